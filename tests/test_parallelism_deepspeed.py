"""The table of layouts in docs/parallelism.md against DeepSpeed itself: its checkpoint loader, and AutoTP.

AutoTP's layers are DeepSpeed's own; only the process group behind them is a stand-in, as they ask it for two numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same
from tests.helpers.parallelism import Opened, Ranks, Row, State, each_row, over, rows_of

pytestmark = pytest.mark.heavy

# --- the loader ---

Load = Callable[..., State]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """What DeepSpeed's loader gives a rank, of states written to files of several ranks."""
    factory = pytest.importorskip("deepspeed.runtime.state_dict_factory").SDLoaderFactory
    beside = {
        "attention.dense.weight": torch.zeros(7, 40),
        "mlp.dense_4h_to_h.weight": torch.zeros(7, 8),
        "attention.query_key_value.weight": torch.zeros(120, 7),
        "mlp.dense_h_to_4h.weight": torch.zeros(8, 7),
        "mlp.dense_h_to_4h.bias": torch.zeros(8),
    }

    def load(states: list[State], ranks: int, rank: int, version: float = 0) -> State:
        paths = [str(tmp_path / f"mp_rank_{number:02d}_model_states.pt") for number in range(len(states))]
        for path, state in zip(paths, states, strict=True):
            torch.save({"module": beside | state}, path)
        module = factory.get_sd_loader(paths, None, "Megatron", version).load(ranks, rank)[1]["module"]
        return {name: module[name].contiguous() for name in states[0]}

    return load


def shares_of(opened: Opened, count: int) -> list[State]:
    return [opened.adapter.shard(opened.right, {"tp": count}, {"tp": rank}) for rank in range(count)]


def resized(opened: Opened, load: Load, version: float, *sizes: tuple[int, int]) -> None:
    """From so many files to so many ranks, the loader gives what moving the slices gives."""
    for count, ranks in sizes:
        shares = shares_of(opened, count)
        for rank in range(ranks):
            moved = opened.adapter.reshard(shares, {"tp": count}, {"tp": ranks}, {"tp": rank})
            assert_same(moved, load(shares, ranks, rank, version), f"{count} to {ranks}, rank {rank}")


@each_row
def test_loader(row: Row, load: Load) -> None:
    found = re.search(r"version ([\d.]+)", row.layout)
    version = float(found[1]) if found else 0
    opened = row.opened()
    opened.agree(lambda whole, n, at: load([whole], n["tp"], at["tp"], version), *over("tp", 1, 2, 4))
    resized(opened, load, version, (4, 2), (2, 1), (4, 1), (2, 4), (1, 4), (2, 2))


@each_row
def test_loader_never_merges_final_linear(row: Row, load: Load) -> None:
    opened = row.opened()
    opened.agree(lambda whole, n, at: load([whole], n["tp"], at["tp"]), *over("tp", 1, 2, 4))
    resized(opened, load, 0, (2, 4), (1, 4), (2, 2))
    shares = shares_of(opened, 4)
    assert_same(load(shares, 1, 0), shares[0], "the loader's")
    assert_same(opened.adapter.merge(shares, {"tp": 4}), opened.right, "ours")


@each_row
def test_loader_takes_what_differs(row: Row, load: Load) -> None:
    opened = row.opened()
    opened.agree(lambda whole, n, at: load([whole], n["tp"], at["tp"]), *over("tp", 1, 2, 4))
    resized(opened, load, 0, (4, 2), (2, 1), (4, 1), (2, 4), (1, 4), (2, 2))
    first, second = shares_of(opened, 2)
    second = {name: tensor + 1 for name, tensor in second.items()}
    assert_same(load([first, second], 1, 0), first, "the loader's")
    with pytest.raises(ConversionError, match="R602"):
        opened.adapter.merge([first, second], {"tp": 2})
    assert_same(opened.adapter.merge([first, second], {"tp": 2}, compare=False), first, "as it is asked for")


# --- AutoTP's layers ---


@dataclass(frozen=True)
class Group:
    """A process group, as far as these layers look at one."""

    rank: int
    size: int


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("deepspeed.module_inject.layers")
    monkeypatch.setattr(module.dist, "get_rank", lambda group=None: group.rank)
    monkeypatch.setattr(module.dist, "get_world_size", lambda group=None: group.size)
    return module


