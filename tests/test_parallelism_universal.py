"""The table of layouts in docs/parallelism.md against DeepSpeed's Universal Checkpointing itself.

Shares go through `merge_tp_slices` as ranks write them, and come back through `load_hp_checkpoint_state` for any ranks.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same
from tests.helpers.parallelism import Opened, Ranks, Row, State, each_row, over, rows_of

pytestmark = pytest.mark.heavy

ROW_PATTERNS = "parameter_with_row_parallelism_patterns"
WITH_SUB_PARAMS = "parameter_with_sub_params"


@pytest.fixture
def universal(tmp_path: Path) -> Universal:
    return Universal(tmp_path)


class Universal:
    """DeepSpeed's way to the universal checkpoint of one parameter, and back to ranks."""

    def __init__(self, folder: Path) -> None:
        self.writing = pytest.importorskip("deepspeed.checkpoint.ds_to_universal")
        self.reading = pytest.importorskip("deepspeed.checkpoint.universal_checkpoint")
        self.folder = folder

    def merged(self, slices: list[Tensor], **info: Any) -> Tensor:
        """What the slices of all ranks become, under the patterns of `universal_checkpoint_info`."""
        for rank, one in enumerate(slices):
            (self.folder / "slices" / "p" / str(rank)).mkdir(parents=True, exist_ok=True)
            for state in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.save(one.flatten(), self.folder / "slices" / "p" / str(rank) / f"{state}.00")
        shapes = [tuple(one.shape) for one in slices]
        self.writing.merge_tp_slices(
            info, str(self.folder / "zero"), str(self.folder / "slices"), len(slices), ("p", shapes)
        )
        return torch.load(self.folder / "zero" / "p" / "fp32.pt", weights_only=False)["param"]

    def restored(self, shape: tuple[int, ...], rank: int, count: int, **ep: int) -> Tensor:
        """What a rank's parameter of that shape gets of the universal one."""
        flat = torch.full((torch.Size(shape).numel(),), -1.0)
        mapping = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=0, numel=len(flat)), get_hp_fragment=lambda: flat
        )
        parameter = SimpleNamespace(shape=torch.Size(shape), numel=lambda: len(flat), _hp_mapping=mapping)
        self.reading.load_hp_checkpoint_state(parameter, str(self.folder / "zero" / "p"), rank, count, **ep)
        return flat.view(shape)


def info_of(row: Row) -> dict[str, Any]:
    """The patterns of `universal_checkpoint_info` that say a row's layout."""
    pattern = row.layout.strip("`")
    shapes = {WITH_SUB_PARAMS: (((40, 20, 20), 7), 0), "its `partition_dim` 1": ((3, (8, 8), 7), 1)}
    if row.layout.strip("`") in shapes:
        shape, dimension = shapes[pattern]
        return {WITH_SUB_PARAMS: [{"patterns": ["p"], "shape": shape, "partition_dim": dimension}]}
    return {} if pattern == "No pattern" else {pattern: ["p"]}


def slices_of(opened: Opened, count: int, mesh: str = "tp") -> list[Tensor]:
    found = []
    for rank in range(count):
        (share,) = opened.adapter.shard(opened.right, {mesh: count}, {mesh: rank}).values()
        found.append(share)
    return found


def there_and_back(row: Row, universal: Universal, counts: tuple[int, ...], **info: Any) -> None:
    """Our shares merge to our whole, and what is restored from that is our shares, whoever wrote it."""
    opened = row.opened()
    ((name, whole),) = opened.right.items()

    def held(state: State, ranks: Ranks, place: Ranks) -> State:
        del state
        shape = tuple(slices_of(opened, ranks["tp"])[place["tp"]].shape)
        return {name: universal.restored(shape, place["tp"], ranks["tp"])}

    for written in counts:
        merged = universal.merged(slices_of(opened, written), **info)
        assert_same({name: merged.contiguous()}, {name: whole}, f"{row.line}, merged from {written}")
        opened.agree(held, *over("tp", *counts))


@each_row
def test_universal(row: Row, universal: Universal) -> None:
    there_and_back(row, universal, (1, 2, 4), **info_of(row))


@each_row
def test_universal_vocabulary(row: Row, universal: Universal) -> None:
    """The universal parameter has no padding: it is the left side. The right is padded anew for any ranks."""
    for size in (12, 300):
        opened = row.opened(vocab_size=size)
        ((name, whole),) = opened.left.items()
        patterns = {"vocabulary_parameter_patterns": ["p"], "original_vocab_size": size}
        for written in (1, 2, 4):
            merged = universal.merged(slices_of(opened, written), **patterns)
            assert_same({name: merged.contiguous()}, {name: whole}, f"merged from {written}")
            for count in (1, 2, 4):
                for rank, mine in enumerate(slices_of(opened, count)):
                    restored = universal.restored(tuple(mine.shape), rank, count)
                    assert_same({name: restored}, {name: mine}, f"{written} to {count}, rank {rank}")


