"""Decoding, encoding and comparing all blocks of one tensor, tile by tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mapdsl.runtime.codecs.elements import Element, TableElement, power_table
from mapdsl.runtime.codecs.formats import as_bits, bits_differ, exact_cast, integer_dtype
from mapdsl.runtime.codecs.kept import as_many_as_all, one_after_another, side_by_side
from mapdsl.runtime.codecs.kernels import COMPILED_DTYPES, compiled_kernels, each
from mapdsl.runtime.codecs.matrices import Matrices
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

    Codes are the stored elements, `[matrices, rows, columns]` of the grid; values are logical, `per` times as wide.
    Tables are reused from tile to tile.
    """

    def __init__(self, element: Element, grid: BlockGrid, factors: BlockFactors, dtype: torch.dtype) -> None:
        self.element, self.grid, self.factors, self.dtype = element, grid, factors, dtype
        elements = grid.elements[0] * grid.elements[1] * grid.elements[2] * element.per
        self.kernels = compiled_kernels(element, dtype, factors.scale.device, elements)
        nothing = torch.empty(0, device=factors.scale.device)
        self._tables: tuple[tuple[int, ...], Tensor, Tensor] = (), nothing, nothing

    def decode(self, codes: Matrices, values: Tensor, skip: int = 0) -> None:
        """Write the logical values, a tensor `[matrices, rows, columns]` of `dtype` that may be any view.

        The first `skip` values of each row of codes are left out, and the last where there are more than columns.
        """
        per = self.element.per
        in_order = values.shape[-1] == 1 or values.stride(-1) == 1
        is_whole = values.shape[-1] == self.grid.elements[2] * per
        is_direct = is_whole and (in_order or (self.kernels is not None and values.stride(-2) == 1))

        def work(tile: Tile) -> None:
            mine = codes.of(tile)
            if is_direct and in_order:
                self._read(tile, mine, tile.flat(values, per))
            elif not (is_direct and self._read_transposed(tile, mine, tile.flat(values, per).T)):
                found, first = self._read(tile, mine), tile.column * per - skip
                left, right = max(0, first), min(first + found.shape[1], values.shape[-1])
                if left < right:
                    place = values[tile.matrix, tile.row : tile.row + len(found), left:right]
                    copy_strided(place, found[:, left - first : right - first], self.kernels)

        strip = self.strip if is_direct and codes.is_view else STRIP_ELEMENTS
        each(work, self.grid.tiles(strip, in_rows=is_direct and in_order), values.device)

    def encode(self, tensor: Tensor, codes: Tensor, kept: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Write the codes nearest to a tensor's values under these scales, or kept ones that mean the same values.

        Kept are the codes at the flat positions `where`, ascending, or all if that is None. Gives a mask of the grid:
        the blocks in which some code does not mean the value, bit by bit.
        """
        values, per = Matrices(tensor, self.grid.wide(self.element.per)), self.element.per
        whole = None if kept is None or where is not None else kept.view(self.grid.elements)
        unlike = torch.zeros(self.grid.blocks, dtype=torch.bool, device=codes.device)

        def visit(tile: Tile) -> None:
            mine, target = values.of(tile, per), tile.flat(codes)
            if whole is not None and not bits_differ(*self._meant(tile, tile.flat(whole), mine)):
                target.copy_(tile.flat(whole))
                return
            self._write(tile, mine, target)
            if whole is not None:
                self._restore(tile, mine, target, tile.flat(whole))
            elif kept is not None and where is not None and len(where):
                self._restore_at(tile, mine, target, kept, where)
            meant, found = self._meant(tile, target, mine)
            if bits_differ(meant, found):
                wrong = as_bits(meant) != as_bits(found)
                tile.blocks(unlike).logical_or_(wrong.amax((1, 3)))

        def work(tiles: list[Tile]) -> None:
            # Tiles that share a block share its place in the mask: they are one thread's.
            for tile in tiles:
                visit(tile)

        each(work, self.grid.bands(in_rows=values.is_view), codes.device)
        return unlike

    def encode_tile(self, tile: Tile, values: Matrices, codes: Tensor, only: Tensor | None = None) -> None:
        """Write the codes nearest to the values of one tile, of the blocks that `only` (of the grid) picks."""
        mine, target = values.of(tile, self.element.per), tile.flat(codes)
        picked = None if only is None else tile.blocks(only)
        if picked is None:
            self._write(tile, mine, target)
        elif picked.any():
            fresh = self._write(tile, mine, scratch("codes", tuple(target.shape), target.dtype, target.device))
            mixed = _where(_over(picked), tile.blocked(fresh), tile.blocked(target))
            target.copy_(mixed.view(target.shape))

    def irreproducible(self, codes: Matrices) -> tuple[Tensor, Tensor] | None:
        """Codes that decoding and encoding under the same scales would not give back, and their flat positions, int64.

        None where there are so many that all codes together take less.
        """
        found: dict[Tile, tuple[Tensor, Tensor]] = {}
        left = [as_many_as_all(torch.Size(self.grid.elements).numel(), codes.dtype)]
        is_certain = self._reproducer()

        def work(tile: Tile) -> None:
            mine = codes.of(tile)
            if left[0] <= 0 or is_certain(tile, mine):
                return
            again = scratch("codes", tuple(mine.shape), mine.dtype, mine.device)
            wrong = as_bits(self._write(tile, self._read(tile, mine), again)) != as_bits(mine)
            if wrong.any():
                found[tile] = as_bits(mine)[wrong].view(mine.dtype), self.grid.positions(tile, tile.blocked(wrong))
                left[0] -= len(found[tile][0])

        each(work, self.grid.tiles(in_rows=codes.is_view), codes.device)
        if left[0] <= 0:
            return None
        nothing, nowhere = (torch.empty(0, dtype=one, device=codes.device) for one in (codes.dtype, torch.int64))
        pieces = [(nothing, nowhere)]
        # Tiles beside each other share rows.
        for _, tiles in itertools.groupby(sorted(found), key=lambda tile: (tile.matrix, tile.row)):
            pieces.append(side_by_side([found.pop(tile) for tile in list(tiles)]))
        return one_after_another(pieces)

    # --- within ---

    @property
    def strip(self) -> int:
        """Elements of a tile for work that needs no scratch."""
        return STRIP_ELEMENTS if self.kernels is None else _COMPILED_STRIP

    def _read(self, tile: Tile, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """The decoded values of a tile's codes, `[rows, columns]`, in `out` if given, whose columns lie together.

        Otherwise they are in scratch, until the next tile is read.
        """
        per = self.element.per
        if out is None:
            out = scratch("values", (codes.shape[0], codes.shape[1] * per), self.dtype, codes.device)
        if self.kernels is not None:
            assert isinstance(self.element, TableElement)
            self.kernels.decode(self.element, codes, self.factors.of(tile), out, height=tile.height, width=tile.width)
            return out
        mine, words = tile.blocked(codes), _as_integers(out, per)
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
        factors = self.factors.of(tile)
        return self.kernels.decode_transposed(self.element, codes, factors, out, height=tile.height, width=tile.width)

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
        # Tables for other blocks of these rows, and of the rows that follow, are made with this tile's.
        _, rows, columns = self.grid.blocks
        ahead = tile
        if columns <= _TABLES:
            bands = max(tile.bands, _TABLES // columns)
            first = tile.grid_row - tile.grid_row % bands if tile.bands == 1 else tile.grid_row
            ahead = tile._replace(grid_row=first, bands=min(bands, rows - first), grid_column=0, groups=columns)
        wanted = (ahead.matrix, ahead.grid_row, ahead.bands, ahead.grid_column, ahead.groups)
        made_for, table, starts = self._tables
        if made_for != wanted:
            table = element.table(self.factors.of(ahead).flatten(), self.dtype)
            starts = torch.arange(0, len(table), 256, dtype=torch.int32, device=table.device)
            starts = starts.view(ahead.bands, ahead.groups)
            self._tables = wanted, table, starts
        down, right = tile.grid_row - ahead.grid_row, tile.grid_column - ahead.grid_column
        return table, _over(starts[down : down + tile.bands, right : right + tile.groups])

    def _write(self, tile: Tile, values: Tensor, out: Tensor) -> Tensor:
        """Write the codes of a tile's values, both `[rows, columns]`, to `out`."""
        factors = self.factors.of(tile)
        # Values may come back in another dtype than was decoded to, one that is not compiled for.
        if self.kernels is not None and values.dtype in COMPILED_DTYPES:
            assert isinstance(self.element, TableElement)
            self.kernels.encode(self.element, values, factors, out, height=tile.height, width=tile.width)
            return out
        quotients = scratch("quotients", (values.numel(),), torch.float32, values.device)
        fresh = self.element.write(tile.blocked(values), _over(factors), out.dtype, quotients)
        return out.copy_(fresh.view(out.shape))

    def _meant(self, tile: Tile, codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a tile's codes mean and what its values are, in the values' dtype, `[bands, height, groups, width]`.

        Values may come back in another dtype than was decoded to; then what counts is what the cast made of them.
        """
        return tile.blocked(exact_cast(self._read(tile, codes), values.dtype)), tile.blocked(values)

    def _restore(self, tile: Tile, values: Tensor, codes: Tensor, kept: Tensor) -> None:
        """Put a tile's kept codes back where they mean the value."""
        meant = exact_cast(self._read(tile, kept), values.dtype)
        fits = _grouped(as_bits(meant) == as_bits(values), self.element.per).all(-1)
        codes.copy_(_where(fits, kept, codes))

    def _restore_at(self, tile: Tile, values: Tensor, codes: Tensor, kept: Tensor, where: Tensor) -> None:
        """The same, of those kept at flat positions of the tensor that lie in the tile."""
        _, rows, columns = self.grid.elements
        first = (tile.matrix * rows + tile.row) * columns
        ends = where.new_tensor([first, first + len(codes) * columns])
        some = slice(*torch.searchsorted(where, ends).tolist())
        row, column = (where[some] - first) // columns, where[some] % columns - tile.column
        inside = (column >= 0) & (column < codes.shape[1])
        where, row, column = where[some][inside], row[inside], column[inside]
        kept = as_bits(kept)[some][inside].view(kept.dtype)
        factors = self.factors.at(self.grid.block_of(where))
        meant = exact_cast(self.element.read(kept[:, None], factors[:, None], self.dtype), values.dtype)
        fits = (as_bits(meant) == as_bits(values.view(len(values), -1, self.element.per)[row, column])).all(-1)
        as_bits(codes)[row[fits], column[fits]] = as_bits(kept)[fits]


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
