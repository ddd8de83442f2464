"""Codecs on several threads: modes of torch that hold for one thread, errors, thread counts, forks; their memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mapdsl.runtime.codecs import kernels
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.kernels import each
from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.codecs.tiles import BlockGrid

KEY = "w"
CPU = torch.device("cpu")
CODECS: dict[str, Codec] = {
    "e4m3": BlockScaled("c", "f8e4m3", (128, 128)),
    "e4m3, a tensor": BlockScaled("c", "f8e4m3", (None, None), squeeze=True),
    "e5m2": BlockScaled("c", "f8e5m2", (1, 32), scale_dtypes=("f8e8m0",)),
    "e2m1": BlockScaled("c", "f4e2m1", (1, 16), scale_dtypes=("f8e4m3",), global_scale="{key}_whole"),
    "i8": BlockScaled("c", "i8", (1, None)),
    "i4 in words": BlockScaled("c", "i4", (1, 32), packed="i32", shape="{key}_shape"),
    "same": BlockScaled("c", "same", (None, None)),
    "i8 in one group": GroupInt("c", 8, 1),
}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "ITEMS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(as_bits(one.contiguous()), as_bits(other.contiguous()))


# --- modes of torch ---


@pytest.mark.parametrize("wish", ["torch", "auto"])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_inference_mode(monkeypatch: pytest.MonkeyPatch, codec: Codec, wish: str) -> None:
    """Threads do as their caller does, and what they keep serves later in another mode."""
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    values = torch.randn(1024, 1024).bfloat16()

    def trip() -> list[Tensor]:
        parts = codec.encode(KEY, values).parts
        decoded = codec.decode(KEY, parts)
        turned = codec.decode(KEY, parts, out=torch.empty(1024, 1024, dtype=torch.bfloat16).T)
        again = codec.encode(KEY, decoded, codec.keep(KEY, parts)).parts
        return [decoded, turned, *again.values()]

    with torch.inference_mode():
        inside = trip()
    outside = trip()
    assert all(map(same, inside, outside))


@pytest.mark.parametrize("wish", ["torch", "auto"])
def test_decoding_into_a_parameter(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    codec = CODECS["e4m3"]
    parts = codec.encode(KEY, torch.randn(1024, 1024).bfloat16()).parts
    parameter = torch.nn.Parameter(torch.empty(1024, 1024, dtype=torch.bfloat16))
    with torch.no_grad():
        codec.decode(KEY, parts, out=parameter)
    assert same(parameter.detach(), codec.decode(KEY, parts)) and parameter.is_leaf


def test_copies_of_parameters_have_no_history() -> None:
    for source in (torch.randn(2048, 1024, requires_grad=True), torch.randn(2048, 1024)):
        out = torch.empty(1024, 2048).T
        copy_strided(out, source)
        assert torch.equal(out, source) and not out.requires_grad


# --- threads ---


def test_an_error_is_raised_when_all_threads_rest() -> None:
    running, done = threading.Event(), []

    def work(item: int) -> None:
        if item == 0:
            running.wait()
            raise ValueError("the first")
        running.set()
        time.sleep(0.1)
        done.append(item)

    with pytest.raises(ValueError, match="the first"):
        each(work, range(50), CPU)
    had_been_done = len(done)
    time.sleep(0.2)
    assert 1 <= len(done) == had_been_done < 49


def test_threads_that_start_later_are_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers say that they are one thread wide, and torch takes that as said for threads to come."""
    lock, starts, mark = threading.Lock(), [], kernels.work_alone

    def slowly() -> None:
        with lock:
            starts.append(None)
        time.sleep(0.1 * len(starts))
        mark()

    monkeypatch.setattr(kernels, "work_alone", slowly)
    monkeypatch.setattr(kernels, "_pools", {})
    each(lambda item: None, range(2), CPU)
    time.sleep(0.3)
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2] and torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [1, 3, 2])
def test_as_many_threads_as_torch_would_use(threads: int) -> None:
    torch.set_num_threads(threads)
    at_work: set[int] = set()

    def work(item: int) -> None:
        at_work.add(threading.get_ident())
        time.sleep(0.02)
        each(lambda inner: at_work.add(threading.get_ident()), range(4), CPU)

    each(work, range(12), CPU)
    assert len(at_work) == threads and torch.get_num_threads() == threads


