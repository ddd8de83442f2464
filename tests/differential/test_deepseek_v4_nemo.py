"""The compiled DeepSeek-V4 adapter and NeMo Automodel's hand-written one: the same names, shapes and bytes.

Where they differ is in `test_deepseek_v4_deviations.py`, each case with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.nemo import nemo_adapter, nemo_model
from tests.helpers.deepseek_v4 import VISION, Storage, checkpoint, differences, tiny_config

pytestmark = pytest.mark.heavy

LATENT = 38
CONFIGS: dict[str, dict[str, Any]] = {
    "one of each": tiny_config(),
    "no hash layer": tiny_config(num_hash_layers=0),
    "hash layers only": tiny_config(num_hash_layers=4),
    "no hash field": tiny_config(num_hash_layers=None),
    "no MTP": tiny_config(num_nextn_predict_layers=0),
    "no MTP field": tiny_config(num_nextn_predict_layers=None),
    "two MTP layers": tiny_config(num_nextn_predict_layers=2, compress_ratios=[0, 4, 128, 4, 0, 0]),
    "compressed MTP layers": tiny_config(num_nextn_predict_layers=2, compress_ratios=[4, 0, 8, 128, 4, 128]),
    "short ratios": tiny_config(num_nextn_predict_layers=2, compress_ratios=[128, 4, 4, 0]),
    "no compression": tiny_config(compress_ratios=[]),
    "one layer": tiny_config(num_hidden_layers=1, compress_ratios=[4, 0]),
    "one expert": tiny_config(n_routed_experts=1),
    "two shared experts": tiny_config(n_shared_experts=2),
    "latent experts": tiny_config(moe_latent_size=LATENT),
    "vision": tiny_config(**VISION),
}
STORAGES = {
    "released: FP4 experts, FP8": Storage(seed=1),
    "FP8 throughout": Storage("fp8", seed=2),
    "FP8, f32 scales": Storage("fp8", scales=torch.float32, seed=3),
    "FP8, V3 spelling": Storage("fp8", v3=True, scales=torch.float32, seed=4),
    "FP8, V3 spelling, bf16 scales": Storage("fp8", v3=True, scales=torch.bfloat16, seed=5),
    "FP4 experts alone": Storage("fp4", "raw", seed=6),
    "FP8 but the experts": Storage("raw", "fp8", seed=7),
    "not quantised": Storage("raw", "raw", wild=True, seed=8),
}
LEGACY = ["layers.{n}", "model.layers.{n}"]


def latent(config: dict[str, Any]) -> int:
    return int(config.get("moe_latent_size", 0))


@pytest.fixture(scope="module")
def deepseek() -> mapdsl.Map:
    return mapdsl.load("deepseek_v4")


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_reading_and_plain_writing_give_the_same_bytes(
    deepseek: mapdsl.Map, config: dict[str, Any], storage: Storage
) -> None:
    stored = checkpoint(config, storage, latent=latent(config))
    ours, theirs = deepseek.adapter(config), nemo_adapter(config)
    native = ours.from_hf(stored)
    assert differences(native, theirs.from_hf(dict(stored))) == []
    assert differences(ours.to_hf(native), theirs.to_hf(dict(native))) == []


@pytest.mark.parametrize("spelling", LEGACY)
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
@pytest.mark.parametrize("name", ["one of each", "two MTP layers", "compressed MTP layers"])
def test_legacy_spellings_of_mtp_layers_are_read_the_same(
    deepseek: mapdsl.Map, name: str, storage: Storage, spelling: str
) -> None:
    stored = checkpoint(CONFIGS[name], storage, mtp=spelling)
    native = deepseek.adapter(CONFIGS[name]).from_hf(stored)
    assert differences(native, nemo_adapter(CONFIGS[name]).from_hf(dict(stored))) == []


@pytest.mark.parametrize("spelling", ["mtp.{k}", *LEGACY])
def test_mtp_layers_that_the_model_does_not_have_are_dropped(deepseek: mapdsl.Map, spelling: str) -> None:
    stored = checkpoint(tiny_config(num_nextn_predict_layers=2), mtp=spelling)
    model = tiny_config(num_nextn_predict_layers=1)
    native = deepseek.adapter(model).from_hf(stored)
    assert any(name.startswith("mtp.layers.0.") for name in native)
    assert differences(native, nemo_adapter(model).from_hf(dict(stored))) == []


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
@pytest.mark.parametrize("name", ["one of each", "compressed MTP layers", "no MTP", "vision", "two shared experts"])
def test_quantised_writing_gives_the_same_names_shapes_and_dtypes(
    deepseek: mapdsl.Map, name: str, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sizes that 32 divides, and scales in f32: what is otherwise is a deviation with a test of its own.
    config = {**CONFIGS[name], "hidden_size": 160, "moe_intermediate_size": 192}
    monkeypatch.setenv("NEMO_AUTOMODEL_DSV4_EXPERT_LAYOUT", experts)
    ours = deepseek.adapter(config)
    native = ours.from_hf(checkpoint(config, Storage(experts, scales=torch.float32)))
    expected = nemo_adapter(config).to_hf(dict(native), quantization=True)
    found = ours.to_hf(native, quantization=True)
    assert form(found) == form(expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_tensor_at_a_time_gives_the_same(deepseek: mapdsl.Map, config: dict[str, Any]) -> None:
    ours, theirs = deepseek.adapter(config), nemo_adapter(config)
    native = ours.from_hf(checkpoint(config, latent=latent(config)))
    for name, tensor in native.items():
        found = dict(ours.convert_single_tensor_to_hf(name, tensor))
        assert differences(found, dict(theirs.convert_single_tensor_to_hf(name, tensor))) == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("no hash field", "no MTP field")])
def test_reading_makes_the_state_of_the_model_itself(deepseek: mapdsl.Map, name: str) -> None:
    config = CONFIGS[name]
    sizes = {"moe_latent_size": LATENT} if latent(config) else {}
    model = nemo_model(config, **sizes).state_dict()
    native = deepseek.adapter(config).from_hf(checkpoint(config, latent=latent(config)))
    assert {n: tuple(t.shape) for n, t in native.items()} == {n: tuple(t.shape) for n, t in model.items()}


def form(state: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
