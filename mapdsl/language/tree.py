"""The syntax tree of a `.map` file: frozen dataclasses, one a construct.

Every node carries the span that it was read from; spans take no part in comparison, so equal trees say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from mapdsl.language.source import Source, Span

# --- expressions: params, index bounds, guards ---------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Base of all nodes; `span` is where the node stands in its file."""

    span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Number(Node):
    """`3`; in values and generators also `-0.5`."""

    value: int | float


@dataclass(frozen=True)
class String(Node):
    """`"full_attention"`."""

    value: str


@dataclass(frozen=True)
class Boolean(Node):
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True)
class ListLiteral(Node):
    """`[0, 4, 128]`."""

    items: tuple[Expr, ...]


@dataclass(frozen=True)
class Name(Node):
    """A param, an index or a config field: `L`, `text_config.hidden_size`."""

    path: str


@dataclass(frozen=True)
class Lookup(Node):
    """`X[n]`: an element of a list."""

    value: Expr
    index: Expr


@dataclass(frozen=True)
class Call(Node):
    """`len(X)`, `positions(X, "v")`, `size(tp)`."""

    function: str
    arguments: tuple[Expr, ...]


@dataclass(frozen=True)
class Has(Node):
    """`has(KEY)`: does the checkpoint hold a name of that template?"""

    template: Template


@dataclass(frozen=True)
class Operation(Node):
    """`operator` is one of `+ - * // % == != < <= > >= in and or not`; unary minus is `-` with one operand.

    `and`, `or`, `+` and `*` may hold any number of operands from two; the others hold two, `not` one.
    """

    operator: str
    operands: tuple[Expr, ...]


@dataclass(frozen=True)
class Default(Node):
    """`a ?? b ?? c`: the first that is neither absent nor null."""

    options: tuple[Expr, ...]


Expr = Union[Number, String, Boolean, ListLiteral, Name, Lookup, Call, Has, Operation, Default]

# --- names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text(Node):
    """Literal characters of a name."""

    text: str


@dataclass(frozen=True)
class NumberHole(Node):
    """`{i}`, `{i+1}`, `{L+k}`, `{A[a]}`, `{local e}`, `{repeat e}`; `{j}` repeats the spelling of an enumeration."""

    value: Expr
    local: bool = False
    repeat: bool = False


@dataclass(frozen=True)
class EnumHole(Node):
    """`{j:w1|w3}`, `{repeat j:gate|up}`: an axis whose positions are spelled so."""

    name: str
    spellings: tuple[str, ...]
    repeat: bool = False


@dataclass(frozen=True)
class WildcardHole(Node):
    """`{*}`, `{n:*}` (one whole segment) or, with `many`, `{..}`, `{n:..}` (one or more segments)."""

    name: str | None
    many: bool


Part = Union[Text, NumberHole, EnumHole, WildcardHole]


@dataclass(frozen=True)
class Template(Node):
    """A name with holes. `.` alone (the empty prefix of a block) has no parts."""

    parts: tuple[Part, ...]


# --- shapes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis(Node):
    """A named axis, or (an integer, `size`) an axis of that size; `1` is a dimension of size one."""

    name: str | None = None
    size: int | None = None
    repeat: bool = False


@dataclass(frozen=True)
class Sum(Node):
    """`a b + c`: terms laid end to end along one dimension."""

    terms: tuple[Product, ...]


@dataclass(frozen=True)
class Product(Node):
    """`h c` or `g (r c + c)`: factors, slowest first."""

    factors: tuple[Axis | Sum, ...]


@dataclass(frozen=True)
class Pad(Node):
    """`pad(V, 128*size(tp))`: a dimension rounded up to a multiple, the rest zeros."""

    axis: Axis
    multiple: Expr


Dimension = Union[Axis, Product, Sum, Pad]


@dataclass(frozen=True)
class Shape(Node):
    """`[f d]`: dimensions, slowest first; `[]` is a scalar."""

    dimensions: tuple[Dimension, ...]


