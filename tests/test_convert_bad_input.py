"""What `convert` refuses: each with its code, its tensor and its file, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from conversions import MAP, NAME, change_json, contents, only, renames, tiny_config, write_state, write_tiny

import mapdsl
from mapdsl.checkpoint import engine
from mapdsl.checkpoint import writer as writer_module
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.journal import Journal
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.cli.main import main
from mapdsl.demo import random_state
from mapdsl.language.diagnostics import MapError


def refused(source: Path, destination: Path, map_: mapdsl.Map | str | Path = MAP, **options: object):
    """The one diagnostic of a conversion that fails, which leaves everything as it was."""
    parent = destination.parent
    before = sorted(str(path) for path in parent.rglob("*"))
    with pytest.raises(MapError) as caught:
        mapdsl.convert(source, destination, map_, **options)
    assert sorted(str(path) for path in parent.rglob("*")) == before
    return only(caught.value)


def spoiled(tmp_path: Path, change) -> Path:
    """A tiny release whose state `change` has been at."""
    config = tiny_config()
    state = random_state(config)
    change(state)
    return write_state(tmp_path / "source", state, config)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_truncated_shard(tmp_path):
    source = write_tiny(tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    found = refused(source, tmp_path / "out")
    assert (found.code, found.subject) == ("C507", str(shard))
    assert "the file is cut short" in found.help


def test_a_shard_that_is_cut_while_it_is_converted(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[1]
    add = Journal.add

    def cutting(self, record):
        add(self, record)
        os.truncate(shard, min(shard.stat().st_size, 20_000))

    monkeypatch.setattr(Journal, "add", cutting)
    found = refused(source, tmp_path / "out", workers=1)
    assert (found.code, found.subject) == ("C507", str(shard))
    assert found.message.endswith("found 20,000")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_tensor_whose_end_is_cut_while_it_is_decoded(tmp_path, monkeypatch, workers):
    """The system shows zeros up to the end of the last page: they must not come out as if they had been stored."""
    source = write_tiny(tmp_path / "source")
    last = max(open_checkpoint(source).tensors.values(), key=lambda stored: (stored.file.name, stored.end))
    hand_out = LazyState._from_map

    def cutting(self, stored, *form):
        found = hand_out(self, stored, *form)
        if stored.name == last.name:
            os.truncate(stored.file, stored.end - 1)
        return found

    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    monkeypatch.setattr(LazyState, "_from_map", cutting)
    found = refused(source, tmp_path / "out", workers=workers)
    assert (found.code, found.subject) == ("C507", str(last.file))
    assert found.message == f"tensor `{last.name}` ends at byte {last.end:,}, found {last.end - 1:,}"


def test_an_index_that_names_a_missing_file(tmp_path):
    source = write_tiny(tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    found = refused(source, tmp_path / "out")
    assert (found.code, found.subject) == ("C507", str(source / "model.safetensors.index.json"))
    assert shard.name in found.message


def test_an_index_that_names_a_file_outside(tmp_path):
    source = write_tiny(tmp_path / "source")
    index = source / "model.safetensors.index.json"
    change_json(index, lambda value: value["weight_map"].update({"norm.weight": "../other.safetensors"}))
    found = refused(source, tmp_path / "out")
    assert (found.code, found.subject) == ("C507", str(index))
    assert "norm.weight" in found.message


def test_an_existing_output(tmp_path):
    source = write_tiny(tmp_path / "source")
    (tmp_path / "out").mkdir()
    found = refused(source, tmp_path / "out")
    assert (found.code, found.subject) == ("C507", str(tmp_path / "out"))
    assert "nothing is overwritten" in found.message


def test_an_output_that_is_a_dangling_link(tmp_path):
    source = write_tiny(tmp_path / "source")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert refused(source, tmp_path / "out").code == "C507"


def test_the_source_as_output(tmp_path):
    source = write_tiny(tmp_path / "source")
    before = contents(source)
    assert "exists already" in refused(source, source).message
    assert contents(source) == before


@pytest.mark.parametrize("inside", ["out", "deep/out"])
def test_an_output_in_the_source(inside, tmp_path):
    source = write_tiny(tmp_path / "source")
    (source / "deep").mkdir()
    found = refused(source, source / inside)
    assert found.code == "C507"
    assert "lies in the source" in found.message


def test_an_output_in_the_source_by_a_link(tmp_path):
    source = write_tiny(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    assert "lies in the source" in refused(source, tmp_path / "link" / "out").message


def test_an_output_in_no_folder(tmp_path):
    source = write_tiny(tmp_path / "source")
    found = refused(source, tmp_path / "none" / "out")
    assert (found.code, found.subject) == ("C507", str(tmp_path / "none" / "out"))


def test_an_unwritable_target(tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is made up."""
    source = write_tiny(tmp_path / "source")

    def no(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(writer_module.os, "mkdir", no)
    found = refused(source, tmp_path / "out")
    assert found.code == "C507"
    assert "permission denied" in found.message


def test_a_disk_that_becomes_full_for_the_side_file(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mapdsl.checkpoint.sidecar.SideWriter._spool", full)
    with pytest.raises(MapError) as caught:
        mapdsl.convert(source, tmp_path / "out", MAP)
    found = only(caught.value)
    assert found.code == "C507"
    assert "no space left" in found.message and "--resume" in found.help
    assert not (tmp_path / "out").exists()


def test_a_listing_has_no_data(tmp_path):
    listing = tmp_path / "names.list"
    listing.write_text("a F32 2\n")
    assert "no tensors to convert" in refused(listing, tmp_path / "out").message


def test_no_source(tmp_path):
    found = refused(tmp_path / "none", tmp_path / "out")
    assert (found.code, found.subject) == ("C507", str(tmp_path / "none"))


def test_no_map(tmp_path):
    source = write_tiny(tmp_path / "source")
    assert refused(source, tmp_path / "out", "no_such_map").code == "N116"


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_a_missing_expert(tmp_path):
    source = spoiled(tmp_path, lambda state: state.pop("layers.1.ffn.experts.1.w2.weight"))
    found = refused(source, tmp_path / "out")
    assert found.code == "R605"
    assert "layers.1.ffn.experts.1.w2.weight" in found.message
    assert found.subject.startswith(str(source))
    assert "ffn.experts.{e}.w2.weight" in found.help, "the rule"


def test_a_missing_scale(tmp_path):
    source = spoiled(tmp_path, lambda state: state.pop("layers.1.ffn.experts.1.w2.scale"))
    found = refused(source, tmp_path / "out")
    assert found.code == "R605"
    assert "layers.1.ffn.experts.1.w2.scale" in found.message


def test_an_unmatched_tensor(tmp_path):
    source = spoiled(tmp_path, lambda state: state.update({"layers.0.surprise": torch.zeros(2)}))
    found = refused(source, tmp_path / "out", to="native")
    assert (found.code, found.subject) == ("R603", str(source / "model.safetensors"))
    assert "layers.0.surprise" in found.message


def test_a_wrong_shape(tmp_path):
    source = spoiled(tmp_path, lambda state: state.update({"norm.weight": torch.zeros(255, dtype=torch.bfloat16)}))
    found = refused(source, tmp_path / "out", to="native")
    assert (found.code, found.subject) == ("R606", str(source / "model.safetensors"))
    assert "norm.weight" in found.message
    assert "255" in found.message
    assert found.help.endswith(f"mapdsl check {MAP.source.path} --against {source}")


def test_the_command_that_lists_all_is_given_with_its_options(tmp_path):
    file, source = renames(tmp_path)
    (source / "config.json").rename(tmp_path / "own.json")
    found = refused(source, tmp_path / "out", file, to="new", config=tmp_path / "own.json", params={"N": 4})
    assert found.code == "R605"
    words = shlex.split(found.help.partition("listed by: ")[2])
    assert words[:2] == ["mapdsl", "check"]
    assert main(words[1:]) == 1
    there = renames_converted(tmp_path, file, source)
    assert "listed by" not in refused(there, tmp_path / "out", file, to="old", params={"N": 4}).help


def renames_converted(tmp_path: Path, file: Path, source: Path) -> Path:
    mapdsl.convert(source, tmp_path / "there", file, config=tmp_path / "own.json", use_complement=False)
    return tmp_path / "there"


def test_a_scale_of_the_wrong_shape(tmp_path):
    name = "layers.0.ffn.experts.0.w1.scale"
    source = spoiled(tmp_path, lambda state: state.update({name: state[name][:-1].clone()}))
    found = refused(source, tmp_path / "out", to="native")
    assert (found.code, found.subject) == ("R606", str(source / "model.safetensors"))
    assert name in found.message


def test_a_wrong_dtype(tmp_path):
    name = "layers.0.ffn.experts.0.w1.scale"
    source = spoiled(tmp_path, lambda state: state.update({name: state[name].view(torch.uint8)}))
    found = refused(source, tmp_path / "out", to="native")
    assert found.code == "C504"
    assert name in found.message


def test_a_config_without_a_field(tmp_path):
    file, source = renames(tmp_path)
    (source / "config.json").write_text("{}")
    found = refused(source, tmp_path / "out", file)
    assert (found.code, found.subject) == ("N115", str(source / "config.json"))
    assert "`n`" in found.message
    assert "--config" in found.help


def test_a_config_that_is_none(tmp_path):
    file, source = renames(tmp_path)
    for text in ("[]", "{", "\xff"):
        (source / "config.json").write_bytes(text.encode("latin-1"))
        found = refused(source, tmp_path / "out", file)
        assert (found.code, found.subject) == ("C507", str(source / "config.json"))


def test_an_unknown_param(tmp_path):
    file, source = renames(tmp_path)
    assert refused(source, tmp_path / "out", file, params={"Q": 1}).code == "N111"


def test_copies_that_differ_are_found_in_the_second_pass(tmp_path):
    file = tmp_path / "copies.map"
    file.write_text("map copies: old <-> new\n{repeat j:q|k}.a [x y] <-> a [x y]\n")
    state = {"q.a": torch.zeros(3, 2), "k.a": torch.tensor([[0.0, 0], [0, 0], [0, 1]])}
    source = write_state(tmp_path / "source", state)
    found = refused(source, tmp_path / "out", file)
    assert (found.code, found.subject) == ("R602", str(source / "model.safetensors"))
    assert "[2, 1]" in found.message


# --- sides -----------------------------------------------------------------------------------------------------------


def test_names_of_neither_side(tmp_path):
    file, _ = renames(tmp_path)
    source = write_state(tmp_path / "source", {"other": torch.zeros(1)}, {"n": 3})
    found = refused(source, tmp_path / "out", file)
    assert (found.code, found.subject) == ("C501", str(source))
    assert "neither those of old nor those of new" in found.message
    assert "old:" in found.help
    assert "new:" in found.help


@pytest.mark.parametrize("side", ["old", "new"])
def test_the_side_that_it_is_already(side, tmp_path):
    file, source = renames(tmp_path)
    if side == "new":
        mapdsl.convert(source, tmp_path / "there", file)
        source = tmp_path / "there"
    found = refused(source, tmp_path / "out", file, to=side)
    assert found.code == "R605"
    count = {"old": 4, "new": 4}[side]
    other = {"old": "new", "new": "old"}[side]
    assert f"{count} of its {count} names are those of the {side} side: did you mean --to {other}?" in found.help


def test_the_side_is_told_where_it_was_guessed(tmp_path):
    file, _ = renames(tmp_path)
    most = {f"{i}.a": torch.randn(3, 4) for i in range(3)}
    source = write_state(tmp_path / "most", most, {"n": 3})
    assert "taken for" not in refused(source, tmp_path / "out", file).help
    few = {"top": torch.zeros(1), "x": torch.zeros(1), "y": torch.zeros(1)}
    source = write_state(tmp_path / "few", few, {"n": 3})
    assert "this was taken for the old side, which has 1 of its 3 names" in refused(source, tmp_path / "out", file).help


def test_names_of_both_sides(tmp_path):
    file = tmp_path / "swap.map"
    file.write_text("map swap: old <-> new\na <-> b\nb <-> a\n")
    source = write_state(tmp_path / "source", {"a": torch.zeros(1), "b": torch.ones(1)})
    found = refused(source, tmp_path / "out", file)
    assert found.code == "D407"
    assert "--to old" in found.help
    assert "--to new" in found.help
    mapdsl.convert(source, tmp_path / "out", file, to="new")


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_what_an_interrupted_conversion_has_done_is_left(problem, tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")
    begun = writer_module.CheckpointWriter._begun
    seen: list[list[str]] = []

    def interrupted(self, name, tensor):
        if name == "model.norm.weight":
            seen.append(sorted(os.listdir(tmp_path)))
            raise problem
        return begun(self, name, tensor)

    monkeypatch.setattr(writer_module.CheckpointWriter, "_begun", interrupted)
    with pytest.raises(problem):
        mapdsl.convert(source, tmp_path / "out", MAP)
    assert seen[0] == [".out.partial", "source"], "it was under way"
    # An error of the program itself leaves nothing.
    assert sorted(os.listdir(tmp_path)) == (
        ["source"] if issubclass(problem, Exception) else [".out.partial", "source"]
    )


def test_a_terminated_conversion_leaves_nothing(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")

    def terminated(self, name, tensor):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(writer_module.CheckpointWriter, "_begun", terminated)
    assert main(["convert", str(source), str(tmp_path / "out"), "--map", NAME]) == 143
    assert os.listdir(tmp_path) == ["source"]
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


@pytest.mark.parametrize("change", ["dtype", "shape", "name", "silence"])
def test_a_second_pass_that_disagrees_with_the_first_is_an_error(change, tmp_path, monkeypatch):
    """The headers are written before any data: what comes then must be what they say."""
    file, source = renames(tmp_path)
    map_ = mapdsl.load(file)
    read_into = map_.adapter_class.read_into

    def unsteady(self, state, sink, read_back, **options):
        def other_sink(name, tensor):
            if tensor.is_meta or name != "head":
                sink(name, tensor)
            elif change != "silence":
                different = {"dtype": tensor.int(), "shape": tensor[:-1], "name": tensor}[change]
                sink("tail" if change == "name" else name, different)

        read_into(self, state, other_sink, read_back, **options)

    monkeypatch.setattr(map_.adapter_class, "read_into", unsteady)
    found = refused(source, tmp_path / "out", map_)
    assert found.code == {"dtype": "C504", "shape": "C503", "name": "C501", "silence": "C502"}[change]
