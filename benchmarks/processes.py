"""What work costs in a process of its own: time, processor time, and memory at its highest."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

_PROGRAM = """
import json, resource, sys, time
sys.path.insert(0, {folder!r})
from {module} import {prepare}
work = {prepare}(*sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
work()
seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime]), flush=True)
sys.stdin.readline()
"""


class Cost(NamedTuple):
    """Seconds; of the processor in the program and in the system; bytes of memory, less what imports took.

    Anonymous memory is the program's own. Resident memory also counts pages of mapped files, which the system takes
    back when it needs them.
    """

    wall: float
    user: float
    system: float
    anonymous: int
    resident: int


def cost(module: str, prepare: str, *arguments: object) -> Cost:
    """The cost of the work that a function of a benchmark's module gives when called with these arguments, as texts."""
    program = _PROGRAM.format(folder=str(Path(__file__).parent), module=module, prepare=prepare)
    words = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{prepare} could not be prepared")
        base = _memory(process.pid)
        peaks, stop = [0, 0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, stop))
        watcher.start()
        print(file=process.stdin, flush=True)
        answer = process.stdout.readline()
        stop.set()
        watcher.join()
        if not answer:
            raise SystemExit(f"{prepare} failed")
        print(file=process.stdin, flush=True)
    return Cost(*json.loads(answer), peaks[0] - base[0], peaks[1] - base[1])


def _watch(process: int, peaks: list[int], stop: threading.Event) -> None:
    """Note the highest memory of a process until told to stop."""
    while not stop.is_set():
        peaks[:] = [max(pair) for pair in zip(peaks, _memory(process), strict=True)]
        time.sleep(0.002)


def _memory(process: int) -> tuple[int, int]:
    """Anonymous and resident memory of a process in bytes; none once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    anonymous, resident = (int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "VmRSS"))
    return anonymous * 1024, resident * 1024
