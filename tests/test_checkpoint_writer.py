"""The writer: exact bytes, in any order, all or nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.checkpoint import writer as writer_module
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dtypes import TORCH_DTYPES, dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.layout import FileLayout, layout_of, plan_layout
from mapdsl.checkpoint.rawbytes import buffer, strips
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.language.diagnostics import MapError


def entries_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype_name(t.dtype), stored_shape(t)) for name, t in tensors.items()]


def raw(tensor: torch.Tensor) -> bytes:
    return b"".join(bytes(buffer(strip)) for strip in strips(tensor))


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {}
    for number, dtype in enumerate(TORCH_DTYPES.values()):
        tensors[f"t{number}"] = torch.randint(0, 255, (3, 8 * dtype.itemsize), dtype=torch.uint8).view(dtype)
        tensors[f"e{number}"] = torch.empty(0, 2, dtype=dtype)
        if dtype_name(dtype) != "F4":
            tensors[f"s{number}"] = torch.zeros((), dtype=dtype)
    return tensors


def only(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_single_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    with CheckpointWriter(tmp_path / "out", entries_of(tensors), single_file=True) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
        assert writer.commit() == tmp_path / "out"
    safetensors.torch.save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    assert only(tmp_path / "out") == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()
    assert only(tmp_path) == ["out", "reference"]


def test_shards(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": torch.full((n + 1, 4), n, dtype=torch.float32) for n in range(8)}
    with CheckpointWriter(tmp_path / "out", entries_of(tensors), max_shard_bytes=150) as writer:
        assert not (tmp_path / "out").exists()
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.write_json("config.json", {"b": 1, "a": "é"})
        writer.commit()
    shards = [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]
    assert only(tmp_path / "out") == sorted(["config.json", "model.safetensors.index.json", *shards])
    for path in (tmp_path / "out").glob("*.safetensors"):
        loaded = safetensors.torch.load_file(path)
        assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)
        assert sum(t.nbytes for t in loaded.values()) <= 150
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.config == {"b": 1, "a": "é"}
    assert (tmp_path / "out" / "config.json").read_text() == '{\n  "b": 1,\n  "a": "é"\n}\n'


def test_plan() -> None:
    entries = [("a", "F32", (25,)), ("b", "U8", (100,)), ("c", "F32", (1000,)), ("d", "U8", (1,)), ("e", "BF16", ())]
    layout = plan_layout(entries, max_shard_bytes=200, metadata={})
    assert [[t.name for t in file.tensors] for file in layout] == [["a", "b"], ["c"], ["e", "d"]]
    assert [file.name for file in layout] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert b"__metadata__" not in layout[0].header
    assert [file.name for file in plan_layout(entries)] == ["model.safetensors"]
    assert [file.name for file in plan_layout(entries, max_shard_bytes=1, single_file=True)] == ["model.safetensors"]
    assert [file.name for file in plan_layout([])] == ["model.safetensors"]
    for bad, expected in (
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "tensor `a` is to be written twice"),
        ([("a", "float", (1,))], "tensor `a` has dtype 'float'"),
        ([("a", "F32", (-1,))], "tensor `a` has shape"),
        ([("__metadata__", "F32", (1,))], "cannot be called `__metadata__`"),
        ([("\ud800", "F32", (1,))], "name is not Unicode text"),
    ):
        with pytest.raises(MapError, match=expected):
            plan_layout(bad)
    with pytest.raises(ValueError, match="expected more than 0"):
        plan_layout(entries, max_shard_bytes=0)


@settings(deadline=None)
@given(st.data())
def test_any_bits_round_trip(data: st.DataObject) -> None:
    contents = {}
    for number in range(data.draw(st.integers(0, 5))):
        dtype = data.draw(st.sampled_from(sorted(TORCH_DTYPES)))
        shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3))) if dtype != "F4" else (2, 4)
        torch_size = torch.Size(torch_shape(dtype, shape))
        size = torch_size.numel() * torch_dtype(dtype).itemsize
        bits = data.draw(st.binary(min_size=size, max_size=size))
        flat = torch.tensor(list(bits), dtype=torch.uint8).view(torch_dtype(dtype))
        contents[f"é {number}"] = (dtype, shape, flat.reshape(torch_size), bits)
    entries = [(name, dtype, shape) for name, (dtype, shape, _, _) in contents.items()]
    with tempfile.TemporaryDirectory() as folder:
        limit = data.draw(st.integers(1, 300))
        with CheckpointWriter(Path(folder) / "out", entries, max_shard_bytes=limit) as writer:
            for name in data.draw(st.permutations(list(contents))):
                writer.write(name, contents[name][2])
                assert raw(writer.read(name)) == contents[name][3]
            writer.commit()
        state = LazyState(open_checkpoint(Path(folder) / "out"))
        assert {name: raw(state[name]) for name in state} == {name: c[3] for name, c in contents.items()}


STRIDED = {
    "transposed": torch.arange(600.0).reshape(20, 30).T,
    "permuted": torch.arange(720.0).reshape(4, 5, 6, 6).permute(2, 0, 3, 1),
    "stepped": torch.arange(600.0).reshape(20, 30)[::2, 1::3],
    "expanded": torch.arange(30.0).expand(20, 30),
    "one long row": torch.arange(1000.0)[::2].reshape(1, 500),
    "offset": torch.arange(600.0)[7:],
    "scalar of many": torch.arange(600.0)[7],
    "rare dtype": torch.arange(200, dtype=torch.uint8).reshape(10, 20).T.view(torch.float8_e8m0fnu),
    "bool": (torch.arange(200, dtype=torch.uint8).reshape(10, 20) % 3 == 0).T,
    "conjugate": torch.randn(10, 20, dtype=torch.complex64).conj(),
    "conjugate transpose": torch.randn(10, 20, dtype=torch.complex64).mH,
    "negative bit": torch.randn(10, dtype=torch.complex64).conj().imag,
    "parameter": torch.nn.Parameter(torch.randn(20, 30).T),
    "empty": torch.empty(3, 0, 4).permute(2, 0, 1),
}


@pytest.mark.parametrize("case", STRIDED)
def test_strided_tensors(tmp_path: Path, case: str) -> None:
    tensor = STRIDED[case]
    expected = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    with CheckpointWriter(tmp_path / "out", entries_of({"a": tensor})) as writer:
        writer.write("a", tensor)
        assert raw(writer.read("a")) == raw(expected)
        writer.commit()


@pytest.mark.parametrize("case", STRIDED)
@pytest.mark.parametrize("limit", [1, 64, 1000])
def test_strips_are_bounded(case: str, limit: int) -> None:
    tensor = STRIDED[case]
    expected = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    pieces = [bytes(buffer(piece)) for piece in strips(tensor, limit)]
    assert b"".join(pieces) == bytes(buffer(expected))
    if not tensor.is_contiguous():
        longest_run = tensor.itemsize * (tensor.shape[-1] if tensor.stride()[-1] == 1 else 1)
        assert all(len(piece) <= max(limit, longest_run) for piece in pieces)


def test_original_files_are_reproduced_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, padding in ((1, 3), (2, 0)):
        header = {  # neither sorted nor aligned nor compact
            f"b{number}": {"data_offsets": [1, 9], "dtype": "F32", "shape": [2]},
            "__metadata__": {"z": "1", "a": "2"},
            f"a{number}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        }
        text = json.dumps(header, indent=1).encode() + b" " * padding
        (source / f"weights_{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + os.urandom(9))
    (source / "tokenizer.json").write_text("{}")
    original = open_checkpoint(source)
    with CheckpointWriter(tmp_path / "out", layout=layout_of(original)) as writer:
        state = LazyState(original)
        for name in writer.names:
            writer.write(name, state[name])
        writer.write_bytes("model.safetensors.index.json", b"{}")
        writer.carry_over(original)
        writer.commit()
    for name in original.files:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert only(tmp_path / "out") == sorted([*original.files, "model.safetensors.index.json", "tokenizer.json"])
    assert (tmp_path / "out" / "model.safetensors.index.json").read_bytes() == b"{}"


def test_misuse_is_named(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", [("a", "F32", (2, 3)), ("b", "U8", (1,)), ("f", "F4", (4,))]) as writer:
        for name, tensor, expected in (
            ("x", torch.zeros(1), "C501.*tensor `x` is not among those to be written"),
            ("a", torch.zeros(3, 2), r"C503.*tensor `a` has shape \[3, 2\], expected \[2, 3\]"),
            ("a", torch.zeros(2, 3, dtype=torch.float64), "C504.*tensor `a` is F64, expected F32"),
            ("a", torch.zeros(2, 3, dtype=torch.complex128), r"C504.*tensor `a` is torch\.complex128, expected F32"),
            ("a", torch.zeros(2, 3, device="meta"), "C504.*tensor `a` is a meta tensor, expected dense data"),
            ("a", torch.zeros(2, 3).to_sparse(), r"C504.*tensor `a` is torch\.sparse_coo"),
            ("f", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), r"has shape \[8\], expected \[4\]"),
        ):
            with pytest.raises(MapError, match=expected):
                writer.write(name, tensor)
        with pytest.raises(MapError, match=r"C502.*tensor `a` is not written yet"):
            writer.read("a")
        writer.write("a", torch.zeros(2, 3))
        with pytest.raises(MapError, match=r"C506.*tensor `a` is written a second time"):
            writer.write("a", torch.zeros(2, 3))
        with pytest.raises(MapError, match=r"C502.*2 of 3 tensors were never written: `b`, `f`"):
            writer.commit()
        assert writer.missing == ["b", "f"]
        for name in ("../x", "/x", "a/b", "", ".."):
            with pytest.raises(MapError, match="no plain file name"):
                writer.write_json(name, {})
        with pytest.raises(MapError, match=r"C506.*the file is written a second time"):
            writer.write_bytes("model.safetensors", b"")
        writer.write("b", torch.zeros(1, dtype=torch.uint8))
        writer.write("f", torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
        writer.commit()
    with pytest.raises(ValueError, match="is committed"):
        writer.read("a")
    with pytest.raises(ValueError, match="either entries or a layout"):
        CheckpointWriter(tmp_path / "other")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link", "folder/..", ""):
        with pytest.raises(MapError, match="the destination exists already"):
            CheckpointWriter(tmp_path / name, [])
    with pytest.raises(MapError, match="does not exist"):
        CheckpointWriter(tmp_path / "absent" / "out", [])
    assert only(tmp_path) == ["file", "folder", "link"]


def test_destination_that_appears_meanwhile(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", []) as writer:
        (tmp_path / "out").mkdir()
        with pytest.raises(MapError, match="the destination exists already"):
            writer.commit()
        (tmp_path / "out").rmdir()
        writer.commit()


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", [("a", "U8", (5,))]) as writer:
        assert [name.split("-")[0] for name in only(tmp_path)] == [".out.partial"]
        writer.write("a", torch.zeros(5, dtype=torch.uint8))
        raise KeyboardInterrupt
    assert only(tmp_path) == []
    with CheckpointWriter(tmp_path / "out", []):
        pass  # left without a commit
    assert only(tmp_path) == []
    with pytest.raises(ValueError, match="is aborted"):
        writer.commit()


def test_disk_that_is_too_small(tmp_path: Path) -> None:
    needs = r"the checkpoint needs 1,000,000,000,000,000,\d+ bytes while it is written, the disk has .* free"
    with pytest.raises(MapError, match=needs):
        CheckpointWriter(tmp_path / "out", [("a", "U8", (10**18,))])
    assert only(tmp_path) == []


@pytest.mark.parametrize("call", ["mkdir", "posix_fallocate", "pwrite", "fsync", "rename"])
def test_disk_that_fills_up(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def convert() -> None:
        with CheckpointWriter(tmp_path / "out", [("a", "U8", (5,))]) as writer:
            writer.write("a", torch.zeros(5, dtype=torch.uint8))
            writer.commit()

    monkeypatch.setattr(writer_module.os, call, full)
    with pytest.raises(MapError, match=r"C507.*no space left on device"):
        convert()
    assert only(tmp_path) == []


LIMITED = """
import resource, sys, torch
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.language.diagnostics import MapError
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    CheckpointWriter(sys.argv[1], [("a", "U8", (100_000,))])
except MapError as problem:
    sys.exit(problem.diagnostics[0].message)
