"""`mapdsl convert` and `mapdsl demo` as commands: what they print, and with which status they end."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversions import MAP, NAME, assert_same_files, renames, write_state, write_tiny

import mapdsl
from mapdsl.checkpoint.progress import human
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.cli import demo
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import error


def test_convert_tells_what_it_did(tmp_path, capsys):
    source = write_tiny(tmp_path / "source")
    (source / "inference").mkdir()
    assert main(["convert", str(source), str(tmp_path / "there"), "--map", NAME]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"hf -> native: {tmp_path / 'there'}\n")
    assert "tokenizer.json, config.json" in out
    assert "left behind: inference/" in out
    assert f"{SIDE_FILE} keeps " in out
    (source / "inference").rmdir()
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--map", NAME]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("native -> hf: ")
    assert "names and headers of the checkpoint that was read" in out
    assert_same_files(tmp_path / "back", source)


def test_a_side_file_of_renames_keeps_the_layout_alone(tmp_path, capsys):
    file, source = renames(tmp_path)
    assert main(["convert", str(source), str(tmp_path / "there"), "--map", str(file)]) == 0
    assert f"  {SIDE_FILE} keeps the layout of the files for the way back\n" in capsys.readouterr().out


def test_convert_tells_of_what_did_not_fit_and_was_edited(tmp_path, capsys):
    from mapdsl.checkpoint.checkpoint import open_checkpoint
    from mapdsl.checkpoint.tensors import LazyState

    mapdsl.convert(write_tiny(tmp_path / "source"), tmp_path / "there", MAP)
    state = {name: tensor.clone() for name, tensor in LazyState(open_checkpoint(tmp_path / "there")).items()}
    state["model.norm.weight"] = state["model.norm.weight"].float()
    state["model.layers.1.mlp.experts.down_projs"][1, 5, 7] += 1.0
    write_state(tmp_path / "trained", state)
    (tmp_path / "there" / SIDE_FILE).rename(tmp_path / "trained" / SIDE_FILE)
    assert main(["convert", str(tmp_path / "trained"), str(tmp_path / "back"), "--map", NAME]) == 0
    out = capsys.readouterr().out
    assert "laid out anew: tensor `norm.weight` is now F32 [256], it was BF16 [256]" in out
    assert "edited: 1 block was encoded anew, in layers.1.ffn.experts.1.w2.weight" in out


def test_every_option_is_heeded(tmp_path, capsys):
    file, source = renames(tmp_path)
    (source / "config.json").unlink()
    words = ["convert", str(source), str(tmp_path / "there"), "--map", str(file), "--to", "new", "--dtype", "f32"]
    words += ["--param", "N=3", "--max-shard-size", "30", "--no-complement"]
    assert main(words) == 0
    assert "written to 4 files" in capsys.readouterr().out
    assert not (tmp_path / "there" / SIDE_FILE).exists()
    (tmp_path / "own.json").write_text('{"n": 3}')
    words = ["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--map", str(file), "--quantize"]
    assert main([*words, "--config", str(tmp_path / "own.json")]) == 0
    assert (tmp_path / "back" / "config.json").read_text() == '{"n": 3}'


def test_an_error_is_shown_without_a_traceback(tmp_path, capsys):
    source = write_tiny(tmp_path / "source")
    assert main(["convert", str(source), str(source), "--map", NAME]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{source}: error[C507]: the destination exists already")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "sideways"],
        ["--dtype", "i8"],
        ["--max-shard-size", "big"],
        ["--param", "N"],
        ["--to", "new", "--quantize"],
    ],
)
def test_bad_usage_has_status_2(words, tmp_path, capsys):
    file, source = renames(tmp_path)
    assert main(["convert", str(source), str(tmp_path / "there"), "--map", str(file), *words]) == 2
    assert "usage: mapdsl convert" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_the_map_must_be_named(tmp_path, capsys):
    assert main(["convert", str(tmp_path), str(tmp_path / "there")]) == 2
    assert "--map" in capsys.readouterr().err


def test_a_bar_is_drawn_on_a_terminal_where_it_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "quiet", file)
    assert capsys.readouterr().err == ""
    mapdsl.convert(source, tmp_path / "told", file, progress=True)
    assert "writing: " in capsys.readouterr().err


def test_a_terminal_gets_a_bar(tmp_path):
    """The command decides by what standard error is."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    file, source = renames(tmp_path)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    program = "import sys; from mapdsl.cli.main import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "convert", str(source), str(tmp_path / "there"), "--map", str(file)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=follower, stdin=subprocess.DEVNULL, check=False)
    shown = os.read(leader, 100_000).decode()
    os.close(follower)
    os.close(leader)
    assert done.returncode == 0
    assert "writing: " in shown


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000_000, "2.0 GB"), (10**16, "10000.0 TB")]
)
def test_bytes_for_people(count, text):
    assert human(count) == text


