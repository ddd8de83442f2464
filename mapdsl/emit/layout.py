"""Laying out generated code as a formatter would: one line where it fits, else one item a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

WIDTH = 88
INDENT = "    "


@dataclass(frozen=True)
class Bracketed:
    """Code with one bracket that may be broken: `before` `(` items `)` `after`.

    `comprehension` breaks between clauses instead of commas.
    """

    before: str
    items: Sequence[Code]
    after: str = ""
    brackets: str = "()"
    comprehension: bool = False


Code = Union[str, Bracketed]


def call(function: str, *arguments: Code | None) -> Bracketed:
    """A call; arguments that are None are left out."""
    return Bracketed(function, [a for a in arguments if a is not None])


def flat(code: Code) -> str:
    """The code on one line."""
    if isinstance(code, str):
        return code
    separator = " " if code.comprehension else ", "
    inner = separator.join(flat(item) for item in code.items)
    comma = "," if code.brackets == "()," and len(code.items) == 1 else ""
    return f"{code.before}{code.brackets[0]}{inner}{comma}{code.brackets[1]}{code.after}"


def lines(code: Code, depth: int, *, before: str = "", after: str = "") -> list[str]:
    """The code at an indentation, in as few lines as fit; `before` and `after` stand on its first and last."""
    one = f"{INDENT * depth}{before}{flat(code)}{after}"
    if len(one) <= WIDTH or isinstance(code, str):
        return [one]
    out = [f"{INDENT * depth}{before}{code.before}{code.brackets[0]}"]
    separator = " " if code.comprehension else ", "
    inner = separator.join(flat(item) for item in code.items)
    if len(INDENT * (depth + 1) + inner) <= WIDTH:
        out.append(f"{INDENT * (depth + 1)}{inner}")
    else:
        for item in code.items:
            out += lines(item, depth + 1, after="" if code.comprehension else ",")
    out.append(f"{INDENT * depth}{code.brackets[1]}{code.after}{after}")
    return out
