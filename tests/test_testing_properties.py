"""Each property can fail: broken adapters break the property that is made for them, and failures are told small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.cli.main import main
from mapdsl.language.source import Source
from mapdsl.map import Map, load
from mapdsl.testing import PROPERTIES, Failure, PropertyError, Suite, load_suite, properties_for, run
from mapdsl.testing.runner import broken

CASES = Path(__file__).parent / "cases" / "testing"
BLOOM = CASES / "bloom.map"

TEXT = """map m: hf <-> native
param L = n
index i < L
codec fp8 = block_scaled(f8e4m3, block=4x4, scale="{stem}.scale", scale_dtype=f32)
u.{i}.weight as fp8|raw <-> u.{i}
x.{i}.{j:a|b} [p q] <-> x.{i} [j q p]
"""
PLAIN = Map(Source("m.map", TEXT))
Made = dict[str, Tensor]


def adapter(**methods: Any) -> type[Any]:
    """The adapter of the map with some of its methods replaced."""
    return type("Broken", (PLAIN.adapter_class,), methods)


def failing(broken_adapter: type[Any], tested: Map = PLAIN) -> set[str]:
    """The properties that an adapter breaks, over a few examples."""
    report = run(Suite(tested, broken_adapter), examples=6)
    return {name for failure in report.failures for name in failure.names}


def changed(method: str, change: Callable[[Made], Any], **only: object) -> type[Any]:
    """An adapter whose results of a method are changed where it is called with these options."""

    def wrapped(self: Any, state: Mapping[str, Tensor], **options: Any) -> Made:
        made = getattr(PLAIN.adapter_class, method)(self, state, **options)
        if all(options.get(name) == value for name, value in only.items()):
            change(made)
        return made  # type: ignore[no-any-return]

    return adapter(**{method: wrapped})


def negate_first(made: Made) -> None:
    """Flip one bit of one tensor."""
    for name, tensor in made.items():
        if tensor.numel() and not tensor.is_meta and name.startswith("x"):
            changed_one = tensor.clone().contiguous()
            changed_one.view(-1)[:1].view(torch.uint8)[-1:] ^= 1
            made[name] = changed_one
            return


def drop_scale(made: Made) -> None:
    for name in [name for name in made if name.endswith(".scale")][:1]:
        del made[name]


def tolerant(*codes: str) -> type[Any]:
    """An adapter that overlooks some errors."""

    def wrapped(self: Any, state: Mapping[str, Tensor], **options: Any) -> Made:
        try:
            return PLAIN.adapter_class.read(self, state, **options)
        except ValueError as err:
            if getattr(err, "code", None) in codes:
                return {}
            raise

    return adapter(read=wrapped)


def twice(self: Any, state: Mapping[str, Tensor], **options: Any) -> Made:
    for name in state:
        _ = state[name]
    return PLAIN.adapter_class.read(self, state, **options)


def lose_groups(made: Made) -> None:
    made.clear()


def as_float(made: Made) -> None:
    for name, tensor in made.items():
        if tensor.is_meta:
            made[name] = tensor.to(torch.float64)


def test_a_good_adapter_breaks_nothing() -> None:
    assert failing(adapter()) == set()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("promised_names", adapter(left_keys=lambda self, **_: {})),
        ("placed", changed("read", negate_first)),
        ("there_and_back", changed("write", negate_first, quantization=True)),
        ("back_and_there", changed("write", negate_first, quantization=False)),
        ("encoded_anew", changed("write", drop_scale, quantization=True)),
        ("meta_tensors", changed("read", as_float)),
        ("asked_once", adapter(read=twice)),
        ("one_missing", tolerant("R605")),
        ("one_too_many", tolerant("R603")),
        ("single_groups", changed("read", lose_groups, partial=True)),
    ],
)
def test_each_property_can_fail(name: str, bad: type[Any]) -> None:
    assert name in failing(bad)


def test_shuffling_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    other = changed("read", negate_first)
    monkeypatch.setattr(Suite, "shuffled", lambda self, order: other)
    assert failing(adapter()) == {"shuffled_rules"}


def test_a_wrong_layout_that_inverts_itself_is_seen() -> None:
    # Both directions agree with each other, so every round trip holds; but the elements lie elsewhere.
    text = BLOOM.read_text()
    wrong = Map(Source("wrong.map", text.replace("[(h j c) d]", "[(j h c) d]", 1)))
    assert failing(wrong.adapter_class, load(BLOOM)) == {"placed", "shuffled_rules"}


def test_a_crash_breaks_the_property() -> None:
    def crash(self: Any, state: Mapping[str, Tensor], **options: Any) -> Made:
        raise TypeError("no such thing")

    example = Suite(PLAIN, adapter(read=crash)).draw(0)
    message = broken(example, "placed")
    assert message is not None
    assert message.startswith("TypeError: no such thing\nat ")


# --- how a failure is told --------------------------------------------------------------------------------------------


def first_failure(bad: type[Any]) -> Failure:
    return run(Suite(PLAIN, bad), examples=6).failures[0]


def test_a_failure_is_shrunk() -> None:
    def late(made: Made) -> None:
        if "x.1" in made:
            negate_first(made)

    failure = first_failure(changed("read", late))
    assert failure.config == {"n": 2}


def test_a_failure_names_the_first_difference() -> None:
    failure = first_failure(changed("read", negate_first))
    assert failure.name == "placed"
    assert failure.message.startswith("x.0: the first difference is at [0, 0, 0]: expected 0x")
    assert failure.title.startswith("hf -> native: ")


def test_alike_failures_are_told_once() -> None:
    def crash(self: Any, state: Mapping[str, Tensor], **options: Any) -> Made:
        raise ValueError("nothing works")

    report = run(Suite(PLAIN, adapter(read=crash)), examples=2)
    shared = max(report.failures, key=lambda failure: len(failure.also))
    assert {"placed", "there_and_back", "meta_tensors"} <= set(shared.names)


def test_a_reproduction_reproduces(tmp_path: Path) -> None:
    path = tmp_path / "m.map"
    path.write_text(TEXT)
    failure = first_failure(changed("read", negate_first))
    text = failure.text(str(path))
    lines = text.split("to see it again:\n")[1]
    code = "\n".join(line.strip() for line in lines.splitlines())
    scope: dict[str, Any] = {}
    exec(code, scope)  # the adapter of the map itself holds
    again = Suite(PLAIN, changed("read", negate_first)).example(scope["config"], failure.seed)
    with pytest.raises(PropertyError) as caught:
        PROPERTIES[failure.name](again)
    assert str(caught.value) == failure.message


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", str(BLOOM), "--examples", "3", "--seed", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == properties_for(load_suite(BLOOM))
    assert all(line.split()[1:4] == ["holds", "3", "examples"] for line in lines[:-1])
    assert lines[-1].startswith("3 examples, ")


def test_the_command_tells_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(example: object) -> None:
        """left -> right: nothing."""
        raise PropertyError("x.0: it differs")

    monkeypatch.setitem(PROPERTIES, "placed", fails)
    assert main(["test", str(BLOOM), "--examples", "2"]) == 1
    out = capsys.readouterr().out
    assert "placed          fails" in out
    assert "placed does not hold: hf -> native: nothing.\n  x.0: it differs\n" in out
    assert f"load_suite('{BLOOM}').example(config, '0.0." in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--examples", "0"], 2, "expected a number from 1"),
        (["--examples", "9999999"], 2, "expected a number from 1"),
        (["--examples", "x"], 2, "expected a number from 1"),
        (["--param", "depth=3"], 1, "error[N111]"),
        (["--config", "nowhere.json"], 1, "error[C507]"),
        (["--param", "h=9000000"], 1, "error[C505]"),
    ],
)
def test_bad_requests(arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", str(BLOOM), *arguments]) == status
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_a_config_file_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    assert main(["test", str(BLOOM), "--config", str(tmp_path), "--examples", "2"]) == 0
    assert "2 examples, 18 stored tensors" in capsys.readouterr().out
