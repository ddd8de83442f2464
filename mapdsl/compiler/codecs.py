"""Codecs as the compiler sees them: which tensors a format stores, of which dtypes and shapes. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mapdsl.compiler import ir
from mapdsl.language.source import Span

# The language's words for dtypes, as safetensors headers spell them.
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
SCALES = (*FLOAT_SCALES, "f8e8m0", "u8")
CASTS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class CodecError(Exception):
    """A codec declaration that makes no sense."""

    code: str
    message: str
    span: Span | None
    help: str = ""


@dataclass(frozen=True)
class Stored:
    """One stored tensor of a codec; shape None where the logical shape is not known."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Codec:
    """A format without companions: `raw`, a cast, or a change of value. `dtypes` are those that it may be stored in."""

    name: str
    kind: str
    dtypes: tuple[str, ...] = ()
    amount: float = 0.0
    companions: tuple[str, ...] = field(default=(), init=False)

    def names(self, key: str) -> list[str]:
        """Stored names, payload first."""
        return [key]

    def stored(self, key: str, shape: tuple[int, ...] | None) -> list[Stored]:
        """All stored tensors of a logical shape."""
        return [Stored(key, self.dtypes, shape)]

    def logical_shape(self, payload: tuple[int, ...]) -> tuple[int, ...]:
        """The shape once decoded."""
        return payload

    def claims(self, dtype: str) -> bool:
        """Whether a payload of this dtype may be stored so."""
        return not self.dtypes or dtype in self.dtypes


