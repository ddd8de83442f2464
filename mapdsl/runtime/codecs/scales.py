"""Block scales: what the stored bits mean, and how a new scale is written."""

from __future__ import annotations

import torch
from torch import Tensor

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
    if not is_power_dtype(scale.dtype):
        return scale.float()
    power = scale.view(torch.uint8).int()
    bits = torch.where(power == 0, _SMALLEST_POWER_BITS, power << 23)
    return torch.where(power == 255, _NAN_BITS, bits).view(torch.float32)


def reciprocal(scale: Tensor) -> Tensor:
    """What to multiply with where scales are to be divided by; a scale of zero stands for a block of zeros."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def written_powers(largest: Tensor, ratio: Tensor, top_exponent: int, rule: str) -> Tensor:
    """e8m0 bytes, uint8, for blocks with these largest magnitudes; `ratio` is them over the element's largest value.

    `up` takes the next power of two, 2**ceil(log2(ratio)), as DeepSeek's ue8m0 kernels do: nothing saturates. `down` is
    the rule of the OCP MX specification v1.0, section 6.3: 2**(floor(log2(largest)) - the element's top exponent).
    `even` rounds the magnitude to the element's bits before that, as compressed-tensors does for FP4: what would
    saturate by more than half a step gets the next power. A block of zeros gets 1 by `up`.
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


def written_global(ratio: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
    """The scale over scales of a dtype, float32: the largest of a matrix' ratios becomes the largest scale.

    That is amax / (6 * 448) for NVFP4 as ModelOpt stores it, and 6 * 448 / amax (`inverse`) in compressed-tensors.
    """
    limit = torch.finfo(dtype).max
    whole = ratio.clamp(min=torch.finfo(torch.float32).tiny)
    whole = limit / whole if inverse else whole / limit
    # Of zeros, or of values so small that the quotient overflows, nothing can be made: 1 does no harm.
    fine = (ratio > 0) & whole.isfinite() & (whole > 0)
    return torch.where(fine, whole, torch.ones_like(whole))
