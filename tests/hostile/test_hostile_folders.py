"""Folders and indexes that are broken or point elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_files import messages, write_index, write_shard

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.language.diagnostics import MapError

ELSEWHERE = [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "sub/a.safetensors",
    "sub\\a.safetensors",
    "C:a.safetensors",
    "..",
    "",
    "a\0.safetensors",
    "a\n.safetensors",
    "x" * 300 + ".safetensors",
    "config.json",
    "a.bin",
    None,
    5,
    ["a.safetensors"],
]


@pytest.mark.parametrize("file", ELSEWHERE)
def test_an_index_stays_in_its_folder(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_shard(tmp_path / "secret.safetensors", "t")
    write_index(folder, {"t": file})
    with pytest.raises(MapError) as problem:
        open_checkpoint(folder)
    (message,) = messages(problem.value)
    assert message.startswith("C507 the index puts tensor `t` into ")
    assert message.endswith("expected *.safetensors in its own folder")


def _index_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


def _missing_file(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x")
    write_index(folder, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})


def _wrong_file(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x", "y")
    write_shard(folder / "b.safetensors", "z")
    write_index(folder, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})


def _missing_name(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x")
    write_index(folder, {"x": "a.safetensors", "y": "a.safetensors"})


def _unlisted_name(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x", "y", "z")
    write_index(folder, {"x": "a.safetensors"})


def _stored_twice(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x", "y")
    write_shard(folder / "b.safetensors", "y", "z")
    write_index(folder, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})


def _stored_twice_plain(folder: Path) -> None:
    write_shard(folder / "model-2.safetensors", "y")
    write_shard(folder / "model-10.safetensors", "y")


def _two_indexes(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x")
    write_index(folder, {"x": "a.safetensors"})
    write_index(folder, {"x": "a.safetensors"}, "model.fp16.safetensors.index.json")


def _two_broken_shards(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"")
    (folder / "b.safetensors").write_bytes(b"\xff" * 9)


def _bad_config(folder: Path) -> None:
    write_shard(folder / "a.safetensors", "x")
    (folder / "config.json").write_text('{"a": 1, "a": 2}')


def _link_to_nowhere(folder: Path) -> None:
    (folder / "a.safetensors").symlink_to("nowhere")


FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "empty": (lambda folder: None, ["C507 the folder holds no *.safetensors, no *.safetensors.index.json and no"]),
    "index is no JSON": (_index_text("weights"), ["C507 the index is not the JSON expected"]),
    "index is a list": (_index_text("[]"), ["C507 the index is a JSON list, expected an object"]),
    "index without a map": (_index_text("{}"), ["C507 the index has no object `weight_map`"]),
    "index names twice": (
        _index_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'),
        ["C507 the index is not the JSON expected: `x` is named twice in one object"],
    ),
    "index nested too deeply": (_index_text('{"a":' * 200_000), ["C507 the index is nested too deeply"]),
    "missing file": (
        _missing_file,
        ["C507 the index puts tensor `y` (and 1 more) into b.safetensors, and there is no such file"],
    ),
    "wrong file": (_wrong_file, ["C507 the index puts tensor `y` into b.safetensors, found in a.safetensors"]),
    "missing name": (_missing_name, ["C507 the index puts tensor `y` into a.safetensors, which does not hold it"]),
    "unlisted name": (
        _unlisted_name,
        ["C507 a.safetensors holds tensor `y` (and 1 more), which the index does not name"],
    ),
    "stored twice": (_stored_twice, ["C506 tensor `y` is stored in a.safetensors and again in b.safetensors"]),
    "stored twice, no index": (
        _stored_twice_plain,
        ["C506 tensor `y` is stored in model-2.safetensors and again in model-10.safetensors"],
    ),
    "two indexes": (
        _two_indexes,
        ["C507 the folder holds 2 indexes, expected one: model.fp16.safetensors.index.json, model.safetensors.index"],
    ),
    "two broken shards": (
        _two_broken_shards,
        ["C507 the file has 0 bytes", "C507 the header's length is stated as 18,446,744,073,709,551,615 bytes"],
    ),
    "config gives two values": (_bad_config, ["C507 the config is not the JSON expected: `a` is given two values"]),
    "link to nowhere": (_link_to_nowhere, ["C507 cannot open the file: no such file or directory"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_is_refused(tmp_path: Path, case: str) -> None:
    build, expected = FOLDERS[case]
    build(tmp_path)
    with pytest.raises(MapError) as problem:
        open_checkpoint(tmp_path)
    found = messages(problem.value)
    assert len(found) == len(expected)
    for message, start in zip(found, expected, strict=True):
        assert message.startswith(start)


def test_an_index_of_a_hundred_thousand_missing_files(tmp_path: Path) -> None:
    write_index(tmp_path, {str(n): f"{n}.safetensors" for n in range(100_000)})
    started = time.perf_counter()
    with pytest.raises(MapError) as problem:
        open_checkpoint(tmp_path)
    found = messages(problem.value)
    assert len(found) == 21
    assert found[-1] == "C507 99,980 more of its files are not there"
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [("absent", "there is no such file or folder"), ("notes.txt", "the name does not say what the file is")],
)
def test_path_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(MapError, match=expected):
        open_checkpoint(tmp_path / name)


def test_links_that_leave_are_not_carried_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_shard(folder / "a.safetensors", "x")
    (tmp_path / "secret").write_text("key")
    (folder / "real.json").write_text("{}")
    (folder / "inside.json").symlink_to("real.json")
    (folder / "outside.json").symlink_to("../secret")
    (folder / "absolute.json").symlink_to(tmp_path / "secret")
    (folder / "nowhere.json").symlink_to("nothing")
    (folder / "way.json").symlink_to("outside.json")
    os.mkfifo(folder / "pipe.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.other_files == ("inside.json", "real.json")
    assert checkpoint.refused_files == ("absolute.json", "nowhere.json", "outside.json", "way.json")
    with CheckpointWriter(tmp_path / "out", []) as writer:
        for name in (*checkpoint.refused_files, "../secret", str(tmp_path / "secret"), "pipe.json", "a.safetensors"):
            with pytest.raises(MapError, match="is not carried over"):
                writer.carry_over(checkpoint, [name])
        (folder / "real.json").unlink()
        (folder / "real.json").symlink_to("../secret")  # changed after it was opened
        with pytest.raises(MapError, match="is not carried over"):
            writer.carry_over(checkpoint)


def test_shards_in_a_hugging_face_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shard(blobs / "111", "x")
    (blobs / "222").write_text("{}")
    (tmp_path / "refs").write_text("not a blob")
    (snapshot / "model.safetensors").symlink_to("../../blobs/111")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/222")
    (snapshot / "evil.json").symlink_to("../../refs")
    checkpoint = open_checkpoint(snapshot)
    assert list(checkpoint.tensors) == ["x"]
    assert (checkpoint.other_files, checkpoint.refused_files) == (("tokenizer.json",), ("evil.json",))
    with CheckpointWriter(tmp_path / "out", []) as writer:
        writer.carry_over(checkpoint)
        writer.commit()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {}
