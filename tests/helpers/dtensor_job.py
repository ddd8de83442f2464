"""Checks of DTensors in a job of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.resharding import places
from mapdsl.runtime.share_list import listed
from tests.helpers.execution import map_of
from tests.helpers.jobs import Checks

State = dict[str, Tensor]

# All that a DTensor can say, and what it cannot; `SHARES` are how meshes share axes out.
TEXT = """
param L
param h
param g
param c
param f
param V
param E
index i < L
index e < E
mesh pp shards i
mesh tp shards h, g, f SHARES, V
mesh ep shards e SHARES
wte.weight [V d] <-> emb.weight [pad(V, 4*size(tp)) d] where rank(pp) == 0
norm.weight [d] <-> final.weight
h.{i} <-> layers.{local i}:
    q.weight [(h c) d] + k.weight [(g c) d] + v.weight [(g c) d] <-> qkv.weight [(h c + g c + g c) d]
    mha.weight [d (3 h c)] <-> mha.weight [(3 h c) d]
    o.weight [d (h c)] <-> o.weight
    {j:gate|up}.weight [f d] <-> fused.weight [(j f) d]
    ex.{e}.{j:w1|w3}.weight [f d] <-> experts [e d (j f)]
    ex.{e}.w2.weight [d f] <-> down [(e f) d]
    both.{e}.{j:a|b} [f d] <-> both [(j e f) d]
    own.{e}.weight [d] <-> own.{local e}.weight
    router.weight [x d] <-> router.weight
"""
EVEN = {"L": 2, "h": 8, "g": 4, "c": 3, "f": 8, "V": 16, "E": 4}
UNEVEN = EVEN | {"f": 7, "V": 11, "E": 5}

QUANTISED = """
param h
mesh tp shards h, f
codec fp8 = block_scaled(f8e4m3, block=2x4, scale="{key}_scale_inv")
codec rows = block_scaled(f8e4m3, block=1x*, scale="{key}_scale")
q.weight [(h 4) d] as fp8 <-> q.weight [(h 4) d] as fp8
o.weight [d (h 4)] as fp8 <-> o.weight [d (h 4)] as fp8
r.weight [d f] as rows <-> r.weight [d f] as rows
{j:gate|up}.weight [f d] as fp8 <-> fused.weight [(j f) d] as fp8
"""

check = Checks()


@cache
def adapter_of(uneven: bool) -> Any:
    text = TEXT.replace(" SHARES", " by ceil" if uneven else "")
    return map_of(text).adapter(None, **(UNEVEN if uneven else EVEN))


@cache
def states(adapter: Any) -> dict[str, State]:
    """Whole states of both sides, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    left = {}
    for name, (shape, _) in adapter.hf_keys().items():
        sizes = [6 if size is None else size for size in shape]
        left[name] = torch.randint(0, 256, (*sizes, 2), dtype=torch.uint8, generator=generator).view(torch.bfloat16)[
            ..., 0
        ]
    return {"hf": left, "native": dict(adapter.from_hf(left))}


def quantised() -> tuple[Any, dict[str, State]]:
    adapter = map_of(QUANTISED).adapter(None, h=4)
    generator = torch.Generator().manual_seed(5)
    state: State = {}
    shapes = {"q.weight": (16, 8), "o.weight": (8, 16), "r.weight": (6, 8), "gate.weight": (8, 8), "up.weight": (8, 8)}
    shown = {one.name: one for one in adapter.list_shares("hf", {}).shown}
    for name, shape in shapes.items():
        plain = torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16()
        state |= shown[name].stored[0].encode(name, plain).parts
    return adapter, {"hf": state, "native": dict(adapter.from_hf(state))}


def meshes() -> Iterator[DeviceMesh]:
    """Meshes of this job."""
    names = {2: ["tp", "ep", "pp", "dp"], 4: ["tp", "tp ep", "ep tp", "dp tp", "pp tp"]}
    for one in names[dist.get_world_size()]:
        words = tuple(one.split())
        shape = (dist.get_world_size(),) if len(words) == 1 else (2, 2)
        yield init_device_mesh("cpu", shape, mesh_dim_names=words)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: object) -> None:
    assert list(one) == list(other), f"{what}: {[*one]} {[*other]}"
    for name, tensor in one.items():
        assert_equal(tensor, other[name], f"{what} {name}")


def assert_equal(one: Tensor, other: Tensor, what: object) -> None:
    assert not isinstance(one, DTensor), what
    assert (one.shape, one.dtype) == (other.shape, other.dtype), f"{what}: {one.shape} {other.shape}"
    assert torch.equal(as_bytes(one), as_bytes(other)), what


def full(tensor: DTensor) -> Tensor:
    """The whole tensor; gloo moves no float8."""
    if tensor.dtype.itemsize > 1:
        return tensor.full_tensor()
    local = tensor.to_local().view(torch.uint8)
    moved = DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return moved.full_tensor().view(tensor.dtype)


