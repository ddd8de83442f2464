"""`convert --checksums` and `mapdsl checksums`: the SHA-256 of every tensor's bytes, written, and compared later."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MAP, assert_same_files, only, write_state, write_tiny
from safetensors import safe_open
from spoiling import flip, rewritten

import mapdsl
from mapdsl.checkpoint import checksums, engine
from mapdsl.checkpoint.checksums import CHECKSUM_FILE, compare_checksums, read_checksums, write_checksums
from mapdsl.checkpoint.journal import Journal
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, `source`, and the model that it converts to, `there`, with checksums."""
    folder = tmp_path_factory.mktemp("made")
    write_tiny(folder / "source")
    mapdsl.convert(folder / "source", folder / "there", MAP, checksums=True)
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path) -> Path:
    """A copy of the model, to spoil."""
    return Path(shutil.copytree(made / "there", tmp_path / "there"))


def sums(folder: Path) -> dict[str, str]:
    """The checksums as another tool finds them: by safetensors and hashlib."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                data = file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(data).hexdigest()
    return found


def written(folder: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in read_checksums(folder / CHECKSUM_FILE).items()}


# --- written ----------------------------------------------------------------------------------------------------------


def test_they_are_those_that_other_tools_find(made):
    assert written(made / "there") == sums(made / "there")
    entry = read_checksums(made / "there" / CHECKSUM_FILE)[NORM]
    assert (entry["dtype"], entry["shape"]) == ("BF16", [256])
    text = (made / "there" / CHECKSUM_FILE).read_text()
    assert list(json.loads(text)) == ["format", "algorithm", "tensors"]
    assert list(json.loads(text)["tensors"]) == sorted(sums(made / "there"))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("verify", [False, True])
def test_workers_and_verifying_change_nothing(made, tmp_path, monkeypatch, workers, verify):
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    options = {"workers": workers, "verify": verify, "checksums": True}
    mapdsl.convert(made / "source", tmp_path / "there", MAP, **options)
    assert_same_files(tmp_path / "there", made / "there")


def test_of_what_was_kept_as_it_is_too(tmp_path):
    source = write_tiny(tmp_path / "source", num_nextn_predict_layers=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    mapdsl.convert(source, tmp_path / "there", MAP)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP, checksums=True)
    assert written(tmp_path / "back") == sums(tmp_path / "back") == sums(source)


def test_a_distributed_checkpoint_has_the_same(made, tmp_path):
    mapdsl.convert(made / "source", tmp_path / "dcp", MAP, checksums=True, format="dcp")
    assert written(tmp_path / "dcp") == written(made / "there")
    assert compare_checksums(tmp_path / "dcp").equal


def test_they_are_found_while_the_rest_is_written(made, tmp_path, monkeypatch):
    left: list[int] = []
    found = checksums._sums
    monkeypatch.setattr(
        checksums, "_sums", lambda held, tensors, meter: left.append(len(tensors)) or found(held, tensors, meter)
    )
    mapdsl.convert(made / "source", tmp_path / "there", MAP, checksums=True)
    assert left == []


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_was_cut_short(made, tmp_path, monkeypatch, first):
    add = Journal.add

    def stopped(self: Journal, record: Any) -> None:
        add(self, record)
        if len(self.done) == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(made / "source", tmp_path / "there", MAP, checksums=first)
    mapdsl.convert(made / "source", tmp_path / "there", MAP, resume=True, checksums=True)
    assert_same_files(tmp_path / "there", made / "there")


def test_they_are_not_carried_over(made, tmp_path):
    done = mapdsl.convert(made / "there", tmp_path / "back", MAP)
    assert_same_files(tmp_path / "back", made / "source")
    assert CHECKSUM_FILE not in (*done.carried, *done.left_behind)
    found = mapdsl.verify(made / "source", made / "there", MAP)
    assert found.holds
    assert not any(CHECKSUM_FILE in text for text in found.not_compared)


# --- compared ---------------------------------------------------------------------------------------------------------


def test_a_byte_that_changed(there):
    assert compare_checksums(there).equal
    flip(there, NORM, 5)
    found = compare_checksums(there)
    assert (found.changed, found.missing, found.unknown, found.equal) == ((NORM,), (), (), False)
    assert found.same == len(sums(there)) - 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop(NORM), ((), (NORM,), ())),
        (lambda state: state.update(extra=torch.ones(2)), ((), (), ("extra",))),
        (lambda state: state.update({NORM: state[NORM].view(torch.int16)}), ((NORM,), (), ())),
        (lambda state: state.update({NORM: state[NORM].view(2, 128)}), ((NORM,), (), ())),
    ],
)
def test_names_dtypes_and_shapes(there, change, expected):
    other = rewritten(there, change, shard_bytes=300_000)
    found = compare_checksums(other, there / CHECKSUM_FILE)
    assert (found.changed, found.missing, found.unknown) == expected
    assert not found.equal


def test_how_tensors_are_shared_out_does_not_matter(there):
    assert compare_checksums(rewritten(there, len, shard_bytes=300_000), there / CHECKSUM_FILE).equal


def test_large_tensors_go_in_strips(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "STRIP_BYTES", 16)
    folder = write_state(tmp_path / "x", {"a": torch.randn(7, 3), "b": torch.empty(0), "c": torch.ones(8)})
    write_checksums(folder)
    assert written(folder) == sums(folder)
    assert compare_checksums(folder).bytes_read == (21 + 8) * 4


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(there, capsys):
    assert main(["checksums", str(there)]) == 0
    assert capsys.readouterr().out.startswith("equal: 93 tensors, ")
    assert main(["checksums", str(there), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    flip(there, NORM, 5)
    assert main(["checksums", str(there)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"differs: {NORM}"
    assert lines[1].startswith("different: 1 changed; 92 tensors equal, ")
    assert main(["checksums", str(there), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["changed"], found["same"]) == (False, [NORM], 92)


def test_convert_writes_them(made, tmp_path, capsys):
    command = ["convert", str(made / "source"), str(tmp_path / "there"), "--map", "deepseek_v4", "--checksums"]
    assert main(command) == 0
    assert_same_files(tmp_path / "there", made / "there")
    assert f"  {CHECKSUM_FILE} has the SHA-256 of every tensor\n" in capsys.readouterr().out


def test_many_that_differ_are_counted(tmp_path, capsys):
    folder = write_state(tmp_path / "x", {f"a.{n}": torch.ones(2) for n in range(30)})
    write_checksums(folder)
    for n in range(30):
        flip(folder, f"a.{n}", 0)
    assert main(["checksums", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert lines[20] == "differs: 10 more (--json lists all)"


def test_writing_them_for_any_checkpoint(made, tmp_path, capsys):
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    assert main(["checksums", str(source), "--write"]) == 0
    assert capsys.readouterr().out == f"wrote {source / CHECKSUM_FILE}\n"
    assert written(source) == sums(source)
    assert main(["checksums", str(source)]) == 0
    assert main(["checksums", str(made / "source"), "--file", str(source / CHECKSUM_FILE)]) == 0


def test_none_are_there(made, capsys):
    assert main(["checksums", str(made / "source")]) == 1
    err = capsys.readouterr().err
    assert "error[C507]: there are no checksums beside the tensors" in err
    assert "help: `--write` writes it" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "its format is None"),
        ('{"format": "mapdsl checksums 2", "algorithm": "sha256"}', "its format is 'mapdsl checksums 2'"),
        ('{"format": "mapdsl checksums 1", "algorithm": "sha256", "tensors": []}', "it has no `tensors`"),
        ('{"format": "mapdsl checksums 1", "algorithm": "sha256", "tensors": {"a": 1}}', "it has no `tensors`"),
        ("[", "the file of checksums is not the JSON expected"),
    ],
)
def test_a_file_that_is_none(there, capsys, text, expected):
    (there / CHECKSUM_FILE).write_text(text)
    assert main(["checksums", str(there)]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--file", "x"], ["--json"]])
def test_options_that_do_not_go_together(there, capsys, more):
    assert main(["checksums", str(there), "--write", *more]) == 2
    assert "--write goes with neither --file nor --json" in capsys.readouterr().err


def test_a_listing_has_no_data(tmp_path):
    (tmp_path / "x.list").write_text("a F32 2\n")
    with pytest.raises(MapError) as caught:
        compare_checksums(tmp_path / "x.list")
    assert "a listing has no tensors to read" in only(caught.value).message


def test_torch_is_not_needed(there):
    code = (
        "import sys; from mapdsl.cli.main import main; main(['checksums', sys.argv[1]]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(there)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_link_in_the_place_of_the_file_is_not_followed(there, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (there / CHECKSUM_FILE).unlink()
    (there / CHECKSUM_FILE).symlink_to(elsewhere)
    with pytest.raises(MapError) as caught:
        compare_checksums(there)
    assert only(caught.value).message == "the file is a link that leads out of its folder"
    before = {path.name for path in there.iterdir()}
    assert write_checksums(there) == there / CHECKSUM_FILE
    assert elsewhere.read_text() == "precious"
    assert not (there / CHECKSUM_FILE).is_symlink()
    assert compare_checksums(there).equal
    assert {path.name for path in there.iterdir()} == before


def test_nothing_is_left_of_a_file_that_cannot_be_written(there, monkeypatch):
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    was = (there / CHECKSUM_FILE).read_bytes()
    before = {path.name for path in there.iterdir()}
    monkeypatch.setattr(checksums.os, "replace", fails)
    with pytest.raises(MapError, match="no space left on device"):
        write_checksums(there)
    assert (there / CHECKSUM_FILE).read_bytes() == was
    assert {path.name for path in there.iterdir()} == before
