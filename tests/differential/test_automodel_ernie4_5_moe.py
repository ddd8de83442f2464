"""The compiled map of ERNIE 4.5 with experts and NeMo Automodel's own adapter: the same names, shapes and bytes.

Its head is its embedding. Automodel writes the head, which no release has, so that here a state is taken without it
where the two are held against each other. A difference is a test of its own, `test_deviation_...`, which runs both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.automodel import Case, Family, State, cases, shuffled
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

ERNIE = Family("ernie4_5", "Ernie4_5_MoeForCausalLM", "transformers:Ernie4_5_MoeConfig")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 3,
    "moe_layer_interval": 1,
    "vocab_size": 17,
    "pad_token_id": 0,
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 26,
    "moe_intermediate_size": 14,
    "moe_num_experts": 3,
    "moe_num_shared_experts": 1,
    "moe_k": 2,
    "tie_word_embeddings": True,
    "use_bias": False,
}
CASES = cases(
    "ernie4_5_moe",
    ERNIE,
    {
        "one of each": CONFIG,
        "experts everywhere": CONFIG | {"moe_layer_start_index": 0},
        "experts in the middle": CONFIG | {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
        "experts in every second layer": CONFIG | {"moe_layer_interval": 2},
        "two shared experts": CONFIG | {"moe_num_shared_experts": 2},
        "no shared expert": CONFIG | {"moe_num_shared_experts": 0},
        "one expert": CONFIG | {"moe_num_experts": 1, "moe_k": 1},
    },
)
CASE = Case("ernie4_5_moe", ERNIE, CONFIG)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROUTING = "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def native(case: Case) -> State:
    """A random state of the model, whose head is its embedding."""
    state = case.native()
    return {**state, HEAD: state[EMBEDDING]}


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != HEAD}


def stored(case: Case) -> State:
    """A random checkpoint as it is released."""
    return headless(case.stored())


@EVERY
def test_the_native_side_is_the_state_of_the_model(case: Case) -> None:
    assert case.model_differences() == [HEAD]  # which a state may have or not
    assert case.parsed_differences() == []


@EVERY
def test_weights_are_written_the_same(case: Case) -> None:
    assert differences(case.ours().to_hf(native(case)), headless(case.theirs().to_hf(native(case)))) == []


@EVERY
def test_weights_are_read_the_same(case: Case) -> None:
    found = headless(case.ours().from_hf(shuffled(stored(case))))
    assert differences(found, case.theirs().from_hf(stored(case))) == []


@EVERY
def test_one_tensor_at_a_time_gives_the_same(case: Case) -> None:
    ours, theirs = case.ours(), case.theirs()
    for name, tensor in headless(native(case)).items():
        found = dict(ours.convert_single_tensor_to_hf(name, tensor))
        assert differences(found, dict(theirs.convert_single_tensor_to_hf(name, tensor))) == []


@EVERY
def test_what_is_written_comes_back(case: Case) -> None:
    assert differences(case.ours().to_hf(case.ours().from_hf(stored(case))), stored(case)) == []
    assert differences(case.ours().from_hf(case.ours().to_hf(native(case))), native(case)) == []


@pytest.mark.parametrize("part", ["block.0.mlp.up_proj", "emb_norm.0", "hidden_norm.0", "linear_proj.0"])
def test_multi_token_prediction_is_dropped_the_same(part: str) -> None:
    checkpoint = stored(CASE) | {f"model.mtp_{part}.weight": torch.ones(3)}
    assert differences(headless(CASE.ours().from_hf(checkpoint)), CASE.theirs().from_hf(dict(checkpoint))) == []


def test_deviation_the_head_is_made_when_read_and_not_written() -> None:
    """The state of the model has it, the release does not; Automodel does the opposite of both."""
    made = CASE.ours().from_hf(stored(CASE))
    assert same_bytes(made[HEAD], made[EMBEDDING])
    assert HEAD not in CASE.theirs().from_hf(stored(CASE))
    assert HEAD in CASE.theirs().to_hf(native(CASE))
    assert HEAD not in CASE.ours().to_hf(native(CASE))


def test_deviation_a_head_that_is_not_the_embedding_is_an_error() -> None:
    """To write it would lose one of the two."""
    state = native(CASE) | {HEAD: torch.ones(17, 60, dtype=torch.bfloat16)}
    assert same_bytes(CASE.theirs().to_hf(dict(state))[HEAD], state[HEAD])
    with pytest.raises(mapdsl.ConversionError, match=r"lm_head\.weight"):
        CASE.ours().to_hf(state)


def test_deviation_written_experts_keep_the_prefix_whichever_name_comes_last() -> None:
    """Automodel takes the prefix from the last name that it reads: a head at the end takes it from all experts."""
    theirs, ours = CASE.theirs(), CASE.ours()
    last = {**stored(CASE), HEAD: stored(CASE)[EMBEDDING]}
    state = theirs.from_hf(dict(last))
    assert "layers.1.mlp.experts.0.down_proj.weight" in theirs.to_hf(dict(state))
    assert differences(ours.to_hf(ours.from_hf(last)), stored(CASE)) == []


def test_deviation_a_bias_of_routing_of_one_dimension_is_an_error() -> None:
    """No release has it; Automodel reads it, and writes two dimensions."""
    checkpoint = stored(CASE)
    checkpoint[ROUTING] = checkpoint[ROUTING][0]
    theirs = CASE.theirs()
    state = theirs.from_hf(dict(checkpoint))
    assert theirs.to_hf(dict(state))[ROUTING].shape == (1, 3)
    with pytest.raises(mapdsl.ConversionError, match=rf"R606.*{ROUTING}"):
        CASE.ours().from_hf(checkpoint)


def test_deviation_an_unknown_tensor_is_an_error_not_handed_on() -> None:
    """No model has such a parameter."""
    checkpoint = stored(CASE) | {"model.layers.0.extra": torch.zeros(2)}
    assert "model.layers.0.extra" in CASE.theirs().from_hf(dict(checkpoint))
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*model\.layers\.0\.extra"):
        CASE.ours().from_hf(checkpoint)
