"""Four tensor parallel shards of a tiny Megatron checkpoint, loaded for two ranks."""

import torch

from mapdsl.deepspeed import SDLoaderFactory

LAYER = "transformer.layers.0"

for rank in range(4):
    # Queries, keys and values of two heads with two dimensions, in the order of checkpoint version 0.
    fused = torch.tensor([100.0, 200.0, 300.0]).repeat_interleave(4) + torch.arange(4.0).repeat(3) + 4 * rank
    module = {
        f"{LAYER}.attention.query_key_value.bias": fused,
        f"{LAYER}.attention.dense.weight": torch.full((2, 4), float(rank)),
        f"{LAYER}.input_layernorm.weight": torch.ones(2),
    }
    torch.save({"module": module, "mp_world_size": 4, "iteration": 1000}, f"mp_rank_{rank:02d}_model_states.pt")

paths = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(4)]
loader = SDLoaderFactory.get_sd_loader(paths, None, "Megatron", version=0, num_heads=8)
path, state, (scales, merge_count) = loader.load(mp_world_size=2, mp_rank=1)

print(path, merge_count, state["mp_world_size"], state["iteration"])
for name, tensor in state["module"].items():
    print(name, tensor.int().tolist())
