"""Shipped maps against checkpoints that transformers writes of its own models: names, shapes, bytes, and the experts.

transformers holds experts in one tensor, `[e (j f) d]` and `[e d f]`, and saves them as they are released; so its model
says what the stack is. For Mixtral and Qwen2-MoE, of which NeMo Automodel has no model, its layer of experts says what
the native names and shapes are.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.differential.automodel import SIZES, load, shape_differences, shapes_of
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

DENSE: dict[str, Any] = {
    "num_hidden_layers": 4,
    **SIZES,
}
NO_HEAD: dict[str, Any] = {"head_dim": None, "hidden_size": 84}
TIED = {"tie_word_embeddings": True}
EXPERTS = DENSE | {"moe_intermediate_size": 14, "num_experts_per_tok": 2}
MIXTRAL = DENSE | {"num_local_experts": 3, "num_experts_per_tok": 2}
QWEN2_MOE = EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 34}
QWEN3_MOE = EXPERTS | {"num_experts": 3}
QWEN3_NEXT = QWEN2_MOE | {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 5,
}
GLM4_MOE = EXPERTS | {"n_routed_experts": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}


@dataclass(frozen=True)
class Case:
    """A shipped map, transformers' name of the family, and fields of a config."""

    map: str
    family: str
    config: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        return {name: value for name, value in self.config.items() if value is not None}

    def model(self) -> torch.nn.Module:
        """transformers' model with random weights."""
        module = importlib.import_module("transformers")
        config = getattr(module, f"{self.family}Config")(**self.fields())
        torch.manual_seed(0)
        made: torch.nn.Module = getattr(module, f"{self.family}ForCausalLM")(config)
        return made.to(torch.bfloat16)

    def stored(self, model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
        """What transformers writes of it."""
        save: Any = model.save_pretrained
        save(folder)
        return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


CASES = {
    "llama": Case("llama", "Llama", DENSE),
    "llama, tied": Case("llama", "Llama", DENSE | TIED),
    "llama, no size of a head": Case("llama", "Llama", DENSE | NO_HEAD),
    "llama, biases": Case("llama", "Llama", DENSE | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": Case("qwen2", "Qwen2", DENSE),
    "qwen2, tied": Case("qwen2", "Qwen2", DENSE | TIED | NO_HEAD),
    "qwen3": Case("qwen3", "Qwen3", DENSE),
    "qwen3, biases": Case("qwen3", "Qwen3", DENSE | {"attention_bias": True}),
    "mixtral": Case("mixtral", "Mixtral", MIXTRAL),
    "mixtral, tied": Case("mixtral", "Mixtral", MIXTRAL | TIED | NO_HEAD),
    "qwen2_moe": Case("qwen2_moe", "Qwen2Moe", QWEN2_MOE),
    "qwen2_moe, layers without experts": Case("qwen2_moe", "Qwen2Moe", QWEN2_MOE | {"mlp_only_layers": [0, 2]} | TIED),
    "qwen2_moe, every third": Case("qwen2_moe", "Qwen2Moe", QWEN2_MOE | {"decoder_sparse_step": 3} | NO_HEAD),
    "qwen2_moe, no biases": Case("qwen2_moe", "Qwen2Moe", QWEN2_MOE | {"qkv_bias": False}),
    "qwen3_moe": Case("qwen3_moe", "Qwen3Moe", QWEN3_MOE | {"mlp_only_layers": [1]}),
    "qwen3_moe, biases": Case("qwen3_moe", "Qwen3Moe", QWEN3_MOE | {"attention_bias": True} | NO_HEAD),
    "qwen3_next": Case("qwen3_next", "Qwen3Next", QWEN3_NEXT | {"mlp_only_layers": [2]}),
    "qwen3_next, by interval": Case(
        "qwen3_next", "Qwen3Next", QWEN3_NEXT | {"layer_types": None, "full_attention_interval": 2}
    ),
    "glm4_moe": Case("glm4_moe", "Glm4Moe", GLM4_MOE),
    "glm4_moe, norms and biases": Case("glm4_moe", "Glm4Moe", GLM4_MOE | {"use_qk_norm": True, "attention_bias": True}),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
STACKED = [case for case in CASES.values() if case.map not in ("llama", "qwen2", "qwen3")]


@EVERY
def test_a_checkpoint_of_transformers_is_what_the_map_promises_and_comes_back(case: Case, tmp_path: Path) -> None:
    stored = case.stored(case.model(), tmp_path)
    adapter = load(case.map).adapter(case.fields())
    assert shape_differences(shapes_of(adapter.hf_keys(quantization=False)), shapes_of(stored)) == []
    native = adapter.from_hf(stored)
    assert differences(adapter.to_hf(native), stored) == []


@pytest.mark.parametrize("case", STACKED, ids=[f"{case.map}-{number}" for number, case in enumerate(STACKED)])
def test_the_experts_are_those_of_the_model(case: Case, tmp_path: Path) -> None:
    model = case.model()
    held = model.state_dict()
    native = load(case.map).adapter(case.fields()).from_hf(case.stored(model, tmp_path))
    stacks = {name for name in held if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert stacks
    assert len(stacks) == len([name for name in native if name.endswith("_projs")])
    for name in stacks:
        found = native[
            name.replace("gate_up_proj", "gate_and_up_projs").replace("experts.down_proj", "experts.down_projs")
        ]
        assert same_bytes(found, held[name].transpose(1, 2).contiguous())


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (CASES["mixtral"], {"moe_inter_dim": 26, "n_shared_experts": 0}),
        (
            CASES["qwen2_moe"],
            {"moe_inter_dim": 14, "n_shared_experts": 1, "shared_expert_inter_dim": 34, "shared_expert_gate": True},
        ),
    ],
    ids=["mixtral", "qwen2_moe"],
)
def test_the_native_layer_is_automodels_general_one(case: Case, sizes: dict[str, Any]) -> None:
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.moe.config import MoEConfig
    from nemo_automodel.components.moe.layers import MoE

    usual = dict.fromkeys(("n_activated_experts", "n_expert_groups", "n_limited_groups"), 1)
    usual |= dict.fromkeys(("gate_bias_update_factor", "aux_loss_coeff", "route_scale"), 0)
    shared = {"dim": 66, "inter_dim": 26, "n_routed_experts": 3, "train_gate": True, "score_func": "softmax"}
    with torch.device("meta"):
        layer = MoE(MoEConfig(**usual, **shared, norm_topk_prob=True, **sizes), BackendConfig())
    expected = {f"model.layers.2.mlp.{name}": shape for name, shape in shapes_of(layer.state_dict()).items()}
    keys = shapes_of(load(case.map).adapter(case.fields()).native_keys())
    found = {name: shape for name, shape in keys.items() if name.startswith("model.layers.2.mlp.")}
    assert shape_differences(found, expected) == []
