"""The compiled map of GLM-4.5 and NeMo Automodel's own adapter: the same names, shapes and bytes.

Where they differ is in `test_automodel_experts_deviations.py`, each case with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.differential.automodel import Case, Family, cases

pytestmark = pytest.mark.heavy

GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", "transformers:Glm4MoeConfig")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "vocab_size": 17,
    "hidden_size": 66,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 26,
    "moe_intermediate_size": 14,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
CASES = cases(
    "glm4_moe",
    GLM4_MOE,
    {
        "one of each": CONFIG,
        "norms and biases": CONFIG | {"use_qk_norm": True, "attention_bias": True},
        "two shared experts": CONFIG | {"n_shared_experts": 2},
        "no dense layer": CONFIG | {"first_k_dense_replace": 0},
        "dense layers only": CONFIG | {"first_k_dense_replace": 3},
        "one layer, one expert": CONFIG
        | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 1, "num_experts_per_tok": 1},
    },
)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@EVERY
def test_the_native_side_is_the_state_of_the_model(case: Case) -> None:
    assert case.model_differences() == []


@EVERY
def test_the_config_may_be_as_transformers_spells_it(case: Case) -> None:
    assert case.parsed_differences() == []


@EVERY
def test_writing_gives_the_same_bytes(case: Case) -> None:
    assert case.writing_differences() == []


@EVERY
def test_reading_gives_the_same_bytes(case: Case) -> None:
    assert case.reading_differences() == []


@EVERY
def test_one_tensor_at_a_time_gives_the_same(case: Case) -> None:
    assert case.single_differences() == []


@EVERY
def test_what_is_written_comes_back(case: Case) -> None:
    assert case.returning_differences() == []
