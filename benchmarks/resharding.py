"""A checkpoint of 8 ranks for 2, mapdsl beside what others do: `python benchmarks/resharding.py`.

2 GB of a GPT as Megatron lays it out: fused QKV by heads, column- and row-parallel weights, vocabulary. All sources lie
in the system's cache. Ways take turns, each time in a new process; times are medians, without start and imports, and
with the files made durable; memory is the highest that was seen.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from convert import Way, report, run, size

BEFORE, AFTER = 8, 2
HEADS, WIDTH, INNER, VOCABULARY = 16, 2048, 8192, 32768
MAP = """map gpt: hf <-> megatron

param L = 18
param h = 16
param c = 128
index i < L
mesh tp shards h, f, V

wte.weight [V d] <-> word_embeddings.weight
h.{i} <-> layers.{i}:
    ln_1.weight [d]                  <-> input_layernorm.weight
    attn.c_attn.weight [d (3 h c)]   <-> attention.query_key_value.weight [(h 3 c) d]
    attn.c_proj.weight [(h c) d]     <-> attention.dense.weight [d (h c)]
    mlp.c_fc.weight [d f]            <-> mlp.dense_h_to_4h.weight [f d]
    mlp.c_fc.bias [f]                <-> mlp.dense_h_to_4h.bias
    mlp.c_proj.weight [f d]          <-> mlp.dense_4h_to_h.weight [d f]
"""
Work = Callable[[], object]


def main() -> None:
    """Make the checkpoint, reshard it, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", metavar="DIR", help="a folder with room for 8 GB (temporary)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=18)
    arguments = parser.parse_args()
    print("| job | way | s | user s | system s | anon MB | peak MB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        rules = folder / "gpt.map"
        rules.write_text(MAP.replace("L = 18", f"L = {arguments.layers}"))
        for kind in ("safetensors", "torch"):
            source, out = folder / kind, folder / "out"
            write(source, kind, arguments.layers)
            ways = [Way("mapdsl", "mapdsl", (source, out, rules))]
            if kind == "safetensors":
                ways.append(Way("copy_file_range", "copied_in_the_system", (source, out)))
            elif importlib.util.find_spec("deepspeed") is not None:
                ways.append(Way("DeepSpeed's loader, torch.save", "deepspeed", (source, out)))
            megabytes = sum(size(path) if path.is_dir() else path.stat().st_size // 10**6 for path in source.iterdir())
            report(f"{megabytes:,} MB of {kind}, 8 -> 2", run(ways, out, arguments.repeat, "resharding"))
            shutil.rmtree(source)


def write(folder: Path, kind: str, layers: int) -> None:
    """The shares of all ranks, random."""
    import torch
    from safetensors.torch import save_file

    from mapdsl.checkpoint.rank_files import RANKS_FILE, rank_folder, ranks_text

    folder.mkdir()
    for rank in range(BEFORE):
        shapes = {"word_embeddings.weight": (VOCABULARY // BEFORE, WIDTH)}
        for layer in range(layers):
            prefix = f"layers.{layer}"
            shapes[f"{prefix}.attention.query_key_value.weight"] = (3 * WIDTH // BEFORE, WIDTH)
            shapes[f"{prefix}.attention.dense.weight"] = (WIDTH, WIDTH // BEFORE)
            shapes[f"{prefix}.mlp.dense_h_to_4h.weight"] = (INNER // BEFORE, WIDTH)
            shapes[f"{prefix}.mlp.dense_h_to_4h.bias"] = (INNER // BEFORE,)
            shapes[f"{prefix}.mlp.dense_4h_to_h.weight"] = (WIDTH, INNER // BEFORE)
        state = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        state |= {f"layers.{layer}.input_layernorm.weight": torch.ones(WIDTH).bfloat16() for layer in range(layers)}
        if kind == "torch":
            torch.save({"module": state, "checkpoint_version": 2.0}, folder / f"mp_rank_{rank:02d}_model_states.pt")
        else:
            (folder / rank_folder({"tp": rank})).mkdir()
            save_file(state, folder / rank_folder({"tp": rank}) / "model.safetensors")
    if kind == "safetensors":
        places = [{"tp": rank} for rank in range(BEFORE)]
        (folder / RANKS_FILE).write_text(ranks_text("gpt", "megatron", {"tp": BEFORE}, places))


# --- the ways: each prepares, and gives the work ---


def mapdsl(source: str, destination: str, rules: str) -> Work:
    """mapdsl itself."""
    import tqdm  # noqa: F401 (as the command has it)

    from mapdsl.checkpoint.convert_ranks import convert_ranks

    return lambda: convert_ranks(source, destination, rules, ranks={"tp": (BEFORE, AFTER)}, to="megatron", workers=2)


def copied_in_the_system(source: str, destination: str) -> Work:
    """The same bytes copied by `copy_file_range`: the files of four ranks one behind the other into one."""

    def work() -> None:
        os.mkdir(destination)
        paths = sorted(Path(source).rglob("*.safetensors"))
        for number in range(AFTER):
            some = paths[number * BEFORE // AFTER : (number + 1) * BEFORE // AFTER]
            with (Path(destination) / f"{number}.safetensors").open("wb") as into:
                os.posix_fallocate(into.fileno(), 0, sum(path.stat().st_size for path in some))
                for path in some:
                    with path.open("rb") as outof:
                        left = path.stat().st_size
                        while left:
                            left -= os.copy_file_range(outof.fileno(), into.fileno(), left)
                os.fsync(into.fileno())

    return work


def deepspeed(source: str, destination: str) -> Work:
    """DeepSpeed's loader for each of the ranks, and what it gives saved."""
    import logging

    with contextlib.redirect_stdout(sys.stderr):  # it logs there what is for others to read
        logging.disable()
        import torch
        from deepspeed.runtime.state_dict_factory import SDLoaderFactory

    def work() -> None:
        os.mkdir(destination)
        paths = [str(path) for path in sorted(Path(source).glob("*.pt"))]
        for rank in range(AFTER):
            loader = SDLoaderFactory.get_sd_loader(paths, None, "Megatron", 2.0)
            _, state, _ = loader.load(AFTER, rank, module_key="module")
            with (Path(destination) / f"mp_rank_{rank:02d}_model_states.pt").open("wb") as into:
                torch.save(state, into)
                os.fsync(into.fileno())

    return work


if __name__ == "__main__":
    main()
