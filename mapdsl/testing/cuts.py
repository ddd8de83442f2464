"""Over which numbers of ranks the states of an example can be cut, and the shares that an adapter makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.expand import Expansion
from mapdsl.compiler.fields import block_multiples
from mapdsl.compiler.sharding import how
from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.shares import Ranks
from mapdsl.testing.comparing import PropertyError
from mapdsl.testing.configs import RANKS, draw_ranks, value_of
from mapdsl.testing.shares import Held, Reading, UnevenError, partial_meshes
from mapdsl.testing.states import SIDES, Group, State

if TYPE_CHECKING:
    from mapdsl.testing.suite import Example

MOST_RANKS = 8
# How many tensors of ranks a property makes for one example, roughly: of large states not all numbers of ranks.
_EFFORT = 200

Shares = list[dict[str, Tensor]]
Item = TypeVar("Item")


class Cuts:
    """The numbers of ranks for one example, up to `MOST_RANKS` in all, fewest first.

    Of them `fine` are those over which every axis divides that the config or a state tells.
    """

    def __init__(self, example: Example) -> None:
        self.example, self.expansion = example, example.expansion
        self.adapter: Any = example.adapter(answered=True)
        self.names = {"left": self.adapter.LEFT, "right": self.adapter.RIGHT}
        self.readings = [Reading(self.expansion, ranks) for ranks in self._all_ranks()]
        self._shares: dict[tuple[str, str], Shares] = {}
        self._held: dict[tuple[str, str, str], list[Held]] = {}

    def state(self, side: str) -> State:
        """The example's state of a side."""
        return self.example.left if side == "left" else self.example.right

    # --- which numbers of ranks ---

    @cached_property
    def fine(self) -> list[Reading]:
        """The numbers of ranks over which everything divides, exactly, and which hold what the whole has."""
        meshes = {m for rule in self.expansion.map.rules for t in (*rule.left, *rule.right) for m in partial_meshes(t)}
        exact = [one for one in self.readings if all(one.ranks[mesh].bit_count() == 1 for mesh in meshes)]
        return [reading for reading in exact if not self.uneven(reading) and self._is_alike(reading)]

    def cuttable(self, side: str) -> list[Reading]:
        """Those of `fine` over which no block of a side's tensors is cut."""
        return [reading for reading in self.fine if not self.cut_blocks(reading, side)]

    def uneven(self, reading: Reading, side: str | None = None) -> list[UnevenError]:
        """The axes that do not divide: of what the state of a side has, or of all that the config tells of."""
        groups = [group for one in SIDES if side in (one, None) for group in self.state(one).groups]
        if side is None:
            groups = [*groups, *self._told]
        return list({str(problem): problem for group in groups for problem in reading.uneven(group)}.values())

    def cut_blocks(self, reading: Reading, side: str) -> list[str]:
        """The tensors of a side of which a share ends within a block of the format that it has."""
        groups = [group for group in self.state(side).groups if any(one.codec is not None for one in group.tensors)]
        return [
            held.whole.named.name
            for place in reading.places
            for group in groups
            for held in reading.held(group, side, place)
            if reading.cuts_a_block(held, held.whole.codec)
        ]

    def may_cut_blocks(self, reading: Reading) -> bool:
        """Whether a share ends within a block of any format that a tensor of either side may have."""
        for side, place in itertools.product(SIDES, reading.places):
            for group in self.state(side).groups:
                here = group.rule.side(side)
                across = group.rule.left if side == "right" else group.rule.right
                codecs = [codec for tensor in (*here, *across) for codec in self.expansion.codecs(tensor)]
                codecs = [codec for codec in codecs if not codec.is_elementwise]
                for held in reading.held(group, side, place) if codecs else ():
                    if any(reading.cuts_a_block(held, codec) for codec in codecs):
                        return True
        return False

    def tells(self, reading: Reading, side: str) -> bool:
        """Whether shares tell the size of each axis: not of one that no config tells, where ranks have copies."""
        for group in self.state(side).groups:
            known = self.expansion.sizes(group.match)
            for axis in group.sizes:
                mesh, manner = reading.axes.get(axis, ("", "evenly"))
                if manner == "or copies" and axis not in known and reading.ranks.get(mesh, 1) > 1:
                    return False
        return True

    def some(self, items: list[Item], shares: Callable[[Item], int], side: str, what: str) -> list[Item]:
        """As many of some numbers of ranks as are not too much work, drawn anew for each example, in their order.

        `shares` is how many shares of a side are made for one.
        """
        rng = Random(f"{what} {self.example.seed}")
        effort = _EFFORT // max(1, len(self.state(side).order))
        found: list[int] = []
        for number in rng.sample(range(len(items)), len(items)):
            if effort > 0 or not found:
                found.append(number)
                effort -= shares(items[number])
        return [items[number] for number in sorted(found)]

    # --- shares ---

    def shares(self, reading: Reading, side: str) -> Shares:
        """What each rank holds of the state of a side, as the adapter cuts it."""
        key = side, told(reading.ranks)
        if key not in self._shares:
            state = self.state(side).tensors()
            self._shares[key] = [
                self.adapter.shard(state, reading.ranks, place, side=self.names[side]) for place in reading.places
            ]
        return self._shares[key]

    def held(self, reading: Reading, side: str, place: Ranks) -> list[Held]:
        """What a rank holds of a side, by the plain reading of the map."""
        key = side, told(reading.ranks), told(place)
        if key not in self._held:
            self._held[key] = [held for group in self.state(side).groups for held in reading.held(group, side, place)]
        return self._held[key]

    # --- within ---

    def _is_alike(self, reading: Reading) -> bool:
        """Whether the ranks together have the rules that the whole has: a guard may say `where size(pp) > 1`."""
        for rule, layout in zip(self.expansion.map.rules, self.expansion.checked.layouts, strict=True):
            if rule.guard is None or not _asks_size(rule.guard):
                continue
            indices = [name for name in layout.matched if name in self.expansion.map.indices]
            for values in self.expansion.index_values(indices):
                on_ranks = [reading.is_there(rule.guard, values, place) for place in reading.places]
                if any(on_ranks) != bool(value_of(rule.guard, values)):
                    return False
        return True

    def _all_ranks(self) -> list[dict[str, int]]:
        names = [mesh.name for mesh in self.expansion.map.meshes]
        counts = itertools.product(range(1, MOST_RANKS + 1), repeat=len(names))
        found = [dict(zip(names, numbers, strict=True)) for numbers in counts if math.prod(numbers) <= MOST_RANKS]
        return sorted(found, key=lambda ranks: (math.prod(ranks.values()), -max(ranks.values())))

    @cached_property
    def _told(self) -> list[Group]:
        """The axes that the config tells of, in groups that a state may lack: an adapter asks for them all the same."""
        found = []
        for number, rule in enumerate(self.expansion.map.rules):
            layout = self.expansion.checked.layouts[number]
            match = next(self.expansion.matches(number), None)
            if match is not None:
                shapes = [shape for side in layout.shapes for shape in side if shape is not None]
                sizes = dict.fromkeys((axis.name for shape in shapes for axis in ir.axes_of(shape) if axis.name), 0)
                found.append(Group(match, rule, sizes | self.expansion.sizes(match), []))
        return found


