"""Automodel's own loading and saving with a compiled class as the model's adapter: the same files, the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from safetensors.torch import load_file, save_file

from tests.differential.automodel import Case, State, load
from tests.differential.automodel_target import FAMILIES, in_place_of
from tests.differential.quantised import fp8_checkpoint
from tests.differential.test_automodel_gpt_oss import packed
from tests.helpers.automodel_job import check, finite
from tests.helpers.deepseek_v4 import Storage, checkpoint, differences
from tests.helpers.jobs import run_job

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"),
]

WHOSE = ("theirs", "ours")


def model_of(case: Case, whose: str) -> torch.nn.Module:
    """A model full of NaNs, with one of the adapters."""
    model = case.family.build(case.config, case.dtype, "cpu")
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    if whose == "ours":
        model.state_dict_adapter = in_place_of(model.state_dict_adapter, case)  # type: ignore[assignment]
    return model


def checkpointer(folder: Path, **options: Any) -> Any:
    """Automodel's own, of one process."""
    plain = {"save_consolidated": "false", "checkpoint_dir": str(folder), "model_cache_dir": str(folder)}
    return CheckpointingConfig(**{**plain, **options}).build(0, 0, 0)


def released(files: State, folder: Path) -> Path:
    folder.mkdir()
    save_file(files, str(folder / "model.safetensors"))
    return folder


def written(folder: Path) -> State:
    out: State = {}
    for file in sorted(folder.rglob("*.safetensors")):
        out |= load_file(str(file))
    return out


def on_cpu(state: dict[str, torch.Tensor]) -> State:
    return {name: tensor.detach() for name, tensor in state.items()}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "ernie4_5_moe"])
def test_a_checkpoint_is_loaded_saved_and_resumed_the_same(family: str, tmp_path: Path) -> None:
    case = FAMILIES[family]
    files = finite(case)
    base = released(files, tmp_path / "base")
    made = {}
    for whose in WHOSE:
        model, engine = model_of(case, whose), checkpointer(tmp_path / whose)
        engine.load_model(model, str(base), is_init_step=True)
        made[whose] = on_cpu(model.state_dict())
        engine.save_model(model, str(tmp_path / whose))
        assert differences(written(tmp_path / whose), files) == []
        again = model_of(case, whose)
        engine.load_model(again, str(tmp_path / whose / "model"))
        assert differences(on_cpu(again.state_dict()), made[whose]) == []
    assert differences(made["ours"], made["theirs"]) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_v3"])
def test_a_consolidated_export_is_the_same(family: str, tmp_path: Path) -> None:
    """With its index, and in the dtypes that the adapter asks for."""
    case = FAMILIES[family]
    base = released(finite(case), tmp_path / "base")
    found = {}
    for whose in WHOSE:
        model, engine = model_of(case, whose), checkpointer(tmp_path / whose, save_consolidated="every")
        engine.load_model(model, str(base), is_init_step=True)
        # As `apply_model_infrastructure` does before it spreads the model.
        model._pre_shard_hf_state_dict_keys = model.state_dict_adapter.get_hf_state_dict_keys(model.state_dict())
        engine.save_model(model, str(tmp_path / whose))
        found[whose] = written(tmp_path / whose / "model" / "consolidated")
    assert differences(found["ours"], found["theirs"]) == []
    assert differences(found["ours"], finite(case)) == []


def in_dtypes_of(state: State, expected: State) -> State:
    """What a loader makes of tensors: some of a tiny DeepSeek-V4 are in f32, whatever its config says."""
    return {name: tensor.to(state[name].dtype) for name, tensor in expected.items()}


def quantised(family: str) -> tuple[Case, State]:
    """A checkpoint as released."""
    case = FAMILIES[family]
    if family == "gpt_oss":
        return replace(case, params={}), packed(dict(case.config), largest=127)
    if family == "deepseek_v4":
        return case, checkpoint(dict(case.config), Storage("fp8", scales=torch.float32))
    return case, fp8_checkpoint(case)


def quantised_model(case: Case, whose: str, base: Path) -> torch.nn.Module:
    """A model whose config was read from a folder with a quantised checkpoint."""
    model: Any = model_of(case, whose)
    model.config.quantization_config = {"quant_method": "fp8"}
    model.config._name_or_path = str(base)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "minimax_m2", "deepseek_v4", "gpt_oss"])
def test_a_quantised_checkpoint_is_decoded_the_same(family: str, tmp_path: Path) -> None:
    """Ours in parts; Automodel's own does so for gpt-oss, and holds a second model in the others."""
    case, files = quantised(family)
    base = released(files, tmp_path / "base")
    made = {}
    for whose in WHOSE:
        model = quantised_model(case, whose, base)
        engine = checkpointer(tmp_path / whose)
        in_parts = Mock(wraps=engine._load_model_in_parts)
        engine._load_model_in_parts = in_parts
        engine.load_model(model, str(base), is_init_step=True)
        assert in_parts.called == (whose == "ours" or family == "gpt_oss")
        made[whose] = on_cpu(model.state_dict())
    assert differences(made["ours"], made["theirs"]) == []
    expected = load(case.map).adapter(case.config).from_hf(files)
    assert differences(made["ours"], in_dtypes_of(made["theirs"], expected)) == []


