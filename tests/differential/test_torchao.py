"""MX formats, NVFP4, FP8 and int8 against torchao: the same bytes written anew, and the same values read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from tests.test_codecs_layouts import KEY, nvfp4

pytestmark = pytest.mark.heavy

SCALE = f"{KEY}_scale"
ELEMENTS = {"f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "f4e2m1": torch.float4_e2m1fn_x2}
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")


@pytest.fixture(scope="module")
def fp4() -> Any:
    return pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")


def mx_codec(element: str, rule: str = "up") -> BlockScaled:
    return BlockScaled("mx", element, (1, 32), scale=SCALE, scale_dtypes=("f8e8m0",), packed="u8", rule=rule)


def wild_blocks(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Blocks of 32 of every size, whose largest value goes through all mantissas, with powers and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-90, 90, (4096, 1), generator=generator)
    values = torch.randn(4096, 32, generator=generator)
    values[:2048] = values[:2048].mul(4).round().div(4)
    values[:, 0] = 3 + torch.linspace(0, 6, 4096)
    return torch.ldexp(values, sizes).to(dtype)


RULES = [(rule, mode, element) for rule, mode in (("down", "FLOOR"), ("up", "RCEIL")) for element in ELEMENTS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "mode", "element"), [*RULES, ("even", "EVEN", "f4e2m1")])
def test_blocks_written_anew_are_torchaos(rule: str, mode: str, element: str, dtype: torch.dtype, mx: Any) -> None:
    values = wild_blocks(dtype)
    scale, codes = mx.to_mx(values, ELEMENTS[element], 32, mx.ScaleCalculationMode[mode])
    made = mx_codec(element, rule).encode(KEY, values).parts
    assert torch.equal(as_bits(made[SCALE]).view(-1), as_bits(scale).view(-1))
    assert torch.equal(as_bits(made[KEY]), codes.view(torch.uint8).view(made[KEY].shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_byte_under_every_scale_is_read_alike(element: str, dtype: torch.dtype, mx: Any) -> None:
    codes = ALL_BYTES.view(1, 256).expand(256, 256).contiguous()
    blocks = 256 * (2 if element == "f4e2m1" else 1) // 32
    scale = ALL_BYTES.view(256, 1).expand(256, blocks).contiguous().view(torch.float8_e8m0fnu)
    stored = codes if element == "f4e2m1" else codes.view(ELEMENTS[element])
    mine = mx_codec(element).decode(KEY, {KEY: stored, SCALE: scale}, dtype)
    theirs = mx.to_dtype(stored, scale, ELEMENTS[element], 32, dtype)
    assert torch.equal(mine.isnan(), theirs.isnan())
    numbers = ~mine.isnan()
    assert torch.equal(as_bits(mine)[numbers], as_bits(theirs)[numbers])


def test_even_is_a_rule_of_its_own_for_eight_bits(mx: Any) -> None:
    """compressed-tensors rounds the largest magnitude to FP4's two bits of MXFP8 too, torchao to the element's."""
    values = torch.zeros(3, 32)
    values[:, 0] = torch.tensor([447.0, 448.0, 495.0])
    theirs = mx.to_mx(values, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.EVEN)[0].view(torch.uint8)
    mine = mx_codec("f8e4m3", "even").encode(KEY, values).parts[SCALE].view(torch.uint8)
    assert mine.flatten().tolist() == [127, 128, 128]
    assert theirs.flatten().tolist() == [127, 127, 127]


def test_a_block_of_zeros_has_a_scale_of_one_here_and_the_least_there(mx: Any) -> None:
    zeros = torch.zeros(1, 32)
    for rule, mode, byte in (("up", "RCEIL", 127), ("down", "FLOOR", 0)):
        scale, codes = mx.to_mx(zeros, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode[mode])
        made = mx_codec("f8e4m3", rule).encode(KEY, zeros).parts
        assert (int(made[SCALE].view(torch.uint8)), int(scale.view(torch.uint8))) == (byte, 0)
        assert torch.equal(as_bits(made[KEY]), as_bits(codes))


def test_gallery_torchao_halves_or_flattens_the_smallest_blocks(mx: Any) -> None:
    """Under byte 0, which means 2**-127, it divides by 2**-126 (floor) or not at all (rceil)."""
    values = torch.full((1, 32), 2.0**-127)
    mine = mx_codec("f4e2m1", "down")
    assert torch.equal(mine.decode(KEY, mine.encode(KEY, values).parts, torch.float32), values)
    scale, codes = mx.to_mx(values, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    assert torch.equal(mx.to_dtype(codes, scale, torch.float4_e2m1fn_x2, 32, torch.float32), values / 2)
    scale, codes = mx.to_mx(values, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.RCEIL)
    assert not mx.to_dtype(codes, scale, torch.float4_e2m1fn_x2, 32, torch.float32).any()


def test_gallery_torchao_cuts_off_what_is_one_bit_over_a_power(mx: Any) -> None:
    """Its log2 is of float32: 448 * (2**10 + 2**-13) is over a power of two, and `rceil` rounds it down."""
    values = torch.zeros(1, 32)
    values[0, 0] = torch.nextafter(torch.tensor(448.0 * 2**10), torch.tensor(torch.inf))
    theirs = mx.to_mx(values, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)[0]
    mine = mx_codec("f8e4m3").encode(KEY, values).parts[SCALE]
    assert (int(mine.view(torch.uint8)), int(theirs.view(torch.uint8))) == (138, 137)


def test_a_nan_spoils_its_block_in_torchao_alone(mx: Any) -> None:
    values = torch.ones(1, 32)
    values[0, 3] = torch.nan
    scale, _ = mx.to_mx(values, torch.float8_e4m3fn, 32)
    one = mx_codec("f8e4m3", "down")
    mine = one.decode(KEY, one.encode(KEY, values).parts, torch.float32)
    assert int(scale.view(torch.uint8)) == 255
    assert mine.isnan().nonzero().tolist() == [[0, 3]]
    assert mine.nan_to_num(1.0).eq(1).all()


# --- NVFP4 ---


def theirs_nvfp4(fp4: Any, values: Tensor) -> dict[str, Tensor]:
    whole = fp4.per_tensor_amax_to_scale(values.float().abs().max())
    scale, codes = fp4.nvfp4_quantize(values, 16, whole)
    return {KEY: codes.view(torch.uint8), SCALE: scale.view(values.shape[0], -1), f"{KEY}_scale_2": whole}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nvfp4_byte_under_every_scale_is_read_alike(dtype: torch.dtype, fp4: Any) -> None:
    for whole in (1.0, 3.1e-5, 2.0**-100, 7e30):
        scale = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F].view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
        parts = {KEY: ALL_BYTES.repeat(len(scale), 1), SCALE: scale, f"{KEY}_scale_2": torch.tensor(whole)}
        tensor = fp4.NVFP4Tensor(parts[KEY], scale, 16, dtype, per_tensor_scale=parts[f"{KEY}_scale_2"])
        theirs = tensor.dequantize(dtype)
        assert torch.equal(as_bits(nvfp4().decode(KEY, parts, dtype)), as_bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_written_anew_where_scales_are_powers_is_torchaos(dtype: torch.dtype, fp4: Any) -> None:
    """Then its product with a reciprocal is the quotient that the format speaks of."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-24, 25, (512, 64), generator=generator).float().div(4).view(512, 4, 16)
    values[..., 0] = 6
    values = torch.ldexp(values, torch.randint(-3, 4, (512, 4, 1), generator=generator)).view(512, 64).to(dtype)
    values[0, 0] = 6 * 448 / 4
    theirs, mine = theirs_nvfp4(fp4, values), nvfp4().encode(KEY, values).parts
    for name in theirs:
        assert torch.equal(as_bits(mine[name]), as_bits(theirs[name])), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_written_anew_is_torchaos_but_for_its_reciprocal(dtype: torch.dtype, fp4: Any) -> None:
    """Scales are the same; codes differ where torchao's product with 1 / scale falls over a tie, and nowhere else."""
    values = torch.randn(1024, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    values[0, 0] = 2688 / 512  # a power of two as the global scale: others are rounded once too often here, see below
    theirs, mine = theirs_nvfp4(fp4, values), nvfp4().encode(KEY, values).parts
    for name in (SCALE, f"{KEY}_scale_2"):
        assert torch.equal(as_bits(mine[name]), as_bits(theirs[name])), name
    other = mine[KEY] != theirs[KEY]
    assert other.float().mean() < 1e-2
    factors = (theirs[SCALE].float() * theirs[f"{KEY}_scale_2"]).double().repeat_interleave(16, 1)
    exact = (values.double() / factors).abs().view(1024, -1, 2)[other]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    nearest = (exact[..., None] - ties).abs().amin(-1) / exact
    assert (nearest.amin(-1) < 2.0**-22).all()


def test_the_global_scale_of_nvfp4_is_torchaos(fp4: Any) -> None:
    for largest in torch.rand(200, generator=torch.Generator().manual_seed(3)) * 9 + 1e-3:
        values = largest.expand(1, 16).contiguous()
        mine = nvfp4().encode(KEY, values).parts[f"{KEY}_scale_2"]
        assert torch.equal(as_bits(mine), as_bits(fp4.per_tensor_amax_to_scale(largest)))


# --- FP8 and integers under float scales ---

GRIDS = {"a tensor": (None, None), "a row": (1, None), "blocks": (128, 128), "groups": (1, 128)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", ["f8e4m3", "f8e5m2"])
@pytest.mark.parametrize("grid", GRIDS)
def test_fp8_is_torchaos(grid: str, element: str, dtype: torch.dtype) -> None:
    """Scales of bf16 weights it divides in bf16; here they are float32 quotients as they are of float32 weights."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    values = torch.randn(256, 384, generator=torch.Generator().manual_seed(4)).to(dtype)
    block = [size or whole for size, whole in zip(GRIDS[grid], values.shape, strict=True)]
    scale = primitives._choose_scale_float8(values.float(), block, ELEMENTS[element])
    codes = primitives._quantize_affine_float8(values, scale, ELEMENTS[element])
    one = BlockScaled("fp8", element, GRIDS[grid], scale=SCALE)
    made = one.encode(KEY, values).parts
    assert torch.equal(as_bits(made[SCALE]), as_bits(scale))
    assert torch.equal(as_bits(made[KEY]), as_bits(codes))
    theirs = primitives._dequantize_affine_float8(codes, scale, dtype)
    assert torch.equal(as_bits(one.decode(KEY, made, dtype)), as_bits(theirs))


def test_int8_a_row_is_torchaos_under_its_scales() -> None:
    """Its own scales are amax / 127.5, at least 2**-23; it multiplies with their reciprocals."""
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.int8.int8_tensor")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    values = torch.randn(128, 256, generator=torch.Generator().manual_seed(5))
    theirs = module.Int8Tensor.from_hp(values, granularity.PerRow())
    one = BlockScaled("int8", "i8", (1, None), scale=SCALE)
    parts = {KEY: theirs.qdata, SCALE: theirs.scale}
    assert torch.equal(as_bits(one.decode(KEY, parts, torch.float32)), as_bits(theirs.dequantize(torch.float32)))
    made = one.encode(KEY, values).parts
    assert torch.equal(as_bits(made[SCALE]), as_bits(theirs.scale))
    other = made[KEY] != theirs.qdata
    quotient = (values.double() / theirs.scale.double())[other]
    assert other.float().mean() < 1e-3
    assert ((quotient - quotient.floor() - 0.5).abs() < 2.0**-16).all()
