"""`mapdsl.complement`: whose it is, and what happens when it is damaged."""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MAP, assert_same_files, only, renames, write_state, write_tiny

import mapdsl
from mapdsl.checkpoint.headers import read_header
from mapdsl.checkpoint.sidecar import SIDE_FILE, SideFile, SideWriter
from mapdsl.language.diagnostics import MapError
from mapdsl.language.source import Source
from mapdsl.runtime.codecs.kept import Kept


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a release, `source`, and what it was converted to, `there`."""
    folder = tmp_path_factory.mktemp("side_file")
    write_tiny(folder / "source")
    mapdsl.convert(folder / "source", folder / "there", MAP)
    return folder


@pytest.fixture
def there(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "there", tmp_path / "there"))


def refused(there: Path, map_: Any = MAP) -> Any:
    """The diagnostic of the way back, which leaves nothing; without the side file there is a way."""
    before = sorted(there.parent.iterdir())
    with pytest.raises(MapError) as caught:
        loaded = map_ if isinstance(map_, mapdsl.Map) else mapdsl.load(map_)
        mapdsl.convert(there, there.with_name("back"), loaded, to=loaded.checked.map.left)
    assert sorted(there.parent.iterdir()) == before
    found = only(caught.value)
    assert found.subject == str(there / SIDE_FILE)
    assert "--no-complement" in found.help
    return found


def packed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The side file with `change` made to its header; `record` in it is unpacked meanwhile."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    texts = header["__metadata__"]
    texts["record"] = json.loads(zlib.decompress(base64.b64decode(texts["record"])))
    change(header)
    if not isinstance(texts["record"], str):
        texts["record"] = base64.b64encode(zlib.compress(json.dumps(texts["record"]).encode())).decode()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def record_of(header: dict[str, Any]) -> dict[str, Any]:
    return header["__metadata__"]["record"]


# --- what it is ------------------------------------------------------------------------------------------------------


def test_it_is_a_sound_safetensors_file(there):
    from safetensors import safe_open

    header = read_header(there / SIDE_FILE)
    with safe_open(there / SIDE_FILE, "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} >= {torch.uint8}
    assert len(names) == len(header.tensors) > 0
    widths = {"I64": 8, "F32": 4, "BF16": 2}
    assert all(tensor.begin % widths.get(tensor.dtype, 1) == 0 for tensor in header.tensors)


def test_unpacking_and_packing_it_changes_nothing(made, there, tmp_path):
    """The tests below change one thing; this shows that it is the change that they see."""
    packed(there / SIDE_FILE, lambda header: None)
    mapdsl.convert(there, tmp_path / "back", MAP)
    assert_same_files(tmp_path / "back", made / "source")


def test_it_holds_scales_not_payloads(there):
    side = SideFile(there / SIDE_FILE)
    _, kept = side["layers.0.ffn.experts.0.w1.weight"]
    assert kept.parts["scale"].dtype == torch.float8_e8m0fnu
    assert kept.where is not None
    assert len(kept.codes) < kept.shape[0] * kept.shape[1] / 2


# --- whose it is -----------------------------------------------------------------------------------------------------


def test_a_side_file_of_another_map(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    other = tmp_path / "others.map"
    other.write_text(file.read_text().replace("map renames", "map others"))
    found = refused(tmp_path / "there", other)
    assert found.code == "R607"
    assert "another map `renames`" in found.message


def test_a_side_file_of_another_version_of_the_map(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    file.write_text(file.read_text() + "\nextra <-> extra\n")
    found = refused(tmp_path / "there", file)
    assert found.code == "R607"
    assert "another version of map `renames`" in found.message


def test_comments_layout_order_and_examples_make_no_other_version(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    header, *lines = file.read_text().splitlines()
    example = "example top -> head"
    file.write_text("\n".join(["# What moves.", header, *reversed(lines), example, ""]).replace("   <->", " <->"))
    mapdsl.convert(tmp_path / "there", tmp_path / "back", file)
    assert_same_files(tmp_path / "back", source)


def test_a_side_file_that_does_not_fit_is_told_where_no_side_is_asked_for(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    file.write_text(file.read_text() + "\nextra <-> extra optional\n")
    with pytest.raises(MapError) as caught:
        mapdsl.convert(tmp_path / "there", tmp_path / "back", file)
    found = only(caught.value)
    assert (found.code, found.subject) == ("R607", str(tmp_path / "there" / SIDE_FILE))
    assert found.help.startswith("use the map as it was then, or convert without the side file (--no-complement)")


def test_a_disk_that_is_full_when_the_side_file_comes(tmp_path, monkeypatch):
    opened = Path.open

    def full(path: Path, mode: str = "r", *options: Any, **more: Any) -> Any:
        if path.name == SIDE_FILE and mode == "wb":
            raise OSError(28, "No space left on device")
        return opened(path, mode, *options, **more)

    file = tmp_path / "drops.map"
    file.write_text("map drops: old <-> new\na <-> b\nc -> _\n")
    source = write_state(tmp_path / "source", {"a": torch.ones(1), "c": torch.zeros(1)})
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MapError) as caught:
        mapdsl.convert(source, tmp_path / "there", file)
    found = only(caught.value)
    assert (found.code, found.subject) == ("C507", str(tmp_path / "there" / SIDE_FILE))
    assert "no space left on device" in found.message
    monkeypatch.setattr(Path, "open", opened)
    mapdsl.convert(source, tmp_path / "there", file, resume=True)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", file)
    assert_same_files(tmp_path / "back", source)


def test_an_included_map_counts_as_the_maps_text(tmp_path):
    part, file = tmp_path / "part.map", tmp_path / "whole.map"
    part.write_text("map part: old <-> new\na <-> b\n")
    file.write_text('map whole: old <-> new\ninclude "part.map"\nc <-> d\n')
    source = write_state(tmp_path / "source", {"a": torch.ones(1), "c": torch.zeros(1)})
    mapdsl.convert(source, tmp_path / "there", file)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", file)
    assert_same_files(tmp_path / "back", source)
    shutil.rmtree(tmp_path / "back")
    part.write_text("map part: old <-> new\na <-> b\nx <-> y optional\n")
    assert refused(tmp_path / "there", file).code == "R607"


def test_a_side_file_of_other_tensors(there, tmp_path):
    write_tiny(tmp_path / "other", num_nextn_predict_layers=0)
    mapdsl.convert(tmp_path / "other", tmp_path / "smaller", MAP)
    shutil.copy(tmp_path / "smaller" / SIDE_FILE, there / SIDE_FILE)
    found = refused(there)
    assert found.code == "R607"
    assert "was not there then" in found.message


def test_a_side_file_of_tensors_of_another_shape(there, tmp_path):
    write_tiny(tmp_path / "other", moe_intermediate_size=96)
    mapdsl.convert(tmp_path / "other", tmp_path / "thinner", MAP)
    shutil.copy(tmp_path / "thinner" / SIDE_FILE, there / SIDE_FILE)
    with pytest.raises(MapError) as caught:
        mapdsl.convert(there, tmp_path / "back", MAP, to="hf", config=there / "config.json")
    assert only(caught.value).code == "R607"
    assert not (tmp_path / "back").exists()


def test_a_side_file_of_another_checkpoint_of_the_same_shape_edits_blocks_only(there, tmp_path):
    """It cannot be told apart from edits: the values are right, and the count of blocks tells."""
    from mapdsl.checkpoint.checkpoint import open_checkpoint
    from mapdsl.checkpoint.tensors import LazyState
    from mapdsl.demo import random_state

    config = json.loads((there / "config.json").read_text())
    write_state(tmp_path / "other", random_state(config, "raw", seed=5), config)
    mapdsl.convert(tmp_path / "other", tmp_path / "values", MAP, use_complement=False)
    shutil.copy(there / SIDE_FILE, tmp_path / "values" / SIDE_FILE)
    done = mapdsl.convert(tmp_path / "values", tmp_path / "back", MAP)
    assert sum(done.edited.values()) > 10_000
    head = LazyState(open_checkpoint(tmp_path / "other"))["head.weight"]
    assert torch.equal(LazyState(open_checkpoint(tmp_path / "back"))["head.weight"], head)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_side_file_that_is_cut_short(size, there):
    os.truncate(there / SIDE_FILE, size % (there / SIDE_FILE).stat().st_size)
    found = refused(there)
    assert (found.code, found.subject) == ("C507", str(there / SIDE_FILE))
    assert "the side file is damaged: " in found.message
    assert "--no-complement" in found.help


@pytest.mark.parametrize("place", [-1, -5000])
def test_a_byte_that_is_wrong(place, there):
    data = bytearray((there / SIDE_FILE).read_bytes())
    data[place] ^= 1
    (there / SIDE_FILE).write_bytes(data)
    found = refused(there)
    assert found.code == "C507"
    assert "checksum" in found.message


def cut(header: dict[str, Any]) -> None:
    """The text is whole, but its checksum is not."""
    packed_record = zlib.compress(json.dumps(record_of(header)).encode())[:-4]
    header["__metadata__"]["record"] = base64.b64encode(packed_record).decode()


def bomb(header: dict[str, Any]) -> None:
    """A few kilobytes that would inflate to a multiple of the limit."""
    header["__metadata__"]["record"] = base64.b64encode(zlib.compress(b" " * 5_000_000)).decode()


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "format": lambda header: header["__metadata__"].update(format="mapdsl complement 99"),
    "no record": lambda header: header["__metadata__"].update(record=""),
    "no base64": lambda header: header["__metadata__"].update(record="%%%"),
    "no deflate": lambda header: header["__metadata__"].update(record=base64.b64encode(b"no").decode()),
    "a list": lambda header: header["__metadata__"].update(record=base64.b64encode(zlib.compress(b"[]")).decode()),
    "no JSON": lambda header: header["__metadata__"].update(record=base64.b64encode(zlib.compress(b"{")).decode()),
    "cut": cut,
    "no entries": lambda header: record_of(header).pop("entries"),
    "no dtypes": lambda header: record_of(header).pop("decoded"),
    "entries of another kind": lambda header: record_of(header).update(entries=["x"]),
    "no such form": lambda header: record_of(header).update(entries={"norm.weight": [99, 0]}),
    "forms of another kind": lambda header: record_of(header).update(forms=[1] * 9),
    "origin with more": lambda header: record_of(header)["origin"].update(more=1),
    "origin with less": lambda header: record_of(header)["origin"].pop("map_hash"),
    "headers of another kind": lambda header: record_of(header)["origin"].update(headers=3),
    "names of another kind": lambda header: record_of(header)["origin"].update(names=3),
    "texts of another kind": lambda header: record_of(header)["origin"].update(index_text=3),
    "a tensor less": lambda header: record_of(header)["forms"][0].update(roles=["part.other"]),
    "a dtype that is none": lambda header: record_of(header)["forms"][0]["kept"].update(codes="f99"),
    "a codec that is none": lambda header: record_of(header)["forms"][0].pop("alternative"),
    "kept of another kind": lambda header: record_of(header)["forms"][0].update(kept=[]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_side_file_that_cannot_be_understood(damage, there):
    packed(there / SIDE_FILE, damage)
    found = refused(there)
    assert found.code == "C507"
    assert "damaged" in found.message


def test_a_record_that_inflates_beyond_reason(there, monkeypatch):
    monkeypatch.setattr("mapdsl.checkpoint.sidecar._MAX_RECORD_BYTES", 1_000_000)
    packed(there / SIDE_FILE, bomb)
    found = refused(there)
    assert found.code == "C507"
    assert "too large" in found.message


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "config.json"])
def test_files_that_a_side_file_names_stay_in_the_folder(name, there, tmp_path):
    def rename(header):
        headers = record_of(header)["origin"]["headers"]
        first = next(iter(headers))
        record_of(header)["origin"]["headers"] = {
            (name if key == first else key): value for key, value in headers.items()
        }

    packed(there / SIDE_FILE, rename)
    before = sorted(path.name for path in tmp_path.parent.iterdir()), sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MapError) as caught:
        mapdsl.convert(there, tmp_path / "back", MAP, to="hf")
    assert only(caught.value).code in ("C507", "C506")
    after = sorted(path.name for path in tmp_path.parent.iterdir()), sorted(path.name for path in tmp_path.iterdir())
    assert before == after


@pytest.mark.parametrize("name", ["../index.json", "/index.json", "model-00001-of-00005.safetensors"])
def test_the_index_that_a_side_file_names_stays_in_the_folder(name, there, tmp_path):
    packed(there / SIDE_FILE, lambda header: record_of(header)["origin"].update(index_name=name))
    with pytest.raises(MapError) as caught:
        mapdsl.convert(there, tmp_path / "back", MAP, to="hf")
    assert only(caught.value).code in ("C507", "C506")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_it_keeps_the_dtypes_that_the_map_changes(tmp_path: Path) -> None:
    text = "map m: hf <-> native\nw [a b] <-> w [b a] as f32\nv as f32 <-> v\nzero [3] <-> _ = 0\n"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        place = tmp_path / str(dtype)
        place.mkdir()
        map_ = mapdsl.Map(Source("m.map", text))
        state = {"w": torch.randn(2, 3).to(dtype), "v": torch.ones(2), "zero": torch.zeros(3, dtype=dtype)}
        write_state(place / "source", state)
        mapdsl.convert(place / "source", place / "there", map_, to="native")
        mapdsl.convert(place / "there", place / "back", map_, to="hf")
        assert_same_files(place / "source", place / "back")


def test_what_is_the_same_of_many_tensors_is_held_once(tmp_path: Path) -> None:
    def writer() -> SideWriter:
        return SideWriter(tmp_path / "there", tmp_path)

    taken, names = writer(), [f"a.{number}" for number in range(100)]
    for name in names:
        codes = torch.zeros(0, dtype=torch.int8)
        taken[name] = "fp8", Kept("fp8", torch.bfloat16, (4, 4), codes, None, {"scale": torch.rand(1, 1)})
    restored = writer()
    restored.restore(json.loads(json.dumps(taken.record(names))))
    for one in (taken, restored):
        assert len({id(text) for text, _ in one._entries.values()}) == 1
        one.close()
    assert restored.record(names) == taken.record(names)


def test_what_was_kept_can_be_had_while_the_side_file_is_finished(tmp_path: Path) -> None:
    """Who verifies while all is written asks for what was kept at any time: the files are given up all at once."""
    writer = SideWriter(tmp_path / "there", tmp_path)
    writer.add_stored("narrow", torch.arange(3, dtype=torch.uint8))
    writer["x"] = ("RAW", None)
    writer.add_stored("wide", torch.arange(3, dtype=torch.float64))
    first, second = writer._spools.values()

    class Asked:
        """The second file: while it is closed, somebody asks."""

        flush = second.flush

        def close(self) -> None:
            self.answer = pool.submit(writer.record, ["x"])
            wait([self.answer], timeout=0.2)  # until all are closed, if need be
            assert first.closed
            second.close()

    asked = Asked()
    writer._spools = dict(zip(writer._spools, (first, asked), strict=True))  # type: ignore[assignment]
    with ThreadPoolExecutor() as pool:
        writer.close()
        assert asked.answer.result()[0][0] == "x"
