"""What one rank is to hold of what other ranks hold, as a checkpoint: nothing is put together beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.dtypes import stored_shape, torch_dtype
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.runtime.assembling import assembled
from mapdsl.runtime.dtensors import Rank
from mapdsl.runtime.resharding import Made

if TYPE_CHECKING:
    from mapdsl.checkpoint.tensors import LazyState


@dataclass(frozen=True)
class Shares:
    """Where the tensors of a rank come from: the checkpoints of all ranks, and what is made of them.

    `rank` is the one that they are for, if they are still to be converted. With `compare`, what several ranks hold
    must be equal.
    """

    checkpoints: Sequence[Checkpoint]
    made: Mapping[str, Made]
    rank: Rank | None = None
    compare: bool = True


def stored_of(name: str, made: Made, checkpoints: Sequence[Checkpoint]) -> StoredTensor:
    """What a header would say of a tensor."""
    rank, like = made.like
    model = checkpoints[rank].tensors[like]
    outline = torch.empty(made.shape, dtype=torch_dtype(model.dtype), device="meta")
    return StoredTensor(name, model.dtype, stored_shape(outline), model.file)


class ShareReader:
    """Reads the tensors of a rank, from the mapped files of others."""

    def __init__(self, shares: Shares, states: Sequence[LazyState]) -> None:
        self.shares, self.states = shares, states

    def __getitem__(self, name: str) -> Tensor:
        """A tensor: a view of one rank's file where it lies in one piece, else put together."""
        return assembled(name, self.shares.made[name], self.states, compare=self.shares.compare, own=False)

    def pieces(self, name: str) -> Pieces | None:
        """A tensor that is still to be put together, where it goes out as it is; None of one that lies in one piece."""
        made = self.shares.made[name]
        is_made = made.value is not None or made.scale[0] != made.scale[1] or not made.shape
        if self.shares.rank is not None or is_made or len(made.sources) < 2:
            return None
        rank, like = made.like
        dtype = torch_dtype(self.states[rank].checkpoint.tensors[like].dtype)
        return Pieces(name, made, self.states, dtype, self.shares.compare)

    def release(self, name: str) -> None:
        """Let the pages that a tensor came from leave this process."""
        made = self.shares.made[name]
        for source in (*made.sources, *made.replicas):
            self.states[source.rank].release(source.name)

    def check_whole(self, name: str) -> None:
        """See `LazyState.check_whole`."""
        made = self.shares.made[name]
        for source in (*made.sources, *made.replicas):
            self.states[source.rank].check_whole(source.name)

    def range_of(self, tensor: Tensor) -> tuple[Path, int] | None:
        """See `LazyState.range_of`."""
        found = (state.range_of(tensor) for state in self.states)
        return next((place for place in found if place is not None), None)

    def close(self) -> None:
        """Let go of the files."""
        for state in self.states:
            state.close()
