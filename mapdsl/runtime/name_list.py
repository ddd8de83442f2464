"""Running a conversion without tensors: what it would take, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mapdsl.runtime.complement import Alternatives
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.fitting import Pattern
from mapdsl.runtime.names import Wide
from mapdsl.runtime.sizes import PartialShape, Size, counted, either_shape, shape_of
from mapdsl.runtime.stored_forms import AS_IS, NOT_AT_ALL
from mapdsl.runtime.take import Operand, Take

MAX_NAMES = 10_000_000


class Listed(NamedTuple):
    """One name of a side, how it is stored, the pattern of its shape and the sizes known; of a tie, its twin."""

    name: str
    stored: Alternatives
    shape: Pattern | None
    sizes: Mapping[str, Size]
    twin: str | None = None

    @property
    def pattern(self) -> str | None:
        """The pattern of its shape, of axes; X307 where the adapter gives numbers."""
        if isinstance(self.shape, tuple):
            raise ConversionError("X307", f"{self.name} has no pattern: compile the map again")
        return self.shape

    @property
    def is_empty(self) -> bool:
        """Whether it has no elements, by the sizes known."""
        stated = self.shape if isinstance(self.shape, tuple) else ()
        return any(size <= 0 for size in (*counted(self.sizes).values(), *stated))


class NameList(Take):
    """Takes nothing: writes down what would be taken.

    `names` are the tensors that a whole state has; `named` are all names that the rules speak of, those that are
    optional, dropped or shut out by a guard too.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__({} if tensors is None else tensors, partial=True)
        self.names: list[Listed] = []
        self.named: set[str] = set()

    def __call__(
        self,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        into: Alternatives = NOT_AT_ALL,
        **sizes: Size,
    ) -> Tensor | None:
        """Note one name."""
        del into
        self._note(Listed(name, stored, shape, sizes), optional)
        return None

    def group(self, *operands: Operand, optional: bool = False, into: Alternatives = NOT_AT_ALL, **sizes: Size) -> bool:
        """Note the names of a group."""
        del into
        for names, shape, *rest in operands:
            for name in [names] if isinstance(names, str) else names:
                self._note(Listed(name, rest[0] if rest else AS_IS, shape, sizes), optional)
        return False

    def equal(
        self,
        name: str,
        value: float | Tensor,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        **sizes: Size,
    ) -> None:
        """Note a constant."""
        del value
        self._note(Listed(name, stored, shape, sizes), optional)

    def tied(
        self,
        name: str,
        other: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        **sizes: Size,
    ) -> None:
        """Note a tied tensor; its twin is another rule's."""
        self._note(Listed(name, stored, shape, sizes, twin=other), optional)

    def shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        """The shape of every name as far as it is known; a tie has that of its twin."""
        own: dict[str, PartialShape | None] = {
            of.name: shape_of(of.shape, counted(of.sizes)) if isinstance(of.shape, str) else of.shape
            for of in self.names
        }
        ties = {of.name: of.twin for of in self.names if of.twin is not None}
        return own | {name: either_shape(own[name], own.get(twin)) for name, twin in ties.items()}

    def drop(self, name: str, stored: Alternatives = AS_IS) -> None:
        """A dropped tensor is no part of the layout, but it has its rule."""
        del stored
        self.named.add(name)

    def shut(self, *names: str | Wide) -> None:
        """Names that are shut out have their rule, too."""
        self.named.update(name for name in names if isinstance(name, str))

    def _note(self, of: Listed, optional: bool) -> None:
        self.named.add(of.name)
        if len(self.named) > MAX_NAMES:
            raise ConversionError("C505", f"the config makes more than {MAX_NAMES:,} tensors")
        # A tensor without elements is on neither side: the other one has no names for it.
        if not optional and not of.is_empty:
            self.names.append(of)
