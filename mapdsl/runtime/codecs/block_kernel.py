"""Decoding, encoding and comparing all blocks of one tensor, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from mapdsl.runtime.codecs.elements import Element, TableElement, power_table
from mapdsl.runtime.codecs.formats import as_bits, bits_differ, exact_cast, integer_dtype
from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.codecs.tiles import BlockGrid, Tile

# A table of 256 products pays for itself in blocks of this many bytes; in smaller ones multiplying is cheaper.
_TABLE_PAYS = 1024


class BlockKernel:
    """The blocks of one tensor under given scales, decoded to `dtype`.

    `codes` are the stored elements, `[matrices, rows, columns]` of the grid; `values` are logical, `per` times as wide.
    `factors` are what to multiply codes with, float32 of the grid; `powers`, where all scales are e8m0, their bytes.
    Scratch and tables are reused from tile to tile.
    """

    def __init__(
        self, element: Element, grid: BlockGrid, factors: Tensor, dtype: torch.dtype, powers: Tensor | None = None
    ) -> None:
        self.element, self.grid, self.dtype = element, grid, dtype
        self.factors = factors.reshape(grid.blocks)
        self._scratch = torch.empty(grid.largest_tile, dtype=torch.int32, device=factors.device)
        self._powers = None if powers is None else powers.reshape(grid.blocks).int() * 256
        self._band: tuple[int, ...] = ()
        self._band_table = self._band_rows = self._scratch

    def decode(self, codes: Tensor, values: Tensor) -> None:
        """Write the logical values, a tensor `[matrices, rows, columns * per]` of `dtype` that may be any view."""
        out = _as_integers(values, self.element.per)
        for tile in self.grid.tiles():
            if out is not None:
                self._read(tile, tile.cut(codes), tile.cut(out))
            else:
                found = self._read(tile, tile.cut(codes)).view(self.dtype)
                copy_strided(tile.flat(values, self.element.per), found.reshape(tile.bands * tile.height, -1))

    def encode(self, values: Tensor, codes: Tensor, only: Tensor | None = None) -> None:
        """Write the codes nearest to the values under these scales, of the blocks that `only` (of the grid) picks."""
        for tile in self.grid.tiles():
            picked = None if only is None else tile.blocks(only)
            if picked is None or picked.any():
                target = tile.cut(codes)
                fresh = self._write(tile, values, codes.dtype)
                target.copy_(fresh if picked is None else _where(picked, fresh, target))

    def unlike(self, codes: Tensor, values: Tensor) -> Tensor:
        """A mask of the grid: blocks in which some code does not mean the value, bit by bit."""
        blocks = torch.zeros(self.grid.blocks, dtype=torch.bool, device=codes.device)
        for tile in self.grid.tiles():
            meant, found = self._meant(tile, tile.cut(codes), values)
            if bits_differ(meant, found):
                wrong = as_bits(meant) != as_bits(found)
                tile.blocks(blocks).logical_or_(wrong.amax((1, 3), keepdim=True))
        return blocks

    def restore(self, codes: Tensor, values: Tensor, kept: Tensor, where: Tensor | None) -> None:
        """Put kept codes back, at flat positions or everywhere, where they mean the value."""
        if where is None:
            kept = kept.view(self.grid.elements)
            for tile in self.grid.tiles():
                mine, target = tile.cut(kept), tile.cut(codes)
                meant, found = self._meant(tile, mine, values)
                fits = _grouped(as_bits(meant) == as_bits(found), self.element.per).all(-1)
                target.copy_(_where(fits, mine, target))
        elif len(where):
            factors = self.factors.view(-1)[self.grid.block_of(where)]
            meant = exact_cast(self.element.read(kept[:, None], factors[:, None], self.dtype), values.dtype)
            found = values.view(-1, self.element.per)[where]
            fits = (as_bits(meant) == as_bits(found)).all(-1)
            as_bits(codes).view(-1)[where[fits]] = as_bits(kept)[fits]

    def irreproducible(self, codes: Tensor) -> Tensor:
        """Flat positions, int64, of the codes that decoding and encoding under the same scales would not give back."""
        found = [torch.empty(0, dtype=torch.int64, device=codes.device)]
        for tile in self.grid.tiles():
            mine = tile.cut(codes)
            factors = tile.blocks(self.factors)
            if not self.element.reproduces(mine, factors, self.dtype):
                values = self._read(tile, mine).view(self.dtype)
                again = self.element.write(values, factors, codes.dtype)
                found.append(self.grid.positions(tile, as_bits(again) != as_bits(mine)))
        return torch.cat(found)

    def _read(self, tile: Tile, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """The decoded bits of a tile, one integer for the values of each stored element, in the shape of `codes`."""
        table, rows = self._table(tile)
        if table is None:
            values = self.element.read(codes, tile.blocks(self.factors), self.dtype)
            bits = values.view(integer_dtype(self.dtype.itemsize * self.element.per))
            return bits if out is None else out.copy_(bits)
        index = self._scratch[: codes.numel()].view(codes.shape)
        index.copy_(codes.view(torch.uint8)).add_(rows)
        if out is not None and out.is_contiguous():
            torch.index_select(table, 0, index.view(-1), out=out.view(-1))
            return out
        bits = table.index_select(0, index.view(-1)).view(codes.shape)
        return bits if out is None else out.copy_(bits)

    def _table(self, tile: Tile) -> tuple[Tensor | None, Tensor]:
        """The table of products for a tile's blocks, and where each block's 256 entries begin; none if it is dear."""
        element = self.element
        if not isinstance(element, TableElement):
            return None, self._scratch
        if self._powers is not None:
            return power_table(element, self.dtype, self._powers.device), tile.blocks(self._powers)
        if self.grid.height * self.grid.width < _TABLE_PAYS:
            return None, self._scratch
        band = (tile.matrix, tile.grid_row, tile.bands, tile.grid_column)
        if band != self._band:
            factors = tile.blocks(self.factors)
            starts = torch.arange(factors.numel(), dtype=torch.int32, device=factors.device) * 256
            self._band_table, self._band_rows = element.table(factors.flatten(), self.dtype), starts.view(factors.shape)
            self._band = band
        return self._band_table, self._band_rows

    def _write(self, tile: Tile, values: Tensor, stored: torch.dtype) -> Tensor:
        return self.element.write(tile.cut(values, self.element.per), tile.blocks(self.factors), stored)

    def _meant(self, tile: Tile, codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a tile's codes mean and what its values are, in the values' dtype.

        Values may come back in another dtype than was decoded to; then what counts is what the cast made of them.
        """
        meant = exact_cast(self._read(tile, codes).view(self.dtype), values.dtype)
        return meant, tile.cut(values, self.element.per)


