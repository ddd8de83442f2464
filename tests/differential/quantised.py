"""Random quantised checkpoints of the families that are released so, with the names that Automodel asks for."""

from __future__ import annotations

import torch

from tests.differential.automodel import Case, State

NARROW = torch.float8_e4m3fn


def form(state: State) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def fp8_checkpoint(case: Case, seed: int = 0, scales: torch.dtype = torch.float32) -> State:
    """A checkpoint in FP8 of 128x128 blocks: every code but NaN, whose payload nobody promises, and random scales."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in case.theirs().to_hf(case.native(seed), quantization=True).items():
        if tensor.dtype is NARROW:
            codes = torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=generator)
            made[name] = codes.masked_fill(codes & 0x7F == 0x7F, 0).view(NARROW)
        elif name.endswith("_scale_inv"):
            made[name] = (torch.rand(tensor.shape, generator=generator) * 2**-6).to(scales)
        else:
            made[name] = tensor
    return made
