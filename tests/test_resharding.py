"""States of ranks: split, merged, and moved from n ranks to m, on both sides of a map."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.resharding import places
from tests.helpers.execution import map_of

State = dict[str, Tensor]

# What a transformer's checkpoints hold, both sides laid out differently, and every way to share an axis out.
GPT = """
param L
param h
param g
param c
param V
param E
index i < L
index e < E
mesh pp shards i
mesh tp shards h, g or copies, f by ceil, V
mesh ep shards e unevenly
wte.weight [V d] <-> emb.weight [pad(V, 4*size(tp)) d] where rank(pp) == 0
ln_f.weight [d] <-> final.weight where rank(pp) == size(pp) - 1
h.{i} <-> layers.{local i}:
    q.weight [(h c) d] + k.weight [(g c) d] + v.weight [(g c) d] <-> qkv.weight [(h c + g c + g c) d]
    v0.weight [d (3 h c)] <-> v0.weight [(3 h c) d]
    v1.weight [d (3 h c)] <-> v1.weight [(h c 3) d]
    v2.weight [d (j h c)] <-> {j:q|k|v}2.weight [(h c) d]
    mlp.weight [f d] <-> mlp.weight
    ex.{e}.{j:w1|w3}.weight [y d] <-> ex.{local e}.weight [(j y) d]
    down.{e}.weight [d y] <-> down [e y d]
    router.weight [x d] <-> router.weight
