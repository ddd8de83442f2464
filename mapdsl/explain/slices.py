"""Where one piece of a tensor lies in another: slices in numpy's notation, symbolic or in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mapdsl.compiler.shapes import Piece
from mapdsl.language import tree
from mapdsl.language.unparse import unparse_shape
from mapdsl.runtime.sizes import Polynomial, evaluate, parse_pattern


def place(shape: tree.Shape, piece: Piece, at: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """`[7, :, F:2*F]` for a piece of a tensor of `shape`, `at` the positions of some axes; empty for the whole tensor.

    Where the piece is no slice, the tensor is reshaped first: ` seen as [g (r c + c + c) d], [:, r*c:r*c+c]`. Positions
    are numbers or names. Sizes that are known stand in the text as numbers.
    """
    dims = [piece.dims[n] if n < len(piece.dims) else () for n in range(len(shape.dimensions))]
    parts = [_dimension(d, piece.path, axes, at, sizes) for d, axes in zip(shape.dimensions, dims, strict=True)]
    if None not in parts:
        return _brackets(parts)
    cut: list[tree.Dimension] = []
    parts = []
    for dimension, axes in zip(shape.dimensions, dims, strict=True):
        if _dimension(dimension, piece.path, axes, at, sizes) is not None or not isinstance(dimension, tree.Product):
            factors: list[tuple[tree.Dimension, tuple[str, ...]]] = [(dimension, axes)]
        else:
            factors = _factors(dimension, axes)
        cut += [factor for factor, _ in factors]
        parts += [_dimension(factor, piece.path, own, at, sizes) for factor, own in factors]
    view = unparse_shape(tree.Shape(tuple(cut), span=shape.span))
    if None in parts:
        return f" seen as {view}, term {'.'.join(str(n + 1) for n in piece.path)}"
    found = _brackets(parts)
    return f" seen as {view}{', ' if found else ''}{found}"


def _brackets(parts: Sequence[str | None]) -> str:
    words = [part or ":" for part in parts]
    while words and words[-1] == ":":
        words.pop()
    return f"[{', '.join(words)}]" if words else ""


def _factors(product: tree.Product, axes: tuple[str, ...]) -> list[tuple[tree.Dimension, tuple[str, ...]]]:
    """The factors of a dimension, each a dimension of its own with its axes."""
    names = iter(axes)
    found: list[tuple[tree.Dimension, tuple[str, ...]]] = []
    for factor in product.factors:
        if isinstance(factor, tree.Axis) and factor.size != 1:
            found.append((factor, (next(names, ""),)))
        else:
            found.append((factor, ()))
    return found


def _dimension(
    dimension: tree.Dimension,
    path: tuple[int, ...],
    axes: tuple[str, ...],
    at: Mapping[str, str],
    sizes: Mapping[str, int],
) -> str | None:
    begin = "0"
    if isinstance(dimension, tree.Sum):
        before = dimension.terms[: path[0]]
        term = dimension.terms[path[0]]
        if _has_sum(term):
            return None
        begin = _total([_text(other) for other in before], sizes)
        axes = _axes(term)
        if not any(axis in at for axis in axes):
            return f"{begin}:{_total([_text(other) for other in (*before, term)], sizes)}"
    elif _has_sum(dimension):
        return None
    given = [axis for axis in axes if axis in at]
    if not given:
        return ":"
    rest = axes[len(given) :]
    if tuple(given) != axes[: len(given)] or len(given) > 1:
        return None
    position = at[given[0]]
    if not rest:
        return position if begin == "0" else f"{begin} + {position}"
    if begin != "0":
        return None
    return f"{_times(position, rest, sizes)}:{_times(_next(position), rest, sizes)}"


def _has_sum(node: tree.Dimension | tree.Product) -> bool:
    match node:
        case tree.Sum():
            return True
        case tree.Product(factors=factors):
            return any(_has_sum(factor) for factor in factors)
    return False


def _axes(term: tree.Product | tree.Axis) -> tuple[str, ...]:
    factors = term.factors if isinstance(term, tree.Product) else (term,)
    return tuple(f.name or str(f.size) for f in factors if isinstance(f, tree.Axis) and f.size != 1)


def _text(node: tree.Product | tree.Axis) -> str:
    return " ".join(_axes(node)) or "1"


def _times(position: str, rest: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    """A position, times the size of what stands behind it."""
    if position.isdigit() and int(position) == 0:
        return "0"
    known = _product(rest, sizes)
    if known is not None and position.isdigit():
        return str(int(position) * known)
    size = str(known) if known is not None else "*".join(rest)
    if position == "1":
        return size
    return f"{position}*{size}" if position.isidentifier() or position.isdigit() else f"({position})*{size}"


def _next(position: str) -> str:
    return str(int(position) + 1) if position.isdigit() else f"{position}+1"


def _product(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int | None:
    total = 1
    for axis in axes:
        size = sizes.get(axis, int(axis) if axis.isdigit() else None)
        if size is None:
            return None
        total *= size
    return total


def _total(terms: list[str], sizes: Mapping[str, int]) -> str:
    """The size of terms laid end to end: a number if all is known, else `h*c + g*c`."""
    if not terms:
        return "0"
    polynomial: Polynomial = tuple(m for term in terms for m in parse_pattern(f"({term})")[0])
    if all(axis in sizes for _, names in polynomial for axis in names):
        return str(evaluate(polynomial, sizes))
    return "+".join("*".join(term.split()) for term in terms)
