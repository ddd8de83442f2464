"""Codecs as code: the constructor call of the runtime's class."""

from __future__ import annotations

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import BlockScaled, parse_codec
from mapdsl.emit.expressions import quoted
from mapdsl.emit.layout import Bracketed, call


def constructor(spec: ir.CodecSpec) -> Bracketed:
    """`BlockScaled("fp8", "f8e4m3", block=(128, 128), ...)`; arguments at their default are left out."""
    codec = parse_codec(spec)
    if isinstance(codec, BlockScaled):
        return _block_scaled(codec)
    if codec.kind == "cast":
        return call("Cast", quoted(codec.name), quoted(codec.name))
    if codec.kind == "add":
        return call("Add", quoted(codec.name), repr(codec.amount))
    return call("NegExp", quoted(codec.name))


def _block_scaled(codec: BlockScaled) -> Bracketed:
    words = [quoted(word) for word in codec.scale_dtypes]
    return call(
        "BlockScaled",
        quoted(codec.name),
        quoted(codec.element),
        f"block={codec.block}",
        f"scale={quoted(codec.scale)}",
        f"scale_dtypes=({', '.join(words)}{',' if len(words) == 1 else ''})" if words else None,
        "squeeze=True" if codec.squeeze else None,
        f"packed={quoted(codec.packed)}" if codec.packed != "i8" else None,
        f"payload={quoted(codec.payload)}" if codec.payload != "{key}" else None,
    )
