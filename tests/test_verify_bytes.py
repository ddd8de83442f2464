"""`mapdsl verify` finds every byte that differs, and names its element and where that comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conversions import MAP, tiny_config, write_state, write_tiny
from spoiling import (
    element,
    flip,
    flip_everywhere,
    places,
    rewritten,
    state_of,
    value_at,
    verified,
)
from spoiling import made as made  # a fixture
from spoiling import work as work

import mapdsl
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.demo import random_state
from mapdsl.testing.suite import Suite

# --- what holds -------------------------------------------------------------------------------------------------------


def test_what_convert_makes_is_its_conversion(made):
    there, back = verified(made / "source", made / "there"), verified(made / "there", made / "back")
    assert there.holds
    assert back.holds
    assert (there.source_side, there.target_side) == ("hf", "native")
    assert (back.source_side, back.target_side) == ("native", "hf")
    assert there.tensors_compared == len(open_checkpoint(made / "there").tensors)
    assert back.bytes_compared == sum(t.nbytes for t in open_checkpoint(made / "back").tensors.values())
    assert there.not_compared == back.not_compared == ("files without tensors: tokenizer.json, config.json",)
    assert not there.is_decoded


def test_the_source_is_the_conversion_of_what_it_was_converted_to(made):
    assert verified(made / "there", made / "source").holds


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_files_may_be_others(made, tmp_path, shard_bytes):
    shutil.copytree(made / "there", tmp_path / "there")
    other = rewritten(tmp_path / "there", lambda state: None, shard_bytes=shard_bytes)
    assert (len(open_checkpoint(other).files) > 5) == (shard_bytes == 50_000)
    assert verified(made / "source", other).holds


def test_a_torch_file_is_compared_too(made, tmp_path):
    state = state_of(made / "there")
    name = next(name for name, tensor in state.items() if tensor.dim() == 3)
    state[name] = state[name].transpose(1, 2).contiguous().transpose(1, 2)
    torch.save(state, tmp_path / "model.pt")
    assert verified(made / "source", tmp_path / "model.pt").holds
    state[name][1, 2, 3] += 1
    torch.save(state, tmp_path / "model.pt")
    assert places(verified(made / "source", tmp_path / "model.pt")) == {name: (1, 2, 3)}


def test_decoded_to_another_dtype(made, tmp_path):
    mapdsl.convert(made / "source", tmp_path / "wide", MAP, dtype="f32")
    assert verified(made / "source", tmp_path / "wide", dtype=torch.float32).holds
    found = verified(made / "source", tmp_path / "wide")
    if "raw" in made.name:  # nothing was decoded
        assert found.holds
        return
    assert {d.kind for d in found.differences} == {"dtype"}
    assert found.hints == ("were tensors decoded to another dtype? --dtype f32",)


# --- one byte ---------------------------------------------------------------------------------------------------------


def test_a_byte_changed_in_every_model_tensor_is_found_where_it_is(work):
    expected = flip_everywhere(work / "there", Random(1))
    assert places(verified(work / "source", work / "there")) == expected


def test_a_byte_changed_in_every_stored_tensor_is_found_where_it_is(work):
    """Weights, scales, packed payloads; the source's side file says what they were."""
    expected = flip_everywhere(work / "back", Random(2))
    found = verified(work / "there", work / "back")
    assert places(found) == expected
    assert all((d.differing, d.nbytes > 0) == (1, True) for d in found.differences)


@pytest.mark.parametrize("seed", range(4))
def test_a_single_byte_is_found(work, seed):
    rng = Random(seed)
    for source, destination in (("there", "back"), ("source", "there")):
        stored = rng.choice(list(open_checkpoint(work / destination).tensors.values()))
        index = flip(work / destination, stored.name, rng.randrange(stored.nbytes), 1 << rng.randrange(8))
        assert places(verified(work / source, work / destination)) == {stored.name: index}


def test_values_are_told_with_their_bits(work):
    name = "model.norm.weight"
    torch_file = state_of(work / "there")[name]
    index = flip(work / "there", name, 7, 0x80)
    (difference,) = verified(work / "source", work / "there").differences
    was = float(torch_file[index])
    assert difference.expected.startswith(f"{was} (0x")
    assert difference.found.startswith(f"{-was} (0x")
    assert int(difference.expected[-5:-1], 16) ^ int(difference.found[-5:-1], 16) == 0x8000


