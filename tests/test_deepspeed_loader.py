"""`mapdsl.deepspeed`: shards loaded for other numbers of ranks, against shards that were cut by hand."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mapdsl.deepspeed import MegatronSDLoader, SDLoaderFactory
from mapdsl.runtime.codecs.group_int import GroupInt
from tests.helpers import megatron
from tests.helpers.megatron import RESIZES, VERSIONS, assert_same, cut, layer, save, save_shards


@pytest.fixture(scope="module")
def state() -> megatron.State:
    torch.manual_seed(1)
    return megatron.whole()


def loader(paths: list[str], version: float | None = None, **options: Any) -> MegatronSDLoader:
    return SDLoaderFactory.get_sd_loader(paths, None, "Megatron", version, **options)


# --- merged, split, as it is ---


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("count", "ranks"), RESIZES)
def test_every_rank_gets_its_share(
    state: megatron.State, count: int, ranks: int, version: float, tmp_path: Path
) -> None:
    paths = save(tmp_path, state, count, version, iteration=7, mp_world_size=count)
    loading = loader(paths, version)
    for rank in range(ranks):
        path, found, (scales, merged) = loading.load(ranks, rank)
        assert_same(found["module"], cut(state, ranks, rank, version))
        assert (path, scales, merged) == (paths[rank * count // ranks], None, max(count // ranks, 1))
        assert (found["iteration"], found["mp_world_size"], list(found)) == (
            7,
            ranks,
            ["module", "iteration", "mp_world_size"],
        )


@pytest.mark.parametrize("version", [*VERSIONS, 3.0])
def test_the_version_is_the_files_where_none_is_asked_for(
    state: megatron.State, version: float, tmp_path: Path
) -> None:
    beside = {"checkpoint_version": version} if version else {}
    paths = save(tmp_path, state, 2, version, **beside)
    _, found, _ = loader(paths).load(1, 0)
    assert_same(found["module"], state)


@pytest.mark.parametrize("heads", [megatron.HEADS, None])
def test_heads_that_are_known_change_nothing_where_they_stay_whole(
    state: megatron.State, heads: int | None, tmp_path: Path
) -> None:
    paths = save(tmp_path, state, 2, 0)
    for rank in range(4):
        _, found, _ = loader(paths, 0, num_heads=heads).load(4, rank)
        assert_same(found["module"], cut(state, 4, rank, 0))


def test_grouped_queries(tmp_path: Path) -> None:
    """8 heads of queries, 4 of keys and values: by groups in version 2.0, one after the other in version 0."""
    query, key, value = torch.arange(16.0), torch.arange(100.0, 108), torch.arange(200.0, 208)
    joined = {"attention.query_key_value.bias": torch.cat([query, key, value])}
    config = {"num_attention_heads": 8, "num_query_groups": 4}
    (path,) = save_shards(tmp_path / "0", [joined])
    _, found, _ = loader([path], 0, config=config).load(2, 1)
    assert found["module"]["attention.query_key_value.bias"].tolist() == [
        *range(8, 16),
        *range(104, 108),
        *range(204, 208),
    ]

    groups = torch.cat([query.view(4, 4), key.view(4, 2), value.view(4, 2)], dim=1)
    (path,) = save_shards(tmp_path / "2", [{"attention.query_key_value.bias": groups.reshape(-1)}])
    _, found, _ = loader([path], 2.0, config=argparse.Namespace(**config)).load(4, 3)
    assert torch.equal(found["module"]["attention.query_key_value.bias"], groups[3])


def test_a_number_of_groups_that_is_not_used(state: megatron.State, tmp_path: Path) -> None:
    """Megatron-LM's arguments have `num_query_groups=1` where queries are not grouped, too."""
    arguments = {"num_attention_heads": megatron.HEADS, "num_query_groups": 1, "group_query_attention": False}
    paths = save(tmp_path, state, 1, 0, args=argparse.Namespace(**arguments))
    assert_same(loader(paths).load(4, 3)[1]["module"], cut(state, 4, 3, 0))


def test_a_gated_mlp_is_cut_within_gate_and_up(tmp_path: Path) -> None:
    """Twice as many rows as the other weight has columns: DeepSpeed would cut the gate off the up projection."""
    gate, up, down = torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8)
    whole = {"mlp.dense_h_to_4h.weight": torch.cat([gate, up]), "mlp.dense_4h_to_h.weight": down}
    (path,) = save_shards(tmp_path / "whole", [whole])
    shares = [loader([path]).load(2, rank)[1]["module"] for rank in range(2)]
    for share, half in zip(shares, [slice(0, 4), slice(4, 8)], strict=True):
        assert torch.equal(share["mlp.dense_h_to_4h.weight"], torch.cat([gate[half], up[half]]))
    _, found, _ = loader(save_shards(tmp_path / "cut", shares)).load(1, 0)
    assert_same(found["module"], whole)


