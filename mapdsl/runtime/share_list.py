"""What one rank holds of a side: the tensors that its adapter reads, with the axes that each of them has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import Alternatives, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.fitting import Pattern
from mapdsl.runtime.name_list import NameList
from mapdsl.runtime.names import Wide
from mapdsl.runtime.sizes import Size
from mapdsl.runtime.stored_forms import AS_IS


class Shown(NamedTuple):
    """A tensor that a rank may hold: its name, how it may be stored, the pattern of its shape, the axes known."""

    name: str
    stored: Alternatives
    pattern: str | None
    sizes: Mapping[str, Size]


class ShareList(NameList):
    """Lists what would be taken of a state: optional tensors and those that wildcards name too.

    Of `tensors` only the names are looked at, and, where `alternative` is asked for, dtypes and shapes.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.shown: list[Shown] = []
        self.any_wild = False

    def drop(self, name: str, stored: Alternatives = AS_IS) -> None:
        """A dropped tensor is on the ranks as it is in the whole."""
        super().drop(name, stored)
        parts = (part for one in stored if isinstance(one, Codec) for part in one.names(name))
        for part in dict.fromkeys((name, *parts)):
            if part in self:
                self._show(part, AS_IS, None, {})

    def wild(self, pattern: str, *but: Wide) -> Iterator[tuple[str, ...]]:
        """See `StateNames.wild`; notes that names are read off the state."""
        self.any_wild = True
        return super().wild(pattern, *but)

    def shut(self, *names: str | Wide) -> None:
        """See `StateNames.shut`: no wildcard names these."""
        super().shut(*names)
        super(NameList, self).shut(*names)

    def is_there(self, shown: Shown) -> bool:
        """Whether the state has a tensor, in one of its formats."""
        return shown.name in self or self._elsewhere(shown.name, shown.stored)

    def alternative(self, shown: Shown) -> Codec | Raw:
        """The format that a tensor of the state is in."""
        self._begin()
        return self._alternative(shown.name, shown.stored)

    def spelled(self, name: str) -> str:
        """What the state calls a tensor: it may have a legacy name."""
        return self._spelled.get(name, name)

    def _note(
        self,
        name: str,
        stored: Alternatives,
        shape: Pattern | None,
        optional: bool,
        sizes: Mapping[str, Size],
        twin: str | None = None,
    ) -> None:
        super()._note(name, stored, shape, optional, sizes, twin)
        if shape is not None and not isinstance(shape, str):
            raise ConversionError("X307", f"{name} has no pattern: compile the map again")
        self._show(name, stored, shape, sizes)

    def _show(self, name: str, stored: Alternatives, pattern: str | None, sizes: Mapping[str, Size]) -> None:
        self.shown.append(Shown(name, stored, pattern, sizes))
