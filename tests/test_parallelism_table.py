"""The table of layouts in docs/parallelism.md: every line of it, over every number of ranks; and Megatron-LM's.

What Megatron-LM holds is said once more in a few lines of torch: `chunk` and `cat`, without axes. The peers that can be
called are in tests/test_parallelism_deepspeed.py and tests/test_parallelism_universal.py.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.runtime.errors import ConversionError
from tests.helpers import parallelism
from tests.helpers.execution import assert_same
from tests.helpers.parallelism import CONFIG, FREE, Ranks, Row, State, cells, coded, each_row, over, places, rows

COUNTS = (1, 2, 3, 4, 5, 8)
EVERY_ROW = pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.section}: {row.line}")
# What the page's params are under CONFIG, worked out by hand.
SIZES = {"h": 8, "g": 4, "V": 12, "e": 4, "i": 8, "m": 4, "t": 2, "y": 4, "f": FREE["f"]}

# --- the page ---


def test_every_test_named_on_the_page_exists() -> None:
    """And every row that has no line says so."""
    here = Path(__file__).parent
    defined = {
        name
        for path in here.glob("test_parallelism_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    for heading, text in parallelism.parts().items():
        for row in cells(text):
            named = coded(row[-1])
            assert named or "none: " in row[2], f"{heading}: {row[0]} names no test"
            assert not set(named) - defined, f"{heading}: {row[0]} names {set(named) - defined}"
            assert heading == parallelism.PEERS_WRONG or row[2].startswith(("`", "none: ")), f"{heading}: {row[0]}"


def test_the_page_names_what_was_asked_for() -> None:
    """Nothing falls out of the table unnoticed."""
    text = parallelism.section()
    for peer in ("Megatron-LM", "DeepSpeed's loader", "AutoTP", "Universal Checkpointing"):
        assert sum(row.section == peer for row in rows()) >= 8, peer
    for kind in ("bloomtype", "glmtype", "qwentype", "codegentype", "bigcodetype", "phi3type", "ChatGLM with 2 groups"):
        assert kind in text
    for version in ("version 0", "version 1.0", "version 2.0"):
        assert text.count(f"{version} |") >= 2, version


# --- every line ---


def shared_out(row: Row) -> dict[str, list[tuple[str, str]]]:
    """Each mesh's axes, and how each is shared out, read off the mesh column."""
    found = {}
    for mesh in row.meshes:
        name, _, axes = mesh.partition(" shards ")
        found[name] = [(one.split()[0], " ".join(one.split()[1:])) for one in axes.split(", ")]
    return found


def fits(axis: str, how: str, count: int, line: str) -> bool:
    """Whether so many ranks can share an axis."""
    if how == "unevenly" or f"pad({axis}," in line or not re.search(rf"\b{axis}\b", line):
        return True
    return SIZES[axis] % count == 0 or (how == "or copies" and count % SIZES[axis] == 0)


def numbers_of_ranks(row: Row) -> tuple[list[Ranks], list[Ranks]]:
    """Numbers of ranks that fit, and that do not, of each mesh alone and of all together."""
    meshes = shared_out(row)
    good, bad = [], []
    for mesh, count in itertools.product(meshes, (1, 2, 4, 8) if is_divided(row) else COUNTS):
        fitting = all(fits(axis, how, count, row.line) for axis, how in meshes[mesh])
        (good if fitting else bad).append({mesh: count})
    if len(meshes) > 1:
        good.append(dict.fromkeys(meshes, 2))
    return good, bad


def is_divided(row: Row) -> bool:
    return "as partial(" in row.line


def of_any_bits(row: Row, state: State) -> State:
    """Random bits; what ranks hold divided has only whole numbers, which division by powers of two keeps."""
    if is_divided(row):
        return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randint(-(2**15), 2**15, one.shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, one in state.items()
    }


@EVERY_ROW
def test_a_line_is_checked(row: Row) -> None:
    """Nothing is to be said of it, but that it needs not all of the declarations."""
    found = [d for d in row.map.check() if d.code != "L701"]
    assert not found, found


@EVERY_ROW
def test_split_and_merged(row: Row) -> None:
    """Merged shares are the whole, cut again they are the shares, and a rank's conversion is a share of the whole's."""
    opened = row.opened()
    adapter, left = opened.adapter, of_any_bits(row, opened.left)
    right = dict(adapter.from_hf(left))
    good, bad = numbers_of_ranks(row)
    assert len(good) > 1
    for ranks in good:
        lefts, rights = (
            [adapter.shard(state, ranks, place, side=side) for place in places(ranks)]
            for side, state in (("hf", left), ("native", right))
        )
        assert_same(adapter.merge(lefts, ranks, side="hf"), left, f"hf of {ranks}")
        assert_same(adapter.merge(rights, ranks), right, f"native of {ranks}")
        for place, mine, theirs in zip(places(ranks), lefts, rights, strict=True):
            assert_same(adapter.at(ranks, place).from_hf(mine), theirs, f"rank {place} of {ranks}")
            assert_same(adapter.at(ranks, place).to_hf(theirs), mine, f"rank {place} of {ranks}, back")
    for ranks in bad:
        with pytest.raises(ConversionError, match="P453"):
            adapter.shard(right, ranks, dict.fromkeys(ranks, 0))