FORKED = """
import os, sys, torch
from mapdsl.runtime.codecs.block_scaled import BlockScaled
torch.set_num_threads(2)
codec = BlockScaled("c", "f8e4m3", (128, 128))
values = torch.randn(1024, 1024).bfloat16()

def encoded():
    return codec.encode("w", values).parts["w"].view(torch.uint8).numpy().tobytes()

before = encoded() if sys.argv[1] == "after work" else None
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
if before is None:
    os._exit(0 if torch.get_num_threads() == 2 else 1)
os._exit(0 if before == encoded() and torch.get_num_threads() == 1 else 1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("when", ["before work", "after work"])
@pytest.mark.parametrize("wish", ["torch", "auto"])
def test_a_process_forked_after_work_has_one_thread(wish: str, when: str) -> None:
    """It has none of its parent's, for which torch's operators would wait for ever. Before that all is as it was."""
    environment = {**os.environ, "MAPDSL_KERNELS": wish}
    subprocess.run([sys.executable, "-c", FORKED, when], check=True, timeout=60, env=environment)


# --- memory ---


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            part.untyped_storage().data_ptr() for part in (*args, *(kwargs or {}).values()) if torch.is_tensor(part)
        }
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(part) and part.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result


def largest_made(work: Callable[[], object]) -> int:
    torch.set_num_threads(1)
    with Largest() as mode:
        work()
    return mode.bytes


@pytest.mark.parametrize("shape", [(8, 1024, 1024), (2, 4_194_304)], ids=str)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_no_more_memory_than_strips(monkeypatch: pytest.MonkeyPatch, codec: Codec, shape: tuple[int, ...]) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", "torch")
    values = torch.randn(shape).bfloat16()
    encoded = codec.encode(KEY, values)
    payload = torch.empty_like(encoded.parts[codec.payload(KEY)])
    out = torch.empty_like(values)
    turned = torch.empty(*shape[:-2], shape[-1], shape[-2], dtype=values.dtype).mT
    kept = codec.keep(KEY, encoded.parts)
    decoded = codec.decode(KEY, encoded.parts)
    strip = 4 << 20  # bytes; of the tensor there are 16 MiB
    assert largest_made(lambda: codec.encode(KEY, values, out=payload)) <= strip
    assert largest_made(lambda: codec.decode(KEY, encoded.parts, out=out)) <= strip
    assert largest_made(lambda: codec.decode(KEY, encoded.parts, out=turned)) <= strip
    assert largest_made(lambda: codec.encode(KEY, decoded, kept, out=payload)) <= strip


@pytest.mark.parametrize("block", [(1, None), (None, None), (1, 700_001), (2, 8)])
@pytest.mark.parametrize("offset", [(0, 0), (1, 5)])
def test_wide_rows_are_cut(block: tuple[int | None, int | None], offset: tuple[int, int]) -> None:
    if offset != (0, 0) and None in block:
        return
    grid = BlockGrid((3, 1_500_000), block, offset)
    seen = torch.zeros(grid.elements, dtype=torch.int8)
    blocks = torch.arange(grid.blocks[0] * grid.blocks[1] * grid.blocks[2]).view(grid.blocks)
    for tile in grid.tiles(1 << 18):
        mine = tile.flat(seen)
        assert mine.numel() <= 1 << 18
        mine += 1
        corners = torch.tensor([tile.row, tile.row + tile.bands * tile.height - 1]) * grid.columns
        corners += torch.tensor([tile.column, tile.column + tile.groups * tile.width - 1])
        assert grid.block_of(corners + tile.matrix * grid.rows * grid.columns).tolist() == [
            int(tile.blocks(blocks)[0, 0]),
            int(tile.blocks(blocks)[-1, -1]),
        ]
    assert bool((seen == 1).all())


def test_one_group_of_a_tensor_that_is_wider_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = GroupInt("c", 8, 2)
    values = torch.randn(3, 300_002)
    values[1, 123_456] = 100
    for wish in ("torch", "compiled"):
        monkeypatch.setenv("MAPDSL_KERNELS", wish)
        parts = codec.encode(KEY, values).parts
        multiplier = 256 / (2 * values.view(2, -1).abs().amax(1) + 1e-5)
        codes = (values.view(2, -1) * multiplier[:, None]).round().clamp(-128, 127).to(torch.int8).view(3, -1)
        assert torch.equal(parts[KEY], codes)
        decoded = (codes.view(2, -1).float() * (1 / multiplier)[:, None]).view(3, -1)
        assert same(codec.decode(KEY, parts, torch.float32), decoded)
        turned = torch.empty(300_002, 3).T
        assert same(codec.decode(KEY, parts, out=turned), decoded)


def test_a_few_items_wake_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ITEMS_A_THREAD", 8)
    for count, threads in ((15, 1), (16, 2)):
        at_work: set[int] = set()

        def work(item: int, at_work: set[int] = at_work) -> None:
            at_work.add(threading.get_ident())
            time.sleep(0.01)

        each(work, range(count), CPU)
        assert len(at_work) == threads
