"""Where NeMo Automodel's adapters of Qwen3-MoE, Qwen3-Next and GLM-4.5 and the compiled ones differ, and why.

A test a case, which runs both, so that a case that Automodel mends shows up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mapdsl
from tests.differential.automodel import Case
from tests.differential.automodel_glm import CASES as GLM_CASES
from tests.differential.automodel_qwen import CASES as QWEN_CASES
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

MOE = QWEN_CASES["qwen3_moe: one of each, bfloat16"]
NEXT = QWEN_CASES["qwen3_next: one of each, bfloat16"]
GLM = GLM_CASES["glm4_moe: norms and biases, bfloat16"]
ALL = pytest.mark.parametrize("case", [MOE, NEXT, GLM], ids=["qwen3_moe", "qwen3_next", "glm4_moe"])

LAYER = "model.layers.2.mlp."
GATE_UP = f"{LAYER}experts.gate_and_up_projs"
LAST_UP = f"{LAYER}experts.2.up_proj.weight"


def refused(convert: Any, *words: str) -> None:
    """The conversion ends in an error that says these words."""
    with pytest.raises(mapdsl.ConversionError) as caught:
        convert()
    assert [word for word in words if word not in str(caught.value)] == []


def read(case: Case, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Automodel makes of a checkpoint."""
    made: dict[str, Tensor] = case.theirs().from_hf(dict(stored))
    return made


def without(state: dict[str, Tensor], words: str) -> dict[str, Tensor]:
    """The tensors whose names do not hold these words."""
    return {name: tensor for name, tensor in state.items() if words not in name}


def in_fp8(stored: dict[str, Tensor], suffix: str, by_channel: bool) -> dict[str, Tensor]:
    """The checkpoint with its experts and queries in FP8: ones, under scales of a hundredth."""
    made = dict(stored)
    for name in [name for name in stored if ".experts." in name or name.endswith("q_proj.weight")]:
        made[name] = torch.ones(stored[name].shape).to(torch.float8_e4m3fn)
        made[name + suffix] = torch.full((stored[name].shape[0] if by_channel else 1, 1), 0.01)
    return made


# --- what is not there, or too much --------------------------------------------------------------------------------


@ALL
def test_a_missing_expert_is_refused_by_both(case: Case) -> None:
    stored = without(case.stored(), LAST_UP)
    with pytest.raises(RuntimeError, match="experts.2.up_proj"):
        read(case, stored)
    refused(lambda: case.ours().from_hf(stored), "R605", LAST_UP)


@ALL
def test_a_layer_without_any_expert_is_an_error_not_a_missing_parameter(case: Case) -> None:
    """Automodel looks at the layers that are there, so that of this one it would train random experts."""
    stored = without(case.stored(), f"{LAYER}experts.")
    assert GATE_UP not in read(case, stored)
    refused(lambda: case.ours().from_hf(stored), "R605", f"{LAYER}experts.0.")


@ALL
def test_more_experts_than_the_config_has_are_an_error_not_left_out(case: Case) -> None:
    """A wrong config would make a model of the first three experts of four; Automodel says nothing."""
    stored = case.stored()
    more = {name.replace("experts.2.", "experts.3."): t for name, t in stored.items() if f"{LAYER}experts.2." in name}
    assert same_bytes(read(case, stored | more)[GATE_UP], read(case, stored)[GATE_UP])
    refused(lambda: case.ours().from_hf(stored | more), "R603", f"{LAYER}experts.3.")


@ALL
def test_a_missing_tensor_is_an_error_not_left_to_the_loader(case: Case) -> None:
    """Automodel's loader is not strict wherever an adapter exists, so nobody would tell."""
    stored = without(case.stored(), "lm_head.weight")
    assert "lm_head.weight" not in read(case, stored)
    refused(lambda: case.ours().from_hf(stored), "R605", "lm_head.weight")


@ALL
def test_an_unknown_tensor_is_an_error_not_carried_along(case: Case) -> None:
    """No model has such a parameter: Automodel hands the name on, and the loader drops it."""
    stored = case.stored() | {"model.layers.1.mlp.gate.bias": torch.zeros(3), "extra": torch.zeros(2)}
    assert {"model.layers.1.mlp.gate.bias", "extra"} <= set(read(case, stored))
    refused(lambda: case.ours().from_hf(stored), "R603", "model.layers.1.mlp.gate.bias", "extra")


@ALL
def test_a_checkpoint_of_the_bare_model_is_an_error_not_a_state_of_no_model(case: Case) -> None:
    """Without `model.` the names are those of another class; Automodel makes a state that its own model cannot load."""
    stored = {name.removeprefix("model."): tensor for name, tensor in case.stored().items()}
    made = read(case, stored)
    assert GATE_UP.removeprefix("model.") in made
    assert [name for name in made if name.startswith("model.")] == []
    refused(lambda: case.ours().from_hf(stored), "R605", "model.embed_tokens.weight")


# --- multi-token-prediction layers, which no model of these has ----------------------------------------------------


