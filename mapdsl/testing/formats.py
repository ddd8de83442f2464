"""Formats of a rule's tensors: which fit a shape, which dtypes they claim, what a round trip through them promises."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from mapdsl.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.compiler.ir import QUANTISED
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.packed_int import PackedInt
from mapdsl.runtime.codecs.values import Add, Cast, NarrowCast, NegExp
from mapdsl.testing.bits import FLOATS, PLAIN_DTYPES
from mapdsl.testing.configs import ContradictionError


@dataclass(frozen=True)
class Formats:
    """The formats of a match as seen from one side: those chosen here, and the alternatives of each tensor there.

    With `encodes` the other side is written in its first formats, without as it is where the map allows that.
    """

    side: str
    chosen: list[AnyCodec | None]
    here: list[list[AnyCodec]]
    across: list[list[AnyCodec]]
    encodes: bool

    @property
    def undecoded(self) -> AnyCodec | None:
        """The format in which the tensors move as they are stored: one that both sides have.

        Of several formats the other side takes the decoded tensors, as they are where it may.
        """
        first = next(iter(self.chosen), None)
        if not self.across or any(codec != first for codec in self.chosen):
            return self._taken_decoded
        return first if all(first in codecs for codecs in self.across) else None

    @property
    def _taken_decoded(self) -> AnyCodec | None:
        """`raw`, if the other side stores what is read in several formats so."""
        if self.side != "left" or not self.across or not all(holds_raw(codecs) for codecs in self.across):
            return None
        if any(codec is None or codec.kind not in ("raw", *QUANTISED) for codec in self.chosen):
            return None
        return next(codec for codec in self.across[0] if codec.kind == "raw")

    @property
    def unpacked(self) -> bool:
        """Whether writing without quantization decodes what would move as it is, so that it comes back plain."""
        moves = self.undecoded is not None and self.undecoded.kind != "raw"
        return self.side == "right" and moves and any(holds_raw(codecs) for codecs in self.across)

    @property
    def must_encode(self) -> bool:
        """Whether writing the other side encodes values, so that they must be such as its formats can hold."""
        return self.undecoded is None and any(c and (self.encodes or not holds_raw(c)) for c in self.across)

    def base_dtype(self, decoded: torch.dtype, rng: Random) -> torch.dtype:
        """The dtype of the match's plain tensors: one for all, since they may be joined on the other side."""
        coded = self._coded
        if self.side == "left" and any(self.across) and self.undecoded is None:
            # Reading notes the dtype of what it encodes, so that any comes back; beside others it is theirs.
            return self._passes_in(coded[0], decoded) if coded else rng.choice(FLOATS)
        if coded or self.must_encode:
            return decoded
        codecs = [codec for tensor in (*self.here, *self.across) for codec in tensor]
        free = [dtype for dtype in PLAIN_DTYPES if not any(claims(codec, dtype) for codec in codecs)]
        if not free:
            raise ContradictionError("no dtype is left for a plain tensor")
        return rng.choice([*free, *(dtype for dtype in free if dtype in FLOATS)])

    def is_exact(self, decoded: torch.dtype, base: torch.dtype) -> bool:
        """Whether a trip from this side and back promises every byte."""
        if self.undecoded is not None:
            return not self.unpacked
        coded = self._coded
        if any(codec.kind == "cast" and not _holds(self._passes_in(codec, decoded), codec) for codec in coded):
            return False
        if self.side == "left":
            return all(not c or casts_back(c[0], base) for c in self.across)
        if coded or any(self.here):
            return len(coded) == len(self.chosen) and all(self._is_cast_back(codec) for codec in coded)
        return all(not c or holds_raw(c) or casts_back(c[0], base) for c in self.across)

    @property
    def _coded(self) -> list[AnyCodec]:
        """The formats chosen, without tensors that are stored as they are."""
        return [codec for codec in self.chosen if codec is not None and codec.kind != "raw"]

    def _target(self, codec: AnyCodec) -> AnyCodec | None:
        """The format that a tensor of this one gets on the other side, if that is the same for all there."""
        alike = all(codecs == self.across[0] for codecs in self.across) and all(self.here)
        theirs = self.across[0] if self.across and alike else []
        if not theirs or (not self.encodes and holds_raw(theirs)):
            return None
        return next((other for other in theirs if other.name == codec.name), theirs[0])

    def _passes_in(self, codec: AnyCodec, asked: torch.dtype) -> torch.dtype:
        """The dtype that a tensor is decoded to: the one that the other side states, else the one asked."""
        target = self._target(codec)
        return cast_dtype(target) if target is not None and target.kind == "cast" else asked

    def _is_cast_back(self, codec: AnyCodec) -> bool:
        """Whether both sides state a dtype, and the other one's holds this one's values."""
        target = self._target(codec)
        return codec.kind == "cast" and target is not None and casts_back(target, cast_dtype(codec))


def holds_raw(codecs: list[AnyCodec]) -> bool:
    """Whether a tensor may be stored as it is."""
    return any(codec.kind == "raw" for codec in codecs)


def written(codecs: list[AnyCodec], quantization: bool) -> AnyCodec | None:
    """The format that a tensor is written in when nothing was read."""
    raw = next((codec for codec in codecs if codec.kind == "raw"), None)
    return raw if raw is not None and not quantization else codecs[0] if codecs else None


def packs(codecs: list[AnyCodec]) -> list[bool]:
    """Which of some formats put several elements into one stored one."""
    return [codec.per > 1 for codec in codecs]


def fits(codec: AnyCodec, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can be stored so: packed elements fill whole bytes."""
    return codec.unfit(shape) is None


def claims(codec: AnyCodec, dtype: torch.dtype) -> bool:
    """Whether a plain tensor of this dtype would be taken for one of the codec's."""
    if codec.kind == "raw":
        return False
    if not codec.payload_dtypes:
        return dtype in FLOATS
    return codec.claims(DTYPE_NAMES[dtype])


def _holds(dtype: torch.dtype, codec: AnyCodec) -> bool:
    """Whether decoding a cast to this dtype loses nothing."""
    return dtype in (torch.float32, cast_dtype(codec))


def casts_back(codec: AnyCodec, dtype: torch.dtype) -> bool:
    """Whether a cast holds every value of this dtype."""
    if codec.kind != "cast":
        return False
    return cast_dtype(codec) in (torch.float32, dtype)


def cast_dtype(codec: AnyCodec) -> torch.dtype:
    """The dtype that a cast stores."""
    return TORCH_DTYPES[codec.stored("x", ())[0].dtypes[0]]


def runtime_codec(codec: AnyCodec) -> Codec:
    """The runtime's codec of a checked declaration."""
    kinds: dict[str, type[Codec]] = {
        "block_scaled": BlockScaled,
        "packed_int": PackedInt,
        "group_int": GroupInt,
        "cast": NarrowCast if codec.name.startswith("f8") else Cast,
        "add": Add,
        "neg_exp": NegExp,
    }
    made = kinds[codec.kind].__new__(kinds[codec.kind])
    made.bind(codec)
    return made
