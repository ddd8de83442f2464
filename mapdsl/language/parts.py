"""From Lark's parse tree to the syntax tree, first half: expressions, shapes, names. One method a grammar rule."""

# Methods are named as the rules of the grammar, which documents them.
# ruff: noqa: D102

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from lark import Token, Tree
from lark.exceptions import UnexpectedInput

from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, error
from mapdsl.language.layout import MAX_DEPTH, LayoutError
from mapdsl.language.parser import parse_template
from mapdsl.language.source import Source, Span
from mapdsl.language.wording import describe

# Longer numbers are no sizes; they would only make arithmetic slow.
MAX_DIGITS = 18

_HOLE = re.compile(r"\{\s*(?:(local|repeat)(?=\s))?([^{}]*)\}")
_GOOD_HOLE = re.compile(r"\{(?:(?:local|repeat)[ \t]+)?[^{}\s]*\}")
_ARITHMETIC = frozenset({"+", "-", "*", "//", "%"})


class PartsBuilder:
    """Builds the nodes inside one statement of a source.

    What is wrong but leaves a node to go on with is put into `found`; only nesting too deep is raised. `offset` shifts
    positions when a part of the source was parsed by itself.
    """

    def __init__(self, source: Source, offset: int = 0, found: list[Diagnostic] | None = None) -> None:
        self.source = source
        self.offset = offset
        self.found: list[Diagnostic] = [] if found is None else found
        self.depth = 0

    def report(self, code: str, message: str, *spans: Span, **fields: str) -> None:
        self.found.append(Diagnostic(code, message, spans, **fields))

    def build(self, node: Any) -> Any:
        """The tree node of a Lark node."""
        self.depth += 1
        try:
            if self.depth > MAX_DEPTH:
                raise error("S101", f"this is nested more than {MAX_DEPTH} deep", self.span(node))
            return getattr(self, node.data)(node)
        finally:
            self.depth -= 1

    def span(self, node: Any) -> Span:
        """Where a Lark tree or token stands."""
        if isinstance(node, Token):
            start, end = node.start_pos or 0, node.end_pos or 0
        else:
            start, end = getattr(node.meta, "start_pos", 0), getattr(node.meta, "end_pos", 0)
        return Span(self.source, start + self.offset, end + self.offset)

    def all(self, nodes: list[Any]) -> tuple[Any, ...]:
        return tuple([self.build(node) for node in nodes if node is not None])

    def trees(self, node: Any) -> tuple[Any, ...]:
        """The nodes of a Lark node's children that are trees: operators and marks left out."""
        return self.all([child for child in node.children if isinstance(child, Tree)])

    def maybe(self, node: Any) -> Any:
        return None if node is None else self.build(node)

    # --- expressions ---

    def number(self, token: Token) -> int | float:
        if not set(token) & set(".eE"):
            return self.integer_of(token)
        value = float(token)
        if not math.isfinite(value):
            self.report("S101", f"the number {token} is too big", self.span(token))
        return value

    def integer_of(self, token: Token) -> int:
        if len(token) > MAX_DIGITS:
            self.report("S101", f"a number of {len(token)} digits is no size", self.span(token))
            return 1
        return int(token)

    def default(self, node: Any) -> tree.Expr:
        options = self.all(node.children)
        return options[0] if len(options) == 1 else tree.Default(options, span=self.span(node))

    def any_of(self, node: Any) -> tree.Expr:
        return tree.Operation("or", self.trees(node), span=self.span(node))

    def all_of(self, node: Any) -> tree.Expr:
        return tree.Operation("and", self.trees(node), span=self.span(node))

    def not_(self, node: Any) -> tree.Expr:
        return tree.Operation("not", (self.build(node.children[-1]),), span=self.span(node))

    def comparison(self, node: Any) -> tree.Expr:
        left, *operators, right = node.children
        span = self.span(node)
        operation = tree.Operation(str(operators[-1]), (self.build(left), self.build(right)), span=span)
        return operation if len(operators) == 1 else tree.Operation("not", (operation,), span=span)

    def _chain(self, node: Any) -> tree.Expr:
        # The first operand of a chain lies deepest in its tree, so the chain's length counts as depth.
        operators = node.children[1::2]
        self.depth += len(operators)
        try:
            result = self.build(node.children[0])
            for operator, operand in zip(operators, node.children[2::2], strict=True):
                right = self.build(operand)
                result = tree.Operation(str(operator), (result, right), span=result.span.to(right.span))
        finally:
            self.depth -= len(operators)
        return result  # type: ignore[no-any-return]

    sum = _chain
    term = _chain

    def negative(self, node: Any) -> tree.Expr:
        return tree.Operation("-", (self.build(node.children[-1]),), span=self.span(node))

    def lookup(self, node: Any) -> tree.Expr:
        value, index = node.children
        return tree.Lookup(self.build(value), self.build(index), span=self.span(node))

    def list(self, node: Any) -> tree.Expr:
        return tree.ListLiteral(self.all(node.children), span=self.span(node))

    def integer(self, node: Any) -> tree.Expr:
        return tree.Number(self.integer_of(node.children[0]), span=self.span(node))

    def string(self, node: Any) -> tree.Expr:
        return tree.String(str(node.children[0])[1:-1], span=self.span(node))

    def boolean(self, node: Any) -> tree.Expr:
        return tree.Boolean(node.children[0].type == "TRUE", span=self.span(node))

    def name(self, node: Any) -> tree.Expr:
        return tree.Name(str(node.children[0]), span=self.span(node))

    def has(self, node: Any) -> tree.Expr:
        return tree.Has(self.template(node.children[0]), span=self.span(node))

    def call(self, node: Any) -> tree.Expr:
        name, *arguments = node.children
        return tree.Call(str(name), self.all(arguments), span=self.span(node))

    # --- shapes ---

    def shape(self, node: Any) -> tree.Shape:
        return tree.Shape(tuple(_plain(child) for child in self.all(node.children)), span=self.span(node))

    def axis(self, node: Any) -> tree.Axis:
        *repeat, name = node.children
        span = self.span(node)
        if name.type != "INT":
            return tree.Axis(str(name), repeat=repeat[0] is not None, span=span)
        size = self.integer_of(name)
        if size == 0:
            self.report("S101", "a dimension has a size of at least 1", span)
        return tree.Axis(size=size, span=span)

    def pad(self, node: Any) -> tree.Pad:
        axis, multiple = node.children
        return tree.Pad(self.build(axis), self.build(multiple), span=self.span(node))

    def terms(self, node: Any) -> tree.Sum:
        return tree.Sum(self.trees(node), span=self.span(node))

    def product(self, node: Any) -> tree.Product:
        factors: list[Any] = []
        for factor in map(_plain, self.all(node.children)):
            # `(g (r c))` is `(g r c)`.
            is_flat = isinstance(factor, tree.Product) and not factor.zeros
            factors += factor.factors if is_flat else [factor]
        return tree.Product(tuple(factors), span=self.span(node))

    def zeros(self, node: Any) -> tree.Product:
        return replace(self.product(node), zeros=True)

    # --- the inside of a name ---

    def template(self, key: Token) -> tree.Template:
        """The template of a KEY token that names a tensor."""
        if key == ".":
            hint = "`.` is the empty prefix of a block head"
            self.report("S101", "expected the name of a tensor, found `.`", self.span(key), help=hint)
        return self.prefix(key)

    def prefix(self, key: Token) -> tree.Template:
        """The template of a KEY token: literal text, or parsed by the grammar's start symbol `template`."""
        span = self.span(key)
        if key == ".":
            return tree.Template((), span=span)
        if "{" not in key:
            return tree.Template((tree.Text(str(key), span=span),), span=span)
        if self._spaced(key, span):
            return tree.Template((), span=span)
        try:
            parsed = parse_template(str(key))
        except LayoutError:
            self.report("S101", f"this is nested more than {MAX_DEPTH} deep", span)
            return tree.Template((), span=span)
        except UnexpectedInput as problem:
            self.found.append(describe(problem, self.source, span.start, span.end))
            return tree.Template((), span=span)
        inner = PartsBuilder(self.source, span.start, self.found)
        return tree.Template(tuple(inner.part(child) for child in parsed.children), span=span)

    def _spaced(self, key: Token, span: Span) -> bool:
        bad = [hole for hole in _HOLE.finditer(key) if not _GOOD_HOLE.fullmatch(hole[0])]
        for hole in bad:
            word, rest = hole.groups()
            tight = f"{{{word + ' ' if word else ''}{''.join(rest.split())}}}"
            place = Span(self.source, span.start + hole.start(), span.start + hole.end())
            self.report("S101", "a name holds no spaces", place, help=f"write `{tight}`")
        return bool(bad)

    def part(self, node: Any) -> tree.Part:
        """Literal text, which Lark hands over as a token, or a hole."""
        if isinstance(node, Token):
            return tree.Text(str(node), span=self.span(node))
        return self.build(node)  # type: ignore[no-any-return]

    def number_hole(self, node: Any) -> tree.NumberHole:
        mark, value = node.children
        kind = None if mark is None else mark.type
        number = self.build(value)
        if not _is_affine_like(number):
            hint = "a hole holds an index, `{i+1}`, `{A[a]}`; an enumeration, `{j:w1|w3}`; `{*}` or `{..}`"
            self.report("S101", "this is no number", number.span, help=hint)
        return tree.NumberHole(number, kind == "LOCAL", kind == "REPEAT", span=self.span(node))

    def enum_hole(self, node: Any) -> tree.EnumHole:
        repeat, name, *spellings = node.children
        return tree.EnumHole(
            self._plain_name(name), tuple(map(str, spellings)), repeat is not None, span=self.span(node)
        )

    def wildcard_hole(self, node: Any) -> tree.WildcardHole:
        name, mark = node.children
        return tree.WildcardHole(name and self._plain_name(name), mark.type == "DOTS", span=self.span(node))

    def _plain_name(self, name: Token) -> str:
        # The lexer cannot tell a name from a path here: what follows decides.
        if "." in name:
            self.report("S101", f"expected a name without dots, found `{name}`", self.span(name))
        return str(name)


def _plain(node: Any) -> Any:
    """A sum of one term is that product: `(j f)`; a product of one factor is that factor: `(f)`."""
    if isinstance(node, tree.Sum) and len(node.terms) == 1:
        product = node.terms[0]
        return product.factors[0] if len(product.factors) == 1 and not product.zeros else product
    return node


def _is_affine_like(value: tree.Expr) -> bool:
    """Whether an expression could be a number in a name; whether it is affine is the compiler's question."""
    match value:
        case tree.Number() | tree.Name():
            return True
        case tree.Lookup(value=table, index=index):
            return isinstance(table, (tree.Name, tree.Lookup)) and _is_affine_like(table) and _is_affine_like(index)
        case tree.Call(arguments=arguments):
            return all(map(_is_affine_like, arguments))
        case tree.Operation(operator=operator, operands=operands):
            return operator in _ARITHMETIC and all(map(_is_affine_like, operands))
    return False
