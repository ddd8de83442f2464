"""The compiled map of gpt-oss and NeMo Automodel's own adapter: the same names, shapes and bytes.

A difference is a test of its own, `test_deviation_...`, which runs both: one that Automodel mends shows up here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.runtime.adapter import Adapter
from tests.differential.automodel import Case, Family, State, load
from tests.differential.quantised import form
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", "transformers:GptOssConfig", backend={"attn": "flex"})
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 17,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 160,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "one of each": CONFIG,
    "one layer, one expert": CONFIG | {"num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1},
    "as many key heads as query heads": CONFIG | {"num_key_value_heads": 6},
    "another size of a head": CONFIG | {"head_dim": 22},
    "hidden size below that of experts": CONFIG | {"hidden_size": 32, "intermediate_size": 224},
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
DOWN = "model.layers.0.mlp.experts.down_proj"
NATIVE_DOWN = "model.layers.0.mlp.experts.down_projs"
WITHOUT_SCALES = ("gate_up_proj", "down_proj")


def plain(config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A case whose experts are not packed, as a trained model is saved."""
    return Case("gpt_oss", GPT_OSS, config, dtype, params={"packed": False})


def released(config: dict[str, Any] = CONFIG) -> Adapter:
    """Our adapter of a checkpoint as it is released."""
    return load("gpt_oss").adapter(config)


def packed(config: dict[str, Any] = CONFIG, largest: int = 254) -> State:
    """A random checkpoint as released, with every FP4 code and every scale up to the largest."""
    generator = torch.Generator().manual_seed(5)
    made = {name: t for name, t in plain(config).stored().items() if not name.endswith(WITHOUT_SCALES)}
    for name, (shape, dtype) in released(config).hf_keys().items():
        if dtype is torch.uint8:
            highest = largest if name.endswith("_scales") else 255
            made[name] = torch.randint(0, highest + 1, shape, dtype=dtype, generator=generator)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@EVERY
def test_plain_experts_are_read_and_written_the_same(config: dict[str, Any], dtype: torch.dtype) -> None:
    case = plain(config, dtype)
    assert case.model_differences() == []
    assert case.parsed_differences() == []
    assert case.writing_differences() == []
    assert case.reading_differences() == []
    assert case.single_differences() == []
    assert case.returning_differences() == []


@EVERY
def test_mxfp4_decodes_to_the_same_bytes_and_comes_back(config: dict[str, Any]) -> None:
    ours, stored = released(config), packed(config)
    native = ours.from_hf(stored)
    assert differences(native, plain(config).theirs().from_hf(dict(stored))) == []
    assert differences(ours.to_hf(native, quantization=True), stored) == []


def test_quantised_writing_gives_the_same_names_shapes_and_dtypes() -> None:
    """At the released sizes, which Automodel's placeholders are made for."""
    config = CONFIG | {"num_hidden_layers": 1, "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 1}
    native = {name: tensor.abs().clamp(max=1) for name, tensor in released(config).from_hf(packed(config)).items()}
    expected = plain(config).theirs().to_hf(dict(native), quantization=True)
    assert form(released(config).to_hf(native, quantization=True)) == form(expected)


def test_the_sinks_are_where_transformer_engine_has_them() -> None:
    adapter = plain().theirs()
    te = type(adapter)(adapter.config, adapter.moe_config, SimpleNamespace(attn="te"))
    ours, stored = load("gpt_oss").adapter(CONFIG, te=True, packed=False), plain().stored()
    native = ours.from_hf(stored)
    assert "model.layers.0.self_attn.attn_module.softmax_offset" in native
    assert differences(native, te.from_hf(dict(stored))) == []
    assert differences(ours.to_hf(native), te.to_hf(dict(native))) == []


def test_deviation_written_blocks_fit_any_size() -> None:
    """Automodel's are of 90 groups whatever the model's size, so that no checkpoint but the released fits them."""
    native = released().from_hf(packed(largest=127))
    name = f"{DOWN}_blocks"
    assert plain().theirs().to_hf(dict(native), quantization=True)[name].shape == (3, 96, 90, 16)
    assert released().to_hf(native, quantization=True)[name].shape == (3, 96, 5, 16)


def test_deviation_written_blocks_hold_the_weights() -> None:
    """Automodel's are ones for a loader to fill, codes and scales: it cannot write MXFP4."""
    stored = {name: t.clamp(min=1) if name.endswith("_scales") else t for name, t in packed(largest=127).items()}
    native = released().from_hf(stored)
    written = plain().theirs().to_hf(dict(native), quantization=True)
    assert all((tensor == 1).all() for name, tensor in written.items() if name.endswith(("_blocks", "_scales")))
    again = released().from_hf(released().to_hf(native, quantization=True))
    assert (again[NATIVE_DOWN] == native[NATIVE_DOWN]).all()


def test_deviation_scale_255_is_nan() -> None:
    """OCP Microscaling Formats 1.0: E8M0 has no 2**128, and the byte is NaN; Automodel makes infinities and finites."""
    stored = packed()
    stored[f"{DOWN}_scales"].fill_(255)
    theirs = plain().theirs().from_hf(dict(stored))[NATIVE_DOWN]
    assert theirs.isinf().any() and (theirs == 0).any()
    assert released().from_hf(stored)[NATIVE_DOWN].isnan().all()


def test_deviation_experts_decode_to_the_dtype_that_is_asked_for() -> None:
    """Automodel decodes to bf16 for a model in f32 too, and its loader casts."""
    stored = packed(largest=127)
    assert plain(dtype=torch.float32).theirs().from_hf(dict(stored))[NATIVE_DOWN].dtype == torch.bfloat16
    assert released().from_hf(stored, dtype=torch.float32)[NATIVE_DOWN].dtype == torch.float32


def test_deviation_experts_in_eight_bits_are_decoded() -> None:
    """A published conversion stores them in E5M2 without scales; Automodel hands the codes on as the weight."""
    stored = plain().stored()
    for name in [name for name in stored if name.endswith(WITHOUT_SCALES)]:
        stored[name] = stored[name].float().nan_to_num(0, 1, -1).clamp(-1e4, 1e4).to(torch.float8_e5m2)
    theirs, ours = plain().theirs().from_hf(dict(stored)), plain().ours()
    native = ours.from_hf(stored)
    assert theirs[NATIVE_DOWN].dtype == torch.float8_e5m2
    assert same_bytes(native[NATIVE_DOWN], stored[DOWN].bfloat16())
    assert differences(ours.to_hf(native, quantization=True), stored) == []


def test_deviation_blocks_without_scales_are_named() -> None:
    """Automodel's error is a KeyError that names neither tensor nor layer."""
    stored = packed()
    del stored[f"{DOWN}_scales"]
    with pytest.raises(KeyError, match="^'scales'$"):
        plain().theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=f"{DOWN}_scales"):
        released().from_hf(stored)


def test_deviation_an_unknown_tensor_is_an_error_not_handed_on() -> None:
    """No model has such a parameter."""
    stored = plain().stored() | {"model.layers.0.extra": torch.zeros(2)}
    assert "model.layers.0.extra" in plain().theirs().from_hf(dict(stored))
    with pytest.raises(mapdsl.ConversionError, match=r"R603.*model\.layers\.0\.extra"):
        plain().ours().from_hf(stored)


def test_deviation_the_state_that_is_read_is_left_as_it_was() -> None:
    """Automodel renames what it is given in place."""
    first, second = plain().stored(), plain().stored()
    plain().theirs().from_hf(first)
    plain().ours().from_hf(second)
    assert (DOWN in first, DOWN in second) == (False, True)
