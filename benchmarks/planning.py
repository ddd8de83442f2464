"""What `mapdsl plan` and `mapdsl check --against` take for a listing, each a process of its own.

    python benchmarks/planning.py [LISTING] [--map MAP] [--rounds N]

Without a listing it makes one of 100,000 tensors: DeepSeek-V4-Flash with more layers, as the shipped map names them.
Commands take turns, round after round, with what they cannot do without: Python's start, torch's import, and reading
the same names, dtypes and shapes as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TENSORS = 100_000

# The fields of DeepSeek-V4-Flash's config.json that the map reads.
CONFIG = {
    "model_type": "deepseek_v4",
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "hc_mult": 4,
}
UNSTATED = 128  # a size that map and config leave open: rows of a compressor's positions


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("listing", nargs="?", type=Path, help="a listing, with its NAME.config.json beside it")
    parser.add_argument("--map", default="deepseek_v4", help="the map that it is of (deepseek_v4)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each command is run (7)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds is 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        listing = arguments.listing or make_listing(Path(folder))
        measure(listing, arguments.map, arguments.rounds, Path(folder))


def measure(listing: Path, rules: str, rounds: int, folder: Path) -> None:
    """Run all commands in turn, and print a table."""
    from mapdsl.checkpoint.checkpoint import open_checkpoint

    tensors = open_checkpoint(listing).tensors
    header = folder / "header"
    header.write_text(json.dumps({name: {"dtype": of.dtype, "shape": of.shape} for name, of in tensors.items()}))
    mapdsl = [sys.executable, "-m", "mapdsl"]
    python = [sys.executable, "-c"]
    commands = {
        "mapdsl plan": [*mapdsl, "plan", str(listing), "--map", rules],
        "mapdsl check --against": [*mapdsl, "check", rules, "--against", str(listing)],
        "python -c 'import torch'": [*python, "import torch"],
        "json.load of the same header": [*python, f"import json; json.load(open({str(header)!r}))"],
        "python -c pass": [*python, "pass"],
    }
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, words in commands.items():
            found = cost(words)
            if turn:  # the first one warms the disk's cache
                costs[name].append(found)
    print(f"{listing.name}: {len(tensors):,} tensors, {rounds} rounds\n")
    print("| | wall s, median | least | CPU s, median | least |\n|---|---|---|---|---|")
    for name, runs in costs.items():
        texts = [f"{of(values):.2f}" for values in zip(*runs, strict=True) for of in (statistics.median, min)]
        print(f"| {name} | {' | '.join(texts)} |")


def cost(words: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command, its start included."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return wall, usage.ru_utime + usage.ru_stime


def make_listing(folder: Path) -> Path:
    """A listing of at least so many tensors, with its config beside it."""
    import mapdsl
    from mapdsl.checkpoint.dtypes import dtype_name
    from mapdsl.checkpoint.headers import StoredTensor
    from mapdsl.checkpoint.listing import write_listing

    rules = mapdsl.load("deepseek_v4")
    layers = TENSORS // (6 * int(CONFIG["n_routed_experts"]))  # three matrices an expert, each with its scales
    ratios = [*[0, 0, *([4, 128] * layers)][:layers], 0]
    config = {**CONFIG, "num_hidden_layers": layers, "compress_ratios": ratios}
    tensors = [
        StoredTensor(name, dtype_name(dtype) if dtype else "BF16", tuple(size or UNSTATED for size in shape or ()))
        for name, (shape, dtype) in rules.adapter(config).left_keys().items()
    ]
    assert len(tensors) >= TENSORS
    listing = folder / "deepseek_v4_large.list"
    listing.write_text(write_listing(tensors, "DeepSeek-V4 with more layers"))
    listing.with_suffix(".config.json").write_text(json.dumps(config))
    return listing


if __name__ == "__main__":
    main()
