"""Distributed Checkpoints that want to run code, contradict themselves, or point elsewhere."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mapdsl.checkpoint import dcp as dcp_module
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.language.diagnostics import MapError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class _Payload:
    """Makes a folder where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def sound(folder: Path) -> Metadata:
    """A folder with one tensor `a` [4, 6] in two chunks; gives its metadata, to be spoiled."""
    dcp.save({"a": torch.ones(4, 6), "b": torch.zeros(2)}, checkpoint_id=folder)
    metadata = dcp.FileSystemReader(folder).read_metadata()
    place = metadata.storage_data.pop(MetadataIndex("a", (0, 0)))
    boxes = [ChunkStorageMetadata(torch.Size([begin, 0]), torch.Size([2, 6])) for begin in (0, 2)]
    metadata.state_dict_metadata["a"].chunks = boxes
    for box in boxes:
        metadata.storage_data[MetadataIndex("a", box.offsets)] = _StorageInfo(
            "__0_0.distcp", place.offset, place.length
        )
    return metadata


def dump(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def refusal(folder: Path) -> str:
    """The one error of opening the folder."""
    with pytest.raises(MapError) as problem:
        open_checkpoint(folder)
    assert len(problem.value.diagnostics) == 1
    found = problem.value.diagnostics[0]
    return f"{found.code} {found.message}"


def test_the_spoiled_one_was_sound(tmp_path: Path) -> None:
    dump(tmp_path, sound(tmp_path))
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        lambda metadata, payload: payload,
        lambda metadata, payload: [metadata, payload],
        lambda metadata, payload: setattr(metadata, "planner_data", payload) or metadata,
        lambda metadata, payload: setattr(metadata, "mcore_data", {"a": payload}) or metadata,
        lambda metadata, payload: setattr(metadata.state_dict_metadata["a"], "size", payload) or metadata,
        lambda metadata, payload: metadata.storage_data.update({"x": payload}) or metadata,
    ],
)
def test_no_code_is_run(tmp_path: Path, place: Callable[[Any, Any], Any]) -> None:
    mark = tmp_path / "pwned"
    dump(tmp_path, place(sound(tmp_path), _Payload(mark)))
    with pytest.raises(MapError, match=r"C507.*the file needs code to load: it names `posix\.mkdir`"):
        open_checkpoint(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "os system",
        "torch load",
        "torch.serialization load",
        "torch.hub load",
        "torch __builtins__",
        "torch Tensor",
        "torch.distributed.checkpoint.filesystem FileSystemWriter",
        "torch.distributed.checkpoint.metadata os.system",
        "torch.distributed.checkpoint.metadata Metadata.__init__.__globals__",
        "mapdsl.checkpoint.dcp_pickle read_pickle",
    ],
)
def test_no_other_name_is_looked_up(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.partition(" ")
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x93."
    )
    assert refusal(tmp_path).startswith(f"C507 the file needs code to load: it names `{module}.{attribute}`")


