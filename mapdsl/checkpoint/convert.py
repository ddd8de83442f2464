"""A whole checkpoint from one side of a map to the other: headers first, then one group of tensors at a time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.attendants import Attendants, Done, Wanted, shared_means
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.checksums import CHECKSUM_FILE
from mapdsl.checkpoint.engine import convert_tensors
from mapdsl.checkpoint.files import read_text
from mapdsl.checkpoint.following import Verified
from mapdsl.checkpoint.journal import Journal
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.memory import memory_budget
from mapdsl.checkpoint.model_config import ModelConfig, written_config
from mapdsl.checkpoint.options import (
    checked_plan,
    make_request,
    memory_bound,
    planned_layout,
    size_in_bytes,
    worker_count,
)
from mapdsl.checkpoint.passes import Plan, header_texts, origin_of
from mapdsl.checkpoint.planned import planned_of, side_file_disk
from mapdsl.checkpoint.progress import Meter, Report, Reporter, plain
from mapdsl.checkpoint.ranks import Ranks
from mapdsl.checkpoint.sharing import Means, flush_leftovers, help_out, lead
from mapdsl.checkpoint.sidecar import SIDE_FILE, Forgetful, SideFile, SideWriter
from mapdsl.checkpoint.sources import INDEX_SUFFIX, check_destination, open_tensors
from mapdsl.checkpoint.window import Window
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.map import Map

_INDEXES = (INDEX_SUFFIX, ".bin.index.json")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    `source_side` and `target_side` are the names of the map's sides. `kept_bytes` is the size of what the side file
    keeps (None: none was written); `dropped` are source tensors that the map drops, `edited` counts, by stored name,
    the blocks that were encoded anew. `same_layout` says whether the headers of the checkpoint once read were written
    again (None where there is no side file), `misfit` why not. `left_behind` are names in the source's folder that were
    not carried over, and keys in torch's files of what is not part of the model. `config` is the config.json that was
    written, with what was changed in it, `verified` what was compared, if that was asked for;
    `checksums` says whether those of the tensors were written.
    """

    source: Path
    destination: Path
    source_side: str
    target_side: str
    tensors_read: int
    bytes_read: int
    tensors_written: int
    bytes_written: int
    files: tuple[str, ...]
    carried: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    kept_bytes: int | None = None
    edited: Mapping[str, int] = field(default_factory=dict)
    same_layout: bool | None = None
    misfit: str = ""
    config: ModelConfig | None = None
    verified: Verified | None = None
    checksums: bool = False
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        value = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        if value["config"] is not None:
            del value["config"]["text"]  # it lies in the destination
        return value


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    map: Map | str | os.PathLike[str],  # noqa: A002 (what else would one call it)
    *,
    to: str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: bool = False,
    params: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    use_complement: bool = True,
    format: str = "safetensors",  # noqa: A002 (the command's option)
    workers: int | None = None,
    memory: int | str | None = None,
    resume: bool = False,
    verify: bool = False,
    checksums: bool = False,
    progress: bool = False,
    report: Report | None = None,
    ranks: Ranks | None = None,
) -> Conversion:
    """Convert a checkpoint, a folder or a file, into a new folder.

    `to` names the side to go to; by default the one whose names the source does not hold. To the right side, decoded
    tensors take `dtype` (bf16), and `mapdsl.complement` is written beside the output, with which the way back gives
    every file again, byte for byte; on that way back, tensors whose values are unchanged get their bytes, others are
    encoded anew. Without that file, or `use_complement`, tensors are written to the left side as they are wherever the
    map allows that, or with `quantize` in the map's first format.

    `config` is that of the left side's checkpoint; by default the one that the side file holds, else the source's
    config.json. It becomes the destination's, the source's other files are copied. `workers` units (tensors, or stacks
    of them) are converted at once, by default as many as torch has threads, and fewer where outputs under way would
    take more than `memory` (2 GiB, or what the largest unit needs).

    A destination appears when it is complete. A run that was killed, interrupted, or stopped by the file system leaves
    the hidden folder `.NAME.partial` beside it, with which the same call with `resume` goes on, to the same bytes;
    after any other error nothing is left.

    `format` is that of the files written, `safetensors` or `dcp`, a torch Distributed Checkpoint; that of the source is
    found by itself.

    With `verify` what was written is read again, converted back, and held against the source, while the conversion
    runs; a difference is an error, R601, and nothing is left under the destination's name. With `checksums` those of
    all tensors are written beside them, to `mapdsl.checksums.json`.

    With `progress` standard error shows how far it is: a bar on a terminal, else a line a minute. `report` is told of
    events, dicts of plain values, as the command's `--json` prints them: `plan`, `warning` and `progress`. It is called
    by other threads too.

    `ranks` are several processes that share the work, all with the same arguments and on a file system that all see:
    what `with joined_ranks() as ranks` gives, where a launcher such as torchrun started them. Within that block each of
    them gets the same result; only the first rank shows progress and reports.

    Raises a MapError: an error of the map, of the checkpoint (codes C and R) or of the file system (C507); an
    OptionError for an option that means nothing for the direction; an OtherRankError where another rank failed.
    """
    started = time.monotonic()
    checkpoint = open_tensors(source)
    check_destination(checkpoint, Path(destination))
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
    shard_bytes, workers, bound = size_in_bytes(max_shard_size), worker_count(workers), memory_bound(memory)
    plan = checked_plan(request, to)
    layout = planned_layout(plan, shard_bytes)
    means = Means(workers, memory_budget(plan, bound), ranks)
    if ranks is not None:
        if resume:
            flush_leftovers(Path(destination))
        ranks.agree(_identity(plan, layout))
    if ranks is not None and ranks.rank:
        help_out(plan, layout, Path(destination), means)
        return _conversion(plan, layout, Path(destination), json.loads(ranks.receive("committed")), started)
    reporter = Reporter(progress, report)
    _tell_plan(plan, layout, Path(destination), means, reporter)
    journal = Journal(Path(destination), _identity(plan, layout), resume=resume, ranks=ranks)
    wanted = Wanted(verify, checksums)
    outcome = _write(plan, layout, journal, means=means, reporter=reporter, wanted=wanted)
    if ranks is not None:
        ranks.hand_out("committed", [json.dumps(outcome)] * (ranks.count - 1))
    return _conversion(plan, layout, Path(destination), outcome, started)


