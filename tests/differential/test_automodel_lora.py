"""LoRA of routed experts: `rules/peft/` and NeMo Automodel's mixin give the same names, shapes and bytes.

The mixin is asked through the adapters of Qwen3-MoE (gated), MiniMax-M2 (w1, w3, w2) and Nemotron-V3 (no gate). Where
they differ is below, each case with its reason.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.runtime.errors import ConversionError
from tests.helpers.deepseek_v4 import differences
from tests.helpers.peft import (
    GATED,
    GATED_LORA,
    LEGACY,
    MODERN,
    UP,
    UP_LORA,
    W_LORA,
    Lora,
    State,
    W,
    compiled,
    without,
)

pytestmark = pytest.mark.heavy

ADAPTERS = {
    "qwen3_moe": "Qwen3MoeStateDictAdapter",
    "minimax_m2": "MiniMaxM2StateDictAdapter",
    "nemotron_v3": "NemotronV3StateDictAdapter",
}
MAPS = {"qwen3_moe": compiled(GATED), "minimax_m2": compiled(W), "nemotron_v3": compiled(UP)}
LORAS = {"qwen3_moe": GATED_LORA, "minimax_m2": W_LORA, "nemotron_v3": UP_LORA}
SIZES: dict[str, dict[str, Any]] = {
    "distinct": {},
    "one expert": {"experts": 1},
    "rank 1": {"rank": 1, "down_rank": 1},
    "one layer": {"layers": 1},
    "f32": {"dtype": torch.float32},
}
EVERY = [(family, name) for family in ADAPTERS for name in SIZES]
LAYOUTS = [MODERN, LEGACY]


def lora_of(family: str, sizes: str) -> Lora:
    return replace(LORAS[family], **SIZES[sizes])


def mixin(family: str, lora: Lora) -> Any:
    """Automodel's adapter of a family, with experts of those sizes."""
    package = "nemo_automodel.components.models"
    adapter = getattr(importlib.import_module(f"{package}.{family}.state_dict_adapter"), ADAPTERS[family])
    experts = SimpleNamespace(
        n_routed_experts=lora.experts,
        moe_inter_dim=lora.inner,
        dim=lora.hidden,
        expert_activation="swiglu" if lora.gated else "relu2",
        expert_bias=False,
    )
    backend = importlib.import_module(f"{package}.common").BackendConfig()
    return adapter(SimpleNamespace(**lora.config), experts, backend, dtype=lora.dtype)


# --- a tensor for each projection of each expert ---


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_v3"])
@pytest.mark.parametrize("sizes", SIZES)
def test_projections_are_read_to_the_same_bytes(family: str, sizes: str) -> None:
    lora = lora_of(family, sizes)
    stored = lora.apart()
    found = MAPS[family].adapter(lora.config).from_hf(stored)
    assert set(found) == set(lora.grouped())
    assert differences(found, mixin(family, lora).from_hf(dict(stored))) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_v3"])
@pytest.mark.parametrize("sizes", SIZES)
def test_projections_are_written_to_the_same_bytes(family: str, sizes: str) -> None:
    lora = lora_of(family, sizes)
    native = lora.grouped()
    found = MAPS[family].adapter(lora.config).to_hf(native)
    assert set(found) == set(lora.apart())
    assert differences(found, mixin(family, lora).to_hf(dict(native), v4_compatible=True)) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_v3"])
def test_one_tensor_at_a_time_is_written_to_the_same_bytes(family: str) -> None:
    lora = LORAS[family]
    ours, theirs = MAPS[family].adapter(lora.config), mixin(family, lora)
    for name, tensor in lora.grouped().items():
        expected = dict(theirs.convert_single_tensor_to_hf(name, tensor, v4_compatible=True))
        assert differences(dict(ours.convert_single_tensor_to_hf(name, tensor)), expected) == []


# --- fused parameters ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "sizes"), EVERY)
def test_fused_parameters_are_read_to_the_same_bytes(family: str, sizes: str, layout: str) -> None:
    lora = lora_of(family, sizes)
    stored = lora.fused(layout)
    theirs = mixin(family, lora)
    theirs._paramwrapper_layout_hint = layout
    found = MAPS[family].adapter(lora.config, lora_layout=layout).from_hf(stored)
    assert set(found) == set(lora.grouped())
    assert differences(found, theirs.from_hf(dict(stored))) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "sizes"), EVERY)
