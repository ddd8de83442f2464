"""Parsing: what is accepted gives the right tree, what is refused every error at once; nothing hangs or crashes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import map_trees as trees
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.language import parser as parser_module
from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError, render
from mapdsl.language.parser import build_parser
from mapdsl.language.recovery import MAX_ERRORS, MAX_LINE, find_errors
from mapdsl.language.source import Source
from mapdsl.language.syntax import MAX_BYTES, parse, read_source
from mapdsl.language.unparse import unparse_file
from mapdsl.resources import resource

CASES = Path(__file__).parent / "cases" / "syntax"
HEADER = "map t: hf <-> native\n"


def parsed(text: str) -> tree.File:
    return parse(Source("test.map", text))


def errors(text: str) -> list[tuple[str, int, int]]:
    """Code, line and column of every error of a text."""
    with pytest.raises(MapError) as caught:
        parsed(text)
    assert render(caught.value.diagnostics)
    return [(d.code, d.spans[0].line, d.spans[0].column) for d in caught.value.diagnostics]


def dump(node: Any) -> str:
    """A tree on one line, without spans and defaults."""
    if isinstance(node, tuple):
        return f"[{', '.join(map(dump, node))}]"
    if not isinstance(node, (tree.Node, tree.Comment)):
        return repr(node)
    parts = []
    for item in fields(node):
        value = getattr(node, item.name)
        if item.name in ("span", "offset") or (item.default is not MISSING and value == item.default):
            continue
        parts.append(dump(value) if item.default is MISSING else f"{item.name}={dump(value)}")
    return f"{type(node).__name__}({', '.join(parts)})"


def outcome(text: str) -> str:
    try:
        file = parsed(text)
    except MapError as problem:
        return render(problem.diagnostics) + "\n"
    return "".join(f"{dump(node)}\n" for node in (file.header, *file.statements, *file.comments))


def run_case(path: Path, accepted: bool) -> None:
    text, _, expected = path.read_text(encoding="utf-8").partition("# output\n")
    result = outcome(text)
    assert ("error[" in result) != accepted, result
    if os.environ.get("MAPDSL_UPDATE_CASES"):
        path.write_text(f"{text}# output\n{result}", encoding="utf-8")
    else:
        assert result == expected


@pytest.mark.parametrize("path", sorted(CASES.glob("accepted/*.case")), ids=lambda path: path.stem)
def test_accepted(path: Path) -> None:
    run_case(path, accepted=True)


@pytest.mark.parametrize("path", sorted(CASES.glob("refused/*.case")), ids=lambda path: path.stem)
def test_refused(path: Path) -> None:
    run_case(path, accepted=False)


# --- what no case file can hold ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeff" + HEADER, [("S101", 1, 1)]),
        (HEADER + "a\0 <-> b\nc => d\n", [("S101", 2, 2), ("S104", 3, 3)]),
        (HEADER + "# \x1b[31m\n", [("S101", 2, 3)]),
        (HEADER + "a <-> b\rc <-> d\n", [("S101", 2, 8)]),
        (HEADER + 'include "a\u202eb"\n', [("S101", 2, 11)]),
        (HEADER + "a" * 1_000_000 + " <-> b\nc => d\n", [("S101", 2, 1), ("S104", 3, 3)]),
        (HEADER + "param x = " + "(" * 1_000_000, [("S101", 2, 1)]),
        (HEADER + "param x = " + "(" * 99, [("S102", 2, 11)]),
        (HEADER + "param x = " + "(" * 9_000, [("S101", 2, 111)]),
        (HEADER + "param x = " + "(" * 9_000 + "1" + ")" * 9_000, [("S101", 2, 111)]),
        (HEADER + "param x = " + "[" * 9_000 + "]" * 9_000, [("S101", 2, 111)]),
        (HEADER + "param x = " + "-" * 9_000 + "1", [("S101", 2, 108)]),
        (HEADER + "param x = " + "not " * 4_000 + "a", [("S101", 2, 399)]),
        (HEADER + "param x = " + "+".join("a" * 9_000), [("S101", 2, 11)]),
        (HEADER + "param x = a" + "[0]" * 6_000, [("S101", 2, 11)]),
        (HEADER + "a [" + "(" * 9_000 + "x" + ")" * 9_000 + "] <-> b", [("S101", 2, 103)]),
        (HEADER + "a.{" + "(" * 9_000 + "i" + ")" * 9_000 + "} <-> b", [("S101", 2, 1)]),
        (HEADER + "".join(" " * n + "a:\n" for n in range(300)) + " " * 300 + "b <-> c", [("S101", 101, 100)]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_hostile_text(text: str, expected: list[tuple[str, int, int]]) -> None:
    start = time.perf_counter()
    found = errors(text)
    assert time.perf_counter() - start < 5
    assert found == expected


def test_harmless_text() -> None:
    """Long comments, many terms of `or`, and Windows line ends are no errors."""
    assert parsed(HEADER + "# " + "x" * 10 * MAX_LINE).comments
    assert parsed(HEADER + "param x = " + " or ".join("a" * 1000)).statements
    assert parsed((HEADER + "a:\n    b <->\n  c # x\n").replace("\n", "\r\n")) == parsed(
        HEADER + "a:\n    b <-> c # x\n"
    )


def test_errors_are_sorted_and_bounded() -> None:
    text = HEADER + "    a => b\n" * 10_000
    start = time.perf_counter()
    found = errors(text)
    assert time.perf_counter() - start < 5
    assert len(found) == MAX_ERRORS
    assert found == sorted(found, key=lambda e: e[1:])


def test_time_is_linear_in_the_number_of_lines() -> None:
    def seconds(count: int) -> float:
        text = HEADER + "a <-> b [f d\n" * (MAX_ERRORS - 1) + "a.{i} [f d] <-> b [d f]\n" * count
        start = time.perf_counter()
        errors(text)
        return time.perf_counter() - start

    seconds(100)
    assert seconds(2000) < 40 * seconds(250)


@pytest.mark.parametrize("text", ["", "a", HEADER, HEADER + "a:\n    b => c\n\td\n"])
def test_recovery_agrees_with_the_parser(text: str) -> None:
    assert bool(find_errors(Source("x", text))) == (text != HEADER)


PIECES = [
    " ",
    "\n",
    "    ",
    "\t",
    "#",
    '"',
    "[",
    "]",
    "(",
    "{",
    "}",
    "<->",
    "=>",
    "->",
    "_",
    ":",
    ",",
    "+",
    "where",
    "a",
    "é",
    "0",
]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_broken_files(data: st.DataObject) -> None:
    """Any damage to a file gives errors with a place, and the search by lines finds some where the parser does."""
    text = unparse_file(data.draw(trees.files))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 3)))
        text = text[:start] + data.draw(st.sampled_from(["", *PIECES])) + text[end:]
    source = Source("x", text)
    try:
        parse(source)
    except MapError as problem:
        assert all(d.spans and 0 <= d.spans[0].start <= d.spans[0].end <= len(text) for d in problem.diagnostics)
        assert str(problem)
    else:
        assert find_errors(source) == []


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from('ab.{}[]()<>-=+,:|_ \n#"01*ié\t'), max_size=60))
def test_random_text(text: str) -> None:
    for whole in (text, HEADER + text):
        source = Source("x", whole)
        try:
            parse(source)
        except MapError as problem:
            assert str(problem)
        else:
            assert find_errors(source) == []


def test_spans_are_exact() -> None:
    file = parsed(HEADER + "a:\n    x.{i+1} [(h c) d] as fp8|raw <-> y where i < H  # why\n")
    rule = file.statements[0].body[0]
    assert rule.span.text == "x.{i+1} [(h c) d] as fp8|raw <-> y where i < H"
    assert rule.left[0].template.parts[1].value.span.text == "i+1"
    assert [d.span.text for d in rule.left[0].shape.dimensions] == ["h c", "d"]
    assert rule.guard.operands[1].span.text == "H"
    assert (rule.span.line, rule.span.column) == (3, 5)
    assert file.comments == (tree.Comment("# why", 0),)


# --- files ---


def test_read_source(tmp_path: Path) -> None:
    path = tmp_path / "x.map"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode())
    assert read_source(path).text == HEADER
    assert read_source(str(path)).path == str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"map t: hf <-> native\n# \xff\n", "x.map:2:3: error[S101]: byte 0xff is no UTF-8"),
        ("# é".encode("latin-1"), "x.map:1:3: error[S101]: byte 0xe9 is no UTF-8"),
        ("map".encode("utf-16"), "x.map:1:1: error[S101]: byte 0xff is no UTF-8"),
        (b"\n" * (MAX_BYTES + 1), "x.map: error[S101]: a map has at most 4,194,304 bytes"),
        (None, "x.map: error[N116]: the file cannot be read: No such file or directory"),
    ],
)
def test_read_source_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.map").write_bytes(content)
    with pytest.raises(MapError) as caught:
        read_source("x.map")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("path", [".", "a\0b", "/dev/zero"])
def test_read_source_refuses_what_is_no_file(path: str) -> None:
    with pytest.raises(MapError):
        read_source(path)


# --- the parser's tables ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parser_module.parser.cache_clear()
    yield tmp_path / "mapdsl"
    parser_module.parser.cache_clear()


def fresh_parser_works() -> bool:
    parser_module.parser.cache_clear()
    return bool(parsed(HEADER + "a:\n    b.{i} <-> c\n").statements)


def test_tables_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh_parser_works()
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(parser_module, "build_parser", None)
    assert fresh_parser_works()
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:1000], lambda b: b"", lambda b: b"\0" * 99, lambda b: b[:-9] + b"123456789"]
)
def test_broken_tables_are_built_anew(cache: Path, capfd: pytest.CaptureFixture[str], damage: Any) -> None:
    assert fresh_parser_works()
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert parser_module._load(file) is None
    assert fresh_parser_works()
    assert parser_module._load(file) is not None
    assert capfd.readouterr() == ("", "")


def test_tables_are_not_kept_where_others_can_write(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert fresh_parser_works()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("home", ["/proc/nowhere", "relative"])
def test_no_folder_for_tables(monkeypatch: pytest.MonkeyPatch, cache: Path, home: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert fresh_parser_works()


def test_many_writers_at_once(cache: Path) -> None:
    script = "from mapdsl.language.parser import parser; parser().parse('a <-> b', start='line')"
    runs = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(4)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [(b"", 0)] * 4
    assert len(list(cache.iterdir())) == 1


def test_the_grammar_has_no_conflict_and_every_statement_is_a_line() -> None:
    built = build_parser(resource("grammars", "map.lark").read_text(encoding="utf-8"))
    assert {"file", "line", "template"} <= set(built.options.start)


def test_imports_are_light() -> None:
    script = (
        "import sys; import mapdsl.language.syntax, mapdsl.language.format\n"
        "print([m for m in ('torch', 'numpy', 'jinja2', 'rich', 'networkx') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
