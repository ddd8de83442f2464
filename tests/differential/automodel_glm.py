"""Cases of GLM-4.5.

Where our maps and NeMo Automodel's adapters differ is in `test_automodel_experts_deviations.py`, with each reason.
"""

from __future__ import annotations

from typing import Any

from tests.differential.automodel import SIZES, Family, cases

GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", "transformers:Glm4MoeConfig")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    **SIZES,
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
