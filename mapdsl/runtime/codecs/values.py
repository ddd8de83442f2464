"""Codecs of one tensor without companions: another dtype, and the few changes of value that models need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Encoded, Slice, unflatten_index
from mapdsl.runtime.codecs.elements import MiniFloat, element_named
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING, FLOAT_DTYPES, as_bits, dtype_name, exact_cast
from mapdsl.runtime.codecs.kept import Kept, as_many_as_all, one_after_another
from mapdsl.runtime.codecs.storage import DTYPES, Storage
from mapdsl.runtime.codecs.strided import contiguous, contiguous_copy, copy_strided
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS, strips


class OneToOne(Codec):
    """A codec of one tensor without companions, whose every element is changed by itself."""

    @abstractmethod
    def change(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The logical values of stored ones."""

    def decode(
        self,
        key: str,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype = torch.bfloat16,
        *,
        out: Tensor | None = None,
        of: Slice | None = None,
    ) -> Tensor:
        """Element by element, in strips of rows."""
        self.check_working(key, dtype if out is None else out.dtype)
        stored = self.checked_parts(key, parts, of)["payload"]
        values = self.output(key, tuple(stored.shape), dtype, stored.device, out)
        if not values.is_meta:
            for some in strips(tuple(stored.shape), STRIP_ELEMENTS):
                copy_strided(values[some], self.change(stored[some], values.dtype))
        return values

    def stored_part(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The one part, checked."""
        self.check_working(key, dtype)
        return self.checked_parts(key, parts)["payload"]


class Cast(OneToOne):
    """`f32`, `bf16`, `f16`: the tensor has that dtype where it is stored, and the asked one when it is decoded.

    Casts round to nearest even and keep NaNs bit by bit, so that bf16 -> f32 -> bf16 is `bit`; a narrowing cast is
    `lossy`, and nothing is kept for it.
    """

    def __init__(self, name: str, dtype: str) -> None:
        self.bind(Storage(name, "cast", (DTYPES[dtype],)))

    def bind(self, storage: Storage) -> None:
        """See `Codec.bind`."""
        super().bind(storage)
        self.dtype = DTYPE_BY_SPELLING[storage.dtypes[0]]
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"codec {storage.name}: a cast is to f32, bf16 or f16")

    def change(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Round to `dtype`."""
        return exact_cast(stored, dtype)

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """Nothing but the dtype and shape."""
        stored = self.stored_part(key, parts, dtype)
        no_positions = torch.empty(0, dtype=torch.int64, device=stored.device)
        return Kept(self.name, dtype, tuple(stored.shape), stored.new_empty(0), no_positions)

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None, *, out: Tensor | None = None) -> Encoded:
        """Round to the codec's dtype; D403 where a finite value would become infinite."""
        tensor = tensor.detach()
        self.check_working(key, tensor.dtype)
        if kept is not None:
            self.check_kept(key, tensor, kept, tuple(tensor.shape))
        payload = self.memory(key, tuple(tensor.shape), self.dtype, tensor.device, out)
        narrows = torch.finfo(tensor.dtype).max > torch.finfo(self.dtype).max
        place = 0
        for some in strips(tuple(tensor.shape), STRIP_ELEMENTS) if not tensor.is_meta else ():
            stored = exact_cast(tensor[some], self.dtype)
            if narrows:
                wrong = stored.isinf() & ~tensor[some].isinf()
                refuse_where(self, key, tensor, wrong, f"overflows {dtype_name(self.dtype)}", place)
            copy_strided(payload[some], stored)
            place += stored.numel()
        return Encoded({self.payload(key): payload})


