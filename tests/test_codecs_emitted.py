"""Codecs as compiled maps make them: the same formats as the compiler checked, whatever arguments a map gives."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import pytest

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.group_int import GroupInt
from mapdsl.runtime.codecs.integer_storage import GroupStorage, PackedIntStorage
from mapdsl.runtime.codecs.packed_int import PackedInt
from mapdsl.runtime.codecs.storage import BlockStorage, Storage
from tests.helpers.execution import map_of

PAIRS: list[tuple[type[Codec], type[Storage]]] = [
    (BlockScaled, BlockStorage),
    (PackedInt, PackedIntStorage),
    (GroupInt, GroupStorage),
]


@pytest.mark.parametrize(("codec", "storage"), PAIRS)
def test_what_is_left_out_means_the_same(codec: type[Codec], storage: type[Storage]) -> None:
    """An emitted constructor leaves out what is at its default in the compiler."""
    stored = {one.name: one.default for one in fields(storage) if one.init and one.default is not MISSING}
    made = inspect.signature(codec.__init__).parameters
    for name, parameter in made.items():
        if parameter.default is not inspect.Parameter.empty:
            assert stored[name] == parameter.default, f"{codec.__name__}({name}=...)"


DECLARATIONS = [
    "block_scaled(f8e4m3, block=128x128)",
    'block_scaled(f8e5m2, block=1x*, scale="{key}_s", scale_dtype=bf16|f16, squeeze=true)',
    "block_scaled(f8e4m3, block=1x32, scale_dtype=u8, rule=down)",
    "block_scaled(f8e4m3, block=1x32, scale_dtype=f8e8m0, rule=even)",
    'block_scaled(f4e2m1, block=1x32, packed=u8, pack=blocks, payload="{key}_blocks", scale="{key}_scales")',
    'block_scaled(f4e2m1, block=1x16, scale_dtype=f8e4m3, global_scale="{key}_2", global_dims=1, global_inverse=true)',
    "block_scaled(i8, block=*x*, inverse=true)",
    "block_scaled(same, block=1x*)",
    "packed_int()",
    'packed_int(bits=8, group=0, payload="{key}_q", scale="{key}_s", shape="{key}_d", scale_dtype=bf16)',
    "packed_int(layout=gptq)",
    'packed_int(bits=3, group=0, layout=gptq_v2, zeros="{stem}.z", order="{stem}.o")',
    "packed_int(bits=4, group=64, layout=awq)",
    "group_int()",
    'group_int(bits=3, groups=7, scale="{key}_s", inverse=true)',
]


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_a_compiled_map_has_the_checked_format(declaration: str) -> None:
    one = map_of(f"codec one = {declaration}\na.weight as one <-> a\n")
    namespace: dict[str, object] = {"__name__": "emitted"}
    exec(compile(one.compile(), "emitted", "exec"), namespace)
    (codec,) = [value for value in namespace.values() if isinstance(value, Codec)]
    assert codec.storage == one.checked.codecs["one"]
