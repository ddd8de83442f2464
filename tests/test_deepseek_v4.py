"""The shipped DeepSeek-V4 map on whole tiny checkpoints: every kind of layer, storage and spelling, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mapdsl
from mapdsl.language.format import format_source
from tests.helpers.deepseek_v4 import VISION, Storage, checkpoint, differences, tiny_config

CONFIG = tiny_config()
DEEPSEEK = mapdsl.load("deepseek_v4")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any mixture of hash layers, MTP layers, compression, experts, latent projections and vision."""
    layers, mtp = draw(st.integers(1, 3)), draw(st.sampled_from([None, 0, 1, 2]))
    ratio = st.sampled_from([0, 4, 3, 128])
    total = layers + (mtp or 0)
    return tiny_config(
        num_hidden_layers=layers,
        num_nextn_predict_layers=mtp,
        num_hash_layers=draw(st.sampled_from([None, 0, 1, layers, layers + 1])),
        compress_ratios=draw(st.just([]) | st.lists(ratio, min_size=layers, max_size=total + 1)),
        n_routed_experts=draw(st.integers(1, 3)),
        n_shared_experts=draw(st.sampled_from([None, 1, 2])),
        moe_latent_size=draw(st.sampled_from([None, 38])),
        hidden_size=draw(st.sampled_from([34, 134])),
        **draw(st.sampled_from([{}, VISION])),
    )


@st.composite
def storages(draw: st.DrawFn) -> Storage:
    """Any way to store what may be quantised, every code of it."""
    v3 = draw(st.booleans())
    scales = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu] if v3 else [torch.float32, torch.float8_e8m0fnu]
    return Storage(
        experts=draw(st.sampled_from(["fp4", "fp8", "raw"])),
        dense=draw(st.sampled_from(["fp8", "raw"])),
        v3=v3,
        scales=draw(st.sampled_from(scales)),
        wild=True,
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), storage=storages())
def test_every_byte_comes_back(config: dict[str, Any], storage: Storage) -> None:
    adapter = DEEPSEEK.adapter(config)
    stored = checkpoint(config, storage, latent=config.get("moe_latent_size", 0))
    native = adapter.from_hf(stored)
    assert differences(adapter.to_hf(native, quantization=True), stored) == []


@settings(max_examples=15, deadline=None)
@given(config=configs(), storage=storages())
def test_a_model_comes_back_from_a_checkpoint_that_is_not_quantised(config: dict[str, Any], storage: Storage) -> None:
    adapter = DEEPSEEK.adapter(config)
    native = adapter.from_hf(checkpoint(config, storage, latent=config.get("moe_latent_size", 0)))
    other = DEEPSEEK.adapter(config)
    assert differences(other.from_hf(other.to_hf(native)), native) == []


def test_gate_and_up_are_joined_and_turned() -> None:
    stored = checkpoint(CONFIG, Storage("raw", "raw"))
    native, prefix = DEEPSEEK.adapter(CONFIG).from_hf(stored), "layers.2.ffn.experts."
    joined = [torch.cat([stored[f"{prefix}{e}.w1.weight"], stored[f"{prefix}{e}.w3.weight"]]).T for e in range(3)]
    down = [stored[f"{prefix}{e}.w2.weight"].T for e in range(3)]
    expected = {"gate_and_up_projs": torch.stack(joined), "down_projs": torch.stack(down)}
    assert differences({name: native[f"model.layers.2.mlp.experts.{name}"] for name in expected}, expected) == []


@pytest.mark.parametrize("spelling", ["layers.{n}", "model.layers.{n}"])
def test_legacy_mtp_layers_are_read_and_written_as_mtp(spelling: str) -> None:
    config = tiny_config(num_nextn_predict_layers=2, compress_ratios=[0, 4, 128, 4, 4, 128])
    adapter = DEEPSEEK.adapter(config)
    native = adapter.from_hf(checkpoint(config, mtp=spelling))
    assert differences(adapter.to_hf(native, quantization=True), checkpoint(config)) == []


@pytest.mark.parametrize("spelling", ["mtp.{k}", "layers.{n}", "model.layers.{n}"])
@pytest.mark.parametrize("kept", [0, 1])
def test_mtp_layers_that_the_model_does_not_have_are_dropped(spelling: str, kept: int) -> None:
    stored = checkpoint(tiny_config(num_nextn_predict_layers=2), Storage("raw", "raw"), mtp=spelling)
    config = tiny_config(num_nextn_predict_layers=kept)
    native = DEEPSEEK.adapter(config).from_hf(stored)
    assert set(native) == set(DEEPSEEK.adapter(config).native_keys())


