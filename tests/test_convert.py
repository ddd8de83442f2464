"""Whole checkpoints there and back: what is written, and that every file comes back byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import (
    MAP,
    assert_same_files,
    change_json,
    contents,
    renames,
    tiny_config,
    write_state,
    write_tiny,
)
from safetensors.torch import load_file, save_file

import mapdsl
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.convert import size_in_bytes
from mapdsl.checkpoint.direction import choose_plan
from mapdsl.checkpoint.passes import OptionError, Request
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.checkpoint.tensors import LazyState, dtype_name
from mapdsl.demo import random_state


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in LazyState(open_checkpoint(folder)).items()}


def there_and_back(source: Path, tmp_path: Path, map_: mapdsl.Map | Path = MAP, **options: object) -> mapdsl.Conversion:
    mapdsl.convert(source, tmp_path / "there", map_, **options)
    return mapdsl.convert(tmp_path / "there", tmp_path / "back", map_)


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "shard_bytes", "layers"),
    [
        ("fp4", 400_000, {}),
        ("fp4", 10**9, {"num_nextn_predict_layers": 0, "compress_ratios": [4, 128]}),
        ("fp8", 400_000, {"num_hash_layers": 2}),
        ("fp8", 10**9, {"num_hash_layers": 0}),
        ("raw", 400_000, {}),
        ("raw", 10**9, {"num_nextn_predict_layers": 2, "compress_ratios": [128, 0, 0, 0]}),
    ],
)
def test_every_file_comes_back(experts, shard_bytes, layers, tmp_path):
    source = write_tiny(tmp_path / "source", experts, shard_bytes=shard_bytes, **layers)
    before = contents(source)
    done = there_and_back(source, tmp_path)
    assert_same_files(tmp_path / "back", source)
    assert contents(source) == before
    assert done.same_layout
    assert not done.edited
    is_sharded = "model.safetensors.index.json" in before
    assert is_sharded == (shard_bytes < 10**9)


@pytest.mark.parametrize("dtype", ["f32", "f16", torch.bfloat16])
def test_every_file_comes_back_from_any_dtype(dtype, tmp_path):
    source = write_tiny(tmp_path / "source")
    there_and_back(source, tmp_path, dtype=dtype)
    stack = state_of(tmp_path / "there")["model.layers.0.mlp.experts.down_projs"]
    assert stack.dtype == {"f32": torch.float32, "f16": torch.float16}.get(dtype, dtype)
    assert_same_files(tmp_path / "back", source)


def test_the_output_is_what_the_adapter_gives(tmp_path):
    config = tiny_config()
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP, max_shard_size=300_000)
    expected = MAP.adapter(config).read(random_state(config))
    found = state_of(tmp_path / "there")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert len(open_checkpoint(tmp_path / "there").files) > 3


def test_other_files_and_the_config_are_carried_over(tmp_path):
    source = write_tiny(tmp_path / "source")
    (source / "inference").mkdir()
    (source / "consolidated.pth").write_bytes(b"")
    (source / ".cache").mkdir()
    for hidden in (".gitattributes", "._config.json", "._model-00001-of-00002.safetensors"):
        (source / hidden).write_bytes(b"hidden")
    done = mapdsl.convert(source, tmp_path / "there", MAP)
    there = tmp_path / "there"
    assert {path.name for path in there.iterdir()} == {"tokenizer.json", "config.json", "model.safetensors", SIDE_FILE}
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]  # see test_convert_config.py
    assert json.loads((there / "config.json").read_text()) == config
    assert (there / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert done.carried == ("tokenizer.json", "config.json")
    assert done.left_behind == ("consolidated.pth", "inference/")


def test_a_single_file_is_a_checkpoint_too(tmp_path):
    source = write_tiny(tmp_path / "source", shard_bytes=10**9)
    mapdsl.convert(source / "model.safetensors", tmp_path / "there", MAP)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    expected = contents(source)
    del expected["tokenizer.json"]  # beside a single file only the config is looked for
    assert contents(tmp_path / "back") == expected


def test_names_of_shards_and_of_the_index_come_back(tmp_path):
    source = write_tiny(tmp_path / "source")
    second = sorted(source.glob("model-00002-*"))[0]
    text = (source / "model.safetensors.index.json").read_text().replace(second.name, "part two.safetensors") + "\n \n"
    second.rename(source / "part two.safetensors")
    (source / "model.safetensors.index.json").unlink()
    (source / "weights.safetensors.index.json").write_text(text)
    there_and_back(source, tmp_path)
    assert_same_files(tmp_path / "back", source)


def test_shards_without_an_index_come_back_without_one(tmp_path):
    source = write_tiny(tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    there_and_back(source, tmp_path)
    assert_same_files(tmp_path / "back", source)


def test_a_header_comes_back_as_it_was_written(tmp_path):
    """Order, metadata and padding are the writer's own: these are not as we would write them."""
    file, source = renames(tmp_path)
    data = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "who": "ünï"}
    text = json.dumps(dict(reversed(header.items())), indent=1).encode() + b" " * 13
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    there_and_back(source, tmp_path, file)
    assert_same_files(tmp_path / "back", source)


