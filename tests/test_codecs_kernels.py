"""Compiled kernels give the bytes that torch's operators give, for every code, scale, shape, slice and memory order."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapdsl.runtime.codecs import kernels
from mapdsl.runtime.codecs.base import Codec, Encoded, Slice
from mapdsl.runtime.codecs.block_kernel import BlockKernel
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.formats import as_bits
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.scales import BlockFactors
from mapdsl.runtime.codecs.tiles import BlockGrid
from mapdsl.runtime.errors import ConversionError
from mapdsl.testing.bits import finite, random_bits

pytest.importorskip("numba")
KEY = "w"

CODECS: dict[str, Codec] = {
    "e4m3, wide blocks": BlockScaled("c", "f8e4m3", (7, 33)),
    "e4m3, one vector": BlockScaled("c", "f8e4m3", (5, 16), scale_dtypes=("bf16",)),
    "e4m3, divided": BlockScaled("c", "f8e4m3", (1, 48), inverse=True),
    "e5m2, e8m0": BlockScaled("c", "f8e5m2", (1, 32), scale_dtypes=("f8e8m0",)),
    "e4m3, a tensor": BlockScaled("c", "f8e4m3", (None, None), squeeze=True),
    "e2m1, e8m0": BlockScaled("c", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",)),
    "e2m1, half a vector": BlockScaled("c", "f4e2m1", (1, 16), scale_dtypes=("f8e4m3",), global_scale="{key}_whole"),
    "e2m1, tall": BlockScaled("c", "f4e2m1", (3, 64), packed="u8"),
    "i4 in words": BlockScaled("c", "i4", (1, 32), packed="i32", shape="{key}_shape"),
    "i4 with a byte each": GroupInt("c", 4, 5),
    "i8": BlockScaled("c", "i8", (1, None)),
    "i8 in words": BlockScaled("c", "i8", (1, 8), packed="i32", shape="{key}_shape"),
}
SHAPES = ((1, 80), (35, 160), (2, 5, 80), (3, 10, 96))
DTYPES = (torch.bfloat16, torch.float32)


def both(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[Any, Any]:
    """What torch's operators give, and what compiled kernels give."""
    results = []
    for wish in ("torch", "compiled"):
        monkeypatch.setenv("MAPDSL_KERNELS", wish)
        results.append(work())
    return results[0], results[1]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(as_bits(one.contiguous()), as_bits(other.contiguous()))


def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return random_bits(torch.Generator().manual_seed(7), shape, dtype)


