"""Block scales: what the stored bits mean, and how a new scale is written."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mapdsl.runtime.codecs.tiles import BlockGrid, Tile

# e8m0 is a bare exponent byte (OCP MX specification v1.0, section 5.4.1): 2**(byte - 127), 255 is NaN. Checkpoints
# that are older than torch's dtype for it store the same byte as u8 (MXFP8 and MXFP4 releases).
POWER_SCALE_DTYPES = (torch.float8_e8m0fnu, torch.uint8)

_SMALLEST_POWER_BITS = 0x00400000  # float32 bits of 2**-127, a denormal
_NAN_BITS = 0x7FC00000


def is_power_dtype(dtype: torch.dtype) -> bool:
    """Whether scales of this dtype are e8m0 bytes."""
    return dtype in POWER_SCALE_DTYPES


def scale_values(scale: Tensor) -> Tensor:
    """The stored scales as float32, exactly."""
    if scale.element_size() > 1:
        return scale.float()
    # torch converts eight bits to floats one by one; a table of all of them is ten times as fast.
    table = _scale_table(torch.uint8 if is_power_dtype(scale.dtype) else scale.dtype, scale.device)
    return table.index_select(0, scale.view(torch.uint8).flatten().int()).view(scale.shape)


@functools.lru_cache(maxsize=32)
def _scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The scale that each of 256 bytes means, float32 `[256]`."""
    if dtype != torch.uint8:
        return torch.arange(256, device="cpu").to(torch.uint8).view(dtype).float().to(device)
    power = torch.arange(256, dtype=torch.int32, device="cpu")
    bits = torch.where(power == 0, _SMALLEST_POWER_BITS, power << 23)
    return torch.where(power == 255, _NAN_BITS, bits).view(torch.float32).to(device)


class BlockFactors:
    """What the codes of each block of a grid are multiplied with, made from stored scales tile by tile.

    `scale` has one element a block; `inverse`: it is to be divided by. `whole`, if any, is the float32 scale over the
    scales of each matrix; `whole_inverse`: scales are divided by it.
    """

    def __init__(
        self,
        grid: BlockGrid,
        scale: Tensor,
        whole: Tensor | None = None,
        *,
        inverse: bool = False,
        whole_inverse: bool = False,
    ) -> None:
        self.scale, self.inverse, self.whole_inverse = scale.reshape(grid.blocks), inverse, whole_inverse
        self._whole = None
        if whole is not None:
            matrices, rows, _ = grid.blocks
            self._whole = whole.flatten().repeat_interleave(matrices * rows // max(1, whole.numel()))
            self._whole = self._whole.view(matrices, rows, 1)

    @property
    def are_powers(self) -> bool:
        """Whether each factor is what an e8m0 byte means."""
        return is_power_dtype(self.scale.dtype) and not self.inverse and self._whole is None

    def whole(self, tile: Tile) -> Tensor | None:
        """The scales over the scales of a tile's rows of blocks, float32 `[bands, 1]`."""
        return None if self._whole is None else tile.grid_rows(self._whole)

    def of(self, tile: Tile) -> Tensor:
        """The factors of a tile, float32 `[bands, groups]`."""
        return self.made(tile.blocks(self.scale), tile)

    def made(self, scale: Tensor, tile: Tile) -> Tensor:
        """The factors that a tile's blocks would have with these stored scales."""
        return self._made(scale_values(scale), self.whole(tile))

    def extremes(self) -> Tensor | None:
        """The smallest and the largest factor, float32 `[2]`, where they can be told from bytes, and there are any."""
        if not self.are_powers or not self.scale.numel():
            return None
        return scale_values(torch.stack(torch.aminmax(self.scale.view(torch.uint8))))

    def at(self, blocks: Tensor) -> Tensor:
        """The factors of blocks at flat places of the grid, float32 `[n]`."""
        whole = None if self._whole is None else self._whole.view(-1)[blocks // self.scale.shape[-1]]
        return self._made(scale_values(self.scale.view(-1)[blocks]), whole)

    def _made(self, values: Tensor, whole: Tensor | None) -> Tensor:
        if self.inverse:
            values = reciprocal(values)
        if whole is None:
            return values
        if not self.whole_inverse:
            return values * whole
        return torch.where(whole == 0, torch.zeros_like(values), values / whole)


def reciprocal(scale: Tensor) -> Tensor:
    """What to multiply with where scales are to be divided by; a scale of zero stands for a block of zeros."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def written_powers(largest: Tensor, ratio: Tensor, top_exponent: int, rule: str) -> Tensor:
    """e8m0 bytes, uint8, for blocks with these largest magnitudes; `ratio` is them over the element's largest value.

    `up` takes the next power of two, 2**ceil(log2(ratio)), as DeepSeek's ue8m0 kernels do: nothing saturates. `down` is
    the rule of the OCP MX specification v1.0, section 6.3: 2**(floor(log2(largest)) - the element's top exponent).
    `even` rounds the magnitude to FP4's two bits before that, of FP8 too, as compressed-tensors does: what would
    saturate by more than half a step of FP4 gets the next power. A block of zeros gets 1 by `up`.
    """
    tiny = torch.finfo(torch.float32).tiny
    if rule == "up":
        bits = torch.where(ratio == 0, torch.ones_like(ratio), ratio).clamp(min=tiny).view(torch.int32)
        # The quotient is rounded, yet never onto a power of two that the true one exceeds: 448 and 6 leave one bit.
        return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).to(torch.uint8)
    bits = largest.view(torch.int32)
    if rule == "even":
        bits = bits + (1 << 21)
    return ((bits >> 23) - top_exponent).clamp(0, 254).to(torch.uint8)


def written_scale(ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """The float scale to store for blocks whose largest magnitude is `ratio` times the element's: the nearest one.

    A block of zeros gets 1. A ratio under the smallest normal scale is raised to it: DeepSeek's FP4 kernel does so
    (`6 * 2**-126`), while the 1e-4 of its FP8 kernel, made for activations, would flatten small weights.
    """
    ratio = torch.where(ratio == 0, torch.ones_like(ratio), ratio)
    limits = torch.finfo(dtype)
    return ratio.clamp(limits.tiny, limits.max).to(dtype)


def written_global(largest: Tensor, most: float, inverse: bool) -> Tensor:
    """The scale over the scales of matrices with these largest magnitudes, float32, where they are to mean `most`.

    For NVFP4 `most` is 6 * 448: amax / 2688 as ModelOpt stores it, and 2688 / amax (`inverse`) in compressed-tensors.
    """
    amax = largest.clamp(min=torch.finfo(torch.float32).tiny)
    whole = most / amax if inverse else amax / most
    # Of zeros, or of values so small that the quotient overflows, nothing can be made: 1 does no harm.
    fine = (largest > 0) & whole.isfinite() & (whole > 0)
    return torch.where(fine, whole, torch.ones_like(whole))