@contextmanager
def telling(ranks: Ranks, side: str) -> Iterator[None]:
    """What fails is told with the ranks at which it did."""
    try:
        yield
    except (PropertyError, ValueError) as err:
        raise PropertyError(f"the {side} side over {told(ranks)}: {err}") from None


def told(ranks: Ranks) -> str:
    """Ranks for a message: `tp 2, ep 4`."""
    return ", ".join(f"{mesh} {number}" for mesh, number in ranks.items())


def free_multiples(expansion: Expansion, rng: Random) -> dict[str, int]:
    """Of what the sizes of the axes that no config tells should be multiples, so that ranks can share them."""
    blocks, found = block_multiples(expansion.checked), {}
    for mesh in expansion.map.meshes:
        even = [axis.name for axis in mesh.axes if how(axis) == "evenly"]
        known = [size for axis in even if (size := _size(expansion, axis)) is not None]
        divisors = [n for n in RANKS if not math.gcd(*known) % n] if known else [draw_ranks(rng)]
        for axis in even:
            found[axis] = rng.choice([divisors[-1], rng.choice(divisors)]) * blocks.get(axis, 1)
    return found


def _asks_size(expr: tree.Expr) -> bool:
    """Whether an expression asks for a number of ranks."""
    is_size = isinstance(expr, tree.Call) and expr.function == "size"
    return is_size or any(_asks_size(child) for child in ir.children(expr))


def _size(expansion: Expansion, axis: str) -> int | None:
    """The size of a cut axis, if the config tells it."""
    if axis in expansion.map.indices:
        try:
            return len(list(expansion.index_values([axis])))
        except MapError:
            return None
    size = expansion.params.get(axis)
    return size if isinstance(size, int) else None
