"""What other libraries do for the same work; one that is not installed is left out."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Decode = Callable[[Mapping[str, Tensor], str], Tensor]
Encode = Callable[[Tensor], object]


def decoders(work: str) -> dict[str, Decode]:
    """By the name of a peer: decode a payload and its scale, which is at the other key, to bf16."""
    found: dict[str, Decode] = {}
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    except ImportError:
        pass
    else:
        op = Fp8Dequantize(None)
        found["transformers"] = lambda parts, key: op._dequantize_one(parts[key], scale(parts, key), torch.bfloat16)
    try:
        from nemo_automodel.components.models.deepseek_v3.state_dict_adapter import dequantize_from_fp8
        from nemo_automodel.components.models.deepseek_v4.state_dict_adapter import DeepSeekV4StateDictAdapter
    except ImportError:
        pass
    else:
        if work == "FP4":
            fp4 = DeepSeekV4StateDictAdapter._dequantize_expert_fp4
            found["NeMo"] = lambda parts, key: fp4(parts[key], scale(parts, key), torch.bfloat16)
        else:
            found["NeMo"] = lambda parts, key: dequantize_from_fp8(parts[key], scale(parts, key))
    return found


def scale(parts: Mapping[str, Tensor], key: str) -> Tensor:
    """The one companion of a payload."""
    (name,) = parts.keys() - {key}
    return parts[name]


def fp8_encoders() -> dict[str, Encode]:
    """By the name of a peer: quantise bf16 to FP8 with new scales of 128x128 blocks."""
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Quantize
    except ImportError:
        return {}
    config = types.SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    op = Fp8Quantize(types.SimpleNamespace(quantization_config=config))
    return {"transformers": lambda values: op._quantize_one("w.weight", values)}


def fp4_encoders() -> dict[str, Encode]:
    """By the name of a peer: quantise bf16 to MXFP4. transformers needs a GPU for it; torchao is the reference."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    except ImportError:
        return {}
    return {"torchao": lambda values: to_mx(values, torch.float4_e2m1fn_x2, 32)}


def stackers() -> dict[str, Callable[[list[list[Tensor]]], Tensor]]:
    """By the name of a peer: gate and up of each expert, `[f, d]`, joined, transposed and stacked to `[E, d, 2f]`.

    NeMo Automodel does it expert by expert in the middle of its adapter, with these operations.
    """

    def nemo(pairs: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(pair, 0).transpose(0, 1) for pair in pairs]).contiguous()

    found: dict[str, Callable[[list[list[Tensor]]], Tensor]] = {"NeMo": nemo}
    try:
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose
    except ImportError:
        return found

    def transformers(pairs: list[list[Tensor]]) -> Tensor:
        given = {"g": [gate for gate, _ in pairs], "u": [up for _, up in pairs]}
        stacked = MergeModulelist(0).convert(given, ["g", "u"], ["w"])
        joined = Concatenate(1).convert(stacked, ["g", "u"], ["w"])
        return Transpose(1, 2).convert(joined, ["w"], ["w"])["w"]

    found["transformers"] = transformers
    return found
