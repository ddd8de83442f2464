"""Putting tensors out: encoded as asked, as they were read, or as the map says first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Alternatives, Complement, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.take import AS_IS

Sink = Callable[[str, Tensor], None]


class Put:
    """Hands finished tensors to `sink`, each name once.

    `quantization` decides among the alternatives of a stored tensor: True takes what reading found, else the first;
    False takes `raw` where the map allows it.
    """

    def __init__(
        self,
        sink: Sink,
        read_back: Callable[[str], Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        quantization: bool = True,
        complement: Complement | None = None,
    ) -> None:
        self.sink = sink
        self.read_back = read_back
        self.dtype = dtype
        self.quantization = quantization
        self.complement = complement if complement is not None else Complement()
        self._names: set[str] = set()

    def __call__(self, name: str, tensor: Tensor | None, stored: Alternatives = AS_IS) -> None:
        """Put a tensor under a name; None (an absent tensor) puts nothing."""
        if tensor is None:
            return
        codec = self.alternative(name, stored)
        if isinstance(codec, Raw):
            self._out(name, tensor)
            return
        entry = self.complement.entries.get(name)
        kept = entry[1] if entry is not None and entry[0] == codec.name else None
        encoded = codec.encode(name, tensor, kept)
        if encoded.edited:
            self.complement.edited[name] = encoded.edited
        for part, value in encoded.parts.items():
            self._out(part, value)

    def part(self, name: str, view: Tensor, stored: Alternatives = AS_IS) -> None:
        """Put a piece of a larger tensor: it gets memory of its own."""
        if self.alternative(name, stored) is RAW:
            view = view.clone(memory_format=torch.contiguous_format)
        self(name, view, stored)

    def full(self, name: str, shape: tuple[int, ...], value: float, stored: Alternatives = AS_IS) -> None:
        """Put a constant tensor."""
        self(name, torch.full(shape, value, dtype=self.dtype), stored)

    def tie(self, name: str, other: str) -> None:
        """Put a tensor that equals one put before."""
        if other in self._names:
            self._out(name, self.read_back(other))

    def alternative(self, name: str, stored: Alternatives) -> Codec | Raw:
        """The format that a tensor is written in."""
        if len(stored) == 1:
            return stored[0]
        if not self.quantization and RAW in stored:
            return RAW
        if (entry := self.complement.entries.get(name)) is not None:
            return next((codec for codec in stored if codec.name == entry[0]), stored[0])
        return stored[0]

    def _out(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise ConversionError("R604", f"{name} is put out twice")
        self._names.add(name)
        self.sink(name, tensor)
