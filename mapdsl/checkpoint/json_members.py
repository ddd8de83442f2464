"""Members of a JSON object taken out of its text, or put into it: what else stands there stays as it is written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Member:
    """Where a member's name begins, where its value begins and where that ends."""

    name: str
    begin: int
    value: int
    end: int


def without_members(text: str, name: str) -> tuple[str, list[str]]:
    """The text of an object without its members called `name`, nor those of objects in it; and their dotted paths.

    `text` is valid JSON. Objects within arrays are not looked into.
    """
    taken: list[str] = []
    return _without(text, _after(text, 0), name, "", taken), taken


def with_member(text: str, name: str, value: Any) -> str:
    """The text of an object with one more member at its end, indented as the others are."""
    begin = text.index("{")
    members = _members(text, begin)
    first = members[0].begin if members else begin + 1
    lead = text[begin + 1 : first] if members else "\n  "
    indent = lead.rpartition("\n")[2] if "\n" in lead else None
    if indent is None:
        packed = json.dumps(value, ensure_ascii=False)
    else:
        packed = json.dumps(value, ensure_ascii=False, indent=indent).replace("\n", "\n" + indent)
    added = f"{lead or ' ' * bool(members)}{json.dumps(name)}: {packed}"
    if members:
        return f"{text[: members[-1].end]},{added}{text[members[-1].end :]}"
    return f"{text[: begin + 1]}{added}\n{text[_after(text, begin + 1) :]}"


def _without(text: str, begin: int, name: str, path: str, taken: list[str]) -> str:
    """`text` without the members of the object that begins at `begin`."""
    for member in reversed(_members(text, begin)):  # from the end: what lies before keeps its place
        if member.name == name:
            taken.insert(0, path + name)
            text = _cut(text, begin, member)
        elif text[member.value] == "{":
            text = _without(text, member.value, name, f"{path}{member.name}.", taken)
    return text


def _cut(text: str, begin: int, member: _Member) -> str:
    """`text` without one member of the object that begins at `begin`, nor its comma."""
    follows = _after(text, member.end)
    if text[follows] == ",":
        return text[: member.begin] + text[_after(text, follows + 1) :]
    before = [other for other in _members(text, begin) if other.begin < member.begin]
    if before:
        return text[: before[-1].end] + text[member.end :]
    return text[: begin + 1] + text[follows:]


def _members(text: str, begin: int) -> list[_Member]:
    """The members of the object that begins at `begin`."""
    members: list[_Member] = []
    at = _after(text, begin + 1)
    while text[at] != "}":
        name, end = _DECODER.raw_decode(text, at)
        value = _after(text, _after(text, end) + 1)
        _, stop = _DECODER.raw_decode(text, value)
        members.append(_Member(name, at, value, stop))
        at = _after(text, stop)
        if text[at] == ",":
            at = _after(text, at + 1)
    return members


def _after(text: str, at: int) -> int:
    """Where what follows the white space at a place begins."""
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()