"""


def test_a_real_limit_of_the_system(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "cannot make the files: file too large"
    assert only(tmp_path) == []


def test_a_write_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(writer_module.os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    tensor = torch.arange(100, dtype=torch.uint8)
    with CheckpointWriter(tmp_path / "out", entries_of({"a": tensor})) as writer:
        writer.write("a", tensor)
        writer.commit()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["a"], tensor)


def test_threads(tmp_path: Path) -> None:
    tensors = {str(n): torch.full((1000,), n, dtype=torch.int32) for n in range(200)}
    with CheckpointWriter(tmp_path / "out", entries_of(tensors), max_shard_bytes=50_000) as writer:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(writer.write, tensors, tensors.values()))
        writer.commit()
    state = LazyState(open_checkpoint(tmp_path / "out"))
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_bad_layouts(tmp_path: Path) -> None:
    (good,) = plan_layout([("a", "U8", (1,))])
    for layout, expected in (
        ([FileLayout("../x", good.header)], "no plain name"),
        ([good, good], "C506.*the layout has this file twice"),
        ([good, FileLayout("b.safetensors", good.header)], "C506.*tensor `a` is in model.safetensors too"),
        ([FileLayout("x", good.header + b" ")], "the header states 88 bytes, it has 89"),
        ([FileLayout("x", b"")], "the header states 0 bytes"),
    ):
        with pytest.raises(MapError, match=expected):
            CheckpointWriter(tmp_path / "out", layout=layout)
    assert only(tmp_path) == []


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A transposed tensor of 400 MB is written in strips, not copied whole."""
    code = (
        "import resource, sys, torch\n"
        "from mapdsl.checkpoint.writer import CheckpointWriter\n"
        "tensor = torch.ones(10_000, 10_000).T\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with CheckpointWriter(sys.argv[1], [('a', 'F32', (10_000, 10_000))]) as writer:\n"
        "    writer.write('a', tensor)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "o")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60  # megabytes; the strip is 16
