"""What a codec is: a way to store a tensor, alone or with companions beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING, FLOAT_DTYPES, dtype_name, is_finite
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.memory import fresh
from mapdsl.runtime.codecs.storage import Box, Storage
from mapdsl.runtime.errors import ConversionError

StoredForm = tuple[torch.dtype, tuple[int, ...]]


class Slice(NamedTuple):
    """A slice of a logical tensor: its whole shape, and start and stop in each dimension."""

    shape: tuple[int, ...]
    box: Box

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the slice."""
        return tuple(stop - start for start, stop in self.box)


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is to be stored.

    `parts` holds payload and companions by stored name; `edited` counts the blocks that were encoded anew although
    something was kept for them (in codecs without blocks: elements that the stored form cannot hold exactly).
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    edited: int = 0


class Codec(ABC):
    """A storage format of one tensor, as declared by `codec NAME = KIND(...)`.

    Mappings of parts are keyed by stored names, so that a whole state dict may be given, and one be updated with them.
    Everything works on any device; of `meta` tensors shapes and dtypes are checked and results are `meta`.
    """

    storage: Storage
    name: str

    def bind(self, storage: Storage) -> None:
        """Make this the codec of what a format stores; constructors end here."""
        self.storage = storage
        self.name = storage.name

    def companions(self, key: str) -> dict[str, str]:
        """Stored names of the tensors beside the payload, by role: `{"scale": "layers.0.w1.scale"}`."""
        names = self.storage.part_names(key)
        return {role: name for role, name in names.items() if role != "payload"}

    def payload(self, key: str) -> str:
        """Stored name of the payload: the key itself unless the codec declares another."""
        return self.storage.part_names(key)["payload"]

    def names(self, key: str) -> list[str]:
        """Every stored name of the tensor, payload first."""
        return self.storage.names(key)

    def recognises(self, key: str, dtype: torch.dtype, holds: Callable[[str], bool]) -> bool:
        """Whether a payload of this dtype, in a checkpoint that `holds` names, is stored this way."""
        return self.claims(key, dtype) and all(holds(name) for name in self.companions(key).values())

    def claims(self, key: str, dtype: torch.dtype) -> bool:
        """Whether a payload may have this dtype; where it may and `recognises` says no, a companion is missing."""
        accepted = self.storage.payload_dtypes
        return dtype in FLOAT_DTYPES if not accepted else dtype in {DTYPE_BY_SPELLING[word] for word in accepted}

    def stored(self, key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, StoredForm]:
        """Dtype and shape of every part by stored name, as written anew from a logical tensor of this shape and dtype.

        Raises `ConversionError`: D401 where the codec does not fit the shape.
        """
        self.check_fit(key, shape)
        forms = {}
        for part in self.storage.stored(key, tuple(shape)):
            assert part.shape is not None
            forms[part.name] = (DTYPE_BY_SPELLING[part.dtypes[0]] if part.dtypes else dtype, part.shape)
        return forms

    def logical_shape(self, payload_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the decoded tensor."""
        return self.storage.logical_shape(tuple(payload_shape))

    def cut(self, key: str, of: Slice) -> dict[str, Box]:
        """Which part of each stored tensor, by name, holds a slice: start and stop in each of its dimensions.

        Any slice will do; it need not begin or end where blocks and packed words do. `decode` takes the parts so cut.
        """
        names = self.storage.part_names(key)
        return {names[role]: box for role, box in self.storage.cut(tuple(of.shape), of.box).items()}

    @abstractmethod
    def decode(
        self,
        key: str,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype = torch.bfloat16,
        *,
        out: Tensor | None = None,
        of: Slice | None = None,
    ) -> Tensor:
        """The logical tensor, of a float `dtype`, in memory of its own or written to `out`, whose dtype is then used.

        `out` may be any view of the right shape whose elements each have a place of their own. With `of` the parts are
        those that `cut` names, and a slice is given.
        Raises `ConversionError`, naming the stored tensor: R605 missing, R606 wrong shape, C504 wrong dtype, R608 not
        finite.
        """

    @abstractmethod
    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The complement: with it `encode` gives these bytes back for the tensor that `decode` gives; same errors."""

    @abstractmethod
    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None, *, out: Tensor | None = None) -> Encoded:
        """The stored parts of a logical tensor, unedited blocks as they were kept.

        The payload is in memory of its own, or in `out`, contiguous, of its shape and dtype; after an error `out` may
        hold anything.
        Raises `ConversionError`: R607 where `kept` is of another tensor, D403 for a value that the format cannot hold,
        D401 where the codec does not fit the shape, D406 where the format can be read only and nothing was kept.
        """

    def part(self, key: str, parts: Mapping[str, Tensor], name: str) -> Tensor:
        """One part by its stored name; R605 names it where it is missing."""
        found = parts.get(name)
        if found is None:
            raise ConversionError(
                "R605", f"{name} is missing: {self.payload(key)} is stored as {self.name} and needs it"
            )
        return found.detach()

    def checked_parts(self, key: str, parts: Mapping[str, Tensor], of: Slice | None = None) -> dict[str, Tensor]:
        """All parts by role, each there, of a dtype that the codec reads and of the right shape."""
        named = {role: self.part(key, parts, name) for role, name in self.storage.part_names(key).items()}
        payload = named["payload"]
        for role, accepted in self.storage.part_dtypes().items():
            self._check_dtype(key, role, named[role].dtype, accepted)
        if payload.ndim < self.storage.needs_payload_dimensions():
            found = f"{self.payload(key)} has shape {list(payload.shape)}"
            raise ConversionError("R606", f"{found}, too few dimensions for a tensor stored as {self.name}")
        if of is None:
            shape = self.logical_shape(tuple(payload.shape))
            expected = self.storage.part_shapes(shape)
        else:
            shape = of.sizes
            boxes = self.storage.cut(tuple(of.shape), of.box)
            expected = {role: tuple(stop - start for start, stop in box) for role, box in boxes.items()}
        for role, tensor in named.items():
            if tuple(tensor.shape) != expected[role]:
                found = f"{self.storage.part_names(key)[role]} has shape {list(tensor.shape)}"
                what = f"{self.payload(key)} of {list(shape)}, stored as {self.name}, needs {list(expected[role])}"
                raise ConversionError("R606", f"{found}, {what}")
            if role in ("scale", "global") and not is_finite(tensor):
                what = f"holds a value that is not finite, so {self.payload(key)} has none"
                raise ConversionError("R608", f"{self.storage.part_names(key)[role]} {what}")
        self._check_stated_shape(key, named, shape if of is None else tuple(of.shape))
        return named

    def _check_stated_shape(self, key: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """R606 where a companion states a logical shape that the payload does not have."""
        stated = parts.get("shape")
        if stated is not None and not stated.is_meta and stated.tolist() != list(shape):
            name, payload = self.storage.part_names(key)["shape"], self.payload(key)
            raise ConversionError("R606", f"{name} states the shape {stated.tolist()}, {payload} has {list(shape)}")

    def _check_dtype(self, key: str, role: str, found: torch.dtype, accepted: tuple[str, ...]) -> None:
        dtypes = [DTYPE_BY_SPELLING[word] for word in accepted] or list(FLOAT_DTYPES)
        if found not in dtypes:
            words = "|".join(dtype_name(one) for one in dtypes)
            name = self.storage.part_names(key)[role]
            raise ConversionError("C504", f"{name} is {dtype_name(found)}, the map says {words}")

    def check_fit(self, key: str, shape: tuple[int, ...]) -> None:
        """D401 unless a tensor of this shape can be stored so."""
        problem = self.storage.unfit(tuple(shape))
        if problem is not None:
            raise ConversionError("D401", f"{self.payload(key)}: {problem}")

    def output(
        self, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, out: Tensor | None
    ) -> Tensor:
        """The tensor to decode to: `out`, if it has the right shape and device, else new memory."""
        if out is None:
            return fresh(shape, dtype, device)
        if tuple(out.shape) != tuple(shape) or out.device != device:
            found, expected = f"{list(out.shape)} on {out.device}", f"{list(shape)} on {device}"
            raise ConversionError("R606", f"{self.payload(key)}: `out` is {found}, the tensor {expected}")
        if 0 in out.stride() and any(size > 1 and not step for size, step in zip(out.shape, out.stride(), strict=True)):
            raise ConversionError("R606", f"{self.payload(key)}: `out` has one place for several elements")
        return out

    def memory(
        self, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, out: Tensor | None
    ) -> Tensor:
        """Memory for a payload: `out`, if it is as the payload has to be, else new memory."""
        if out is None:
            return fresh(shape, dtype, device)
        if (tuple(out.shape), out.dtype, out.device) != (tuple(shape), dtype, device) or not out.is_contiguous():
            found, expected = f"{list(out.shape)} {dtype_name(out.dtype)}", f"{list(shape)} {dtype_name(dtype)}"
            raise ConversionError("R606", f"{self.payload(key)}: `out` is {found}, the payload {expected}, contiguous")
        return out

    def check_kept(
        self,
        key: str,
        tensor: Tensor,
        kept: Kept,
        payload_shape: tuple[int, ...],
        code_dtype: torch.dtype | None = None,
    ) -> None:
        """R607 unless the complement was made by this codec from a tensor of this shape."""
        payload = self.payload(key)
        if kept.codec != self.name:
            raise ConversionError("R607", f"{payload}: the complement is of codec {kept.codec}, not {self.name}")
        if kept.shape != tuple(tensor.shape):
            found, expected = list(kept.shape), list(tensor.shape)
            raise ConversionError("R607", f"{payload}: the complement is of shape {found}, the tensor of {expected}")
        if kept.codes.dtype != code_dtype if code_dtype else not self.claims(key, kept.codes.dtype):
            raise ConversionError("R607", f"{payload}: the complement is of {dtype_name(kept.codes.dtype)} elements")
        if not kept.lies_in(payload_shape):
            raise ConversionError("R607", f"{payload}: the complement is damaged, its elements lie outside the tensor")

    def refuse_value(self, key: str, tensor: Tensor, index: list[int], which: str) -> NoReturn:
        """D403 for one value of a tensor, which a format `cannot hold` or the like."""
        found = f"element {index} is {tensor[tuple(index)].item()}"
        raise ConversionError("D403", f"{self.payload(key)}: {found}, which {which}")

    def check_working(self, key: str, dtype: torch.dtype) -> None:
        """C504 unless logical tensors may have this dtype."""
        if dtype not in FLOAT_DTYPES:
            words = ", ".join(dtype_name(one) for one in FLOAT_DTYPES)
            raise ConversionError(
                "C504", f"{self.payload(key)}: {self.name} decodes to {words}, not {dtype_name(dtype)}"
            )


def unflatten_index(place: int, shape: tuple[int, ...]) -> list[int]:
    """The index of a flat position, for messages."""
    index = []
    for size in reversed(shape):
        place, axis = divmod(place, size)
        index.append(axis)
    return index[::-1]
