"""Where the blocks of a block-scaled tensor lie, and the walk over them in strips that fit a cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

STRIP_ELEMENTS = 1 << 18  # small enough for a core's caches, large enough that starting torch's kernels costs little
_LINE = 32  # rows of a strip are a multiple of it: transposed, they are whole cache lines


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

    def cut(self, tensor: Tensor, per: int = 1) -> Tensor:
        """The tile of a `[matrices, rows, columns * per]` tensor, as a view `[bands, height, groups, width * per]`."""
        return self.flat(tensor, per).view(self.bands, self.height, self.groups, self.width * per)

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

    def bands(self, strip: int = STRIP_ELEMENTS) -> Iterator[list[Tile]]:
        """The tiles that together hold some whole rows of blocks, for all of them."""
        for _, tiles in itertools.groupby(self.tiles(strip), key=lambda tile: (tile.matrix, tile.grid_row)):
            yield list(tiles)

    def tiles(self, strip: int = STRIP_ELEMENTS) -> Iterator[Tile]:
        """All elements, each in one tile of `strip` at most; tiles of the same rows of blocks follow each other."""
        spans = list(self._columns_of_blocks(strip))
        for matrix in range(self.matrices):
            for band in self._rows_of_blocks(strip):
                for column, groups, width, grid_column in spans:
                    yield Tile(matrix, *band, column, groups, width, grid_column)

    def _rows_of_blocks(self, strip: int) -> Iterator[tuple[int, int, int, int]]:
        """Row, bands, height and grid row of each strip: several rows of blocks, or a slice of one where it is tall."""
        most = max(1, strip // max(1, self.columns))
        most -= most % _LINE if most > _LINE else 0
        for first, bands, height, grid_row in _runs(self.rows, self.height, self.down):
            if height > most:
                for band in range(bands):
                    for row in range(0, height, most):
                        yield first + band * height + row, 1, min(most, height - row), grid_row + band
            else:
                step = max(1, most // height)
                for band in range(0, bands, step):
                    yield first + band * height, min(step, bands - band), height, grid_row + band

    def _columns_of_blocks(self, strip: int) -> Iterator[tuple[int, int, int, int]]:
        """Column, groups, width and grid column of each span: blocks of one width, or columns of a wide one."""
        for first, groups, width, grid_column in _runs(self.columns, self.width, self.right):
            if width > strip:
                for group in range(groups):
                    for column in range(0, width, strip):
                        yield first + group * width + column, 1, min(strip, width - column), grid_column + group
            else:
                step = strip // width
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