"""
SIZES = {"L": 4, "h": 8, "g": 2, "c": 3, "V": 11, "E": 5}
RANKS: list[dict[str, int]] = [
    {"tp": 1},
    {"tp": 2},
    {"tp": 4},
    {"tp": 8},
    {"pp": 2, "ep": 2},
    {"pp": 4, "tp": 2, "ep": 3},
]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of any bits at all."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).view(shape)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one[name], other[name]))), name


@pytest.fixture(scope="module")
def gpt() -> Any:
    return map_of(GPT).adapter(None, **SIZES)


@pytest.fixture(scope="module")
def left(gpt: Any) -> State:
    shapes = {name: shape for name, (shape, _) in gpt.hf_keys().items()}
    free = {"mlp.weight": (7, 5), "router.weight": (5, 5), "wte.weight": (11, 5), "ln_f.weight": (5,)}
    ends = dict.fromkeys(("w1.weight", "w3.weight"), (13, 5)) | {f"v{n}.weight": (5, 72) for n in range(3)}
    state = {}
    for name, shape in shapes.items():
        last = ".".join(name.split(".")[-2:])
        known = free.get(last) or ends.get(last) or ((5, 13) if "down" in name else (*shape[:-1], 5))
        state[name] = drawn(tuple(known))
    return state


@pytest.fixture(scope="module")
def right(gpt: Any, left: State) -> State:
    return dict(gpt.from_hf(left))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_converts_what_it_holds(gpt: Any, left: State, right: State, ranks: dict[str, int]) -> None:
    """Cut and converted is converted and cut: neither side is ever needed whole."""
    for rank in places(gpt, ranks):
        mine, theirs = gpt.shard(left, ranks, rank, side="hf"), gpt.shard(right, ranks, rank)
        one = gpt.at(ranks, rank)
        assert_same(one.from_hf(mine), theirs)
        assert_same(one.to_hf(theirs), mine)


@pytest.mark.parametrize("side", ["hf", "native"])
@pytest.mark.parametrize("ranks", RANKS)
def test_merging_is_the_inverse_of_splitting(
    gpt: Any, left: State, right: State, ranks: dict[str, int], side: str
) -> None:
    state = left if side == "hf" else right
    shares = [gpt.shard(state, ranks, rank, side=side) for rank in places(gpt, ranks)]
    whole = gpt.merge(shares, ranks, side=side)
    assert_same(whole, state)
    for rank, share in zip(places(gpt, ranks), shares, strict=True):
        assert_same(gpt.shard(whole, ranks, rank, side=side), share)


@pytest.mark.parametrize(("ranks", "to"), list(itertools.product(RANKS[1:], RANKS[1:])))
def test_from_ranks_to_other_ranks(
    gpt: Any, left: State, right: State, ranks: dict[str, int], to: dict[str, int]
) -> None:
    for side, state in (("hf", left), ("native", right)):
        shares = [gpt.shard(state, ranks, rank, side=side) for rank in places(gpt, ranks)]
        for rank in places(gpt, to):
            assert_same(gpt.reshard(shares, ranks, to, rank, side=side), gpt.shard(state, to, rank, side=side))


def test_shares_own_their_memory(gpt: Any, right: State) -> None:
    for tensor in gpt.shard(right, {"tp": 2}, {"tp": 1}).values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_nothing_larger_than_a_share_is_made(gpt: Any, right: State) -> None:
    """From 4 ranks to 2: no tensor of 1 rank is put together on the way."""

    class Largest(torch.overrides.TorchFunctionMode):
        found = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.empty and isinstance(out, Tensor):
                self.found = max(self.found, out.numel())
            return out

    shares = [gpt.shard(right, {"tp": 4}, rank) for rank in places(gpt, {"tp": 4})]
    with Largest() as mode:
        mine = gpt.reshard(shares, {"tp": 4}, {"tp": 2}, {"tp": 0})
    assert mode.found == max(tensor.numel() for tensor in mine.values())


# --- quantised ---

FP8 = """
param h
mesh tp shards h, f
mesh ep shards e
param E
index e < E
codec fp8 = block_scaled(f8e4m3, block=2x4, scale="{key}_scale_inv")
codec fp4 = block_scaled(f4e2m1, block=1x4, packed=i8, scale="{stem}.scale", scale_dtype=f8e8m0)
codec rows = block_scaled(f8e4m3, block=1x*, scale="{key}_scale")
codec nv = block_scaled(f4e2m1, block=1x4, packed=u8, scale="{key}_scale", scale_dtype=f8e4m3, global_scale="{key}_2")
q.weight [(h 4) d] as fp8 <-> q.weight [(h 4) d] as fp8
o.weight [d (h 4)] as fp8 <-> o.weight [d (h 4)] as fp8
w.{e}.weight [f d] as fp4 <-> w.{e}.weight [f d] as fp4
r.weight [d f] as rows <-> r.weight [d f] as rows
n.weight [f d] as nv <-> n.weight [f d] as nv
"""


def quantised() -> tuple[Any, State]:
    adapter = map_of(FP8).adapter(None, h=4, E=2)
    shapes = {"q.weight": (16, 10), "o.weight": (10, 16), "r.weight": (10, 8), "n.weight": (8, 12)}
    shapes |= {f"w.{e}.weight": (8, 12) for e in range(2)}
    plain = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    state = {}
    for name, tensor in plain.items():
        (codec,) = next(one.stored for one in adapter.list_shares("native", {}).shown if one.name == name)
        state |= codec.encode(name, tensor).parts
    return adapter, state


@pytest.mark.parametrize("ranks", [{"tp": 2}, {"tp": 4}, {"tp": 2, "ep": 2}])
def test_scales_follow_their_weights(ranks: dict[str, int]) -> None:
    adapter, state = quantised()
    shares = [adapter.shard(state, ranks, rank) for rank in places(adapter, ranks)]
    assert_same(adapter.merge(shares, ranks), state)
    codec = next(one.stored[0] for one in adapter.list_shares("native", {}).shown if one.name == "q.weight")
    whole = codec.decode("q.weight", state)
    for rank, share in zip(places(adapter, ranks), shares, strict=True):
        rows = 16 // ranks["tp"]
        begin = rank["tp"] * rows
        assert torch.equal(codec.decode("q.weight", share), whole[begin : begin + rows])


def test_a_cut_within_a_block() -> None:
    text = 'mesh tp shards f\ncodec fp8 = block_scaled(f8e4m3, block=128x128, scale="{key}_s")\n'
    adapter = map_of(text + "w [f d] as fp8 <-> v [f d] as fp8\n").adapter(None)
    state = {"v": torch.zeros(384, 128, dtype=torch.float8_e4m3fn), "v_s": torch.ones(3, 1)}
    with pytest.raises(ConversionError, match="P454.*v: a share ends at position 192.*within a block of 128"):
        adapter.shard(state, {"tp": 2}, {"tp": 0})
    assert adapter.shard(state, {"tp": 3}, {"tp": 1})["v_s"].shape == (1, 1)


# --- what does not fit ---


@pytest.fixture
def plain() -> Any:
    return map_of("param h\nmesh tp shards h, f\nq [(h c) d] <-> q [(h c) d]\nw [f d] <-> w\nn [d] <-> n\n").adapter(
        None, h=6
    )


def state_of(adapter: Any) -> State:
    del adapter
    return {"q": drawn((12, 5)), "w": drawn((8, 5)), "n": drawn((5,))}


def test_a_cut_through_a_head(plain: Any) -> None:
    with pytest.raises(ConversionError, match="P453.*axis `h` has 6 positions.*over 4 ranks of `tp`"):
        plain.shard(state_of(plain), {"tp": 4}, {"tp": 0})


def shares_of(plain: Any) -> Iterator[State]:
    state = state_of(plain)
    return (plain.shard(state, {"tp": 2}, {"tp": rank}) for rank in range(2))


def test_replicas_are_compared(plain: Any) -> None:
    one, two = shares_of(plain)
    two["n"] = one["n"].clone()
    two["n"].view(torch.int16)[3] ^= 1
    with pytest.raises(ConversionError, match=r"R602.*n differs from what another rank holds \(n of rank 1\) at \[3\]"):
        plain.merge([one, two], {"tp": 2})
    merged = plain.merge([one, two], {"tp": 2}, compare=False)
    assert torch.equal(merged["n"].view(torch.int16), one["n"].view(torch.int16))


def test_a_tensor_that_one_rank_lacks(plain: Any) -> None:
    one, two = shares_of(plain)
    del two["w"]
    with pytest.raises(ConversionError, match=r"R605.*w of rank tp 1 is missing, rank tp 0 has it"):
        plain.merge([one, two], {"tp": 2})


def test_a_tensor_that_no_rule_reads(plain: Any) -> None:
    one, two = shares_of(plain)
    two["lm_head"] = two["w"]
    with pytest.raises(ConversionError, match="R603.*no rule reads lm_head of rank tp 1"):
        plain.merge([one, two], {"tp": 2})


def test_ranks_whose_shapes_do_not_fit(plain: Any) -> None:
    one, two = shares_of(plain)
    two["w"] = two["w"][:, :3]
    with pytest.raises(ConversionError, match="R606.*w: `d` is 5 on rank tp 0, 3 on rank tp 1"):
        plain.merge([one, two], {"tp": 2})


def test_widths_come_with_the_shares(plain: Any) -> None:
    """The size of an axis that no config tells is that of all ranks together, however it is shared out."""
    one, two = shares_of(plain)
    w = torch.cat([one["w"], two["w"]])
    one["w"], two["w"] = w[:3], w[3:]
    assert_same({"w": plain.merge([one, two], {"tp": 2})["w"]}, {"w": w})


def test_ranks_of_two_dtypes(plain: Any) -> None:
    one, two = shares_of(plain)
    two["w"] = two["w"].float()
    with pytest.raises(ConversionError, match=r"R606.*w of rank 1 is torch.float32, of rank 0 torch.bfloat16"):
        plain.merge([one, two], {"tp": 2})


def test_states_and_ranks_that_do_not_go_together(plain: Any) -> None:
    with pytest.raises(ConversionError, match=r"N113.*1 states were given, .* are 2 ranks"):
        plain.merge([state_of(plain)], {"tp": 2})
    with pytest.raises(ConversionError, match="N113.*no mesh `ep`; it has `tp`"):
        plain.shard(state_of(plain), {"ep": 2}, {"ep": 0})
    with pytest.raises(ConversionError, match="N113.*no rank 2 of `tp`"):
        plain.shard(state_of(plain), {"tp": 2}, {"tp": 2})
    with pytest.raises(ConversionError, match="N111.*sides of the map are `hf` and `native`, not `left`"):
        plain.shard(state_of(plain), {"tp": 2}, {"tp": 0}, side="left")


def test_a_rank_without_experts_has_no_stack_of_them() -> None:
    """What has no elements is on neither side; of padding there is an empty tensor, which tells the other axes."""
    text = "param E\nparam V\nindex e < E\nmesh ep shards e unevenly, V\n"
    text += "w.{e} [f d] <-> w [e f d]\nt [V d] <-> t [pad(V, size(ep)) d]\n"
    adapter = map_of(text).adapter(None, E=2, V=2)
    left = {"w.0": drawn((2, 5)), "w.1": drawn((2, 5)), "t": drawn((2, 5))}
    ranks = {"ep": 3}
    for side, state in (("hf", left), ("native", adapter.from_hf(left))):
        shares = [adapter.shard(state, ranks, rank, side=side) for rank in places(adapter, ranks)]
        assert [len(share) for share in shares] == [2, 2, 1]
        assert_same(adapter.merge(shares, ranks, side=side), state)
    last = adapter.at(ranks, {"ep": 2})
    assert_same(last.from_hf(adapter.shard(left, ranks, {"ep": 2}, side="hf")), shares[2])


def test_copies_of_an_axis_that_no_config_tells() -> None:
    adapter = map_of("mesh tp shards g or copies\nk [g d] <-> k\n").adapter(None)
    with pytest.raises(ConversionError, match="X304.*nothing tells the size of `g`.*declare it"):
        adapter.merge([{"k": drawn((1, 2))}] * 2, {"tp": 2})


def test_what_a_wildcard_carries_is_on_every_rank() -> None:
    """Names that only a state tells of: what one rank has and another lacks is noticed, cut or whole."""
    text = "mesh tp shards f\n{..}.w [f d] <-> {..}.w else\n{..}.n [d] <-> {..}.n else\n"
    adapter = map_of(text).adapter(None)
    state = {"a.w": drawn((4, 3)), "b.c.n": drawn((3,))}
    shares = [adapter.shard(state, {"tp": 2}, {"tp": rank}) for rank in range(2)]
    assert_same(adapter.merge(shares, {"tp": 2}), state)
    for name, rank in itertools.product(state, range(2)):
        lacking = [{n: t for n, t in share.items() if (n, r) != (name, rank)} for r, share in enumerate(shares)]
        with pytest.raises(ConversionError, match=f"R605.*{name} .*missing"):
            adapter.merge(lacking, {"tp": 2})


# --- values that ranks share ---

SHARED = "mesh tp shards h\nparam h\nw [d (h c)] <-> w\nb [d] <-> b [d] as partial(tp)\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_bias_that_each_rank_has_a_share_of(dtype: torch.dtype, ranks: int) -> None:
    """Powers of two divide exactly, but for the smallest numbers; the dtype stays."""
    adapter = map_of(SHARED).adapter(None, h=4)
    bias = torch.tensor([1.5, -0.0, float("inf"), float("nan"), -3.0], dtype=dtype)
    left = {"w": drawn((5, 8), dtype), "b": bias}
    right = adapter.from_hf(left)
    assert_same(right, left)
    shares = [adapter.shard(right, {"tp": ranks}, {"tp": rank}) for rank in range(ranks)]
    for rank, share in enumerate(shares):
        assert share["b"].dtype == dtype
        assert torch.equal(share["b"][[0, 1, 2, 4]], (bias / ranks)[[0, 1, 2, 4]])
        one = adapter.at({"tp": ranks}, {"tp": rank})
        mine = adapter.shard(left, {"tp": ranks}, {"tp": rank}, side="hf")
        assert_same(mine, {**mine, "b": bias})
        assert_same(one.from_hf(mine), share)
        assert_same(one.to_hf(share), mine)
    assert_same(adapter.merge(shares, {"tp": ranks}), right)
    assert_same(
        adapter.reshard(shares, {"tp": ranks}, {"tp": 4}, {"tp": 3}), adapter.shard(right, {"tp": 4}, {"tp": 3})
    )


@pytest.mark.parametrize(
    ("text", "code"),
    [("partial(ep)", "N113"), ("partial(2)", "N113"), ("partial", "N113"), ("partial(tp)|raw", "D407")],
)
def test_what_is_partial_is_over_a_mesh(text: str, code: str) -> None:
    with pytest.raises(MapError) as caught:
        _ = map_of(SHARED.replace("partial(tp)", text)).checked
    assert {one.code for one in caught.value.diagnostics} == {code}
