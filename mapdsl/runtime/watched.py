"""States that are told what is done with them: which tensors are one group, and what memory a group fills."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.memory import fresh

# Dtype, in safetensors' spelling, and shape of a tensor.
Form = tuple[str, "tuple[int, ...]"]


class WatchedState(Mapping[str, Tensor]):
    """A state dict for a conversion that is planned, or shared out among workers."""

    device: torch.device | None = None
    """Where constants are made; None: where the tensors taken last were."""

    def begin(self) -> None:
        """A rule is about to ask for a group of tensors."""

    def touch(self, name: str) -> None:
        """The rule looks at a tensor of its group for the first time; it may have come with another group before."""

    def form(self, name: str) -> Form | None:
        """What there is to know of a tensor of a group that comes without data; None where the group has data.

        It is asked once the group was looked at. Tensors of one form are taken to be alike, and need not be asked for.
        """
        del name
        return None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a tensor that is to be filled with the group."""
        return fresh(shape, dtype, device)
