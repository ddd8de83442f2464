"""Every narrow tensor of every released listing is in one format of docs/codecs.md, with all its companions' shapes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.runtime.codecs.integer_storage import PackedIntStorage
from mapdsl.runtime.codecs.storage import BlockStorage, Storage

LISTINGS = sorted((Path(__file__).parent / "data" / "listings").glob("*.list"))
INVERSE = {"element": "f8e4m3", "block": (128, 128), "scale": "{key}_scale_inv"}
FORMATS = [
    BlockStorage("fp8, f32 scales", **INVERSE, scale_dtypes=("f32",)),
    BlockStorage("fp8, bf16 scales", **INVERSE, scale_dtypes=("bf16",)),
    BlockStorage("fp8, powers", element="f8e4m3", block=(128, 128), scale_dtypes=("f8e8m0",)),
    BlockStorage("fp8 per channel", element="f8e4m3", block=(1, None), scale="{key}_scale", scale_dtypes=("f32",)),
    BlockStorage("fp4", element="f4e2m1", block=(1, 32), scale_dtypes=("f8e8m0",)),
    BlockStorage(
        "mxfp4",
        element="f4e2m1",
        block=(1, 32),
        packed="u8",
        blocks=True,
        payload="{key}_blocks",
        scale="{key}_scales",
        scale_dtypes=("u8",),
    ),
    PackedIntStorage("awq", layout="awq", bits=4, group=128),
    Storage("e5m2", "cast", ("F8_E5M2",)),
]
WIDE = {"BF16", "F16", "F32", "I64"}
EXPECTED = {
    "deepseek_v3": {"fp8, f32 scales": 45_808},
    "deepseek_v3_2": {"fp8, f32 scales": 45_932},
    "deepseek_v4_flash": {"fp4": 33_792, "fp8, powers": 375},
    "glm_4_5_fp8": {"fp8 per channel": 43_852},
    "gpt_oss_20b": {"mxfp4": 48},
    "gpt_oss_20b_bf16": {"e5m2": 48},
    "kimi_k2_instruct": {"fp8, f32 scales": 69_608},
    "llama_2_7b_awq": {"awq": 224},
    "minimax_m2_7": {"fp8, f32 scales": 47_864},
    "qwen3_235b_a22b_instruct_2507_fp8": {"fp8, bf16 scales": 36_472},
}


def key_of(one: Storage, name: str) -> str | None:
    """The tensor whose payload a stored name is."""
    _, _, ending = one.payload.rpartition("}")
    if not name.endswith(ending):
        return None
    key = name[: len(name) - len(ending)]
    return f"{key}.weight" if one.payload.startswith("{stem}") else key


def stored_names(one: Storage, name: str, found: Checkpoint) -> list[str] | None:
    """All names of a tensor if it is stored so, dtypes and shapes as they should be."""
    key = key_of(one, name) if one.claims(found.tensors[name].dtype) else None
    if key is None or not all(part in found.tensors for part in one.names(key)):
        return None
    parts = one.stored(key, one.logical_shape(found.tensors[name].shape))
    as_it_should = all(
        found.tensors[part.name].dtype in part.dtypes and found.tensors[part.name].shape == part.shape for part in parts
    )
    return one.names(key) if as_it_should else None


@pytest.mark.parametrize("path", LISTINGS, ids=lambda path: path.stem)
def test_every_narrow_tensor_has_one_format(path: Path) -> None:
    found = open_checkpoint(path)
    narrow = {name for name, tensor in found.tensors.items() if tensor.dtype not in WIDE}
    formats: Counter[str] = Counter()
    served: Counter[str] = Counter()
    for name in sorted(narrow):
        held = [(one.name, names) for one in FORMATS if (names := stored_names(one, name, found)) is not None]
        assert len(held) <= 1, f"{name}: {held}"
        for form, names in held:
            formats[form] += 1
            served.update(names)
    assert narrow - served.keys() == set()
    assert set(served.values()) <= {1}
    beside = {name for name in found.tensors if "scale" in name.rpartition(".")[2]}
    assert beside - served.keys() - {name for name in beside if "hc_" in name} == set()
    assert dict(formats) == EXPECTED.get(path.stem, {})
