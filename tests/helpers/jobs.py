"""Checks that run in a job of several processes, which talk through gloo: `python -m MODULE RANK WORLD STORE`.

Every process runs every check for a job of its size, in one order, prints the name of each that held, and stops at the
first that does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent

Check = Callable[[], None]


class Checks:
    """The checks of one module; a decorator says in jobs of how many processes one is to run."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[tuple[int, ...], Check]] = {}

    def __call__(self, *worlds: int) -> Callable[[Check], Check]:
        def listed_too(function: Check) -> Check:
            self.known[function.__name__] = worlds, function
            return function

        return listed_too

    def names(self, world: int) -> list[str]:
        """The checks of a job of this size."""
        return [name for name, (worlds, _) in self.known.items() if world in worlds]

    def main(self) -> None:
        """Run all checks of this job."""
        rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        method, limit = f"file://{store}", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=limit)
        for name in self.names(world):
            try:
                self.known[name][1]()
            except BaseException:
                print(f"{name} on rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                os._exit(1)
            print(name, flush=True)
        dist.barrier()
        dist.destroy_process_group()


def run_job(module: str, checks: Checks, world: int, folder: Path, seconds: float = 240) -> None:
    """All checks of a module in one job; `folder` takes what the processes print."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs: list[subprocess.Popen[str]] = []
    try:
        for rank in range(world):
            with (folder / f"{rank}").open("w") as file:
                arguments = [sys.executable, "-m", module, str(rank), str(world), str(folder / "store")]
                runs.append(subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=file, stderr=file, text=True))
        for run in runs:
            run.wait(timeout=seconds)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    outputs = [(folder / f"{rank}").read_text() for rank in range(world)]
    # The others of a rank that fails fail, too: they lose it.
    assert all(run.returncode == 0 for run in runs), "\n".join(output[-3000:] for output in outputs)
    for output in outputs:
        assert [line for line in output.splitlines() if line in checks.known] == checks.names(world)
