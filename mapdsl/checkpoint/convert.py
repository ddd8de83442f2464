"""A whole checkpoint from one side of a map to the other: headers first, then one group of tensors at a time."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.compare import byte_bar
from mapdsl.checkpoint.direction import choose_plan
from mapdsl.checkpoint.engine import convert_tensors
from mapdsl.checkpoint.files import bad_file, read_text
from mapdsl.checkpoint.journal import Journal
from mapdsl.checkpoint.layout import FileLayout, plan_layout
from mapdsl.checkpoint.passes import OptionError, Plan, Request, float_dtype, header_texts, origin_of, outputs_of
from mapdsl.checkpoint.sidecar import SIDE_FILE, Forgetful, SideFile, SideWriter
from mapdsl.checkpoint.window import Window
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.map import Map, load

_INDEX = ".safetensors.index.json"
_INDEXES = (_INDEX, ".bin.index.json")
FORMATS = ("safetensors", "dcp")
"""What checkpoints are written as."""

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) *(?:([KMGT])(i?)B)?", re.IGNORECASE)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    `source_side` and `target_side` are the names of the map's sides. `kept_bytes` is the size of what the side file
    keeps (None: none was written); `dropped` are source tensors that the map drops, `edited` counts, by stored name,
    the blocks that were encoded anew. `same_layout` says whether the headers of the checkpoint once read were written
    again (None where there is no side file), `misfit` why not. `left_behind` are names in the source's folder that were
    not carried over, and keys in torch's files of what is not part of the model.
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
    seconds: float = 0.0


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
    resume: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a checkpoint, a folder or a file, into a new folder.

    `to` names the side to go to; by default the one whose names the source does not hold. To the right side, decoded
    tensors take `dtype` (bf16), and `mapdsl.complement` is written beside the output, with which the way back gives
    every file again, byte for byte; on that way back, tensors whose values are unchanged get their bytes, others are
    encoded anew. Without that file, or `use_complement`, tensors are written to the left side as they are wherever the
    map allows that, or with `quantize` in the map's first format.

    `config` is that of the left side's checkpoint; by default the one that the side file holds, else the source's
    config.json. It becomes the destination's, the source's other files are copied. `workers` units (tensors, or stacks
    of them) are converted at once, by default as many as torch has threads.

    A destination appears when it is complete. A run that was killed, interrupted, or stopped by the file system leaves
    the hidden folder `.NAME.partial` beside it, with which the same call with `resume` goes on, to the same bytes;
    after any other error nothing is left.

    `format` is that of the files written, `safetensors` or `dcp`, a torch Distributed Checkpoint; that of the source is
    found by itself.

    Raises a MapError: an error of the map, of the checkpoint (codes C and R) or of the file system (C507); an
    OptionError for an option that means nothing for the direction.
    """
    started = time.monotonic()
    request = Request(
        map if isinstance(map, Map) else load(map),
        _opened(source, Path(destination)),
        float_dtype(dtype),
        quantize,
        dict(params or {}),
        config if config is None or isinstance(config, Mapping) else Path(config),
        use_complement,
        _format(format),
    )
    shard_bytes = size_in_bytes(max_shard_size)
    plan = choose_plan(request, to)
    _check_options(plan)
    layout = plan.restored
    if layout is None:
        layout = plan_layout(outputs_of(plan, {}), max_shard_bytes=shard_bytes)
    journal = Journal(Path(destination), _identity(plan, layout), resume=resume)
    workers = workers or torch.get_num_threads()
    return _write(plan, layout, journal, workers=workers, progress=progress, started=started)


def size_in_bytes(text: int | str) -> int:
    """`5GB`, `500 MB`, `2GiB` or a number of bytes; OptionError where it is none of these."""
    found = _SIZE.fullmatch(str(text).strip())
    if found is None:
        raise OptionError(f"a shard's size is a number of bytes, or one such as 500MB or 2GiB, not {str(text)[:80]!r}")
    number, unit, binary = found.groups()
    exponent = " KMGT".index(unit.upper()) if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** exponent)
    if not size:
        raise OptionError("a shard has one byte at least")
    return size


def _opened(source: str | os.PathLike[str], destination: Path) -> Checkpoint:
    """The source's headers; C507 where there is no data, or the destination is in the way of something."""
    checkpoint = open_checkpoint(source)
    if not checkpoint.has_data:
        raise bad_file(checkpoint.path, "a listing has no tensors to convert", advice="give the checkpoint itself")
    if not checkpoint.tensors:
        raise bad_file(checkpoint.path, "the checkpoint holds no tensors")
    if os.path.lexists(destination):
        advice = "choose another destination, or remove this one first"
        raise bad_file(destination, "the destination exists already; nothing is overwritten", advice)
    whole_folder = checkpoint.path.is_dir() or checkpoint.path.name.endswith(_INDEX)
    if whole_folder and destination.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise bad_file(destination, f"the destination lies in the source, {checkpoint.folder}", "choose another place")
    return checkpoint


def _format(name: str) -> str:
    if name not in FORMATS:
        raise OptionError(f"a checkpoint is written as one of {', '.join(FORMATS)}, not {name!r:.80}")
    return name


