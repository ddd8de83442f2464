"""Every map of `tests/cases/testing/`, and every shipped one, keeps the properties; examples are drawn as promised."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from mapdsl.compiler.fields import fields_of
from mapdsl.language.diagnostics import MapError
from mapdsl.language.source import Source
from mapdsl.map import Map, load
from mapdsl.resources import shipped_maps
from mapdsl.testing import Suite, load_suite, run
from mapdsl.testing.bits import bits, random_bits, same
from mapdsl.testing.configs import draw_config, flat, nested
from mapdsl.testing.suite import Example

CASES = Path(__file__).parent / "cases" / "testing"
MAPS = sorted(CASES.glob("*.map"))
RANKS = [path for path in MAPS if path.stem.startswith("ranks")]


def suite(name: str) -> Suite:
    return load_suite(CASES / f"{name}.map")


def inline(text: str) -> Suite:
    """The suite of a map written here."""
    return Suite(Map(Source("inline.map", text)))


def examples(tested: Suite, count: int) -> list[Example]:
    return [tested.draw(number) for number in range(count)]


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.stem)
def test_every_case_keeps_the_properties(path: Path) -> None:
    count = 4 if path in RANKS else 12
    report = run(load_suite(path), examples=count, seed=path.stem)
    assert not report.failures, report.failures[0].text(str(path))
    assert report.tensors > 0
    assert {row.held for row in report.rows} == {count}
    assert ("split_and_merged" in {row.name for row in report.rows}) == (path in RANKS)


@pytest.mark.parametrize("name", shipped_maps())
def test_every_shipped_map_keeps_the_properties(name: str) -> None:
    tested = load_suite(name)
    report = run(tested, examples=2 if tested.checked.map.meshes else 5, seed=name)
    assert not report.failures, report.failures[0].text(name)
    assert report.tensors > 0


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_one_seed_draws_one_example() -> None:
    one, again, other = (suite("qkv").draw(seed) for seed in (3, 3, 4))
    assert one.config == again.config
    assert one.left.order == again.left.order
    assert all(same(tensor, again.left.canonical[name]) for name, tensor in one.left.canonical.items())
    assert one.left.canonical.keys() != other.left.canonical.keys() or any(
        not same(tensor, other.left.canonical[name]) for name, tensor in one.left.canonical.items()
    )


def test_guards_take_both_values() -> None:
    tested = inline('map m: a <-> b\nparam t = kind ?? "x"\nu <-> v where t == "x"\nw <-> v where t != "x"\n')
    found = {name for example in examples(tested, 20) for name in example.left.order}
    assert found == {"u", "w"}


def test_checkpoints_answer_has_both_ways() -> None:
    found = {name for example in examples(suite("variant"), 20) for name in example.left.order}
    assert found == {"old.weight", "new.weight"}


def test_optional_groups_come_and_go() -> None:
    tested = inline("map m: a <-> b\nu <-> v  optional\nx <-> y\n")
    counts = {len(example.left.order) for example in examples(tested, 20)}
    assert counts == {1, 2}


def test_indices_start_empty_and_reach_their_guards() -> None:
    tested = inline("map m: a <-> b\nparam L = n\nindex i < L\nu.{i} <-> v.{i} where i % 6 == 5\n")
    counts = {example.expansion.params["L"] for example in examples(tested, 60)}
    assert {0, 1} <= counts
    assert max(counts) > 5


def test_lists_are_long_enough_and_speak_the_words_of_guards() -> None:
    tested = inline(
        'map m: a <-> b\nparam L = n\nparam t = types\nindex i < L\nu.{i} <-> v.{i} where t[i+2] == "full"\n'
    )
    drawn = [example.config["types"] for example in examples(tested, 20)]
    assert {word for types in drawn for word in types} == {"full", "other"}


def test_tensors_come_in_every_format() -> None:
    tested = suite("codecs")
    seen = {t.codec.name for e in examples(tested, 30) for g in e.left.groups for t in g.tensors if t.codec}
    assert seen == {"fp8", "row", "raw", "fp4", "pe", "add", "neg_exp", "f32", "bf16"}


def test_some_names_are_legacy_spellings() -> None:
    old = {name for example in examples(suite("accept"), 30) for name in example.left.tensors()}
    assert any("gamma" in name for name in old)
    assert any(name.endswith(".ln.g") for name in old)


def test_dropped_and_carried_names_are_drawn() -> None:
    drawn = [example.left for example in examples(suite("nested_else"), 20)]
    rules = {group.match.rule: group for state in drawn for group in state.groups}
    assert any(not group.kept for group in rules.values())
    assert len(rules) >= 3


def test_bits_hold_what_random_floats_seldom_do() -> None:
    drawn = random_bits(torch.Generator().manual_seed(0), (400,), torch.bfloat16)
    words = {int(word) & 0xFFFF for word in bits(drawn)}
    assert {0x7FC1, 0x8000, 0x0001, 0x7F80} <= words
    assert drawn.isnan().any()


def test_no_axis_of_a_rule_has_the_size_of_another() -> None:
    tested = inline("map m: a <-> b\nu [x y z] <-> v [z y x]\n")
    for example in examples(tested, 10):
        shape = next(iter(example.left.canonical.values())).shape
        assert len(set(shape)) == 3


# --- configs ----------------------------------------------------------------------------------------------------------


def test_fields_are_read_from_the_whole_map() -> None:
    fields = fields_of(load("deepseek_v4").checked)
    assert fields.of["num_hidden_layers"].bounds_index
    assert fields.of["hidden_size"].is_size
    assert fields.of["compress_ratios"].kind == "list"
    assert fields.of["num_nextn_predict_layers"].optional
    assert not fields.of["num_hidden_layers"].optional


def test_dotted_fields_are_nested() -> None:
    config = {"text_config": {"hidden_size": 3, "num_layers": 2}, "kind": "x"}
    assert nested(flat(config)) == config
    example = suite("nested").draw(0)
    assert isinstance(example.config["text_config"]["hidden_size"], int)


def test_absent_fields_are_drawn_where_the_map_has_a_default() -> None:
    tested = suite("nested")
    drawn = [draw_config(tested.checked, tested.fields, Random(n), {}).config for n in range(40)]
    assert {"num_layers" in config["text_config"] for config in drawn} == {True, False}


def test_a_given_config_is_used_as_it_is() -> None:
    config = {"n_layers": 3, "num_heads": 2, "num_groups": 1}
    example = suite("qkv").example(config, 0)
    assert example.config == config
    assert any(name.startswith("layers.2.") for name in example.left.order)


def test_given_params_win() -> None:
    tested = load_suite(CASES / "qkv.map", params={"L": 2})
    assert all(example.expansion.params["L"] == 2 for example in examples(tested, 5))
    assert not run(tested, examples=3).failures


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_layers": 50_000, "num_heads": 1, "num_groups": 1}, "20,000 tensors"),
        ({"n_layers": 1, "num_heads": 9_000_000, "num_groups": 1}, "elements"),
        ({"n_layers": 1, "num_heads": 1}, "num_groups"),
        ({"n_layers": "many", "num_heads": 1, "num_groups": 1}, "not an integer"),
    ],
)
def test_configs_that_are_no_examples_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(MapError, match=words):
        suite("qkv").example(config, 0)


def test_a_map_that_no_config_fits_is_refused() -> None:
    tested = inline("map m: a <-> b\nparam p = n // 0\nindex i < p\nu.{i} <-> v.{i}\n")
    with pytest.raises(MapError, match="no small config fits"):
        tested.draw(0)


def test_an_unknown_param_is_told_at_once() -> None:
    with pytest.raises(MapError, match="no param `depth`"):
        run(load_suite(CASES / "qkv.map", params={"depth": 2}))
