"""Choosing the scales of blocks from their largest values, and encoding under them, band by band of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mapdsl.runtime.codecs.block_kernel import BlockKernel
from mapdsl.runtime.codecs.elements import Element
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.kernels import compiled_kernels, each
from mapdsl.runtime.codecs.matrices import Matrices
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS, BlockGrid, Tile, covering

# Given the blocks of a band, as one tile of the grid, and their largest magnitudes, float32 `[bands, groups]`, the
# scales to store, of the same shape.
ChooseScales = Callable[[Tile, Tensor], Tensor]


class Largest:
    """The largest finite magnitudes of the blocks of a tensor's values, a band at a time."""

    def __init__(self, element: Element, values: Matrices, per: int) -> None:
        self.values, self.per = values, per
        self.kernels = compiled_kernels(element, values.dtype, values.device, values.elements)
        self.all_finite = True

    def of(self, tiles: list[Tile]) -> Tensor:
        """Of the blocks of a band, which these tiles make up: float32 `[bands, groups]`, 0 where none is."""
        if len(tiles) == 1:
            return self._of_tile(tiles[0])
        band = covering(tiles)
        found = torch.zeros(band.bands, band.groups, dtype=torch.float32, device=self.values.device)
        for tile in tiles:
            first = tile.grid_column - band.grid_column
            mine = found[:, first : first + tile.groups]
            mine.copy_(torch.maximum(mine, self._of_tile(tile)))
        return found

    def _of_tile(self, tile: Tile) -> Tensor:
        values = self.values.of(tile, self.per)
        if self.kernels is None:
            largest = _largest(tile.blocked(values))
        else:
            largest = self.kernels.largest(values, tile.bands, tile.groups, tile.height, tile.width * self.per)
        if not bool(largest.amax() < torch.inf):
            self.all_finite = False
            largest = _largest(tile.blocked(values).nan_to_num(0.0, 0.0, 0.0))
        return largest


def largest_of_matrices(element: Element, tensor: Tensor, count: int) -> Tensor:
    """The largest finite magnitude of each of `count` equal parts of a tensor, float32 `[count]`.

    Their rows are read in whichever direction they lie in memory.
    """
    turned = tensor.mT if tensor.ndim > 1 and tensor.stride(-2) == 1 else tensor
    grid = BlockGrid(tuple(turned.shape), (1, None))
    largest = Largest(element, Matrices(turned, grid.elements), 1)
    found = torch.zeros(grid.blocks, dtype=torch.float32, device=tensor.device)

    def work(tiles: list[Tile]) -> None:
        covering(tiles).blocks(found).copy_(largest.of(tiles))

    each(work, grid.bands(), tensor.device)
    return found.view(count, -1).amax(-1)


def quantise(
    kernel: BlockKernel, tensor: Tensor, codes: Tensor, choose: ChooseScales, only: Tensor | None = None
) -> bool:
    """Fill in scales, those of `kernel.factors`, and codes; `only` of the blocks that it picks; are all values finite.

    Each band of blocks is read, given its scales and encoded while it lies in a cache.
    """
    grid, per = kernel.grid, kernel.element.per
    values = Matrices(tensor, grid.wide(per))
    largest = Largest(kernel.element, values, per)
    scales = kernel.factors.scale

    def work(tiles: list[Tile]) -> None:
        band = covering(tiles)
        picked = None if only is None else band.blocks(only)
        if picked is not None and not picked.any():
            return
        target = band.blocks(scales)
        fresh = choose(band, largest.of(tiles))
        if picked is None:
            target.copy_(fresh)
        else:
            # As bytes: torch selects among no FP8 numbers.
            chosen = torch.where(picked[..., None], _bytes(fresh), _bytes(target))
            _bytes(target).copy_(chosen)
        for tile in tiles:
            kernel.encode_tile(tile, values, codes, only)

    strip = kernel.strip if values.is_view else STRIP_ELEMENTS
    each(work, grid.bands(strip, in_rows=values.is_view), values.device)
    return largest.all_finite


def first_unholdable(element: Element, grid: BlockGrid, tensor: Tensor, only: Tensor | None) -> int | None:
    """Flat position of the first value, in the blocks that `only` picks, that no code stands for."""
    values, found = Matrices(tensor, grid.wide(element.per)), []
    for tile in grid.tiles():
        wrong = element.cannot_hold(tile.blocked(values.of(tile, element.per)))
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