@pytest.mark.parametrize(
    "stream",
    [
        b"c" + b"torch.distributed.checkpoint.metadata\nMetadata\n" + b"}U\x08__init__I1\nsb.",  # a class is changed
        b"c" + b"torch.distributed.checkpoint.metadata\nMetadata\n" + b"N}U\x04evilI1\ns\x86b.",
        b"ctorch\nSize\nN}U\x04evilI1\ns\x86b.",
        b"ctorch\nfloat32\n(tR.",  # a dtype is called
        b"Pfile\n.",
        b"U\x04fileQ.",
        b"\x82\x01.",  # an extension
        b"N.",
        b"}.",
        b"",
        b"\x80\x04",
        b"\x80\xff.",
        b"junk",
        b"\x80\x04\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a string of 2**63 bytes
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of that
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of 2**31 places
        b"\x80\x04}()" + b"\x85" * 1_000_000 + b"Nu.",  # a key whose hash needs a deep stack
        b"\x80\x04}(" + b"ctorch\nSize\n(" * 1 + b")" + b"ttRNu.",
        b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        b"\x80\x04(" * 1 + b"Nt" + b"q\x00" + b"".join(b"(" + b"h\x00" * 99 + b"tq\x00" for _ in range(9)) + b".",
    ],
)
def test_bare_streams(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(stream)
    assert refusal(tmp_path).startswith("C507 ")
    for made in (Metadata, tuple):
        assert not hasattr(made, "evil")


def test_code_in_the_data(tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    metadata = sound(tmp_path)
    with (tmp_path / "__0_0.distcp").open("r+b") as file:
        begin = file.seek(0, os.SEEK_END)
        torch.save(_Payload(mark), file)
        length = file.tell() - begin
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", begin, length)
    dump(tmp_path, metadata)
    state = LazyState(open_checkpoint(tmp_path))
    for name in "ab":
        with pytest.raises(
            MapError, match=f"C507.*tensor `{name}` needs code to load, or is broken: Weights only load"
        ):
            state[name]
    assert not mark.exists()


def test_a_torch_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.load

    def trusting(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "weights_only": False})

    dcp.save({"a": torch.ones(1)}, checkpoint_id=tmp_path)
    monkeypatch.setattr(filesystem.torch, "load", trusting)
    dcp_module._check_reader.cache_clear()
    try:
        with pytest.raises(MapError, match=r"C507.*torch .* reads Distributed Checkpoints in a way that runs code"):
            LazyState(open_checkpoint(tmp_path))["a"]
    finally:
        dcp_module._check_reader.cache_clear()


# --- places, shapes, sizes -------------------------------------------------------------------------------------------


def entry(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["a"]


def boxes(*pairs: tuple[list[int], list[int]]) -> Callable[[Metadata], None]:
    def spoil(metadata: Metadata) -> None:
        place = next(iter(metadata.storage_data.values()))
        entry(metadata).chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in pairs]
        for offsets, _ in pairs:
            metadata.storage_data[MetadataIndex("a", offsets)] = place

    return spoil


def place(**changes: Any) -> Callable[[Metadata], None]:
    def spoil(metadata: Metadata) -> None:
        for index in metadata.storage_data:
            for name, value in changes.items():
                setattr(metadata.storage_data[index], name, value)

    return spoil


def put(**changes: Any) -> Callable[[Metadata], None]:
    def spoil(metadata: Metadata) -> None:
        for name, value in changes.items():
            setattr(entry(metadata), name, value)

    return spoil


HUGE = TensorStorageMetadata(TensorProperties(torch.float32), (2**62, 2**62), [])  # type: ignore[arg-type]
SPOILED = {
    "parent": (place(relative_path="../x.distcp"), "puts tensor `a` into '../x.distcp', expected *.distcp in its own"),
    "absolute": (place(relative_path="/etc/passwd"), "puts tensor `a` into '/etc/passwd', expected"),
    "other kind": (place(relative_path="config.json"), "puts tensor `a` into 'config.json', expected"),
    "no path": (place(relative_path=None), "tensor `a` has a chunk that lies in no file"),
    "absent": (place(relative_path="__1_0.distcp"), "cannot open the file: no such file"),
    "negative": (place(offset=-1), "tensor `a` lies at no place in '__0_0.distcp'"),
    "float": (place(length=1.5), "tensor `a` lies at no place in '__0_0.distcp'"),
    "behind": (place(offset=10**9), "of __0_0.distcp, which has"),
    "packing": (place(transform_descriptors=[1]), "tensor `a` is packed in a way that nobody can name"),
    "gap": (boxes(([0, 0], [2, 6])), "the chunks of tensor `a` hold 12 elements of 24"),
    "overlap": (boxes(([0, 0], [3, 6]), ([2, 0], [1, 6])), "chunks of tensor `a` overlap"),
    "overlap of columns": (boxes(([0, 0], [4, 3]), ([0, 2], [4, 3])), "chunks of tensor `a` overlap"),
    "twice": (boxes(([0, 0], [4, 6]), ([0, 0], [4, 6])), "chunks of tensor `a` overlap"),
    "outside": (boxes(([0, 0], [2, 6]), ([3, 0], [2, 6])), "a chunk [2, 6] at [3, 0], which does not lie in it"),
    "other rank": (boxes(([0], [24])), "a chunk [24] at [0], which does not lie in it"),
    "nowhere": (lambda metadata: metadata.storage_data.clear(), "a chunk at [0, 0] that is stored nowhere"),
    "no list": (put(chunks=None), "tensor `a` has no list of chunks"),
    "odd chunk": (put(chunks=[1]), "tensor `a` has a chunk without offsets or sizes"),
    "no size": (put(size=[4, 6]), "tensor `a` has no dtype, or a shape that is none"),
    "negative size": (put(size=(-4, -6)), "tensor `a` has no dtype, or a shape that is none"),
    "bool size": (put(size=(True, 24)), "tensor `a` has no dtype, or a shape that is none"),
    "large size": (put(size=(2**64,)), "tensor `a` has no dtype, or a shape that is none"),
    "many sizes": (put(size=(1,) * 65), "tensor `a` has no dtype, or a shape that is none"),
    "no properties": (put(properties=None), "tensor `a` has no dtype, or a shape that is none"),
    "huge": (put(size=(2**62, 2**62)), "the chunks of tensor `a` hold 24 elements of"),
    "empty but huge": (put(size=(0, 2**62, 2**62), chunks=[]), "more elements than 2**63 - 1"),
    "no entries": (
        lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        "expected a dict `state_dict_metadata`",
    ),
    "no storage": (lambda metadata: setattr(metadata, "storage_data", None), "expected a dict `storage_data`"),
    "odd index": (lambda metadata: metadata.storage_data.update({1: 2}), "does not say which tensor is where"),
    "half a character": (
        lambda metadata: metadata.state_dict_metadata.update({"\ud800": metadata.state_dict_metadata["b"]}),
        "a tensor's name is not Unicode text: '\\ud800'",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_metadata_that_contradicts_itself(tmp_path: Path, case: str) -> None:
    spoil, expected = SPOILED[case]
    metadata = sound(tmp_path)
    spoil(metadata)
    dump(tmp_path, metadata)
    found = refusal(tmp_path)
    assert found.startswith("C507 ")
    assert expected in found


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    metadata = sound(tmp_path)
    metadata.planner_data = {"a": ("model", "b"), "b": ("model", "b")}
    metadata.state_dict_metadata = {f"model.{k}": v for k, v in metadata.state_dict_metadata.items()}
    metadata.planner_data = {"model.a": ("model", "a"), "model.b": ("other", "model.b")}  # does not lead there
    dump(tmp_path, metadata)
    assert "that is stored nowhere" in refusal(tmp_path)


def test_data_of_another_dtype_or_size(tmp_path: Path) -> None:
    """Torch's own reader would convert the one and cut the other."""
    dcp.save({"a": torch.ones(4, dtype=torch.float64)}, checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    entry(metadata).properties.dtype = torch.float32
    dump(tmp_path, metadata)
    with pytest.raises(MapError, match=r"C507.*tensor `a`: found torch\.float64, the metadata says torch\.float32"):
        LazyState(open_checkpoint(tmp_path))["a"]
    entry(metadata).properties.dtype, entry(metadata).size = torch.float64, torch.Size([5])
    entry(metadata).chunks[0].sizes = torch.Size([5])
    dump(tmp_path, metadata)
    with pytest.raises(MapError, match=r"C507.*torch cannot load tensor `a`"):
        LazyState(open_checkpoint(tmp_path))["a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    dump(folder, sound(folder))
    return folder, (folder / ".metadata").read_bytes(), (folder / "__0_0.distcp").read_bytes()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_error_or_is_read(folder: tuple[Path, bytes, bytes], data: st.DataObject) -> None:
    path, metadata, stored = folder
    spoiled = {}
    for name, whole in ((".metadata", metadata), ("__0_0.distcp", stored)):
        bits = bytearray(whole)
        for _ in range(data.draw(st.integers(0, 3))):
            bits[data.draw(st.integers(0, len(bits) - 1))] = data.draw(st.integers(0, 255))
        spoiled[name] = bytes(bits[: data.draw(st.none() | st.integers(0, len(bits)))])
    for name, contents in spoiled.items():
        (path / name).write_bytes(contents)
    try:
        state = LazyState(open_checkpoint(path))
        for name in state:
            assert tuple(state[name].shape) == state.checkpoint.tensors[name].shape
    except MapError as problem:
        assert {d.code for d in problem.diagnostics} <= {"C504", "C506", "C507"}
