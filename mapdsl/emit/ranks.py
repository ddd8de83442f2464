"""What one rank holds of the axes that meshes cut, as code: one adapter converts whole states and shares of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.compiler.sharding import how
from mapdsl.emit.expressions import Params, counted_from, local, python, quoted
from mapdsl.emit.layout import INDENT, Code, call, lines
from mapdsl.emit.reserved import ADAPTER_NAMES
from mapdsl.language import tree
from mapdsl.language.diagnostics import error
from mapdsl.runtime.shares import padded


@dataclass(frozen=True)
class Property:
    """A property of the adapter: `held_e`, the positions of an axis that the rank holds."""

    name: str
    text: str
    value: Code

    def lines(self, result: str) -> list[str]:
        """Its definition."""
        head = [f"{INDENT}@property", f"{INDENT}def {self.name}(self) -> {result}:", f'{INDENT * 2}"""{self.text}"""']
        return [*head, *lines(self.value, 2, before="return ")]


class Held:
    """The axes of a map that are cut over ranks, or padded, and the properties that stand for what a rank holds."""

    def __init__(self, resolved: ir.Map, attributes: Params) -> None:
        self.map, self.attributes = resolved, attributes
        self.cut = {axis.name: mesh for mesh in resolved.meshes for axis in mesh.axes}
        self.pads = self._pads()
        self._taken = {*attributes.values(), *ADAPTER_NAMES}
        self.positions: dict[str, Property] = {}
        self.firsts: dict[str, Property] = {}
        for name in self.pads:
            self.positions[padded(name)] = self._padded(name)
        for name in (*resolved.params, *resolved.indices):
            if name in self.cut or name in self.pads:
                self._add(name)

    @property
    def is_needed(self) -> bool:
        """Whether anything is cut or padded."""
        return bool(self.map.meshes or self.pads)

    def code(self, axis: str) -> str | None:
        """The range of positions of an axis that the rank holds; None where that is all, or read off the tensors."""
        return f"self.{self.positions[axis].name}" if axis in self.positions else None

    def names(self) -> dict[str, str]:
        """What the first positions of cut indices are called, and what their names count from, by attribute."""
        firsts = {first_of(name): f"{one.name}.start" for name, one in self.positions.items()}
        return firsts | {counted_from(name): one.name for name, one in self.firsts.items()}

    def table(self) -> list[str]:
        """`MESHES`: how each axis is shared out, by the names that axes have in patterns."""
        if not self.map.meshes:
            return []
        out: list[str] = []
        for mesh in self.map.meshes:
            axes: dict[str, str] = {local(axis.name): how(axis) for axis in mesh.axes}
            axes |= {padded(axis.name): "evenly" for axis in mesh.axes if axis.name in self.pads}
            items = [f"{quoted(axis)}: {quoted(word)}" for axis, word in axes.items()]
            out += lines(call("", *items), 2, before=f"{quoted(mesh.name)}: ", after=",")
        inner = (line.replace("(", "{").replace(")", "}") for line in out)
        return [f"{INDENT}MESHES: ClassVar[Meshes] = {{", *inner, f"{INDENT}}}"]

    def lines(self) -> list[str]:
        """All properties."""
        out: list[str] = []
        for result, found in (("range", self.positions), ("int", self.firsts)):
            for one in found.values():
                out += ["", *one.lines(result)]
        return out

    def _add(self, name: str) -> None:
        everything = self._range(name)
        value = call("self.held", quoted(name), everything)
        if name in self.pads:
            value = call("self.unpadded", quoted(name), self.code(padded(name)))
        text = f"Positions of `{name}` that this rank holds."
        self.positions[name] = Property(self._fresh(f"held_{name}"), text, value)
        if name in _counted_locally(self.map):
            text = f"What names with `{{local {name}}}` count from."
            value = call("self.counted_from", self.code(name), everything)
            self.firsts[name] = Property(self._fresh(f"first_{name}"), text, value)

    def _range(self, name: str) -> str:
        """All positions of a param or an index."""
        index = self.map.indices.get(name)
        if index is None:
            return f"range(self.{self.attributes[name]})"
        bounds = [bound for bound in (index.lower, index.upper) if bound is not None]
        return f"range({', '.join(python(bound, self.attributes) for bound in bounds if not _is_zero(bound))})"

    def _padded(self, name: str) -> Property:
        if name not in self.map.params:
            raise error("X304", f"`{name}` is padded, so it must be a param", self.pads[name].span)
        multiple = python(self.pads[name].multiple, self.attributes, outer=0)
        value = call("self.held_padded", quoted(name), f"range(self.{self.attributes[name]})", multiple)
        text = f"Positions of `{name}`, rounded up, that this rank holds."
        return Property(self._fresh(f"held_{padded(name)}"), text, value)

    def _pads(self) -> Mapping[str, tree.Pad]:
        """The padded axes; MapError, X304, where one is padded in two ways."""
        shapes = [t.shape for rule in self.map.rules for t in (*rule.left, *rule.right) if t.shape is not None]
        found: dict[str, tree.Pad] = {}
        for pad in _pads_of(shapes):
            name = pad.axis.name or ""
            if found.setdefault(name, pad).multiple != pad.multiple:
                raise error("X304", f"`{name}` is padded to two sizes", pad.span, found[name].span)
        return found

    def _fresh(self, wanted: str) -> str:
        while wanted in self._taken:
            wanted += "_"
        self._taken.add(wanted)
        return wanted


def first_of(index: str) -> str:
    """What the first position of an index of a rank is called in expressions. No name of a map has a space."""
    return f"first {index}"


def _counted_locally(resolved: ir.Map) -> set[str]:
    """The indices of `{local e}`."""
    tensors = [tensor for rule in resolved.rules for tensor in (*rule.left, *rule.right)]
    holes = [hole for tensor in tensors for hole in tensor.template.parts if isinstance(hole, tree.NumberHole)]
    return {hole.value.path for hole in holes if hole.local and isinstance(hole.value, tree.Name)}


def _is_zero(bound: tree.Expr) -> bool:
    return isinstance(bound, tree.Number) and bound.value == 0


def _pads_of(shapes: Iterable[tree.Shape]) -> Iterable[tree.Pad]:
    return (dimension for shape in shapes for dimension in shape.dimensions if isinstance(dimension, tree.Pad))
