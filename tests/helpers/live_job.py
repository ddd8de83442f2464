"""Checks of a live model's state in a job of several processes: held against what one process makes of the whole."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load, save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.frameworks.automodel import AutomodelAdapter
from mapdsl.frameworks.dcp import MapStorageReader, MapStorageWriter
from mapdsl.frameworks.layouts import Layout, expert_layout
from mapdsl.frameworks.live import MissingTensorsError
from mapdsl.runtime.errors import ConversionError
from tests.helpers.dtensor_job import as_bytes, assert_equal, full
from tests.helpers.execution import map_of
from tests.helpers.jobs import Checks

State = dict[str, Tensor]

# What maps can say: names, stacks, halves, transposes, joined and split tensors, moved axes, padding, values, formats.
TEXT = """
param L
param D
param E
param F
param h
param tie = tied ?? false
index i < L
index e < E
codec fp8 = block_scaled(f8e4m3, block=2x4, scale="{key}_scale_inv", scale_dtype=f32)
codec fp4 = block_scaled(f4e2m1, block=1x4, packed=u8, scale="{stem}.scale", scale_dtype=u8)
embed.weight as fp8|raw <-> model.embed.weight [V D]
_ <-> lm_head.weight [V D] = model.embed.weight where tie
head.weight <-> lm_head.weight [V D] where not tie
_ <-> model.ones [D] = 1
layers.{i} <-> model.layers.{i}:
    norm.weight <-> norm.weight [D]
    gate.weight as fp8|raw <-> mlp.gate.weight [E D]
    experts.{e}.{j:w1|w3}.weight [F D] as fp8|fp4|raw <-> mlp.experts.gate_and_up_projs [e D (j F)]
    experts.{e}.w2.weight [D F] as fp8|fp4|raw        <-> mlp.experts.down_projs [e F D]
    o.weight [D (h c)] as fp8|raw <-> o.weight [(h c) D]
    q.weight [(h c) D] + k.weight [(h c) D] <-> qk.weight [(h c + h c) D]
    qkv.weight [(h (c + c)) D] <-> q2.weight [(h c) D] + k2.weight [(h c) D]
    rope.weight [(h t 2) D] <-> rope.weight [(h 2 t) D]
    rows.weight as fp8|raw <-> rows.weight [R D]
