"""A conversion shared out among ranks: the first leads, and writes what belongs to no unit; the others help."""

from __future__ import annotations

import json
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.division import divide
from mapdsl.checkpoint.engine import convert_tensors, output_bytes, take_over
from mapdsl.checkpoint.file_writing import flush
from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.journal import Journal, JournalFile, Segment, partial_folder
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.progress import Meter
from mapdsl.checkpoint.ranks import Ranks, may_go_on
from mapdsl.checkpoint.sidecar import Entry, Forgetful, SideWriter
from mapdsl.checkpoint.writer import CheckpointWriter


@dataclass(frozen=True)
class Means:
    """With what a conversion is done: workers and bytes of memory of this process, and the ranks that share it.

    `is_last` says of what verifies it that it comes after it, not beside.
    """

    workers: int
    memory: int
    ranks: Ranks | None = None
    is_last: bool = False


def lead(
    plan: Plan,
    writer: CheckpointWriter,
    entries: MutableMapping[str, Entry],
    means: Means,
    *,
    journal: Journal,
    progress: Meter,
) -> None:
    """Convert all units of a plan, as the first rank: in the end the writer and the entries have what all have done."""
    ranks = _ranks_of(means)
    done = take_over(plan, writer, entries, journal, journal.done)
    progress.skip(output_bytes(plan, done))
    division = divide(plan, writer.layout, done, ranks.nodes)
    _flush(journal, writer.layout, ranks)
    ranks.hand_out("units", [json.dumps(part) for part in division.parts[1:]])
    ranks.heard = progress
    part = {"workers": means.workers, "memory": means.memory, "progress": progress, "journal": journal}
    try:
        _convert_part(plan, writer, entries, division.parts[0], ranks, part)
        ranks.hear_all([int(text) for text in ranks.collect("written")])
        take_over(plan, writer, entries, journal, journal.collect())
        if division.last:
            _convert_part(plan, writer, entries, division.last, ranks, part)
    except BaseException as problem:
        if not may_go_on(problem):
            ranks.stop_others()  # before what they write is removed
        raise


def help_out(plan: Plan, layout: list[FileLayout], destination: Path, means: Means) -> None:
    """Convert the units that the first rank gives to this one; ends when they are written."""
    ranks = _ranks_of(means)
    units = json.loads(ranks.receive("units"))
    journal = Segment(destination, ranks.rank)
    keeps = plan.to_right and plan.request.use_complement
    kept = SideWriter(destination, journal.folder, ranks.rank) if keeps else None
    entries = plan.side if plan.side is not None else kept if kept is not None else Forgetful()
    meter = _RankMeter(ranks)
    part = {"workers": means.workers, "memory": means.memory, "progress": meter, "journal": journal}
    try:
        with _PartWriter(destination, layout=layout, journal=journal) as writer:
            _convert_part(plan, writer, entries, units, ranks, part)
            _flush(journal, layout, ranks)
    finally:
        if kept is not None:
            kept.close()
        journal.close()
    ranks.send("written", str(meter.bytes_done))


def flush_leftovers(destination: Path) -> None:
    """Have this machine write what a run that was killed has left to it, before another machine writes there."""
    for path in sorted(partial_folder(destination).glob("*.safetensors")):
        try:
            flush(path)
        except OSError as problem:
            raise bad_file(path, f"cannot flush the file: {reason(problem)}") from problem


class _RankMeter(Meter):
    """Tells the first rank, which shows progress."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__("writing", 0)
        self._ranks, self.bytes_done = ranks, 0

    def __call__(self, count: int) -> None:
        with self._lock:
            self.bytes_done += count
        self._ranks.tell_bytes(self.bytes_done)


class _PartWriter(CheckpointWriter):
    """Writes tensors to files that the first rank has made, and will finish."""

    def _make_files(self) -> None:
        """They are there."""

    def abort(self) -> None:
        """The first rank removes what is of no use."""
        self.leave()


def _convert_part(
    plan: Plan,
    writer: CheckpointWriter,
    entries: MutableMapping[str, Entry],
    units: Collection[int],
    ranks: Ranks,
    part: dict[str, Any],
) -> None:
    convert_tensors(plan, writer, entries, only=units, stop=ranks.stop, **part)
    ranks.check()


def _ranks_of(means: Means) -> Ranks:
    if means.ranks is None:
        raise ValueError("expected ranks to share with")
    return means.ranks


def _flush(journal: JournalFile, layout: Collection[FileLayout], ranks: Ranks) -> None:
    """Other machines see what was written to the files, and what they write is not written over."""
    if len(set(ranks.nodes)) == 1:
        return
    for file in layout:
        path = journal.folder / file.name
        try:
            if path.exists():  # a shard that an earlier run has packed is no longer there
                flush(path)
        except OSError as problem:
            message = f"cannot flush {file.name}: {reason(problem)}"
            raise bad_file(journal.destination, message, journal.advice) from problem
