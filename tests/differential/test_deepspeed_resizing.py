"""`mapdsl.deepspeed` against DeepSpeed's own loader: the same results, byte for byte, wherever that one is right.

Where it is not is in tests/test_deepspeed_loader_bugs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mapdsl.deepspeed import SDLoaderFactory
from tests.helpers import megatron
from tests.helpers.megatron import RESIZES, VERSIONS, assert_same, cut, layer, save

pytestmark = pytest.mark.heavy

SAME_AND_MERGED = [(count, ranks) for count, ranks in RESIZES if count >= ranks] + [(4, 4), (1, 1)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("deepspeed.runtime.state_dict_factory").SDLoaderFactory


def assert_alike(found: tuple[Any, ...], expected: tuple[Any, ...], key: str | None = "module") -> None:
    """The same path, state, scales and count of merged shards."""
    path, state, (scales, merged) = found
    their_path, their_state, (their_scales, their_merged) = expected
    assert (path, merged) == (their_path, their_merged)
    module, their_module = (state, their_state) if key is None else (state[key], their_state[key])
    assert_same(module, their_module)
    if key is not None:
        assert list(state) == list(their_state)
        beside = [{k: v for k, v in one.items() if k not in (key, "mp_world_size")} for one in (state, their_state)]
        assert beside[0] == beside[1]
    assert (scales is None) == (their_scales is None)
    if scales is not None:
        assert scales.shape == their_scales.shape
        assert torch.equal(scales.view(torch.int32), their_scales.contiguous().view(torch.int32))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("count", "ranks"), [*RESIZES, (8, 2), (2, 8)])
def test_loaded_as_deepspeed_does(theirs: Any, count: int, ranks: int, version: float, tmp_path: Path) -> None:
    torch.manual_seed(5)
    paths = save(tmp_path, megatron.whole(), count, version, iteration=3, mp_world_size=count)
    ours, other = (f.get_sd_loader(paths, None, "Megatron", version) for f in (SDLoaderFactory, theirs))
    for rank in range(ranks):
        assert_alike(ours.load(ranks, rank), other.load(ranks, rank))


@pytest.mark.parametrize("saved", [None, 0, 1.0, 2.0])
def test_the_version_in_a_file(theirs: Any, saved: float | None, tmp_path: Path) -> None:
    beside = {} if saved is None else {"checkpoint_version": saved}
    paths = save(tmp_path, megatron.whole(), 2, saved or 0, **beside)
    manifest = {"type": "Megatron", "version": None, "checkpoints": paths}
    for ranks in (1, 4):
        ours, other = (f.get_sd_loader_json(manifest, None).load(ranks, 0) for f in (SDLoaderFactory, theirs))
        assert_alike(ours, other)


@pytest.mark.parametrize(("count", "ranks"), RESIZES)
def test_layer_files_as_deepspeed_does(theirs: Any, count: int, ranks: int, tmp_path: Path) -> None:
    whole = layer(attention="self_attention")
    paths = [str(tmp_path / f"layer_03-model_{rank:02d}-model_states.pt") for rank in range(count)]
    for rank, path in enumerate(paths):
        torch.save(cut(whole, count, rank, 2.0), path)
    ours, other = (f.get_sd_loader(paths, None, version=2.0) for f in (SDLoaderFactory, theirs))
    for rank in range(ranks):
        arguments = (ranks, rank, None, True)
        assert_alike(ours.load(*arguments), other.load(*arguments), key=None)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_pipelines_files_as_deepspeed_does(theirs: Any, ranks: int, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"mp_rank_{rank:02d}_model_states.pt") for rank in range(2)]
    for rank, path in enumerate(paths):
        torch.save({"module": {}, "saved_by": rank}, path)
    for rank in range(ranks):
        loaded = [f.get_sd_loader(paths, None).load(ranks, rank, "auto", True) for f in (SDLoaderFactory, theirs)]
        assert_alike(*loaded)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("count", "ranks"), SAME_AND_MERGED)
def test_quantised_as_deepspeed_does(
    theirs: Any, count: int, ranks: int, version: float, bits: int, tmp_path: Path
) -> None:
    """All but what it does wrong: the order of version 0 when merged, and groups of attention's output over 2 ranks."""
    torch.manual_seed(6)
    paths = save(tmp_path, megatron.whole(), count, version)
    ours, other = (f.get_sd_loader(paths, None, "Megatron", version) for f in (SDLoaderFactory, theirs))
    extra = count != 2
    for rank in range(ranks):
        found, expected = (one.load(ranks, rank, "auto", False, True, bits, 4, extra) for one in (ours, other))
        if version == 0 and count > ranks:
            for name in expected[1]["module"]:
                if "query_key_value" in name:
                    expected[1]["module"][name] = found[1]["module"][name]
            expected[2][0][:, 0] = found[2][0][:, 0]
        assert_alike(found, expected)
