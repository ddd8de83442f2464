"""Ranks for tests: threads that share a store, and processes that torchrun starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from mapdsl.checkpoint.ranks import Ranks

ROOT = Path(__file__).parent.parent.parent

# `mapdsl`, but the rank named in KILL kills itself when it has done so many units; FAIL: it fails to write its journal.
PROGRAM = """
import os, signal, sys
from mapdsl.checkpoint import engine, journal
from mapdsl.cli.main import main

engine.SMALL_BYTES = 0
add = journal.JournalFile.add
kill, fail = ([int(n) for n in os.environ.get(what, "-1 0").split()] for what in ("KILL", "FAIL"))

def counted(self, record):
    if [int(os.environ["RANK"]), len(self.done)] == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if [int(os.environ["RANK"]), len(self.done)] == fail:
        raise OSError(28, "No space left on device")
    add(self, record)

journal.JournalFile.add = counted
sys.exit(main(sys.argv[1:]))
"""


def torchrun(count: int, *arguments: str, program: Path | None = None, **environment: str) -> Any:
    """`torchrun -m mapdsl` with arguments, or another program; what it printed, and its exit status."""
    what = ["-m", "mapdsl"] if program is None else [str(program)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *what]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=known, timeout=120)


def launched(count: int, *arguments: str, program: Path, **environment: str) -> list[Any]:
    """The same by a launcher that looks after nothing: what each rank printed, and its exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), **place}
    command = [sys.executable, str(program), *arguments]
    ranks = [
        subprocess.Popen(
            command,
            env={**known, "RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [
        subprocess.CompletedProcess(command, rank.returncode, *told) for rank, told in zip(ranks, printed, strict=True)
    ]


def together(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` gives, or raises, on each of several ranks, each a thread."""
    store = HashStore()
    outcomes: list[Any] = [None] * count

    def run(rank: int) -> None:
        ranks = Ranks(store, rank, count)
        try:
            with ranks.together():
                outcomes[rank] = work(ranks)
        except BaseException as problem:
            outcomes[rank] = problem
        finally:
            ranks.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes
