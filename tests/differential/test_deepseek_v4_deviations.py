"""Where NeMo Automodel's adapter of DeepSeek-V4 and the compiled one differ: a test a case, with who is right and why.

Each test runs both, so that a case that NeMo mends shows up here. `docs/comparison.md` lists them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mapdsl
from mapdsl.runtime.adapter import Adapter
from tests.differential.nemo import nemo_adapter
from tests.helpers.deepseek_v4 import Storage, checkpoint, differences, same_bytes, tiny_config

pytestmark = pytest.mark.heavy

CONFIG = tiny_config()
EXPERTS = "layers.1.ffn.experts."
GATE_UP = "model.layers.1.mlp.experts.gate_and_up_projs"


@pytest.fixture(scope="module")
def deepseek() -> mapdsl.Map:
    return mapdsl.load("deepseek_v4")


@pytest.fixture
def ours(deepseek: mapdsl.Map) -> Adapter:
    return deepseek.adapter(CONFIG)


def refused(convert: Any, *words: str) -> None:
    """The conversion ends in an error that says these words."""
    with pytest.raises(mapdsl.ConversionError) as caught:
        convert()
    assert [word for word in words if word not in str(caught.value)] == []


def with_codes(code: int, scale: int) -> dict[str, Tensor]:
    """A checkpoint with expert 0's `w1` full of one FP4 code under one e8m0 byte."""
    stored = checkpoint(CONFIG)
    stored[f"{EXPERTS}0.w1.weight"].view(torch.uint8).fill_(code | code << 4)
    stored[f"{EXPERTS}0.w1.scale"].view(torch.uint8).fill_(scale)
    return stored


def first_gate(state: dict[str, Tensor]) -> Tensor:
    """The decoded `w1` of expert 0."""
    return state[GATE_UP][0, :, : CONFIG["moe_intermediate_size"]]


