"""The compiled map of MiniMax-M2 and NeMo Automodel's own adapter: the same names, shapes and bytes.

A difference is a test of its own, `test_deviation_...`, which runs both: one that Automodel mends shows up here. What
its FP8 has in common with DeepSeek-V3's is in `test_automodel_deepseek_v3_deviations.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.automodel import Case, Family, cases
from tests.differential.quantised import form, fp8_checkpoint
from tests.helpers.deepseek_v4 import differences

pytestmark = pytest.mark.heavy

MINIMAX = Family("minimax_m2", "MiniMaxM2ForCausalLM", "transformers:MiniMaxM2Config")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 17,
    "hidden_size": 134,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 26,
    "rotary_dim": 8,
    "use_qk_norm": True,
    "intermediate_size": 139,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
CASES = cases(
    "minimax_m2",
    MINIMAX,
    {
        "one of each": CONFIG,
        "no norms of queries and keys": CONFIG | {"use_qk_norm": False},
        "one layer, one expert": CONFIG | {"num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1},
        "experts beyond a block": CONFIG | {"intermediate_size": 262, "hidden_size": 38},
    },
)
CASE = Case("minimax_m2", MINIMAX, CONFIG)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
EXPERTS = "model.layers.1.block_sparse_moe.experts."


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=str)
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


def test_deviation_written_scales_are_those_of_the_weights() -> None:
    """Automodel's are ones, for a loader to fill."""
    stored, ours = fp8_checkpoint(CASE), CASE.ours()
    native = ours.from_hf(stored)
    written = CASE.theirs().to_hf(dict(native), quantization=True)
    assert all((tensor == 1).all() for name, tensor in written.items() if name.endswith("_scale_inv"))
    assert differences(ours.to_hf(native, quantization=True), stored) == []


def test_deviation_norms_of_queries_and_keys_are_there_unless_the_config_says_otherwise() -> None:
    """The config as transformers writes it does not tell, and its model has them; Automodel's is then without."""
    config = {name: value for name, value in CONFIG.items() if name != "use_qk_norm"}
    case, name = Case("minimax_m2", MINIMAX, config), "model.layers.0.self_attn.q_norm.weight"
    assert name not in case.model.state_dict()
    assert case.ours().native_keys()[name][0] == (6 * 26,)


def test_deviation_a_layer_without_any_expert_is_an_error() -> None:
    """Automodel looks only at the layers that it finds experts of."""
    stored = {name: tensor for name, tensor in CASE.stored().items() if not name.startswith(EXPERTS)}
    assert "model.layers.1.mlp.experts.down_projs" not in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=rf"R605.*{EXPERTS}0\.w1"):
        CASE.ours().from_hf(stored)


def test_deviation_experts_in_the_native_spelling_are_an_error() -> None:
    """No release names them so; Automodel reads both spellings, and writes but one."""
    stored = {
        name.replace("block_sparse_moe.experts", "mlp.experts")
        .replace(".w1.", ".gate_proj.")
        .replace(".w2.", ".down_proj.")
        .replace(".w3.", ".up_proj."): tensor
        for name, tensor in CASE.stored().items()
    }
    expected = CASE.theirs().from_hf(CASE.stored())
    assert differences(CASE.theirs().from_hf(dict(stored)), expected) == []
    with pytest.raises(mapdsl.ConversionError, match=rf"R605.*{EXPERTS.replace('1', '0')}0\.w1"):
        CASE.ours().from_hf(stored)


def test_deviation_an_unknown_tensor_is_an_error_not_handed_on() -> None:
    """No model has such a parameter."""
    stored = CASE.stored() | {"model.layers.0.extra": torch.zeros(2)}
    assert "model.layers.0.extra" in CASE.theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*model\.layers\.0\.extra"):
        CASE.ours().from_hf(stored)
