"""Torch Distributed Checkpoints, both ways: torch reads what mapdsl writes, mapdsl reads what torch writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversions import NAME, assert_same_files, only, renames, write_tiny
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import mapdsl
from mapdsl.checkpoint import dcp as dcp_module
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dcp_writer import DcpWriter
from mapdsl.checkpoint.dtypes import TORCH_DTYPES, dtype_name, stored_shape
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.passes import OptionError
from mapdsl.checkpoint.rawbytes import buffer, strips
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def raw(tensor: torch.Tensor) -> bytes:
    return b"".join(bytes(buffer(strip)) for strip in strips(tensor))


def some_tensors() -> dict[str, torch.Tensor]:
    """All dtypes and all bits, among them bools that are neither 0 nor 1; scalars, empty tensors, odd names."""
    tensors = {}
    for name, dtype in TORCH_DTYPES.items():
        bits = torch.arange(3 * 8 * dtype.itemsize, dtype=torch.uint8) * 37 + 2
        tensors[f"layers.0.{name}"] = bits.view(dtype).view(3, 8)
        tensors[f"é {name}/../x\n"] = torch.empty(0, 2, dtype=dtype)
        if name != "F4":
            tensors[f"..{name}."] = bits[: dtype.itemsize].clone().view(dtype)[0]
    return tensors


def assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> Path:
    entries = [(name, dtype_name(t.dtype), stored_shape(t)) for name, t in tensors.items()]
    with DcpWriter(folder, entries, max_shard_bytes=shard_bytes) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
        writer.commit()
    return folder


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_torch_saves_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    dcp.save(tensors, checkpoint_id=tmp_path / "ckpt")
    (tmp_path / "ckpt" / "tokenizer.json").write_text("{}")
    (tmp_path / "ckpt" / "config.json").write_text('{"n": 1}')
    for path in (tmp_path / "ckpt", tmp_path / "ckpt" / ".metadata"):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.kind, checkpoint.config, checkpoint.path) == ("dcp", {"n": 1}, tmp_path / "ckpt")
        assert (checkpoint.files, checkpoint.other_files) == (("__0_0.distcp",), ("tokenizer.json",))
        assert checkpoint.left_out == ()
        assert {t.name: (t.dtype, t.shape) for t in checkpoint.tensors.values()} == {
            name: (dtype_name(t.dtype), stored_shape(t)) for name, t in tensors.items()
        }
        assert_same(LazyState(checkpoint), tensors)


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2, 3)}, checkpoint_id=tmp_path)
    code = "import sys; from mapdsl.cli.main import main; main(['snapshot', sys.argv[1]]); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a F32 2,3" in done.stdout


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_the_models_part_of_a_training_run(tmp_path: Path, wrapper: str) -> None:
    model = OrderedDict({"model.a": torch.ones(2), "b": torch.zeros(3), "x._extra_state": None})
    state = {wrapper: model, "optim": {"state": {"b": {"step": torch.tensor(5)}}, "lr": 0.1}, "step": 7}
    dcp.save(state, checkpoint_id=tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["model.a", "b"]
    left_out = {"optim.state.b.step", "optim.lr", "step", f"{wrapper}.x._extra_state"}
    assert set(checkpoint.left_out) == left_out
    assert_same(LazyState(checkpoint), {"model.a": torch.ones(2), "b": torch.zeros(3)})


def test_other_nested_keys_are_joined_as_torch_joins_them(tmp_path: Path) -> None:
    state = {"net": {"layers": [torch.ones(1), torch.zeros(2)]}, "model.norm": torch.ones(3)}
    dcp.save(state, checkpoint_id=tmp_path)
    names = {"net.layers.0", "net.layers.1", "model.norm"}
    assert (
        set(open_checkpoint(tmp_path).tensors)
        == names
        == set(dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata)
    )


RANKS = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=2)
line, plain = init_device_mesh("cpu", (2,)), torch.arange(35).reshape(5, 7)
codes = (plain[:3], plain[3:])[rank].to(torch.uint8).view(torch.bool)
state = {
    "rows": distribute_tensor(plain, line, [Shard(0)]),
    "columns": distribute_tensor(plain.to(torch.bfloat16), line, [Shard(1)]),
    "codes": DTensor.from_local(codes, line, [Shard(0)], shape=(5, 7), stride=(7, 1)),
    "few": distribute_tensor(plain[:1].clone(), line, [Shard(0)]),
    "everywhere": distribute_tensor(plain, line, [Replicate()]),
    "plain": plain,
}
dcp.save(state, checkpoint_id=folder)
dist.destroy_process_group()
"""


def test_pieces_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", RANKS]
    ranks = [subprocess.Popen([*words, str(rank), str(tmp_path / "ckpt")]) for rank in range(2)]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert len(checkpoint.files) == 2
    assert {name: len(tensor.chunks) for name, tensor in checkpoint.saved.items()}["columns"] == 2
    plain = torch.arange(35).reshape(5, 7)
    assert_same(
        LazyState(checkpoint),
        {
            "rows": plain,
            "columns": plain.to(torch.bfloat16),
            "codes": plain.to(torch.uint8).view(torch.bool),
            "few": plain[:1],
            "everywhere": plain,
            "plain": plain,
        },
    )