def test_fused_parameters_are_written_to_the_same_bytes(family: str, sizes: str, layout: str) -> None:
    lora = lora_of(family, sizes)
    native = lora.grouped()
    found = MAPS[family].adapter(lora.config, lora_fused=True, lora_layout=layout).to_hf(native)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in lora.fused(layout).items()
    }
    expected = mixin(family, lora).to_hf(dict(native), legacy_paramwrapper_layout=layout == LEGACY)
    assert differences(found, expected) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_metadata_is_read_as_automodel_stamps_it(layout: str) -> None:
    """What it writes to `automodel_peft_config.json` is the value of the param."""
    addons = importlib.import_module("nemo_automodel.components.checkpoint.addons")
    adapter = mixin("qwen3_moe", GATED_LORA)
    assert addons._get_paramwrapper_layout_stamp(adapter, False, layout == LEGACY) == layout
    stamped = {**GATED_LORA.config, "paramwrapper_layout": layout}
    found = MAPS["qwen3_moe"].adapter(stamped).from_hf(GATED_LORA.fused(layout))
    adapter._paramwrapper_layout_hint = layout
    assert differences(found, adapter.from_hf(GATED_LORA.fused(layout))) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_the_shapes_rule_out_is_refused_by_both(layout: str) -> None:
    other = LEGACY if layout == MODERN else MODERN
    adapter = mixin("qwen3_moe", GATED_LORA)
    adapter._paramwrapper_layout_hint = other
    with pytest.raises(ValueError, match="shapes only fit"):
        adapter.from_hf(GATED_LORA.fused(layout))
    with pytest.raises(ConversionError, match="R606.*lora_A.weight") as refused:
        MAPS["qwen3_moe"].adapter(GATED_LORA.config, lora_layout=other).from_hf(GATED_LORA.fused(layout))
    assert refused.value.code == "R606"


# --- in the shipped maps ---

# What the maps read of a config besides the sizes of `Lora`.
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"intermediate_size": 11},
    "minimax_m2": {"intermediate_size": GATED_LORA.inner, "num_local_experts": GATED_LORA.experts},
    "nemotron_v3": {
        "intermediate_size": 11,
        "n_routed_experts": GATED_LORA.experts,
        "hybrid_override_pattern": "EE",
        "mamba_num_heads": 2,
        "mamba_head_dim": 3,
        "n_groups": 1,
        "ssm_state_size": 2,
        "conv_kernel": 4,
    },
}
COMMON = {"vocab_size": 13, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}


@pytest.mark.parametrize("family", ADAPTERS)
def test_the_shipped_map_of_a_family_has_its_adapters(family: str) -> None:
    lora = LORAS[family]
    config = {**lora.config, **COMMON, **MORE[family]}
    shipped = mapdsl.load(family)
    assert (
        differences(
            shipped.adapter(config).from_hf(lora.apart(), partial=True),
            MAPS[family].adapter(lora.config).from_hf(lora.apart()),
        )
        == []
    )
    for layout in LAYOUTS:
        stored = lora.fused(layout)
        theirs = mixin(family, lora)
        theirs._paramwrapper_layout_hint = layout
        adapter = shipped.adapter(config, lora_layout=layout)
        native = adapter.from_hf(stored, partial=True)
        assert differences(native, theirs.from_hf(dict(stored))) == []
        assert differences(adapter.to_hf(native, partial=True), stored) == []


# --- deviations ---


def changed(state: State, name: str) -> State:
    """The state with one bit of one tensor changed."""
    tensor = state[name].clone()
    tensor.view(torch.uint8)[0, 0] ^= 1
    return {**state, name: tensor}


def test_deviation_copies_of_a_shared_a_that_differ_are_refused() -> None:
    """Automodel keeps that of the gate and discards that of up, whatever is in it (B7)."""
    path = "model.layers.1.mlp.experts.2"
    stored = changed(GATED_LORA.apart(), f"{path}.up_proj.lora_A.weight")
    theirs = mixin("qwen3_moe", GATED_LORA)
    assert differences(theirs.from_hf(dict(stored)), theirs.from_hf(GATED_LORA.apart())) == []
    with pytest.raises(ConversionError) as refused:
        MAPS["qwen3_moe"].adapter(GATED_LORA.config).from_hf(stored)
    assert refused.value.code == "R602"
    assert f"{path}.up_proj.lora_A.weight differs from {path}.gate_proj.lora_A.weight at [0, 0]" in str(refused.value)


ALONE = {"gate": "up_proj", "up": "gate_proj"}  # the projection that has an adapter, and the one that has none


@pytest.mark.parametrize("only", ALONE)
def test_deviation_an_adapter_of_gate_or_up_alone_is_kept(only: str) -> None:
    """Automodel loses all of one of up alone, and all but A, without a B, of one of the gate alone (B7).

    As a grouped adapter it is one whose other half of B is zeros, which adds nothing.
    """
    stored = without(GATED_LORA.apart(), ALONE[only])
    theirs = mixin("qwen3_moe", GATED_LORA).from_hf(dict(stored))
    lost = [name for name in theirs if name.endswith(".lora_gate_and_up_B")]
    assert lost == []
    assert any(name.endswith(".lora_gate_and_up_A") for name in theirs) == (only == "gate")

    found = MAPS["qwen3_moe"].adapter(GATED_LORA.config).from_hf(stored)
    assert set(found) == set(GATED_LORA.grouped())
    half = slice(GATED_LORA.inner, None) if only == "gate" else slice(None, GATED_LORA.inner)
    for name, tensor in found.items():
        if name.endswith(".lora_gate_and_up_B"):
            assert not tensor[..., half].view(torch.uint8).any()
            tensor[..., half] = 1
    # Beside the zeros, it is what both read where the other projection has the same A and a B of ones.
    filled = {
        name: torch.ones_like(tensor) if f".{ALONE[only]}.lora_B" in name else stored.get(name, tensor)
        for name, tensor in GATED_LORA.apart().items()
    }
    assert differences(found, mixin("qwen3_moe", GATED_LORA).from_hf(filled)) == []


