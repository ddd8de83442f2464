"""Grouped experts for a training job, mapdsl beside NeMo Automodel's own adapter: `python benchmarks/moe.py`.

The map and Automodel's adapter of Qwen3-MoE convert the same bf16 tensors; both have to give the same bytes. Ways take
turns, each time in a new process, which does the work once to get its memory from the system, and then three times;
times are medians. Extra memory is the highest that was resident during the last time, less what was before and less
the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
EXPERTS, HIDDEN, INNER = 64, 2048, 1024
LAYERS, MANY = 60, 256
WAYS = ("mapdsl", "Automodel")
JOBS = {
    "read": f"from_hf, {EXPERTS} experts",
    "save": f"to_hf to save, {EXPERTS} experts",
    "load": f"to_hf to load, copies, from_hf, {EXPERTS} experts",
    "names": f"names, {LAYERS} layers x {MANY} experts x 3",
}


def main() -> None:
    """Take turns, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("JOB", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measured(*arguments.one)))
        return
    print("| job | way | s | extra MB | moved MB |\n|---|---|---|---|---|")
    for job, title in JOBS.items():
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeat):
            for way in WAYS:
                command = [sys.executable, __file__, "--one", job, way]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        checks = {run["check"] for runs in found.values() for run in runs}
        assert len(checks) == 1, f"{title}: the ways differ: {checks}"
        seconds = {way: statistics.median(run["s"] for run in runs) for way, runs in found.items()}
        for way, runs in found.items():
            ratio = f" (x {seconds[way] / seconds['mapdsl']:.1f})" if way != "mapdsl" else ""
            extra = statistics.median(run["extra"] for run in runs) / 1e6
            print(f"| {title} | {way} | {seconds[way]:.2f}{ratio} | {extra:,.0f} | {runs[0]['bytes'] / 1e6:,.0f} |")


def measured(job: str, way: str) -> dict[str, Any]:
    """Seconds, extra bytes, bytes of the result and a number that tells whether results are the same."""
    with contextlib.redirect_stdout(sys.stderr):  # it logs there what is for others to read
        logging.disable()
        do = work(job, way, config(LAYERS, MANY, 64, 32) if job == "names" else config(1, EXPERTS, HIDDEN, INNER))
    do()
    times: list[float] = []
    made, before, most = None, 0, 0
    for _ in range(3):
        made = None
        before = resident("VmRSS")
        reset_peak()
        began = time.perf_counter()
        made = do()
        times.append(time.perf_counter() - began)
        most = resident("VmHWM")
    size, check = told(made)
    extra = most - before - (size if job in ("read", "save") else 0)
    return {"s": statistics.median(times), "extra": max(extra, 0), "bytes": size, "check": check}


def told(made: Any) -> tuple[int, int]:
    """Bytes of the experts in a result, and a number made of them; of names, how many there are."""
    import torch

    if not isinstance(made, dict):
        return 0, len(made)
    tensors = {name: tensor for name, tensor in made.items() if ".experts." in name}
    numbers = (int(tensor.contiguous().view(torch.int16).long().sum()) for tensor in tensors.values())
    return sum(tensor.nbytes for tensor in tensors.values()), sum(numbers)


def config(layers: int, experts: int, hidden: int, inner: int) -> dict[str, Any]:
    """A model of Qwen3-MoE with little besides its experts."""
    return {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 64,
        "intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def work(job: str, way: str, fields: dict[str, Any]) -> Callable[[], Any]:
    """The work of a job, on tensors that are there."""
    import torch

    own = mapdsl_adapter(fields)
    adapter = own if way == "mapdsl" else automodel_adapter(fields)
    generator = torch.Generator().manual_seed(1)

    def drawn(keys: Any, device: str) -> dict[str, Any]:
        shapes = {name: shape for name, (shape, _) in keys.items()}
        if device == "meta":
            return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
        return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}

    if job == "names":
        model = drawn(own.adapter.native_keys(), "meta")
        return lambda: adapter.get_hf_state_dict_keys(model)
    if job == "read":
        stored = drawn(own.adapter.hf_keys(quantization=False), "cpu")
        return lambda: adapter.from_hf(dict(stored))
    model = drawn(own.adapter.native_keys(), "cpu")
    if job == "save":
        return lambda: adapter.to_hf(model)
    stored = drawn(own.adapter.hf_keys(quantization=False), "cpu")

    def load() -> Any:
        asked = adapter.to_hf(model, for_checkpoint_load=True)
        for name, tensor in asked.items():
            tensor.copy_(stored[name])
        return {**model, **adapter.from_hf(asked)}

    return load


def mapdsl_adapter(fields: dict[str, Any]) -> Any:
    """The class that `mapdsl compile qwen3_moe --target automodel` writes."""
    import mapdsl
    from mapdsl.emit.automodel import automodel_source

    module: dict[str, Any] = {}
    exec(automodel_source(mapdsl.load("qwen3_moe").checked), module)
    return module["Qwen3MoeStateDictAdapter"](SimpleNamespace(**fields))


def automodel_adapter(fields: dict[str, Any]) -> Any:
    """Automodel's own."""
    import torch
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.qwen3_moe.state_dict_adapter import Qwen3MoeStateDictAdapter

    inner, experts = fields["moe_intermediate_size"], fields["num_experts"]
    of_experts = SimpleNamespace(
        n_routed_experts=experts, moe_inter_dim=inner, expert_activation="swiglu", expert_bias=False
    )
    return Qwen3MoeStateDictAdapter(SimpleNamespace(**fields), of_experts, BackendConfig(), dtype=torch.bfloat16)


def reset_peak() -> None:
    """Let the highest resident size begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    main()
