"""The compiled maps of dense models and what NeMo Automodel does with them: the same names, shapes and bytes.

Automodel has no adapter of these families: what its models hold has the released names, but for a tied head, which its
`ModelState` takes out of a state and puts back. So that is what the maps are held against.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.differential.automodel import SIZES, Case, Family, cases, contiguous, random_state, shuffled
from tests.helpers.deepseek_v4 import differences, same_bytes

pytestmark = pytest.mark.heavy

SHARED: dict[str, Any] = {
    "num_hidden_layers": 2,
    **SIZES,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "one of each": SHARED,
    "tied": SHARED | {"tie_word_embeddings": True},
    "no groups of heads": SHARED | {"num_key_value_heads": 6},
    "one layer": SHARED | {"num_hidden_layers": 1},
}
PLAIN = {"no size of a head": SHARED | {"head_dim": None, "hidden_size": 84}}
BIASES = {"biases": SHARED | {"attention_bias": True}}
CASES = {
    **cases(
        "llama",
        Family("llama", "LlamaForCausalLM", "transformers:LlamaConfig"),
        CONFIGS | PLAIN | BIASES | {"biases throughout": SHARED | {"attention_bias": True, "mlp_bias": True}},
    ),
    **cases("qwen2", Family("qwen2", "Qwen2ForCausalLM", "transformers:Qwen2Config"), CONFIGS | PLAIN),
    **cases("qwen3", Family("qwen3", "Qwen3ForCausalLM", "transformers:Qwen3Config"), CONFIGS | PLAIN | BIASES),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
TIED = pytest.mark.parametrize("case", [case for name, case in CASES.items() if "tied" in name])


def filled(case: Case, seed: int) -> torch.nn.Module:
    """Automodel's model with random bits in it, its head tied if the config says so."""
    model = case.family.build(case.config, case.dtype, "cpu")
    model.load_state_dict(random_state(model.state_dict(), seed))
    return model


def saved(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What Automodel saves of a model."""
    from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState

    return contiguous(ModelState(model).state_dict())


def loaded(model: torch.nn.Module, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state after Automodel has loaded a checkpoint."""
    from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState

    ModelState(model).load_state_dict(dict(stored))
    return dict(model.state_dict())


@EVERY
def test_the_native_side_is_the_state_of_the_model(case: Case) -> None:
    """A tied head is made but not listed: a state may come without it, and from Automodel's `ModelState` it does."""
    assert case.model_differences() == (["lm_head.weight"] if case.config.get("tie_word_embeddings") else [])


@EVERY
def test_the_config_may_be_as_transformers_spells_it(case: Case) -> None:
    assert case.parsed_differences() == []


@EVERY
def test_writing_gives_what_automodel_saves(case: Case) -> None:
    model = filled(case, 1)
    assert differences(case.ours().to_hf(dict(model.state_dict())), saved(model)) == []
    assert differences(case.ours().to_hf(saved(model)), saved(model)) == []


@EVERY
def test_reading_gives_what_automodel_loads(case: Case) -> None:
    stored = shuffled(saved(filled(case, 2)), 2)
    native = case.ours().from_hf(stored)
    assert differences(native, loaded(filled(case, 3), stored)) == []
    model = filled(case, 4)
    model.load_state_dict(native, strict=True)
    assert differences(dict(model.state_dict()), native) == []


@EVERY
def test_what_is_read_is_written_again(case: Case) -> None:
    stored = saved(filled(case, 5))
    assert differences(case.ours().to_hf(case.ours().from_hf(stored)), stored) == []


@TIED
def test_a_stored_copy_of_a_tied_head_does_not_win_over_the_embedding(case: Case) -> None:
    """Some releases hold the copy; where it differs, Automodel's model has the head's values in its embedding too."""
    stored = saved(filled(case, 6))
    other = torch.ones_like(stored["model.embed_tokens.weight"])
    theirs = loaded(filled(case, 7), stored | {"lm_head.weight": other})
    assert same_bytes(theirs["model.embed_tokens.weight"], other)
    native = case.ours().from_hf(stored | {"lm_head.weight": other})
    assert same_bytes(native["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert differences(case.ours().to_hf(native), stored) == []


@pytest.mark.parametrize("name", ["llama: one of each, bfloat16", "qwen2: one of each, bfloat16"])
def test_the_rotary_table_of_old_checkpoints_is_dropped_not_handed_on(name: str) -> None:
    """No model has had it as a parameter for years; Automodel's strict load refuses it."""
    case = CASES[name]
    stored = saved(filled(case, 8))
    table = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    with pytest.raises(RuntimeError, match="inv_freq"):
        loaded(filled(case, 9), stored | table)
    assert differences(case.ours().from_hf(stored | table), case.ours().from_hf(stored)) == []
