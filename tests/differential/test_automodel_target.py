"""The classes of `--target automodel` in the place of NeMo Automodel's adapters: every method that its callers call.

Names, shapes, dtypes and bytes are those of Automodel's own adapter of a tiny model, built of the same config, experts'
config, backend and dtype. Where they are not, the test is called `test_deviation_...`, and runs both.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo_automodel.components.checkpoint.state_dict_adapter import CheckpointLoadPart, StateDictAdapter
from nemo_automodel.components.moe.state_dict_mixin import MoESplitExpertsStateDictMixin
from torch import Tensor

from tests.differential.automodel import Case, State, contiguous, shuffled
from tests.differential.automodel_target import FAMILIES, drop_in
from tests.differential.quantised import form
from tests.helpers.deepseek_v4 import differences, same_bytes, tiny_config

pytestmark = pytest.mark.heavy

EVERY = pytest.mark.parametrize("family", FAMILIES)
EXTRA = r".*_extra_state.*"
SAVE: dict[str, Any] = {
    "exclude_key_regex": EXTRA,
    "quantization": False,
    "device_mesh": None,
    "v4_compatible": True,
    "legacy_paramwrapper_layout": False,
}
LOAD: dict[str, Any] = {
    "exclude_key_regex": EXTRA,
    "quantization": False,
    "device_mesh": None,
    "for_checkpoint_load": True,
}
CALLS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "to save": SAVE,
    "to save for version 5": SAVE | {"v4_compatible": False, "legacy_paramwrapper_layout": True},
    "to load": LOAD,
    "without experts": {"exclude_key_regex": r".*experts.*"},
    "a regex matches from the beginning": {"exclude_key_regex": r"experts"},
}
# Sizes that 32 divides: for others Automodel asserts.
QUANTISED = FAMILIES | {
    "deepseek_v4": replace(
        FAMILIES["deepseek_v4"], config=tiny_config(hidden_size=160, moe_intermediate_size=192, o_lora_rank=64)
    )
}
FP8_OF_ITS_OWN = ("deepseek_v3", "deepseek_v32", "minimax_m2")


def native(case: Case) -> State:
    """A random state as Automodel's `ModelState` gives it: a tied head is not in it."""
    state = case.native()
    if case.config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    return state


def stored(case: Case) -> State:
    """A random checkpoint, as Automodel writes it."""
    return contiguous(case.theirs().to_hf(native(case)))


@EVERY
def test_it_is_what_automodels_code_asks_for(family: str) -> None:
    case = FAMILIES[family]
    ours = drop_in(case)
    assert isinstance(ours, StateDictAdapter)
    # DeepSeek-V4 and gpt-oss have adapters without the mixin; it is asked of those whose LoRA is one for each expert.
    assert isinstance(ours, MoESplitExpertsStateDictMixin)
    theirs = case.theirs()
    assert (ours.config, ours.moe_config, ours.backend, ours.dtype) == (
        theirs.config,
        theirs.moe_config,
        theirs.backend,
        theirs.dtype,
    )
    if isinstance(theirs, MoESplitExpertsStateDictMixin):
        assert ours._v5_peft_target_parameters == theirs._v5_peft_target_parameters
        assert ours._is_gated_moe == theirs._is_gated_moe
    assert ours.checkpoint_key_aliases == {}
    assert all(isinstance(part, CheckpointLoadPart) for part in ours.iter_checkpoint_load_parts(native(case)))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@EVERY
def test_writing_gives_the_same_bytes(family: str, call: dict[str, Any]) -> None:
    case = FAMILIES[family]
    state = native(case)
    before = dict(state)
    found = drop_in(case).to_hf(state, **call)
    assert list(state) == list(before)
    if family == "ling_v2" and call.get("exclude_key_regex") == "experts":  # Automodel searches anywhere (B17)
        call = {}
    if family == "ling_v2" and call is LOAD:  # what is joined is not there yet: it is to be overwritten
        found |= {name: t for name, t in case.theirs().to_hf(dict(state)).items() if "query_key_value" in name}
    assert differences(found, case.theirs().to_hf(dict(state), **call)) == []


