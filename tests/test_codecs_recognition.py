"""Which format a tensor is in: by names, dtypes and shapes of all its parts; and formats that nothing tells apart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.codecs.base import Codec
from mapdsl.testing.formats import runtime_codec
from tests.helpers.execution import assert_same, map_of
from tests.test_codecs_layouts import stored_parts

KEY = "layers.0.w1.weight"
PACKED = 'payload="{key}_packed", scale="{key}_scale", packed=u8'
CODECS = {
    "mxfp4": f"block_scaled(f4e2m1, block=1x32, scale_dtype=u8|f8e8m0, {PACKED})",
    "nvfp4": f'block_scaled(f4e2m1, block=1x16, scale_dtype=f8e4m3, global_scale="{{key}}_global_scale", {PACKED})',
    "nvfp4_local": f"block_scaled(f4e2m1, block=1x16, scale_dtype=f8e4m3, {PACKED})",
    "mxfp4_of_16": f"block_scaled(f4e2m1, block=1x16, scale_dtype=u8|f8e8m0, {PACKED})",
    "blocks": 'block_scaled(f8e4m3, block=128x128, scale="{key}_scale")',
    "rows": 'block_scaled(f8e4m3, block=1x*, scale="{key}_scale")',
    "rows_flat": 'block_scaled(f8e4m3, block=1x*, scale="{key}_scale", squeeze=true)',
    "groups": 'block_scaled(f8e4m3, block=1x128, scale="{key}_scale")',
    "whole": 'block_scaled(f8e4m3, block=*x*, scale="{key}_scale")',
    "scalar": 'block_scaled(f8e4m3, block=*x*, scale="{key}_scale", squeeze=true)',
    "powers": 'block_scaled(f8e4m3, block=1x32, scale="{key}_scale", scale_dtype=f8e8m0)',
    "e5m2": 'block_scaled(f8e5m2, block=*x*, scale="{key}_scale", squeeze=true)',
    "gptq": "packed_int(bits=4, group=32, layout=gptq)",
    "awq": "packed_int(bits=4, group=32, layout=awq)",
}
FAMILIES = [
    ("mxfp4", "nvfp4", "nvfp4_local"),
    ("mxfp4", "mxfp4_of_16", "nvfp4"),
    ("blocks", "rows", "rows_flat", "groups", "scalar", "powers", "e5m2"),
    ("blocks", "whole", "rows"),
    ("gptq", "awq"),
    ("f8e5m2", "e5m2"),
    ("rows", "f8e4m3", "f8e5m2"),
]


def declared(names: tuple[str, ...]) -> str:
    """Codec lines of those that are none of the language's own."""
    return "".join(f"codec {name} = {CODECS[name]}\n" for name in names if name in CODECS)


def text_of(names: tuple[str, ...], more: str = "") -> str:
    return f"{declared(names)}{KEY} [o i] as {'|'.join(names)}{more} <-> w [o i]\n"


def codecs_of(names: tuple[str, ...]) -> dict[str, Codec]:
    checked = map_of(text_of(names)).checked
    return {codec.name: runtime_codec(codec) for codec in checked.codecs.values()}


ORDERS = [order for family in FAMILIES for order in dict.fromkeys([family, family[::-1], family[1:] + family[:1]])]


@pytest.mark.parametrize("names", ORDERS, ids="|".join)
def test_each_is_recognised_among_the_others(names: tuple[str, ...], tmp_path: Path) -> None:
    """In any order, by the runtime and by `check --against`; it comes back byte for byte."""
    one = map_of(text_of(names, "|raw"))
    for name, codec in codecs_of(names).items():
        adapter = one.adapter({})
        parts = stored_parts(codec, (256, 384), seed=3)
        values = adapter.read(parts)["w"]
        assert adapter.complement.entries[KEY][0] == name
        assert_same({"w": values}, {"w": codec.decode(KEY, parts)}, f"{name} of {names}")
        assert_same(adapter.write({"w": values}, quantization=True), parts, f"{name} of {names}, back")
        found, summary = check_against(one.checked, open_checkpoint(listing(tmp_path, parts)))
        assert [problem for problem in found if problem.severity == "error"] == []
        assert summary.formats == {name: len(parts)}


def listing(folder: Path, parts: dict[str, Tensor]) -> Path:
    """A checkpoint of headers alone."""
    spelled = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e8m0fnu: "F8_E8M0",
        torch.uint8: "U8",
        torch.int32: "I32",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    lines = [f"{n} {spelled[t.dtype]} {','.join(map(str, t.shape)) or '-'}\n" for n, t in parts.items()]
    path = folder / "headers.list"
    path.write_text("".join(lines))
    (folder / "headers.config.json").write_text(json.dumps({}))
    return path


@pytest.mark.parametrize("names", FAMILIES, ids="|".join)
def test_formats_that_are_told_apart_are_not_refused(names: tuple[str, ...]) -> None:
    for pair in itertools.permutations(names, 2):
        assert [problem.code for problem in map_of(text_of(pair)).check() if problem.severity == "error"] == []


SAME = {
    "another rule of scales": (
        'block_scaled(f8e4m3, block=1x32, scale="{key}_scale", scale_dtype=u8)',
        'block_scaled(f8e4m3, block=1x32, scale="{key}_scale", scale_dtype=u8, rule=down)',
    ),
    "divided or multiplied": (
        'block_scaled(f8e4m3, block=128x128, scale="{key}_scale")',
        'block_scaled(f8e4m3, block=128x128, scale="{key}_scale", inverse=true)',
    ),
    "blocks that may be equally many": (
        'block_scaled(f8e4m3, block=1x100, scale="{key}_scale")',
        'block_scaled(f8e4m3, block=1x128, scale="{key}_scale")',
    ),
    "a row or a column of a square": (
        'block_scaled(f8e4m3, block=1x*, scale="{key}_scale", squeeze=true)',
        'block_scaled(f8e4m3, block=*x1, scale="{key}_scale", squeeze=true)',
    ),
    "one dtype in common": (
        'block_scaled(f8e4m3, block=1x*, scale="{key}_scale", scale_dtype=f32|bf16)',
        'block_scaled(f8e4m3, block=1x*, scale="{key}_scale", scale_dtype=bf16|f16, inverse=true)',
    ),
    "zero points less one": (
        "packed_int(bits=4, group=128, layout=gptq)",
        "packed_int(bits=4, group=128, layout=gptq_v2)",
    ),
    "flat groups and rows": (
        'block_scaled(i8, block=1x*, scale="{key}_scale", scale_dtype=f32)',
        "group_int(bits=8, groups=16, inverse=true)",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_formats_that_nothing_tells_apart_are_refused(name: str) -> None:
    first, second = SAME[name]
    text = f"codec one = {first}\ncodec two = {second}\n{KEY} [o i] as one|two <-> w [o i]\n"
    with pytest.raises(MapError, match="`one` and `two` look the same in a checkpoint") as caught:
        map_of(text).compile()
    assert {problem.code for problem in caught.value.diagnostics} == {"D407"}


def test_what_two_formats_mean_alike_may_be_either() -> None:
    """One row of one block: a scale for the row is a scale for the block."""
    names = ("rows", "blocks", "groups")
    parts = stored_parts(codecs_of(names)["blocks"], (1, 100))
    for order in itertools.permutations(names):
        adapter = map_of(text_of(order)).adapter({})
        values = adapter.read(parts)
        assert_same(values, {"w": codecs_of(names)["blocks"].decode(KEY, parts)}, "values")
        assert_same(adapter.write(values, quantization=True), parts, "back")
