"""Opening checkpoints of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.headers import NO_FILE
from mapdsl.checkpoint.tensors import LazyState

LISTINGS = Path(__file__).parent / "data" / "listings"


def shard(folder: Path, name: str, *tensors: str) -> None:
    safetensors.torch.save_file({t: torch.ones(2) for t in tensors}, folder / name, metadata={"format": "pt"})


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / name


def test_folder_with_index(tmp_path: Path) -> None:
    shard(tmp_path, "model-00002.safetensors", "a")
    shard(tmp_path, "model-00010.safetensors", "b", "c")
    shard(tmp_path, "consolidated.safetensors", "a", "b", "c")  # not in the index: another copy
    path = index(
        tmp_path, {"c": "model-00010.safetensors", "a": "model-00002.safetensors", "b": "model-00010.safetensors"}
    )
    (tmp_path / "config.json").write_text('{"L": 2, "limit": [0.0, Infinity], "L": 2}')
    for name in (
        "tokenizer.json",
        "LICENSE",
        "file-10.txt",
        "file-9.txt",
        ".gitattributes",
        "pytorch_model.bin",
        "x.gguf",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "original").mkdir()
    for given in (tmp_path, str(tmp_path), path):
        checkpoint = open_checkpoint(given)
        assert checkpoint.path == Path(given)
        assert checkpoint.folder == tmp_path
        assert checkpoint.kind == "safetensors"
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.files == ("model-00002.safetensors", "model-00010.safetensors")
        assert checkpoint.metadata == {name: {"format": "pt"} for name in checkpoint.files}
        assert checkpoint.config == {"L": 2, "limit": [0.0, float("inf")]}
        assert checkpoint.other_files == ("LICENSE", "file-9.txt", "file-10.txt", "tokenizer.json")
        assert checkpoint.refused_files == ()


def test_folder_without_index(tmp_path: Path) -> None:
    shard(tmp_path, "part-10.safetensors", "a")
    shard(tmp_path, "part-9.safetensors", "b")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ("part-9.safetensors", "part-10.safetensors")
    assert list(checkpoint.tensors) == ["b", "a"]
    assert checkpoint.config is None


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", "a")
    for name in ("._model.safetensors", "._model.safetensors.index.json", ".other.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert open_checkpoint(tmp_path).files == ("model.safetensors",)


def test_single_file_takes_the_config_beside_it_and_nothing_else(tmp_path: Path) -> None:
    shard(tmp_path, "model.safetensors", "a")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert (checkpoint.config, checkpoint.other_files, checkpoint.files) == ({}, (), ("model.safetensors",))


def test_shards_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "view").mkdir()
    shard(tmp_path / "store", "blob", "a")
    (tmp_path / "view" / "model.safetensors").symlink_to(tmp_path / "store" / "blob")
    assert list(open_checkpoint(tmp_path / "view").tensors) == ["a"]
    (tmp_path / "link").symlink_to("view")
    assert list(open_checkpoint(tmp_path / "link").tensors) == ["a"]


def test_empty_checkpoint(tmp_path: Path) -> None:
    index(tmp_path, {})
    assert open_checkpoint(tmp_path).tensors == {}


def test_listing_finds_its_config() -> None:
    checkpoint = open_checkpoint(LISTINGS / "gpt_oss_20b.list")
    assert checkpoint.kind == "listing"
    assert not checkpoint.has_data
    assert checkpoint.config is not None
    assert checkpoint.config["hidden_size"] == 2880
    stored = checkpoint.tensors["model.layers.23.self_attn.sinks"]
    assert (stored.dtype, stored.shape, stored.file, stored.begin, stored.end) == ("BF16", (64,), NO_FILE, 0, 0)


def test_json_listing_is_a_header(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F8_E8M0", "shape": [2, 3], "data_offsets": [0, 6]},
        "a": {"dtype": "I64", "shape": []},
    }
    path.write_text(json.dumps(header))
    (tmp_path / "config.json").write_text('{"a": 1}')
    checkpoint = open_checkpoint(path)
    assert [(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()] == [
        ("b", "F8_E8M0", (2, 3)),
        ("a", "I64", ()),
    ]
    assert checkpoint.config == {"a": 1}
    (tmp_path / "x.config.json").write_text('{"a": 2}')
    assert open_checkpoint(path).config == {"a": 2}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_file(tmp_path: Path, wrapper: str | None, is_zip: bool) -> None:
    weight = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    state = {
        "b": weight,
        "t": weight.T,
        "tied": weight,
        "s": torch.tensor(5),
        "p": torch.nn.Parameter(torch.ones(2)),
        "layer._extra_state": None,
    }
    path = tmp_path / "model.pt"
    value = {wrapper: state, "step": 3} if wrapper else state
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == "torch"
    assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == {
        "b": ("BF16", (3, 4)),
        "t": ("BF16", (4, 3)),
        "tied": ("BF16", (3, 4)),
        "s": ("I64", ()),
        "p": ("F32", (2,)),
    }
    lazy = LazyState(checkpoint)
    for name in checkpoint.tensors:
        assert torch.equal(lazy[name], state[name])
        assert not lazy[name].requires_grad
        assert lazy.meta()[name].shape == state[name].shape


def test_folder_of_torch_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model-2.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    index(tmp_path, {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert (list(checkpoint.tensors), checkpoint.kind) == (["a", "b"], "torch")
    shard(tmp_path, "model.safetensors", "c")  # goes before
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]


def test_folder_with_one_torch_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
