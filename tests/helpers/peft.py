"""Random LoRA adapters of experts, as PEFT stores them and as Automodel's modules hold them, and maps of no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.testing.bits import random_bits

State = dict[str, Tensor]

MODERN, LEGACY = "peft-0.19.1", "peft-0.18"

_HEAD = """map lora: hf <-> native
param L = num_hidden_layers
param E = num_experts
param D = hidden_size
param F = moe_intermediate_size
"""
_VARIANTS = """param lora_fused = has({path}.lora_A.weight) ?? false
param lora_layout = paramwrapper_layout ?? "peft-0.19.1"
"""
GATED = f"""{_HEAD}index i < L
model.layers.{{i}}.mlp.experts:
    include "peft/experts.map" with E = E, D = D, F = F
"""
UP = f"""{_HEAD}{_VARIANTS.format(path="model.layers.{*}.mixer.experts")}index i < L
backbone.layers.{{i}}.mixer.experts <-> model.layers.{{i}}.mixer.experts:
    include "peft/experts_up.map" with E = E, D = D, F = F, lora_fused = lora_fused
model.layers.{{i}}.mixer.experts:
    include "peft/fused.map" with E = E, D = D, F = F, U = F, lora_layout = lora_layout where lora_fused
"""
W = f"""{_HEAD}{_VARIANTS.format(path="model.layers.{*}.mlp.experts")}index i < L
model.layers.{{i}}.block_sparse_moe.experts <-> model.layers.{{i}}.mlp.experts:
    include "peft/experts_w.map" with E = E, D = D, F = F, lora_fused = lora_fused
model.layers.{{i}}.mlp.experts:
    include "peft/fused.map" with E = E, D = D, F = F, U = 2 * F, lora_layout = lora_layout where lora_fused
"""


@dataclass(frozen=True)
class Lora:
    """The sizes of a model's experts and of their adapters, and how its layers and projections are called.

    `stored` and `native` are the paths of a layer's experts on the two sides.
    """

    layers: int = 2
    experts: int = 3
    hidden: int = 5
    inner: int = 7
    rank: int = 4
    down_rank: int = 2
    gated: bool = True
    stored: str = "model.layers.{i}.mlp.experts"
    native: str = "model.layers.{i}.mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    dtype: torch.dtype = torch.bfloat16

    @property
    def config(self) -> dict[str, int]:
        """Its config.json, as far as the maps of this module read it."""
        return {
            "num_hidden_layers": self.layers,
            "num_experts": self.experts,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.inner,
        }

    @property
    def width(self) -> int:
        """The rows of gate and up together, or of up alone."""
        return 2 * self.inner if self.gated else self.inner

    def grouped(self, seed: int = 0) -> State:
        """Of any bits, as the model holds them."""
        return self._drawn(seed, (name for i in range(self.layers) for name in self._grouped(self.native.format(i=i))))

    def apart(self, seed: int = 0) -> State:
        """Of any bits, a tensor for each projection of each expert; gate and up have the same A, each its own."""
        state = self._drawn(seed, (name for i in range(self.layers) for name in self._apart(self.stored.format(i=i))))
        gate, up, _ = self.projections
        return state | {
            name: state[name.replace(f".{up}.", f".{gate}.")].clone()
            for name in state
            if self.gated and name.endswith(f".{up}.lora_A.weight")
        }

    def fused(self, layout: str, seed: int = 0) -> State:
        """Of any bits, the experts folded into the rank, as PEFT lays them out for `target_parameters`.

        That is under the names of transformers, which are those of the model.
        """
        return self._drawn(seed, (n for i in range(self.layers) for n in self._fused(self.native.format(i=i), layout)))

    def _drawn(self, seed: int, names: Iterator[tuple[str, tuple[int, ...]]]) -> State:
        generator = torch.Generator().manual_seed(seed)
        return {name: random_bits(generator, shape, self.dtype) for name, shape in names}

    def _grouped(self, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{path}.lora_gate_and_up_A", (self.experts, self.hidden, self.rank)
        yield f"{path}.lora_gate_and_up_B", (self.experts, self.rank, self.width)
        yield f"{path}.lora_down_A", (self.experts, self.inner, self.down_rank)
        yield f"{path}.lora_down_B", (self.experts, self.down_rank, self.hidden)

    def _apart(self, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        gate, up, down = self.projections
        for e in range(self.experts):
            for name in (gate, up) if self.gated else (up,):
                yield f"{path}.{e}.{name}.lora_A.weight", (self.rank, self.hidden)
                yield f"{path}.{e}.{name}.lora_B.weight", (self.inner, self.rank)
            yield f"{path}.{e}.{down}.lora_A.weight", (self.down_rank, self.inner)
            yield f"{path}.{e}.{down}.lora_B.weight", (self.hidden, self.down_rank)

    def _fused(self, path: str, layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        ranks, down_ranks = self.rank * self.experts, self.down_rank * self.experts
        sizes = [(self.inner, self.hidden), (self.hidden, self.width)]  # what down, gate and up read and write
        (down_in, down_out), (up_in, up_out) = [s[::-1] if layout == LEGACY else s for s in sizes]
        yield f"{path}.lora_A.weight", (down_ranks, down_in)
        yield f"{path}.lora_B.weight", (down_out, down_ranks)
        yield f"{path}.base_layer.lora_A.weight", (ranks, up_in)
        yield f"{path}.base_layer.lora_B.weight", (up_out, ranks)


def without(state: State, projection: str) -> State:
    """The adapter without that of one projection."""
    return {name: tensor for name, tensor in state.items() if f".{projection}." not in name}


def compiled(text: str) -> Map:
    """A map of its text."""
    return Map(Source("lora.map", text))


GATED_LORA = Lora()
UP_LORA = replace(
    GATED_LORA, gated=False, stored="backbone.layers.{i}.mixer.experts", native="model.layers.{i}.mixer.experts"
)
W_LORA = replace(GATED_LORA, stored="model.layers.{i}.block_sparse_moe.experts", projections=("w1", "w3", "w2"))