@dataclass(frozen=True)
class BlockScaled:
    """`block_scaled`: a payload of narrow floats and a tensor of scales, one a block of the last two dimensions."""

    name: str
    element: str
    block: tuple[int | None, int | None]
    scale: str
    scale_dtypes: tuple[str, ...]
    squeeze: bool
    packed: str
    payload: str
    kind: str = field(default="block_scaled", init=False)

    @property
    def companions(self) -> tuple[str, ...]:
        """Templates of the companions' names."""
        return (self.scale,)

    @property
    def per(self) -> int:
        """Logical elements in one stored element."""
        return 2 if self.element == "f4e2m1" else 1

    @property
    def payload_dtypes(self) -> tuple[str, ...]:
        """What the payload may be stored in; any where the element is `same`."""
        if self.element == "same":
            return ()
        return (DTYPES[self.packed if self.per == 2 else self.element],)

    def claims(self, dtype: str) -> bool:
        """Whether a payload of this dtype may be stored so."""
        return not self.payload_dtypes or dtype in self.payload_dtypes

    def names(self, key: str) -> list[str]:
        """Stored names, payload first."""
        return [fill(self.payload, key), fill(self.scale, key)]

    def logical_shape(self, payload: tuple[int, ...]) -> tuple[int, ...]:
        """The shape once decoded."""
        return (*payload[:-1], payload[-1] * self.per) if payload else payload

    def stored(self, key: str, shape: tuple[int, ...] | None) -> list[Stored]:
        """All stored tensors of a logical shape."""
        payload, scale = self.names(key)
        dtypes = tuple(DTYPES[word] for word in self.scale_dtypes or FLOAT_SCALES)
        if shape is None:
            return [Stored(payload, self.payload_dtypes, None), Stored(scale, dtypes, None)]
        packed = (*shape[:-1], shape[-1] // self.per) if shape else shape
        return [Stored(payload, self.payload_dtypes, packed), Stored(scale, dtypes, self.grid(shape))]

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales: a block may be cut off at the edge; `squeeze` leaves out what is one block whole."""
        batch, last = shape[:-2], shape[-2:]
        sizes = self.block[2 - len(last) :]
        pairs = [(size, block) for size, block in zip(last, sizes, strict=True) if not (self.squeeze and block is None)]
        return (*batch, *(1 if block is None else -(-size // block) for size, block in pairs))


AnyCodec = Codec | BlockScaled


def parse_codec(spec: ir.CodecSpec) -> AnyCodec:
    """The codec of a declaration; CodecError where its arguments make no sense."""
    match spec.kind:
        case "raw":
            return Codec(spec.name, "raw")
        case "cast":
            return Codec(spec.name, "cast", (DTYPES[spec.name],))
        case "neg_exp":
            return Codec(spec.name, "neg_exp")
        case "add":
            if len(spec.arguments) != 1 or not isinstance(spec.arguments[0].value, (int, float)):
                raise CodecError("N113", "`add` takes one number: `add(1)`", spec.span)
            return Codec(spec.name, "add", amount=float(spec.arguments[0].value))
    return _block_scaled(spec)


def _block_scaled(spec: ir.CodecSpec) -> BlockScaled:
    options = _options(spec)
    element = _one(spec, options, "element", ("f8e4m3", "f8e5m2", "f4e2m1", "same"))
    block = re.fullmatch(r"(\d+|\*)x(\d+|\*)", _one(spec, options, "block", None))
    if block is None or "0" in block.groups():
        raise CodecError("D401", f"codec `{spec.name}`: a block is written `128x128`, `1x32` or `1x*`", spec.span)
    rows, columns = (None if size == "*" else int(size) for size in block.groups())
    if element == "f4e2m1" and columns is not None and columns % 2:
        raise CodecError("D401", f"codec `{spec.name}`: two codes share a byte, so a block has even columns", spec.span)
    scale_dtypes = options.get("scale_dtype", ())
    if not isinstance(scale_dtypes, tuple) or not set(scale_dtypes) <= set(SCALES):
        raise CodecError("N113", f"codec `{spec.name}`: a scale is stored as {', '.join(SCALES)}", spec.span)
    codec = BlockScaled(
        spec.name,
        element,
        (rows, columns),
        _template(spec, options, "scale", "{stem}.scale"),
        scale_dtypes,
        _one(spec, options, "squeeze", ("true", "false"), "false") == "true",
        _one(spec, options, "packed", ("i8", "u8"), "i8"),
        _template(spec, options, "payload", "{key}"),
    )
    _one(spec, options, "pack", ("flat",), "flat")
    if len(set(codec.names("a.b"))) < 2:
        raise CodecError("D402", f"codec `{spec.name}`: payload and scale have one name", spec.span)
    return codec


KNOWN = ("element", "block", "scale", "scale_dtype", "squeeze", "packed", "payload", "pack")


def _options(spec: ir.CodecSpec) -> dict[str, tuple[str, ...] | str | int | float]:
    """Arguments by name; the first may stand without one: it is the element."""
    options: dict[str, tuple[str, ...] | str | int | float] = {}
    for number, argument in enumerate(spec.arguments):
        name = argument.name or ("element" if number == 0 else None)
        if name is None:
            raise CodecError("N113", f"codec `{spec.name}`: arguments behind the first have names", argument.span)
        if name not in KNOWN:
            known = ", ".join(KNOWN[1:])
            raise CodecError("N113", f"codec `{spec.name}` has no argument `{name}`", argument.span, f"it has {known}")
        if name in options:
            raise CodecError("N114", f"codec `{spec.name}`: `{name}` is given twice", argument.span)
        options[name] = argument.value
    return options


def _one(
    spec: ir.CodecSpec,
    options: dict[str, tuple[str, ...] | str | int | float],
    name: str,
    allowed: tuple[str, ...] | None,
    default: str | None = None,
) -> str:
    """An argument that is one word."""
    value = options.get(name, (default,) if default is not None else None)
    if value is None:
        raise CodecError("N113", f"codec `{spec.name}` needs `{name}`", spec.span)
    word = value[0] if isinstance(value, tuple) and len(value) == 1 else str(value)
    if allowed is not None and word not in allowed:
        raise CodecError("N113", f"codec `{spec.name}`: `{name}` is one of {', '.join(allowed)}", spec.span)
    return word


def _template(
    spec: ir.CodecSpec, options: dict[str, tuple[str, ...] | str | int | float], name: str, default: str
) -> str:
    """An argument that is a template of a companion's name over `{key}` and `{stem}`."""
    text = options.get(name, default)
    if not isinstance(text, str) or re.search(r"[{}]|\s", text.replace("{key}", "").replace("{stem}", "")):
        message = f"codec `{spec.name}`: `{name}` is a string over {{key}} and {{stem}}"
        raise CodecError("N113", message, spec.span)
    if "{key}" not in text and "{stem}" not in text:
        message = f"codec `{spec.name}`: `{name}` has no {{key}} or {{stem}}, so all tensors would share it"
        raise CodecError("D402", message, spec.span)
    return text


def fill(template: str, key: str) -> str:
    """A companion's name: `{key}` is the tensor's, `{stem}` that without its last segment (and its dot)."""
    stem, dot, _ = key.rpartition(".")
    if not dot:
        template = template.replace("{stem}.", "{stem}")
    return template.replace("{stem}", stem).replace("{key}", key)


def codec_key(spec: ir.CodecSpec) -> str:
    """Codecs with arguments at their use are told apart by them."""
    return f"{spec.name}({', '.join(str(a.value) for a in spec.arguments)})" if spec.kind == "add" else spec.name
