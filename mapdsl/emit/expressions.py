"""Expressions and names of a map as Python code. Text of a map enters code through `repr` only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mapdsl.emit.reserved import attribute, local
from mapdsl.language import tree

_PRECEDENCE = {"or": 1, "and": 2, "not": 3, "in": 4, "+": 5, "-": 5, "*": 6, "//": 6, "%": 6}
_PRECEDENCE |= dict.fromkeys(("==", "!=", "<", "<=", ">", ">="), 4)
_OPPOSITES = {"==": "!=", "!=": "==", "in": "not in"}
_OF_MESH = {"size": "mesh_size", "rank": "mesh_rank"}
_COMPARISON, _SUM, _UNARY, _ATOM = 4, 5, 7, 9

# The attribute that holds each param.
Params = Mapping[str, str]
Spellings = Mapping[tuple[str, tuple[str, ...]], str]


def python(expr: tree.Expr, params: Params, field: Callable[[str], str] | None = None, outer: int = 0) -> str:
    """Python code of an expression. A name that is no param is a local variable, or what `field` makes of it."""
    return _Emitter(params, field).code(expr, outer)


def difference(upper: str, lower: tree.Expr | None, params: Params) -> str:
    """`upper - lower`; what is 0 is left out."""
    if lower is None or (isinstance(lower, tree.Number) and lower.value == 0):
        return upper
    return f"{upper} - {python(lower, params, outer=_SUM + 1)}"


class _Emitter:
    def __init__(self, params: Params, field: Callable[[str], str] | None) -> None:
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
                    return f"self.{self.params[path]}"
                return self.field(path) if self.field else local(path)
            case tree.Lookup(value=value, index=index):
                return f"{self.code(value, _ATOM)}[{self.code(index, 0)}]"
            case tree.Call(function="size" | "rank" as function, arguments=(tree.Name(path=mesh),)):
                return f"self.{_OF_MESH[function]}({quoted(mesh)})"
            case tree.Call(function=function, arguments=arguments):
                return f"{function}({', '.join(self.code(a, 0) for a in arguments)})"
            case tree.Operation(operator=operator, operands=operands):
                return self._operation(operator, operands, outer)
        raise AssertionError(f"{type(expr).__name__} stands only in a param")

    def _operation(self, operator: str, operands: tuple[tree.Expr, ...], outer: int) -> str:
        if operator == "not":
            return self._not(operands[0], outer)
        if len(operands) == 1:
            return self._wrapped(f"-{self.code(operands[0], _UNARY)}", _UNARY, outer)
        level = _PRECEDENCE[operator]
        # A comparison does not chain, and `a - (b - c)` keeps its parentheses: operands behind the first bind tighter.
        first = self.code(operands[0], level + (level == _COMPARISON))
        rest = [self.code(operand, level + (operator not in ("or", "and"))) for operand in operands[1:]]
        return self._wrapped(f" {operator} ".join([first, *rest]), level, outer)

    def _not(self, operand: tree.Expr, outer: int) -> str:
        match operand:
            case tree.Operation(operator="in" | "==" | "!=" as operator, operands=(one, other)):
                sides = f"{self.code(one, _SUM)} {_OPPOSITES[operator]} {self.code(other, _SUM)}"
                return self._wrapped(sides, _COMPARISON, outer)
        return self._wrapped(f"not {self.code(operand, 3)}", 3, outer)

    def _wrapped(self, code: str, level: int, outer: int) -> str:
        return f"({code})" if level < outer else code


def quoted(text: str) -> str:
    """A string literal with double quotes, as formatters want it."""
    literal = repr(text)
    if literal[0] == "'" and '"' not in text:
        return f'"{literal[1:-1]}"'
    return literal


def name_code(template: tree.Template, params: Params, spelled: Spellings) -> str:
    """A string or f-string that spells the name of a template; `spelled` gives the variable of each enumeration.

    `params` gives, as for `first_of`, what `{local e}` counts from by the name `local e`.
    """
    pieces = []
    plain = True
    for part in template.parts:
        match part:
            case tree.Text(text=text):
                pieces.append(quoted(text)[1:-1])
                continue
            case tree.EnumHole(name=name, spellings=spellings):
                pieces.append(f"\0{spelled[name, spellings]}\1")
            case tree.NumberHole(value=tree.Name(path=index), local=True):
                pieces.append(f"\0{local(index)} - self.{params[counted_from(index)]}\1")
            case tree.NumberHole(value=value):
                # A string within a string literal has the other quotes.
                pieces.append(f"\0{python(value, params)}\1".replace('"', "'"))
            case tree.WildcardHole(name=wild):
                pieces.append(f"\0{wildcard(wild or '*', spelled)}\1")
        plain = False
    text = "".join(pieces)
    if plain:
        return f'"{text}"'
    return f'f"{text.replace("{", "{{").replace("}", "}}")}"'.replace("\0", "{").replace("\1", "}")


def pattern_code(template: tree.Template, params: Params, spelled: Spellings, numbers: Iterable[tree.Part] = ()) -> str:
    """Like `name_code`, with wildcards as the runtime's patterns spell them: `*`, `**`, and `#` for `numbers`."""
    open_holes = {id(part) for part in numbers}
    parts: list[tree.Part] = []
    for part in template.parts:
        if isinstance(part, tree.WildcardHole):
            part = tree.Text("**" if part.many else "*", span=part.span)
        elif id(part) in open_holes:
            part = tree.Text("#", span=part.span)
        parts.append(part)
    return name_code(tree.Template(tuple(parts), span=template.span), params, spelled)


def counted_from(index: str) -> str:
    """What `{local e}` counts from, as `Params` call it: no name of a map has a space."""
    return f"local {index}"


def wildcard(name: str, spelled: Spellings) -> str:
    """The local variable of a wildcard."""
    return {"*": "segment", "..": "rest"}.get(name) or spelled.get((name, ())) or local(name)


def product(factors: list[str]) -> str:
    """Sizes multiplied: `2 * f`."""
    wrapped = [f"({f})" if (" + " in f or " - " in f) and not _is_wrapped(f) else f for f in factors if f != "1"]
    return " * ".join(wrapped) or "1"


def _is_wrapped(code: str) -> bool:
    """Whether one pair of parentheses is around all of it."""
    depth = 0
    for place, letter in enumerate(code):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place == len(code) - 1
    return False


__all__ = [
    "Params",
    "Spellings",
    "attribute",
    "difference",
    "local",
    "name_code",
    "pattern_code",
    "product",
    "python",
    "quoted",
]
