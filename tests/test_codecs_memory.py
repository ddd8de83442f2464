"""No format needs more working memory than some strips of rows, whatever the memory order of what it is given.

The measure is the highest sum of all that torch's allocator and Python hold while a codec works, less what it gives
back. Strips are a sixteenth of what they are elsewhere, so that tensors of many strips stay small.
"""

from __future__ import annotations

import importlib.util
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from mapdsl.runtime.codecs import block_kernel, group_int, packed_int, quantise, scratch, strided, tiles
from mapdsl.runtime.codecs import values as value_codecs
from mapdsl.runtime.codecs.base import Codec, Slice
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.packed_int import PackedInt
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS
from mapdsl.runtime.codecs.values import Add, Cast, NarrowCast, NegExp
from mapdsl.runtime.errors import ConversionError
from mapdsl.testing.bits import random_bits

KEY = "w"
ROWS, COLUMNS = 4096, 512  # 4 MiB of bf16, 1 MiB of FP4
STRIP = STRIP_ELEMENTS // 16
MOST = 13 * 4 * STRIP  # bytes of so many strips of float32: 0.8 MiB

BLOCKS: dict[str, Codec] = {
    "e4m3": BlockScaled("c", "f8e4m3", (128, 128)),
    "e4m3, rows": BlockScaled("c", "f8e4m3", (1, None), scale_dtypes=("bf16",)),
    "e4m3, a tensor": BlockScaled("c", "f8e4m3", (None, None), squeeze=True),
    "e5m2, e8m0": BlockScaled("c", "f8e5m2", (1, 32), scale_dtypes=("f8e8m0",)),
    "e2m1": BlockScaled("c", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",)),
    "e2m1 in blocks": BlockScaled("c", "f4e2m1", (1, 32), scale_dtypes=("u8",), packed="u8", blocks=True),
    "e2m1, two scales": BlockScaled("c", "f4e2m1", (1, 16), scale_dtypes=("f8e4m3",), global_scale="{key}_whole"),
    "i8": BlockScaled("c", "i8", (1, None)),
    "i4 in words": BlockScaled("c", "i4", (1, 32), packed="i32", shape="{key}_shape"),
    "same": BlockScaled("c", "same", (None, None)),
    "i8 in groups": GroupInt("c", 8, 64),
    "i8 in one group": GroupInt("c", 8, 1),
}
ZEROS: dict[str, Codec] = {
    "gptq": PackedInt("c", "gptq", 4, 128, zero_offset=1),
    "gptq, 3 bits": PackedInt("c", "gptq", 3, 128),
    "awq": PackedInt("c", "awq", 4, 32),
}
VALUES: dict[str, Codec] = {
    "f32": Cast("c", "f32"),
    "f16": Cast("c", "f16"),
    "f8e4m3": NarrowCast("c", "f8e4m3"),
    "f8e5m2": NarrowCast("c", "f8e5m2"),
    "add": Add("c", 1.0),
    "neg_exp": NegExp("c"),
}
WITH_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


def cases(blocks: str, compiled: str, values: str, zeros: str) -> list[Any]:
    """Codecs, in plain torch or compiled, and the memory orders to try each with."""
    groups = (
        (BLOCKS, "torch", blocks),
        (BLOCKS, "compiled", compiled),
        (VALUES, "torch", values),
        (ZEROS, "torch", zeros),
    )
    return [
        pytest.param(codec, wish, order, id=f"{name}, {order}, {wish}", marks=[WITH_NUMBA] * (wish == "compiled"))
        for codecs, wish, orders in groups
        for name, codec in codecs.items()
        for order in orders.split(", ")
        if order
    ]


# Views of a tensor's shape in another memory order, made from that shape.
ORDERS: dict[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
    "whole": lambda shape, dtype: torch.empty(shape, dtype=dtype),
    "transposed": lambda shape, dtype: torch.empty(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT,
    "strided": lambda shape, dtype: torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
    "experts last": lambda shape, dtype: torch.empty(*shape[1:], shape[0], dtype=dtype).movedim(-1, 0),
    "rows first": lambda shape, dtype: torch.empty(shape[-2], *shape[:-2], shape[-1], dtype=dtype).movedim(0, -2),
}


@pytest.fixture(autouse=True)
def one_thread_of_small_strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (block_kernel, group_int, packed_int, quantise, value_codecs):
        monkeypatch.setattr(module, "STRIP_ELEMENTS", STRIP)
    monkeypatch.setattr(tiles.strips, "__defaults__", (STRIP,))
    monkeypatch.setattr(tiles.BlockGrid.tiles, "__defaults__", (STRIP,))
    monkeypatch.setattr(tiles.BlockGrid.bands, "__defaults__", (STRIP,))
    monkeypatch.setattr(block_kernel, "_COMPILED_STRIP", 4 * STRIP)
    monkeypatch.setattr(strided, "_STRIP", 4 * STRIP)
    yield
    torch.set_num_threads(before)


def laid(tensor: Tensor, order: str) -> Tensor:
    """The same tensor in another memory order."""
    view = ORDERS[order](tuple(tensor.shape), tensor.dtype) if tensor.ndim > 1 else tensor.clone()
    as_bits(view).copy_(as_bits(tensor))
    return view


@pytest.fixture(autouse=True, scope="module")
def ready() -> None:
    """What the profiler imports when it is first used is no codec's memory."""
    highest(lambda: None)


def highest(work: Callable[[], object]) -> int:
    """The most memory, in bytes, that is held at any time beyond what was before.

    Tables are made beforehand, as they are once in a process; threads' scratch is made anew.
    """
    work()
    scratch._this_thread.buffers.clear()
    tracemalloc.start()  # numpy's memory
    try:
        with profile(profile_memory=True) as seen:
            work()
            arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    events = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most + arrays


def size(parts: Mapping[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


def shapes(order: str) -> tuple[int, ...]:
    return (16, ROWS // 16, COLUMNS) if order in ("experts last", "rows first") else (ROWS, COLUMNS)


def tensor_of(codec: Codec, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return -values.abs() if isinstance(codec, NegExp) else values


def wild_parts(codec: Codec, shape: tuple[int, ...], order: str) -> dict[str, Tensor]:
    """Stored parts in some memory order; every pattern of bits in the payload, where it has codes."""
    if isinstance(codec, PackedInt):
        forms = codec.stored(KEY, shape)
        parts = {name: random_bits(torch.Generator().manual_seed(2), form[1], form[0]) for name, form in forms.items()}
        scale, order_name = codec.companions(KEY)["scale"], codec.companions(KEY).get("order")
        parts[scale] = torch.linspace(0.5, 1.5, parts[scale].numel()).view(forms[scale][1]).to(forms[scale][0])
        if order_name:
            parts[order_name] = torch.arange(shape[0], dtype=torch.int32) // 128
    else:
        parts = dict(codec.encode(KEY, tensor_of(codec, shape)).parts)
        payload = parts[codec.payload(KEY)]
        if payload.element_size() == 1 and not isinstance(codec, NarrowCast):
            random = random_bits(torch.Generator().manual_seed(3), tuple(payload.shape), torch.uint8)
            as_bits(payload)[..., ::64] = random[..., ::64]
    return {name: laid(part, order) if part.numel() > 1 else part for name, part in parts.items()}


@pytest.mark.parametrize(
    ("codec", "wish", "order"), cases("transposed, strided, rows first", "experts last", "transposed", "")
)
def test_encoding(monkeypatch: pytest.MonkeyPatch, codec: Codec, wish: str, order: str) -> None:
    """With new scales, and with kept ones; of a tensor that nobody has touched, and of one that was edited."""
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    plain = tensor_of(codec, shapes(order))
    anew, parts = codec.encode(KEY, plain).parts, wild_parts(codec, plain.shape, "whole")
    name = codec.payload(KEY)
    kept, decoded = codec.keep(KEY, parts, plain.dtype), codec.decode(KEY, parts, plain.dtype)
    values, unchanged, edited = (laid(one, order) for one in (plain, decoded, decoded))
    edited[..., -1, -1] = -3 if isinstance(codec, NegExp) else 3
    out, again = torch.empty_like(anew[name]), torch.empty_like(parts[name])

    def work() -> None:
        codec.encode(KEY, values, out=out)
        codec.encode(KEY, edited, kept, out=again)
        codec.encode(KEY, unchanged, kept, out=again)

    # An edit takes a mask of the blocks, and may take new companions for all of them.
    assert highest(work) <= MOST + 3 * (size(anew) - out.nbytes)
    assert torch.equal(as_bits(out), as_bits(anew[name]))
    assert isinstance(codec, Cast) or torch.equal(as_bits(again), as_bits(parts[name]))


@pytest.mark.parametrize(
    ("codec", "wish", "order"),
    cases("transposed, strided, rows first", "experts last", "transposed", "whole, transposed"),
)
def test_decoding_and_keeping(monkeypatch: pytest.MonkeyPatch, codec: Codec, wish: str, order: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    shape = shapes(order)
    plain = wild_parts(codec, shape, "whole")
    parts = {name: laid(part, order) if part.numel() > 1 else part for name, part in plain.items()}
    expected, kept = codec.decode(KEY, plain), codec.keep(KEY, plain)
    out, turned = torch.empty_like(expected), laid(torch.zeros_like(expected), order)
    found: list[Kept] = []

    def work() -> None:
        codec.decode(KEY, parts, out=out)
        codec.decode(KEY, parts, out=turned)
        found.append(codec.keep(KEY, parts))

    assert highest(work) <= MOST + kept.nbytes
    assert torch.equal(as_bits(out), as_bits(expected)) and torch.equal(as_bits(turned), as_bits(expected))
    assert torch.equal(as_bits(found[0].codes), as_bits(kept.codes)) and found[0].nbytes == kept.nbytes


@pytest.mark.parametrize(("codec", "wish", "order"), cases("whole", "transposed", "transposed", "transposed"))
def test_decoding_a_slice(monkeypatch: pytest.MonkeyPatch, codec: Codec, wish: str, order: str) -> None:
    """Whose first and last elements share a byte, a word or a block with others."""
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    shape = ROWS, COLUMNS
    parts = wild_parts(codec, shape, order)
    of = Slice(shape, ((1, ROWS - 2), (5, COLUMNS - 4)))
    cut = {
        name: parts[name][tuple(slice(*span) for span in box)] if box else parts[name]
        for name, box in codec.cut(KEY, of).items()
    }
    out = laid(torch.zeros(of.sizes, dtype=torch.bfloat16), order)
    assert highest(lambda: codec.decode(KEY, cut, out=out, of=of)) <= MOST
    assert torch.equal(as_bits(out), as_bits(codec.decode(KEY, parts)[1:-2, 5:-4]))


@pytest.mark.parametrize("order", ["whole", "transposed"])
@pytest.mark.parametrize("codec", ZEROS.values(), ids=ZEROS)
def test_giving_zero_points_back(codec: Codec, order: str) -> None:
    plain = wild_parts(codec, (ROWS, COLUMNS), "whole")
    kept, payload = codec.keep(KEY, plain), plain[codec.payload(KEY)]
    values, out = laid(codec.decode(KEY, plain), order), torch.empty_like(payload)
    assert highest(lambda: codec.encode(KEY, values, kept, out=out)) <= MOST + size(plain) - payload.nbytes
    assert torch.equal(out, payload)
    values[-1, -1] += 1
    with pytest.raises(ConversionError, match="has changed since it was read"):
        codec.encode(KEY, values, kept, out=out)


@pytest.mark.parametrize("codec", [BLOCKS["e2m1"], VALUES["f16"], VALUES["f8e4m3"], VALUES["neg_exp"]])
def test_refusing_a_value(codec: Codec) -> None:
    """To name the place of a value takes no copy of the tensor."""
    values = laid(tensor_of(codec, (ROWS, COLUMNS)), "transposed")
    values[-2, -3] = 1e30

    if codec is BLOCKS["e2m1"]:
        values[-2, -3] = torch.inf
    made = codec.stored(KEY, (ROWS, COLUMNS))
    out = torch.empty(made[KEY][1], dtype=made[KEY][0])

    def refused() -> None:
        with pytest.raises(ConversionError, match=f"element .{ROWS - 2}, {COLUMNS - 3}. is"):
            codec.encode(KEY, values, out=out)

    assert highest(refused) <= MOST
