"""The one error of the runtime."""

from __future__ import annotations

import linecache
import re
from collections.abc import Collection
from itertools import islice
from types import TracebackType

_RULE = re.compile(r"\s*# ((?:[^\s:]+:)?\d+: .*)")
_SHOWN = 5


class ConversionError(ValueError):
    """Tensors that do not fit the map.

    `code` is a code of the catalogue (`mapdsl explain R605` tells more); `message` names the tensor, what was expected
    and what was found; `rule` is the rule at work, with its line in the map, where one was.
    """

    def __init__(self, code: str, message: str, rule: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.rule = rule

    def __str__(self) -> str:
        rule = f"\n  rule: {self.rule}" if self.rule else ""
        return f"error[{self.code}]: {self.message}{rule}"


def some_of(names: Collection[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(islice(names, _SHOWN)) + more


def rule_at_work(traceback: TracebackType | None, *, innermost: bool = False) -> str:
    """The rule, `37: KEY <-> KEY`, whose code in a compiled adapter raised: the comment above that code.

    Nothing where there is none, or with `innermost` where the code that raised is not the adapter's own.
    """
    rule, file, last = "", "", ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        last = code.co_filename
        if code.co_name.endswith(("_to_right", "_to_left")):
            file = code.co_filename
            rule = _comment_above(file, traceback.tb_lineno, code.co_firstlineno) or rule
        traceback = traceback.tb_next
    return rule if file == last or not innermost else ""


def _comment_above(filename: str, line: int, first: int) -> str:
    for number in range(line, first, -1):
        if found := _RULE.fullmatch(linecache.getline(filename, number).rstrip("\n")):
            return found[1]
    return ""
