"""Conversions that several processes share: the files are those of one process, whoever did what."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

import mapdsl
from mapdsl.checkpoint import engine, ranks
from mapdsl.checkpoint.journal import Journal, JournalFile, Segment, partial_folder, segment_path
from mapdsl.checkpoint.ranks import OtherRankError, Ranks, join_ranks
from mapdsl.cli.main import main
from mapdsl.demo import small_config, write_release
from mapdsl.language.diagnostics import MapError
from tests.conversions import assert_same_files, contents, only, renames
from tests.helpers.ranks import PROGRAM, together, torchrun
from tests.spoiling import flip_everywhere

NAME = "deepseek_v4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A release, the model that it converts to, and what that converts back to."""
    folder = tmp_path_factory.mktemp("ranks")
    write_release(folder / "released", small_config())
    mapdsl.convert(folder / "released", folder / "model", NAME)
    mapdsl.convert(folder / "model", folder / "back", NAME)
    return folder / "released", folder / "model", folder / "back"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program" / "program.py"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    return path


def units_of(destination: Path, rank: int) -> list[int]:
    """The units that a rank has noted."""
    lines = segment_path(partial_folder(destination), rank).read_text().splitlines()
    return [record["unit"] for record in map(json.loads, lines) if "unit" in record]


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_processes_write_what_one_writes(folders: tuple[Path, Path, Path], tmp_path: Path, count: int) -> None:
    for way, target in enumerate(("model", "back")):
        done = torchrun(count, "convert", str(folders[way]), str(tmp_path / target), "--map", NAME)
        assert done.returncode == 0, done.stderr
        assert_same_files(tmp_path / target, folders[way + 1])
        assert done.stdout.count(" read, ") == 1  # the story is told once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model"]


@pytest.mark.parametrize(("count", "killed", "others"), [(2, "1 20", 1), (4, "0 12", 2), (2, "0 9", 4)])
def test_a_killed_rank_ends_all_and_others_go_on(
    folders: tuple[Path, Path, Path], tmp_path: Path, program: Path, count: int, killed: str, others: int
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(folders[0]), str(out), "--map", NAME]
    done = torchrun(count, *command, program=program, KILL=killed)
    assert done.returncode != 0 and not out.exists()
    rank, units = map(int, killed.split())
    assert len(units_of(out, rank)) == units
    with pytest.raises(MapError, match="an unfinished conversion to this destination is there"):
        mapdsl.convert(folders[0], out, NAME)
    if others == 1:
        mapdsl.convert(folders[0], out, NAME, resume=True)
    else:
        done = torchrun(others, *command, "--resume")
        assert done.returncode == 0, done.stderr
    assert_same_files(out, folders[1])


def test_a_failure_is_told_once(folders: tuple[Path, Path, Path], tmp_path: Path, program: Path) -> None:
    out = tmp_path / "out"
    command = ["convert", str(folders[0]), str(out), "--map", NAME]
    done = torchrun(2, *command, program=program, FAIL="1 5")
    assert done.returncode != 0
    assert done.stderr.count("no space left on device") == 1 and "rank 1 of 2, on " in done.stderr
    assert len(units_of(out, 1)) == 5
    done = torchrun(2, "convert", str(folders[0]), str(out), "--map", NAME, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_files(out, folders[1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--map", NAME, "--dtype", "f64"], "invalid choice"),
        (["--map", NAME, "--workers", "0"], "--workers is 1 or more"),
        (["--map", "nowhere.map"], "nowhere.map"),
    ],
)
def test_what_is_wrong_from_the_start_is_told_once(
    folders: tuple[Path, Path, Path], tmp_path: Path, words: list[str], told: str
) -> None:
    done = torchrun(2, "convert", str(folders[0]), str(tmp_path / "out"), *words)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert done.stderr.split("torch.distributed.elastic")[0].count(told) == 1


def test_a_rank_that_is_not_the_first_leaves_other_commands_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["maps"]) == 0
        assert main(["--help"]) == 0
        # A launcher kills all at the first failure, which must not be of a rank that does not tell.
        assert main(["maps", "--nonsense"]) == (2 if rank == "0" else 0)
        said.append(capsys.readouterr())
    assert said[0].out and said[0].err and not said[1].out and not said[1].err


