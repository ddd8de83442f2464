"""The law of shapes: both sides of a rule hold the same axes, each once, piece by piece.

A tensor without a sum is one piece; with a sum, one piece a term, nested sums outermost first. Piece n of the left is
piece n of the right. An axis of a piece lives in the name of its tensor or in one of its dimensions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import parse_codec
from mapdsl.language import tree
from mapdsl.language.rewrite import rewrite
from mapdsl.language.source import Span
from mapdsl.runtime.shares import padded


@dataclass(frozen=True)
class ShapeError(Exception):
    """A rule that breaks the law of shapes: `code` is one of X301 to X307."""

    code: str
    message: str
    span: Span
    help: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of one tensor: `path` chooses a term of each sum, outermost first; `dims` are the axes of its dimensions.

    `tensor` counts the tensors of the side. Axes of an integer size are called by it, a second one of the same size by
    `2'` and so on.
    """

    tensor: int
    path: tuple[int, ...]
    dims: tuple[tuple[str, ...], ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes of the shape, in order."""
        return tuple(axis for dim in self.dims for axis in dim)


@dataclass(frozen=True)
class Layout:
    """Where the axes of a rule live.

    `matched` are the axes in the names of both sides: one combination of them is a match of the rule. `in_names` are,
    a side, the axes that its names absorb; `repeated` those whose copies are compared. `pieces` pairs left and right;
    it is empty where the tensors go over as they are. `zeros` are, a side, the parts that the other side lacks; in
    `shapes` they are terms like others.
    """

    matched: tuple[str, ...]
    in_names: tuple[tuple[str, ...], tuple[str, ...]]
    repeated: frozenset[str]
    pieces: tuple[tuple[Piece, Piece], ...]
    shapes: tuple[tuple[tree.Shape | None, ...], tuple[tree.Shape | None, ...]]
    zeros: tuple[tuple[Piece, ...], tuple[Piece, ...]] = ((), ())

    @property
    def is_rename(self) -> bool:
        """Whether each match is one tensor that keeps its shape."""
        return not self.pieces


def layout(rule: ir.Rule, indices: dict[str, ir.Index]) -> Layout:
    """The layout of a rule; ShapeError where the law of shapes is broken."""
    of_names = [[name_axes(tensor.template, indices) for tensor in side] for side in rule.sides]
    bare = (tuple(t.shape for t in rule.left), tuple(t.shape for t in rule.right))
    for tensor in (*rule.left, *rule.right):
        _check_zeros(tensor, is_alone=not rule.left or not rule.right)
    if not rule.left or not rule.right:
        side = of_names[0] or of_names[1]
        return Layout(tuple(dict.fromkeys(axis for axes in side for axis in axes)), ((), ()), frozenset(), (), bare)
    repeated = _repeated(rule)
    everywhere = set.intersection(*(set(axes) for side in of_names for axes in side)) - repeated
    matched = tuple(axis for axis in of_names[0][0] if axis in everywhere)
    left, right = (tuple(dict.fromkeys(a for axes in side for a in axes if a not in everywhere)) for side in of_names)
    shapes = _shapes(rule, bool(left or right))
    if shapes is None:
        return Layout(matched, ((), ()), frozenset(), (), bare)
    pieces = _pieces(rule.left, shapes[0]), _pieces(rule.right, shapes[1])
    if len(pieces[0]) != len(pieces[1]):
        message = f"the left side has {_pieces_text(len(pieces[0]))}, the right side {_pieces_text(len(pieces[1]))}"
        raise ShapeError("X303", message, rule.span, "each term of a sum is a piece; each tensor without one is one")
    pairs = tuple(zip(*pieces, strict=True))
    for one, other in pairs:
        _check_axes(rule, one, other, of_names, everywhere, repeated)
    _check_absorbed(rule, of_names, everywhere)
    zeros = _pieces(rule.left, shapes[0], zeros=True), _pieces(rule.right, shapes[1], zeros=True)
    if any(zeros):
        plain = tuple(map(_without_zeros, shapes[0])), tuple(map(_without_zeros, shapes[1]))
        return Layout(matched, (left, right), repeated, pairs, plain, (tuple(zeros[0]), tuple(zeros[1])))
    if not left and not right and len(pairs) == 1 and pairs[0][0].dims == pairs[0][1].dims:
        pads = [[isinstance(d, tree.Pad) for d in shape.dimensions] for side in shapes for shape in side]
        pairs = () if pads[0] == pads[1] else pairs
    return Layout(matched, (left, right), repeated, pairs, shapes)


def keeps_blocks(rule: ir.Rule, layout: Layout) -> bool:
    """Whether every block of a codec stays whole: the last two dimensions of one tensor a side are left alone.

    Where a part has not the dimensions of its tensor (squeezed scales, say), such tensors can only be renamed.
    """
    if layout.is_rename:
        return True
    if len(rule.left) > 1 or len(rule.right) > 1:
        return False
    codecs = [parse_codec(spec) for tensor in (*rule.left, *rule.right) for spec in tensor.codecs]
    if not all(codec.moves_whole for codec in codecs):
        return False
    left, right = (shape.dimensions[-2:] for (shape,) in layout.shapes if shape is not None)
    return len(left) == 2 and left == right and all(isinstance(d, tree.Axis) and d.name and not d.repeat for d in left)


def with_padded_axes(shape: tree.Shape) -> tree.Shape:
    """A shape with each `pad(V, n)` as an axis of its own."""
    dimensions = (
        tree.Axis(name=padded(one.axis.name or ""), span=one.span) if isinstance(one, tree.Pad) else one
        for one in shape.dimensions
    )
    return replace(shape, dimensions=tuple(dimensions))


def name_axes(template: tree.Template, indices: dict[str, ir.Index]) -> tuple[str, ...]:
    """The axes that live in a name, in order: indices and enumerations (wildcards are no axes but go along)."""
    found: dict[str, None] = {}
    for part in template.parts:
        match part:
            case tree.NumberHole(value=value):
                found |= dict.fromkeys(name for name in ir.names_in(value) if name in indices)
            case tree.EnumHole(name=name):
                found[name] = None
            case tree.WildcardHole(name=name):
                found[f"{{{name}}}"] = None
    return tuple(found)


def _repeated(rule: ir.Rule) -> frozenset[str]:
    found = set()
    for side in rule.sides:
        for tensor in side:
            for part in tensor.template.parts:
                if isinstance(part, tree.EnumHole) and part.repeat:
                    found.add(part.name)
                if isinstance(part, tree.NumberHole) and part.repeat and isinstance(part.value, tree.Name):
                    found.add(part.value.path)
            for axis in _axes(tensor.shape):
                if axis.repeat and axis.name:
                    found.add(axis.name)
    return frozenset(found)


def _axes(shape: tree.Shape | None) -> list[tree.Axis]:
    return list(ir.axes_of(shape)) if shape else []


Shapes = tuple[tuple[tree.Shape, ...], tuple[tree.Shape, ...]]


def _shapes(rule: ir.Rule, moves: bool) -> Shapes | None:
    """The shapes of all tensors. One serves both sides of a rename; a rename may have none at all."""
    tensors = [*rule.left, *rule.right]
    given = [t.shape for t in tensors]
    if all(shape is not None for shape in given):
        return tuple(tuple(t.shape for t in side) for side in rule.sides)  # type: ignore[return-value]
    if len(tensors) == 2 and not moves:
        shape = given[0] or given[1]
        return None if shape is None else ((shape,), (shape,))
    bare = next(t for t in tensors if t.shape is None)
    raise ShapeError(
        "X307", "this rule moves axes, so every tensor needs a shape", bare.span, "write it as `KEY [f d]`"
    )


def pieces_of(tensor: ir.Tensor, shape: tree.Shape | None) -> list[tuple[str, ...]]:
    """The axes in the shape of each piece of a tensor."""
    return [piece.axes for piece in _pieces((tensor,), (shape,))] if shape is not None else [()]


def _pieces(tensors: tuple[ir.Tensor, ...], shapes: tuple[tree.Shape, ...], *, zeros: bool = False) -> list[Piece]:
    """The pieces of some tensors, or (`zeros`) the terms of their sums that are none."""
    out = []
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        sums = [n for n, dimension in enumerate(shape.dimensions) if _sums_in(dimension)]
        if len(sums) > 1 or any(_sums_in(dimension) > 1 for dimension in shape.dimensions if _is_crowded(dimension)):
            raise ShapeError("X303", "at most one dimension of a tensor has sums, one in a product", tensor.span)
        variants = [
            [((), axes)] if n not in sums else _terms(d)
            for n, d in enumerate(shape.dimensions)
            for axes in [_plain_axes(d) if n not in sums else ()]
        ]
        if sums:
            for path, axes in variants[sums[0]]:
                dims = [v[0][1] for v in variants]
                dims[sums[0]] = axes
                if _is_zeros(shape.dimensions[sums[0]], path) == zeros:
                    out.append(Piece(number, path, _numbered(dims)))
        elif not zeros:
            out.append(Piece(number, (), _numbered([v[0][1] for v in variants])))
    return out


def _sums_in(dimension: tree.Dimension | tree.Product) -> int:
    """How many sums stand anywhere in a dimension."""
    match dimension:
        case tree.Sum(terms=terms):
            return 1 + sum(_sums_in(term) for term in terms)
        case tree.Product(factors=factors):
            return sum(_sums_in(factor) for factor in factors)
    return 0


def _is_zeros(part: tree.Dimension | tree.Product, path: tuple[int, ...]) -> bool:
    """Whether a way through the sums of a dimension ends in `zeros(...)`."""
    match part:
        case tree.Sum(terms=terms):
            return _is_zeros(terms[path[0]], path[1:])
        case tree.Product(factors=factors, zeros=zeros):
            return zeros or any(_is_zeros(factor, path) for factor in factors if isinstance(factor, tree.Sum))
    return False


def _check_zeros(tensor: ir.Tensor, *, is_alone: bool) -> None:
    """X303 for `zeros(...)` that is no term of a sum with others, or whose size is not that of some axes."""

    def check(part: tree.Dimension | tree.Product, *, is_term: bool = False) -> None:
        match part:
            case tree.Sum(terms=terms):
                if all(term.zeros for term in terms):
                    raise ShapeError("X303", "a sum of zeros alone says nothing of the other side", tensor.span)
                for term in terms:
                    check(term, is_term=True)
            case tree.Product(factors=factors, zeros=zeros):
                if zeros and not is_term:
                    message = "`zeros(...)` is a term of a sum, beside others that the other side has"
                    raise ShapeError("X303", message, tensor.span, "write `(zeros(f) + f)`")
                if zeros and not all(isinstance(factor, tree.Axis) and not factor.repeat for factor in factors):
                    raise ShapeError("X303", "in `zeros(...)` stand axes: `zeros(h c)`", tensor.span)
                if zeros and is_alone:
                    message = "`zeros(...)` is what the other side lacks, but that has no tensor at all"
                    raise ShapeError("X303", message, tensor.span)
                for factor in factors:
                    check(factor)

    for dimension in tensor.shape.dimensions if tensor.shape else ():
        check(dimension)


def _without_zeros(shape: tree.Shape) -> tree.Shape:
    """The shape with `zeros(f)` as a plain `f`: of sizes and places they are terms like others."""
    return rewrite(shape, lambda node: replace(node, zeros=False) if isinstance(node, tree.Product) else node)


def _is_crowded(dimension: tree.Dimension | tree.Product) -> bool:
    """Whether some product in it has two sums as factors: such a piece would not be a range of rows."""
    match dimension:
        case tree.Sum(terms=terms):
            return any(_is_crowded(term) for term in terms)
        case tree.Product(factors=factors):
            sums = [factor for factor in factors if isinstance(factor, tree.Sum)]
            return len(sums) > 1 or any(_is_crowded(factor) for factor in sums)
    return False


def _terms(dimension: tree.Dimension | tree.Product) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Every way through the sums of a dimension: the terms taken, and the axes met."""
    match dimension:
        case tree.Sum(terms=terms):
            return [((n, *path), axes) for n, term in enumerate(terms) for path, axes in _terms(term)]
        case tree.Product(factors=factors):
            ways: list[tuple[tuple[int, ...], tuple[str, ...]]] = [((), ())]
            for factor in factors:
                ways = [(p + path, a + axes) for p, a in ways for path, axes in _terms(factor)]
            return ways
    return [((), _plain_axes(dimension))]


def _plain_axes(dimension: tree.Dimension | tree.Product) -> tuple[str, ...]:
    match dimension:
        case tree.Axis(name=str(name)):
            return (name,)
        case tree.Axis(size=size):
            return () if size == 1 else (str(size),)
        case tree.Pad(axis=axis):
            return _plain_axes(axis)
        case tree.Product(factors=factors):
            return tuple(axis for factor in factors for axis in _plain_axes(factor))
    return ()


def _numbered(dims: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Integer axes of one size told apart by primes, in order."""
    seen: Counter[str] = Counter()
    out = []
    for dim in dims:
        axes = []
        for axis in dim:
            if axis[0].isdigit():
                axes.append(axis + "'" * seen[axis])
                seen[axis] += 1
            else:
                axes.append(axis)
        out.append(tuple(axes))
    return tuple(out)


def _check_axes(
    rule: ir.Rule,
    left: Piece,
    right: Piece,
    of_names: list[list[tuple[str, ...]]],
    everywhere: set[str],
    repeated: frozenset[str],
) -> None:
    axes = []
    for piece, names, side in ((left, of_names[0], rule.left), (right, of_names[1], rule.right)):
        held = [a for a in names[piece.tensor] if a not in everywhere] + list(piece.axes)
        for axis, count in Counter(held).items():
            if count > 1:
                raise ShapeError("X302", f"the axis `{axis}` stands twice", side[piece.tensor].span)
            if axis in everywhere:
                message = f"`{axis}` stands in the names of both sides and in this shape"
                raise ShapeError("X302", message, side[piece.tensor].span)
        axes.append(held)
    for mine, theirs, span, other in (
        (axes[0], axes[1], rule.left[left.tensor].span, "right"),
        (axes[1], axes[0], rule.right[right.tensor].span, "left"),
    ):
        if copied := [axis for axis in mine if axis in theirs and axis in repeated]:
            message = f"copies of `{copied[0]}` stand on one side, so it is no axis of the other"
            raise ShapeError("X302", message, span)
        lost = [axis for axis in mine if axis not in theirs and axis not in repeated]
        if lost:
            listed = ", ".join(f"`{axis}`" for axis in lost)
            hint = f"here {_listed(mine)}, there {_listed(theirs)}"
            raise ShapeError("X301", f"{listed} is on this side only, not on the {other}", span, hint)


def _check_absorbed(rule: ir.Rule, of_names: list[list[tuple[str, ...]]], everywhere: set[str]) -> None:
    """X301: an axis is absorbed by the names of every piece of a side, or of none."""
    for side, names in zip(rule.sides, of_names, strict=True):
        for tensor, axes in zip(side, names, strict=True):
            others = {axis for other in names for axis in other} - everywhere - set(axes)
            if others:
                message = f"`{min(others)}` stands in the names of other tensors of this side, not in this one"
                raise ShapeError("X301", message, tensor.span, "an axis is absorbed by every piece, or by none")


def _listed(axes: list[str]) -> str:
    return "[" + " ".join(axes) + "]"


def _pieces_text(count: int) -> str:
    return "1 piece" if count == 1 else f"{count} pieces"
