"""Grades: what a rule promises for a round trip, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import parse_codec
from mapdsl.compiler.shapes import Layout, keeps_blocks
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic

# From the strongest promise to none.
GRADES = ("bit", "bit, guarded", "value", "lossy", "none")


@dataclass(frozen=True)
class Grade:
    """A promise and, below `bit`, its reason."""

    grade: str
    reason: str = ""
    code: str = "D404"  # of the error where a law pins more

    @property
    def rank(self) -> int:
        """0 for `bit`, growing as promises weaken."""
        return GRADES.index(self.grade)


BIT = Grade("bit")

# Changes of value, in either direction.
_ROUNDED = {"add": "sums and differences are rounded", "neg_exp": "exponentials and logarithms are rounded"}


@dataclass(frozen=True)
class RuleLaw:
    """Grades of one rule; None where the first side of the trip has no tensor.

    `left` is left -> right -> left with the complement, `left_bare` without it, `right` is right -> left -> right.
    """

    rule: ir.Rule
    left: Grade | None
    left_bare: Grade | None
    right: Grade | None


def meet(grades: Sequence[Grade | None]) -> Grade:
    """The weakest of some grades."""
    return max((g for g in grades if g is not None), key=lambda g: g.rank, default=BIT)


def rule_law(rule: ir.Rule, layout: Layout) -> RuleLaw:
    """The grades of a rule."""
    if not rule.right:
        return RuleLaw(rule, _one_sided(rule, "->"), _one_sided(rule, "->", with_complement=False), None)
    if not rule.left:
        return RuleLaw(rule, None, None, _one_sided(rule, "<-"))
    guarded = [Grade("bit, guarded", f"copies of {', '.join(sorted(layout.repeated))} are compared")]
    common = guarded if layout.repeated else [BIT]
    whole = keeps_blocks(rule, layout)  # then what both sides can store goes over undecoded
    left = [*common, *_trip(rule.left, rule.right, whole, True)]
    bare = [*common, *_trip(rule.left, rule.right, whole, False)]
    right = [*common, *_trip(rule.right, rule.left, whole, True)]
    if not layout.is_rename:  # a rename keeps its padding
        left, bare, right = ([*_padding(layout, s), *g] for s, g in ((0, left), (0, bare), (1, right)))
        left, bare, right = ([*_zeros(layout, s), *g] for s, g in ((0, left), (0, bare), (1, right)))
    return RuleLaw(rule, meet(left), meet(bare), meet(right))


def _padding(layout: Layout, side: int) -> Iterator[Grade]:
    """What stands in padding is not looked at, and is written as zeros."""
    shapes = (shape for shape in layout.shapes[side] if shape is not None)
    if any(isinstance(dimension, tree.Pad) for shape in shapes for dimension in shape.dimensions):
        yield Grade("lossy", "what stands in padding is not kept")


def _zeros(layout: Layout, side: int) -> Iterator[Grade]:
    """Parts that the other side lacks come back as zeros, so they have to be that."""
    if layout.zeros[side]:
        yield Grade("bit, guarded", "zeros, compared")


def _trip(
    here: tuple[ir.Tensor, ...], there: tuple[ir.Tensor, ...], whole: bool, with_complement: bool
) -> Iterator[Grade]:
    """Grades of going over and coming back, for each alternative that a tensor may start in.

    It goes over in the alternative of the same name if there is one, undecoded where blocks stay whole, else in the
    first. A tensor without codecs goes over in any. A dtype that all of the other side states is decoded to, if
    nothing goes over as it is.
    """
    theirs = _written(codec for tensor in there for codec in tensor.codecs)
    stated = _all_alike(there) and all(tensor.codecs for tensor in here)
    unknown = not with_complement and not (_all_alike(here) and here[0].codecs)
    if unknown and any(codec.kind == "cast" for codec in theirs):
        yield Grade("lossy", "which dtype it had is not known")
    for tensor in here:
        if not tensor.codecs:
            yield from map(_encoded, theirs)
        for codec in tensor.codecs:
            same = [other for other in theirs if other.name == codec.name]
            is_stated = stated and codec.name in ir.WIDE_CASTS
            if same and (whole or codec.kind == "raw" or is_stated):
                continue
            targets = (same or theirs)[:1]
            if not (is_stated and any(target.name in ir.WIDE_CASTS for target in targets)):
                yield _decoded(codec, with_complement)
            yield from map(_encoded, targets)


def _written(codecs: Iterable[ir.CodecSpec]) -> list[ir.CodecSpec]:
    """The formats that new tensors may be written in: those to be read only are not, if others are there."""
    every = list(codecs)
    return [codec for codec in every if not parse_codec(codec).read_only] or every


def _all_alike(tensors: tuple[ir.Tensor, ...]) -> bool:
    """Whether all operands of a side are stored in the same formats."""
    return all([c.name for c in t.codecs] == [c.name for c in tensors[0].codecs] for t in tensors)


def _one_sided(rule: ir.Rule, drops: str, *, with_complement: bool = True) -> Grade:
    if rule.arrow == drops:
        return Grade("none", "dropped")
    value = rule.value
    if value is None or not value.compared:
        return Grade("lossy", "made anew, not compared")
    if isinstance(value.content, tree.Template):
        return Grade("bit, guarded", "tied, compared")
    if not with_complement and not all(tensor.codecs for tensor in (*rule.left, *rule.right)):
        return Grade("value", "constant, made in the dtype that is asked")
    return Grade("bit, guarded", "constant, compared")


def _decoded(codec: ir.CodecSpec, with_complement: bool) -> Grade:
    """Decode, then encode."""
    if codec.kind == "raw":
        return BIT
    if codec.kind == "cast" and codec.name in ir.WIDE_CASTS:
        # To bf16 or f32 and back: a dtype that both hold exactly comes back.
        return BIT if codec.name == "bf16" else Grade("lossy", f"{codec.name} to a narrower dtype")
    if with_complement or codec.name == "f8e4m3":
        return BIT
    if codec.name == "f8e5m2":
        return Grade("value", "of f8e5m2's NaNs one of each sign is written")
    if parse_codec(codec).read_only:
        return Grade("none", f"{codec.name} can be read, not written", "D406")
    return Grade(
        "lossy", f"{codec.name}: scales are found anew" if codec.kind in ir.QUANTISED else _ROUNDED[codec.kind]
    )


def _encoded(codec: ir.CodecSpec) -> Grade:
    """Encode, then decode."""
    if codec.kind == "raw":
        return BIT
    if codec.kind == "cast" and codec.name == "f32":
        return BIT
    if parse_codec(codec).read_only:
        return Grade("none", f"{codec.name} can be read, not written", "D406")
    return Grade("lossy", _ROUNDED.get(codec.kind, f"rounded to {codec.name}"))


def check_laws(resolved: ir.Map, layouts: Sequence[Layout]) -> list[Diagnostic]:
    """D404 for every pinned law that is stronger than what the rules promise."""
    found: list[Diagnostic] = []
    laws = [rule_law(rule, layout) for rule, layout in zip(resolved.rules, layouts, strict=True)]
    sides = (resolved.left, resolved.right)
    for law in resolved.laws:
        if law.path not in ((sides[0], sides[1], sides[0]), (sides[1], sides[0], sides[1])):
            message = f"a law goes `{sides[0]} -> {sides[1]} -> {sides[0]}`, or the other way"
            found.append(Diagnostic("N111", message, (law.span,)))
            continue
        if law.grade not in GRADES:
            message = f"no grade `{law.grade}`; grades are {'; '.join(GRADES)}"
            found.append(Diagnostic("N111", message, (law.span,)))
            continue
        for rule in laws:
            grade = rule.left if law.path[0] == sides[0] else rule.right
            if grade is not None and grade.rank > GRADES.index(law.grade):
                message = f"this rule promises `{grade.grade}` ({grade.reason}), the law pins `{law.grade}`"
                found.append(Diagnostic(grade.code, message, (law.span, rule.rule.span)))
    return found