def test_one_tensor_at_a_time_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save({"a": torch.ones(3), "b": torch.zeros(3)}, checkpoint_id=tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    reader = dcp_module.DcpReader(tmp_path, checkpoint.saved)
    first = reader["a"]
    assert reader["a"] is first
    read, held = reader._read, []
    monkeypatch.setattr(reader, "_read", lambda tensor: held.append(reader._last) or read(tensor))
    assert reader["b"] is not first
    assert held == [None]
    assert reader["a"] is not first


@pytest.mark.parametrize("spoil", ["gone", "cut", "other"])
def test_files_that_changed_since(tmp_path: Path, spoil: str) -> None:
    dcp.save({"a": torch.ones(300)}, checkpoint_id=tmp_path)
    state, file = LazyState(open_checkpoint(tmp_path)), tmp_path / "__0_0.distcp"
    if spoil == "gone":
        file.unlink()
    elif spoil == "cut":
        os.truncate(file, 1000)
    else:
        dcp.save({"a": torch.ones(300, dtype=torch.int32)}, checkpoint_id=tmp_path)
    with pytest.raises(MapError, match=r"C507.*tensor `a`") as problem:
        state["a"]
    assert only(problem.value).subject == str(file)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["__0_0.distcp"], r"the folder holds \*\.distcp, but no \.metadata that says what is in them"),
        (["__0_0.distcp", "__0.metadata"], r"the folder holds \*\.distcp, but no \.metadata"),
        (["x.txt"], r"the folder holds no \*\.safetensors.*nor a torch Distributed Checkpoint's \.metadata"),
    ],
)
def test_folders_without_metadata(tmp_path: Path, files: list[str], expected: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MapError, match=expected):
        open_checkpoint(tmp_path)


def test_dtypes_that_safetensors_lacks_are_named(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2, dtype=torch.complex128)}, checkpoint_id=tmp_path)
    with pytest.raises(MapError, match=r"C504.*tensor `a`: safetensors has no dtype for torch\.complex128"):
        open_checkpoint(tmp_path)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 300, 10**9])
def test_what_is_written_is_read_by_torch(tmp_path: Path, shard_bytes: int) -> None:
    tensors = some_tensors()
    folder = write(tmp_path / "out", tensors, shard_bytes)
    assert_same(LazyState(open_checkpoint(folder)), tensors)
    plain = {name: t for name, t in tensors.items() if t.dtype != torch.bool}  # torch makes ones of a bool's other bits
    loaded = {name: torch.empty_like(tensor) for name, tensor in plain.items()}
    dcp.load(loaded, checkpoint_id=folder)
    assert_same(loaded, plain)
    dcp_to_torch_save(folder, tmp_path / "out.pt")
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(saved) == set(tensors)
    assert_same({name: saved[name] for name in plain}, plain)
    files = sorted(os.listdir(folder))
    assert files[0] == ".metadata"
    assert all(name.startswith("__") and name.endswith(".distcp") for name in files[1:])
    assert (len(files) > 2) == (shard_bytes < 10**9)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.pt"]


