"""Choosing the scales of blocks from their largest values, and encoding under them, band by band of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mapdsl.runtime.codecs.block_kernel import BlockKernel
from mapdsl.runtime.codecs.elements import Element
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.kernels import compiled_kernels, each
from mapdsl.runtime.codecs.tiles import BlockGrid, Tile

# Given the first tile of a band and the largest magnitudes of all blocks in it, float32 `[bands, grid columns]`, the
# scales to store, of the same shape.
ChooseScales = Callable[[Tile, Tensor], Tensor]


class Largest:
    """The largest finite magnitudes of the blocks of a tensor `[matrices, rows, columns * per]`, a band at a time."""

    def __init__(self, element: Element, grid: BlockGrid, values: Tensor) -> None:
        self.element, self.grid, self.values = element, grid, values
        self.kernels = compiled_kernels(element, values.dtype, values.device, values.numel())
        self.all_finite = True

    def of(self, tiles: list[Tile]) -> Tensor:
        """Of the blocks of a band, which these tiles make up: float32 `[bands, grid columns]`, 0 where none is."""
        found = torch.zeros(tiles[0].bands, self.grid.blocks[2], dtype=torch.float32, device=self.values.device)
        for tile in tiles:
            mine = found[:, tile.grid_column : tile.grid_column + tile.groups]
            mine.copy_(torch.maximum(mine, self._of_tile(tile)))
        return found

    def _of_tile(self, tile: Tile) -> Tensor:
        per = self.element.per
        if self.kernels is None:
            largest = _largest(tile.cut(self.values, per))
        else:
            flat = tile.flat(self.values, per)
            largest = self.kernels.largest(flat, tile.bands, tile.groups, tile.height, tile.width * per)
        if not bool(largest.amax() < torch.inf):
            self.all_finite = False
            largest = _largest(tile.cut(self.values, per).nan_to_num(0.0, 0.0, 0.0))
        return largest

    def of_matrices(self, count: int) -> Tensor:
        """The largest of each of `count` equal parts of the tensor, float32 `[count]`."""
        matrices, rows, _ = self.grid.blocks
        found = torch.zeros(matrices, rows, 1, dtype=torch.float32, device=self.values.device)

        def work(tiles: list[Tile]) -> None:
            tiles[0].grid_rows(found).copy_(self.of(tiles).amax(1, True))

        each(work, self.grid.bands(), found.device)
        return found.view(count, -1).amax(-1)


def quantise(
    kernel: BlockKernel, values: Tensor, codes: Tensor, choose: ChooseScales, only: Tensor | None = None
) -> bool:
    """Fill in scales, those of `kernel.factors`, and codes; `only` of the blocks that it picks; are all values finite.

    Each band of blocks is read, given its scales and encoded while it lies in a cache.
    """
    largest = Largest(kernel.element, kernel.grid, values)
    scales = kernel.factors.scale

    def work(tiles: list[Tile]) -> None:
        band = tiles[0]
        picked = None if only is None else band.grid_rows(only)
        if picked is not None and not picked.any():
            return
        target = band.grid_rows(scales)
        fresh = choose(band, largest.of(tiles))
        if picked is None:
            target.copy_(fresh)
        else:
            # As bytes: torch selects among no FP8 numbers.
            chosen = torch.where(picked[..., None], _bytes(fresh), _bytes(target))
            _bytes(target).copy_(chosen)
        for tile in tiles:
            kernel.encode_tile(tile, values, codes, only)

    each(work, kernel.grid.bands(kernel.strip), values.device)
    return largest.all_finite


def first_unholdable(element: Element, grid: BlockGrid, values: Tensor, only: Tensor | None) -> int | None:
    """Flat position of the first value, in the blocks that `only` picks, that no code stands for."""
    found = []
    for tile in grid.tiles():
        wrong = element.cannot_hold(tile.cut(values, element.per))
        if only is not None:
            wrong = wrong & tile.blocks(only)[:, None, :, None]
        if wrong.any():
            pairs = wrong.view(*wrong.shape[:-1], -1, element.per)
            stored = grid.positions(tile, pairs.any(-1))
            picks = pairs[pairs.any(-1)].to(torch.uint8).argmax(-1)
            found.append(int((stored * element.per + picks).min()))
    return min(found, default=None)


def _largest(tile: Tensor) -> Tensor:
    """Magnitudes are ordered as their bits are, NaNs last; integers of 32 bits are what torch compares fastest."""
    if tile.dtype == torch.bfloat16:
        # The upper half of a float32.
        return ((as_bits(tile) & 0x7FFF).int().amax((1, 3)) << 16).view(torch.float32)
    return (tile.float().view(torch.int32) & 0x7FFFFFFF).amax((1, 3)).view(torch.float32)


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in one more dimension."""
    return tensor.view(torch.uint8).view(*tensor.shape, -1)