def test_what_all_files_say_of_themselves_is_kept(tmp_path):
    file, source = renames(tmp_path)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    texts = [{"format": "pt", "run": "7", "step": "1"}, {"run": "7", "step": "2", "format": "mlx"}]
    for place, metadata in enumerate(texts):
        half = {name: tensor for name, tensor in tensors.items() if name.startswith("0") == bool(place)}
        save_file(half, source / f"part{place}.safetensors", metadata)
    mapdsl.convert(source, tmp_path / "there", file)
    assert open_checkpoint(tmp_path / "there").metadata == {"model.safetensors": {"run": "7", "format": "pt"}}


def test_a_torch_file_comes_back_as_safetensors(tmp_path):
    config = tiny_config()
    state = random_state(config)
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(config))
    done = there_and_back(source, tmp_path)
    assert done.same_layout is False
    assert "no safetensors files" in done.misfit
    found = state_of(tmp_path / "back")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


# --- what the map does not keep --------------------------------------------------------------------------------------


def test_dropped_tensors_come_back(tmp_path):
    source = write_tiny(tmp_path / "source")
    change_json(source / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    done = mapdsl.convert(source, tmp_path / "there", MAP)
    assert {name.split(".")[0] for name in done.dropped} == {"mtp"}
    assert not any(name.startswith("mtp") for name in open_checkpoint(tmp_path / "there").tensors)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    assert_same_files(tmp_path / "back", source)


def test_legacy_spellings_come_back(tmp_path):
    config = tiny_config()
    state = {name.replace("mtp.0", "layers.2"): tensor for name, tensor in random_state(config).items()}
    source = write_state(tmp_path / "source", state, config)
    assert there_and_back(source, tmp_path).same_layout
    assert "mtp.layers.0.e_proj.weight" in open_checkpoint(tmp_path / "there").tensors
    assert_same_files(tmp_path / "back", source)


def test_params_and_answers_come_back(tmp_path):
    """What was given, and what `has` found, holds on the way back without being given again."""
    file = tmp_path / "variants.map"
    file.write_text(
        "map variants: old <-> new\nparam N = n\nparam joined = has(qkv)\nindex i < N\n"
        "qkv <-> attention.all where joined\nq <-> attention.q where not joined\n{i}.a <-> layer.{i}.a\n"
    )
    state = {"0.a": torch.ones(2), "1.a": torch.zeros(2), "qkv": torch.ones(3)}
    source = write_state(tmp_path / "source", state)
    there_and_back(source, tmp_path, file, params={"N": 2})
    assert open_checkpoint(tmp_path / "there").tensors.keys() == {"layer.0.a", "layer.1.a", "attention.all"}
    assert_same_files(tmp_path / "back", source)


def test_tied_tensors_are_written_twice(tmp_path):
    file = tmp_path / "tied.map"
    file.write_text("map tied: old <-> new\nembed <-> wte [v d]\n_ <-> head [v d] = wte\n")
    source = write_state(tmp_path / "source", {"embed": torch.randn(4, 3)})
    there_and_back(source, tmp_path, file)
    made = state_of(tmp_path / "there")
    assert torch.equal(made["head"], made["wte"])
    assert_same_files(tmp_path / "back", source)


def test_formats_of_the_model_side_are_not_kept(tmp_path):
    """They would pile up in memory."""
    file = tmp_path / "casts.map"
    file.write_text("map casts: old <-> new\na <-> b [x y] as f32\n")
    source = write_state(tmp_path / "source", {"a": torch.randn(4, 3).bfloat16()})
    there_and_back(source, tmp_path, file)
    assert open_checkpoint(tmp_path / "there").tensors["b"].dtype == "F32"
    assert_same_files(tmp_path / "back", source)
    plan = choose_plan(Request(mapdsl.load(file), open_checkpoint(tmp_path / "there")), "old")
    assert not plan.adapter.complement.right


# --- edits -----------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change) -> None:
    """The folder's one shard, with `change` made to its state."""
    state = state_of(folder)
    change(state)
    shutil.rmtree(folder.with_name("new"), ignore_errors=True)
    write_state(folder.with_name("new"), state)
    shutil.copy(folder.with_name("new") / "model.safetensors", folder / "model.safetensors")


def test_only_edited_blocks_are_encoded_anew(tmp_path):
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP)

    def edit(state):
        state["model.layers.1.mlp.experts.down_projs"][1, 5, 7] += 1.0  # one element: one block of w2 of expert 1
        state["model.norm.weight"][0] = 17.0

    rewritten(tmp_path / "there", edit)
    done = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    assert dict(done.edited) == {"layers.1.ffn.experts.1.w2.weight": 1}
    assert done.same_layout
    before, after = state_of(source), state_of(tmp_path / "back")
    changed = [n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))]
    assert set(changed) <= {
        "norm.weight",
        "layers.1.ffn.experts.1.w2.weight",
        "layers.1.ffn.experts.1.w2.scale",
    }
    payload = "layers.1.ffn.experts.1.w2.weight"
    places = (before[payload] != after[payload]).nonzero()
    # Row 7, and of it the block of 32 columns, 16 bytes, that holds column 5.
    assert len(places)
    assert all(row == 7 and column < 16 for row, column in places.tolist())
    assert after["norm.weight"][0] == 17.0


