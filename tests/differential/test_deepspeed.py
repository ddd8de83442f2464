"""Flat groups of integers against DeepSpeed's quantiser, `deepspeed/runtime/weight_quantizer.py`: it needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.group_int import GroupInt

pytestmark = pytest.mark.heavy

KEY = "transformer.layers.0.attention.dense.weight"
SCALE = f"{KEY}_scale"
SHAPES = [((48, 20), 16), ((48, 20), 1), ((7, 9), 21), ((64,), 4), ((3, 16, 8), 6)]


@pytest.fixture(scope="module")
def quantizer() -> Any:
    module = pytest.importorskip("deepspeed.runtime.weight_quantizer")
    return module.WeightQuantization(mlp_extra_grouping=False)


def weights(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Runs of very different sizes, ties between two integers, and whole runs of zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = values.view(-1)
    flat[: len(flat) // 2] *= torch.logspace(-6, 6, len(flat) // 2)
    flat[len(flat) // 2 : len(flat) * 3 // 4] = flat[len(flat) // 2 : len(flat) * 3 // 4].mul(8).round().div(8)
    flat[-len(flat) // 8 :] = 0
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_groups_written_anew_are_deepspeeds(
    bits: int, shape: tuple[int, ...], groups: int, dtype: torch.dtype, quantizer: Any
) -> None:
    for seed in range(5):
        values = weights(shape, seed).clamp(-6e4, 6e4).to(dtype)
        codes, scale = quantizer.quantize_data(values, bits, groups)
        made = GroupInt("g", bits, groups, inverse=True).encode(KEY, values).parts
        assert torch.equal(made[KEY], codes)
        assert torch.equal(as_bits(made[SCALE]), as_bits(scale))


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_its_loader_hands_on_is_written_and_read(bits: int, quantizer: Any) -> None:
    """`Quantize` gives integers and `[1, groups]` factors to multiply with."""
    values = weights((48, 20))
    (codes,) = quantizer.Quantize([values.clone()], bits, 16, KEY)
    scale = quantizer.dense_scales.pop()
    one = GroupInt("g", bits, 16)
    made = one.encode(KEY, values).parts
    assert torch.equal(made[KEY], codes)
    assert torch.equal(as_bits(made[SCALE]), as_bits(scale))
    expected = (codes.float().view(16, -1) * scale.view(16, 1)).view(48, 20)
    assert torch.equal(as_bits(one.decode(KEY, {KEY: codes, SCALE: scale}, torch.float32)), as_bits(expected))


def test_mlp_weights_have_twice_the_groups(quantizer: Any) -> None:
    """Its `mlp_extra_grouping`, on by default, doubles the groups of 4:1 matrices: a map states the number it finds."""
    module = pytest.importorskip("deepspeed.runtime.weight_quantizer")
    loader, values = module.WeightQuantization(), weights((64, 16))
    (codes,) = loader.Quantize([values.clone()], 8, 8, "layers.0.mlp.dense_h_to_4h.weight")
    made = GroupInt("g", 8, 16).encode(KEY, values).parts
    assert torch.equal(made[KEY], codes)
    assert torch.equal(as_bits(made[SCALE]), as_bits(loader.mlph4h_scales[0]))
