"""Random tiny DeepSeek-V4 checkpoints in the released layout, with bytes as wild as their formats allow.

Sizes are distinct and, where a format packs two elements to a byte, twice a prime: no axis can stand for another, and
no block of 32 or 128 comes out whole. Names and shapes are those of the released DeepSeek-V4-Flash and, for what it
does not hold (compressed multi-token-prediction layers, latent projections, the vision tower), of NeMo's model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "vocab_size": 17,
    "hidden_size": 134,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 22,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 131,
    "o_groups": 2,
    "o_lora_rank": 73,
    "index_n_heads": 5,
    "index_head_dim": 26,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 142,
    "hc_mult": 3,
}
VISION = {"vision_n_layers": 1, "vision_dim": 12, "vision_inter_dim": 10, "vision_n_heads": 2, "vision_patch_size": 2}

Sizes = tuple[int, ...]


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json as DeepSeek writes it, with some of its fields changed; None takes a field out."""
    return {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores what may be quantised.

    `experts` is fp4, fp8 or raw, `dense` fp8 or raw; `v3` spells the scales of FP8 as DeepSeek-V3 does; `scales` is
    the dtype of FP8's scales. `wild` draws every code of every format, NaNs and the ends of e8m0 too.
    """

    experts: str = "fp4"
    dense: str = "fp8"
    v3: bool = False
    scales: torch.dtype = torch.float8_e8m0fnu
    wild: bool = False
    seed: int = 0

    def kind(self, name: str, kind: str) -> str:
        """How a tensor is stored: fp4, fp8, bf16, f32 or i64."""
        stored = {"dense": self.dense, "expert": self.experts}.get(kind, kind)
        return "bf16" if stored == "raw" else stored


def checkpoint(
    config: dict[str, Any], storage: Storage = Storage(), *, latent: int = 0, mtp: str = "mtp.{k}"
) -> dict[str, Tensor]:
    """A whole checkpoint. `latent` adds latent projections of that size; `mtp` spells the prefix of MTP layers.

    In `mtp`, `{k}` counts those layers and `{n}` all layers: `layers.{n}` is a legacy spelling.
    """
    made = _Maker(storage)
    for name, shape, kind in tensors(config, latent=latent, mtp=mtp):
        made.add(name, shape, kind)
    return made.tensors


def tensors(config: dict[str, Any], *, latent: int = 0, mtp: str = "mtp.{k}") -> Iterator[tuple[str, Sizes, str]]:
    """Name, logical shape and kind of every tensor: bf16, f32, i64, or what may be quantised, dense and expert."""
    layers, width, streams = config["num_hidden_layers"], config["hidden_size"], config.get("hc_mult", 0)
    yield "embed.weight", (config["vocab_size"], width), "bf16"
    yield "norm.weight", (width,), "bf16"
    yield "head.weight", (config["vocab_size"], width), "bf16"
    yield from _hyper_head("", streams, width)
    for i in range(layers):
        yield from _layer(config, f"layers.{i}.", i, latent)
    for k in range(config.get("num_nextn_predict_layers", 0)):
        prefix = mtp.format(k=k, n=layers + k) + "."
        yield from _layer(config, prefix, layers + k, latent)
        yield prefix + "e_proj.weight", (width, width), "dense"
        yield prefix + "h_proj.weight", (width, width), "dense"
        yield from ((f"{prefix}{norm}.weight", (width,), "bf16") for norm in ("enorm", "hnorm", "norm"))
        yield from _hyper_head(prefix, streams, width)
    if config.get("vision_n_layers"):
        yield from _vision(config)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names that are on one side only or whose tensors differ in dtype, shape or bytes."""
    here = set(found) & set(expected)
    return sorted(set(found) ^ set(expected)) + sorted(n for n in here if not same_bytes(found[n], expected[n]))


def _hyper_head(prefix: str, streams: int, width: int) -> Iterator[tuple[str, Sizes, str]]:
    yield prefix + "hc_head_fn", (streams, streams * width), "f32"
    yield prefix + "hc_head_base", (streams,), "f32"
    yield prefix + "hc_head_scale", (1,), "f32"


def _layer(config: dict[str, Any], prefix: str, number: int, latent: int) -> Iterator[tuple[str, Sizes, str]]:
    width, streams = config["hidden_size"], config["hc_mult"]
    yield prefix + "attn_norm.weight", (width,), "bf16"
    yield prefix + "ffn_norm.weight", (width,), "bf16"
    mix = streams * (streams + 2)
    for site in ("attn", "ffn"):
        yield f"{prefix}hc_{site}_fn", (mix, streams * width), "f32"
        yield f"{prefix}hc_{site}_base", (mix,), "f32"
        yield f"{prefix}hc_{site}_scale", (3,), "f32"
    yield from _attention(config, prefix + "attn.", number)
    yield from _experts(config, prefix + "ffn.", number, latent)


def _attention(config: dict[str, Any], prefix: str, number: int) -> Iterator[tuple[str, Sizes, str]]:
    width, heads, head, rank = (config[n] for n in ("hidden_size", "num_attention_heads", "head_dim", "q_lora_rank"))
    out = config["o_groups"] * config["o_lora_rank"]
    yield prefix + "attn_sink", (heads,), "f32"
    yield prefix + "q_norm.weight", (rank,), "bf16"
    yield prefix + "kv_norm.weight", (head,), "bf16"
    yield prefix + "wq_a.weight", (rank, width), "dense"
    yield prefix + "wq_b.weight", (heads * head, rank), "dense"
    yield prefix + "wkv.weight", (head, width), "dense"
    yield prefix + "wo_a.weight", (out, heads * head // config["o_groups"]), "dense"
    yield prefix + "wo_b.weight", (width, out), "dense"
    ratios = config.get("compress_ratios", [])
    ratio = ratios[number] if number < len(ratios) else 0
    if ratio:
        yield from _compressor(prefix + "compressor.", ratio, head, width)
    if ratio == 4:
        heads, head = config["index_n_heads"], config["index_head_dim"]
        yield from _compressor(prefix + "indexer.compressor.", ratio, head, width)
        yield prefix + "indexer.wq_b.weight", (heads * head, rank), "dense"
        yield prefix + "indexer.weights_proj.weight", (heads, width), "bf16"


def _compressor(prefix: str, ratio: int, head: int, width: int) -> Iterator[tuple[str, Sizes, str]]:
    out = 2 * head if ratio == 4 else head
    yield prefix + "ape", (ratio, out), "f32"
    yield prefix + "norm.weight", (head,), "bf16"
    yield prefix + "wgate.weight", (out, width), "bf16"
    yield prefix + "wkv.weight", (out, width), "bf16"


def _experts(config: dict[str, Any], prefix: str, number: int, latent: int) -> Iterator[tuple[str, Sizes, str]]:
    width, inner, count = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    yield prefix + "gate.weight", (count, width), "bf16"
    is_hash = number < min(config.get("num_hash_layers", 0), config["num_hidden_layers"])
    has_vision = bool(config.get("vision_n_layers"))
    if is_hash:
        yield prefix + "gate.tid2eid", (config["vocab_size"], config["num_experts_per_tok"]), "i64"
    if not is_hash or has_vision:
        yield prefix + "gate.bias", (count,), "f32"
    if has_vision:
        yield prefix + "gate.bias_vl", (count,), "f32"
    if latent:
        yield prefix + "fc1_latent_proj.weight", (latent, width), "bf16"
        yield prefix + "fc2_latent_proj.weight", (width, latent), "bf16"
    joined = inner * config.get("n_shared_experts", 1)
    for name, outer, side in (("w1", joined, width), ("w2", width, joined), ("w3", joined, width)):
        yield f"{prefix}shared_experts.{name}.weight", (outer, side), "dense"
    outside = latent or width
    for e in range(count):
        for name, outer, side in (("w1", inner, outside), ("w2", outside, inner), ("w3", inner, outside)):
            yield f"{prefix}experts.{e}.{name}.weight", (outer, side), "expert"


def _vision(config: dict[str, Any]) -> Iterator[tuple[str, Sizes, str]]:
    width, inner, patch = config["vision_dim"], config["vision_inter_dim"], 3 * config["vision_patch_size"] ** 2
    hidden = config["hidden_size"]
    yield "vision.patch_embed.proj.weight", (width, patch), "bf16"
    yield "vision.patch_embed.proj.bias", (width,), "bf16"
    for n in range(config["vision_n_layers"]):
        block = f"vision.blocks.{n}."
        for name, outer in (("wqkv", 3 * width), ("wo", width)):
            yield f"{block}attn.{name}.weight", (outer, width), "bf16"
            yield f"{block}attn.{name}.bias", (outer,), "bf16"
        yield block + "mlp.w1.weight", (2 * inner, width), "bf16"
        yield block + "mlp.w2.weight", (width, inner), "bf16"
        yield block + "norm1.weight", (width,), "f32"
        yield block + "norm2.weight", (width,), "f32"
    yield "vision.norm.weight", (width,), "f32"
    for name, side in (("w1", width * 9), ("w2", hidden)):
        yield f"aligner.{name}.weight", (hidden, side), "bf16"
        yield f"aligner.{name}.bias", (hidden,), "bf16"
    for name in ("start", "end", "newline", "pad"):
        yield f"image_{name}", (hidden,), "bf16"


class _Maker:
    """Draws tensors; what may be quantised goes where `storage` says, its scales beside it."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.tensors: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(storage.seed)

    def add(self, name: str, shape: Sizes, kind: str) -> None:
        stored = self.storage.kind(name, kind)
        if stored == "fp8":
            self.tensors[name] = self._fp8(shape)
            blocks = tuple(-(-size // 128) for size in shape)
            self.tensors[self._scale_name(name)] = self._scale(blocks, self.storage.scales)
        elif stored == "fp4":
            self.tensors[name] = self._fp4((shape[0], shape[1] // 2))
            self.tensors[name[: -len("weight")] + "scale"] = self._scale(
                (shape[0], -(-shape[1] // 32)), torch.float8_e8m0fnu, lowest=1
            )
        elif stored == "i64":
            self.tensors[name] = torch.randint(0, 2**62, shape, generator=self.random)
        else:
            dtype = torch.float32 if stored == "f32" else torch.bfloat16
            self.tensors[name] = self._bytes((*shape[:-1], shape[-1] * dtype.itemsize)).view(dtype)

    def _scale_name(self, name: str) -> str:
        return name + "_scale_inv" if self.storage.v3 else name[: -len("weight")] + "scale"

    def _bytes(self, shape: Sizes, lowest: int = 0, highest: int = 255) -> Tensor:
        return torch.randint(lowest, highest + 1, shape, dtype=torch.uint8, generator=self.random)

    def _fp8(self, shape: Sizes) -> Tensor:
        codes = self._bytes(shape)
        if not self.storage.wild:
            codes[(codes & 0x7F) == 0x7F] = 0
        return codes.view(torch.float8_e4m3fn)

    def _fp4(self, shape: Sizes) -> Tensor:
        codes = self._bytes(shape)
        if not self.storage.wild:
            codes[(codes & 0x0F) == 0x08] ^= 0x01
            codes[(codes & 0xF0) == 0x80] ^= 0x10
        return codes.view(torch.int8)

    def _scale(self, shape: Sizes, dtype: torch.dtype, lowest: int = 0) -> Tensor:
        if dtype.itemsize > 1:
            return torch.rand(shape, generator=self.random).to(dtype)
        return self._bytes(shape, *((0, 255) if self.storage.wild else (lowest, 254))).view(dtype)
