"""What DeepSpeed's loader does wrong, each beside what is right.

A test `test_X` says what is right, and `test_X_in_deepspeed` that the installed DeepSpeed does otherwise, so that the
claim is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mapdsl.runtime.errors import ConversionError
from tests.helpers import megatron
from tests.helpers.megatron import HEAD_DIM, HIDDEN, assert_same, cut, layer, save, save_shards
from tests.test_deepspeed_loader import loader

QKV = "transformer.layers.0.attention.query_key_value.weight"


@pytest.fixture
def theirs() -> Any:
    """DeepSpeed's loader of a list of files."""
    factory = pytest.importorskip("deepspeed.runtime.state_dict_factory").SDLoaderFactory
    return lambda paths, version=None: factory.get_sd_loader(paths, None, "Megatron", version)


@pytest.fixture
def state() -> megatron.State:
    torch.manual_seed(2)
    return megatron.whole()


# --- a module of dicts in dicts ---


def nested_files(folder: Path, count: int) -> list[str]:
    torch.manual_seed(3)
    whole = layer("layers.0.")
    return save_shards(folder, [{"language_model": {"transformer": cut(whole, count, r, 0)}} for r in range(count)])


def test_a_nested_language_model_is_split_and_merged(tmp_path: Path) -> None:
    (path,) = nested_files(tmp_path / "whole", 1)
    paths = nested_files(tmp_path / "cut", 2)
    whole = torch.load(path)["module"]["language_model"]["transformer"]
    assert_same(loader(paths).load(1, 0)[1]["module"]["language_model"]["transformer"], whole)
    for rank in range(2):
        _, found, _ = loader([path]).load(2, rank)
        assert_same(found["module"]["language_model"]["transformer"], cut(whole, 2, rank, 0))


@pytest.mark.heavy
def test_a_nested_language_model_is_split_and_merged_in_deepspeed(tmp_path: Path, theirs: Any) -> None:
    """It is given whole to every rank, and not merged at all."""
    (path,) = nested_files(tmp_path / "whole", 1)
    _, found, _ = theirs([path]).load(2, 0)
    whole = torch.load(path)["module"]["language_model"]["transformer"]
    assert_same(found["module"]["language_model"]["transformer"], whole)
    with pytest.raises(AssertionError, match="is not found in the checkpoint"):
        theirs(nested_files(tmp_path / "cut", 2)).load(1, 0)


# --- final_linear.weight ---


def test_final_linear_is_merged(state: megatron.State, tmp_path: Path) -> None:
    state["final_linear.weight"] = torch.randn(6, 4)
    _, found, _ = loader(save(tmp_path, state, 2, 0)).load(1, 0)
    assert_same(found["module"], state)


@pytest.mark.heavy
def test_final_linear_is_merged_in_deepspeed(state: megatron.State, tmp_path: Path, theirs: Any) -> None:
    """It is split, but of the parts the first is kept."""
    state["final_linear.weight"] = torch.randn(6, 4)
    (path,) = save(tmp_path / "whole", state, 1, 0)
    assert torch.equal(theirs([path]).load(2, 1)[1]["module"]["final_linear.weight"], state["final_linear.weight"][3:])
    _, found, _ = theirs(save(tmp_path / "cut", state, 2, 0)).load(1, 0)
    assert torch.equal(found["module"]["final_linear.weight"], state["final_linear.weight"][:3])


# --- quantised queries, keys and values of version 0 ---


def marked(state: megatron.State) -> megatron.State:
    """Queries are near 1, keys near 2, values near 3."""
    rows = torch.arange(1.0, 4).repeat_interleave(megatron.HEADS * HEAD_DIM)
    return state | {QKV: rows[:, None].expand(-1, HIDDEN).clone(), QKV.replace("weight", "bias"): rows.clone()}