# --- demo ------------------------------------------------------------------------------------------------------------


def test_the_demo_shows_that_every_byte_came_back(tmp_path, capsys):
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "2 shards" in out
    assert out.count("identical") == 5
    assert "Every byte came back" in out
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["model", "released", "restored"]
    assert_same_files(tmp_path / "kept" / "restored", tmp_path / "kept" / "released")


def test_the_demo_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["demo"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) in capsys.readouterr().out


def test_without_numpy_nothing_is_said_of_it(tmp_path):
    code = "import sys; sys.modules['numpy'] = None; from mapdsl.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "demo"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("spoil", ["byte", "length", "gone", "more"])
def test_the_demo_fails_where_a_byte_differs(spoil, tmp_path, monkeypatch, capsys):
    convert = demo._convert

    def spoiled(number, source, destination):
        convert(number, source, destination)
        if destination.name == "restored":
            file: Path = destination / "model-00002-of-00002.safetensors"
            data = bytearray(file.read_bytes())
            data[1234] ^= 1
            {
                "byte": lambda: file.write_bytes(data),
                "length": lambda: file.write_bytes(data[:1234]),
                "gone": file.unlink,
                "more": lambda: (destination / "more").write_bytes(b""),
            }[spoil]()

    monkeypatch.setattr(demo, "_convert", spoiled)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    place = 1234 if spoil in ("byte", "length") else 0
    assert f"differs from byte {place:,} on" in out
    assert "1 file differs" in err
    assert "Every byte" not in out


def test_the_demo_writes_into_no_folder_that_is_there(tmp_path, capsys):
    assert main(["demo", "--keep", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}: error[C507]: the folder cannot be made: file exists")


@pytest.mark.parametrize(("fails", "left"), [("write_release", []), ("convert", [["released"]])])
def test_the_demo_leaves_no_empty_folder(fails, left, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise error("C507", "cannot write: no space left on device", subject="disk")

    monkeypatch.setattr("mapdsl.demo.write_release" if not left else "mapdsl.checkpoint.convert.convert", full)
    assert main(["demo", "--keep", str(tmp_path / "kept")]) == 1
    assert "no space left" in capsys.readouterr().err
    assert [sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()] == left


def test_the_demo_release_has_what_is_hard(tmp_path):
    """NaN codes in both payload formats' scales and values, odd scales, partial blocks, hash and prediction layers."""
    from mapdsl.demo import random_state, small_config

    state = random_state(small_config())
    scales = torch.cat([t.view(torch.uint8).flatten() for n, t in state.items() if n.endswith(".scale")])
    assert {0, 255} <= set(scales.tolist())
    codes = torch.cat([t.view(torch.uint8).flatten() for t in state.values() if t.dtype == torch.float8_e4m3fn])
    assert {0x7F, 0xFF, 0x80, 0x01} <= set(codes.tolist())
    assert any(t.dtype == torch.float8_e4m3fn and (t.shape[0] % 128 or t.shape[1] % 128) for t in state.values())
    assert "layers.0.ffn.gate.tid2eid" in state
    assert "mtp.0.ffn.gate.bias" in state
