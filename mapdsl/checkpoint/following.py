"""Verifying a conversion while it runs: what was written is read, converted back, and held against the source.

A second pass, in the other direction, goes over the files that are being written. Its workers are those of every
conversion; only, before one begins a unit, it waits until the units that this one comes from are written. Both passes
go through the map in the same order, so what is read is mostly still in memory. Nothing waits for the second pass but
the end; where it finds a difference, the first one stops.

Where bytes do not come back, because something was encoded anew or the map has no way back for it, those units are
converted a second time instead, from the source, and held against what was written.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.elements import Difference
from mapdsl.checkpoint.engine import convert_tensors
from mapdsl.checkpoint.journal import Journal
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.live_side import LiveSide
from mapdsl.checkpoint.memory import held_bytes
from mapdsl.checkpoint.origins import Origins
from mapdsl.checkpoint.passes import Plan, make_plan, outputs_of
from mapdsl.checkpoint.progress import ForwardingMeter, Meter, Reporter, some_of
from mapdsl.checkpoint.promises import Promises
from mapdsl.checkpoint.sharing import Means
from mapdsl.checkpoint.sidecar import Forgetful, SideFile, SideWriter
from mapdsl.checkpoint.strict import BackChecker, StrictChecker
from mapdsl.checkpoint.written import back_request, common_dtype, declared_formats, written_checkpoint
from mapdsl.compiler.codecs import AnyCodec, parse_codec
from mapdsl.language.diagnostics import MapError, error

_ADVICE = (
    "convert again. If it fails at the same place, that is a bug of mapdsl or of the map; else look at the memory "
)
_ADVICE += "and the disk of this machine"
_ANEW = "encoded anew"
_NOT_GIVEN = "the way back does not give them"
_NOT_KEPT = "an earlier run has kept nothing of them"
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Verified:
    """What was compared before a destination took its name.

    `tensors` and `bytes` of the source were held against what was written, converted back. `tensors_again` and
    `bytes_again` are of the output, held against a second conversion, for `reason`. `kept` counts what was read of the
    side file: all of one that was written; of one that was there, what the map drops. `not_compared` says in sentences
    what was not looked at.
    """

    tensors: int
    bytes: int
    tensors_again: int = 0
    bytes_again: int = 0
    reason: str = ""
    kept: int | None = None
    not_compared: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verified:
        """The inverse of `asdict`, also after a detour through JSON."""
        return cls(**{**value, "not_compared": tuple(value["not_compared"])})


class Follower:
    """Verifies what a conversion writes into files of its hidden folder, laid out as `layout` says.

    `kept` holds what codecs keep. `start` begins, `done` is to be told of every unit, `finish` waits for the rest and
    says what was compared; `stop` gives up. Whatever differs is a MapError, R601, out of `done` or `finish`.
    With `means.is_last` all is looked at in `finish` alone, when the files have their last form: the checkpoint is
    given there.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Iterable[FileLayout],
        journal: Journal,
        kept: SideWriter | None,
        means: Means,
    ) -> None:
        self._plan, self._means, self._waits = plan, means, means.is_last
        self._folder, self._destination = journal.folder, journal.destination
        self._written = written_checkpoint(tuple(layout), journal.folder)
        self._side = LiveSide(plan, kept) if kept is not None else None
        self._done: set[int] = set()
        self._again: dict[int, str] = {}  # units to be converted a second time, and why
        self._besides: set[int] = set()  # come back, but not all that was written of them does
        self._kept_of: dict[int, list[str]] = {}
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._threads = torch.get_num_threads()
        self._back, reason = self._planned_back()
        self._checker: BackChecker | None = None
        self._meter = ForwardingMeter("verifying")
        self._needs: dict[int, frozenset[int]] = {}
        if self._back is not None:
            self._prepare(self._back)
        else:
            self._mark(range(plan.units.count), f"the map has no way back for them ({reason})")

    def start(self) -> None:
        """Begin to follow."""
        if self._back is not None and not self._waits:
            self._thread = threading.Thread(target=self._follow, name="mapdsl-verify", daemon=True)
            self._thread.start()

    def done(self, unit: int, edited: Mapping[str, int]) -> None:
        """A unit is written; `edited` are tensors of which blocks were encoded anew."""
        with self._changed:
            self._mark({self._unit_of(name, unit) for name in edited}, _ANEW)
            if self._side is not None and not self._side.holds(self._kept_of.get(unit, ())):
                self._mark([unit], _NOT_KEPT)
            self._done.add(unit)
            self._changed.notify_all()
        if self._failure is not None:
            raise self._failure

    def finish(self, reporter: Reporter, checkpoint: Checkpoint | None = None) -> Verified:
        """Wait until all is compared. `checkpoint` is what was written, if that is not the files laid out."""
        if checkpoint is not None:
            self._written = checkpoint
            if self._back is not None:
                self._back = replace(self._back, request=replace(self._back.request, checkpoint=checkpoint))
        with reporter.meter("verifying", self._bytes()) as meter:
            self._meter.hand_over(meter)
            if self._thread is not None:
                self._thread.join()
            elif self._back is not None:
                self._follow()
            if self._failure is not None:
                raise self._failure
            self._mark_tensors(self._plan.adapter.complement.edited, _ANEW)
            again = self._convert_again(meter)
            kept = self._compare_kept()
        torch.set_num_threads(self._threads)
        return self._told(again, kept)

    def stop(self) -> None:
        """Give up, and let go of the files."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._checker is not None:
            self._checker.close()
        torch.set_num_threads(self._threads)

    # --- planning ---

    def _planned_back(self) -> tuple[Plan | None, str]:
        """The plan of the way back, or why there is none."""
        plan = self._plan
        try:
            back = make_plan(back_request(plan, self._written, self._side), to_right=not plan.to_right)
            dtype = common_dtype(back, plan.request.checkpoint)
            if back.to_right and dtype is not None:
                back = make_plan(back_request(plan, self._written, self._side, dtype), to_right=True)
        except MapError as problem:
            return None, problem.diagnostics[0].message
        return back, ""

    def _prepare(self, back: Plan) -> None:
        """Find what each unit of the way back waits for, and what cannot come back by it."""
        plan = self._plan
        made_by = {plan.name_of(name): unit for name, unit in plan.units.of_output.items()}
        needs: dict[int, set[int]] = {unit: set() for unit in range(back.units.count)}
        for name, unit in back.units.of_source.items():
            if name in made_by:
                needs[unit].add(made_by[name])
        self._needs = {unit: frozenset(units) for unit, units in needs.items()}
        self._besides = {made_by[name] for name in back.dropped if name in made_by}
        self._besides |= {plan.units.of_output[name] for name in Origins(plan, self._written).uncompared()}
        self._mark_tensors(self._encoded_anew(back), _ANEW)
        for name in self._side or ():
            self._kept_of.setdefault(self._unit_of(name, -1), []).append(name)
        for unit, size in enumerate(held_bytes(back)):
            if size > self._means.memory:
                self._mark(self._needs[unit], "the way back needs more memory than there is for it")
        source = plan.request.checkpoint
        origins = Origins(back, source)
        spelled = self._side.spelled if self._side is not None else {}
        self._checker = BackChecker(source, back, spelled, self._folder, Promises(back, origins), self._differs)
        for name in self._checker.unlike:
            self._mark(self._needs[back.units.of_output[name]], _NOT_GIVEN)
        lacking = (stored.name for stored in self._checker.missing)
        self._mark({plan.units.of_source[name] for name in lacking if name in plan.units.of_source}, _NOT_GIVEN)

    def _mark(self, units: Iterable[int], reason: str) -> None:
        """Have some units converted a second time."""
        for unit in units:
            self._again.setdefault(unit, reason)

    def _mark_tensors(self, names: Iterable[str], reason: str) -> None:
        """The same of the units that write some stored tensors of the map."""
        self._mark({unit for name in names if (unit := self._unit_of(name, -1)) >= 0}, reason)

    def _encoded_anew(self, back: Plan) -> Iterator[str]:
        """The tensors that are known to be encoded anew: nothing was kept of them."""
        side = self._plan.side if back.to_right else self._side
        kept = set(side) if side is not None else set()
        return (name for name in (back if back.to_right else self._plan).formats if name not in kept)

    def _unit_of(self, name: str, unit: int) -> int:
        """The unit that writes a stored tensor of the map; its payload may have another name."""
        units, spelled = self._plan.units.of_output, self._plan.adapter.complement.spelled
        if self._plan.to_right:
            units = self._plan.units.of_source
        for payload in (name, *(codec.names(name)[0] for codec in self._codecs)):
            if spelled.get(payload, payload) in units:
                return units[spelled.get(payload, payload)]
        return unit

    @cached_property
    def _codecs(self) -> list[AnyCodec]:
        declared = declared_formats(self._plan.request.map.checked.map)
        return [parse_codec(codec) for codec in declared.values() if codec is not None]

    def _bytes(self) -> int:
        """How much there is to compare by the way back."""
        return 0 if self._back is None else sum(map(self._back.nbytes, self._back.forms))

    # --- comparing ---

    def _follow(self) -> None:
        """Convert back, and compare."""
        assert self._back is not None
        assert self._checker is not None
        entries = self._side if self._side is not None else Forgetful()
        options: dict[str, Any] = {"workers": self._means.workers, "memory": self._means.memory, "stop": self._stop}
        options |= {"gate": self._may, "finished": self._came_back}
        try:
            convert_tensors(self._back, self._checker, entries, **options, progress=self._meter)
        except BaseException as problem:
            self._failure = _noted(problem)

    def _may(self, unit: int) -> bool:
        """Wait until a unit can be converted back; False where it cannot."""
        needed = self._needs[unit]
        with self._changed:
            while not self._waits and not needed <= self._done and not self._stop.is_set():
                self._changed.wait(_WAIT_SECONDS)
            if found := next((self._again[unit] for unit in needed if unit in self._again), ""):
                self._mark(needed, found)
                return False
        return not self._stop.is_set()

    def _came_back(self, unit: int, edited: Mapping[str, int]) -> None:
        """A unit is converted back. What was kept fits only what was decoded: `edited` are tensors that it did not fit.

        Their bytes may have come out right all the same, rounded. A second conversion tells which element is wrong.
        """
        assert self._checker is not None
        units: set[int] = set()
        for name in edited:
            found = self._unit_of(name, -1)
            units |= self._needs[unit] if found < 0 else {found}
            if not self._checker.promises.hold(name):
                self._checker.unpromised.append(name)
            else:
                self._held_again(units, Meter("verifying", 0))
                message = (
                    f"`{name}`: what was written of it does not fit what was kept of it, in {edited[name]:,} blocks"
                )
                raise error("R601", message, subject=str(self._destination), help=_ADVICE)

    def _convert_again(self, meter: Meter) -> StrictChecker | None:
        """Convert units a second time, and compare them with what was written."""
        plan = self._plan
        assert self._checker is not None or self._back is None
        if self._checker is not None and self._back is not None:
            for name in self._checker.unpromised:
                self._mark(self._needs[self._back.units.of_output[name]], _NOT_GIVEN)
        self._mark(self._besides, _NOT_GIVEN)
        units = {unit for unit in self._again if plan.units.members()[unit][1]}
        return self._held_again(units, meter) if units else None

    def _held_again(self, units: Collection[int], meter: Meter) -> StrictChecker:
        """Convert some units a second time, and compare; MapError where something differs."""
        plan, checker = self._plan, self._strict_checker()
        entries: SideFile | Forgetful = plan.side if plan.side is not None else Forgetful()
        options: dict[str, Any] = {"workers": self._means.workers, "memory": self._means.memory}
        try:
            convert_tensors(plan, checker, entries, **options, progress=meter, only=units)
        except MapError as problem:
            raise _noted(problem) from None
        finally:
            checker.close()
        return checker

    def _compare_kept(self) -> int | None:
        """Hold the tensors that were dropped once against what the side file keeps of them; gives their number."""
        side = self._plan.side
        if side is None or not list(side.stored_names):
            return None
        checker = self._strict_checker()
        try:
            for name in side.stored_names:
                checker.write(name, side.stored(name))
        finally:
            checker.close()
        return checker.compared

    def _strict_checker(self) -> StrictChecker:
        plan = self._plan
        spelled = plan.side.spelled if plan.side is not None and plan.restored is not None else {}
        return StrictChecker(self._written, list(outputs_of(plan, spelled)), self._folder, self._differs)

    def _differs(self, difference: Difference, origins: Origins | None) -> MapError:
        """The error of a difference."""
        message = f"`{difference.place}` is {difference.found}, "
        count = f"{difference.differing:,} of its {difference.nbytes:,} bytes differ"
        if origins is None:
            message = f"`{difference.place}` was written as {difference.found}, converted again it is"
            message += f" {difference.expected}; {count}"
            return error("R601", message, subject=str(self._destination), help=_ADVICE)
        told = origins.told({difference.name: difference})[0]
        where = self._plan.request.checkpoint.path
        message = f"`{difference.place}` is {difference.expected} in {where}, what was written of it gives "
        message += f"{difference.found} when it is converted back; {count}"
        origin = told.origin or some_of(told.sources)
        advice = f"it was made from {origin}\n{_ADVICE}" if origin else _ADVICE
        return error("R601", message, subject=str(self._destination), help=advice)

    # --- telling ---

    def _told(self, again: StrictChecker | None, kept: int | None) -> Verified:
        checker = self._checker
        if checker is not None:
            checker.close()
        count, size = (checker.compared, checker.bytes_compared) if checker is not None else (0, 0)
        return Verified(
            count,
            size,
            tensors_again=again.compared if again is not None else 0,
            bytes_again=again.bytes_compared if again is not None else 0,
            reason="; ".join(dict.fromkeys(self._again.values())) if again is not None else "",
            kept=kept,
            not_compared=tuple(self._not_compared()),
        )

    def _not_compared(self) -> Iterator[str]:
        plan = self._plan
        if plan.dropped and not (plan.to_right and plan.request.use_complement):
            side = plan.request.sides[plan.to_right]
            yield f"without a counterpart on the {side} side: {some_of(plan.dropped)}"


def _noted(problem: BaseException) -> BaseException:
    """An error of the way back, with a note that it is one."""
    if not isinstance(problem, MapError) or _ADVICE in problem.diagnostics[-1].help:
        return problem
    note = f"this was found in what was written, when it was verified; {_ADVICE}"
    *others, last = problem.diagnostics
    return MapError([*others, replace(last, help="\n".join(filter(None, (last.help, note))))])
