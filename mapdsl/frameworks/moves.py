"""Moving elements between what a process holds of tensors on both sides, as links say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mapdsl.frameworks.layouts import Block, Layout
from mapdsl.runtime.codecs.memory import fresh
from mapdsl.runtime.codecs.strided import contiguous_copy, copy_strided
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.fitting import compare
from mapdsl.runtime.links import Box, Link, Ranges, Side, elements

Window = tuple[Tensor, Sequence[Block]]
"""A local tensor and the blocks of the whole one that it has."""


def fill(target: Tensor, blocks: Iterable[Block], links: Iterable[Link], window: Callable[[str, Box], Window]) -> None:
    """Fill what is held of a tensor.

    `window` gives what is at hand of a source, by name, with all of a box of it. Raises ConversionError: R605 where it
    has not all of it, R602 where copies differ.
    """
    for link in links:
        for block in blocks:
            for ranges in link.within("target", block.box):
                source, held = window(link.source, link.box("source", ranges))
                place, moved = seen(target, block, link, "target", ranges), 0
                for other in held:
                    for shared in link.within("source", other.box, ranges):
                        begins = [begin for begin, _ in ranges]
                        part = _cut(place, begins, shared)
                        value = seen(source, other, link, "source", shared)
                        (_compare if link.copy else _copy)(part, value, link)
                        moved += part.numel()
                if moved != place.numel():
                    raise ConversionError("R605", f"this process has not all of {link.source} that {link.target} needs")


def _copy(place: Tensor, value: Tensor, link: Link) -> None:
    if place.dtype != value.dtype:
        message = f"expected {place.dtype} as in the rest of {link.target}, found {value.dtype}"
        raise ConversionError("R606", f"{link.source}: {message}")
    if not place.is_meta:
        copy_strided(place, value.to(place.device) if value.device != place.device else value)


def _compare(place: Tensor, value: Tensor, link: Link) -> None:
    compare(place, value.to(place.device), link.source)


def _cut(view: Tensor, begins: Sequence[int], ranges: Ranges) -> Tensor:
    """Those positions of a view of some axes, which begin where it begins."""
    for axis, (begin, end) in enumerate(ranges):
        view = view.narrow(axis, begin - begins[axis], end - begin)
    return view


def seen(local: Tensor, block: Block, link: Link, side: Side, ranges: Ranges) -> Tensor:
    """Some positions of a link as a view of a local tensor, a dimension for each axis."""
    strides = local.stride()
    offset = local.storage_offset()
    for dim, (first, _) in enumerate(link.box(side, ranges)):
        offset += (first - block.box[dim][0] + block.at[dim]) * strides[dim]
    sizes = [end - begin for begin, end in ranges]
    steps = [0 if dim < 0 else step * strides[dim] for dim, step in link.along(side)]
    return local.as_strided(sizes, steps, offset)


def as_target(local: Tensor, block: Block, link: Link, ranges: Ranges) -> Tensor | None:
    """The same view in the shape of what it is of the target; None where it is no view in that shape."""
    view = seen(local, block, link, "source", ranges)
    dims: list[tuple[int, int]] = []
    for target in range(len(link.target_at)):
        own = [n for n, axis in enumerate(link.axes) if axis.target.dim == target]
        own.sort(key=lambda n: -link.axes[n].target.step)
        size, stride = 1, 1
        for n in reversed(own):  # the fastest first
            if view.shape[n] == 1:
                continue
            if size == 1:
                stride = view.stride(n)
            elif view.stride(n) != size * stride:
                return None
            size *= view.shape[n]
        dims.append((size, stride))
    return view.as_strided([size for size, _ in dims], [stride for _, stride in dims])


def piece(local: Tensor, block: Block, link: Link, ranges: Ranges) -> Tensor:
    """The same in the order of the target: in each dimension those of its positions that the ranges have."""
    view = seen(local, block, link, "source", ranges)
    order = sorted(range(len(link.axes)), key=lambda n: (link.axes[n].target.dim, -link.axes[n].target.step))
    sizes = [1] * len(link.target_at)
    for n in order:
        sizes[link.axes[n].target.dim] *= view.shape[n]
    return contiguous_copy(view.permute(order)).view(sizes)


def made_for(layout: Layout, links: Sequence[Link], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what this process is to hold of a tensor; zeros where links do not fill it."""
    made = fresh(layout.local_shape, dtype, device)
    return made if all(are_filled(links, block.box) for block in layout.blocks()) else made.zero_()


def are_filled(links: Sequence[Link], box: Box) -> bool:
    """Whether links leave nothing of a box of their target out."""
    parts = (ranges for link in links if not link.copy for ranges in link.within("target", box))
    return sum(map(elements, parts)) == elements(box)


__all__ = ["Window", "are_filled", "as_target", "fill", "made_for", "piece", "seen"]
