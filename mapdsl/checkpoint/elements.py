"""Two runs of bytes held against each other: where the first element differs, and what stands there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mapdsl.checkpoint.headers import BITS, StoredTensor

STRIP_BYTES = 6 * 2**20
"""How much of a tensor is held in memory at a time, of each of two checkpoints; whole elements of every dtype."""

Strip = bytearray | memoryview

_F4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Difference:
    """A tensor that two checkpoints hold differently.

    `kind` is `dtype`, `shape` or `bytes`. `expected` and `found` are texts: dtype and shape, or with `bytes` the first
    element that differs, as a value with its bits, at `index`. `differing` of `nbytes` bytes differ. `sources` are the
    tensors that the element was made from, where it was made; `origin` says which of their elements, where that can be
    told.
    """

    name: str
    kind: str
    expected: str
    found: str
    index: tuple[int, ...] = ()
    differing: int = 0
    nbytes: int = 0
    sources: tuple[str, ...] = ()
    origin: str = ""

    @property
    def place(self) -> str:
        """The name with the index of the element, `w[3, 7]`; of another kind of difference, the name."""
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return self.name + at

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        value: dict[str, Any] = {"name": self.name, "kind": self.kind, "expected": self.expected, "found": self.found}
        if self.kind == "bytes":
            value |= {"index": list(self.index), "bytes_differing": self.differing, "bytes": self.nbytes}
        if self.sources:
            value["sources"] = list(self.sources)
        if self.origin:
            value["origin"] = self.origin
        return value

    def made_from(self, sources: Sequence[str], origin: str) -> Difference:
        """The same, with where the element comes from."""
        return replace(self, sources=tuple(sources), origin=origin)


def form(stored: StoredTensor) -> str:
    """`BF16 [4, 64]`."""
    return f"{stored.dtype} {json.dumps(list(stored.shape))}"


def header_difference(expected: StoredTensor, found: StoredTensor) -> Difference | None:
    """What dtype and shape of two tensors say, if they disagree."""
    if expected.dtype != found.dtype:
        return Difference(expected.name, "dtype", form(expected), form(found))
    if expected.shape != found.shape:
        return Difference(expected.name, "shape", form(expected), form(found))
    return None


class Tally:
    """Gathers what differs in one tensor, strip by strip."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.differing = 0
        self._first: tuple[int, bytes, bytes] | None = None

    def compare(self, offset: int, expected: Strip, found: Strip) -> None:
        """Hold strips of equal length against each other, which begin `offset` bytes into the tensor.

        Strips begin where an element begins; one of them is a bytearray.
        """
        one, other = (expected, found) if isinstance(expected, bytearray) else (found, expected)
        if one == other:  # of a bytearray this is one call of memcmp, of memoryviews a slow loop
            return
        wrong = _xor(expected, found)
        self.differing += len(wrong) - wrong.count(0)
        if self._first is None:
            width = max(BITS[self.stored.dtype] // 8, 1)
            if BITS[self.stored.dtype] == 6:  # four elements fill three bytes
                width = 3
            begin = (len(wrong) - len(wrong.lstrip(b"\0"))) // width * width
            self._first = (offset + begin, bytes(expected[begin : begin + width]), bytes(found[begin : begin + width]))

    def difference(self) -> Difference | None:
        """What was found; None where all bytes are equal."""
        if self._first is None:
            return None
        begin, expected, found = self._first
        count, texts = _elements(self.stored.dtype, expected, found)
        element = begin * 8 // BITS[self.stored.dtype] + count
        index = _unravel(element, self.stored.shape)
        return Difference(self.stored.name, "bytes", *texts, index, self.differing, self.stored.nbytes)


def _xor(one: Strip, other: Strip) -> bytes:
    """The bits that differ, through one large integer: fast without numpy."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def _unravel(element: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        element, place = divmod(element, size)
        index.append(place)
    return tuple(reversed(index))


def _elements(dtype: str, expected: bytes, found: bytes) -> tuple[int, tuple[str, str]]:
    """Texts of the first element that differs in a run of bytes that may hold several, and its place in it."""
    bits = BITS[dtype]
    if bits >= 8:
        return 0, (value_text(dtype, expected), value_text(dtype, found))
    codes = [_codes(data, bits) for data in (expected, found)]
    place = next(n for n, (a, b) in enumerate(zip(*codes, strict=True)) if a != b)
    return place, (_code_text(dtype, codes[0][place]), _code_text(dtype, codes[1][place]))


def _codes(data: bytes, bits: int) -> list[int]:
    """Elements narrower than a byte, the lowest bits first."""
    number = int.from_bytes(data, "little")
    return [number >> at & ((1 << bits) - 1) for at in range(0, 8 * len(data), bits)]


def _code_text(dtype: str, code: int) -> str:
    if dtype != "F4":
        return f"0x{code:02x}"
    sign = "-" if code & 8 else ""
    return f"{sign}{_F4[code & 7]} (0x{code:x})"


def value_text(dtype: str, data: bytes) -> str:
    """An element as a value with its bits, `-0.0 (0x8000)`: NaNs and zeros are told apart by the latter."""
    bits = f"0x{data[::-1].hex()}"
    import torch  # only where something differs

    from mapdsl.checkpoint.dtypes import TORCH_DTYPES

    if dtype not in TORCH_DTYPES:
        return bits
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(TORCH_DTYPES[dtype])
    if dtype.startswith("F8"):
        tensor = tensor.float()
    value = tensor.tolist()[0]
    return str(value) if dtype in ("I64", "I32", "I16", "U64", "U32", "U16") else f"{value} ({bits})"
