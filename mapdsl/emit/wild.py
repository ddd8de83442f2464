"""The code of rules that read their names off the state: wildcards, and indices without an upper bound."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mapdsl.compiler import ir
from mapdsl.compiler.names import patterns
from mapdsl.emit.expressions import local, pattern_code, python, wildcard
from mapdsl.emit.layout import INDENT, Bracketed, Code, breakable, call, lines
from mapdsl.language import tree
from mapdsl.language.rewrite import rewrite

if TYPE_CHECKING:
    from mapdsl.emit.rules import RuleEmitter

# Above every number that a name is read with.
_NO_END = "10**18"


@dataclass
class WildHead:
    """What stands around the code of one rule.

    `narrow` are, a side, the names that narrower wildcards carry; `guarded` those of them that a guard may shut out.
    """

    emitter: RuleEmitter
    narrow: tuple[list[Code], list[Code]] = field(default_factory=lambda: ([], []))
    guarded: tuple[list[Code], list[Code]] = field(default_factory=lambda: ([], []))

    def head(self, template: tree.Template, source: int, depth: int) -> tuple[list[str], int]:
        """The loop over the names that a template with wildcards, or an open index, fits; and the depth inside."""
        holes = self.open_holes(template)
        variables = [(part.span.start, "number") for part in holes]
        variables += [
            (part.span.start, wildcard(part.name or "*", self.emitter.spelled))
            for part in template.parts
            if isinstance(part, tree.WildcardHole)
        ]
        if not variables:
            return [], depth
        out: list[str] = []
        if self.narrow[1 - source]:
            out += lines(Bracketed("", self.narrow[1 - source], brackets="[]"), depth, before="narrower = ")
        ordered = [name for _, name in sorted(variables)]
        targets = f"({ordered[0]},)" if len(ordered) == 1 else ", ".join(ordered)
        pattern = pattern_code(template, self.emitter.params, self.emitter.spelled, holes)
        loop = call("take.wild", pattern, *self.guarded[source])
        out += lines(loop, depth, before=f"for {targets} in ", after=":")
        if not holes:
            return out, depth + 1
        return out + self._number(holes[0], depth + 1), depth + 2

    def open_holes(self, template: tree.Template) -> list[tree.NumberHole]:
        """The holes that hold an index without an upper bound."""
        holes = [part for part in template.parts if isinstance(part, tree.NumberHole)]
        return [hole for hole in holes if self._open_index(hole)]

    def _number(self, hole: tree.NumberHole, depth: int) -> list[str]:
        """An open index has no range to loop over: its number is read off the name, and held against its bound."""
        emitter, name = self.emitter, self._open_index(hole) or ""
        offset = offset_of(hole.value, name)
        less = f" - {python(offset, emitter.params, outer=6)}" if offset is not None else ""
        lower = emitter.map.indices[name].lower
        conditions = [f"{local(name)} >= {python(lower, emitter.params, outer=5) if lower else 0}"]
        if emitter.outer_guard() is None and emitter.condition is not None:
            conditions.append(python(emitter.condition, emitter.params, outer=2))
        condition = breakable(" and ".join(conditions))
        return [
            f"{INDENT * depth}{local(name)} = int(number){less}",
            *lines(condition, depth, before="if ", after=":"),
        ]

    def _open_index(self, hole: tree.NumberHole) -> str | None:
        return next((name for name in ir.names_in(hole.value) if self.emitter.is_open(name)), None)

    def wide(self, tensor: ir.Tensor) -> list[Code]:
        """The names of a tensor as the runtime's `Wide`, one for each spelling of its enumerations."""
        out: list[Code] = []
        for template in spelled_out(tensor.template):
            holes = [part for part in template.parts if isinstance(part, tree.NumberHole)]
            code = pattern_code(template, self.emitter.params, self.emitter.spelled, holes)
            out.append(call("Wide", code, *(self._numbers(hole) for hole in holes)))
        return out

    def _numbers(self, hole: tree.NumberHole) -> str:
        """The numbers that a hole may hold."""
        emitter, value = self.emitter, hole.value
        if hole.local and isinstance(value, tree.Name):
            return f"range(len({emitter.range(value.path)}))"
        if isinstance(value, tree.Name) and not emitter.is_open(value.path):
            return emitter.range(value.path)
        for name in ir.names_in(value):
            if emitter.is_open(name):
                lower = emitter.map.indices[name].lower
                offset = offset_of(value, name)
                words = [python(e, emitter.params, outer=5) for e in (lower, offset) if e is not None]
                return f"range({' + '.join(words) or '0'}, {_NO_END})"
        used = emitter.ordered([n for n in dict.fromkeys(ir.names_in(value)) if n in emitter.map.indices])
        clauses = " ".join(f"for {local(name)} in {emitter.range(name)}" for name in used)
        return f"{{{python(value, emitter.params)} {clauses}}}"


def spelled_out(template: tree.Template) -> Iterator[tree.Template]:
    """A template for each spelling of its enumerations."""
    for pattern in patterns(template):
        parts = [
            tree.Text(part.spellings[pattern.choice[part.name]], span=part.span)
            if isinstance(part, tree.EnumHole)
            else part
            for part in template.parts
        ]
        yield replace(template, parts=tuple(parts))


def first_position(template: tree.Template, absorbed: Container[str], firsts: Mapping[str, tree.Expr]) -> tree.Template:
    """A name with all that it absorbs at the first position: there is one such name for each group."""

    def change(node: tree.Node) -> tree.Node:
        if isinstance(node, tree.Name) and node.path in absorbed and node.path in firsts:
            return replace(firsts[node.path], span=node.span)
        return node

    parts: list[tree.Part] = []
    for part in template.parts:
        if isinstance(part, tree.EnumHole) and part.name in absorbed:
            part = tree.Text(part.spellings[0], span=part.span)
        parts.append(rewrite(part, change))
    return replace(template, parts=tuple(parts))


def offset_of(value: tree.Expr, index: str) -> tree.Expr | None:
    """What is added to an index in a hole: `L` of `{L+x}`."""
    others = tuple(o for o in ir.summands(value) if not (isinstance(o, tree.Name) and o.path == index))
    if len(others) < 2:
        return others[0] if others else None
    return tree.Operation("+", others, span=value.span)
