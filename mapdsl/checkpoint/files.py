"""Careful access to files that others made: bounded reads, strict JSON, names that stay in their folder."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mapdsl.language.diagnostics import MapError, error

MAX_TEXT_BYTES = 100_000_000
"""The most that a header, an index, a config or a listing may weigh; safetensors has the same limit for headers."""

_JSON_TYPES = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def bad_file(path: Path | str, message: str, advice: str = "", code: str = "C507") -> MapError:
    """An error on one file, ready to raise; `message` names the tensor, what was expected and what was found."""
    return error(code, message, subject=str(path), help=advice)


def file_size(path: Path) -> int:
    """The size in bytes of a regular file (links are followed); C507 for anything else, a pipe or a device too."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise bad_file(path, f"cannot open the file: {reason(problem)}") from problem
    if not stat.S_ISREG(status.st_mode):
        raise bad_file(path, "expected a regular file, found a folder, a pipe or a device")
    return status.st_size


def read_bytes(path: Path, count: int, what: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The first `count` bytes of a regular file; C507 when it holds fewer, or when `count` is above `limit`."""
    if count > limit:
        raise bad_file(path, f"the {what} has {count:,} bytes, at most {limit:,} are read")
    try:
        with path.open("rb") as file:
            data = file.read(count)
    except OSError as problem:
        raise bad_file(path, f"cannot read the file: {reason(problem)}") from problem
    if len(data) < count:
        raise bad_file(path, f"expected {count:,} bytes of {what}, found {len(data):,}")
    return data


def read_text(path: Path, what: str) -> str:
    """A whole text file, UTF-8; C507 when it is too large or is not UTF-8."""
    return decode(path, read_bytes(path, file_size(path), what), what)


def decode(path: Path, data: bytes, what: str) -> str:
    """Bytes as UTF-8 text; C507 names the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        found = f"byte 0x{data[problem.start]:02x} at {problem.start:,}"
        raise bad_file(path, f"the {what} is not UTF-8 text: {found}") from problem


def parse_object(path: Path, text: str, what: str, *, lenient: bool = False) -> dict[str, Any]:
    """A JSON object; C507 when it is none, or when a name stands in it twice.

    `lenient` is for `config.json`: it admits NaN and Infinity, which transformers writes, and a name that is repeated
    with the same value.
    """
    hook = _agreeing if lenient else _unique
    constant: Callable[[str], Any] = float if lenient else _no_constant
    try:
        value = json.loads(text, object_pairs_hook=hook, parse_constant=constant)
    except RecursionError as problem:
        raise bad_file(path, f"the {what} is nested too deeply") from problem
    except ValueError as problem:
        raise bad_file(path, f"the {what} is not the JSON expected: {problem}") from problem
    if not isinstance(value, dict):
        raise bad_file(path, f"the {what} is a JSON {_JSON_TYPES[type(value)]}, expected an object")
    if "\\u" in text:  # only an escape can bring in half a character, which no file name or header can hold
        _refuse_surrogates(path, value, what)
    return value


def read_object(path: Path, what: str, *, lenient: bool = False) -> dict[str, Any]:
    """A file that holds one JSON object; C507 as `parse_object`."""
    return parse_object(path, read_text(path, what), what, lenient=lenient)


def is_plain_name(name: str) -> bool:
    """Whether this names a file directly in its folder: no separator, no `..`, no drive, nothing unprintable."""
    return (
        name not in ("", ".", "..")
        and not any(c in name for c in '/\\:*?"<>|')
        and name.isprintable()
        and len(name.encode("utf-8", "replace")) <= 255
    )


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """A sort key that puts `part-2` before `part-10`."""
    pieces = re.split(r"([0-9]+)", name)
    return [(0, int(p[:4000])) if p.isdecimal() and p.isascii() else (1, p) for p in pieces], name


def leaves_folder(path: Path) -> bool:
    """Whether a link leads out of its folder.

    The `blobs` of a Hugging Face cache (`models--x/snapshots/REV/f -> ../../blobs/HASH`) count as inside.
    """
    if not path.is_symlink():
        return False
    try:
        target, folder = path.resolve(strict=True), path.parent.resolve()
    except (OSError, RuntimeError):  # dangling, or a ring of links
        return True
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    return not any(target.is_relative_to(place) for place in allowed)


def reason(problem: Exception) -> str:
    """What the system says about a failed call, without the path that the diagnostic names already."""
    return (getattr(problem, "strerror", None) or str(problem)).lower()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"`{_repeated(pairs)}` is named twice in one object")
    return result


def _agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs) and any(result[key] != value for key, value in pairs):
        raise ValueError(f"`{_repeated(pairs)}` is given two values")
    return result


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    return Counter(key for key, _ in pairs).most_common(1)[0][0]


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _refuse_surrogates(path: Path, value: Any, what: str) -> None:
    """C507 when a string in a parsed value cannot be written as UTF-8."""
    queue = [value]
    while queue:
        item = queue.pop()
        if isinstance(item, dict):
            queue += [*item, *item.values()]
        elif isinstance(item, list):
            queue += item
        elif isinstance(item, str) and _LONE_SURROGATE.search(item):
            raise bad_file(path, f"the {what} holds half of a surrogate pair, which is no character: {item!a}")
