"""Values that a map computes: generators of buffers."""

from __future__ import annotations

import torch
from torch import Tensor


def inv_freq(theta: float, count: int) -> Tensor:
    """Inverse frequencies of rotary embeddings: `theta ** -(n / count)` for n from 0, float32 of shape [count].

    The formula of RoPE (Su et al., 2021) as transformers computes it, with half the head size as `count`.
    """
    exponents = torch.arange(0, 2 * count, 2, dtype=torch.int64).float() / (2 * count)
    return 1.0 / (theta**exponents)
