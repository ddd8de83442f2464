"""Distributed Checkpoints whose writing was cut short, at any point of the packing, and gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import NAME, assert_same_files, change_json, write_tiny

import mapdsl
from mapdsl.language.diagnostics import MapError

KILLED = """
import os, signal, sys
import mapdsl
from mapdsl.checkpoint import dcp_writer, writer
source, destination, point = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

kind, number = point.split(":")
if kind == "flush":  # all is there but the name
    writer.flush = die
elif kind == "metadata":
    dcp_writer._Writer.finish = die
else:
    owner = {"note": dcp_writer.DcpWriter, "write_data": dcp_writer._Writer}[kind.split(" ")[-1]]
    call, left = getattr(owner, kind := "_note" if "note" in kind else "write_data"), [int(number)]
    after = "after" in point

    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] < 0 and not after:
            die()
        found = call(*arguments, **options)
        if left[0] < 0:
            die()
        return found

    setattr(owner, kind, counted)
mapdsl.convert(source, destination, "deepseek_v4", format="dcp", max_shard_size="300kB")
"""
POINTS = ["write_data:0", "write_data:2", "note:0", "note:3", "after note:0", "after note:2", "metadata:0", "flush:0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "source")
    change_json(folder / "source" / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    done = mapdsl.convert(folder / "source", folder / "out", NAME, format="dcp", max_shard_size="300kB")
    assert done.dropped
    assert len(list((folder / "out").glob("*.distcp"))) > 4
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_is_gone_on_with(tmp_path: Path, whole: Path, point: str) -> None:
    words = [sys.executable, "-c", KILLED, str(whole / "source"), str(tmp_path / "out"), point]
    assert subprocess.run(words, check=False).returncode == -9
    assert os.listdir(tmp_path) == [".out.partial"]
    options = {"format": "dcp", "max_shard_size": "300kB"}
    with pytest.raises(MapError, match="an unfinished conversion to this destination is there"):
        mapdsl.convert(whole / "source", tmp_path / "out", NAME, **options)
    with pytest.raises(MapError, match="the unfinished conversion was another"):
        mapdsl.convert(whole / "source", tmp_path / "out", NAME, max_shard_size="300kB", resume=True)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.distcp")}
    mapdsl.convert(whole / "source", tmp_path / "out", NAME, resume=True, **options)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_files(tmp_path / "out", whole / "out")
    kept = [name for name, time in before.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time]
    packed = {"after note:0": 1, "after note:2": 3, "note:3": 3, "write_data:2": 2}.get(point)
    assert len(kept) == (packed if packed is not None else len(before) if point in ("metadata:0", "flush:0") else 0)


def test_the_stored_side_is_gone_on_with(tmp_path: Path, whole: Path) -> None:
    """With tensors that the map drops, which are written after all others."""
    mapdsl.convert(whole / "out", tmp_path / "reference", NAME, format="dcp", max_shard_size="300kB")
    for point in ("after note:0", "flush:0"):
        words = [sys.executable, "-c", KILLED, str(whole / "out"), str(tmp_path / "out"), point]
        assert subprocess.run(words, check=False).returncode == -9
        mapdsl.convert(whole / "out", tmp_path / "out", NAME, format="dcp", max_shard_size="300kB", resume=True)
        assert_same_files(tmp_path / "out", tmp_path / "reference")
        (tmp_path / "out").rename(tmp_path / f"done {point}")
