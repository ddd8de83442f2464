"""Peak memory of `mapdsl convert` against the size of the checkpoint, both ways: `python benchmarks/convert_memory.py`.

Checkpoints of random FP4 experts and FP8 weights, alike but for their number of layers, are converted in processes of
their own. What a conversion needs is one group, the largest stack of experts, whatever the size of the checkpoint: the
anonymous memory of the last row is to be that of the first. Resident memory also counts pages of mapped files, which
the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WIDE = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 32, "vocab_size": 4096}
MB = 10**6


def main() -> None:
    """Make, convert and print, one size after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 20])
    parser.add_argument("--work", metavar="DIR", help="a folder with room for four times the largest (temporary)")
    arguments = parser.parse_args()
    print(f"{'layers':>6} {'direction':>14} {'in MB':>8} {'out MB':>8} {'anon MB':>8} {'peak MB':>8} {'s':>6}")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            measure(Path(folder), layers)


def measure(folder: Path, layers: int) -> None:
    """Convert a checkpoint of so many layers there and back, and print a line for each way."""
    from mapdsl.demo import small_config, write_release

    ratios = [0, 4, 128] * layers
    config = small_config(**WIDE, num_hidden_layers=layers, compress_ratios=ratios[: layers + 1])
    write_release(folder / "hf", config, max_shard_bytes=500 * MB)
    for source, destination in (("hf", "native"), ("native", "back")):
        anonymous, resident, seconds = convert(folder / source, folder / destination)
        sizes = [sum(path.stat().st_size for path in (folder / name).iterdir()) for name in (source, destination)]
        numbers = [size // MB for size in (*sizes, anonymous, resident)]
        text = " ".join(f"{number:>8,}" for number in numbers)
        print(f"{layers:>6} {f'{source}->{destination}':>14} {text} {seconds:>6.1f}", flush=True)


def convert(source: Path, destination: Path) -> tuple[int, int, float]:
    """Convert in a process of its own; gives its peak anonymous and resident memory, less what imports take, and time.

    Memory is in bytes, time in seconds.
    """
    program = (
        "import sys, time\n"
        "import mapdsl, mapdsl.checkpoint.convert, tqdm\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "started = time.perf_counter()\n"
        "mapdsl.convert(sys.argv[1], sys.argv[2], 'deepseek_v4')\n"
        "print(time.perf_counter() - started, flush=True); sys.stdin.readline()\n"
    )
    words = [sys.executable, "-c", program, str(source), str(destination)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        base = memory(process.pid)
        peaks, stop = [0, 0], threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peaks, stop))
        watcher.start()
        print(file=process.stdin, flush=True)
        answer = process.stdout.readline()
        stop.set()
        watcher.join()
        if not answer:
            raise SystemExit("the conversion failed")
        print(file=process.stdin, flush=True)
    return peaks[0] - base[0], peaks[1] - base[1], float(answer)


def watch(process: int, peaks: list[int], stop: threading.Event) -> None:
    """Note the highest anonymous and resident memory of a process until told to stop."""
    while not stop.is_set():
        peaks[:] = [max(pair) for pair in zip(peaks, memory(process), strict=True)]
        time.sleep(0.002)


def memory(process: int) -> tuple[int, int]:
    """Anonymous and resident memory of a process in bytes; none once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    anonymous, resident = (int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "VmRSS"))
    return anonymous * 1024, resident * 1024


if __name__ == "__main__":
    main()
