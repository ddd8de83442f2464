"""Weights as int8 in groups, with the scales in the form in which DeepSpeed's inference takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.errors import ConversionError

# The quantised weights of a layer, in the order of the rows of its scales.
_KINDS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_ACROSS = ("attention.dense", "mlp.dense_4h_to_h")
_MAX_BITS = 8


def kind_of(name: str) -> str | None:
    """Which of a layer's quantised weights this is, if it is one; an MLP of an expert is not."""
    stem = f".{name.removesuffix('.weight')}"
    if not name.endswith(".weight"):
        return None
    return next((kind for kind in _KINDS if stem.endswith((f".{kind}", f".self_{kind}"))), None)


def is_cut_across(name: str) -> bool:
    """Whether shards hold columns of a weight: its groups do not lie one behind the other in the merged one."""
    return kind_of(name) in _ACROSS


class Quantiser:
    """Quantises weights of one load, and keeps their scales.

    A weight is cut, flat, into `groups` equal groups, twice as many in an MLP with `mlp_extra_grouping`. Raises
    ConversionError: C505 for numbers that cannot be, D401 where the groups of a weight would not be equal, D403 where a
    value is not finite.
    """

    def __init__(self, bits: int, groups: int, mlp_extra_grouping: bool) -> None:
        if not 2 <= bits <= _MAX_BITS:
            raise ConversionError("C505", f"quantize_bits is {bits}, expected 2 to {_MAX_BITS}")
        if groups < 1:
            raise ConversionError("C505", f"quantize_groups is {groups}, expected a number from 1")
        self._bits, self._groups, self._extra = bits, groups, mlp_extra_grouping
        self._scales: dict[str, Tensor] = {}

    def quantised(self, state: Mapping[str, Tensor], merged: int = 1) -> dict[str, Tensor]:
        """The state with its weights as int8; with the groups of as many shards as it was `merged` from."""
        return {name: self._quantised(name, tensor, merged) for name, tensor in state.items()}

    def across(self, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """States to be merged, with those weights as int8 that are cut across: each shard keeps groups of its own."""
        out: list[dict[str, Tensor]] = [dict(state) for state in states]
        for name in filter(is_cut_across, states[0]):
            columns = []
            for state in out:
                if name in state:
                    state[name] = self._quantised(name, state[name], 1)
                    columns.append(self._scales[name].view(-1, 1))
            self._scales[name] = torch.cat(columns, dim=1).view(1, -1)
        return out

    def scales(self, names: Iterable[str]) -> Tensor | None:
        """What to multiply with, [layers, 4, groups]: rows for QKV, attention's output and the two of the MLP.

        Layers come in the order of `names`, those of the state. Shorter rows end in zeros. None where nothing was
        quantised.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        for name in names:
            kind = kind_of(name)
            if kind is not None:
                stem = name.removesuffix(".weight").removesuffix(kind).removesuffix("self_")
                layers.setdefault(stem, {})[kind] = self._scales[name]
        if not layers:
            return None
        width = max(scale.shape[1] for scale in self._scales.values())
        like = next(iter(self._scales.values()))
        return torch.stack([_rows(layer, like.new_zeros(len(_KINDS), width)) for layer in layers.values()])

    def _quantised(self, name: str, tensor: Tensor, merged: int) -> Tensor:
        kind = kind_of(name)
        if kind is None or (tensor.dtype == torch.int8 and name in self._scales):
            return tensor
        groups = self._groups * merged * (2 if self._extra and kind.startswith("mlp.") else 1)
        codec = GroupInt(f"int{self._bits} in {groups} groups", self._bits, groups)
        parts = codec.encode(name, tensor).parts
        self._scales[name] = parts[f"{name}_scale"]
        return parts[name]


def _rows(layer: Mapping[str, Tensor], out: Tensor) -> Tensor:
    for row, kind in enumerate(_KINDS):
        if kind in layer:
            out[row, : layer[kind].shape[1]] = layer[kind][0]
    return out
