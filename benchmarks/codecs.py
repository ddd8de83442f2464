"""Speed of the codecs, as multiples of a warm copy of their output: `python benchmarks/codecs.py [--threads N]`.

The copy goes into a reused buffer, in the same run and between the same repetitions, so that a busy machine slows both;
medians of both are compared. Outputs are reused too: touching fresh memory costs more than any decoding. Encoding is
compared with a copy of its input.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.strided import copy_strided

KEY = "layers.0.w1.weight"
ROWS, COLUMNS, EXPERTS = 8192, 4096, 8

CODECS: dict[str, Codec] = {
    "FP4 + e8m0": BlockScaled("fp4", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",)),
    "FP8 128x128": BlockScaled("fp8", "f8e4m3", (128, 128), scale_dtypes=("f32",)),
    "int4 groups of 32": BlockScaled("int4", "i4", (1, 32), packed="i32", shape="{key}_shape"),
    "NVFP4": BlockScaled(
        "nvfp4", "f4e2m1", (1, 16), scale_dtypes=("f8e4m3",), packed="u8", global_scale="{key}_scale_2"
    ),
}


def main() -> None:
    """Measure and print one line for each kind of work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.empty_like(values)
    print(f"{'work':<44} {'x copy':>7} {'ms':>8}   {arguments.threads} threads, torch {torch.__version__}")
    for name, codec in CODECS.items():
        parts = codec.encode(KEY, values).parts
        report(f"{name} -> bf16", arguments.repeat, out, lambda c=codec, p=parts: c.decode(KEY, p, out=out))
        report(f"bf16 -> {name}, new scales", arguments.repeat, out, lambda c=codec: c.encode(KEY, values))
    stack_transposed(arguments.repeat)


def stack_transposed(repeat: int) -> None:
    """Two projections `[f, d]` of each expert, side by side as `[E, d, 2f]`; plain, and decoded from FP4."""
    features, hidden = 512, 2048
    source = torch.randn(EXPERTS, 2, features, hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    joined = torch.empty(EXPERTS, hidden, 2 * features, dtype=torch.bfloat16)
    places = joined.view(EXPERTS, hidden, 2, features).permute(0, 2, 3, 1)
    codec = CODECS["FP4 + e8m0"]
    parts = [[codec.encode(KEY, matrix).parts for matrix in expert] for expert in source]

    def copy() -> None:
        for expert in range(EXPERTS):
            for half in range(2):
                copy_strided(places[expert, half], source[expert, half])

    def decode() -> None:
        for expert in range(EXPERTS):
            for half in range(2):
                codec.decode(KEY, parts[expert][half], out=places[expert, half])

    report("stack, transpose, join to [E, d, 2f]", repeat, joined, copy)
    report("FP4 decoded, transposed, joined, stacked", repeat, joined, decode)


def report(name: str, repeat: int, output: Tensor, work: Callable[[], object]) -> None:
    """Print how many warm copies of the output the work takes."""
    bits = output.view(torch.int16).numpy()
    buffer = np.empty_like(bits)
    times: dict[str, list[float]] = {"copy": [], "work": []}
    work()
    np.copyto(buffer, bits)
    for _ in range(repeat):
        for kind, call in (("copy", lambda: np.copyto(buffer, bits)), ("work", work)):
            started = time.perf_counter()
            call()
            times[kind].append(time.perf_counter() - started)
    copy, took = (statistics.median(times[kind]) for kind in ("copy", "work"))
    print(f"{name:<44} {took / copy:>7.1f} {took * 1000:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
