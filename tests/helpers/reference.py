"""A second opinion on what a map does: a slow interpreter of checked maps, element by element, in plain Python.

It shares nothing with `emit/` and the conversions of `runtime/`: it enumerates every match of every rule, every element
of every piece, and moves one number at a time. Names are enumerated, not parsed; sizes are found by trying.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.formula import evaluate, evaluate_params, show
from mapdsl.compiler.names import Pattern, is_narrower, patterns, read
from mapdsl.compiler.shapes import name_axes
from mapdsl.language import tree
from tests.helpers.elements import LEFT, RIGHT, Match, ReferenceProblem, State, Values, axes_of_dimension, extent, move


@dataclass
class Reference:
    """A checked map under one config."""

    checked: Checked
    config: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False

    def __post_init__(self) -> None:
        self.map = self.checked.map
        self.values: Values = {}

    # --- whole states ---

    def to_right(self, state: State) -> State:
        """The right side's state of a left one."""
        self._answer(state)
        return self._convert(self._respelled(state), LEFT)

    def to_left(self, state: State, *, found: Mapping[str, bool] | None = None) -> State:
        """The left side's state of a right one; `found` answers `has(...)`."""
        self._answer({}, found)
        return self._convert(dict(state), RIGHT)

    def _convert(self, state: State, source: int) -> State:
        left_over, made = dict(state), State()
        ties: list[Match] = []
        named = self._named(source)
        for match in self._matches():
            if not match.holds or is_wild(match.rule, self.map):
                continue
            value = match.rule.value
            if value is not None and isinstance(value.content, tree.Template):
                ties.append(match)
                continue
            self._apply(match, source, state, left_over, made)
        for match in ties:
            self._tie(match, source, state, left_over, made)
        self._carry(source, named, left_over, made)
        if left_over:
            raise ReferenceProblem("R603", ", ".join(left_over))
        return made

    def _apply(self, match: Match, source: int, state: State, left_over: State, made: State) -> None:
        """One match of a rule without wildcards in its names."""
        here, there = match.rule.sides[source], match.rule.sides[1 - source]
        dropped = (match.rule.arrow, source) in (("->", LEFT), ("<-", RIGHT))
        names = [n for tensor in here for n, _ in self._names(match, source, tensor)]
        if not here:
            if match.rule.value is not None:
                self._make(match, 1 - source, made)
            return
        if not there and match.rule.value is None:
            for name in names if dropped else ():
                left_over.pop(name, None)
            return
        if self._is_empty(match):
            for name in names:
                left_over.pop(name, None)
            return
        missing = [name for name in names if name not in state]
        if missing and len(missing) == len(names) and (match.rule.optional or self.partial):
            return
        if missing:
            raise ReferenceProblem("R605", ", ".join(missing))
        for name in names:
            left_over.pop(name)
        if not there:
            self._compare(match, source, state)
        elif names:
            move(self, match, source, state, made)

    # --- constants and ties ---

    def _constant(self, match: Match, side: int) -> Iterator[tuple[str, Tensor | None]]:
        value = match.rule.value
        assert value is not None
        for tensor in match.rule.sides[side]:
            for name, inner in self._names(match, side, tensor):
                if isinstance(value.content, tree.Generator):
                    theta, count = (evaluate(a, {**self.values, **inner}) for a in value.content.arguments)
                    yield name, torch.tensor([theta ** -(n / count) for n in range(count)], dtype=torch.float32)
                else:
                    assert isinstance(value.content, tree.Number) and tensor.shape is not None
                    sizes = self._sizes(match, [], {})
                    shape = [extent(d, sizes) for d in tensor.shape.dimensions]
                    yield name, torch.full(shape, float(value.content.value), dtype=torch.bfloat16)

    def _make(self, match: Match, side: int, made: State) -> None:
        made.update({name: tensor for name, tensor in self._constant(match, side) if tensor is not None})

    def _compare(self, match: Match, side: int, state: State) -> None:
        assert match.rule.value is not None
        if match.rule.value.compared:
            for name, wanted in self._constant(match, side):
                if wanted is not None and not torch.equal(state[name], wanted.to(state[name].dtype)):
                    raise ReferenceProblem("R601", name)

    def _tie(self, match: Match, source: int, state: State, left_over: State, made: State) -> None:
        rule = match.rule
        assert rule.value is not None and isinstance(rule.value.content, tree.Template)
        side = LEFT if rule.left else RIGHT
        twin = self._spell(rule.value.content, match.values)
        for tensor in rule.sides[side]:
            for name, _ in self._names(match, side, tensor):
                if side == source:
                    if name in state and rule.value.compared and not torch.equal(state[name], state[twin]):
                        raise ReferenceProblem("R601", name)
                    left_over.pop(name, None)
                elif twin in made:
                    made[name] = made[twin]

    # --- wildcards ---

    def _carry(self, source: int, named: set[str], left_over: State, made: State) -> None:
        """Names that no other rule names, by the narrowest template; their images must be no other rule's either."""
        elses = [match for match in self._matches() if is_wild(match.rule, self.map)]
        foreign = self._named(1 - source)
        for name in list(left_over):
            readings = [
                (m, p, r) for m in elses for p in self._else_patterns(m, source) if (r := self._reads(p, m, name))
            ]
            best = [(m, p, r) for m, p, r in readings if not any(is_narrower(q, p) for _, q, _ in readings)]
            if not best or name in named:
                continue
            match, _, texts = best[0]
            if not match.holds or name not in left_over:
                continue
            if match.layout.pieces:
                values = {**match.values, **{f"{{{wild}}}": text for wild, text in texts_of(best[0]).items()}}
                self._apply(Match(match.rule, match.layout, values, True), source, dict(left_over), left_over, made)
                continue
            tensor = left_over.pop(name)
            for target in match.rule.sides[1 - source]:
                image = self._spell(target.template, match.values, texts)
                rivals = [
                    q
                    for m in elses
                    for q in self._else_patterns(m, 1 - source)
                    if m is not match and self._reads(q, m, image)
                ]
                mine = self._else_patterns(match, 1 - source)[0]
                if image in foreign or image in made or any(is_narrower(q, mine) for q in rivals):
                    raise ReferenceProblem("R603", image)
                made[image] = tensor

    def _else_patterns(self, match: Match, side: int) -> list[Pattern]:
        found = []
        for tensor in match.rule.sides[side]:
            for pattern in patterns(tensor.template):
                if all(match.values.get(axis, position) == position for axis, position in pattern.choice.items()):
                    found.append(pattern)
        return found

    def _reads(self, pattern: Pattern, match: Match, name: str) -> dict[str, str] | None:
        """What the wildcards of a pattern stand for in a name, if its numbers are those of the match."""
        reading = read(pattern, name)
        if reading is None:
            return None
        for hole, number in reading[0]:
            open_ = [n for n in ir.names_in(hole) if n in self.map.indices and self.map.indices[n].upper is None]
            if open_:
                lower = self.map.indices[open_[0]].lower
                offset = evaluate(hole, {**self.values, **match.values, open_[0]: 0})
                if number - offset < (evaluate(lower, self.values) if lower else 0):
                    return None
                return {**reading[1], f"#{open_[0]}": str(number - offset)}
            axes = [n for n in ir.names_in(hole) if n in self.map.indices and n not in match.values]
            scopes = [{**match.values, **values} for values in self._positions(match.rule, axes, match.values)]
            if not any(evaluate(hole, {**self.values, **scope}) == number for scope in scopes):
                return None
        return reading[1] or {"": ""}

    # --- names ---

    def _matches(self) -> Iterator[Match]:
        for rule, layout in zip(self.map.rules, self.checked.layouts, strict=True):
            axes = [a for a in layout.matched if a in rule.enumerations or self._is_closed(a)]
            for values in self._positions(rule, axes, {}):
                holds = rule.guard is None or evaluate(rule.guard, {**self.values, **values})
                yield Match(rule, layout, values, bool(holds))

    def _is_closed(self, axis: str) -> bool:
        return axis in self.map.indices and self.map.indices[axis].upper is not None

    def _positions(self, rule: ir.Rule, axes: list[str], known: Values) -> Iterator[Values]:
        """Every combination of positions of some axes; bounds may use earlier indices."""
        declared = list(self.map.indices)
        order = sorted(axes, key=lambda a: declared.index(a) if a in declared else -1)

        def extend(values: Values, left: list[str]) -> Iterator[Values]:
            if not left:
                yield values
                return
            for position in self._range(rule, left[0], {**known, **values}):
                yield from extend({**values, left[0]: position}, left[1:])

        yield from extend({}, order)

    def _range(self, rule: ir.Rule, axis: str, values: Values) -> range:
        if axis in rule.enumerations:
            return range(rule.enumerations[axis].size)
        index = self.map.indices[axis]
        scope = {**self.values, **values}
        assert index.upper is not None
        return range(evaluate(index.lower, scope) if index.lower else 0, evaluate(index.upper, scope))

    def _names(self, match: Match, side: int, tensor: ir.Tensor) -> Iterator[tuple[str, Values]]:
        """The names of one operand in a match, with the positions of the axes that they absorb."""
        axes = [a for a in name_axes(tensor.template, self.map.indices) if a in match.layout.in_names[side]]
        for values in self._positions(match.rule, axes, match.values):
            yield self._spell(tensor.template, {**match.values, **values}), values

    def _spell(self, template: tree.Template, values: Values, texts: Mapping[str, str] | None = None) -> str:
        numbers = {key[1:]: int(text) for key, text in (texts or {}).items() if key.startswith("#")}
        words = []
        for part in template.parts:
            match part:
                case tree.Text(text=text):
                    words.append(text)
                case tree.EnumHole(name=name, spellings=spellings):
                    words.append(spellings[values[name]])
                case tree.NumberHole(value=value):
                    words.append(str(evaluate(value, {**self.values, **values, **numbers})))
                case tree.WildcardHole(name=wild):
                    known = {key[1:-1]: text for key, text in values.items() if key.startswith("{")}
                    words.append({**known, **(texts or {})}[wild or "*"])
        return "".join(words)

    def _is_empty(self, match: Match) -> bool:
        """Whether an operand has no names (there are no experts): then no tensor of the match is on either side."""
        return any(not list(self._names(match, side, t)) for side in (LEFT, RIGHT) for t in match.rule.sides[side])

    def _named(self, side: int) -> set[str]:
        """Every name that a rule without `{..}` names, whether its guard holds or not."""
        found = set()
        for match in self._matches():
            if not is_wild(match.rule, self.map):
                for tensor in match.rule.sides[side]:
                    found |= {name for name, _ in self._names(match, side, tensor)}
        return found

    # --- params and legacy names ---

    def _answer(self, state: State, found: Mapping[str, bool] | None = None) -> None:
        """Set the params; `has(...)` is answered by the state."""
        fields = dict(_flat(self.config))
        given = {**self.given, **(found or {})}
        for param in self.map.params.values():
            options = param.value.options if isinstance(param.value, tree.Default) else (param.value,)
            for option in options:
                if isinstance(option, tree.Has) and state:
                    wanted = patterns(option.template)
                    fields[show(option)] = any(read(p, n) is not None for p in wanted for n in state)
        self.values = evaluate_params({n: p.value for n, p in self.map.params.items()}, fields, given)

    def _respelled(self, state: State) -> State:
        out = dict(state)
        for accept in self.map.accepts:
            axes = [p.name for p in ir.holes(accept.old, tree.EnumHole)]  # type: ignore[attr-defined]
            axes += [a for a in name_axes(accept.old, self.map.indices) if a in self.map.indices]
            rule = ir.Rule((), "<->", (), None, False, False, None, accept.enumerations, (), accept.span)
            for values in self._positions(rule, list(dict.fromkeys(axes)), {}):
                if accept.guard is not None and not evaluate(accept.guard, {**self.values, **values}):
                    continue
                match = Match(rule, self.checked.layouts[0], values, True)
                for name in list(state):
                    for pattern in patterns(accept.old):
                        fits = all(values.get(a, n) == n for a, n in pattern.choice.items())
                        texts = self._reads(pattern, match, name) if fits else None
                        if texts is not None and name in out:
                            new = self._spell(accept.new, values, texts)
                            if new in out:
                                raise ReferenceProblem("C506", name)
                            out[new] = out.pop(name)
        return out

    # --- sizes ---

    def _sizes(
        self, match: Match, tensors: list[tuple[tree.Shape, tuple[int, ...]]], free: Mapping[str, int]
    ) -> Values:
        """The size of every axis of a rule: known ones, and those of the tensors at hand by trying."""
        sizes: Values = dict(free)
        for name, value in self.values.items():
            if isinstance(value, int):
                sizes[name] = value
        for name, enumeration in match.rule.enumerations.items():
            sizes[name] = enumeration.size
        for name in self.map.indices:
            if self._is_closed(name):
                try:
                    sizes[name] = len(self._range(match.rule, name, match.values))
                except Exception:  # its bound uses an index of other rules
                    continue
        for _ in range(10):
            for shape, found in tensors:
                for dimension, size in zip(shape.dimensions, found, strict=True):
                    unknown = axes_of_dimension(dimension) - sizes.keys()
                    if len(unknown) == 1:
                        axis = unknown.pop()
                        fits = [n for n in range(size + 1) if extent(dimension, {**sizes, axis: n}) == size]
                        if not fits:
                            raise ReferenceProblem("X305", f"{axis} in {found}")
                        sizes[axis] = fits[0]
        return sizes


def texts_of(reading: tuple[Match, Pattern, dict[str, str]]) -> dict[str, str]:
    """What the wildcards stand for in a reading."""
    return {name: text for name, text in reading[2].items() if not name.startswith("#")}


def is_wild(rule: ir.Rule, resolved: ir.Map) -> bool:
    """Whether names of a rule cannot be enumerated: wildcards, indices without an upper bound."""
    if any(ir.holes(t.template, tree.WildcardHole) for side in rule.sides for t in side):
        return True
    axes = {a for side in rule.sides for t in side for a in name_axes(t.template, resolved.indices)}
    return any(a in resolved.indices and resolved.indices[a].upper is None for a in axes)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
