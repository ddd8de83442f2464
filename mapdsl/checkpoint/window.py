"""A checkpoint's tensors for one pass over them: pages that were read leave memory soon after."""

from __future__ import annotations

from collections import deque

import torch

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.tensors import LazyState

WINDOW_BYTES = 64 * 2**20
"""How much of what was handed out last is left in memory."""


class Window(LazyState):
    """A `LazyState` that notes which tensors were asked for, and lets go of the pages of all but the last ones.

    Tensors handed out long ago stay good: they are read again when they are used. They must not be written into.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu") -> None:
        super().__init__(checkpoint, device=device)
        self.asked: dict[str, None] = {}
        self._recent: deque[str] = deque()
        self._recent_bytes = 0

    def meta(self) -> Window:
        """The same names with meta tensors, noted by themselves."""
        return Window(self.checkpoint, device="meta")

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        self.asked[name] = None
        if not self._is_meta:
            self._recent.append(name)
            self._recent_bytes += self.checkpoint.tensors[name].nbytes
            while self._recent_bytes > WINDOW_BYTES and len(self._recent) > 1:
                oldest = self._recent.popleft()
                self._recent_bytes -= self.checkpoint.tensors[oldest].nbytes
                self.release(oldest)
        return tensor