@EVERY_ROW
def test_from_ranks_to_ranks(row: Row) -> None:
    opened = row.opened()
    adapter, right = opened.adapter, opened.adapter.from_hf(of_any_bits(row, opened.left))
    good, _ = numbers_of_ranks(row)
    for ranks, to in itertools.permutations(good, 2):
        shares = [adapter.shard(right, ranks, place) for place in places(ranks)]
        for place in places(to):
            moved = adapter.reshard(shares, ranks, to, place)
            assert_same(moved, adapter.shard(right, to, place), f"{ranks} to {to}, rank {place}")


# --- Megatron-LM ---

Q, K, V = "q.weight", "k.weight", "v.weight"


def renamed(row: Row, tensor: Tensor) -> State:
    """A tensor by the right name of a row that has no holes."""
    return {row.line.partition("<-> ")[2].split()[0]: tensor}


def only(state: State) -> Tensor:
    (tensor,) = state.values()
    return tensor


def by_heads(tensor: Tensor) -> Tensor:
    """Rows as heads, and rows of a head."""
    return tensor.view(-1, CONFIG["head_dim"], *tensor.shape[1:])


@each_row
def test_column(row: Row) -> None:
    row.opened().agree(lambda w, n, at: renamed(row, only(w).chunk(n["tp"])[at["tp"]]), *over("tp", 1, 2, 4, 8))


@each_row
def test_row(row: Row) -> None:
    row.opened().agree(lambda w, n, at: renamed(row, only(w).chunk(n["tp"], 1)[at["tp"]]), *over("tp", 1, 2, 4, 8))


@each_row
def test_replicated(row: Row) -> None:
    def same(whole: State, ranks: Ranks, place: Ranks) -> State:
        del ranks, place
        if "norm." in row.line:
            return {f"input_layernorm.{name.split('.')[-1]}": tensor for name, tensor in whole.items()}
        return renamed(row, only(whole))

    (mesh,) = shared_out(row)
    opened = row.opened()
    opened.agree(same, *over(mesh, 1, 2, 4))
    changed = [opened.right, {name: -tensor for name, tensor in opened.right.items()}]
    with pytest.raises(ConversionError, match="R602"):
        opened.adapter.merge(changed, {mesh: 2})


@each_row
def test_vocabulary(row: Row) -> None:
    """`_vocab_size_with_padding` of Megatron: to the next multiple of 128 rows a rank."""

    def padded(whole: State, ranks: Ranks, place: Ranks) -> State:
        embedding, rows_padded = only(whole), len(only(whole))
        while rows_padded % (128 * ranks["tp"]):
            rows_padded += 1
        embedding = torch.nn.functional.pad(embedding, (0, 0, 0, rows_padded - len(embedding)))
        return renamed(row, embedding.chunk(ranks["tp"])[place["tp"]])

    for size in (11, 128, 300, 1030):
        opened = row.opened(vocab_size=size, d=2)
        # The whole right side is that of one rank, padded for one.
        opened.agree(padded, *over("tp", 1, 2, 4, 8))


@each_row
def test_qkv(row: Row) -> None:
    """Version 0 has all queries, then keys, then values; 1.0 has them by elements of heads; 2.0 by heads."""
    version = float(row.layout.split()[-1])

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        mine = [by_heads(whole[name]).chunk(ranks["tp"])[place["tp"]] for name in (Q, K, V)]
        fused = torch.cat(mine) if version == 0 else torch.stack(mine, dim=2 if version == 1 else 1)
        return renamed(row, fused.reshape(-1, *mine[0].shape[2:]))

    row.opened().agree(held, *over("tp", 1, 2, 4, 8))


@each_row
def test_grouped_queries(row: Row) -> None:
    """Megatron-core's `linear_qkv`: of each group its queries, its key, its value."""

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        q, k, v = (whole[name].chunk(CONFIG["num_key_value_heads"]) for name in (Q, K, V))
        groups = [torch.cat(group) for group in zip(q, k, v, strict=True)]
        per_rank = len(groups) // ranks["tp"]
        first = per_rank * place["tp"]
        return renamed(row, torch.cat(groups[first : first + per_rank]))

    row.opened().agree(held, *over("tp", 1, 2, 4))


