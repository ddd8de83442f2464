"""Where the blocks of a block-scaled tensor lie, and the walk over them in strips that fit a cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

STRIP_ELEMENTS = 1 << 18  # small enough for a core's caches, large enough that starting torch's kernels costs little
_LINE = 32  # rows of a strip are a multiple of it where they can be: transposed, they are whole cache lines
_TALL = 512  # rows of a block: of one with more, a strip is some of its rows


class Tile(NamedTuple):
    """`bands` x `groups` blocks of `height` x `width` each.

    Of one band of tall blocks it may be `height` of their rows, of one wide block `width` of its columns.
    """

    matrix: int
    row: int
    bands: int
    height: int
    grid_row: int
    column: int
    groups: int
    width: int
    grid_column: int

    def cut(self, tensor: Tensor) -> Tensor:
        """The tile of a `[matrices, rows, columns]` tensor, as a view `[bands, height, groups, width]`."""
        return self.blocked(self.flat(tensor))

    def blocked(self, flat: Tensor) -> Tensor:
        """What is `[rows, groups * width * per]` of this tile, as a view `[bands, height, groups, width * per]`."""
        return flat.view(self.bands, self.height, self.groups, flat.shape[1] // self.groups)

    def flat(self, tensor: Tensor, per: int = 1) -> Tensor:
        """The tile of a `[matrices, rows, columns * per]` tensor, as a view `[rows, groups * width * per]`."""
        rows = slice(self.row, self.row + self.bands * self.height)
        columns = slice(self.column * per, (self.column + self.groups * self.width) * per)
        return tensor[self.matrix, rows, columns]

    def grid_rows(self, grid: Tensor) -> Tensor:
        """The tile's rows of blocks of a `[matrices, grid rows, grid columns]` tensor, as a view."""
        return grid[self.matrix, self.grid_row : self.grid_row + self.bands]

    def blocks(self, grid: Tensor) -> Tensor:
        """The tile's blocks of such a tensor, as a view `[bands, groups]`."""
        return self.grid_rows(grid)[:, self.grid_column : self.grid_column + self.groups]


