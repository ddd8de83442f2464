"""Any family of NeMo Automodel: its own model without memory, the adapter that the model builds, and random states.

A family is one line, a case one config of it; a test file lists cases and asks them for differences:

    QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", "transformers:Qwen3MoeConfig")
    CASES = cases("qwen3_moe", QWEN3_MOE, {"one of each": {"hidden_size": 66, ...}})

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_reading_gives_the_same_bytes(case: Case) -> None:
        assert case.reading_differences() == []
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mapdsl
from mapdsl.runtime.adapter import Adapter
from mapdsl.testing.bits import random_bits
from tests.differential.nemo import PEERS
from tests.helpers.deepseek_v4 import differences

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

# What most tiny models share; no two are alike, so that no axis is taken for another.
SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 66,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 26,
}


@dataclass(frozen=True)
class Family:
    """One family of models: the folder in Automodel, its model's class, and the config's as `module:Class`."""

    package: str
    model: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of the config of its experts
    backend: Mapping[str, Any] = field(default_factory=dict, hash=False)  # which implementations the model uses

    def parsed(self, fields: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
        """The config of a model of that dtype as the family's own class makes it of the fields of config.json."""
        module, _, name = self.config.partition(":")
        return _get(module, name)(**{**fields, "dtype": dtype})

    def build(
        self, fields: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, device: str = "meta"
    ) -> torch.nn.Module:
        """The model; its `state_dict_adapter` is the adapter as Automodel builds it, if it has one."""
        module = "nemo_automodel.components.models"
        backend = _get(f"{module}.common", "BackendConfig")
        overrides = {"moe_overrides": dict(self.overrides)} if self.overrides else {}
        # Imported before the device is set: a table that a module makes of itself would stay without data for good.
        model, config = _get(f"{module}.{self.package}.model", self.model), self.parsed(fields, dtype)
        # The models ask for the current GPU's number to name a device; nothing is put there.
        with torch.device(device), patch("torch.cuda.current_device", return_value=0):
            made: torch.nn.Module = model(config, backend=backend(**self.backend), **overrides)
        return made


@dataclass(frozen=True)
class Case:
    """One config of a family, as config.json has it, and the map that is held against Automodel's adapter of it."""

    map: str
    family: Family
    config: Mapping[str, Any] = field(hash=False)
    dtype: torch.dtype = torch.bfloat16
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of the map, given by the caller

    @property
    def model(self) -> torch.nn.Module:
        """Automodel's model, without memory, fresh."""
        return self.family.build(self.config, self.dtype)

    def ours(self) -> Adapter:
        """The compiled adapter, fresh."""
        return load(self.map).adapter(self.config, **self.params)

    def theirs(self) -> Any:
        """Automodel's adapter, fresh as its model is: it keeps things from call to call."""
        return self.model.state_dict_adapter

    def native(self, seed: int = 0) -> State:
        """A random state of the model: the names, shapes and dtypes that it has itself."""
        return random_state(self.model.state_dict(), seed)

    def stored(self, seed: int = 0) -> State:
        """A random checkpoint, as Automodel writes it."""
        return contiguous(self.theirs().to_hf(self.native(seed)))

    def model_differences(self) -> list[str]:
        """Names and shapes that our native side and the model's own state do not share."""
        return shape_differences(shapes_of(self.ours().native_keys()), shapes_of(self.model.state_dict()))

    def parsed_differences(self) -> list[str]:
        """Names and shapes that change where the config is as its own class spells it."""
        parsed = load(self.map).adapter(self.family.parsed(self.config, self.dtype).to_dict(), **self.params)
        native = shape_differences(shapes_of(parsed.native_keys()), shapes_of(self.ours().native_keys()))
        return native + shape_differences(shapes_of(parsed.hf_keys()), shapes_of(self.ours().hf_keys()))

    def writing_differences(self, seed: int = 1) -> list[str]:
        """What differs in name, dtype, shape or bytes where both write a random state of the model."""
        native = self.native(seed)
        return differences(self.ours().to_hf(native), self.theirs().to_hf(dict(native)))

    def reading_differences(self, seed: int = 2) -> list[str]:
        """What differs where both read a random checkpoint, whose tensors come in no order."""
        stored = shuffled(self.stored(seed), seed)
        return differences(self.ours().from_hf(stored), self.theirs().from_hf(dict(stored)))

    def single_differences(self, seed: int = 3) -> list[str]:
        """What differs where both write one tensor at a time."""
        ours, theirs, found = self.ours(), self.theirs(), []
        for name, tensor in self.native(seed).items():
            ones = [dict(one.convert_single_tensor_to_hf(name, tensor)) for one in (ours, theirs)]
            found += differences(*ones)
        return found

    def returning_differences(self, seed: int = 4) -> list[str]:
        """What does not come back: a checkpoint read and written, and a state written and read, by fresh adapters."""
        stored, native = self.stored(seed), self.native(seed)
        found = differences(self.ours().to_hf(self.ours().from_hf(stored)), stored)
        return found + differences(self.ours().from_hf(self.ours().to_hf(native)), native)


def cases(
    map_name: str,
    family: Family,
    configs: Mapping[str, Mapping[str, Any]],
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
) -> dict[str, Case]:
    """A case for each config and dtype, by a name for each; None takes a field out of a config."""
    made = {}
    for name, config in configs.items():
        stated = {key: value for key, value in config.items() if value is not None}
        for dtype in dtypes:
            made[f"{map_name}: {name}, {str(dtype).removeprefix('torch.')}"] = Case(map_name, family, stated, dtype)
    return made


@functools.cache
def load(name: str) -> mapdsl.Map:
    """A shipped map, compiled once."""
    return mapdsl.load(name)


def random_state(like: Mapping[str, Tensor], seed: int = 0) -> State:
    """Tensors of the names, shapes and dtypes of others, of any bit patterns that their dtypes have."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bits(generator, tuple(tensor.shape), tensor.dtype) for name, tensor in like.items()}


def shuffled(state: State, seed: int = 0) -> State:
    """The same tensors in another order of names."""
    order = torch.randperm(len(state), generator=torch.Generator().manual_seed(seed)).tolist()
    names = list(state)
    return {names[place]: state[names[place]] for place in order}


def contiguous(state: Mapping[str, Tensor]) -> State:
    """Copies of all, as a checkpoint would hold them."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """Shapes by name, of a state or of an adapter's keys."""
    return {name: tuple(one.shape if isinstance(one, Tensor) else one[0] or ()) for name, one in state.items()}


def shape_differences(found: Shapes, expected: Shapes) -> list[str]:
    """Names that are on one side only, and those whose shapes differ, with both."""
    here = sorted(set(found) & set(expected))
    changed = [f"{name}: {found[name]}, not {expected[name]}" for name in here if found[name] != expected[name]]
    return sorted(set(found) ^ set(expected)) + changed


def _get(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as problem:
        raise RuntimeError(f"the differential tests run against NeMo Automodel: {PEERS}") from problem
