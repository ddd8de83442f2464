"""What commands read: maps, configs, checkpoints and params, from the words of the command line."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapdsl.cli.output import UsageError, escaped

if TYPE_CHECKING:
    from mapdsl.compiler.check import Checked

FILE_HELP = "a .map file, or the name of a shipped map (`mapdsl maps` lists them)"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]{1,300})?(e[+-]?[0-9]{1,3})?", re.IGNORECASE)


def add_config(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The options `--config C` and `--param P=V`."""
    where = "config.json of the stored side's checkpoint, or the folder that holds it"
    parser.add_argument("--config", metavar="C", required=required, help=where)
    parser.add_argument(
        "--param",
        metavar="P=V",
        type=assignment,
        action="append",
        default=[],
        help="a param of the map; wins over the config. V is an integer, true, false, a string or a JSON list",
    )


def assignment(text: str) -> tuple[str, Any]:
    """`P=V` as a name and a value; ArgumentTypeError where it is neither."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"expected P=V, found {escaped(text)!r}")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if number := _NUMBER.fullmatch(text):
        return float(text) if number[2] or number[3] else int(text)
    if text[:1] not in ("[", '"'):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{escaped(text)} begins like JSON, but is none") from None
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (bool, int, float, str)) for item in items):
        raise argparse.ArgumentTypeError(f"a list holds numbers, strings, true and false: {escaped(text)}")
    return value


def params_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The params given with `--param`; UsageError where one is given two values."""
    params: dict[str, Any] = {}
    for name, value in arguments.param:
        if name in params and repr(params[name]) != repr(value):
            raise UsageError(f"--param gives `{escaped(name)}` twice: {params[name]!r} and {value!r}")
        params[name] = value
    return params


def read_config(path: str) -> dict[str, Any]:
    """The fields of a config.json, or of that in a folder; MapError, C507, where it cannot be read."""
    from mapdsl.checkpoint.files import read_object

    place = Path(path)
    return read_object(place / "config.json" if _is_folder(place) else place, "config", lenient=True)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file system takes; reading it will say so
        return False


def values_of(checked: Checked, arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of all params of a map under `--config` and `--param`; MapError where one has none."""
    from mapdsl.compiler.expand import param_values

    config = read_config(arguments.config) if arguments.config is not None else None
    return param_values(checked, config, params_of(arguments))
