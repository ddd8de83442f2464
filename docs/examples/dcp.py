"""A released checkpoint into a model, and one out of it, by torch Distributed Checkpoint: alone or with torchrun."""

import os

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mapdsl
from mapdsl.frameworks.dcp import MapStorageReader, MapStorageWriter

tiny = mapdsl.load("docs/examples/tiny.map")
config = {"num_hidden_layers": 1, "num_experts": 4}
shapes = {
    "blocks.0.norm.weight": (256,),
    "blocks.0.o_proj.weight": (256, 256),
    "blocks.0.experts.gate_and_up": (4, 256, 2 * 128),
}
ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
if ranks > 1:
    dist.init_process_group("gloo")

# A checkpoint as it may be released: experts one by one, in FP8 with a scale for each block.
if rank == 0:
    random = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    os.mkdir("released")
    save_file(tiny.adapter(config).to_hf(random, quantization=True), "released/model.safetensors")
if ranks > 1:
    dist.barrier()

# The state of a model. On ranks, each one holds some of the experts.
state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
if ranks > 1:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    experts = "blocks.0.experts.gate_and_up"
    state[experts] = distribute_tensor(state[experts], mesh, [Shard(0)])

load(state, storage_reader=MapStorageReader("released", tiny, config))
save(state, storage_writer=MapStorageWriter("saved", tiny, config))

if rank == 0:  # what one process makes of the whole
    adapter = tiny.adapter(config)
    expected = adapter.to_hf(adapter.from_hf(load_file("released/model.safetensors")))
    saved = load_file("saved/model.safetensors")
    assert all(torch.equal(saved.pop(name), tensor) for name, tensor in expected.items()) and not saved
    print(f"saved {len(expected)} tensors, ranks: {ranks}")
if ranks > 1:
    dist.destroy_process_group()
