"""The complement of one decoded tensor: what its values do not tell about its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mapdsl.runtime.codecs.formats import DTYPE_BY_NAME, as_bits, dtype_name


@dataclass(frozen=True)
class Kept:
    """Companions as stored, and the stored elements that decoding and encoding again would not reproduce.

    `codec` is the map's name for the codec, `dtype` the one that was decoded to, `shape` the logical shape. `codes` are
    stored elements at the flat positions `where` (int64) of the payload, or the whole payload where `where` is None.
    """

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    codes: Tensor
    where: Tensor | None
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that the complement takes."""
        tensors = [self.codes, *self.parts.values()] + ([] if self.where is None else [self.where])
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device) -> Kept:
        """The same on another device."""
        where = None if self.where is None else self.where.to(device)
        parts = {role: part.to(device) for role, part in self.parts.items()}
        return replace(self, codes=self.codes.to(device), where=where, parts=parts)

    def in_order(self) -> Kept:
        """The same with ascending positions: those of a side file may come in any order."""
        if self.where is None or self.where.is_meta or bool((self.where[1:] >= self.where[:-1]).all()):
            return self
        order = self.where.argsort(stable=True)
        return replace(self, where=self.where[order], codes=as_bits(self.codes)[order].view(self.codes.dtype))

    def lies_in(self, payload_shape: tuple[int, ...]) -> bool:
        """Whether positions and elements agree in number and lie in the payload: a side file may be damaged."""
        if self.where is None:
            return tuple(self.codes.shape) == payload_shape
        if self.where.dtype != torch.int64 or self.where.ndim != 1 or self.where.shape != self.codes.shape:
            return False
        if self.where.is_meta or not len(self.where):
            return True
        return bool(self.where.min() >= 0 and self.where.max() < torch.Size(payload_shape).numel())

    def to_tensors(self) -> dict[str, Tensor]:
        """What to store in a safetensors file: bytes for the dtypes that older readers do not know."""
        tensors = {f"part.{role}": _plain(part) for role, part in self.parts.items()}
        tensors["codes"] = _plain(self.codes)
        if self.where is not None:
            tensors["where"] = self.where
        return tensors

    def to_meta(self) -> dict[str, Any]:
        """What to store beside the tensors, as JSON."""
        return {
            "codec": self.codec,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
            "codes": dtype_name(self.codes.dtype),
            "parts": {role: dtype_name(part.dtype) for role, part in self.parts.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Kept:
        """The inverse of `to_tensors` and `to_meta`; KeyError where one of them lacks something."""
        return cls(
            codec=meta["codec"],
            dtype=DTYPE_BY_NAME[meta["dtype"]],
            shape=tuple(meta["shape"]),
            codes=tensors["codes"].view(DTYPE_BY_NAME[meta["codes"]]),
            where=tensors.get("where"),
            parts={role: tensors[f"part.{role}"].view(DTYPE_BY_NAME[word]) for role, word in meta["parts"].items()},
        )


def as_many_as_all(elements: int, dtype: torch.dtype) -> int:
    """How many of a payload's elements, kept with their positions, take as much as all of it."""
    return max(1, -(-elements * dtype.itemsize // (8 + dtype.itemsize)))


def side_by_side(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Codes and ascending positions, of several such as one."""
    if len(pieces) == 1:
        return pieces[0]
    where, order = torch.cat([positions for _, positions in pieces]).sort()
    return torch.cat([as_bits(codes) for codes, _ in pieces])[order].view(pieces[0][0].dtype), where


def one_after_another(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Codes and positions of all pieces, one after another; the list is emptied, so that no more memory is held."""
    total = sum(len(where) for _, where in pieces)
    codes, where = (part.new_empty(total) for part in pieces[0])
    while pieces:
        some, positions = pieces.pop()
        total -= len(positions)
        codes[total : total + len(some)].copy_(some)
        where[total : total + len(some)] = positions
    return codes, where


def _plain(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
