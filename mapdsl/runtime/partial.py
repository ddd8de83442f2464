"""`as partial(tp)`: each rank stores a share of the value, so that the values of all ranks add up to the whole one.

Some frameworks store the bias of a row-parallel layer so: every rank adds its own, and all is summed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mapdsl.runtime.codecs.storage import Storage
from mapdsl.runtime.codecs.values import Reversible
from mapdsl.runtime.complement import Alternatives
from mapdsl.runtime.stored_forms import AS_IS


class Partial(Reversible):
    """The value divided by the number of ranks, in the tensor's own dtype; exact for powers of two."""

    def __init__(self, ranks: int) -> None:
        self.bind(Storage("partial", "raw"))
        self.ranks = ranks

    def change(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole value."""
        return scaled(stored, self.ranks, 1).to(dtype)

    def undo(self, logical: Tensor, dtype: torch.dtype) -> Tensor:
        """What each rank stores."""
        return scaled(logical, 1, self.ranks).to(dtype)

    def cannot_store(self, logical: Tensor) -> tuple[Tensor, str]:
        """There is nothing that cannot be divided."""
        return torch.zeros(logical.shape, dtype=torch.bool, device=logical.device), ""


@lru_cache
def partial_form(ranks: int) -> Alternatives:
    """How a tensor is stored of which each of some ranks has a share of the value: as it is, where there is one."""
    return AS_IS if ranks == 1 else (Partial(ranks),)


def scaled(tensor: Tensor, times: int, over: int) -> Tensor:
    """A tensor times one number, over another, rounded once to its own dtype; NaNs keep their bits."""
    if times == over or tensor.is_meta:
        return tensor
    result = (tensor.double() * times / over).to(tensor.dtype)
    return torch.where(tensor.isnan(), tensor, result)


def ranks_of(stored: Alternatives) -> int:
    """Over how many ranks a value is shared out."""
    return next((one.ranks for one in stored if isinstance(one, Partial)), 1)
