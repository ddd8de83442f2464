"""What goes along with a conversion, on request: verifying what is written, and taking its checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.checksums import CHECKSUM_FILE, Summer
from mapdsl.checkpoint.dcp_metadata import METADATA_FILE
from mapdsl.checkpoint.following import Follower, Verified
from mapdsl.checkpoint.journal import Journal
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.memory import held_bytes
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.progress import Reporter
from mapdsl.checkpoint.sharing import Means
from mapdsl.checkpoint.sidecar import SIDE_FILE, SideFile, SideWriter
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.checkpoint.written import written_checkpoint

Done = Callable[[int, Mapping[str, int]], object]
"""Told of a unit that is written, and of what was encoded anew in it."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted beside the conversion."""

    verify: bool = False
    checksums: bool = False


def shared_means(means: Means, wanted: Wanted, plan: Plan) -> tuple[Means, Means]:
    """The means of the conversion, and those of what verifies it: beside it, half of all each, or after it, all.

    It comes after where units of other ranks are not told of, where packed shards are gone, and where there is memory
    for one unit alone.
    """
    workers, memory = means.workers // 2, means.memory // 2
    is_last = plan.request.format == "dcp" or means.ranks is not None
    is_last |= wanted.verify and max(held_bytes(plan), default=0) > memory
    if not wanted.verify or is_last:
        return means, replace(means, is_last=is_last)
    first = replace(means, workers=max(means.workers - workers, 1), memory=means.memory - memory)
    return first, replace(means, workers=max(workers, 1), memory=memory)


class Attendants:
    """Those of one conversion into `folder`; a context: whoever leaves it early gives them up.

    `done` is to be told of every unit that is written, `finish` comes when all files have their last form.
    """

    def __init__(
        self,
        wanted: Wanted,
        plan: Plan,
        layout: Iterable[FileLayout],
        journal: Journal,
        kept: SideWriter | None,
        means: Means,
    ) -> None:
        layout, folder = tuple(layout), journal.folder
        self.verified: Verified | None = None
        self._plan, self._folder, self._is_packed = plan, folder, plan.request.format == "dcp"
        self._members = plan.units.members()
        self._follower: Follower | None = None
        self._summer: Summer | None = None
        if wanted.verify:
            self._follower = Follower(plan, layout, journal, kept, means)
        self._sums = wanted.checksums
        self._is_last = means.is_last
        self._written = written_checkpoint(layout, folder)

    @property
    def done(self) -> Done | None:
        """What is to be told of units, if anything is."""
        return self._done if self._follower is not None or self._summer is not None else None

    def start(self) -> None:
        """All files are made."""
        if self._follower is not None:
            self._follower.start()
        if self._sums:
            self._summer = Summer(self._written)

    def finish(self, writer: CheckpointWriter, reporter: Reporter) -> None:
        """Compare what is left to compare, and write the checksums. MapError, R601, where something differs."""
        packed = open_checkpoint(self._folder / METADATA_FILE) if self._is_packed else None
        verified = self._follower.finish(reporter, packed) if self._follower is not None else None
        if verified is not None and (self._folder / SIDE_FILE).exists():
            verified = replace(verified, kept=_check_side_file(self._folder / SIDE_FILE))
        if self._summer is not None:
            writer.write_bytes(CHECKSUM_FILE, self._summer.finish(reporter, packed))
        self.verified = verified

    def __enter__(self) -> Attendants:
        return self

    def __exit__(self, *_: object) -> None:
        if self._follower is not None:
            self._follower.stop()
        if self._summer is not None:
            self._summer.stop()

    def _done(self, unit: int, edited: Mapping[str, int]) -> None:
        if self._follower is not None:
            self._follower.done(unit, edited)
        if self._summer is not None and not self._is_last:
            self._summer.written(map(self._plan.name_of, self._members[unit][1]))


def _check_side_file(path: Path) -> int:
    """Read all that a side file keeps, and hold it against its checksums; gives the number of entries."""
    side = SideFile(path)
    for name in side:
        side.entry(name, is_meta=False)
    for name in side.stored_names:
        side.stored(name)
    return len(side) + len(list(side.stored_names))
