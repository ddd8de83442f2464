"""Where the classes of `--target automodel` and NeMo Automodel's own adapters differ, and who is right.

A test a case, which runs both, so that a case that Automodel mends shows up here. What differs of a map in whichever
way it is compiled is in `test_automodel_..._deviations.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.differential.automodel_target import FAMILIES, drop_in
from tests.differential.quantised import form
from tests.differential.test_automodel_target import LOAD, native, stored
from tests.helpers.deepseek_v4 import same_bytes

pytestmark = pytest.mark.heavy


def test_deviation_fp8_that_automodel_has_no_decoder_of_is_asked_for() -> None:
    """Qwen3 and GLM-4.5 are released in FP8, too: Automodel asks for bf16 under the names of no release's scales."""
    for family in ("qwen3_moe", "glm4_moe"):
        case = FAMILIES[family]
        state = case.model.state_dict()
        theirs = form(case.theirs().to_hf(dict(state), **LOAD | {"quantization": True}))
        ours = form(drop_in(case).to_hf(state, **LOAD | {"quantization": True}))
        assert torch.float8_e4m3fn not in {dtype for dtype, _ in theirs.values()}
        assert set(ours) > set(theirs)
        assert torch.float8_e4m3fn in {dtype for dtype, _ in ours.values()}


def test_deviation_an_expert_is_missed_also_where_the_others_are_loaded() -> None:
    """Automodel gives back a layer without that group (B9): its experts stay random."""
    case = FAMILIES["deepseek_v4"]
    files = {name: t for name, t in stored(case).items() if not name.startswith("layers.1.ffn.experts.2.w1")}
    assert "model.layers.1.mlp.experts.gate_and_up_projs" not in case.theirs().from_hf(dict(files))
    with pytest.raises(RuntimeError, match=r"layers\.1\.ffn\.experts\.2\.w1\.weight"):
        drop_in(case).from_hf(files)


def test_deviation_values_are_encoded_not_cut_off() -> None:
    """With values, `quantization=True` is a quantiser; Automodel casts them, so that 1000 is 448 (B11)."""
    case = FAMILIES["deepseek_v3"]
    state = {name: torch.full_like(tensor, 1000) for name, tensor in native(case).items()}
    theirs, ours = case.theirs(), drop_in(case)
    cut = theirs.from_hf(theirs.to_hf(dict(state), quantization=True))
    name = "model.layers.1.mlp.experts.down_projs"
    assert (cut[name] == 448).all()
    assert (ours.from_hf(ours.to_hf(state, quantization=True))[name] == 1000).all()


def test_deviation_packed_experts_of_any_size_are_asked_for() -> None:
    """Automodel asks for the groups of the released sizes, 90 of 32 elements, whatever the model's are (B21)."""
    case = replace(FAMILIES["gpt_oss"], params={})
    state = case.model.state_dict()
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    size, hidden = case.config["intermediate_size"], case.config["hidden_size"]
    asked = drop_in(case).to_hf(state, **LOAD | {"quantization": True})
    assert tuple(asked[name].shape) == (case.config["num_local_experts"], hidden, size // 32, 16)
    theirs = case.theirs().to_hf(dict(state), **LOAD | {"quantization": True})
    assert tuple(theirs[name].shape)[2] != size // 32


def test_deviation_queries_keys_and_values_of_ling_are_joined_or_refused() -> None:
    """Alone, one of the three is no stored tensor; Automodel makes up a name that no release has (B26)."""
    case = FAMILIES["ling_v2"]
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = native(case)[name]
    ((made, _),) = case.theirs().convert_single_tensor_to_hf(name, tensor)
    assert made not in stored(case)
    with pytest.raises(RuntimeError, match="k_proj"):
        drop_in(case).convert_single_tensor_to_hf(name, tensor)


def test_deviation_the_callers_state_is_left_as_it_is() -> None:
    """Automodel's Nemotron-V3 empties the dict that it is given to write (B19)."""
    case = FAMILIES["nemotron_v3"]
    state, given = native(case), native(case)
    case.theirs().to_hf(given)
    assert given == {}
    drop_in(case).to_hf(state)
    assert set(state) == set(native(case))


def test_deviation_a_bare_tensor_of_another_shape_is_refused() -> None:
    """Automodel hands experts whose inner size is not the config's on under the model's name (B33)."""
    case = FAMILIES["qwen3_moe"]
    name = "model.layers.1.mlp.experts.down_projs"
    tensor = native(case)[name][:, 1:]
    ((made, kept),) = case.theirs().convert_single_tensor_to_hf(name, tensor)
    assert made == name
    assert same_bytes(kept, tensor)
    with pytest.raises(Exception, match="R606"):
        drop_in(case).convert_single_tensor_to_hf(name, tensor)
