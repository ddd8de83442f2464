"""A piece of a tensor as a torch expression: unflatten, narrow, select, permute, flatten.

Every such expression but the last step is a view, so the same code reads a piece and writes it in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from mapdsl.compiler.shapes import Piece
from mapdsl.emit.expressions import product
from mapdsl.language import tree

Run = tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Code of the size of every axis of a rule: `self.E`, `2`, or the local variable of a free axis."""

    of: dict[str, str]

    def run(self, run: Run) -> str:
        """The size of neighbouring axes taken as one."""
        return product([self.of[axis.rstrip("'")] for axis in run])

    def dimension(self, dimension: tree.Dimension | tree.Product) -> str:
        """The size of a whole dimension, sums included."""
        match dimension:
            case tree.Axis(name=str(name)):
                return self.of[name]
            case tree.Axis(size=size):
                return str(size)
            case tree.Pad(axis=axis):
                return self.dimension(axis)
            case tree.Product(factors=factors):
                return product([self.dimension(factor) for factor in factors])
            case tree.Sum(terms=terms):
                return " + ".join(self.dimension(term) for term in terms)
        raise AssertionError(dimension)


def common_runs(one: Piece, other: Piece, selected: set[str]) -> list[Run]:
    """The axes of `one` in order, neighbours that are neighbours in one dimension on both sides taken together."""
    after: dict[str, str] = {}
    for dim in other.dims:
        after |= dict(zip(dim, dim[1:], strict=False))
    runs: list[Run] = []
    for dim in one.dims:
        last = None
        for axis in dim:
            if axis in selected:
                last = None
                continue
            if last is not None and after.get(last) == axis:
                runs[-1] = (*runs[-1], axis)
            else:
                runs.append((axis,))
            last = axis
    return runs


def view(
    variable: str, shape: tree.Shape, piece: Piece, selected: dict[str, str], runs: list[Run], sizes: Sizes
) -> str:
    """The piece of a tensor as a view whose dimensions are `runs`, axes in `selected` fixed to positions."""
    code = variable
    held: list[Run | None] = []  # what each dimension of `code` holds; None is a dimension of size one
    path = list(piece.path)
    for dimension, axes in zip(shape.dimensions, piece.dims, strict=True):
        steps, dims = _cut(dimension, axes, path, len(held), sizes)
        code += steps
        for dim in dims:
            parts = _runs_of(dim, runs)
            if len(parts) > 1:
                sizes_code = ", ".join(sizes.run(part) for part in parts)
                code += f".unflatten({len(held)}, ({sizes_code}))"
            held += parts or [None]
    code += _selection(held, selected)
    left = [run for run in held if run is not None and run[0] not in selected]
    return code + _permutation(left, runs)


def flattened(piece: Piece, runs: list[Run]) -> str:
    """The step from a view of `runs` to the dimensions of a piece; it may copy."""
    code = ""
    place = 0
    pending = list(runs)
    for dim in piece.dims:
        count, axes = 0, len(dim)
        while axes > 0 and pending:
            axes -= len(pending.pop(0))
            count += 1
        if count == 0:
            code += f".unsqueeze({place})"
        elif count > 1:
            code += f".flatten({place}, {place + count - 1})"
        place += 1
    return code


def _cut(
    dimension: tree.Dimension | tree.Product, axes: Run, path: list[int], place: int, sizes: Sizes
) -> tuple[str, list[Run]]:
    """Narrow a dimension to the terms that the path takes. Returns the steps and what each new dimension holds."""
    match dimension:
        case tree.Sum(terms=terms):
            taken = path.pop(0)
            start = " + ".join(sizes.dimension(term) for term in terms[:taken]) or "0"
            step = f".narrow({place}, {start}, {sizes.dimension(terms[taken])})"
            steps, dims = _cut(terms[taken], axes, path, place, sizes)
            return step + steps, dims
        case tree.Product(factors=factors) if any(isinstance(f, tree.Sum) for f in factors):
            at = next(n for n, f in enumerate(factors) if isinstance(f, tree.Sum))
            before, after = axes[:at], axes[len(axes) - (len(factors) - at - 1) :]
            inner = axes[at : len(axes) - len(after)]
            parts = [sizes.run(before)] if before else []
            parts += [sizes.dimension(factors[at])]
            parts += [sizes.run(after)] if after else []
            step = f".unflatten({place}, ({', '.join(parts)}))"
            steps, dims = _cut(factors[at], inner, path, place + bool(before), sizes)
            return step + steps, [*([before] if before else []), *dims, *([after] if after else [])]
    return "", [axes]


def _runs_of(dim: Run, runs: list[Run]) -> list[Run]:
    """The runs that make up a dimension; an axis that is in none of them (it is selected) stands for itself."""
    first = {run[0]: run for run in runs}
    out: list[Run] = []
    place = 0
    while place < len(dim):
        run = first.get(dim[place], (dim[place],))
        out.append(run)
        place += len(run)
    return out


def _selection(held: list[Run | None], selected: dict[str, str]) -> str:
    """`[e, :, j]`: positions of the selected axes, and 0 in dimensions of size one."""
    words = ["0" if run is None else selected.get(run[0], ":") for run in held]
    while words and words[-1] == ":":
        words.pop()
    return f"[{', '.join(words)}]" if words else ""


def _permutation(found: list[Run], wanted: list[Run]) -> str:
    order = [found.index(run) for run in wanted]
    if order == sorted(order):
        return ""
    if order == [1, 0]:
        return ".T"
    return f".permute({', '.join(map(str, order))})"
