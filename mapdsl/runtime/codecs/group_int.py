"""`group_int`: DeepSpeed's integers, one scale for each of a number of equal runs of the flat tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Slice
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.elements import Integer
from mapdsl.runtime.codecs.formats import round_product
from mapdsl.runtime.codecs.integer_storage import GroupStorage
from mapdsl.runtime.codecs.kernels import each
from mapdsl.runtime.codecs.matrices import Matrices
from mapdsl.runtime.codecs.quantise import Largest, first_unholdable
from mapdsl.runtime.codecs.scales import BlockFactors, reciprocal
from mapdsl.runtime.codecs.strided import copy_strided
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS, BlockGrid, Tile, covering
from mapdsl.runtime.errors import ConversionError


class GroupInt(BlockScaled):
    """Integers of 2 to 8 bits, two's complement in an int8 each: logical = element * scale, rounded once to float.

    DeepSpeed's `WeightQuantization`: the flat tensor is cut into `groups` equal runs, with a float32 scale each,
    `[1, groups]`. With `inverse` the scales are the factors that values were multiplied with, `[groups, 1]`.
    """

    storage: GroupStorage  # type: ignore[assignment]

    def __init__(
        self, name: str, bits: int = 8, groups: int = 1, scale: str = "{key}_scale", *, inverse: bool = False
    ) -> None:
        self.bind(GroupStorage(name, bits=bits, groups=groups, scale=scale, inverse=inverse))

    def bind(self, storage: GroupStorage) -> None:  # type: ignore[override]
        """See `Codec.bind`."""
        Codec.bind(self, storage)
        self.element: Integer = Integer(f"i{storage.bits}", torch.int8, storage.bits, 1, offset=False)
        self.scale_dtypes = (torch.float32,)

    def checked_parts(self, key: str, parts: Mapping[str, Tensor], of: Slice | None = None) -> dict[str, Tensor]:
        """See `Codec.checked_parts`; the groups are equal runs of the whole tensor."""
        found = super().checked_parts(key, parts, of)
        problem = self.storage.unfit(tuple(found["payload"].shape) if of is None else tuple(of.shape))
        if problem is not None:
            raise ConversionError("R606", f"{self.payload(key)}: {problem}, stored as {self.name}")
        return found

    def _decode(self, parts: Mapping[str, Tensor], values: Tensor, of: Slice | None) -> None:
        """By the block kernel where the whole tensor is decoded in its own order, else position by position."""
        if of is None and values.is_contiguous():
            self._decode_into(parts, values.view(self._code_shape(tuple(values.shape))))
            return
        shape, box = (tuple(values.shape), tuple((0, size) for size in values.shape)) if of is None else of
        apart = tuple(torch.Size(shape[dim + 1 :]).numel() for dim in range(len(shape)))
        first = sum(start * step for (start, _), step in zip(box, apart, strict=True))
        factors, run = self._multipliers(parts).flatten(), torch.Size(shape).numel() // self.storage.groups
        if values.ndim:
            _decode_by_place(parts["payload"], values, first, apart, factors, run)
        else:
            _decode_by_place(parts["payload"].view(1), values.view(1), first, (1,), factors, run)

    def _write_anew(
        self,
        key: str,
        tensor: Tensor,
        codes: Tensor,
        only: Tensor | None = None,
        before: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """DeepSpeed's quantiser: values times 2**bits / (2 * amax + 1e-5), rounded to even, saturating."""
        grid = self._grid(codes.shape)
        values, flat = Matrices(tensor, grid.elements), codes.view(grid.elements)
        measured = Largest(self.element, values, 1)
        shape = self.storage.part_shapes(tuple(tensor.shape))["scale"]
        scales = torch.empty(shape, device=tensor.device) if before is None else before["scale"].clone()

        def work(tiles: list[Tile]) -> None:
            band = covering(tiles)
            picked = None if only is None else band.blocks(only)
            if picked is not None and not picked.any():
                return
            multiplier = 2.0**self.storage.bits / (2 * measured.of(tiles) + 1e-5)
            target = band.blocks(scales.view(grid.blocks))
            scale = multiplier if self.storage.inverse else 1 / multiplier
            target.copy_(scale if picked is None else torch.where(picked, scale, target))
            for tile in tiles:
                rows, mine = values.of(tile), tile.flat(flat)
                fresh = self.element.rounded(rows.float() * multiplier).view(torch.int8)
                mine.copy_(fresh if picked is None else torch.where(picked, fresh, mine))

        each(work, grid.bands(), tensor.device)
        if not measured.all_finite:
            self._refuse_unholdable(key, tensor, first_unholdable(self.element, grid, tensor, only))
        return {"scale": scales}

    def _factors(self, grid: BlockGrid, parts: Mapping[str, Tensor]) -> BlockFactors:
        return BlockFactors(grid, parts["scale"].float(), inverse=self.storage.inverse)

    def _multipliers(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale = parts["scale"].float()
        return reciprocal(scale) if self.storage.inverse else scale

    def _code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.storage.groups, torch.Size(shape).numel() // self.storage.groups

    def _grid(self, code_shape: tuple[int, ...], offset: tuple[int, int] = (0, 0)) -> BlockGrid:
        return BlockGrid(tuple(code_shape), (1, None), offset)


def _decode_by_place(
    codes: Tensor, values: Tensor, first: int, apart: tuple[int, ...], factors: Tensor, run: int
) -> None:
    """Decode a box of a flat tensor in which each `run` has a factor, some rows at a time.

    Its first element lies at the place `first`, neighbours in each dimension so far `apart`.
    """
    row = values[0].numel()
    if values.ndim > 1 and row > STRIP_ELEMENTS:
        for place in range(len(values)):
            _decode_by_place(codes[place], values[place], first + place * apart[0], apart[1:], factors, run)
        return
    step = max(1, STRIP_ELEMENTS // row)
    for start in range(0, len(values), step):
        mine, theirs = values[start : start + step], codes[start : start + step]
        places = torch.tensor(first + start * apart[0], device=values.device)
        for size, distance in zip(mine.shape, apart, strict=True):
            places = places[..., None] + torch.arange(size, device=values.device) * distance
        products = round_product(theirs.float(), factors[places.div(run, rounding_mode="floor")], values.dtype)
        copy_strided(mine, products)
