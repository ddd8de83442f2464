"""Speed of the codecs, as multiples of a warm copy of the bf16 tensor: `python benchmarks/codecs.py`.

The copy goes into a reused buffer, in the same run and between the same repetitions, so that a busy machine slows both;
medians of both are compared. Outputs are reused too: touching fresh memory costs more than any decoding. Peers that are
installed do the same work on the same tensors; they make new outputs, as their interfaces have it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import codec_peers
import numpy as np
import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.codecs.kernels import each
from mapdsl.runtime.codecs.strided import copy_strided

KEY = "layers.0.w1.weight"
ROWS, COLUMNS, EXPERTS = 8192, 4096, 8
FP4 = BlockScaled("fp4", "f4e2m1", (1, 32), scale_dtypes=("f8e8m0",))
FP8 = BlockScaled("fp8", "f8e4m3", (128, 128), scale_dtypes=("f32",))
OTHERS: dict[str, Codec] = {
    "int4, groups of 32": BlockScaled("int4", "i4", (1, 32), packed="i32", shape="{key}_shape"),
    "MXFP8": BlockScaled("mxfp8", "f8e4m3", (1, 32), scale_dtypes=("u8",)),
    "NVFP4": BlockScaled(
        "nvfp4", "f4e2m1", (1, 16), scale_dtypes=("f8e4m3",), packed="u8", global_scale="{key}_scale_2"
    ),
}


class Work(NamedTuple):
    """One row: a name, the tensor whose copy is the measure, our way of doing it, and those of peers, by name."""

    name: str
    measure: Tensor
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true", help="our own codecs only")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; multiples of a copy\n")
    columns = [f"{kind}, {n} thr" for kind in ("torch", "compiled") for n in arguments.threads]
    peers = [] if arguments.no_peers else ["NeMo", "transformers", "torchao"]
    print("| work | " + " | ".join(columns + peers) + " |")
    print("|---|" + "---|" * len(columns + peers))
    for work in works():
        cells = []
        for kind in ("torch", "compiled"):
            os.environ["MAPDSL_KERNELS"] = kind
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                cells.append(f"{ratio(work.measure, work.ours, arguments.repeat):.1f}")
        torch.set_num_threads(1)
        for peer in peers:
            call = work.peers.get(peer)
            cells.append("-" if call is None else f"{ratio(work.measure, call, 3):.0f}")
        print(f"| {work.name} | " + " | ".join(cells) + " |", flush=True)


def works() -> Iterator[Work]:
    """All rows."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    yield from trip("FP4 + e8m0", "FP4", FP4, values, codec_peers.fp4_encoders())
    yield from trip("FP8 128x128", "FP8", FP8, values, codec_peers.fp8_encoders())
    yield from stack_transposed()
    for name, codec in OTHERS.items():
        yield from trip(name, "", codec, values, {})


def trip(name: str, kind: str, codec: Codec, values: Tensor, encoders: dict[str, codec_peers.Encode]) -> Iterator[Work]:
    """Decoding and encoding with new scales; of the formats of peers, with kept scales and transposed tensors too."""
    parts, out = codec.encode(KEY, values).parts, torch.empty_like(values)
    decoders = codec_peers.decoders(kind) if kind else {}
    yield Work(
        f"{name} -> bf16",
        values,
        lambda: codec.decode(KEY, parts, out=out),
        {peer: lambda decode=decode: decode(parts, KEY) for peer, decode in decoders.items()},
    )
    payload = torch.empty_like(parts[codec.payload(KEY)])
    yield Work(
        f"bf16 -> {name}, new scales",
        values,
        lambda: codec.encode(KEY, values, out=payload),
        {peer: lambda encode=encode: encode(values) for peer, encode in encoders.items()},
    )
    if kind:
        decoded, kept, turned = codec.decode(KEY, parts), codec.keep(KEY, parts), values.T.contiguous().T
        yield Work(f"bf16 -> {name}, kept scales", values, lambda: codec.encode(KEY, decoded, kept, out=payload), {})
        yield Work(f"transposed bf16 -> {name}, new scales", values, lambda: codec.encode(KEY, turned, out=payload), {})


def stack_transposed() -> Iterator[Work]:
    """Two projections `[f, d]` of each expert, side by side as `[E, d, 2f]`; plain, and decoded from FP4."""
    features, hidden = 512, 2048
    source = torch.randn(EXPERTS, 2, features, hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    joined = torch.empty(EXPERTS, hidden, 2 * features, dtype=torch.bfloat16)
    places = joined.view(EXPERTS, hidden, 2, features).permute(0, 2, 3, 1)
    pairs = [[places[expert, half] for half in range(2)] for expert in range(EXPERTS)]
    parts = [[FP4.encode(KEY, matrix).parts for matrix in expert] for expert in source]
    decoders = codec_peers.decoders("FP4")

    jobs = [(expert, half) for expert in range(EXPERTS) for half in range(2)]

    def copy() -> None:
        each(lambda job: copy_strided(pairs[job[0]][job[1]], source[job]), jobs, joined.device)

    def decode() -> None:
        each(lambda job: FP4.decode(KEY, parts[job[0]][job[1]], out=pairs[job[0]][job[1]]), jobs, joined.device)

    stackers = codec_peers.stackers()
    plain = {peer: lambda stack=stack: stack([list(expert) for expert in source]) for peer, stack in stackers.items()}
    yield Work("stack, transpose, join to [E, d, 2f]", joined, copy, plain)
    decoded = {
        peer: lambda read=read, stack=stackers[peer]: stack([[read(p, KEY) for p in expert] for expert in parts])
        for peer, read in decoders.items()
    }
    yield Work("FP4 decoded, transposed, joined, stacked", joined, decode, decoded)


def ratio(measure: Tensor, work: Callable[[], object], repeat: int) -> float:
    """How many warm copies of a tensor the work takes."""
    bits = measure.view(torch.int16).numpy()
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
    return took / copy


if __name__ == "__main__":
    main()
