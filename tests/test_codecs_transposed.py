"""What is written to a transposed view has the bytes of a plain copy, and nothing around it is touched."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.strided import contiguous, contiguous_copy, copy_strided
from mapdsl.testing.bits import random_bits

KEY = "w"
FILL = 0x5A
WITH_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
WISHES = ["torch", pytest.param("compiled", marks=WITH_NUMBA)]
CODECS: dict[str, Codec] = {
    "e2m1, e8m0": BlockScaled("c", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",)),
    "e2m1, half a vector": BlockScaled("c", "f4e2m1", (1, 16), scale_dtypes=("f8e4m3",), global_scale="{key}_whole"),
    "e4m3, squares": BlockScaled("c", "f8e4m3", (64, 32)),
    "e4m3, odd blocks": BlockScaled("c", "f8e4m3", (7, 33)),
    "e5m2, rows": BlockScaled("c", "f8e5m2", (1, None)),
    "i4 in words": BlockScaled("c", "i4", (1, 32), packed="i32", shape="{key}_shape"),
}


def frame(rows: int, columns: int, dtype: torch.dtype, place: int) -> tuple[Tensor, Tensor]:
    """A matrix `[columns, rows]` within larger memory, `place` elements from its beginning, and that memory."""
    whole = (
        torch.full((columns + 2, rows + 8), FILL, dtype=torch.uint8).repeat_interleave(dtype.itemsize, 1).view(dtype)
    )
    return whole[1 : 1 + columns, place : place + rows], whole


def untouched(whole: Tensor, inner: Tensor) -> bool:
    """Whether memory has its old bytes but for the matrix within, which gets them too."""
    inner.copy_(
        torch.full(inner.shape, FILL, dtype=torch.uint8).repeat_interleave(inner.element_size(), 1).view(inner.dtype)
    )
    return bool((whole.view(torch.uint8) == FILL).all())


@pytest.mark.parametrize("wish", WISHES)
@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from([1, 31, 32, 37, 64, 67, 96, 128, 521, 544]),
    columns=st.sampled_from([1, 29, 32, 41, 64, 97, 160, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.int16, torch.float32, torch.uint8]),
    place=st.integers(0, 8),
    step=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_copying(wish: str, rows: int, columns: int, dtype: torch.dtype, place: int, step: int, seed: int) -> None:
    source = random_bits(torch.Generator().manual_seed(seed), (rows, columns * step), dtype)[:, ::step]
    inner, whole = frame(rows, columns, dtype, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPDSL_KERNELS", wish)
        copy_strided(inner.T, source)
    assert torch.equal(as_bits(inner.T.contiguous()), as_bits(source.contiguous()))
    assert untouched(whole, inner)


@pytest.mark.parametrize("wish", WISHES)
def test_copying_a_batch(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    source = random_bits(torch.Generator().manual_seed(1), (3, 2, 64, 96), torch.bfloat16)
    out = torch.empty(3, 96, 2, 64, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    copy_strided(out, source)
    assert torch.equal(as_bits(out.contiguous()), as_bits(source))


@WITH_NUMBA
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("shape", [(32, 64), (128, 96), (576, 160), (33, 160), (1, 32), (640, 1056)])
def test_decoding(
    monkeypatch: pytest.MonkeyPatch, codec: Codec, dtype: torch.dtype, place: int, shape: tuple[int, int]
) -> None:
    parts = codec.encode(KEY, torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()).parts
    payload = parts[codec.payload(KEY)]
    as_bits(payload).copy_(as_bits(random_bits(torch.Generator().manual_seed(3), tuple(payload.shape), payload.dtype)))
    monkeypatch.setenv("MAPDSL_KERNELS", "torch")
    expected = codec.decode(KEY, parts, dtype)
    inner, whole = frame(*shape, dtype, place)
    monkeypatch.setenv("MAPDSL_KERNELS", "compiled")
    codec.decode(KEY, parts, out=inner.T)
    assert torch.equal(as_bits(inner.T.contiguous()), as_bits(expected))
    assert untouched(whole, inner)


@WITH_NUMBA
@pytest.mark.parametrize(("place", "is_direct"), [(0, True), (1, False)])
def test_what_is_decoded_in_one_go(monkeypatch: pytest.MonkeyPatch, place: int, is_direct: bool) -> None:
    from mapdsl.runtime.codecs.compiled import CompiledKernels

    calls = []
    decode = CompiledKernels.decode_transposed

    def spy(*arguments: Any, **options: Any) -> bool:
        calls.append(decode(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(CompiledKernels, "decode_transposed", spy)
    monkeypatch.setenv("MAPDSL_KERNELS", "compiled")
    codec = CODECS["e2m1, e8m0"]
    inner, _ = frame(64, 96, torch.bfloat16, place)
    codec.decode(KEY, codec.encode(KEY, torch.randn(64, 96).bfloat16()).parts, out=inner.T)
    assert calls == [is_direct]


@pytest.mark.parametrize("wish", WISHES)
def test_contiguous_copies(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    joined = random_bits(torch.Generator().manual_seed(4), (96, 128), torch.bfloat16)
    half = joined[:, 64:].T
    copied = contiguous_copy(half)
    assert copied.is_contiguous() and torch.equal(as_bits(copied), as_bits(half))
    assert contiguous(joined) is joined and contiguous_copy(joined).data_ptr() != joined.data_ptr()
    assert contiguous(half).is_contiguous() and contiguous(half.to("meta")).is_contiguous()


def test_gradients_flow_through_a_contiguous_copy() -> None:
    source = torch.ones(64, 96, requires_grad=True)
    contiguous_copy(source.T).sum().backward()
    assert source.grad is not None and bool((source.grad == 1).all())


# --- tensors that are not what their memory says, or of which torch does not copy the bits ----------------------------


@pytest.mark.parametrize("wish", WISHES)
def test_every_byte_of_a_bool_stays(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    stored = torch.arange(64 * 96).to(torch.uint8).view(64, 96)
    out = torch.empty(96, 64, dtype=torch.bool)
    copy_strided(out.T, stored.view(torch.bool))
    assert torch.equal(out.view(torch.uint8), stored.T)
    in_order = torch.empty(64, 96, dtype=torch.bool)
    copy_strided(in_order, stored.view(torch.bool))
    assert torch.equal(in_order.view(torch.uint8), stored)
    assert torch.equal(contiguous_copy(stored.view(torch.bool).T).view(torch.uint8), stored.T)


@pytest.mark.parametrize("wish", WISHES)
def test_a_negative_that_is_yet_to_be(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    source = torch._neg_view(torch.randn(64, 96).half())
    out = torch.empty(96, 64, dtype=torch.float16)
    copy_strided(out.T, source)
    assert torch.equal(out.T, source)
    assert torch.equal(contiguous_copy(source.T), source.T)


class Elsewhere(Tensor):
    """A tensor that knows by itself how it is copied, as a DTensor does."""


def test_other_kinds_of_tensors_are_copied_as_they_will() -> None:
    source = torch.randn(64, 96).as_subclass(Elsewhere)
    assert type(contiguous_copy(source.T)) is Elsewhere
    assert torch.equal(contiguous_copy(source.T), source.T)
    assert type(contiguous(source.T)) is Elsewhere
    assert type(contiguous_copy(torch.nn.Parameter(source.as_subclass(Tensor), requires_grad=False))) is Tensor


@WITH_NUMBA
def test_words_are_read_where_the_first_value_is_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    from mapdsl.runtime.codecs.compiled import CompiledKernels

    source, kernels = torch.randn(64, 96).bfloat16(), CompiledKernels()
    out = torch.empty(96, 64, dtype=torch.bfloat16)
    assert kernels.transpose(source, out)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert not kernels.transpose(source, out)
    codec = CODECS["e2m1, e8m0"]
    monkeypatch.setattr(CompiledKernels, "decode_transposed", noted := Noted(CompiledKernels.decode_transposed))
    monkeypatch.setenv("MAPDSL_KERNELS", "compiled")
    codec.decode(KEY, codec.encode(KEY, torch.randn(64, 96).bfloat16()).parts, out=out.T)
    assert noted.given == [False]


class Noted:
    """A method that notes what it gives."""

    def __init__(self, method: Any) -> None:
        self.method, self.given = method, []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.given.append(self.method(None, *arguments, **options))
        return self.given[-1]
