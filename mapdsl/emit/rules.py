"""The code of one rule in one direction.

Reading goes left to right, writing right to left, so a direction is a pair (source side, target side) and both come out
of the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Layout, Piece, name_axes
from mapdsl.emit.expressions import local, name_code, pattern_code, python, quoted, wildcard
from mapdsl.emit.layout import INDENT, Bracketed, Code, call, flat, lines
from mapdsl.emit.views import Sizes, common_runs, flattened, view
from mapdsl.language import tree
from mapdsl.language.unparse import unparse_shape

LEFT, RIGHT = 0, 1


@dataclass(frozen=True)
class Loop:
    """One `for` line around a rule; `axis` is the axis it runs over."""

    axis: str
    code: str


class RuleEmitter:
    """Emits one rule. `alternatives` names the constant of a tuple of codecs; `sides` are the names of the two sides."""

    def __init__(
        self, rule: ir.Rule, layout: Layout, resolved: ir.Map, alternatives: dict[tuple[str, ...], str]
    ) -> None:
        self.rule = rule
        self.layout = layout
        self.map = resolved
        self.alternatives = alternatives
        self.spelled = self._spellings()
        self.sizes = Sizes(self._size_codes())

    # --- loops ---

    def index_loops(self) -> list[Loop]:
        """Loops over the indices of a match, outermost first; a bound may use an index before it."""
        closed = [a for a in self.layout.matched if a in self.map.indices and self.map.indices[a].upper is not None]
        return [Loop(a, self._loop(a)) for a in closed]

    def inner_loops(self) -> list[Loop]:
        """Loops over the enumerations of a match, inside the guard."""
        return [Loop(a, self._loop(a)) for a in self.layout.matched if a in self.rule.enumerations]

    def guard(self) -> str | None:
        """The guard as code."""
        return None if self.rule.guard is None else python(self.rule.guard, self.map.params)

    def outer_guard(self) -> str | None:
        """The guard, where it can be asked before any name is looked at: no open index takes part."""
        names = set(ir.names_in(self.rule.guard)) if self.rule.guard is not None else set()
        open_ = {n for n in names if n in self.map.indices and self.map.indices[n].upper is None}
        return None if open_ else self.guard()

    def _loop(self, axis: str, *, counted: bool = False, side: int | None = None) -> str:
        if axis in self.map.indices:
            return f"for {local(axis)} in {self._range(axis)}"
        variables = self._variables(axis, side)
        size = self.rule.enumerations[axis].size
        names = [v for v, _ in variables]
        columns = [spellings for _, spellings in variables]
        if not names:
            return f"for {local(axis)} in range({size})"
        rows = [", ".join(quoted(column[n]) for column in columns) for n in range(size)]
        values = f"({', '.join(rows if len(names) == 1 else [f'({row})' for row in rows])}{',' if size == 1 else ''})"
        targets = names[0] if len(names) == 1 else ", ".join(names)
        if counted:
            targets = f"({targets})" if len(names) > 1 else targets
            return f"for {local(axis)}, {targets} in enumerate({values})"
        return f"for {targets} in {values}"

    def _range(self, axis: str) -> str:
        index = self.map.indices[axis]
        bounds = [python(b, self.map.params) for b in (index.lower, index.upper) if b is not None]
        return f"range({', '.join(bounds)})"

    def _spellings(self) -> dict[tuple[str, tuple[str, ...]], str]:
        """The local variable that holds each spelling of each enumeration: `j`, or `hf_j` and `native_j`."""
        found: dict[str, dict[tuple[str, ...], int]] = {}
        for side, tensors in enumerate(self.rule.sides):
            for tensor in tensors:
                for part in tensor.template.parts:
                    if isinstance(part, tree.EnumHole):
                        found.setdefault(part.name, {}).setdefault(part.spellings, side)
        out = {}
        for name, spellings in found.items():
            absorbed = name not in self.layout.matched
            for number, (spelling, side) in enumerate(spellings.items()):
                if len(spellings) == 1 and not absorbed:
                    variable = local(name)
                else:
                    variable = f"{(self.map.left, self.map.right)[side]}_{name}"
                    variable += str(number + 1) if len(spellings) > 2 else ""
                out[name, spelling] = local(variable)
        return out

    def _variables(self, axis: str, side: int | None) -> list[tuple[str, tuple[str, ...]]]:
        """Variables and spellings of an enumeration, of one side or of both."""
        tensors = [t for n, ts in enumerate(self.rule.sides) if side in (None, n) for t in ts]
        used = {
            p.spellings for t in tensors for p in t.template.parts if isinstance(p, tree.EnumHole) and p.name == axis
        }
        return [(v, s) for (name, s), v in self.spelled.items() if name == axis and s in used]

    def all_names(self, tensor: ir.Tensor) -> Code:
        """Every name of a tensor within one round of the index loops, as arguments of a call."""
        side = 0 if tensor in self.rule.left else 1
        loops = [axis for axis in self.layout.matched if axis in self.rule.enumerations]
        absorbed = [a for a in name_axes(tensor.template, self.map.indices) if a in self.layout.in_names[side]]
        clauses = [self._loop(axis, side=side) for axis in (*loops, *absorbed)]
        if not clauses:
            return self.name(tensor)
        return Bracketed("*", [self.name(tensor), *clauses], comprehension=True)

    # --- sizes ---

    def _size_codes(self) -> dict[str, str]:
        codes: dict[str, str] = {}
        for tensor in (*self.rule.left, *self.rule.right):
            for axis in ir.axes_of(tensor.shape) if tensor.shape else ():
                if axis.name is not None:
                    codes[axis.name] = self._size(axis.name) or local(axis.name)
                elif axis.size is not None:
                    codes[str(axis.size)] = str(axis.size)
        for axis_name in (*self.layout.in_names[0], *self.layout.in_names[1]):
            codes[axis_name] = self._size(axis_name) or local(axis_name)
        return codes

    def _size(self, axis: str) -> str | None:
        """The size of an axis that does not depend on tensors."""
        if axis in self.rule.enumerations:
            return str(self.rule.enumerations[axis].size)
        if axis in self.map.params:
            return python(tree.Name(axis, span=self.rule.span), self.map.params)
        index = self.map.indices.get(axis)
        if index is None or index.upper is None:
            return None
        upper = python(index.upper, self.map.params)
        if index.lower is None:
            return upper
        return f"({upper} - {python(tree.Operation('-', (index.lower,), span=index.span), self.map.params)[1:]})"

    def _pattern(self, shape: tree.Shape, also_known: set[str]) -> tuple[list[Code], list[str]]:
        """Arguments that state a shape: its pattern and the sizes known; and the axes still unknown, in order."""
        text = unparse_shape(shape)[1:-1].replace("repeat ", "")
        known: dict[str, str] = {}
        unknown: dict[str, None] = {}
        for axis in ir.axes_of(shape):
            if axis.name is None:
                continue
            size = self._size(axis.name)
            if size is None and axis.name not in also_known:
                unknown[axis.name] = None
            else:
                known[axis.name] = size or local(axis.name)
        return [quoted(text), *(f"{local(axis)}={code}" for axis, code in known.items())], list(unknown)

    # --- pieces of calls ---

    def name(self, tensor: ir.Tensor) -> str:
        """Code that spells a tensor's name."""
        return name_code(tensor.template, self.map.params, self.spelled)

    def stored(self, tensor: ir.Tensor) -> str | None:
        """The constant of a tensor's alternatives."""
        return self.alternatives[tuple(c.name for c in tensor.codecs)] if tensor.codecs else None

    def _optional(self) -> str | None:
        return "optional=True" if self.rule.optional else None

    def take(self, tensor: ir.Tensor, *, name: str | None = None) -> Bracketed:
        """`take(NAME, STORED, shape=...)`: taken whole, checked against its shape."""
        arguments: list[Code] = []
        if tensor.shape is not None:
            pattern, _ = self._pattern(tensor.shape, set())
            arguments = [f"shape={pattern[0]}", *pattern[1:]]
        return call("take", name or self.name(tensor), self.stored(tensor), *arguments, self._optional())

    # --- whole rules ---

    def emit(self, source: int, depth: int) -> list[str]:
        """The lines of the rule from a source side to the other, at an indentation, without its match's loops."""
        target = RIGHT if source == LEFT else LEFT
        here, there = self.rule.sides[source], self.rule.sides[target]
        if not there:
            return self._absent_target(source, depth)
        if not here:
            return self._absent_source(target, depth)
        if self.layout.is_rename:
            return self._rename(here[0], there[0], depth)
        return Movement(self, source, target).emit(depth)

    def _rename(self, here: ir.Tensor, there: ir.Tensor, depth: int) -> list[str]:
        shapes = self.layout.shapes[0][0] if self.layout.shapes[0] else None
        if here.shape is None and shapes is not None:
            here = ir.Tensor(here.template, shapes, here.codecs, here.span)
        head, depth = self._wild_head(here.template, depth)
        return [*head, *lines(call("put", self.name(there), self.take(here), self.stored(there)), depth)]

    def shut_wild(self, tensor: ir.Tensor, depth: int) -> list[str]:
        """Keep the names of an `else` rule whose guard does not hold from wider `else` rules."""
        head, inner = self._wild_head(tensor.template, depth)
        return [*head, *lines(call("take.shut", self.name(tensor)), inner)]

    def _wild_head(self, template: tree.Template, depth: int) -> tuple[list[str], int]:
        """The loop over the names that a template with wildcards, or an open index, fits; and the depth inside."""
        wild = [wildcard(a[1:-1]) for a in name_axes(template, {}) if a[0] == "{"]
        holes = [part for part in template.parts if isinstance(part, tree.NumberHole) and self._open_index(part)]
        if not wild and not holes:
            return [], depth
        # An open index has no range to loop over: its number is read off the names.
        variables = [(part.span.start, "number") for part in holes]
        variables += [
            (p.span.start, wildcard(p.name or "*")) for p in template.parts if isinstance(p, tree.WildcardHole)
        ]
        ordered = [name for _, name in sorted(variables)]
        targets = f"({ordered[0]},)" if len(ordered) == 1 else ", ".join(ordered)
        pattern = pattern_code(template, self.map.params, self.spelled, open_holes=frozenset(map(id, holes)))
        out = [f"{INDENT * depth}for {targets} in take.wild({pattern}):"]
        if holes:
            name = self._open_index(holes[0]) or ""
            offset = _offset(holes[0].value, name)
            less = f" - {python(offset, self.map.params)}" if offset is not None else ""
            out.append(f"{INDENT * (depth + 1)}{local(name)} = int(number){less}")
            lower = self.map.indices[name].lower
            conditions = [f"{local(name)} >= {python(lower, self.map.params) if lower else 0}"]
            guard = self.guard() if self.outer_guard() is None else None
            conditions += [guard if " or " not in guard else f"({guard})"] if guard else []
            out.append(f"{INDENT * (depth + 1)}if {' and '.join(conditions)}:")
        return out, depth + 1 + bool(holes)

    def _open_index(self, hole: tree.NumberHole) -> str | None:
        """The index without an upper bound that a hole holds."""
        for name in ir.names_in(hole.value):
            if name in self.map.indices and self.map.indices[name].upper is None:
                return name
        return None

    def _absent_target(self, source: int, depth: int) -> list[str]:
        """The other side has nothing: drop, compare, or see that it is there."""
        if (self.rule.arrow, source) in (("->", RIGHT), ("<-", LEFT)):
            return []
        out: list[str] = []
        value = self.rule.value
        for tensor in self.rule.sides[source]:
            name, stored = self.name(tensor), self.stored(tensor)
            code: Bracketed
            if value is None:
                code = call("take.drop", name, stored)
            elif not value.compared:
                code = self.take(tensor)
            elif isinstance(value.content, tree.Template):
                code = call("take.tied", name, name_code(value.content, self.map.params, self.spelled))
            else:
                code = call("take.equal", name, self._value(value), stored)
            head, inner = self._wild_head(tensor.template, depth)
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
                out += lines(call("put.tie", name, name_code(value.content, self.map.params, self.spelled)), depth)
            elif isinstance(value.content, tree.Generator):
                out += lines(call("put", name, self._value(value), stored), depth)
            else:
                sizes = [self.sizes.dimension(d) for d in tensor.shape.dimensions] if tensor.shape else []
                shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
                out += lines(call("put.full", name, shape, self._value(value), stored), depth)
        return out

    def _value(self, value: tree.Value) -> str:
        match value.content:
            case tree.Number(value=number):
                return repr(float(number))
            case tree.Generator(name=name, arguments=arguments):
                return f"{name}({', '.join(python(a, self.map.params) for a in arguments)})"
        raise AssertionError(value)


