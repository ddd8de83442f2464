"""`--memory`: how much outputs under way may take, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.checkpoint import engine
from mapdsl.checkpoint.memory import DEFAULT_BYTES, Budget, held_bytes, memory_budget
from mapdsl.checkpoint.options import checked_plan, make_request
from mapdsl.checkpoint.passes import OptionError, Plan
from mapdsl.checkpoint.sources import open_tensors
from mapdsl.cli.main import main
from mapdsl.demo import small_config, write_release
from mapdsl.language.diagnostics import MapError
from tests.conversions import assert_same_files, only, write_state

TURNED = """\
map turned: old <-> new
param N = n
index i < N
{i}.a [x y] <-> layer.{i}.a [y x]
"""
JOINED = """\
map joined: old <-> new
codec fp8 = block_scaled(f8e4m3, block=32x32, scale="{stem}.scale", scale_dtype=f32)
qk.weight [(j X) y] as fp8 <-> {j:q|k}.weight [X y]
"""
BYTES = 4 * 30 * 40  # of each tensor, none of which is copied as it is


@pytest.fixture
def turned(tmp_path: Path) -> tuple[Path, Path]:
    """A map that transposes, and a checkpoint of its left side: six units of one size."""
    file = tmp_path / "turned.map"
    file.write_text(TURNED)
    state = {f"{i}.a": torch.randn(30, 40) for i in range(6)}
    return file, write_state(tmp_path / "old", state, {"n": 6})


def plan_of(source: Path, rules: Any) -> Plan:
    return checked_plan(make_request(rules, open_tensors(source)), None)


# --- the budget ------------------------------------------------------------------------------------------------------


def waiting(budget: Budget, size: int, got: list[int]) -> threading.Thread:
    """A thread that takes bytes, and notes when it has them."""

    def work() -> None:
        if budget.take(size, lambda: False):
            got.append(size)

    thread = threading.Thread(target=work)
    before = len(budget._waiting)
    thread.start()
    while thread.is_alive() and len(budget._waiting) == before:
        pass
    return thread


def test_bytes_are_granted_in_the_order_in_which_they_are_asked_for() -> None:
    budget, got = Budget(10), []
    assert budget.take(6, lambda: False)
    threads = [waiting(budget, 8, got), waiting(budget, 2, got)]  # 2 would fit, but 8 came first
    assert got == []
    budget.give_back(6)
    for thread in threads:
        thread.join(5)
    assert got == [8, 2]


def test_a_worker_that_is_alone_gets_what_it_needs() -> None:
    budget = Budget(10)
    assert budget.take(25, lambda: False)
    assert not budget.take(1, lambda: True)  # all is over, and nothing free
    budget.give_back(25)
    assert budget.take(10, lambda: True)


def test_no_bound() -> None:
    budget = Budget(None)
    assert all(budget.take(10**15, lambda: False) for _ in range(3))


# --- what a unit needs -----------------------------------------------------------------------------------------------


def test_what_is_neither_copied_nor_filled_in_place_is_held(tmp_path: Path) -> None:
    write_release(tmp_path / "released", small_config())
    mapdsl.convert(tmp_path / "released", tmp_path / "model", "deepseek_v4")
    there, back = (plan_of(tmp_path / name, "deepseek_v4") for name in ("released", "model"))
    held = held_bytes(there)
    for output, unit in there.units.of_output.items():
        free = output in there.units.copied or output in there.units.in_place.values()
        assert held[unit] == (0 if free else there.nbytes(output))
    for output, unit in back.units.of_output.items():
        if output.endswith("experts.0.w2.weight"):  # of a stack that is cut up: one expert, its scale with it
            assert held_bytes(back)[unit] == back.nbytes(output) + back.nbytes(output.replace("weight", "scale"))


def test_a_source_that_is_not_mapped_is_held_too(turned: tuple[Path, Path], tmp_path: Path) -> None:
    mapdsl.convert(turned[1], tmp_path / "dcp", turned[0], format="dcp")
    assert held_bytes(plan_of(turned[1], turned[0])) == [BYTES] * 6
    assert held_bytes(plan_of(tmp_path / "dcp", turned[0])) == [2 * BYTES] * 6


def test_what_is_joined_to_be_encoded_and_decoded_to_be_cut_is_held(tmp_path: Path) -> None:
    file = tmp_path / "joined.map"
    file.write_text(JOINED)
    state = {f"{j}.weight": torch.randn(64, 32, dtype=torch.bfloat16) for j in ("q", "k")}
    model = write_state(tmp_path / "new", state)
    mapdsl.convert(model, tmp_path / "old", file, quantize=True)
    whole, piece, encoded = 2 * 128 * 32, 2 * 64 * 32, 128 * 32 + 4 * 4
    assert held_bytes(checked_plan(make_request(file, open_tensors(model), quantize=True), None)) == [whole + encoded]
    assert held_bytes(plan_of(tmp_path / "old", file)) == [whole + piece]


def test_the_budget(turned: tuple[Path, Path]) -> None:
    plan = plan_of(turned[1], turned[0])
    assert memory_budget(plan, None) == DEFAULT_BYTES
    assert memory_budget(plan, BYTES) == BYTES
    with pytest.raises(MapError, match=rf"`layer.0.a` needs {BYTES:,} bytes of memory, --memory allows {BYTES - 1:,}"):
        memory_budget(plan, BYTES - 1)


# --- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_so_many_units_at_once_as_there_is_memory(
    turned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    mapdsl.convert(turned[1], tmp_path / "alone", turned[0], workers=1)
    lock, active, seen, sink = threading.Lock(), [0], [], engine._Worker._sink
    full = threading.Barrier(at_once)  # as many as there may be do come together, or the test hangs and fails

    def counted(self: Any, name: str, tensor: Any) -> None:
        if not tensor.is_meta:
            with lock:
                active[0] += 1
                seen.append(active[0])
            full.wait(20)
        sink(self, name, tensor)
        if not tensor.is_meta:
            with lock:
                active[0] -= 1
            full.wait(20)

    monkeypatch.setattr(engine._Worker, "_sink", counted)
    mapdsl.convert(turned[1], tmp_path / "new", turned[0], workers=3, memory=at_once * BYTES + 1)
    assert max(seen) == at_once and len(seen) == 6
    assert_same_files(tmp_path / "new", tmp_path / "alone")


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_too_little_memory_is_refused_before_anything_is_written(
    turned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    words = [command, str(turned[1]), str(tmp_path / "new"), "--map", str(turned[0]), "--memory"]
    before = sorted(tmp_path.iterdir())
    assert main([*words, "4kB"]) == 1
    error = capsys.readouterr().err
    assert "C507" in error and "`layer.0.a`" in error and f"give --memory {BYTES} or more" in error
    assert sorted(tmp_path.iterdir()) == before
    assert main([*words, str(BYTES)]) == 0


@pytest.mark.parametrize("size", ["lots", "0", "-1", "2 GiBB"])
def test_sizes_that_are_none(turned: tuple[Path, Path], tmp_path: Path, size: str) -> None:
    with pytest.raises(OptionError, match="--memory is "):
        mapdsl.convert(turned[1], tmp_path / "new", turned[0], memory=size)
    words = ["convert", str(turned[1]), str(tmp_path / "new"), "--map", str(turned[0])]
    assert main([*words, f"--memory={size}"]) == 2


def test_a_plan_says_what_is_held_and_allowed(turned: tuple[Path, Path]) -> None:
    from mapdsl.checkpoint.planned import plan_conversion

    planned = plan_conversion(turned[1], None, turned[0], workers=3, memory="1MB")
    assert planned.memory_bytes == 10**6 and planned.as_json()["memory_bytes"] == 10**6
    assert {unit.held_bytes for unit in planned.units} == {BYTES}


def test_the_refusal_names_all_that_is_made_together(tmp_path: Path) -> None:
    write_release(tmp_path / "released", small_config())
    mapdsl.convert(tmp_path / "released", tmp_path / "model", "deepseek_v4")
    with pytest.raises(MapError) as caught:
        mapdsl.convert(tmp_path / "model", tmp_path / "back", "deepseek_v4", memory=100)
    assert ", with 1 more tensors that are made from the same, needs" in only(caught.value).message
