"""`mapdsl check`: everything that is proved of maps without a tensor, and of checkpoints by their headers."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mapdsl.cli.inputs import FILE_HELP, add_config, params_of, read_config
from mapdsl.cli.output import escaped, paint, rendered, say, say_json
from mapdsl.cli.rank_options import add_counts, by_mesh

if TYPE_CHECKING:
    from mapdsl.checkpoint.checkpoint import Checkpoint
    from mapdsl.compiler.check import Checked
    from mapdsl.language.diagnostics import Diagnostic


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "check",
        help="prove that maps hold, alone, under a config, or against a checkpoint",
        description="Prove that maps hold: every name has one reader and one writer, no axis is lost, every size "
        "follows. Nothing but text and headers is read.",
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help=FILE_HELP)
    add_config(parser)
    against = "a checkpoint of the stored side: a folder, an index, a weight file, or a listing (`mapdsl snapshot`)"
    parser.add_argument("--against", metavar="CKPT", help=against)
    ranks = "so many ranks of a mesh, under a config: does every axis divide over them, and is every block of a format "
    ranks += "left whole? Once for each mesh"
    add_counts(parser, ranks)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


@dataclass
class _Result:
    """What was found of one file, and the sentences that hold where there is no error."""

    file: str
    diagnostics: list[Diagnostic] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    rules: int | None = None

    @property
    def errors(self) -> int:
        return sum(d.severity == "error" for d in self.diagnostics)


def run(arguments: argparse.Namespace) -> int:
    """Check every file; 1 if one of them has an error."""
    from mapdsl.language.diagnostics import MapError

    params, ranks = params_of(arguments), by_mesh(arguments)
    config = read_config(arguments.config) if arguments.config is not None else None
    checkpoint = _open(arguments.against, config) if arguments.against is not None else None
    results = []
    for file in arguments.files:
        result = _Result(file)
        try:
            checked = _check(file, result, config, checkpoint, params, has_params=bool(arguments.param))
            if ranks:
                known = config if checkpoint is None else checkpoint.config
                _check_ranks(checked, result, known, params, ranks)
        except MapError as problem:
            result.diagnostics += problem.diagnostics
        results.append(result)
        if not arguments.json:
            _show(result)
    failed = any(result.errors for result in results)
    if arguments.json:
        say_json({"ok": not failed, "files": [_as_json(result) for result in results]})
    return int(failed)


def _open(path: str, config: dict[str, Any] | None) -> Checkpoint:
    """The checkpoint to hold maps against; a config that is given goes before its own."""
    from mapdsl.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    return checkpoint if config is None else dataclasses.replace(checkpoint, config=config)


def _check(
    file: str,
    result: _Result,
    config: dict[str, Any] | None,
    checkpoint: Checkpoint | None,
    params: dict[str, Any],
    *,
    has_params: bool,
) -> Checked:
    """Fill the result, and give the map; MapError where the map, or what it is held against, has errors."""
    from mapdsl.map import load

    loaded = load(file)
    result.file = loaded.source.path
    checked = loaded.checked
    result.diagnostics += checked.diagnostics
    result.rules = len(checked.map.rules)
    result.facts.append(_verdict(checked))
    if checkpoint is not None:
        from mapdsl.checkpoint.against import check_against

        found, summary = check_against(checked, checkpoint, params)
        result.diagnostics += found
        result.facts.append(f"{checkpoint.path}: {summary.text()}")
    elif config is not None or has_params:
        from mapdsl.compiler.expand import expand, param_values

        expansion = expand(checked, param_values(checked, config, params))
        counts = [_count(len(expansion.keys(side)), name) for side, name in _sides(checked)]
        result.facts.append(f"this config has {' and '.join(counts)}")
    return checked


def _check_ranks(
    checked: Checked, result: _Result, config: dict[str, Any] | None, params: dict[str, Any], ranks: dict[str, int]
) -> None:
    """Cut the map over ranks; MapError where its params have no values, or it has no such mesh."""
    from mapdsl.compiler.expand import expand, param_values
    from mapdsl.compiler.sharding import Sharding

    sharding = Sharding(expand(checked, param_values(checked, config, params)), ranks)
    result.diagnostics += sharding.problems()
    over = " x ".join(f"{count} ranks of {mesh}" for mesh, count in ranks.items())
    for side, name in _sides(checked):
        counted = sharding.count(side)
        result.facts.append(f"over {over}: {_count(counted.divided, name)} divided, {counted.whole:,} on every rank")
    if unknown := sharding.unknown():
        names = ", ".join(f"`{name}`" for name in unknown)
        result.facts.append(f"not checked, as neither map nor config says the size: {names}")


def _verdict(checked: Checked) -> str:
    """`44 rules hold: 51 hf names, 50 native names, no two alike`; a name here is a template of any number of names."""
    rules = checked.map.rules
    names = [_count(sum(len(rule.side(side)) for rule in rules), name) for side, name in _sides(checked)]
    count = "1 rule holds" if len(rules) == 1 else f"{len(rules)} rules hold"
    return f"{count}: {', '.join(names)}, no two alike"


def _count(number: int, side: str) -> str:
    return f"{number:,} {side} name{'s' * (number != 1)}"


def _sides(checked: Checked) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("left", checked.map.left), ("right", checked.map.right)


def _show(result: _Result) -> None:
    from mapdsl.language.diagnostics import ordered

    for diagnostic in ordered(result.diagnostics):
        say(rendered(diagnostic) + "\n")
    file = escaped(result.file)
    if result.errors:
        say(paint(f"{file}: {_counts(result.diagnostics)}", "error"))
        return
    first, *rest = result.facts
    notes = _counts(result.diagnostics)
    say(paint(f"{file}: {escaped(first)}", "good") + (f" ({notes})" if notes else ""))
    for fact in rest:
        say(f"  {escaped(fact)}")


def _counts(diagnostics: list[Diagnostic]) -> str:
    """`2 errors, 1 lint`."""
    found = []
    for severity in ("error", "warning", "lint"):
        count = sum(d.severity == severity for d in dict.fromkeys(diagnostics))
        if count:
            found.append(f"{count} {severity}{'s' * (count > 1)}")
    return ", ".join(found)


def _as_json(result: _Result) -> dict[str, Any]:
    from mapdsl.language.diagnostics import ordered

    return {
        "file": result.file,
        "ok": not result.errors,
        "rules": result.rules,
        "facts": result.facts if not result.errors else [],
        "diagnostics": [d.as_json() for d in ordered(result.diagnostics)],
    }
