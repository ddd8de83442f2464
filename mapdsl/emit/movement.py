"""The code of a rule that moves axes: parts gathered into a whole, a whole scattered into parts, or both.

From one tensor everything is made at once. From several, all are seen to be there before the first is taken, and each
is written to its place as it comes, so that only the result is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from mapdsl.compiler import ir
from mapdsl.compiler.shapes import Piece, keeps_blocks, with_padded_axes
from mapdsl.emit.expressions import local, quoted
from mapdsl.emit.layout import INDENT, WIDTH, Bracketed, Code, breakable, call, comprehension, fits, flat, lines
from mapdsl.emit.rules import RuleEmitter, clause
from mapdsl.emit.solving import axis_codes, is_simple, mentions, needed
from mapdsl.emit.variables import Variables
from mapdsl.emit.views import Run, View, common_runs, cut_dimensions, flattened, view
from mapdsl.emit.wild import first_position
from mapdsl.language import tree


class Movement:
    """One movement, from a source side to a target side."""

    def __init__(self, emitter: RuleEmitter, source: int, target: int) -> None:
        self.e = emitter
        self.source, self.target = source, target
        self.here, self.there = emitter.rule.sides[source], emitter.rule.sides[target]
        self.called = Variables(emitter, source)
        self.variables, self.names = self.called.tensors, self.called.names

    def emit(self, depth: int) -> list[str]:
        """The lines of the movement, for each name that its wildcards fit."""
        head, depth = self.e.wild.head(self._first_name(), self.source, depth)
        if self.e.rule.is_else:
            names = [self.e.all_names(self.target, tensor) for tensor in self.there]
            but = "but=narrower" if self.e.wild.narrow[self.target] else None
            head += lines(call("put.own", *names, but), depth)
        return head + self._emit(depth)

    def _first_name(self) -> tree.Template:
        return first_position(self.here[0].template, self.e.layout.in_names[self.source], self.e.firsts())

    def _emit(self, depth: int) -> list[str]:
        if self.called.is_from_one:
            return self._from_one(depth)
        return self._from_group(depth)

    # --- from one tensor ---

    def _from_one(self, depth: int) -> list[str]:
        variable, shape = self.variables[self.source][0], self._shape(self.source, 0)
        body = self._compare_zeros(0, self.e.name(self.here[0]), depth + 1)
        for number in range(len(self.there)):
            body += self._make(number, depth + 1)
        sizes = axis_codes(
            variable, self.e.pattern(shape), {local(axis): code for axis, code in self._known(shape).items()}
        )
        text = "\n".join(body)
        used = [axis for axis in sizes if mentions(text, axis)]
        into = self._into()
        take = self.e.take(self.here[0], shape, into=into)
        head = lines(take, depth, before=f"{variable} = ")
        head.append(f"{INDENT * depth}if {variable} is not None:")
        if all(is_simple(code) for code in sizes.values()):
            for axis in needed(used, sizes):
                head += lines(sizes[axis], depth + 1, before=f"{axis} = ")
            return head + body
        return head + self._read_sizes(used, depth + 1) + body

    def _make(self, number: int, depth: int) -> list[str]:
        """Make one target operand from the one source tensor, under the loops over what its name absorbs."""
        tensor = self.there[number]
        out: list[str] = []
        for axis in self._absorbed(self.target, number):
            out += self._loop(axis, depth, bool(self._selects(axis)))
            depth += 1
        if not self._is_filled(number):
            ((mine, other),) = self._pieces(number)
            return out + self._put_part(mine, other, self.e.name(tensor), depth)
        whole = self.variables[self.target][number]
        sizes = self._dimensions(number)
        method = f"{self.variables[self.source][0]}.new_{'zeros' if self._has_zeros(self.target, number) else 'empty'}"
        out += lines(call(method, *sizes), depth, before=f"{whole} = ")
        for mine, other in self._pieces(number):
            out += self._copy(mine, other, whole, self.e.name(self.here[0]), depth)
        return out + lines(call("put", self.e.name(tensor), whole, self.e.stored(tensor)), depth)

    def _selects(self, axis: str) -> bool:
        """Whether the source holds an axis in a shape, so that its position is needed."""
        return any(axis in mine.axes for number in range(len(self.there)) for mine, _ in self._pieces(number))

    def _loop(self, axis: str, depth: int, counted: bool) -> list[str]:
        return lines(self.e.loop(axis, counted=counted, side=self.target), depth, before="for ", after=":")

    # --- from several ---

    def _from_group(self, depth: int) -> list[str]:
        out: list[str] = []
        for number, tensor in enumerate(self.here):
            out += self._names(number, tensor, depth)
        body: list[str] = []
        for number in range(len(self.there)):
            if self._is_filled(number):
                body += self._allocate(number, depth + 1)
        for number in range(len(self.here)):
            body += self._take_all(number, depth + 1)
        for number in range(len(self.there)):
            if self._is_filled(number):
                body += self._finish(number, depth + 1)
        shapes = [self._shape(self.source, number) for number in range(len(self.here))]
        text = "\n".join(body)
        unknown = [local(axis) for axis in self.e.unknown_axes(*shapes) if mentions(text, local(axis))]
        out += lines(self._group(shapes), depth, before="if ", after=":")
        return out + self._read_sizes(unknown, depth + 1) + body

    def _read_sizes(self, axes: list[str], depth: int) -> list[str]:
        """Read sizes off the tensors of the group."""
        if len(axes) < 2:
            return [
                line for axis in axes for line in lines(call("take.size", quoted(axis)), depth, before=f"{axis} = ")
            ]
        return lines(call("take.sizes", *map(quoted, axes)), depth, before=f"{', '.join(axes)} = ")

    def _names(self, number: int, tensor: ir.Tensor, depth: int) -> list[str]:
        """The name of an operand, or a dict of names by the positions of the axes that they absorb."""
        absorbed, name = self._absorbed(self.source, number), self.e.name(tensor)
        code = self._by_position(absorbed, name, self.source) if absorbed else name
        return lines(code, depth, before=f"{self.names[number]} = ")

    def _by_position(self, absorbed: list[str], value: Code, side: int) -> Bracketed:
        clauses = [clause(self.e.loop(axis, counted=True, side=side)) for axis in absorbed]
        return comprehension("{}", _entry(absorbed, value), clauses)

    def _group(self, shapes: list[tree.Shape]) -> Bracketed:
        """`take.group((NAMES, SHAPE, STORED), ..., SIZES)`."""
        operands: list[Code] = []
        for number, tensor in enumerate(self.here):
            many = self._absorbed(self.source, number)
            names = f"{self.names[number]}.values()" if many else self.names[number]
            operands.append(call("", names, quoted(self.e.pattern(shapes[number])), self.e.stored(tensor)))
        return call("take.group", *operands, *self.e.known_sizes(*shapes), self.e.optional(), self._into())

    def _allocate(self, number: int, depth: int) -> list[str]:
        method = "take.zeros" if self._has_zeros(self.target, number) else "take.empty"
        code = call(method, *self._dimensions(number))
        whole, absorbed = self.variables[self.target][number], self._absorbed(self.target, number)
        if not absorbed:
            return lines(code, depth, before=f"{whole} = ")
        return lines(self._empties(absorbed, code), depth, before=f"{whole} = ")

    def _empties(self, absorbed: list[str], code: Code) -> Bracketed:
        """One tensor a position of the axes that the names absorb."""
        clauses: list[Code] = []
        for axis in absorbed:
            if axis in self.e.rule.enumerations:
                clauses.append(f"for {local(axis)} in range({self.e.rule.enumerations[axis].size})")
            else:
                clauses.append(clause(self.e.loop(axis)))
        return comprehension("{}", _entry(absorbed, code), clauses)

    def _take_all(self, number: int, depth: int) -> list[str]:
        """Take each tensor of one source operand and move its pieces."""
        variable, absorbed = self.variables[self.source][number], self._absorbed(self.source, number)
        name = self.names[number]
        out: list[str] = []
        if absorbed:
            out.append(f"{INDENT * depth}for {_key(absorbed)}, name in {name}.items():")
            depth, name = depth + 1, "name"
        pieces = [(mine, other) for mine, other in self._all_pieces() if mine.tensor == number]
        if len(pieces) == 1 and self._is_gathered(*pieces[0]):
            return out + self._gather(name, number, pieces[0], depth)
        out += lines(call("take.part", name), depth, before=f"{variable} = ")
        out += self._compare_zeros(number, name, depth)
        for mine, other in pieces:
            out += self._move(mine, other, name, depth)
        return out

    def _pads(self, side: int, number: int) -> list[tuple[int, tree.Pad]]:
        """The padded dimensions of a tensor."""
        return [(n, d) for n, d in enumerate(self._shape(side, number).dimensions) if isinstance(d, tree.Pad)]

    def _has_zeros(self, side: int, number: int) -> bool:
        """Whether a tensor has elements that the other side lacks."""
        return bool(self._pads(side, number)) or any(one.tensor == number for one in self.e.layout.zeros[side])

    def _compare_zeros(self, number: int, name: str, depth: int) -> list[str]:
        """See that the parts of a source tensor that the other side lacks are zeros."""
        out: list[str] = []
        variable, shape = self.variables[self.source][number], self._shape(self.source, number)
        for piece in (one for one in self.e.layout.zeros[self.source] if one.tensor == number):
            runs = [run for run in cut_dimensions(shape, piece, self.e.sizes) if run]
            part = view(variable, shape, piece, {}, runs, self.e.sizes)
            out += self._with_view(part, lambda v: call("only_zeros", v, name), depth)
        return out

    def _is_gathered(self, mine: Piece, other: Piece) -> bool:
        """Whether a whole source tensor goes to one place of one target tensor."""
        if not self._is_filled(other.tensor) or self._absorbed(self.target, other.tensor):
            return False
        if self._has_zeros(self.source, mine.tensor):
            return False
        return not self._copies(mine, other) and not self._copies(other, mine)

    def _gather(self, name: str, number: int, piece: tuple[Piece, Piece], depth: int) -> list[str]:
        """`take.into(view of the whole, name)`."""
        _, to = self._views(*piece, self.variables[self.target][piece[1].tensor])
        copy = self._is_copy(number)
        copy_code = f"copy={copy}" if copy else None
        return self._with_view(to, lambda v: call("take.into", v, name, copy_code), depth)

    def _move(self, mine: Piece, other: Piece, name: str, depth: int) -> list[str]:
        """Move one piece of a source tensor to its target: put it, or copy it to where it is being filled."""
        number = other.tensor
        tensor, absorbed = self.there[number], self._absorbed(self.target, number)
        out: list[str] = []
        if not self._is_filled(number):
            for axis in absorbed:
                out += self._loop(axis, depth, axis in mine.axes)
                depth += 1
            return out + self._put_part(mine, other, self.e.name(tensor), depth)
        whole = self.variables[self.target][number]
        if absorbed:
            key, part = _key(absorbed), self.called.view(f"one_{whole}")
            out.append(f"{INDENT * depth}for {key}, {part} in {whole}.items():")
            depth, whole = depth + 1, part
        return out + self._copy(mine, other, whole, name, depth)

    def _finish(self, number: int, depth: int) -> list[str]:
        """Put a tensor that has been filled."""
        tensor, whole = self.there[number], self.variables[self.target][number]
        absorbed = self._absorbed(self.target, number)
        out: list[str] = []
        for axis in absorbed:
            out += self._loop(axis, depth, True)
            depth += 1
        key = f"[{', '.join(map(local, absorbed))}]" if absorbed else ""
        return out + lines(call("put", self.e.name(tensor), f"{whole}{key}", self.e.stored(tensor)), depth)

    # --- one piece ---

    def _put_part(self, mine: Piece, other: Piece, name: str, depth: int) -> list[str]:
        """Put a target tensor that is one view of a source tensor."""
        runs = self._runs(self.target, other, mine)
        from_ = self._source_view(mine, other, runs).then(*flattened(other, runs))
        stored = self.e.stored(self.there[other.tensor])
        return self._with_view(from_, lambda v: call("put.part", name, v, stored), depth)

    def _copy(self, mine: Piece, other: Piece, whole: str, name: str, depth: int) -> list[str]:
        """Copy one piece to its place in a target tensor; copies behind the first are compared with it."""
        from_, to = self._views(mine, other, whole)
        out: list[str] = []
        if copies := self._copies(mine, other):
            dims = flat(Bracketed("", [*map(str, range(len(copies)))])) if len(copies) > 1 else "(0,)"
            part = self.called.view("part")
            out += self._with_view(from_, lambda v: call("only_copy", v, dims, name), depth, before=f"{part} = ")
            from_ = View(part, ())
        copy = self._is_copy(mine.tensor)
        if copy is None:
            code = call(f"{to.code}.copy_", from_.code)
            if fits(block := lines(code, depth)) and len(block) < 3:
                return out + block
            return out + self._spelled_out(to, from_, depth)
        if filled := self._copies(other, mine):
            runs = self._runs(self.source, mine, other)
            from_ = from_.then(
                f".expand({', '.join([*(self.e.sizes.of[axis] for axis in filled), *['-1'] * len(runs)])})"
            )
        settle = f"(compare if {copy} else place)"
        return out + self._with_view(to, lambda v: call(settle, v, from_.code, name), depth)

    def _spelled_out(self, to: View, from_: View, depth: int) -> list[str]:
        """A copy that is too long for a line: the place first, then what goes there."""
        out: list[str] = []
        variable = self.called.view("slot")
        for code in to.spelled_out(variable, _room(depth, variable)):
            out += lines(code, depth, before=f"{variable} = ")
        return out + self._with_view(from_, lambda v: call(f"{variable}.copy_", v), depth)

    def _with_view(self, v: View, build: Callable[[str], Code], depth: int, before: str = "") -> list[str]:
        """A statement with a view in it; a view that makes the line too long is spelled out before."""
        block = lines(build(v.code), depth, before=before)
        if fits(block):
            return block
        variable = self.called.view("part")
        out: list[str] = []
        for step in v.spelled_out(variable, _room(depth, variable)):
            out += lines(step, depth, before=f"{variable} = ")
        return out + lines(build(variable), depth, before=before)

    def _views(self, mine: Piece, other: Piece, whole: str) -> tuple[View, View]:
        """The piece in its source tensor and in its target, as views of the same dimensions."""
        runs = self._runs(self.source, mine, other)
        given = self._positions(self.target, mine.tensor)
        copies = self._copies(other, mine)
        shape = self._shape(self.target, other.tensor)
        # Copying fills leading dimensions that the source does not have.
        to = view(whole, shape, other, given, [*((axis,) for axis in copies), *runs], self.e.sizes)
        return self._source_view(mine, other, runs), to

    def _runs(self, side: int, one: Piece, other: Piece) -> list[Run]:
        """The dimensions that a piece has in common with its counterpart, in the order of `one`, which is of `side`."""
        mine, theirs = (one, other) if side == self.source else (other, one)
        dims = [
            cut_dimensions(self._shape(s, piece.tensor), piece, self.e.sizes)
            for s, piece in ((side, one), (1 - side, other))
        ]
        return common_runs(dims[0], dims[1], self._alone(mine, theirs))

    def _source_view(self, mine: Piece, other: Piece, runs: list[Run]) -> View:
        taken = self._positions(self.source, other.tensor)
        copies: list[Run] = [(axis,) for axis in self._copies(mine, other)]
        variable, shape = self.variables[self.source][mine.tensor], self._shape(self.source, mine.tensor)
        return view(variable, shape, mine, taken, [*copies, *runs], self.e.sizes)

    def _positions(self, side: int, number: int) -> dict[str, str]:
        """Axes that the names of the other side's tensor absorb: their positions in this side's shapes."""
        return {axis: self.e.position(axis) for axis in self._absorbed(1 - side, number)}

    def _alone(self, mine: Piece, other: Piece) -> set[str]:
        selected = {*self._absorbed(self.source, mine.tensor), *self._absorbed(self.target, other.tensor)}
        return selected | set(self._copies(mine, other)) | set(self._copies(other, mine))

    def _copies(self, piece: Piece, other: Piece) -> list[str]:
        """Axes of copies in the shape of one piece, which the other one does not have."""
        return [a for a in piece.axes if a in self.e.layout.repeated and a not in other.axes]

    def _is_copy(self, number: int) -> str | None:
        """The condition that a source tensor is a copy behind the first."""
        axes = [a for a in self._absorbed(self.source, number) if a in self.e.layout.repeated]
        return " or ".join(f"{self.e.position(axis)} > 0" for axis in axes) or None

    # --- facts ---

    def _absorbed(self, side: int, number: int) -> list[str]:
        return self.e.absorbed(side, self.e.rule.sides[side][number])

    def _shape(self, side: int, number: int) -> tree.Shape:
        shape = self.e.layout.shapes[side][number]
        assert shape is not None  # Layout has pieces only where every tensor has a shape
        return shape

    def _dimensions(self, number: int) -> list[Code]:
        return [breakable(self.e.sizes.dimension(d)) for d in self._shape(self.target, number).dimensions]

    def _known(self, shape: tree.Shape) -> dict[str, str]:
        names = {axis.name for axis in ir.axes_of(with_padded_axes(shape)) if axis.name}
        return {name: size for name in names if (size := self.e.size(name)) is not None}

    def _all_pieces(self) -> list[tuple[Piece, Piece]]:
        """Pairs of pieces, the source's first."""
        return [(pair[self.source], pair[self.target]) for pair in self.e.layout.pieces]

    def _pieces(self, number: int) -> list[tuple[Piece, Piece]]:
        """The pieces that make up one target tensor."""
        return [(mine, other) for mine, other in self._all_pieces() if other.tensor == number]

    def _is_filled(self, number: int) -> bool:
        """Whether a target tensor is allocated first and filled piece by piece, not made in one step."""
        pieces = self._pieces(number)
        if len(pieces) > 1 or self._has_zeros(self.target, number):
            return True
        ((mine, other),) = pieces
        if self._copies(mine, other) or self._copies(other, mine):
            return True
        return bool(self._absorbed(self.source, mine.tensor))

    def _into(self) -> str | None:
        return self.e.into(self.here, self.there, keeps_blocks=keeps_blocks(self.e.rule, self.e.layout))


def _room(depth: int, variable: str) -> int:
    """How long code may be behind `variable = `."""
    return WIDTH - len(INDENT) * depth - len(variable) - len(" = ")


def _key(axes: list[str]) -> str:
    return local(axes[0]) if len(axes) == 1 else f"({', '.join(map(local, axes))})"


def _entry(axes: list[str], value: Code) -> Code:
    """An entry of a dict by positions."""
    if len(axes) == 1:
        return f"{local(axes[0])}: {flat(value)}"
    return Bracketed("", [local(axis) for axis in axes], after=f": {flat(value)}")
