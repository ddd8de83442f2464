"""What `mapdsl laws` says of casts and changes of value, measured over every value of 16 bits and many of 32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mapdsl.compiler.laws import GRADES, RuleLaw, rule_law
from mapdsl.map import load
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.values import Add, Cast, NarrowCast, NegExp

KEY = "a.weight"
TARGETS = (torch.bfloat16, torch.float32)  # what the grades assume
WIDE = (torch.bfloat16, torch.float16, torch.float32)

# A codec, and the dtypes that it may be stored in.
CODECS: dict[str, tuple[Codec, tuple[torch.dtype, ...]]] = {
    "f32": (Cast("f32", "f32"), (torch.float32,)),
    "bf16": (Cast("bf16", "bf16"), (torch.bfloat16,)),
    "f16": (Cast("f16", "f16"), (torch.float16,)),
    "f8e4m3": (NarrowCast("f8e4m3", "f8e4m3"), (torch.float8_e4m3fn,)),
    "f8e5m2": (NarrowCast("f8e5m2", "f8e5m2"), (torch.float8_e5m2,)),
    "add(1)": (Add("add", 1.0), WIDE),
    "add(-0.1)": (Add("add", -0.1), WIDE),
    "neg_exp": (NegExp("neg_exp"), WIDE),
}


def every(dtype: torch.dtype) -> Tensor:
    """Every pattern; of f32 every sign, exponent and seven bits of mantissa, with seven tails: all kinds of NaN too."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    if dtype != torch.float32:
        return patterns.view(dtype)
    tails = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x5A5A, 0xFFFF], dtype=torch.int32)
    return (patterns.int()[:, None] << 16 | tails).view(dtype).flatten()


def measured(before: Tensor, after: Tensor) -> str:
    """The grade of a trip that made one tensor of the other."""
    if before.dtype == after.dtype and torch.equal(as_bits(before), as_bits(after)):
        return "bit"
    left, right = before.double(), after.double()
    return "value" if bool(((left == right) | (left.isnan() & right.isnan())).all()) else "lossy"


def held(word: str, values: Tensor) -> Tensor:
    """Those of the values that the format reaches; the others are refused (D403)."""
    sizes = values.abs()
    reached = {
        "bf16": (sizes < (2 - 2.0**-8) * 2.0**127) | values.isinf(),
        "f16": (sizes < 65520) | values.isinf(),
        "f8e4m3": sizes <= 464,
        "f8e5m2": (sizes < 61440) | values.isinf(),
        "neg_exp": values <= 0,
    }
    return values[reached[word] | values.isnan()] if word in reached else values


def claimed(path: Path, word: str) -> RuleLaw:
    path.write_text(f"map one: hf <-> native\na.weight as {word} <-> a\n", encoding="utf-8")
    checked = load(str(path)).checked
    return rule_law(checked.map.rules[0], checked.layouts[0])


def weakest(grades: list[str]) -> str:
    return max(grades, key=GRADES.index)


@pytest.mark.parametrize("word", CODECS)
def test_grades_are_what_is_measured(word: str, tmp_path: Path) -> None:
    codec, dtypes = CODECS[word]
    law = claimed(tmp_path / "one.map", word)
    left, bare, right = [], [], []
    for target in TARGETS:
        for dtype in dtypes:
            stored = every(dtype)
            if word in ("f16", "f32"):
                # What a narrower target makes infinite or rounds up beyond the largest is refused on the way back.
                there = stored.to(target).to(dtype)
                stored = stored[there.isfinite() == stored.isfinite()]
            values = codec.decode(KEY, {KEY: stored}, target)
            kept = codec.keep(KEY, {KEY: stored}, target)
            left.append(measured(stored, codec.encode(KEY, values, kept).parts[KEY]))
            if dtype == target or len(dtypes) == 1:
                bare.append(measured(stored, codec.encode(KEY, values).parts[KEY]))
        logical = held(word, every(target))
        assert len(logical) > len(every(target)) // 4
        right.append(measured(logical, codec.decode(KEY, codec.encode(KEY, logical).parts, target)))
    assert law.left is not None
    assert law.left_bare is not None
    assert law.right is not None
    found = [weakest(grades) for grades in (left, bare, right)]
    assert found == [law.left.grade, law.left_bare.grade, law.right.grade]


def errors(codec: Codec, dtype: torch.dtype, largest: float) -> tuple[float, float]:
    """The worst of all stored values up to a size: how far off it comes back without a complement, and which it is."""
    stored = every(dtype)
    stored = stored[stored.abs() <= largest]
    back = codec.encode(KEY, codec.decode(KEY, {KEY: stored}, dtype)).parts[KEY]
    away = (back.double() - stored.double()).abs()
    return float(away.max()), float(stored[away.argmax()])


# As docs/codecs.md has it: half a step of the dtype at 1.
STEPS = [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)]


@pytest.mark.parametrize(("dtype", "step"), STEPS)
def test_norms_around_zero_come_back_bare_to_half_a_step_of_one(dtype: torch.dtype, step: float) -> None:
    worst, where = errors(Add("add", 1.0), dtype, 0.5)
    assert step * 0.99 <= worst <= step, where
    assert errors(Add("add", 1.0), dtype, step)[0] == step  # the smallest are lost whole


@pytest.mark.parametrize(("dtype", "step"), STEPS)
def test_decays_come_back_bare_to_half_a_step_of_one(dtype: torch.dtype, step: float) -> None:
    """Of Mamba's range, logarithms of 1 to 16, and far beyond it: down to where exponentials are denormal in f16."""
    worst, where = errors(NegExp("neg_exp"), dtype, 9.0)
    assert step * 0.99 <= worst <= step, where