@EVERY
def test_reading_gives_the_same_bytes(family: str) -> None:
    case = FAMILIES[family]
    state = shuffled(stored(case), 2)
    before = dict(state)
    ours, theirs = drop_in(case), case.theirs()
    made = ours.from_hf(state, device_mesh=None)
    if case.config.get("tie_word_embeddings"):  # made here, and by Automodel's loader there
        assert same_bytes(made.pop("lm_head.weight"), made["model.embed_tokens.weight"])
    assert differences(made, theirs.from_hf(dict(state), device_mesh=None)) == []
    assert all(state[name] is tensor for name, tensor in before.items())
    assert ours.view_loaded_native_keys == set()


@EVERY
def test_one_tensor_at_a_time_gives_the_same(family: str) -> None:
    """As a trainer refits an engine: one tensor of the model, and what it is stored as."""
    case = FAMILIES[family]
    ours, theirs = drop_in(case), case.theirs()
    for name, tensor in native(case).items():
        if family == "ling_v2" and re.search(r"\.self_attn\.[qkv]_proj", name):
            continue
        for call in ({}, {"exclude_key_regex": EXTRA, "quantization": False}, {"exclude_key_regex": r".*\.0\."}):
            if family == "ling_v2" and call.get("exclude_key_regex") != EXTRA and call:  # ignored by Automodel (B17)
                continue
            found = ours.convert_single_tensor_to_hf(name, tensor, **call)
            assert isinstance(found, list)
            assert differences(dict(found), dict(theirs.convert_single_tensor_to_hf(name, tensor, **call))) == []


@EVERY
def test_the_names_alone_are_the_same(family: str) -> None:
    """Of a model that has memory and of one that has none; their order is the map's, not that of the state."""
    case = FAMILIES[family]
    real, meta = native(case), {name: tensor.to("meta") for name, tensor in native(case).items()}
    for state in (real, meta):
        state |= {"model.layers.0._extra_state": None, "model.layers.1._extra_state": torch.zeros(3)}
        found = drop_in(case).get_hf_state_dict_keys(state)
        assert sorted(found) == sorted(case.theirs().get_hf_state_dict_keys(dict(state)))


@EVERY
def test_what_modules_keep_besides_is_handed_on(family: str) -> None:
    case = FAMILIES[family]
    extra = {"model.layers.0.mlp._extra_state": None}
    assert set(drop_in(case).to_hf(native(case) | extra)) >= set(extra)
    assert not set(drop_in(case).to_hf(native(case) | extra, exclude_key_regex=EXTRA)) & set(extra)
    assert drop_in(case).from_hf(stored(case) | extra)["model.layers.0.mlp._extra_state"] is None


# --- loading ---------------------------------------------------------------------------------------------------------


@EVERY
def test_what_is_to_be_loaded_lies_in_the_model(family: str) -> None:
    """Filled as a distributed load fills it: the model has what a checkpoint has, without `from_hf` having made it."""
    case = FAMILIES[family]
    files = stored(case)
    expected = case.theirs().from_hf(dict(files))
    model = {name: torch.zeros_like(tensor) for name, tensor in native(case).items()}
    ours = drop_in(case)
    asked = ours.to_hf(model, **LOAD)
    assert form(asked) == form(files)
    for name, tensor in asked.items():
        tensor.copy_(files[name])
    made = ours.from_hf(asked)
    in_model = ours.view_loaded_native_keys
    experts = {name for name in model if name.endswith("_projs") and family != "gpt_oss"}  # whose it just renames
    assert experts <= in_model
    assert not in_model & set(made)
    assert in_model | set(made) == set(model)
    assert differences({**made, **{name: model[name] for name in in_model}}, expected) == []
    # The next load begins anew: nothing is taken for read that was read before.
    assert set(ours.from_hf(files)) >= set(expected)
    assert ours.view_loaded_native_keys == set()


