"""Codecs as code: the constructor call of the runtime's class."""

from __future__ import annotations

from dataclasses import fields

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import parse_codec
from mapdsl.emit.expressions import quoted
from mapdsl.emit.layout import Bracketed, call
from mapdsl.runtime.codecs.integer_storage import GroupStorage, PackedIntStorage
from mapdsl.runtime.codecs.storage import BlockStorage

# The runtime's class, and the fields that it takes by position.
_CLASSES = {
    BlockStorage: ("BlockScaled", ("element",)),
    PackedIntStorage: ("PackedInt", ("layout",)),
    GroupStorage: ("GroupInt", ()),
}


def constructor(spec: ir.CodecSpec) -> Bracketed:
    """`BlockScaled("fp8", "f8e4m3", block=(128, 128), ...)`; arguments at their default are left out."""
    codec = parse_codec(spec)
    match codec.kind:
        case "cast":
            name = "NarrowCast" if codec.name.startswith("f8") else "Cast"
            return call(name, quoted(codec.name), quoted(codec.name))
        case "add":
            return call("Add", quoted(codec.name), repr(codec.amount))
        case "neg_exp":
            return call("NegExp", quoted(codec.name))
    name, positional = _CLASSES[type(codec)]
    given = {one.name: getattr(codec, one.name) for one in fields(codec) if one.init and one.name != "name"}
    plain = {one.name: one.default for one in fields(codec)}
    words = [f"{name}={_literal(value)}" for name, value in given.items() if _said(name, value, plain, positional)]
    return call(name, quoted(codec.name), *(_literal(given[name]) for name in positional), *words)


def _said(name: str, value: object, plain: dict[str, object], positional: tuple[str, ...]) -> bool:
    """Whether an argument is written by name: the block always, others where they are not at their default."""
    return name not in positional and (name in ("block", "scale", "group") or value != plain[name])


def _literal(value: object) -> str:
    match value:
        case str():
            return quoted(value)
        case tuple():
            items = [_literal(item) for item in value]
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    return repr(value)
