"""The journal of a conversion under way: which units are done, so that a run that was killed can be gone on with.

It lies in the hidden folder that the conversion makes, a line of JSON for each unit, written after the unit's tensors.
What a killed process wrote stays in the system's hands, so a line that is there says that its tensors are, too; a last
line that is cut off says nothing. The open journal is locked: a second run into the same destination is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.files import bad_file, reason

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]

WORK_PREFIX = ".mapdsl."
"""Names of files begin so that are of use only until a conversion is complete."""

JOURNAL_FILE = f"{WORK_PREFIX}journal"
_FORMAT = "mapdsl journal 1"


def partial_folder(destination: Path) -> Path:
    """The folder in which a checkpoint is made before it takes its name."""
    return destination.with_name(f".{destination.name[:100]}.partial")


class Journal:
    """The journal of a new conversion, or with `resume` of one that was cut short.

    `identity` says what is converted, and how: texts by what they are of. `done` are the records of an earlier run.
    Raises a MapError, C507: where another run is at work or has left something and `resume` was not asked for; where
    nothing was left, or something of another identity, and it was.
    """

    def __init__(self, destination: Path, identity: Mapping[str, str], *, resume: bool = False) -> None:
        self.destination, self.folder = destination, partial_folder(destination)
        self.path = self.folder / JOURNAL_FILE
        self.done: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        exists = self.folder.exists()
        with self._naming("make the files"):
            if not exists:
                if resume:
                    raise bad_file(destination, "there is no unfinished conversion to go on with", "leave out --resume")
                self.folder.mkdir()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._take_lock()
            if exists:
                self._read(identity, resume=resume)
            if not self.done:
                self._begin(identity)
        except BaseException:
            os.close(self._descriptor)  # the folder may be another run's
            raise

    @property
    def advice(self) -> str:
        """How to go on after a failure."""
        return f"what is done is kept: the same command with --resume goes on (to give up, remove {self.folder})"

    def add(self, record: Mapping[str, Any]) -> None:
        """Note that a unit is done. OSError where the disk fails."""
        self._write(record)
        self.done.append(dict(record))

    def close(self) -> None:
        """Give up the lock; a folder in which nothing is done goes too."""
        if self._descriptor >= 0 and not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            message = "another run is converting to this destination"
            raise bad_file(self.destination, message, "wait for it, or choose another destination") from problem

    def _read(self, identity: Mapping[str, str], *, resume: bool) -> None:
        """Take over what an earlier run has done."""
        with self._naming("read the journal"):
            data = self.path.read_bytes()
        lines = data.split(b"\n")[:-1]  # what follows the last end of a line was cut off
        with self._naming("write the journal"):
            os.ftruncate(self._descriptor, sum(len(line) + 1 for line in lines))
        if len(lines) < 2:
            return
        if not resume:
            message = f"an unfinished conversion to this destination is there, {len(lines) - 1:,} units of it done"
            raise bad_file(self.destination, message, f"--resume goes on with it; to give up, remove {self.folder}")
        try:
            first, *rest = [json.loads(line) for line in lines]
            if first["format"] != _FORMAT:
                raise ValueError(f"its format is {first['format']!r}")
            was = dict(first["identity"])
            self.done = [dict(record) for record in rest]
        except (ValueError, TypeError, KeyError) as problem:
            message = f"the journal of an unfinished conversion cannot be read ({problem})"
            raise bad_file(self.path, message, f"start anew: remove {self.folder}") from problem
        changed = [what for what in identity if was.get(what) != identity[what]]
        if changed:
            message = f"the unfinished conversion was another: {' and '.join(changed)} changed"
            raise bad_file(self.destination, message, f"give the same options, or start anew: remove {self.folder}")

    def _begin(self, identity: Mapping[str, str]) -> None:
        """Begin anew: nothing is done. What else is in the folder is of no use."""
        with self._naming("make the files"):
            for path in self.folder.iterdir():
                if path.name != JOURNAL_FILE:
                    path.unlink()
            os.ftruncate(self._descriptor, 0)
            self._write({"format": _FORMAT, "identity": dict(identity)})

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
