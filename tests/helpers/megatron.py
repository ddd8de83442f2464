"""Tiny Megatron GPT checkpoints, whole and cut into shards by hand: nothing here knows of maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB, LAYERS = 8, 2, 16, 64, 48, 2
VERSIONS = [0, 1.0, 2.0]
# From so many shards to so many ranks.
RESIZES = [(4, 2), (2, 1), (4, 1), (1, 2), (2, 4), (1, 4), (2, 2)]


def layer(prefix: str = "", attention: str = "attention", heads: int = HEADS, ffn: int = FFN) -> State:
    """Random tensors of one layer; rows of queries, keys and values are in no order yet."""
    rows = heads * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "input_layernorm.bias": (HIDDEN,),
        f"{attention}.query_key_value.weight": (3 * rows, HIDDEN),
        f"{attention}.query_key_value.bias": (3 * rows,),
        f"{attention}.dense.weight": (HIDDEN, rows),
        f"{attention}.dense.bias": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.bias": (HIDDEN,),
        "mlp.dense_h_to_4h.weight": (ffn, HIDDEN),
        "mlp.dense_h_to_4h.bias": (ffn,),
        "mlp.dense_4h_to_h.weight": (HIDDEN, ffn),
        "mlp.dense_4h_to_h.bias": (HIDDEN,),
    }
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


def whole(*, heads: int = HEADS) -> State:
    """A random state of a whole model, the names as Megatron-LM of 2020 had them."""
    state = {
        "word_embeddings.weight": torch.randn(VOCAB, HIDDEN),
        "position_embeddings.weight": torch.randn(9, HIDDEN),
    }
    for number in range(LAYERS):
        state |= layer(f"transformer.layers.{number}.", heads=heads)
    return state | {
        "transformer.final_layernorm.weight": torch.randn(HIDDEN),
        "transformer.final_layernorm.bias": torch.randn(HIDDEN),
    }


def cut(state: Mapping[str, Tensor], count: int, rank: int, version: float, heads: int = HEADS) -> State:
    """The share of one rank, in memory of its own."""
    out = {}
    for name, tensor in state.items():
        if "query_key_value" in name:
            first, last = heads // count * rank, heads // count * (rank + 1)
            rest = tensor.shape[1:]
            if version == 0:  # queries of all heads, then keys, then values
                part = tensor.view(3, heads, HEAD_DIM, *rest)[:, first:last]
            elif version == 1:  # of each head, for each of its dimensions a query, a key and a value
                part = tensor.view(heads, HEAD_DIM, 3, *rest)[first:last]
            else:  # of each head, its query, its key, its value
                part = tensor.view(heads, 3, HEAD_DIM, *rest)[first:last]
            part = part.reshape(-1, *rest)
        elif name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
            part = tensor.chunk(count, dim=1)[rank]
        elif name.endswith(
            ("dense_h_to_4h.weight", "dense_h_to_4h.bias", "word_embeddings.weight", "final_linear.weight")
        ):
            part = tensor.chunk(count)[rank]
        else:
            part = tensor
        out[name] = part.clone(memory_format=torch.contiguous_format)
    return out


def save(folder: Path, state: Mapping[str, Any], count: int, version: float, **beside: Any) -> list[str]:
    """Files of all ranks' shares of a whole state, under `module`; what else is given stands beside it."""
    return save_shards(folder, [cut(state, count, rank, version) for rank in range(count)], **beside)


def save_shards(folder: Path, shards: list[Any], **beside: Any) -> list[str]:
    """Files of shards, under `module`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"mp_rank_{rank:02d}_model_states.pt") for rank in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        torch.save({"module": shard, **beside}, path)
    return paths


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same names in the same order, shapes, dtypes and bytes."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        one = found[name]
        assert one.shape == tensor.shape and one.dtype == tensor.dtype, name
        bytes_ = [t.contiguous().view(-1).view(torch.uint8) for t in (one, tensor)]
        assert torch.equal(*bytes_), name
