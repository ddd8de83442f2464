"""What a codec is: a way to store a tensor, alone or with companions beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mapdsl.runtime.codecs.formats import FLOAT_DTYPES, dtype_name
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.errors import ConversionError

StoredForm = tuple[torch.dtype, tuple[int, ...]]


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

    def __init__(self, name: str, templates: Mapping[str, str] | None = None, payload: str = "{key}") -> None:
        self.name = name
        self._templates = dict(templates or {})
        self._payload = payload

    def companions(self, key: str) -> dict[str, str]:
        """Stored names of the tensors beside the payload, by role: `{"scale": "layers.0.w1.scale"}`."""
        return {role: fill_template(template, key) for role, template in self._templates.items()}

    def payload(self, key: str) -> str:
        """Stored name of the payload: the key itself unless the codec declares another."""
        return fill_template(self._payload, key)

    def names(self, key: str) -> list[str]:
        """Every stored name of the tensor, payload first."""
        return [self.payload(key), *self.companions(key).values()]

    def recognises(self, key: str, dtype: torch.dtype, holds: Callable[[str], bool]) -> bool:
        """Whether a payload of this dtype, in a checkpoint that `holds` names, is stored this way."""
        return self.claims(key, dtype) and all(holds(name) for name in self.companions(key).values())

    @abstractmethod
    def claims(self, key: str, dtype: torch.dtype) -> bool:
        """Whether a payload may have this dtype; where it may and `recognises` says no, a companion is missing."""

    @abstractmethod
    def stored(self, key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, StoredForm]:
        """Dtype and shape of every part by stored name, as written anew from a logical tensor of this shape and dtype.

        Raises `ConversionError`: D401 where the codec does not fit the shape.
        """

    @abstractmethod
    def logical_shape(self, payload_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the decoded tensor."""

    @abstractmethod
    def decode(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The logical tensor, of a float `dtype`, in memory of its own.

        Raises `ConversionError`, naming the stored tensor: R605 missing, R606 wrong shape, C504 wrong dtype.
        """

    @abstractmethod
    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The complement: with it `encode` gives these bytes back for the tensor that `decode` gives; same errors."""

    @abstractmethod
    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None) -> Encoded:
        """The stored parts of a logical tensor, unedited blocks as they were kept.

        Raises `ConversionError`: R607 where `kept` is of another tensor, D403 for a value that the format cannot hold,
        D401 where the codec does not fit the shape.
        """

    def part(self, key: str, parts: Mapping[str, Tensor], name: str) -> Tensor:
        """One part by its stored name; R605 names it where it is missing."""
        found = parts.get(name)
        if found is None:
            raise ConversionError(
                "R605", f"{name} is missing: {self.payload(key)} is stored as {self.name} and needs it"
            )
        return found.detach()

    def check_kept(self, key: str, tensor: Tensor, kept: Kept, payload_shape: tuple[int, ...]) -> None:
        """R607 unless the complement was made by this codec from a tensor of this shape."""
        payload = self.payload(key)
        if kept.codec != self.name:
            raise ConversionError("R607", f"{payload}: the complement is of codec {kept.codec}, not {self.name}")
        if kept.shape != tuple(tensor.shape):
            found, expected = list(kept.shape), list(tensor.shape)
            raise ConversionError("R607", f"{payload}: the complement is of shape {found}, the tensor of {expected}")
        if not self.claims(key, kept.codes.dtype):
            raise ConversionError("R607", f"{payload}: the complement is of {dtype_name(kept.codes.dtype)} elements")
        if not kept.lies_in(payload_shape):
            raise ConversionError("R607", f"{payload}: the complement is damaged, its elements lie outside the tensor")

    def check_working(self, key: str, dtype: torch.dtype) -> None:
        """C504 unless logical tensors may have this dtype."""
        if dtype not in FLOAT_DTYPES:
            words = ", ".join(dtype_name(one) for one in FLOAT_DTYPES)
            raise ConversionError(
                "C504", f"{self.payload(key)}: {self.name} decodes to {words}, not {dtype_name(dtype)}"
            )


def fill_template(template: str, key: str) -> str:
    """A stored name: `{key}` is the tensor's, `{stem}` that without its last segment; no dot follows an empty stem."""
    stem, dot, _ = key.rpartition(".")
    if not dot:
        template = template.replace("{stem}.", "{stem}")
    return template.replace("{stem}", stem).replace("{key}", key)


def unflatten_index(place: int, shape: tuple[int, ...]) -> list[int]:
    """The index of a flat position, for messages."""
    index = []
    for size in reversed(shape):
        place, axis = divmod(place, size)
        index.append(axis)
    return index[::-1]
