"""The names of what maps have no lines for: low-rank adapters, modules, PEFT's prefix."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import mapdsl
from mapdsl.frameworks.naming import OUTER_PREFIX, Naming, outer_prefix
from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import map_of

TEXT = """
param L
param E
param D
param F
index i < L
index e < E
codec fp8 = block_scaled(f8e4m3, block=2x4, scale="{key}_scale_inv", scale_dtype=f32)
embed.weight [V D]    <-> model.embed_tokens.weight [V D]
norm.weight [D]       <-> model.norm.weight [D]
head                  <-> lm_head.weight [V D]
layers.{i} <-> model.layers.{i}:
    attn.wq.weight [Q D] as fp8|raw <-> self_attn.q_proj.weight [Q D]
    attn.wo.weight [Q D]            <-> self_attn.o_proj.weight [Q D]
    attn.t.weight [D F]             <-> self_attn.t_proj.weight [F D]
    attn.a.weight [F D] + attn.b.weight [F D] <-> self_attn.ab_proj.weight [(F + F) D]
    ffn.{e}.{p:w1|w3}.weight [F D] <-> mlp.experts.gate_and_up_projs [e D (p F)]
    ffn.{e}.w2.weight [D F]        <-> mlp.experts.down_projs [e F D]
"""
CONFIG = {"L": 2, "E": 3, "D": 6, "F": 4}
REST = [
    ".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_embedding_A", ".lora_embedding_B.default",
    ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight",
]  # fmt: skip
STEMS = {
    "model.layers.1.self_attn.q_proj": "layers.1.attn.wq",
    "model.layers.0.self_attn.o_proj": "layers.0.attn.wo",
    "model.embed_tokens": "embed",
    "model.norm": "norm",
}


@cache
def naming() -> Naming:
    return Naming(map_of(TEXT).adapter(CONFIG))


def some(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1) for name in names}


# --- the prefix ---


def test_the_prefix_is_that_of_all_names() -> None:
    tensors = some(OUTER_PREFIX + "a.weight", OUTER_PREFIX + "b.weight")
    prefix, plain = outer_prefix(tensors)
    assert prefix == "base_model.model." and list(plain) == ["a.weight", "b.weight"]
    assert all(plain[name] is tensors[prefix + name] for name in plain)
    mixed = tensors | some("c.weight")
    assert outer_prefix(mixed) == ("", mixed)
    assert outer_prefix({}) == ("", {})
    assert list(tensors) == [OUTER_PREFIX + "a.weight", OUTER_PREFIX + "b.weight"]


# --- low-rank adapters ---


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("stem", STEMS)
def test_adapters_are_called_as_their_weights(stem: str, rest: str) -> None:
    native, stored = stem + rest, STEMS[stem] + rest
    plain, low_rank = naming().split(some(native, stem + ".weight"))
    assert (list(plain), list(low_rank)) == ([stem + ".weight"], [native])
    plain, low_rank = naming().split_left(some(stored, STEMS[stem] + ".weight"))
    assert (list(plain), list(low_rank)) == ([STEMS[stem] + ".weight"], [stored])
    assert naming().left(native) == stored
    assert naming().right(stored) == native


def test_adapters_may_be_stored_under_the_models_name() -> None:
    """As PEFT stores them, whatever the checkpoint is called."""
    native = "model.layers.1.self_attn.q_proj.lora_A.weight"
    assert list(naming().split_left(some(native))[1]) == [native]
    assert naming().right(native) == native


@pytest.mark.parametrize("weight", ["model.layers.1.self_attn.ab_proj", "model.layers.0.self_attn.t_proj"])
def test_adapters_of_what_is_moved_keep_their_names(weight: str) -> None:
    """No stored weight has its rows and columns alone."""
    name = f"{weight}.lora_B.weight"
    assert list(naming().split(some(name))[1]) == [name]
    assert naming().left(name) == name and naming().right(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
        "model.layers.0.self_attn.q_proj_lora_A.weight",
        "model.layers.7.self_attn.q_proj.lora_A.weight",
        "model.layers.0.nobody.lora_A.weight",
        "lora_A.weight",
        ".lora_A.weight",
        "model.layers.0.mlp.experts.lora_gate_and_up_A",
    ],
)
def test_other_names_are_no_adapters(name: str) -> None:
    assert naming().split(some(name)) == (some(name), {}) or list(naming().split(some(name))[0]) == [name]
    assert list(naming().split_left(some(name))[0]) == [name]


def test_a_stored_name_that_is_no_weight_is_refused() -> None:
    with pytest.raises(ConversionError) as caught:
        naming().left("lm_head.lora_A.weight")
    assert caught.value.code == "R603"
    assert "lm_head.lora_A.weight" in caught.value.message and "head" in caught.value.message


def test_states_without_adapters_look_at_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Naming(map_of(TEXT).adapter(CONFIG))
    tensors = some("model.norm.weight", "nobody")
    assert fresh.split(tensors) == (tensors, {})
    assert "_trace" not in vars(fresh)


# --- modules ---


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *STEMS.items(),
        ("model.layers.0.mlp.experts.0.gate_proj", "layers.0.ffn.0.w1"),
        ("model.layers.1.mlp.experts.2.up_proj", "layers.1.ffn.2.w3"),
        ("model.layers.1.mlp.experts.1.down_proj", "layers.1.ffn.1.w2"),
        ("model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts.3.down_proj"),
        ("model.layers.1.self_attn.ab_proj", "model.layers.1.self_attn.ab_proj"),
        ("lm_head", "head"),
        ("nobody", "nobody"),
        ("", ""),
    ],
)
def test_modules(name: str, stored: str) -> None:
    assert naming().module(name) == stored


@pytest.mark.parametrize(
    ("map_name", "config", "expert"),
    [
        ("mixtral", {"num_hidden_layers": 1, "num_local_experts": 2, "hidden_size": 4, "intermediate_size": 6},
         {"gate": "w1", "up": "w3", "down": "w2"}),
        ("minimax_m2", {"num_hidden_layers": 1, "num_local_experts": 2, "hidden_size": 4, "intermediate_size": 6},
         {"gate": "w1", "up": "w3", "down": "w2"}),
    ],
)  # fmt: skip
def test_experts_of_shipped_maps(map_name: str, config: dict[str, Any], expert: dict[str, str]) -> None:
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 8}
    of = Naming(mapdsl.load(map_name).adapter(config))
    for word, stored in expert.items():
        found = of.module(f"model.layers.0.mlp.experts.1.{word}_proj")
        assert found == f"model.layers.0.block_sparse_moe.experts.1.{stored}"


# --- what is a view ---


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("a [D F] <-> a [D F]", 1.0),
        ("a [D F] <-> a [F D]", 1.0),
        ("a [F D] + b [F D] <-> a [(F + F) D]", 1.0),
        ("a.{i} [F D] <-> a [i D F]", 1.0),
        ("a [(F + F) D] <-> a [F D] + b [F D]", 0.0),
        ("a [(D F)] <-> a [F D]", 0.0),
        ("a [D F] as f32 <-> a [D F]", 0.0),
        ("a [D F] as f32 <-> a [D F] as f32", 1.0),
        ("a [D F] <-> a [D F]\nb [(D F)] <-> b [F D]", 0.5),
    ],
)
def test_the_share_of_views(line: str, share: float) -> None:
    head = "param D\nparam F\nparam L\nindex i < L\n"
    assert Naming(map_of(head + line + "\n").adapter(CONFIG)).share_of_views == share