def parts_of(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Random bytes in all parts, scales finite but otherwise of any bits: zeros, denormals, negative ones."""
    forms = codec.stored(KEY, shape, dtype)
    parts = {name: bits(shape, dtype) for name, (dtype, shape) in forms.items()}
    if f"{KEY}_shape" in parts:
        parts[f"{KEY}_shape"] = torch.tensor(shape)
    return {name: part if name == codec.payload(KEY) else finite(part) for name, part in parts.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_decoding(monkeypatch: pytest.MonkeyPatch, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = parts_of(codec, shape, dtype)
    plain, fast = both(monkeypatch, lambda: codec.decode(KEY, parts, dtype))
    assert same(plain, fast)
    # Into memory of another order.
    for order in ((*range(1, len(shape)), 0), (len(shape) - 1, *range(len(shape) - 1))):
        out = torch.empty([shape[dim] for dim in order], dtype=dtype).permute(
            [order.index(d) for d in range(len(order))]
        )
        assert same(codec.decode(KEY, parts, out=out), plain)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_slices(monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    shape, box = (35, 160), ((3, 31), (5, 141))
    parts = parts_of(codec, shape, torch.bfloat16)
    of = Slice(shape, box)
    held = {name: parts[name][tuple(slice(*edge) for edge in edges)] for name, edges in codec.cut(KEY, of).items()}
    plain, fast = both(monkeypatch, lambda: codec.decode(KEY, held, torch.bfloat16, of=of))
    assert same(plain, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_encoding_anew(
    monkeypatch: pytest.MonkeyPatch, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = finite(bits(shape, dtype))
    values[..., :40] = torch.randn(shape).to(dtype)[..., :40]
    values[..., 40:48] = 0
    plain, fast = both(monkeypatch, lambda: codec.encode(KEY, values))
    equal(plain, fast)


@pytest.mark.parametrize("element", ["f8e4m3", "f8e5m2"])
def test_encoding_what_is_not_finite(monkeypatch: pytest.MonkeyPatch, element: str) -> None:
    codec = BlockScaled("c", element, (3, 16))
    values = bits((9, 64), torch.bfloat16)
    plain, fast = both(monkeypatch, lambda: tried(lambda: codec.encode(KEY, values)))
    if isinstance(plain, str):
        assert plain == fast
    else:
        equal(plain, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_kept_and_comes_back(monkeypatch: pytest.MonkeyPatch, codec: Codec, dtype: torch.dtype) -> None:
    parts = parts_of(codec, (35, 160), dtype)

    def trip() -> tuple[Encoded, Encoded]:
        kept = codec.keep(KEY, parts, dtype)
        values = codec.decode(KEY, parts, dtype)
        edited = values.clone()
        edited[2, 30:50] = 0.75
        return codec.encode(KEY, values, kept), codec.encode(KEY, edited, kept)

    plain, fast = both(monkeypatch, trip)
    for one, other in zip(plain, fast, strict=True):
        equal(one, other)
    assert all(same(part, parts[name]) for name, part in fast[0].parts.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.sampled_from(["f8e4m3", "f8e5m2", "f4e2m1", "i8"]))
def test_any_value_under_any_scale(value: int, scale: int, element: str) -> None:
    """Division, rounding and saturation, of bit patterns that random tensors seldom hold."""
    codec = BlockScaled("c", element, (1, 16))
    values = finite(torch.tensor([value] * 16, dtype=torch.uint32).view(torch.float32)).view(1, 16)
    values = (values.view(torch.int32) + torch.arange(16, dtype=torch.int32)).view(torch.float32)
    scales = finite(torch.tensor([[scale]], dtype=torch.uint32).view(torch.float32))
    factors = torch.where(scales == 0, torch.ones_like(scales), scales)
    results = []
    for wish in ("torch", "compiled"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAPDSL_KERNELS", wish)
            results.append(written(codec, values, factors))
    assert torch.equal(*results)


def written(codec: BlockScaled, values: Tensor, factors: Tensor) -> Tensor:
    """The codes of `[1, 16]` values under one scale."""
    per = codec.element.per
    grid = BlockGrid((1, 16 // per), (1, 16 // per))
    kernel = BlockKernel(codec.element, grid, BlockFactors(grid, factors), torch.float32)
    codes = torch.zeros(grid.elements, dtype=torch.uint8)
    kernel.encode(values.view(1, 1, 16), codes)
    return codes


def test_threads_share_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", "compiled")
    monkeypatch.setattr(kernels, "ITEMS_A_THREAD", 1)
    codec = BlockScaled("c", "f8e4m3", (128, 128))
    values = torch.randn(1280, 1024).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made = codec.encode(KEY, values)
            results.append((made.parts, codec.decode(KEY, made.parts)))
    finally:
        torch.set_num_threads(before)
    (parts, decoded), (again, decoded_again) = results
    assert all(same(parts[name], again[name]) for name in parts) and same(decoded, decoded_again)


def test_small_tensors_and_other_dtypes_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    element = BlockScaled("c", "f8e4m3", (128, 128)).element
    cpu = torch.device("cpu")
    monkeypatch.setenv("MAPDSL_KERNELS", "auto")
    monkeypatch.setattr(kernels, "_kernels", [])
    monkeypatch.setattr(kernels, "_done_without", [0])
    assert kernels.compiled_kernels(element, torch.bfloat16, cpu, kernels.WORTHWHILE - 1) is None
    assert kernels.compiled_kernels(element, torch.bfloat16, cpu, kernels.WORTHWHILE) is not None
    assert kernels.compiled_kernels(element, torch.bfloat16, cpu, kernels.FEW) is not None  # they are loaded
    assert kernels.compiled_kernels(element, torch.bfloat16, cpu, kernels.FEW - 1) is None
    assert kernels.compiled_kernels(element, torch.float16, cpu, kernels.WORTHWHILE) is None
    assert kernels.compiled_kernels(element, torch.bfloat16, torch.device("meta"), kernels.WORTHWHILE) is None
    monkeypatch.setenv("MAPDSL_KERNELS", "torch")
    assert kernels.compiled_kernels(element, torch.bfloat16, cpu, kernels.WORTHWHILE) is None


def test_many_small_tensors_are_worth_loading_for(monkeypatch: pytest.MonkeyPatch) -> None:
    element, cpu = BlockScaled("c", "f8e4m3", (128, 128)).element, torch.device("cpu")
    monkeypatch.setenv("MAPDSL_KERNELS", "auto")
    monkeypatch.setattr(kernels, "_kernels", [])
    monkeypatch.setattr(kernels, "_done_without", [0])
    count, small = kernels.MANY // kernels.WORTHWHILE, kernels.WORTHWHILE // 2
    found = [kernels.compiled_kernels(element, torch.bfloat16, cpu, small) is not None for _ in range(2 * count)]
    assert found == [False] * (2 * count - 1) + [True]


def test_a_wish_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", "fast")
    with pytest.raises(ConversionError, match="MAPDSL_KERNELS is 'fast', not auto, torch or compiled"):
        BlockScaled("c", "f8e4m3", (1, 16)).encode(KEY, torch.ones(2, 16))


WITHOUT_NUMBA = """
import importlib.abc, sys, torch

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numba":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "numba" else find(name, package)
from mapdsl.runtime.codecs.block_scaled import BlockScaled
try:
    print(len(BlockScaled("c", "f8e4m3", (128, 128)).encode("w", torch.ones(1024, 1024)).parts))
except Exception as err:
    print(err)
"""


@pytest.mark.parametrize(
    ("wish", "printed"),
    [("auto", "2"), ("compiled", "MAPDSL_KERNELS is compiled, and numba is missing: pip install mapdsl[fast]")],
)
def test_without_numba(tmp_path: Path, wish: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MAPDSL_KERNELS": wish},
    )
    assert printed in done.stdout


@pytest.mark.parametrize("wish", ["torch", "compiled"])
def test_memory_with_one_place_for_several_elements(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MAPDSL_KERNELS", wish)
    codec = BlockScaled("c", "f8e4m3", (128, 128))
    parts = codec.encode(KEY, torch.randn(256, 256)).parts
    with pytest.raises(ConversionError, match="w: `out` has one place for several elements"):
        codec.decode(KEY, parts, out=torch.empty(1, 256).expand(256, 256))


def test_a_numba_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise SystemError("initialization of _internal failed")

    monkeypatch.setattr(kernels, "_kernels", [])
    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    monkeypatch.setenv("MAPDSL_KERNELS", "auto")
    codec, values = BlockScaled("c", "f8e4m3", (128, 128)), torch.randn(1024, 1024)
    with pytest.warns(UserWarning, match="numba is installed and cannot be imported.*_internal failed"):
        codec.encode(KEY, values)
    monkeypatch.setenv("MAPDSL_KERNELS", "compiled")
    with pytest.raises(ConversionError, match="MAPDSL_KERNELS is compiled, and numba cannot be imported: .*_internal"):
        codec.encode(KEY, values)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code that cannot be kept is compiled all the same."""
    from numba.core.caching import IndexDataCacheFile

    from mapdsl.runtime.codecs import numba_kernels

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "load", lambda *arguments: None)
    monkeypatch.setattr(IndexDataCacheFile, "save", fail)
    codec, values = BlockScaled("c", "f8e4m3", (128, 128)), torch.randn(256, 256).bfloat16()
    numba_kernels.measurer.cache_clear()
    equal(*both(monkeypatch, lambda: codec.encode(KEY, values)))


CACHED = """
import torch
from mapdsl.runtime.codecs.block_scaled import BlockScaled
parts = {"w": torch.ones(256, 256).to(torch.float8_e4m3fn), "scale": torch.ones(2, 2)}
for dtype in (torch.bfloat16, torch.float32):
    BlockScaled("c", "f8e4m3", (128, 128)).decode("w", parts, dtype)
"""


def test_each_kernel_is_kept_in_a_file_of_its_own(tmp_path: Path) -> None:
    """numba numbers the kernels of one name; processes that compile at once may take one number for two of them."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "MAPDSL_KERNELS": "compiled"}
    subprocess.run([sys.executable, "-c", CACHED], check=True, env=env)
    assert len(list(tmp_path.rglob("*.1.nbc"))) == len(list(tmp_path.rglob("*.nbc"))) == 2


def tried(work: Callable[[], Encoded]) -> Encoded | str:
    """What it gives, or the message of its error."""
    try:
        return work()
    except ConversionError as err:
        return str(err)


def equal(one: Encoded, other: Encoded) -> None:
    assert one.parts.keys() == other.parts.keys() and one.edited == other.edited
    for name in one.parts:
        assert same(one.parts[name], other.parts[name]), name
