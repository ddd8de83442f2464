"""Arguments of codec declarations that mean nothing, or not what they seem to, are refused by name."""

from __future__ import annotations

import pytest

from mapdsl.compiler.check import check
from mapdsl.language.diagnostics import MapError
from mapdsl.language.source import Source
from mapdsl.language.syntax import parse


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("block_scaled(f8e4m3, block=*x*, scale_dims=1)", "`scale_dims` means nothing in scales that are not squeezed"),
        ("block_scaled(f4e2m1, block=1x16, global_dims=1)", "`global_dims` means nothing in a codec without a global"),
        ("block_scaled(f4e2m1, block=1x16, global_inverse=true)", "`global_inverse` means nothing in a codec without"),
        ("block_scaled(f8e4m3, block=1x32, scale_dtype=f8e8m0, inverse=true)", "powers of two are not inverse"),
        ("packed_int(bits=3)", "`bits` is 4 or 8"),
        ("packed_int(layout=awq, order=\"{key}.o\")", "`order` means nothing in the layout of awq"),
        ("packed_int(zeros=\"{key}.z\")", "`zeros` means nothing in the symmetric layout"),
        ("block_scaled(block=1x32)", "`element` is missing"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(declaration: str, message: str) -> None:
    text = f"map t: hf <-> native\ncodec c = {declaration}\nx [a b] as c <-> y [a b]\n"
    with pytest.raises(MapError) as caught:
        check(parse(Source("t.map", text)))
    (found,) = caught.value.diagnostics
    assert found.code == "N113" and message in found.message


def test_a_scale_of_a_whole_tensor_may_have_one_dimension() -> None:
    declaration = 'codec c = block_scaled(f8e4m3, block=*x*, scale="{key}_scale", squeeze=true, scale_dims=1)'
    checked = check(parse(Source("t.map", f"map t: hf <-> native\n{declaration}\nx [a b] as c <-> y [a b]\n")))
    assert not checked.diagnostics
    assert checked.codecs["c"].part_shapes((4, 6)) == {"payload": (4, 6), "scale": (1,)}
