"""A whole checkpoint from one side of a map to the other: headers first, then one group of tensors at a time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.attendants import Attendants, Done, Wanted, shared_means
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.completion import check_resumable, finish, is_finished, note_outcome
from mapdsl.checkpoint.engine import convert_tensors
from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.following import Verified
from mapdsl.checkpoint.identity import identity_of
from mapdsl.checkpoint.journal import Journal, units_left_done
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
from mapdsl.checkpoint.other_files import carry_over, index_of, left_behind
from mapdsl.checkpoint.passes import Plan, header_texts, origin_of
from mapdsl.checkpoint.planned import beside_disk, planned_of
from mapdsl.checkpoint.progress import Meter, Report, Reporter, plain
from mapdsl.checkpoint.ranks import Ranks
from mapdsl.checkpoint.sharing import Means, flush_leftovers, help_out, lead
from mapdsl.checkpoint.sidecar import SIDE_FILE, Forgetful, SideFile, SideWriter
from mapdsl.checkpoint.sources import check_destination, open_tensors
from mapdsl.checkpoint.window import Window
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.map import Map


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    `source_side` and `target_side` are the names of the map's sides. `kept_bytes` is the size of what the side file
    keeps (None: none was written); `dropped` are source tensors that the map drops, `edited` counts, by stored name,
    the blocks that were encoded anew. `same_layout` says whether the headers of the checkpoint once read were written
    again (None where there is no side file), `misfit` why not. `left_behind` are names in the source's folder that were
    not carried over, and keys in torch's files of what is not part of the model. `config` is the config.json that was
    written, with what was changed in it, `verified` what was compared, if that was asked for;
    `checksums` says whether those of the tensors were written, `was_complete` that a run that was killed had done all
    of it, and `resume` was only to clean up.
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
    was_complete: bool = False
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        value = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        if value["config"] is not None:
            del value["config"]["text"]  # it lies in the destination
        return value


def convert(
    source: str | os.PathLike[str] | Checkpoint,
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
    """Convert a checkpoint, a folder or a file or one that was opened, into a new folder.

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
    destination = Path(destination)
    was_complete = resume and is_finished(destination)
    if not was_complete:
        if resume:
            check_resumable(destination)
        check_destination(checkpoint, destination)
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
    identity, wanted = identity_of(plan, layout), Wanted(verify, checksums)
    if ranks is not None:
        if resume:
            flush_leftovers(destination)
        ranks.agree(identity)
    if ranks is not None and ranks.rank:
        if not was_complete:
            help_out(plan, layout, destination, means)
        outcome = json.loads(ranks.receive("committed"))
        return _conversion(plan, layout, destination, written_config(plan), outcome, started)
    reporter = Reporter(progress, report)
    done = len(plan.units.members()) if was_complete else units_left_done(destination, identity, resume=resume)
    _tell_plan(plan, layout, destination, means, reporter, wanted, done)
    written = written_config(plan)
    if was_complete:
        outcome = _finished(destination, identity, wanted)
    else:
        journal = Journal(destination, identity, resume=resume, ranks=ranks)
        with journal.telling():
            outcome = _write(plan, layout, written, journal, identity, means=means, reporter=reporter, wanted=wanted)
    if ranks is not None:
        ranks.hand_out("committed", [json.dumps(outcome)] * (ranks.count - 1))
    return _conversion(plan, layout, destination, written, outcome, started)


def _finished(destination: Path, identity: Mapping[str, str], wanted: Wanted) -> dict[str, Any]:
    """What came of a conversion that was complete when it was killed, which then is cleaned up."""
    outcome = finish(destination, identity)
    for what, command, is_lacking in (
        ("verified", "`mapdsl verify` does that", wanted.verify and outcome["verified"] is None),
        ("given checksums", "`mapdsl checksums --write` does that", wanted.checksums and not outcome["checksums"]),
    ):
        if is_lacking:
            raise bad_file(destination, f"the conversion was complete already, and not {what}", command)
    return {**outcome, "was_complete": True}


def _tell_plan(
    plan: Plan,
    layout: list[FileLayout],
    destination: Path,
    means: Means,
    reporter: Reporter,
    wanted: Wanted,
    done: int,
) -> None:
    """What is going to be done, and what may surprise about it."""
    if reporter.report is None:
        return
    beside = beside_disk(plan, verify=wanted.verify and means.ranks is None)
    planned = planned_of(
        plan, layout, workers=means.workers, destination=destination, memory=means.memory, beside=beside
    )
    members = replace(planned, done_units=done).as_json(with_units=False)
    reporter.event("plan", {**members, "destination": str(destination)})
    if plan.misfit:
        reporter.event("warning", {"message": f"the files are laid out anew: {plan.misfit}"})