def test_a_layout_that_no_longer_fits_is_made_anew(tmp_path):
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP)
    rewritten(tmp_path / "there", lambda state: state.update({"model.norm.weight": state["model.norm.weight"].float()}))
    done = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    assert done.same_layout is False
    assert done.misfit == "tensor `norm.weight` is now F32 [256], it was BF16 [256]"
    assert done.files == ("model.safetensors",)
    before, after = state_of(source), state_of(tmp_path / "back")
    assert before.keys() == after.keys()
    del before["norm.weight"]
    assert [n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))] == []


def test_a_layout_of_more_tensors_does_not_fit(tmp_path):
    file = tmp_path / "hash.map"
    file.write_text(
        "map hash: old <-> new\nparam H = h\nindex i < 2\n"
        "{i}.b <-> layer.{i}.b where i >= H\n_ <- layer.{i}.b where i < H\n"
    )
    source = write_state(tmp_path / "source", {"0.b": torch.ones(1), "1.b": torch.zeros(1)}, {"h": 0})
    mapdsl.convert(source, tmp_path / "there", file)
    done = mapdsl.convert(tmp_path / "there", tmp_path / "back", file, params={"H": 1})
    assert done.misfit == "tensor `0.b` is no longer there"
    assert state_of(tmp_path / "back").keys() == {"1.b"}