def _tell_plan(plan: Plan, layout: list[FileLayout], destination: Path, means: Means, reporter: Reporter) -> None:
    """What is going to be done, and what may surprise about it."""
    if reporter.report is None:
        return
    planned = planned_of(plan, layout, workers=means.workers, destination=destination, memory=means.memory)
    reporter.event("plan", {**planned.as_json(with_units=False), "destination": str(destination)})
    if plan.misfit:
        reporter.event("warning", {"message": f"the files are laid out anew: {plan.misfit}"})


def _identity(plan: Plan, layout: list[FileLayout]) -> dict[str, str]:
    """What must be the same for a conversion to go on where another ended."""
    request, checkpoint = plan.request, plan.request.checkpoint
    places = [(tensor.name, tensor.dtype, tensor.shape, tensor.begin) for tensor in checkpoint.tensors.values()]
    states = [(name, os.stat(checkpoint.folder / name)) for name in sorted(checkpoint.files)]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    options = (plan.to_right, str(request.dtype), request.quantize, request.use_complement, request.format)
    found = {
        "the source": (str(checkpoint.path.resolve()), places, files),
        "the map": request.map_hash,
        "the config, or a param,": (plan.config_text, sorted((name, repr(v)) for name, v in request.params.items())),
        "an option": (options, plan.side is not None),
        "what mapdsl makes of it": (sorted(plan.units.of_source.items()), sorted(plan.units.of_output.items())),
        "the size of shards": [hashlib.sha256(file.header).hexdigest() for file in layout],
    }
    return {what: hashlib.sha256(repr(value).encode("utf-8")).hexdigest() for what, value in found.items()}


def _write(
    plan: Plan, layout: list[FileLayout], journal: Journal, *, means: Means, reporter: Reporter, wanted: Wanted
) -> dict[str, Any]:
    """The pass over the tensors, into a writer; commits it when all went well. Gives what is not known beforehand."""
    destination = journal.destination
    keeps = plan.to_right and plan.request.use_complement
    kept = SideWriter(destination, journal.folder) if keeps or _keeps_for_now(plan, means, wanted) else None
    means, beside = shared_means(means, wanted, plan)
    try:
        with (
            _writer(plan, layout, journal, reporter) as writer,
            Attendants(wanted, plan, layout, journal, kept, beside) as attendants,
        ):
            config = written_config(plan)
            if config is not None and config.lacks:
                reporter.event("warning", {"message": config.lacks})
            carried = _carry_over(plan, writer, config)
            attendants.start()
            _write_tensors(
                plan, writer, kept, means=means, reporter=reporter, journal=journal, finished=attendants.done
            )
            if kept is not None and keeps:
                _write_side_file(plan, writer, kept)
            writer.commit(check=lambda: attendants.finish(writer, reporter))
    finally:
        if kept is not None:
            kept.close()
        journal.close()
    return {
        "files": writer.weight_files,
        "carried": carried,
        "kept_bytes": kept.nbytes if kept is not None and keeps else None,
        "checksums": wanted.checksums,
        "verified": None if attendants.verified is None else asdict(attendants.verified),
        "edited": dict(plan.adapter.complement.edited),
        "keeps_headers": writer.keeps_headers,
    }


def _keeps_for_now(plan: Plan, means: Means, wanted: Wanted) -> bool:
    """Whether what codecs keep is wanted only to verify what is written."""
    return plan.to_right and wanted.verify and means.ranks is None