def test_other_memory_is_not_taken_for_the_models() -> None:
    """Tensors of the same names, shapes and strides that were not given out: the model has nothing of them."""
    case = FAMILIES["qwen3_moe"]
    files, ours = stored(case), drop_in(case)
    asked = ours.to_hf({name: torch.zeros_like(tensor) for name, tensor in native(case).items()}, **LOAD)
    given = {n: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).copy_(files[n]) for n, t in asked.items()}
    assert differences(ours.from_hf(given), case.theirs().from_hf(dict(files))) == []
    assert ours.view_loaded_native_keys == set()


@EVERY
def test_a_load_needs_little_memory_or_says_so(family: str) -> None:
    """Automodel keeps a load of FP8 families off this path whatever is loaded; it asks only where nothing is decoded.

    The attention of Ling, whose queries, keys and values are joined, is more than an eighth of the tiny model.
    """
    case = FAMILIES[family]
    differing = (*FP8_OF_ITS_OWN, "deepseek_v4", "gpt_oss", "ling_v2")
    expected = case.theirs().supports_low_memory_dcp_load
    assert drop_in(case).supports_low_memory_dcp_load == (expected != (family in differing))
    assert drop_in(case).supports_write_through_checkpoint_load == (family != "ling_v2")


@pytest.mark.parametrize("backend", [{"experts": "te"}, {"dispatcher": "mok"}], ids=str)
def test_a_backend_that_copies_its_experts_is_not_loaded_through_views(backend: dict[str, str]) -> None:
    case = FAMILIES["qwen3_moe"]
    ours = drop_in(case)
    ours.backend = SimpleNamespace(**backend)
    assert not ours.supports_low_memory_dcp_load
    files = stored(case)
    asked = ours.to_hf({name: torch.zeros_like(tensor) for name, tensor in native(case).items()}, **LOAD)
    for name, tensor in asked.items():
        tensor.copy_(files[name])
    assert differences(ours.from_hf(asked), case.theirs().from_hf(dict(files))) == []
    assert ours.view_loaded_native_keys == set()


@pytest.mark.parametrize("family", [*FP8_OF_ITS_OWN, "deepseek_v4"])
def test_a_quantised_load_asks_for_the_same_names_shapes_and_dtypes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = QUANTISED[family]
    for experts in ("fp4", "fp8") if family == "deepseek_v4" else ("fp8",):
        monkeypatch.setenv("NEMO_AUTOMODEL_DSV4_EXPERT_LAYOUT", experts)
        state = case.model.state_dict()
        expected = form(case.theirs().to_hf(dict(state), **LOAD | {"quantization": True}))
        ours = drop_in(case)
        if family == "deepseek_v4":  # f32 is how Automodel asks for scales; the map has the release's first
            ours.expect_formats({name: torch.empty(s, dtype=d, device="meta") for name, (d, s) in expected.items()})
        assert form(ours.to_hf(state, **LOAD | {"quantization": True})) == expected


# --- what else is asked ----------------------------------------------------------------------------------------------


@EVERY
def test_dtypes_that_an_export_must_keep(family: str) -> None:
    """Automodel asks an adapter of them only where the adapter has the method."""
    case = FAMILIES[family]
    files = stored(case)
    expected = getattr(case.theirs(), "forced_hf_dtype_mapping", lambda _: {})(files)
    if family == "nemotron_v3":  # the map does not state a dtype of the bias of routing, which has that of the model
        expected = {name: dtype for name, dtype in expected.items() if "e_score" not in name}
    assert drop_in(case).forced_hf_dtype_mapping(files) == expected
    assert drop_in(case).forced_hf_dtype_mapping({**files, "unknown": torch.zeros(1), "_extra_state": None}) == expected


def modules(case: Case) -> list[str]:
    """The linear layers of a model that LoRA may adapt, and its experts one by one."""
    names = [name for name, tensor in case.model.state_dict().items() if name.endswith(".weight") and tensor.ndim == 2]
    linear = [
        name.removesuffix(".weight") for name in names if not re.search(r"embed|head|gate\.|_fn$|\.fn$|_param", name)
    ]
    grouped = {name.rpartition(".")[0] for name in case.model.state_dict() if name.endswith("down_projs")}
    words = ("gate_proj", "up_proj", "down_proj") if case.map != "nemotron_v3" else ("up_proj", "down_proj")
    return linear + [f"{path}.{e}.{word}" for path in sorted(grouped) for e in (0, 2) for word in words]