def largest_magnitudes(grid: BlockGrid, values: Tensor, per: int) -> tuple[Tensor, bool]:
    """The largest finite magnitude of each block, float32 of the grid, 0 where there is none; are all values finite."""
    finite = True
    largest = torch.zeros(grid.blocks, dtype=torch.float32, device=values.device)
    for tile in grid.tiles():
        mine = tile.cut(values, per)
        found = _largest(mine)
        if not found.isfinite().all():
            finite = False
            found = _largest(mine.nan_to_num(0.0, 0.0, 0.0))
        target = tile.blocks(largest)
        target.copy_(torch.maximum(target, found))
    return largest, finite


def _largest(tile: Tensor) -> Tensor:
    """Magnitudes are ordered as their bits are, NaNs last, and integers are compared twice as fast."""
    return (tile.float().view(torch.int32) & 0x7FFFFFFF).amax((1, 3), keepdim=True).view(torch.float32)


def first_unholdable(element: Element, grid: BlockGrid, values: Tensor, only: Tensor | None) -> int | None:
    """Flat position of the first value, in the blocks that `only` picks, that no code stands for."""
    found = []
    for tile in grid.tiles():
        wrong = element.cannot_hold(tile.cut(values, element.per))
        if only is not None:
            wrong = wrong & tile.blocks(only)
        if wrong.any():
            pairs = _grouped(wrong, element.per)
            stored = grid.positions(tile, pairs.any(-1))
            picks = pairs[pairs.any(-1)].to(torch.uint8).argmax(-1)
            found.append(int((stored * element.per + picks).min()))
    return min(found, default=None)


def _as_integers(values: Tensor, per: int) -> Tensor | None:
    """The same memory with `per` values as one integer, or None where they do not lie together."""
    if values.shape[-1] > 1 and values.stride(-1) != 1:
        return None
    if per > 1 and any(place % per for place in (values.storage_offset(), *values.stride()[:-1])):
        return None
    return values.view(integer_dtype(values.element_size() * per))


def _grouped(mask: Tensor, per: int) -> Tensor:
    """A mask over values `[..., w * per]` as `[..., w, per]`."""
    return mask.view(*mask.shape[:-1], -1, per)


def _where(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`torch.where` for dtypes that it does not know, FP8 among them."""
    return torch.where(mask, as_bits(chosen), as_bits(other)).view(chosen.dtype)