"""
EXPERTS = ("model.layers.#.mlp.experts.gate_and_up_projs", "model.layers.#.mlp.experts.down_projs")
CONFIG = {"L": 2, "D": 12, "E": 5, "F": 8, "h": 3}
FREE = {"V": 11, "c": 4, "t": 3, "R": 13}

check = Checks()


@cache
def map_() -> Any:
    return map_of(TEXT)


def adapter(*, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> AutomodelAdapter:
    class Toy(AutomodelAdapter):
        ADAPTER: ClassVar = type(map_().adapter(CONFIG | {"tied": tied}))

    Toy.EXPERTS = EXPERTS
    return Toy(CONFIG | {"tied": tied}, dtype=dtype)


@cache
def stored(kind: str, tied: bool = False) -> State:
    """A whole checkpoint, the same on every rank: of any bits, or of values in a format."""
    compiled = map_().adapter(CONFIG | {"tied": tied})
    generator = torch.Generator().manual_seed(7)
    state: State = {}
    sizes = {**FREE, **CONFIG}
    for listed in compiled.listed_left():
        shape = [sizes[word] for word in []] if listed.shape is None else _shape(listed.shape, sizes)
        codec = next((one for one in listed.stored if one.name == kind and kind != "raw"), None)
        if kind == "fp4" and codec is None:
            codec = next((one for one in listed.stored if one.name == "fp8"), None)
        if codec is None:
            bits = torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=generator)
            state[listed.name] = bits.to(torch.int16).view(torch.bfloat16)
        else:
            plain = torch.randn(shape, generator=generator).bfloat16()
            state |= codec.encode(listed.name, plain).parts
    return state


def _shape(pattern: Any, sizes: Mapping[str, int]) -> list[int]:
    from mapdsl.runtime.sizes import shape_of

    if isinstance(pattern, tuple):
        return list(pattern)
    found = shape_of(pattern, sizes)
    return [size or 1 for size in found]


@cache
def native(kind: str, tied: bool = False) -> State:
    return dict(map_().adapter(CONFIG | {"tied": tied}).from_hf(stored(kind, tied)))


@cache
def saved(kind: str) -> str:
    """A folder with the checkpoint, the same on every rank."""
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        save_file(stored(kind), str(Path(names[0]) / "model.safetensors"))
    dist.barrier()
    return str(names[0])


def meshes() -> Iterator[DeviceMesh]:
    world = dist.get_world_size()
    yield init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    if world == 4:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_shard", "ep"))
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def placed(whole: Mapping[str, Tensor], mesh: DeviceMesh, seed: int) -> dict[str, DTensor]:
    """A model whose tensors are placed in some way, the same on every rank; shares need not be even."""
    draw = random.Random(seed)
    made = {}
    for name, tensor in whole.items():
        ways = [draw.choice([Replicate(), *(Shard(dim) for dim in range(tensor.ndim))]) for _ in range(mesh.ndim)]
        made[name] = cut(tensor, mesh, ways)
    return made


def cut(tensor: Tensor, mesh: DeviceMesh, ways: list[Any]) -> DTensor:
    local = tensor
    for dim, way in enumerate(ways):
        if isinstance(way, Shard):
            chunks = local.chunk(mesh.size(dim), way.dim)
            place = mesh.get_local_rank(dim)
            local = chunks[place] if place < len(chunks) else local.narrow(way.dim, 0, 0)
    local = local.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, ways, run_check=False, shape=tensor.shape, stride=tensor.stride())


def cases() -> Iterator[tuple[DeviceMesh, int]]:
    for mesh in meshes():
        for seed in range(6):
            yield mesh, seed


def assert_holds(tensor: Tensor, whole: Tensor, what: object) -> None:
    """A tensor is the whole one, or what this rank has of it."""
    if isinstance(tensor, DTensor):
        assert tuple(tensor.shape) == tuple(whole.shape), what
        tensor = full(tensor)
    assert_equal(tensor, whole, what)


@check(2, 4)
def what_is_saved_is_what_one_process_saves() -> None:
    whole = native("raw")
    expected = map_().adapter(CONFIG).to_hf(whole)
    for mesh, seed in cases():
        made = adapter().to_hf(placed(whole, mesh, seed))
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, list(made))
        assert set().union(*seen) == set(expected), (mesh, seed)
        for name, tensor in made.items():
            assert_holds(tensor, expected[name], (mesh, seed, name))
            assert isinstance(tensor, DTensor) or tensor.is_contiguous(), name


@check(2, 4)
def a_rank_has_its_own_experts() -> None:
    """Shares of five experts are those of DTensors: 3 and 2, or 2, 2, 1 and none."""
    (mesh, *_) = meshes()
    world, rank = dist.get_world_size(), dist.get_rank()
    model = {name: cut(tensor, mesh, [Shard(0)]) for name, tensor in native("raw").items() if "experts" in name}
    own = set(range(5)[rank * -(-5 // world) : (rank + 1) * -(-5 // world)])
    converter = adapter()
    type(converter).LOAD_PART = dict
    assert converter.iter_checkpoint_load_parts(model) is None  # that is for a process alone
    for load_it in (False, True):
        made = adapter().to_hf(model, for_checkpoint_load=load_it)
        assert {int(name.split(".")[3]) for name in made} == own
        assert all(type(tensor) is Tensor for tensor in made.values())
        aliases = {tensor.untyped_storage().data_ptr() for tensor in made.values()}
        memory = {tensor.to_local().untyped_storage().data_ptr() for tensor in model.values()}
        assert bool(aliases & memory) == (load_it and bool(own))


@check(2, 4)
def a_distributed_load_fills_the_model() -> None:
    """Through torch's own reader of Hugging Face checkpoints: plain, and decoded from formats."""
    for kind in ("raw", "fp8", "fp4"):
        whole, files = native(kind), stored(kind)
        folder = saved(kind)
        for mesh, seed in cases():
            converter = adapter()
            blank = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
            model = placed(blank, mesh, seed)
            quantised = kind != "raw"
            if quantised:
                converter.adapter.complement.entries.update(map_().adapter(CONFIG).complement.entries)
                expect_formats(converter, files)
            asked = converter.to_hf(model, quantization=quantised, for_checkpoint_load=True)
            assert {name: (t.shape, t.dtype) for name, t in asked.items()}.items() <= {
                name: (t.shape, t.dtype) for name, t in files.items()
            }.items()
            load(asked, storage_reader=HuggingFaceStorageReader(folder))
            made = converter.from_hf(asked, mesh)
            in_model = converter.view_loaded_native_keys
            assert not in_model & set(made) and in_model | set(made) == set(whole), (kind, mesh, seed)
            for name, tensor in whole.items():
                found = model[name] if name in in_model else made[name]
                if name in made and isinstance(found, DTensor) and name != "model.ones":
                    assert found.placements == model[name].placements, (kind, mesh, seed, name)
                assert_holds(found, tensor, (kind, mesh, seed, name))
        dist.barrier()


