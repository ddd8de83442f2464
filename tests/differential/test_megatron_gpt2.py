"""Megatron's shards, converted by the maps, in transformers' GPT-2: the logits of Megatron's own forward pass.

That pass is written out here for tensor parallel ranks, in plain torch, so that only the maps stand between the two.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear

from tests.helpers.megatron import HEAD_DIM, HEADS, HIDDEN, LAYERS, VERSIONS, State
from tests.test_megatron_maps import FFN, VOCAB, adapter, cut_rank, megatron_gpt

pytestmark = pytest.mark.heavy

EPSILON = 1e-5


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def normed(x: Tensor, state: State, name: str) -> Tensor:
    return layer_norm(x, (HIDDEN,), state[f"{name}.weight"], state[f"{name}.bias"], EPSILON)


def attention(x: Tensor, state: State, stem: str, version: float, heads: int) -> Tensor:
    """What one rank adds to the output of attention, without the bias, which is added once."""
    fused = linear(x, state[f"{stem}.query_key_value.weight"], state[f"{stem}.query_key_value.bias"])
    if version == 0:
        query, key, value = fused.view(-1, 3, heads, HEAD_DIM).unbind(1)
    elif version == 1:
        query, key, value = fused.view(-1, heads, HEAD_DIM, 3).unbind(3)
    else:
        query, key, value = fused.view(-1, heads, 3, HEAD_DIM).unbind(2)
    scores = torch.einsum("qhc,khc->hqk", query, key) / math.sqrt(HEAD_DIM)
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    mixed = torch.einsum("hqk,khc->qhc", weights, value).reshape(len(x), -1)
    return linear(mixed, state[f"{stem}.dense.weight"])


def logits_of(shards: list[State], tokens: Tensor, version: float) -> Tensor:
    """The logits of one sequence, of ranks that hold parts of a model each and add up what they find."""
    shards = [{name.removeprefix("language_model."): t for name, t in shard.items()} for shard in shards]
    first = shards[0]
    words = torch.cat([shard["embedding.word_embeddings.weight"] for shard in shards])
    x = embedding(tokens, words) + first["embedding.position_embeddings.weight"][: len(tokens)]
    for number in range(LAYERS):
        stem = f"encoder.layers.{number}"
        own, heads = f"{stem}.self_attention", HEADS // len(shards)
        inner = normed(x, first, f"{stem}.input_layernorm")
        x = x + sum(attention(inner, shard, own, version, heads) for shard in shards) + first[f"{own}.dense.bias"]
        inner = normed(x, first, f"{stem}.post_attention_layernorm")
        for shard in shards:
            up = linear(inner, shard[f"{stem}.mlp.dense_h_to_4h.weight"], shard[f"{stem}.mlp.dense_h_to_4h.bias"])
            x = x + linear(gelu(up, approximate="tanh"), shard[f"{stem}.mlp.dense_4h_to_h.weight"])
        x = x + first[f"{stem}.mlp.dense_4h_to_h.bias"]
    return linear(normed(x, first, "encoder.final_layernorm"), words)[:, :VOCAB]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_is_the_same(transformers: Any, version: float, count: int) -> None:
    padded = {name: tensor.double() for name, tensor in megatron_gpt(version, ranks=count).items()}
    shards = [cut_rank(padded, version, count, rank) for rank in range(count)]
    converts = adapter(f"megatron/gpt_v{int(version)}")
    state = converts.from_megatron(converts.merge(shards, {"tp": count}, side="megatron"))
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_inner=FFN, n_positions=9, vocab_size=VOCAB, eos_token_id=0
    )
    assert config.layer_norm_epsilon == EPSILON and config.n_embd == HEADS * HEAD_DIM
    model = transformers.GPT2LMHeadModel(config).double().eval()
    model.load_state_dict(state)
    tokens = torch.tensor([3, 1, 44, 0, 7, 7, 12])
    with torch.no_grad():
        found = model(tokens[None]).logits[0]
    torch.testing.assert_close(found, logits_of(shards, tokens, version), rtol=1e-9, atol=1e-9)
    if version != 2.0:  # and not by chance: read as another version the model is another
        other = adapter("megatron/gpt_v2").from_megatron(converts.merge(shards, {"tp": count}, side="megatron"))
        model.load_state_dict(other)
        with torch.no_grad():
            assert not torch.allclose(model(tokens[None]).logits[0], found, rtol=1e-3, atol=1e-3)


def test_a_released_model_goes_to_megatron(transformers: Any) -> None:
    """From transformers' own state, without the tied output layer, to shards that say the same."""
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_positions=9, vocab_size=VOCAB, eos_token_id=0
    )
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.tensor([5, 6, 44, 1])
    converts = adapter("megatron/gpt_v2", {**config.to_dict(), "make_vocab_size_divisible_by": 8})
    whole = converts.to_megatron({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"})
    shards = [converts.shard(whole, {"tp": 4}, {"tp": rank}, side="megatron") for rank in range(4)]
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits_of(shards, tokens, 2.0), expected, rtol=1e-9, atol=1e-9)
