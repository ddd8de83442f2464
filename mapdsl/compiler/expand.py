"""A map under one config: every match of every rule, every name with what is known of its shape. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mapdsl.compiler import ir
from mapdsl.compiler.admissible import check_admissible
from mapdsl.compiler.check import Checked
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.formula import EvaluationError, MissingValueError, evaluate, evaluate_params
from mapdsl.compiler.shapes import name_axes
from mapdsl.compiler.solvable import size_pattern
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, MapError
from mapdsl.runtime.shares import padded
from mapdsl.runtime.sizes import PartialShape, either_shape, shape_of

# More names than any checkpoint has: a config that promises them is broken, and listing them would only hang.
MAX_NAMES = 1_000_000
MAX_COUNT = 10_000_000
MAX_INDEX = 100_000


def param_values(checked: Checked, config: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all params under a config; MapError N115 (no field), N118 (wrong type), C505 (out of range).

    `given` wins over the config. Answers of `has(...)` stand in it under their text.
    """
    params = {name: param.value for name, param in checked.map.params.items()}
    unknown = sorted(name for name in given if name not in params and not name.startswith("has("))
    if unknown:
        known = ", ".join(params)
        raise MapError([Diagnostic("N111", f"the map has no param `{unknown[0]}`", help=f"it has {known or 'none'}")])
    fields = {path: _field(config or {}, path) for value in params.values() for path in ir.names_in(value)}
    fields |= {name: value for name, value in given.items() if name.startswith("has(")}
    try:
        values = evaluate_params(params, fields, {n: v for n, v in given.items() if n in params})
    except MissingValueError as err:
        span = getattr(err.expr, "span", None)
        hint = "give the config with --config, or the param with --param"
        if config is not None and isinstance(err.expr, tree.Name):
            hint = "the config has no such field: is it that of another model? --param gives the param a value"
        raise MapError([Diagnostic("N115", str(err.message), (span,) if span else (), help=hint)]) from None
    except EvaluationError as err:
        span = getattr(err.expr, "span", None)
        raise MapError([Diagnostic("C505", str(err.message), (span,) if span else ())]) from None
    for name, value in values.items():
        _check_value(checked.map.params[name], name, value)
    check_admissible(checked.map, fields, values)
    return values


