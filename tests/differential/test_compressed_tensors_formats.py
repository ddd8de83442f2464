"""Whole tensors through compressed-tensors' compressors: every format of its that has a codec, written and read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from tests.test_codecs_layouts import packed_int

pytestmark = pytest.mark.heavy

ROWS, COLUMNS = 256, 384
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """A format: compressed-tensors' class and arguments, and the codec that a map declares for it."""

    compressor: str
    arguments: dict[str, Any]
    codec: BlockScaled
    reduces: tuple[int, ...] | None  # the block that a scale is found over; None is the tensor


def scaled(element: str, block: tuple[int | None, int | None], **more: Any) -> BlockScaled:
    return BlockScaled("q", element, block, scale="{key}_scale", **{"packed": "u8", **more})


FP4 = {"payload": "{key}_packed"}
POWERS = {"scale_dtypes": ("u8",), "rule": "even"}
FLOAT8 = {"num_bits": 8, "type": "float"}
CASES = {
    "fp8 a channel": Case(
        "float_quantized", {**FLOAT8, "strategy": "channel"}, scaled("f8e4m3", (1, None)), (1, COLUMNS)
    ),
    "fp8 blocks": Case(
        "float_quantized",
        {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
        scaled("f8e4m3", (128, 128)),
        (128, 128),
    ),
    "fp8 groups": Case(
        "float_quantized",
        {**FLOAT8, "strategy": "group", "group_size": 128},
        scaled("f8e4m3", (1, 128)),
        (1, 128),
    ),
    "int8 a channel": Case(
        "int_quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        scaled("i8", (1, None), packed="i8"),
        (1, COLUMNS),
    ),
    "int4 packed": Case(
        "pack_quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        packed_int("i4", 32),
        (1, 32),
    ),
    "int4 packed, a channel": Case(
        "pack_quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}, packed_int("i4", None), (1, COLUMNS)
    ),
    "int8 packed": Case(
        "pack_quantized",
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64},
        packed_int("i8", 64),
        (1, 64),
    ),
    "mxfp8": Case(
        "mxfp8_quantized",
        {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        scaled("f8e4m3", (1, 32), **POWERS),
        (1, 32),
    ),
    "mxfp4": Case(
        "mxfp4_pack_quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        scaled("f4e2m1", (1, 32), **FP4, **POWERS),
        (1, 32),
    ),
    "nvfp4": Case(
        "nvfp4_pack_quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
        scaled(
            "f4e2m1",
            (1, 16),
            scale_dtypes=("f8e4m3",),
            global_scale="{key}_global_scale",
            global_dims=1,
            global_inverse=True,
            **FP4,
        ),
        (1, 16),
    ),
}


def weights(dtype: torch.dtype) -> Tensor:
    """Random, with ties; the largest is a power of two times NVFP4's 2688, so that its global scale is exact."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    values[::2] = values[::2].mul(8).round().div(8)
    values[0, 0] = 2688 / 512
    return (values + 0.0).to(dtype)  # without -0.0: see test_gallery_their_fp4_loses_the_sign_of_zero


def theirs(case: Case, values: Tensor) -> tuple[Any, Any, dict[str, Tensor]]:
    """The compressor, its scheme, and what it stores."""
    module = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(symmetric=True, **case.arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    height, width = case.reduces or (ROWS, COLUMNS)
    blocks = values.view(ROWS // height, height, COLUMNS // width, width)
    state = {"weight": values}
    if case.codec.storage.global_scale:
        state["weight_global_scale"] = quantization.utils.generate_gparam(values.amin(), values.amax())
    state["weight_scale"], _ = quantization.utils.calculate_qparams(
        blocks.amin((1, 3)), blocks.amax((1, 3)), arguments, global_scale=state.get("weight_global_scale")
    )
    compressor = module.BaseCompressor.get_value_from_registry(case.compressor.replace("_", "-"))
    return compressor, scheme, compressor.compress(state, scheme)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_anew_is_theirs(name: str) -> None:
    case, values = CASES[name], weights(torch.float32)
    _, _, stored = theirs(case, values)
    made = case.codec.encode("weight", values).parts
    assert sorted(made) == sorted(stored)
    for part, tensor in made.items():
        assert tensor.dtype == stored[part].dtype, part
        assert torch.equal(as_bits(tensor.contiguous()), as_bits(stored[part].contiguous())), part


@pytest.mark.parametrize("name", CASES)
def test_what_they_wrote_is_read_alike(name: str) -> None:
    case = CASES[name]
    compressor, scheme, stored = theirs(case, weights(torch.float32))
    values = compressor.decompress(stored, scheme)["weight"]
    mine = case.codec.decode("weight", stored, values.dtype)
    if name == "nvfp4":
        # Their FP4 is unpacked as bf16, and the product with the scales is rounded on its way.
        mine = case.codec.decode("weight", stored, torch.float32)
        torch.testing.assert_close(values.float(), mine, rtol=2.0**-7, atol=0)
        return
    assert torch.equal(as_bits(mine), as_bits(values))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_gallery_their_fp4_loses_the_sign_of_zero(name: str) -> None:
    """Code 8 is written for small negative values, and not for -0.0 itself."""
    case, values = CASES[name], weights(torch.float32)
    values[3, 2:4], values[3, 4:6] = -0.0, -1e-6
    _, _, stored = theirs(case, values)
    made = case.codec.encode("weight", values).parts["weight_packed"]
    assert (made[3, 1:3].tolist(), stored["weight_packed"][3, 1:3].tolist()) == ([0x88, 0x88], [0x00, 0x88])
    assert (made != stored["weight_packed"]).sum() == 1


@pytest.mark.parametrize("name", ["fp8 a channel", "fp8 blocks", "int8 a channel", "int4 packed"])
def test_of_bf16_weights_scales_are_theirs_and_codes_are_nearer(name: str) -> None:
    """They divide in bf16, so that a quotient is rounded to eight bits before it is rounded to a code."""
    case, values = CASES[name], weights(torch.bfloat16)
    form = case.codec.storage
    one = BlockScaled(
        "q",
        form.element,
        form.block,
        scale=form.scale,
        scale_dtypes=("bf16",),
        packed=form.packed,
        payload=form.payload,
        shape=form.shape,
    )
    stored, made = theirs(case, values)[2], one.encode("weight", values).parts
    assert torch.equal(as_bits(made["weight_scale"]), as_bits(stored["weight_scale"]))
    errors = [(one.decode("weight", parts, torch.float32).double() - values).abs() for parts in (made, stored)]
    other = errors[0] != errors[1]
    assert 0 < other.float().mean() < 0.1
    assert (errors[0] <= errors[1]).all()


def test_blocks_at_the_edge_are_theirs() -> None:
    """576 x 200: they pad with zeros, and store the grid of the padded matrix."""
    quantization, case = pytest.importorskip("compressed_tensors.quantization"), CASES["fp8 blocks"]
    values = weights(torch.float32).repeat(3, 1)[:576, :200].contiguous()
    padded = quantization.utils.maybe_pad_tensor_for_block_quant(values, (128, 128))
    blocks = padded.view(5, 128, 2, 128)
    compressor, scheme, _ = theirs(case, weights(torch.float32))
    scale, _ = quantization.utils.calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), scheme.weights)
    stored = compressor.compress({"weight": values, "weight_scale": scale}, scheme)
    made = case.codec.encode("weight", values).parts
    assert torch.equal(as_bits(made["weight_scale"]), as_bits(scale))
    assert torch.equal(as_bits(made["weight"]), as_bits(stored["weight"]))
    expected = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(case.codec.decode("weight", stored, torch.float32), expected)


def test_the_global_scale_of_nvfp4_is_theirs() -> None:
    quantization, case = pytest.importorskip("compressed_tensors.quantization"), CASES["nvfp4"]
    for largest in torch.rand(200, generator=torch.Generator().manual_seed(3)) * 9 + 1e-3:
        values = largest.expand(1, 16).contiguous()
        mine = case.codec.encode("weight", values).parts["weight_global_scale"]
        assert torch.equal(as_bits(mine), as_bits(quantization.utils.generate_gparam(-largest, largest)))


def test_a_scale_of_the_whole_tensor_has_one_dimension() -> None:
    case = Case(
        "float_quantized",
        {**FLOAT8, "strategy": "tensor"},
        scaled("f8e4m3", (None, None), squeeze=True, scale_dims=1),
        None,
    )
    compressor, scheme, stored = theirs(case, weights(torch.float32))
    stored["weight_scale"] = stored["weight_scale"].view(1)
    values = compressor.decompress(stored, scheme)["weight"]
    assert torch.equal(case.codec.decode("weight", stored, torch.float32), values)
