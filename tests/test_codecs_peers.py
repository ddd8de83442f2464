"""Codecs against NeMo Automodel and transformers where those are right, and the bugs of theirs by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.errors import ConversionError

FP8 = BlockScaled("fp8", "f8e4m3", (128, 128), scale="{key}_scale_inv")
FP4 = BlockScaled("fp4", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",))
KEY = "layers.0.w1.weight"


def random_fp8(rows: int, columns: int) -> Tensor:
    codes = torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)


def fp8_parts(rows: int, columns: int) -> dict[str, Tensor]:
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(5)) * 1e-3
    return {KEY: random_fp8(rows, columns), f"{KEY}_scale_inv": scales}


def fp4_parts(rows: int, columns: int, codes: Tensor | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    powers = torch.randint(100, 130, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    if codes is None:
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    return {KEY: codes.view(torch.int8), "layers.0.w1.scale": powers.view(torch.float8_e8m0fnu)}


def nemo_v3() -> Any:
    return pytest.importorskip("nemo_automodel.components.models.deepseek_v3.state_dict_adapter")


def nemo_fp4(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    module = pytest.importorskip("nemo_automodel.components.models.deepseek_v4.state_dict_adapter")
    decoded: Tensor = module.DeepSeekV4StateDictAdapter._dequantize_expert_fp4(*parts.values(), dtype)
    return decoded


def transformers_decode(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    decoded: Tensor = module.Fp8Dequantize(None)._dequantize_one(*parts.values(), output_dtype=dtype)
    return decoded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (576, 300), (130, 7), (256, 512)])
def test_fp8_is_nemos(rows: int, columns: int, dtype: torch.dtype) -> None:
    parts = fp8_parts(rows, columns)
    theirs = nemo_v3().dequantize_from_fp8(*parts.values(), dtype=dtype)
    assert torch.equal(as_bits(FP8.decode(KEY, parts, dtype)), as_bits(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_is_transformers_where_blocks_are_whole(dtype: torch.dtype) -> None:
    parts = fp8_parts(256, 384)
    assert torch.equal(as_bits(FP8.decode(KEY, parts, dtype)), as_bits(transformers_decode(parts, dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp4_is_transformers(dtype: torch.dtype) -> None:
    parts = fp4_parts(48, 96)
    assert torch.equal(as_bits(FP4.decode(KEY, parts, dtype)), as_bits(transformers_decode(parts, dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp4_is_nemos_but_for_negative_zero(dtype: torch.dtype) -> None:
    parts = fp4_parts(48, 96)
    mine, theirs = FP4.decode(KEY, parts, dtype), nemo_fp4(parts, dtype)
    assert torch.equal(mine, theirs)
    assert torch.equal(as_bits(mine)[mine != 0], as_bits(theirs)[mine != 0])


def test_gallery_nemo_fp4_code_8_loses_its_sign() -> None:
    parts = fp4_parts(1, 32, torch.full((1, 16), 0x88, dtype=torch.uint8))
    assert not nemo_fp4(parts, torch.bfloat16).signbit().any()
    assert FP4.decode(KEY, parts).signbit().all()
    back = FP4.encode(KEY, FP4.decode(KEY, parts), FP4.keep(KEY, parts))
    assert torch.equal(back.parts[KEY], parts[KEY])


def test_gallery_nemo_e8m0_bytes_0_and_255() -> None:
    parts = fp4_parts(2, 32, torch.full((2, 16), 0x22, dtype=torch.uint8))
    parts["layers.0.w1.scale"] = torch.tensor([[0], [255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    theirs, mine = nemo_fp4(parts, torch.float32), FP4.decode(KEY, parts, torch.float32)
    assert theirs[:, 0].tolist() == [0.0, float("inf")]
    assert mine[0].tolist() == [2.0**-127] * 32
    assert mine[1].isnan().all()


def test_gallery_nemo_row_shards_take_scales_of_other_rows() -> None:
    """384 rows over two ranks: with the shard's own blocks unaligned, slicing scales per rank is wrong for 64 rows."""
    parts = fp8_parts(384, 128)
    parts[f"{KEY}_scale_inv"] = torch.tensor([[1.0], [2.0], [4.0]])
    whole = FP8.decode(KEY, parts, torch.float32)
    assert torch.equal(whole, parts[KEY].float() * torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(128)[:, None])
    shard = {KEY: parts[KEY][192:], f"{KEY}_scale_inv": parts[f"{KEY}_scale_inv"][1:]}
    sliced = nemo_v3().dequantize_from_fp8(*shard.values(), dtype=torch.float32)
    wrong = (sliced != whole[192:]).any(1)
    assert wrong.sum() == 64
    assert not (sliced[:64] != whole[192:256]).any()
    # Here a shard is cut from the decoded tensor; blocks of its own start at its own first row, never mid-block.


def test_gallery_nemo_accepts_scales_that_are_too_large() -> None:
    parts = fp8_parts(256, 128)
    parts[f"{KEY}_scale_inv"] = torch.ones(2, 4)
    nemo_v3().dequantize_from_fp8(*parts.values())
    with pytest.raises(ConversionError, match=rf"{KEY}_scale_inv has shape \[2, 4\]") as caught:
        FP8.decode(KEY, parts)
    assert caught.value.code == "R606"


def test_gallery_a_companion_cannot_be_dropped_apart_from_its_payload() -> None:
    """qwen3_moe's mixin drops `_scale_inv` and leaves the weight 100 times off."""
    parts = fp8_parts(128, 128)
    names = {KEY}.__contains__
    assert FP8.claims(KEY, torch.float8_e4m3fn)
    assert not FP8.recognises(KEY, torch.float8_e4m3fn, names)
    with pytest.raises(ConversionError, match=f"{KEY}_scale_inv is missing") as caught:
        FP8.decode(KEY, {KEY: parts[KEY]})
    assert caught.value.code == "R605"


def test_gallery_nemo_export_writes_scales_of_one() -> None:
    values = torch.randn(128, 128, generator=torch.Generator().manual_seed(8)) * 5e-4
    theirs = values.to(torch.float8_e4m3fn).float()
    mine = FP8.decode(KEY, FP8.encode(KEY, values).parts, torch.float32)
    error = [float((one - values).norm() / values.norm()) for one in (theirs, mine)]
    assert error[0] > 0.5
    assert error[1] < 0.03


def test_fp8_codes_are_transformers_where_its_scales_are_exact() -> None:
    """It multiplies by 448 / amax, here a power of two, and stores the inverse."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class Quantizer:
        class quantization_config:  # noqa: N801
            scale_fmt = "float"
            weight_block_size = (128, 128)

    values = torch.randn(256, 128, generator=torch.Generator().manual_seed(9)).clamp(-3.5, 3.5) * 2.0**-3
    values[0, 0] = values[128, 0] = 448 * 2.0**-10
    convert = module.Fp8Quantize(Quantizer())
    theirs = convert._quantize_one("w.weight", values)
    mine = BlockScaled("q", "f8e4m3", (128, 128), scale="{key}_scale_inv").encode("w.weight", values).parts
    assert torch.equal(theirs["w.weight_scale_inv"], mine["w.weight_scale_inv"])
    assert torch.equal(as_bits(theirs["w.weight"]), as_bits(mine["w.weight"]))