@check(2, 4)
def the_storage_reader_fills_the_models_own_state() -> None:
    for kind in ("raw", "fp8", "fp4"):
        folder = saved(kind)
        for dtype in (torch.bfloat16, torch.float32):
            whole = map_().adapter(CONFIG).read(stored(kind), dtype=dtype)
            for mesh, seed in cases():
                blank = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in whole.items()}
                model = placed(blank, mesh, seed)
                load(model, storage_reader=MapStorageReader(folder, map_(), CONFIG))
                for name, tensor in whole.items():
                    found = full(model[name])
                    if dtype == tensor.dtype:
                        assert_equal(found, tensor, (kind, mesh, seed, name))
                    else:  # a cast may change which NaN it is
                        assert torch.equal(found.nan_to_num(), tensor.to(dtype).nan_to_num()), (kind, mesh, seed, name)


@check(2, 4)
def the_storage_writer_writes_the_checkpoint() -> None:
    """The bytes of the conversion of the whole state, in as many files as asked for; in formats where shards allow."""
    whole = native("raw")
    expected = map_().adapter(CONFIG).to_hf(whole)
    for number, (mesh, seed) in enumerate(cases()):
        folder = f"{saved('raw')}/out-{number}"
        writer = MapStorageWriter(folder, map_(), CONFIG, max_shard_bytes=4000)
        save(dict(placed(whole, mesh, seed)), storage_writer=writer)
        assert_same_state(dict(LazyState(open_checkpoint(folder))), expected, (mesh, seed))
        assert json.loads((Path(folder) / "config.json").read_text()) == CONFIG
        dist.barrier()
    (mesh, *_) = meshes()
    whole = native("fp8")
    expected = map_().adapter(CONFIG).to_hf(whole, quantization=True)
    folder = f"{saved('raw')}/quantised"
    by_expert = {name: cut(t, mesh, [Shard(0) if "experts" in name else Replicate()]) for name, t in whole.items()}
    save(dict(by_expert), storage_writer=MapStorageWriter(folder, map_(), CONFIG, quantization=True))
    assert_same_state(dict(LazyState(open_checkpoint(folder))), expected, "quantised")
    by_row = {name: cut(t, mesh, [Shard(0)]) for name, t in whole.items()}
    try:
        save(dict(by_row), storage_writer=MapStorageWriter(f"{folder}-2", map_(), CONFIG, quantization=True))
    except CheckpointException as problem:
        assert "P454" in str(problem), problem
    else:
        raise AssertionError("no P454")


