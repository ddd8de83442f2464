"""Lists of a config as a map sees them: a position outside of one is an error that names the list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mapdsl.runtime.errors import ConversionError


class Items(list[Any]):
    """A list param. Positions are never negative, and an element that is absent or null is C505, not an IndexError."""

    def __init__(self, name: str, values: Iterable[Any]) -> None:
        super().__init__(Items(f"{name}[{n}]", v) if isinstance(v, (list, tuple)) else v for n, v in enumerate(values))
        self.name = name

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, bool) or not isinstance(position, int):
            raise ConversionError("C505", f"`{self.name}` is asked for element {position!r}, which is no position")
        if not 0 <= position < len(self):
            raise ConversionError("C505", f"`{self.name}` has {len(self)} elements, and no element {position}")
        value = super().__getitem__(position)
        if value is None:
            raise ConversionError("C505", f"`{self.name}[{position}]` is null")
        return value


def positions(items: Iterable[Any], value: Any) -> list[int]:
    """Where a value stands in a list."""
    return [place for place, item in enumerate(items) if item == value]
