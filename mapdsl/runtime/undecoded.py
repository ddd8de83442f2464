"""A tensor in its stored form, for rules that have one codec on both sides: it moves without being decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec


class Undecoded:
    """Payload and companions of one tensor, moved together.

    It has those methods of a tensor that leave the last two dimensions alone: there the stored parts have sizes of
    their own (packed elements, one scale a block), in the dimensions before them all parts agree.
    """

    def __init__(self, codec: Codec, parts: tuple[Tensor, ...]) -> None:
        self.codec = codec
        self.parts = parts

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded tensor."""
        return self.codec.logical_shape(tuple(self.parts[0].shape))

    @property
    def dtype(self) -> tuple[torch.dtype, ...]:
        """The dtypes of all parts."""
        return tuple(part.dtype for part in self.parts)

    @property
    def is_meta(self) -> bool:
        """Whether the parts have no data."""
        return self.parts[0].is_meta

    def new_empty(self, *shape: int) -> Undecoded:
        """Memory for a tensor of another logical shape whose last two dimensions are the same."""
        parts = (torch.empty((*shape[:-2], *p.shape[-2:]), dtype=p.dtype, device=p.device) for p in self.parts)
        return Undecoded(self.codec, tuple(parts))

    def copy_(self, other: Undecoded) -> Undecoded:
        """Copy every part from its counterpart."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_(theirs)
        return self

    def contiguous_clone(self) -> Undecoded:
        """A copy in memory of its own."""
        return self._each(lambda part: part.clone(memory_format=torch.contiguous_format))

    def __getitem__(self, place: Any) -> Undecoded:
        return self._each(lambda part: part[place])

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> Undecoded:
        """As of tensors."""
        return self._each(lambda part: part.unflatten(dim, sizes))

    def flatten(self, start: int, end: int) -> Undecoded:
        """As of tensors."""
        return self._each(lambda part: part.flatten(start, end))

    def narrow(self, dim: int, start: int, length: int) -> Undecoded:
        """As of tensors."""
        return self._each(lambda part: part.narrow(dim, start, length))

    def unsqueeze(self, dim: int) -> Undecoded:
        """As of tensors."""
        return self._each(lambda part: part.unsqueeze(dim))

    def permute(self, *dims: int) -> Undecoded:
        """As of tensors."""
        return self._each(lambda part: part.permute(*dims))

    def _each(self, change: Any) -> Undecoded:
        return Undecoded(self.codec, tuple(change(part) for part in self.parts))
