"""What a map asks of a config: every field that it reads, of which kind, and the values that its guards tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.codecs import codec_key
from mapdsl.compiler.formula import show
from mapdsl.language import tree
from mapdsl.runtime.codecs.storage import BlockStorage

# A guard that speaks of large indices (`i < 61`) is not worth a model that large.
LARGEST_REACH = 8
_SMALLEST_REACH = 4
_FLAGS = ("bounds_index", "is_size", "is_factor", "is_divided", "is_divisor", "is_cut", "measured", "distinct")
_ORDER = ("<", "<=", ">", ">=")


@dataclass
class Field:
    """One field of the config, or one param: what is known of its values.

    `kind` is `int`, `bool`, `str`, `number`, `list`, or empty where nothing tells. `bounds_index` and `is_size` say
    what an integer does, `is_factor` that a size is made from it, `is_divided` and `is_divisor` where it stands by a
    `//` there. `is_cut` says that ranks share it, and `multiple` of what each share should be one, as blocks of formats
    want it. `measured` says that a list's length matters, `distinct` that no element may stand twice. `optional` fields
    may be absent. `literals` are what the map compares with.
    """

    path: str
    kind: str = ""
    bounds_index: bool = False
    is_size: bool = False
    is_factor: bool = False
    is_divided: bool = False
    is_divisor: bool = False
    is_cut: bool = False
    multiple: int = 1
    optional: bool = False
    measured: bool = False
    distinct: bool = False
    literals: list[Any] = field(default_factory=list)
    element: Field | None = None

    def of_kind(self, kind: str) -> Field:
        """Note the kind, unless one is known."""
        self.kind = self.kind or kind
        return self

    def items(self) -> Field:
        """The elements, of what is now known to be a list."""
        self.of_kind("list")
        if self.element is None:
            self.element = Field(f"{self.path}[]")
        return self.element

    def note(self, value: Any) -> None:
        """A literal that values are compared with."""
        if not any(type(known) is type(value) and known == value for known in self.literals):
            self.literals.append(value)
        self.of_kind(_kind(value))

    def absorb(self, other: Field) -> None:
        """Everything that is known of another name for the same value."""
        self.kind = self.kind or other.kind
        for flag in _FLAGS:
            setattr(self, flag, getattr(self, flag) or getattr(other, flag))
        self.multiple = math.lcm(self.multiple, other.multiple)
        for literal in other.literals:
            self.note(literal)
        if other.element is not None:
            self.items().absorb(other.element)


@dataclass(frozen=True)
class Fields:
    """All fields of a map by dotted path, the texts of its `has(...)`, and how far its indices should reach."""

    of: dict[str, Field]
    has: tuple[str, ...]
    reach: int
    packs: bool


def fields_of(checked: Checked) -> Fields:
    """What the map of `checked` asks of a config."""
    return _Reader(checked).run()


def block_multiples(checked: Checked) -> dict[str, int]:
    """Of what the shares of an axis are multiples so that no share ends within a block of a format, by axis."""
    found: dict[str, int] = {}
    for rule, layout in zip(checked.map.rules, checked.layouts, strict=True):
        for tensors, shapes in zip(rule.sides, layout.shapes, strict=True):
            for tensor, shape in zip(tensors, shapes, strict=True):
                last = shape.dimensions[-2:] if shape is not None else ()
                for codec in (checked.codecs[codec_key(spec)] for spec in tensor.codecs):
                    blocks = codec.block if isinstance(codec, BlockStorage) else (1, 1)
                    for place, dimension in enumerate(last, 2 - len(last)):
                        wanted = math.lcm(blocks[place] or 1, codec.per if place == 1 else 1)
                        for axis, multiple in _innermost(dimension, wanted):
                            found[axis] = math.lcm(found.get(axis, 1), multiple)
    return found


def _innermost(part: tree.Dimension | tree.Product, wanted: int) -> Iterator[tuple[str, int]]:
    """The axes whose positions lie next to each other in a dimension, and of what their sizes are to be multiples."""
    match part:
        case tree.Axis(name=str(name)) | tree.Pad(axis=tree.Axis(name=str(name))):
            yield name, wanted
        case tree.Sum(terms=terms):
            for term in terms:
                yield from _innermost(term, wanted)
        case tree.Product(factors=factors):
            for factor in reversed(factors):
                if not isinstance(factor, tree.Axis) or factor.size is None:
                    yield from _innermost(factor, wanted)
                    return
                wanted //= math.gcd(wanted, factor.size)


class _Reader:
    """Walks every expression of a map, uses before definitions: a param's uses tell of the fields it is made from."""

    def __init__(self, checked: Checked) -> None:
        self.checked = checked
        self.map = checked.map
        self.names: dict[str, Field] = {}
        self.has: dict[str, None] = {}
        self.largest = _SMALLEST_REACH

    def run(self) -> Fields:
        for rule in self.map.rules:
            self._rule(rule)
        for accept in self.map.accepts:
            self._template(accept.old)
            self._template(accept.new)
            if accept.guard is not None:
                self._boolean(accept.guard)
        for index in self.map.indices.values():
            for bound in (index.lower, index.upper):
                if bound is not None:
                    self._integer(bound, bounds=True)
        self._cut_axes()
        # A definition mentions params before it only, so backwards every use is met before the definition.
        for param in reversed(self.map.params.values()):
            own_field = isinstance(param.value, tree.Name) and param.value.path == param.name
            if not own_field:
                self._like(param.value, self._field(param.name))
        read = {p for param in self.map.params.values() for p in self._paths(param)}
        packs = any(getattr(codec, "per", 1) > 1 for codec in self.checked.codecs.values())
        of = {path: self._field(path) for path in sorted(read)}
        return Fields(of, tuple(self.has), min(self.largest, LARGEST_REACH), packs)

    def _paths(self, param: ir.Param) -> list[str]:
        """The config fields of a definition: names that are no params, and its own."""
        return [p for p in ir.names_in(param.value) if p not in self.map.params or p == param.name]

    def _field(self, path: str) -> Field:
        return self.names.setdefault(path, Field(path))

    # --- where expressions stand ---

    def _cut_axes(self) -> None:
        """Params, and ends of indices, that are axes which meshes cut."""
        multiples = block_multiples(self.checked)
        for name in (axis.name for mesh in self.map.meshes for axis in mesh.axes):
            index = self.map.indices.get(name)
            size = None if index is None or index.upper is None else self._target(index.upper)
            if name in self.map.params:
                size = self._field(name)
            if size is not None:
                size.of_kind("int").is_cut = True
                size.multiple = math.lcm(size.multiple, multiples.get(name, 1))

    def _rule(self, rule: ir.Rule) -> None:
        for side in rule.sides:
            for tensor in side:
                self._template(tensor.template)
                for axis in ir.axes_of(tensor.shape) if tensor.shape else ():
                    if axis.name in self.map.params:
                        self._field(axis.name).of_kind("int").is_size = True
        if rule.guard is not None:
            self._boolean(rule.guard)
        if rule.value is not None and isinstance(rule.value.content, tree.Generator):
            for argument in rule.value.content.arguments:
                if isinstance(argument, tree.Name) and argument.path in self.map.params:
                    self._field(argument.path).of_kind("number")

    def _template(self, template: tree.Template) -> None:
        for part in template.parts:
            if isinstance(part, tree.NumberHole):
                self._integer(part.value)
                if isinstance(part.value, tree.Lookup) and isinstance(part.value.value, tree.Name):
                    self._field(part.value.value.path).distinct = True

    # --- what an expression tells of the names in it ---

    def _target(self, expr: tree.Expr) -> Field | None:
        """The field that an expression is the value of, if it is one name or an element of one list."""
        if isinstance(expr, tree.Name) and expr.path not in self.map.indices:
            return self._field(expr.path)
        if isinstance(expr, tree.Lookup):
            self._integer(expr.index)
            listed = self._target(expr.value)
            return None if listed is None else listed.items()
        return None

    def _like(self, expr: tree.Expr, wanted: Field) -> None:
        """The expression is the value of `wanted`: what is known of that is known of its names."""
        target = self._target(expr)
        if target is not None:
            target.absorb(wanted)
            return
        match expr:
            case tree.Default(options=options):
                for option in options:
                    if isinstance(option, (tree.Number, tree.String, tree.Boolean)):
                        wanted.of_kind(_kind(option.value))
                for option in options:
                    self._like(option, wanted)
                for option in options[:-1]:
                    for path in ir.names_in(option):
                        self._field(path).optional = True
            case tree.Operation(operator=symbol) if symbol in ("+", "-", "*", "//", "%"):
                self._integer(expr, bounds=wanted.bounds_index)
                if wanted.is_size or wanted.is_factor:
                    self._size(expr)
            case tree.Operation():
                self._boolean(expr)
            case tree.Call():
                self._call(expr)
            case tree.Has():
                self._has(expr)

    def _size(self, expr: tree.Operation) -> None:
        """The expression is a size: what it is made from stays small, and a quotient should not be 0."""
        for path in ir.names_in(expr):
            self._field(path).is_factor = True
        if expr.operator == "//":
            for path in ir.names_in(expr.operands[0]):
                self._field(path).is_divided = True
            for path in ir.names_in(expr.operands[1]):
                self._field(path).is_divisor = True

    def _boolean(self, expr: tree.Expr) -> None:
        match expr:
            case tree.Operation(operator=symbol, operands=operands) if symbol in ("and", "or", "not"):
                for operand in operands:
                    self._boolean(operand)
            case tree.Operation(operator="in", operands=(item, items)):
                self._membership(item, items)
            case tree.Operation(operator=symbol, operands=(one, other)):
                self._comparison(one, other, symbol)
            case tree.Default():
                self._like(expr, Field("", "bool"))
            case tree.Has():
                self._has(expr)
            case _:
                if (target := self._target(expr)) is not None:
                    target.of_kind("bool")

    def _comparison(self, one: tree.Expr, other: tree.Expr, symbol: str) -> None:
        for mine, theirs in ((one, other), (other, one)):
            if isinstance(theirs, (tree.Number, tree.String, tree.Boolean)):
                target = self._target(mine)
                if target is not None:
                    target.note(theirs.value)
                else:
                    self._integer(mine)
                    self._reach(theirs.value, symbol)
                return
        for side in (one, other):
            self._integer(side)

    def _membership(self, item: tree.Expr, items: tree.Expr) -> None:
        if isinstance(items, tree.ListLiteral):
            for literal in items.items:
                self._comparison(item, literal, "==")
            return
        listed = self._target(items)
        if listed is None:
            return
        element = listed.items()
        if isinstance(item, (tree.Number, tree.String, tree.Boolean)):
            element.note(item.value)
        else:
            self._integer(item)
            element.of_kind("int")

    def _integer(self, expr: tree.Expr, *, bounds: bool = False) -> None:
        match expr:
            case tree.Operation(operands=operands):
                for operand in operands:
                    self._integer(operand, bounds=bounds)
                    if isinstance(operand, tree.Number) and expr.operator in ("%", "//"):
                        self._reach(operand.value, "<")
            case tree.Call():
                self._call(expr)
            case tree.Default():
                self._like(expr, Field("", "int", bounds_index=bounds))
            case _:
                target = self._target(expr)
                if target is not None:
                    target.of_kind("int").bounds_index |= bounds

    def _call(self, call: tree.Call) -> None:
        if call.function not in ("len", "positions") or not call.arguments:
            return
        listed = self._target(call.arguments[0])
        if listed is None:
            if isinstance(call.arguments[0], tree.Call):
                self._call(call.arguments[0])
            return
        listed.of_kind("list").measured = True
        for argument in call.arguments[1:]:
            if isinstance(argument, (tree.Number, tree.String, tree.Boolean)):
                listed.items().note(argument.value)

    def _has(self, expr: tree.Has) -> None:
        self.has[show(expr)] = None

    def _reach(self, value: Any, symbol: str) -> None:
        """Indices should reach past the literals that they are compared with."""
        if isinstance(value, int) and not isinstance(value, bool):
            self.largest = max(self.largest, value + (symbol in (*_ORDER, "==", "!=")) + 1)


def _kind(value: Any) -> str:
    return {bool: "bool", int: "int", float: "number", str: "str"}.get(type(value), "")
