"""Where a conversion reads and where it writes: refused before anything is planned where that cannot be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.files import bad_file

INDEX_SUFFIX = ".safetensors.index.json"


def open_tensors(path: str | os.PathLike[str] | Checkpoint, task: str = "convert") -> Checkpoint:
    """A checkpoint's headers, read if they are not.

    C507 where it has no data for the task, which a listing has not, or no tensors.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if not checkpoint.has_data:
        raise bad_file(checkpoint.path, f"a listing has no tensors to {task}", advice="give the checkpoint itself")
    return with_tensors(checkpoint)


def with_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint; C507 where it is empty."""
    if not checkpoint.tensors:
        raise bad_file(checkpoint.path, "the checkpoint holds no tensors")
    return checkpoint


def check_destination(checkpoint: Checkpoint, destination: Path) -> None:
    """C507 where the output cannot be made: something is there, its folder is missing, or it lies in the source."""
    if os.path.lexists(destination):
        advice = "choose another destination, or remove this one first"
        raise bad_file(destination, "the destination exists already; nothing is overwritten", advice)
    whole_folder = checkpoint.path.is_dir() or checkpoint.path.name.endswith(INDEX_SUFFIX)
    if whole_folder and destination.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise bad_file(destination, f"the destination lies in the source, {checkpoint.folder}", "choose another place")
    if not destination.parent.is_dir():
        raise bad_file(destination, f"its folder {destination.parent} does not exist", advice="make it first")


def free_bytes(destination: Path) -> int:
    """What is free on the disk that the output is to lie on."""
    return shutil.disk_usage(destination.absolute().parent).free


def check_disk(destination: Path, needed: int, advice: str = "free space, or choose another destination") -> None:
    """C507 where the disk has less free than the output needs while it is written."""
    free = free_bytes(destination)
    if needed > free:
        message = f"the checkpoint needs {needed:,} bytes while it is written, the disk has {free:,} free"
        raise bad_file(destination, message, advice)
