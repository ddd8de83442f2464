"""From which tensors, and which of their elements, an element of a converted tensor comes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.elements import Difference
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.compiler.collide import entries
from mapdsl.compiler.expand import Expansion, Match, Named, expand
from mapdsl.compiler.formula import EvaluationError, evaluate
from mapdsl.compiler.names import Pattern, patterns, read, spelled
from mapdsl.compiler.shapes import Piece
from mapdsl.emit.context import Context
from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.sizes import Sized, joint_sizes

_SIDES = ("left", "right")
_SHUFFLED = ("packed_int", "group_int")  # formats whose payload has the elements in another order


class Origins:
    """The origins of what one conversion, `plan`, makes; `held` is the checkpoint with the tensors of its outputs."""

    def __init__(self, plan: Plan, held: Checkpoint) -> None:
        self.plan = plan
        self.held = held
        self.source = plan.request.checkpoint
        self.made, self.read = (1, 0) if plan.to_right else (0, 1)
        self._outputs = {name: place for place, (name, _, _) in enumerate(plan.entries)}
        self._own = {plan.name_of(name): name for name in self._outputs}
        self._respelled = plan.adapter.complement.spelled if plan.to_right else {}

    def told(self, differences: Mapping[str, Difference]) -> tuple[Difference, ...]:
        """The differences in the order of the outputs, each with where it comes from, as far as that can be told."""
        names = sorted(differences, key=self._order)
        found = self._found({self._own.get(name, name) for name in names})
        result = []
        for name in names:
            own = self._own.get(name, name)
            result.append(differences[name].made_from(*self._of(own, differences[name], found.get(own))))
        return tuple(result)

    def uncompared(self) -> set[str]:
        """The outputs that the map states a value for, and that nothing is held against when they are read."""
        found: set[str] = set()
        for number, rule in enumerate(self.expansion.map.rules):
            if rule.value is None or rule.value.compared or not rule.sides[self.made]:
                continue
            with contextlib.suppress(MapError, EvaluationError, KeyError):  # a param that the checkpoint does without
                for match in self.expansion.matches(number):
                    found |= {named.name for named in self.expansion.names(match, _SIDES[self.made])}
        return found & self._outputs.keys()

    def rule_of(self, output: str) -> int | None:
        """The number of the rule that makes an output; None for what a wildcard carries."""
        found = self._found({output}).get(output)
        return None if found is None else found[0].rule

    def _of(self, own: str, difference: Difference, made_by: tuple[Match, Named] | None) -> tuple[list[str], str]:
        """Sources and origin of one difference."""
        if made_by is not None:
            return self._of_match(own, difference, *made_by)
        if own not in self._outputs:
            return [], f"what {SIDE_FILE} keeps"
        return self._carried(own), ""

    def _order(self, name: str) -> int:
        return self._outputs.get(self._own.get(name) or name, len(self._outputs))

    @cached_property
    def expansion(self) -> Expansion:
        """The matches of the map under the params that the adapter has."""
        checked = self.plan.request.map.checked
        held = vars(self.plan.adapter)
        attributes = Context(checked.map).attributes
        params = {name: held[place] for name, place in attributes.items() if held.get(place) is not None}
        return expand(checked, params)

    def _found(self, wanted: set[str]) -> dict[str, tuple[Match, Named]]:
        """The match that each of some names is made by."""
        found: dict[str, tuple[Match, Named]] = {}
        if not wanted:
            return found
        for number, rule in enumerate(self.expansion.map.rules):
            try:
                for match in self.expansion.matches(number):
                    for named in self.expansion.names(match, _SIDES[self.made]):
                        for part in self._parts(rule.sides[self.made][named.place], named.name):
                            if part in wanted:
                                found[part] = match, named
            except (MapError, EvaluationError, KeyError):  # a param that the checkpoint does without
                continue
        return found

    def _parts(self, tensor: Any, name: str) -> Iterator[str]:
        """Every name under which a tensor, or a part of it, may be stored."""
        yield name
        for codec in self.expansion.codecs(tensor):
            yield from codec.names(name)

    # --- names ---

    def _there(self, tensor: Any, name: str) -> list[str]:
        """The stored names of a source tensor: those of the first format whose parts are all there."""
        for codec in self.expansion.codecs(tensor):
            names = [self._respelled.get(part, part) for part in codec.names(name)]
            if codec.kind != "raw" and all(part in self.source.tensors for part in names):
                return names
        name = self._respelled.get(name, name)
        return [name] if name in self.source.tensors else []

    def _carried(self, name: str) -> list[str]:
        """The sources of a tensor that a wildcard, or an index without an end, carries."""
        checked, side = self.expansion.checked, _SIDES[self.made]
        found: dict[str, None] = {}
        for entry in sorted(entries(checked.map, checked.codecs, side), key=lambda entry: entry.is_else):
            reading = read(entry.pattern, name)
            if reading is None or found:
                continue
            numbers, texts = reading
            values = dict(self.expansion.params)
            values |= {expr.path: number for expr, number in numbers if isinstance(expr, tree.Name)}
            for source in checked.map.rules[entry.rule].sides[self.read]:
                for pattern in patterns(source.template):
                    if all(entry.pattern.choice.get(axis, at) == at for axis, at in pattern.choice.items()):
                        found |= dict.fromkeys(self._there(source, _spelled(pattern, values, texts)))
        return list(found)

    def _of_match(self, own: str, difference: Difference, match: Match, named: Named) -> tuple[list[str], str]:
        rule = self.expansion.map.rules[match.rule]
        sources = list(self.expansion.names(match, _SIDES[self.read]))
        if not sources:
            return [], "a value that the map states"
        if difference.kind == "bytes":
            try:
                element = self._element(own, difference.index, match, named, sources)
            except (KeyError, ValueError, IndexError):  # sizes that are not told, or a MapError of params
                element = None
            if element is not None:
                place, index = element
                there = self._there(rule.sides[self.read][place.place], place.name)
                if there:
                    return there, there[0] + (f"[{', '.join(map(str, index))}]" if index else "")
        found = [name for source in sources for name in self._there(rule.sides[self.read][source.place], source.name)]
        return found, ""

    # --- elements ---

    def _element(
        self, own: str, index: tuple[int, ...], match: Match, named: Named, sources: Sequence[Named]
    ) -> tuple[Named, tuple[int, ...]] | None:
        """The source tensor and the element in it; None where an element has several sources, or none of its own."""
        layout = self.expansion.checked.layouts[match.rule]
        entry = self.plan.entries[self._outputs[own]]
        stored = StoredTensor(own, entry[1], tuple(entry[2]))
        logical = self._logical(self.expansion.map.rules[match.rule].sides[self.made][named.place], named.name, stored)
        if logical is None:
            return None
        if index:
            index = (*index[:-1], index[-1] * _per(logical, stored.shape))
        if layout.is_rename:
            return (sources[0], self._narrow(match, sources[0], index)) if len(sources) == 1 else None
        sizes = self._sizes(match, named, logical, sources)
        for pair in layout.pieces:
            if pair[self.made].tensor != named.place:
                continue
            found = self._in_piece(pair[self.made], self.made, match, index, sizes)
            if found is None:
                continue
            axes = {**found, **named.position}
            twin = pair[self.read]
            there = [s for s in sources if s.place == twin.tensor and _agree(s.position, axes)]
            if len(there) != 1:
                return None
            place = self._index(twin, match, axes, sizes)
            return there[0], self._narrow(match, there[0], place)
        return None

    def _narrow(self, match: Match, named: Named, index: tuple[int, ...]) -> tuple[int, ...]:
        """An index into a tensor as it is stored in the source: packed elements share one place."""
        tensor = self.expansion.map.rules[match.rule].sides[self.read][named.place]
        there = self._there(tensor, named.name)
        if not there or not index:
            return index
        stored = self.source.tensors[there[0]]
        logical = self._logical(tensor, named.name, stored)
        if logical is None:
            raise ValueError("the payload is laid out otherwise")
        return (*index[:-1], index[-1] // _per(logical, stored.shape))

    def _logical(self, tensor: Any, name: str, stored: StoredTensor) -> tuple[int, ...] | None:
        """The shape of a tensor, once decoded, by that of its payload; None for a companion, and for shuffled ones."""
        for codec in self.expansion.codecs(tensor):
            names = codec.names(name)
            if codec.kind != "raw" and stored.name in names and codec.claims(stored.dtype) and names[0] == stored.name:
                return None if codec.kind in _SHUFFLED else tuple(codec.logical_shape(stored.shape))
        return stored.shape if stored.name in (name, self._respelled.get(name)) else None

    def _sizes(self, match: Match, named: Named, logical: tuple[int, ...], sources: Sequence[Named]) -> dict[str, int]:
        """The sizes of all axes of a match."""
        rule = self.expansion.map.rules[match.rule]
        sized = []
        pattern = self.expansion.pattern(match.rule, _SIDES[self.made], named.place)
        if pattern is not None:
            sized.append(Sized(named.name, pattern, logical))
        for source in {source.place: source for source in reversed(sources)}.values():
            tensor = rule.sides[self.read][source.place]
            pattern = self.expansion.pattern(match.rule, _SIDES[self.read], source.place)
            there = self._there(tensor, source.name)
            shape = self._logical(tensor, source.name, self.source.tensors[there[0]]) if there else None
            if pattern is not None and shape is not None:
                sized.append(Sized(source.name, pattern, shape))
        return joint_sizes(sized, self.expansion.sizes(match))

    def _in_piece(
        self, piece: Piece, side: int, match: Match, index: tuple[int, ...], sizes: Mapping[str, int]
    ) -> dict[str, int] | None:
        """The positions along the axes of a piece; None where the element is not in it."""
        shape = self.expansion.checked.layouts[match.rule].shapes[side][piece.tensor]
        assert shape is not None  # a rule with pieces has all shapes
        path, found = list(piece.path), dict[str, int]()
        for dimension, axes, at in zip(shape.dimensions, piece.dims, index, strict=True):
            if not _place(dimension, at, list(axes), path, sizes, found):
                return None
        return found

    def _index(self, piece: Piece, match: Match, axes: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[int, ...]:
        shape = self.expansion.checked.layouts[match.rule].shapes[self.read][piece.tensor]
        assert shape is not None  # a rule with pieces has all shapes
        path = list(piece.path)
        return tuple(_at(d, list(own), path, axes, sizes) for d, own in zip(shape.dimensions, piece.dims, strict=True))


def _spelled(pattern: Pattern, values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """The name of a pattern; nobody's, where an index is in it that `values` lack."""
    try:
        return spelled(pattern, lambda expr: evaluate(expr, values), lambda wildcard: texts[wildcard.name])
    except (EvaluationError, KeyError):
        return ""


