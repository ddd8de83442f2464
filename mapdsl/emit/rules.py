"""The code of one rule in one direction.

Reading goes left to right, writing right to left, so a direction is a pair (source side, target side) and both come out
of the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Layout, name_axes
from mapdsl.emit.context import Context
from mapdsl.emit.expressions import Params, difference, local, name_code, python, quoted
from mapdsl.emit.layout import Bracketed, Code, breakable, call, comprehension, flat, lines, listed
from mapdsl.emit.patterns import holds_sum, named_axes, pattern_of
from mapdsl.emit.ranks import first_of
from mapdsl.emit.views import Sizes
from mapdsl.emit.wild import WildHead
from mapdsl.language import tree

LEFT, RIGHT = 0, 1

Tensors = tuple[ir.Tensor, ...]


@dataclass(frozen=True)
class Loop:
    """One `for` line around a rule; `axis` is the axis it runs over."""

    axis: str
    code: Code

    def lines(self, depth: int) -> list[str]:
        """The line, or lines where it is long."""
        return lines(self.code, depth, before="for ", after=":")


class RuleEmitter:
    """Emits one rule.

    `prefixes` are the codes of the names' prefixes that stand in variables, where the body of a block is stated once;
    `guard` is what is left of the rule's guard then. `bound` are the indices that loops around bind already.
    """

    def __init__(
        self,
        rule: ir.Rule,
        layout: Layout,
        context: Context,
        *,
        prefixes: tuple[str, str] = ("", ""),
        guard: tree.Expr | None = None,
        bound: frozenset[str] = frozenset(),
    ) -> None:
        self.rule = rule
        self.layout = layout
        self.context = context
        self.map = context.map
        self.prefixes = prefixes
        self.condition = guard
        self.bound = bound
        self.params = context.words_of_names
        self.words = self._words()
        self.spelled = self._spellings()
        self.sizes = Sizes(self._size_codes())
        self.wild = WildHead(self)

    # --- loops ---

    def index_loops(self) -> list[Loop]:
        """Loops over the indices of a match, outermost first; a bound may use an index before it."""
        return [Loop(a, self.loop(a)) for a in self.ordered(self.layout.matched) if self._is_closed(a)]

    def inner_loops(self) -> list[Loop]:
        """Loops over the enumerations of a match, inside the guard."""
        return [Loop(a, self.loop(a)) for a in self.layout.matched if a in self.rule.enumerations]

    def ordered(self, axes: tuple[str, ...] | list[str]) -> list[str]:
        """Axes so that an index comes behind those that its bounds use."""
        declared = list(self.map.indices)
        needed = {used for axis in axes if axis in self.map.indices for used in self._bounds_use(axis)}
        if not needed & set(axes):
            return list(axes)
        return sorted(axes, key=lambda axis: declared.index(axis) if axis in declared else len(declared))

    def guard(self) -> Code | None:
        """The guard as code."""
        return guard_code(self.condition, self.params)

    def outer_guard(self) -> Code | None:
        """The guard, where it can be asked before any name is looked at: no open index takes part."""
        names = set(ir.names_in(self.condition)) if self.condition is not None else set()
        return None if any(self.is_open(name) for name in names) else self.guard()

    def is_open(self, name: str) -> bool:
        """Whether this is an index without an upper bound."""
        return name in self.map.indices and self.map.indices[name].upper is None

    def _is_closed(self, axis: str) -> bool:
        return axis in self.map.indices and not self.is_open(axis) and axis not in self.bound

    def _bounds_use(self, axis: str) -> set[str]:
        index = self.map.indices[axis]
        return {n for b in (index.lower, index.upper) if b is not None for n in ir.names_in(b)} & set(self.map.indices)

    def loop(self, axis: str, *, counted: bool = False, side: int | None = None) -> Code:
        """`e in range(self.E)`, `j in ("w1", "w3")`; counted, an enumeration gives its positions too."""
        if axis in self.map.indices:
            positions = self.range(axis)
            if not positions.startswith("range("):
                return f"{local(axis)} in {positions}"
            return call(f"{local(axis)} in range", positions.removeprefix("range(")[:-1])
        variables = self._variables(axis, side)
        size = self.rule.enumerations[axis].size
        if not variables:
            return f"{local(axis)} in range({size})"
        columns = [spellings for _, spellings in variables]
        rows = [", ".join(quoted(column[n]) for column in columns) for n in range(size)]
        values = listed(rows if len(columns) == 1 else [f"({row})" for row in rows])
        targets = ", ".join(variable for variable, _ in variables)
        if not counted:
            return replace(values, before=f"{targets} in ")
        targets = f"({targets})" if len(variables) > 1 else targets
        return call(f"{local(axis)}, {targets} in enumerate", values)

    def range(self, axis: str) -> str:
        """The positions of an index, those that the rank holds."""
        if (held := self.context.held.code(axis)) is not None:
            return held
        index = self.map.indices[axis]
        lower = None if isinstance(index.lower, tree.Number) and index.lower.value == 0 else index.lower
        return f"range({', '.join(python(b, self.params) for b in (lower, index.upper) if b is not None)})"

    def _words(self) -> set[str]:
        """Variables that are taken in the code of this rule."""
        words = set(self.context.words) | set(self.context.prefixes)
        return words | {f"{self.context.prefixes[0]}s", "name", "target", "rest", "segment", "number", "narrower"}

    def _spellings(self) -> dict[tuple[str, tuple[str, ...]], str]:
        """The local variable that holds each spelling of each enumeration: `j`, or `hf_j` and `native_j`.

        It is no `j` where another rule of the map counts with that. Wildcards, without spellings, are treated alike.
        """
        found: dict[str, dict[tuple[str, ...], int]] = {}
        for side, tensors in enumerate(self.rule.sides):
            for tensor in tensors:
                for part in tensor.template.parts:
                    if isinstance(part, tree.EnumHole):
                        found.setdefault(part.name, {}).setdefault(part.spellings, side)
        out = {}
        for name, spellings in found.items():
            for spelling, side in spellings.items():
                alone = len(spellings) == 1 and name in self.layout.matched and name not in self.context.positions
                out[name, spelling] = local(name) if alone else self._spelling(side, name)
        return out | self._wildcards()

    def _wildcards(self) -> dict[tuple[str, tuple[str, ...]], str]:
        """The local variables of wildcards whose names are those of axes in other rules."""
        parts = [part for side in self.rule.sides for tensor in side for part in tensor.template.parts]
        names = {part.name for part in parts if isinstance(part, tree.WildcardHole) and part.name}
        return {(name, ()): self._spelling(LEFT, name) for name in sorted(names & self.context.positions)}

    def _spelling(self, side: int, name: str) -> str:
        return self.context.variable(f"{self.context.sides[side]}_{name}", self.words, "str")

    def _variables(self, axis: str, side: int | None) -> list[tuple[str, tuple[str, ...]]]:
        """Variables and spellings of an enumeration, of one side or of both."""
        tensors = [t for n, ts in enumerate(self.rule.sides) if side in (None, n) for t in ts]
        used = {
            p.spellings for t in tensors for p in t.template.parts if isinstance(p, tree.EnumHole) and p.name == axis
        }
        return [(v, s) for (name, s), v in self.spelled.items() if name == axis and s in used]

    def absorbed(self, side: int, tensor: ir.Tensor) -> list[str]:
        """The axes that a tensor's name absorbs, in an order for loops."""
        axes = [a for a in name_axes(tensor.template, self.map.indices) if a in self.layout.in_names[side]]
        return self.ordered(axes)

    def all_names(self, side: int, tensor: ir.Tensor) -> Code:
        """Every name of a tensor within one round of the index loops, as arguments of a call."""
        loops = [axis for axis in self.layout.matched if axis in self.rule.enumerations]
        clauses: list[Code] = [clause(self.loop(axis, side=side)) for axis in (*loops, *self.absorbed(side, tensor))]
        return comprehension("()", self.name(tensor), clauses, before="*") if clauses else self.name(tensor)

    # --- sizes ---

    def _size_codes(self) -> dict[str, str]:
        codes: dict[str, str] = {}
        for shape in (s for side in self.layout.shapes for s in side):
            for axis in ir.axes_of(shape) if shape else ():
                name = axis.name or str(axis.size)
                codes[name] = self.size(name) or local(name)
            for name in named_axes([shape] if shape else []):
                codes[name] = self.size(name) or local(name)
        for name in (*self.layout.in_names[0], *self.layout.in_names[1]):
            codes[name] = self.size(name) or local(name)
        return codes

    def size(self, axis: str) -> str | None:
        """The size of an axis that does not depend on tensors."""
        if axis.isdigit():
            return axis
        if axis in self.rule.enumerations:
            return str(self.rule.enumerations[axis].size)
        if (held := self.context.held.code(axis)) is not None:
            return f"len({held})"
        if axis in self.map.params:
            return f"self.{self.params[axis]}"
        index = self.map.indices.get(axis)
        if index is None or index.upper is None:
            return None
        code = difference(python(index.upper, self.params), index.lower, self.params)
        return f"({code})" if not code.replace("self.", "").isidentifier() and not code.isdigit() else code

    def position(self, axis: str) -> str:
        """The position of an index or an enumeration of a name in the dimension that holds it on the other side."""
        if (held := self.context.held.code(axis)) is not None:
            return f"{local(axis)} - {held}.start"
        index = self.map.indices.get(axis)
        return difference(local(axis), index.lower if index else None, self.params)

    def firsts(self) -> dict[str, tree.Expr]:
        """The first position of each index, as an expression that `name` and patterns know."""
        span = self.rule.span
        return {
            name: tree.Name(first_of(name), span=span)
            if self.context.held.code(name)
            else index.lower or tree.Number(0, span=span)
            for name, index in self.map.indices.items()
        }

    def pattern(self, shape: tree.Shape) -> str:
        """A shape as the runtime's patterns write it, axes by their local names."""
        return pattern_of(shape)

    def known_sizes(self, *shapes: tree.Shape) -> list[str]:
        """Keyword arguments that give the sizes of axes that do not depend on tensors; of those cut, the positions."""
        sizes = {name: self.context.held.code(name) or self.size(name) for name in named_axes(shapes)}
        return [f"{local(name)}={_bare(code)}" for name, code in sizes.items() if code is not None]

    def unknown_axes(self, *shapes: tree.Shape) -> list[str]:
        """Axes whose size is read off the tensors."""
        return [name for name in named_axes(shapes) if self.size(name) is None]

    # --- pieces of calls ---

    def name(self, tensor: ir.Tensor, template: tree.Template | None = None) -> str:
        """Code that spells a tensor's name, or another template of its side."""
        code = name_code(template or tensor.template, self.params, self.spelled)
        prefix = self.prefixes[LEFT if tensor in self.rule.left else RIGHT]
        inner = code.removeprefix("f")[1:-1]
        if not prefix or not inner.startswith(f"{prefix}."):
            return code
        variable = self.context.prefixes[LEFT if tensor in self.rule.left else RIGHT]
        return f'f"{{{variable}}}{inner.removeprefix(prefix)}"'

    def stored(self, tensor: ir.Tensor) -> str | None:
        """The constant of a tensor's alternatives."""
        return self.context.stored(tensor.codecs)

    def optional(self) -> str | None:
        """The argument that lets a group be absent."""
        return "optional=True" if self.rule.optional else None

    def into(self, here: Tensors, there: Tensors, *, keeps_blocks: bool) -> str | None:
        """The argument that says how the target is stored, where that matters: in a format of blocks that both sides
        share a tensor moves undecoded, and a dtype that the map states for all is decoded to, if all are decoded.
        """
        if keeps_blocks and shared_codecs(here[0], there[0]):
            return f"into={self.stored(there[0])}"
        names = {tuple(codec.name for codec in tensor.codecs) for tensor in there}
        codecs = tuple(codec for codec in there[0].codecs if codec.kind == "raw" or codec.name in ir.WIDE_CASTS)
        if not all(tensor.codecs for tensor in here) or len(names) > 1 or all(c.kind == "raw" for c in codecs):
            return None
        return f"into={self.context.stored(codecs)}"

    def take(
        self, tensor: ir.Tensor, shape: tree.Shape | None, *, into: str | None = None, name: str = ""
    ) -> Bracketed:
        """`take(NAME, STORED, shape=...)`: taken whole, checked against its shape."""
        return call("take", name or self.name(tensor), self.stored(tensor), *self.stated(shape), self.optional(), into)

    def stated(self, shape: tree.Shape | None) -> list[Code]:
        """Arguments that state a shape: the shape itself, or its pattern and the sizes known where some are not."""
        if shape is None:
            return []
        # Where ranks cut a tensor is read off its pattern.
        is_solved = not self.unknown_axes(shape) and not any(holds_sum(dimension) for dimension in shape.dimensions)
        if self.map.meshes or not is_solved:
            return [f"shape={quoted(self.pattern(shape))}", *self.known_sizes(shape)]
        sizes = [_bare(self.sizes.dimension(dimension)) for dimension in shape.dimensions]
        return [replace(listed(sizes), before="shape=") if sizes else "shape=()"]

    # --- whole rules ---

    def emit(self, source: int, depth: int) -> list[str]:
        """The lines of the rule from a source side to the other, at an indentation, without its match's loops."""
        from mapdsl.emit.movement import Movement  # movements are made of rules

        target = RIGHT if source == LEFT else LEFT
        here, there = self.rule.sides[source], self.rule.sides[target]
        if not there:
            return self._absent_target(source, depth)
        if not here:
            return self._absent_source(target, depth)
        if self.layout.is_rename:
            return self._rename(here[0], there[0], source, depth)
        return Movement(self, source, target).emit(depth)

    def _rename(self, here: ir.Tensor, there: ir.Tensor, source: int, depth: int) -> list[str]:
        shape = self.layout.shapes[0][0] if self.layout.shapes[0] else None
        into = self.into((here,), (there,), keeps_blocks=True)
        head, depth = self.wild.head(here.template, source, depth)
        put = "put.carried" if self.rule.is_else else "put"
        but = "but=narrower" if self.rule.is_else and self.wild.narrow[1 - source] else None
        code = call(put, self.name(there), self.take(here, shape, into=into), self.stored(there), but)
        return [*head, *lines(code, depth)]

    def _absent_target(self, source: int, depth: int) -> list[str]:
        """The other side has nothing: drop, compare, or see that it is there."""
        if (self.rule.arrow, source) in (("->", RIGHT), ("<-", LEFT)):
            return []
        out: list[str] = []
        value = self.rule.value
        for tensor in self.rule.sides[source]:
            name, stored = self.name(tensor), self.stored(tensor)
            stated = [*self.stated(tensor.shape), self.optional()]
            code: Bracketed
            if value is None:
                code = call("take.drop", name, stored)
            elif not value.compared:
                code = self.take(tensor, tensor.shape)
            elif isinstance(value.content, tree.Template):
                code = call("take.tied", name, self.name(tensor, value.content), stored, *stated)
            else:
                made = self._value(value)
                code = call("take.equal", name, made, stored, *stated)
            head, inner = self.wild.head(tensor.template, source, depth)
            out += [*head, *lines(code, inner)]
        return out

    def _absent_source(self, target: int, depth: int) -> list[str]:
        """There is nothing to take: make the constant, the copy or the generated tensor."""
        value = self.rule.value
        if value is None:
            return []
        out: list[str] = []
        for tensor in self.rule.sides[target]:
            name, stored = self.name(tensor), self.stored(tensor)
            if isinstance(value.content, tree.Template):
                out += lines(call("put.tie", name, self.name(tensor, value.content), stored), depth)
            elif isinstance(value.content, tree.Generator):
                out += lines(call("put.made", name, self._value(value), stored), depth)
            else:
                sizes = [self.sizes.dimension(d) for d in tensor.shape.dimensions] if tensor.shape else []
                shape = flat(listed([_bare(size) for size in sizes])) if sizes else "()"
                out += lines(call("put.full", name, shape, self._value(value), stored), depth)
        return out

    def _value(self, value: tree.Value) -> str:
        match value.content:
            case tree.Number(value=number):
                return repr(float(number))
            case tree.Generator(name=name, arguments=arguments):
                return f"{name}({', '.join(python(a, self.params) for a in arguments)})"
        raise AssertionError(value)


def guard_code(guard: tree.Expr | None, params: Params) -> Code | None:
    """A guard as code."""
    if guard is None:
        return None
    return breakable(python(guard, params))


def shared_codecs(one: ir.Tensor, other: ir.Tensor) -> bool:
    """Whether a tensor can be stored in one codec on both sides, so that it may move undecoded."""
    mine = {codec.name for codec in one.codecs if codec.kind in ir.QUANTISED}
    return bool(mine & {codec.name for codec in other.codecs})


def clause(code: Code) -> Code:
    """`for e in range(self.E)` of a comprehension."""
    return f"for {code}" if isinstance(code, str) else replace(code, before=f"for {code.before}")


def _bare(code: str) -> str:
    """Code without parentheses around all of it."""
    if code.startswith("(") and code.endswith(")") and code.count("(") == 1:
        return code[1:-1]
    return code
