"""What a map says of names alone: which tensors of the model are stored under which, and modules with them.

Low-rank adapters of a linear layer (`q_proj.lora_A.weight`) have no lines in maps: they are called as the weight that
they belong to. The lines of the map say how that is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from mapdsl.frameworks.live import MissingTensorsError
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs.values import Cast
from mapdsl.runtime.complement import Alternatives, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.links import Link
from mapdsl.runtime.name_list import Listed
from mapdsl.runtime.shares import axes_in
from mapdsl.runtime.sizes import counted, shape_of
from mapdsl.runtime.tracing import Target, Trace, trace

OUTER_PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""

LAYOUT, LEGACY_LAYOUT = "peft-0.19.1", "peft-0.18"
"""How PEFT lays out adapters of fused parameters: since 0.19.1, and before."""

_HALF = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.|$)")
_LOW_RANK = re.compile(r"(?P<stem>.+)(?P<rest>\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.\w+)*)")
_EXPERT = re.compile(r"(?P<stem>.+)\.(?P<expert>0|[1-9]\d*)\.(?P<projection>gate|up|down)_proj")


def outer_prefix(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The prefix that all names have, if they have it, and the tensors without it."""
    if not tensors or not all(name.startswith(OUTER_PREFIX) for name in tensors):
        return "", dict(tensors)
    return OUTER_PREFIX, {name.removeprefix(OUTER_PREFIX): tensor for name, tensor in tensors.items()}


class Naming:
    """The names of a map's two sides under a config."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    @cached_property
    def _trace(self) -> Trace:
        """The conversion of a whole state of the model; axes that the config does not tell the size of have one."""
        listed = self.adapter.listed_right()
        shapes = {of.name: _shape(of) for of in listed}
        shapes |= {of.name: shapes[of.twin] for of in listed if of.shape is None and of.twin in shapes}
        blank = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return trace(self.adapter, self.adapter.RIGHT, blank, partial=True, quantization=False)

    @cached_property
    def stored(self) -> dict[str, Alternatives]:
        """How each stored tensor may be stored, by name."""
        return {listed.name: listed.stored for listed in self.adapter.listed_left()}

    @cached_property
    def _to_left(self) -> dict[str, str]:
        """What is stored under another name, or the same, and not moved, by the model's name."""
        found = {}
        for target in self._trace.targets.values():
            links = list(target.links())
            # The first part of a joined tensor begins where that does, but is not all of it.
            is_whole = len(links) == 1 and self._trace.sources[links[0].source].shape == target.shape
            if is_whole and links[0].is_rename:
                found[links[0].source] = target.name
        return found

    @cached_property
    def _to_right(self) -> dict[str, str]:
        return {left: right for right, left in self._to_left.items()}

    @cached_property
    def _adapted(self) -> dict[str, str]:
        """After what the low-rank adapter of a weight is called: the stored one; itself if it is but a part of one."""
        return {name: self._to_left.get(name, name) for name in self._trace.sources}

    @cached_property
    def _adapted_left(self) -> dict[str, str]:
        """The same of stored adapters, which may have the model's names, too."""
        return {name: name for name in self._adapted} | self._to_right

    @cached_property
    def share_of_views(self) -> float:
        """How much of the stored tensors, those in no format, is views of the model's: 1 for all."""
        views = others = 0
        for target in self._trace.targets.values():
            links = list(target.links())
            if len(links) == 1 and links[0].is_view and self._is_as_held(target, links[0]):
                views += math.prod(target.shape)
            elif links:
                others += math.prod(target.shape)
        return views / max(views + others, 1)

    def _is_as_held(self, target: Target, link: Link) -> bool:
        """Whether a tensor is stored in the dtype that the model has it in."""
        held = self._trace.sources[link.source].stored
        if isinstance(target.stored, Cast) and isinstance(held, Cast):
            return target.stored.dtype is held.dtype
        return isinstance(target.stored, Raw)

    # --- low-rank adapters of linear layers ---

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors of the model that the map speaks of, and low-rank adapters of its weights."""
        return _split(tensors, lambda: self._adapted)

    def split_left(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same of stored tensors."""
        return _split(tensors, lambda: self._adapted_left)

    def left(self, name: str) -> str:
        """The stored name of a low-rank adapter of the model."""
        return _renamed(name, self._adapted)

    def right(self, name: str) -> str:
        """The model's name of a stored low-rank adapter."""
        return _renamed(name, self._adapted_left)

    # --- modules ---

    def module(self, name: str) -> str:
        """What the checkpoint calls a module of the model, or a projection of a grouped expert; itself if nothing."""
        weight = self._to_left.get(f"{name}.weight")
        if weight is not None:
            return weight.removesuffix(".weight")
        expert = _EXPERT.fullmatch(name)
        return self._projections.get(expert.groups(), name) if expert is not None else name

    @cached_property
    def _projections(self) -> dict[tuple[str, ...], str]:
        """The stored modules of grouped experts, by module, expert and projection."""
        found: dict[tuple[str, ...], str] = {}
        for target in self._trace.targets.values():
            for link in target.links():
                stem, _, grouped = link.source.rpartition(".")
                words = {"gate_and_up_projs": ("gate", "up"), "down_projs": ("down",)}.get(grouped, ())
                if not words or not link.source_at:
                    continue
                width = self._trace.sources[link.source].shape[-1]
                first = link.source_at[-1] * len(words) // max(width, 1)
                is_half = len(words) > 1 and any(a.source.dim == 2 and a.size < width for a in link.axes)
                word = words[first] if is_half else words[-1]
                found[stem, str(link.source_at[0]), word] = target.name.removesuffix(".weight")
        return found


