"""Planning looks at each form of tensors once, and finds what looking at every tensor finds."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conversions import assert_same_files, write_tiny

import mapdsl
from mapdsl.checkpoint import formats
from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.passes import Request, make_plan
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime import group, put, stored_forms
from mapdsl.runtime.codecs.block_scaled import BlockScaled

DATA = Path(__file__).parent / "data"
LISTINGS = DATA / "listings"
FAMILIES = {"gpt_oss": "gpt_oss_20b", "llama_awq": "llama_2_7b_awq"}
DTYPES = ("F32", "BF16", "F16", "F64", "I8", "U8", "I64", "F8_E4M3", "F8_E5M2", "F8_E8M0")


@pytest.fixture
def each_by_itself(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is looked up while this is entered: every tensor is looked at."""
    with monkeypatch.context() as patch:
        yield patch


def look_at_each(patch: pytest.MonkeyPatch) -> None:
    for module in (stored_forms, group, put):
        patch.setattr(module, "MAX_KNOWN", 0)
    patch.setattr(formats.Formats, "forms", lambda *_: object())


def sources(tmp_path: Path) -> dict[str, tuple[mapdsl.Map, Checkpoint, Any]]:
    """Maps with checkpoints of their left sides, and the configs of these."""
    found = {}
    for experts in ("fp4", "fp8", "raw"):
        folder = write_tiny(tmp_path / experts, experts)
        found[experts] = mapdsl.load("deepseek_v4"), open_checkpoint(folder), None
    for name, listing in FAMILIES.items():
        rules = mapdsl.load(DATA / "maps" / f"{name}.map")
        found[name] = rules, open_checkpoint(LISTINGS / f"{listing}.list"), LISTINGS / f"{listing}.config.json"
    return found


def spoiled(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """The checkpoint with one tensor changed: not there, misnamed, or of another dtype or shape."""
    choose, tensors = random.Random(seed), dict(checkpoint.tensors)
    name = choose.choice(list(tensors))
    was = tensors[name]
    changes: list[dict[str, Any]] = [
        {"shape": tuple(size + 1 for size in was.shape)},
        {"shape": was.shape[:-1]},
        {"dtype": choose.choice(DTYPES)},
    ]
    kind = choose.randrange(len(changes) + 2)
    if kind < len(changes):
        tensors[name] = dataclasses.replace(was, **changes[kind])
    else:
        del tensors[name]
    if kind > len(changes):
        tensors[f"{name}_scale_inv"] = was
    return dataclasses.replace(checkpoint, tensors=tensors)


def planned(rules: mapdsl.Map, checkpoint: Checkpoint, config: Any, *, to_right: bool, **options: Any) -> Any:
    """All that a plan says, or the error that speaks against it."""
    try:
        plan = make_plan(Request(rules, checkpoint, config=config, **options), to_right=to_right)
    except MapError as problem:
        return str(problem)
    units = plan.units
    in_order = [list(texts.items()) for texts in (units.of_source, units.of_output, units.copied, units.in_place)]
    return plan.entries, in_order, units.count, plan.kept_bytes, plan.formats, plan.dropped


def right_side(entries: list[Any]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name, dtype, tuple(shape)) for name, dtype, shape in entries}


def test_plans_are_those_of_every_tensor_looked_at(tmp_path: Path, each_by_itself: pytest.MonkeyPatch) -> None:
    asked = []
    for rules, checkpoint, config in sources(tmp_path).values():
        asked.append((rules, checkpoint, config, {"to_right": True}))
        entries = planned(rules, checkpoint, config, to_right=True)[0]
        back = Checkpoint(checkpoint.path, "listing", right_side(entries))
        asked += [(rules, back, config, {"to_right": False, "quantize": quantize}) for quantize in (False, True)]
    quickly = [planned(rules, checkpoint, config, **how) for rules, checkpoint, config, how in asked]
    look_at_each(each_by_itself)
    slowly = [planned(rules, checkpoint, config, **how) for rules, checkpoint, config, how in asked]
    assert quickly == slowly
    # GPT-OSS' codecs can be written; AWQ's cannot, and that is all that fails.
    assert [place for place, found in enumerate(quickly) if isinstance(found, str)] == [len(asked) - 1]


