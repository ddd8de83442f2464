"""Tiles of a tensor in any memory order are those of a contiguous copy, and every element lies in one tile."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.runtime.codecs.matrices import Matrices
from mapdsl.runtime.codecs.tiles import BlockGrid, covering, strips
from mapdsl.testing.bits import random_bits

BLOCKS = [(1, 4), (3, 4), (2, None), (None, 8), (None, None), (40, 16), (1, 1), (7, 5), (3, 7)]
SIZES = st.sampled_from([1, 2, 3, 5, 8])


@settings(max_examples=800, deadline=None)
@given(
    shape=st.lists(SIZES, min_size=1, max_size=4),
    order=st.permutations(range(4)),
    step=st.sampled_from([1, 2]),
    block=st.sampled_from(BLOCKS),
    strip=st.sampled_from([1, 6, 16, 64, 1 << 18]),
    in_rows=st.booleans(),
    trail=st.sampled_from(["", "blocks", "words", "flat"]),
)
def test_tiles(
    shape: list[int],
    order: list[int],
    step: int,
    block: tuple[int | None, int | None],
    strip: int,
    in_rows: bool,
    trail: str,
) -> None:
    dtype = torch.int32 if trail == "words" else torch.bfloat16
    whole = [*shape, 4] if trail == "blocks" else shape
    order = [dim for dim in order if dim < len(whole)] + list(range(4, len(whole)))
    stored = random_bits(torch.Generator().manual_seed(1), tuple(step * whole[dim] for dim in order), dtype)
    tensor = stored[tuple(slice(None, None, step) for _ in order)].permute([order.index(d) for d in range(len(whole))])
    assert list(tensor.shape) == whole
    strip = max(strip, tensor.numel() // 64)  # no more tiles than that, or some
    copied = tensor.clone(memory_format=torch.contiguous_format).view(-1).view(tensor.shape)
    plain = copied.view(torch.uint8 if trail == "words" else torch.int16)
    if trail == "blocks":
        plain = plain.flatten(-2)
    if trail == "flat":  # rows that have nothing to do with the tensor's
        plain = plain.view(math.gcd(plain.numel(), 12), -1)
        block = 1, None
    grid = BlockGrid(tuple(plain.shape), block)
    read = Matrices(tensor, grid.elements, torch.uint8 if trail == "words" else None)
    seen = torch.zeros(grid.elements, dtype=torch.int8)
    for band in grid.bands(strip, in_rows=in_rows):
        for tile in band:
            found = read.of(tile)
            assert found.stride(-1) == 1 and read.of(tile).data_ptr() == found.data_ptr()
            assert torch.equal(found.view(plain.dtype), tile.flat(plain.view(grid.elements)))
            tile.flat(seen).add_(1)
            assert tile.bands * tile.height * tile.groups * tile.width <= strip
            of_band, of_tile = covering(band), covering([tile])
            assert of_band.grid_column <= of_tile.grid_column
            assert of_tile.grid_column + of_tile.groups <= of_band.grid_column + of_band.groups
    assert bool((seen == 1).all())


def test_what_one_reads_another_does_not_get() -> None:
    """Two tensors, and two threads, have one scratch each or fill it anew."""
    grid = BlockGrid((64, 64), (1, 32))
    (tile,) = grid.tiles()
    given = [Matrices(torch.full((64, 128), value)[:, ::2], grid.elements) for value in (1.0, 2.0)]
    for _ in range(2):
        for value, one in zip((1.0, 2.0), given, strict=True):
            assert bool((one.of(tile) == value).all())
    mine, theirs = given[0].of(tile), []
    thread = threading.Thread(target=lambda: theirs.append(given[1].of(tile).clone()))
    thread.start()
    thread.join()
    assert bool((mine == 1).all()) and bool((theirs[0] == 2).all())


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2, 3, 50), (4, 0, 3), (1, 1, 1000)], ids=str)
def test_strips(shape: tuple[int, ...]) -> None:
    """Elements in their order, each once, a few at a time."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = [numbers[index].flatten() for index in strips(shape, 16)]
    assert torch.cat(found).tolist() == numbers.flatten().tolist() if found else not numbers.numel()
    assert all(len(one) <= 16 for one in found)