def _write(
    plan: Plan,
    layout: list[FileLayout],
    config: ModelConfig | None,
    journal: Journal,
    identity: Mapping[str, str],
    *,
    means: Means,
    reporter: Reporter,
    wanted: Wanted,
) -> dict[str, Any]:
    """The pass over the tensors, into a writer; commits it when all went well. Gives what is not known beforehand."""
    destination = journal.destination
    keeps = plan.to_right and plan.request.use_complement
    kept = SideWriter(destination, journal.folder) if keeps or _keeps_for_now(plan, means, wanted) else None
    disk = beside_disk(plan, verify=wanted.verify and means.ranks is None)
    means, beside = shared_means(means, wanted, plan)
    outcome: dict[str, Any] = {}
    try:
        with (
            _writer(plan, layout, journal, reporter, disk) as writer,
            Attendants(wanted, plan, layout, journal, kept, beside) as attendants,
        ):
            if config is not None and config.lacks:
                reporter.event("warning", {"message": config.lacks})
            carried = carry_over(plan, writer, config)
            attendants.start()
            _write_tensors(
                plan, writer, kept, means=means, reporter=reporter, journal=journal, finished=attendants.done
            )
            if kept is not None and keeps:
                _write_side_file(plan, writer, kept)

            def complete() -> None:
                attendants.finish(writer, reporter)
                outcome.update(_outcome(plan, writer, attendants, wanted))
                outcome["carried"] = carried
                outcome["kept_bytes"] = kept.nbytes if kept is not None and keeps else None
                note_outcome(journal.folder, identity, outcome)

            writer.commit(check=complete)
    finally:
        if kept is not None:
            kept.close()
        journal.close()
    return outcome


def _outcome(plan: Plan, writer: CheckpointWriter, attendants: Attendants, wanted: Wanted) -> dict[str, Any]:
    """What is not known beforehand, as JSON has it."""
    return {
        "files": writer.weight_files,
        "checksums": wanted.checksums,
        "verified": None if attendants.verified is None else asdict(attendants.verified),
        "edited": dict(plan.adapter.complement.edited),
        "keeps_headers": writer.keeps_headers,
    }


def _keeps_for_now(plan: Plan, means: Means, wanted: Wanted) -> bool:
    """Whether what codecs keep is wanted only to verify what is written."""
    return plan.to_right and wanted.verify and means.ranks is None


def _conversion(
    plan: Plan,
    layout: list[FileLayout],
    destination: Path,
    config: ModelConfig | None,
    outcome: Mapping[str, Any],
    started: float,
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
        left_behind=left_behind(checkpoint, carried),
        dropped=tuple(plan.dropped),
        kept_bytes=outcome["kept_bytes"],
        edited=outcome["edited"],
        same_layout=None if plan.side is None else plan.restored is not None and keeps_headers,
        misfit=plan.misfit or ("" if keeps_headers else "Distributed Checkpoints have no safetensors headers"),
        config=config,
        checksums=outcome["checksums"],
        was_complete=outcome.get("was_complete", False),
        verified=None if outcome["verified"] is None else Verified.from_json(outcome["verified"]),
        seconds=time.monotonic() - started,
    )


def _writer(
    plan: Plan, layout: list[FileLayout], journal: Journal, reporter: Reporter, beside_bytes: int
) -> CheckpointWriter:
    """The writer for the format that is asked for."""
    if plan.request.format == "dcp":
        from mapdsl.checkpoint.dcp_writer import DcpWriter  # imports torch.distributed

        return DcpWriter(
            journal.destination, layout=layout, journal=journal, beside_bytes=beside_bytes, reporter=reporter
        )
    write_index = plan.restored is None or plan.side is None
    return CheckpointWriter(
        journal.destination,
        layout=layout,
        write_index=write_index,
        journal=journal,
        beside_bytes=beside_bytes,
    )


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
    origin = origin_of(plan, header_texts(checkpoint), index_of(checkpoint))
    kept.finish(writer.new_file(SIDE_FILE), origin, complement.found, complement.spelled, complement.decoded)
