"""The pass over a checkpoint's data, by several workers: each takes the next unit that none has taken.

Every worker goes through the whole conversion; of units that are not its own it sees meta tensors, and gives nothing.
So a unit needs no plan of its own to be run apart, and the work shares itself out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.journal import JournalFile
from mapdsl.checkpoint.memory import Budget, held_bytes
from mapdsl.checkpoint.passes import Plan, another_adapter, run_plan
from mapdsl.checkpoint.progress import Meter, UnitProgress
from mapdsl.checkpoint.rawbytes import release_pages
from mapdsl.checkpoint.sidecar import Entry, SideFile, SideWriter
from mapdsl.checkpoint.units import Allocation
from mapdsl.checkpoint.window import WorkingWindow
from mapdsl.runtime.codecs.kernels import work_alone

PASSED_BYTES = 2**24  # of one side; the other may be four times as large
SMALL_BYTES = 2**26  # of output: less is done before a second worker has come so far


def convert_tensors(
    plan: Plan,
    writer: Writer,
    entries: MutableMapping[str, Entry],
    *,
    workers: int,
    progress: Meter,
    journal: JournalFile | None = None,
    finished: Callable[[int, Mapping[str, int]], object] | None = None,
    gate: Callable[[int], bool] | None = None,
    only: Collection[int] | None = None,
    memory: int | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Write all outputs of a plan. `progress` is told of bytes; raises what a worker raises, once all have stopped.

    Units that the journal has are done already; those that are finished are noted there. `finished` is told of both,
    with what was edited, as soon as their outputs are written. `gate` is asked before a worker begins a unit: it may
    wait, and False leaves the unit out.

    With `only`, just these units are converted, whatever the journal has. Units under way at once need no more than
    `memory`, if each of them by itself does not. All ends, without an error, soon after somebody sets `stop`.
    """
    workers = workers_for(plan, workers)
    run = _Run(plan, writer, entries, progress, journal, Budget(memory), stop or threading.Event())
    run.finished, run.gate = finished, gate
    if only is None:
        run.take_over()
    else:
        run.omit(set(range(plan.units.count)) - set(only))
    # A single worker is a thread of its own too: all of torch's threads for each small operator cost twice the time.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "mapdsl-convert", work_alone) as pool:
            try:
                futures = [pool.submit(_Worker(run).work) for _ in range(workers)]
                wait(futures)
            except BaseException:  # an interrupt, say: leaving the pool waits for the workers
                run.failed.set()
                raise
        failures = [problem for future in futures if (problem := future.exception()) is not None]
    finally:
        torch.set_num_threads(threads)
    for problem in failures:
        if not isinstance(problem, _StoppedError):
            raise problem


def workers_for(plan: Plan, asked: int) -> int:
    """How many workers a plan is worth."""
    return 1 if sum(map(plan.nbytes, plan.forms)) < SMALL_BYTES else asked


def take_over(
    plan: Plan,
    writer: Writer,
    entries: MutableMapping[str, Entry],
    journal: JournalFile,
    records: Iterable[Mapping[str, Any]],
) -> set[int]:
    """Take what records of a journal say is done, by an earlier run or another rank, as this run's; gives the units.

    C507 where a record is not what a run writes.
    """
    done: set[int] = set()
    for record in records:
        try:
            if record["unit"] not in range(plan.units.count):
                raise ValueError(f"there is no unit {record['unit']!r:.80}")
            done.add(record["unit"])
            edited = {str(name): int(count) for name, count in record["edited"].items()}
            plan.adapter.complement.edited.update(edited)
            if isinstance(entries, SideWriter):
                entries.restore(record["kept"])
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            message = (
                f"a record of the unfinished conversion cannot be understood ({type(problem).__name__}: {problem})"
            )
            raise bad_file(journal.path, message, "start anew: leave out --resume") from problem
    writer.take_over(plan.name_of(name) for name, unit in plan.units.of_output.items() if unit in done)
    return done


def output_bytes(plan: Plan, units: AbstractSet[int]) -> int:
    """What comes out of some units."""
    return sum(plan.nbytes(name) for name, unit in plan.units.of_output.items() if unit in units)


