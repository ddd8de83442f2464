"""Checksums of a checkpoint's tensors: SHA-256 of each one's bytes, as safetensors stores them, in a file beside it.

The bytes are little-endian and contiguous, so the same tensor has the same checksum however it is shared out over
files, in safetensors or in a torch Distributed Checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import secrets
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.byteranges import ByteRanges
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.elements import STRIP_BYTES
from mapdsl.checkpoint.files import bad_file, leaves_folder, read_object, reason
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.progress import Meter, Reporter
from mapdsl.checkpoint.sources import open_tensors

CHECKSUM_FILE = "mapdsl.checksums.json"
FORMAT = "mapdsl checksums 1"
_ALGORITHM = "sha256"
_THREADS = 4  # hashing leaves Python's lock; more would wait for the disk


@dataclass(frozen=True)
class ChecksumComparison:
    """A checkpoint held against checksums: `changed` have another one, or another dtype or shape, in stored order."""

    checkpoint: Path
    file: Path
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    changed: tuple[str, ...]
    same: int
    bytes_read: int

    @property
    def equal(self) -> bool:
        """Whether every tensor is what it was."""
        return not (self.missing or self.unknown or self.changed)

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        names = {key: list(getattr(self, key)) for key in ("missing", "unknown", "changed")}
        paths = {"checkpoint": str(self.checkpoint), "file": str(self.file)}
        return {"equal": self.equal, **paths, **names, "same": self.same, "bytes_read": self.bytes_read}


class Summer:
    """Finds the checksums of tensors of a checkpoint that is being written: of each soon after it is."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._ranges = ByteRanges(checkpoint)
        self._found: dict[str, str] = {}
        self._names: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mapdsl-checksums", daemon=True)
        self._thread.start()

    def written(self, names: Iterable[str]) -> None:
        """These tensors are written."""
        for name in names:
            self._names.put(name)

    def finish(self, reporter: Reporter, checkpoint: Checkpoint | None = None) -> bytes:
        """The text of the file, when all is written. `checkpoint` is what was written, if it has another form now."""
        self._names.put(None)
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        held = checkpoint or self._checkpoint
        left = [tensor for tensor in held.tensors.values() if tensor.name not in self._found]
        if left:
            with reporter.meter("checksums", sum(tensor.nbytes for tensor in left)) as meter:
                self._found |= _sums(held, left, meter)
        return _text(held, self._found)

    def stop(self) -> None:
        """Give up, and let go of the files."""
        self._stop.set()
        self._names.put(None)
        self._thread.join()
        self._ranges.close()

    def _work(self) -> None:
        try:
            while (name := self._names.get()) is not None and not self._stop.is_set():
                self._found[name] = _sum(self._ranges, self._checkpoint.tensors[name], None)
        except BaseException as problem:
            self._problem = problem


def write_checksums(path: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Write the checksums of a checkpoint's tensors beside it. MapError, C507, where it cannot be read or written."""
    checkpoint = open_tensors(path, "read")
    file = checkpoint.folder / CHECKSUM_FILE
    tensors = list(checkpoint.tensors.values())
    with Reporter(progress).meter("checksums", sum(tensor.nbytes for tensor in tensors)) as meter:
        text = _text(checkpoint, _sums(checkpoint, tensors, meter))
    made = file.with_name(f".{CHECKSUM_FILE}.{secrets.token_hex(4)}")
    try:
        made.write_bytes(text)
        os.replace(made, file)  # of a link the link itself: what it leads to may lie anywhere
    except OSError as problem:
        made.unlink(missing_ok=True)
        raise bad_file(file, f"cannot write the file: {reason(problem)}") from problem
    return file


def compare_checksums(
    path: str | os.PathLike[str], file: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> ChecksumComparison:
    """Hold a checkpoint against checksums, by default those of the file beside it.

    Raises a MapError, C507, where one of them cannot be read.
    """
    checkpoint = open_tensors(path, "read")
    place = checkpoint.folder / CHECKSUM_FILE if file is None else Path(file)
    if file is None and not place.exists():
        advice = "`--write` writes it, as does `mapdsl convert --checksums`; --file names one elsewhere"
        raise bad_file(place, "there are no checksums beside the tensors", advice)
    if file is None and leaves_folder(place):
        raise bad_file(place, "the file is a link that leads out of its folder", "give --file if you trust it")
    expected = read_checksums(place)
    both = [tensor for name, tensor in checkpoint.tensors.items() if name in expected]
    with Reporter(progress).meter("comparing", sum(tensor.nbytes for tensor in both)) as meter:
        found = _sums(checkpoint, both, meter)
    changed = tuple(tensor.name for tensor in both if _entry(tensor, found[tensor.name]) != expected[tensor.name])
    return ChecksumComparison(
        checkpoint.path,
        place,
        missing=tuple(name for name in expected if name not in checkpoint.tensors),
        unknown=tuple(name for name in checkpoint.tensors if name not in expected),
        changed=changed,
        same=len(both) - len(changed),
        bytes_read=sum(tensor.nbytes for tensor in both),
    )


def read_checksums(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file of checksums, by name of the tensor; C507 where it is none."""
    value = read_object(path, "file of checksums")
    if value.get("format") != FORMAT or value.get("algorithm") != _ALGORITHM:
        raise bad_file(path, f"its format is {value.get('format')!r:.80}, expected {FORMAT!r} with {_ALGORITHM}")
    entries = value.get("tensors")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise bad_file(path, "it has no `tensors`, an object of objects")
    return entries


def _sums(checkpoint: Checkpoint, tensors: list[StoredTensor], meter: Meter) -> dict[str, str]:
    """The checksums of some tensors, several at a time."""
    with ByteRanges(checkpoint) as ranges, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            found = pool.map(lambda tensor: _sum(ranges, tensor, meter), tensors)
            return dict(zip((tensor.name for tensor in tensors), found, strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _sum(ranges: ByteRanges, tensor: StoredTensor, meter: Meter | None) -> str:
    digest = hashlib.sha256()
    for offset in range(0, tensor.nbytes, STRIP_BYTES):
        data = ranges.read(tensor, offset, min(STRIP_BYTES, tensor.nbytes - offset))
        digest.update(data)
        if meter is not None:
            meter(len(data))
    return digest.hexdigest()


def _entry(tensor: StoredTensor, digest: str) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), _ALGORITHM: digest}


def _text(checkpoint: Checkpoint, sums: Mapping[str, str]) -> bytes:
    """The file: an object with a line for each tensor, in order of names, whatever the order in which they came."""
    lines = [
        f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(_entry(tensor, sums[name]))}"
        for name, tensor in sorted(checkpoint.tensors.items())
    ]
    head = f'{{\n  "format": "{FORMAT}",\n  "algorithm": "{_ALGORITHM}",\n  "tensors": {{\n'
    return (head + ",\n".join(lines) + "\n  }\n}\n").encode("utf-8")
