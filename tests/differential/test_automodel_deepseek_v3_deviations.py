"""Where NeMo Automodel's adapters of DeepSeek-V3 and V3.2 and the compiled maps differ: a test a case, with its reason.

Each test runs both, so that a case that Automodel mends shows up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapdsl
from tests.differential.automodel import Case, State
from tests.differential.quantised import fp8_checkpoint
from tests.differential.test_automodel_deepseek_v3 import CONFIG, INDEXER, V3, V32
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

CASE = Case("deepseek_v3", V3, CONFIG)
EXPERTS = "model.layers.1.mlp.experts."
QUERY = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture
def plain() -> State:
    return CASE.stored()


@pytest.fixture
def fp8() -> State:
    return fp8_checkpoint(CASE)


def theirs(stored: State, case: Case = CASE) -> State:
    """What Automodel reads; it empties the state that it is given."""
    made: State = case.theirs().from_hf(dict(stored))
    return made


def refused(stored: State, *words: str) -> None:
    """Ours is an error that says these words."""
    with pytest.raises(mapdsl.ConversionError) as caught:
        CASE.ours().from_hf(stored)
    assert [word for word in words if word not in str(caught.value)] == []


def expert(number: int, like: State) -> State:
    """One more expert of layer 1."""
    names = [f"{EXPERTS}0.{part}_proj.weight" for part in ("gate", "up", "down")]
    return {name.replace("experts.0", f"experts.{number}"): torch.ones_like(like[name]) for name in names}


# --- what the model does not have ------------------------------------------------------------------------------------


def test_layers_that_predict_more_tokens_are_dropped_not_handed_on(plain: State) -> None:
    """Layer 61 of the release: no part of Automodel's model, whose loader drops what the adapter made of it."""
    layer = {name.replace("layers.1", "layers.3"): tensor for name, tensor in plain.items() if "layers.1." in name}
    layer["model.layers.3.enorm.weight"] = torch.ones(134)
    made = theirs(plain | layer)
    assert {"model.layers.3.enorm.weight", "model.layers.3.mlp.experts.down_projs"} <= set(made)
    assert differences(CASE.ours().from_hf(plain | layer), theirs(plain)) == []


def test_kimis_rotary_frequencies_are_dropped_not_handed_on(plain: State) -> None:
    """Kimi-K2 stores a buffer that each model computes."""
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    stored = plain | {name: torch.ones(4)}
    assert name in theirs(stored)
    assert differences(CASE.ours().from_hf(stored), theirs(plain)) == []


def test_an_unknown_tensor_is_an_error_not_handed_on_or_lost(plain: State) -> None:
    """No model has such parameters; of two alike Automodel hands on one and loses the other, by its last word."""
    stored = plain | {"model.extra": torch.zeros(2), "model.extra_scale_inv": torch.zeros(2)}
    assert {"model.extra", "model.extra_scale_inv"} & set(theirs(stored)) == {"model.extra"}
    refused(stored, "R603", "model.extra", "model.extra_scale_inv")


def test_names_without_the_prefix_of_the_model_are_an_error(plain: State) -> None:
    """A bare body, which no release is: Automodel makes states of both kinds, and keeps which for what it writes."""
    bare = {name.removeprefix("model."): tensor for name, tensor in plain.items()}
    assert "layers.1.mlp.experts.down_projs" in theirs(bare)
    refused(bare, "R605", "model.embed_tokens.weight")


# --- experts ---------------------------------------------------------------------------------------------------------


