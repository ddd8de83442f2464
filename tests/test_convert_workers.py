"""Conversions by several workers: the files are those of one worker, byte for byte, both ways."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

import mapdsl
from mapdsl.checkpoint import engine
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.passes import Request, make_plan
from mapdsl.checkpoint.units import UnitFinder
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.demo import small_config, write_release
from mapdsl.language.diagnostics import MapError


@pytest.fixture(autouse=True)
def all_sizes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "released"
    write_release(folder, small_config())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_write_what_one_writes(released: Path, tmp_path: Path, workers: int) -> None:
    threads = torch.get_num_threads()
    for number in (1, workers):
        mapdsl.convert(released, tmp_path / f"model-{number}", "deepseek_v4", workers=number)
        mapdsl.convert(tmp_path / f"model-{number}", tmp_path / f"back-{number}", "deepseek_v4", workers=number)
    assert contents(tmp_path / f"model-{workers}") == contents(tmp_path / "model-1")
    assert contents(tmp_path / f"back-{workers}") == contents(tmp_path / "back-1") == contents(released)
    assert torch.get_num_threads() == threads


def test_without_what_was_kept(released: Path, tmp_path: Path) -> None:
    mapdsl.convert(released, tmp_path / "model", "deepseek_v4")
    for number in (1, 2):
        options = {"use_complement": False, "workers": number}
        mapdsl.convert(tmp_path / "model", tmp_path / f"back-{number}", "deepseek_v4", **options)
    assert contents(tmp_path / "back-2") == contents(tmp_path / "back-1")


def test_an_error_of_one_worker_stops_all(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, written = CheckpointWriter._begun, []

    def refused(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> object:
        written.append(name)
        if len(written) == 20:
            raise ZeroDivisionError
        return begun(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "_begun", refused)
    with pytest.raises(ZeroDivisionError):
        mapdsl.convert(released, tmp_path / "out", "deepseek_v4", workers=2)
    assert len(written) < 30 and list(tmp_path.iterdir()) == []


def test_experts_are_filled_where_they_are_to_lie(released: Path) -> None:
    request = Request(mapdsl.load("deepseek_v4"), open_checkpoint(released))
    plan = make_plan(request, to_right=True)
    stacked = {name for name, _, shape in plan.entries if len(shape) == 3 and "experts" in name}
    assert stacked and stacked == set(plan.units.in_place.values())
    experts = {plan.units.of_output[name] for name in stacked}
    of_experts = [name for name in plan.units.of_source if plan.units.of_source[name] in experts]
    assert len(experts) == len(stacked)
    assert all(".experts." in name for name in of_experts)


def test_groups_that_share_a_tensor_are_one_unit() -> None:
    finder, data = UnitFinder(), torch.empty(2, device="meta")
    for names in (["a"], ["b"], ["c", "a"], ["d"]):
        finder.begin()
        for name in names:
            finder.touch(name)
        finder.output(f"out.{names[0]}", data)
    finder.read_back("out.b")
    units = finder.finish()
    assert units.of_source == {"a": 0, "b": 1, "c": 0, "d": 1}
    assert units.of_output == {"out.a": 0, "out.b": 1, "out.c": 0, "out.d": 1}
    assert units.count == 2


def test_a_source_that_became_shorter(tmp_path: Path) -> None:
    source = tmp_path / "short"
    source.write_bytes(b"1234")
    entry = ("w", "F32", (4,))
    with (
        CheckpointWriter(tmp_path / "out", [entry]) as writer,
        pytest.raises(MapError, match="has become shorter") as raised,
    ):
        writer.copy("w", torch.zeros(4), source, 0)
    found = raised.value.diagnostics[0]
    assert found.subject == str(source) and "`w`" in found.message and "look at that file" in found.help


def test_a_mapped_source_that_became_shorter(tmp_path: Path) -> None:
    """As where the system copies nothing between two file systems."""
    with (tmp_path / "short").open("w+b") as file:
        file.truncate(3 * mmap.PAGESIZE)
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
        file.truncate(mmap.PAGESIZE)
    with (
        CheckpointWriter(tmp_path / "out", [("w", "U8", (len(mapped),))]) as writer,
        pytest.raises(MapError, match="cannot write tensor `w`: the file that it comes from has become shorter"),
    ):
        writer.write("w", mapped)
