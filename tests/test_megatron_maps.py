"""The maps of `rules/megatron`: whole models, shards, layer files and experts, against tensors arranged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mapdsl
from mapdsl.resources import shipped_maps
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.resharding import places
from tests.helpers.megatron import HEAD_DIM, HEADS, HIDDEN, LAYERS, VERSIONS, State, assert_same, cut, layer
from tests.test_cli import run

MAPS = [name for name in shipped_maps() if name.startswith("megatron/")]
VOCAB, MULTIPLE, FFN = 45, 8, 64
CONFIG = {
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": MULTIPLE,
}


def padded_rows(ranks: int) -> int:
    multiple = MULTIPLE * ranks
    return -(-VOCAB // multiple) * multiple


def megatron_gpt(version: float, encoder: str = "encoder", attention: str = "self_attention", ranks: int = 1) -> State:
    """A whole random model, its vocabulary padded for so many ranks."""
    torch.manual_seed(int(version) + 10)
    words = torch.zeros(padded_rows(ranks), HIDDEN)
    words[:VOCAB] = torch.randn(VOCAB, HIDDEN)
    state = {
        "embedding.word_embeddings.weight": words,
        "embedding.position_embeddings.weight": torch.randn(9, HIDDEN),
    }
    for number in range(LAYERS):
        state |= layer(f"{encoder}.layers.{number}.", attention)
    state |= {f"{encoder}.final_layernorm.{p}": torch.randn(HIDDEN) for p in ("weight", "bias")}
    return {f"language_model.{name}": tensor for name, tensor in state.items()}


def fused(tensor: Tensor, version: float) -> Tensor:
    """Queries of all heads, then keys, then values: what version 0 has, and GPT-2."""
    rest = tensor.shape[1:]
    if version == 0:
        return tensor
    if version == 1:
        return tensor.view(HEADS * HEAD_DIM, 3, *rest).transpose(0, 1).reshape(-1, *rest)
    return tensor.view(HEADS, 3, HEAD_DIM, *rest).transpose(0, 1).reshape(-1, *rest)


def gpt2_layer(state: State, version: float, attention: str = "self_attention") -> State:
    """A GPT-2 block, whose weights are those of Megatron transposed."""
    out = {}
    for p in ("weight", "bias"):
        turned = (lambda t: t.T.contiguous()) if p == "weight" else (lambda t: t)
        out |= {
            f"ln_1.{p}": state[f"input_layernorm.{p}"],
            f"ln_2.{p}": state[f"post_attention_layernorm.{p}"],
            f"attn.c_attn.{p}": turned(fused(state[f"{attention}.query_key_value.{p}"], version)),
            f"attn.c_proj.{p}": turned(state[f"{attention}.dense.{p}"]),
            f"mlp.c_fc.{p}": turned(state[f"mlp.dense_h_to_4h.{p}"]),
            f"mlp.c_proj.{p}": turned(state[f"mlp.dense_4h_to_h.{p}"]),
        }
    return out


def gpt2(state: State, version: float, encoder: str = "encoder", attention: str = "self_attention") -> State:
    """The whole model as transformers has it."""
    state = {name.removeprefix("language_model."): tensor for name, tensor in state.items()}
    words = state["embedding.word_embeddings.weight"][:VOCAB]
    out = {
        "transformer.wte.weight": words,
        "transformer.wpe.weight": state["embedding.position_embeddings.weight"],
        "lm_head.weight": words,
    }
    for number in range(LAYERS):
        stem = f"{encoder}.layers.{number}."
        own = {name.removeprefix(stem): tensor for name, tensor in state.items() if name.startswith(stem)}
        out |= {f"transformer.h.{number}.{n}": t for n, t in gpt2_layer(own, version, attention).items()}
    return out | {f"transformer.ln_f.{p}": state[f"{encoder}.final_layernorm.{p}"] for p in ("weight", "bias")}


def assert_equal(found: State, expected: State) -> None:
    assert_same({name: found[name] for name in sorted(found)}, {name: expected[name] for name in sorted(expected)})


def adapter(name: str, config: Any = CONFIG, **params: Any) -> Any:
    return mapdsl.load(name).adapter(config, **params)


# --- all maps ---


def test_there_are_maps() -> None:
    assert {f"megatron/{name}" for name in ("gpt_v0", "gpt_v1", "gpt_v2", "layer", "embedding", "gpt_moe")} <= set(MAPS)


@pytest.mark.parametrize("name", MAPS)
def test_the_maps_hold(name: str, tmp_path: Path) -> None:
    """For any config, with nothing to complain of; and for one, over 4 ranks."""
    assert mapdsl.load(name).check() == []
    checked = mapdsl.load(name).checked.map
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 8}))
    needs_version = any(param.name == "version" for param in checked.params.values()) and "_v" not in name
    words = ["--param", "version=2"] if needs_version else []
    words += ["--ranks", "tp=4"] if checked.meshes else []
    done = run("check", name, "--config", str(tmp_path / "config.json"), *words)
    assert done.returncode == 0, done.stdout + done.stderr


# --- whole models ---

SPELLINGS = [("encoder", "self_attention"), ("transformer", "attention"), ("transformer", "self_attention")]


@pytest.mark.parametrize(("encoder", "attention"), SPELLINGS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_whole_model(version: float, encoder: str, attention: str) -> None:
    """Read as GPT-2, whatever its parts are called, and given back under the names that it had."""
    state = megatron_gpt(version, encoder, attention)
    converts = adapter(f"megatron/gpt_v{int(version)}")
    found = converts.from_megatron(state)
    assert_equal(found, gpt2(state, version, encoder, attention))
    assert_equal(converts.to_megatron(found), state)
    del found["lm_head.weight"]  # as transformers saves it
    found["transformer.h.0.attn.bias"] = torch.ones(1, 1, 9, 9)  # as it saved it once
    assert_equal(converts.to_megatron(found), state)


def test_a_model_whose_version_is_a_param() -> None:
    state = megatron_gpt(1.0)
    assert_equal(adapter("megatron/gpt", version=1).from_megatron(state), gpt2(state, 1.0))


def test_norms_of_later_megatrons() -> None:
    state = megatron_gpt(2.0)
    words = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}
    later = {}
    for name, tensor in state.items():
        for old, new in {**words, "final_layernorm": "final_norm"}.items():
            name = name.replace(old, new)
        later[name] = tensor
    assert later.keys() != state.keys()
    assert_equal(adapter("megatron/gpt_v2").from_megatron(later), gpt2(state, 2.0))


# --- ranks ---


def cut_rank(state: State, version: float, count: int, rank: int) -> State:
    own = cut({name.removeprefix("language_model."): tensor for name, tensor in state.items()}, count, rank, version)
    return {f"language_model.{name}": tensor for name, tensor in own.items()}


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("version", VERSIONS)
def test_ranks_hold_what_megatron_gives_them(version: float, count: int) -> None:
    """The vocabulary is padded for the number of ranks: 48 rows for 1, 2 or 3, 64 for 4 or 8."""
    converts = adapter(f"megatron/gpt_v{int(version)}")
    whole = megatron_gpt(version)
    padded = megatron_gpt(version, ranks=count)
    shards = [cut_rank(padded, version, count, rank) for rank in range(count)]
    for rank, shard in enumerate(shards):
        assert_equal(converts.shard(whole, {"tp": count}, {"tp": rank}, side="megatron"), shard)
        mine = converts.at({"tp": count}, {"tp": rank})
        hf = converts.shard(gpt2(whole, version), {"tp": count}, {"tp": rank})
        assert_equal(mine.from_megatron(shard), hf)
    assert_equal(converts.merge(shards, {"tp": count}, side="megatron"), whole)


def test_a_cut_through_a_head() -> None:
    with pytest.raises(ConversionError, match="P453.*axis `h` has 8 positions, .* over 16 ranks"):
        adapter("megatron/gpt_v2").shard(megatron_gpt(2.0), {"tp": 16}, {"tp": 0}, side="megatron")


def test_stages_of_a_pipeline_count_their_own_layers() -> None:
    converts, state = adapter("megatron/gpt_v2"), megatron_gpt(2.0)
    ranks = {"pp": 2, "tp": 2}
    hf = gpt2(state, 2.0)
    for rank in places(converts, ranks):
        mine = converts.at(ranks, rank)
        made = mine.to_megatron(converts.shard(hf, ranks, rank))
        layers = {int(name.split(".")[3]) for name in made if ".layers." in name}
        assert layers == {0}
        number = f"language_model.encoder.layers.{rank['pp']}.mlp.dense_h_to_4h.weight"
        own = made["language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"]
        assert torch.equal(own, state[number].chunk(2)[rank["tp"]])
        ends = {"embedding" in name for name in made}, {"final_layernorm" in name for name in made}
        assert ends == (({True, False}, {False}) if rank["pp"] == 0 else ({True, False}, {True, False}))
        # The output layer is the last stage's own copy of the embeddings.
        assert ("word_embeddings_for_head.weight" in made) == (rank["pp"] == 1)


# --- layer files ---


@pytest.mark.parametrize("attention", ["attention", "self_attention"])
@pytest.mark.parametrize("version", VERSIONS)
def test_layer_files(version: float, attention: str) -> None:
    torch.manual_seed(20)
    state = layer(attention=attention)
    converts = adapter("megatron/layer", version=int(version))
    assert_equal(converts.from_megatron(state), gpt2_layer(state, version, attention))
    assert_equal(converts.to_megatron(converts.from_megatron(state)), state)
    shards = [cut(state, 4, rank, version) for rank in range(4)]
    for rank in range(2):
        found = converts.reshard(shards, {"tp": 4}, {"tp": 2}, {"tp": rank}, side="megatron")
        assert_equal(found, cut(state, 2, rank, version))


def test_layer_files_of_the_ends() -> None:
    words, places_ = torch.randn(48, HIDDEN), torch.randn(9, HIDDEN)
    converts = adapter("megatron/embedding")
    found = converts.from_megatron({"word_embeddings.weight": words, "position_embeddings.weight": places_})
    assert_equal(found, {"wte.weight": words[:VOCAB], "wpe.weight": places_})
    norm = {"weight": torch.randn(4), "bias": torch.randn(4)}
    assert_equal(adapter("megatron/final_norm").from_megatron(norm), {f"ln_f.{p}": t for p, t in norm.items()})


# --- experts ---


def moe_mlp(experts: int, residual: bool = False) -> State:
    torch.manual_seed(21)
    moe = "moe.deepspeed_moe" if residual else "deepspeed_moe"
    state = {f"{moe}.gate.wg.weight": torch.randn(experts, HIDDEN)}
    mlp = {name.removeprefix("mlp."): shape for name, shape in layer().items() if name.startswith("mlp.")}
    for number in range(experts):
        state |= {f"{moe}.experts.deepspeed_experts.{number}.{n}": torch.randn(t.shape) for n, t in mlp.items()}
    if residual:
        state |= {f"mlp.{name}": tensor for name, tensor in mlp.items()}
        state |= {"coefficient.weight": torch.randn(2, HIDDEN), "coefficient.bias": torch.randn(2)}
    return state


@pytest.mark.parametrize("residual", [False, True])
def test_experts_are_stacked(residual: bool) -> None:
    state = moe_mlp(6, residual)
    moe = "moe.deepspeed_moe" if residual else "deepspeed_moe"
    of = [
        {n.removeprefix(f"{moe}.experts.deepspeed_experts.{e}."): t for n, t in state.items() if f"experts.{e}." in n}
        for e in range(6)
    ]
    expected = {
        "gate.weight": state[f"{moe}.gate.wg.weight"],
        "experts.c_fc.weight": torch.stack([one["dense_h_to_4h.weight"].T for one in of]),
        "experts.c_fc.bias": torch.stack([one["dense_h_to_4h.bias"] for one in of]),
        "experts.c_proj.weight": torch.stack([one["dense_4h_to_h.weight"].T for one in of]),
        "experts.c_proj.bias": torch.stack([one["dense_4h_to_h.bias"] for one in of]),
    }
    if residual:
        mlp = {name: tensor for name, tensor in state.items() if name.startswith("mlp.")}
        expected |= {f"coefficient.{p}": state[f"coefficient.{p}"] for p in ("weight", "bias")}
        expected |= {
            "residual.c_fc.weight": mlp["mlp.dense_h_to_4h.weight"].T.contiguous(),
            "residual.c_fc.bias": mlp["mlp.dense_h_to_4h.bias"],
            "residual.c_proj.weight": mlp["mlp.dense_4h_to_h.weight"].T.contiguous(),
            "residual.c_proj.bias": mlp["mlp.dense_4h_to_h.bias"],
        }
    converts = adapter("megatron/moe_mlp", {**CONFIG, "num_experts": 6})
    found = converts.from_megatron(state)
    assert_equal(found, expected)
    assert_equal(converts.to_megatron(found), state)


@pytest.mark.parametrize("is_cut", [False, True])
def test_experts_over_ranks_count_their_own(is_cut: bool) -> None:
    """Each rank of `ep` has 3 of 6 experts, as 0 to 2; tensor parallel ranks have them whole, or cut."""
    state = moe_mlp(6)
    converts = adapter("megatron/moe_mlp", {**CONFIG, "num_experts": 6, "enable_expert_tensor_parallelism": is_cut})
    ranks = {"tp": 2, "ep": 2}
    shards = [converts.shard(state, ranks, rank, side="megatron") for rank in places(converts, ranks)]
    stem = "deepspeed_moe.experts.deepspeed_experts."
    last = shards[3]  # tp 1, ep 1
    assert {int(name.split(".")[3]) for name in last if name.startswith(stem)} == {0, 1, 2}
    expected = state[f"{stem}5.dense_h_to_4h.weight"]
    assert torch.equal(last[f"{stem}2.dense_h_to_4h.weight"], expected.chunk(2)[1] if is_cut else expected)
    assert last["deepspeed_moe.gate.wg.weight"].shape == (6, HIDDEN)
    assert_equal(converts.merge(shards, ranks, side="megatron"), state)


def test_a_model_with_experts_in_every_other_layer() -> None:
    dense = megatron_gpt(2.0)
    state = {name: tensor for name, tensor in dense.items() if ".layers.1.mlp." not in name}
    state |= {f"language_model.encoder.layers.1.mlp.{name}": tensor for name, tensor in moe_mlp(4).items()}
    converts = adapter("megatron/gpt_moe", {**CONFIG, "num_experts": 4}, version=2)
    found = converts.from_megatron(state)
    expected = {name: tensor for name, tensor in gpt2(dense, 2.0).items() if ".h.1.mlp." not in name}
    assert {name for name in found if name not in expected} == {
        f"transformer.h.1.mlp.{name}"
        for name in ("gate.weight", *(f"experts.{w}.{p}" for w in ("c_fc", "c_proj") for p in ("weight", "bias")))
    }
    assert_equal({name: found[name] for name in expected}, expected)
    assert_equal(converts.to_megatron(found), state)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_layer_files_is_the_whole_model(tmp_path: Path, version: float) -> None:
    """`mapdsl convert` of layer files of two ranks gives the GPT-2 that the map of whole shards gives."""
    whole = mapdsl.load(f"megatron/gpt_v{int(version)}").adapter(CONFIG)
    state = megatron_gpt(version, ranks=2)
    renamed = {
        "language_model.embedding.": "layer_01/",
        **{f"language_model.encoder.layers.{n}.": f"layer_{n + 3:02d}/" for n in range(LAYERS)},
        "language_model.encoder.final_layernorm.": f"layer_{LAYERS + 4:02d}/",
    }
    (tmp_path / "pipe").mkdir()
    for rank in range(2):
        share = cut(state, 2, rank, version)
        files: dict[str, State] = {}
        for name, tensor in share.items():
            start = next(one for one in renamed if name.startswith(one))
            file = f"{renamed[start][:-1]}-model_{rank:02d}-model_states.pt"
            files.setdefault(file, {})[name.removeprefix(start)] = tensor
        for file, held in files.items():
            torch.save(held, tmp_path / "pipe" / file)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = {"ranks": {"tp": (2, 1)}, "config": tmp_path / "config.json", "params": {"version": int(version)}}
    mapdsl.convert_ranks(tmp_path / "pipe", tmp_path / "hf", "megatron/layer_files", **options)
    expected = whole.merge([cut(state, 2, rank, version) for rank in range(2)], {"tp": 2}, side="megatron")
    found = load_file(str(tmp_path / "hf" / "model.safetensors"))
    assert_same(dict(sorted(found.items())), dict(sorted(whole.from_megatron(expected).items())))