def meta(**known: int) -> Any:
    return pytest.importorskip("deepspeed.module_inject.tp_shard").AutoTPMeta(**known)


def linear(weight: Tensor, bias: Tensor | None = None) -> torch.nn.Linear:
    made = torch.nn.Linear(1, 1, bias=bias is not None)
    made.weight = torch.nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = torch.nn.Parameter(bias.clone())
    return made


@each_row
def test_linear(row: Row, layers: Any) -> None:
    uneven, by_groups = "unevenly" in row.meshes[0], "shards g" in row.meshes[0]
    layer = {
        "lm_head": layers.VocabParallelLinear,
        "gate_up_proj": layers.GateUpPack_LinearLayer,
        "down_proj": layers.LinearAllreduce,
        "o_proj": layers.LinearAllreduce,
    }.get(row.line.partition(".")[0], layers.LinearLayer)
    heads, groups = (6, 3) if by_groups else (8, 4)
    sizes = {"f": 10, "vocab_size": 13} if uneven else {}
    opened = row.opened(num_attention_heads=heads, num_key_value_heads=groups, **sizes)
    known = meta(num_kv_heads=groups) if by_groups else meta()

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        ((name, tensor),) = whole.items()
        part = name.rpartition(".")[2]
        module = linear(tensor) if part == "weight" else linear(torch.zeros(len(tensor), 8), tensor)
        group = Group(place["tp"], ranks["tp"])
        # The name says whether it is cut by groups at all.
        made = layer(module, group, name="self_attn" if by_groups else "mlp", tp_meta=known)
        return {name: getattr(made, part).detach()}

    counts = (1, 2, 3) if by_groups else (1, 2, 3, 4) if uneven else (1, 2, 4, 8)
    opened.agree(held, *over("tp", *counts))
    if by_groups:  # of which the last of 4 ranks has none: AutoTP's tensor is empty, and here there is no such tensor
        assert not any(one.numel() for one in held(opened.left, {"tp": 4}, {"tp": 3}).values())
        assert not opened.adapter.shard(opened.right, {"tp": 4}, {"tp": 3})


# --- AutoTP's fused kinds ---

# What AutoTP looks for in the printed module, by what the page calls it.
BLOCKS = {
    "bloomtype: Bloom": ("BloomBlock", "bloomtype"),
    "Falcon, by groups": ("FalconDecoderLayer", "bloomtype"),
    "glmtype: GLM, MPT, Baichuan": ("MptBlock", "glmtype"),
    "ChatGLM with 2 groups": ("GLMBlock", "glmtype"),
    "qwentype: QWen": ("QWenBlock", "qwentype"),
    "phi3type: Phi-3": ("Phi3DecoderLayer", "phi3type"),
    "over ranks that do not divide": ("Phi3DecoderLayer", "phi3type"),
    "bigcodetype: GPTBigCode": ("GPTBigCodeBlock", "bigcodetype"),
    "codegen": ("CodeGenBlock", "codegentype"),
}


def cut_by_autotp(block: str, tensor: Tensor, count: int, rank: int, known: Any) -> Tensor:
    """`prepare_tp_fused_qkvw` for a module that prints as a block of that name."""
    utils = pytest.importorskip("deepspeed.module_inject.fusedqkv_utils")
    name, kind = BLOCKS[block]
    assert utils.get_fused_qkv_type(name) == kind
    return utils.prepare_tp_fused_qkvw(name, tensor, count, rank, known).contiguous()


def known_of(opened: Opened) -> Any:
    heads, groups = opened.sizes["num_attention_heads"], opened.sizes["num_key_value_heads"]
    return meta(num_kv_heads=groups, num_attention_heads=heads, n_embd=heads * opened.sizes["head_dim"])


@each_row
def test_fused(row: Row) -> None:
    block = row.layout
    sizes, counts = {
        "Falcon, by groups": ({}, (1, 2, 4)),
        "ChatGLM with 2 groups": ({"num_key_value_heads": 2}, (1, 2)),
        "phi3type: Phi-3": ({"d": 40}, (1, 2, 4)),
        "over ranks that do not divide": ({"num_attention_heads": 6, "num_key_value_heads": 3, "d": 30}, (1, 2, 3)),
    }.get(block, ({"num_key_value_heads": 8}, (1, 2, 4, 8)))
    opened = row.opened(**sizes)

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        ((name, tensor),) = whole.items()
        return {name: cut_by_autotp(block, tensor, ranks["tp"], place["tp"], known_of(opened))}

    opened.agree(held, *over("tp", *counts))


