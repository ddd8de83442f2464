"""Laying out generated code as a formatter would: one line where it fits, else one item a line."""

from __future__ import annotations

import io
import itertools
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

WIDTH = 88
INDENT = "    "


@dataclass(frozen=True)
class Bracketed:
    """Code with one bracket that may be broken: `before` `(` items `)` `after`.

    `joint` stands between the items: a comma, or a space between the clauses of a comprehension and the terms of an
    expression. `optional` brackets stand only around broken code.
    """

    before: str
    items: Sequence[Code]
    after: str = ""
    brackets: str = "()"
    joint: str = ", "
    optional: bool = False

    @property
    def is_literal(self) -> bool:
        """Whether this is a tuple, a list or a dict, which is broken into one item a line at once."""
        is_call = self.brackets == "()" and (self.before[-1:].isalnum() or self.before.endswith(("_", "*", ")")))
        return self.joint == ", " and not is_call


Code = Union[str, Bracketed]


def call(function: str, *arguments: Code | None) -> Bracketed:
    """A call; arguments that are None are left out."""
    return Bracketed(function, [a for a in arguments if a is not None])


def comprehension(brackets: str, item: Code, clauses: Sequence[Code], before: str = "") -> Bracketed:
    """`[item for x in y for z in x]`."""
    return Bracketed(before, [item, *clauses], brackets=brackets, joint=" ")


def listed(items: Sequence[str]) -> Bracketed:
    """A tuple: `(a, b)`, `(a,)`."""
    return Bracketed("", [*items[:-1], f"{items[-1]},"] if len(items) == 1 else items)


# Python's operators that a line is broken before, loosest first; within a row they bind alike.
_LEVELS = (("or",), ("and",), ("+", "-"), ("*", "//", "%"))


def breakable(code: str, before: str = "") -> Code:
    """An expression that may be broken: before its loosest operators, else between the arguments of a call."""
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    found: dict[str, list[int]] = {}
    commas: list[int] = []
    depth = 0
    for last, token in zip([None, *tokens], tokens, strict=False):
        depth += (token.string in ("(", "[")) - (token.string in (")", "]"))
        # A sign is no operator between operands.
        is_binary = last is not None and (last.type in (tokenize.NAME, tokenize.NUMBER) or last.string in (")", "]"))
        if depth == 0 and is_binary:
            found.setdefault(token.string, []).append(token.start[1])
        if depth == 1 and token.string == ",":
            commas.append(token.start[1])
    for level in _LEVELS:
        if starts := sorted(start for operator in level for start in found.get(operator, [])):
            pieces = [code[i:j].rstrip() for i, j in zip([0, *starts], [*starts, len(code)], strict=True)]
            return Bracketed(before, pieces, joint=" ", optional=True)
    if not code.endswith(")") or code.startswith("("):
        return before + code
    opened = code.index("(")
    cuts = [opened, *commas, len(code) - 1]
    return Bracketed(before + code[:opened], [breakable(code[i + 1 : j].strip()) for i, j in itertools.pairwise(cuts)])


def flat(code: Code) -> str:
    """The code on one line."""
    if isinstance(code, str):
        return code
    inner = code.joint.join(flat(item) for item in code.items)
    if code.optional:
        return f"{code.before}{inner}{code.after}"
    return f"{code.before}{code.brackets[0]}{inner}{code.brackets[1]}{code.after}"


def lines(code: Code, depth: int, *, before: str = "", after: str = "") -> list[str]:
    """The code at an indentation, in as few lines as fit; `before` and `after` stand on its first and last."""
    one = f"{INDENT * depth}{before}{flat(code)}{after}"
    if len(one) <= WIDTH:
        return [one]
    if isinstance(code, str):
        return _long_string(code, depth, before, after)
    if code.optional and len(code.items) == 2 and _is_enclosed(flat(code.items[0])):
        # One operator behind brackets of its own, which are broken instead: `if (`, `a or b`, `) and c:`.
        first, second = (flat(item) for item in code.items)
        return [
            f"{INDENT * depth}{before}{code.before}(",
            *_item(breakable(first[1:-1]), depth + 1, ""),
            f"{INDENT * depth}) {second}{code.after}{after}",
        ]
    out = [f"{INDENT * depth}{before}{code.before}{code.brackets[0]}"]
    inner = code.joint.join(flat(item) for item in code.items)
    if len(INDENT * (depth + 1) + inner) <= WIDTH and not code.is_literal:
        out.append(f"{INDENT * (depth + 1)}{inner}")
    else:
        for item in code.items:
            out += _item(item, depth + 1, code.joint.rstrip())
    out.append(f"{INDENT * depth}{code.brackets[1]}{code.after}{after}")
    return out


def _is_enclosed(code: str) -> bool:
    """Whether the first bracket of an expression is round and closed by its end."""
    depths = itertools.accumulate((character in "([") - (character in ")]") for character in code)
    return code.startswith("(") and list(depths).index(0) == len(code) - 1


def _item(item: Code, depth: int, after: str) -> list[str]:
    """One item of broken code: within brackets a long expression needs none of its own."""
    if isinstance(item, str):
        return lines(item.removesuffix(","), depth, after=after)
    if not item.optional or item.before or len(INDENT * depth + flat(item) + after) <= WIDTH:
        return lines(item, depth, after=after)
    *first, last = [line for term in item.items for line in _term(flat(term), depth)]
    return [*first, last + after]


def _term(code: str, depth: int) -> list[str]:
    """A term of an expression, broken further where it is still too long."""
    if len(INDENT * depth + code) <= WIDTH:
        return [INDENT * depth + code]
    operator, space, rest = (
        code.partition(" ") if code[0] in "+-*/%" or code.startswith(("and ", "or ")) else ("", "", code)
    )
    if rest.startswith("(") and rest.endswith(")"):
        return [
            f"{INDENT * depth}{operator}{space}(",
            *_item(breakable(rest[1:-1]), depth + 1, ""),
            f"{INDENT * depth})",
        ]
    inner = breakable(rest)
    if isinstance(inner, str) or not inner.optional:
        return [INDENT * depth + code]
    first, *others = (flat(term) for term in inner.items)
    terms = [f"{operator}{space}{first}", *others]
    return [line for term in terms for line in _term(term, depth)]


def _long_string(code: str, depth: int, before: str, after: str) -> list[str]:
    """What cannot be broken moves to a line of its own, behind `=` and if that helps."""
    inner = f"{INDENT * (depth + 1)}{code}"
    if not before.endswith(" = ") or len(inner) > WIDTH:
        return [f"{INDENT * depth}{before}{code}{after}"]
    return [f"{INDENT * depth}{before}(", inner, f"{INDENT * depth}){after}"]


def fits(block: Sequence[str]) -> bool:
    """Whether no line is too long."""
    return all(len(line) <= WIDTH for line in block)
