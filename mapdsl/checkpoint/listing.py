"""Header listings as text: every stored tensor's name, dtype and shape, with numeric ranges in names folded.

A line holds a name, a dtype in safetensors' spelling and a shape (sizes joined by commas, `-` for a scalar):

    layers.{0..42}.attn.wkv.weight F8_E4M3 512,4096

`{0..42}`, `{2..42..2}` and `{0..2,5}` stand for each of their numbers; several in one name for every combination.
`#` begins a comment; `# tensors N` and `# parameters N` state totals, which are checked. A name that could be mistaken
for something else (spaces, braces, control characters, a leading `#` or `"`) is written as a JSON string, unfolded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.files import bad_file, read_object, read_text
from mapdsl.checkpoint.folding import Fold, fold_names
from mapdsl.checkpoint.headers import StoredTensor, checked_size

MAX_TENSORS = 1_000_000
"""The most tensors that a listing may expand to: seven times the largest release."""

_TOTAL = re.compile(r"#\s*(tensors|parameters)\s+([0-9][0-9,]{0,30})")
_HOLE = re.compile(r"\{([^{}]*)\}")
_NUMBER = "(0|[1-9][0-9]{0,17})"
_PART = re.compile(rf"{_NUMBER}(?:\.\.{_NUMBER}(?:\.\.{_NUMBER})?)?")
_SIZE = re.compile(_NUMBER)


def read_listing(path: Path) -> dict[str, StoredTensor]:
    """Expand a `.list` file; tensors in the order of its lines.

    Raises a MapError: C507 for a line that cannot be read, for more than `MAX_TENSORS` tensors (found before anything
    is expanded) and for totals that disagree; C506 for a name that comes twice.
    """
    tensors: dict[str, StoredTensor] = {}
    stated: list[tuple[str, int]] = []
    for number, text in enumerate(read_text(path, "listing").split("\n"), 1):
        line = text.strip()
        if line.startswith("#"):
            if total := _TOTAL.match(line):
                stated.append((total[1], int(total[2].replace(",", ""))))
        elif line:
            _read_line(path, number, line, tensors)
    _check_totals(path, stated, tensors)
    return tensors


def read_json_listing(path: Path) -> dict[str, StoredTensor]:
    """Read a `.json` listing, `{name: {"dtype", "shape"}}` as in a safetensors header; other fields are not read.

    Raises a MapError, C507: not such an object, a name twice, an unknown dtype, a bad shape.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, info in read_object(path, "listing").items():
        if name == "__metadata__":
            continue
        if type(info) is not dict or "dtype" not in info or "shape" not in info:
            raise bad_file(path, f"tensor `{name}` is no object with dtype and shape", advice=_help_json(info))
        checked_size(path, name, info["dtype"], info["shape"])
        tensors[name] = StoredTensor(name, info["dtype"], tuple(info["shape"]))
    return tensors


