"""Two loads as Automodel does them, with the class that tiny.map compiles to."""

import torch
from tiny_adapter import TinyStateDictAdapter  # mapdsl compile docs/examples/tiny.map --target automodel

config = {"num_hidden_layers": 1, "num_experts": 4}
experts = "blocks.0.experts.gate_and_up"
shapes = {"blocks.0.norm.weight": (256,), "blocks.0.o_proj.weight": (256, 256), experts: (4, 256, 2 * 128)}
model = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
adapter = TinyStateDictAdapter(config)

# What is to be read lies in the model. torch Distributed Checkpoint fills it; here a loop does.
asked = adapter.to_hf(model, for_checkpoint_load=True)
for number, tensor in enumerate(asked.values()):
    tensor.fill_(number)
assert model[experts][2, 0, 128] == asked["layers.0.experts.2.w3.weight"][0, 0] != 0
made = adapter.from_hf(asked)
assert adapter.view_loaded_native_keys == {experts}
assert set(made) == set(shapes) - {experts} and made["blocks.0.norm.weight"] is model["blocks.0.norm.weight"]

# A checkpoint with the experts in FP8: codes and scales are asked for.
files = TinyStateDictAdapter(config).to_hf(model, quantization=True)
files["layers.0.wo.weight"] = model["blocks.0.o_proj.weight"].clone()
del files["layers.0.wo.weight_scale_inv"]
adapter.expect_formats({name: tensor.to("meta") for name, tensor in files.items()})
asked = adapter.to_hf(model, quantization=True, for_checkpoint_load=True)
assert {name: tensor.dtype for name, tensor in asked.items()} == {name: one.dtype for name, one in files.items()}
for name, tensor in asked.items():
    tensor.copy_(files[name])
assert torch.equal(adapter.from_hf(asked)[experts], model[experts])
assert adapter.view_loaded_native_keys == set()
print("loaded twice")
