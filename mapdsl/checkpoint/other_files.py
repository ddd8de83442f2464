"""Files of a checkpoint that hold no tensors: what is carried over, and what is not."""

from __future__ import annotations

import os

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.checksums import CHECKSUM_FILE
from mapdsl.checkpoint.files import read_text
from mapdsl.checkpoint.model_config import ModelConfig
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.checkpoint.sources import INDEX_SUFFIX
from mapdsl.checkpoint.writer import CheckpointWriter

_INDEXES = (INDEX_SUFFIX, ".bin.index.json")


def carry_over(plan: Plan, writer: CheckpointWriter, config: ModelConfig | None) -> tuple[str, ...]:
    """Write the files that hold no tensors; gives their names."""
    checkpoint = plan.request.checkpoint
    others = tuple(name for name in checkpoint.other_files if name not in (SIDE_FILE, CHECKSUM_FILE))
    writer.carry_over(checkpoint, others)
    if config is not None and plan.config_text is not None:
        writer.write_bytes("config.json", config.text.encode("utf-8"))
    has_index = plan.restored is not None and plan.side is not None and writer.keeps_headers
    if has_index and plan.side is not None and plan.side.origin.index_name is not None:
        writer.write_bytes(plan.side.origin.index_name, plan.side.origin.index_text.encode("utf-8"))
    return (*others, "config.json") if plan.config_text is not None else others


def index_of(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Name and text of the index that the checkpoint was opened by."""
    path = checkpoint.path
    names = [path.name] if not path.is_dir() else os.listdir(path)
    found = [name for name in names if name.endswith(INDEX_SUFFIX)]
    return (found[0], read_text(checkpoint.folder / found[0], "index")) if found else None


def left_behind(checkpoint: Checkpoint, carried: tuple[str, ...]) -> tuple[str, ...]:
    """What else is there: keys of torch's files that are not the model's; subfolders, other weights, links that lead
    out of a checkpoint that is a folder."""
    if not checkpoint.path.is_dir():
        return checkpoint.left_out
    known = {*checkpoint.files, *carried, "config.json", SIDE_FILE, CHECKSUM_FILE}
    names = [name for name in sorted(os.listdir(checkpoint.path)) if name not in known and not name.endswith(_INDEXES)]
    shown = (f"{name}/" if (checkpoint.path / name).is_dir() else name for name in names if name[0] != ".")
    return (*checkpoint.left_out, *shown)
