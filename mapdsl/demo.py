"""A small checkpoint in the layout of a DeepSeek-V4 release, of random bytes: something to convert without a download.

Payloads take every byte, so NaN codes, -0.0 and denormals are among them; scales are ordinary ones, but for a few that
are zero, NaN or far out. Layer 0 has a hash router, layers 1 and 2 compressors, layer 1 an indexer, and one layer
predicts a second token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.dtypes import dtype_name, stored_shape
from mapdsl.checkpoint.writer import CheckpointWriter

TOKENIZER = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"<s>": 0}}}\n'
FORMATS = ("fp4", "fp8", "raw")

_FP4, _FP8, _SCALE = torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu
_ODD_SCALES = (0, 1, 60, 250, 254, 255)  # e8m0: 2**-127, ..., 2**127, NaN


def small_config(**changes: Any) -> dict[str, Any]:
    """A config.json of 4 layers, one of them with a hash router, one extra prediction layer and 4 experts."""
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 4,
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 1,
        "compress_ratios": [0, 4, 128, 0, 0],
        "vocab_size": 101,
        "hidden_size": 256,
        "hc_mult": 2,
        "num_attention_heads": 4,
        "head_dim": 72,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 96,
        "index_n_heads": 2,
        "index_head_dim": 40,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    }
    return {**config, **changes}


def random_state(
    config: dict[str, Any], experts: str = "fp4", seed: int = 0, *, is_odd: bool = True
) -> dict[str, Tensor]:
    """Every tensor of a release with this config: experts in FP4 or FP8 and the other matrices in FP8, or all raw."""
    return dict(_Release(config, experts, seed, is_odd).tensors())


def write_release(
    folder: Path,
    config: dict[str, Any],
    experts: str = "fp4",
    *,
    max_shard_bytes: int = 2_000_000,
    seed: int = 0,
    is_odd: bool = True,
) -> int:
    """Write such a checkpoint into a new folder: shards and their index, config.json, tokenizer.json.

    Gives the number of tensors. Without `is_odd`, no scales are extreme and no codes are NaN, as in what is released.
    """
    state = random_state(config, experts, seed, is_odd=is_odd)
    entries = [(name, dtype_name(tensor.dtype), stored_shape(tensor)) for name, tensor in state.items()]
    with CheckpointWriter(folder, entries, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.write_json("config.json", config)
        writer.write_bytes("tokenizer.json", TOKENIZER)
        writer.commit()
    return len(state)


class _Release:
    """The tensors of a release, one after another, in the order of its layers."""

    def __init__(self, config: dict[str, Any], experts: str, seed: int, is_odd: bool) -> None:
        self.config = config
        self.experts = experts
        self.is_odd = is_odd
        self.random = torch.Generator().manual_seed(seed)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        c, hidden = self.config, self.config["hidden_size"]
        yield "embed.weight", self.floats(c["vocab_size"], hidden)
        yield "norm.weight", self.floats(hidden)
        yield "head.weight", self.floats(c["vocab_size"], hidden)
        yield from self.head_connections("hc_head_")
        count = c["num_hidden_layers"]
        for layer in range(count):
            name = f"layers.{layer}"
            yield from self.attention(f"{name}.attn", c["compress_ratios"][layer])
            yield from self.layer(name, is_hash=layer < c["num_hash_layers"])
        for layer in range(c["num_nextn_predict_layers"]):
            name = f"mtp.{layer}"
            yield from self.attention(f"{name}.attn", c["compress_ratios"][count + layer])
            yield from self.layer(name, is_hash=False)
            yield from self.prediction(name)

    def layer(self, name: str, *, is_hash: bool) -> Iterator[tuple[str, Tensor]]:
        c = self.config
        hidden, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{name}.{norm}.weight", self.floats(hidden)
        for site in ("attn", "ffn"):
            yield from self.site_connections(f"{name}.hc_{site}_")
        yield f"{name}.ffn.gate.weight", self.floats(experts, hidden)
        if is_hash:
            ids = torch.randint(experts, (c["vocab_size"], c["num_experts_per_tok"]), generator=self.random)
            yield f"{name}.ffn.gate.tid2eid", ids
        else:
            yield f"{name}.ffn.gate.bias", self.floats(experts, dtype=torch.float32)
        for weight, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            yield from self.matrix(f"{name}.ffn.shared_experts.{weight}", rows, columns)
            for expert in range(experts):
                yield from self.matrix(f"{name}.ffn.experts.{expert}.{weight}", rows, columns, self.experts)

    def attention(self, name: str, ratio: int) -> Iterator[tuple[str, Tensor]]:
        c = self.config
        hidden, heads, size = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
        rank, groups, out = c["q_lora_rank"], c["o_groups"], c["o_groups"] * c["o_lora_rank"]
        yield f"{name}.attn_sink", self.floats(heads, dtype=torch.float32)
        yield f"{name}.q_norm.weight", self.floats(rank)
        yield f"{name}.kv_norm.weight", self.floats(size)
        yield from self.matrix(f"{name}.wq_a", rank, hidden)
        yield from self.matrix(f"{name}.wq_b", heads * size, rank)
        yield from self.matrix(f"{name}.wkv", size, hidden)
        yield from self.matrix(f"{name}.wo_a", out, heads * size // groups)
        yield from self.matrix(f"{name}.wo_b", hidden, out)
        if ratio:
            yield from self.compressor(f"{name}.compressor", ratio, size)
        if ratio == 4:
            yield from self.compressor(f"{name}.indexer.compressor", ratio, c["index_head_dim"])
            yield from self.matrix(f"{name}.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], rank)
            yield f"{name}.indexer.weights_proj.weight", self.floats(c["index_n_heads"], hidden)

    def compressor(self, name: str, ratio: int, size: int) -> Iterator[tuple[str, Tensor]]:
        wide = 2 * size if ratio == 4 else size  # windows of ratio 4 overlap
        yield f"{name}.ape", self.floats(ratio, wide, dtype=torch.float32)
        yield f"{name}.norm.weight", self.floats(size)
        for weight in ("wgate", "wkv"):
            yield f"{name}.{weight}.weight", self.floats(wide, self.config["hidden_size"])

    def prediction(self, name: str) -> Iterator[tuple[str, Tensor]]:
        hidden = self.config["hidden_size"]
        for weight in ("e_proj", "h_proj"):
            yield from self.matrix(f"{name}.{weight}", hidden, hidden)
        for norm in ("enorm", "hnorm", "norm"):
            yield f"{name}.{norm}.weight", self.floats(hidden)
        yield from self.head_connections(f"{name}.hc_head_")

    def site_connections(self, name: str) -> Iterator[tuple[str, Tensor]]:
        streams = self.config["hc_mult"]
        mixed = streams * (streams + 2)
        yield f"{name}fn", self.floats(mixed, streams * self.config["hidden_size"], dtype=torch.float32)
        yield f"{name}base", self.floats(mixed, dtype=torch.float32)
        yield f"{name}scale", self.floats(3, dtype=torch.float32)

    def head_connections(self, name: str) -> Iterator[tuple[str, Tensor]]:
        streams = self.config["hc_mult"]
        yield f"{name}fn", self.floats(streams, streams * self.config["hidden_size"], dtype=torch.float32)
        yield f"{name}base", self.floats(streams, dtype=torch.float32)
        yield f"{name}scale", self.floats(1, dtype=torch.float32)

    def matrix(self, name: str, rows: int, columns: int, payload: str = "fp8") -> Iterator[tuple[str, Tensor]]:
        if self.experts == "raw":
            yield f"{name}.weight", self.floats(rows, columns)
        elif payload == "fp4":
            yield f"{name}.weight", self.codes(rows, columns // 2, dtype=_FP4)
            yield f"{name}.scale", self.scales(rows, -(-columns // 32))
        else:
            yield f"{name}.weight", self.codes(rows, columns, dtype=_FP8)
            yield f"{name}.scale", self.scales(-(-rows // 128), -(-columns // 128))

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(dtype)

    def codes(self, *shape: int, dtype: torch.dtype) -> Tensor:
        codes = torch.randint(256, shape, dtype=torch.uint8, generator=self.random)
        if not self.is_odd and dtype == _FP8:
            codes.copy_(torch.where(codes & 0x7F == 0x7F, codes ^ 1, codes))
        return codes.view(dtype)

    def scales(self, *shape: int) -> Tensor:
        exponents = torch.randint(115, 128, shape, dtype=torch.uint8, generator=self.random)
        if not self.is_odd:
            return exponents.view(_SCALE)
        odd = torch.tensor(_ODD_SCALES, dtype=torch.uint8)[torch.randint(6, shape, generator=self.random)]
        rare = torch.rand(shape, generator=self.random) < 0.01
        return torch.where(rare, odd, exponents).view(_SCALE)
