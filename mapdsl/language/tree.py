"""The syntax tree of a `.map` file: frozen dataclasses, one a construct.

Every node carries the span that it was read from; spans take no part in comparison, so equal trees say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from mapdsl.language.node import Node as Node
from mapdsl.language.node import node
from mapdsl.language.source import Source

# --- expressions: params, index bounds, guards ---------------------------------------------------------------------


@node
class Number(Node):
    """`3`; in values and generators also `-0.5`."""

    value: int | float


@node
class String(Node):
    """`"full_attention"`."""

    value: str


@node
class Boolean(Node):
    """`true` or `false`."""

    value: bool


@node
class ListLiteral(Node):
    """`[0, 4, 128]`."""

    items: tuple[Expr, ...]


@node
class Name(Node):
    """A param, an index or a config field: `L`, `text_config.hidden_size`."""

    path: str


@node
class Lookup(Node):
    """`X[n]`: an element of a list."""

    value: Expr
    index: Expr


@node
class Call(Node):
    """`len(X)`, `positions(X, "v")`, `size(tp)`."""

    function: str
    arguments: tuple[Expr, ...]


@node
class Has(Node):
    """`has(KEY)`: does the checkpoint hold a name of that template?"""

    template: Template


@node
class Operation(Node):
    """`operator` is one of `+ - * // % == != < <= > >= in and or not`; unary minus is `-` with one operand.

    `and`, `or`, `+` and `*` may hold any number of operands from two; the others hold two, `not` one.
    """

    operator: str
    operands: tuple[Expr, ...]


@node
class Default(Node):
    """`a ?? b ?? c`: the first that is neither absent nor null."""

    options: tuple[Expr, ...]


Expr = Union[Number, String, Boolean, ListLiteral, Name, Lookup, Call, Has, Operation, Default]

# --- names ---------------------------------------------------------------------------------------------------------


@node
class Text(Node):
    """Literal characters of a name."""

    text: str


@node
class NumberHole(Node):
    """`{i}`, `{i+1}`, `{L+k}`, `{A[a]}`, `{local e}`, `{repeat e}`; `{j}` repeats the spelling of an enumeration."""

    value: Expr
    local: bool = False
    repeat: bool = False


@node
class EnumHole(Node):
    """`{j:w1|w3}`, `{repeat j:gate|up}`: an axis whose positions are spelled so."""

    name: str
    spellings: tuple[str, ...]
    repeat: bool = False


@node
class WildcardHole(Node):
    """`{*}`, `{n:*}` (one whole segment) or, with `many`, `{..}`, `{n:..}` (one or more segments)."""

    name: str | None
    many: bool


Part = Union[Text, NumberHole, EnumHole, WildcardHole]


@node
class Template(Node):
    """A name with holes. `.` alone (the empty prefix of a block) has no parts."""

    parts: tuple[Part, ...]


# --- shapes --------------------------------------------------------------------------------------------------------


@node
class Axis(Node):
    """A named axis, or (an integer, `size`) an axis of that size; `1` is a dimension of size one."""

    name: str | None = None
    size: int | None = None
    repeat: bool = False


@node
class Sum(Node):
    """`a b + c`: terms laid end to end along one dimension."""

    terms: tuple[Product, ...]


@node
class Product(Node):
    """`h c` or `g (r c + c)`: factors, slowest first; `zeros(h c)`: a term of a sum that the other side lacks."""

    factors: tuple[Axis | Sum, ...]
    zeros: bool = False


@node
class Pad(Node):
    """`pad(V, 128*size(tp))`: a dimension rounded up to a multiple, the rest zeros."""

    axis: Axis
    multiple: Expr


Dimension = Union[Axis, Product, Sum, Pad]


@node
class Shape(Node):
    """`[f d]`: dimensions, slowest first; `[]` is a scalar."""

    dimensions: tuple[Dimension, ...]


# --- rules ---------------------------------------------------------------------------------------------------------


@node
class CodecUse(Node):
    """One alternative behind `as`: `fp8`, `raw`, `f32`, `add(1)`."""

    name: str
    arguments: tuple[Argument, ...] = ()


@node
class Tensor(Node):
    """`KEY [shape] as a|b`."""

    template: Template
    shape: Shape | None = None
    codecs: tuple[CodecUse, ...] = ()


@node
class Generator(Node):
    """`inv_freq(rope_theta, c)`: a value computed from params and sizes."""

    name: str
    arguments: tuple[Expr, ...]


@node
class Value(Node):
    """`= V` (compared) or `~ V` (not compared) behind an absent side: a number, another name, or a generator."""

    content: Number | Template | Generator
    compared: bool


@node
class Rule(Node):
    """One line. A side without tensors is `_`."""

    left: tuple[Tensor, ...]
    arrow: str
    right: tuple[Tensor, ...]
    value: Value | None = None
    is_else: bool = False
    optional: bool = False
    guard: Expr | None = None


@node
class Pair(Node):
    """One pair of prefixes of a block head, with its own guard."""

    left: Template
    right: Template
    guard: Expr | None = None


@node
class Block(Node):
    """Statements that hold under each pair of prefixes."""

    pairs: tuple[Pair, ...]
    body: tuple[Statement, ...]


# --- declarations --------------------------------------------------------------------------------------------------


@node
class Header(Node):
    """`map NAME: LEFT <-> RIGHT`."""

    name: str
    left: str
    right: str


@node
class Param(Node):
    """`param P = EXPR`; `param P` alone stands for `param P = P`, the config field of that name."""

    name: str
    value: Expr


@node
class Index(Node):
    """`index i < U`, `index A <= i < U`; without an upper bound `index x >= A`."""

    name: str
    lower: Expr | None
    upper: Expr | None


@node
class Argument(Node):
    """An argument of a codec, `name=value` or by position; a value is `a|b`, a string, or a number."""

    name: str | None
    value: tuple[str, ...] | str | int | float


@node
class Codec(Node):
    """`codec C = KIND(ARGS)`."""

    name: str
    kind: str
    arguments: tuple[Argument, ...]


@node
class MeshAxis(Node):
    """An axis behind `shards`: `h`, `e unevenly`, `e by ceil`, `g or copies`."""

    name: str
    uneven: bool = False
    by_ceil: bool = False
    copies: bool = False


@node
class Mesh(Node):
    """`mesh tp shards h, f`."""

    name: str
    axes: tuple[MeshAxis, ...]


@node
class Accept(Node):
    """`accept OLD for NEW where C`."""

    old: Template
    new: Template
    guard: Expr | None = None


@node
class Binding(Node):
    """`P = EXPR` behind `with`."""

    name: str
    value: Expr


@node
class Include(Node):
    """`include "f.map" with config = text_config, P = EXPR where C`."""

    path: str
    bindings: tuple[Binding, ...] = ()
    guard: Expr | None = None


@node
class Override(Node):
    """`override RULE`."""

    rule: Rule


@node
class Remove(Node):
    """`remove KEY`."""

    template: Template


@node
class Example(Node):
    """`example KEY -> KEY`, `example KEY <- KEY`; a target of None is `error`."""

    name: str
    arrow: str
    target: str | None


@node
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
