"""The options that `convert`, `plan` and `verify` share: what they say, and what they are to the functions behind."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from mapdsl.cli.inputs import FILE_HELP, add_config, params_of
from mapdsl.cli.output import UsageError, escaped, say, say_json


class _Found(Protocol):
    """What a comparison has found."""

    def as_json(self) -> dict[str, Any]: ...


_Comparison = TypeVar("_Comparison", bound=_Found)

SOURCE_HELP = "a folder of safetensors, pytorch_model.bin or a torch Distributed Checkpoint; an .index.json; a "
SOURCE_HELP += ".safetensors, .pt, .pth or .bin file (read with weights_only=True)"


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """What is converted, and which way: the options by which a conversion is the same to all three commands."""
    parser.add_argument("--map", metavar="MAP", required=True, help=FILE_HELP)
    sides = "the side to convert to, by its name in the map (default: the one whose names SRC does not have)"
    parser.add_argument("--to", metavar="SIDE", help=sides)
    dtype = "the dtype of decoded tensors (default: bf16); others keep theirs. Only on the way to the right side"
    parser.add_argument("--dtype", choices=("bf16", "f32", "f16"), help=dtype)
    quantize = "quantise in the map's formats where SRC has no mapdsl.complement. Only on the way to the left side"
    parser.add_argument("--quantize", action="store_true", help=quantize)
    add_config(parser)
    complement = "do without mapdsl.complement: write none, and take no notice of one that is there"
    parser.add_argument("--no-complement", action="store_true", help=complement)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """How the output is written, and with what means: options of `convert`, which `plan` accounts for."""
    size = "the largest size of an output file, but where one tensor is larger: 500MB, 2GiB, or bytes (default: 5GB)"
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help=size)
    written = "write safetensors with an index, or a torch Distributed Checkpoint (default: safetensors); the latter "
    written += "needs disk space for one more shard while it is written"
    parser.add_argument("--format", choices=("safetensors", "dcp"), default="safetensors", help=written)
    workers = "how many tensors, or stacks of them, are converted at once (default: one a core; under torchrun, which "
    workers += "divides a conversion over processes, those of each)"
    parser.add_argument("--workers", metavar="N", type=int, help=workers)
    memory = "the memory of tensors being made, of all workers: 500MB, 2GiB, or bytes (default: 2GiB, or what the "
    memory += "largest needs). Files that are mapped and torch itself come on top; see docs/checkpoints.md"
    parser.add_argument("--memory", metavar="SIZE", help=memory)
    verify = "read what is written, convert it back, and compare it with SRC, before DST takes its name"
    parser.add_argument("--verify", action="store_true", help=verify)
    checksums = "write the SHA-256 of every tensor to DST/mapdsl.checksums.json; `mapdsl checksums` compares them"
    parser.add_argument("--checksums", action="store_true", help=checksums)
    resume = "go on with a conversion to DST that was killed, interrupted, or stopped by a full disk"
    parser.add_argument("--resume", action="store_true", help=resume)


def add_report_options(parser: argparse.ArgumentParser, *, quiet: str, json: str) -> None:
    """How a command tells of what it does."""
    parser.add_argument("--quiet", action="store_true", help=quiet)
    parser.add_argument("--json", action="store_true", help=json)


def tell(
    arguments: argparse.Namespace,
    found: _Comparison,
    story: Callable[[_Comparison], Iterable[str]],
    *,
    is_fine: bool,
) -> int:
    """Tell what a comparison has found, as `add_report_options` was told to; gives the exit status."""
    if arguments.json:
        say_json(found.as_json())
    elif not (arguments.quiet and is_fine):
        for line in story(found):
            say(line)
    return int(not is_fine)


def conversion_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_conversion_options` has read, but for the map, as keyword arguments."""
    return {
        "to": arguments.to,
        "dtype": arguments.dtype,
        "quantize": arguments.quantize,
        "params": params_of(arguments),
        "config": arguments.config,
        "use_complement": not arguments.no_complement,
    }


def output_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_output_options` has read, as keyword arguments."""
    return {
        "max_shard_size": arguments.max_shard_size,
        "format": arguments.format,
        "workers": arguments.workers,
        "memory": arguments.memory,
        "resume": arguments.resume,
        "verify": arguments.verify,
    }


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns options that mean nothing for the conversion into a usage error: exit status 2."""
    from mapdsl.checkpoint.passes import OptionError

    try:
        yield
    except OptionError as problem:
        raise UsageError(escaped(str(problem))) from None
