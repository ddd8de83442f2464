"""`mapdsl keys` and `mapdsl laws`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapdsl.checkpoint.listing import read_listing
from mapdsl.cli.main import main

LISTINGS = Path(__file__).parent / "data" / "listings"
CONFIG = str(LISTINGS / "deepseek_v4_flash.config.json")

MAP = """\
map small: hf <-> native

param E = experts
param D = width

index e < E

codec fp8 = block_scaled(f8e4m3, block=128x128, scale="{key}_s")

experts.{e}.w [f D] as fp8|raw <-> experts [e D f]
norm [D]                       <-> norm
scale [] as f32                <-> scale
old                            ->  _
any.{..}                       <-> any.{..} else
_                              <-> ones [D] = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.map").write_text(MAP)
    (tmp_path / "config.json").write_text('{"experts": 2, "width": 8}')
    return tmp_path


def test_keys_of_the_stored_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "small.map", "--config", "config.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "experts.0.w F8_E4M3 ?",
        "experts.0.w_s F32 ?",
        "experts.1.w F8_E4M3 ?",
        "experts.1.w_s F32 ?",
        "norm ? 8",
        "scale F32 -",
    ]


def test_keys_of_the_other_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "small.map", "--config", ".", "--side", "native"]) == 0
    assert capsys.readouterr().out.splitlines() == ["experts ? 2,8,?", "norm ? 8", "scale ? -", "ones ? 8"]


def test_keys_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["keys", "small.map", "--param", "E=1", "--param", "D=4", "--side", "native", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == {"dtype": None, "shape": [1, 4, None]}
    assert list(found) == ["experts", "norm", "scale", "ones"]


def test_keys_of_the_released_config_are_the_released_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "deepseek_v4", "--config", CONFIG]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    stored = read_listing(LISTINGS / "deepseek_v4_flash.list")
    assert sorted(line[0] for line in lines) == sorted(stored)
    for name, dtype, sizes in lines:
        assert dtype in ("?", stored[name].dtype), name
        shape = "-" if not stored[name].shape else ",".join(map(str, stored[name].shape))
        assert sizes == shape or "?" in sizes, name


def test_a_name_that_is_no_word_is_a_json_string(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "odd.map").write_text("map odd: hf <-> native\n\nparam D = width\n\na#b [D] <-> b\n")
    status = main(["keys", "odd.map", "--param", "D=2"])
    shown = capsys.readouterr()
    assert (status, shown.out) in ((0, '"a#b" ? 2\n'), (1, ""))  # whether a map may hold such a name is not ours


def test_laws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", "small.map"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "line rule hf -> native -> hf bare native -> hf -> native because"
    assert lines[1].startswith("10 experts.{e}.w [f D] as fp8|raw <-> experts [e D f] bit lossy lossy ")
    assert lines[2].startswith("11 norm [D] <-> norm bit bit bit")
    assert lines[4] == "13 old -> _ none none - dropped"
    assert lines[6] == "15 _ <-> ones [D] = 1 - - bit, guarded constant, compared"
    assert lines[-1] == "the file none none lossy"


def test_laws_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", "small.map", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["map"] == "small"
    assert found["trips"] == {"left": "hf -> native -> hf", "right": "native -> hf -> native"}
    first = found["rules"][0]
    assert (first["file"], first["line"]) == ("small.map", 10)
    assert first["left"] == {"grade": "bit", "reason": ""}
    assert first["left_bare"]["grade"] == "lossy"
    assert found["rules"][3]["right"] is None
    assert found["file"]["left"]["grade"] == "none"


def test_a_rule_that_holds_under_two_prefixes_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "map two: hf <-> native\n\na <-> A,\nb <-> B:\n    norm <-> norm\n"
    (folder / "two.map").write_text(text)
    assert main(["laws", "two.map"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["laws", "two.map", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rules"]) == 2
