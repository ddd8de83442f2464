"""Every construct executed: compiled adapters against the reference interpreter, both ways, element by element."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.elements import State
from tests.helpers.execution import LEFT, RIGHT, Case, all_cases, assert_same, drawn, on_meta
from tests.helpers.reference import Reference

CASES = all_cases()
RUNS = [pytest.param(case, n, id=f"{case.name}-{n}") for case in CASES for n in range(len(case.runs))]


def adapters(case: Case, number: int):
    run = case.runs[number]
    map_ = case.map()
    params = run.get("params", {})
    adapter = map_.adapter(run.get("config", {}), **params)
    return run, adapter, Reference(map_.checked, run.get("config", {}), params, run.get("partial", False))


@pytest.mark.parametrize(("case", "number"), RUNS)
def test_reading_is_what_the_rules_say(case: Case, number: int) -> None:
    run, adapter, reference = adapters(case, number)
    left = drawn(reference, LEFT, run)
    expected = reference.to_right(left)
    found = adapter.read(left, partial=run.get("partial", False))
    assert_same(found, expected, "reading")
    assert set(run.get("right", found)) == set(found)
    for name, shape in run.get("right", {}).items():
        assert list(found[name].shape) == shape
    back = adapter.write(found, quantization=True, partial=run.get("partial", False))
    assert_same(back, reference.to_left(expected, found=run.get("found")), "writing what was read")
    assert_same(back, without(left, run.get("lost", [])), "the round trip")
    assert_same(adapter.read(on_meta(left), partial=run.get("partial", False)), on_meta(found), "on meta")


@pytest.mark.parametrize(("case", "number"), RUNS)
def test_writing_is_what_the_rules_say(case: Case, number: int) -> None:
    run, adapter, reference = adapters(case, number)
    if run.get("found"):
        adapter = case.map().adapter(run.get("config", {}), **run.get("params", {}), **run["found"])
    right = drawn(reference, RIGHT, run)
    expected = reference.to_left(right, found=run.get("found"))
    found = adapter.write(right, quantization=True, partial=run.get("partial", False))
    assert_same(found, expected, "writing")
    assert_same(
        adapter.write(on_meta(right), quantization=True, partial=run.get("partial", False)), on_meta(found), "on meta"
    )
    again = adapter.read(found, partial=run.get("partial", False))
    assert_same(again, reference.to_right(expected), "reading what was written")
    assert_same(again, without(right, run.get("lost_right", [])), "the round trip")


@pytest.mark.parametrize(("case", "number"), RUNS)
def test_the_keys_are_the_names(case: Case, number: int) -> None:
    run, adapter, reference = adapters(case, number)
    if run.get("found"):
        adapter = case.map().adapter(run.get("config", {}), **run.get("params", {}), **run["found"])
    for side, keys in ((LEFT, adapter.left_keys()), (RIGHT, adapter.right_keys())):
        extra = run.get("extra", {}).get("left" if side == LEFT else "right", {})
        unlisted = set(extra) | set(run.get("unlisted", []))
        state = {name: tensor for name, tensor in drawn(reference, side, run).items() if name not in unlisted}
        assert set(keys) == set(state), f"names differ: {sorted(set(keys) ^ set(state))}"
        for name, (shape, _) in keys.items():
            known = [size for size in shape or [] if size is not None]
            assert shape is None or known == [
                found for found, size in zip(state[name].shape, shape, strict=True) if size is not None
            ], name


def without(state: State, names: list[str]) -> State:
    """The state without what a round trip loses: what the other side does not have."""
    assert set(names) <= set(state), "what is lost was there"
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_the_provenance_is_unique() -> None:
    case = next(case for case in CASES if case.name == "qkv_joined")
    _, _, reference = adapters(case, 0)
    state = drawn(reference, LEFT, case.runs[0])
    ids = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    assert len(ids.unique()) == len(ids) > 20


def test_generated_code_passes_linters(tmp_path: Path) -> None:
    for case in CASES:
        (tmp_path / f"{case.name}.py").write_text(case.map().compile(), encoding="utf-8")
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-500:]