def check_pairs(stored: Mapping[str, Tensor]) -> None:
    """Raise MissingTensorsError for an A or a B of low-rank adapters whose other half is not there."""
    for name in stored:
        half = _HALF.search(name) if "lora_" in name else None
        if half is not None:
            other = name[: half.start(1)] + ("B" if half[1] == "A" else "A") + name[half.end(1) :]
            if other not in stored:
                raise MissingTensorsError("R605", f"{other} is missing, {name} is there")


@contextmanager
def telling_of_layouts(adapter: Adapter) -> Iterator[None]:
    """Where an adapter of fused parameters does not fit, it may be in the other layout that PEFT has had."""
    try:
        yield
    except ConversionError as problem:
        layout = getattr(adapter, "lora_layout", None)
        if problem.code != "R606" or ".lora_" not in problem.message or layout is None:
            raise
        advice = f"read as lora_layout={layout!r}; {LEGACY_LAYOUT!r} is what PEFT before 0.19.1 writes"
        raise ConversionError(problem.code, f"{problem.message}; {advice}", problem.rule) from None


def _shape(of: Listed) -> tuple[int, ...]:
    """A shape of a tensor that its pattern fits: where an axis has no known size it has one position."""
    if not isinstance(of.shape, str):
        return of.shape or ()
    sizes = {**dict.fromkeys(axes_in(of.shape), 1), **counted(of.sizes)}
    return tuple(size or 0 for size in shape_of(of.shape, sizes))


def _split(
    tensors: Mapping[str, Tensor], names: Callable[[], Mapping[str, str]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    plain: dict[str, Tensor] = {}
    low_rank: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Most states have none: then nothing of the map is looked at.
        found = _LOW_RANK.fullmatch(name) if "lora_" in name else None
        is_low_rank = found is not None and f"{found['stem']}.weight" in names()
        (low_rank if is_low_rank else plain)[name] = tensor
    return plain, low_rank


def _renamed(name: str, names: Mapping[str, str]) -> str:
    found = _LOW_RANK.fullmatch(name)
    assert found is not None
    weight = names[f"{found['stem']}.weight"]
    if not weight.endswith(".weight"):
        raise ConversionError("R603", f"{name}: it adapts {weight}, whose name does not end in `.weight`")
    return weight.removesuffix(".weight") + found["rest"]


__all__ = ["LAYOUT", "LEGACY_LAYOUT", "OUTER_PREFIX", "Naming", "check_pairs", "outer_prefix", "telling_of_layouts"]
