"""Torch's own files: what of them is the model, and that they are mapped, not read into memory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversions import NAME, assert_same_files, renames, write_tiny

import mapdsl
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.rawbytes import buffer, strips
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.checkpoint.torch_files import MappedFile
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError


def raw(tensor: torch.Tensor) -> bytes:
    return b"".join(bytes(buffer(strip)) for strip in strips(tensor))


def test_the_models_part_is_taken_and_the_rest_is_named(tmp_path: Path) -> None:
    model = {"a": torch.ones(2), "b": None, "l._extra_state": torch.zeros(1)}
    torch.save({"model": model, "optimizer": {"a": torch.ones(9)}, "step": 3}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert list(checkpoint.tensors) == ["a"]
    assert set(checkpoint.left_out) == {"optimizer", "step", "b", "l._extra_state"}


@pytest.mark.parametrize("wrapper", [None, "model", "module"])
def test_nested_dicts_are_joined_by_dots(tmp_path: Path, wrapper: str | None) -> None:
    value: Any = {"language_model": {"embedding": {"word.weight": torch.ones(2)}, "none": {}}, "head": torch.zeros(3)}
    torch.save({wrapper: value, "args": 1} if wrapper else value, tmp_path / "x.pt")
    state = LazyState(open_checkpoint(tmp_path / "x.pt"))
    assert list(state) == ["language_model.embedding.word.weight", "head"]
    assert state["language_model.embedding.word.weight"].tolist() == [1, 1]


def deep(depth: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = {"a": value}
    return {"a": value, "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "C506.*two tensors are called `a.b`"),
        ({"a": {3: torch.ones(1)}}, "C507.*entry 3 is a torch.strided tensor, expected a dense tensor under a string"),
        (
            {"a": {"b": [torch.ones(1)]}, "c": torch.ones(1)},
            "entry 'a.b' is of <class 'list'>, expected a dense tensor",
        ),
        (deep(40), "dicts are nested more than 32 deep"),
    ],
)
def test_nested_values_that_are_no_state(tmp_path: Path, value: Any, expected: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(MapError, match=expected):
        open_checkpoint(tmp_path / "x.pt")


class Part(torch.Tensor):
    """As a DTensor: what it holds is not what its shape says."""


def test_tensors_that_are_more_than_tensors_are_refused(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([Part]):
        torch.save({"a": torch.ones(2).as_subclass(Part)}, tmp_path / "x.pt")
        with pytest.raises(MapError, match=r"entry 'a' is of <class '.*Part'>, expected a dense tensor"):
            open_checkpoint(tmp_path / "x.pt")


def test_a_tensor_without_data_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "x.pt")
    with pytest.raises(MapError, match="C507.*tensor `a` was saved without data, on device meta"):
        LazyState(open_checkpoint(tmp_path / "x.pt"))["a"]


def test_shared_storages_and_views_are_read_as_they_are_seen(tmp_path: Path) -> None:
    whole = torch.arange(100, dtype=torch.int16).reshape(10, 10)
    state = {"whole": whole, "part": whole[3:5, ::2], "turned": whole.T, "tied": whole, "wide": whole[0].expand(7, 10)}
    torch.save(state, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").stat().st_size < 3000  # one storage
    found = LazyState(open_checkpoint(tmp_path / "x.bin"))
    for name, tensor in state.items():
        assert raw(found[name]) == raw(tensor)
        found.release(name)
        assert raw(found[name]) == raw(tensor)
    assert found["whole"].data_ptr() == found["tied"].data_ptr()


@pytest.mark.parametrize("kind", ["file", "index", "distributed"])
def test_converted_as_safetensors_are(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way there gives the same files as from safetensors, but for those that say where they come from."""
    monkeypatch.setattr("mapdsl.checkpoint.engine.SMALL_BYTES", 0)  # several workers, each with its own reader
    source = write_tiny(tmp_path / "source")
    state = {name: tensor.clone() for name, tensor in LazyState(open_checkpoint(source)).items()}
    folder = tmp_path / "torch"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    if kind == "distributed":
        dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)
    elif kind == "file":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = list(state)
        shards = {f"pytorch_model-{n}.bin": names[n::2] for n in range(2)}
        for file, held in shards.items():
            torch.save({name: state[name] for name in held}, folder / file)
        text = ", ".join(f'"{name}": "{file}"' for file, held in shards.items() for name in held)
        (folder / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{text}}}}}')
    for source_ in (source, folder):
        mapdsl.convert(source_, tmp_path / f"{source_.name}.there", NAME, use_complement=False, workers=3)
    assert_same_files(tmp_path / "torch.there", tmp_path / "source.there")
    mapdsl.convert(folder, tmp_path / "there", NAME)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", NAME)
    back = LazyState(open_checkpoint(tmp_path / "back"))
    assert {name: raw(back[name]) for name in back} == {name: raw(state[name]) for name in state}
    assert not list((tmp_path / "back").glob("*.bin*"))


def test_snapshot_and_check_read_the_headers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, source = renames(tmp_path)
    state = {name: tensor.clone() for name, tensor in LazyState(open_checkpoint(source)).items()}
    torch.save({"state_dict": state}, source / "x.pt")
    assert main(["snapshot", str(source / "x.pt")]) == 0
    assert "{0..2}.a F32 3,4" in capsys.readouterr().out
    words = ["check", str(file), "--config", str(source), "--against"]
    assert main([*words, str(source / "x.pt")]) == 0
    del state["1.a"]
    torch.save(state, source / "y.pt")
    assert main([*words, str(source / "y.pt")]) == 1
    assert "1.a" in "".join(capsys.readouterr())


MEASURED = """
import sys
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.window import Window

def resident(what):
    lines = open("/proc/self/status").read().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) // 1024

state = Window(open_checkpoint(sys.argv[1]))
state["0"]
start, worst = resident("VmRSS"), 0
for number in range(40):
    assert state[str(number)].sum() == 2**21 * number
    worst = max(worst, resident("VmRSS"))
print(worst - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_read_leaves_memory(tmp_path: Path) -> None:
    """320 MiB, of which 64 stay."""
    torch.save({str(n): torch.full((2**21,), float(n)) for n in range(40)}, tmp_path / "x.pt")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120, done.stdout


def test_bytes_in_another_order_stay_swapped(tmp_path: Path) -> None:
    """Torch swaps them in memory: those pages must not be read from the file again."""
    path, swapped = tmp_path / "x.pt", tmp_path / "swapped.pt"
    torch.save({"a": torch.arange(10_000, dtype=torch.int32)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(swapped, "w") as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("byteorder"):
                data = b"big"
            elif entry.filename.endswith("data/0"):
                data = bytes(
                    torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 4).flip(1).flatten().tolist()
                )
            other.writestr(entry, data)
    found = MappedFile(swapped)
    for _ in range(2):
        assert torch.equal(found.tensors["a"], torch.arange(10_000, dtype=torch.int32))
        found.release("a")


def test_the_old_format_is_read_whole(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    found = MappedFile(tmp_path / "x.pt")
    found.release("a")  # it is this process's own memory, and must stay
    assert found.tensors["a"].sum() == 5000


def test_the_old_format_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10000000000000 bytes.")

    torch.save({"a": torch.ones(5)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(MapError, match="torch reads its old format as a whole only: load it on a larger machine"):
        MappedFile(tmp_path / "x.pt")


def test_a_compiled_module_is_no_state(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(MapError, match="C507"):
        open_checkpoint(tmp_path / "x.pt")