RENAMING = ("deepseek_v4", "hy_v3", "ling_v2", "minimax_m2", "qwen3_next")


@pytest.mark.parametrize("v4_compatible", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*RENAMING, "gpt_oss")])
def test_modules_of_an_adapter_are_called_the_same(family: str, v4_compatible: bool) -> None:
    case = FAMILIES[family]
    ours, theirs = drop_in(case), case.theirs()
    for name in modules(case):
        for prefix in ("", "base_model.model."):
            found = ours.map_peft_target_module_to_hf(prefix + name, v4_compatible=v4_compatible)
            if family == "nemotron_v3" and prefix:  # Automodel leaves out the prefix in one of two places
                assert found.startswith(prefix)
                continue
            assert found == theirs.map_peft_target_module_to_hf(prefix + name, v4_compatible=v4_compatible)


@pytest.mark.parametrize("family", RENAMING)
def test_deviation_modules_of_an_adapter_are_called_as_its_tensors_are(family: str) -> None:
    """Automodel renames tensors of the model but not the modules of its LoRA, so PEFT looks for modules of no model.

    Of DeepSeek-V4 it names those of transformers' model, which no released file has; here it is the release's.
    """
    case = FAMILIES[family]
    ours, theirs = drop_in(case), case.theirs()
    adapters = {
        f"{name}.lora_{side}.weight": torch.ones(4, 4)
        for name in modules(case)
        for side in "AB"
        if not re.search(r"experts\.\d", name)
    }
    written = {name.split(".lora_")[0] for name in ours.to_hf(adapters, v4_compatible=True)}
    named = [ours.map_peft_target_module_to_hf(name.split(".lora_")[0], v4_compatible=True) for name in adapters]
    assert set(named) == written
    released = {name.removesuffix(".weight") for name in stored(case)}
    # A part of what Ling stores joined has no name there: it keeps that of the model, by which Automodel finds it.
    joined = {name for name in written if re.search(r"self_attn\.[qkv]_proj$", name)} if family == "ling_v2" else set()
    assert written - joined <= released
    assert differences(ours.from_hf(ours.to_hf(adapters, v4_compatible=True)), adapters) == []
    called = {theirs.map_peft_target_module_to_hf(name, v4_compatible=True) for name in modules(case)}
    assert not called <= released


@EVERY
def test_memory_of_what_is_saved_is_its_own_or_the_models_as_it_is(family: str) -> None:
    """What an export writes is contiguous, so that nothing has to be copied once more."""
    case = FAMILIES[family]
    for tensor in drop_in(case).to_hf(native(case), **SAVE).values():
        assert isinstance(tensor, Tensor)
        assert tensor.is_contiguous()


@EVERY
def test_names_of_low_rank_adapters_are_those_that_are_written(family: str) -> None:
    ours = drop_in(FAMILIES[family])
    adapters = {
        f"base_model.model.{name}.lora_{side}.weight": torch.ones(4, 4)
        for name in modules(FAMILIES[family])
        for side in "AB"
        if not re.search(r"experts\.\d", name)
    }
    assert sorted(ours.get_hf_state_dict_keys(adapters)) == sorted(ours.to_hf(adapters))
    assert differences(ours.from_hf(ours.to_hf(adapters)), adapters) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4"])
def test_a_stage_of_a_pipeline_is_loaded_by_itself(family: str) -> None:
    """The last of two: some layers and the head, and nothing is missed."""
    case = FAMILIES[family]
    files, state = stored(case), native(case)
    stage = {name: torch.zeros_like(t) for name, t in state.items() if re.search(r"layers\.[23]\.|lm_head", name)}
    ours = drop_in(case)
    asked = ours.to_hf(stage, **LOAD)
    assert 0 < len(asked) < len(files)
    for name, tensor in asked.items():
        tensor.copy_(files[name])
    made = ours.from_hf(asked)
    found = {**stage, **made}
    assert differences(found, {name: case.theirs().from_hf(dict(files))[name] for name in stage}) == []
    assert set(made) | ours.view_loaded_native_keys == set(stage)
