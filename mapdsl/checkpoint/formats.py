"""How the tensors of one operand of a rule may be stored, and what of it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.runtime.codecs.storage import Parts, Shape, fill_template

Forms = tuple["tuple[str, Shape] | None", ...]
"""Dtype and shape of each part that a tensor may have; None for one that is not there."""


@dataclass(frozen=True)
class Formats:
    """The alternatives of an operand, and the parts that a tensor may have under any of them."""

    codecs: tuple[AnyCodec, ...]
    parts: Parts

    def is_there(self, name: str, stored: Mapping[str, StoredTensor]) -> bool:
        """Whether one of the payloads that a tensor may have is."""
        return any(fill_template(payload, name) in stored for payload in self.parts.payloads)

    def forms(self, name: str, stored: Mapping[str, StoredTensor]) -> Forms:
        """What there is to be seen of a tensor: those with the same forms differ in their names only."""
        found = map(stored.get, self.parts.names(name))
        return tuple([None if part is None else (part.dtype, part.shape) for part in found])

    def claiming(self, name: str, stored: Mapping[str, StoredTensor]) -> list[AnyCodec]:
        """The codecs that may store a payload so, going by its dtype."""
        payloads = [(codec, stored.get(codec.names(name)[0])) for codec in self.codecs if codec.kind != "raw"]
        return [codec for codec, payload in payloads if payload is not None and codec.claims(payload.dtype)]