HEADS_OF_CODEGEN = 32


def fused_of_codegen(whole: State) -> Tensor:
    """transformers' `qkv_proj`: 4 blocks of heads, of each its queries, then its values, then its keys."""
    q, v, k = (whole[f"{j}.weight"].view(4, -1, whole["q.weight"].shape[1]) for j in "qvk")
    return torch.cat([q, v, k], dim=1).reshape(-1, q.shape[2])


def codegen(count: int) -> tuple[Opened, Callable[[State, Ranks, Ranks], State]]:
    (row,) = rows_of("test_codegen")
    opened = row.opened(num_attention_heads=HEADS_OF_CODEGEN, ranks_written=count)
    known = meta(num_kv_heads=HEADS_OF_CODEGEN)

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        fused = fused_of_codegen(whole)
        return {"qkv_proj.weight": cut_by_autotp("codegen", fused, ranks["tp"], place["tp"], known)}

    return opened, held


@pytest.mark.parametrize("count", [2, 4, 8])
def test_codegen(count: int) -> None:
    opened, held = codegen(count)
    opened.agree(held, {"tp": count})


def test_codegen_of_other_ranks() -> None:
    """Shards for 2 ranks end to end are another tensor than those for 4; the left side takes them from one to other."""
    (two, held), (four, _) = codegen(2), codegen(4)
    of = {
        count: [held(two.left, {"tp": count}, {"tp": rank}) for rank in range(count)]  # as AutoTP cuts it
        for count in (2, 4)
    }
    ends = [torch.cat([share["qkv_proj.weight"] for share in shares]) for shares in of.values()]
    assert not torch.equal(*ends)
    whole = two.adapter.to_hf(two.adapter.merge(of[2], {"tp": 2}))
    for rank, share in enumerate(of[4]):
        moved = four.adapter.shard(four.adapter.from_hf(whole), {"tp": 4}, {"tp": rank})
        assert_same(moved, share, f"rank {rank}")


@each_row
def test_yuan(row: Row, layers: Any) -> None:
    layer = layers.Yuan_LinearLayer if "v_proj" in row.line else layers.Yuan_LinearAllreduce
    opened = row.opened()

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        ((name, tensor),) = whole.items()
        made = layer(linear(tensor), Group(place["tp"], ranks["tp"]), tp_meta=meta(num_kv_heads=8))
        return {name: made.weight.detach()}

    opened.agree(held, *over("tp", 1, 2, 4))


@each_row
def test_divided_bias(row: Row, layers: Any) -> None:
    """As the pieces of its checkpoints say it, with a scale; the layer itself fails before it holds one."""
    affine = pytest.importorskip("deepspeed.checkpoint.affine")
    opened = row.opened()
    ((name, whole),) = opened.left.items()

    def held(state: State, ranks: Ranks, place: Ranks) -> State:
        pieces = affine.replicated_map(whole.shape, ranks["tp"], scale=1 / ranks["tp"])
        return {name: pieces.extract(state[name], place["tp"])}

    opened.agree(held, *over("tp", 1, 2, 4, 8))
    with pytest.raises(AttributeError, match="'list' object"):
        layers.Yuan_LinearAllreduce(linear(torch.zeros(7, 40), whole), Group(0, 2), tp_meta=meta(num_kv_heads=8))


def test_yuan_with_odd_heads() -> None:
    """12 heads over 4 ranks: two ranks would hold head 1, and none head 3."""
    utils = pytest.importorskip("deepspeed.module_inject.fusedqkv_utils")
    heads = [utils.shared_qk_value_head_ids(12, 4, rank)[:2] for rank in range(4)]
    assert heads == [[0, 1], [1, 2], [3, 4], [4, 5]]
    opened = rows_of("test_yuan")[0].opened(num_attention_heads=12)
    with pytest.raises(ConversionError, match="P453.*axis `y` has 6 positions.*over 4 ranks of `tp`"):
        opened.adapter.shard(opened.right, {"tp": 4}, {"tp": 0})


