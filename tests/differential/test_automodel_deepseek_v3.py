"""The compiled maps of DeepSeek-V3 and V3.2 and NeMo Automodel's own adapters: the same names, shapes and bytes.

Where they differ is in `test_automodel_deepseek_v3_deviations.py`, each case with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.differential.automodel import Case, Family, cases
from tests.differential.quantised import form, fp8_checkpoint
from tests.helpers.deepseek_v4 import differences

pytestmark = pytest.mark.heavy

V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", "transformers:DeepseekV3Config")
V32 = Family(
    "deepseek_v32",
    "DeepseekV32ForCausalLM",
    "nemo_automodel.components.models.deepseek_v32.config:DeepseekV32Config",
)

# Blocks of 128 are whole in some dimensions, in parts in others, and more than one in both of a few tensors.
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "vocab_size": 17,
    "hidden_size": 134,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 131,
    "kv_lora_rank": 23,
    "qk_nope_head_dim": 22,
    "qk_rope_head_dim": 8,
    "v_head_dim": 26,
    "qk_head_dim": 30,
    "intermediate_size": 146,
    "moe_intermediate_size": 139,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
}
INDEXER = CONFIG | {"index_n_heads": 5, "index_head_dim": 28, "index_topk": 3}
CONFIGS = {
    "one of each": CONFIG,
    "no layer without experts": CONFIG | {"first_k_dense_replace": 0},
    "no layer with experts": CONFIG | {"first_k_dense_replace": 3},
    "fewer layers than go without experts": CONFIG | {"num_hidden_layers": 1, "first_k_dense_replace": 3},
    "no shared expert": CONFIG | {"n_shared_experts": 0},
    "two shared experts": CONFIG | {"n_shared_experts": 2},
    "one expert": CONFIG | {"n_routed_experts": 1, "num_experts_per_tok": 1},
}
PLAIN = {
    **cases("deepseek_v3", V3, CONFIGS),
    "deepseek_v3: queries are not compressed": Case("deepseek_v3", V3, CONFIG | {"q_lora_rank": None}),
    **cases(
        "deepseek_v32",
        V32,
        {
            "one of each": INDEXER,
            "no layer without experts": INDEXER | {"first_k_dense_replace": 0},
            "two shared experts": INDEXER | {"n_shared_experts": 2},
        },
    ),
}
SCALES = [torch.float32, torch.bfloat16]
EVERY = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())


@pytest.mark.parametrize("scales", SCALES, ids=str)
@EVERY
def test_fp8_decodes_to_the_same_bytes_and_comes_back(case: Case, scales: torch.dtype) -> None:
    ours, stored = case.ours(), fp8_checkpoint(case, scales=scales)
    native = ours.from_hf(stored, dtype=case.dtype)
    assert differences(native, case.theirs().from_hf(dict(stored))) == []
    assert differences(ours.to_hf(native, quantization=True), stored) == []


@EVERY
def test_quantised_writing_gives_the_same_names_shapes_and_dtypes(case: Case) -> None:
    native = case.ours().from_hf(fp8_checkpoint(case), dtype=case.dtype)
    expected = case.theirs().to_hf(dict(native), quantization=True)
    assert form(case.ours().to_hf(native, quantization=True)) == form(expected)
