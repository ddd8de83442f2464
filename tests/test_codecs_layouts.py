"""Every format: there and back byte for byte, any slice of it, and decoded into memory of another order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Slice
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING, as_bits
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.packed_int import PackedInt
from mapdsl.runtime.codecs.values import Add, Cast, NarrowCast, NegExp
from mapdsl.runtime.errors import ConversionError
from mapdsl.testing.bits import finite, random_bits

KEY = "layers.0.w1.weight"


def nvfp4(**more: Any) -> BlockScaled:
    return BlockScaled(
        "nvfp4",
        "f4e2m1",
        (1, 16),
        scale="{key}_scale",
        scale_dtypes=("f8e4m3",),
        packed="u8",
        global_scale="{key}_scale_2",
        **more,
    )


def packed_int(element: str, group: int | None) -> BlockScaled:
    return BlockScaled(
        "ints",
        element,
        (1, group),
        scale="{key}_scale",
        packed="i32",
        payload="{key}_packed",
        shape="{key}_shape",
    )


MXFP4 = BlockScaled(
    "mxfp4",
    "f4e2m1",
    (1, 32),
    scale="{key}_scales",
    scale_dtypes=("u8",),
    packed="u8",
    payload="{key}_blocks",
    blocks=True,
)
FORMATS: dict[str, tuple[Codec, tuple[int, ...]]] = {
    "fp8": (BlockScaled("fp8", "f8e4m3", (32, 16)), (70, 45)),
    "fp8 of experts": (BlockScaled("fp8", "f8e4m3", (32, 16)), (3, 70, 45)),
    "fp8 a row": (BlockScaled("fp8", "f8e5m2", (1, None), scale_dtypes=("bf16",)), (17, 45)),
    "fp8 an expert": (BlockScaled("fp8", "f8e4m3", (None, None), squeeze=True), (3, 17, 45)),
    "fp8 divided": (BlockScaled("fp8", "f8e4m3", (32, 16), inverse=True), (70, 45)),
    "mxfp8": (BlockScaled("mx", "f8e4m3", (1, 32), scale_dtypes=("u8",)), (17, 70)),
    "fp4": (BlockScaled("fp4", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",)), (17, 70)),
    "mxfp4": (MXFP4, (3, 17, 96)),
    "nvfp4": (nvfp4(), (17, 70)),
    "nvfp4 of experts": (nvfp4(), (3, 17, 70)),
    "nvfp4 divided": (nvfp4(global_inverse=True, global_dims=1), (17, 70)),
    "int8 a row": (BlockScaled("i8", "i8", (1, None), scale="{key}_scale"), (17, 45)),
    "int4": (packed_int("i4", 32), (17, 96)),
    "int8 packed": (packed_int("i8", None), (17, 96)),
    **{f"group int{bits}": (GroupInt("g", bits, 15), (3, 10, 7)) for bits in (2, 3, 5, 8)},
    "group int divided": (GroupInt("g", 8, 15, inverse=True), (30, 7)),
    **{f"gptq {bits}": (PackedInt("gptq", "gptq", bits, 32, zero_offset=1), (96, 64)) for bits in (2, 3, 4, 8)},
    "gptq of one group": (PackedInt("gptq", "gptq", 4, 0), (96, 64)),
    "awq": (PackedInt("awq", "awq", 4, 32), (70, 64)),
    "e4m3": (NarrowCast("f8e4m3", "f8e4m3"), (17, 45)),
    "e5m2": (NarrowCast("f8e5m2", "f8e5m2"), (17, 45)),
    "f32": (Cast("f32", "f32"), (17, 45)),
    "add": (Add("add", 1.0), (17, 45)),
    "neg_exp": (NegExp("neg_exp"), (17, 45)),
}


def stored_parts(codec: Codec, shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Random bits in every part, as far as its meaning leaves them free."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for role, part in zip(codec.storage.templates, codec.storage.stored(KEY, shape), strict=True):
        assert part.shape is not None
        dtype = DTYPE_BY_SPELLING[part.dtypes[0]] if part.dtypes else torch.bfloat16
        made = random_bits(generator, part.shape, dtype)
        if role == "shape":
            made = torch.tensor(shape)
        if role == "order":
            made = torch.randint(0, codec.storage.part_shapes(shape)["scale"][0], part.shape, dtype=torch.int32)
        parts[part.name] = finite(made) if role in ("scale", "global") else made
    return parts


def assert_same(left: Tensor, right: Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert torch.equal(as_bits(left.contiguous()), as_bits(right.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_what_was_stored_comes_back(name: str, dtype: torch.dtype) -> None:
    codec, shape = FORMATS[name]
    exact = not isinstance(codec, Cast) or dtype == torch.float32
    for seed in range(4):
        parts = stored_parts(codec, shape, seed)
        assert list(parts) == codec.names(KEY)
        values = codec.decode(KEY, parts, dtype)
        assert tuple(values.shape) == shape == codec.logical_shape(tuple(next(iter(parts.values())).shape))
        back = codec.encode(KEY, values, codec.keep(KEY, parts, dtype))
        assert back.edited == 0
        for part in parts if exact else ():
            assert_same(back.parts[part], parts[part])


@pytest.mark.parametrize("name", FORMATS)
def test_any_slice_is_decoded_from_its_own_bytes(name: str) -> None:
    codec, shape = FORMATS[name]
    parts, rnd = stored_parts(codec, shape), random.Random(1)
    values = codec.decode(KEY, parts)
    for _ in range(60):
        box = tuple((low, high) for low, high in (sorted(rnd.sample(range(size + 1), 2)) for size in shape))
        of = Slice(shape, box)
        cuts = codec.cut(KEY, of)
        held = {part: parts[part][tuple(slice(*span) for span in cuts[part])] for part in parts}
        assert_same(codec.decode(KEY, held, of=of), values[tuple(slice(*span) for span in box)])


@pytest.mark.parametrize("name", FORMATS)
def test_it_decodes_into_any_memory(name: str) -> None:
    codec, shape = FORMATS[name]
    parts = stored_parts(codec, shape)
    values = codec.decode(KEY, parts)
    turned = torch.empty(*reversed(shape), dtype=values.dtype).permute(*reversed(range(len(shape))))
    spaced = torch.empty(*shape, 3, dtype=values.dtype)[..., 1]
    wide = torch.empty(*shape[:-1], shape[-1] + 1, dtype=values.dtype)[..., 1:]
    for out in (turned, spaced, wide):
        assert codec.decode(KEY, parts, out=out) is out
        assert_same(out, values)
    with pytest.raises(ConversionError, match="`out` is"):
        codec.decode(KEY, parts, out=torch.empty(5))


@pytest.mark.parametrize("name", FORMATS)
def test_meta_tensors_have_the_forms_of_real_ones(name: str) -> None:
    codec, shape = FORMATS[name]
    parts = {part: tensor.to("meta") for part, tensor in stored_parts(codec, shape).items()}
    values = codec.decode(KEY, parts)
    assert (values.is_meta, tuple(values.shape)) == (True, shape)
    kept = codec.keep(KEY, parts)
    for part, tensor in codec.encode(KEY, values, kept).parts.items():
        if not isinstance(codec, (Add, NegExp)):
            assert (tensor.shape, tensor.dtype) == (parts[part].shape, parts[part].dtype)


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name][0].storage.read_only])
def test_values_written_anew_are_close(name: str) -> None:
    codec, shape = FORMATS[name]
    values = -torch.rand(shape, generator=torch.Generator().manual_seed(3)) - 0.01
    fresh = codec.encode(KEY, values)
    assert fresh.edited == 0
    for part, (dtype, size) in codec.stored(KEY, shape, values.dtype).items():
        assert (fresh.parts[part].dtype, tuple(fresh.parts[part].shape)) == (dtype, size)
    error = (codec.decode(KEY, fresh.parts, torch.float32) - values).abs().max()
    assert error < (1.05 / 2 if "int2" in name else 0.3 if "int3" in name else 0.2)


@pytest.mark.parametrize("name", ["gptq 4", "awq"])
def test_what_can_only_be_read_is_given_back_or_refused(name: str) -> None:
    codec, shape = FORMATS[name]
    parts = stored_parts(codec, shape)
    values, kept = codec.decode(KEY, parts), codec.keep(KEY, parts)
    with pytest.raises(ConversionError, match="can be read, not written") as caught:
        codec.encode(KEY, values)
    assert caught.value.code == "D406"
    values[3, 5] += 1000
    with pytest.raises(ConversionError, match="has changed since it was read") as caught:
        codec.encode(KEY, values, kept)
    assert caught.value.code == "D406"


def test_a_stated_shape_must_be_the_payloads() -> None:
    codec, shape = FORMATS["int4"]
    parts = stored_parts(codec, shape) | {f"{KEY}_shape": torch.tensor([17, 95])}
    with pytest.raises(ConversionError, match=r"_shape states the shape \[17, 95\]") as caught:
        codec.decode(KEY, parts)
    assert caught.value.code == "R606"


def test_groups_that_are_not_there_are_refused() -> None:
    codec, shape = FORMATS["gptq 4"]
    parts = stored_parts(codec, shape) | {"layers.0.w1.g_idx": torch.full((96,), 3, dtype=torch.int32)}
    with pytest.raises(ConversionError, match="g_idx names groups 3 to 3 of 3"):
        codec.decode(KEY, parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int4"])
def test_scales_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    codec, shape = FORMATS[name]
    for role, part in codec.companions(KEY).items():
        parts = stored_parts(codec, shape)
        if role != "shape" and not (parts[part].element_size() == 1 and bad == float("inf")):
            parts[part] = torch.full(parts[part].shape, bad).to(parts[part].dtype)
            with pytest.raises(ConversionError, match=f"{part} holds a value that is not finite") as caught:
                codec.decode(KEY, parts)
            assert caught.value.code == "R608"


def test_a_scale_of_zero_is_a_block_of_zeros() -> None:
    for name in ("fp8", "fp8 divided", "int4", "nvfp4", "group int8", "group int divided"):
        codec, shape = FORMATS[name]
        parts = stored_parts(codec, shape)
        scale = codec.companions(KEY)["scale"]
        parts[scale] = torch.zeros_like(parts[scale].float()).to(parts[scale].dtype)
        payload = codec.payload(KEY)
        parts[payload] = torch.ones_like(parts[payload].view(torch.uint8)).view(parts[payload].dtype)
        values = codec.decode(KEY, parts)
        assert not values.any()
        back = codec.encode(KEY, values, codec.keep(KEY, parts))
        assert_same(back.parts[payload], parts[payload])


def test_edits_beyond_a_kept_global_scale_are_not_cut_off() -> None:
    codec, shape = FORMATS["nvfp4"]
    first = codec.encode(KEY, torch.randn(shape)).parts
    values, kept = codec.decode(KEY, first), codec.keep(KEY, first)
    values[3] *= 1000
    again = codec.decode(KEY, codec.encode(KEY, values, kept).parts)
    assert (again[3].float() - values[3].float()).abs().max() <= values[3].float().abs().max() / 5