@pytest.mark.parametrize("is_cut", [True, False])
def test_experts_are_cut_or_whole_as_the_arguments_say(is_cut: bool, tmp_path: Path) -> None:
    name = "layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.3.dense_h_to_4h.weight"
    paths = save_shards(
        tmp_path,
        [{name: torch.randn(8, 4), "layers.1.mlp.deepspeed_moe.gate.wg.weight": torch.randn(4, 4)}],
        args=argparse.Namespace(enable_expert_tensor_parallelism=is_cut),
    )
    _, found, _ = loader(paths).load(2, 0)
    assert found["module"][name].shape == (4 if is_cut else 8, 4)
    assert found["args"].enable_expert_tensor_parallelism == is_cut


# --- where the module is ---


@pytest.mark.parametrize("key", ["module", "model", "weights"])
def test_the_module_stands_under_any_key(state: megatron.State, key: str, tmp_path: Path) -> None:
    torch.save({key: state, "rng": [torch.arange(3)]}, tmp_path / "a.pt")
    asked = {} if key != "weights" else {"module_key": key}
    _, found, _ = loader([str(tmp_path / "a.pt")], 0).load(2, 1, **asked)
    assert_same(found[key], cut(state, 2, 1, 0))
    assert torch.equal(found["rng"][0], torch.arange(3))


def test_layer_files_hold_a_module_each(tmp_path: Path) -> None:
    """What a pipeline saves: `layer_XX-model_YY-model_states.pt`, read with `module_key=None`."""
    files = [
        {"word_embeddings.weight": torch.randn(8, 4), "position_embeddings.weight": torch.randn(5, 4)},
        layer(attention="self_attention"),
        {"weight": torch.randn(4), "bias": torch.randn(4)},
    ]
    for number, whole in enumerate(files):
        paths = [str(tmp_path / f"layer_{number:02d}-model_{rank:02d}-model_states.pt") for rank in range(4)]
        for rank, path in enumerate(paths):
            torch.save(cut(whole, 4, rank, 2.0), path)
        for rank in range(2):
            path, found, (_, merged) = loader(paths, 2.0).load(2, rank, module_key=None, is_pipe_parallel=True)
            assert_same(found, cut(whole, 2, rank, 2.0))
            assert (path, merged) == (paths[2 * rank], 2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_pipelines_files_of_ranks_are_alike(ranks: int, tmp_path: Path) -> None:
    """`mp_rank_XX` files of a pipeline are loaded whole: its own with as many ranks, else the first."""
    paths = [str(tmp_path / f"mp_rank_{rank:02d}_model_states.pt") for rank in range(2)]
    for rank, path in enumerate(paths):
        torch.save({"module": None, "saved_by": rank}, path)
    path, found, _ = loader(paths).load(ranks, ranks - 1, is_pipe_parallel=True)
    assert (path, found["saved_by"]) == ((paths[1], 1) if ranks == 2 else (paths[0], 0))


def test_a_nested_module_comes_back_nested(state: megatron.State, tmp_path: Path) -> None:
    """Megatron-LM saves dicts in dicts, and some values that are no tensors."""
    nested = OrderedDict(
        language_model={
            "embedding": {"word_embeddings": {"weight": state["word_embeddings.weight"]}},
            "encoder": layer("layers.0.", "self_attention") | {"layers.0.core._extra_state": None},
        },
    )
    flat = {
        "embedding": {"word_embeddings": {"weight": state["word_embeddings.weight"]}},
        "encoder": {name: value for name, value in nested["language_model"]["encoder"].items() if value is not None},
    }
    torch.save({"model": nested, "checkpoint_version": 2.0}, tmp_path / "a.pt")
    shares = [loader([str(tmp_path / "a.pt")]).load(2, rank)[1] for rank in range(2)]
    for rank, share in enumerate(shares):
        found = share["model"]["language_model"]
        assert found["encoder"].pop("layers.0.core._extra_state", "gone") is None
        assert_same(found["encoder"], cut(flat["encoder"], 2, rank, 2.0))
        expected = state["word_embeddings.weight"].chunk(2)[rank]
        assert torch.equal(found["embedding"]["word_embeddings"]["weight"], expected)


# --- how files are read ---


class Engine:
    """Reads files as DeepSpeed's engines do, and notes which."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def load(self, path: str, map_location: Any = None) -> Any:
        self.read.append(path)
        return torch.load(path, map_location=map_location, weights_only=True)


def test_an_engine_reads_the_files_of_the_rank_only(state: megatron.State, tmp_path: Path) -> None:
    paths = save(tmp_path, state, 4, 0)
    engine = Engine()
    loading = SDLoaderFactory.get_sd_loader(paths, engine, version=0)
    engine.read.clear()
    _, found, _ = loading.load(2, 1)
    assert engine.read == paths[2:]
    assert_same(found["module"], cut(state, 2, 1, 0))


def test_what_is_loaded_has_nothing_to_do_with_the_files(state: megatron.State, tmp_path: Path) -> None:
    """A file may be overwritten while its tensors are in use: none is a mapping of it."""
    paths = save(tmp_path, state, 2, 0, rng=torch.arange(4))
    loaded = [loader(paths, 0).load(ranks, 0)[1] for ranks in (1, 2, 4)]
    for path in paths:
        size = Path(path).stat().st_size
        with open(path, "r+b") as file:
            file.write(b"\0" * size)
    for ranks, found in zip((1, 2, 4), loaded, strict=True):
        assert_same(found["module"], cut(state, ranks, 0, 0))
        assert torch.equal(found["rng"], torch.arange(4))


# --- the JSON file ---


def test_the_json_file_of_a_checkpoint(state: megatron.State, tmp_path: Path) -> None:
    save(tmp_path, state, 2, 2.0)
    names = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(2)]
    manifest = {"type": "Megatron", "version": 2.0, "checkpoints": names, "base_dir": str(tmp_path), "mp_size": 2}
    (tmp_path / "checkpoint.json").write_text(json.dumps(manifest))
    for source in (str(tmp_path / "checkpoint.json"), tmp_path / "checkpoint.json", manifest):
        loading = SDLoaderFactory.get_sd_loader_json(source, None)
        assert isinstance(loading, MegatronSDLoader)
        assert_same(loading.load(1, 0)[1]["module"], state)


@pytest.mark.parametrize("kind", ["bloom", "BLOOM", "ds_model"])
def test_descriptions_that_are_read_otherwise_come_back(kind: str) -> None:
    manifest = {
        "type": kind,
        "checkpoints": {"non_tp": ["non-tp.pt"], "tp": ["tp_00_00.pt", "tp_01_00.pt"]},
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": 2,
        "dtype": "float16",
    }
    assert SDLoaderFactory.get_sd_loader_json(manifest, None) is manifest


# --- quantised ---


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values of a weight whose groups lie one behind the other."""
    runs = codes.float().view(scales.numel(), -1)
    return (runs * scales.view(-1, 1)).view(codes.shape)


def row_of(scales: torch.Tensor, number: int, kind: int, groups: int) -> torch.Tensor:
    row = scales[number, kind]
    assert (row[groups:] == 0).all() and (row[:groups] > 0).all()
    return row[:groups]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("count", "ranks"), RESIZES)
