"""Members of a JSON object taken out of its text, or put into it: what else stands there stays as it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

# Colons and white space tell nothing.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],]|[^\s"{}\[\],:]+')


@dataclass
class _Member:
    """Where a member's name begins and where its value ends."""

    name: str
    begin: int
    end: int = -1


@dataclass
class _Container:
    """An object, or an array, which has no members; `path` is None for one that is not looked into."""

    begin: int
    is_object: bool
    path: str | None
    end: int = -1
    members: list[_Member] = field(default_factory=list)


def without_members(text: str, name: str) -> tuple[str, list[str]]:
    """The text of an object without its members called `name`, nor those of objects in it; and their dotted paths.

    `text` is valid JSON. Objects within arrays, and within what is taken out, are not looked into.
    """
    cuts: list[tuple[int, int]] = []
    taken: list[tuple[int, str]] = []
    for holder in _objects(text, name):
        taken += [(member.begin, f"{holder.path}{name}") for member in holder.members if member.name == name]
        cuts += _cuts(holder, name)
    kept, at = [], 0
    for begin, end in sorted(cuts):
        kept.append(text[at:begin])
        at = end
    return "".join([*kept, text[at:]]), [path for _, path in sorted(taken)]


def with_member(text: str, name: str, value: Any) -> str:
    """The text of an object with one more member at its end, indented as the others are."""
    *_, whole = _objects(text)
    begin, members = whole.begin, whole.members
    lead = text[begin + 1 : members[0].begin] if members else "\n  "
    indent = lead.rpartition("\n")[2] if "\n" in lead else None
    if indent is None:
        packed = json.dumps(value, ensure_ascii=False)
    else:
        packed = json.dumps(value, ensure_ascii=False, indent=indent).replace("\n", "\n" + indent)
    added = f"{lead or ' ' * bool(members)}{json.dumps(name)}: {packed}"
    if members:
        return f"{text[: members[-1].end]},{added}{text[members[-1].end :]}"
    return f"{text[: begin + 1]}{added}\n{text[whole.end :]}"


def _cuts(holder: _Container, name: str) -> Iterator[tuple[int, int]]:
    """What to cut out of an object: its members called `name`, each with one comma."""
    members = holder.members
    kept = [place for place, member in enumerate(members) if member.name != name]
    if not kept:
        if members:
            yield holder.begin + 1, holder.end
        return
    for member, follower in pairwise(members[: kept[-1] + 1]):
        if member.name == name:
            yield member.begin, follower.begin
    yield members[kept[-1]].end, members[-1].end


def _objects(text: str, but: str | None = None) -> Iterator[_Container]:
    """The objects of a text, each when it ends, but for those within arrays and within members called `but`.

    Nothing is called again for what is nested: a text may nest as deeply as Python's own reader lets it.
    """
    holders: list[_Container] = []
    is_name = False  # what comes next names a member
    for token in _TOKEN.finditer(text):
        mark, begin = text[token.start()], token.start()
        if mark == ",":
            is_name = holders[-1].is_object
            continue
        if mark in "{[":
            holders.append(_Container(begin, mark == "{", _path(holders[-1], but) if holders else ""))
            is_name = mark == "{"
            continue
        if is_name and mark != "}":
            holders[-1].members.append(_Member(json.loads(token[0]), begin))
            is_name = False
            continue
        if mark in "}]":
            is_name, ended = False, holders.pop()
            ended.end = begin
            if ended.is_object and ended.path is not None:
                yield ended
        if holders and holders[-1].is_object:
            holders[-1].members[-1].end = token.end()


def _path(holder: _Container, but: str | None) -> str | None:
    """The path of what the last member of a container holds."""
    if holder.path is None or not holder.is_object or holder.members[-1].name == but:
        return None
    return f"{holder.path}{holder.members[-1].name}."
