"""Block scales: what the stored bits mean, and how a new scale is written."""

from __future__ import annotations

import torch
from torch import Tensor

# e8m0 is a bare exponent byte (OCP MX specification v1.0, section 5.4.1): 2**(byte - 127), 255 is NaN. Checkpoints
# that are older than torch's dtype for it store the same byte as u8 (MXFP8 and MXFP4 releases).
POWER_SCALE_DTYPES = (torch.float8_e8m0fnu, torch.uint8)
FLOAT_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_DTYPES = FLOAT_SCALE_DTYPES + POWER_SCALE_DTYPES

_SMALLEST_POWER_BITS = 0x00400000  # float32 bits of 2**-127, a denormal
_NAN_BITS = 0x7FC00000


def is_power_scale(scale: Tensor) -> bool:
    """Whether the scales are e8m0 bytes."""
    return scale.dtype in POWER_SCALE_DTYPES


def scale_values(scale: Tensor) -> Tensor:
    """The stored scales as float32, exactly."""
    if not is_power_scale(scale):
        return scale.float()
    power = scale.view(torch.uint8).int()
    bits = torch.where(power == 0, _SMALLEST_POWER_BITS, power << 23)
    return torch.where(power == 255, _NAN_BITS, bits).view(torch.float32)


def written_scale(ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale to store for blocks whose largest magnitude is `ratio` times the element's largest.

    e8m0 takes the next power of two, 2**ceil(log2(ratio)), as DeepSeek's ue8m0 kernels do; the others take the nearest.
    A block of zeros gets 1. A ratio under the smallest normal scale is raised to it: DeepSeek's FP4 kernel does so
    (`6 * 2**-126`), while the 1e-4 of its FP8 kernel, made for activations, would flatten small weights.
    """
    ratio = torch.where(ratio == 0, torch.ones_like(ratio), ratio)
    if dtype not in POWER_SCALE_DTYPES:
        limits = torch.finfo(dtype)
        return ratio.clamp(limits.tiny, limits.max).to(dtype)
    bits = ratio.clamp(min=torch.finfo(torch.float32).tiny).view(torch.int32)
    # The quotient is rounded, yet never onto a power of two that the true one exceeds: 448 and 6 leave one bit of room.
    power = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return power.to(torch.uint8).view(dtype)
