"""Expressions and names of a map as Python code. Text of a map enters code through `repr` only."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable

from mapdsl.emit.reserved import ADAPTER_NAMES, LOCAL_NAMES
from mapdsl.language import tree

_PRECEDENCE = {"or": 1, "and": 2, "not": 3, "in": 4, "+": 5, "-": 5, "*": 6, "//": 6, "%": 6}
_PRECEDENCE |= dict.fromkeys(("==", "!=", "<", "<=", ">", ">="), 4)


def attribute(name: str) -> str:
    """The attribute of the adapter that holds a param."""
    return f"{name}_" if keyword.iskeyword(name) or name in ADAPTER_NAMES else name


def local(name: str) -> str:
    """The local variable of an index, an enumeration or a free axis."""
    return f"{name}_" if keyword.iskeyword(name) or name in LOCAL_NAMES else name


def python(expr: tree.Expr, params: Iterable[str], field: Callable[[str], str] | None = None) -> str:
    """Python code of an expression. A name that is no param is a local variable, or what `field` makes of it."""
    return _Emitter(frozenset(params), field).code(expr, 0)


class _Emitter:
    def __init__(self, params: frozenset[str], field: Callable[[str], str] | None) -> None:
        self.params = params
        self.field = field

    def code(self, expr: tree.Expr, outer: int) -> str:
        match expr:
            case tree.Number(value=value) | tree.String(value=value) | tree.Boolean(value=value):
                return repr(value) if not isinstance(value, str) else quoted(value)
            case tree.ListLiteral(items=items):
                return f"[{', '.join(self.code(item, 0) for item in items)}]"
            case tree.Name(path=path):
                if path in self.params:
                    return f"self.{attribute(path)}"
                return self.field(path) if self.field else local(path)
            case tree.Lookup(value=value, index=index):
                return f"{self.code(value, 9)}[{self.code(index, 0)}]"
            case tree.Call(function=function, arguments=arguments):
                return f"{function}({', '.join(self.code(a, 0) for a in arguments)})"
            case tree.Operation(operator=operator, operands=operands):
                return self._operation(operator, operands, outer)
        raise AssertionError(f"{type(expr).__name__} stands only in a param")

    def _operation(self, operator: str, operands: tuple[tree.Expr, ...], outer: int) -> str:
        if operator == "not":
            return self._not(operands[0], outer)
        if len(operands) == 1:
            return self._wrapped(f"-{self.code(operands[0], 7)}", 7, outer)
        level = _PRECEDENCE[operator]
        # A comparison does not chain, and `a - (b - c)` keeps its parentheses: operands behind the first bind tighter.
        first = self.code(operands[0], level + (level == 4))
        rest = [self.code(operand, level + (operator not in ("or", "and"))) for operand in operands[1:]]
        return self._wrapped(f" {operator} ".join([first, *rest]), level, outer)

    def _not(self, operand: tree.Expr, outer: int) -> str:
        match operand:
            case tree.Operation(operator="in", operands=(item, items)):
                return self._wrapped(f"{self.code(item, 5)} not in {self.code(items, 5)}", 4, outer)
            case tree.Operation(operator="==", operands=(one, other)):
                return self._wrapped(f"{self.code(one, 5)} != {self.code(other, 5)}", 4, outer)
        return self._wrapped(f"not {self.code(operand, 3)}", 3, outer)

    def _wrapped(self, code: str, level: int, outer: int) -> str:
        return f"({code})" if level < outer else code


def quoted(text: str) -> str:
    """A string literal with double quotes, as formatters want it."""
    literal = repr(text)
    if literal[0] == "'" and '"' not in text:
        return f'"{literal[1:-1]}"'
    return literal


def name_code(template: tree.Template, params: Iterable[str], spelled: dict[tuple[str, tuple[str, ...]], str]) -> str:
    """A string or f-string that spells the name of a template; `spelled` gives the variable of each enumeration."""
    pieces = []
    plain = True
    for part in template.parts:
        match part:
            case tree.Text(text=text):
                pieces.append(quoted(text)[1:-1].replace("{", "{{").replace("}", "}}"))
            case tree.EnumHole(name=name, spellings=spellings):
                pieces.append(f"{{{spelled[name, spellings]}}}")
                plain = False
            case tree.NumberHole(value=value):
                pieces.append(f"{{{python(value, params)}}}")
                plain = False
            case tree.WildcardHole(name=name):
                pieces.append(f"{{{wildcard(name or '*')}}}")
                plain = False
    text = "".join(pieces)
    return f'"{text}"' if plain else f'f"{text}"'


def pattern_code(
    template: tree.Template,
    params: Iterable[str],
    spelled: dict[tuple[str, tuple[str, ...]], str],
    open_holes: frozenset[int] = frozenset(),
) -> str:
    """Like `name_code`, with wildcards as the runtime's patterns spell them: `*`, `**`, and `#` for `open_holes`."""
    parts: list[tree.Part] = []
    for part in template.parts:
        if isinstance(part, tree.WildcardHole):
            part = tree.Text("**" if part.many else "*", span=part.span)
        elif id(part) in open_holes:
            part = tree.Text("#", span=part.span)
        parts.append(part)
    return name_code(tree.Template(tuple(parts), span=template.span), params, spelled)


def wildcard(name: str) -> str:
    """The local variable of a wildcard."""
    return {"*": "segment", "..": "rest"}.get(name) or local(name)


def product(factors: list[str]) -> str:
    """Sizes multiplied: `2 * f`."""
    return " * ".join(f"({f})" if " + " in f else f for f in factors if f != "1") or "1"


__all__ = ["attribute", "local", "name_code", "pattern_code", "product", "python", "quoted", "wildcard"]
