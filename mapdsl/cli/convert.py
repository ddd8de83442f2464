"""`mapdsl convert`: a whole checkpoint from one side of a map to the other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mapdsl.cli.inputs import FILE_HELP, add_config, params_of
from mapdsl.cli.output import UsageError, complain, escaped, paint, say

if TYPE_CHECKING:
    from mapdsl.checkpoint.convert import Conversion

_SHOWN = 4
SOURCE_HELP = "a folder of safetensors, pytorch_model.bin or a torch Distributed Checkpoint; an index; a .safetensors, "
SOURCE_HELP += ".pt, .pth or .bin file (read with weights_only=True)"
SHARD_HELP = "the latter needs one more shard of disk space while it is written"


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint",
        description="Convert a checkpoint from one side of a map to the other, into a new folder. "
        "What a conversion to the right side loses is kept there in mapdsl.complement, so that the way back gives the "
        "same files, byte for byte. Other files beside the weights are copied, but for hidden ones and sub-folders. "
        "Nothing is overwritten, and nothing half-written is left behind.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    parser.add_argument("--map", metavar="MAP", required=True, help=FILE_HELP)
    parser.add_argument("--to", metavar="SIDE", help="the side to go to; by default the one that SRC is not")
    dtype = "to the right side: of the tensors that are decoded there (bf16); the others keep their own. To the left "
    dtype += "side it is refused: tensors are encoded as they were, in the map's formats, or not at all"
    parser.add_argument("--dtype", choices=("bf16", "f32", "f16"), help=dtype)
    quantize = "write the stored side in the map's formats although there is no side file to say which"
    parser.add_argument("--quantize", action="store_true", help=quantize)
    add_config(parser)
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="500MB, 2GiB, or bytes (5GB)")
    written = "of what is written: safetensors shards with an index, or a torch Distributed Checkpoint (safetensors); "
    parser.add_argument("--format", choices=("safetensors", "dcp"), default="safetensors", help=written + SHARD_HELP)
    workers = "tensors, or stacks of them, that are converted at once (one a core)"
    parser.add_argument("--workers", metavar="N", type=int, help=workers)
    resume = "go on with a run to DST that was killed, interrupted, or stopped by a full disk"
    parser.add_argument("--resume", action="store_true", help=resume)
    complement = "write no mapdsl.complement; on the way back, take no notice of it"
    parser.add_argument("--no-complement", action="store_true", help=complement)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and tell what was done."""
    import signal

    from mapdsl.checkpoint.convert import convert
    from mapdsl.checkpoint.passes import OptionError

    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError("--workers is 1 or more")
    params = params_of(arguments)
    previous = signal.signal(signal.SIGTERM, _leave)  # so that what is half written is removed
    try:
        done = convert(
            arguments.source,
            arguments.destination,
            arguments.map,
            to=arguments.to,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            params=params,
            config=arguments.config,
            max_shard_size=arguments.max_shard_size,
            use_complement=not arguments.no_complement,
            workers=arguments.workers,
            resume=arguments.resume,
            format=arguments.format,
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
    except OptionError as problem:
        raise UsageError(escaped(str(problem))) from None
    except (KeyboardInterrupt, SystemExit):
        from mapdsl.checkpoint.journal import partial_folder

        if partial_folder(Path(arguments.destination)).exists():
            complain("what is done is kept: the same command with --resume goes on")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    for line in story(done):
        say(line)
    return 0


def _leave(number: int, frame: object) -> NoReturn:
    del frame
    sys.exit(128 + number)


def story(done: Conversion) -> list[str]:
    """What a conversion did, a line a fact."""
    lines = [paint(f"{done.source_side} -> {done.target_side}: {escaped(str(done.destination))}", "good")]
    read, written = _amount(done.tensors_read, done.bytes_read), _amount(done.tensors_written, done.bytes_written)
    files = f"{len(done.files)} file{'s' * (len(done.files) > 1)}"
    lines.append(f"  {read} read, {written} written to {files}, in {done.seconds:.1f} s")
    if done.carried:
        lines.append(f"  carried over: {_some(done.carried)}")
    if done.left_behind:
        lines.append(f"  left behind: {_some(done.left_behind)}")
    if done.dropped:
        kept = "" if done.kept_bytes is None else ", kept for the way back"
        lines.append(f"  dropped by the map{kept}: {_some(done.dropped)}")
    if done.kept_bytes is not None:
        kept = f"{human(done.kept_bytes)} and the" if done.kept_bytes else "the"
        lines.append(f"  mapdsl.complement keeps {kept} layout of the files for the way back")
    if done.same_layout:
        lines.append("  the files have the names and headers of the checkpoint that was read")
    elif done.same_layout is False:
        lines.append(paint(f"  the files are laid out anew: {escaped(done.misfit)}", "warning"))
    if done.edited:
        count = sum(done.edited.values())
        blocks = "1 block was" if count == 1 else f"{count:,} blocks were"
        lines.append(f"  edited: {blocks} encoded anew, in {_some(tuple(done.edited))}")
    return lines


def human(count: int) -> str:
    """A number of bytes for people: `1.5 GB`."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _amount(tensors: int, size: int) -> str:
    return f"{tensors:,} tensor{'s' * (tensors != 1)} ({human(size)})"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(escaped(name) for name in names[:_SHOWN]) + more