def test_a_nan_with_another_payload_differs(tmp_path):
    (tmp_path / "one.map").write_text("map one: old <-> new\na <-> b\n")
    nan = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    write_state(tmp_path / "source", {"a": nan})
    mapdsl.convert(tmp_path / "source", tmp_path / "there", tmp_path / "one.map")
    assert verified(tmp_path / "source", tmp_path / "there", map=tmp_path / "one.map").holds
    assert flip(tmp_path / "there", "b", 4, 3) == (1,)
    (found,) = verified(tmp_path / "source", tmp_path / "there", map=tmp_path / "one.map").differences
    assert (found.index, found.expected, found.found) == ((1,), "nan (0x7fc00002)", "nan (0x7fc00001)")
    assert (found.sources, found.origin) == (("a",), "a[1]")


def test_workers_and_memory_on_disk_find_the_same(work, monkeypatch):
    """As with large checkpoints: several units at once, stacks made in memory that a file is behind."""
    from mapdsl.checkpoint import checker, engine

    views = []
    original = checker.Checker.view

    def viewing(self: Any, name: str) -> Any:
        views.append(original(self, name))
        return views[-1]

    monkeypatch.setattr(engine, "SMALL_BYTES", 1)
    monkeypatch.setattr(checker, "_LARGE_BYTES", 1)
    monkeypatch.setattr(checker.Checker, "view", viewing)
    torch.set_num_threads(max(2, torch.get_num_threads()))
    expected = flip_everywhere(work / "back", Random(9))
    assert places(verified(work / "there", work / "back")) == expected
    assert verified(work / "source", work / "there").holds
    expected = flip_everywhere(work / "there", Random(10))
    before = sorted(path.name for path in (work / "there").iterdir())
    found = verified(work / "source", work / "there")
    assert places(found) == expected
    assert not found.kept_differences
    assert not found.kept_problems
    assert views
    assert all(view is not None for view in views)
    assert sorted(path.name for path in (work / "there").iterdir()) == before


# --- where an element comes from --------------------------------------------------------------------------------------


def test_the_element_that_is_named_is_the_one(tmp_path):
    """Of a checkpoint stored as it is, the element named has the bits that were expected, both ways."""
    config = tiny_config()
    source = write_state(tmp_path / "source", random_state(config, "raw"), config)
    mapdsl.convert(source, tmp_path / "there", MAP)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    for start, end in (("there", "back"), ("source", "there")):
        flip_everywhere(tmp_path / end, Random(3))
        state = state_of(tmp_path / start)
        found = verified(tmp_path / start, tmp_path / end).differences
        assert len(found) == len(open_checkpoint(tmp_path / end).tensors)
        for difference in found:
            name = difference.origin.partition("[")[0]
            assert difference.sources == (name,)
            bits = element(state[name], difference.origin)
            assert difference.expected.endswith(f"(0x{bits})") or state[name].dtype == torch.int64


MAPS = sorted((Path(__file__).parent / "cases" / "testing").glob("*.map"))


@pytest.mark.parametrize("file", MAPS, ids=lambda file: file.stem)
def test_any_map(file, tmp_path):
    """Random checkpoints of maps with all that the language has: every byte is found, and its origin is the one."""
    suite = Suite(mapdsl.load(file))
    resolved = suite.checked.map
    example = suite.draw("verify")
    write_state(tmp_path / "source", example.left.tensors(), example.config)
    mapdsl.convert(tmp_path / "source", tmp_path / "there", suite.map, to=resolved.right, dtype=example.dtype)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", suite.map, to=resolved.left)
    ways = ("there", "back", {"to": resolved.left}), ("source", "there", {"to": resolved.right, "dtype": example.dtype})
    for start, end, options in ways:
        assert verified(tmp_path / start, tmp_path / end, map=suite.map, **options).holds
        before, source = state_of(tmp_path / end), state_of(tmp_path / start)
        expected = flip_everywhere(tmp_path / end, Random(file.stem))
        found = verified(tmp_path / start, tmp_path / end, map=suite.map, **options)
        tied = {text.partition(": it is tied")[0] for text in found.not_compared}
        assert places(found) | {name: index for name, index in expected.items() if name in tied} == expected
        for difference in found.differences:
            name = difference.origin.partition("[")[0]
            if file.stem == "codecs":  # where values are computed, and not only moved
                continue
            if difference.origin.endswith("]") and source[name].dtype == before[difference.name].dtype:
                was = value_at(before[difference.name], difference.index)
                assert element(source[name], difference.origin) == was[::-1].hex(), difference