class BlockGrid:
    """Blocks over the last two dimensions of a shape; a block size of None is the whole dimension.

    A vector is one row. Blocks at the edges may be partial. The other dimensions are batch: where their matrices hold
    whole blocks only, all of them are walked as one tall matrix. Of a slice of a tensor, `offset` says where in a block
    its first row and column lie.
    """

    def __init__(
        self, shape: tuple[int, ...], block: tuple[int | None, int | None], offset: tuple[int, int] = (0, 0)
    ) -> None:
        *batch, rows, columns = (1, 1, *shape)
        self.matrices = 1
        for size in batch:
            self.matrices *= size
        self.down, self.right = offset
        self.height = (block[0] if self.down else min(block[0] or rows, rows)) or 1
        self.width = (block[1] if self.right else min(block[1] or columns, columns)) or 1
        if rows % self.height == 0 and not self.down:
            self.matrices, rows = 1, self.matrices * rows
        self.rows, self.columns = rows, columns
        self.elements = (self.matrices, rows, columns)
        self.blocks = (
            self.matrices,
            -(-(self.down + rows) // self.height),
            -(-(self.right + columns) // self.width),
        )

    def wide(self, per: int) -> tuple[int, int, int]:
        """The size of what has `per` values for each element."""
        matrices, rows, columns = self.elements
        return matrices, rows, columns * per

    def bands(self, strip: int = STRIP_ELEMENTS, *, in_rows: bool = False) -> Iterator[list[Tile]]:
        """All tiles, those together that share blocks."""
        down, across = self._span(strip, in_rows)
        tiles = self.tiles(strip, in_rows=in_rows)
        if self.height <= down and self.width <= across:
            yield from ([tile] for tile in tiles)
            return
        for _, band in itertools.groupby(tiles, key=lambda tile: (tile.matrix, tile.grid_row)):
            yield list(band)

    def tiles(self, strip: int = STRIP_ELEMENTS, *, in_rows: bool = False) -> Iterator[Tile]:
        """All elements, each in one tile of `strip` at most; tiles of the same rows of blocks follow each other.

        They are parts of as many rows as make whole blocks and whole lines, or whole rows however few (`in_rows`).
        """
        down, across = self._span(strip, in_rows)
        spans = list(self._columns_of_blocks(across))
        for matrix in range(self.matrices):
            for band in self._rows_of_blocks(down):
                for column, groups, width, grid_column in spans:
                    yield Tile(matrix, *band, column, groups, width, grid_column)

    def _span(self, strip: int, in_rows: bool) -> tuple[int, int]:
        """The most rows and columns of a tile."""
        few = 1 if in_rows else min(_LINE, self.rows)
        if self.height <= _TALL and not in_rows:
            few = -(-few // self.height) * self.height
        across = min(strip, max(1, self.columns, self.width), max(strip // max(1, few), self.width))
        return max(1, strip // across), across

    def _rows_of_blocks(self, most: int) -> Iterator[tuple[int, int, int, int]]:
        """Row, bands, height and grid row of each strip: several rows of blocks, or a slice of one where it is tall."""
        for first, bands, height, grid_row in _runs(self.rows, self.height, self.down):
            step = _lined(most if height > most else most // height)
            if height > most:
                for band in range(bands):
                    for row in range(0, height, step):
                        yield first + band * height + row, 1, min(step, height - row), grid_row + band
            else:
                for band in range(0, bands, step):
                    yield first + band * height, min(step, bands - band), height, grid_row + band

    def _columns_of_blocks(self, most: int) -> Iterator[tuple[int, int, int, int]]:
        """Column, groups, width and grid column of each span: blocks of one width, or columns of a wide one."""
        for first, groups, width, grid_column in _runs(self.columns, self.width, self.right):
            if width > most:
                for group in range(groups):
                    for column in range(0, width, most):
                        yield first + group * width + column, 1, min(most, width - column), grid_column + group
            else:
                step = most // width
                for group in range(0, groups, step):
                    yield first + group * width, min(step, groups - group), width, grid_column + group

    def positions(self, tile: Tile, mask: Tensor) -> Tensor:
        """Flat positions in the tensor, int64, of what a tile's mask `[bands, height, groups, width]` picks."""
        band, height, group, width = mask.nonzero(as_tuple=True)
        row = tile.row + band * tile.height + height
        column = tile.column + group * tile.width + width
        return (tile.matrix * self.rows + row) * self.columns + column

    def block_of(self, positions: Tensor) -> Tensor:
        """Flat index, int64, of the block that holds each flat position."""
        row, column = positions // self.columns, positions % self.columns
        matrix, row = row // self.rows, row % self.rows + self.down
        _, grid_rows, grid_columns = self.blocks
        return (matrix * grid_rows + row // self.height) * grid_columns + (column + self.right) // self.width


def _runs(size: int, block: int, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of equal blocks along a dimension: first element, number of blocks, their size, the first one's place.

    At most three: the rest of a block that began before, whole blocks, and the beginning of one that is cut off.
    """
    head = min(block - offset, size) if offset else 0
    whole, tail = divmod(size - head, block)
    place = 1 if offset else 0
    for first, count, length, at in (
        (0, 1, head, 0),
        (head, whole, block, place),
        (head + whole * block, 1, tail, place + whole),
    ):
        if count and length:
            yield first, count, length, at


def _lined(rows: int) -> int:
    """So many rows, or fewer: whole lines of them, if there are any."""
    return rows - rows % _LINE if rows > _LINE else rows


def covering(tiles: list[Tile]) -> Tile:
    """The blocks that a band's tiles lie in, as one tile of the grid."""
    first, last = tiles[0], tiles[-1]
    return first._replace(groups=last.grid_column + last.groups - first.grid_column)


def strips(shape: tuple[int, ...], most: int = STRIP_ELEMENTS) -> Iterator[tuple[int | slice, ...]]:
    """Indices of a tensor's elements in their order, some rows at a time, or parts of one that is long."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    if row > most:
        for place in range(shape[0]):
            yield from ((place, *rest) for rest in strips(shape[1:], most))
        return
    step = most // max(1, row)
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)