def write_listing(tensors: Iterable[StoredTensor], title: str = "") -> str:
    """Fold tensors into a listing, in the order of first appearance; `read_listing` gives back the same set.

    Raises ValueError where one name comes twice, cannot be written as UTF-8, or the title would read as a total.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    seen: dict[str, int] = {}
    parameters = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor `{tensor.name}` comes twice")
        seen[tensor.name] = len(seen)
        parameters += tensor.count
        groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor.name)
    title = " ".join(title.split())
    if _TOTAL.match(f"# {title}"):
        raise ValueError(f"the title `{title}` would be read as a total")
    head = [f"# {title}"] * bool(title) + [f"# tensors {len(seen)}", f"# parameters {parameters}"]
    return "\n".join(head + _lines(groups, seen)) + "\n"


def _lines(groups: dict[tuple[str, tuple[int, ...]], list[str]], order: dict[str, int]) -> list[str]:
    """One line per fold, by the place of its first name."""
    found: list[tuple[int, str]] = []
    for (dtype, shape), names in groups.items():
        tail = f" {dtype} {','.join(map(str, shape)) or '-'}"
        plain = [name for name in names if _is_plain(name)]
        found += [(order[name], json.dumps(name) + tail) for name in names if not _is_plain(name)]
        found += [(order[fold.first], fold.text() + tail) for fold in fold_names(plain)]
    return [line for _, line in sorted(found)]


def _is_plain(name: str) -> bool:
    """Whether a name can stand in a line as it is; refuses what UTF-8 cannot hold."""
    name.encode("utf-8")  # UnicodeEncodeError is a ValueError
    return bool(name) and name[0] not in '#"' and name.isprintable() and not any(c in " {}" for c in name)


def _read_line(path: Path, number: int, line: str, tensors: dict[str, StoredTensor]) -> None:
    """Add the tensors of one line."""
    pieces, rest = _read_name(path, number, line)
    fields = rest.split()
    if len(fields) != 2:
        raise bad_file(
            path, f"line {number} has {len(fields) + 1} fields, expected name, dtype and shape: {line[:200]}"
        )
    sizes = [] if fields[1] == "-" else fields[1].split(",")
    if not all(map(_SIZE.fullmatch, sizes)):
        raise bad_file(path, f"line {number} has shape {fields[1][:200]}, expected sizes joined by commas, or -")
    dtype, shape = fields[0], tuple(map(int, sizes))
    checked_size(path, line.split()[0], dtype, shape)
    spans = [_read_span(path, number, text) for text in pieces[1::2]]
    count = math.prod(sum(map(len, span)) for span in spans)
    if len(tensors) + count > MAX_TENSORS:
        raise bad_file(path, f"line {number} expands to {count:,} tensors, a listing may hold {MAX_TENSORS:,}")
    for name in Fold(tuple(pieces[::2]), tuple(spans)).names():
        if name in tensors:
            raise bad_file(path, f"line {number} lists tensor `{name}` a second time", code="C506")
        tensors[name] = StoredTensor(name, dtype, shape)


def _read_name(path: Path, number: int, line: str) -> tuple[list[str], str]:
    """Literal, range text, literal, ... of a line's name, and the rest of the line."""
    if line.startswith('"'):
        try:
            name, end = json.JSONDecoder().raw_decode(line)
            name.encode("utf-8")
        except ValueError as problem:
            raise bad_file(path, f'line {number} begins with `"` but not with a JSON string: {line[:200]}') from problem
        return [name], line[end:]
    name, rest = [*line.split(maxsplit=1), ""][:2]
    pieces = _HOLE.split(name)
    if any("{" in literal or "}" in literal for literal in pieces[::2]):
        advice = "a name with braces of its own is written as a JSON string"
        raise bad_file(path, f"line {number} has a brace without its partner: {name[:200]}", advice)
    return pieces, rest


def _read_span(path: Path, number: int, text: str) -> tuple[range, ...]:
    """`0..2,5` as ranges, which are not expanded here."""
    span = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        low, high, step = (int(n) if n else None for n in match.groups()) if match else (None, None, None)
        if low is None or step == 0 or (high is not None and high < low):
            message = f"line {number} has the range {{{text[:200]}}}, expected {{0..42}}, {{2..42..2}} or {{0..2,5}}"
            raise bad_file(path, message)
        span.append(range(low, (low if high is None else high) + 1, step or 1))
    return tuple(span)


def _check_totals(path: Path, stated: list[tuple[str, int]], tensors: dict[str, StoredTensor]) -> None:
    found = {"tensors": len(tensors), "parameters": sum(tensor.count for tensor in tensors.values())}
    for what, count in stated:
        if count != found[what]:
            raise bad_file(path, f"the listing states {count:,} {what}, its lines hold {found[what]:,}")


def _help_json(info: Any) -> str:
    return "this looks like an index: name it *.index.json" if isinstance(info, (str, dict)) else ""
