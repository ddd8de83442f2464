"""How properties compare: names, and tensors to the byte."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mapdsl.testing.bits import bits, same


class PropertyError(AssertionError):
    """A property that an example breaks; the message names the tensors and what differs."""


def same_names(found: Iterable[str], expected: Iterable[str], what: str, free: Iterable[str] = ()) -> None:
    """The same names, but for `free` ones; the error lists those that are lacking or too many."""
    found, expected = set(found), set(expected)
    lacking, extra = sorted(expected - found), sorted(found - expected - set(free))
    if lacking or extra:
        parts = [f"lacks {_listed(lacking)}"] * bool(lacking) + [f"has {_listed(extra)} too many"] * bool(extra)
        raise PropertyError(f"{what}: the result {' and '.join(parts)}")


def compare(name: str, found: Tensor, expected: Tensor, exact: bool) -> None:
    """Shape, and where the laws promise it dtype and bytes; the first differing element is named."""
    if found.shape != expected.shape:
        raise PropertyError(f"{name}: expected the shape {list(expected.shape)}, found {list(found.shape)}")
    if not exact or same(found, expected):
        return
    if found.dtype != expected.dtype:
        raise PropertyError(f"{name}: expected the dtype {expected.dtype}, found {found.dtype}")
    one, other = bits(found).flatten(), bits(expected).flatten()
    flat = int((one != other).nonzero()[0])
    place = [int(n) for n in torch.unravel_index(torch.tensor(flat), found.shape)]
    size = found.element_size()
    words = (_hex(element, flat, size) for element in (other, one))
    raise PropertyError(f"{name}: the first difference is at {place}: expected {next(words)}, found {next(words)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hex(elements: Tensor, place: int, size: int) -> str:
    return f"0x{int(elements[place]) & ((1 << (8 * size)) - 1):0{2 * size}x}"