class Movement:
    """The code of a rule that moves axes: parts gathered into a whole, a whole scattered into parts, or both."""

    def __init__(self, emitter: RuleEmitter, source: int, target: int) -> None:
        self.e = emitter
        self.source, self.target = source, target
        self.here, self.there = emitter.rule.sides[source], emitter.rule.sides[target]
        self.shapes = emitter.layout.shapes
        self.lists = {side: self._variables_of(side) for side in (source, target)}

    def emit(self, depth: int) -> list[str]:
        """Lines: names, the check that the group is whole, sizes, and the moves."""
        out: list[str] = []
        for side in (LEFT, RIGHT):
            for number, tensor in enumerate(self.e.rule.sides[side]):
                out += self._names(side, number, tensor, depth)
        out += lines(self._group(), depth, before="if ", after=":")
        depth += 1
        out += self._sizes(depth)
        out += self._allocations(depth)
        for number, tensor in enumerate(self.here):
            out += self._moves(number, tensor, depth)
        for number, tensor in enumerate(self.there):
            if self._is_whole(self.target, number):
                out += self._finish(number, tensor, depth)
        return out

    def _finish(self, number: int, tensor: ir.Tensor, depth: int) -> list[str]:
        """Put a tensor that has been filled; one of several has its name by the same key."""
        name, whole, stored = self._name(self.target, number), self._whole(self.target, number), self.e.stored(tensor)
        if not self._absorbed(self.target, tensor):
            return lines(call("put", name, whole, stored), depth)
        head = f"{INDENT * depth}for key, target in {name}s.items():"
        return [head, *lines(call("put", "target", f"{whole}s[key]", stored), depth + 1)]

    # --- names ---

    def _absorbed(self, side: int, tensor: ir.Tensor) -> list[str]:
        axes = name_axes(tensor.template, self.e.map.indices)
        return [axis for axis in axes if axis in self.e.layout.in_names[side]]

    def _variables_of(self, side: int) -> list[str]:
        side_name = (self.e.map.left, self.e.map.right)[side]
        tensors = self.e.rule.sides[side]
        return [f"{side_name}{number + 1 if len(tensors) > 1 else ''}" for number in range(len(tensors))]

    def _names(self, side: int, number: int, tensor: ir.Tensor, depth: int) -> list[str]:
        """The name of a tensor, or a dict of names by the positions of the axes that the names absorb."""
        variable = f"{self.lists[side][number]}_name"
        absorbed = self._absorbed(side, tensor)
        if not absorbed:
            return lines(self.e.name(tensor), depth, before=f"{variable} = ")
        key = local(absorbed[0]) if len(absorbed) == 1 else f"({', '.join(map(local, absorbed))})"
        clauses = [self.e._loop(axis, counted=True, side=side) for axis in absorbed]
        items: list[Code] = [f"{key}: {self.e.name(tensor)}", *clauses]
        names = Bracketed("", items, brackets="{}", comprehension=True)
        return lines(names, depth, before=f"{variable}s = ")

    def _name(self, side: int, number: int) -> str:
        return f"{self.lists[side][number]}_name"

    def _group(self) -> Bracketed:
        """`take.group(NAMES, STORED, shape=...)`, all operands together: a group is whole or an error."""
        parts: list[Code] = []
        for number, tensor in enumerate(self.here):
            many = self._absorbed(self.source, tensor)
            parts.append(f"*{self._name(self.source, number)}s.values()" if many else self._name(self.source, number))
        names: Code = Bracketed("", parts, brackets="[]")
        if len(parts) == 1 and str(parts[0])[0] == "*":
            names = str(parts[0])[1:]
        stated: list[Code] = []
        if len(self.here) == 1:
            pattern, _ = self.e._pattern(self._shape(self.source, 0), set())
            stated = [f"shape={pattern[0]}", *pattern[1:]] if len(pattern) > 1 else []
        return call("take.group", names, self.e.stored(self.here[0]), *stated, self.e._optional())

    def _first(self, side: int, number: int) -> str:
        """Code of the name of a tensor that stands for its group."""
        tensor = self.e.rule.sides[side][number]
        absorbed = self._absorbed(side, tensor)
        if not absorbed:
            return self._name(side, number)
        return f"next(iter({self._name(side, number)}s.values()))"

    # --- sizes and wholes ---

    def _sizes(self, depth: int) -> list[str]:
        """Read the unknown sizes off the source tensors; what is found by one is known to the next."""
        out: list[str] = []
        known: set[str] = set()
        for number in range(len(self.here)):
            pattern, unknown = self.e._pattern(self._shape(self.source, number), known)
            known |= set(unknown)
            if not unknown:
                continue  # the tensor itself is checked when it is taken
            code = call("take.sizes", self._first(self.source, number), *pattern)
            variables = [local(axis) for axis in unknown]
            before = f"{', '.join(variables)} = " if len(variables) > 1 else "".join(f"({v},) = " for v in variables)
            out += lines(code, depth, before=before)
        return out

    def _shape(self, side: int, number: int) -> tree.Shape:
        shape = self.shapes[side][number]
        assert shape is not None  # Layout has pieces only where every tensor has a shape
        return shape

    def _pieces(self, side: int, number: int) -> list[tuple[Piece, Piece]]:
        """The pieces of one tensor, each with the one on the other side that it moves to."""
        pairs = [(p[side], p[1 - side]) for p in self.e.layout.pieces]
        return [(mine, other) for mine, other in pairs if mine.tensor == number]

    def _is_whole(self, side: int, number: int) -> bool:
        """Whether a target tensor is allocated first and filled piece by piece, not made in one step."""
        if side != self.target:
            return True
        pieces = self._pieces(side, number)
        other = self._absorbed(self.source, self.here[pieces[0][1].tensor])
        return len(pieces) > 1 or bool(other)

    def _whole(self, side: int, number: int) -> str:
        return self.lists[side][number]

    def _allocations(self, depth: int) -> list[str]:
        out: list[str] = []
        for number, tensor in enumerate(self.there):
            if not self._is_whole(self.target, number):
                continue
            sizes = [self.e.sizes.dimension(d) for d in self._shape(self.target, number).dimensions]
            code = call("take.empty", *sizes)
            absorbed = self._absorbed(self.target, tensor)
            if absorbed:
                # One tensor a position: allocated in a dict beside its name.
                variable = f"{self._whole(self.target, number)}s"
                items: list[Code] = [f"key: {flat(code)}", f"for key in {self._name(self.target, number)}s"]
                out += lines(Bracketed("", items, brackets="{}", comprehension=True), depth, before=f"{variable} = ")
            else:
                out += lines(code, depth, before=f"{self._whole(self.target, number)} = ")
        return out

    # --- moves ---

    def _moves(self, number: int, tensor: ir.Tensor, depth: int) -> list[str]:
        """Take each tensor of one source operand and move its pieces."""
        absorbed = self._absorbed(self.source, tensor)
        name = self._name(self.source, number)
        out: list[str] = []
        if absorbed:
            key = local(absorbed[0]) if len(absorbed) == 1 else f"({', '.join(map(local, absorbed))})"
            out.append(f"{INDENT * depth}for {key}, name in {name}s.items():")
            depth, name = depth + 1, "name"
        pieces = self._pieces(self.source, number)
        if len(pieces) == 1 and self._is_gathered(pieces[0], tensor):
            return out + self._gather(name, tensor, pieces[0], depth)
        variable = self._whole(self.source, number)
        out += lines(self.e.take(tensor, name=name), depth, before=f"{variable} = ")
        for mine, other in pieces:
            out += self._move(variable, number, mine, other, depth)
        return out

    def _is_gathered(self, piece: tuple[Piece, Piece], tensor: ir.Tensor) -> bool:
        """Whether a whole source tensor goes to one place of one target tensor."""
        _, other = piece
        target = self.there[other.tensor]
        return self._is_whole(self.target, other.tensor) and not self._absorbed(self.target, target)

    def _selected(self, side: int) -> dict[str, str]:
        """Axes that the other side's names hold: their position in this side's shapes is a loop variable."""
        positions = {}
        for axis in self.e.layout.in_names[1 - side]:
            index = self.e.map.indices.get(axis)
            code = local(axis)
            if index is not None and index.lower is not None:
                code = f"{code} - {python(index.lower, self.e.map.params)}"
            positions[axis] = code
        return positions

    def _views(self, mine: Piece, other: Piece) -> tuple[str, str, list[tuple[str, ...]]]:
        """The piece in its source tensor and in its target, as views of the same dimensions."""
        taken, given = self._selected(self.source), self._selected(self.target)
        selected = set(taken) | set(given)
        # Dimensions go in the order of the part: what is gathered is taken whole, what is scattered is put whole.
        gathered = self._is_whole(self.target, other.tensor)
        runs = common_runs(mine, other, selected) if gathered else common_runs(other, mine, selected)
        from_ = view(
            self._whole(self.source, mine.tensor),
            self._shape(self.source, mine.tensor),
            mine,
            taken,
            runs,
            self.e.sizes,
        )
        whole = self._whole(self.target, other.tensor)
        if self._absorbed(self.target, self.there[other.tensor]):
            whole += "s[" + ", ".join(local(a) for a in self._absorbed(self.target, self.there[other.tensor])) + "]"
        to = view(whole, self._shape(self.target, other.tensor), other, given, runs, self.e.sizes)
        return from_, to, runs

    def _gather(self, name: str, tensor: ir.Tensor, piece: tuple[Piece, Piece], depth: int) -> list[str]:
        """`take.into(view of the whole, name)`, with the part's own shape stated where the view cuts it finer."""
        mine, other = piece
        _, to, runs = self._views(mine, other)
        copy = self._copy_code(tensor)
        pattern: list[Code] = []
        if [tuple(run) for run in runs] != [dim for dim in mine.dims if dim]:
            words, _ = self.e._pattern(self._shape(self.source, mine.tensor), set(self.e.sizes.of))
            pattern = [f"shape={words[0]}", *words[1:]]
        return lines(call("take.into", to, name, self.e.stored(tensor), copy, *pattern), depth)

    def _copy_code(self, tensor: ir.Tensor) -> str | None:
        """Copies behind the first are compared with it, not written again."""
        axes = [a for a in self._absorbed(self.source, tensor) if a in self.e.layout.repeated]
        return f"copy={' or '.join(f'{local(a)} > 0' for a in axes)}" if axes else None

    def _move(self, variable: str, number: int, mine: Piece, other: Piece, depth: int) -> list[str]:
        """Move one piece of a source tensor to its target: put it, or place it in a tensor that is being filled."""
        target = self.there[other.tensor]
        absorbed = self._absorbed(self.target, target)
        out: list[str] = []
        name = self._name(self.target, other.tensor)
        if absorbed:
            key = local(absorbed[0]) if len(absorbed) == 1 else f"({', '.join(map(local, absorbed))})"
            out.append(f"{INDENT * depth}for {key}, target in {name}s.items():")
            depth, name = depth + 1, "target"
        from_, to, runs = self._views(mine, other)
        if self._is_whole(self.target, other.tensor):
            return out + lines(call("place", to, from_, name), depth)
        done = from_ + flattened(other, runs)
        return out + lines(call("put.part", name, done, self.e.stored(target)), depth)


def _offset(value: tree.Expr, index: str) -> tree.Expr | None:
    """What is added to an index in a hole: `L` of `{L+x}`."""
    match value:
        case tree.Operation(operator="+", operands=(tree.Name(path=path), other)) if path == index:
            return other
        case tree.Operation(operator="+", operands=(other, tree.Name(path=path))) if path == index:
            return other
    return None
