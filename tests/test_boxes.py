"""Boxes of stored tensors: just their bytes are read and written, whatever shape, dtype and file."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.checkpoint.boxes import _GAP_BYTES, BoxReader, BoxWriter
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dtypes import TORCH_DTYPES, torch_shape
from mapdsl.checkpoint.headers import BITS, StoredTensor
from mapdsl.language.diagnostics import MapError
from tests.helpers.links import boxes

DTYPES = ["F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"]
FILE = "model.safetensors"

shapes = st.lists(st.integers(0, 5), max_size=4)


def stored_file(folder: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> dict[str, bytes]:
    """A file of random bytes; those of each tensor."""
    header, data, bytes_ = {}, {}, b""
    for name, (dtype, shape) in sorted(tensors.items()):
        data[name] = os.urandom(math.prod(shape) * BITS[dtype] // 8)
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(bytes_), len(bytes_) + len(data[name])]
        }  # fmt: skip
        bytes_ += data[name]
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes_)
    return data


def sizes_of(dtype: str, shape: list[int]) -> tuple[int, ...]:
    """The shape that torch gives."""
    return torch_shape(dtype, tuple(shape))


@st.composite
def forms(draw: st.DrawFn) -> tuple[str, list[int]]:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    return dtype, [*shape, 2 * draw(st.integers(0, 3))] if dtype == "F4" else shape


def part(data: bytes, dtype: str, shape: list[int], box: Any) -> bytes:
    """The bytes of a box, one element after the other."""
    size, sizes = TORCH_DTYPES[dtype].itemsize, sizes_of(dtype, shape)
    numbers = torch.arange(math.prod(sizes)).reshape(sizes)[tuple(slice(*span) for span in box)]
    return b"".join(data[n * size : (n + 1) * size] for n in numbers.reshape(-1).tolist())


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


# --- reading ---


@given(forms(), st.data())
def test_a_box_has_its_bytes(tmp_path_factory: pytest.TempPathFactory, form: Any, data: st.DataObject) -> None:
    """Also of scalars, of empty boxes, and of elements in pairs."""
    dtype, shape = form
    folder = tmp_path_factory.mktemp("boxes")
    stored = stored_file(folder, {"a": ("U8", [3]), "w": form, "z": ("F32", [2])})
    box = data.draw(boxes(sizes_of(dtype, shape)))
    with BoxReader(open_checkpoint(folder)) as reader:
        found = reader.read("w", box)
        assert found.dtype == TORCH_DTYPES[dtype]
        assert tuple(found.shape) == tuple(end - begin for begin, end in box)
        assert found.is_contiguous()
        assert as_bytes(found) == part(stored["w"], dtype, shape, box)
        assert found.nbytes <= reader.read_bytes <= span(sizes_of(dtype, shape), box, found.itemsize)


def span(sizes: tuple[int, ...], box: Any, itemsize: int) -> int:
    """From the first byte of a box to its last."""
    if any(begin == end for begin, end in box):
        return 0
    steps = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    return itemsize * (1 + sum((end - 1 - begin) * step for (begin, end), step in zip(box, steps, strict=True)))


@pytest.mark.parametrize("width", [10, 1030, 5000])
def test_no_more_is_read_than_small_gaps(tmp_path: Path, width: int) -> None:
    """A column of a narrow matrix is one read, of a wide one as many as rows."""
    stored = stored_file(tmp_path, {"w": ("F32", [2, 7, width])})
    box = ((0, 2), (1, 6), (3, 9))
    with BoxReader(open_checkpoint(tmp_path)) as reader:
        assert as_bytes(reader.read("w", box)) == part(stored["w"], "F32", [2, 7, width], box)
        gap = 4 * (width - 6)
        assert reader.read_bytes == 2 * (5 * 24 + 4 * (gap if gap <= _GAP_BYTES else 0))


def test_what_is_whole_is_one_read(tmp_path: Path) -> None:
    """Rows of whole rows are read at once, and counted together with what was read before."""
    stored_file(tmp_path, {"w": ("BF16", [6, 4, 5])})
    with BoxReader(open_checkpoint(tmp_path)) as reader:
        reader.read("w", ((2, 5), (0, 4), (0, 5)))
        assert reader.read_bytes == 3 * 4 * 5 * 2
        reader.read("w", ((0, 6), (0, 4), (0, 5)))
        assert reader.read_bytes == 9 * 4 * 5 * 2
        reader.read("w", ((0, 6), (2, 2), (0, 5)))
        assert reader.read_bytes == 9 * 4 * 5 * 2


@pytest.mark.parametrize("way", ["plain", "transposed", "every other"])
def test_boxes_of_torch_files(tmp_path: Path, way: str) -> None:
    """Tensors in them may be views of others."""
    whole = torch.arange(60.0).reshape(5, 12)
    tensor = {"plain": whole, "transposed": whole.T, "every other": whole[:, ::2]}[way]
    torch.save({"w": tensor, "s": torch.tensor(2.5)}, tmp_path / "pytorch_model.bin")
    with BoxReader(open_checkpoint(tmp_path)) as reader:
        found = reader.read("w", ((1, 4), (2, 5)))
        assert torch.equal(found, tensor[1:4, 2:5])
        assert reader.read("s", ()).item() == 2.5


def test_a_file_that_is_cut_is_C507(tmp_path: Path) -> None:  # noqa: N802 a code
    stored_file(tmp_path, {"w": ("F32", [8, 8])})
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 100)
    with BoxReader(checkpoint) as reader:
        reader.read("w", ((0, 2), (0, 8)))
        with pytest.raises(MapError) as caught:
            reader.read("w", ((6, 8), (0, 8)))
    (problem,) = caught.value.diagnostics
    assert problem.code == "C507"
    assert "`w`" in problem.message and FILE in str(caught.value) and problem.help


def test_a_file_that_is_gone_is_C507(tmp_path: Path) -> None:  # noqa: N802 a code
    stored_file(tmp_path, {"w": ("F32", [8, 8])})
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / FILE).unlink()
    with BoxReader(checkpoint) as reader, pytest.raises(MapError) as caught:
        reader.read("w", ((0, 1), (0, 8)))
    assert [problem.code for problem in caught.value.diagnostics] == ["C507"]
    assert open_files(tmp_path) == 0


def open_files(folder: Path) -> int:
    """How many files of a folder this process has open."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(str(folder)) for link in links if link.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
