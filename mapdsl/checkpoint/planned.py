"""What a conversion will read and write, before it starts: from headers, config and map alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.checkpoint import no_collection, open_checkpoint
from mapdsl.checkpoint.completion import check_resumable
from mapdsl.checkpoint.engine import workers_for
from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.identity import identity_of
from mapdsl.checkpoint.journal import units_left_done
from mapdsl.checkpoint.layout import FileLayout, disk_needed
from mapdsl.checkpoint.memory import held_bytes, memory_budget
from mapdsl.checkpoint.options import (
    checked_plan,
    make_request,
    memory_bound,
    planned_layout,
    size_in_bytes,
    worker_count,
)
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.sources import check_destination, check_disk, free_bytes, with_tensors
from mapdsl.map import Map


@dataclass(frozen=True)
class Unit:
    """Tensors that are converted together: the first output, how many there are, and the bytes on both sides.

    `held_bytes` is the memory that a worker needs for it, about: of copied outputs, and of those that are filled where
    they are to lie, it holds none.
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
    written). `needed_bytes` is what the destination's disk must have while the output is written, `free_bytes` what it
    has (None: no destination was given). `memory_bytes` bounds the memory of all units under way. `done_units`
    counts those that an earlier run has done, with which `--resume` goes on.
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
    format: str
    needed_bytes: int
    memory_bytes: int
    free_bytes: int | None = None
    done_units: int = 0

    @property
    def held_bytes(self) -> int:
        """Memory for outputs under way, at most: the largest units, one a worker, within the bound."""
        largest = sorted((unit.held_bytes for unit in self.units), reverse=True)[: self.workers]
        return min(sum(largest), self.memory_bytes)

    def as_json(self, *, with_units: bool = True) -> dict[str, Any]:
        """A dict of plain values."""
        value = asdict(self) | {"source": str(self.source), "held_bytes": self.held_bytes}
        if not with_units:
            del value["units"]
        return value


@no_collection()
def plan_conversion(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None,
    map: Map | str | os.PathLike[str],  # noqa: A002 (as `convert` has it)
    *,
    to: str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: bool = False,
    params: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    use_complement: bool = True,
    format: str = "safetensors",  # noqa: A002 (as `convert` has it)
    workers: int | None = None,
    memory: int | str | None = None,
    resume: bool = False,
    verify: bool = False,
) -> Planned:
    """Plan a conversion of a checkpoint, or of a listing; see `convert` for the arguments.

    Raises what `convert` raises before it reads data: a MapError for all that speaks against the conversion, C507 where
    the destination is in the way of something, an unfinished conversion in its own, or its disk too small; an
    OptionError.
    """
    checkpoint = with_tensors(open_checkpoint(source))
    place = None if destination is None else Path(destination)
    if place is not None:
        if resume:
            check_resumable(place)
        check_destination(checkpoint, place)
    request = make_request(
        map,
        checkpoint,
        dtype=dtype,
        quantize=quantize,
        params=params,
        config=config,
        use_complement=use_complement,
        format=format,
    )
    shard_bytes, workers = size_in_bytes(max_shard_size), worker_count(workers)
    bound = memory_bound(memory)
    plan = checked_plan(request, to)
    layout = planned_layout(plan, shard_bytes)
    beside = beside_disk(plan, verify=verify)
    planned = planned_of(
        plan, layout, workers=workers, destination=place, memory=memory_budget(plan, bound), beside=beside
    )
    if place is None:
        return planned
    identity = identity_of(plan, layout) if checkpoint.has_data else {}
    done = units_left_done(place, identity, resume=resume)
    if not done:  # else all files have been made
        check_disk(place, planned.needed_bytes)
    if not os.access(place.absolute().parent, os.W_OK | os.X_OK):
        raise bad_file(place, "cannot make the files: its folder cannot be written to")
    return replace(planned, done_units=done)


def planned_of(
    plan: Plan, layout: list[FileLayout], *, workers: int, destination: Path | None, memory: int, beside: int
) -> Planned:
    """What a plan comes to, when units under way have so much memory, and files beside the tensors so much disk."""
    request, checkpoint = plan.request, plan.request.checkpoint
    left, right = request.sides
    return Planned(
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
        workers=workers_for(plan, workers),
        format=request.format,
        memory_bytes=memory,
        needed_bytes=disk_needed(layout, is_packed=request.format == "dcp") + beside,
        free_bytes=None if destination is None else free_bytes(destination),
    )


def beside_disk(plan: Plan, *, verify: bool) -> int:
    """Disk that is needed beside the tensors, at least: what the side file keeps is first put aside, then written.

    To `verify`, what codecs keep is put aside where no side file is wanted, too.
    """
    if plan.to_right and verify and not plan.request.use_complement:
        return plan.kept_bytes
    return 2 * (_kept_bytes(plan) or 0)


def _kept_bytes(plan: Plan) -> int | None:
    """Bytes of what the side file keeps: what codecs keep, and tensors that the map drops."""
    if not (plan.to_right and plan.request.use_complement):
        return None
    tensors = plan.request.checkpoint.tensors
    return plan.kept_bytes + sum(tensors[name].nbytes for name in plan.dropped)


def _units(plan: Plan) -> tuple[Unit, ...]:
    """The units, in order."""
    stored = plan.request.checkpoint.tensors
    return tuple(
        Unit(
            output=outputs[0] if outputs else "",
            outputs=len(outputs),
            sources=len(sources),
            bytes_read=sum(stored[name].nbytes for name in sources),
            bytes_written=sum(map(plan.nbytes, outputs)),
            held_bytes=held,
        )
        for (sources, outputs), held in zip(plan.units.members(), held_bytes(plan), strict=True)
    )
