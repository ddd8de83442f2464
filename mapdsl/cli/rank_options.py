"""Options that say over how many ranks the meshes of a map cut it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mapdsl.cli.output import UsageError, escaped

LAYOUTS = ("megatron", "deepspeed", "ds_inference")
"""Files of ranks that others read, as `mapdsl.checkpoint.rank_layouts` has them (which needs torch)."""

MESHES = ("tp", "ep", "pp")
"""Meshes that have options of their own, as most maps call them; others are given by name."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,4}")
_Value = TypeVar("_Value")


def add_counts(parser: argparse.ArgumentParser, what: str) -> None:
    """`--tp 4`, `--ranks MESH=4`."""
    parser.add_argument("--ranks", metavar="MESH=N", type=_named(_count), action="append", default=[], help=what)
    for mesh in MESHES:
        parser.add_argument(f"--{mesh}", metavar="N", type=_count, help=f"short for --ranks {mesh}=N")


def add_moves(parser: argparse.ArgumentParser) -> None:
    """`--tp 2:8`, `--ranks MESH=2:8`, `--no-compare`."""
    what = "so many ranks of a mesh hold SRC, so many are to hold DST: see docs/parallelism.md. Once for each mesh"
    parser.add_argument("--ranks", metavar="MESH=N:M", type=_named(_move), action="append", default=[], help=what)
    for mesh in MESHES:
        parser.add_argument(f"--{mesh}", metavar="N:M", type=_move, help=f"short for --ranks {mesh}=N:M")
    files = "write the files of ranks as others want them: see docs/parallelism.md (default: a folder for each rank)"
    parser.add_argument("--layout", choices=LAYOUTS, help=files)
    compare = "take the first rank's copy of what several ranks hold, and do not compare it with the others"
    parser.add_argument("--no-compare", action="store_true", help=compare)


def add_rank(parser: argparse.ArgumentParser) -> None:
    """`--rank 2`, `--rank tp=2`."""
    held = "the place of one rank in a mesh, from 0 (0): what does it hold? Once for each mesh; R alone of the only one"
    parser.add_argument("--rank", metavar="[MESH=]R", type=_place, action="append", default=[], help=held)


def by_mesh(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options say of each mesh; UsageError where they say two things of one."""
    own = [(mesh, value) for mesh in MESHES if (value := getattr(arguments, mesh)) is not None]
    return once([*arguments.ranks, *own], "--ranks")


def places_of(arguments: argparse.Namespace, ranks: dict[str, int]) -> dict[str, int]:
    """The place of the rank that is asked for in each mesh; UsageError for one that there is not."""
    named = []
    for mesh, place in arguments.rank:
        if not mesh and len(ranks) != 1:
            raise UsageError(f"--rank {place} names no mesh (--rank MESH={place}), and {len(ranks)} are cut")
        named.append((mesh or next(iter(ranks)), place))
    places = once(named, "--rank")
    for mesh, place in places.items():
        if place >= ranks.get(mesh, 1):
            raise UsageError(f"--rank {mesh}={place} is none of {ranks.get(mesh, 1)} (--ranks {mesh}=N says how many)")
    return places


def once(given: Iterable[tuple[str, _Value]], option: str) -> dict[str, _Value]:
    """What an option says of each mesh; UsageError where it says two things of one."""
    listed = list(given)
    found = dict(listed)
    if len(found) < len(listed):
        raise UsageError(f"{option} gives one mesh twice")
    return found


def _named(value_of: Callable[[str], _Value]) -> Callable[[str], tuple[str, _Value]]:
    """What reads `MESH=VALUE`."""

    def read(text: str) -> tuple[str, _Value]:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals):
            raise argparse.ArgumentTypeError(f"expected the name of a mesh, `=` and a number, found {escaped(text)!r}")
        return name.strip(), value_of(value)

    return read


def _count(text: str) -> int:
    return _number(text, 1, "N from 1 to 99999", text)


def _move(text: str) -> tuple[int, int]:
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"expected N:M, from so many ranks to so many, found {escaped(text)!r}")
    expected = "N:M with numbers from 1 to 99999"
    return _number(before, 1, expected, text), _number(after, 1, expected, text)


def _place(text: str) -> tuple[str, int]:
    name, equals, value = text.rpartition("=")
    if equals and not name.strip():
        raise argparse.ArgumentTypeError(f"expected MESH=R, found {escaped(text)!r}")
    return name.strip(), _number(value, 0, "MESH=R with R from 0 on", text)


def _number(digits: str, least: int, expected: str, text: str) -> int:
    """A number in the text of an option."""
    if not _NUMBER.fullmatch(digits) or int(digits) < least:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {escaped(text)!r}")
    return int(digits)
