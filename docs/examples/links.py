"""Which rows of one expert a rank needs that holds the second half of `d` of tiny.map's stack."""

import torch

import mapdsl
from mapdsl.runtime.tracing import trace

shapes = {"layers.0.norm.weight": (6,), "layers.0.wo.weight": (6, 6)}
shapes |= {f"layers.0.experts.{e}.{w}.weight": (5, 6) for e in range(4) for w in ("w1", "w3")}  # [f d]
headers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
adapter = mapdsl.load("docs/examples/tiny.map").adapter({"num_hidden_layers": 1, "num_experts": 4})
(stack,) = (made for made in trace(adapter, "hf", headers).targets.values() if made.shape == (4, 6, 10))  # [e d (j f)]

link = next(link for link in stack.links() if link.source == "layers.0.experts.2.w3.weight")
print("from", link.target_at)
for axis in link.axes:
    print(f"  {axis.size} positions: {axis.source} -> {axis.target}")
(here,) = link.within("target", ((0, 4), (3, 6), (0, 10)))
print("needs", link.box("source", here))