def test_the_config_of_the_stored_side_comes_back(tmp_path):
    """A trainer may have put its own config beside the weights: the stored one is in the side file."""
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP)
    (tmp_path / "there" / "config.json").write_text('{"num_hash_layers": 0}')
    mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    assert_same_files(tmp_path / "back", source)


# --- options ---------------------------------------------------------------------------------------------------------


def test_without_the_side_file_tensors_are_written_as_they_are(tmp_path):
    source = write_tiny(tmp_path / "source")
    done = mapdsl.convert(source, tmp_path / "there", MAP, use_complement=False)
    assert done.kept_bytes is None
    assert not (tmp_path / "there" / SIDE_FILE).exists()
    mapdsl.convert(tmp_path / "there", tmp_path / "raw", MAP)
    raw = open_checkpoint(tmp_path / "raw").tensors
    assert raw["layers.0.ffn.experts.0.w1.weight"].dtype == "BF16"
    assert not any(name.endswith(".scale") for name in raw)


def test_a_checkpoint_can_be_quantised_on_the_way(tmp_path):
    source = write_tiny(tmp_path / "source", "raw")
    mapdsl.convert(source, tmp_path / "there", MAP, use_complement=False)
    mapdsl.convert(tmp_path / "there", tmp_path / "anew", MAP, quantize=True)
    expected = {n: (dtype_name(t.dtype), t.shape) for n, t in random_state(tiny_config(), "fp4").items()}
    assert {n: (t.dtype, t.shape) for n, t in open_checkpoint(tmp_path / "anew").tensors.items()} == expected


def test_the_side_file_can_be_ignored(tmp_path):
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP)
    done = mapdsl.convert(tmp_path / "there", tmp_path / "raw", MAP, use_complement=False)
    assert done.same_layout is None
    assert open_checkpoint(tmp_path / "raw").tensors["layers.0.ffn.experts.0.w1.weight"].dtype == "BF16"
    assert not (tmp_path / "raw" / SIDE_FILE).exists()


def test_a_config_that_is_given_goes_before_and_is_written(tmp_path):
    file, source = renames(tmp_path)
    (source / "config.json").write_text('{"n": 99}')
    own = tmp_path / "own.json"
    own.write_text('{"n":   3}')
    mapdsl.convert(source, tmp_path / "there", file, config=own)
    assert (tmp_path / "there" / "config.json").read_text() == '{"n":   3}'
    mapdsl.convert(source, tmp_path / "other", file, config={"n": 3})
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == {"n": 3}


def test_the_direction_can_be_said(tmp_path):
    file, source = renames(tmp_path)
    there = mapdsl.convert(source, tmp_path / "there", file, to="new")
    back = mapdsl.convert(tmp_path / "there", tmp_path / "back", file, to="old")
    assert (there.source_side, there.target_side) == ("old", "new")
    assert (back.source_side, back.target_side) == ("new", "old")
    assert_same_files(tmp_path / "back", source)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "olf"}, "no `olf`"),
        ({"to": "new", "quantize": True}, "--quantize is for the way to old"),
        ({"dtype": "i8"}, "not i8"),
        ({"max_shard_size": "5 elephants"}, "5 elephants"),
        ({"max_shard_size": 0}, "one byte"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words, tmp_path):
    file, source = renames(tmp_path)
    with pytest.raises(OptionError, match=words):
        mapdsl.convert(source, tmp_path / "there", file, **options)
    assert not (tmp_path / "there").exists()


def test_a_dtype_means_nothing_on_the_way_back(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    with pytest.raises(OptionError, match="--dtype is for the way to new"):
        mapdsl.convert(tmp_path / "there", tmp_path / "back", file, dtype="bf16")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 mb", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5KB", 1500),
        ("17", 17),
        (17, 17),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size