def test_the_mtp_layers_of_qwen3_next_are_dropped_not_handed_on() -> None:
    """The released checkpoint holds them, its config does not mention them."""
    stored = NEXT.stored()
    names = [f"mtp.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(3)] + ["mtp.fc.weight"]
    mtp = {name: torch.ones(66, 14, dtype=torch.bfloat16) for name in names}
    mtp["mtp.layers.0.mlp.shared_expert.down_proj.weight"] = torch.ones(66, 34)
    extra = set(read(NEXT, stored | mtp)) - set(read(NEXT, stored))
    assert extra == {*names, "mtp.layers.0.mlp.shared_experts.down_proj.weight"}
    assert differences(NEXT.ours().from_hf(stored | mtp), NEXT.ours().from_hf(stored)) == []


def test_the_mtp_layer_of_glm_is_dropped_not_made_a_layer_of_the_backbone() -> None:
    """It is stored as the layer behind the last one; Automodel stacks its experts for a model without that layer."""
    stored = GLM.stored()
    layer = {name.replace("layers.2.", "layers.3."): t for name, t in stored.items() if "layers.2." in name}
    layer["model.layers.3.eh_proj.weight"] = torch.ones(66, 132)
    layer["model.layers.3.shared_head.head.weight_scale"] = torch.ones(17, 1)
    extra = set(read(GLM, stored | layer)) - set(read(GLM, stored))
    assert GATE_UP.replace("layers.2.", "layers.3.") in extra
    assert "model.layers.3.eh_proj.weight" in extra
    assert differences(GLM.ours().from_hf(stored | layer), GLM.ours().from_hf(stored)) == []


# --- quantised checkpoints -----------------------------------------------------------------------------------------


def test_fp8_of_qwen3_is_decoded_not_taken_for_values() -> None:
    """Qwen3-235B-A22B-FP8: Automodel drops the scales, so that a scale of a hundredth makes weights 100 times off."""
    stored = in_fp8(MOE.stored(), "_scale_inv", by_channel=False)
    made = read(MOE, stored)
    assert (made[GATE_UP] == 1).all()
    assert made["model.layers.2.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert not [name for name in made if "scale" in name]
    native = MOE.ours().from_hf(stored)
    expected = torch.tensor(0.01).to(torch.bfloat16)
    assert (native[GATE_UP] == expected).all()
    assert (native["model.layers.2.self_attn.q_proj.weight"] == expected).all()


def test_fp8_of_glm_is_decoded_not_taken_for_values() -> None:
    """GLM-4.5-FP8, scales by channel: Automodel hands them on as parameters that no model has."""
    stored = in_fp8(GLM.stored(), "_scale", by_channel=True)
    made = read(GLM, stored)
    assert (made[GATE_UP] == 1).all()
    assert made["model.layers.2.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert {f"{LAST_UP}_scale", "model.layers.2.self_attn.q_proj.weight_scale"} <= set(made)
    native = GLM.ours().from_hf(stored)
    expected = torch.tensor(0.01).to(torch.bfloat16)
    assert (native[GATE_UP] == expected).all()
    assert (native["model.layers.2.self_attn.q_proj.weight"] == expected).all()
    assert not [name for name in native if "scale" in name]


@pytest.mark.parametrize(("case", "suffix"), [(MOE, "_scale_inv"), (GLM, "_scale")], ids=["qwen3_moe", "glm4_moe"])
def test_a_quantised_load_asks_for_the_scales_and_not_for_bf16(case: Case, suffix: str) -> None:
    """The placeholders have to have the stored names and dtypes; Automodel's are those of the unquantised release."""
    native = {name: torch.ones_like(tensor) for name, tensor in case.native().items()}
    theirs = case.theirs().to_hf(dict(native), quantization=True)
    assert theirs[LAST_UP].dtype == torch.bfloat16
    assert LAST_UP + suffix not in theirs
    ours = case.ours().to_hf(native, quantization=True)
    assert ours[LAST_UP].dtype == torch.float8_e4m3fn
    assert ours[LAST_UP + suffix].shape == ((1, 1) if suffix == "_scale_inv" else (14, 1))


# --- dtypes --------------------------------------------------------------------------------------------------------


@ALL
def test_experts_keep_the_dtype_that_they_are_stored_in(case: Case) -> None:
    """Automodel casts the experts alone, to the dtype of the model, and leaves everything else as it is stored."""
    stored = {name: tensor.float() if ".experts." in name else tensor for name, tensor in case.stored().items()}
    assert read(case, stored)[GATE_UP].dtype == torch.bfloat16
    native = case.ours().from_hf(stored)
    assert native[GATE_UP].dtype == torch.float32
    assert differences(case.ours().to_hf(native), stored) == []


def test_the_decay_of_qwen3_next_comes_back_in_the_dtype_that_it_was_read_in() -> None:
    """Both hold it in f32. The release has it in bf16: Automodel writes f32 all the same, so the file differs."""
    stored = NEXT.stored()
    narrow = {name: t.nan_to_num(0.5).bfloat16() if "A_log" in name else t for name, t in stored.items()}
    held = "model.layers.0.linear_attn._fp32_params.A_log"
    theirs, ours = read(NEXT, narrow), NEXT.ours()
    native = ours.from_hf(narrow)
    assert differences(native, theirs) == []
    assert native[held].dtype == torch.float32
    assert NEXT.theirs().to_hf(theirs)["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    assert differences(ours.to_hf(native), narrow) == []
    assert differences(NEXT.ours().to_hf(native), NEXT.theirs().to_hf(theirs)) == []
