"""What a conversion will read and write, before it starts: from headers, config and map alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.direction import choose_plan
from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.layout import plan_layout
from mapdsl.checkpoint.passes import Plan, Request, outputs_of
from mapdsl.map import Map, load


@dataclass(frozen=True)
class Unit:
    """Tensors that are converted together: the first output, how many there are, and the bytes on both sides.

    `held_bytes` is what a worker needs memory for: outputs that are neither copied nor filled where they are to lie.
    """

    output: str
    outputs: int
    sources: int
    bytes_read: int
    bytes_written: int
    held_bytes: int


@dataclass(frozen=True)
class Planned:
    """What a conversion will do.

    `copied_tensors` come out as they are stored. `kept_bytes` is what the side file will hold, at least (None: none is
    written). `free_bytes` is what the destination's disk has (None: no destination was given).
    """

    source: Path
    source_side: str
    target_side: str
    tensors_read: int
    bytes_read: int
    files_read: int
    tensors_written: int
    bytes_written: int
    files_written: int
    copied_tensors: int
    copied_bytes: int
    dropped: tuple[str, ...]
    kept_bytes: int | None
    units: tuple[Unit, ...]
    workers: int
    free_bytes: int | None = None

    @property
    def needed_bytes(self) -> int:
        """What the destination's disk must have."""
        return self.bytes_written + (self.kept_bytes or 0)

    @property
    def held_bytes(self) -> int:
        """Memory for outputs under way, at most: the largest units, one a worker."""
        return sum(sorted((unit.held_bytes for unit in self.units), reverse=True)[: self.workers])


def plan_conversion(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None,
    map: Map | str | os.PathLike[str],  # noqa: A002 (as `convert` has it)
    *,
    to: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantize: bool = False,
    params: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | None = None,
    max_shard_bytes: int,
    use_complement: bool = True,
    workers: int | None = None,
) -> Planned:
    """Plan a conversion of a checkpoint, or of a listing; see `convert` for the arguments.

    Raises a MapError for all that speaks against it: C and R codes; C507 where the destination's disk is too small.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.tensors:
        raise bad_file(checkpoint.path, "the checkpoint holds no tensors")
    where = None if config is None else Path(config)
    rules = map if isinstance(map, Map) else load(map)
    request = Request(rules, checkpoint, dtype, quantize, dict(params or {}), where, use_complement)
    plan = choose_plan(request, to)
    layout = plan.restored or plan_layout(outputs_of(plan, {}), max_shard_bytes=max_shard_bytes)
    left, right = request.sides
    planned = Planned(
        source=checkpoint.path,
        source_side=left if plan.to_right else right,
        target_side=right if plan.to_right else left,
        tensors_read=len(checkpoint.tensors),
        bytes_read=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        files_read=len(checkpoint.files),
        tensors_written=sum(len(file.tensors) for file in layout),
        bytes_written=sum(file.size for file in layout),
        files_written=len(layout),
        copied_tensors=len(plan.units.copied),
        copied_bytes=sum(plan.nbytes(name) for name in plan.units.copied),
        dropped=tuple(plan.dropped),
        kept_bytes=_kept_bytes(plan),
        units=_units(plan),
        workers=workers or torch.get_num_threads(),
        free_bytes=None if destination is None else shutil.disk_usage(Path(destination).absolute().parent).free,
    )
    if planned.free_bytes is not None and planned.free_bytes < planned.needed_bytes:
        message = f"the checkpoint needs {planned.needed_bytes:,} bytes, the disk has {planned.free_bytes:,} free"
        raise bad_file(Path(str(destination)), message, "free space, or choose another destination")
    return planned


def _kept_bytes(plan: Plan) -> int | None:
    """Bytes of what the side file keeps: what codecs keep, and tensors that the map drops."""
    if not (plan.to_right and plan.request.use_complement):
        return None
    tensors = plan.request.checkpoint.tensors
    return plan.kept_bytes + sum(tensors[name].nbytes for name in plan.dropped)


def _units(plan: Plan) -> tuple[Unit, ...]:
    """The units, in order."""
    stored, found = plan.request.checkpoint.tensors, plan.units
    free = {*found.copied, *found.in_place.values()}
    return tuple(
        Unit(
            output=outputs[0] if outputs else "",
            outputs=len(outputs),
            sources=len(sources),
            bytes_read=sum(stored[name].nbytes for name in sources),
            bytes_written=sum(map(plan.nbytes, outputs)),
            held_bytes=sum(plan.nbytes(name) for name in outputs if name not in free),
        )
        for sources, outputs in found.members()
    )
