"""Conversions run without elements: links say what a conversion does, for random rules and every shipped map."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.resources import shipped_maps
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.made_names import lacking, left_names_of
from mapdsl.runtime.tracing import trace
from mapdsl.testing.suite import Example, Suite, load_suite
from tests.helpers.execution import LEFT, RIGHT, drawn, map_of, on_meta
from tests.helpers.random_rules import CONFIG, FREE, RandomRule, joins, moves
from tests.helpers.reference import Reference
from tests.helpers.tracing import assert_traced

CASES = sorted((Path(__file__).parent / "cases" / "testing").glob("*.map"))
MAPS = {path.stem: path for path in CASES} | {f"shipped-{name}": path for name, path in shipped_maps().items()}
SEEDS = range(2)


@cache
def suite(name: str) -> Suite:
    return load_suite(MAPS[name])


@cache
def example(name: str, seed: int) -> Example:
    return suite(name).draw(f"tracing {seed}")


def cases() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", MAPS)


# --- where elements go ---


@settings(max_examples=40)
@given(st.one_of(moves(), joins()))
def test_links_of_random_rules(rule: RandomRule) -> None:
    """Of tensors no two elements of which are the same."""
    map_ = map_of(rule.text())
    assume(not [found for found in map_.check() if found.code[0] != "L"])
    adapter, reference = map_.adapter(CONFIG), Reference(map_.checked, CONFIG)
    left, right = (drawn(reference, side, {"free": FREE}) for side in (LEFT, RIGHT))
    for side, state, made in (("hf", left, adapter.read(left)), ("native", right, adapter.write(right))):
        found = trace(map_.adapter(CONFIG), side, on_meta(state))
        assert_traced(found, state, made, torch.bfloat16)
        assert set(found.sources) == set(state) and not found.lacking
        assert all(source.is_there and source.shape == tuple(state[n].shape) for n, source in found.sources.items())


@cases()
def test_links_of_maps(name: str) -> None:
    """There and back, in whatever formats tensors are stored."""
    for seed in SEEDS:
        one = example(name, seed)
        adapter, made, _ = one.read
        state, left, right = one.left.tensors(), one.checked.map.left, one.checked.map.right
        tracing = one.adapter()
        assert_traced(trace(tracing, left, on_meta(state), dtype=one.dtype), state, made, one.dtype)
        for quantization in (True, False):
            # The tracing adapter has seen the formats of the left side.
            back = adapter.write(made, quantization=quantization, dtype=one.dtype)
            found = trace(tracing, right, on_meta(made), dtype=one.dtype, quantization=quantization)
            assert_traced(found, made, back, one.dtype)


# --- names alone ---


@cases()
def test_names_are_those_of_a_conversion(name: str) -> None:
    """In its order, for a whole state and for parts of it, and the same refusals."""
    for seed in SEEDS:
        one, rng = example(name, seed), Random(seed)
        whole = one.right.tensors()
        for kept in (1.0, 0.8, 0.3):
            state = {name: tensor for name, tensor in whole.items() if rng.random() < kept}
            assert names_or_code(one, state) == written_or_code(one, state), (seed, kept)


def names_or_code(one: Example, state: dict[str, Tensor]) -> list[str] | str:
    try:
        return left_names_of(one.adapter(answered=True), on_meta(state))
    except ConversionError as problem:
        return problem.code


def written_or_code(one: Example, state: dict[str, Tensor]) -> list[str] | str:
    try:
        return list(one.adapter(answered=True).write(state, partial=True, dtype=one.dtype))
    except ConversionError as problem:
        return problem.code


@cases()
def test_what_is_lacking_is_what_was_removed(name: str) -> None:
    """Just where a conversion refuses the state, and the tensors that it names are among them."""
    for seed in SEEDS:
        one, rng = example(name, seed), Random(seed)
        whole = one.left.canonical
        assert lacking(one.adapter(), on_meta(one.left.tensors()), partial=False) == []
        for count in (1, 2):
            gone = set(rng.sample(sorted(whole), min(count, len(whole))))
            state = one.left.tensors(set(whole) - gone)
            for partial in (False, True):
                check_lacking(one, state, gone, partial=partial)


def check_lacking(one: Example, state: dict[str, Tensor], gone: set[str], *, partial: bool) -> None:
    try:
        one.adapter().read(state, dtype=one.dtype, partial=partial)
        problem = None
    except ConversionError as err:
        problem = err
    if problem is not None and (problem.code != "R605" or "companion" in problem.message):
        return  # a payload without its scales is no tensor that is missing
    found = lacking(one.adapter(), on_meta(state), partial=partial)
    names = {tensor.named.name for group in one.left.groups for tensor in group.tensors if gone & set(tensor.parts)}
    if not one.suite.asks:  # else other tensors may be asked for, where the checkpoint is another variant
        assert set(found) <= names, (found, gone)
    assert bool(found) == (problem is not None), (found, gone, problem)
    if problem is not None:
        assert any(name in problem.message for name in found), (found, problem)
    if problem is not None or not partial:
        traced = trace_or_code(one, state, partial=partial)
        assert isinstance(traced, str) or traced == set(found)


def trace_or_code(one: Example, state: dict[str, Tensor], *, partial: bool) -> set[str] | str:
    try:
        side = one.checked.map.left
        return set(trace(one.adapter(), side, on_meta(state), dtype=one.dtype, partial=partial).lacking)
    except ConversionError as problem:
        return problem.code
