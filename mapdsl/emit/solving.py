"""Sizes of axes as code: `c = qkv.shape[0] // (h + 2 * g)`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mapdsl.emit.expressions import product
from mapdsl.emit.layout import Code, flat
from mapdsl.runtime.sizes import Polynomial, parse_pattern


def axis_codes(variable: str, pattern: str, known: Mapping[str, str]) -> dict[str, Code]:
    """The size of every axis that is not known, from the shape of a tensor that fits the pattern.

    In an order in which each may use those before it.
    """
    sizes = dict(known)
    codes: dict[str, Code] = {}
    pending = list(enumerate(parse_pattern(pattern)))
    progress = True
    while pending and progress:
        progress = False
        for place, polynomial in list(pending):
            unknown = {axis for _, axes in polynomial for axis in axes if axis not in sizes}
            if len(unknown) > 1:
                continue
            if unknown:
                axis = unknown.pop()
                codes[axis] = _solved(f"{variable}.shape[{place}]", polynomial, axis, sizes)
                sizes[axis] = axis
            pending.remove((place, polynomial))
            progress = True
    return codes


def _solved(whole: str, polynomial: Polynomial, axis: str, sizes: Mapping[str, str]) -> str:
    """The axis out of `whole == factor * axis + rest`."""
    rest = _total([(n, axes) for n, axes in polynomial if axis not in axes], sizes)
    factor = _total([(n, tuple(a for a in axes if a != axis)) for n, axes in polynomial if axis in axes], sizes)
    code = whole
    if rest:
        wrapped = f"({rest})" if " + " in rest else rest
        code = f"{whole} - {wrapped}" if factor == "1" else f"({whole} - {wrapped})"
    if factor == "1":
        return code
    return f"{code} // {f'({factor})' if ' ' in factor else factor}"


def _total(monomials: list[tuple[int, tuple[str, ...]]], sizes: Mapping[str, str]) -> str:
    """A sum of products, like terms together."""
    counts: dict[tuple[str, ...], int] = {}
    for count, axes in monomials:
        counts[axes] = counts.get(axes, 0) + count
    terms = []
    for axes, count in counts.items():
        words = [sizes[axis] for axis in axes]
        terms.append(product([str(count), *words]) if words else str(count))
    return " + ".join(terms)


def is_simple(code: Code) -> bool:
    """Whether a size is read off a shape at a glance: `x.shape[0]`, `x.shape[0] // 2`."""
    return isinstance(code, str) and "(" not in code and " - " not in code and len(code) < 50


def mentions(code: str, name: str) -> bool:
    """Whether code uses a variable; within strings only what f-strings fill in counts."""
    bare = re.sub(r'f?"[^"]*"', lambda found: " ".join(re.findall(r"\{[^{}]*\}", found[0])), code)
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|=[^=])", bare) is not None


def needed(axes: list[str], sizes: dict[str, Code]) -> list[str]:
    """The axes with those that their own sizes are computed from, in the order of computing."""
    wanted = set(axes)
    for axis in reversed(list(sizes)):
        if axis in wanted:
            wanted |= {other for other in sizes if other != axis and mentions(flat(sizes[axis]), other)}
    return [axis for axis in sizes if axis in wanted]
