"""The parser of `grammars/map.lark`, its tables kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import lark
from lark import Lark, Token, Tree

from mapdsl.language.layout import Layout
from mapdsl.resources import resource


def parse_template(text: str) -> Tree[Token]:
    """Lark's tree of the inside of one name."""
    return parser().parse(text, start="template")


@lru_cache(maxsize=1)
def parser() -> Lark:
    """The parser; its tables come from the user's cache folder where that holds good ones."""
    grammar = resource("grammars", "map.lark").read_text(encoding="utf-8")
    file = _cache_file(grammar)
    kept = _load(file) if file else None
    if kept is not None:
        return kept
    built = build_parser(grammar)
    if file:
        _save(built, file)
    return built


def build_parser(grammar: str) -> Lark:
    """A parser built from the grammar's text, without a cache."""
    return Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        start=["file", "line", "template"],
        postlex=Layout(),
        propagate_positions=True,
        maybe_placeholders=True,
    )


def _cache_file(grammar: str) -> Path | None:
    """A file in a folder that only this user can write: the tables are a pickle, so /tmp would not do.

    The name says which grammar, Lark and Python the tables are for, so that versions never meet in one file.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        return None
    folder = Path(base, "mapdsl")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
        if info.st_uid != os.getuid() or info.st_mode & 0o022:
            return None
    except (OSError, AttributeError):
        return None
    made_for = f"{lark.__version__} {sys.version} {grammar}"
    return folder / f"map-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.tables"


def _load(file: Path) -> Lark | None:
    """The parser kept in a file; None where there is none, or where the file is not as it was written.

    The checksum comes first: a pickle cut short or changed by accident is never opened.
    """
    try:
        checksum, _, tables = file.read_bytes().partition(b"\n")
        if checksum.decode() != hashlib.sha256(tables).hexdigest():
            return None
        kept: Any = Lark.load(io.BytesIO(tables))
    except Exception:  # Whatever is wrong with the file, the parser can be built anew.
        return None
    return kept if isinstance(kept, Lark) else None


def _save(built: Lark, file: Path) -> None:
    """Write the tables under another name, then rename: a reader sees all of a file or none of it."""
    tables = io.BytesIO()
    temporary = None
    with contextlib.suppress(Exception):  # A full disk or a missing right costs the cache, not the run.
        built.save(tables)
        checksum = hashlib.sha256(tables.getvalue()).hexdigest()
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as out:
            temporary = out.name
            out.write(checksum.encode() + b"\n" + tables.getvalue())
        os.replace(temporary, file)
        return
    if temporary:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
