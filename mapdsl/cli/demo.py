"""`mapdsl demo`: a small checkpoint there and back, and every byte compared."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mapdsl.cli.output import complain, escaped, paint, say

MAP = "deepseek_v4"
_CHUNK = 2**20


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="convert a small checkpoint there and back, and compare every byte",
        description="Make a small checkpoint in DeepSeek-V4's released layout (FP4 experts, FP8 weights, random "
        "bytes), check the map against it, convert it to the model's layout and back, and compare every byte.",
        allow_abbrev=False,
    )
    parser.add_argument("--keep", metavar="DIR", help="make the checkpoints in this new folder, and leave them there")


def run(arguments: argparse.Namespace) -> int:
    """Tell the story as it happens; 0 only if every byte came back."""
    with _folder(arguments.keep) as folder:
        return _tell(folder, keep=arguments.keep is not None)


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """A temporary folder, or the one to keep, which must be new. MapError, C507, where it cannot be made."""
    if keep is None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="mapdsl-demo-") as name:
            yield Path(name)
        return
    from mapdsl.language.diagnostics import error

    try:
        Path(keep).mkdir()
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error("C507", f"the folder cannot be made: {reason.lower()}", subject=keep) from None
    try:
        yield Path(keep)
    finally:
        with contextlib.suppress(OSError):
            Path(keep).rmdir()  # which it is only while empty, where something failed before the first checkpoint


def _tell(folder: Path, *, keep: bool) -> int:
    from mapdsl.checkpoint.checkpoint import open_checkpoint
    from mapdsl.demo import small_config, write_release

    released, model, restored = folder / "released", folder / "model", folder / "restored"
    started = time.perf_counter()
    say(paint("A DeepSeek-V4 checkpoint in small, to the model's layout and back", "bold") + "\n")
    write_release(released, small_config())
    checkpoint = open_checkpoint(released)
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    kinds = _count(tensor.dtype for tensor in checkpoint.tensors.values())
    _step(1, "make a checkpoint of random bytes, NaN codes and odd scales among them")
    _note(f"{len(checkpoint.tensors)} tensors, {size:,} bytes in {len(checkpoint.files)} shards: {kinds}")
    if not _check(released):
        return 1
    _convert(4, released, model)
    _convert(5, model, restored)
    differing = _compare(released, restored)
    seconds = time.perf_counter() - started
    if keep:
        _note(f"the checkpoints are in {folder}")
    if differing:
        count = "1 file differs" if differing == 1 else f"{differing} files differ"
        complain(paint(f"\n{count}: this is a defect of mapdsl", "error", sys.stderr))
        return 1
    say(paint(f"\nEvery byte came back, in {seconds:.1f} s.", "good"))
    return 0


def _check(released: Path) -> bool:
    """`mapdsl check`, by itself and against the checkpoint."""
    from mapdsl.cli import check

    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    for number, against in ((2, None), (3, str(released))):
        _step(number, f"mapdsl check {MAP}{f' --against {released.name}' if against else ''}")
        started = time.perf_counter()
        if check.run(parser.parse_args(["check", MAP, *(["--against", against] if against else [])])):
            return False
        _note(f"{time.perf_counter() - started:.2f} s, without reading a tensor")
    return True


def _convert(number: int, source: Path, destination: Path) -> None:
    from mapdsl.checkpoint.convert import convert
    from mapdsl.cli.convert import story

    _step(number, f"mapdsl convert {source.name} {destination.name} --map {MAP}")
    for line in story(convert(source, destination, MAP)):
        say(f"   {line}")


def _compare(released: Path, restored: Path) -> int:
    """Every file of both folders, byte for byte; gives the number of those that differ."""
    _step(6, f"compare {released.name} and {restored.name}")
    names = sorted({path.name for folder in (released, restored) for path in folder.iterdir()})
    differing = 0
    for name in names:
        place = first_difference(released / name, restored / name)
        differing += place is not None
        size = (released / name).stat().st_size if (released / name).exists() else 0
        verdict = paint("identical", "good") if place is None else paint(f"differs from byte {place:,} on", "error")
        say(f"   {escaped(name):34} {size:>9,} bytes  {verdict}")
    return differing


def first_difference(one: Path, other: Path) -> int | None:
    """The first byte in which two files differ; None where they are the same, 0 where one is not there."""
    if not (one.is_file() and other.is_file()):
        return 0
    done = 0
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            here, there = first.read(_CHUNK), second.read(_CHUNK)
            if here != there:
                pairs = zip(here, there, strict=False)
                return done + next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(here), len(there)))
            if not here:
                return None
            done += len(here)


def _count(words: Any) -> str:
    """`128 F8_E4M3, 60 I8`, the most frequent first."""
    from collections import Counter

    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def _step(number: int, text: str) -> None:
    say(f"{number}. {paint(escaped(text), 'bold')}")


def _note(text: str) -> None:
    say(f"   {escaped(text)}")