def test_companions_and_packed_payloads_are_named(tmp_path):
    source = write_tiny(tmp_path / "source", "fp4")
    mapdsl.convert(source, tmp_path / "there", MAP)
    name = "model.layers.1.mlp.experts.gate_and_up_projs"  # [e d (j f)], f = 192
    index = flip(tmp_path / "there", name, 2 * (1 * 256 * 384 + 7 * 384 + 192 + 5))
    assert index == (1, 7, 197)
    (found,) = verified(source, tmp_path / "there").differences
    weight = "layers.1.ffn.experts.1.w3.weight"
    assert found.origin == f"{weight}[5, 3]"  # column 7 of two to a byte
    assert found.sources == (weight, "layers.1.ffn.experts.1.w3.scale")


def test_sources_of_what_wildcards_carry_and_of_legacy_names(tmp_path):
    file = tmp_path / "wild.map"
    file.write_text("map wild: old <-> new\nnorm <-> n\nrest.{..} <-> all.{..} else\naccept final for norm\n")
    source = write_state(tmp_path / "source", {"final": torch.ones(2), "rest.a.b": torch.zeros(3)})
    mapdsl.convert(source, tmp_path / "there", file)
    flip_everywhere(tmp_path / "there", Random(4))
    found = {d.name: d for d in verified(source, tmp_path / "there", map=file).differences}
    assert found["n"].sources == ("final",)
    assert found["n"].origin.startswith("final[")
    assert found["all.a.b"].sources == ("rest.a.b",)
    shutil.rmtree(tmp_path / "there")
    mapdsl.convert(source, tmp_path / "there", file)
    mapdsl.convert(tmp_path / "there", tmp_path / "back", file)
    expected = flip_everywhere(tmp_path / "back", Random(5))
    assert expected.keys() == {"final", "rest.a.b"}
    assert places(verified(tmp_path / "there", tmp_path / "back", map=file)) == expected


# --- tied tensors -----------------------------------------------------------------------------------------------------


TIED = "map tied: old <-> new\n_ <-> b [v d] = a\na [v d] <-> a\n_ <-> c [2] = 1.0\n"


@pytest.fixture
def tied(tmp_path) -> Path:
    (tmp_path / "tied.map").write_text(TIED)
    write_state(tmp_path / "source", {"a": torch.randn(4, 3)})
    mapdsl.convert(tmp_path / "source", tmp_path / "there", tmp_path / "tied.map")
    return tmp_path


def test_a_tied_tensor_that_differs_is_named(tied):
    assert verified(tied / "source", tied / "there", map=tied / "tied.map").holds
    flip(tied / "there", "b", 20)
    flip(tied / "there", "c", 2)
    found = verified(tied / "source", tied / "there", map=tied / "tied.map")
    assert places(found) == {"b": (1, 2), "c": (1,)}
    assert {d.origin for d in found.differences} == {"a value that the map states"}
    assert len(found.not_compared) == 1


@pytest.mark.parametrize("spoil", ["changed", "dropped"])
def test_a_tensor_tied_to_one_that_differs_is_not_blamed(tied, spoil):
    there = tied / "there"
    if spoil == "changed":
        flip(there, "a", 20)
    else:
        there = rewritten(there, lambda state: state.pop("a"))
    found = verified(tied / "source", there, map=tied / "tied.map")
    assert not found.holds
    assert [t.name for t in found.missing] + list(places(found)) == ["a"]
    assert "b: it is tied to a, which differs or is missing" in found.not_compared
