"""Codecs of one tensor without companions: another dtype, and the few changes of value that models need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Encoded, StoredForm, unflatten_index
from mapdsl.runtime.codecs.formats import DTYPE_BY_NAME, FLOAT_DTYPES, as_bits, dtype_name, exact_cast
from mapdsl.runtime.codecs.kept import Kept, choose_kept
from mapdsl.runtime.errors import ConversionError


class Cast(Codec):
    """`f32`, `bf16`, `f16`: the tensor has that dtype where it is stored, and the asked one when it is decoded.

    Casts round to nearest even and keep NaNs bit by bit, so that bf16 -> f32 -> bf16 is `bit`; a narrowing cast is
    `lossy`, and nothing is kept for it.
    """

    def __init__(self, name: str, dtype: str) -> None:
        super().__init__(name)
        self.dtype = DTYPE_BY_NAME[dtype]
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"codec {name}: a cast is to f32, bf16 or f16")

    def claims(self, key: str, dtype: torch.dtype) -> bool:
        """By dtype."""
        return dtype == self.dtype

    def stored(self, key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, StoredForm]:
        """The same shape, in the codec's dtype."""
        return {self.payload(key): (self.dtype, tuple(shape))}

    def logical_shape(self, payload_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same."""
        return tuple(payload_shape)

    def decode(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Round to `dtype`."""
        return exact_cast(self._checked(key, parts, dtype), dtype).clone()

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """Nothing but the dtype and shape."""
        stored = self._checked(key, parts, dtype)
        no_positions = torch.empty(0, dtype=torch.int64, device=stored.device)
        return Kept(self.name, dtype, tuple(stored.shape), stored.new_empty(0), no_positions)

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None) -> Encoded:
        """Round to the codec's dtype; D403 where a finite value would become infinite."""
        tensor = tensor.detach()
        self.check_working(key, tensor.dtype)
        if kept is not None:
            self.check_kept(key, tensor, kept, tuple(tensor.shape))
        stored = exact_cast(tensor, self.dtype)
        if not tensor.is_meta and torch.finfo(tensor.dtype).max > torch.finfo(self.dtype).max:
            refuse_where(self, key, tensor, stored.isinf() & ~tensor.isinf(), f"overflows {dtype_name(self.dtype)}")
        return Encoded({self.payload(key): stored.clone()})

    def _checked(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        self.check_working(key, dtype)
        stored = self.part(key, parts, self.payload(key))
        if stored.dtype != self.dtype:
            found, expected = dtype_name(stored.dtype), dtype_name(self.dtype)
            raise ConversionError("C504", f"{self.payload(key)} is {found}, the map says {expected}")
        return stored


class ValueChange(Codec):
    """A change of every value, in a float tensor of whatever dtype; NaNs pass through bit by bit.

    The complement holds the stored elements that the change and its inverse, both rounded, do not give back.
    """

    @abstractmethod
    def forward(self, stored: Tensor) -> Tensor:
        """Logical values, in float32."""

    @abstractmethod
    def inverse(self, logical: Tensor) -> Tensor:
        """Stored values, in float32."""

    def outside(self, logical: Tensor) -> Tensor:
        """A mask of the values that the change cannot give."""
        return torch.zeros_like(logical, dtype=torch.bool)

    def claims(self, key: str, dtype: torch.dtype) -> bool:
        """Any float of 16 bits or more."""
        return dtype in FLOAT_DTYPES

    def stored(self, key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, StoredForm]:
        """The same shape and dtype."""
        return {self.payload(key): (dtype, tuple(shape))}

    def logical_shape(self, payload_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same."""
        return tuple(payload_shape)

    def decode(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The changed values, rounded once to `dtype`."""
        return self._apply(self._checked(key, parts, dtype), dtype)

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The stored elements that do not come back, or all of them if that is less."""
        stored = self._checked(key, parts, dtype)
        where = torch.empty(0, dtype=torch.int64, device=stored.device)
        if not stored.is_meta:
            again = self._undo(self._apply(stored, dtype), stored.dtype)
            where = (as_bits(again) != as_bits(stored)).flatten().nonzero().flatten()
        return Kept(self.name, dtype, tuple(stored.shape), *choose_kept(stored, where))

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None) -> Encoded:
        """The inverse, in the dtype that was read, else in the tensor's; D403 where the change cannot give a value."""
        tensor = tensor.detach().contiguous()
        self.check_working(key, tensor.dtype)
        if kept is not None:
            self.check_kept(key, tensor, kept, tuple(tensor.shape))
        stored = self._undo(tensor, tensor.dtype if kept is None else kept.codes.dtype)
        if tensor.is_meta:
            return Encoded({self.payload(key): stored})
        refuse_where(self, key, tensor, self.outside(tensor), f"is nothing that {self.name} can give")
        if kept is None:
            return Encoded({self.payload(key): stored})
        back = self._kept_everywhere(stored, kept.to(tensor.device))
        fits = self._means(back, tensor, kept.dtype)
        stored = torch.where(fits, back, stored)
        edited = ~self._means(stored, tensor, kept.dtype)
        return Encoded({self.payload(key): stored}, int(edited.sum()))

    def _means(self, stored: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask of stored elements that decode, in `dtype`, to what the tensor holds, bit by bit."""
        return as_bits(exact_cast(self._apply(stored, dtype), tensor.dtype)) == as_bits(tensor)

    def _kept_everywhere(self, stored: Tensor, kept: Kept) -> Tensor:
        if kept.where is None:
            return kept.codes
        back = stored.clone()
        as_bits(back).view(-1)[kept.where] = as_bits(kept.codes)
        return back

    def _apply(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return _around_nans(stored, exact_cast(self.forward(stored), dtype))

    def _undo(self, logical: Tensor, dtype: torch.dtype) -> Tensor:
        return _around_nans(logical, exact_cast(self.inverse(logical), dtype))

    def _checked(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        self.check_working(key, dtype)
        stored = self.part(key, parts, self.payload(key))
        if stored.dtype not in FLOAT_DTYPES:
            found = dtype_name(stored.dtype)
            raise ConversionError("C504", f"{self.payload(key)} is {found}, {self.name} is for floats")
        return stored.contiguous()


class Add(ValueChange):
    """`add(1)`: logical = stored + amount, summed in float32 and rounded once (norms that are stored around zero)."""

    def __init__(self, name: str, amount: float) -> None:
        super().__init__(name)
        self.amount = amount

    def forward(self, stored: Tensor) -> Tensor:
        """Stored + amount."""
        return stored.float() + self.amount

    def inverse(self, logical: Tensor) -> Tensor:
        """Logical - amount."""
        return logical.float() - self.amount


class NegExp(ValueChange):
    """`neg_exp`: logical = -exp(stored) (Mamba's `A_log`).

    Computed in float64, then rounded to float32: float32 exponentials differ by a bit between vectors and their tails
    and between devices, and what was kept on one machine has to fit on another.
    """

    def forward(self, stored: Tensor) -> Tensor:
        """-exp(stored)."""
        return -stored.double().exp().float()

    def inverse(self, logical: Tensor) -> Tensor:
        """log(-logical)."""
        return (-logical.double()).log().float()

    def outside(self, logical: Tensor) -> Tensor:
        """Positive values."""
        return logical > 0


def refuse_where(codec: Codec, key: str, tensor: Tensor, mask: Tensor, what: str) -> None:
    """D403 naming the first element of a mask, if there is one."""
    if mask.any():
        place = int(mask.flatten().to(torch.uint8).argmax())
        found = f"element {unflatten_index(place, tensor.shape)} is {tensor.flatten()[place].item()}"
        raise ConversionError("D403", f"{codec.payload(key)}: {found}, which {what}")


def _around_nans(source: Tensor, result: Tensor) -> Tensor:
    """The result, with the source's NaNs in the result's dtype."""
    if source.is_meta:
        return result
    return torch.where(source.isnan(), exact_cast(source, result.dtype), result)
