"""Listings: read, folded again, nothing lost."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.folding import fold_names
from mapdsl.checkpoint.headers import BITS, StoredTensor
from mapdsl.checkpoint.listing import read_listing, write_listing

LISTINGS = sorted((Path(__file__).parent / "data" / "listings").glob("*.list"))


def read_text(text: str) -> dict[str, StoredTensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.list"
        path.write_bytes(text.encode("utf-8"))
        return read_listing(path)


def tensors(*names: str, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> list[StoredTensor]:
    return [StoredTensor(name, dtype, shape) for name in names]


def lines(*names: str) -> list[str]:
    """The names of the lines that these fold to."""
    return [line.split(" F32 ")[0] for line in write_listing(tensors(*names)).splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", LISTINGS, ids=lambda path: path.stem)
def test_released_checkpoint(path: Path) -> None:
    expanded = read_listing(path)  # checks the stated totals
    title = path.read_text().splitlines()[0].removeprefix("# ")
    text = write_listing(expanded.values(), title)
    assert read_text(text) == expanded
    assert text.splitlines()[:3] == path.read_text().splitlines()[:3]
    assert len(text.splitlines()) <= len(path.read_text().splitlines())


def test_largest_listing_opens_fast() -> None:
    for stem in ("deepseek_v4_flash", "kimi_k2_instruct"):
        path = next(path for path in LISTINGS if path.stem == stem)
        started = time.perf_counter()
        count = len(open_checkpoint(path).tensors)
        elapsed = time.perf_counter() - started
        print(f"\n{stem}: {count:,} tensors in {elapsed:.2f} s")
        assert elapsed < 2  # 0.1 to 0.2 s on an idle machine


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0", "a.1", "a.2"], ["a.{0..2}"]),
        (["a.0", "a.1", "a.2", "a.5"], ["a.{0..2,5}"]),
        (["a.2", "a.4", "a.6"], ["a.{2..6..2}"]),
        (["a.2", "a.4"], ["a.{2,4}"]),
        (["a.2", "a.3"], ["a.{2..3}"]),
        (["a.7"], ["a.7"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0..1}.b.{0..1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.{0..1}.b.0", "a.0.b.1"]),
        (["a.00", "a.01", "a.0", "a.1"], ["a.00", "a.01", "a.{0..1}"]),
        (["w1", "w2", "w3"], ["w1", "w2", "w3"]),  # a reader's three names, not a range
        (["h1", "h2", "h3", "h4"], ["h{1..4}"]),
        (["h_1", "h_2", "0x"], ["h_{1..2}", "0x"]),
        (["0", "1", "2"], ["{0..2}"]),
        (["a.123456789012345678", "a.123456789012345679"], ["a.123456789012345678", "a.123456789012345679"]),
        (["a b", "a{0}", "#", '"', "", "a\nb", "é.0", "é.1", "a\u00a0b"], None),
    ],
)
def test_folds(names: list[str], expected: list[str] | None) -> None:
    if expected is not None:
        assert lines(*names) == expected
    assert read_text(write_listing(tensors(*names))).keys() == set(names)


def test_odd_names_are_json_strings() -> None:
    assert lines("a {0}") == ['"a {0}"']
    assert lines("#a") == ['"#a"']
    assert read_text('"a\\u0020b" F32 -') == {"a b": StoredTensor("a b", "F32", ())}
    assert read_text("  a.{0..1}\tF32   2,3\r\n\n# end")["a.1"].shape == (2, 3)


def test_names_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        write_listing(tensors("\ud800"))
    with pytest.raises(ValueError, match="tensor `a` comes twice"):
        write_listing(tensors("a", "a"))
    with pytest.raises(ValueError, match="would be read as a total"):
        write_listing([], "tensors\n5")


def test_title_stays_one_line() -> None:
    assert write_listing([], "a\nb.{0..1} F32 1") == "# a b.{0..1} F32 1\n# tensors 0\n# parameters 0\n"


_PIECES = st.sampled_from(
    ["a", "w", ".", "_", "0", "1", "2", "3", "10", "007", "{", "}", "..", ",", " ", "#", '"', "é", "\n"]
)
_NAMES = st.one_of(st.lists(_PIECES, max_size=8).map("".join), st.text(st.characters(codec="utf-8"), max_size=12))
_TENSORS = st.tuples(st.sampled_from(["F32", "U8", "F8_E8M0"]), st.sampled_from([(), (2,), (2, 3), (0,)]))


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(_NAMES, _TENSORS, max_size=40))
def test_round_trip(drawn: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    state = {name: StoredTensor(name, dtype, shape) for name, (dtype, shape) in drawn.items()}
    assert read_text(write_listing(state.values(), "any")) == state


@settings(max_examples=300, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)), max_size=60))
def test_folds_hold_each_name_once(points: set[tuple[int, int, int]]) -> None:
    names = [f"l.{a}.e.{b}.w{c}" for a, b, c in sorted(points)]
    unfolded = [name for fold in fold_names(names) for name in fold.names()]
    assert sorted(unfolded) == sorted(names)


def test_a_name_of_a_thousand_numbers_is_no_trouble() -> None:
    names = [".".join(map(str, range(n, n + 1000))) for n in range(200)]
    started = time.perf_counter()
    assert read_text(write_listing(tensors(*names))).keys() == set(names)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype(dtype: str) -> None:
    assert read_text(write_listing(tensors("a", dtype=dtype, shape=(4,)))) == {"a": StoredTensor("a", dtype, (4,))}


def test_json_listing_and_list_agree(tmp_path: Path) -> None:
    listed = read_listing(LISTINGS[0])
    path = tmp_path / "x.json"
    path.write_text(json.dumps({name: {"dtype": t.dtype, "shape": t.shape} for name, t in listed.items()}))
    assert open_checkpoint(path).tensors == listed