def _per(logical: tuple[int, ...], stored: tuple[int, ...]) -> int:
    """How many elements along the last dimension share a place; ValueError where other dimensions differ."""
    if logical[:-1] != stored[:-1] or not stored or not stored[-1]:
        raise ValueError("the payload has other dimensions")
    return logical[-1] // stored[-1]


def _agree(position: Mapping[str, int], axes: Mapping[str, int]) -> bool:
    return all(axes.get(axis) == place for axis, place in position.items())


def _size(part: tree.Dimension | tree.Product, sizes: Mapping[str, int]) -> int:
    match part:
        case tree.Axis(name=str(name)):
            return sizes[name]
        case tree.Axis(size=int(size)):
            return size
        case tree.Product(factors=factors):
            return math.prod(_size(factor, sizes) for factor in factors)
        case tree.Sum(terms=terms):
            return sum(_size(term, sizes) for term in terms)
    raise ValueError("a padded dimension has no size of its own")


def _place(
    part: tree.Dimension | tree.Product,
    at: int,
    axes: list[str],
    path: list[int],
    sizes: Mapping[str, int],
    found: dict[str, int],
) -> bool:
    """Note the positions of the axes of a dimension, whose place is `at`; False where that is in another term."""
    match part:
        case tree.Sum(terms=terms):
            term = path.pop(0)
            at -= sum(_size(other, sizes) for other in terms[:term])
            inside = 0 <= at < _size(terms[term], sizes)
            return inside and _place(terms[term], at, axes, path, sizes, found)
        case tree.Product(factors=factors):
            places = []
            for factor in reversed(factors):
                at, place = divmod(at, _size(factor, sizes))
                places.append(place)
            pairs = zip(factors, reversed(places), strict=True)
            return all(_place(factor, place, axes, path, sizes, found) for factor, place in pairs)
        case tree.Axis(size=1):
            return True
        case tree.Pad():
            raise ValueError("a padded dimension has elements of no other tensor")
    found[axes.pop(0)] = at
    return True


def _at(
    part: tree.Dimension | tree.Product,
    axes: list[str],
    path: list[int],
    positions: Mapping[str, int],
    sizes: Mapping[str, int],
) -> int:
    """The place along a dimension of the element at some positions."""
    match part:
        case tree.Sum(terms=terms):
            term = path.pop(0)
            before = sum(_size(other, sizes) for other in terms[:term])
            return before + _at(terms[term], axes, path, positions, sizes)
        case tree.Product(factors=factors):
            at = 0
            for factor in factors:
                at = at * _size(factor, sizes) + _at(factor, axes, path, positions, sizes)
            return at
        case tree.Axis(size=1):
            return 0
        case tree.Pad():
            raise ValueError("a padded dimension has elements of no other tensor")
    return positions[axes.pop(0)]
