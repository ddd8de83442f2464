"""`mapdsl verify` with what the side file keeps, and on the way back without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from conversions import MAP, NAME, renames, tiny_config, write_state, write_tiny
from spoiling import (
    EXPERTS,
    State,
    flip,
    flip_everywhere,
    places,
    rewritten,
    state_of,
    verified,
)
from spoiling import made as made  # a fixture
from spoiling import work as work

import mapdsl
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.cli.main import main
from mapdsl.demo import random_state

# --- the side file ----------------------------------------------------------------------------------------------------


def test_a_scale_that_no_value_tells_of_is_compared_with_the_one_kept(tmp_path):
    """A block of zeros decodes to zeros under any scale; the destination's side file has the one that was there."""
    state = random_state(tiny_config(), "fp8")
    weight, scale = "layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale"
    state[weight] = torch.zeros_like(state[weight].view(torch.uint8)).view(state[weight].dtype)
    state[scale] = torch.full_like(state[scale].view(torch.uint8), 127).view(state[scale].dtype)
    source = write_state(tmp_path / "source", state, tiny_config())
    mapdsl.convert(source, tmp_path / "there", MAP)
    flip(source, scale, 0)
    found = verified(source, tmp_path / "there")
    assert not found.differences
    (kept,) = found.kept_differences
    assert kept.name == f"{weight}|part.scale"
    assert not found.holds
    (tmp_path / "there" / SIDE_FILE).unlink()
    found = verified(source, tmp_path / "there")
    assert found.holds
    assert "what decoding loses of" in found.not_compared[0]


def test_a_byte_of_the_side_file(work):
    from mapdsl.checkpoint.headers import read_header

    kept = read_header(work / "there" / SIDE_FILE).tensors
    if not kept:
        assert "raw" in str(work.parent) or verified(work / "source", work / "there").holds
        return
    for tensor in (kept[0], kept[-1]):
        with (work / "there" / SIDE_FILE).open("r+b") as file:
            file.seek(tensor.begin)
            byte = file.read(1)[0]
            file.seek(tensor.begin)
            file.write(bytes([byte ^ 16]))
    found = verified(work / "source", work / "there")
    assert not found.differences
    assert not found.holds
    assert {p.partition("`")[2].partition("`")[0] for p in found.kept_problems} == {
        tensor.name.partition("|")[0] for tensor in (kept[0], kept[-1])
    }


def test_a_side_file_that_is_none(work):
    (work / "there" / SIDE_FILE).write_bytes(b"?")
    found = verified(work / "source", work / "there")
    assert len(found.kept_problems) == 1
    assert not found.holds
    assert verified(work / "source", work / "there", use_complement=False).holds


def test_a_side_file_of_another_map_and_of_other_headers(tmp_path):
    file, source = renames(tmp_path)
    mapdsl.convert(source, tmp_path / "there", file)
    other = write_state(tmp_path / "other", state_of(source), {"n": 3}, shard_bytes=30)
    found = verified(other, tmp_path / "there", map=file)
    assert not found.holds
    assert found.kept_problems[-1] == "it has another header for model.safetensors than the source"
    file.write_text(file.read_text() + "\nextra <-> extra optional\n")
    (problem,) = verified(source, tmp_path / "there", map=file).kept_problems
    assert problem == "it was made with another map, or another version of `renames`"


DROPS = "map drops: old <-> new\na <-> b\nc -> _\n"


def test_dropped_tensors_are_compared_where_they_are_kept(tmp_path):
    file = tmp_path / "drops.map"
    file.write_text(DROPS)
    source = write_state(tmp_path / "source", {"a": torch.ones(3), "c": torch.arange(4)})
    mapdsl.convert(source, tmp_path / "there", file)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", file)
    assert verified(tmp_path / "there", tmp_path / "back", map=file).holds
    assert flip(tmp_path / "back", "c", 9) == (1,)
    assert places(verified(tmp_path / "there", tmp_path / "back", map=file)) == {"c": (1,)}
    flip(source, "c", 16)
    found = verified(source, tmp_path / "there", map=file)
    assert [(d.name, d.index) for d in found.kept_differences] == [("c|stored", (2,))]
    (tmp_path / "there" / SIDE_FILE).unlink()
    found = verified(source, tmp_path / "there", map=file)
    assert found.holds
    assert found.not_compared[0] == "dropped by the map: c"


# --- the way back without it ------------------------------------------------------------------------------------------


@pytest.fixture
def bare(work) -> Path:
    (work / "there" / SIDE_FILE).unlink()
    return work


def test_a_quantised_destination_is_decoded(bare):
    is_raw = not any(t.dtype == "F8_E8M0" for t in open_checkpoint(bare / "source").tensors.values())
    found = verified(bare / "there", bare / "source")
    assert found.holds
    assert found.is_decoded is not is_raw
    assert any("was decoded" in text for text in found.not_compared) is not is_raw
    names = ("norm.weight", "model.norm.weight")
    index = flip(bare / "source", names[0], 5)
    found = verified(bare / "there", bare / "source")
    # in the names of the side that was made to compare, and from the other's
    name, origin = names if is_raw else names[::-1]
    assert places(found) == {name: index}
    assert found.differences[0].sources == (origin,)


