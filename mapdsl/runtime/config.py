"""Values of params: from what the caller gives, else from the checkpoint's config, else from the map's default."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mapdsl.runtime.errors import ConversionError

# No released model comes near; a larger count is a broken config and would only loop for hours.
MAX_COUNT = 10_000_000


class Config:
    """The config of the left side's checkpoint, with params that the caller gave on top."""

    def __init__(self, config: Any, params: Mapping[str, Any]) -> None:
        self.fields = read_config(config)
        self.given = dict(params)
        self.used: set[str] = set()

    def field(self, path: str) -> Any:
        """A field of the config by its dotted path; N115 where it is absent or null."""
        value: Any = self.fields
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
            if value is None:
                raise ConversionError("N115", f"the config has no `{path}`; give it, or the param that needs it")
        return value

    def param(self, name: str, *options: Callable[[], Any]) -> Any:
        """The value of a param: given by the caller, else the first option that is not absent."""
        self.used.add(name)
        if name in self.given:
            return checked(name, self.given[name])
        for option in options[:-1]:
            try:
                return checked(name, option())
            except ConversionError as err:
                if err.code != "N115":
                    raise
        return checked(name, options[-1]())

    def finish(self) -> None:
        """Refuse params that the map does not have."""
        if unknown := sorted(set(self.given) - self.used):
            raise ConversionError("N111", f"this map has no param `{unknown[0]}`; it has {', '.join(sorted(self.used))}")


def checked(name: str, value: Any) -> Any:
    """A param's value if it is of a kind that params may be: integer from 0, boolean, string, list, or a number."""
    if isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        if not 0 <= value <= MAX_COUNT:
            raise ConversionError("C505", f"`{name}` is {value}; expected an integer from 0 to {MAX_COUNT}")
        return value
    if isinstance(value, (list, tuple)):
        return list(value)
    raise ConversionError("C505", f"`{name}` is a {type(value).__name__}; expected an integer, boolean, string or list")


def read_config(config: Any) -> Any:
    """A config as given: a mapping, any object with the fields, or the path of a config.json or of its folder."""
    if not isinstance(config, (str, os.PathLike)):
        return {} if config is None else config
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ConversionError("C505", f"{path} cannot be read as a config: {err}") from None
    if not isinstance(fields, dict):
        raise ConversionError("C505", f"{path} is no JSON object")
    return fields