def wholes(adapter: Any, mesh: DeviceMesh, side: str, whole: State) -> dict[str, Tensor]:
    """The whole tensors behind those of this rank, by what it calls them."""
    return {shown.name: whole[name] for shown, name in listed(adapter.at(mesh), side, whole) if name in whole}


def expect(code: str, work: Callable[[], object], text: str = "") -> None:
    try:
        work()
    except ConversionError as problem:
        assert problem.code == code, problem
        assert text in problem.message, problem
        return
    raise AssertionError(f"no {code}")


def cases() -> Iterator[tuple[Any, dict[str, State], DeviceMesh, str]]:
    for uneven in (False, True):
        adapter = adapter_of(uneven)
        whole = states(adapter)
        for mesh in meshes():
            for side in whole:
                yield adapter, whole, mesh, side


@check(2, 4)
def the_full_tensor_is_the_whole_one() -> None:
    said: dict[str, set[str]] = {}
    for adapter, whole, mesh, side in cases():
        mine = adapter.shard(whole[side], mesh, side=side)
        made = adapter.to_dtensors(mine, mesh, side=side, otherwise="local")
        expected = wholes(adapter, mesh, side, whole[side])
        assert made.keys() == mine.keys()
        for name, tensor in made.items():
            said.setdefault(name, set()).add(str(getattr(tensor, "placements", "local")))
            if not isinstance(tensor, DTensor):
                continue
            assert tensor.to_local().data_ptr() == mine[name].data_ptr()
            found = full(tensor)
            padding = found.shape[0] - expected[name].shape[0]
            assert padding == 0 or name == "emb.weight"
            assert not found[len(found) - padding :].any()
            assert_equal(found[: len(found) - padding], expected[name], (side, mesh, name))
    # What this job has seen: every kind of placement.
    assert any("_StridedShard(dim=0, sf=2)" in one for one in said["layers.0.fused.weight"])
    assert any("_StridedShard(dim=0, sf=3)" in one for one in said["layers.0.mha.weight"])
    assert any("Shard(dim=1)" in one for one in said["layers.0.o.weight"])
    assert "local" in said["layers.0.qkv.weight"]
    if dist.get_world_size() == 4:
        assert said["layers.0.down"] >= {"(Shard(dim=0), _StridedShard(dim=0, sf=2))", "local"}
        assert said["layers.0.experts"] >= {
            "(Shard(dim=0), _StridedShard(dim=2, sf=2))",
            "(_StridedShard(dim=2, sf=2), Shard(dim=0))",
        }


@check(2, 4)
def from_dtensors_is_the_inverse_of_to_dtensors() -> None:
    for adapter, whole, mesh, side in cases():
        mine = adapter.shard(whole[side], mesh, side=side)
        made = adapter.to_dtensors(mine, mesh, side=side, otherwise="local")
        back = adapter.from_dtensors(made, mesh, side=side, redistribute=False)
        assert_same(back, mine, (mesh, side))
        assert all(back[name].data_ptr() == tensor.data_ptr() for name, tensor in mine.items())


@check(2, 4)
def conversions_commute() -> None:
    for adapter, whole, mesh, side in cases():
        one, other = adapter.at(mesh), "native" if side == "hf" else "hf"
        mine, theirs = (adapter.shard(whole[which], mesh, side=which) for which in (side, other))
        made = adapter.to_dtensors(mine, mesh, side=side, otherwise="local")
        found = one.from_hf(made) if side == "hf" else one.to_hf(made)
        assert found.keys() == theirs.keys()
        assert_same({name: found[name] for name in theirs}, theirs, (mesh, side))


@check(2, 4)
def what_is_placed_otherwise_is_redistributed() -> None:
    for adapter, whole, mesh, side in cases():
        mine = adapter.shard(whole[side], mesh, side=side)
        made = adapter.to_dtensors(mine, mesh, side=side, otherwise="local")
        moved = dict(made)
        for name, tensor in made.items():
            if isinstance(tensor, DTensor):
                moved[name] = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
        spread = {
            name: tensor.redistribute(placements=[Shard(tensor.ndim - 1)] * tensor.device_mesh.ndim)
            if isinstance(tensor, DTensor)
            else tensor
            for name, tensor in moved.items()
        }
        for one in (moved, spread):
            assert_same(adapter.from_dtensors(one, mesh, side=side), mine, (mesh, side))
        strict = {"redistribute": False}
        if any(isinstance(one, DTensor) and one.placements != made[name].placements for name, one in spread.items()):
            expect("P456", lambda: adapter.from_dtensors(spread, mesh, side=side, **strict), "placements are")  # noqa: B023


