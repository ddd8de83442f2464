"""Expressions, scopes and questions for the tests of guards, written as Python and turned into trees."""

from __future__ import annotations

import ast

from mapdsl.compiler.formula import Scope, Verdict, decide, evaluate
from mapdsl.language import tree
from mapdsl.language.source import Source, Span

HERE = Span(Source("test.map", ""), 0, 0)
OPERATORS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.In: "in",
    ast.And: "and",
    ast.Or: "or",
    ast.Not: "not",
    ast.USub: "-",
}


def expr(text: str) -> tree.Expr:
    """`default(a, b)` stands for `a ?? b`, `has("x")` for `has(x)`."""
    return convert(ast.parse(text, mode="eval").body)


def operation(symbol: str, *operands: tree.Expr) -> tree.Expr:
    return tree.Operation(symbol, operands, span=HERE)


def convert(node: ast.expr) -> tree.Expr:
    match node:
        case ast.Constant(value=bool(value)):
            return tree.Boolean(value, span=HERE)
        case ast.Constant(value=str(value)):
            return tree.String(value, span=HERE)
        case ast.Constant(value=value):
            return tree.Number(value, span=HERE)
        case ast.Name(id="true" | "false" as name):
            return tree.Boolean(name == "true", span=HERE)
        case ast.Name() | ast.Attribute():
            return tree.Name(ast.unparse(node), span=HERE)
        case ast.List(elts=items):
            return tree.ListLiteral(tuple(map(convert, items)), span=HERE)
        case ast.Subscript(value=value, slice=index):
            return tree.Lookup(convert(value), convert(index), span=HERE)
        case ast.BinOp(left=left, op=op, right=right):
            return operation(OPERATORS[type(op)], convert(left), convert(right))
        case ast.UnaryOp(op=op, operand=operand):
            return operation(OPERATORS[type(op)], convert(operand))
        case ast.BoolOp(op=op, values=values):
            return operation(OPERATORS[type(op)], *map(convert, values))
        case ast.Compare(left=left, ops=[ast.NotIn()], comparators=[right]):
            return operation("not", operation("in", convert(left), convert(right)))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return operation(OPERATORS[type(op)], convert(left), convert(right))
        case ast.Call(func=ast.Name(id="default"), args=options):
            return tree.Default(tuple(map(convert, options)), span=HERE)
        case ast.Call(func=ast.Name(id="has"), args=[ast.Constant(value=text)]):
            return tree.Has(tree.Template((tree.Text(text, span=HERE),), span=HERE), span=HERE)
        case ast.Call(func=ast.Name(id=function), args=arguments):
            return tree.Call(function, tuple(map(convert, arguments)), span=HERE)
    raise AssertionError(ast.dump(node))


def scope(params: dict[str, str] | None = None, distinct: tuple[str, ...] = (), **indices: str) -> Scope:
    """`i="L"` is `index i < L`, `i="3..L"` is `index 3 <= i < L`, `i="3.."` has no end."""
    bounds = {}
    for name, text in indices.items():
        lower, dots, upper = text.partition("..")
        bounds[name] = (expr(lower), expr(upper) if upper else None) if dots else (None, expr(text))
    definitions = {name: expr(text) for name, text in (params or {}).items()}
    return Scope(definitions, bounds, frozenset(distinct))


def ask(where: Scope, *facts: str, used: tuple[str, ...] = (), **options: int) -> Verdict:
    verdict = decide(where, [expr(fact) for fact in facts], used, **options)
    if verdict.status == "open":
        for fact in facts:
            assert evaluate(expr(fact), verdict.model) is True
    return verdict