# --- threads --------------------------------------------------------------------------------------------------------


def shared(source: Path, destination: Path, count: int, **options: Any) -> list[Any]:
    return together(count, lambda ranks: mapdsl.convert(source, destination, NAME, ranks=ranks, **options))


def test_every_rank_has_a_part_and_the_whole_result(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: dict[str, int] = {}
    add = JournalFile.add

    def counted(self: JournalFile, record: Any) -> None:
        added[self.path.name] = added.get(self.path.name, 0) + 1
        add(self, record)

    monkeypatch.setattr(JournalFile, "add", counted)
    events: list[Any] = []
    done = shared(folders[0], tmp_path / "out", 3, report=events.append)
    assert_same_files(tmp_path / "out", folders[1])
    assert len(added) == 3 and min(added.values()) > 10
    alone = mapdsl.convert(folders[0], tmp_path / "alone", NAME)
    same = {"destination": alone.destination, "seconds": 0.0}
    assert all(replace(one, **same) == replace(alone, seconds=0.0) for one in done)
    last = [event for event in events if event["event"] == "progress"][-1]
    assert last["bytes"] == last["total"]


@pytest.mark.parametrize("way", [0, 1])
def test_machines_do_not_write_to_the_same_page(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: int
) -> None:
    parts: list[set[int]] = []
    convert = engine.convert_tensors

    def noted(*arguments: Any, **options: Any) -> None:
        parts.append(set(options["only"]))
        convert(*arguments, **options)

    monkeypatch.setattr("mapdsl.checkpoint.sharing.convert_tensors", noted)
    names = iter(["a", "b", "b"])
    monkeypatch.setattr(ranks, "node_name", lambda: next(names))
    shared(folders[way], tmp_path / "out", 3)
    assert_same_files(tmp_path / "out", folders[way + 1])
    assert len(parts) == 4 and parts[3]  # the first rank again
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_a_distributed_checkpoint_is_packed_by_the_first_rank(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    mapdsl.convert(folders[0], tmp_path / "alone", NAME, format="dcp", max_shard_size="2MB")
    done = shared(folders[0], tmp_path / "out", 2, format="dcp", max_shard_size="2MB")
    assert_same_files(tmp_path / "out", tmp_path / "alone")
    assert done[1].files == done[0].files and len(done[0].files) > 2


def test_what_all_ranks_have_written_is_verified(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    alone = mapdsl.convert(folders[0], tmp_path / "alone", NAME, verify=True, checksums=True)
    done = shared(folders[0], tmp_path / "out", 2, verify=True, checksums=True)
    assert alone.verified is not None and done[0].verified == done[1].verified == alone.verified
    assert_same_files(tmp_path / "out", tmp_path / "alone")


def test_what_was_edited_on_any_rank_is_told(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "edited")
    flip_everywhere(tmp_path / "edited", Random(1))
    alone = mapdsl.convert(tmp_path / "edited", tmp_path / "alone", NAME)
    done = shared(tmp_path / "edited", tmp_path / "out", 2)
    assert len(alone.edited) > 20 and done[0].edited == done[1].edited == alone.edited
    assert_same_files(tmp_path / "out", tmp_path / "alone")


def test_ranks_with_different_conversions(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        return mapdsl.convert(folders[0], tmp_path / "out", NAME, dtype="f32" if ranks.rank else None, ranks=ranks)

    first, second = together(2, work)
    assert only(first).code == "C507" and "rank 1 has another conversion to do" in only(first).message
    assert "an option" in only(first).message
    assert isinstance(second, OtherRankError) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["of the disk", "of the data"])
def test_the_failure_of_a_rank_stops_the_others(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, kind: str
) -> None:
    add, failing = JournalFile.add, Journal if rank == 0 else Segment

    def stopped(self: JournalFile, record: Any) -> None:
        if isinstance(self, failing) and len(self.done) == 3:
            raise OSError(5, "Input/output error") if kind == "of the disk" else MapError([])
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFile, "add", stopped)
        outcomes = shared(folders[0], tmp_path / "out", 2)
    assert isinstance(outcomes[rank], MapError) and isinstance(outcomes[1 - rank], OtherRankError)
    assert partial_folder(tmp_path / "out").exists() == (kind == "of the disk")
    if kind == "of the disk":
        shared(folders[0], tmp_path / "out", 3, resume=True)
        assert_same_files(tmp_path / "out", folders[1])


def test_ranks_stop_soon_after_another_failed(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, members = JournalFile.add, []

    def stopped(self: JournalFile, record: Any) -> None:
        if isinstance(self, Segment):
            raise OSError(5, "Input/output error")
        if len(self.done) == 2:
            assert members[0].stop.wait(20)
        add(self, record)

    def work(member: Ranks) -> Any:
        members.extend([member] * (not member.rank))
        return mapdsl.convert(folders[0], tmp_path / "out", NAME, ranks=member)

    monkeypatch.setattr(JournalFile, "add", stopped)
    together(2, work)
    assert len(units_of(tmp_path / "out", 0)) == 3


def test_one_rank_tells_and_of_what_all_find_it_is_the_first() -> None:
    def work(member: Ranks) -> bool:
        with pytest.raises(ValueError, match="all find it"), member.together():
            if not member.rank:
                time.sleep(0.3)
            raise ValueError("all find it")
        return member.tells()

    assert together(4, work) == [True, False, False, False]


def test_what_another_rank_has_done_is_worth_keeping(tmp_path: Path) -> None:
    for keeps in (False, True):
        journal = Journal(tmp_path / "out", {"the map": "x"})
        segment_path(journal.folder, 1).write_text('{"unit": 3}\n' if keeps else "")
        assert journal.worth_keeping == keeps
        journal.close()
        assert journal.folder.exists() == keeps


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion by two ranks, each of which is interrupted when it has done eight units."""
    add = JournalFile.add

    def stopped(self: JournalFile, record: Any) -> None:
        if len(self.done) == 8:
            raise KeyboardInterrupt
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFile, "add", stopped)
        shared(source, out, 2)


def test_half_a_line_of_a_segment_says_nothing(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(folders[0], out, monkeypatch)
    path = segment_path(partial_folder(out), 1)
    before = units_of(out, 1)
    path.write_bytes(path.read_bytes()[:-9])
    shared(folders[0], out, 2, resume=True)
    assert before and contents(out) == contents(folders[1])


def test_a_rank_of_an_earlier_run_that_is_still_at_work(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(folders[0], out, monkeypatch)
    segment = Segment(out, 1)
    with pytest.raises(MapError, match="another run is converting to this destination"):
        mapdsl.convert(folders[0], out, NAME, resume=True)
    segment.close()
    mapdsl.convert(folders[0], out, NAME, resume=True)
    assert_same_files(out, folders[1])


def test_no_shared_file_system(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here = os.fspath(tmp_path / "out"), os.fspath(tmp_path / "elsewhere" / "out")
    first, second = together(2, lambda ranks: mapdsl.convert(folders[0], here[ranks.rank], NAME, ranks=ranks))
    assert only(second).code == "C507" and "the ranks need a file system that they share" in only(second).help
    assert isinstance(first, OtherRankError)


def test_fewer_units_than_ranks(tmp_path: Path) -> None:
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "alone", file)
    together(6, lambda ranks: mapdsl.convert(source, tmp_path / "out", file, ranks=ranks))
    assert_same_files(tmp_path / "out", tmp_path / "alone")


def test_a_process_that_is_alone_needs_no_distributed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.distributed.distributed_c10d", "torch.distributed.rendezvous"):
        monkeypatch.setitem(sys.modules, name, None)  # as in builds of torch without it
    assert join_ranks({}) is None
    assert join_ranks({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}) is None
