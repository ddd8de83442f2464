"""The compiled map of Nemotron 3 and NeMo Automodel's own adapter: the same names, shapes and bytes.

A difference is a test of its own, `test_deviation_...`, which runs both: one that Automodel mends shows up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.automodel import Case, Family, State, cases, shuffled
from tests.helpers.deepseek_v4 import differences

pytestmark = pytest.mark.heavy

NEMOTRON = Family("nemotron_v3", "NemotronHForCausalLM", "transformers:NemotronHConfig")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hybrid_override_pattern": "ME*-M",
    "vocab_size": 17,
    "hidden_size": 66,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "mamba_num_heads": 4,
    "mamba_head_dim": 14,
    "ssm_state_size": 5,
    "n_groups": 2,
    "conv_kernel": 3,
    "intermediate_size": 26,
    "n_routed_experts": 3,
    "moe_intermediate_size": 22,
    "moe_shared_expert_intermediate_size": 34,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}
WITHOUT_MTP = CONFIG | {"num_nextn_predict_layers": 0}
WORDS = ["mamba", "moe", "attention", "mlp", "mamba"]
NEW_WORDS = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]
CASES = cases(
    "nemotron_v3",
    NEMOTRON,
    {
        "one of each": CONFIG,
        "no multi-token prediction": WITHOUT_MTP,
        "two depths of multi-token prediction": CONFIG | {"num_nextn_predict_layers": 2},
        "all kinds of layers in each of two depths": CONFIG
        | {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "M*-E"},
        "experts in a latent space": CONFIG | {"moe_latent_size": 38},
        "kinds of layers in words": CONFIG | {"hybrid_override_pattern": None, "layers_block_type": WORDS},
        "kinds of layers in newer words": CONFIG
        | {
            "hybrid_override_pattern": None,
            "layers_block_type": NEW_WORDS,
            "mtp_hybrid_override_pattern": None,
            "mtp_layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
        },
        "no bias of the convolution": CONFIG | {"use_conv_bias": False},
        "Mamba alone": WITHOUT_MTP | {"hybrid_override_pattern": "M", "num_hidden_layers": 1},
        "one expert": CONFIG | {"n_routed_experts": 1, "num_experts_per_tok": 1},
    },
)
CASE = Case("nemotron_v3", NEMOTRON, CONFIG)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DECAY = "layers.0.mixer.A_log"


def as_transformers_writes(stored: State) -> State:
    """The names from version 5 on."""
    return {name.replace("backbone.", "model."): tensor for name, tensor in stored.items()}


@EVERY
def test_names_as_transformers_writes_them_are_read_and_written_the_same(case: Case) -> None:
    ours, theirs, stored = case.ours(), case.theirs(), as_transformers_writes(case.stored())
    native = ours.from_hf(shuffled(stored))
    assert differences(native, theirs.from_hf(dict(stored))) == []
    assert differences(native, case.ours().from_hf(case.stored())) == []
    written = ours.to_hf(native)
    assert differences(written, stored) == []
    assert differences(written, theirs.to_hf(dict(native))) == []


@pytest.mark.parametrize("root", ["backbone", "model"])
def test_the_singular_name_of_the_embedding_is_read_the_same(root: str) -> None:
    stored = CASE.stored() if root == "backbone" else as_transformers_writes(CASE.stored())
    old = {name.replace("embeddings", "embedding"): tensor for name, tensor in stored.items()}
    ours, theirs = CASE.ours(), CASE.theirs()
    native = ours.from_hf(old)
    assert differences(native, theirs.from_hf(dict(old))) == []
    assert differences(ours.to_hf(native), stored) == []
    assert differences(ours.to_hf(native), theirs.to_hf(dict(native))) == []


@pytest.mark.parametrize("root", ["backbone", "model"])
def test_layers_of_a_larger_checkpoint_are_dropped_the_same(root: str) -> None:
    stored = CASE.stored() if root == "backbone" else as_transformers_writes(CASE.stored())
    smaller = Case("nemotron_v3", NEMOTRON, CONFIG | {"num_hidden_layers": 2, "hybrid_override_pattern": "ME"})
    native = smaller.ours().from_hf(stored)
    assert differences(native, smaller.theirs().from_hf(dict(stored))) == []
    assert not any("layers.2." in name for name in native if not name.startswith("mtp."))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_decay_is_read_as_f32_the_same(dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) if "A_log" in name else tensor for name, tensor in CASE.stored().items()}
    native = CASE.ours().from_hf(stored)
    assert native["model.layers.0.mixer._fp32_params.A_log"].dtype == torch.float32
    assert differences(native, CASE.theirs().from_hf(dict(stored))) == []


def test_deviation_the_decay_is_written_as_it_was_stored() -> None:
    """A checkpoint that stores it in bf16 gets its bytes back; Automodel writes f32 always."""
    name = f"backbone.{DECAY}"
    stored = {key: tensor.bfloat16() if key == name else tensor for key, tensor in CASE.stored().items()}
    ours = CASE.ours()
    native = ours.from_hf(stored)
    assert CASE.theirs().to_hf(dict(native))[name].dtype == torch.float32
    assert differences(ours.to_hf(native), stored) == []
    assert CASE.ours().to_hf(native)[name].dtype == torch.float32


def test_deviation_a_gate_that_the_experts_do_not_have_is_an_error() -> None:
    """The checkpoint is then of another architecture; Automodel reads past it."""
    name = "backbone.layers.1.mixer.experts.0.gate_proj.weight"
    stored = CASE.stored()
    assert differences(CASE.theirs().from_hf(stored | {name: torch.zeros(22, 66)}), CASE.ours().from_hf(stored)) == []
    with pytest.raises(mapdsl.ConversionError, match=rf"R603.*{name}"):
        CASE.ours().from_hf(stored | {name: torch.zeros(22, 66)})


def test_deviation_multi_token_prediction_that_the_model_does_not_have_is_dropped_not_handed_on() -> None:
    """Automodel's loader drops it."""
    case, stored = Case("nemotron_v3", NEMOTRON, WITHOUT_MTP), CASE.stored()
    assert any(name.startswith("mtp.") for name in case.theirs().from_hf(dict(stored)))
    backbone = {name: tensor for name, tensor in stored.items() if not name.startswith("mtp.")}
    assert differences(case.ours().from_hf(stored), case.theirs().from_hf(backbone)) == []


def test_deviation_a_layer_without_any_expert_is_an_error() -> None:
    """Automodel looks only at the layers that it finds experts of, and the backbone's and the others apart."""
    stored = {name: tensor for name, tensor in CASE.stored().items() if not name.startswith("mtp.layers.1.mixer.exp")}
    assert "mtp.layers.1.mixer.experts.down_projs" not in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=r"R605.*mtp\.layers\.1\.mixer\.experts\.0"):
        CASE.ours().from_hf(stored)


def test_deviation_an_unknown_tensor_is_an_error_not_handed_on() -> None:
    """No model has such a parameter."""
    stored = CASE.stored() | {"backbone.layers.0.extra": torch.zeros(2)}
    assert "model.layers.0.extra" in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*backbone\.layers\.0\.extra"):
        CASE.ours().from_hf(stored)


def test_deviation_the_states_that_are_read_and_written_are_left_as_they_were() -> None:
    """Automodel empties both, so that whoever saves a model twice saves nothing the second time."""
    found = []
    for adapter in (CASE.theirs(), CASE.ours()):
        stored, native = CASE.stored(), CASE.native()
        adapter.from_hf(stored)
        adapter.to_hf(native)
        found.append((bool(stored), bool(native)))
    assert found == [(False, False), (True, True)]
