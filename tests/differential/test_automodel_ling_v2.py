"""The compiled map of Ling 2.0 and NeMo Automodel's own adapter: the same names, shapes and bytes.

A difference is a test of its own, `test_deviation_...`, which runs both: one that Automodel mends shows up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.automodel import Case, Family, cases
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

LING = Family(
    "ling_v2", "BailingMoeV2ForCausalLM", "nemo_automodel.components.models.ling_v2.config:BailingMoeV2Config"
)
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "vocab_size": 17,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "hidden_size": 66,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "use_qk_norm": True,
    "intermediate_size": 26,
    "moe_intermediate_size": 14,
    "num_experts": 3,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_router_enable_expert_bias": True,
    "max_position_embeddings": 64,
}
BIASED = CONFIG | {"use_qkv_bias": True, "use_bias": True}
CASES = cases(
    "ling_v2",
    LING,
    {
        "one of each": CONFIG,
        "no layer without experts": CONFIG | {"first_k_dense_replace": 0},
        "no layer with experts": CONFIG | {"first_k_dense_replace": 3},
        "one layer": CONFIG | {"num_hidden_layers": 1, "first_k_dense_replace": 0},
        "no shared expert": CONFIG | {"num_shared_experts": 0},
        "two shared experts": CONFIG | {"num_shared_experts": 2},
        "no bias of routing": CONFIG | {"moe_router_enable_expert_bias": False},
        "no norms of queries and keys": CONFIG | {"use_qk_norm": False},
        "a bias of what attention gives": CONFIG | {"use_bias": True},
        "as many key heads as query heads": CONFIG | {"num_key_value_heads": 6},
    },
)
CASE = Case("ling_v2", LING, CONFIG)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
JOINED = "model.layers.0.attention.query_key_value"


@EVERY
def test_the_native_side_is_the_state_of_the_model(case: Case) -> None:
    assert case.model_differences() == []
    assert case.parsed_differences() == []


@EVERY
def test_weights_are_read_and_written_the_same(case: Case) -> None:
    assert case.writing_differences() == []
    assert case.reading_differences() == []
    assert case.returning_differences() == []


@EVERY
def test_one_tensor_at_a_time_gives_the_same_but_for_joined_projections(case: Case) -> None:
    ours, theirs = case.ours(), case.theirs()
    for name, tensor in case.native().items():
        if ".self_attn." not in name or "_norm" in name or "o_proj" in name:
            found = dict(ours.convert_single_tensor_to_hf(name, tensor))
            assert differences(found, dict(theirs.convert_single_tensor_to_hf(name, tensor))) == []


def test_deviation_biases_of_queries_keys_and_values_are_split() -> None:
    """Automodel hands the joined bias on, and leaves the three of its model as they were made."""
    case = Case("ling_v2", LING, BIASED)
    assert case.model_differences() == []
    native = case.native()
    stored = case.ours().to_hf(native)
    made = case.theirs().from_hf(dict(stored))
    assert f"{JOINED}.bias" in made
    assert "model.layers.0.self_attn.q_proj.bias" not in made
    assert {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"} <= set(case.theirs().to_hf(dict(native)))
    parts = [native[f"model.layers.0.self_attn.{p}_proj.bias"] for p in "qkv"]
    assert same_bytes(stored[f"{JOINED}.bias"], torch.cat(parts))
    assert differences(case.ours().from_hf(stored), native) == []


def test_deviation_a_part_of_a_joined_projection_is_an_error() -> None:
    """Automodel writes it in a name that no checkpoint has."""
    native = CASE.native()
    del native["model.layers.0.self_attn.k_proj.weight"]
    assert "model.layers.0.attention.q_proj.weight" in CASE.theirs().to_hf(dict(native))
    with pytest.raises(mapdsl.ConversionError, match=r"R605.*k_proj\.weight"):
        CASE.ours().to_hf(native)


def test_deviation_one_projection_alone_is_not_written() -> None:
    """It is a third of a tensor; Automodel writes it in a name that no checkpoint has."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = CASE.native()[name]
    assert CASE.theirs().convert_single_tensor_to_hf(name, tensor)[0][0] == "model.layers.0.attention.q_proj.weight"
    with pytest.raises(mapdsl.ConversionError, match=r"R605.*k_proj\.weight"):
        CASE.ours().convert_single_tensor_to_hf(name, tensor)


def test_deviation_layers_that_predict_more_tokens_are_dropped_not_handed_on() -> None:
    """The model has none, so that Automodel's loader drops what the adapter made of them."""
    plain = CASE.stored()
    layer = {name.replace("layers.1", "layers.3"): tensor for name, tensor in plain.items() if "layers.1." in name}
    assert "model.layers.3.mlp.experts.down_projs" in CASE.theirs().from_hf(plain | layer)
    assert differences(CASE.ours().from_hf(plain | layer), CASE.theirs().from_hf(dict(plain))) == []


def test_deviation_a_joined_projection_of_another_size_is_named_with_its_shape() -> None:
    """Both refuse it; Automodel checks the rows alone."""
    wrong = CASE.stored() | {f"{JOINED}.weight": torch.zeros(100, 67)}
    assert CASE.theirs().from_hf(dict(wrong))["model.layers.0.self_attn.q_proj.weight"].shape == (60, 67)
    with pytest.raises(mapdsl.ConversionError, match=rf"R606.*{JOINED}\.weight"):
        CASE.ours().from_hf(wrong)


def test_deviation_an_unknown_tensor_is_an_error_not_handed_on() -> None:
    """No model has such a parameter."""
    stored = CASE.stored() | {"model.layers.0.extra": torch.zeros(2)}
    assert "model.layers.0.extra" in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*model\.layers\.0\.extra"):
        CASE.ours().from_hf(stored)


def test_deviation_plain_experts_keep_their_dtype() -> None:
    """Automodel makes experts what its model is, and nothing else."""
    stored, name = (
        {key: tensor.float() for key, tensor in CASE.stored().items()},
        "model.layers.1.mlp.experts.down_projs",
    )
    made = CASE.theirs().from_hf(dict(stored))
    assert (made[name].dtype, made["lm_head.weight"].dtype) == (torch.bfloat16, torch.float32)
    ours = CASE.ours().from_hf(stored)
    assert ours[name].dtype == torch.float32
    assert same_bytes(ours["lm_head.weight"], stored["lm_head.weight"])