# --- where AutoTP goes wrong ---


def fused_row(layout: str) -> Row:
    return next(row for row in rows_of("test_fused") if row.layout == layout)


def numbered(count: int) -> Tensor:
    """Rows that say which they are."""
    return torch.arange(float(count)).view(-1, 1)


def rows_in(tensor: Tensor) -> list[int]:
    return tensor.flatten().int().tolist()


def rows_of_thirds(count: int) -> list[list[int]]:
    """Which rows DeepSpeed's `strided_copy` gives each of 2 ranks, of a fused tensor of so many."""
    copier = pytest.importorskip("deepspeed.module_inject.auto_tp").ReplaceWithTensorSlicing(
        mp_size=2, out_dim=0, in_dim=1
    )
    found = []
    for copier.gpu_index in range(2):
        target = torch.zeros(count // 2, 1)
        found.append(rows_in(copier.strided_copy(target, numbered(count), num_splits=3, int8=True)))
    return found


def rows_of_line(row: Row, count: int, **sizes: int) -> list[list[int]]:
    opened = row.opened(d=1, head_dim=3, **sizes)
    (name,) = opened.right
    whole = {name: numbered(count)}
    return [rows_in(opened.adapter.shard(whole, {"tp": 2}, {"tp": rank})[name]) for rank in range(2)]


def test_thirds_of_grouped_queries() -> None:
    """4 heads and 1 or 2 groups of 3 rows: a third is no multiple of a head, and the second third has queries too."""
    assert rows_of_thirds(18)[0] == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    row = fused_row("phi3type: Phi-3")
    q, kv = [[*range(6)], [*range(6, 12)]], [*range(12, 18)]
    ours = rows_of_line(row, 18, num_attention_heads=4, num_key_value_heads=1)
    assert ours == [q[0] + kv, q[1] + kv]
    assert rows_of_thirds(24)[0] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    ours = rows_of_line(row, 24, num_attention_heads=4, num_key_value_heads=2)
    assert ours == [q[0] + [12, 13, 14, 18, 19, 20], q[1] + [15, 16, 17, 21, 22, 23]]


def test_thirds_of_heads() -> None:
    """Bloom's and GPT-NeoX's heads hold Q, K and V of their own: thirds tear heads apart. Of GLM's they are right."""
    thirds = rows_of_thirds(36)
    assert thirds[0] == [*range(6), *range(12, 18), *range(24, 30)]
    assert rows_of_line(fused_row("bloomtype: Bloom"), 36, num_attention_heads=4) == [[*range(18)], [*range(18, 36)]]
    assert rows_of_line(fused_row("glmtype: GLM, MPT, Baichuan"), 36, num_attention_heads=4) == thirds


def test_ranks_without_groups() -> None:
    """2 groups over 4 ranks: AutoTP gives ranks 2 and 3 nothing, not even queries; ours hold copies of their group."""
    opened = fused_row("ChatGLM with 2 groups").opened(num_key_value_heads=2)
    fused = opened.one()
    theirs = [cut_by_autotp("ChatGLM with 2 groups", fused, 4, rank, known_of(opened)) for rank in range(4)]
    assert [len(one) for one in theirs] == [30, 30, 0, 0]
    q, k, v = fused.split([40, 10, 10])
    for rank, share in enumerate(shares_of(opened, 4)):
        expected = torch.cat([q.chunk(4)[rank], k.chunk(2)[rank // 2], v.chunk(2)[rank // 2]])
        assert_same(share, {"query_key_value.weight": expected}, f"rank {rank}")


def test_phi3_with_other_heads() -> None:
    """AutoTP takes heads to have `d / h` rows. With 8 heads of 5 rows and d = 24 it cuts Q within K."""
    opened = fused_row("phi3type: Phi-3").opened(d=24)
    fused = opened.one()
    q, k, v = fused.split([40, 20, 20])
    for rank, share in enumerate(shares_of(opened, 2)):
        expected = torch.cat([one.chunk(2)[rank] for one in (q, k, v)])
        assert_same(share, {"qkv_proj.weight": expected}, f"rank {rank}")
        theirs = cut_by_autotp("phi3type: Phi-3", fused, 2, rank, known_of(opened))
        assert theirs.shape == expected.shape
        assert not torch.equal(theirs, expected)