def _check_options(plan: Plan) -> None:
    left, right = plan.request.sides
    if plan.to_right and plan.request.quantize:
        raise OptionError(f"--quantize is for the way to {left}; this goes to {right}, where nothing is quantised")
    if not plan.to_right and plan.request.dtype is not None:
        raise OptionError(f"--dtype is for the way to {right}, where tensors are decoded; this goes to {left}")


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
        "the size of shards": [hashlib.sha256(file.header).hexdigest() for file in layout],
    }
    return {what: hashlib.sha256(repr(value).encode("utf-8")).hexdigest() for what, value in found.items()}


def _write(
    plan: Plan, layout: list[FileLayout], journal: Journal, *, workers: int, progress: bool, started: float
) -> Conversion:
    """The pass over the tensors, into a writer; commits it when all went well."""
    checkpoint, destination = plan.request.checkpoint, journal.destination
    keeps = plan.to_right and plan.request.use_complement
    kept = SideWriter(destination, journal.folder) if keeps else None
    try:
        with _writer(plan, layout, journal) as writer:
            carried = _carry_over(plan, writer)
            _write_tensors(plan, writer, kept, workers=workers, progress=progress, journal=journal)
            if kept is not None:
                _write_side_file(plan, writer, kept)
            writer.commit()
    finally:
        if kept is not None:
            kept.close()
        journal.close()
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
        files=writer.weight_files,
        carried=carried,
        left_behind=_left_behind(checkpoint, carried),
        dropped=tuple(plan.dropped),
        kept_bytes=kept.nbytes if kept is not None else None,
        edited=dict(plan.adapter.complement.edited),
        same_layout=None if plan.side is None else plan.restored is not None and writer.keeps_headers,
        misfit=plan.misfit or ("" if writer.keeps_headers else "Distributed Checkpoints have no safetensors headers"),
        seconds=time.monotonic() - started,
    )


def _writer(plan: Plan, layout: list[FileLayout], journal: Journal) -> CheckpointWriter:
    """The writer for the format that is asked for."""
    if plan.request.format == "dcp":
        from mapdsl.checkpoint.dcp_writer import DcpWriter  # imports torch.distributed

        return DcpWriter(journal.destination, layout=layout, journal=journal)
    same_index = plan.restored is not None and plan.side is not None
    return CheckpointWriter(journal.destination, layout=layout, write_index=not same_index, journal=journal)


def _carry_over(plan: Plan, writer: CheckpointWriter) -> tuple[str, ...]:
    """Write the files that hold no tensors; gives their names."""
    checkpoint = plan.request.checkpoint
    others = tuple(name for name in checkpoint.other_files if name != SIDE_FILE)
    writer.carry_over(checkpoint, others)
    if plan.config_text is not None:
        writer.write_bytes("config.json", plan.config_text.encode("utf-8"))
    has_index = plan.restored is not None and plan.side is not None and writer.keeps_headers
    if has_index and plan.side is not None and plan.side.origin.index_name is not None:
        writer.write_bytes(plan.side.origin.index_name, plan.side.origin.index_text.encode("utf-8"))
    return (*others, "config.json") if plan.config_text is not None else others


def _write_tensors(
    plan: Plan, writer: CheckpointWriter, kept: SideWriter | None, *, workers: int, progress: bool, journal: Journal
) -> None:
    """Every tensor to its place, as soon as it is made."""
    total = sum(tensor.nbytes for file in writer.layout for tensor in file.tensors)
    entries = plan.side if plan.side is not None else kept if kept is not None else Forgetful()
    with byte_bar(total, progress, "writing") as advance:
        convert_tensors(plan, writer, entries, workers=workers, progress=advance, journal=journal)
        if kept is not None:
            state = Window(plan.request.checkpoint)
            for name in plan.dropped:
                kept.add_stored(name, state[name])
            state.close()
        if plan.side is not None:
            _write_stored(plan.side, writer)


def _write_stored(side: SideFile, writer: CheckpointWriter) -> None:
    """The tensors that the map dropped, as they were stored."""
    for name in side.stored_names:
        writer.write(name, side.stored(name))


def _write_side_file(plan: Plan, writer: CheckpointWriter, kept: SideWriter) -> None:
    checkpoint, complement = plan.request.checkpoint, plan.adapter.complement
    origin = origin_of(plan, header_texts(checkpoint), _index(checkpoint))
    kept.finish(writer.new_file(SIDE_FILE), origin, complement.found, complement.spelled, complement.decoded)


def _index(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Name and text of the index that the checkpoint was opened by."""
    path = checkpoint.path
    names = [path.name] if not path.is_dir() else os.listdir(path)
    found = [name for name in names if name.endswith(_INDEX)]
    return (found[0], read_text(checkpoint.folder / found[0], "index")) if found else None


def _left_behind(checkpoint: Checkpoint, carried: tuple[str, ...]) -> tuple[str, ...]:
    """What else is there: keys of torch's files that are not the model's; subfolders, other weights, links that lead
    out of a checkpoint that is a folder."""
    if not checkpoint.path.is_dir():
        return checkpoint.left_out
    known = {*checkpoint.files, *carried, "config.json", SIDE_FILE}
    names = [name for name in sorted(os.listdir(checkpoint.path)) if name not in known and not name.endswith(_INDEXES)]
    shown = (f"{name}/" if (checkpoint.path / name).is_dir() else name for name in names if name[0] != ".")
    return (*checkpoint.left_out, *shown)
