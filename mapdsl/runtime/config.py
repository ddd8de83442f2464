"""Values of params: from what the caller gives, else from the checkpoint's config, else from the map's default."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.items import Items

# No released model comes near; a larger count is a broken config and would only loop for hours.
MAX_COUNT = 1_000_000
MAX_SIZE = 2**40


class UndecidedError(ConversionError):
    """A param depends on what a checkpoint holds, and none was read yet."""


class Undecided:
    """Stands for such a param: to ask it is an error, to have it is none."""

    def __init__(self, error: UndecidedError) -> None:
        self.error = error

    def __bool__(self) -> bool:
        raise UndecidedError(self.error.code, self.error.message)

    def __eq__(self, other: object) -> bool:
        return bool(self)

    __hash__ = None  # type: ignore[assignment]


class Config:
    """The config of the left side's checkpoint, with params that the caller gave on top.

    Params are asked for by what the map uses them as: `count` (how many of something there are), `size` (of an axis),
    `number` (to compute or compare with), `real` (a fraction too), `flag`, `items` (a list), `numbers` (a list of
    such), `table` (a list of distinct numbers), or `param` where it does not matter.
    """

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
        if isinstance(value, int) and value < 0:  # maps are proved for integers from 0
            raise ConversionError("C505", f"the config's `{path}` is {shown(value)}; expected an integer from 0")
        return value

    def param(self, name: str, *options: Callable[[], Any]) -> Any:
        """The value of a param: given by the caller, else the first option that is not absent."""
        self.used.add(name)
        if name in self.given:
            return checked(name, self.given[name])
        for option in options[:-1]:
            try:
                return checked(name, evaluated(name, option))
            except ConversionError as err:
                if err.code != "N115":
                    raise
        try:
            return checked(name, evaluated(name, options[-1]))
        except UndecidedError as err:
            return Undecided(err)

    def count(self, name: str, *options: Callable[[], Any]) -> Any:
        """How many layers or experts there are: an integer, and not more than any model has."""
        return self._integer(name, options, MAX_COUNT)

    def size(self, name: str, *options: Callable[[], Any]) -> Any:
        """The size of an axis, or what one is computed from: an integer."""
        return self._integer(name, options, MAX_SIZE)

    def number(self, name: str, *options: Callable[[], Any]) -> Any:
        """An integer that is computed or compared with: a map is not proved for fractions."""
        return self._integer(name, options, MAX_SIZE)

    def real(self, name: str, *options: Callable[[], Any]) -> Any:
        """An integer or a float."""
        value = self.param(name, *options)
        return self._of_kind(name, value, isinstance(value, (int, float)) and not isinstance(value, bool), "a number")

    def flag(self, name: str, *options: Callable[[], Any]) -> Any:
        """True or false."""
        value = self.param(name, *options)
        return self._of_kind(name, value, isinstance(value, bool), "true or false")

    def items(self, name: str, *options: Callable[[], Any]) -> Any:
        """A list of anything."""
        value = self.param(name, *options)
        return self._of_kind(name, value, isinstance(value, Items), "a list")

    def numbers(self, name: str, *options: Callable[[], Any]) -> Any:
        """A list of integers; elements may be null where they are not asked for."""
        values = self.items(name, *options)
        for place, value in enumerate([] if isinstance(values, Undecided) else values):
            fits = value is None or (isinstance(value, int) and not isinstance(value, bool))
            self._of_kind(f"{name}[{place}]", value, fits, "an integer")
        return values

    def table(self, name: str, *options: Callable[[], Any]) -> Any:
        """A list of numbers that stand in names: integers from 0, each once."""
        values = self.items(name, *options)
        seen: dict[int, int] = {}
        for place, value in enumerate([] if isinstance(values, Undecided) else values):
            self._of_kind(f"{name}[{place}]", value, type(value) is int and value >= 0, "an integer from 0")
            if value in seen:
                message = (
                    f"`{name}` holds {value} twice, at {seen[value]} and {place}, so two tensors would have one name"
                )
                raise ConversionError("C505", message)
            seen[value] = place
        return values

    def limit(self, index: str, count: int) -> None:
        """Refuse the range of an index that would take hours to go through."""
        if count > MAX_COUNT:
            raise ConversionError(
                "C505", f"`{index}` would go through {count:,} values; at most {MAX_COUNT:,} make sense"
            )

    def finish(self) -> None:
        """Refuse params that the map does not have."""
        if unknown := sorted(set(self.given) - self.used):
            raise ConversionError(
                "N111", f"this map has no param `{unknown[0]}`; it has {', '.join(sorted(self.used))}"
            )

    def _integer(self, name: str, options: tuple[Callable[[], Any], ...], most: int) -> Any:
        value = self.param(name, *options)
        self._of_kind(name, value, isinstance(value, int) and not isinstance(value, bool), "an integer")
        if isinstance(value, int) and value > most:
            raise ConversionError("C505", f"`{name}` is {value:,}; expected an integer from 0 to {most:,}")
        return value

    def _of_kind(self, name: str, value: Any, fits: bool, kind: str) -> Any:
        if not fits and not isinstance(value, Undecided):
            raise ConversionError("N118", f"`{name}` is {shown(value)}; expected {kind}")
        return value


def checked(name: str, value: Any) -> Any:
    """A param's value if it is of a kind that params may be: integer from 0, boolean, string, list, or a number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConversionError("C505", f"`{name}` is {value}; expected a number")
    if isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        if not 0 <= value <= MAX_SIZE:
            raise ConversionError("C505", f"`{name}` is {shown(value)}; expected an integer from 0 to {MAX_SIZE:,}")
        return value
    if isinstance(value, (list, tuple)):
        return Items(name, value)
    if value is None:
        raise ConversionError("N115", f"`{name}` is null; give it, or the field that it follows from")
    raise ConversionError("C505", f"`{name}` is a {type(value).__name__}; expected an integer, boolean, string or list")


def evaluated(name: str, option: Callable[[], Any]) -> Any:
    """The value of a param's expression; C505 where the config makes no sense of it."""
    try:
        return option()
    except ZeroDivisionError:
        raise ConversionError("C505", f"`{name}` divides by a param that is 0") from None
    except TypeError as err:
        raise ConversionError("N118", f"`{name}` computes with values of the wrong kind: {err}") from None


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = f"{value:,}" if isinstance(value, int) and value.bit_length() < 200 else repr(type(value).__name__)
    text = repr(value) if isinstance(value, (bool, float, str)) or value is None else text
    text = f"a list of {len(value)} elements" if isinstance(value, list) else text
    return text if len(text) <= 60 else f"{text[:57]}..."


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