@pytest.mark.parametrize("mapped", [True, False])
def test_any_layout_is_packed(tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that begin anywhere, and a system that maps no file."""
    if not mapped:
        monkeypatch.setattr("mapdsl.checkpoint.dcp_writer.map_file", lambda stored: None)
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F64", "shape": [2, 1], "data_offsets": [1, 17]}
    text = json.dumps(header).encode()
    layout = [FileLayout("odd.safetensors", len(text).to_bytes(8, "little") + text)]
    tensors = {"a": torch.ones(1, dtype=torch.uint8), "b": torch.randn(2, 1, dtype=torch.float64)}
    with DcpWriter(tmp_path / "out", layout=layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    assert_same(LazyState(open_checkpoint(tmp_path / "out")), tensors)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, some_tensors(), 500) for name in ("one", "other"))
    assert_same_files(one, other)
    assert str(tmp_path).encode() not in (one / ".metadata").read_bytes()


def test_an_empty_checkpoint(tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path / "out", {})).tensors == {}


def test_a_destination_that_appears_meanwhile(tmp_path: Path) -> None:
    with DcpWriter(tmp_path / "out", [("a", "F32", (2,))]) as writer:
        writer.write("a", torch.ones(2))
        (tmp_path / "out").mkdir()
        with pytest.raises(MapError, match="exists already"):
            writer.commit()
        (tmp_path / "out").rmdir()
        writer.commit()
    assert_same(LazyState(open_checkpoint(tmp_path / "out")), {"a": torch.ones(2)})


def test_the_space_on_the_way_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3_000_000}))
    entries = [(name, "U8", (1_000_000,)) for name in "ab"]
    with pytest.raises(MapError, match=r"needs 4,\d+,\d+ bytes while it is written, the disk has 3,000,000 free"):
        DcpWriter(tmp_path / "out", entries)
    DcpWriter(tmp_path / "out", entries[:1]).abort()
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys, torch
from mapdsl.checkpoint.dcp_writer import DcpWriter
from mapdsl.language.diagnostics import MapError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with DcpWriter(sys.argv[1], [(str(n), "U8", (20_000,)) for n in range(9)], max_shard_bytes=100_000) as writer:
        for name in writer.names:
            writer.write(name, torch.zeros(20_000, dtype=torch.uint8))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        writer.commit()
except MapError as problem:
    sys.exit(problem.diagnostics[0].message)
"""


def test_a_disk_that_fills_up_while_torch_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("cannot finish the checkpoint: ")
    assert "file too large" in done.stderr.lower()
    assert os.listdir(tmp_path) == []


MEASURED = """
import sys, threading, torch
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dcp_writer import DcpWriter
from mapdsl.checkpoint.window import Window

def resident():
    lines = open("/proc/self/status").read().split("\\n")
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}

worst, done = {}, threading.Event()
def watch():
    while not done.wait(0.002):
        for key, size in resident().items():
            worst[key] = max(worst.get(key, 0), size)

entries = [(str(n), "F32", (2**21,)) for n in range(40)]  # 8 MiB each
with DcpWriter(sys.argv[1], entries) as writer:
    for number, (name, _, _) in enumerate(entries):
        writer.write(name, torch.full((2**21,), float(number)))
    start = resident()
    threading.Thread(target=watch).start()
    writer.commit()
if sys.argv[2] == "read":
    worst.clear()
    for number, tensor in enumerate(map(Window(open_checkpoint(sys.argv[1])).__getitem__, (e[0] for e in entries))):
        assert tensor[-1] == number
done.set()
print((worst["RssAnon"] - start["RssAnon"]) // 1024, (worst["RssFile"] - start["RssFile"]) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("what", ["write", "read"])
def test_memory_is_that_of_single_tensors(tmp_path: Path, what: str) -> None:
    """320 MiB in one shard, of tensors of 8 MiB."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "out"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    anonymous, mapped = map(int, done.stdout.split())
    assert (anonymous < 60, mapped < 80) == (True, True), done.stdout


# --- convert ---------------------------------------------------------------------------------------------------------


def test_there_and_back_through_a_distributed_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source")
    words = ["convert", str(source), str(tmp_path / "there"), "--map", NAME, "--format", "dcp"]
    assert main([*words, "--max-shard-size", "500kB"]) == 0
    there = tmp_path / "there"
    found = sorted(name for name in os.listdir(there) if not name.endswith(".distcp"))
    assert found == [".metadata", "config.json", SIDE_FILE, "tokenizer.json"]
    assert f"written to {len(list(there.glob('*.distcp')))} files" in capsys.readouterr().out
    assert main(["convert", str(there), str(tmp_path / "back"), "--map", NAME]) == 0
    assert_same_files(tmp_path / "back", source)
    mapdsl.convert(source, tmp_path / "plain", NAME)
    assert_same(LazyState(open_checkpoint(there)), dict(LazyState(open_checkpoint(tmp_path / "plain"))))


def test_the_stored_side_as_a_distributed_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", NAME)
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--map", NAME, "--format", "dcp"]) == 0
    assert "laid out anew: Distributed Checkpoints have no safetensors headers" in capsys.readouterr().out
    assert not list((tmp_path / "back").glob("*.safetensors*"))
    expected = LazyState(open_checkpoint(source))
    assert_same(LazyState(open_checkpoint(tmp_path / "back")), dict(expected))
    done = mapdsl.convert(tmp_path / "back", tmp_path / "again", NAME, format="dcp")
    assert done.files[0] == "__0_0.distcp"
    there = LazyState(open_checkpoint(tmp_path / "there"))
    assert_same(LazyState(open_checkpoint(tmp_path / "again")), dict(there))


def test_what_is_not_the_model_is_named(tmp_path: Path) -> None:
    file, source = renames(tmp_path)
    state = {name: tensor.clone() for name, tensor in LazyState(open_checkpoint(source)).items()}
    dcp.save({"model": state, "optim": {"a": torch.ones(1)}}, checkpoint_id=tmp_path / "run")
    torch.save({"model": state, "optim": {"a": torch.ones(1)}}, tmp_path / "run.pt")
    expected = {f"layer.{i}.a": state[f"{i}.a"] for i in range(3)} | {"head": state["top"]}
    for name, left in (("run", "optim.a"), ("run.pt", "optim")):
        done = mapdsl.convert(tmp_path / name, tmp_path / f"{name}.out", file, params={"N": 3}, use_complement=False)
        assert done.left_behind == (left,)
        assert_same(LazyState(open_checkpoint(tmp_path / f"{name}.out")), expected)


def test_an_unknown_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, source = renames(tmp_path)
    with pytest.raises(OptionError, match="a checkpoint is written as one of safetensors, dcp, not 'gguf'"):
        mapdsl.convert(source, tmp_path / "out", file, format="gguf")
    assert main(["convert", str(source), str(tmp_path / "out"), "--map", str(file), "--format", "gguf"]) == 2
    assert "--format" in capsys.readouterr().err
