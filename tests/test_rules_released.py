"""Shipped maps against the complete header listings of released checkpoints: nothing unmatched, missing or mis-sized.

A release is one line of `RELEASES`: its map, its listing in `tests/data/listings`, and how many of its stored tensors
each format has; `dropped` are those that the model does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING

LISTINGS = Path(__file__).parent / "data" / "listings"
LAYERS = 4
LAYER = re.compile(r"^(?:\w+\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Release:
    """A map, the listing of a release, and its stored tensors by format; `params` are those given to the map."""

    map: str
    listing: str
    stored: dict[str, int]
    dropped: int = 0
    params: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The listing, as a checkpoint of which the headers are known."""
        return open_checkpoint(LISTINGS / f"{self.listing}.list")

    @functools.cached_property
    def loaded(self) -> mapdsl.Map:
        """The map, compiled."""
        return mapdsl.load(self.map)

    def first_layers(self) -> Checkpoint:
        """The listing without most of its layers, and its config to fit."""
        whole = self.checkpoint
        numbers = {name: int((LAYER.search(name) or [0, "0"])[1]) for name in whole.tensors}
        tensors = {name: tensor for name, tensor in whole.tensors.items() if numbers[name] < LAYERS}
        return dataclasses.replace(whole, tensors=tensors, config={**whole.config, "num_hidden_layers": LAYERS})

    def codes(self, first: Checkpoint, changes: Mapping[str, StoredTensor | None]) -> set[str]:
        """The codes of what is wrong where these tensors are changed, or taken away."""
        changed = {name: tensor for name, tensor in {**first.tensors, **changes}.items() if tensor is not None}
        found, _ = check_against(self.loaded.checked, dataclasses.replace(first, tensors=changed), params=self.params)
        return {one.code for one in found}


RELEASES = {
    release.listing: release
    for release in (
        Release("llama", "meta_llama_3_1_8b_instruct", {"as they are": 291}),
        Release("qwen2", "qwen2_5_7b_instruct", {"as they are": 339}),
        Release("qwen3", "qwen3_8b", {"raw": 252, "as they are": 147}),
        Release("qwen3_moe", "qwen3_30b_a3b_instruct_2507", {"raw": 18_624, "as they are": 243}),
        Release("qwen3_moe", "qwen3_235b_a22b_instruct_2507_fp8", {"fp8": 2 * 36_472, "as they are": 473}),
        Release("qwen3_next", "qwen3_next_80b_a3b_instruct", {"bf16": 72, "as they are": 74_319}, dropped=1_553),
        Release("deepseek_v3", "deepseek_v3", {"fp8": 2 * 45_032, "as they are": 363}, dropped=1_564),
        Release("deepseek_v3", "kimi_k2_instruct", {"fp8": 2 * 69_608, "as they are": 367}, dropped=61),
        Release(
            "deepseek_v32",
            "deepseek_v3_2",
            {"fp8": 2 * 45_032, "fp8_indexer": 2 * 122, "as they are": 546},
            dropped=1_571,
        ),
        Release("gpt_oss", "gpt_oss_20b", {"mxfp4": 2 * 48, "as they are": 363}),
        Release("gpt_oss", "gpt_oss_20b_bf16", {"f8e5m2": 48, "as they are": 363}),
        Release("minimax_m2", "minimax_m2_7", {"fp8": 2 * 47_864, "as they are": 375}),
        Release("glm4_moe", "glm_4_5_fp8", {"fp8": 2 * 43_364, "as they are": 825}, dropped=990),
    )
}
EVERY = pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES.keys())


@EVERY
def test_the_listing_is_what_the_map_promises(release: Release) -> None:
    found, summary = check_against(release.loaded.checked, release.checkpoint, params=release.params)
    assert found == []
    assert summary.formats == release.stored
    assert (summary.dropped, summary.carried) == (release.dropped, 0)
    assert summary.tensors == len(release.checkpoint.tensors) == sum(release.stored.values()) + release.dropped


@EVERY
def test_the_adapter_reads_and_writes_the_first_layers_without_memory(release: Release) -> None:
    first = release.first_layers()
    stored = {
        name: torch.empty(tensor.shape, dtype=DTYPE_BY_SPELLING[tensor.dtype], device="meta")
        for name, tensor in first.tensors.items()
    }
    adapter = release.loaded.adapter(first.config, **release.params)
    native = adapter.from_hf(stored)
    keys = adapter.native_keys()
    assert native.keys() == keys.keys()
    assert [name for name, (shape, _) in keys.items() if shape != tuple(native[name].shape)] == []
    written = adapter.to_hf(native, quantization=True)
    kept = adapter.hf_keys()
    assert written.keys() == kept.keys()
    assert {name: form(tensor) for name, tensor in written.items()} == {name: form(stored[name]) for name in kept}


@EVERY
def test_one_wrong_tensor_among_all_is_found(release: Release) -> None:
    first = release.first_layers()
    name = [name for name in first.tensors if f".layers.{LAYERS - 1}." in name][-1]
    right = first.tensors[name]
    longer = dataclasses.replace(right, shape=(*right.shape[:-1], right.shape[-1] + 1))
    assert release.codes(first, {}) == set()
    assert "C502" in release.codes(first, {name: None})
    assert "C503" in release.codes(first, {name: longer})
    assert "C501" in release.codes(first, {"model.extra": StoredTensor("model.extra", "F32", (7,))})


def form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype."""
    return tensor.shape, tensor.dtype
