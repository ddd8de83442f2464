"""The journal of a conversion under way: which units are done, so that a run that was killed can be gone on with.

It lies in the hidden folder that the conversion makes, a line of JSON for each unit, written after the unit's tensors.
What a killed process wrote stays in the system's hands, so a line that is there says that its tensors are, too; a last
line that is cut off says nothing. The open journal is locked: a second run into the same destination is refused.

Where several processes (ranks) convert one checkpoint, each but the first writes a file of its own, a segment, since
not every file system can append from two machines. The journal is all of them together, whoever goes on with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.identity import FOLLOWING
from mapdsl.checkpoint.ranks import Ranks, may_go_on
from mapdsl.language.diagnostics import Diagnostic, MapError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]

WORK_PREFIX = ".mapdsl."
"""Names of files begin so that are of use only until a conversion is complete."""

JOURNAL_FILE = f"{WORK_PREFIX}journal"
_FORMAT = "mapdsl journal 2"


def partial_folder(destination: Path) -> Path:
    """The folder in which a checkpoint is made before it takes its name."""
    return destination.with_name(f".{destination.name[:100]}.partial")


def segment_path(folder: Path, rank: int) -> Path:
    """The file in which a rank notes what it has done."""
    return folder / (f"{JOURNAL_FILE}-{rank}" if rank else JOURNAL_FILE)


class JournalFile:
    """A file of a journal, open and locked: `done` are records of what is done."""

    def __init__(self, destination: Path, rank: int) -> None:
        self.destination, self.folder = destination, partial_folder(destination)
        self.path = segment_path(self.folder, rank)
        self.done: list[dict[str, Any]] = []
        self._descriptor = -1
        self._lock = threading.Lock()

    @property
    def advice(self) -> str:
        """How to go on after a failure."""
        if not self.path.exists():
            return f"{self.folder}, with what was done, is no longer there: begin anew, without --resume"
        return f"what is done is kept: the same command with --resume goes on (to give up, remove {self.folder})"

    @property
    def worth_keeping(self) -> bool:
        """Whether a failure leaves something that a later run can go on with."""
        return True

    def add(self, record: Mapping[str, Any]) -> None:
        """Note that a unit is done. OSError where the disk fails."""
        self._write(record)
        self.done.append(dict(record))

    def close(self) -> None:
        """Give up the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode("utf-8") + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]

    @contextlib.contextmanager
    def _naming(self, task: str) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise bad_file(self.destination, f"cannot {task}: {reason(problem)}") from problem

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """For errors after which a later run can go on, and which do not say so: of a source that has gone, say."""
        try:
            yield
        except MapError as problem:
            if not (may_go_on(problem) and self.done and self.path.exists()):
                raise
            found = [d if "--resume" in d.help else _with_help(d, self.advice) for d in problem.diagnostics]
            raise MapError(found) from problem.__cause__

    @contextlib.contextmanager
    def _locking(self) -> Iterator[None]:
        """Locks the file that is open; closed again where what follows fails."""
        try:
            _lock(self._descriptor, self.destination)
            yield
        except BaseException:
            os.close(self._descriptor)  # the folder may be another run's
            self._descriptor = -1
            raise


