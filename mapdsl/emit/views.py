"""A piece of a tensor as a torch expression: unflatten, narrow, select, permute, flatten.

Every such expression but the last step is a view, so the same code reads a piece and writes it in place.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mapdsl.compiler.shapes import Piece
from mapdsl.emit.expressions import product
from mapdsl.emit.layout import Bracketed, Code, breakable, call
from mapdsl.language import tree
from mapdsl.runtime.shares import padded

Run = tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A tensor's variable and the steps taken from it: `.unflatten(0, (2, f))`, `[e, :, j]`, `.T`."""

    variable: str
    steps: tuple[str, ...]

    @property
    def code(self) -> str:
        """The whole expression."""
        return self.variable + "".join(self.steps)

    def then(self, *steps: str) -> View:
        """The view with more steps."""
        return View(self.variable, (*self.steps, *steps))

    def spelled_out(self, variable: str, width: int) -> list[Code]:
        """What to assign to a variable, one after the other, to take as many steps at a time as the width has room for.

        A step that is too long by itself may be broken.
        """
        out: list[Code] = []
        code = self.variable
        fresh = True  # whether `code` holds no step yet
        for step in self.steps:
            if not fresh and len(code + step) > width:
                out.append(code)
                code, fresh = variable, True
            if fresh and len(code + step) > width and step.startswith("."):
                method, _, arguments = step.partition("(")
                out.append(call(f"{code}{method}", *map(_breakable, _arguments(arguments[:-1]))))
                code = variable
                continue
            code, fresh = code + step, False
        return out if fresh and out else [*out, code]


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
                return self.of[padded(axis.name or "")]
            case tree.Product(factors=factors):
                return product([self.dimension(factor) for factor in factors])
            case tree.Sum(terms=terms):
                return " + ".join(self.dimension(term) for term in terms)
        raise AssertionError(dimension)


def cut_dimensions(shape: tree.Shape, piece: Piece, sizes: Sizes) -> list[Run]:
    """The axes of a piece by the dimensions that it has once the sums of its tensor are cut."""
    path = list(piece.path)
    dims = [_cut(d, axes, path, 0, sizes)[1] for d, axes in zip(shape.dimensions, piece.dims, strict=True)]
    return [dim for cut in dims for dim in cut]


def common_runs(one: list[Run], other: list[Run], alone: set[str]) -> list[Run]:
    """The axes of `one` in order, neighbours that are neighbours in one dimension on both sides taken together.

    Axes in `alone` are in no run: they are selected, or one of the sides does not have them.
    """
    after: dict[str, str] = {}
    for dim in other:
        after |= dict(itertools.pairwise(dim))
    runs: list[Run] = []
    for dim in one:
        last = None
        for axis in dim:
            if axis in alone:
                last = None
                continue
            if last is not None and after.get(last) == axis:
                runs[-1] = (*runs[-1], axis)
            else:
                runs.append((axis,))
            last = axis
    return runs


def view(
    variable: str,
    shape: tree.Shape,
    piece: Piece,
    selected: dict[str, str],
    runs: list[Run],
    sizes: Sizes,
) -> View:
    """The piece of a tensor as a view whose dimensions are `runs`, axes in `selected` fixed to positions."""
    result = View(variable, ())
    held: list[Run | None] = []  # what each dimension of the view holds; None is a dimension of size one
    path = list(piece.path)
    for dimension, axes in zip(shape.dimensions, piece.dims, strict=True):
        steps, dims = _cut(dimension, axes, path, len(held), sizes)
        result = result.then(*steps)
        for dim in dims:
            parts = _runs_of(dim, runs)
            if len(parts) > 1:
                result = result.then(f".unflatten({len(held)}, ({', '.join(sizes.run(part) for part in parts)}))")
            held += parts or [None]
    result = result.then(*_selection(held, selected))
    left = [run for run in held if run is not None and run[0] not in selected]
    return result.then(*_permutation(left, runs))


def flattened(piece: Piece, runs: list[Run]) -> list[str]:
    """The steps from a view of `runs` to the dimensions of a piece; they may copy."""
    steps: list[str] = []
    pending = list(runs)
    for place, dim in enumerate(piece.dims):
        count, axes = 0, len(dim)
        while axes > 0 and pending:
            axes -= len(pending.pop(0))
            count += 1
        if count == 0:
            steps.append(f".unsqueeze({place})")
        elif count > 1:
            steps.append(f".flatten({place}, {place + count - 1})")
    return steps


def _cut(
    dimension: tree.Dimension | tree.Product, axes: Run, path: list[int], place: int, sizes: Sizes
) -> tuple[list[str], list[Run]]:
    """Narrow a dimension to the terms that the path takes. Returns the steps and what each new dimension holds."""
    match dimension:
        case tree.Pad(axis=axis):
            return [f".narrow({place}, 0, {sizes.dimension(axis)})"], [axes]
        case tree.Sum(terms=terms):
            taken = path.pop(0)
            start = " + ".join(sizes.dimension(term) for term in terms[:taken]) or "0"
            step = f".narrow({place}, {start}, {sizes.dimension(terms[taken])})"
            steps, dims = _cut(terms[taken], axes, path, place, sizes)
            return [step, *steps], dims
        case tree.Product(factors=factors) if any(isinstance(f, tree.Sum) for f in factors):
            return _cut_product(factors, axes, path, place, sizes)
    return [], [axes]


def _cut_product(
    factors: tuple[tree.Axis | tree.Sum, ...], axes: Run, path: list[int], place: int, sizes: Sizes
) -> tuple[list[str], list[Run]]:
    """Set the sum among some factors apart, then narrow it. Factors of size one hold no axis."""
    at = next(n for n, f in enumerate(factors) if isinstance(f, tree.Sum))
    lead, trail = (sum(f != _ONE for f in part) for part in (factors[:at], factors[at + 1 :]))
    before, inner, after = axes[:lead], axes[lead : len(axes) - trail], axes[len(axes) - trail :]
    parts = [sizes.run(before)] if before else []
    parts += [sizes.dimension(factors[at])]
    parts += [sizes.run(after)] if after else []
    step = [f".unflatten({place}, ({', '.join(parts)}))"] if len(parts) > 1 else []
    steps, dims = _cut(factors[at], inner, path, place + bool(before), sizes)
    return [*step, *steps], [*([before] if before else []), *dims, *([after] if after else [])]


_ONE = tree.Axis(size=1, span=None)  # type: ignore[arg-type]


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


def _selection(held: list[Run | None], selected: dict[str, str]) -> list[str]:
    """`[e, :, j]`: positions of the selected axes, and 0 in dimensions of size one."""
    words = ["0" if run is None else selected.get(run[0], ":") for run in held]
    while words and words[-1] == ":":
        words.pop()
    return [f"[{', '.join(words)}]"] if words else []


def _permutation(found: list[Run], wanted: list[Run]) -> list[str]:
    order = [found.index(run) for run in wanted]
    if order == sorted(order):
        return []
    if order == [1, 0]:
        return [".T"]
    return [f".permute({', '.join(map(str, order))})"]


def _breakable(argument: str) -> Code:
    """An argument that may be broken: a tuple between its items, a sum before its signs."""
    if argument.startswith("(") and argument.endswith(")") and len(items := _arguments(argument[1:-1])) > 1:
        return Bracketed("", [breakable(item) for item in items])
    return breakable(argument)


def _arguments(text: str) -> list[str]:
    """The arguments of a call, cut at the commas that stand in no bracket."""
    out, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            out.append(text[start:place])
            start = place + 1
    return [word.strip() for word in [*out, text[start:]] if word.strip()]