def test_files_are_closed(tmp_path: Path) -> None:
    stored_file(tmp_path, {"w": ("F32", [8, 8])})
    box = ((0, 1), (0, 8))
    with BoxReader(open_checkpoint(tmp_path)) as reader:
        reader.read("w", box)
        assert open_files(tmp_path) == 1
    assert open_files(tmp_path) == 0
    with pytest.raises(KeyError), BoxWriter(tmp_path, {"w": place("w", "F32", [8, 8], 8)}) as writer:
        writer.write("w", box, torch.zeros(1, 8))
        assert open_files(tmp_path) == 1
        writer.write("unknown", box, torch.zeros(1, 8))
    assert open_files(tmp_path) == 0


# --- writing ---


def place(name: str, dtype: str, shape: list[int], begin: int) -> StoredTensor:
    return StoredTensor(name, dtype, tuple(shape), Path(FILE), begin, begin + math.prod(shape) * BITS[dtype] // 8)


def pieces(draw: Any, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Boxes that together are all of a tensor, in any order."""
    if not sizes:
        yield ()
        return
    ends = sorted({0, sizes[0], *draw(st.lists(st.integers(0, sizes[0]), max_size=2))})
    spans = draw(st.permutations(list(itertools.pairwise(ends)) or [(0, 0)]))
    for span_ in spans:
        yield from ((span_, *rest) for rest in pieces(draw, sizes[1:]))


@settings(max_examples=60)
@given(forms(), st.data())
def test_boxes_are_written_to_their_places(
    tmp_path_factory: pytest.TempPathFactory, form: Any, data: st.DataObject
) -> None:
    """All boxes of a tensor are the tensor, and nothing around it changes."""
    dtype, shape = form
    folder = tmp_path_factory.mktemp("boxes")
    stored = stored_file(folder, {"w": form})["w"]
    (folder / FILE).write_bytes(b"\xaa" * 5 + b"\x55" * len(stored) + b"\xaa" * 3)
    sizes = sizes_of(dtype, shape)
    whole = torch.frombuffer(bytearray(stored), dtype=torch.uint8) if stored else torch.empty(0, dtype=torch.uint8)
    written = list(pieces(data.draw, sizes))
    with BoxWriter(folder, {"w": place("w", dtype, shape, 5)}) as writer:
        for number, box in enumerate(written):
            own = part(stored, dtype, shape, box)
            flat = torch.tensor(list(own), dtype=torch.uint8).view(TORCH_DTYPES[dtype])
            tensor = flat.reshape([end - begin for begin, end in box])
            if number == 0 and tensor.ndim == 2 and dtype == "F32":
                tensor = tensor.T.contiguous().T  # of any strides
            writer.write("w", box, tensor)
    assert len(whole) == len(stored)
    assert (folder / FILE).read_bytes() == b"\xaa" * 5 + stored + b"\xaa" * 3


def test_a_writer_makes_no_files(tmp_path: Path) -> None:
    """They are of their final size before anybody writes."""
    with pytest.raises(OSError), BoxWriter(tmp_path, {"w": place("w", "F32", [2], 0)}) as writer:
        writer.write("w", ((0, 2),), torch.zeros(2))
    assert not list(tmp_path.iterdir())
