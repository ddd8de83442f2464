"""Packed integers, NVFP4 and MXFP4 against compressed-tensors: the same bytes read to the same values, and written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_codecs_layouts import KEY, nvfp4, packed_int

pytestmark = pytest.mark.heavy

ROWS, COLUMNS = 33, 192


@pytest.fixture(scope="module")
def packing() -> Any:
    return pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


@pytest.fixture(scope="module")
def quantization() -> Any:
    return pytest.importorskip("compressed_tensors.quantization")


@pytest.fixture(scope="module")
def fp4() -> Any:
    return pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_read_alike(bits: int, packing: Any) -> None:
    codec = packed_int(f"i{bits}", 32)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (ROWS, COLUMNS), dtype=torch.int8)
    scale = torch.rand(ROWS, COLUMNS // 32) + 0.1
    packed = packing.pack_to_int32(codes, bits)
    parts = {f"{KEY}_packed": packed, f"{KEY}_scale": scale, f"{KEY}_shape": torch.tensor([ROWS, COLUMNS])}
    expected = codes.float() * scale.repeat_interleave(32, 1)
    assert torch.equal(codec.decode(KEY, parts, torch.float32), expected)
    assert torch.equal(packing.unpack_from_int32(packed, bits, torch.Size([ROWS, COLUMNS])), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_written_anew_are_theirs(bits: int, packing: Any, quantization: Any) -> None:
    values = torch.randn(ROWS, COLUMNS)
    made = packed_int(f"i{bits}", 32).encode(KEY, values).parts
    groups = values.view(ROWS, -1, 32)
    arguments = quantization.QuantizationArgs(num_bits=bits, group_size=32, strategy="group", symmetric=True)
    scale, _ = quantization.utils.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    assert torch.equal(made[f"{KEY}_scale"], scale)
    quotient = (groups / scale[..., None]).clamp(-(1 << bits - 1), (1 << bits - 1) - 1).round()
    assert torch.equal(made[f"{KEY}_packed"], packing.pack_to_int32(quotient.view(ROWS, COLUMNS).to(torch.int8), bits))


def test_nvfp4_is_read_alike(fp4: Any) -> None:
    codec = nvfp4(global_inverse=True, global_dims=1)
    made = codec.encode(KEY, torch.randn(ROWS, COLUMNS)).parts
    unpacked = fp4.unpack_fp4_from_uint8(made[KEY], ROWS, COLUMNS, dtype=torch.float32)
    scale = made[f"{KEY}_scale"].float() / made[f"{KEY}_scale_2"]
    expected = unpacked * scale.repeat_interleave(16, 1)
    assert torch.equal(codec.decode(KEY, made, torch.float32), expected)
