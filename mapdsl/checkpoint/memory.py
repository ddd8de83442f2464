"""How much memory outputs under way may take, and workers that wait for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.headers import BITS
from mapdsl.checkpoint.passes import Plan

DEFAULT_BYTES = 2 * 2**30
"""What outputs under way may take where nothing is asked for; more where one unit needs more."""


def held_bytes(plan: Plan) -> list[int]:
    """By unit, the memory that converting it needs, about.

    Outputs that are copied, and those that are filled where they are to lie, need none. Of others there is one at a
    time, with its companions (scales, say): pieces of a mapped source are written as they are cut off. A decoded
    source is there as a whole while its pieces are. What is filled before it is encoded is there, too, and where
    sources are not mapped from disk, in a Distributed Checkpoint, one of them.
    """
    stored, units = plan.request.checkpoint.tensors, plan.units
    free = {*units.copied, *units.in_place.values()}
    is_mapped = plan.request.checkpoint.kind != "dcp"
    decoded = set(map(_stem, plan.formats))
    held = []
    for unit, (sources, outputs) in enumerate(units.members()):
        made: dict[str, int] = {}
        for name in outputs:
            if name not in free:
                made[_stem(name)] = made.get(_stem(name), 0) + plan.nbytes(name)
        size = max(made.values(), default=0) + units.filled_bytes.get(unit, 0)
        if len(made) > 1 and any(_stem(name) in decoded or BITS[stored[name].dtype] < 16 for name in sources):
            size += sum(made.values())
        held.append(size if is_mapped else size + max((stored[name].nbytes for name in sources), default=0))
    return held


def _stem(name: str) -> str:
    """What the names of a tensor's companions have in common with its own."""
    return name.rpartition(".")[0] or name


def memory_budget(plan: Plan, asked: int | None) -> int:
    """The bytes that outputs under way may take; C507 where a unit needs more than was asked for."""
    held = held_bytes(plan)
    largest = max(held, default=0)
    if asked is None:
        return max(DEFAULT_BYTES, largest)
    if largest <= asked:
        return asked
    outputs = plan.units.members()[held.index(largest)][1]
    more = f", with {len(outputs) - 1:,} more tensors that are made from the same," if len(outputs) > 1 else ""
    message = f"`{outputs[0]}`{more} needs {largest:,} bytes of memory, --memory allows {asked:,}"
    advice = f"give --memory {largest} or more: what is made together is not divided"
    raise bad_file(plan.request.checkpoint.path, message, advice)


class Budget:
    """Bytes for several workers, each of which takes some at a time and gives them back; first come, first served.

    A worker that waits holds none, so those that it waits for go on. More than `total` is granted to a worker that is
    alone.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._held = 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    def take(self, size: int, is_over: Callable[[], bool]) -> bool:
        """Wait until so many bytes are free, and take them; False where everything `is_over` meanwhile."""
        if self._total is None or not size:
            return True
        mark = object()
        with self._changed:
            self._waiting.append(mark)
            try:
                while self._waiting[0] is not mark or (self._held and self._held + size > self._total):
                    if is_over():
                        return False
                    self._changed.wait(0.5)  # nobody notifies of the end
                self._held += size
            finally:
                self._waiting.remove(mark)
                self._changed.notify_all()
        return True

    def give_back(self, size: int) -> None:
        """Free bytes that were taken."""
        if self._total is None or not size:
            return
        with self._changed:
            self._held -= size
            self._changed.notify_all()
