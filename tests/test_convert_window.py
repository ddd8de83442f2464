"""Pages that were read leave memory, and the tensors over them stay good."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conversions import write_state

import mapdsl
from mapdsl.checkpoint import engine, window
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.window import Window

COUNT, BYTES = 16, 2**20


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {f"t{n}": torch.randint(256, (BYTES,), dtype=torch.uint8, generator=generator) for n in range(COUNT)}
    return write_state(tmp_path / "source", state)


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_ours = line.endswith(str(file))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_only_the_last_tensors_stay_in_memory(folder, monkeypatch):
    file = folder / "model.safetensors"
    held = {}
    for limit in (2 * BYTES, 100 * BYTES):
        monkeypatch.setattr(window, "WINDOW_BYTES", limit)
        state = Window(open_checkpoint(folder))
        sums = [int(state[name].sum()) for name in state]
        held[limit] = resident(file)
        assert [int(state[name].sum()) for name in state] == sums
        state.close()
        del state
    assert held[2 * BYTES] < 5 * BYTES
    assert held[100 * BYTES] > 12 * BYTES, "the measurement can tell"


def test_a_tensor_that_was_let_go_stays_good(folder, monkeypatch):
    monkeypatch.setattr(window, "WINDOW_BYTES", BYTES)
    state = Window(open_checkpoint(folder))
    tensors = [state[name] for name in state]
    copies = [tensor.clone() for tensor in tensors]
    for name in state:
        state.release(name)
    assert all(torch.equal(one, other) for one, other in zip(tensors, copies, strict=True))


def test_copies_of_unaligned_tensors_are_not_touched(tmp_path):
    from mapdsl.checkpoint.headers import header_bytes

    folder = write_state(tmp_path / "source", {"a": torch.arange(2**15, dtype=torch.float32)})
    file = folder / "model.safetensors"
    header = header_bytes(file)
    text = header[8:] + b" "  # one byte more shifts the data off their alignment
    file.write_bytes(len(text).to_bytes(8, "little") + text + file.read_bytes()[len(header) :])
    state = Window(open_checkpoint(folder))
    tensor = state["a"]
    state.release("a")
    assert torch.equal(tensor, torch.arange(2**15, dtype=torch.float32))


def test_it_notes_what_was_asked_for(folder):
    state = Window(open_checkpoint(folder))
    assert state["t3"].shape == (BYTES,)
    assert "t4" in state
    assert list(state.asked) == ["t3"]
    assert list(state.meta().asked) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_stack_does_not_stay_in_memory_while_it_is_filled(tmp_path, monkeypatch):
    """Nor, on the way back, while it is read: neither is let go of by being asked for another tensor."""
    monkeypatch.setattr(engine, "PASSED_BYTES", 2 * BYTES)
    monkeypatch.setattr(window, "WINDOW_BYTES", 100 * BYTES)
    rules = tmp_path / "stack.map"
    rules.write_text("map stack: apart <-> stacked\n\nparam E = experts\n\nindex e < E\n\nx.{e} [r] <-> x [e r]\n")
    state = {f"x.{e}": torch.randn(BYTES // 4) for e in range(COUNT)}
    write_state(tmp_path / "apart", state, {"experts": COUNT})
    stacks = [tmp_path / folder / "model.safetensors" for folder in (".stacked.partial", "stacked")]
    highest = dict.fromkeys(stacks, 0)
    passed = engine._Worker._passed

    def watched(self, nbytes):
        highest.update((stack, max(before, resident(stack))) for stack, before in list(highest.items()))
        passed(self, nbytes)

    monkeypatch.setattr(engine._Worker, "_passed", watched)
    for source, destination in (("apart", "stacked"), ("stacked", "back")):
        mapdsl.convert(tmp_path / source, tmp_path / destination, rules)
    assert all(0 < most < 6 * BYTES for most in highest.values())
    first, last = (tmp_path / folder / "model.safetensors" for folder in ("apart", "back"))
    assert first.read_bytes() == last.read_bytes()
