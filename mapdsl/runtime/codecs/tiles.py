"""Where the blocks of a block-scaled tensor lie, and the walk over them in strips that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

STRIP_ELEMENTS = 1 << 18  # small enough for a core's caches, large enough that starting torch's kernels costs little


class Tile(NamedTuple):
    """`bands` x `groups` blocks of `height` x `width` each; or, of one band of tall blocks, `height` of their rows."""

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
        rows = slice(self.row, self.row + self.bands * self.height)
        columns = slice(self.column * per, (self.column + self.groups * self.width) * per)
        return tensor[self.matrix, rows, columns].view(self.bands, self.height, self.groups, self.width * per)

    def blocks(self, grid: Tensor) -> Tensor:
        """The tile's blocks of a `[matrices, grid rows, grid columns]` tensor, as a view `[bands, 1, groups, 1]`."""
        rows = slice(self.grid_row, self.grid_row + self.bands)
        columns = slice(self.grid_column, self.grid_column + self.groups)
        return grid[self.matrix, rows, columns].view(self.bands, 1, self.groups, 1)


class BlockGrid:
    """Blocks over the last two dimensions of a shape; a block size of None is the whole dimension.

    A vector is one row. Blocks at the edges may be partial. The other dimensions are batch: where their matrices hold
    whole blocks only, all of them are walked as one tall matrix.
    """

    def __init__(self, shape: tuple[int, ...], block: tuple[int | None, int | None]) -> None:
        *batch, rows, columns = (1, 1, *shape)
        self.matrices = 1
        for size in batch:
            self.matrices *= size
        self.height = min(block[0] or rows, rows) or 1
        self.width = min(block[1] or columns, columns) or 1
        if rows % self.height == 0:
            self.matrices, rows = 1, self.matrices * rows
        self.rows, self.columns = rows, columns
        self.elements = (self.matrices, rows, columns)
        self.blocks = (self.matrices, -(-rows // self.height), -(-columns // self.width))
        self.largest_tile = max(STRIP_ELEMENTS, columns)

    def tiles(self) -> Iterator[Tile]:
        """All elements, each in one tile; tiles of the same rows of blocks follow each other."""
        full, rest = divmod(self.columns, self.width)
        spans = [(0, full, self.width, 0), (full * self.width, 1, rest, full)]
        spans = [span for span in spans if span[1] and span[2]]
        for matrix in range(self.matrices):
            for band in self._bands():
                for span in spans:
                    yield Tile(matrix, *band, *span)

    def _bands(self) -> Iterator[tuple[int, int, int, int]]:
        """Row, bands, height and grid row of each strip: several rows of blocks, or a slice of one where it is tall."""
        most = max(1, STRIP_ELEMENTS // max(1, self.columns))
        full = self.rows // self.height
        step = max(1, most // self.height)
        if self.height <= most:
            for block in range(0, full, step):
                yield block * self.height, min(step, full - block), self.height, block
        else:
            for block in range(full):
                yield from self._slices(block, self.height, most)
        yield from self._slices(full, self.rows - full * self.height, most)

    def _slices(self, block: int, height: int, most: int) -> Iterator[tuple[int, int, int, int]]:
        for row in range(0, height, most):
            yield block * self.height + row, 1, min(most, height - row), block

    def positions(self, tile: Tile, mask: Tensor) -> Tensor:
        """Flat positions in the tensor, int64, of what a tile's mask `[bands, height, groups, width]` picks."""
        band, height, group, width = mask.nonzero(as_tuple=True)
        row = tile.row + band * tile.height + height
        column = tile.column + group * tile.width + width
        return (tile.matrix * self.rows + row) * self.columns + column

    def block_of(self, positions: Tensor) -> Tensor:
        """Flat index, int64, of the block that holds each flat position."""
        row, column = positions // self.columns, positions % self.columns
        matrix, row = row // self.rows, row % self.rows
        _, grid_rows, grid_columns = self.blocks
        return (matrix * grid_rows + row // self.height) * grid_columns + column // self.width