def test_quantised_weights_are_those_that_were_loaded(
    state: megatron.State, count: int, ranks: int, version: float, tmp_path: Path
) -> None:
    """Within a step of the weight (the largest value saturates), by the scale of its group; others are as they were."""
    paths = save(tmp_path, state, count, version)
    rank = ranks - 1
    _, found, (scales, merged) = loader(paths, version).load(ranks, rank, quantize=True, quantize_groups=4)
    expected = cut(state, ranks, rank, version)
    assert scales is not None and scales.shape == (megatron.LAYERS, 4, 8 * merged)
    kinds = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    for name, tensor in found["module"].items():
        stem = name.removesuffix(".weight")
        kind = next((n for n, kind in enumerate(kinds) if stem.endswith(kind) and stem != name), None)
        if kind is None:
            assert torch.equal(tensor, expected[name]), name
            continue
        groups = (8 if kind > 1 else 4) * merged
        row = row_of(scales, int(name.split(".")[2]), kind, groups)
        if kind in (0, 2):
            values = dequantised(tensor, row)
        else:  # each merged shard has its groups, and its columns
            parts = zip(tensor.chunk(merged, dim=1), row.view(-1, merged).T, strict=True)
            values = torch.cat([dequantised(part.contiguous(), own) for part, own in parts], dim=1)
        assert tensor.dtype == torch.int8
        assert ((values - expected[name]).abs() <= row.max() * 1.01).all(), name


def test_a_quantised_split_is_what_a_rank_would_quantise(state: megatron.State, tmp_path: Path) -> None:
    paths = save(tmp_path / "whole", state, 1, 0)
    cut_paths = save(tmp_path / "cut", state, 2, 0)
    for rank in range(2):
        _, split, (scales, merged) = loader(paths, 0).load(2, rank, quantize=True, quantize_groups=4)
        _, same, (others, _) = loader(cut_paths, 0).load(2, rank, quantize=True, quantize_groups=4)
        assert_same(split["module"], same["module"])
        assert scales is not None and others is not None and torch.equal(scales, others) and merged == 1


def test_without_extra_groups_and_with_fewer_bits(state: megatron.State, tmp_path: Path) -> None:
    paths = save(tmp_path, state, 1, 0)
    _, found, (scales, _) = loader(paths, 0).load(1, 0, "auto", False, True, 4, 2, False)
    name = "transformer.layers.1.mlp.dense_4h_to_h.weight"
    parts = GroupInt("int4", 4, 2).encode(name, state[name]).parts
    assert scales is not None and scales.shape == (megatron.LAYERS, 4, 2)
    assert torch.equal(scales[1, 3:], parts[f"{name}_scale"])
    assert torch.equal(found["module"][name], parts[name]) and found["module"][name].abs().max() == 8


def test_a_file_without_such_weights_has_no_scales(tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(4), "bias": torch.randn(4)}, tmp_path / "a.pt")
    _, _, (scales, merged) = loader([str(tmp_path / "a.pt")]).load(2, 0, module_key=None, quantize=True)
    assert (scales, merged) == (None, 1)