class Reversible(OneToOne):
    """A codec whose complement holds the stored elements that changing them and back does not give."""

    @abstractmethod
    def undo(self, logical: Tensor, dtype: torch.dtype) -> Tensor:
        """The stored values of logical ones, where the stored tensor had (or, written anew, is to have) a dtype."""

    @abstractmethod
    def cannot_store(self, logical: Tensor) -> tuple[Tensor, str]:
        """A mask of the values that cannot be stored, and what they do: `overflows f8e4m3`."""

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The stored elements that do not come back, or all of them if that is less."""
        stored = self.stored_part(key, parts, dtype)
        found = [(stored.new_empty(0), torch.empty(0, dtype=torch.int64, device=stored.device))]
        if not stored.is_meta:
            place, left = 0, as_many_as_all(stored.numel(), stored.dtype)
            for some in strips(tuple(stored.shape), STRIP_ELEMENTS):
                strip = stored[some].reshape(-1)
                again = self.undo(self.change(strip, dtype), stored.dtype)
                where = (as_bits(again) != as_bits(strip)).nonzero().flatten()
                found.append((as_bits(strip)[where].view(strip.dtype), where + place))
                place, left = place + len(strip), left - len(where)
                if left <= 0:
                    return Kept(self.name, dtype, tuple(stored.shape), contiguous_copy(stored), None)
        return Kept(self.name, dtype, tuple(stored.shape), *one_after_another(found))

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None, *, out: Tensor | None = None) -> Encoded:
        """The inverse, in the dtype that was read, else in the tensor's; D403 where the change cannot give a value."""
        tensor = tensor.detach()
        self.check_working(key, tensor.dtype)
        if kept is not None:
            self.check_kept(key, tensor, kept, tuple(tensor.shape))
            kept = kept.to(tensor.device).in_order()
        dtype = tensor.dtype if kept is None else kept.codes.dtype
        stored_dtype = self.undo(torch.empty(0, dtype=tensor.dtype, device="meta"), dtype).dtype
        payload = self.memory(key, tuple(tensor.shape), stored_dtype, tensor.device, out)
        edited = place = 0
        for some in strips(tuple(tensor.shape), STRIP_ELEMENTS) if not tensor.is_meta else ():
            strip = contiguous(tensor[some]).view(-1)
            refuse_where(self, key, tensor, *self.cannot_store(strip), place)
            stored = self.undo(strip, dtype)
            if kept is not None:
                stored, count = self._restored(stored, strip, place, kept)
                edited += count
            payload[some].copy_(stored.view(payload[some].shape))
            place += len(strip)
        return Encoded({self.payload(key): payload}, edited)

    def _restored(self, stored: Tensor, strip: Tensor, start: int, kept: Kept) -> tuple[Tensor, int]:
        """A strip's stored elements as they were kept, where those mean its values; and how many mean others."""
        if kept.where is None:
            back = kept.codes.reshape(-1)[start : start + len(strip)]
        else:
            first, last = torch.searchsorted(kept.where, kept.where.new_tensor([start, start + len(strip)])).tolist()
            back = stored.clone()
            as_bits(back)[kept.where[first:last] - start] = as_bits(kept.codes)[first:last]
        fits = self._means(back, strip, kept.dtype)
        stored = torch.where(fits, as_bits(back), as_bits(stored)).view(stored.dtype)
        return stored, int((~self._means(stored, strip, kept.dtype)).sum())

    def _means(self, stored: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask of stored elements that decode, in `dtype`, to what the tensor holds, bit by bit."""
        return as_bits(exact_cast(self.change(stored, dtype), tensor.dtype)) == as_bits(tensor)


class NarrowCast(Reversible):
    """`f8e4m3`, `f8e5m2`: stored in eight bits, without scales; any float once decoded, exactly.

    Rounds to nearest even; what the eight bits cannot reach is refused (D403), where torch would make it NaN or
    infinite. Of e5m2's NaNs those that would not be written are kept.
    """

    def __init__(self, name: str, dtype: str) -> None:
        self.bind(Storage(name, "cast", (DTYPES[dtype],)))

    def bind(self, storage: Storage) -> None:
        """See `Codec.bind`."""
        super().bind(storage)
        narrow = {DTYPES[word]: word for word in ("f8e4m3", "f8e5m2")}
        if storage.dtypes[0] not in narrow:
            raise ValueError(f"codec {storage.name}: a narrow cast is to {' or '.join(narrow.values())}")
        element = element_named(narrow[storage.dtypes[0]], "i8")
        assert isinstance(element, MiniFloat)
        self.element = element

    def change(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of the codes."""
        if stored.is_meta:
            return torch.empty_like(stored, dtype=dtype)
        return self.element.read(stored[..., None], self._one(stored), dtype)[..., 0]

    def undo(self, logical: Tensor, dtype: torch.dtype) -> Tensor:
        """The nearest codes."""
        if logical.is_meta:
            return torch.empty_like(logical, dtype=self.element.dtype)
        return self.element.write(logical[..., None], self._one(logical), self.element.dtype)[..., 0]

    def cannot_store(self, logical: Tensor) -> tuple[Tensor, str]:
        """What rounds to more than the largest code, and infinities that the format lacks."""
        sizes = logical.float().abs()
        beyond = sizes >= self.element.overflow if self.element.holds_inf else sizes > self.element.overflow
        return beyond & ~logical.isinf() | self.element.cannot_hold(logical), f"overflows {self.element.name}"

    def _one(self, tensor: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.float32, device=tensor.device)


class ValueChange(Reversible):
    """A change of every value, in a float tensor of whatever dtype; NaNs pass through bit by bit."""

    @abstractmethod
    def forward(self, stored: Tensor) -> Tensor:
        """Logical values, in float32."""

    @abstractmethod
    def inverse(self, logical: Tensor) -> Tensor:
        """Stored values, in float32."""

    def outside(self, logical: Tensor) -> Tensor:
        """A mask of the values that the change cannot give."""
        return torch.zeros_like(logical, dtype=torch.bool)

    def change(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The changed values, rounded once to `dtype`."""
        return _around_nans(stored, exact_cast(self.forward(stored), dtype))

    def undo(self, logical: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse, rounded once."""
        return _around_nans(logical, exact_cast(self.inverse(logical), dtype))

    def cannot_store(self, logical: Tensor) -> tuple[Tensor, str]:
        """Values that the change cannot give."""
        return self.outside(logical), f"is nothing that {self.name} can give"


class Add(ValueChange):
    """`add(1)`: logical = stored + amount, summed in float32 and rounded once (norms that are stored around zero)."""

    def __init__(self, name: str, amount: float) -> None:
        self.bind(Storage(name, "add", amount=amount))

    def forward(self, stored: Tensor) -> Tensor:
        """Stored + amount."""
        return stored.float() + self.storage.amount

    def inverse(self, logical: Tensor) -> Tensor:
        """Logical - amount."""
        return logical.float() - self.storage.amount


class NegExp(ValueChange):
    """`neg_exp`: logical = -exp(stored) (Mamba's `A_log`).

    Computed in float64, then rounded to float32: float32 exponentials differ by a bit between vectors and their tails
    and between devices, and what was kept on one machine has to fit on another.
    """

    def __init__(self, name: str) -> None:
        self.bind(Storage(name, "neg_exp"))

    def forward(self, stored: Tensor) -> Tensor:
        """-exp(stored)."""
        return -stored.double().exp().float()

    def inverse(self, logical: Tensor) -> Tensor:
        """log(-logical)."""
        return (-logical.double()).log().float()

    def outside(self, logical: Tensor) -> Tensor:
        """Positive values."""
        return logical > 0


def refuse_where(codec: Codec, key: str, tensor: Tensor, mask: Tensor, which: str, place: int) -> None:
    """D403 naming the first element of a mask, if there is one; it is over the elements from a flat place on."""
    if mask.any():
        place += int(mask.flatten().to(torch.uint8).argmax())
        codec.refuse_value(key, tensor, unflatten_index(place, tensor.shape), which)


def _around_nans(source: Tensor, result: Tensor) -> Tensor:
    """The result, with the source's NaNs in the result's dtype."""
    if source.is_meta:
        return result
    return torch.where(source.isnan(), exact_cast(source, result.dtype), result)