@each_row
def test_universal_widths(row: Row, universal: Universal) -> None:
    """3 groups over 2 ranks: version 0.4 of its metadata records how wide each rank's part of Q, of K and of V is."""
    opened = row.opened(num_attention_heads=6, num_key_value_heads=3)
    ((name, whole),) = opened.right.items()
    widths = [[20, 10], [10, 5], [10, 5]]
    sizes = tuple(map(sum, widths))
    slices = slices_of(opened, 2)
    merged = universal.merged(
        slices,
        universal_checkpoint_version=0.4,
        parameter_with_sub_params=[{"patterns": ["p"], "shape": (sizes, 7), "partition_dim": 0}],
        sub_param_shard_widths={"p": widths},
    )
    assert_same({name: merged.contiguous()}, {name: whole}, "merged")
    for rank, mine in enumerate(slices):
        theirs = universal.reading._narrow_sub_params(whole, 0, sizes, widths, rank, 2, 0.4)
        assert_same({name: theirs.view(mine.shape)}, {name: mine}, f"rank {rank}")


@each_row
def test_universal_experts(row: Row, universal: Universal) -> None:
    opened = row.opened()
    ((name, whole),) = opened.right.items()
    for written in (1, 2, 4):
        ranks = dict(enumerate(slices_of(opened, written, "ep")))
        merged = universal.writing._rebuild_zero3_autoep_rank_tensors(ranks, None, tuple(whole.shape), name)
        assert_same({name: merged}, {name: whole}, f"merged from {written}")
        # It writes below `zero`, in a folder by the parameter's name.
        universal.writing._save_zero3_autoep_universal_tensor(str(universal.folder), "p", "fp32", merged, len(whole))
        for count in (1, 2, 4):
            for rank, mine in enumerate(slices_of(opened, count, "ep")):
                restored = universal.restored(tuple(mine.shape), 0, 1, ep_rank=rank, ep_size=count)
                assert_same({name: restored}, {name: mine}, f"{written} to {count}, rank {rank}")


# --- where it goes wrong ---


def test_bias_in_a_row_pattern(universal: Universal) -> None:
    """A bias has one dimension, and a pattern that is the start of its name means its second one."""
    (row,) = (row for row in rows_of("test_replicated") if row.line.startswith("fc2.bias"))
    opened = row.opened()
    with pytest.raises(IndexError, match="Dimension out of range"):
        universal.merged(slices_of(opened, 2), **{ROW_PATTERNS: ["p"]})
    shares = [opened.adapter.shard(opened.right, {"tp": 2}, {"tp": rank}) for rank in range(2)]
    assert_same(opened.adapter.merge(shares, {"tp": 2}), opened.right, "ours")


def test_counts_of_sub_params(universal: Universal) -> None:
    """`shape=(experts, rows, columns)` used to say how many rows there are; now it says how many sub-parameters.

    One sub-parameter cut over ranks is an axis of its own in a line, whatever the version.
    """
    plain = Row("", "", ("tp shards f",), "experts.weight [x f d] <-> experts.weight", "").opened()
    ((name, whole),) = plain.right.items()
    slices = slices_of(plain, 4)
    pattern = {"patterns": ["p"], "shape": (3, 6, 7), "partition_dim": 1}
    with pytest.raises(AssertionError, match="count 6 .* does not evenly divide its full partition dimension 8"):
        universal.merged(slices, **{WITH_SUB_PARAMS: [pattern]})
    merged = universal.merged(slices, **{WITH_SUB_PARAMS: [pattern | {"shape": (3, (8,), 7)}]})
    assert_same({name: merged.contiguous()}, {name: whole}, "with widths")
    shares = [{name: one} for one in slices]
    assert_same(plain.adapter.merge(shares, {"tp": 4}), {name: whole}, "ours")


def test_averages_have_no_way_back(universal: Universal) -> None:
    """The mean of ranks that differ, which no rank held."""
    row = Row("", "", ("tp shards f",), "gate.weight [d] <-> gate.weight", "")
    opened = row.opened()
    ((name, whole),) = opened.right.items()
    merged = universal.merged([whole, whole * 3], parameter_to_average_patterns=["p"])
    assert torch.equal(merged, whole * 2)
    with pytest.raises(ConversionError, match="R602"):
        opened.adapter.merge([{name: whole}, {name: whole * 3}], {"tp": 2})
