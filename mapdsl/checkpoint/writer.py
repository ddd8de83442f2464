"""Writing a checkpoint: everything into a hidden folder beside the destination, which takes its name at the end."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.completion import clean_up
from mapdsl.checkpoint.dtypes import DTYPE_NAMES, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.file_writing import allocate, copy_range, flush, flush_folder, write_tensor
from mapdsl.checkpoint.files import bad_file, is_plain_name, leaves_folder, reason
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.interrupts import deferred_interrupts
from mapdsl.checkpoint.journal import JournalFile, partial_folder
from mapdsl.checkpoint.layout import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    Entry,
    FileLayout,
    disk_needed,
    index_text,
    places_in,
    plan_layout,
)
from mapdsl.checkpoint.ranks import may_go_on
from mapdsl.checkpoint.rawbytes import buffer
from mapdsl.checkpoint.sources import check_disk

_SHOWN = 5


class CheckpointWriter:
    """Writes a safetensors checkpoint, tensor by tensor in any order, from any thread.

    Files, headers and sizes are fixed at the start: from `entries` (name, dtype in safetensors' spelling, stored shape)
    shared out as `plan_layout` says, or from an explicit `layout`, whose headers are kept byte for byte. An index is
    added where there are several files, unless `write_index` is off or the caller wrote it.

    All is written in a hidden folder beside `destination`; `commit()` makes it durable and renames it. `abort()`,
    leaving a `with` block without a commit, and any failure of the file system remove it; with a `journal` of units
    that are done, a failure of the file system and an interrupt leave it for a later run. `beside_bytes` is what files
    that the caller makes himself need of the disk.

    Raises a MapError: C507 where the destination exists, its folder does not, the disk is too full, or a layout is bad;
    C506 for a tensor or a file given twice.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        entries: Iterable[Entry] | None = None,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        single_file: bool = False,
        layout: Sequence[FileLayout] | None = None,
        write_index: bool = True,
        journal: JournalFile | None = None,
        beside_bytes: int = 0,
    ) -> None:
        if (entries is None) == (layout is None):
            raise ValueError("expected either entries or a layout")
        if layout is None:
            options = {"max_shard_bytes": max_shard_bytes, "metadata": metadata, "single_file": single_file}
            layout = plan_layout(entries or (), **options)  # type: ignore[arg-type]
        self.destination = Path(destination)
        self.layout = tuple(layout)
        self._write_index = write_index
        self._places = places_in(self.layout)
        self._files = {file.name for file in self.layout}
        self._started: set[str] = set()
        self._written: set[str] = set()
        self._lock = threading.Lock()
        self._state = "open"
        self._journal = journal
        self._beside_bytes = beside_bytes
        self._folder = partial_folder(self.destination) if journal is not None else _new_folder(self.destination)
        try:
            self._check_destination()
            self._make_files()
        except BaseException:  # an interrupt too leaves nothing behind
            self.abort()
            raise

    keeps_headers = True
    """Whether the layout's headers are written, byte for byte."""

    @property
    def folder(self) -> Path:
        """Where the files are until `commit`: others may write tensors there, which `take_over` then names."""
        return self._folder

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The names of the files that hold tensors."""
        return tuple(file.name for file in self.layout)

    @property
    def names(self) -> list[str]:
        """Every tensor to be written, in stored order."""
        return list(self._places)

    @property
    def missing(self) -> list[str]:
        """The tensors not yet written, in stored order."""
        return [name for name in self._places if name not in self._written]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor's bytes at its place.

        Strided tensors and those on a device are copied in strips of 16 MiB, not whole. Raises a MapError: C501 for a
        name that is not in the layout, C503 and C504 for another shape or dtype than its header's, C506 for a second
        write, C507 where the disk fails (then the whole writer is aborted).
        """
        with self._writing(name, tensor) as stored:
            write_tensor(self._folder / stored.file, stored.begin, tensor)

    def copy(self, name: str, tensor: torch.Tensor, source: Path, offset: int) -> None:
        """Write a tensor whose bytes lie in a file from an offset on: copied by the system, not through this process.

        Where the system cannot, from memory. Errors as `write`.
        """
        with self._writing(name, tensor, source) as stored:
            if not copy_range(source, offset, self._folder / stored.file, stored.begin, stored.nbytes):
                write_tensor(self._folder / stored.file, stored.begin, tensor)

    def gather(self, name: str, tensor: torch.Tensor, pieces: Pieces) -> None:
        """Write a tensor that is still to be put together; `tensor` has its dtype and shape. Errors as `write`."""
        with self._writing(name, tensor) as stored:
            pieces.write(self._folder / stored.file, stored.begin)

    def view(self, name: str) -> torch.Tensor | None:
        """The place of a tensor in its file, as memory to write to; then call `viewed`. None where it has no bytes."""
        self._check_open()
        stored = self._place(name)
        if not stored.nbytes or stored.begin % torch_dtype(stored.dtype).itemsize:
            return None
        start = stored.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._removing(f"write tensor `{name}`"), (self._folder / stored.file).open("r+b") as file:
            pages = mmap.mmap(file.fileno(), stored.end - start, offset=start)
        whole = torch.frombuffer(pages, dtype=torch.uint8)[stored.begin - start :]
        return whole.view(torch_dtype(stored.dtype)).view(torch_shape(stored.dtype, stored.shape))

    def viewed(self, name: str, tensor: torch.Tensor) -> None:
        """Says that the place of a tensor, which `view` gave, is filled. Errors as `write`."""
        self._begun(name, tensor)
        self._written.add(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a written tensor back, into fresh memory; C501 for an unknown name, C502 before it was written."""
        self._check_open()
        stored = self._place(name)
        if name not in self._written:
            raise bad_file(self._final(stored), f"tensor `{name}` is not written yet", code="C502")
        tensor = torch.empty(torch_shape(stored.dtype, stored.shape), dtype=torch_dtype(stored.dtype))
        view, done = buffer(tensor), 0
        with self._removing(f"read tensor `{name}`"), (self._folder / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.begin)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(0, f"the file ends {len(view) - done:,} bytes early")
                done += count
        return tensor

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write another file; C507 for a name with a folder in it, C506 for one that was written."""
        self._check_open()
        self._take_name(name)
        with self._removing(f"write {name}"), (self._folder / name).open("wb") as file:
            file.write(data)

    def new_file(self, name: str) -> Path:
        """The path at which the caller makes another file himself, before `commit`; errors as `write_bytes`."""
        self._check_open()
        self._take_name(name)
        return self._folder / name

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, indented by two, in the order of `value`; errors as `write_bytes`."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))

    def carry_over(self, checkpoint: Checkpoint, files: Iterable[str] | None = None) -> None:
        """Copy files that are not tensors, all of `checkpoint.other_files` or some; errors as `write_bytes`.

        C507 for a name that is not among them, and for a link that leads out of the checkpoint's folder.
        """
        self._check_open()
        for name in checkpoint.other_files if files is None else files:
            source = checkpoint.folder / name
            if name not in checkpoint.other_files or leaves_folder(source):
                message = "the file is not carried over: it is no plain file of the checkpoint's folder"
                raise bad_file(source, message, advice="copy it yourself if you trust it")
            self._take_name(name)
            with self._removing(f"copy {name}"):
                shutil.copyfile(source, self._folder / name)

    def commit(self, check: Callable[[], object] | None = None) -> Path:
        """Write the index if there are several files, flush all to disk, and give the folder its name.

        `check` is called when all files have their last form; what it raises leaves the destination as it was.
        Raises a MapError: C502 while tensors are missing (the writer stays open), C507 where the disk fails or the
        destination has appeared meanwhile.
        """
        self._check_open()
        if missing := self.missing:
            shown = ", ".join(f"`{name}`" for name in missing[:_SHOWN]) + ", ..." * (len(missing) > _SHOWN)
            message = f"{len(missing):,} of {len(self._places):,} tensors were never written: {shown}"
            raise bad_file(
                self.destination, message, code="C502", advice="write them, or leave them out of the entries"
            )
        if self._write_index and len(self.layout) > 1 and INDEX_FILE not in self._files:
            self.write_bytes(INDEX_FILE, index_text(self.layout).encode("utf-8"))
        self._check_destination()
        with self._removing("finish the checkpoint"):
            self._finish_files()
            if check is not None:
                check()
            for name in self._files:
                flush(self._folder / name)
            flush_folder(self._folder)
            with deferred_interrupts():
                os.rename(self._folder, self.destination)
                self._state = "committed"
                clean_up(self.destination)
        self._close_journal()
        flush_folder(self.destination.parent)
        return self.destination

    def abort(self) -> None:
        """Remove what was written; does nothing after a commit."""
        if self._state == "open":
            self._state = "aborted"
            shutil.rmtree(self._folder, ignore_errors=True)
            self._close_journal()

    def leave(self) -> None:
        """Leave what was written, with its journal, for a later run to go on with."""
        if self._state == "open":
            self._state = "left"
            self._close_journal()

    def take_over(self, names: Iterable[str]) -> None:
        """Tensors that an earlier run has written."""
        written = set(names)
        self._started |= written
        self._written |= written

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and may_go_on(value) and self._journal is not None and self._journal.worth_keeping:
            self.leave()
        else:
            self.abort()

    @contextlib.contextmanager
    def _writing(self, name: str, tensor: torch.Tensor, source: Path | None = None) -> Iterator[StoredTensor]:
        """One tensor is written in the block, from `source` if it comes from a file."""
        stored = self._begun(name, tensor)
        try:
            with self._removing(f"{'copy' if source is not None else 'write'} tensor `{name}`", source):
                yield stored
        except BaseException:
            self._started.discard(name)
            raise
        self._written.add(name)

    def _make_files(self) -> None:
        """Make all files in their final size; those of an earlier run are there."""
        if self._journal is None or not self._journal.done:
            self._check_space()
            with self._removing("make the files"):
                if self._journal is None:
                    os.mkdir(self._folder)
                for file in self.layout:
                    allocate(self._folder / file.name, file)
            return
        for file in self.layout:
            if not self._is_there(file):
                self.leave()
                advice = f"start anew: remove {self._folder}"
                message = "a file of the unfinished conversion is not what it was"
                raise bad_file(self._folder / file.name, message, advice)

    def _is_there(self, file: FileLayout) -> bool:
        """Whether an earlier run has made a file."""
        path = self._folder / file.name
        return path.exists() and path.stat().st_size == file.size

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _finish_files(self) -> None:
        """For writers of other formats: all tensors are written, the files get their last form."""

    def _check_open(self) -> None:
        if self._state != "open":
            raise ValueError(f"the writer for {self.destination} is {self._state}")

    def _check_destination(self) -> None:
        if os.path.lexists(self.destination):
            advice = "choose another destination, or remove this one first"
            if self._journal is not None and self._journal.worth_keeping:  # it came while this one was made
                advice = f"remove it first; {self._journal.advice}"
                self.leave()
            raise bad_file(self.destination, "the destination exists already; nothing is overwritten", advice)
        parent = self.destination.parent
        if not parent.is_dir():
            raise bad_file(self.destination, f"its folder {parent} does not exist", advice="make it first")

    def _check_space(self) -> None:
        check_disk(self.destination, disk_needed(self.layout) + self._beside_bytes)

    def _check_fits(self, stored: StoredTensor, tensor: torch.Tensor) -> None:
        """The tensor has data, and the dtype and shape that its header promises."""
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            found = "a meta tensor" if tensor.device.type == "meta" else str(tensor.layout)
            raise bad_file(self._final(stored), f"tensor `{stored.name}` is {found}, expected dense data", code="C504")
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        if dtype != stored.dtype:
            message = f"tensor `{stored.name}` is {dtype}, expected {stored.dtype}"
            raise bad_file(self._final(stored), message, code="C504")
        if stored_shape(tensor) != stored.shape:
            message = f"tensor `{stored.name}` has shape {list(stored_shape(tensor))}, expected {list(stored.shape)}"
            raise bad_file(self._final(stored), message, code="C503")

    def _begun(self, name: str, tensor: torch.Tensor) -> StoredTensor:
        """The place of a tensor that fits there and was not written before."""
        self._check_open()
        stored = self._place(name)
        self._check_fits(stored, tensor)
        with self._lock:
            if name in self._started:
                raise bad_file(self._final(stored), f"tensor `{name}` is written a second time", code="C506")
            self._started.add(name)
        return stored

    def _place(self, name: str) -> StoredTensor:
        if name not in self._places:
            raise bad_file(self.destination, f"tensor `{name}` is not among those to be written", code="C501")
        return self._places[name]

    def _final(self, stored: StoredTensor) -> Path:
        return self.destination / stored.file

    def _take_name(self, name: str) -> None:
        if not is_plain_name(name):
            raise bad_file(self.destination, f"{name!r} is no plain file name", advice="no folders, no `..`")
        with self._lock:
            if name in self._files:
                raise bad_file(self.destination / name, "the file is written a second time", code="C506")
            self._files.add(name)

    @contextlib.contextmanager
    def _removing(self, task: str, source: Path | None = None) -> Iterator[None]:
        """Turns a failure of the file system into an error that says what to do, and leaves nothing behind.

        `source` is a file that is read, and may be at fault.
        """
        try:
            yield
        except OSError as problem:
            message = f"cannot {task}: {reason(problem)}"
            is_of_source = source is not None and problem.filename == str(source)
            at_fault = source if source is not None and is_of_source else self.destination
            remedy = "look at that file" if is_of_source else "free space, or choose another destination"
            advice = f"nothing is left of what was written; {remedy}"
            if self._journal is not None and self._journal.worth_keeping:
                advice = self._journal.advice
                self.leave()
            else:
                self.abort()
            raise bad_file(at_fault, message, advice) from problem


def _new_folder(destination: Path) -> Path:
    """A folder beside a destination that nobody else has."""
    return destination.with_name(f".{destination.name[:100]}.partial-{secrets.token_hex(4)}")
