"""Whole checkpoints, mapdsl beside what others do with the same files: `python benchmarks/convert.py`.

A dense checkpoint whose tensors only change their names, and two like DeepSeek-V4 (FP4 experts, FP8 weights), one ten
times the other, there and back. All sources lie in the system's cache. Ways that are compared take turns, each time
in a new process; times are medians, without start and imports, memory is the highest that was seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from processes import Cost, cost

MB = 10**6
SHARD = 500 * MB
DENSE_MAP = """map dense: hf <-> native

param L = num_hidden_layers

index l < L

model.layers.{l}.self_attn.{p:q|k|v|o|gate|up|down}_proj.weight <-> layers.{l}.attention.w{p}.weight
"""
DENSE_LAYERS = 12
_WORTH_COMPARING = 0.1  # seconds
LARGE = {"hidden_size": 2048, "moe_intermediate_size": 1024, "n_routed_experts": 16, "vocab_size": 4096}
Row = tuple[str, list[Cost]]


class Way(NamedTuple):
    """A way of doing a job: a function and its arguments. The first one is ours."""

    name: str
    function: str
    arguments: tuple[object, ...]


def main() -> None:
    """Make checkpoints, convert them, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", metavar="DIR", help="a folder with room for 12 GB (temporary)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 20], help="of those like DeepSeek-V4 (1 20)")
    arguments = parser.parse_args()
    print("| job | way | s | user s | system s | anon MB | peak MB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        for job, ways in jobs(folder, arguments.layers, arguments.workers):
            report(job, run(ways, folder / "out", arguments.repeat))


def jobs(folder: Path, layers: list[int], workers: int) -> Iterator[tuple[str, list[Way]]]:
    """Every job, once what it needs has been made."""
    out = folder / "out"
    rules = write_dense(folder / "dense")
    ours = Way("mapdsl", "mapdsl", (folder / "dense", out, rules, workers))
    copy = Way("copy_file_range", "copied_in_the_system", (folder / "dense", out))
    yield f"{size(folder / 'dense'):,} MB, names only", [ours, copy]
    shutil.rmtree(folder / "dense")
    for count in layers:
        hf, native = folder / "hf", folder / "native"
        write_deepseek(hf, count)
        cost("convert_peers", "mapdsl", hf, native, "deepseek_v4", workers)
        there = [Way("mapdsl", "mapdsl", (hf, out, "deepseek_v4", workers))]
        there.append(Way("read and written", "read_and_written", (hf, out, size(native) * MB)))
        if importlib.util.find_spec("nemo_automodel") is not None:
            there.append(Way("NeMo Automodel", "nemo_automodel", (hf, out)))
        yield f"{size(hf):,} MB FP4, FP8 -> {size(native):,} MB bf16", there
        back = Way("mapdsl", "mapdsl", (native, out, "deepseek_v4", workers))
        ideal = Way("read and written", "read_and_written", (native, out, size(hf) * MB))
        yield f"{size(native):,} MB bf16 -> {size(hf):,} MB FP4, FP8", [back, ideal]
        shutil.rmtree(hf)
        shutil.rmtree(native)


def run(ways: list[Way], out: Path, repeat: int, module: str = "convert_peers") -> list[Row]:
    """The costs of each way, which take turns; the first turn, with cold files, does not count.

    `module` is the one that has the functions.
    """
    costs: dict[str, list[Cost]] = {way.name: [] for way in ways}
    for turn in range(repeat + 1):
        for way in ways:
            found = cost(module, way.function, *way.arguments)
            shutil.rmtree(out)
            if turn:
                costs[way.name].append(found)
    return list(costs.items())


def report(job: str, rows: list[Row]) -> None:
    """A line for each way; behind the times of others, how many times as long ours takes."""
    (_, ours), *_ = rows
    for name, costs in rows:
        cells = []
        for kind in ("wall", "user", "system"):
            mine, theirs = (statistics.median(getattr(cost, kind) for cost in some) for some in (ours, costs))
            is_other = costs is not ours and kind != "system" and theirs > _WORTH_COMPARING
            cells.append(f"{theirs:.2f} (x {mine / theirs:.2f})" if is_other else f"{theirs:.2f}")
        cells += [f"{max(getattr(cost, kind) for cost in costs) // MB:,}" for kind in ("anonymous", "resident")]
        print(f"| {job} | {name} | " + " | ".join(cells) + " |", flush=True)


def size(folder: Path) -> int:
    """Megabytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir()) // MB


def write_dense(folder: Path) -> Path:
    """The layers of a dense model in bf16, random; gives the map that renames them."""
    import torch

    from mapdsl.checkpoint.writer import CheckpointWriter

    shapes = dict.fromkeys("qkvo", (2048, 2048)) | {"gate": (5632, 2048), "up": (5632, 2048), "down": (2048, 5632)}
    names = {
        f"model.layers.{layer}.self_attn.{p}_proj.weight": s for layer in range(DENSE_LAYERS) for p, s in shapes.items()
    }
    with CheckpointWriter(
        folder, [(name, "BF16", shape) for name, shape in names.items()], max_shard_bytes=SHARD
    ) as to:
        for name, shape in names.items():
            to.write(name, torch.randn(shape).bfloat16())
        to.write_json("config.json", {"num_hidden_layers": DENSE_LAYERS})
        to.commit()
    rules = folder.with_name("dense.map")
    rules.write_text(DENSE_MAP)
    return rules


def write_deepseek(folder: Path, layers: int) -> None:
    """A checkpoint like DeepSeek-V4 with so many layers, and one more to predict with, of random bytes."""
    from mapdsl.demo import small_config, write_release

    ratios = ([0, 4, 128] * layers)[: layers + 1]
    config = small_config(**LARGE, num_hidden_layers=layers, compress_ratios=ratios)
    write_release(folder, config, max_shard_bytes=SHARD, is_odd=False)


if __name__ == "__main__":
    main()