@pytest.mark.parametrize("groups", [4, 8])
def test_quantised_version_0_queries_keys_and_values_stay_in_order(
    state: megatron.State, groups: int, tmp_path: Path
) -> None:
    state = marked(state)
    _, found, (scales, _) = loader(save(tmp_path, state, 2, 0)).load(1, 0, quantize=True, quantize_groups=groups)
    assert torch.equal(found["module"][QKV.replace("weight", "bias")], state[QKV.replace("weight", "bias")])
    scale = scales[0, 0, : 2 * groups].repeat_interleave(state[QKV].numel() // (2 * groups))
    values = found["module"][QKV].float() * scale.view(state[QKV].shape)
    assert torch.allclose(values, state[QKV], atol=0.05)


@pytest.mark.heavy
def test_quantised_version_0_queries_keys_and_values_stay_in_order_in_deepspeed(
    state: megatron.State, tmp_path: Path, theirs: Any
) -> None:
    """Queries, keys and values of the first shard come before those of the second."""
    state = marked(state)
    paths = save(tmp_path, state, 2, 0)
    _, found, _ = theirs(paths).load(1, 0, quantize=True, quantize_groups=4)
    bias = QKV.replace("weight", "bias")
    assert torch.equal(found["module"][bias], torch.cat([cut(state, 2, rank, 0)[bias] for rank in range(2)]))
    assert not torch.equal(found["module"][bias], state[bias])
    assert torch.equal(theirs(paths).load(1, 0)[1]["module"][bias], state[bias])  # right, where it is not quantised


# --- split and quantised ---


def test_a_split_can_be_quantised(state: megatron.State, tmp_path: Path) -> None:
    (path,) = save(tmp_path, state, 1, 2.0)
    _, found, (scales, merged) = loader([path], 2.0).load(2, 1, quantize=True, quantize_groups=4)
    assert found["module"][QKV].dtype == torch.int8 and scales.shape == (megatron.LAYERS, 4, 8) and merged == 1


@pytest.mark.heavy
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_can_be_quantised_in_deepspeed(
    ranks: int, extra: bool, state: megatron.State, tmp_path: Path, theirs: Any
) -> None:
    (path,) = save(tmp_path, state, 1, 2.0)
    with pytest.raises((IndexError, RuntimeError)):
        theirs([path], 2.0).load(ranks, 0, quantize=True, quantize_groups=4, mlp_extra_grouping=extra)


# --- extra groups of an MLP ---


def test_an_mlp_is_known_by_its_name(state: megatron.State, tmp_path: Path) -> None:
    _, _, (scales, _) = loader(save(tmp_path, state, 2, 0)).load(2, 0, quantize=True, quantize_groups=4)
    assert [int((row > 0).sum()) for row in scales[0]] == [4, 4, 8, 8]


@pytest.mark.heavy
def test_an_mlp_is_known_by_its_name_in_deepspeed(state: megatron.State, tmp_path: Path, theirs: Any) -> None:
    """It is known by its shape, which over 2 ranks the output of attention has too."""
    _, _, (scales, _) = theirs(save(tmp_path, state, 2, 0)).load(2, 0, quantize=True, quantize_groups=4)
    assert [int((row > 0).sum()) for row in scales[0]] == [4, 8, 8, 8]


# --- tensors that nobody knows ---

UNKNOWN = ["lm_head.weight", "inter_attention.key_value.weight", "mlp.gate_proj.weight"]
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts.0.dense_h_to_4h.weight"


@pytest.mark.parametrize("name", [*UNKNOWN, EXPERT])
def test_unknown_tensors_are_an_error(state: megatron.State, name: str, tmp_path: Path) -> None:
    state[name] = torch.randn(8, 4)
    for paths, ranks in ((save(tmp_path / "1", state, 1, 0), 2), (save(tmp_path / "2", state, 2, 0), 1)):
        with pytest.raises(ConversionError, match=f"R603.*no rule reads {name} of rank .* given as `map=`.*mp_rank_00"):
            loader(paths).load(ranks, 0)


def test_a_map_of_ones_own_says_how_a_tensor_is_cut(state: megatron.State, tmp_path: Path) -> None:
    text = 'map mine: shards <-> model\ninclude "megatron/loader.map"\nmesh tp shards W\n'
    (tmp_path / "mine.map").write_text(text + "{..}.lm_head.weight [W d] <-> {..}.lm_head.weight else\n")
    state["lm_head.weight"] = torch.randn(8, 4)
    (path,) = save(tmp_path, state, 1, 0)
    _, found, _ = loader([path], map=tmp_path / "mine.map").load(2, 1)
    assert torch.equal(found["module"]["lm_head.weight"], state["lm_head.weight"][4:])
    assert torch.equal(found["module"][QKV], cut(state, 2, 1, 0)[QKV])


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*UNKNOWN, EXPERT])
def test_unknown_tensors_are_an_error_in_deepspeed(
    state: megatron.State, name: str, tmp_path: Path, theirs: Any
) -> None:
    """Every rank gets all of it, and of different parts the first is kept."""
    state[name] = torch.randn(8, 4)
    (path,) = save(tmp_path, state, 1, 0)
    assert torch.equal(theirs([path]).load(2, 1)[1]["module"][name], state[name])


# --- cuts through heads ---

SIX = {"num_heads": 6}


