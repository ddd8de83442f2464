"""What formats of integers store, GPTQ and AWQ and DeepSpeed's groups; see `storage`. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from mapdsl.runtime.codecs.storage import DTYPES, Box, Shape, Storage, covered


@dataclass(frozen=True)
class PackedIntStorage(Storage):
    """GPTQ and AWQ: integers packed in 32-bit words, with a scale and a zero point for each group of input rows.

    The logical tensor is `[in, out]`, as both lay it out. GPTQ packs down the input rows, and `g_idx` says the group of
    each; AWQ packs along the outputs, in an order of its own.
    """

    layout: str = "gptq"
    bits: int = 4
    group: int = 128
    payload: str = "{stem}.qweight"
    zeros: str = "{stem}.qzeros"
    scale: str = "{stem}.scales"
    order: str = "{stem}.g_idx"
    zero_offset: int = 0
    kind: str = field(default="packed_int", init=False)
    dtypes: tuple[str, ...] = field(default=("I32",), init=False)
    amount: float = field(default=0.0, init=False)

    @cached_property
    def templates(self) -> dict[str, str]:
        names = {"payload": self.payload, "zeros": self.zeros, "scale": self.scale}
        return names | ({"order": self.order} if self.layout == "gptq" else {})

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def moves_whole(self) -> bool:
        return False

    @property
    def read_only(self) -> bool:
        return True

    def needs_dimensions(self) -> int:
        return 2

    def needs_payload_dimensions(self) -> int:
        return 2

    def unfit(self, shape: Shape) -> str | None:
        if len(shape) != 2:
            return f"{list(shape)} is not [in, out], which {self.name} packs"
        packed = shape[1:] if self.layout == "awq" else shape
        if any(size * self.bits % 32 for size in packed):
            return f"{list(shape)} does not fill whole 32-bit words with elements of {self.bits} bits"
        return None

    def logical_shape(self, payload: Shape) -> Shape:
        *_, rows, columns = payload  # a matrix, whatever is found: of anything else the shape differs from it
        return (rows, columns * 32 // self.bits) if self.layout == "awq" else (rows * 32 // self.bits, columns)

    def part_dtypes(self) -> dict[str, tuple[str, ...]]:
        words, scales = ("I32",), tuple(DTYPES[word] for word in ("f16", "bf16", "f32"))
        return {"payload": words, "zeros": words, "scale": scales} | (
            {"order": words} if "order" in self.templates else {}
        )

    def groups(self, rows: int) -> int:
        """Groups over the input rows; group 0 is all of them."""
        return -(-rows // (self.group or rows or 1))

    def part_shapes(self, shape: Shape) -> dict[str, Shape]:
        rows, columns = shape
        groups, words = self.groups(rows), columns * self.bits // 32
        parts = {"zeros": (groups, words), "scale": (groups, columns)}
        if self.layout == "awq":
            return {"payload": (rows, words), **parts}
        return {"payload": (rows * self.bits // 32, columns), **parts, "order": (rows,)}

    def cut(self, shape: Shape, box: Box) -> dict[str, Box]:
        rows, columns = box
        words = tuple(covered(span, math.lcm(self.bits, 32) // self.bits) for span in box)
        per = math.lcm(self.bits, 32) // 32  # words of one whole run: 3 for elements of 3 bits
        in_words = [(start * per, stop * per) for start, stop in words]
        if self.layout == "awq":
            groups = covered(rows, self.group or shape[0])
            return {"payload": (rows, in_words[1]), "zeros": (groups, in_words[1]), "scale": (groups, columns)}
        # Rows may belong to any group, as `g_idx` says.
        groups = (0, self.groups(shape[0]))
        zeros, scale = (groups, in_words[1]), (groups, columns)
        return {"payload": (in_words[0], columns), "zeros": zeros, "scale": scale, "order": (rows,)}


@dataclass(frozen=True)
class GroupStorage(Storage):
    """`group_int`: DeepSpeed's integers of 2 to 8 bits in an int8 each, one scale for each of `groups` flat runs."""

    bits: int = 8
    groups: int = 1
    scale: str = "{key}_scale"
    inverse: bool = False
    kind: str = field(default="group_int", init=False)
    dtypes: tuple[str, ...] = field(default=("I8",), init=False)
    amount: float = field(default=0.0, init=False)
    payload: str = field(default="{key}", init=False)

    @cached_property
    def templates(self) -> dict[str, str]:
        return {"payload": self.payload, "scale": self.scale}

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def moves_whole(self) -> bool:
        return False

    def unfit(self, shape: Shape) -> str | None:
        if math.prod(shape) % self.groups:
            return f"the {math.prod(shape)} elements of {list(shape)} do not fall into {self.groups} equal groups"
        return None

    def part_dtypes(self) -> dict[str, tuple[str, ...]]:
        return {"payload": self.dtypes, "scale": ("F32",)}

    def part_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {"payload": shape, "scale": (self.groups, 1) if self.inverse else (1, self.groups)}

    def cut(self, shape: Shape, box: Box) -> dict[str, Box]:
        scales = ((0, self.groups), (0, 1)) if self.inverse else ((0, 1), (0, self.groups))
        return {"payload": box, "scale": scales}