class Writer(Protocol):
    """Where the outputs go: see `CheckpointWriter`, whose methods these are."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Take a tensor."""

    def copy(self, name: str, tensor: Tensor, source: Path, offset: int) -> None:
        """Take a tensor whose bytes lie in a file from an offset on."""

    def gather(self, name: str, tensor: Tensor, pieces: Pieces) -> None:
        """Take a tensor that is still to be put together; `tensor` has its dtype and shape."""

    def view(self, name: str) -> Tensor | None:
        """Memory to fill with a tensor, if there is any: a shared map of a file."""

    def viewed(self, name: str, tensor: Tensor) -> None:
        """Such memory is filled."""

    def read(self, name: str) -> Tensor:
        """A tensor that was taken."""

    def take_over(self, names: Iterable[str]) -> None:
        """Tensors that an earlier run has written."""


class _StoppedError(Exception):
    """Another worker failed."""


class _Run:
    """What the workers share."""

    def __init__(
        self,
        plan: Plan,
        writer: Writer,
        entries: MutableMapping[str, Entry],
        progress: Meter,
        journal: JournalFile | None,
        budget: Budget,
        stop: threading.Event,
    ) -> None:
        self.plan, self.writer, self.entries, self.progress, self.journal = plan, writer, entries, progress, journal
        self.budget, self.held = budget, held_bytes(plan)
        self.finished: Callable[[int, Mapping[str, int]], object] | None = None
        self.gate: Callable[[int], bool] | None = None
        self.failed = stop
        self.lock = threading.Lock()
        self._taken = [False] * plan.units.count
        self.members = plan.units.members()

    def take(self, unit: int) -> bool:
        """Take a unit, if none has."""
        with self.lock:
            free = not self._taken[unit]
            self._taken[unit] = True
        return free

    def take_over(self) -> None:
        """What the journal says is done."""
        if self.journal is None:
            return
        done = take_over(self.plan, self.writer, self.entries, self.journal, self.journal.done)
        self.omit(done)
        for record in self.journal.done if self.finished is not None else ():
            self.finished(record["unit"], record["edited"])  # type: ignore[misc]
        self.progress.skip(output_bytes(self.plan, done))

    def omit(self, units: Iterable[int]) -> None:
        """These are done, or others'."""
        for unit in units:
            self._taken[unit] = True

    def finish(self, unit: int, kept: Iterable[str], edited: Mapping[str, int]) -> None:
        """Note that a unit is done, with what was kept of its tensors, and which of them were edited."""
        if self.journal is not None:
            record = self.entries.record(kept) if isinstance(self.entries, SideWriter) else []
            try:
                self.journal.add({"unit": unit, "kept": record, "edited": dict(edited)})
            except OSError as problem:
                message = f"cannot write the journal: {reason(problem)}"
                raise bad_file(self.journal.destination, message, self.journal.advice) from problem
        if self.finished is not None:
            self.finished(unit, edited)


@dataclass
class _Open:
    """What is left to do of a unit, and what was kept of it."""

    outputs: set[str]
    sources: set[str]
    kept: list[str] = field(default_factory=list)
    progress: UnitProgress = field(kw_only=True)


