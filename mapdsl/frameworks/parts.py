"""The tensors of a model in parts, loaded one after the other, so that little is there beside the model at once.

What stored tensors are made of together is in one part: a part's stored tensors need nothing of another part's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from mapdsl.frameworks.layouts import local_of
from mapdsl.frameworks.live import MissingTensorsError, State
from mapdsl.runtime.errors import some_of
from mapdsl.runtime.tracing import Trace

_MOST_PARTS = 64  # planning a load takes time besides reading


@dataclass(frozen=True)
class Part:
    """Tensors of the model, and what stored tensors are read into for them: some of these are the model's memory."""

    held: State
    stored: State

    def temporary(self) -> frozenset[str]:
        """The names of the stored tensors that are not the model's memory."""
        own = {_memory(tensor) for tensor in self.held.values()}
        return frozenset(name for name, tensor in self.stored.items() if _memory(tensor) not in own)

    def install(self, made: Mapping[str, Tensor]) -> None:
        """Put what was made of the stored tensors into the model."""
        for name, tensor in made.items():
            if tensor is not self.held[name]:
                self.held[name].copy_(tensor)


def _memory(tensor: Tensor) -> int:
    return local_of(tensor).untyped_storage().data_ptr()


def check_complete(found: Trace, known: Collection[str]) -> None:
    """Raise MissingTensorsError where a checkpoint of the known names lacks what writing a state would make."""
    missing = [name for name in found.stored_names() if name not in known]
    if missing:
        many = f"{len(missing)} tensors" if len(missing) > 1 else "a tensor"
        raise MissingTensorsError("R605", f"the checkpoint lacks {many}: {some_of(missing)}")


def parts_of(found: Trace, state: State) -> list[list[str]]:
    """The names of a state in parts, in its order; none where nothing of it is stored.

    `found` is what writing the state takes. A part has a 64th of all bytes, or what the largest stored tensor is made
    of. What nothing is stored of is in the first part.
    """
    groups = _together(found, state)
    loose = [name for name in state if name not in groups]
    members: dict[str, list[str]] = {}
    for name, first in groups.items():
        members.setdefault(first, []).append(name)
    sizes = {first: sum(state[name].nbytes for name in names) for first, names in members.items()}
    bound = max([sum(sizes.values()) // _MOST_PARTS, *sizes.values()], default=0)
    parts: list[list[str]] = []
    used = bound + 1
    for first, names in members.items():
        if used + sizes[first] > bound:
            parts.append([])
            used = 0
        parts[-1] += names
        used += sizes[first]
    if parts:
        parts[0] += loose
    return parts


def _together(found: Trace, state: State) -> dict[str, str]:
    """By name of what something is stored of, in the order of the state, one that stands for all it is stored with."""
    others: dict[str, str] = {}

    def leader(name: str) -> str:
        while (other := others.setdefault(name, name)) != name:
            others[name] = others[other]
            name = other
        return name

    for target in found.targets.values():
        origins = list(dict.fromkeys(name for name in target.origins() if name in state))
        for name in origins:
            others[leader(name)] = leader(origins[0])
    return {name: leader(name) for name in state if name in others}


__all__ = ["Part", "check_complete", "parts_of"]
