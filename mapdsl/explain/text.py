"""A trace as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.laws import Grade, rule_law
from mapdsl.compiler.shapes import Piece
from mapdsl.explain.shares import Rank
from mapdsl.explain.slices import place
from mapdsl.explain.trace import Reading, Trace, partial_name, spellings
from mapdsl.language import tree
from mapdsl.language.unparse import unparse_expression, unparse_shape, unparse_value

Lines = list[tuple[str, str]]


@dataclass(frozen=True)
class Explanation:
    """Lines under a title; a line has a label, or an empty one where it goes on."""

    title: str
    lines: tuple[tuple[str, str], ...]


def explanations(
    checked: Checked, found: Trace, params: Mapping[str, Any] | None, rank: Rank | None = None
) -> list[Explanation]:
    """One explanation a reading, with what one rank holds, if it is given.

    Under a config, readings that it shuts out come only where no other is left.
    """
    readings = found.readings or found.shut
    return [_Writer(checked, found.name, reading, params, rank).explanation() for reading in readings]


class _Writer:
    def __init__(
        self, checked: Checked, asked: str, reading: Reading, params: Mapping[str, Any] | None, rank: Rank | None
    ) -> None:
        self.rank = rank
        self.checked = checked
        self.map = checked.map
        self.asked = asked
        self.reading = reading
        self.params = params
        self.sizes = {n: v for n, v in (params or {}).items() if isinstance(v, int) and not isinstance(v, bool)}
        self.sizes |= {name: enum.size for name, enum in reading.rule.enumerations.items()}
        self.is_left = reading.side == "left"
        # What the name fixes, or must be known to spell the other side; without a config only what is certain.
        self.values: dict[str, Any] = {**(params or {}), **reading.values}

    def explanation(self) -> Explanation:
        lines = [*self._identity(), *self._rule(), *self._bindings(), *self._condition()]
        if not self.reading.shut:
            lines += [*self._other_side(), *self._formats(), *self._legacy(), *self._law()]
            if self.rank is not None:
                lines += self.rank.lines(self.reading, self.sizes, self._name)
        return Explanation(self.asked, tuple(lines))

    # --- what it is ---

    def _identity(self) -> Iterator[tuple[str, str]]:
        reading = self.reading
        side = f"stored ({self.map.left})" if self.is_left else f"native ({self.map.right})"
        yield "side", side
        if reading.accept is not None:
            place = _place(reading.accept.span)
            yield "legacy", f"an old spelling of {reading.name}  ({place})"
        if reading.key != reading.name:
            names = " or ".join(codec.name for codec in reading.codecs)
            yield "part of", f"{reading.key}, where that is stored as {names}"

    def _rule(self) -> Iterator[tuple[str, str]]:
        rule = self.reading.rule
        yield "rule", f"{_place(rule.span)}: {' '.join(rule.span.text.split())}"
        for head in rule.heads:
            yield "under", " ".join(head.span.text.split())

    def _bindings(self) -> Iterator[tuple[str, str]]:
        reading = self.reading
        words = [f"{name} = {value}" for name, value in reading.values.items()]
        for name, position in reading.choice.items():
            words.append(f"{name} = {position} (`{_spelling(reading.tensor.template, name, position)}`)")
        words += [f"{{{name}}} = `{text}`" for name, text in reading.texts.items()]
        if words:
            yield "with", ", ".join(words)

    def _condition(self) -> Iterator[tuple[str, str]]:
        reading = self.reading
        if reading.shut:
            yield "but", f"it does not apply{' under this config' if self.params is not None else ''}: {reading.shut}"
        for index in reading.values:
            yield "range", self._range(index)
        if reading.rule.guard is not None:
            yield "where", unparse_expression(reading.rule.guard) + self._given(reading.rule.guard)
        if reading.unproved:
            yield "", f"(not proved to hold for any config: {reading.unproved})"
        elif self.params is None and not reading.shut and reading.example:
            shown = [f"{name} = {_value(value)}" for name, value in reading.example if name not in reading.values]
            if shown:
                yield "", f"for example {', '.join(shown)}"
        if reading.rule.is_else:
            yield "else", "it carries names that no other rule names"
        if reading.rule.optional:
            yield "optional", "it may be absent"

    def _given(self, guard: tree.Expr) -> str:
        """The values of the params in a guard, under a config; lists are too long to be told."""
        values = {name: value for name in ir.names_in(guard) if (value := (self.params or {}).get(name)) is not None}
        words = [f"{name} = {_value(value)}" for name, value in values.items() if not isinstance(value, list)]
        return f"  ({', '.join(words)})" if words else ""

    def _range(self, name: str) -> str:
        index = self.map.indices[name]
        lower = "0" if index.lower is None else unparse_expression(index.lower)
        upper = "" if index.upper is None else f" < {unparse_expression(index.upper)}"
        known = self.params.get(unparse_expression(index.upper)) if self.params and index.upper is not None else None
        return f"{lower} <= {name}{upper}" + (f" = {known}" if known is not None else "")

    # --- where it goes, or comes from ---

    def _other_side(self) -> Iterator[tuple[str, str]]:
        reading = self.reading
        others = reading.rule.right if self.is_left else reading.rule.left
        label = "goes to" if self.is_left else "comes from"
        if not others:
            yield from self._absent(label)
            return
        if not reading.layout.pieces:
            yield label, self._name(others[0])
            shape = reading.tensor.shape or others[0].shape
            yield "shape", f"{unparse_shape(shape)}, kept as it is" if shape is not None else "kept as it is"
            return
        yield "shape", self._shape(reading.tensor)
        pairs = [pair if self.is_left else pair[::-1] for pair in reading.layout.pieces]
        pairs = [pair for pair in pairs if pair[0].tensor == reading.entry.tensor]
        for number, (mine, theirs) in enumerate(pairs, 1):
            yield label, self._move(mine, theirs, others[theirs.tensor], f"piece {number}: " if len(pairs) > 1 else "")
            yield from self._absorbed(others[theirs.tensor])

    def _absent(self, label: str) -> Iterator[tuple[str, str]]:
        rule, value = self.reading.rule, self.reading.rule.value
        if value is not None:
            verb = "made anew" if self.is_left else "made when reading"
            kept = "compared" if value.compared else "not compared"
            other = "when reading" if self.is_left else "when writing"
            yield "value", f"{unparse_value(value)}: {verb}; {kept} {other}"
        elif self.is_left:
            kept = "read if there, not kept" if rule.arrow == "->" else "not read"
            yield label, f"nothing: {kept}, never written"
        else:
            yield label, "nothing: not made when reading, dropped when writing"

    def _move(self, mine: Piece, theirs: Piece, other: ir.Tensor, before: str) -> str:
        """`q.weight [(h c) d] at qkv.weight[0:h*c]`."""
        shapes = self.reading.layout.shapes[::1] if self.is_left else self.reading.layout.shapes[::-1]
        my_shape, their_shape = shapes[0][mine.tensor], shapes[1][theirs.tensor]
        assert my_shape is not None and their_shape is not None  # a rule that moves something has all shapes
        there = place(their_shape, theirs, self._positions(self.reading.tensor), self.sizes)
        here = place(my_shape, mine, _symbolic(other, self.reading), self.sizes)
        text = f"{before}{here.strip()}{' is ' if here else ''}{self._name(other)}{there}"
        axes = [[a for d in p.dims for a in d] for p in (mine, theirs)]
        common = [[a for a in side if a in axes[1 - number]] for number, side in enumerate(axes)]
        if common[0] != common[1]:
            text += f", axes {' '.join(common[1])} there in the order {' '.join(common[0])} here"
        return text

    def _positions(self, tensor: ir.Tensor) -> dict[str, str]:
        """The positions of the axes that this tensor's name absorbs: the number that it has in its range."""
        found = {}
        for axis, value in self.reading.values.items():
            index = self.map.indices[axis]
            plain = index.lower is None or (isinstance(index.lower, tree.Number) and index.lower.value == 0)
            found[axis] = str(value) if plain else f"{value} - ({unparse_expression(index.lower)})"  # type: ignore[arg-type]
        found |= {axis: str(position) for axis, position in self.reading.choice.items()}
        return {axis: text for axis, text in found.items() if axis not in self.reading.layout.matched}

    def _absorbed(self, other: ir.Tensor) -> Iterator[tuple[str, str]]:
        """How far the axes run that the other side's name holds and this one's shape."""
        for part in other.template.parts:
            match part:
                case tree.EnumHole(name=name, spellings=spelled) if name not in self.reading.choice:
                    yield "", f"for {name} = {', '.join(f'{n} (`{word}`)' for n, word in enumerate(spelled))}"
                case tree.NumberHole(value=value):
                    for name in ir.names_in(value):
                        if name in self.map.indices and name not in self.reading.values:
                            yield "", f"for {self._range(name)}"

    def _name(self, tensor: ir.Tensor) -> str:
        return partial_name(tensor.template, self.values, self.reading.choice, self.reading.texts)

    def _shape(self, tensor: ir.Tensor) -> str:
        if tensor.shape is None:
            return "-"
        text = unparse_shape(tensor.shape)
        axes = dict.fromkeys(axis.name for axis in ir.axes_of(tensor.shape) if axis.name)
        known = [f"{axis} = {self.sizes[axis]}" for axis in axes if axis in self.sizes]
        return f"{text} with {', '.join(known)}" if known else text

    # --- formats, legacy spellings, law ---

    def _formats(self) -> Iterator[tuple[str, str]]:
        for tensors, side in ((self.reading.rule.left, self.map.left), (self.reading.rule.right, self.map.right)):
            mine = (side == self.map.left) == self.is_left
            for tensor in [self.reading.tensor] if mine else tensors:
                label = "formats" if mine else f"in {side}"
                name = self.reading.key if mine else self._name(tensor)
                for number, spec in enumerate(tensor.codecs):
                    codec = self.checked.codecs[codec_key(spec)]
                    yield "" if number else label, _format(codec, name)

    def _legacy(self) -> Iterator[tuple[str, str]]:
        if not self.is_left or self.reading.accept is not None:
            return
        for accept, old in spellings(self.checked, self.reading.key, self.params):
            yield "also as", f"{old}  ({_place(accept.span)})"

    def _law(self) -> Iterator[tuple[str, str]]:
        law = rule_law(self.reading.rule, self.reading.layout)
        left, right = self.map.left, self.map.right
        if law.left is not None:
            bare = "" if law.left_bare == law.left else f"; without the complement {_grade(law.left_bare)}"
            yield "law", f"{left} -> {right} -> {left}: {_grade(law.left)}{bare}"
        if law.right is not None:
            yield "" if law.left is not None else "law", f"{right} -> {left} -> {right}: {_grade(law.right)}"


