"""`mapdsl explain`: where one tensor comes from and goes to, or what an error code means."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mapdsl.cli.inputs import FILE_HELP, add_config, values_of
from mapdsl.cli.output import UsageError, escaped, paint, say
from mapdsl.cli.rank_options import add_counts, add_rank, by_mesh, places_of

if TYPE_CHECKING:
    from mapdsl.explain.shares import Rank
    from mapdsl.explain.text import Explanation
    from mapdsl.language.diagnostics import MapError


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "explain",
        help="tell where one tensor comes from and goes to, or what an error code means",
        usage="%(prog)s [-h] [--config C] [--param P=V] [--tp N] [--ranks MESH=N] [--rank R] FILE NAME\n"
        "       %(prog)s [-h] CODE",
        description="Tell where one tensor of a map comes from and goes to: its rule, the indices, the slices, the "
        "formats and what a round trip promises. Or what an error code means: a map that has it, why, and the map "
        "mended.",
        allow_abbrev=False,
    )
    parser.add_argument("subject", metavar="FILE", help=f"{FILE_HELP}; or an error code such as K202")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a tensor's name, of either side")
    add_config(parser)
    add_counts(parser, "so many ranks of a mesh. Once for each mesh")
    add_rank(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation."""
    if arguments.name is None:
        return _explain_code(arguments)
    from mapdsl.explain.text import explanations
    from mapdsl.explain.trace import trace
    from mapdsl.map import load

    checked = load(arguments.subject).checked
    has_config = arguments.config is not None or bool(arguments.param)
    params = values_of(checked, arguments) if has_config else None
    rank = _rank(checked, arguments, params)
    found = trace(checked, arguments.name, params)
    if not found.readings and not found.shut:
        raise _unknown(checked, arguments)
    for number, explanation in enumerate(explanations(checked, found, params, rank)):
        if number:
            say()
        _show(explanation)
    return 0 if found.readings else 1


def _rank(checked: Any, arguments: argparse.Namespace, params: dict[str, Any] | None) -> Rank | None:
    """The rank that is asked for; MapError where the map cannot be cut so."""
    ranks = by_mesh(arguments)
    places = places_of(arguments, ranks)
    if not ranks:
        return None
    from mapdsl.compiler.expand import expand, param_values
    from mapdsl.compiler.sharding import Sharding
    from mapdsl.explain.shares import Rank
    from mapdsl.language.diagnostics import MapError

    sharding = Sharding(expand(checked, param_values(checked, None, {}) if params is None else params), ranks)
    if uneven := [problem for problem in sharding.problems() if problem.code == "P453"]:
        raise MapError(uneven)
    return Rank(sharding, places)


def _show(explanation: Explanation) -> None:
    say(paint(escaped(explanation.title), "bold"))
    width = max(len(label) for label, _ in explanation.lines)
    for label, text in explanation.lines:
        say(f"  {label.ljust(width)}  {escaped(text)}")


def _unknown(checked: Any, arguments: argparse.Namespace) -> MapError:
    """No rule has the name; the nearest templates may help."""
    from mapdsl.explain.nearest import nearest
    from mapdsl.language.diagnostics import error

    near = nearest(checked, arguments.name)
    message = f"no rule of this map reads or makes `{arguments.name}`"
    return error("C501", message, subject=checked.map.file.source.path, help="near: " + ", ".join(near) if near else "")


def _explain_code(arguments: argparse.Namespace) -> int:
    from mapdsl.explain.pages import read_page
    from mapdsl.language.catalogue import CATALOGUE

    subject = arguments.subject
    by_name = {entry.name: code for code, entry in CATALOGUE.items()}
    code = by_name.get(subject, subject.upper())
    if code in CATALOGUE:
        say(read_page(code).text.rstrip("\n"))
        return 0
    raise UsageError(f"`{escaped(subject)}` is no error code; for a tensor of a map, give FILE and NAME")
