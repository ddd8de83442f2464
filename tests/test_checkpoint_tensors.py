"""Lazy tensors: the bytes of the file, mapped."""

from __future__ import annotations

import errno
import json
import mmap
import os
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES, dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.headers import BITS
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.language.diagnostics import MapError

LISTINGS = Path(__file__).parent / "data" / "listings"


def write(path: Path, *tensors: tuple[str, str, list[int], bytes]) -> None:
    """A safetensors file with these tensors in this order, aligned or not."""
    header, offset = {}, 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors))


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_table() -> None:
    assert torch_dtype("BF16") is torch.bfloat16
    assert dtype_name(torch.float8_e4m3fn) == "F8_E4M3"
    for name, dtype in TORCH_DTYPES.items():
        assert DTYPE_NAMES[dtype] == name
        assert dtype.itemsize == max(BITS[name] // 8, 1)
    with pytest.raises(MapError, match="no tensor of dtype F6_E2M3: torch has no such dtype"):
        torch_dtype("F6_E2M3")
    with pytest.raises(MapError, match="no tensor of dtype float32: expected one of BOOL"):
        torch_dtype("float32")
    with pytest.raises(MapError, match=r"safetensors has no dtype for torch\.complex128"):
        dtype_name(torch.complex128)
    assert torch_shape("F4", (3, 8)) == (3, 4)
    with pytest.raises(MapError, match="in pairs along the last axis"):
        torch_shape("F4", (2, 3))


@settings(deadline=None)
@given(st.data())
def test_any_bits_of_any_dtype(data: st.DataObject) -> None:
    """NaN payloads, -0.0, denormals, bools that are neither 0 nor 1; aligned and unaligned."""
    dtypes = data.draw(st.lists(st.sampled_from(sorted(TORCH_DTYPES)), min_size=1, max_size=6))
    tensors = []
    for number, dtype in enumerate(dtypes):
        shape = (
            data.draw(st.lists(st.integers(0, 3), max_size=3)) if dtype != "F4" else [data.draw(st.integers(0, 2)), 6]
        )
        size = torch.Size(torch_shape(dtype, tuple(shape))).numel() * torch_dtype(dtype).itemsize
        tensors.append((str(number), dtype, shape, data.draw(st.binary(min_size=size, max_size=size))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write(path, *tensors)
        state = LazyState(open_checkpoint(path))
        for name, dtype, shape, expected in tensors:
            tensor = state[name]
            assert tensor.dtype is torch_dtype(dtype)
            assert stored_shape(tensor) == tuple(shape)
            assert raw(tensor) == expected
            meta = state.meta()[name]
            assert (meta.device.type, meta.dtype, meta.shape) == ("meta", tensor.dtype, tensor.shape)


def test_agrees_with_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {name: torch.empty(3, 4, dtype=dtype) for name, dtype in TORCH_DTYPES.items()}
    safetensors.torch.save_file(tensors, path)
    state = LazyState(open_checkpoint(path))
    assert set(state) == set(tensors)
    assert len(state) == len(tensors)
    with safetensors.safe_open(path, "pt") as reference:
        for name in tensors:
            expected = reference.get_tensor(name)
            assert (state[name].dtype, state[name].shape) == (expected.dtype, expected.shape)
            assert raw(state[name]) == raw(expected)


def test_mapped_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, ("pad", "U8", [1], b"\1"), ("odd", "F32", [2], bytes(8)), ("a", "U8", [3], b"abc"))
    state = LazyState(open_checkpoint(path))
    assert state["a"].untyped_storage().data_ptr() == state["a"].untyped_storage().data_ptr()
    assert state["a"].untyped_storage().nbytes() == path.stat().st_size
    assert state["odd"].untyped_storage().nbytes() == 8  # unaligned: a copy
    state["a"].fill_(0)
    assert path.read_bytes().endswith(b"abc")  # private pages
    kept = state["a"]
    state.close()
    assert raw(kept) == b"\0\0\0"
    assert raw(state["a"]) == b"abc"


def test_reading_a_huge_sparse_file_is_instant(tmp_path: Path) -> None:
    path, size = tmp_path / "x.safetensors", 2**40
    text = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + size)
        except OSError:
            pytest.skip("no sparse files here")
    tensor = LazyState(open_checkpoint(path))["a"]
    assert tensor.nbytes == size
    assert tensor[-1].item() == 0.0


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EACCES])
def test_without_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "x.safetensors"
    write(path, ("pad", "U8", [1], b"\1"), ("a", "F32", [2], bytes(range(8))))
    monkeypatch.setattr(mmap, "mmap", refuse)
    state = LazyState(open_checkpoint(path))
    if number == errno.ENOMEM:
        assert raw(state["a"]) == bytes(range(8))
    else:
        with pytest.raises(MapError, match="cannot map the file: permission denied"):
            state["a"]


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, ("a", "U8", [3], b"abc"))
    checkpoint = open_checkpoint(path)
    os.truncate(path, 20)
    with pytest.raises(MapError, match="tensor `a` ends at byte"):
        LazyState(checkpoint)["a"]
    path.unlink()
    with pytest.raises(MapError, match="cannot map the file"):
        LazyState(checkpoint)["a"]


def test_file_cut_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, ("a", "U8", [3], b"abc"), ("b", "U8", [2], b"de"))
    state = LazyState(open_checkpoint(path))
    assert raw(state["a"]) == b"abc"
    os.truncate(path, path.stat().st_size - 1)  # the rest of a page would be read as zeros
    with pytest.raises(MapError, match="tensor `b` ends at byte"):
        state["b"]
    path.unlink()  # the map holds it
    assert raw(state["a"]) == b"abc"


def test_listing_has_meta_tensors_only() -> None:
    state = LazyState(open_checkpoint(LISTINGS / "deepseek_v4_flash.list"))
    with pytest.raises(MapError, match=r"tensor `embed\.weight` has no data here"):
        state["embed.weight"]
    assert "embed.weight" in state
    assert state.meta()["layers.0.ffn.experts.7.w1.scale"].dtype is torch.float8_e8m0fnu
    assert sum(tensor.numel() for tensor in state.meta().values()) == 158_069_433_298
    with pytest.raises(KeyError):
        state["absent"]


def test_dtypes_that_torch_lacks_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, ("a", "F6_E2M3", [4], bytes(3)), ("b", "F4", [2, 3], bytes(3)))
    state = LazyState(open_checkpoint(path))
    with pytest.raises(MapError, match=r"C504.*tensor `a`: there is no tensor of dtype F6_E2M3"):
        state["a"]
    with pytest.raises(MapError, match=r"C503.*tensor `b`: torch holds F4 in pairs"):
        state.meta()["b"]
    with pytest.raises(ValueError, match="expected 'cpu' or 'meta'"):
        LazyState(state.checkpoint, device="cuda")
