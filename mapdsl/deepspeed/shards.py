"""How shards are cut: a map with a mesh `tp`, compiled for the layout, the heads and the experts of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import Tensor

from mapdsl.map import Map, load
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.sharded_adapter import ShardedAdapter

State = Mapping[str, Tensor]

PREFIX = "module."
"""Stands before every name that the map reads, so that a name without any prefix is read like those that have one."""

# Versions of Megatron's checkpoints by how queries, keys and values are fused; 3.0 changed other things.
LAYOUTS = {0: 0, 1.0: 1, 2.0: 2, 3.0: 2}


def layout_of(version: object, where: str) -> int:
    """How queries, keys and values are fused in checkpoints of a version; C505 for one that is not known."""
    if isinstance(version, (int, float)) and not isinstance(version, bool) and version in LAYOUTS:
        return LAYOUTS[version]
    message = f"the checkpoint version {version!r}{where} is not known; expected one of 0, 1.0, 2.0, 3.0"
    raise ConversionError("C505", message)


MAP = "megatron/loader"
"""The map that is used if no other is given."""


@lru_cache(maxsize=1)
def _shipped() -> Map:
    return load(MAP)


def _load(path: str | os.PathLike[str]) -> Map:
    # A pipeline makes a loader for each layer's files. A map of the caller's own may change meanwhile.
    return _shipped() if path == MAP else load(path)


def map_of(given: Map | str | os.PathLike[str]) -> Map:
    """The map of a loader; N113 where it has no mesh `tp` to cut axes over."""
    found = given if isinstance(given, Map) else _load(given)
    if "tp" not in {mesh.name for mesh in found.checked.map.meshes}:
        message = f"{found.source.path} has no mesh `tp`, over which a loader cuts axes: `mesh tp shards ...`"
        raise ConversionError("N113", message)
    return found


@dataclass(frozen=True)
class Model:
    """What is known of a model: fields of its config under Megatron's names."""

    fields: Mapping[str, Any]
    num_heads: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any] | Any, num_heads: int | None, arguments: object) -> Model:
        """What a caller says, and for the rest the arguments that a checkpoint holds."""
        fields: dict[str, Any] = {}
        for source in (arguments, config):
            if source is not None:
                fields |= source if isinstance(source, Mapping) else vars(source)
        return cls({key: value for key, value in fields.items() if value is not None}, num_heads)

    def params(self, layout: int, state: State) -> dict[str, Any]:
        """The params of the loader's map, for what one shard holds."""
        heads = self.num_heads or self.fields.get("num_attention_heads") or 0
        return {
            "version": layout,
            "h": heads,
            "g": self._groups(heads),
            "gated": self.fields.get("swiglu", _is_gated(state)),
            "experts": self._experts_are(),
            "E": _experts(state),
        }

    def _experts_are(self) -> str:
        cut = self.fields.get("enable_expert_tensor_parallelism")
        return "unknown" if cut is None else "cut" if cut else "whole"

    def _groups(self, heads: int) -> int:
        """How many heads of keys and values there are. Megatron-LM has its number of groups without using it, too."""
        groups = self.fields.get("num_query_groups") if self.fields.get("group_query_attention", True) else None
        return int(groups or self.fields.get("num_key_value_heads") or heads)


def resharded(
    source: Map,
    params: Mapping[str, Any],
    states: Sequence[State],
    counts: tuple[int, int],
    rank: int,
    *,
    compare: bool,
) -> dict[str, Tensor]:
    """One new shard, out of the old ones that it is made of, or out of the one that it is a part of.

    `counts` are how many old shards there are in all, and how many new ones; `rank` is that of the new one among those
    that `states` make. Raises ConversionError: P453 where a size does not divide, R602 where copies differ, R603, R605
    and R606 where shards do not fit the map or each other.
    """
    params = {name: value for name, value in params.items() if name in source.checked.map.params}
    adapter = cast(ShardedAdapter, source.adapter(None, **params))
    sizes = {axis: params[axis] for axis in adapter.MESHES["tp"] if params.get(axis)}
    for axis, size in sizes.items():
        for count in counts:
            adapter.at({"tp": count}, {"tp": 0}).held(axis, range(size))
    # So many groups of shards have nothing to do with each other, and each holds its part of every axis.
    groups = min(counts)
    here = {axis: size // groups for axis, size in sizes.items()}
    adapter = cast(ShardedAdapter, source.adapter(None, **{**params, **here}))
    named = [{PREFIX + name: tensor for name, tensor in state.items()} for state in states]
    new = {"tp": counts[1] // groups}
    made = adapter.reshard(named, {"tp": len(states)}, new, {"tp": rank}, side=adapter.LEFT, compare=compare)
    return {name.removeprefix(PREFIX): tensor for name, tensor in made.items()}


def _is_gated(state: State) -> bool:
    """Whether dense_h_to_4h holds two projections: it has twice as many rows as dense_4h_to_h has columns."""
    for name, tensor in state.items():
        if name.endswith("dense_h_to_4h.weight") and tensor.ndim == 2:
            other = state.get(name.removesuffix("dense_h_to_4h.weight") + "dense_4h_to_h.weight")
            if other is not None and other.ndim == 2 and tensor.shape[0] == 2 * other.shape[1]:
                return True
    return False


def _experts(state: State) -> int:
    """Up to which number the names of experts count."""
    numbers = [name.partition(".deepspeed_experts.")[2].split(".")[0] for name in state]
    return max((int(number) + 1 for number in numbers if number.isdecimal() and number.isascii()), default=0)