def test_deviation_an_adapter_that_lacks_an_expert_is_refused() -> None:
    """Automodel hands the others of its group on under their stored names, which no module has."""
    name = "model.layers.0.mlp.experts.1.down_proj.lora_A.weight"
    stored = {key: tensor for key, tensor in GATED_LORA.apart().items() if key != name}
    theirs = mixin("qwen3_moe", GATED_LORA).from_hf(dict(stored))
    assert "model.layers.0.mlp.experts.lora_down_A" not in theirs
    assert "model.layers.0.mlp.experts.0.down_proj.lora_A.weight" in theirs
    with pytest.raises(ConversionError, match=f"1 of 3 tensors of a group are missing: {name}"):
        MAPS["qwen3_moe"].adapter(GATED_LORA.config).from_hf(stored)


def test_deviation_projections_of_minimax_m2_are_named_as_its_checkpoint_names_them() -> None:
    """Automodel writes `mlp.experts.0.gate_proj` where MiniMax has `block_sparse_moe.experts.0.w1` (B14)."""
    native = W_LORA.grouped()
    found = MAPS["minimax_m2"].adapter(W_LORA.config).to_hf(native)
    assert set(found) == set(W_LORA.apart())
    theirs = mixin("minimax_m2", W_LORA).to_hf(dict(native), v4_compatible=True)
    assert differences(renamed(theirs), found) == []
    assert not set(theirs) & set(found)


def test_deviation_projections_of_minimax_m2_are_read_as_its_checkpoint_names_them() -> None:
    """Automodel hands them on under their stored names, which no module has (B14)."""
    stored = W_LORA.apart()
    assert set(mixin("minimax_m2", W_LORA).from_hf(dict(stored))) == set(stored)
    found = MAPS["minimax_m2"].adapter(W_LORA.config).from_hf(stored)
    unnamed = dict(zip(renamed_back(stored), stored.values(), strict=True))
    assert differences(found, mixin("minimax_m2", W_LORA).from_hf(unnamed)) == []


def test_deviation_the_layout_of_fused_parameters_is_told_and_not_guessed_by_shapes() -> None:
    """Automodel takes the one that fits, unless both do; here metadata or the caller tells, else it is the newer."""
    stored = GATED_LORA.fused(LEGACY)
    assert set(mixin("qwen3_moe", GATED_LORA).from_hf(dict(stored))) == set(GATED_LORA.grouped())
    with pytest.raises(ConversionError) as refused:
        MAPS["qwen3_moe"].adapter(GATED_LORA.config).from_hf(stored)
    assert refused.value.code == "R606"


def test_deviation_a_square_is_read_in_the_layout_that_is_told() -> None:
    """Where both layouts have the same shapes, Automodel refuses to read without metadata; the newer is our default."""
    square = replace(GATED_LORA, hidden=6, inner=6, gated=False)
    square_up = replace(UP_LORA, hidden=6, inner=6)
    stored = square_up.fused(MODERN)
    with pytest.raises(ValueError, match="Cannot tell which"):
        mixin("nemotron_v3", square_up).from_hf(dict(stored))
    theirs = mixin("nemotron_v3", square_up)
    theirs._paramwrapper_layout_hint = MODERN
    found = MAPS["nemotron_v3"].adapter(square.config).from_hf(stored)
    assert differences(found, theirs.from_hf(dict(stored))) == []


@pytest.mark.parametrize("layout", ["peft-0.20", ""])
def test_a_layout_that_is_not_known_is_refused_by_both(layout: str) -> None:
    theirs = mixin("qwen3_moe", GATED_LORA)
    theirs._paramwrapper_layout_hint = layout
    with pytest.raises(ValueError, match="Unknown peft"):
        theirs.from_hf(GATED_LORA.fused(MODERN))
    with pytest.raises(ConversionError) as refused:
        MAPS["qwen3_moe"].adapter(GATED_LORA.config, lora_layout=layout).from_hf(GATED_LORA.fused(MODERN))
    assert refused.value.code == "R603"


_GENERIC = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def renamed(state: State) -> State:
    """Names of Automodel's per-expert adapters as MiniMax spells them."""
    out = {}
    for name, tensor in state.items():
        for short, long in _GENERIC.items():
            name = name.replace(f".{long}.", f".{short}.")
        out[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
    return out


def renamed_back(state: State) -> list[str]:
    """The other way."""
    out = []
    for name in state:
        for short, long in _GENERIC.items():
            name = name.replace(f".{short}.", f".{long}.")
        out.append(name.replace(".block_sparse_moe.", ".mlp."))
    return out