def test_a_missing_expert_ends_the_load(tmp_path: Path) -> None:
    """Also where a layer has none at all: Automodel keeps what was there, and says so in a warning at most."""
    case = FAMILIES["deepseek_v3"]
    files = {name: t for name, t in fp8_checkpoint(case).items() if "layers.2.mlp.experts." not in name}
    base = released(files, tmp_path / "base")
    model = quantised_model(case, "theirs", base)
    checkpointer(tmp_path).load_model(model, str(base), is_init_step=True)
    assert model.state_dict()["model.layers.2.mlp.experts.down_projs"].isnan().all()
    model = quantised_model(case, "ours", base)
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.mlp\.experts\.0"):
        checkpointer(tmp_path).load_model(model, str(base), is_init_step=True)
    assert model.state_dict()["model.embed_tokens.weight"].isnan().all()
    model.config._name_or_path = ""  # nothing tells where the checkpoint is: parts before it are read
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.mlp\.experts\.0"):
        checkpointer(tmp_path).load_model(model, str(base), is_init_step=True)


# --- adapters --------------------------------------------------------------------------------------------------------

SETTINGS = PeftConfig(target_modules=["*_proj", "*.experts"], dim=4, alpha=8)
OPTIONS: dict[str, dict[str, bool]] = {
    "version 5": {},
    "version 5, PEFT 0.18": {"legacy_paramwrapper_layout": True},
    "version 4": {"v4_compatible": True},
}


def adapted(case: Case, whose: str, fill: Callable[[torch.Tensor], object]) -> torch.nn.Module:
    """A model with LoRA of its projections and of its experts."""
    model = model_of(case, whose)
    apply_lora_to_linear_modules(model, SETTINGS)
    for name, parameter in sorted(model.named_parameters()):
        if "lora" in name:
            fill(parameter.data)
    return model


def lora(model: torch.nn.Module) -> State:
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if "lora" in name}


def exported(case: Case, whose: str, folder: Path, options: dict[str, bool]) -> tuple[State, Any, Any]:
    """What Automodel exports of an adapter, tensors and config, once it was seen to come back."""
    generator = torch.Generator().manual_seed(3)
    model = adapted(case, whose, lambda data: data.normal_(generator=generator))
    engine = checkpointer(folder, is_peft=True, **options)
    engine.save_model(model, str(folder), peft_config=SETTINGS)
    again = adapted(case, whose, lambda data: data.zero_())
    engine.load_model(again, str(folder / "model"))
    assert differences(lora(again), lora(model)) == []
    texts = [(folder / "model" / f"{name}.json").read_text() for name in ("adapter_config", "automodel_peft_config")]
    return written(folder), *map(json.loads, texts)


def modules(tensors: State) -> set[str]:
    """What the tensors of an adapter adapt."""
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}


ALIKE = ["qwen3_moe", "deepseek_v3", "glm4_moe", "nemotron_v3", "minimax_m2"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", ALIKE)
def test_an_adapter_is_exported_the_same(family: str, options: dict[str, bool], tmp_path: Path) -> None:
    case = FAMILIES[family]
    found, config, metadata = exported(case, "ours", tmp_path / "ours", options)
    expected, their_config, their_metadata = exported(case, "theirs", tmp_path / "theirs", options)
    assert any("experts" in name for name in found)
    assert metadata == their_metadata
    if family == "minimax_m2" and "v4_compatible" in options:
        # Automodel calls them as no released MiniMax does: `mlp.experts.0.gate_proj` for `block_sparse_moe...w1` (B14).
        assert not any("block_sparse_moe" in name for name in expected)
        assert set(config["target_modules"]) == modules(found)
        return
    assert config == their_config
    assert differences(found, expected) == []


@pytest.mark.parametrize("family", ["qwen3_next", "ling_v2"])
def test_deviation_the_config_of_an_adapter_names_what_its_tensors_name(family: str, tmp_path: Path) -> None:
    """Automodel calls modules by the model's names where it gives their tensors the released ones."""
    case = FAMILIES[family]
    found, config, _ = exported(case, "ours", tmp_path / "ours", {})
    expected, their_config, _ = exported(case, "theirs", tmp_path / "theirs", {})
    assert differences(found, expected) == []
    assert set(config["target_modules"]) == modules(found)
    assert set(their_config["target_modules"]) != modules(found)


def test_deviation_an_adapter_of_ups_alone_is_trained_on(tmp_path: Path) -> None:
    """Automodel loads nothing of such an adapter (B7). Saved again, it has a gate, as its config says."""
    case = FAMILIES["deepseek_v3"]
    apart, _, _ = exported(case, "ours", tmp_path / "whole", {})
    (tmp_path / "ups").mkdir()
    save_file(
        {n: t for n, t in apart.items() if ".gate_proj." not in n}, str(tmp_path / "ups/adapter_model.safetensors")
    )
    model = adapted(case, "ours", lambda data: data.zero_())
    engine = checkpointer(tmp_path, is_peft=True)
    engine.load_model(model, str(tmp_path / "ups"))
    name = "model.layers.1.mlp.experts.lora_gate_and_up_B"
    half = case.config["moe_intermediate_size"]
    grouped = lora(model)[name]
    assert not grouped[..., :half].any()
    assert grouped[..., half:].any()
    lora(model)[name].fill_(1)
    engine.save_model(model, str(tmp_path / "again"), peft_config=SETTINGS)
    assert set(written(tmp_path / "again")) == set(apart)
    theirs = adapted(case, "theirs", lambda data: data.zero_())
    engine.load_model(theirs, str(tmp_path / "ups"))
    assert not lora(theirs)[name].any()


# --- on several ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_in_a_job(world: int, tmp_path: Path) -> None:
    run_job("tests.helpers.automodel_job", check, world, tmp_path)
