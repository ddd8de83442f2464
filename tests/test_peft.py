"""The fragments of `rules/peft/`: LoRA of routed experts there and back, byte for byte, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mapdsl
from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError
from tests.helpers.deepseek_v4 import checkpoint, differences, tiny_config
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

FORMS = {"gated": (compiled(GATED), GATED_LORA), "w": (compiled(W), W_LORA), "up": (compiled(UP), UP_LORA)}
LAYOUTS = [MODERN, LEGACY]

loras = st.builds(
    Lora,
    layers=st.integers(1, 2),
    experts=st.integers(1, 4),
    hidden=st.integers(1, 6),
    inner=st.integers(1, 6),
    rank=st.integers(1, 4),
    down_rank=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)


def drawn(form: str, lora: Lora) -> tuple[Map, Lora]:
    """The map of a form, and the sizes drawn under its names."""
    found, named = FORMS[form]
    return found, replace(
        lora, gated=named.gated, stored=named.stored, native=named.native, projections=named.projections
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_maps_of_the_tests_hold(form: str) -> None:
    assert FORMS[form][0].check() == []


# --- there and back ---


@pytest.mark.parametrize("form", FORMS)
@given(lora=loras, seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_projections_come_back_to_the_byte(form: str, lora: Lora, seed: int) -> None:
    found, lora = drawn(form, lora)
    stored, native = lora.apart(seed), lora.grouped(seed)
    assert differences(twice(found, lora, stored), stored) == []
    assert differences(found.adapter(lora.config).from_hf(found.adapter(lora.config).to_hf(native)), native) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@given(lora=loras, seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_fused_parameters_come_back_to_the_byte(form: str, layout: str, lora: Lora, seed: int) -> None:
    found, lora = drawn(form, lora)
    stored, native = lora.fused(layout, seed), lora.grouped(seed)
    assert differences(twice(found, lora, stored, lora_layout=layout), stored) == []
    written = found.adapter(lora.config, lora_fused=True, lora_layout=layout).to_hf(native)
    assert differences(found.adapter(lora.config, lora_layout=layout).from_hf(written), native) == []


def twice(found: Map, lora: Lora, stored: State, **params: Any) -> State:
    """Read and written by one adapter, to which reading tells the variant."""
    adapter = found.adapter(lora.config, **params)
    return adapter.to_hf(adapter.from_hf(stored))  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("form", ["gated", "w"])
@pytest.mark.parametrize("place", [0, 1])
@given(lora=loras, seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_an_adapter_of_gate_or_up_alone_comes_back_to_the_byte(form: str, place: int, lora: Lora, seed: int) -> None:
    found, lora = drawn(form, lora)
    stored = without(lora.apart(seed), lora.projections[place])
    assert differences(twice(found, lora, stored), stored) == []


def test_an_adapter_of_down_projections_alone_comes_back() -> None:
    found, lora = FORMS["gated"]
    stored = without(without(lora.apart(), "gate_proj"), "up_proj")
    assert differences(twice(found, lora, stored), stored) == []


# --- what an adapter of one half means ---


def test_the_half_without_an_adapter_adds_nothing() -> None:
    found, lora = FORMS["gated"]
    stored = without(lora.apart(), "gate_proj")
    native = found.adapter(lora.config).from_hf(stored)
    assert set(native) == set(lora.grouped())
    path = "model.layers.1.mlp.experts"
    assert not native[f"{path}.lora_gate_and_up_B"][..., : lora.inner].view(torch.uint8).any()
    up = native[f"{path}.lora_gate_and_up_B"][2, :, lora.inner :].T.contiguous()
    assert differences({"B": up}, {"B": stored[f"{path}.2.up_proj.lora_B.weight"]}) == []


def test_a_trained_half_is_refused_until_both_are_asked_for() -> None:
    """Written as up alone, what the gate has learnt would be lost."""
    found, lora = FORMS["gated"]
    adapter = found.adapter(lora.config)
    native = adapter.from_hf(without(lora.apart(), "gate_proj"))
    name = "model.layers.0.mlp.experts.lora_gate_and_up_B"
    native[name][0, 0, 0] = 1
    with pytest.raises(ConversionError, match=f"{name}: the part that the other side lacks") as refused:
        adapter.to_hf(native)
    assert refused.value.code == "R601"
    whole = found.adapter(lora.config, lora_gate=True).to_hf(native)
    assert set(whole) == set(lora.apart())
    assert differences(found.adapter(lora.config).from_hf(whole), native) == []


def test_reading_a_checkpoint_without_adapters_decides_nothing() -> None:
    """Adapters that are trained after it are written in the usual form."""
    found, lora = FORMS["gated"]
    adapter = found.adapter(lora.config)
    assert adapter.from_hf({}) == {}
    assert set(adapter.to_hf(lora.grouped())) == set(lora.apart())


# --- what is refused ---


def test_copies_that_differ_are_refused_by_both_names() -> None:
    found, lora = FORMS["gated"]
    stored = lora.apart()
    gate, up = (f"model.layers.1.mlp.experts.2.{name}_proj.lora_A.weight" for name in ("gate", "up"))
    stored[up].view(torch.int16)[1, 3] ^= 1
    with pytest.raises(ConversionError, match=rf"{up} differs from {gate} at \[1, 3\]") as refused:
        found.adapter(lora.config).from_hf(stored)
    assert refused.value.code == "R602"


def test_copies_of_two_shapes_are_refused() -> None:
    found, lora = FORMS["gated"]
    stored = lora.apart()
    up = "model.layers.0.mlp.experts.0.up_proj.lora_A.weight"
    stored[up] = stored[up][:-1].clone()
    with pytest.raises(ConversionError, match=up) as refused:
        found.adapter(lora.config).from_hf(stored)
    assert refused.value.code == "R606"


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_is_missing_is_named(form: str) -> None:
    found, lora = FORMS[form]
    stored = lora.apart()
    name = f"{lora.stored.format(i=1)}.2.{lora.projections[2]}.lora_B.weight"
    del stored[name]
    with pytest.raises(ConversionError, match=f"1 of 3 tensors of a group are missing: {name}") as refused:
        found.adapter(lora.config).from_hf(stored)
    assert refused.value.code == "R605"


def test_both_forms_at_once_are_refused() -> None:
    found, lora = FORMS["gated"]
    with pytest.raises(ConversionError, match="no rule reads") as refused:
        found.adapter(lora.config).from_hf(lora.apart() | lora.fused(MODERN))
    assert refused.value.code == "R603"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(layout: str) -> None:
    found, lora = FORMS["gated"]
    other = LEGACY if layout == MODERN else MODERN
    with pytest.raises(ConversionError, match="lora_A.weight") as refused:
        found.adapter(lora.config, lora_layout=other).from_hf(lora.fused(layout))
    assert refused.value.code == "R606"


# --- in a whole map ---


@pytest.mark.parametrize("prefix", ["layers.{n}", "mtp.{k}"])
def test_deepseek_v4_has_adapters_beside_its_experts(prefix: str) -> None:
    config = tiny_config(num_nextn_predict_layers=2, compress_ratios=[0, 4, 128, 4, 0, 0])
    stored = checkpoint(config)
    sizes = {"experts": config["n_routed_experts"], "hidden": config["hidden_size"]}
    path = prefix.format(n="{i}", k="{i}") + ".ffn.experts"
    lora = replace(W_LORA, stored=path, inner=config["moe_intermediate_size"], layers=2, **sizes)
    both = stored | lora.apart()
    adapter = mapdsl.load("deepseek_v4").adapter(config)
    native = adapter.from_hf(both)
    plain = mapdsl.load("deepseek_v4").adapter(config).from_hf(stored)
    assert len(native) == len(plain) + 8
    assert differences({name: native[name] for name in plain}, plain) == []
    assert differences(adapter.to_hf(native, quantization=True), both) == []


def test_an_adapter_alone_is_a_partial_state() -> None:
    config = tiny_config()
    sizes = {"experts": config["n_routed_experts"], "hidden": config["hidden_size"]}
    lora = replace(W_LORA, stored="layers.{i}.ffn.experts", inner=config["moe_intermediate_size"], layers=4, **sizes)
    adapter = mapdsl.load("deepseek_v4").adapter(config)
    native = adapter.from_hf(lora.apart(), partial=True)
    assert len(native) == 16
    assert differences(adapter.to_hf(native, partial=True), lora.apart()) == []


def test_a_fragment_keeps_its_names_to_itself() -> None:
    """Its free axis `x` and its enumeration `j` are not the param and the index of the map that includes it."""
    more = "param x = of_another_kind\nindex j < 5\nother.{j} [x] <-> others [j x]"
    text = GATED.replace("index i < L", f"{more}\nindex i < L")
    found, lora = Map(Source("lora.map", text)), GATED_LORA
    adapter = found.adapter({**lora.config, "of_another_kind": 11})
    assert set(adapter.from_hf(lora.apart(), partial=True)) == set(lora.grouped())