def thousands(deepseek: mapdsl.Map, config: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a model that was never quantised, values around a thousand."""
    native = deepseek.adapter(config).from_hf(checkpoint(config, Storage("raw", "raw")))
    random = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(t.shape, generator=random).mul(1000).to(t.dtype) for name, t in native.items()}
    return {name: drawn[name] if t.is_floating_point() else t for name, t in native.items()}


# --- what is not there ---------------------------------------------------------------------------------------------


def test_a_missing_expert_is_an_error_not_a_missing_layer(ours: Adapter) -> None:
    """A training run would go on with experts of random weights: the group has to be whole."""
    stored = checkpoint(CONFIG, Storage("raw"))
    del stored[f"{EXPERTS}2.w1.weight"]
    made = nemo_adapter(CONFIG).from_hf(dict(stored))
    assert GATE_UP not in made
    assert GATE_UP.replace("gate_and_up", "down") in made
    refused(lambda: ours.from_hf(stored), "R605", f"{EXPERTS}2.w1.weight")


def test_more_experts_than_the_config_has_are_an_error_not_left_out(ours: Adapter) -> None:
    """A wrong config would make a model of the first three experts of five; NeMo says nothing."""
    stored = checkpoint(tiny_config(n_routed_experts=5), Storage("raw"))
    gates = {name: tensor for name, tensor in stored.items() if ".gate." in name}
    stored |= {name: tensor[:3].clone() for name, tensor in gates.items() if "tid2eid" not in name}
    assert nemo_adapter(CONFIG).from_hf(dict(stored))[GATE_UP].shape[0] == 3
    refused(lambda: ours.from_hf(stored), "R603", "layers.0.ffn.experts.3.w1.weight")


def test_a_missing_tensor_is_an_error_not_left_to_the_loader(ours: Adapter) -> None:
    """NeMo's loader is not strict wherever an adapter exists, so nobody would tell."""
    stored = checkpoint(CONFIG)
    del stored["head.weight"]
    assert "lm_head.weight" not in nemo_adapter(CONFIG).from_hf(dict(stored))
    refused(lambda: ours.from_hf(stored), "R605", "head.weight")


def test_fp8_without_its_scale_is_an_error_not_a_weight(ours: Adapter) -> None:
    """The stored codes mean nothing without their scales; NeMo hands them on as the weight."""
    stored = checkpoint(CONFIG)
    del stored["layers.0.attn.wkv.scale"]
    made = nemo_adapter(CONFIG).from_hf(dict(stored))
    assert made["model.layers.0.self_attn.wkv.weight"].dtype == torch.float8_e4m3fn
    refused(lambda: ours.from_hf(stored), "layers.0.attn.wkv.scale")


def test_a_scale_without_its_weight_is_an_error_not_a_parameter(ours: Adapter) -> None:
    """Nothing reads such a tensor, so the checkpoint is not what it is taken for."""
    stored = checkpoint(CONFIG)
    stored["layers.0.attn.attn_sink.scale"] = stored["layers.0.attn.wkv.scale"]
    assert "model.layers.0.self_attn.attn_sink.scale" in nemo_adapter(CONFIG).from_hf(dict(stored))
    refused(lambda: ours.from_hf(stored), "R603", "layers.0.attn.attn_sink.scale")


def test_an_unknown_tensor_is_an_error_not_carried_along(ours: Adapter) -> None:
    """No model has such a parameter: NeMo hands the name on, and the loader drops it."""
    stored = checkpoint(CONFIG) | {"layers.0.attn.wkv.bias": torch.zeros(2), "extra": torch.zeros(2)}
    made = nemo_adapter(CONFIG).from_hf(dict(stored))
    assert {"model.layers.0.self_attn.wkv.bias", "extra"} <= set(made)
    refused(lambda: ours.from_hf(stored), "R603", "layers.0.attn.wkv.bias", "extra")


# --- multi-token-prediction layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["layers.{n}", "model.layers.{n}"])
def test_legacy_mtp_layers_do_not_leak_into_a_backbone_without_mtp(deepseek: mapdsl.Map, spelling: str) -> None:
    """A model without MTP layers drops `mtp.0`; the same layer in a legacy spelling is no fifth backbone layer."""
    stored = checkpoint(CONFIG, mtp=spelling)
    model = tiny_config(num_nextn_predict_layers=0)
    backbone = checkpoint(model)
    assert len(nemo_adapter(model).from_hf(dict(stored))) > len(nemo_adapter(model).from_hf(dict(backbone)))
    assert sorted(deepseek.adapter(model).from_hf(stored)) == sorted(deepseek.adapter(model).from_hf(backbone))


def test_an_mtp_layer_that_comes_in_two_spellings_is_an_error(ours: Adapter) -> None:
    """NeMo takes whichever comes last."""
    stored = checkpoint(CONFIG)
    stored["layers.4.enorm.weight"] = stored["mtp.0.enorm.weight"] + 1
    made = nemo_adapter(CONFIG).from_hf(dict(stored))["mtp.layers.0.enorm.weight"]
    assert same_bytes(made, stored["layers.4.enorm.weight"])
    refused(lambda: ours.from_hf(stored), "C506", "layers.4.enorm.weight")


# --- values --------------------------------------------------------------------------------------------------------


def test_fp4_code_8_is_minus_zero(ours: Adapter) -> None:
    """Sign 1, exponent 0, mantissa 0 (OCP Microscaling Formats 1.0, E2M1); with +0.0 the bytes cannot come back."""
    stored = with_codes(8, 127)
    assert not torch.signbit(first_gate(nemo_adapter(CONFIG).from_hf(dict(stored)))).any()
    gate = first_gate(ours.from_hf(stored))
    assert (gate == 0).all()
    assert torch.signbit(gate).all()


def test_e8m0_byte_0_is_two_to_the_minus_127(ours: Adapter) -> None:
    """OCP Microscaling Formats 1.0: E8M0 has no zero. Six times that is a denormal bf16, and not nothing."""
    stored = with_codes(7, 0)
    assert (first_gate(nemo_adapter(CONFIG).from_hf(dict(stored))) == 0).all()
    assert (first_gate(ours.from_hf(stored)) == 6 * 2.0**-127).all()


def test_e8m0_byte_255_is_nan(ours: Adapter) -> None:
    """OCP Microscaling Formats 1.0: E8M0 has no infinity either."""
    stored = with_codes(7, 255)
    assert first_gate(nemo_adapter(CONFIG).from_hf(dict(stored))).isinf().all()
    assert first_gate(ours.from_hf(stored)).isnan().all()


def test_a_scale_of_the_wrong_shape_is_an_error(ours: Adapter) -> None:
    """NeMo takes the corner of it that fits."""
    stored = checkpoint(CONFIG)
    stored["layers.0.attn.wkv.scale"] = torch.ones(5, 7)
    nemo_adapter(CONFIG).from_hf(dict(stored))
    refused(lambda: ours.from_hf(stored), "R606", "layers.0.attn.wkv.scale", "[5, 7]", "[1, 2]")


def test_the_dtype_asked_for_is_that_of_decoded_tensors_only(ours: Adapter) -> None:
    """NeMo turns plain bf16 experts, and nothing else that is plain, into the dtype that it decodes to."""
    stored = checkpoint(CONFIG, Storage("raw", "raw"))
    theirs = nemo_adapter(CONFIG, dtype=torch.float32).from_hf(dict(stored))
    assert {theirs[GATE_UP].dtype, theirs["lm_head.weight"].dtype} == {torch.float32, torch.bfloat16}
    assert ours.from_hf(stored, dtype=torch.float32)[GATE_UP].dtype == torch.bfloat16
    decoded = ours.from_hf(checkpoint(CONFIG), dtype=torch.float32)
    assert {decoded[GATE_UP].dtype, decoded["lm_head.weight"].dtype} == {torch.float32, torch.bfloat16}


def test_fp4_with_scales_in_the_v3_spelling_is_refused(ours: Adapter) -> None:
    """No release stores it and the map does not list it; NeMo reads it, for it looks at the two apart."""
    stored = {n.replace(".w1.scale", ".w1.weight_scale_inv"): t for n, t in checkpoint(CONFIG).items()}
    stored |= {n: t for n, t in checkpoint(CONFIG).items() if "shared_experts" in n}
    stored = {n: t for n, t in stored.items() if "shared_experts.w1.weight_scale_inv" not in n}
    assert nemo_adapter(CONFIG).from_hf(dict(stored))[GATE_UP].dtype == torch.bfloat16
    refused(lambda: ours.from_hf(stored), f"{'layers.0.ffn.experts.'}0.w1", "fp4")


# --- quantised writing ---------------------------------------------------------------------------------------------


def test_quantised_writing_gives_the_stored_bytes_back(ours: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo writes placeholders for a loader to fill: FP8 weights without their scales, FP4 of whatever memory held."""
    monkeypatch.setenv("NEMO_AUTOMODEL_DSV4_EXPERT_LAYOUT", "fp8")
    stored = checkpoint(CONFIG, Storage("fp8", scales=torch.float32, wild=True))
    native = ours.from_hf(stored)
    theirs = nemo_adapter(CONFIG).to_hf(dict(native), quantization=True)
    assert all((tensor == 1).all() for name, tensor in theirs.items() if name.endswith(".scale"))
    assert differences(ours.to_hf(native, quantization=True), stored) == []


def test_quantised_writing_without_a_checkpoint_encodes(deepseek: mapdsl.Map, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo's scales are ones whatever the values: those beyond 448, the largest of e4m3, are lost."""
    config = tiny_config(hidden_size=160, moe_intermediate_size=192)
    monkeypatch.setenv("NEMO_AUTOMODEL_DSV4_EXPERT_LAYOUT", "fp4")
    weight = "model.layers.0.self_attn.wkv.weight"
    native = thousands(deepseek, config)
    found = deepseek.adapter(config).to_hf(native, quantization=True)
    theirs = nemo_adapter(config).to_hf(dict(native), quantization=True)
    largest = native[weight].float().abs().max()
    assert largest > 2000
    assert (theirs["layers.0.attn.wkv.scale"] == 1).all()
    # Half a step of a block whose scale is a power of two: 1/16 of a value, and 2**-10 of the largest.
    error = (deepseek.adapter(config).from_hf(found)[weight].float() - native[weight].float()).abs()
    assert (error <= native[weight].float().abs() / 16 + largest * 2**-10).all()


def test_written_fp8_scales_are_e8m0_as_released(deepseek: mapdsl.Map, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released DeepSeek-V4-Flash has no scale in f32, so NeMo's destinations do not fit its files."""
    config = tiny_config(hidden_size=160, moe_intermediate_size=192)
    monkeypatch.setenv("NEMO_AUTOMODEL_DSV4_EXPERT_LAYOUT", "fp4")
    native, name = thousands(deepseek, config), "layers.0.attn.wkv.scale"
    assert nemo_adapter(config).to_hf(dict(native), quantization=True)[name].dtype == torch.float32
    assert deepseek.adapter(config).to_hf(native, quantization=True)[name].dtype == torch.float8_e8m0fnu


def test_quantised_writing_keeps_what_the_checkpoint_did_not_quantise(
    deepseek: mapdsl.Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo quantises by a list of names, with one layout for all experts and V4's spelling for all scales."""
    config = tiny_config(hidden_size=160, moe_intermediate_size=192)
    monkeypatch.setenv("NEMO_AUTOMODEL_DSV4_EXPERT_LAYOUT", "fp8")
    for storage in (Storage("raw", "fp8"), Storage("fp8", "raw"), Storage("fp8", v3=True, scales=torch.float32)):
        adapter, stored = deepseek.adapter(config), checkpoint(config, storage)
        native = adapter.from_hf(stored)
        assert set(nemo_adapter(config).to_hf(dict(native), quantization=True)) != set(stored)
        assert differences(adapter.to_hf(native, quantization=True), stored) == []


def test_fp4_with_a_last_block_in_part_can_be_written(ours: Adapter) -> None:
    """NeMo reads such a tensor and asserts that it cannot write it; 134 columns are four blocks and a part."""
    stored = checkpoint(CONFIG)
    native = ours.from_hf(stored)
    with pytest.raises(AssertionError, match="divisible by 32"):
        nemo_adapter(CONFIG).to_hf(dict(native), quantization=True)
    assert differences(ours.to_hf(native, quantization=True), stored) == []


def test_written_experts_own_their_memory(ours: Adapter) -> None:
    """NeMo writes transposed views: safetensors refuses them, and pickling one keeps the whole stack."""
    native = ours.from_hf(checkpoint(CONFIG, Storage("raw", "raw")))
    name = f"{EXPERTS}0.w1.weight"
    for state, whole in ((nemo_adapter(CONFIG).to_hf(dict(native)), False), (ours.to_hf(native), True)):
        assert state[name].is_contiguous() is whole
        assert (state[name].untyped_storage().nbytes() == state[name].nbytes) is whole


# --- hash layers ---------------------------------------------------------------------------------------------------


def test_the_hash_layers_are_those_of_the_checkpoint_though_it_has_none(tmp_path: Path, deepseek: mapdsl.Map) -> None:
    """NeMo takes a 0 in the checkpoint's config for no answer, asks the model's, and drops a bias that is on disk."""
    mine = tiny_config(num_hash_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(mine))
    adapter = deepseek.adapter(tmp_path)
    stored = checkpoint(mine, Storage("raw", "raw"))
    native = adapter.from_hf(stored)
    theirs = nemo_adapter(tiny_config(num_hash_layers=2), path=str(tmp_path)).to_hf(dict(native))
    assert set(stored) - set(theirs) == {"layers.0.ffn.gate.bias", "layers.1.ffn.gate.bias"}
    assert set(adapter.to_hf(native)) == set(stored)


def test_one_tensor_at_a_time_drops_the_bias_of_hash_layers_too(ours: Adapter) -> None:
    """A checkpoint has no such tensor, whichever way it is written."""
    name, bias = "model.layers.0.mlp.gate.e_score_correction_bias", torch.zeros(3)
    theirs = nemo_adapter(CONFIG)
    assert theirs.convert_single_tensor_to_hf(name, bias) != []
    assert ours.convert_single_tensor_to_hf(name, bias) == []
    native = ours.from_hf(checkpoint(CONFIG)) | {name: bias}
    assert differences(ours.to_hf(native), theirs.to_hf(dict(native))) == []