@check(4)
def what_fsdp_shards_is_gathered() -> None:
    adapter = adapter_of(False)
    whole = states(adapter)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, _ = mesh.get_coordinate()
    mine = adapter.shard(whole["hf"], mesh, side="hf")
    made: State = adapter.to_dtensors(mine, mesh, side="hf")
    for name, tensor in made.items():
        if tensor.placements == (Replicate(), Shard(0)):
            local = tensor.to_local().chunk(2)[dp]  # as FSDP2 cuts what tensor parallelism has cut
            placements = [_StridedShard(0, split_factor=2), Shard(0)]
            made[name] = DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())
        elif tensor.placements == (Replicate(), Replicate()):
            made[name] = tensor.redistribute(placements=[Shard(0), Replicate()])
    assert sum(one.placements == (_StridedShard(0, split_factor=2), Shard(0)) for one in made.values()) > 10
    assert_same(adapter.from_dtensors(made, mesh, side="hf"), mine, "fsdp")
    # Sharded over `dp` alone: torch knows nothing of `tp` there.
    local = adapter.shard(whole["native"], mesh)
    names = ["layers.0.fused.weight", "layers.0.qkv.weight", "layers.0.o.weight"]
    parts = {name: whole["native"][name].chunk(2)[dp] for name in names}
    alone = {name: DTensor.from_local(part, mesh["dp"], [Shard(0)]) for name, part in parts.items()}
    assert_same(adapter.from_dtensors(alone, mesh), {name: local[name] for name in names}, "dp alone")


@check(2)
def scales_and_bytes() -> None:
    adapter, whole = quantised()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for side, state in whole.items():
        mine = adapter.shard(state, mesh, side=side)
        made = adapter.to_dtensors(mine, mesh, side=side)
        assert all(isinstance(tensor, DTensor) for tensor in made.values())
        for name, tensor in made.items():
            assert_equal(full(tensor), state[name], name)
        assert_same(adapter.from_dtensors(made, mesh, side=side, redistribute=False), mine, side)
        replicated = {name: DTensor.from_local(state[name], mesh, [Replicate()]) for name in made}
        assert_same(adapter.from_dtensors(replicated, mesh, side=side), mine, side)
        one = adapter.at(mesh)
        other = adapter.shard(whole["native" if side == "hf" else "hf"], mesh, side="native" if side == "hf" else "hf")
        found = one.from_hf(made) if side == "hf" else one.to_hf(made, quantization=True)
        assert_same({name: found[name] for name in other}, other, side)


@check(2)
def what_does_not_fit() -> None:
    adapter = adapter_of(False)
    whole = states(adapter)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    mine = adapter.shard(whole["native"], mesh)
    expect(
        "P456", lambda: adapter.to_dtensors(mine, mesh), "layers.0.qkv.weight [(h c + g c + g c) d] over 2 ranks; other"
    )
    made = adapter.to_dtensors(mine, mesh, otherwise="local")
    rank = dist.get_rank()
    other = adapter.at({"tp": 2}, {"tp": 1 - rank})
    expect("N113", lambda: other.to_hf(made), "adapter.at(device_mesh)")
    assert_same(adapter.at({"tp": 2}, {"tp": rank}).to_hf(made), adapter.at(mesh).to_hf(mine), "ranks without a mesh")
    unnamed = init_device_mesh("cpu", (2,))
    expect("N113", lambda: adapter.shard(whole["native"], unnamed), "mesh_dim_names")
    local = made["layers.0.o.weight"].to_local()
    wrong = made | {"layers.0.o.weight": DTensor.from_local(local[:, :-1], mesh, [Shard(1)])}
    expect("R606", lambda: adapter.from_dtensors(wrong, mesh), "layers.0.o.weight")
    expect("R603", lambda: adapter.from_dtensors(made | {"x": made["final.weight"]}, mesh), "no rule reads x")
    expect("R606", lambda: adapter.to_dtensors(made, mesh, otherwise="local"), "a DTensor already")
    experts = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    own = adapter.to_dtensors(adapter.shard(whole["native"], experts), experts)
    assert not isinstance(own["layers.0.own.0.weight"], DTensor)
    own["layers.0.own.0.weight"] = DTensor.from_local(own["layers.0.own.0.weight"], experts, [Replicate()])
    expect("P456", lambda: adapter.from_dtensors(own, experts), "layers.0.own.0.weight is one DTensor over `ep`, but")


@check(4)
def every_rank_is_found() -> None:
    """A rank by its global number, and this process, are the ranks that `places` counts."""
    adapter = adapter_of(False)
    whole = states(adapter)["native"]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "ep"))
    ranks = {"tp": 2, "ep": 2}
    for number, rank in enumerate(places(adapter, ranks)):
        expected = adapter.shard(whole, ranks, rank)
        assert_same(adapter.shard(whole, mesh, number), expected, rank)
        if number == dist.get_rank():
            assert_same(adapter.shard(whole, mesh), expected, rank)
    expect("N113", lambda: adapter.shard(whole, mesh, 4), "rank 4 is not part of the device mesh")
    expect("N113", lambda: adapter.shard(whole, ranks), "which rank of")


if __name__ == "__main__":
    check.main()
