"""gpt-oss' MXFP4 and fine-grained FP8 against transformers' own functions, and where those are not followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from tests.test_codecs_layouts import KEY, MXFP4

pytestmark = pytest.mark.heavy

BLOCKS, SCALES, INVERSE = f"{KEY}_blocks", f"{KEY}_scales", f"{KEY}_scale_inv"
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def mxfp4() -> Any:
    return pytest.importorskip("transformers.integrations.mxfp4")


@pytest.fixture(scope="module")
def fp8() -> Any:
    return pytest.importorskip("transformers.integrations.finegrained_fp8")


def every_block() -> dict[str, Tensor]:
    """All 256 bytes under all 256 scales: as 256 rows of 16 blocks of 16 bytes, of one expert."""
    blocks = ALL_BYTES.view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    return {BLOCKS: blocks, SCALES: ALL_BYTES.view(1, 256, 1).expand(1, 256, 16).contiguous()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_gpt_oss_is_read_alike(dtype: torch.dtype, mxfp4: Any) -> None:
    """But for byte 255, see below; transformers hands the experts transposed, `[e, in, out]`."""
    parts = every_block()
    theirs = mxfp4.convert_moe_packed_tensors(parts[BLOCKS], parts[SCALES], dtype=dtype).transpose(1, 2)
    mine = MXFP4.decode(KEY, parts, dtype)
    numbers = slice(None), slice(0, 255)
    assert torch.equal(as_bits(mine[numbers]), as_bits(theirs[numbers].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gallery_transformers_reads_the_nan_of_e8m0_as_a_number(dtype: torch.dtype, mxfp4: Any) -> None:
    """Byte 255 is NaN in the OCP specification; as 2**128 it makes infinities, and of zeros and halves numbers."""
    parts = every_block()
    theirs = mxfp4.convert_moe_packed_tensors(parts[BLOCKS], parts[SCALES], dtype=dtype).transpose(1, 2)
    assert MXFP4.decode(KEY, parts, dtype)[0, 255].isnan().all()
    assert not theirs[0, 255].isnan().any()
    assert sorted(set(theirs[0, 255].abs().tolist())) == [0.0, 2.0**127, torch.inf]


class Settings:
    """What `Fp8Quantize` asks of a quantiser."""

    def __init__(self, block: tuple[int, int] | None, scale_fmt: str) -> None:
        self.quantization_config = self
        self.weight_block_size, self.scale_fmt = block, scale_fmt


def weights(dtype: torch.dtype) -> Tensor:
    values = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(1))
    values *= torch.logspace(-9, 9, 256)[:, None]
    values[0, :128, :128] = 0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(128, 128), None])
def test_fp8_under_powers_is_transformers(block: tuple[int, int] | None, dtype: torch.dtype, fp8: Any) -> None:
    values = weights(dtype)
    theirs = fp8.Fp8Quantize(Settings(block, "ue8m0"))._quantize_one("a.weight", values)
    one = BlockScaled("fp8", "f8e4m3", block or (None, None), scale="{key}_scale_inv", scale_dtypes=("f8e8m0",))
    made = one.encode("a.weight", values).parts
    assert torch.equal(as_bits(made["a.weight_scale_inv"]), as_bits(theirs["a.weight_scale_inv"]))
    assert torch.equal(as_bits(made["a.weight"]), as_bits(theirs["a.weight"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_under_float_scales_is_transformers_but_for_its_reciprocals(dtype: torch.dtype, fp8: Any) -> None:
    """It stores 1 / (448 / amax), rounded twice, and multiplies with 448 / amax: DeepSeek divides, as done here."""
    values = weights(dtype)
    theirs = fp8.Fp8Quantize(Settings((128, 128), "float"))._quantize_one("a.weight", values)
    one = BlockScaled("fp8", "f8e4m3", (128, 128), scale="{key}_scale_inv")
    made = one.encode("a.weight", values).parts
    steps = as_bits(made["a.weight_scale_inv"]) - as_bits(theirs["a.weight_scale_inv"])
    assert 1 <= steps.abs().max() <= 2
    assert (made["a.weight"].view(torch.uint8) != theirs["a.weight"].view(torch.uint8)).float().mean() < 1e-4
    largest = values.float().view(3, 2, 128, 3, 128).abs().amax((2, 4))
    exact = torch.where(largest > 0, largest.double() / 448, 1.0).float()
    assert torch.equal(made["a.weight_scale_inv"], exact)


def test_fp8_under_their_parts_is_read_alike(fp8: Any) -> None:
    """What transformers wrote, in every spelling of scales that it reads."""
    for scale_dtype in ("f32", "f8e8m0", "bf16"):
        fmt = "ue8m0" if scale_dtype == "f8e8m0" else "float"
        parts = fp8.Fp8Quantize(Settings((128, 128), fmt))._quantize_one(KEY, weights(torch.float32)[1])
        if scale_dtype == "bf16":
            parts[INVERSE] = parts[INVERSE].bfloat16()
        one = BlockScaled("fp8", "f8e4m3", (128, 128), scale="{key}_scale_inv", scale_dtypes=(scale_dtype,))
        for dtype in DTYPES:
            theirs = fp8.Fp8Dequantize(None)._dequantize_one(parts[KEY], parts[INVERSE], output_dtype=dtype)
            assert torch.equal(as_bits(one.decode(KEY, parts, dtype)), as_bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", [torch.uint8, torch.float8_e8m0fnu])
def test_every_fp8_byte_under_every_power_is_read_alike(spelling: torch.dtype, dtype: torch.dtype, fp8: Any) -> None:
    codes = ALL_BYTES.view(1, 256).expand(256, 256).contiguous().view(torch.float8_e4m3fn)
    scale = ALL_BYTES.view(256, 1).expand(256, 8).contiguous().view(spelling)
    one = BlockScaled("mx", "f8e4m3", (1, 32), scale="{key}_scale_inv", scale_dtypes=("u8", "f8e8m0"))
    mine = one.decode(KEY, {KEY: codes, INVERSE: scale}, dtype)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=dtype)
    rows = slice(0, 255) if spelling == torch.uint8 else slice(None)  # of u8 it reads 255 as a number
    assert torch.equal(mine[rows].isnan(), theirs[rows].isnan())
    numbers = ~mine[rows].isnan()
    assert torch.equal(as_bits(mine[rows])[numbers], as_bits(theirs[rows])[numbers])
    assert mine[255].isnan().all()


def test_gallery_transformers_leaves_what_is_not_whole_blocks_unquantised(fp8: Any) -> None:
    """DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows; transformers stores it in bf16, and cannot read the release."""
    values = torch.randn(576, 256)
    left = fp8.Fp8Quantize(Settings((128, 128), "float"))._quantize_one(KEY, values)
    assert list(left) == [KEY]
    assert left[KEY] is values
    one = BlockScaled("fp8", "f8e4m3", (128, 128), scale="{key}_scale_inv")
    made = one.encode(KEY, values).parts
    assert made[INVERSE].shape == (5, 2)
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        fp8.Fp8Dequantize(None)._dequantize_one(made[KEY], made[INVERSE])