def test_the_model_may_have_a_bias_in_hash_layers() -> None:
    """It is not made when reading, and dropped when writing."""
    adapter, stored = DEEPSEEK.adapter(CONFIG), checkpoint(CONFIG)
    native, bias = adapter.from_hf(stored), "model.layers.0.mlp.gate.e_score_correction_bias"
    assert bias not in native
    assert differences(adapter.to_hf(native | {bias: torch.ones(3)}, quantization=True), stored) == []


def test_vision_checkpoints_keep_the_bias_of_hash_layers() -> None:
    """Image tokens are routed by scores in every layer."""
    config = tiny_config(**VISION)
    native = DEEPSEEK.adapter(config).from_hf(checkpoint(config))
    assert {f"model.layers.0.mlp.gate.{name}" for name in ("e_score_correction_bias", "bias_vl", "tid2eid")} <= set(
        native
    )
    assert "model.vision.blocks.0.attn.wqkv.weight" in native


def test_a_vision_tower_that_the_config_does_not_mention_is_an_error() -> None:
    stored = checkpoint(CONFIG) | {"vision.norm.weight": torch.ones(3)}
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*vision\.norm\.weight"):
        DEEPSEEK.adapter(CONFIG).from_hf(stored)


def test_a_config_in_the_words_of_transformers_is_understood(tmp_path: Path) -> None:
    """`layer_types` for `compress_ratios`, without entries for MTP layers, and `mlp_layer_types` for hash layers."""
    types = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    config = tiny_config(
        num_hash_layers=None,
        compress_ratios=None,
        layer_types=[types[0], types[1], types[2], types[1]],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    )
    stored = checkpoint(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = DEEPSEEK.adapter(CONFIG).from_hf(stored)
    for form in (config, SimpleNamespace(**config), tmp_path, tmp_path / "config.json"):
        assert differences(DEEPSEEK.adapter(form).from_hf(stored), expected) == []


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("num_attention_heads", 8, "attn_sink"),
        ("head_dim", 20, "attn.kv_norm.weight"),
        ("q_lora_rank", 130, "attn.q_norm.weight"),
        ("o_lora_rank", 70, "attn.wo_a.weight"),
        ("hc_mult", 4, "hc_head_fn"),
        ("vocab_size", 18, "embed.weight"),
        ("hidden_size", 132, "embed.weight"),
        ("moe_intermediate_size", 140, "ffn.shared_experts"),
        ("n_shared_experts", 2, "ffn.shared_experts"),
        ("num_experts_per_tok", 3, "ffn.gate.tid2eid"),
        ("index_n_heads", 6, "attn.indexer.w"),
        ("index_head_dim", 28, "attn.indexer.compressor"),
        ("moe_latent_size", 38, "ffn.experts."),
    ],
)
def test_every_size_of_the_config_is_held_against_the_tensors(field: str, value: int, name: str) -> None:
    with pytest.raises(mapdsl.ConversionError) as caught:
        DEEPSEEK.adapter(tiny_config(**{field: value})).from_hf(checkpoint(CONFIG))
    assert caught.value.code == "R606"
    assert name in caught.value.message


@pytest.mark.parametrize("name", sorted(checkpoint(CONFIG, Storage("raw", "raw"))))
def test_no_tensor_may_be_missing(name: str) -> None:
    stored = dict(RAW_STATE)
    del stored[name]
    with pytest.raises(mapdsl.ConversionError) as caught:
        DEEPSEEK.adapter(CONFIG).from_hf(stored)
    assert caught.value.code == "R605"
    assert name in caught.value.message


RAW_STATE: dict[str, Tensor] = checkpoint(CONFIG, Storage("raw", "raw"))


def test_a_lazy_state_is_asked_for_each_tensor_once() -> None:
    asked: list[str] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    stored = checkpoint(CONFIG)
    DEEPSEEK.adapter(CONFIG).from_hf(Lazy(stored))
    assert sorted(asked) == sorted(stored)


def test_the_file_is_formatted_and_without_findings() -> None:
    assert DEEPSEEK.check() == []
    assert format_source(DEEPSEEK.source) == DEEPSEEK.source.text
