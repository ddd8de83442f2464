"""Declarations of codecs: from `codec NAME = KIND(...)` to what the format stores."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.language.source import Span
from mapdsl.runtime.codecs.integer_storage import GroupStorage, PackedIntStorage
from mapdsl.runtime.codecs.storage import (
    DTYPES,
    FLOAT_SCALES,
    POWERS,
    SCALES,
    BlockStorage,
    Storage,
    Stored,
)

__all__ = ["CASTS", "AnyCodec", "CodecError", "Stored", "codec_key", "parse_codec"]

AnyCodec = Storage

CASTS = ("f32", "bf16", "f16", "f8e4m3", "f8e5m2")
ELEMENTS = ("f8e4m3", "f8e5m2", "f4e2m1", "i8", "same")

Value = tuple[str, ...] | str | int | float


@dataclass(frozen=True)
class CodecError(Exception):
    """A codec declaration that makes no sense."""

    code: str
    message: str
    span: Span | None
    help: str = ""


def parse_codec(spec: ir.CodecSpec) -> Storage:
    """What a declared format stores; CodecError where its arguments make no sense."""
    match spec.kind:
        case "raw" | "neg_exp":
            return Storage(spec.name, spec.kind)
        case "cast":
            return Storage(spec.name, "cast", (DTYPES[spec.name],))
        case "add":
            if len(spec.arguments) != 1 or not isinstance(spec.arguments[0].value, (int, float)):
                raise CodecError("N113", "`add` takes one number: `add(1)`", spec.span)
            return Storage(spec.name, "add", amount=float(spec.arguments[0].value))
        case "packed_int":
            return _checked(spec, _packed_int(spec))
        case "group_int":
            return _checked(spec, _group_int(spec))
    return _checked(spec, _block_scaled(spec))


def _checked(spec: ir.CodecSpec, storage: Storage) -> Storage:
    """D402 where two parts have one name."""
    names: dict[str, str] = {}
    for role, name in storage.part_names("a.b").items():
        if name in names:
            raise CodecError("D402", f"codec `{spec.name}`: {names[name]} and {role} have one name", spec.span)
        names[name] = role
    return storage


def _block_scaled(spec: ir.CodecSpec) -> BlockStorage:
    options = Options(spec, "element", BLOCK_SCALED)
    element = options.word("element", ELEMENTS)
    block = re.fullmatch(r"(\d+|\*)x(\d+|\*)", options.word("block"))
    if block is None or "0" in block.groups():
        raise options.error("D401", "a block is written `128x128`, `1x32` or `1x*`")
    rows, columns = (None if size == "*" else int(size) for size in block.groups())
    if element == "f4e2m1" and columns is not None and columns % 2:
        raise options.error("D401", "two codes share a byte, so a block has even columns")
    blocks = options.word("pack", ("flat", "blocks"), "flat") == "blocks"
    if blocks and (columns is None or rows != 1):
        raise options.error("D401", "blocks that are stored one by one are runs of a row: `block=1x32`")
    global_scale = options.template("global_scale", "")
    scale_dtypes = options.words("scale_dtype", SCALES)
    powers = bool(scale_dtypes) and set(scale_dtypes) <= set(POWERS)
    if options.flag("inverse") and set(scale_dtypes) & set(POWERS):
        raise options.error("N113", "scales that are powers of two are not inverse")
    if not options.flag("squeeze"):
        options.refuse("scale_dims", "scales that are not squeezed")
    if not global_scale:
        for name in ("global_dims", "global_inverse"):
            options.refuse(name, "a codec without a global scale")
    return BlockStorage(
        spec.name,
        element=element,
        block=(rows, columns),
        scale=options.template("scale", "{stem}.scale"),
        scale_dtypes=scale_dtypes,
        squeeze=options.flag("squeeze"),
        scale_dims=options.number("scale_dims", 0, 0, 8),
        packed=options.word("packed", ("i8", "u8"), "i8"),
        payload=options.template("payload", "{key}"),
        blocks=blocks,
        inverse=options.flag("inverse"),
        global_scale=global_scale,
        global_dims=options.number("global_dims", 0, 0, 8),
        global_inverse=options.flag("global_inverse"),
        rule=options.word("rule", ("up", "down", "even"), "up") if powers else "up",
    )


def _packed_int(spec: ir.CodecSpec) -> Storage:
    options = Options(spec, None, PACKED_INT)
    layout = options.word("layout", ("compressed_tensors", "gptq", "gptq_v2", "awq"), "compressed_tensors")
    bits = options.number("bits", 4, 2, 8)
    group = options.number("group", 128 if layout != "compressed_tensors" else 32, 0, 1 << 30)
    if layout == "compressed_tensors":
        if bits not in (4, 8):
            raise options.error("N113", "`bits` is 4 or 8 in the layout of compressed_tensors")
        for name in ("zeros", "order"):
            options.refuse(name, "the symmetric layout of compressed_tensors")
        if group % (8 // bits):
            raise options.error("D401", "a group has a whole number of bytes")
        return BlockStorage(
            spec.name,
            element=f"i{bits}",
            block=(1, group or None),
            scale=options.template("scale", "{key}_scale"),
            scale_dtypes=options.words("scale_dtype", FLOAT_SCALES),
            packed="i32",
            payload=options.template("payload", "{key}_packed"),
            shape=options.template("shape", "{key}_shape"),
        )
    if bits not in ((4,) if layout == "awq" else (2, 3, 4, 8)):
        raise options.error("N113", f"`bits` is {'4' if layout == 'awq' else '2, 3, 4 or 8'} in the layout of {layout}")
    for name in ("shape", "scale_dtype", *(("order",) if layout == "awq" else ())):
        options.refuse(name, f"the layout of {layout}")
    return PackedIntStorage(
        spec.name,
        layout="awq" if layout == "awq" else "gptq",
        bits=bits,
        group=group,
        payload=options.template("payload", "{stem}.qweight"),
        zeros=options.template("zeros", "{stem}.qzeros"),
        scale=options.template("scale", "{stem}.scales"),
        order=options.template("order", "{stem}.g_idx"),
        zero_offset=1 if layout == "gptq" else 0,
    )


def _group_int(spec: ir.CodecSpec) -> GroupStorage:
    options = Options(spec, None, GROUP_INT)
    return GroupStorage(
        spec.name,
        bits=options.number("bits", 8, 2, 8),
        groups=options.number("groups", 1, 1, 1 << 40),
        scale=options.template("scale", "{key}_scale"),
        inverse=options.flag("inverse"),
    )


BLOCK_SCALED = (
    "element",
    "block",
    "scale",
    "scale_dtype",
    "squeeze",
    "scale_dims",
    "packed",
    "payload",
    "pack",
    "inverse",
    "global_scale",
    "global_dims",
    "global_inverse",
    "rule",
)
PACKED_INT = ("bits", "group", "layout", "payload", "scale", "scale_dtype", "shape", "zeros", "order")
GROUP_INT = ("bits", "groups", "scale", "inverse")


class Options:
    """The arguments of a declaration by name; the `first` may stand without one."""

    def __init__(self, spec: ir.CodecSpec, first: str | None, known: tuple[str, ...]) -> None:
        self.spec = spec
        self._given: dict[str, Value] = {}
        for number, argument in enumerate(spec.arguments):
            name = argument.name or (first if number == 0 else None)
            if name is None:
                where = "arguments behind the first have names" if first else "arguments have names"
                raise CodecError("N113", f"codec `{spec.name}`: {where}", argument.span)
            if name not in known:
                message = f"codec `{spec.name}` has no argument `{name}`"
                raise CodecError("N113", message, argument.span, f"it has {', '.join(known[1 if first else 0 :])}")
            if name in self._given:
                raise CodecError("N114", f"codec `{spec.name}`: `{name}` is given twice", argument.span)
            self._given[name] = argument.value

    def error(self, code: str, message: str) -> CodecError:
        """An error of this declaration."""
        return CodecError(code, f"codec `{self.spec.name}`: {message}", self.spec.span)

    def refuse(self, name: str, where: str) -> None:
        """N113 where an argument is given that means nothing here."""
        if name in self._given:
            raise self.error("N113", f"`{name}` means nothing in {where}")

    def word(self, name: str, allowed: tuple[str, ...] | None = None, default: str | None = None) -> str:
        """An argument that is one word."""
        value = self._given.get(name, default)
        if value is None:
            raise self.error("N113", f"`{name}` is missing")
        text = value[0] if isinstance(value, tuple) and len(value) == 1 else str(value)
        if allowed is not None and text not in allowed:
            raise self.error("N113", f"`{name}` is one of {', '.join(allowed)}")
        return text

    def words(self, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """An argument of words with `|` between them; none if it is not given."""
        value = self._given.get(name, ())
        if not isinstance(value, tuple) or not set(value) <= set(allowed):
            raise self.error("N113", f"`{name}` is of {', '.join(allowed)}")
        return value

    def flag(self, name: str) -> bool:
        """An argument that is `true` or `false`, `false` if it is not given."""
        return self.word(name, ("true", "false"), "false") == "true"

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """An argument that is a whole number."""
        value = self._given.get(name, default)
        if not isinstance(value, int) or not least <= value <= most:
            raise self.error("N113", f"`{name}` is a whole number from {least} to {most}")
        return value

    def template(self, name: str, default: str) -> str:
        """An argument that is a template of a stored name over `{key}` and `{stem}`."""
        text = self._given.get(name, default)
        if not isinstance(text, str) or re.search(r"[{}]|\s", text.replace("{key}", "").replace("{stem}", "")):
            raise self.error("N113", f"`{name}` is a string over {{key}} and {{stem}}")
        if text and "{key}" not in text and "{stem}" not in text:
            raise self.error("D402", f"`{name}` has no {{key}} or {{stem}}, so all tensors would share it")
        if not text and name in self._given:
            raise self.error("N113", f"`{name}` is empty")
        return text


def codec_key(spec: ir.CodecSpec) -> str:
    """Codecs with arguments at their use are told apart by them."""
    return f"{spec.name}({', '.join(str(a.value) for a in spec.arguments)})" if spec.kind == "add" else spec.name
