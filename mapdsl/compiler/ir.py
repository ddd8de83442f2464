"""What resolving makes of the syntax tree: one flat list of rules with whole names, every word bound to its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mapdsl.language import tree
from mapdsl.language.source import Span


@dataclass(frozen=True)
class Param:
    """A value that follows from the left side's config: `value` names params before it and config fields."""

    name: str
    value: tree.Expr
    span: Span = field(repr=False)


@dataclass(frozen=True)
class Index:
    """An axis of known size. `upper` is None for an open range, which only dropped names may use."""

    name: str
    lower: tree.Expr | None
    upper: tree.Expr | None
    span: Span = field(repr=False)


@dataclass(frozen=True)
class Enumeration:
    """An axis whose positions are spelled out: `{j:w1|w3}`. Each side may spell it in its own way."""

    name: str
    size: int


# Kinds of codecs that are declared with their layout, and quantise; others stand by their name alone.
QUANTISED = ("block_scaled", "packed_int", "group_int")
# Casts to a dtype that tensors may have once they are decoded.
WIDE_CASTS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class CodecSpec:
    """A storage format as the map declares it: its name there, its kind, and the arguments of the kind.

    `raw` is the kind of a tensor that is stored as it is.
    """

    name: str
    kind: str
    arguments: tuple[tree.Argument, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a rule: its whole name template (block prefixes joined), shape, and storage alternatives.

    Holes of the template: `NumberHole` over indices and params, `EnumHole` spelled out on this side, `WildcardHole`
    with a name (unnamed ones are called `*` and `..`).
    """

    template: tree.Template
    shape: tree.Shape | None
    codecs: tuple[CodecSpec, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Rule:
    """One rule under one combination of block prefixes. A side without tensors is absent (`_`)."""

    left: tuple[Tensor, ...]
    arrow: str
    right: tuple[Tensor, ...]
    value: tree.Value | None
    is_else: bool
    optional: bool
    guard: tree.Expr | None
    enumerations: dict[str, Enumeration] = field(compare=False)
    heads: tuple[tree.Pair, ...] = field(compare=False, repr=False)
    span: Span = field(compare=False, repr=False)
    included: bool = field(default=False, compare=False)

    @property
    def sides(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Left and right."""
        return self.left, self.right

    def side(self, name: str) -> tuple[Tensor, ...]:
        """`left` or `right`."""
        return self.left if name == "left" else self.right

    @property
    def is_read(self) -> bool:
        """Whether reading the left side makes something of this rule on the right."""
        return bool(self.right) and self.arrow != "<-"

    @property
    def is_written(self) -> bool:
        """Whether writing the left side makes something of this rule there."""
        return bool(self.left) and self.arrow != "->"


@dataclass(frozen=True)
class Accept:
    """A legacy spelling of stored names."""

    old: tree.Template
    new: tree.Template
    guard: tree.Expr | None
    enumerations: dict[str, Enumeration] = field(compare=False)
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Map:
    """A resolved map."""

    name: str
    left: str
    right: str
    params: dict[str, Param]
    indices: dict[str, Index]
    codecs: dict[str, CodecSpec]
    meshes: tuple[tree.Mesh, ...]
    rules: tuple[Rule, ...]
    accepts: tuple[Accept, ...]
    examples: tuple[tree.Example, ...]
    laws: tuple[tree.Law, ...]
    file: tree.File = field(compare=False, repr=False)


def children(expr: tree.Expr) -> tuple[tree.Expr, ...]:
    """The expressions that an expression is made of."""
    match expr:
        case tree.Lookup(value=value, index=index):
            return value, index
        case tree.Call(arguments=items) | tree.ListLiteral(items=items) | tree.Operation(operands=items):
            return items
        case tree.Default(options=items):
            return items
    return ()


def names_in(expr: tree.Expr) -> Iterator[str]:
    """Every name of a param, an index or a field that an expression mentions, as it is written."""
    if isinstance(expr, tree.Name):
        yield expr.path
    for child in children(expr):
        yield from names_in(child)


def holes(template: tree.Template, kind: type[tree.Part]) -> list[tree.Part]:
    """The holes of one kind, in order."""
    return [part for part in template.parts if isinstance(part, kind)]


def conjunction(*guards: tree.Expr | None) -> tree.Expr | None:
    """All guards that are not None, joined by `and`."""
    parts = [guard for guard in guards if guard is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return tree.Operation("and", tuple(parts), span=parts[0].span.to(parts[-1].span))


def axes_of(shape: tree.Shape) -> Iterator[tree.Axis]:
    """Every axis of a shape, in order, those of sums once a term."""
    pending: list[tree.Dimension | tree.Product] = list(reversed(shape.dimensions))
    while pending:
        match pending.pop():
            case tree.Axis() as axis:
                yield axis
            case tree.Pad(axis=axis):
                yield axis
            case tree.Sum(terms=parts) | tree.Product(factors=parts):
                pending += reversed(parts)


def summands(value: tree.Expr) -> tuple[tree.Expr, ...]:
    """The operands of a sum, those of the sums in it too; of anything else it alone."""
    if isinstance(value, tree.Operation) and value.operator == "+":
        return tuple(part for operand in value.operands for part in summands(operand))
    return (value,)
