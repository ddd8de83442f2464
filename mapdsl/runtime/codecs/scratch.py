"""Memory for what lives no longer than one tile, kept by each thread: to touch new memory costs more than the work."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """Each thread's memory, by what it is for."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_this_thread = _Buffers()


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any content, valid until this thread asks again for the same `use`."""
    elements = torch.Size(shape).numel()
    held = _this_thread.buffers.get((use, dtype, device))
    if held is None or held.numel() < elements:
        with torch.inference_mode(False):  # memory made in that mode could not be written to outside of it
            held = _this_thread.buffers[use, dtype, device] = torch.empty(elements, dtype=dtype, device=device)
    return held[:elements].view(shape)
