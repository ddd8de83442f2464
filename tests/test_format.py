"""The formatter: canonical layout, same tree and comments, twice changes nothing; and the text of every node."""

from __future__ import annotations

import os
from pathlib import Path

import map_trees as trees
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.language import tree
from mapdsl.language.format import format_source
from mapdsl.language.source import Source
from mapdsl.language.syntax import parse, read_source
from mapdsl.language.unparse import (
    unparse_expression,
    unparse_file,
    unparse_rule,
    unparse_shape,
    unparse_template,
)
from mapdsl.resources import shipped_maps

CASES = sorted((Path(__file__).parent / "cases" / "format").glob("*.case"))
ACCEPTED = sorted((Path(__file__).parent / "cases" / "syntax" / "accepted").glob("*.case"))
HEADER = "map t: hf <-> native\n"


def parsed(text: str) -> tree.File:
    return parse(Source("test.map", text))


def formatted(text: str) -> str:
    return format_source(Source("test.map", text))


def assert_safe(text: str) -> str:
    """The formatted text, which says the same and stays as it is when formatted again."""
    once = formatted(text)
    assert parsed(once) == parsed(text)
    assert formatted(once) == once
    return once


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    text, _, expected = path.read_text(encoding="utf-8").partition("# output\n")
    result = assert_safe(text)
    if os.environ.get("MAPDSL_UPDATE_CASES"):
        path.write_text(f"{text}# output\n{result}", encoding="utf-8")
    else:
        assert result == expected


@pytest.mark.parametrize("path", ACCEPTED, ids=lambda path: path.stem)
def test_every_accepted_case_is_safe(path: Path) -> None:
    assert_safe(path.read_text(encoding="utf-8").partition("# output\n")[0])


@pytest.mark.parametrize("path", shipped_maps().values(), ids=lambda path: path.stem)
def test_every_shipped_map_is_safe(path: Path) -> None:
    assert_safe(read_source(path).text)


@settings(deadline=None, max_examples=100)
@given(trees.files)
def test_unparsed_files_parse_to_the_same_tree(file: tree.File) -> None:
    text = unparse_file(file)
    again = parsed(text)
    assert (again.header, again.statements) == (file.header, file.statements)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_layout_does_not_matter(data: st.DataObject) -> None:
    file = data.draw(trees.files)
    text = trees.scribble(data.draw, file)
    again = parsed(text)
    assert (again.header, again.statements) == (file.header, file.statements)
    assert_safe(text)


@settings(deadline=None, max_examples=100)
@given(trees.expressions)
def test_unparsed_expressions_parse_to_the_same_tree(expression: tree.Expr) -> None:
    file = parsed(f"{HEADER}a <-> b where {unparse_expression(expression)}\n")
    assert file.statements[0].guard == expression


@settings(deadline=None, max_examples=100)
@given(trees.templates)
def test_unparsed_templates_parse_to_the_same_tree(template: tree.Template) -> None:
    assert parsed(f"{HEADER}remove {unparse_template(template)}\n").statements[0].template == template


@settings(deadline=None, max_examples=100)
@given(trees.expressions)
def test_parentheses_are_needed(expression: tree.Expr) -> None:
    """Taking away any pair of parentheses that the unparser wrote for grouping changes the tree, or breaks the text."""
    text = unparse_expression(expression)
    for start, end in grouping_parentheses(text):
        bare = f"{text[:start]} {text[start + 1 : end]} {text[end + 1 :]}"
        try:
            file = parsed(f"{HEADER}a <-> b where {bare}\n")
        except ValueError:
            continue
        assert file.statements[0].guard != expression


def grouping_parentheses(text: str) -> list[tuple[int, int]]:
    """Where parentheses stand that belong to no call and no name."""
    found, stack, quoted, hole = [], [], False, 0
    for offset, char in enumerate(text):
        quoted ^= char == '"'
        hole += (char == "{") - (char == "}") if not quoted else 0
        if quoted or hole:
            continue
        if char == "(":
            stack.append(offset)
        elif char == ")":
            start = stack.pop()
            if not (start and (text[start - 1].isalnum() or text[start - 1] == "_")):
                found.append((start, offset))
    return found


@pytest.mark.parametrize(
    ("loose", "tight"),
    [
        ("((a))", "a"),
        ("(a+b)+c", "a + b + c"),
        ("a+(b+c)", "a + (b + c)"),
        ("a-(b-c)", "a - (b - c)"),
        ("(a*b)+c", "a * b + c"),
        ("a*(b+c)", "a * (b + c)"),
        ("a//b%c", "a // b % c"),
        ("a//(b%c)", "a // (b % c)"),
        ("-(a)", "-a"),
        ("-(a+b)", "-(a + b)"),
        ("-a+b", "-a + b"),
        ("(-a)[0]", "(-a)[0]"),
        ("(x[0])[1]", "x[0][1]"),
        ("not (a)", "not a"),
        ("not (a and b)", "not (a and b)"),
        ("not (a==b)", "not a == b"),
        ("not (a in b)", "a not in b"),
        ("not a in b", "a not in b"),
        ("(not a)==b", "(not a) == b"),
        ("(a and b) or c", "a and b or c"),
        ("a and (b or c)", "a and (b or c)"),
        ("a or (b or c)", "a or (b or c)"),
        ("(a<b)==c", "(a < b) == c"),
        ("len( x )", "len(x)"),
        ('positions(x,"v")', 'positions(x, "v")'),
        ("has(a.{..})", "has(a.{..})"),
        ("[0,4 , 128][i]", "[0, 4, 128][i]"),
        ("007", "7"),
        ("i <-1", "i < -1"),
    ],
)
def test_canonical_expression(loose: str, tight: str) -> None:
    assert unparse_expression(parsed(f"{HEADER}a <-> b where {loose}\n").statements[0].guard) == tight


@pytest.mark.parametrize(
    ("loose", "tight"),
    [
        ("[ ]", "[]"),
        ("[f   d]", "[f d]"),
        ("[(f) d]", "[f d]"),
        ("[((j f)) d]", "[(j f) d]"),
        ("[(g (r c)) d]", "[(g r c) d]"),
        ("[(g (r c+c+ c)) d]", "[(g (r c + c + c)) d]"),
        ("[((a + b) + c)]", "[((a + b) + c)]"),
        ("[(g (r c + c) + g r)]", "[(g (r c + c) + g r)]"),
        ("[repeat  j f]", "[repeat j f]"),
        ("[pad( V,128*size(tp) ) d]", "[pad(V, 128 * size(tp)) d]"),
    ],
)
def test_canonical_shape(loose: str, tight: str) -> None:
    rule = parsed(f"{HEADER}a {loose} <-> b\n").statements[0]
    assert unparse_shape(rule.left[0].shape) == tight
    assert unparse_rule(rule) == f"a {tight} <-> b"


def test_one_space_suffices_everywhere() -> None:
    """The layout of the input leaves no trace but blank lines and comments."""
    wide = f"{HEADER}\n\n\n\na   [ f  d ]<->   b[d f]\nccc<->d   optional\n\n\n"
    assert formatted(wide) == f"{HEADER}\na [f d] <-> b [d f]\nccc     <-> d  optional\n"


def test_carriage_returns_go() -> None:
    assert formatted((HEADER + "a <-> b # c\n").replace("\n", "\r\n")) == HEADER + "a <-> b  # c\n"


def test_no_line_is_made_longer_than_the_limit() -> None:
    long = "x" * 50
    text = assert_safe(f"{HEADER}{long} + {long} + {long} <-> {long} + {long}  where i < 3\n")
    assert max(map(len, text.splitlines())) <= 120
