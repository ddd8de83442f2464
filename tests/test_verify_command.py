"""`mapdsl verify`: names, dtypes, shapes and files that are wrong, and the command: what it prints, its status."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from conversions import NAME, only, renames
from spoiling import (
    EXPERTS,
    flip,
    flip_everywhere,
    renamed,
    rewritten,
    verified,
)
from spoiling import made as made  # a fixture
from spoiling import work as work

import mapdsl
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.passes import OptionError
from mapdsl.cli.main import main
from mapdsl.cli.verify import story
from mapdsl.language.diagnostics import MapError

# --- names, dtypes, shapes --------------------------------------------------------------------------------------------


def test_a_renamed_tensor(work):
    found = verified(work / "source", rewritten(work / "there", renamed))
    assert [tensor.name for tensor in found.missing] == ["model.norm.weight"]
    assert [tensor.name for tensor in found.unknown] == ["model.norm.wait"]
    assert not found.differences
    assert not found.holds


@pytest.mark.parametrize(
    ("change", "missing", "unknown"),
    [
        (lambda state: state.pop(EXPERTS), [EXPERTS], []),
        (lambda state: state.update(extra=torch.ones(2)), [], ["extra"]),
    ],
)
def test_a_tensor_dropped_or_added(work, change, missing, unknown):
    found = verified(work / "source", rewritten(work / "there", change))
    assert [tensor.name for tensor in found.missing] == missing
    assert [tensor.name for tensor in found.unknown] == unknown
    assert not found.differences
    assert not found.holds


def test_a_tensor_dropped_on_the_way_back(work):
    lost = next(n for n in open_checkpoint(work / "back").tensors if n.endswith(("1.w2.scale", "1.w2.weight")))
    found = verified(work / "there", rewritten(work / "back", lambda state: state.pop(lost)))
    assert [tensor.name for tensor in found.missing] == [lost]
    assert not found.differences


@pytest.mark.parametrize(
    ("change", "kind", "expected", "found"),
    [
        (lambda t: t.float(), "dtype", "BF16 [256]", "F32 [256]"),
        (lambda t: t.view(torch.int16), "dtype", "BF16 [256]", "I16 [256]"),
        (lambda t: t.reshape(16, 16), "shape", "BF16 [256]", "BF16 [16, 16]"),
    ],
)
def test_another_dtype_or_shape(work, change, kind, expected, found):
    other = rewritten(
        work / "there", lambda state: state.update({"model.norm.weight": change(state["model.norm.weight"])})
    )
    (difference,) = verified(work / "source", other).differences
    assert (difference.name, difference.kind) == ("model.norm.weight", kind)
    assert (difference.expected, difference.found) == (expected, found)
    assert difference.sources == ("norm.weight",)


def test_a_file_cut_short(work, capsys):
    file = work / "there" / open_checkpoint(work / "there").files[-1]
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    assert main(["verify", str(work / "source"), str(work / "there"), "--map", NAME]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error[C507]" in err
    assert str(file) in err
    assert "Traceback" not in err


def test_a_file_cut_while_it_is_read(work, monkeypatch, capsys):
    from mapdsl.checkpoint import verify

    original = verify.convert_tensors

    def cutting(*arguments: Any, **options: Any) -> None:
        for name in open_checkpoint(work / "there").files:
            with (work / "there" / name).open("r+b") as opened:
                opened.truncate(20_000)
        original(*arguments, **options)

    monkeypatch.setattr(verify, "convert_tensors", cutting)
    assert main(["verify", str(work / "source"), str(work / "there"), "--map", NAME]) == 1
    err = capsys.readouterr().err
    assert "error[C507]" in err
    assert "the file ends within tensor" in err


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_that_it_holds(made, capsys):
    assert main(["verify", str(made / "source"), str(made / "there"), "--map", NAME]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"hf -> native: {made / 'there'} is the conversion of {made / 'source'}\n")
    assert "compared, and what mapdsl.complement keeps, all equal" in out
    assert "  not compared: files without tensors: tokenizer.json, config.json\n" in out


def test_the_command_says_what_differs(work, capsys):
    index = flip(work / "there", EXPERTS, 1000)
    other = rewritten(work / "there", renamed)
    assert main(["verify", str(work / "source"), str(other), "--map", NAME]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "is not the conversion of" in out
    assert "  missing:\n    model.norm.weight BF16 256\n  unknown:\n    model.norm.wait BF16 256\n" in out
    assert f"  {EXPERTS}[{', '.join(map(str, index))}]: expected " in out
    assert "; 1 of 196,608 bytes differ\n    from layers.1.ffn.experts.0.w2.weight[" in out
    assert "1 differs, in " in out


def test_one_block_is_one_block(made):
    found = mapdsl.verify(made / "source", made / "there", NAME)
    for count, blocks in ((1, "1 block"), (1200, "1,200 blocks")):
        assert f"  encoded anew and compared so: {blocks} with other values" in story(
            replace(found, edited={"a": count})
        )


def test_the_command_as_json(work, capsys):
    index = flip(work / "back", "norm.weight", 11)
    assert main(["verify", str(work / "there"), str(work / "back"), "--map", NAME, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is False
    (difference,) = found["differences"]
    assert (difference["name"], difference["index"]) == ("norm.weight", list(index))
    assert difference["origin"] == "model.norm.weight[5]"
    assert found["missing"] == found["unknown"] == []


def test_many_differences_are_not_all_printed(work, capsys):
    count = len(flip_everywhere(work / "there", Random(8)))
    assert main(["verify", str(work / "source"), str(work / "there"), "--map", NAME]) == 1
    assert f"... and {count - 20:,} more tensors with other bytes (--json lists all)" in capsys.readouterr().out


def test_every_option_is_heeded(tmp_path, capsys):
    file, source = renames(tmp_path)
    (source / "config.json").unlink()
    (tmp_path / "own.json").write_text('{"n": 3}')
    mapdsl.convert(source, tmp_path / "there", file, config=tmp_path / "own.json")
    words = ["verify", str(source), str(tmp_path / "there"), "--map", str(file), "--to", "new"]
    assert main(words) == 1
    assert "error[N115]" in capsys.readouterr().err
    assert main([*words, "--config", str(tmp_path / "own.json")]) == 0
    assert main([*words, "--param", "N=3"]) == 1  # there the side file's record of the config is another one
    assert main([*words, "--param", "N=3", "--no-complement"]) == 0


@pytest.mark.parametrize(
    "words",
    [["--to", "sideways"], ["--dtype", "i8"], ["--param", "N"], ["--to", "new", "--quantize"]],
)
def test_bad_usage_has_status_2(words, tmp_path, capsys):
    file, source = renames(tmp_path)
    assert main(["verify", str(source), str(source), "--map", str(file), *words]) == 2
    assert "usage: mapdsl verify" in capsys.readouterr().err


def test_a_dtype_means_nothing_where_nothing_is_decoded(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    with pytest.raises(OptionError, match="--dtype"):
        verified(tmp_path / "there", source, map=file, dtype="f32")
    with pytest.raises(OptionError, match="i8"):
        verified(source, tmp_path / "there", map=file, dtype="i8")


def test_bad_input_is_told_without_a_traceback(tmp_path, capsys):
    file, source = renames(tmp_path)
    (tmp_path / "some.list").write_text("layer.0.a F32 3,4\n")
    for destination in ("nowhere", "some.list"):
        assert main(["verify", str(source), str(tmp_path / destination), "--map", str(file)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"{tmp_path / destination}: error[C507]")
        assert "Traceback" not in err


def test_a_source_that_does_not_fit_the_map(tmp_path):
    file, source = renames(tmp_path)
    other = rewritten(source, lambda state: state.pop("1.a"))
    with pytest.raises(MapError) as caught:
        verified(other, source, map=file, to="new")
    assert only(caught.value).code == "R605"


def test_a_bar_is_drawn_on_a_terminal_where_it_is_asked_for(made, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    verified(made / "source", made / "there")
    assert capsys.readouterr().err == ""
    verified(made / "source", made / "there", progress=True)
    assert "comparing: " in capsys.readouterr().err