def test_a_missing_expert_is_an_error_of_both(plain: State) -> None:
    """Said so that this stays: Automodel lists what is missing, too."""
    del plain[f"{EXPERTS}2.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"experts\.2\.up_proj"):
        theirs(plain)
    refused(plain, "R605", f"{EXPERTS}2.up_proj.weight")


def test_a_layer_without_any_expert_is_an_error_not_left_out(plain: State) -> None:
    """Training would start from random experts there: Automodel looks only at the layers that it finds."""
    stored = {name: tensor for name, tensor in plain.items() if not name.startswith(EXPERTS)}
    made = theirs(stored)
    assert EXPERTS + "down_projs" not in made
    assert EXPERTS.replace("1", "2") + "down_projs" in made
    refused(stored, "R605", f"{EXPERTS}0.gate_proj.weight")


def test_more_experts_than_the_config_has_are_an_error_not_left_out(plain: State) -> None:
    """A wrong config would make a model of the first three experts of five."""
    stored = plain | expert(3, plain) | expert(4, plain)
    assert same_bytes(theirs(stored)[EXPERTS + "down_projs"], theirs(plain)[EXPERTS + "down_projs"])
    refused(stored, "R603", f"{EXPERTS}3.gate_proj.weight")


def test_plain_experts_keep_their_dtype(plain: State) -> None:
    """Automodel makes experts, and nothing else that is plain, what its model is: bits of f32 are lost."""
    stored = {name: tensor.float() for name, tensor in plain.items()}
    made, ours = theirs(stored), CASE.ours().from_hf(stored)
    assert (made[EXPERTS + "down_projs"].dtype, made["lm_head.weight"].dtype) == (torch.bfloat16, torch.float32)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_a_tensor_of_another_size_than_the_config_says_is_an_error(plain: State) -> None:
    """Automodel leaves it to the model to refuse."""
    stored = plain | {"lm_head.weight": torch.ones(18, 134)}
    assert theirs(stored)["lm_head.weight"].shape == (18, 134)
    refused(stored, "R606", "lm_head.weight", "[17, 134]", "[18, 134]")


def test_the_size_of_a_head_follows_from_its_parts() -> None:
    """Released configs have no `qk_head_dim`; Automodel's config of V3.2 says 192 whatever the parts are."""
    config = {name: value for name, value in INDEXER.items() if name != "qk_head_dim"}
    case, name = Case("deepseek_v32", V32, config), "model.layers.0.self_attn.q_b_proj.weight"
    assert case.model.state_dict()[name].shape == (6 * 192, 131)
    assert case.ours().native_keys()[name][0] == (6 * 30, 131)


# --- FP8 -------------------------------------------------------------------------------------------------------------


def test_a_scale_with_too_many_blocks_is_an_error(fp8: State) -> None:
    """Automodel takes the corner of it that fits."""
    stored = fp8 | {f"{QUERY}_scale_inv": torch.ones(5, 7)}
    assert theirs(stored)[QUERY].dtype == torch.bfloat16
    refused(stored, "R606", f"{QUERY}_scale_inv", "[5, 7]", "[2, 2]")


def test_a_scale_with_too_few_blocks_is_an_error_that_names_it(fp8: State) -> None:
    """Automodel's names nothing, and on a GPU its kernel reads what lies behind."""
    stored = fp8 | {f"{QUERY}_scale_inv": torch.ones(1, 1)}
    with pytest.raises(IndexError, match="out of bounds"):
        theirs(stored)
    refused(stored, "R606", f"{QUERY}_scale_inv", "[1, 1]", "[2, 2]")


def test_fp8_without_its_scale_is_an_error_not_a_weight(fp8: State) -> None:
    """The codes mean nothing without it; Automodel hands them on as the weight."""
    del fp8[f"{QUERY}_scale_inv"]
    assert theirs(fp8)[QUERY].dtype == torch.float8_e4m3fn
    refused(fp8, "R605", f"{QUERY}_scale_inv")


def test_a_nan_keeps_its_sign(fp8: State) -> None:
    """Automodel's has all bits set, whichever of the two codes it was."""
    codes = fp8[QUERY].view(torch.uint8)
    codes[0, 0], codes[0, 1] = 0x7F, 0xFF
    for state, signs in ((theirs(fp8), [True, True]), (CASE.ours().from_hf(fp8), [False, True])):
        assert state[QUERY][0, :2].isnan().all()
        assert torch.signbit(state[QUERY][0, :2]).tolist() == signs


def test_quantised_writing_gives_the_stored_bytes_back(fp8: State) -> None:
    """Automodel writes placeholders for a loader to fill: FP8 without scales, for what was never FP8 as for this."""
    ours = CASE.ours()
    native = ours.from_hf(fp8)
    written = CASE.theirs().to_hf(dict(native), quantization=True)
    assert all((tensor == 1).all() for name, tensor in written.items() if name.endswith("_scale_inv"))
    assert differences(ours.to_hf(native, quantization=True), fp8) == []


def test_quantised_writing_of_new_weights_encodes_them(fp8: State) -> None:
    """Half a step of e4m3 is 1/16 of a value; Automodel loses what is beyond 448, and what is small."""
    native = {name: tensor * 1000 for name, tensor in CASE.ours().from_hf(fp8).items()}
    native[QUERY] = torch.randn(131, 134, generator=torch.Generator().manual_seed(0)).mul(1000).bfloat16()
    lost = theirs(CASE.theirs().to_hf(dict(native), quantization=True))[QUERY].float() - native[QUERY].float()
    kept = CASE.ours().from_hf(CASE.ours().to_hf(native, quantization=True))[QUERY].float() - native[QUERY].float()
    assert lost.abs().max() > 1000
    assert (kept.abs() <= native[QUERY].float().abs() / 16 + 4000 * 2**-10).all()


def test_what_the_checkpoint_did_not_quantise_stays_plain(fp8: State) -> None:
    """Automodel quantises by a list of names, so that its destinations do not fit such a file."""
    scale = fp8.pop(f"{QUERY}_scale_inv")
    fp8[QUERY] = torch.ones(131, 134, dtype=torch.bfloat16)
    ours = CASE.ours()
    native = ours.from_hf(fp8)
    written: dict[str, Any] = CASE.theirs().to_hf(dict(native), quantization=True)
    assert written[f"{QUERY}_scale_inv"].shape == scale.shape
    assert differences(ours.to_hf(native, quantization=True), fp8) == []


# --- what the caller keeps -------------------------------------------------------------------------------------------


def test_the_state_that_is_read_is_left_as_it_was(plain: State) -> None:
    """Automodel empties it."""
    first, second = dict(plain), dict(plain)
    CASE.theirs().from_hf(first)
    CASE.ours().from_hf(second)
    assert (len(first), len(second)) == (0, len(plain))