def test_errors_are_those_of_every_tensor_looked_at(tmp_path: Path, each_by_itself: pytest.MonkeyPatch) -> None:
    bad = [
        (rules, spoiled(checkpoint, seed), config)
        for rules, checkpoint, config in sources(tmp_path).values()
        for seed in range(25)
    ]
    quickly = [planned(*one, to_right=True) for one in bad]
    look_at_each(each_by_itself)
    assert quickly == [planned(*one, to_right=True) for one in bad]
    assert sum(isinstance(found, str) for found in quickly) > len(bad) / 2


def test_findings_are_those_of_every_tensor_looked_at(tmp_path: Path, each_by_itself: pytest.MonkeyPatch) -> None:
    bad = [
        (rules, spoiled(checkpoint, seed)) for rules, checkpoint, _ in sources(tmp_path).values() for seed in range(40)
    ]
    quickly = [check_against(rules.checked, checkpoint) for rules, checkpoint in bad]
    look_at_each(each_by_itself)
    assert quickly == [check_against(rules.checked, checkpoint) for rules, checkpoint in bad]
    assert sum(bool(found) for found, _ in quickly) > len(bad) / 2


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", {"shape": (190, 128)}, "expected 192 in dimension 0, found 190"),
        ("weight", {"dtype": "U8"}, "has dtype U8, which is none of fp4|fp8|fp8v3"),
        ("scale", {"shape": (192, 4)}, "has shape [192, 4], expected [192, 8] beside [192, 256]"),
        ("scale", {"dtype": "F32"}, "has dtype F32, expected F8_E8M0"),
        ("scale", None, "is missing: the tensor is stored as fp4"),
    ],
)
def test_one_expert_of_many_is_found(tmp_path: Path, part: str, change: dict[str, Any] | None, message: str) -> None:
    rules, checkpoint, _ = sources(tmp_path)["fp4"]
    tensors, name = dict(checkpoint.tensors), f"layers.1.ffn.experts.1.w3.{part}"
    was = tensors.pop(name)
    if change is not None:
        tensors[name] = dataclasses.replace(was, **change)
    found, _ = check_against(rules.checked, dataclasses.replace(checkpoint, tensors=tensors))
    assert found and all("layers.1.ffn.experts.1.w3" in one.message for one in found)
    assert any(message in one.message for one in found), [one.message for one in found]


def test_workers_pass_over_what_is_not_theirs(tmp_path: Path, each_by_itself: pytest.MonkeyPatch) -> None:
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "quickly", "deepseek_v4", workers=2)
    mapdsl.convert(tmp_path / "quickly", tmp_path / "back", "deepseek_v4", workers=2)
    look_at_each(each_by_itself)
    mapdsl.convert(source, tmp_path / "slowly", "deepseek_v4", workers=2)
    assert_same_files(tmp_path / "quickly", tmp_path / "slowly")
    assert_same_files(tmp_path / "back", source)


def test_a_form_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counted(self: BlockScaled, key: str, *arguments: Any, **options: Any) -> Any:
        decoded.append(key)
        return decode(self, key, *arguments, **options)

    decode = BlockScaled.decode
    monkeypatch.setattr(BlockScaled, "decode", counted)
    listing = LISTINGS / "deepseek_v4_flash.list"
    plan = make_plan(Request(mapdsl.load("deepseek_v4"), open_checkpoint(listing)), to_right=True)
    assert len(plan.formats) == 34_167
    assert len(decoded) < 20  # one for each shape that is stored in FP8, and one for FP4's each


def test_the_config_beside_a_listing_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in (".list", ".config.json"):
        shutil.copy(LISTINGS / f"deepseek_v4_flash{suffix}", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    assert main(["plan", str(tmp_path / "deepseek_v4_flash.list"), "--map", "deepseek_v4"]) == 0
    assert "1,316 tensors, 582.0 GB" in capsys.readouterr().out


def test_a_packed_tensor_of_one_dimension_is_a_finding() -> None:
    checkpoint = open_checkpoint(LISTINGS / "llama_2_7b_awq.list")
    name = "model.layers.3.mlp.down_proj.qweight"
    tensors = {**checkpoint.tensors, name: dataclasses.replace(checkpoint.tensors[name], shape=(11008,))}
    rules = mapdsl.load(DATA / "maps" / "llama_awq.map")
    found, _ = check_against(rules.checked, dataclasses.replace(checkpoint, tensors=tensors))
    assert [one.code for one in found] == ["C503"]
    assert found[0].message == f"{name} has shape [11008], too few dimensions for a tensor stored as awq"