def test_what_decoding_finds_is_told_in_terms_of_both(tmp_path):
    source = write_tiny(tmp_path / "source", "fp8")
    mapdsl.convert(source, tmp_path / "there", MAP, use_complement=False)
    state = state_of(tmp_path / "there")
    payload, name = "layers.1.ffn.experts.1.w2.weight", EXPERTS
    # an ordinary element: another bit of it is another value
    values = state[name][1].T
    row, column = next((r, c) for r in range(256) for c in range(192) if 0.01 < abs(float(values[r, c])) < 1)
    flip(source, payload, row * 192 + column, 8)
    found = verified(tmp_path / "there", source)
    assert found.is_decoded
    assert places(found) == {name: (1, column, row)}
    assert found.differences[0].expected.startswith(str(float(values[row, column])))
    assert found.differences[0].origin == f"{payload}[{row}, {column}]"


def test_a_destination_is_decoded_to_the_dtype_that_is_given(tmp_path):
    source = write_tiny(tmp_path / "source", "fp8")
    mapdsl.convert(source, tmp_path / "there", MAP, use_complement=False, dtype="f32")
    found = verified(tmp_path / "there", source)
    assert {(d.kind, d.expected[:3], d.found[:4]) for d in found.differences} == {("dtype", "F32", "BF16")}
    assert found.hints == ("were tensors decoded to another dtype? --dtype f32",)
    assert verified(tmp_path / "there", source, dtype="f32").holds


def test_a_destination_quantised_with_loss(tmp_path):
    (tmp_path / "one.map").write_text(
        'map one: old <-> new\ncodec fp8 = block_scaled(f8e4m3, block=128x128, scale="{key}_scale")\n'
        "a [x y] as fp8|raw <-> b [y x]\nc <-> d\n"
    )
    there = write_state(tmp_path / "there", {"b": torch.randn(200, 130).bfloat16(), "d": torch.ones(3)})
    mapdsl.convert(there, tmp_path / "back", tmp_path / "one.map", quantize=True)
    assert verified(there, tmp_path / "back", map=tmp_path / "one.map", quantize=True).holds
    found = verified(there, tmp_path / "back", map=tmp_path / "one.map")
    assert found.is_decoded
    assert places(found).keys() == {"b"}
    assert found.hints == ("was it quantised by `mapdsl convert --quantize`? then give --quantize here, too",)


def test_a_plain_destination_with_one_strange_dtype_is_not_decoded(bare, tmp_path):
    mapdsl.convert(bare / "there", tmp_path / "back", MAP)
    norm = "norm.weight"
    other = rewritten(tmp_path / "back", lambda state: state.update({norm: state[norm].view(torch.int16)}))
    found = verified(bare / "there", other)
    assert not found.is_decoded
    assert [(d.name, d.kind, d.found) for d in found.differences] == [(norm, "dtype", "I16 [256]")]


@pytest.mark.parametrize("change", ["renamed", "dropped", "added"])
def test_names_of_a_destination_that_is_decoded(change, tmp_path, capsys):
    source = write_tiny(tmp_path / "source", "fp8")
    mapdsl.convert(source, tmp_path / "there", MAP, use_complement=False)
    name = "layers.1.attn_norm.weight"
    changes: dict[str, Callable[[State], object]] = {
        "renamed": lambda state: state.update(odd=state.pop(name)),
        "dropped": lambda state: state.pop(name),
        "added": lambda state: state.update(odd=torch.ones(1)),
    }
    other = rewritten(source, changes[change])
    assert main(["verify", str(tmp_path / "there"), str(other), "--map", NAME]) == 1
    out, err = capsys.readouterr()
    assert ("odd" if change == "added" else name) in out + err
    assert "Traceback" not in err


def test_what_was_quantised_by_convert(bare, tmp_path):
    def tame(state: State) -> None:
        """No NaN, which FP4 cannot hold, and nothing beyond what its scales reach."""
        floats = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.bfloat16}
        state.update({name: tensor.nan_to_num().clamp(-9, 9) for name, tensor in floats.items()})

    there = rewritten(bare / "there", tame)
    mapdsl.convert(there, tmp_path / "back", MAP, quantize=True)
    found = verified(there, tmp_path / "back", quantize=True)
    assert found.holds
    assert not found.is_decoded
    expected = flip_everywhere(tmp_path / "back", Random(6))
    assert places(verified(there, tmp_path / "back", quantize=True)) == expected


def test_what_was_written_as_it_is(bare, tmp_path):
    mapdsl.convert(bare / "there", tmp_path / "back", MAP)
    found = verified(bare / "there", tmp_path / "back")
    assert found.holds
    assert not found.is_decoded
    expected = flip_everywhere(tmp_path / "back", Random(7))
    assert places(verified(bare / "there", tmp_path / "back")) == expected
