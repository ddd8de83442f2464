"""Every format with every part of it missing, misshapen, of another dtype, not finite, zero: errors that name it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Slice
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING
from mapdsl.runtime.codecs.scales import is_power_dtype
from mapdsl.runtime.codecs.values import Add, Cast, NegExp
from mapdsl.runtime.errors import ConversionError
from mapdsl.testing.bits import PLAIN_DTYPES
from tests.test_codecs_layouts import FORMATS, KEY, assert_same, stored_parts

ROLES = [(name, role) for name, (codec, _) in FORMATS.items() for role in codec.storage.templates]
EACH = pytest.mark.parametrize(("name", "role"), ROLES)
SCALES = [(name, role) for name, role in ROLES if role in ("scale", "global")]
EVERY_DTYPE = (*PLAIN_DTYPES, torch.float8_e8m0fnu)


def parts_of(name: str, role: str) -> tuple[Codec, dict[str, Tensor], str]:
    """A codec, its parts, and the stored name of one of them."""
    codec, shape = FORMATS[name]
    return codec, stored_parts(codec, shape), codec.storage.part_names(KEY)[role]


def refused(codec: Codec, parts: dict[str, Tensor], code: str, text: str) -> None:
    """Both decoding and keeping refuse the parts, on meta too, and name what is wrong."""
    for call in (codec.decode, codec.keep):
        with pytest.raises(ConversionError, match=text) as caught:
            call(KEY, parts)
        assert caught.value.code == code


def meta(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.to("meta") for name, part in parts.items()}


@EACH
def test_a_part_that_is_missing_is_named(name: str, role: str) -> None:
    codec, parts, part = parts_of(name, role)
    del parts[part]
    for there in (parts, meta(parts)):
        refused(codec, there, "R605", f"^.*{part} is missing: {codec.payload(KEY)} is stored as {codec.name}")


@EACH
def test_a_part_of_another_dtype_is_named(name: str, role: str) -> None:
    codec, parts, part = parts_of(name, role)
    accepted = {DTYPE_BY_SPELLING[word] for word in codec.storage.part_dtypes()[role]}
    accepted = accepted or {torch.float32, torch.bfloat16, torch.float16}
    for dtype in EVERY_DTYPE:
        if dtype not in accepted:
            other = torch.zeros(parts[part].shape).to(dtype)
            for there in (parts | {part: other}, meta(parts | {part: other})):
                refused(codec, there, "C504", f"{part} is .*, the map says ")


@EACH
def test_a_part_of_another_shape_is_named(name: str, role: str) -> None:
    """One row or column more, none at all, a dimension more or less: the part is named, or what it does not fit."""
    codec, parts, part = parts_of(name, role)
    if len(parts) == 1:
        return  # then any shape will do
    found = parts[part]
    others = [found[None], found.flatten()[:0]]
    for dim in range(found.ndim):
        others += [torch.cat([found, found.narrow(dim, 0, 1)], dim), found.narrow(dim, 0, found.shape[dim] - 1)]
    for other in others:
        if other.shape == found.shape:
            continue
        named = KEY.rpartition(".")[0] if role == "payload" else part
        for there in (parts | {part: other}, meta(parts | {part: other})):
            # A stated shape tells more than shapes do, where it can be read.
            stated = "shape" in codec.storage.templates and not there[part].is_meta
            if role != "payload" or stated or not fits_too(codec, other.shape):
                refused(codec, there, "R606", named)


def fits_too(codec: Codec, payload: tuple[int, ...]) -> bool:
    """Whether a payload of another shape has companions of the shapes that are there: within the last block."""
    storage = codec.storage
    if len(payload) < storage.needs_payload_dimensions() or storage.unfit(storage.logical_shape(payload)) is not None:
        return False
    shape = FORMATS[next(name for name, (one, _) in FORMATS.items() if one is codec)][1]
    here, there = storage.part_shapes(shape), storage.part_shapes(storage.logical_shape(payload))
    return all(here[role] == there[role] for role in here if role != "payload")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "role"), SCALES)
def test_a_float_scale_that_is_not_finite_is_named(name: str, role: str, bad: float) -> None:
    codec, parts, part = parts_of(name, role)
    if is_power_dtype(parts[part].dtype):
        return  # bare exponents: see test_the_nan_of_bare_exponents_comes_back
    found = parts[part].float()
    found.view(-1)[-1] = bad if parts[part].dtype != torch.float8_e4m3fn else math.nan
    refused(codec, parts | {part: found.to(parts[part].dtype)}, "R608", f"{part} holds a value that is not finite")


@pytest.mark.parametrize("name", [name for name, (codec, _) in FORMATS.items() if "scale" in codec.storage.templates])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_nan_of_bare_exponents_and_zeros_come_back(name: str, dtype: torch.dtype) -> None:
    """Byte 255 under every code; of float scales zeros of both signs, which make blocks of zeros: codes are kept."""
    codec, parts, part = parts_of(name, "scale")
    scale = parts[part]
    if is_power_dtype(scale.dtype):
        parts[part] = torch.full_like(scale.view(torch.uint8), 255).view(scale.dtype)
    else:
        zeros = torch.zeros(scale.shape)
        zeros.view(-1)[::2] *= -1
        parts[part] = zeros.to(scale.dtype)
    values = codec.decode(KEY, parts, dtype)
    codes = codec.storage.payload_dtypes
    if is_power_dtype(scale.dtype):
        assert values.isnan().all()
    elif codes and codes[0] not in ("F8_E4M3", "F8_E5M2"):  # those hold NaNs of their own
        assert not values.any()
    back = codec.encode(KEY, values, codec.keep(KEY, parts, dtype))
    assert back.edited == 0
    for stored, tensor in parts.items():
        assert_same(back.parts[stored], tensor)


@pytest.mark.parametrize(
    "name",
    [
        "nvfp4",
        "nvfp4 of experts",
        "nvfp4 divided",
    ],
)
def test_a_global_scale_of_zero_makes_zeros_and_comes_back(name: str) -> None:
    codec, parts, part = parts_of(name, "global")
    parts[part] = torch.zeros_like(parts[part])
    values = codec.decode(KEY, parts)
    assert not values.any()
    back = codec.encode(KEY, values, codec.keep(KEY, parts))
    for stored, tensor in parts.items():
        assert_same(back.parts[stored], tensor)


@EACH
def test_parts_of_a_slice_are_checked_as_well(name: str, role: str) -> None:
    codec, parts, part = parts_of(name, role)
    shape = FORMATS[name][1]
    of = Slice(shape, tuple((0, size) for size in shape))
    cuts = codec.cut(KEY, of)
    held = {one: parts[one][tuple(slice(*span) for span in cuts[one])] for one in parts}
    held[part] = held[part][None]
    with pytest.raises(ConversionError) as caught:
        codec.decode(KEY, held, of=of)
    assert caught.value.code == "R606"


@pytest.mark.parametrize("name", [n for n, (c, _) in FORMATS.items() if not isinstance(c, (Add, NegExp, Cast))])
def test_what_is_no_float_is_not_encoded(name: str) -> None:
    codec, shape = FORMATS[name]
    for dtype in (torch.int32, torch.float64, torch.float8_e4m3fn):
        with pytest.raises(ConversionError, match="decodes to") as caught:
            codec.encode(KEY, torch.zeros(shape).to(dtype))
        assert caught.value.code == "C504"