def _grade(grade: Grade | None) -> str:
    if grade is None:
        return "-"
    return f"{grade.grade} ({grade.reason})" if grade.reason else grade.grade


def _place(span: Any) -> str:
    return f"{span.source.path}:{span.line}"


def _spelling(template: tree.Template, name: str, position: int) -> str:
    spelled: Sequence[str] = next(
        part.spellings for part in template.parts if isinstance(part, tree.EnumHole) and part.name == name
    )
    return spelled[position]


def _symbolic(other: ir.Tensor, reading: Reading) -> dict[str, str]:
    """Axes that only the other side's name holds, under their own names."""
    found = {}
    for part in other.template.parts:
        match part:
            case tree.EnumHole(name=name) if name not in reading.choice:
                found[name] = name
            case tree.NumberHole(value=value):
                found |= {name: name for name in ir.names_in(value) if name not in reading.values}
    return found


def _format(codec: AnyCodec, name: str) -> str:
    """`fp8: NAME F8_E4M3, with NAME.scale F8_E8M0 or F32, one a 128x128 block`."""
    if codec.kind == "raw":
        return f"{codec.name}: as it is"
    parts = [f"{part.name} {' or '.join(part.dtypes) or 'of any dtype'}" for part in codec.stored(name, None)]
    block = getattr(codec, "block", None)
    rows = "" if block is None else f", one a {'x'.join('*' if n is None else str(n) for n in block)} block"
    return f"{codec.name}: {', with '.join(parts)}{rows}"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


__all__ = ["Explanation", "explanations"]
