"""What the code of all rules of a map shares: names of params and constants, and the words that are taken."""

from __future__ import annotations

from mapdsl.compiler import ir
from mapdsl.emit.expressions import quoted
from mapdsl.emit.ranks import Held
from mapdsl.emit.reserved import attribute, fresh, local
from mapdsl.language import tree


class Context:
    """Names in one adapter. `attributes` gives the attribute of each param; `codecs` are those that need a constant.

    `positions` are the names of axes that some rule counts, whose local variables are integers.
    """

    def __init__(self, resolved: ir.Map) -> None:
        self.map = resolved
        self.sides = (resolved.left, resolved.right)
        self.methods = method_names(resolved.left, resolved.right)
        self.attributes = {name: attribute(name, self.methods) for name in resolved.params}
        self.held = Held(resolved, self.attributes)
        self.words_of_names = {**self.attributes, **self.held.names()}
        self.words = {local(word) for word in _words(resolved)}
        self.positions = set(resolved.indices) | _positions(resolved)
        self._types: dict[tuple[int, str], str] = {}  # of variables, by the side that is taken from
        self.codecs: dict[str, ir.CodecSpec] = {}
        self.alternatives: dict[tuple[str, ...], str] = {}
        self._constants: set[str] = {"RAW"} | self.words
        self._constant_of: dict[str, str] = {"raw": "RAW"}
        # The variables that hold the prefixes of a block whose body is stated once.
        taken = set(self.words)
        self.prefixes = (fresh(self.sides[0], taken), fresh(self.sides[1], taken))

    def stored(self, codecs: tuple[ir.CodecSpec, ...]) -> str | None:
        """The constant of a tensor's alternatives; None where it is stored as it is."""
        if not codecs:
            return None
        if codecs[0].name == "partial":  # how much a rank stores is known when there are ranks
            return f"self.partial({quoted(str(codecs[0].arguments[0].value[0]))})"  # type: ignore[index]
        names = tuple(codec_name(codec) for codec in codecs)
        if names not in self.alternatives:
            words = [self.constant(codec) for codec in codecs]
            wanted = "_".join(words) if len(words) > 1 else f"{words[0]}_ONLY"
            self.alternatives[names] = fresh(wanted, self._constants)
        return self.alternatives[names]

    def constant(self, codec: ir.CodecSpec) -> str:
        """The module constant of a codec: `FP8`; for a built-in with arguments `ADD_1`."""
        name = codec_name(codec)
        if name not in self._constant_of:
            self.codecs[name] = codec
            self._constant_of[name] = fresh(name.upper(), self._constants)
        return self._constant_of[name]

    def variable(self, wanted: str, taken: set[str], of_type: str, sources: tuple[int, ...] = (0, 1)) -> str:
        """A variable's name that one rule has not taken, and that no rule of these directions has for another type.

        All rules of a direction stand in one function, where type checkers want one type of each variable.
        """
        name = fresh(wanted, taken, lambda name: all(self._types.get((s, name), of_type) == of_type for s in sources))
        self._types.update(((source, name), of_type) for source in sources)
        return name

    def constant_named(self, name: str) -> str:
        """The constant of a codec by its `codec_name`."""
        return self._constant_of[name]


def codec_name(codec: ir.CodecSpec) -> str:
    """A codec's name; of one with arguments at its use, with them: `add_1`."""
    words = [codec.name]
    if codec.kind == "add":
        words += [str(a.value).replace("-", "minus_").replace(".", "_").replace("+", "") for a in codec.arguments]
    return "_".join(words)


def method_names(left: str, right: str) -> frozenset[str]:
    """Public methods that the names of the sides make."""
    return frozenset(
        (f"from_{left}", f"to_{left}", f"convert_single_tensor_to_{left}", f"{left}_keys", f"{right}_keys")
    )


def _words(resolved: ir.Map) -> set[str]:
    """Every name of an axis, an index, an enumeration or a wildcard of the map."""
    words = set(resolved.indices)
    for rule in resolved.rules:
        for tensor in (*rule.left, *rule.right):
            words |= {axis.name for axis in ir.axes_of(tensor.shape) if axis.name} if tensor.shape else set()
            words |= _holes(tensor.template)
    for accept in resolved.accepts:
        words |= _holes(accept.old)
    return words


def _positions(resolved: ir.Map) -> set[str]:
    """The axes that stand in a shape, or that copies are told apart by."""
    found: set[str] = set()
    for rule in resolved.rules:
        for tensor in (*rule.left, *rule.right):
            found |= {axis.name for axis in ir.axes_of(tensor.shape) if axis.name} if tensor.shape else set()
            found |= {p.name for p in tensor.template.parts if isinstance(p, tree.EnumHole) and p.repeat}
    return found


def _holes(template: tree.Template) -> set[str]:
    return {p.name for p in template.parts if isinstance(p, (tree.EnumHole, tree.WildcardHole)) and p.name}