def _field(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value


def _check_value(param: ir.Param, name: str, value: Any) -> None:
    if isinstance(value, (bool, str, float, list, tuple)):
        return
    if not isinstance(value, int):
        message = f"`{name}` is a {type(value).__name__}; expected an integer, boolean, string or list"
        raise MapError([Diagnostic("N118", message, (param.span,))])
    if not 0 <= value <= MAX_COUNT:
        message = f"`{name}` is {value}; expected an integer from 0 to {MAX_COUNT}"
        raise MapError([Diagnostic("C505", message, (param.span,))])


@dataclass(frozen=True)
class Match:
    """One match of a rule: values of its matched indices, positions of its matched enumerations."""

    rule: int
    values: Mapping[str, Any]
    choice: Mapping[str, int]


@dataclass(frozen=True)
class Named:
    """One tensor of a match: its place on its side, its name, and the positions of the axes that its name absorbs."""

    place: int
    name: str
    position: Mapping[str, int]


@dataclass(frozen=True)
class Key:
    """A name of one side with what map and config fix of it; a shape may have unknown dimensions (None)."""

    name: str
    dtype: str | None
    shape: tuple[int | None, ...] | None
    rule: int


@dataclass(frozen=True)
class Expansion:
    """The matches and names of a checked map under the values of its params."""

    checked: Checked
    params: Mapping[str, Any]
    _templates: dict[int, list[Any]] = field(default_factory=dict, repr=False)
    _sized: dict[int, list[str]] = field(default_factory=dict, repr=False)
    _axes: dict[int, set[str]] = field(default_factory=dict, repr=False)
    _padded: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def map(self) -> ir.Map:
        """The resolved map."""
        return self.checked.map

    def matches(self, number: int) -> Iterator[Match]:
        """All matches of a rule whose guard holds. A rule with wildcards or an open index has none to list."""
        rule, layout = self.map.rules[number], self.checked.layouts[number]
        if any(axis[0] == "{" or self._is_open(axis) for axis in layout.matched):
            return
        indices = [axis for axis in layout.matched if axis in self.map.indices]
        spelled = [axis for axis in layout.matched if axis in rule.enumerations]
        sizes = [range(rule.enumerations[axis].size) for axis in spelled]
        for values in self.index_values(indices):
            if rule.guard is None or self._holds(rule.guard, values):
                for choice in itertools.product(*sizes):
                    yield Match(number, values, dict(zip(spelled, choice, strict=True)))

    def names(self, match: Match, side: str) -> Iterator[Named]:
        """The tensors of a match on one side."""
        rule, layout = self.map.rules[match.rule], self.checked.layouts[match.rule]
        absorbed = layout.in_names[0 if side == "left" else 1]
        for place, tensor in enumerate(rule.side(side)):
            axes = [axis for axis in name_axes(tensor.template, self.map.indices) if axis in absorbed]
            parts = self._parts(tensor.template)
            for position, values, choice in self._positions(axes, rule, match):
                yield Named(place, _spell(parts, values, choice), position)

    def keys(self, side: str, *, quantization: bool = True) -> list[Key]:
        """Every name of a side, companions included, in the order of the rules; not optional ones and wildcards.

        With `quantization` each tensor is in the first of its formats, without in `raw` where that is one of them; a
        MapError, D401, where that format does not fit its shape. A tie has the shape of its twin.
        """
        promised = list(self._promised(side))
        shapes = {named.name: shape for _, named, shape, _ in promised}
        found: list[Key] = []
        for number, named, own, twin in promised:
            shape = either_shape(own, shapes.get(twin)) if twin is not None else own
            found += self._stored(number, side, named, shape, quantization)
        return found

    def _promised(self, side: str) -> Iterator[tuple[int, Named, PartialShape | None, str | None]]:
        """Every tensor of a side, without companions: its rule, what is known of its shape, of a tie its twin."""
        count = 0
        for number, rule in enumerate(self.map.rules):
            one_sided = not rule.left or not rule.right
            if rule.optional or (one_sided and rule.value is None):
                continue
            for match in self.matches(number):
                sizes = self.sizes(match)
                if self.is_empty(match, sizes):
                    continue
                value = rule.value.content if rule.value is not None else None
                tied = self._parts(value) if isinstance(value, tree.Template) else None
                twin = _spell(tied, match.values, match.choice) if tied is not None else None
                for named in self.names(match, side):
                    pattern = self.pattern(number, side, named.place)
                    yield number, named, None if pattern is None else shape_of(pattern, sizes), twin
                    count += 1
                    if count > MAX_NAMES:
                        message = f"the config promises more than {MAX_NAMES} tensors"
                        raise MapError([Diagnostic("C505", message, (rule.span,))])

    def codecs(self, tensor: ir.Tensor) -> list[AnyCodec]:
        """The storage alternatives of a tensor, in order; none where it is stored as it is."""
        return [self.checked.codecs[codec_key(spec)] for spec in tensor.codecs]

    def sizes(self, match: Match) -> dict[str, int]:
        """The sizes of axes that the config fixes, for one match."""
        rule = self.map.rules[match.rule]
        sizes = {name: enumeration.size for name, enumeration in rule.enumerations.items()}
        sizes |= {n: v for n, v in self.params.items() if isinstance(v, int) and not isinstance(v, bool)}
        sizes |= self._padded
        for name in self._sized_indices(match.rule):
            lower, upper = self._bounds(name, match.values)
            sizes[name] = max(0, upper - lower)
        return sizes

    def is_empty(self, match: Match, sizes: Mapping[str, int]) -> bool:
        """Whether an axis of the match has no positions: a tensor without elements is on neither side."""
        if match.rule not in self._axes:
            layout = self.checked.layouts[match.rule]
            shapes = [shape for side in layout.shapes for shape in side if shape is not None]
            axes = {axis.name for shape in shapes for axis in ir.axes_of(shape) if axis.name}
            self._axes[match.rule] = axes.union(*layout.in_names)
        return any(sizes.get(axis) == 0 for axis in self._axes[match.rule])

    def pattern(self, number: int, side: str, place: int) -> str | None:
        """The shape of a tensor of a rule as the size solver reads it."""
        shapes = self.checked.layouts[number].shapes[0 if side == "left" else 1]
        shape = shapes[place] if place < len(shapes) else None
        return None if shape is None else size_pattern(shape)

    # --- within ---

    def _stored(
        self, number: int, side: str, named: Named, shape: PartialShape | None, quantization: bool
    ) -> Iterator[Key]:
        codecs = self.codecs(self.map.rules[number].side(side)[named.place])
        raw = next((codec for codec in codecs if codec.kind == "raw"), None)
        codec = raw if raw is not None and not quantization else codecs[0] if codecs else None
        if codec is None or codec.kind == "raw":
            yield Key(named.name, None, shape, number)
            return
        known = None if shape is None or None in shape else tuple(size or 0 for size in shape)
        if known is not None and (problem := codec.unfit(known)):
            advice = "ask for its names without quantization, or list a format first that fits"
            raise MapError(
                [Diagnostic("D401", f"{named.name}: {problem}", (self.map.rules[number].span,), help=advice)]
            )
        for stored in codec.stored(named.name, known):
            yield Key(stored.name, stored.dtypes[0] if stored.dtypes else None, stored.shape, number)

    def _sized_indices(self, number: int) -> list[str]:
        """Indices that stand in a shape of the rule."""
        if number not in self._sized:
            shapes = [shape for side in self.checked.layouts[number].shapes for shape in side if shape is not None]
            axes = {axis.name for shape in shapes for axis in ir.axes_of(shape)}
            self._sized[number] = [name for name in self.map.indices if name in axes]
        return self._sized[number]

    def _is_open(self, axis: str) -> bool:
        return axis in self.map.indices and self.map.indices[axis].upper is None

    def index_values(self, indices: list[str], values: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Every combination of values of some indices, with the params; a bound may use an index before it."""
        values = {**self.params, **alone(self.map)} if values is None else values
        if not indices:
            yield values
            return
        first, *rest = indices
        lower, upper = self._bounds(first, values)
        for value in range(lower, upper):
            yield from self.index_values(rest, {**values, first: value})

    def _bounds(self, name: str, values: Mapping[str, Any]) -> tuple[int, int]:
        index = self.map.indices[name]
        bounds = []
        for bound in (index.lower, index.upper):
            value = 0 if bound is None else self.evaluate(bound, values)
            if not isinstance(value, int) or isinstance(value, bool):
                raise MapError([Diagnostic("N118", f"a bound of `{name}` is {value!r}, not an integer", (index.span,))])
            bounds.append(value)
        if bounds[1] - bounds[0] > MAX_INDEX:
            message = f"the index `{name}` runs to {bounds[1]}; more than {MAX_INDEX} positions are no checkpoint"
            raise MapError([Diagnostic("C505", message, (index.span,))])
        return bounds[0], bounds[1]

    def evaluate(self, expr: tree.Expr, values: Mapping[str, Any]) -> Any:
        """The value of an expression under params and indices; MapError C505 where it has none."""
        try:
            return evaluate(expr, values)
        except EvaluationError as err:
            span = getattr(err.expr, "span", None) or expr.span
            raise MapError([Diagnostic("C505", str(err.message), (span,))]) from None

    def _holds(self, guard: tree.Expr, values: Mapping[str, Any]) -> bool:
        return bool(self.evaluate(guard, values))

    def _positions(
        self, axes: list[str], rule: ir.Rule, match: Match
    ) -> Iterator[tuple[dict[str, int], Mapping[str, Any], Mapping[str, int]]]:
        """Every position of the absorbed axes, with the values and choices that spell it."""
        if not axes:
            yield {}, match.values, match.choice
            return
        ranges = []
        for axis in axes:
            if axis in rule.enumerations:
                ranges.append([(n, n) for n in range(rule.enumerations[axis].size)])
            else:
                lower, upper = self._bounds(axis, match.values)
                ranges.append([(value - lower, value) for value in range(lower, upper)])
        for combination in itertools.product(*ranges):
            position = {axis: place for axis, (place, _) in zip(axes, combination, strict=True)}
            spelled = {axis: value for axis, (_, value) in zip(axes, combination, strict=True)}
            yield position, {**match.values, **spelled}, {**match.choice, **spelled}

    def _parts(self, template: tree.Template) -> list[Any]:
        """A template ready to be spelled: texts, index names, and expressions."""
        key = id(template)
        if key not in self._templates:
            self._templates[key] = [_part(part) for part in template.parts]
        return self._templates[key]


def expand(checked: Checked, values: Mapping[str, Any]) -> Expansion:
    """The expansion of a map under the values of its params (see `param_values`), of a state that is whole."""
    expansion = Expansion(checked, values)
    expansion._padded.update(_padded_sizes(expansion))
    return expansion


def alone(resolved: ir.Map) -> dict[str, int]:
    """What `size(tp)` and `rank(tp)` are, by their text, to a state that is whole."""
    return {f"{what}({mesh.name})": number for mesh in resolved.meshes for what, number in (("size", 1), ("rank", 0))}


def _padded_sizes(expansion: Expansion) -> dict[str, int]:
    """The sizes of padded axes with their padding; MapError, C505, where they cannot be padded so."""
    values = {**expansion.params, **alone(expansion.map)}
    sizes: dict[str, int] = {}
    for pad in pads_of(expansion.map):
        size, multiple = values.get(pad.axis.name or ""), expansion.evaluate(pad.multiple, values)
        if multiple < 1:
            message = f"`{pad.axis.name}` cannot be padded to a multiple of {multiple}"
            raise MapError([Diagnostic("C505", message, (pad.span,))])
        if isinstance(size, int):
            sizes[padded(pad.axis.name or "")] = -(-size // multiple) * multiple
    return sizes


def pads_of(resolved: ir.Map) -> Iterator[tree.Pad]:
    """Every `pad(V, 128)` of a map."""
    shapes = (t.shape for rule in resolved.rules for t in (*rule.left, *rule.right) if t.shape is not None)
    return (one for shape in shapes for one in shape.dimensions if isinstance(one, tree.Pad))


def _part(part: tree.Part) -> Any:
    match part:
        case tree.Text(text=text):
            return text
        case tree.NumberHole(value=value):
            return value
    return part


def _spell(parts: list[Any], values: Mapping[str, Any], choice: Mapping[str, int]) -> str:
    words = []
    for part in parts:
        if type(part) is str:
            words.append(part)
        elif type(part) is tree.Name:
            words.append(str(values[part.path]))
        elif type(part) is tree.EnumHole:
            words.append(part.spellings[choice[part.name]])
        elif type(part) is tree.WildcardHole:
            words.append(str(values[f"{{{part.name}}}"]))
        else:
            words.append(str(evaluate(part, values)))
    return "".join(words)