def assert_same_state(found: State, expected: State, what: object) -> None:
    assert set(found) == set(expected), (what, set(found) ^ set(expected))
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, (what, name))


def expect_formats(converter: AutomodelAdapter, files: State) -> None:
    """Note which formats a checkpoint is in."""
    converter.expect_formats({name: tensor.to("meta") for name, tensor in files.items()})


@check(2, 4)
def experts_of_a_plain_state_are_cut_over_the_mesh() -> None:
    whole = native("raw")
    for mesh in meshes():
        if "dp" in (mesh.mesh_dim_names or ()):
            try:
                adapter().from_hf(stored("raw"), mesh)
            except ConversionError as problem:
                assert problem.code == "N113", problem
                continue
            raise AssertionError("no N113")
        made = adapter().from_hf(stored("raw"), mesh)
        assert set(made) == set(whole)
        for name, tensor in made.items():
            if name.endswith("_projs"):
                assert isinstance(tensor, DTensor)
                way = "Shard(dim=1)"
                assert [repr(one) for one in tensor.placements] in (["Shard(dim=0)"], [way, "Shard(dim=0)"])
            assert_holds(tensor, whole[name], (mesh, name))


@check(2, 4)
def missing_experts_are_listed_before_any_work() -> None:
    (mesh, *_) = meshes()
    rank = dist.get_rank()
    share = -(-5 // dist.get_world_size())
    mine = [str(e) for e in range(5)[rank * share : (rank + 1) * share]]
    for gone, by_whom in ((("layers.1.experts.0.w2.weight",), 0), (("layers.1.experts.",), None)):
        left = {name: tensor for name, tensor in stored("raw").items() if not name.startswith(gone)}
        needs = bool(mine) if by_whom is None else rank == by_whom
        try:
            adapter().from_hf(left, mesh)
            assert not needs, "nothing was refused"
        except MissingTensorsError as problem:
            assert isinstance(problem, RuntimeError)
            assert needs, problem
            assert gone[0] in str(problem), problem
    # What other ranks have is not asked for.
    own = {
        name: tensor for name, tensor in stored("raw").items() if "experts" not in name or name.split(".")[3] in mine
    }
    made = adapter().from_hf(own, mesh)
    assert_holds(
        made["model.layers.0.mlp.experts.down_projs"], native("raw")["model.layers.0.mlp.experts.down_projs"], 0
    )


@check(2, 4)
def a_tie_is_made_and_checked() -> None:
    whole = native("raw", tied=True)
    for mesh in meshes():
        model = placed(whole, mesh, 1)
        model["lm_head.weight"] = model["model.embed.weight"]
        made = adapter(tied=True).to_hf(model)
        assert "head.weight" not in made and "lm_head.weight" not in made
        other = model | {"lm_head.weight": _flipped(model["model.embed.weight"])}
        if model["model.embed.weight"].to_local().numel():
            try:
                adapter(tied=True).to_hf(other)
            except ConversionError as problem:
                assert problem.code == "R601", problem
            else:
                raise AssertionError("no R601")


def _flipped(tensor: DTensor) -> DTensor:
    local = tensor.to_local().clone()
    local.view(torch.uint8).bitwise_not_()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@check(2)
def layouts_of_experts() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep_shard", "ep"))
    (target, *_) = (t for t in _targets() if t.name.endswith("_projs"))
    layout = expert_layout(target.shape, mesh)
    assert layout.mesh is not None and layout.mesh.mesh_dim_names == ("ep",)
    assert Layout.of("x", torch.empty(3)).local_shape == (3,)
    assert as_bytes(torch.empty(2, dtype=torch.bfloat16)).numel() == 4


def _targets() -> list[Any]:
    from mapdsl.runtime.tracing import trace

    compiled = map_().adapter(CONFIG)
    return list(trace(compiled, "hf", stored("raw")).targets.values())


if __name__ == "__main__":
    check.main()
