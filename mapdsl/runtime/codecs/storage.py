"""What each format stores: names, dtypes and shapes of all parts, and which of them hold a slice. No torch here.

The compiler checks maps with these, the runtime plans, checks and slices with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

# The language's words for dtypes, and safetensors' spelling of each.
DTYPES = {
    "f64": "F64",
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "f8e4m3": "F8_E4M3",
    "f8e5m2": "F8_E5M2",
    "f8e8m0": "F8_E8M0",
    "i64": "I64",
    "i32": "I32",
    "i16": "I16",
    "i8": "I8",
    "u8": "U8",
    "bool": "BOOL",
}
FLOAT_SCALES = ("f32", "bf16", "f16")
# e8m0 is a bare exponent; older releases store its bytes as u8.
POWERS = ("f8e8m0", "u8")
SCALES = (*FLOAT_SCALES, "f8e4m3", *POWERS)

Shape = tuple[int, ...]
# Start and stop in each dimension.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stored:
    """One stored tensor of a format; `dtypes` in safetensors' spelling, shape None where the logical one is unknown."""

    name: str
    dtypes: tuple[str, ...]
    shape: Shape | None


@dataclass(frozen=True)
class Storage:
    """A format of one tensor. This one has no companions: `raw`, a cast (`dtypes` says to what), a change of value."""

    name: str
    kind: str
    dtypes: tuple[str, ...] = ()
    amount: float = 0.0
    payload: str = "{key}"

    @cached_property
    def templates(self) -> dict[str, str]:
        """Names of all stored tensors over `{key}` and `{stem}`, by role, payload first."""
        return {"payload": self.payload}

    @property
    def payload_dtypes(self) -> tuple[str, ...]:
        """What the payload may be stored in; any float where empty."""
        return self.dtypes

    @property
    def companions(self) -> tuple[str, ...]:
        """Templates of the names beside the payload's."""
        return tuple(self.templates.values())[1:]

    @property
    def per(self) -> int:
        """Logical elements along the last dimension that share one stored element."""
        return 1

    @property
    def is_elementwise(self) -> bool:
        """Whether each element is stored by itself, so that a share of a tensor may begin and end anywhere."""
        return True

    @property
    def moves_whole(self) -> bool:
        """Whether all parts have the tensor's leading dimensions, so that it can be stacked without being decoded."""
        return True

    @property
    def read_only(self) -> bool:
        """Whether nothing new can be written, but what was read only."""
        return False

    def part_names(self, key: str) -> dict[str, str]:
        """Stored names by role, payload first."""
        # One tensor's names are asked for many times on end.
        held: tuple[str, dict[str, str]] = self.__dict__.get("_last_names", ("", {}))
        if held[0] != key or not held[1]:
            held = key, {role: fill_template(template, key) for role, template in self.templates.items()}
            self.__dict__["_last_names"] = held
        return held[1]

    def names(self, key: str) -> list[str]:
        """Stored names, payload first."""
        return list(self.part_names(key).values())

    def claims(self, dtype: str) -> bool:
        """Whether a payload of this dtype may be stored so."""
        return not self.payload_dtypes or dtype in self.payload_dtypes

    def unfit(self, shape: Shape) -> str | None:
        """Why a tensor of this shape cannot be stored so, if it cannot: `shape [3, 5] has ...`."""
        return None

    def needs_dimensions(self) -> int:
        """The fewest dimensions that a tensor stored so has."""
        return 0

    def needs_payload_dimensions(self) -> int:
        """The fewest dimensions that a payload has."""
        return 0

    def logical_shape(self, payload: Shape) -> Shape:
        """The shape of the decoded tensor."""
        return payload

    def part_dtypes(self) -> dict[str, tuple[str, ...]]:
        """Dtypes of each part, in safetensors' spelling."""
        return {"payload": self.payload_dtypes}

    def part_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Shape of each part, by the logical shape."""
        return {"payload": shape}

    def stored(self, key: str, shape: Shape | None) -> list[Stored]:
        """All stored tensors of a logical shape, payload first."""
        dtypes = self.part_dtypes()
        shapes = None if shape is None else self.part_shapes(shape)
        names = self.part_names(key)
        return [Stored(names[role], dtypes[role], None if shapes is None else shapes[role]) for role in names]

    def cut(self, shape: Shape, box: Box) -> dict[str, Box]:
        """Which part of each stored tensor holds a slice of a logical tensor; no more than needed to decode it."""
        return {"payload": box}


RAW_STORAGE = Storage("raw", "raw")

# Bits of a value, stored dtype of the payload, of each element that a block-scaled format may have.
ELEMENT_BITS = {"f8e4m3": 8, "f8e5m2": 8, "f4e2m1": 4, "i8": 8, "i4": 4, "same": 0}


@dataclass(frozen=True)
class BlockStorage(Storage):
    """`block_scaled` and symmetric `packed_int`: narrow elements, one scale for each block of the last two dimensions.

    `packed` is the integer that holds elements of fewer bits, low bits first; `blocks` splits the last dimension into
    blocks and the bytes of each. `squeeze` leaves whole dimensions out of the scales' shape, and `scale_dims` of size
    one follow. Scales multiply, or divide (`inverse`); one more of the whole matrix may stand over them. `rule` rounds
    scales that are powers.
    """

    element: str = "f8e4m3"
    block: tuple[int | None, int | None] = (None, None)
    scale: str = "{stem}.scale"
    scale_dtypes: tuple[str, ...] = ()
    squeeze: bool = False
    scale_dims: int = 0
    packed: str = "i8"
    blocks: bool = False
    inverse: bool = False
    global_scale: str = ""
    global_dims: int = 0
    global_inverse: bool = False
    shape: str = ""
    rule: str = "up"
    kind: str = field(default="block_scaled", init=False)
    dtypes: tuple[str, ...] = field(default=(), init=False)
    amount: float = field(default=0.0, init=False)

    @cached_property
    def templates(self) -> dict[str, str]:
        named = {"scale": self.scale, "global": self.global_scale, "shape": self.shape}
        return {"payload": self.payload} | {role: name for role, name in named.items() if name}

    @property
    def payload_dtypes(self) -> tuple[str, ...]:
        if self.element == "same":
            return ()
        bits = ELEMENT_BITS[self.element]
        return (DTYPES[self.packed if bits < 8 or self.shape else self.element],)

    @property
    def bits(self) -> int:
        """Bits of an element; 0 for `same`."""
        return ELEMENT_BITS[self.element]

    @property
    def per(self) -> int:
        if not self.bits:
            return 1
        return (32 if self.packed == "i32" else 8) // self.bits

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def moves_whole(self) -> bool:
        return not (self.squeeze or self.blocks or self.global_scale or self.shape)

    def needs_dimensions(self) -> int:
        return 2 if self.block[0] not in (None, 1) else 1

    def needs_payload_dimensions(self) -> int:
        return 2 if self.blocks else 1 if self.per > 1 else 0

    def unfit(self, shape: Shape) -> str | None:
        width = self.block[1] if self.blocks and self.block[1] else self.per
        if width > 1 and (not shape or shape[-1] % width):
            what = "blocks" if self.blocks else f"{self.packed} elements"
            return (
                f"the last dimension of {list(shape)} is not a multiple of {width}, and {self.name} fills whole {what}"
            )
        return None

    def logical_shape(self, payload: Shape) -> Shape:
        if self.blocks and len(payload) > 1:
            return (*payload[:-2], payload[-2] * payload[-1] * self.per)
        return (*payload[:-1], payload[-1] * self.per) if payload else payload

    def part_dtypes(self) -> dict[str, tuple[str, ...]]:
        scales = tuple(DTYPES[word] for word in self.scale_dtypes or FLOAT_SCALES)
        dtypes = {"payload": self.payload_dtypes, "scale": scales, "global": ("F32",), "shape": ("I64", "I32")}
        return {role: dtypes[role] for role in self.templates}

    def part_shapes(self, shape: Shape) -> dict[str, Shape]:
        shapes = {
            "payload": self._packed(shape),
            "scale": self.grid(shape),
            "global": (*shape[:-2], *(1,) * self.global_dims),
            "shape": (len(shape),),
        }
        return {role: shapes[role] for role in self.templates}

    def grid(self, shape: Shape) -> Shape:
        """The shape of the scales: a block may be cut off at the edge; `squeeze` leaves out what is one block whole."""
        blocks = (1 if b is None else -(-size // b) for size, b in self._blocked(shape))
        return (*shape[:-2], *blocks, *(1,) * self.scale_dims)

    def cut(self, shape: Shape, box: Box) -> dict[str, Box]:
        batch = box[:-2]
        last = zip(box[-2:], self.block[2 - len(box[-2:]) :], strict=True)
        scales = [(0, 1) if b is None else covered(span, b) for span, b in last if self._shown(b)]
        boxes: dict[str, Box] = {
            "payload": self._packed_box(box),
            "scale": (*batch, *scales, *((0, 1),) * self.scale_dims),
            "global": (*batch, *((0, 1),) * self.global_dims),
            "shape": ((0, len(shape)),),
        }
        return {role: boxes[role] for role in self.templates}

    def _shown(self, block: int | None) -> bool:
        return not (self.squeeze and block is None)

    def _blocked(self, shape: Shape) -> list[tuple[int, int | None]]:
        last = shape[-2:]
        return [pair for pair in zip(last, self.block[2 - len(last) :], strict=True) if self._shown(pair[1])]

    def _packed(self, shape: Shape) -> Shape:
        if not shape:
            return shape
        if self.blocks:
            width = self.block[1] or shape[-1] or self.per
            return (*shape[:-1], shape[-1] // width, width // self.per)
        return (*shape[:-1], shape[-1] // self.per)

    def _packed_box(self, box: Box) -> Box:
        if not box:
            return box
        if self.blocks:
            width = self.block[1] or self.per
            return (*box[:-1], covered(box[-1], width), (0, width // self.per))
        return (*box[:-1], covered(box[-1], self.per))


class Parts(NamedTuple):
    """Templates of the names of all parts that a tensor of several possible formats may have: payloads come first."""

    payloads: tuple[str, ...]
    companions: tuple[str, ...]
    all_have_companions: bool

    @classmethod
    def of(cls, formats: Iterable[Storage]) -> Parts:
        """Of formats, in their order; `raw` counts for none that could have companions."""
        listed = list(formats)
        payloads = dict.fromkeys(one.payload for one in listed)
        companions = dict.fromkeys(template for one in listed for template in one.companions)
        told = all(one.companions for one in listed if one.kind != "raw")
        return cls(tuple(payloads), tuple(companions), told)

    def names(self, key: str) -> list[str]:
        """The names of all parts of a tensor, payloads first."""
        stem, dot, _ = key.rpartition(".")
        return [_filled(template, key, stem, dot) for template in (*self.payloads, *self.companions)]


def fill_template(template: str, key: str) -> str:
    """A stored name: `{key}` is the tensor's, `{stem}` that without its last segment; no dot follows an empty stem."""
    stem, dot, _ = key.rpartition(".")
    return _filled(template, key, stem, dot)


def _filled(template: str, key: str, stem: str, dot: str) -> str:
    if template == "{key}":
        return key
    if not dot:
        template = template.replace("{stem}.", "{stem}")
    return template.replace("{stem}", stem).replace("{key}", key)


def covered(span: tuple[int, int], size: int) -> tuple[int, int]:
    """The runs of `size` elements that a span touches."""
    start, stop = span
    return (start // size, -(-stop // size)) if stop > start else (start // size, start // size)
