"""`mapdsl.deepspeed`: what cannot be loaded is an error that says which file, what was expected and what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.deepspeed import SDLoaderFactory
from mapdsl.runtime.errors import ConversionError
from tests.helpers import megatron
from tests.helpers.megatron import save, save_shards
from tests.test_deepspeed_loader import loader


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return save(tmp_path, megatron.whole(), 2, 0)


def refused(match: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises((ConversionError, mapdsl.MapError), match=match):
        loader(*arguments).load(**{"mp_world_size": 1, "mp_rank": 0, **options})


# --- the list of files, and what they say of themselves ---


def test_no_file(paths: list[str]) -> None:
    refused(r"C505.*expected a list of files, one a rank, found \[\]", [])
    refused(r"C505.*expected a list of files, one a rank, found '.*pt'", paths[0])
    refused(r"gone\.pt: error\[C507\]: cannot open the file", [str(Path(paths[0]).parent / "gone.pt")])


def test_a_file_of_a_later_rank_is_missing(paths: list[str]) -> None:
    Path(paths[1]).unlink()
    refused(r"mp_rank_01.*C507.*cannot open the file", paths, mp_world_size=2, mp_rank=1)
    refused(r"mp_rank_01.*C507.*cannot open the file", paths)


def test_more_or_fewer_shards_than_were_saved(tmp_path: Path) -> None:
    paths = save(tmp_path, megatron.whole(), 2, 0, mp_world_size=2)
    refused(r"C505.*mp_rank_00.* is one of 2 shards \(`mp_world_size`\), 1 were given", paths[:1])


@pytest.mark.parametrize(("count", "ranks"), [(4, 3), (4, 6), (2, 3)])
def test_ranks_that_do_not_divide(count: int, ranks: int, tmp_path: Path) -> None:
    paths = save(tmp_path, megatron.whole(), count, 0)
    message = f"P453.*{count} shards cannot be merged or split for {ranks} ranks: neither divides the other"
    refused(message, paths, mp_world_size=ranks)


@pytest.mark.parametrize(("ranks", "rank"), [(2, 2), (4, 4), (1, 1), (2, -1), (0, 0)])
def test_a_rank_that_there_is_not(paths: list[str], ranks: int, rank: int) -> None:
    refused(f"N113.*there is no rank {rank} of {ranks}", paths, mp_world_size=ranks, mp_rank=rank)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    refused(
        r"list\.pt: error\[C507\]: expected a dict with the state of a module, found a list", [tmp_path / "list.pt"]
    )
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused(r"text\.pt: error\[C507\]", [tmp_path / "text.pt"])


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("code of a checkpoint was run",))


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"module": {}, "args": Evil()}, tmp_path / "evil.pt")
    refused(r"evil\.pt: error\[C507\]: the file needs code to load", [tmp_path / "evil.pt"])
    arguments = argparse.Namespace(num_layers=2, params_dtype=torch.float16)
    torch.save({"module": {"weight": torch.zeros(2)}, "args": arguments}, tmp_path / "args.pt")
    assert loader([str(tmp_path / "args.pt")]).load(2, 0)[1]["args"] == arguments


# --- the module ---


def test_where_the_module_is(tmp_path: Path) -> None:
    def file(**found: Any) -> list[Path]:
        torch.save(found, tmp_path / "a.pt")
        return [tmp_path / "a.pt"]

    refused("C507.*the file has both `module` and `model`", file(module={}, model={}), mp_world_size=2)
    refused("C507.*the file has neither `module` nor `model`", file(weights={}), mp_world_size=2)
    refused("C507.*the file has no `module`", file(model={}), mp_world_size=2, module_key="module")
    refused("C507.*the file has a NoneType under `module`", file(module=None), mp_world_size=2)
    twice = {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}
    refused("C506.*two tensors are called a.b", file(module=twice), mp_world_size=2)


def test_shards_that_do_not_fit_each_other(tmp_path: Path) -> None:
    state = megatron.whole()
    shards = [megatron.cut(state, 2, rank, 0) for rank in range(2)]
    for name in ("transformer.layers.1.mlp.dense_h_to_4h.weight", "transformer.final_layernorm.bias"):
        short = {other: tensor for other, tensor in shards[1].items() if other != name}
        for number, files in enumerate(([shards[0], short], [short, shards[0]])):
            missing, has = f"mp_rank_0{1 - number}", f"mp_rank_0{number}"
            message = f"R605.*{name} is missing in .*{missing}.*, .*{has}.* has it"
            refused(message, save_shards(tmp_path / "short", files))
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    narrow = shards[1] | {name: shards[1][name][:, 1:]}
    refused(f"R606.*{name}: `d` is 16 on rank tp 0, 15 on", save_shards(tmp_path / "2", [shards[0], narrow]))
    typed = shards[1] | {name: shards[1][name].half()}
    refused(f"R606.*{name} of rank 1 is torch.float16, of", save_shards(tmp_path / "3", [shards[0], typed]))


def test_a_size_that_does_not_divide(tmp_path: Path) -> None:
    paths = save_shards(tmp_path, [{"word_embeddings.weight": torch.zeros(51, 4)}])
    refused(
        r"P453.*word_embeddings\.weight: the axis `V` has 51 positions, which do not divide over 2 ranks of `tp`.*"
        r"rank 0 is .*mp_rank_00",
        paths,
        mp_world_size=2,
    )
    paths = save_shards(tmp_path, [{"attention.query_key_value.bias": torch.zeros(16)}])
    refused(r"X305.*attention\.query_key_value\.bias: 16 does not divide by 3", paths, mp_world_size=2)


# --- versions ---


@pytest.mark.parametrize("version", [0.5, 4.0, -1, "2.0", True])
def test_a_version_that_is_not_known(paths: list[str], version: Any, tmp_path: Path) -> None:
    message = f"C505.*the checkpoint version {version!r}.* is not known; expected one of 0, 1.0, 2.0, 3.0"
    refused(message, paths, version)
    refused(message, save(tmp_path / "own", megatron.whole(), 2, 0, checkpoint_version=version))


def test_a_version_that_the_file_contradicts(tmp_path: Path) -> None:
    paths = save(tmp_path, megatron.whole(), 2, 0, checkpoint_version=2.0)
    refused("C505.*mp_rank_00.* has checkpoint version 2.0, and is to be loaded as version 1.0", paths, 1.0)
    loader(paths, 3.0).load(1, 0)  # fused alike
    torch.save({"module": {}, "checkpoint_version": 1.0}, paths[1])
    refused("C505.*mp_rank_00.* and .*mp_rank_01.* have different checkpoint versions", paths)


# --- kinds of checkpoints ---


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("megatron", "no loader of checkpoints of type 'megatron'; expected 'Megatron'"),
        ("bloom", "`get_sd_loader_json` gives its description"),
        (None, "no loader of checkpoints of type None"),
    ],
)
def test_a_type_that_is_not_loaded(kind: Any, words: str, paths: list[str]) -> None:
    with pytest.raises(ConversionError, match=f"C505.*{words}"):
        SDLoaderFactory.get_sd_loader(paths, None, kind)


MANIFEST = {"type": "Megatron", "version": 0, "checkpoints": ["a.pt", "b.pt"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": None}, "wrong `type`: expected a text, found nothing"),
        ({"type": "megatron"}, "wrong `type`: expected one of .*, found 'megatron'; did you mean 'Megatron'?"),
        ({"type": "gpt"}, "wrong `type`: expected one of Megatron, bloom, ds_model, found 'gpt'"),
        ({"checkpoints": None}, "wrong `checkpoints`: expected a list or an object, found nothing"),
        ({"checkpoints": [1]}, r"wrong `checkpoints`: expected a list of files, found \[1\]"),
        (
            {"checkpoints": {"non_tp": [], "tp": []}},
            "expected a list of files, one a tensor parallel rank, found an object",
        ),
        ({"type": "bloom", "checkpoints": {"tp": []}}, "expected `non_tp` and `tp`, a list of files each, found 'tp'"),
        ({"version": ...}, "wrong `version`: expected 0, 1.0 or 2.0, or null"),
        ({"version": 7}, "the checkpoint version 7 is not known"),
        ({"parallelization": "dp"}, "wrong `parallelization`: expected 'pp' or 'tp', found 'dp'"),
        ({"mp_size": 4}, "wrong `mp_size`: expected 2, the number of files, found 4"),
        ({"tp_size": "2"}, "wrong `tp_size`: expected a number of ranks, found '2'"),
        ({"tp_size": 2, "mp_size": 1}, "wrong `tp_size`: expected 1, as `mp_size` says, found 2"),
        ({"base_dir": 3}, "wrong `base_dir`: expected a text, found 3"),
        ({"checkpoints": []}, "expected a list of files"),
    ],
)
def test_a_description_that_is_wrong(changes: dict[str, Any], words: str) -> None:
    manifest = {key: value for key, value in {**MANIFEST, **changes}.items() if value is not ...}
    with pytest.raises(ConversionError, match=f"C505.*{words}"):
        SDLoaderFactory.get_sd_loader_json(manifest, None)


def test_a_json_file_that_is_none(tmp_path: Path) -> None:
    for text, words in (("{", "this is no JSON"), (json.dumps([1]), r"expected an object.*, found \[1\]")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(mapdsl.MapError, match=f"a.json: error.C507.: {words}"):
            SDLoaderFactory.get_sd_loader_json(str(tmp_path / "a.json"), None)
    with pytest.raises(mapdsl.MapError, match="gone.json: error.C507.: cannot open the file"):
        SDLoaderFactory.get_sd_loader_json(str(tmp_path / "gone.json"), None)
    with pytest.raises(ConversionError, match="C505.*expected the path of a JSON file or a dict, found a list"):
        SDLoaderFactory.get_sd_loader_json([MANIFEST], None)  # type: ignore[arg-type]


# --- quantising, and maps of one's own ---


def test_what_cannot_be_quantised(paths: list[str]) -> None:
    refused("C505.*quantize_bits is 16, expected 2 to 8", paths, quantize=True, quantize_bits=16)
    refused("C505.*quantize_groups is 0", paths, quantize=True, quantize_groups=0)
    refused(r"elements of \[.*\] do not fall into 5 equal groups", paths, quantize=True, quantize_groups=5)


def test_a_map_without_ranks(paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "plain.map").write_text("map plain: a <-> b\n{..} <-> {..} else\n")
    with pytest.raises(ConversionError, match="N113.*plain.map has no mesh `tp`"):
        loader(paths, map=tmp_path / "plain.map")
