"""The pages behind `mapdsl explain K202`: one a code, and every example does what its page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_examples import codes_of

from mapdsl.cli.main import main
from mapdsl.explain.pages import FOLDER, Block, parse_page, read_page
from mapdsl.language.catalogue import CATALOGUE
from mapdsl.language.format import format_source
from mapdsl.language.source import Source

# Codes of the catalogue that nothing finds yet. Strict: who makes one findable takes it off this list.
NOT_FOUND_YET = {
    "L703": "told by `fmt --check`: comparing layouts would slow every check",
}


def case(code: str) -> object:
    reason = NOT_FOUND_YET.get(code)
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return pytest.param(code, marks=marks)


@pytest.mark.parametrize("code", [case(code) for code in CATALOGUE])
def test_the_failing_example_has_exactly_this_code(code: str, tmp_path: Path) -> None:
    assert codes_of(read_page(code).fails, tmp_path) == {code}


@pytest.mark.parametrize("code", [case(code) if code != "L703" else code for code in CATALOGUE])
def test_the_mended_example_passes(code: str, tmp_path: Path) -> None:
    assert codes_of(read_page(code).mended, tmp_path) == set()


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{code}.md" for code in CATALOGUE}


@pytest.mark.parametrize("code", CATALOGUE)
def test_the_heading_is_the_catalogues(code: str) -> None:
    page = read_page(code)
    assert (page.code, page.name) == (code, CATALOGUE[code].name)
    assert page.why


@pytest.mark.parametrize("code", CATALOGUE)
def test_pages_are_laid_out_well(code: str) -> None:
    page = read_page(code)
    assert all(len(line) <= 120 for line in page.text.splitlines() if code != "L706")
    assert page.fails != page.mended
    for block in page.mended:
        if block.kind == "map":
            assert format_source(Source("example.map", block.text)) == block.text


@pytest.mark.parametrize("word", ["K202", "k202", "written-twice"])
def test_explain_prints_the_page(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", word]) == 0
    assert capsys.readouterr().out == read_page("K202").text


GOOD = (
    "# K202 written-twice\n\nText.\n\n## Fails\n\n```map base.map\na\n```\n\n"
    "## Why\n\nSo.\n\n## Mended\n\n```map\nb\n```\n"
)


def test_a_page_is_parsed() -> None:
    page = parse_page(GOOD)
    assert (page.code, page.name, page.why) == ("K202", "written-twice", "So.")
    assert page.fails == (Block("map", "base.map", "a\n"),)
    assert page.mended == (Block("map", "", "b\n"),)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# K202", "K202"),
        ("## Why", "## Because"),
        ("## Why\n\nSo.\n\n", ""),
        ("```map\nb\n```", "b"),
        ("```map\nb", "```toml\nb"),
    ],
)
def test_a_page_that_is_none(old: str, new: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=r"expected blocks|a page has"):
        parse_page(GOOD.replace(old, new))


def test_a_wrong_example_would_be_seen(tmp_path: Path) -> None:
    page = read_page("K202")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    assert codes_of(page.mended, tmp_path) != {"K202"}
    assert codes_of(page.fails, swapped) != set()
