"""The compiled map of Hy3 and NeMo Automodel's own adapter: the same names, shapes and bytes.

A difference is a test of its own, `test_deviation_...`, which runs both: one that Automodel mends shows up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.automodel import SIZES, Case, Family, cases
from tests.helpers.deepseek_v4 import differences

pytestmark = pytest.mark.heavy

HY = Family("hy_v3", "HYV3ForCausalLM", "nemo_automodel.components.models.hy_v3.config:HYV3Config")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    **SIZES,
    "moe_intermediate_size": 14,
    "num_experts": 3,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
CASES = cases(
    "hy_v3",
    HY,
    {
        "one of each": CONFIG,
        "no layer without experts": CONFIG | {"first_k_dense_replace": 0},
        "no layer with experts": CONFIG | {"first_k_dense_replace": 3},
        "no shared expert": CONFIG | {"num_shared_experts": 0},
        "two shared experts": CONFIG | {"num_shared_experts": 2},
        "no bias of routing": CONFIG | {"moe_router_enable_expert_bias": False},
        "biases of attention": CONFIG | {"attention_bias": True},
        "one expert": CONFIG | {"num_experts": 1, "num_experts_per_tok": 1},
    },
    (torch.bfloat16,),  # the experts of a model in f32 are in bf16 in Automodel, and its adapter makes them f32
)
CASE = Case("hy_v3", HY, CONFIG)


@pytest.mark.parametrize("number", [3, 4])
def test_layers_that_predict_more_tokens_are_dropped_the_same(number: int) -> None:
    plain = CASE.stored()
    layer = {n.replace("layers.1", f"layers.{number}"): t for n, t in plain.items() if "layers.1." in n}
    native = CASE.ours().from_hf(plain | layer)
    assert differences(native, CASE.theirs().from_hf(plain | layer)) == []
    assert differences(native, CASE.ours().from_hf(plain)) == []


def test_deviation_kinds_of_layers_are_also_those_that_transformers_lists() -> None:
    """Its config has a list; Automodel's model takes the first layer alone to be without experts."""
    kinds = ["dense", "dense", "sparse"]
    config = {name: value for name, value in CONFIG.items() if name != "first_k_dense_replace"}
    case = Case("hy_v3", HY, config | {"mlp_layer_types": kinds})
    name = "model.layers.1.mlp.gate_proj.weight"
    assert name not in case.model.state_dict()
    assert case.ours().native_keys()[name][0] == (26, 66)


def test_deviation_a_layer_without_any_expert_is_an_error() -> None:
    """Automodel looks only at the layers that it finds experts of."""
    experts = "model.layers.1.mlp.experts."
    stored = {name: tensor for name, tensor in CASE.stored().items() if not name.startswith(experts)}
    assert f"{experts}down_projs" not in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=rf"R605.*{experts}0\.gate_proj"):
        CASE.ours().from_hf(stored)


def test_deviation_an_unknown_tensor_is_an_error_not_handed_on() -> None:
    """No model has such a parameter."""
    stored = CASE.stored() | {"model.layers.0.extra": torch.zeros(2)}
    assert "model.layers.0.extra" in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*model\.layers\.0\.extra"):
        CASE.ours().from_hf(stored)


def test_deviation_plain_experts_keep_their_dtype() -> None:
    """Automodel makes experts what its model is, and nothing else."""
    stored, name = {k: tensor.float() for k, tensor in CASE.stored().items()}, "model.layers.1.mlp.experts.down_projs"
    made = CASE.theirs().from_hf(dict(stored))
    assert (made[name].dtype, made["lm_head.weight"].dtype) == (torch.bfloat16, torch.float32)
    assert CASE.ours().from_hf(stored)[name].dtype == torch.float32
