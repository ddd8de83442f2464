"""Ranks of which nothing is heard any more: the others do not wait for them, and say why they stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import mapdsl
from mapdsl.checkpoint import ranks
from mapdsl.checkpoint.ranks import OtherRankError, Ranks
from mapdsl.demo import small_config, write_release
from tests.conversions import assert_same_files, only
from tests.helpers.ranks import PROGRAM, launched, together

NAME = "deepseek_v4"


@pytest.mark.parametrize(
    ("killed", "told"),
    [
        (0, "rank 1: error[C507]: rank 1 has lost the others"),
        (1, "rank 1: error[C507]: the process of rank 1 has ended"),
    ],
)
def test_a_killed_rank_is_missed_where_no_launcher_tells(tmp_path: Path, killed: int, told: str) -> None:
    source, out, program = tmp_path / "released", tmp_path / "out", tmp_path / "program.py"
    write_release(source, small_config())
    program.write_text(PROGRAM)
    command = ["convert", str(source), str(out), "--map", NAME]
    done = launched(2, *command, program=program, KILL=f"{killed} 5")  # raises where they do not end within a minute
    assert (done[killed].returncode, done[1 - killed].returncode) == (-9, 1)
    assert told in done[1 - killed].stderr and "--resume goes on" in done[1 - killed].stderr and not out.exists()
    mapdsl.convert(source, out, NAME, resume=True)
    mapdsl.convert(source, tmp_path / "alone", NAME)
    assert_same_files(out, tmp_path / "alone")


def test_a_rank_that_is_not_heard_of_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)

    def work(member: Ranks) -> Any:
        if member.rank:
            member._ended.set()  # it says nothing more, and does nothing
            member._watcher.join()
            member.stop.wait(2)
            return None
        return member.collect("never")

    first, _ = together(2, work)
    assert only(first).code == "C507" and "rank 1 was not heard of" in only(first).message
    assert ranks.may_go_on(first)


def test_why_a_rank_was_lost_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)

    def work(member: Ranks) -> None:
        if member.rank:
            member._ended.set()
            member._watcher.join()
        assert member.rank or member.stop.wait(20)
        time.sleep(0.5)  # at a unit that takes long; meanwhile it hears its own word that all are to stop
        member.check()

    first, _ = together(2, work)
    assert "rank 1 was not heard of" in only(first).message


def test_a_rank_that_cannot_listen_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)

    def work(member: Ranks) -> Any:
        def broken(count: int) -> None:
            raise ValueError(f"{count} bytes")

        member.heard = broken
        member.tell_bytes(7 * member.rank)
        return member.receive("never") if member.rank else member.collect("never")

    first, second = together(2, work)
    assert "rank 0 has lost the others: 7 bytes" in only(first).message
    assert isinstance(second, OtherRankError)
