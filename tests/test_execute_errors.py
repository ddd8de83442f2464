"""States and configs that do not fit: each gets its code, and names the tensor and the rule; nothing hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.compiler.expand import expand
from mapdsl.language.diagnostics import MapError
from mapdsl.map import load
from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same, map_of, refused

ZEROS = torch.zeros


EXPERTS = "param E\nindex e < E\nexperts.{e}.w [f d] <-> stacked [e d f]\nnorm <-> ln\n"


def experts(**changes: Any) -> dict[str, Any]:
    state = {f"experts.{e}.w": ZEROS(3, 5) for e in range(3)} | {"norm": ZEROS(2)}
    return {k: v for k, v in (state | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        (experts(**{"experts.1.w": None}), "R605", ["1 of 3", "experts.1.w"]),
        (experts(norm=None), "R605", ["norm is missing"]),
        (experts(more=ZEROS(1)), "R603", ["more"]),
        (experts(**{"experts.3.w": ZEROS(3, 5)}), "R603", ["experts.3.w"]),
        (experts(**{"experts.01.w": ZEROS(3, 5)}), "R603", ["experts.01.w"]),
        (experts(**{"experts.2.w": ZEROS(5, 3)}), "R606", ["experts.2.w", "[3, 5]", "[5, 3]"]),
        (experts(**{"experts.2.w": ZEROS(15)}), "R606", ["experts.2.w", "dimensions"]),
        (experts(**{"experts.1.w": ZEROS(3, 5, dtype=torch.int32)}), "R606", ["experts.1.w", "float32", "int32"]),
    ],
)
def test_states_that_do_not_fit(state: dict[str, Any], code: str, words: list[str]) -> None:
    found = refused(EXPERTS, {"E": 3}, left=state)
    assert found.code == code
    assert all(word in found.message for word in words), found.message


def test_errors_name_the_rule_at_work() -> None:
    found = refused(EXPERTS, {"E": 3}, left=experts(**{"experts.2.w": ZEROS(5, 3)}))
    assert found.rule == "4: experts.{e}.w [f d] <-> stacked [e d f]"
    assert str(found).endswith("rule: 4: experts.{e}.w [f d] <-> stacked [e d f]")
    found = refused(EXPERTS, {"E": 3}, right={"stacked": ZEROS(4, 5, 3), "ln": ZEROS(2)})
    assert found.code == "R606"
    assert found.rule.startswith("4: ")
    assert "rule:" not in str(refused(EXPERTS, {"E": 3}, left=experts(more=ZEROS(1))))


@pytest.mark.parametrize("shape", [(4, 5, 3), (3, 5), (3, 5, 3, 1)])
def test_a_whole_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    assert refused(EXPERTS, {"E": 3}, right={"stacked": ZEROS(*shape), "ln": ZEROS(2)}).code == "R606"


def test_sizes_that_do_not_divide() -> None:
    text = "param h\nqkv [(h c)] <-> x [h c]\n"
    assert refused(text, {"h": 3}, left={"qkv": ZEROS(10)}).code == "X305"


def test_sizes_that_operands_disagree_on() -> None:
    text = "q [(2 c) d] + k [c d] <-> qk [(2 c + c) d]\n"
    found = refused(text, {}, left={"q": ZEROS(6, 5), "k": ZEROS(4, 5)})
    assert found.code == "R606"
    found = refused(text, {}, left={"q": ZEROS(6, 5), "k": ZEROS(3, 7)})
    assert found.code == "R606"
    assert "k" in found.message


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"k": (12, 16)},
            "k: expected 8 in dimension 0, found 12: [(G c) d] against [12, 16] with G=2 and c=4, d=16 as in q",
        ),
        (
            {"v": (8, 20)},
            "v: expected 16 in dimension 1, found 20: [(G c) d] against [8, 20] with G=2 and c=4, d=16 as in q",
        ),
        (
            {"q": (33, 16)},
            "q: 33 does not divide by 8: [(H c) d] against [33, 16] with H=8",
        ),
        (
            {"v": (8, 16, 1)},
            "v: expected 2 dimensions, found 3: [(G c) d] against [8, 16, 1] with G=2",
        ),
    ],
)
def test_the_tensor_of_a_group_that_does_not_fit_is_named(shapes: dict[str, Any], message: str) -> None:
    text = "param H\nparam G\nq [(H c) d] + k [(G c) d] + v [(G c) d] <-> qkv [(H c + G c + G c) d]\n"
    sizes = {"q": (32, 16), "k": (8, 16), "v": (8, 16)} | shapes
    found = refused(text, {"H": 8, "G": 2}, left={n: ZEROS(*shape) for n, shape in sizes.items()})
    assert found.message == message


def test_copies_that_differ() -> None:
    text = "{repeat j:a|b}.A [x d] <-> A [d x]\n"
    left = {"a.A": ZEROS(2, 3), "b.A": ZEROS(2, 3)}
    left["b.A"][1, 2] = -0.0
    found = refused(text, {}, left=left)
    assert found.code == "R602"
    assert "b.A" in found.message
    assert "[2, 1]" in found.message or "[1, 2]" in found.message


def test_copies_in_a_shape_that_differ() -> None:
    text = "param R\nparam g\nindex r < R\nk [(g repeat r c)] <-> kk [g c]\n"
    left = {"k": torch.arange(12.0)}
    assert refused(text, {"R": 3, "g": 2}, left=left).code == "R602"
    left = {"k": torch.tensor([0.0, 1, 0, 1, 2, 3, 2, 3])}
    assert map_of(text).adapter({"R": 2, "g": 2}).read(left)["kk"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_copy_in_a_shape_is_compared(place: int) -> None:
    text = "param R\nindex r < R\nk [(repeat r c)] <-> kk [c]\n"
    left = {"k": torch.tensor([5.0, 7.0] * 3)}
    assert map_of(text).adapter({"R": 3}).read(left)["kk"].tolist() == [5, 7]
    left["k"][2 * place] = 6.0
    found = refused(text, {"R": 3}, left=left)
    assert (found.code, "k (copy" in found.message) == ("R602", True)


def test_constants_and_ties_that_differ() -> None:
    text = "param d\n_ <-> b [d] = 0\nw <-> w\n_ <-> head = w\n"
    right = {"b": ZEROS(3), "w": torch.ones(2), "head": torch.ones(2)}
    adapter = map_of(text).adapter({"d": 3})
    assert set(adapter.write(right)) == {"w"}
    found = refused(text, {"d": 3}, right=right | {"b": torch.tensor([0, 0, -0.0])})
    assert found.code == "R601"
    assert "[2]" in found.message
    assert refused(text, {"d": 3}, right=right | {"b": ZEROS(2)}).code == "R606"
    assert refused(text, {"d": 3}, right=right | {"head": ZEROS(2)}).code == "R601"
    assert refused(text, {"d": 3}, right=right | {"head": torch.ones(3)}).code == "R601"
    assert refused(text, {"d": 3}, right={"b": ZEROS(3), "w": torch.ones(2)}).code == "R605"


def test_names_that_wildcards_must_not_carry() -> None:
    text = "a.weight <-> b.weight optional\n{..} <-> {..} else\n"
    adapter = map_of(text).adapter({})
    assert set(adapter.read({"a.weight": ZEROS(1), "x": ZEROS(1)})) == {"b.weight", "x"}
    found = refused(text, {}, left={"b.weight": ZEROS(1)})
    assert (found.code, "b.weight" in found.message) == ("R603", True)
    found = refused(text, {}, right={"a.weight": ZEROS(1)})
    assert (found.code, "a.weight" in found.message) == ("R603", True)


def test_names_whose_guard_does_not_hold_are_shut_out() -> None:
    text = "param L\nparam on\nindex i < L\nl.{i}.bias <-> m.{i}.bias where on and i > 0\n{..} <-> x.{..} else\n"
    adapter = map_of(text).adapter({"L": 2, "on": False})
    assert set(adapter.read({"l.2.bias": ZEROS(1), "y": ZEROS(1)})) == {"x.l.2.bias", "x.y"}
    assert refused(text, {"L": 2, "on": False}, left={"l.1.bias": ZEROS(1)}).code == "R603"
    assert refused(text, {"L": 2, "on": True}, left={"l.0.bias": ZEROS(1), "l.1.bias": ZEROS(1)}).code == "R603"


def test_narrower_wildcards_keep_their_names_on_both_sides() -> None:
    text = "param M\nmtp.{..} -> _ else where M == 0\na.{..} <-> b.{..} else\n{..} <-> {..} else\n"
    assert set(map_of(text).adapter({"M": 0}).read({"mtp.x": ZEROS(1), "y": ZEROS(1)})) == {"y"}
    assert refused(text, {"M": 1}, left={"mtp.x": ZEROS(1)}).code == "R603"
    assert refused(text, {"M": 0}, left={"b.x": ZEROS(1)}).code == "R603"
    assert refused(text, {"M": 0}, right={"mtp.x": ZEROS(1)}).code == "R603"


def test_dropped_ranges_keep_their_names_on_both_sides() -> None:
    text = "param L\nparam M\nindex x >= M\nlayers.{L+x}.{..} -> _ else\n{..} <-> {..} else\n"
    config = {"L": 2, "M": 1}
    adapter = map_of(text).adapter(config)
    assert set(adapter.read({"layers.2.w": ZEROS(1), "layers.3.w": ZEROS(1)})) == {"layers.2.w"}
    assert set(adapter.write({"layers.2.w": ZEROS(1)})) == {"layers.2.w"}
    assert refused(text, config, right={"layers.3.w": ZEROS(1)}).code == "R603"


def test_wildcards_of_one_segment_are_named_too() -> None:
    text = "param on\nold.{*}.w <-> new.{*} where on\n{..} <-> {..} else\n"
    assert set(map_of(text).adapter({"on": True}).read({"old.x.w": ZEROS(1), "z.w": ZEROS(1)})) == {"new.x", "z.w"}
    assert refused(text, {"on": True}, left={"new.x": ZEROS(1)}).code == "R603"
    assert refused(text, {"on": False}, left={"old.x.w": ZEROS(1)}).code == "R603"


def test_one_tensor_under_two_spellings() -> None:
    text = "a <-> b\naccept old for a\n"
    found = refused(text, {}, left={"a": ZEROS(1), "old": ZEROS(1)})
    assert (found.code, "old" in found.message) == ("C506", True)


def test_a_respelled_name_is_not_respelled_again() -> None:
    text = "b.{n:*} <-> right.{n:*}\nc.{n:*} <-> other.{n:*}\naccept a.{..} for b.{..}\naccept b.x.{..} for c.{..}\n"
    adapter = map_of(text).adapter({})
    assert set(adapter.read({"a.k": ZEROS(1), "b.x.k": ZEROS(1)})) == {"right.k", "other.k"}
    found = refused(text, {}, left={"a.x.k": ZEROS(1)})
    assert (found.code, "a.x.k" in found.message) == ("R603", True)


def test_partial_states() -> None:
    adapter = map_of(EXPERTS).adapter({"E": 3})
    assert set(adapter.read({"norm": ZEROS(2)}, partial=True)) == {"ln"}
    assert adapter.read({}, partial=True) == {}
    with pytest.raises(ConversionError, match="R605"):
        adapter.read({"experts.0.w": ZEROS(3, 5)}, partial=True)
    assert [name for name, _ in adapter.write_one("ln", ZEROS(2))] == ["norm"]
    assert [name for name, _ in adapter.write_one("stacked", ZEROS(3, 5, 3))] == [f"experts.{e}.w" for e in range(3)]
    with pytest.raises(ConversionError, match="R603"):
        adapter.write_one("unknown", ZEROS(1))


def test_one_tied_tensor_alone() -> None:
    adapter = map_of("w <-> w\n_ <-> head = w\n").adapter({})
    assert [name for name, _ in adapter.write_one("w", ZEROS(2))] == ["w"]
    assert adapter.write_one("head", ZEROS(2)) == []
    with pytest.raises(ConversionError, match=r"R605.*w is missing: head is tied to it"):
        adapter.write({"head": ZEROS(2)})
    assert adapter.write({"head": ZEROS(2)}, partial=True) == {}
    with pytest.raises(ConversionError, match=r"R601"):
        adapter.write({"w": ZEROS(2), "head": ZEROS(2) + 1}, partial=True)


def test_a_tied_tensor_has_a_shape() -> None:
    text = "param V\nparam D\nembed [V D] <-> embed\n_ <-> head [V d] = embed\nalso <-> _ = embed\n"
    adapter = map_of(text).adapter({"V": 5, "D": 3})
    assert adapter.right_keys() == {"embed": ((5, 3), None), "head": ((5, 3), None)}
    assert adapter.left_keys() == {"embed": ((5, 3), None), "also": ((5, 3), None)}
    expansion = expand(map_of(text).checked, {"V": 5, "D": 3})
    for side in ("left", "right"):
        assert {key.shape for key in expansion.keys(side)} == {(5, 3)}
    with pytest.raises(ConversionError, match=r"R606.*head.*expected 5"):
        adapter.write_one("head", ZEROS(4, 3))


def test_a_tied_tensor_in_blocks_has_their_shapes() -> None:
    text = "codec fp8 = block_scaled(f8e4m3, block=2x2)\nparam D\na.w [4 D] as fp8 <-> a\nb.w as fp8 <-> _ = a.w\n"
    keys = map_of(text).adapter({"D": 6}).left_keys()
    assert (keys["b.w"], keys["b.scale"]) == (keys["a.w"], keys["a.scale"])
    found = {key.name: key.shape for key in expand(map_of(text).checked, {"D": 6}).keys("left")}
    assert found == {name: shape for name, (shape, _) in keys.items()}
    assert found["b.scale"] == (2, 3)


def test_a_format_that_does_not_fit_is_told_by_every_list_of_names() -> None:
    text = "codec fp4 = block_scaled(f4e2m1, block=1x32)\nparam D\nx.w [4 D] as fp4|raw <-> x\n"
    adapter, expansion = map_of(text).adapter({"D": 7}), expand(map_of(text).checked, {"D": 7})
    found = []
    for listing in (
        adapter.left_keys,
        lambda: adapter.write({"x": ZEROS(4, 7)}, quantization=True),
        lambda: expansion.keys("left"),
    ):
        with pytest.raises((ConversionError, MapError)) as caught:
            listing()
        text = str(caught.value)
        found.append(text[text.index("D401") :].partition("\n")[0])
    assert len(set(found)) == 1
    assert "x.w" in found[0]
    assert "[4, 7]" in found[0]
    assert adapter.left_keys(quantization=False) == {"x.w": ((4, 7), None)}
    assert [key.shape for key in expansion.keys("left", quantization=False)] == [(4, 7)]


def test_no_experts_is_no_tensor_on_either_side() -> None:
    adapter = map_of(EXPERTS).adapter({"E": 0})
    assert set(adapter.read({"norm": ZEROS(2)})) == {"ln"}
    assert set(adapter.write({"ln": ZEROS(2)})) == {"norm"}
    assert set(adapter.write({"ln": ZEROS(2), "stacked": ZEROS(0, 5, 3)})) == {"norm"}
    assert set(adapter.right_keys()) == {"ln"}


# --- includes --------------------------------------------------------------------------------------------------------


def test_included_rules_run_under_their_prefix(tmp_path: Path) -> None:
    (tmp_path / "text.map").write_text(
        "map text: hf <-> native\nparam L = num_layers\nparam h = heads ?? 1\nindex i < L\n"
        "layers.{i}.q [(h c) d] <-> l.{i}.q [h d c]\nnorm <-> ln\nextra <-> more\nbias <-> b\n"
    )
    (tmp_path / "whole.map").write_text(
        "map whole: hf <-> native\nparam L = depth\nindex i < L\nvision.{i}.w <-> v.{i}\n"
        'language <-> model.text:\n    include "text.map" with config = text_config, h = L\n'
        "override language.bias [d] <-> model.text.b\nremove language.extra\n"
    )
    map_ = load(tmp_path / "whole.map")
    adapter = map_.adapter({"depth": 2, "text_config": {"num_layers": 1, "heads": 7}})
    state = {"vision.0.w": ZEROS(1), "vision.1.w": ZEROS(1), "language.norm": ZEROS(1), "language.bias": ZEROS(3)}
    state["language.layers.0.q"] = torch.arange(24.0).reshape(6, 4)
    found = adapter.read(state)
    assert set(found) == {"v.0", "v.1", "model.text.l.0.q", "model.text.ln", "model.text.b"}
    assert torch.equal(found["model.text.l.0.q"], state["language.layers.0.q"].reshape(2, 3, 4).permute(0, 2, 1))
    assert_same(adapter.write(found), state, "back")
    with pytest.raises(ConversionError) as caught:
        adapter.read({k: v for k, v in state.items() if k != "language.norm"})
    assert caught.value.rule == "text.map:6: norm <-> ln"


def test_without_experts_nothing_is_promised_and_nothing_missed(tmp_path: Path) -> None:
    text = "param E\nparam D\nnorm [D] <-> ln\nbias [E] <-> b\nrouter [E D] <-> r [D E]\ncount [(E D)] <-> _ = 0\n"
    map_ = map_of(text)
    stored = map_.adapter({"E": 0, "D": 2}).write({"ln": ZEROS(2)})
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"E": 0, "D": 2}')
    expansion = expand(map_.checked, {"E": 0, "D": 2})
    assert (
        {key.name for key in expansion.keys("left")} == set(stored) == set(map_.adapter({"E": 0, "D": 2}).left_keys())
    )
    adapter, empty = map_.adapter({"E": 0, "D": 2}), {**stored, "bias": ZEROS(0), "count": ZEROS(0)}
    assert_same(adapter.write(adapter.read(empty)), empty, "what is there without elements comes back")
    findings, _ = check_against(map_.checked, open_checkpoint(tmp_path), {"E": 0, "D": 2})
    assert findings == []
    findings, _ = check_against(map_.checked, open_checkpoint(tmp_path), {"E": 1, "D": 2})
    assert {finding.code for finding in findings} == {"C502"}
