"""States that are told what is done with them: which tensors are one group, and what memory a group fills."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WatchedState(Mapping[str, Tensor]):
    """A state dict for a conversion that is planned, or shared out among workers."""

    device: torch.device | None = None
    """Where constants are made; None: where the tensors taken last were."""

    def begin(self) -> None:
        """A rule is about to ask for a group of tensors."""

    def touch(self, name: str) -> None:
        """The rule looks at a tensor of its group, for the first time or again."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a tensor that is to be filled with the group."""
        return torch.empty(shape, dtype=dtype, device=device)