def _conversion(
    plan: Plan, layout: list[FileLayout], destination: Path, outcome: Mapping[str, Any], started: float
) -> Conversion:
    """What was planned, and came of it."""
    checkpoint, carried, keeps_headers = plan.request.checkpoint, tuple(outcome["carried"]), outcome["keeps_headers"]
    left, right = plan.request.sides
    return Conversion(
        source=checkpoint.path,
        destination=destination,
        source_side=left if plan.to_right else right,
        target_side=right if plan.to_right else left,
        tensors_read=len(checkpoint.tensors),
        bytes_read=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        tensors_written=sum(len(file.tensors) for file in layout),
        bytes_written=sum(tensor.nbytes for file in layout for tensor in file.tensors),
        files=tuple(outcome["files"]),
        carried=carried,
        left_behind=_left_behind(checkpoint, carried),
        dropped=tuple(plan.dropped),
        kept_bytes=outcome["kept_bytes"],
        edited=outcome["edited"],
        same_layout=None if plan.side is None else plan.restored is not None and keeps_headers,
        misfit=plan.misfit or ("" if keeps_headers else "Distributed Checkpoints have no safetensors headers"),
        config=written_config(plan),
        checksums=outcome["checksums"],
        verified=None if outcome["verified"] is None else Verified.from_json(outcome["verified"]),
        seconds=time.monotonic() - started,
    )


def _writer(plan: Plan, layout: list[FileLayout], journal: Journal, reporter: Reporter) -> CheckpointWriter:
    """The writer for the format that is asked for."""
    if plan.request.format == "dcp":
        from mapdsl.checkpoint.dcp_writer import DcpWriter  # imports torch.distributed

        return DcpWriter(
            journal.destination, layout=layout, journal=journal, beside_bytes=side_file_disk(plan), reporter=reporter
        )
    write_index = plan.restored is None or plan.side is None
    return CheckpointWriter(
        journal.destination,
        layout=layout,
        write_index=write_index,
        journal=journal,
        beside_bytes=side_file_disk(plan),
    )


def _carry_over(plan: Plan, writer: CheckpointWriter, config: ModelConfig | None) -> tuple[str, ...]:
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


def _write_tensors(
    plan: Plan,
    writer: CheckpointWriter,
    kept: SideWriter | None,
    *,
    means: Means,
    reporter: Reporter,
    journal: Journal,
    finished: Done | None,
) -> None:
    """Every tensor to its place, as soon as it is made."""
    total = sum(tensor.nbytes for file in writer.layout for tensor in file.tensors)
    entries = plan.side if plan.side is not None else kept if kept is not None else Forgetful()
    with reporter.meter("writing", total) as meter:
        if means.ranks is not None:
            lead(plan, writer, entries, means, journal=journal, progress=meter)
        else:
            convert_tensors(
                plan,
                writer,
                entries,
                workers=means.workers,
                memory=means.memory,
                progress=meter,
                journal=journal,
                finished=finished,
            )
        if kept is not None and plan.request.use_complement:
            state = Window(plan.request.checkpoint)
            for name in plan.dropped:
                kept.add_stored(name, state[name])
            state.close()
        if plan.side is not None:
            _write_stored(plan.side, writer, meter)


def _write_stored(side: SideFile, writer: CheckpointWriter, meter: Meter) -> None:
    """The tensors that the map dropped, as they were stored."""
    for name in side.stored_names:
        tensor = side.stored(name)
        writer.write(name, tensor)
        meter(tensor.nbytes)


def _write_side_file(plan: Plan, writer: CheckpointWriter, kept: SideWriter) -> None:
    checkpoint, complement = plan.request.checkpoint, plan.adapter.complement
    origin = origin_of(plan, header_texts(checkpoint), _index(checkpoint))
    kept.finish(writer.new_file(SIDE_FILE), origin, complement.found, complement.spelled, complement.decoded)


def _index(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Name and text of the index that the checkpoint was opened by."""
    path = checkpoint.path
    names = [path.name] if not path.is_dir() else os.listdir(path)
    found = [name for name in names if name.endswith(INDEX_SUFFIX)]
    return (found[0], read_text(checkpoint.folder / found[0], "index")) if found else None


def _left_behind(checkpoint: Checkpoint, carried: tuple[str, ...]) -> tuple[str, ...]:
    """What else is there: keys of torch's files that are not the model's; subfolders, other weights, links that lead
    out of a checkpoint that is a folder."""
    if not checkpoint.path.is_dir():
        return checkpoint.left_out
    known = {*checkpoint.files, *carried, "config.json", SIDE_FILE, CHECKSUM_FILE}
    names = [name for name in sorted(os.listdir(checkpoint.path)) if name not in known and not name.endswith(_INDEXES)]
    shown = (f"{name}/" if (checkpoint.path / name).is_dir() else name for name in names if name[0] != ".")
    return (*checkpoint.left_out, *shown)
