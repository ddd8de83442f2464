"""`mapdsl plan`: what it says is what `mapdsl convert` does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mapdsl
from mapdsl.checkpoint.journal import JOURNAL_FILE, Journal, partial_folder
from mapdsl.cli.main import main
from mapdsl.demo import small_config, write_release

LISTINGS = Path(__file__).parent / "data" / "listings"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "released"
    write_release(folder, small_config())
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--map", "deepseek_v4", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_what_is_done(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, target in ((released, "model"), (tmp_path / "model", "back")):
        plan = planned(capsys, str(source), str(tmp_path / target))
        assert not (tmp_path / target).exists()
        done = mapdsl.convert(source, tmp_path / target, "deepseek_v4")
        files = [tmp_path / target / name for name in done.files]
        assert plan["bytes_written"] == sum(file.stat().st_size for file in files)
        assert (plan["tensors_read"], plan["tensors_written"]) == (done.tensors_read, done.tensors_written)
        assert (plan["bytes_read"], plan["files_written"]) == (done.bytes_read, len(done.files))
        assert (plan["source_side"], plan["target_side"]) == (done.source_side, done.target_side)
        units = plan["units"]
        assert sum(unit["outputs"] for unit in units) + len(plan["dropped"]) >= done.tensors_written
        assert sum(unit["bytes_read"] for unit in units) <= plan["bytes_read"]
        if done.kept_bytes is None:
            assert plan["kept_bytes"] is None
        else:
            assert 0 < plan["kept_bytes"] <= done.kept_bytes


def test_stacked_experts_need_no_memory(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = {unit["output"]: unit for unit in planned(capsys, str(released))["units"]}
    experts = [unit for name, unit in units.items() if name.endswith("gate_and_up_projs")]
    assert experts and all(unit["held_bytes"] == 0 and unit["sources"] > 2 for unit in experts)


def test_a_listing_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    listing, config = LISTINGS / "deepseek_v4_flash.list", LISTINGS / "deepseek_v4_flash.config.json"
    assert main(["plan", str(listing), "--map", "deepseek_v4", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  read    69,187 tensors, 159.6 GB", "  write   1,316 tensors, 582.0 GB in 89 files"]


def test_a_disk_that_is_too_small(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(["plan", str(released), str(tmp_path / "out"), "--map", "deepseek_v4"]) == 1
    assert "C507" in (text := capsys.readouterr().err) and "the disk has 1,000 free" in text


def test_what_speaks_against_the_conversion_is_an_error(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(released / "tokenizer.json"), "--map", "deepseek_v4"]) == 1
    assert main(["plan", str(released), "--map", "deepseek_v4", "--param", "D=31"]) == 1
    assert "R606" in capsys.readouterr().err
    assert main(["plan", str(released), "--map", "deepseek_v4", "--workers", "0"]) == 2
    assert main(["plan", str(released), "--map", "deepseek_v4", "--to", "nowhere"]) == 2


@pytest.mark.parametrize("words", [["--quantize"], ["--to", "hf", "--dtype", "f32"], ["--format", "pt"]], ids=" ".join)
def test_it_refuses_the_options_that_convert_refuses(
    words: list[str], released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(released)
    if "--dtype" in words:
        mapdsl.convert(released, tmp_path / "model", "deepseek_v4")
        source = str(tmp_path / "model")
    told = []
    for command in ("plan", "convert"):
        assert main([command, source, str(tmp_path / "out"), "--map", "deepseek_v4", *words]) == 2
        told.append(capsys.readouterr().err.splitlines()[-1].removeprefix(f"mapdsl {command}: "))
    assert told[0] == told[1]
    assert words[-2 if "--dtype" in words else 0] in told[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["there", "in the source", "nowhere/out"])
def test_it_refuses_the_destinations_that_convert_refuses(
    place: str, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    destination = released / "out" if place == "in the source" else tmp_path / place
    told = []
    for command in ("plan", "convert"):
        assert main([command, str(released), str(destination), "--map", "deepseek_v4"]) == 1
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert told[0].startswith(f"{destination}: error[C507]: ")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--no-complement"],
        ["--no-complement", "--verify"],
        ["--verify", "--checksums"],
        ["--format", "dcp"],
        ["--max-shard-size", "2MB"],
    ],
    ids=str,
)
@pytest.mark.parametrize("missing", [0, 1])
def test_convert_begins_where_plan_says_that_there_is_room(
    options: list[str],
    missing: int,
    released: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = planned(capsys, str(released), *options)["needed_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - missing))
    told = []
    for command in ("plan", "convert"):
        status = main([command, str(released), str(tmp_path / "out"), "--map", "deepseek_v4", *options])
        assert status == missing
        told.append(capsys.readouterr().err.splitlines()[:1])
    assert told[0] == told[1]
    assert bool(told[0]) == missing


def test_what_is_put_aside_to_verify_needs_room(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = planned(capsys, str(released))["kept_bytes"]
    plain, verified = (
        planned(capsys, str(released), "--no-complement", *more)["needed_bytes"] for more in ([], ["--verify"])
    )
    assert verified - plain == kept > 0


def left_by(source: Path, out: Path, units: int, **options: Any) -> None:
    """A conversion that is interrupted when so many units are done."""
    add = Journal.add

    def stopped(self: Journal, record: Any) -> None:
        if len(self.done) == units:
            raise KeyboardInterrupt
        add(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(source, out, "deepseek_v4", **options)


def test_it_knows_what_an_earlier_run_has_left(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(released), str(tmp_path / "out"), "--map", "deepseek_v4"]
    left_by(released, tmp_path / "out", 7)
    left = {path.name: path.read_bytes() for path in (tmp_path / ".out.partial").iterdir()}
    for more in ([], ["--resume", "--dtype", "f32"]):
        told = []
        for command in ("plan", "convert"):
            assert main([command, *words, *more]) == 1
            told.append(capsys.readouterr().err)
        assert told[0] == told[1]
        assert ("7 units of it done" if not more else "an option changed\n") in told[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))  # its files have been made
    assert planned(capsys, *words[:2], "--resume")["done_units"] == 7
    assert main(["plan", *words, "--resume"]) == 0
    assert "7 of them done by an earlier run, with which --resume goes on" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / ".out.partial").iterdir()} == left
    assert main(["convert", *words, "--resume"]) == 0


def test_a_run_at_work_and_nothing_to_go_on_with(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(released), str(tmp_path / "out"), "--map", "deepseek_v4"]
    journal = Journal(tmp_path / "out", {"the map": "x"})
    assert main(["plan", *words]) == 1
    assert "another run is converting to this destination" in capsys.readouterr().err
    journal.close()
    for command in ("plan", "convert"):
        assert main([command, *words, "--resume"]) == 1
        assert "there is no unfinished conversion to go on with" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    partial_folder(tmp_path / "out").mkdir()  # a run that was killed before anything was done
    assert planned(capsys, *words[:2])["done_units"] == planned(capsys, *words[:2], "--resume")["done_units"] == 0
    journal_file = partial_folder(tmp_path / "out") / JOURNAL_FILE
    journal_file.write_text("nonsense\n")
    assert main(["plan", *words]) == 1
    assert f"{journal_file}: error[C507]: the journal of an unfinished" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    access = os.access
    # Root may write everywhere, so it is not enough to change the mode.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    assert main(["plan", str(released), str(tmp_path / "out"), "--map", "deepseek_v4"]) == 1
    assert "its folder cannot be written to" in capsys.readouterr().err


def test_packing_needs_one_shard_more(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed = (
        planned(capsys, str(released), "--max-shard-size", "2MB", "--no-complement", "--format", name)
        for name in ("safetensors", "dcp")
    )
    assert plain["needed_bytes"] == plain["bytes_written"] == packed["bytes_written"]
    overhead = 4096 * plain["tensors_written"]
    assert 1_500_000 < packed["needed_bytes"] - plain["needed_bytes"] - overhead < 2_100_000


def test_it_counts_the_workers_that_convert_has(
    released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(capsys, str(released), "--workers", "3")["workers"] == 1  # it is small
    monkeypatch.setattr("mapdsl.checkpoint.engine.SMALL_BYTES", 0)
    assert planned(capsys, str(released), "--workers", "3")["workers"] == 3
