"""Decoding, encoding and comparing all blocks of one tensor, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mapdsl.runtime.codecs.elements import Element, TableElement, power_table
from mapdsl.runtime.codecs.formats import as_bits, bits_differ, exact_cast, integer_dtype
from mapdsl.runtime.codecs.kept import as_many_as_all
from mapdsl.runtime.codecs.kernels import COMPILED_DTYPES, compiled_kernels, each
from mapdsl.runtime.codecs.scales import BlockFactors
from mapdsl.runtime.codecs.scratch import scratch
from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS, BlockGrid, Tile

# A table of 256 products pays for itself in blocks of this many bytes; in smaller ones multiplying is cheaper.
_TABLE_PAYS = 1024
# So many tables are made at once: they stay in a second-level cache, and starting torch's kernels costs little.
_TABLES = 256
# Compiled kernels that need no scratch may take larger tiles: fewer calls.
_COMPILED_STRIP = 4 * STRIP_ELEMENTS


class BlockKernel:
    """The blocks of one tensor under given scales, decoded to `dtype`.

    `codes` are the stored elements, `[matrices, rows, columns]` of the grid; `values` are logical, `per` times as wide.
    Tables are reused from tile to tile.
    """

    def __init__(self, element: Element, grid: BlockGrid, factors: BlockFactors, dtype: torch.dtype) -> None:
        self.element, self.grid, self.factors, self.dtype = element, grid, factors, dtype
        elements = grid.elements[0] * grid.elements[1] * grid.elements[2] * element.per
        self.kernels = compiled_kernels(element, dtype, factors.scale.device, elements)
        self._tables: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0, device=factors.scale.device))

    def decode(self, codes: Tensor, values: Tensor) -> None:
        """Write the logical values, a tensor `[matrices, rows, columns * per]` of `dtype` that may be any view."""
        in_order = values.shape[-1] == 1 or values.stride(-1) == 1
        is_direct = in_order or (self.kernels is not None and values.stride(-2) == 1)

        def work(tile: Tile) -> None:
            out = tile.flat(values, self.element.per)
            if in_order:
                self._read(tile, codes, out)
            elif not (is_direct and self._read_transposed(tile, codes, out.T)):
                copy_strided(out, self._read(tile, codes), self.kernels)

        each(work, self._tiles(is_direct), values.device)

    def encode(self, values: Tensor, codes: Tensor, only: Tensor | None = None) -> None:
        """Write the codes nearest to the values under these scales, of the blocks that `only` (of the grid) picks."""
        tiles = self._tiles(only is None)
        each(lambda tile: self.encode_tile(tile, values, codes, only), tiles, values.device)

    def encode_tile(self, tile: Tile, values: Tensor, codes: Tensor, only: Tensor | None = None) -> None:
        """Encode one tile."""
        picked = None if only is None else tile.blocks(only)
        if picked is None:
            self._write(tile, values, tile.flat(codes))
        elif picked.any():
            target = tile.cut(codes)
            fresh = self._write(tile, values).view(target.shape)
            target.copy_(_where(_over(picked), fresh, target))

    def unlike(self, codes: Tensor, values: Tensor) -> Tensor:
        """A mask of the grid: blocks in which some code does not mean the value, bit by bit."""
        blocks = torch.zeros(self.grid.blocks, dtype=torch.bool, device=codes.device)

        def work(tiles: list[Tile]) -> None:
            # The tiles of a tall block share its place in the mask: they are one thread's.
            for tile in tiles:
                meant, found = self._meant(tile, codes, values)
                if bits_differ(meant, found):
                    wrong = as_bits(meant) != as_bits(found)
                    tile.blocks(blocks).logical_or_(wrong.amax((1, 3)))

        each(work, self.grid.bands(), codes.device)
        return blocks

    def restore(self, codes: Tensor, values: Tensor, kept: Tensor, where: Tensor | None) -> None:
        """Put kept codes back, at flat positions or everywhere, where they mean the value."""
        if where is not None:
            for start in range(0, len(where), STRIP_ELEMENTS):
                some = slice(start, start + STRIP_ELEMENTS)
                self._restore_at(codes, values, kept[some], where[some])
            return
        kept = kept.view(self.grid.elements)

        def work(tile: Tile) -> None:
            meant, found = self._meant(tile, kept, values)
            fits = _grouped(as_bits(meant) == as_bits(found), self.element.per).all(-1)
            tile.cut(codes).copy_(_where(fits, tile.cut(kept), tile.cut(codes)))

        each(work, self.grid.tiles(), codes.device)

    def irreproducible(self, codes: Tensor) -> Tensor | None:
        """Flat positions, int64, of the codes that decoding and encoding under the same scales would not give back.

        None where there are so many that the codes themselves take less.
        """
        found: dict[Tile, Tensor] = {}
        left = [as_many_as_all(codes)]
        is_certain = self._reproducer()

        def work(tile: Tile) -> None:
            if left[0] <= 0:
                return
            mine = tile.cut(codes)
            if not is_certain(tile, mine):
                again = self._write_values(tile, self._read(tile, codes), torch.empty_like(tile.flat(codes)))
                wrong = as_bits(again).view(mine.shape) != as_bits(mine)
                if wrong.any():
                    found[tile] = self.grid.positions(tile, wrong)
                    left[0] -= len(found[tile])

        each(work, self.grid.tiles(), codes.device)
        if left[0] <= 0:
            return None
        return torch.cat([found[tile] for tile in sorted(found)] or [codes.new_empty(0, dtype=torch.int64)])

    # --- within ---

    @property
    def strip(self) -> int:
        """Elements of a tile for work that needs no scratch."""
        return STRIP_ELEMENTS if self.kernels is None else _COMPILED_STRIP

    def _tiles(self, is_direct: bool) -> Iterable[Tile]:
        return self.grid.tiles(self.strip if is_direct else STRIP_ELEMENTS)

    def _read(self, tile: Tile, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """The decoded values of a tile, `[rows, columns * per]`, in `out` if given, whose columns lie together.

        Otherwise they are in scratch, until the next tile is read.
        """
        per = self.element.per
        if out is None:
            shape = tile.bands * tile.height, tile.groups * tile.width * per
            out = scratch("values", shape, self.dtype, codes.device)
        if self.kernels is not None:
            assert isinstance(self.element, TableElement)
            self.kernels.decode(
                self.element, tile.flat(codes), self.factors.of(tile), out, height=tile.height, width=tile.width
            )
            return out
        mine, words = tile.cut(codes), _as_integers(out, per)
        found = None if words is None else self._table_for(tile)
        if found is None or words is None:
            values = self.element.read(mine, _over(self.factors.of(tile)), self.dtype)
            return out.copy_(values.view(out.shape))
        table, rows = found
        index = scratch("index", tuple(mine.shape), torch.int32, codes.device)
        index.copy_(mine.view(torch.uint8)).add_(rows)
        if words.is_contiguous():
            torch.index_select(table, 0, index.view(-1), out=words.view(-1))
        else:
            words.copy_(table.index_select(0, index.view(-1)).view(words.shape))
        return out

    def _reproducer(self) -> Callable[[Tile, Tensor], bool]:
        """Whether it is certain, without trying, that the codes of a tile survive decoding and encoding again."""
        element, extremes = self.element, self.factors.extremes()
        if isinstance(element, TableElement) and extremes is not None and element.are_harmless(extremes, self.dtype):
            # One look at all scales has saved one at those of each tile.
            return lambda tile, codes: not element.holds_unwritten(codes)
        return lambda tile, codes: element.reproduces(codes, _over(self.factors.of(tile)), self.dtype)

    def _read_transposed(self, tile: Tile, codes: Tensor, out: Tensor) -> bool:
        """Decode a tile to `out`, `[columns * per, rows]`, in one go; False where that is not possible."""
        if self.kernels is None:
            return False
        assert isinstance(self.element, TableElement)
        mine, factors = tile.flat(codes), self.factors.of(tile)
        return self.kernels.decode_transposed(self.element, mine, factors, out, height=tile.height, width=tile.width)

    def _table_for(self, tile: Tile) -> tuple[Tensor, Tensor] | None:
        """The table of products for a tile's blocks, and where each block's 256 entries begin; none if it is dear."""
        element = self.element
        if not isinstance(element, TableElement):
            return None
        if self.factors.are_powers:
            powers = tile.blocks(self.factors.scale).view(torch.uint8)
            return power_table(element, self.dtype, powers.device), _over(powers.int() * 256)
        if self.grid.height * self.grid.width < _TABLE_PAYS:
            return None
        # Tables for the bands that follow are made with this one's.
        bands = max(tile.bands, _TABLES // tile.groups)
        first = tile.grid_row - tile.grid_row % bands if tile.bands == 1 else tile.grid_row
        ahead = tile._replace(grid_row=first, bands=min(bands, self.grid.blocks[1] - first))
        wanted = (ahead.matrix, ahead.grid_row, ahead.bands, ahead.grid_column, ahead.groups)
        made_for, table = self._tables
        if made_for != wanted:
            table = element.table(self.factors.of(ahead).flatten(), self.dtype)
            self._tables = wanted, table
        starts = torch.arange(tile.bands * tile.groups, dtype=torch.int32, device=table.device) * 256
        starts += (tile.grid_row - first) * tile.groups * 256
        return table, _over(starts.view(tile.bands, tile.groups))

    def _write(self, tile: Tile, values: Tensor, out: Tensor | None = None) -> Tensor:
        """The codes of a tile of values, `[rows, columns]`, in `out` if given, else in scratch."""
        if out is None:
            shape = tile.bands * tile.height, tile.groups * tile.width
            stored = self.element.dtype if isinstance(self.element, TableElement) else values.dtype
            out = scratch("codes", shape, stored, values.device)
        return self._write_values(tile, tile.flat(values, self.element.per), out)

    def _write_values(self, tile: Tile, values: Tensor, out: Tensor) -> Tensor:
        """Codes for the values of a tile, both `[rows, columns]`."""
        factors = self.factors.of(tile)
        # Values may come back in another dtype than was decoded to, one that is not compiled for.
        if self.kernels is not None and values.dtype in COMPILED_DTYPES:
            assert isinstance(self.element, TableElement)
            self.kernels.encode(self.element, values, factors, out, height=tile.height, width=tile.width)
            return out
        blocks = values.reshape(tile.bands, tile.height, tile.groups, tile.width * self.element.per)
        quotients = scratch("quotients", (blocks.numel(),), torch.float32, values.device)
        fresh = self.element.write(blocks, _over(factors), out.dtype, quotients)
        return out.copy_(fresh.view(out.shape))

    def _meant(self, tile: Tile, codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a tile's codes mean and what its values are, in the values' dtype, `[bands, height, groups, width]`.

        Values may come back in another dtype than was decoded to; then what counts is what the cast made of them.
        """
        found = tile.cut(values, self.element.per)
        return exact_cast(self._read(tile, codes), values.dtype).view(found.shape), found

    def _restore_at(self, codes: Tensor, values: Tensor, kept: Tensor, where: Tensor) -> None:
        factors = self.factors.at(self.grid.block_of(where))
        meant = exact_cast(self.element.read(kept[:, None], factors[:, None], self.dtype), values.dtype)
        found = values.view(-1, self.element.per)[where]
        fits = (as_bits(meant) == as_bits(found)).all(-1)
        as_bits(codes).view(-1)[where[fits]] = as_bits(kept)[fits]


def _as_integers(values: Tensor, per: int) -> Tensor | None:
    """The same memory with `per` values as one integer, or None where they do not lie together."""
    if per > 1 and any(place % per for place in (values.storage_offset(), *values.stride()[:-1])):
        return None
    return values.view(integer_dtype(values.element_size() * per))


def _over(blocks: Tensor) -> Tensor:
    """Something of each block, `[bands, groups]`, as it lies over elements `[bands, height, groups, width]`."""
    return blocks[:, None, :, None]


def _grouped(mask: Tensor, per: int) -> Tensor:
    """A mask over values `[..., w * per]` as `[..., w, per]`."""
    return mask.view(*mask.shape[:-1], -1, per)


def _where(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`torch.where` for dtypes that it does not know, FP8 among them."""
    return torch.where(mask, as_bits(chosen), as_bits(other)).view(chosen.dtype)
