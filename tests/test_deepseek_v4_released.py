"""The shipped DeepSeek-V4 map against the complete header listing of the released DeepSeek-V4-Flash."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.compiler.expand import expand, param_values
from mapdsl.runtime.adapter import Adapter

LISTING = Path(__file__).parent / "data" / "listings" / "deepseek_v4_flash.list"
TENSORS = 69_187
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# What the config does not fix: the rows of `ape` where the ratio is not 4.
FREE = {f"layers.{i}.attn.compressor.ape" for i in range(3, 42, 2)}


@pytest.fixture(scope="module")
def deepseek() -> mapdsl.Map:
    return mapdsl.load("deepseek_v4")


@pytest.fixture(scope="module")
def released() -> Checkpoint:
    return open_checkpoint(LISTING)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(json.loads(LISTING.with_suffix(".config.json").read_text()))


@pytest.fixture
def adapter(deepseek: mapdsl.Map, config: dict[str, Any]) -> Adapter:
    return deepseek.adapter(config)


def agrees(shape: tuple[int | None, ...] | None, found: tuple[int, ...]) -> bool:
    """Whether a shape with unknown sizes is that of a stored tensor."""
    return (
        shape is not None
        and len(shape) == len(found)
        and all(a in (None, b) for a, b in zip(shape, found, strict=True))
    )


def test_the_adapter_lists_exactly_the_released_names(adapter: Adapter, released: Checkpoint) -> None:
    keys = adapter.hf_keys()
    assert len(keys) == TENSORS
    assert set(keys) == set(released.tensors)
    assert [name for name, (shape, _) in keys.items() if not agrees(shape, released.tensors[name].shape)] == []
    assert {name for name, (shape, _) in keys.items() if None in shape} == FREE
    stated = {name: dtype for name, (_, dtype) in keys.items() if dtype is not None}
    assert [name for name, dtype in stated.items() if dtype != DTYPES[released.tensors[name].dtype]] == []
    quantised = {"I8", "F8_E4M3", "F8_E8M0"}
    assert set(stated) == {name for name, tensor in released.tensors.items() if tensor.dtype in quantised}


def test_the_compiler_lists_exactly_the_released_names(
    deepseek: mapdsl.Map, released: Checkpoint, config: dict[str, Any]
) -> None:
    keys = expand(deepseek.checked, param_values(deepseek.checked, config, {})).keys("left")
    assert len(keys) == TENSORS
    assert {key.name for key in keys} == set(released.tensors)
    assert [key.name for key in keys if not agrees(key.shape, released.tensors[key.name].shape)] == []
    assert {key.name for key in keys if None in key.shape} == FREE
    assert [key.name for key in keys if key.dtype not in (None, released.tensors[key.name].dtype)] == []


def test_the_listing_holds_what_the_map_promises(deepseek: mapdsl.Map, released: Checkpoint) -> None:
    found, summary = check_against(deepseek.checked, released)
    assert found == []
    assert summary.tensors == TENSORS
    assert (summary.dropped, summary.carried) == (0, 0)


@pytest.mark.parametrize(
    ("name", "changes", "code"),
    [
        ("layers.7.ffn.experts.255.w2.weight", None, "C502"),
        ("layers.7.ffn.experts.255.w2.scale", None, "C502"),
        ("layers.2.ffn.gate.tid2eid", None, "C502"),
        ("layers.3.ffn.gate.bias", None, "C502"),
        ("layers.2.ffn.gate.bias", {}, "C501"),
        ("layers.1.attn.compressor.ape", {}, "C501"),
        ("layers.3.attn.indexer.compressor.norm.weight", {}, "C501"),
        ("layers.4.attn.kv_norm.bias", {}, "C501"),
        ("head.weight", {"shape": (129280, 4097)}, "C503"),
        ("layers.9.hc_attn_fn", {"shape": (16384, 24)}, "C503"),
        ("layers.9.attn.wq_b.scale", {"shape": (8, 256)}, "C503"),
        ("layers.42.attn.indexer.wq_b.weight", {"shape": (1024, 8192)}, "C503"),
        ("mtp.0.ffn.experts.0.w3.weight", {"shape": (2048, 1024)}, "C503"),
        ("layers.9.attn.wq_b.scale", {"dtype": "U8"}, "C504"),
    ],
)
def test_one_wrong_tensor_among_all_is_found(
    deepseek: mapdsl.Map, released: Checkpoint, name: str, changes: Mapping[str, Any] | None, code: str
) -> None:
    tensors = dict(released.tensors)
    if changes is None:
        del tensors[name]
    else:
        tensors[name] = dataclasses.replace(tensors.get(name, StoredTensor(name, "F32", (7,))), **changes)
    found, _ = check_against(deepseek.checked, dataclasses.replace(released, tensors=tensors))
    assert any(one.code == code and name in one.message for one in found)


def test_the_whole_listing_is_read_and_written_without_memory(adapter: Adapter, released: Checkpoint) -> None:
    stored = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        for name, tensor in released.tensors.items()
    }
    native = adapter.from_hf(stored)
    keys = adapter.native_keys()
    assert set(native) == set(keys)
    assert [name for name, (shape, _) in keys.items() if not agrees(shape, tuple(native[name].shape))] == []
    assert native["model.layers.42.mlp.experts.gate_and_up_projs"].shape == (256, 4096, 2 * 2048)
    assert native["mtp.layers.0.mlp.experts.down_projs"].shape == (256, 2048, 4096)
    assert native["model.layers.0.self_attn.wq_b.weight"].dtype == torch.bfloat16
    written = adapter.to_hf(native, quantization=True)
    assert {name: (t.dtype, t.shape) for name, t in written.items()} == {
        name: (t.dtype, t.shape) for name, t in stored.items()
    }