@each_row
def test_copies_of_groups(row: Row) -> None:
    """Over 8 ranks with 2 groups, 4 ranks hold the same keys and values, and merging compares them."""

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        count, rank = ranks["tp"], place["tp"]
        q = whole[Q].chunk(count)[rank]
        groups = min(count, 2)
        k, v = (whole[name].chunk(groups)[rank * groups // count] for name in (K, V))
        return renamed(row, torch.cat([q, k, v]))

    opened = row.opened(num_key_value_heads=2)
    opened.agree(held, *over("tp", 1, 2, 4, 8))
    shares = [opened.adapter.shard(opened.right, {"tp": 8}, {"tp": rank}) for rank in range(8)]
    only(shares[3])[-1, -1] += 1
    with pytest.raises(ConversionError, match="R602"):
        opened.adapter.merge(shares, {"tp": 8})


@each_row
def test_gate_and_up(row: Row) -> None:
    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        return renamed(row, torch.cat([whole[f"{j}.weight"].chunk(ranks["tp"])[place["tp"]] for j in ("gate", "up")]))

    row.opened().agree(held, *over("tp", 1, 2, 4, 8))


@each_row
def test_mamba(row: Row) -> None:
    """`in_proj` is z, x, B, C and dt, each column parallel by itself."""

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        h, c, g, s = 8, 5, 4, 2
        parts = only(whole).split([h * c, h * c, g * s, g * s, h])
        return renamed(row, torch.cat([part.chunk(ranks["tp"])[place["tp"]] for part in parts]))

    row.opened().agree(held, *over("tp", 1, 2, 4))


@each_row
def test_experts(row: Row) -> None:
    """Each rank's experts are numbered from 0; where ranks do not divide them, the first have one more."""

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        mine = torch.tensor_split(torch.arange(count), ranks["ep"])[place.get("ep", 0)]
        tp, rank = ranks.get("tp", 1), place.get("tp", 0)
        out = {}
        for local, e in enumerate(mine.tolist()):
            if "gate" in row.line:
                fused = torch.cat([whole[f"experts.{e}.{j}.weight"].chunk(tp)[rank] for j in ("gate", "up")])
                out[f"local_experts.{local}.linear_fc1.weight"] = fused
            else:
                name = row.line.partition("<-> ")[2].replace("{local e}", str(local))
                out[name] = whole[f"experts.{e}.down.weight"].chunk(tp, dim=1)[rank]
        return out

    uneven = "unevenly" in row.meshes[0]
    count = 5 if uneven else 4
    ranks = over("ep", 1, 2, 3, 4, 5) if uneven else [*over("ep", 1, 2, 4), {"ep": 2, "tp": 2}, {"ep": 4, "tp": 8}]
    row.opened(num_experts=count).agree(held, *ranks)


@each_row
def test_experts_in_one_tensor(row: Row) -> None:
    """`GroupedMLP` views it as `(local experts, rows, hidden)`: inputs of an expert's second layer are rows."""

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        stacked = torch.stack([whole[f"experts.{e}.down.weight"].T for e in range(4)])
        mine = stacked.chunk(ranks["ep"])[place["ep"]].chunk(ranks["tp"], dim=1)[place["tp"]]
        return renamed(row, mine.reshape(-1, mine.shape[-1]))

    row.opened().agree(held, *({"ep": ep, "tp": tp} for ep, tp in itertools.product((1, 2, 4), repeat=2)))


@each_row
def test_stages(row: Row) -> None:
    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        per_stage = 8 // ranks["pp"]
        return {
            f"layers.{local}.input_layernorm.weight": whole[f"layers.{per_stage * place['pp'] + local}.norm.weight"]
            for local in range(per_stage)
        }

    row.opened().agree(held, *over("pp", 1, 2, 4, 8))


@each_row
def test_interleaved_stages(row: Row) -> None:
    """Megatron's offset of chunk k: all layers before the chunk's, and those of the stages before."""

    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        per_chunk = 8 // 2 // ranks["pp"]
        return {
            f"model{k}.layers.{local}.input_layernorm.weight": whole[
                f"layers.{k * 8 // 2 + place['pp'] * per_chunk + local}.norm.weight"
            ]
            for k in range(2)
            for local in range(per_chunk)
        }

    row.opened().agree(held, *over("pp", 1, 2, 4))


@each_row
def test_ends_of_the_pipeline(row: Row) -> None:
    def held(whole: State, ranks: Ranks, place: Ranks) -> State:
        end = 0 if "== 0" in row.line else ranks["pp"] - 1
        return renamed(row, only(whole)) if place["pp"] == end else {}

    row.opened().agree(held, *over("pp", 1, 2, 4, 8))


@each_row
def test_replicated_over_stages(row: Row) -> None:
    """Universal Checkpointing keeps what stage 0 has of these: it does not look at the others."""
    opened: Any = row.opened()
    opened.agree(lambda whole, ranks, place: whole, *over("pp", 1, 2, 4))
    changed = [opened.right, {name: tensor + 1 for name, tensor in opened.right.items()}]
    assert_same(opened.adapter.merge(changed, {"pp": 2}, compare=False), opened.right, "the first stage's")
    with pytest.raises(ConversionError, match="R602"):
        opened.adapter.merge(changed, {"pp": 2})


def test_averages_are_refused() -> None:
    """No line says `mean`: ranks that hold different values of one parameter are told apart."""
    row = Row("", "", ("tp shards f",), "gate.weight [d] <-> gate.weight", "")
    opened = row.opened()
    shares = [{"gate.weight": tensor} for tensor in (only(opened.right), only(opened.right) * 3)]
    with pytest.raises(ConversionError, match="R602.*gate.weight differs from what another rank holds"):
        opened.adapter.merge(shares, {"tp": 2})
