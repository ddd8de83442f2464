"""Cases of Qwen's mixtures of experts.

Where our maps and NeMo Automodel's adapters differ is in `test_automodel_experts_deviations.py`, with each reason.
"""

from __future__ import annotations

from typing import Any

from tests.differential.automodel import SIZES, Family, cases

QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", "transformers:Qwen3MoeConfig")
QWEN3_NEXT = Family("qwen3_next", "Qwen3NextForCausalLM", "transformers:Qwen3NextConfig")

SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    **SIZES,
    "moe_intermediate_size": 14,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
MOE = SHARED
NEXT = SHARED | {
    "shared_expert_intermediate_size": 34,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 5,
}
CASES = {
    **cases(
        "qwen3_moe",
        QWEN3_MOE,
        {
            "one of each": MOE,
            "no size of a head": MOE | {"head_dim": None},
            "biases": MOE | {"attention_bias": True},
            "layers without experts": MOE | {"mlp_only_layers": [0, 2]},
            "experts in every third layer": MOE | {"decoder_sparse_step": 3},
            "both": MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
            "one layer, one expert": MOE | {"num_hidden_layers": 1, "num_experts": 1, "num_experts_per_tok": 1},
        },
    ),
    **cases(
        "qwen3_next",
        QWEN3_NEXT,
        {
            "one of each": NEXT,
            "types of layers by their interval": NEXT | {"layer_types": None, "full_attention_interval": 3},
            "types of layers as usual": NEXT | {"layer_types": None},
            "layers without experts": NEXT | {"mlp_only_layers": [0, 2]},
            "experts in every second layer": NEXT | {"decoder_sparse_step": 2},
            "full attention only": NEXT | {"layer_types": ["full_attention"] * 4},
            "linear attention only": NEXT | {"layer_types": ["linear_attention"] * 4},
        },
    ),
}