def test_a_cut_through_a_head_is_an_error(tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = layer("transformer.layers.0.", heads=6, ffn=48)
    (path,) = save_shards(tmp_path, [state])
    for version in megatron.VERSIONS:
        with pytest.raises(ConversionError, match="P453.*axis `h` has 6 positions, .* over 4 ranks of `tp`"):
            loader([path], version, **SIX).load(4, 0)
        _, found, _ = loader([path], version, **SIX).load(3, 1)
        assert_same(found["module"], cut(state, 3, 1, version, heads=6))
    with pytest.raises(ConversionError, match="P453.*axis `g` has 2 positions, .* over 3 ranks"):
        loader([path], 2.0, config={"num_attention_heads": 6, "num_query_groups": 2}).load(3, 0)


@pytest.mark.heavy
def test_a_cut_through_a_head_is_an_error_in_deepspeed(tmp_path: Path, theirs: Any) -> None:
    """Each rank gets the rows of one head and a half."""
    (path,) = save_shards(tmp_path, [layer("transformer.layers.0.", heads=6)])
    _, found, _ = theirs([path], 2.0).load(4, 0)
    assert found["module"][QKV].shape[0] == 3 * HEAD_DIM * 6 // 4


# --- layer files of embeddings and norms ---


def embedding_files(folder: Path) -> tuple[megatron.State, list[str]]:
    whole = {"word_embeddings.weight": torch.randn(8, 4), "position_embeddings.weight": torch.randn(5, 4)}
    paths = [str(folder / f"layer_01-model_{rank:02d}-model_states.pt") for rank in range(2)]
    for rank, path in enumerate(paths):
        torch.save(cut(whole, 2, rank, 0), path)
    return whole, paths


def test_embeddings_by_themselves_are_merged(tmp_path: Path) -> None:
    whole, paths = embedding_files(tmp_path)
    assert_same(loader(paths, 2.0).load(1, 0, module_key=None, is_pipe_parallel=True)[1], whole)


@pytest.mark.heavy
def test_embeddings_by_themselves_are_merged_in_deepspeed(tmp_path: Path, theirs: Any) -> None:
    _, paths = embedding_files(tmp_path)
    with pytest.raises(AssertionError, match="attention.dense.weight is not found in the checkpoint"):
        theirs(paths, 2.0).load(1, 0, module_key=None, is_pipe_parallel=True)


# --- shards that are views, and what they say of themselves ---


def storage(state: megatron.State) -> dict[str, int]:
    return {name: tensor.untyped_storage().nbytes() for name, tensor in state.items()}


def test_shards_own_their_memory(state: megatron.State, tmp_path: Path) -> None:
    (path,) = save(tmp_path, state, 1, 2.0)
    _, found, _ = loader([path], 2.0).load(8, 3)
    assert storage(found["module"]) == {name: tensor.nbytes for name, tensor in found["module"].items()}
    assert all(tensor.is_contiguous() for tensor in found["module"].values())


@pytest.mark.heavy
def test_shards_own_their_memory_in_deepspeed(state: megatron.State, tmp_path: Path, theirs: Any) -> None:
    """An eighth is a view of the whole: saved, it takes as much."""
    (path,) = save(tmp_path, state, 1, 2.0)
    _, found, _ = theirs([path], 2.0).load(8, 3)
    assert storage(found["module"])[QKV] == state[QKV].nbytes == 8 * found["module"][QKV].nbytes
    assert not found["module"]["transformer.layers.0.attention.dense.weight"].is_contiguous()


def saved_again(loading: Any, ranks: int, folder: Path) -> list[str]:
    paths = [str(folder / f"again_{rank}.pt") for rank in range(ranks)]
    for rank, path in enumerate(paths):
        torch.save(loading.load(ranks, rank)[1], path)
    return paths


def test_shards_that_were_split_can_be_loaded_again(state: megatron.State, tmp_path: Path) -> None:
    paths = saved_again(loader(save(tmp_path, state, 1, 0, mp_world_size=1)), 2, tmp_path)
    assert_same(loader(paths).load(1, 0)[1]["module"], state)


@pytest.mark.heavy
def test_shards_that_were_split_can_be_loaded_again_in_deepspeed(
    state: megatron.State, tmp_path: Path, theirs: Any
) -> None:
    """Each of the two still says that it is the only one."""
    paths = saved_again(theirs(save(tmp_path, state, 1, 0, mp_world_size=1)), 2, tmp_path)
    with pytest.raises(AssertionError, match="checkpoint count 2 is different from saved mp_world_size 1"):
        theirs(paths)


# --- copies ---


def differing(state: megatron.State, folder: Path) -> list[str]:
    shards = [cut(state, 2, rank, 0) for rank in range(2)]
    shards[1]["transformer.final_layernorm.bias"][5] += 1
    return save_shards(folder, shards)


def test_copies_are_compared(state: megatron.State, tmp_path: Path) -> None:
    paths = differing(state, tmp_path)
    with pytest.raises(ConversionError, match=r"R602.*final_layernorm\.bias differs.*at \[5\].*mp_rank_01"):
        loader(paths).load(1, 0)
    assert_same(loader(paths, compare=False).load(1, 0)[1]["module"], state)


@pytest.mark.heavy
def test_copies_are_compared_in_deepspeed(state: megatron.State, tmp_path: Path, theirs: Any) -> None:
    _, found, _ = theirs(differing(state, tmp_path)).load(1, 0)
    assert torch.equal(found["module"]["transformer.final_layernorm.bias"], state["transformer.final_layernorm.bias"])


# --- versions ---


def test_a_wrong_version_is_an_error(state: megatron.State, tmp_path: Path) -> None:
    paths = save(tmp_path, state, 2, 0, checkpoint_version=0)
    with pytest.raises(ConversionError, match="C505.*has checkpoint version 0, and is to be loaded as version 2.0"):
        loader(paths, 2.0)


@pytest.mark.heavy
def test_a_wrong_version_is_an_error_in_deepspeed(state: megatron.State, tmp_path: Path, theirs: Any) -> None:
    _, found, _ = theirs(save(tmp_path, state, 2, 0, checkpoint_version=0), 2.0).load(1, 0)
    assert not torch.equal(found["module"][QKV], state[QKV])