class Journal(JournalFile):
    """The journal of a new conversion, or with `resume` of one that was cut short.

    `identity` says what is converted, and how: texts by what they are of. `done` are the records of an earlier run.
    `ranks` are those that convert it together, this process the first of them.

    Raises a MapError, C507: where another run is at work or has left something and `resume` was not asked for; where
    nothing was left, or something of another identity, and it was.
    """

    def __init__(
        self,
        destination: Path,
        identity: Mapping[str, str],
        *,
        resume: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(destination, 0)
        self._ranks = ranks
        self._known: dict[Path, int] = {}  # by segment, bytes that were read
        exists = self.folder.exists()
        with self._naming("make the files"):
            if not exists:
                if resume:
                    raise _nothing_left(destination)
                self.folder.mkdir()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with self._locking():
            if exists:
                self._read(identity, resume=resume)
            if not self.done:
                self._begin(identity)
            with self._naming("make the files"):
                for rank in range(1, 1 if ranks is None else ranks.count):
                    segment_path(self.folder, rank).touch()

    @property
    def worth_keeping(self) -> bool:
        """Whether anything is done; where not, no other rank is at work any more."""
        if not self._has_any() and self._ranks is not None:
            self._ranks.stop_others()
        return self._has_any()

    def collect(self) -> list[dict[str, Any]]:
        """The records of what the other ranks have done, which then are this journal's too."""
        found: list[dict[str, Any]] = []
        with self._naming("read the journal"):
            for path in self._segments():
                found += self._read_segment(path)
        self.done += found
        return found

    def close(self) -> None:
        """Give up the lock; a folder in which nothing is done goes too."""
        if self._descriptor >= 0 and not self._has_any():
            shutil.rmtree(self.folder, ignore_errors=True)
        super().close()

    def _has_any(self) -> bool:
        if self.done:
            return True
        with contextlib.suppress(OSError):
            return any(path.read_bytes() for path in self._segments())
        return True

    def _read(self, identity: Mapping[str, str], *, resume: bool) -> None:
        """Take over what an earlier run has done."""
        with self._naming("read the journal"):
            data = self.path.read_bytes()
        lines = data.split(b"\n")[:-1]  # what follows the last end of a line was cut off
        with self._naming("write the journal"):
            os.ftruncate(self._descriptor, sum(len(line) + 1 for line in lines))
        if not lines:
            return
        with _naming_journal(self.path):
            was, done = _parsed(lines)
            done += self._take_over_segments()
        if done:
            _require_going_on(self.destination, len(done), was, identity, resume=resume)
        self.done = done

    def _segments(self) -> list[Path]:
        """The other ranks' files."""
        return sorted(self.folder.glob(f"{JOURNAL_FILE}-*"))

    def _take_over_segments(self) -> list[dict[str, Any]]:
        """What the other ranks of an earlier run have done, once none of them is at work; half a line is cut off."""
        done: list[dict[str, Any]] = []
        for path in self._segments():
            with self._naming("read the journal"), path.open("r+b") as file:
                _lock(file.fileno(), self.destination)
                done += self._read_segment(path)
                file.truncate(self._known[path])
        return done

    def _read_segment(self, path: Path) -> list[dict[str, Any]]:
        """What was written to a segment since it was read last."""
        known = self._known.get(path, 0)
        lines = path.read_bytes()[known:].split(b"\n")[:-1]
        self._known[path] = known + sum(len(line) + 1 for line in lines)
        return [dict(json.loads(line)) for line in lines]

    def _begin(self, identity: Mapping[str, str]) -> None:
        """Begin anew: nothing is done. What else is in the folder is of no use."""
        with self._naming("make the files"):
            for path in self.folder.iterdir():
                if path.name != JOURNAL_FILE:
                    path.unlink()
            self._known.clear()
            os.ftruncate(self._descriptor, 0)
            self._write({"format": _FORMAT, "identity": dict(identity)})


class Segment(JournalFile):
    """The file of another rank than the first, which the first has made."""

    def __init__(self, destination: Path, rank: int) -> None:
        super().__init__(destination, rank)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
        except OSError as problem:
            message = f"cannot open what rank 0 has made: {reason(problem)}"
            raise bad_file(self.path, message, "the ranks need a file system that they share") from problem
        with self._locking():
            pass


def units_left_done(destination: Path, identity: Mapping[str, str], *, resume: bool) -> int:
    """How many units of this conversion an earlier run has done and left; changes nothing.

    Raises what a `Journal` raises: a MapError, C507.
    """
    folder = partial_folder(destination)
    if not folder.exists():
        if resume:
            raise _nothing_left(destination)
        return 0
    first = segment_path(folder, 0)
    if not (lines := _lines_left(first, destination)):
        return 0
    with _naming_journal(first):
        was, records = _parsed(lines)
    others = sorted(folder.glob(f"{JOURNAL_FILE}-*"))
    done = len(records) + sum(len(_lines_left(path, destination)) for path in others)
    if done:
        _require_going_on(destination, done, was, identity, resume=resume)
    return done


def _lines_left(path: Path, destination: Path) -> list[bytes]:
    """The whole lines of a journal's file, in which nobody writes any more; none where it is not there."""
    try:
        with path.open("rb") as file:
            _lock(file.fileno(), destination, is_shared=True)
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise bad_file(destination, f"cannot read the journal: {reason(problem)}") from problem


def require_same(
    destination: Path, was: Mapping[str, str], identity: Mapping[str, str], message: str, advice: str
) -> None:
    """C507 where one conversion is not the other, with what is not the same."""
    changed = [what for what in identity if was.get(what) != identity[what]]
    # What follows from another source, say, is not worth a word.
    if changed := [what for what in changed if what not in FOLLOWING] or changed:
        raise bad_file(destination, f"{message}: {' and '.join(changed)} changed", advice)


def _require_going_on(
    destination: Path, done: int, was: Mapping[str, str], identity: Mapping[str, str], *, resume: bool
) -> None:
    """C507 where what an earlier run has done is of no use to this one, or in its way."""
    folder = partial_folder(destination)
    if not resume:
        message = f"an unfinished conversion to this destination is there, {done:,} units of it done"
        raise bad_file(destination, message, f"--resume goes on with it; to give up, remove {folder}")
    advice = f"give the same options, or start anew: remove {folder}"
    require_same(destination, was, identity, "the unfinished conversion was another", advice)


def _with_help(diagnostic: Diagnostic, advice: str) -> Diagnostic:
    return replace(diagnostic, help="\n".join(filter(None, (diagnostic.help, advice))))


def _parsed(lines: Sequence[bytes]) -> tuple[dict[str, str], list[Any]]:
    """The identity of a conversion, and the records of what is done."""
    first, *rest = [json.loads(line) for line in lines]
    if first["format"] != _FORMAT:
        raise ValueError(f"its format is {first['format']!r}")
    return dict(first["identity"]), [dict(record) for record in rest]


@contextlib.contextmanager
def _naming_journal(path: Path) -> Iterator[None]:
    try:
        yield
    except MapError:
        raise
    except (ValueError, TypeError, KeyError) as problem:
        message = f"the journal of an unfinished conversion cannot be read ({problem})"
        raise bad_file(path, message, f"start anew: remove {path.parent}") from problem


def _nothing_left(destination: Path) -> MapError:
    return bad_file(destination, "there is no unfinished conversion to go on with", "leave out --resume")


def _lock(descriptor: int, destination: Path, *, is_shared: bool = False) -> None:
    """Take the lock of an open file. C507 where another run has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as problem:
        message = "another run is converting to this destination"
        raise bad_file(destination, message, "wait for it, or choose another destination") from problem
