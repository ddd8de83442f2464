"""Listings that are broken or meant to harm."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hostile_files import messages

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.language.diagnostics import MapError

LISTINGS = {
    "absurd range": ("a.{0..999999999999} F32 1", "C507 line 1 expands to 1,000,000,000,000 tensors, a listing may"),
    "many ranges": ("a" + ".{0..9}" * 40 + " F32 1", "C507 line 1 expands to 10,000,000,000,000,000,000,000,000"),
    "range of 30 digits": ("a.{0..999999999999999999999999999999} F32 1", "C507 line 1 has the range {0..9999999"),
    "many lines": ("\n".join(f"{n}.{{0..999999}} F32 1" for n in range(3)), "C507 line 2 expands to 1,000,000"),
    "falling range": ("a.{5..3} F32 1", "C507 line 1 has the range {5..3}, expected {0..42}"),
    "step of nought": ("a.{0..3..0} F32 1", "C507 line 1 has the range {0..3..0}"),
    "negative range": ("a.{-3..3} F32 1", "C507 line 1 has the range {-3..3}"),
    "leading nought": ("a.{00..03} F32 1", "C507 line 1 has the range {00..03}"),
    "empty range": ("a.{} F32 1", "C507 line 1 has the range {}"),
    "words": ("a.{x,y} F32 1", "C507 line 1 has the range {x,y}"),
    "open brace": ("# title\na.{0..3 F32 1", "C507 line 2 has a brace without its partner"),
    "nested braces": ("a.{{0..3}} F32 1", "C507 line 1 has a brace without its partner"),
    "no shape": ("a F32", "C507 line 1 has 2 fields, expected name, dtype and shape"),
    "name alone": ("a", "C507 line 1 has 1 fields"),
    "four fields": ("a F32 1 2", "C507 line 1 has 4 fields"),
    "unknown dtype": ("a FLOAT 1", "C507 tensor `a` has dtype 'FLOAT', expected one of"),
    "negative size": ("a F32 -1", "C507 line 1 has shape -1, expected sizes joined by commas"),
    "size in words": ("a F32 1,two", "C507 line 1 has shape 1,two"),
    "empty size": ("a F32 1,,2", "C507 line 1 has shape 1,,2"),
    "too many elements": ("a U8 999999999999999999,999", "C507 tensor `a` has shape [999999999999999999, 999]: more"),
    "name twice": ("a.{0..3} F32 1\na.2 F32 1", "C506 line 2 lists tensor `a.2` a second time"),
    "twice in one range": ("a.{0..3,2} F32 1", "C506 line 1 lists tensor `a.2` a second time"),
    "tensors disagree": ("# tensors 5\na.{0..3} F32 1", "C507 the listing states 5 tensors, its lines hold 4"),
    "parameters disagree": (
        "# parameters 1,000\na F32 2,3",
        "C507 the listing states 1,000 parameters, its lines hold 6",
    ),
    "open string": ('"a F32 1', 'C507 line 1 begins with `"` but not with a JSON string'),
    "string of half a character": ('"\\ud800" F32 1', 'C507 line 1 begins with `"` but not with a JSON string'),
}

JSON_LISTINGS = {
    "no JSON": ("a F32 1", "C507 the listing is not the JSON expected"),
    "list": ("[]", "C507 the listing is a JSON list, expected an object"),
    "no object": ('{"a": "F32"}', "C507 tensor `a` is no object with dtype and shape"),
    "an index": (
        '{"weight_map": {"a": "b.safetensors"}}',
        "C507 tensor `weight_map` is no object with dtype and shape",
    ),
    "unknown dtype": ('{"a": {"dtype": "x", "shape": []}}', "C507 tensor `a` has dtype 'x'"),
    "negative size": ('{"a": {"dtype": "F32", "shape": [-1]}}', "C507 tensor `a` has shape [-1]"),
    "name twice": ('{"a": {"dtype":"U8","shape":[]}, "a": {"dtype":"U8","shape":[]}}', "C507 the listing is not the"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_listing_is_refused(tmp_path: Path, case: str) -> None:
    _refused(tmp_path / "x.list", *LISTINGS[case])


@pytest.mark.parametrize("case", JSON_LISTINGS)
def test_json_listing_is_refused(tmp_path: Path, case: str) -> None:
    _refused(tmp_path / "x.json", *JSON_LISTINGS[case])


def _refused(path: Path, text: str, expected: str) -> None:
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(MapError) as problem:
        open_checkpoint(path)
    assert messages(problem.value)[0].startswith(expected)
    assert time.perf_counter() - started < 10
