"""The complement of one decoded tensor: what its values do not tell about its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mapdsl.runtime.codecs.formats import DTYPE_BY_NAME, dtype_name


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


def as_many_as_all(payload: Tensor) -> int:
    """How many elements, kept with their positions, take as much as the whole payload."""
    return max(1, -(-payload.nbytes // (8 + payload.element_size())))


def choose_kept(payload: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`codes` and `where` of a `Kept` from the positions that do not come back, or None for too many to list.

    The whole payload is kept if that is less.
    """
    if where is None or len(where) >= as_many_as_all(payload):
        return payload.clone(memory_format=torch.contiguous_format), None
    if not len(where):  # nearly always; picking none costs as much as picking some
        return payload.new_empty(0), where
    return payload.flatten()[where].clone(), where


def _plain(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