class _Worker:
    """One pass over the checkpoint."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self._mine: dict[int, bool] = {}
        self._places: dict[str, Tensor] = {}
        self._open: dict[int, _Open] = {}
        self._noted: set[str] = set()  # of what was edited
        self._at_work: int | None = None  # the unit of this worker whose memory is taken
        self._passed_bytes = 0
        self.window = WorkingWindow(
            run.plan.request.checkpoint,
            self._asks,
            self._place,
            self._settle,
            lambda: self.at_own,
        )
        self._adapter = another_adapter(run.plan)

    def work(self) -> None:
        """Go through the conversion."""
        run = self.run
        try:
            run_plan(run.plan, self.window, self._sink, self._read_back, _OwnEntries(self), self._adapter)
            self._settle()
            if self._open and run.finished is not None:  # who waits for them would wait for ever
                raise AssertionError(f"units {[*self._open]} of the plan did not come to an end")
        except BaseException:
            run.failed.set()
            raise
        finally:
            self._take_memory(None)
            self.window.close()
        with run.lock:
            run.plan.adapter.complement.edited.update(self._adapter.complement.edited)

    @property
    def at_own(self) -> bool:
        """Whether the group at work is of a unit of this worker."""
        return self.window.looked_at is None or self._is_mine(self.run.plan.units.of_source[self.window.looked_at])

    def _asks(self, name: str) -> bool:
        """Whether a source tensor that is asked for is of a unit of this worker."""
        unit = self.run.plan.units.of_source[name]
        if not self._is_mine(unit):
            return False
        if unit in self._open:
            self._open[unit].progress.read(name)
        self._passed(self.run.plan.request.checkpoint.tensors[name].nbytes)
        return True

    def _passed(self, nbytes: int) -> None:
        """So many bytes were read, or written: every so often, let go of pages, those of large stacks under way too."""
        self._passed_bytes += nbytes
        if self._passed_bytes >= PASSED_BYTES:
            self._passed_bytes = 0
            self.window.release_recent()
            for place in self._places.values():
                release_pages(place)

    def _progress_of(self, sources: Iterable[str], outputs: Iterable[str]) -> UnitProgress:
        plan = self.run.plan
        stored = {name: plan.request.checkpoint.tensors[name].nbytes for name in sources}
        return UnitProgress(self.run.progress, stored, sum(map(plan.nbytes, outputs)))

    def _is_mine(self, unit: int) -> bool:
        if self.run.failed.is_set():
            raise _StoppedError
        if unit not in self._mine:
            self._mine[unit] = self.run.take(unit)
            if self._mine[unit] and self.run.gate is not None:
                self._mine[unit] = self.run.gate(unit)
            if self._mine[unit]:
                sources, outputs = self.run.members[unit]
                self._open[unit] = _Open(set(outputs), set(sources), progress=self._progress_of(sources, outputs))
        if self._mine[unit] and self._at_work != unit:
            self._take_memory(unit)
        return self._mine[unit]

    def _take_memory(self, unit: int | None) -> None:
        """Wait for the memory of a unit, of which a group is to be converted; what was held is given back first.

        Between two groups a worker holds none, though it has units open: so nobody waits for it in vain.
        """
        run = self.run
        if self._at_work is not None:
            run.budget.give_back(run.held[self._at_work])
            self._at_work = None
        if unit is not None:
            if not run.budget.take(run.held[unit], run.failed.is_set):
                raise _StoppedError
            self._at_work = unit

    def _settle(self) -> None:
        """Between two groups: note the units of which nothing is left to do."""
        self._take_memory(None)
        for unit, left in list(self._open.items()):
            left.sources = {name for name in left.sources if name not in self.window.asked}
            if not left.outputs and not left.sources:
                self.window.check_all_whole(self.run.members[unit][0])  # else no later run would make it again
                del self._open[unit]
                left.progress.finish()
                edited = self._adapter.complement.edited
                fresh = {name: count for name, count in edited.items() if name not in self._noted}
                self._noted |= fresh.keys()
                self.run.finish(unit, left.kept, fresh)

    def keep(self, name: str) -> None:
        """Something was kept of a tensor of the group at work."""
        looked_at = self.window.looked_at
        if looked_at is not None:
            self._open[self.run.plan.units.of_source[looked_at]].kept.append(name)  # open: its group is at work

    def _place(self, allocation: Allocation) -> Tensor | None:
        """Memory in the output for what a group fills, where that is an output as it is."""
        name = self.run.plan.units.in_place.get(allocation)
        if name is None:
            return None
        memory = self.run.writer.view(self.run.plan.name_of(name))
        if memory is not None:
            self._places[name] = memory
        return memory

    def _sink(self, name: str, tensor: Tensor) -> None:
        plan, writer = self.run.plan, self.run.writer
        unit = plan.units.of_output.get(name)
        if unit is not None and not self._is_mine(unit):  # a name that was not planned is for the writer to refuse
            return
        if tensor.is_meta:
            raise AssertionError(f"{name} came without data: it belongs to two units")
        target, placed = plan.name_of(name), self._places.pop(name, None)
        if placed is not None and placed.data_ptr() == tensor.data_ptr():
            writer.viewed(target, tensor)
        elif (pieces := self.window.unread(tensor)) is not None:
            writer.gather(target, tensor, pieces)
        elif (found := self.window.range_of(tensor)) is not None:
            writer.copy(target, tensor, *found)
        else:
            writer.write(target, tensor)
        if unit is not None:
            self._open[unit].outputs.discard(name)
        self._passed(tensor.nbytes)

    def _read_back(self, name: str) -> Tensor:
        plan = self.run.plan
        if self._is_mine(plan.units.of_output[name]):
            return self.run.writer.read(plan.name_of(name))
        return plan.on_meta(name)


class _OwnEntries(MutableMapping[str, Entry]):
    """The entries of a complement, of this worker's tensors alone; of others, dtypes and shapes."""

    def __init__(self, worker: _Worker) -> None:
        self._worker, self._entries = worker, worker.run.entries

    def __getitem__(self, name: str) -> Entry:
        if isinstance(self._entries, SideFile):
            return self._entries.entry(name, is_meta=not self._worker.at_own)
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        if self._worker.at_own:
            self._entries[name] = entry
            self._worker.keep(name)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def clear(self) -> None:
        """What the workers share is not one worker's to forget."""