# --- rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodecUse(Node):
    """One alternative behind `as`: `fp8`, `raw`, `f32`, `add(1)`."""

    name: str
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Tensor(Node):
    """`KEY [shape] as a|b`."""

    template: Template
    shape: Shape | None = None
    codecs: tuple[CodecUse, ...] = ()


@dataclass(frozen=True)
class Generator(Node):
    """`inv_freq(rope_theta, c)`: a value computed from params and sizes."""

    name: str
    arguments: tuple[Expr, ...]


@dataclass(frozen=True)
class Value(Node):
    """`= V` (compared) or `~ V` (not compared) behind an absent side: a number, another name, or a generator."""

    content: Number | Template | Generator
    compared: bool


@dataclass(frozen=True)
class Rule(Node):
    """One line. A side without tensors is `_`."""

    left: tuple[Tensor, ...]
    arrow: str
    right: tuple[Tensor, ...]
    value: Value | None = None
    is_else: bool = False
    optional: bool = False
    guard: Expr | None = None


@dataclass(frozen=True)
class Pair(Node):
    """One pair of prefixes of a block head, with its own guard."""

    left: Template
    right: Template
    guard: Expr | None = None


@dataclass(frozen=True)
class Block(Node):
    """Statements that hold under each pair of prefixes."""

    pairs: tuple[Pair, ...]
    body: tuple[Statement, ...]


# --- declarations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header(Node):
    """`map NAME: LEFT <-> RIGHT`."""

    name: str
    left: str
    right: str


@dataclass(frozen=True)
class Param(Node):
    """`param P = EXPR`; `param P` alone stands for `param P = P`, the config field of that name."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Index(Node):
    """`index i < U`, `index A <= i < U`; without an upper bound `index x >= A`."""

    name: str
    lower: Expr | None
    upper: Expr | None


@dataclass(frozen=True)
class Argument(Node):
    """An argument of a codec, `name=value` or by position; a value is `a|b`, a string, or a number."""

    name: str | None
    value: tuple[str, ...] | str | int | float


@dataclass(frozen=True)
class Codec(Node):
    """`codec C = KIND(ARGS)`."""

    name: str
    kind: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class MeshAxis(Node):
    """An axis behind `shards`: `h`, `e unevenly`, `e by ceil`, `g or copies`."""

    name: str
    uneven: bool = False
    by_ceil: bool = False
    copies: bool = False


@dataclass(frozen=True)
class Mesh(Node):
    """`mesh tp shards h, f`."""

    name: str
    axes: tuple[MeshAxis, ...]


@dataclass(frozen=True)
class Accept(Node):
    """`accept OLD for NEW where C`."""

    old: Template
    new: Template
    guard: Expr | None = None


@dataclass(frozen=True)
class Binding(Node):
    """`P = EXPR` behind `with`."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Include(Node):
    """`include "f.map" with config = text_config, P = EXPR where C`."""

    path: str
    bindings: tuple[Binding, ...] = ()
    guard: Expr | None = None


@dataclass(frozen=True)
class Override(Node):
    """`override RULE`."""

    rule: Rule


@dataclass(frozen=True)
class Remove(Node):
    """`remove KEY`."""

    template: Template


@dataclass(frozen=True)
class Example(Node):
    """`example KEY -> KEY`, `example KEY <- KEY`; a target of None is `error`."""

    name: str
    arrow: str
    target: str | None


@dataclass(frozen=True)
class Law(Node):
    """`law left -> right -> left: bit, guarded`."""

    path: tuple[str, str, str]
    grade: str


Declaration = Union[Param, Index, Codec, Mesh, Example, Law]
Statement = Union[Declaration, Rule, Block, Accept, Include, Override, Remove]


@dataclass(frozen=True)
class Comment:
    """`# ...` with its offset; `own_line` when nothing but spaces stands before it."""

    text: str
    offset: int = field(compare=False)
    own_line: bool = False


@dataclass(frozen=True)
class File:
    """A whole `.map` file."""

    source: Source = field(compare=False, repr=False)
    header: Header | None
    statements: tuple[Statement, ...]
    comments: tuple[Comment, ...] = ()
