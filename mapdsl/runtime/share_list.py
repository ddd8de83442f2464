"""What one rank holds of a side: the tensors that its adapter reads, with the axes that each of them has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.storage import RAW_STORAGE, Storage
from mapdsl.runtime.complement import Alternatives, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.name_list import Listed, NameList
from mapdsl.runtime.names import Wide
from mapdsl.runtime.sizes import SizeError, axis_sizes, counted
from mapdsl.runtime.stored_forms import AS_IS

if TYPE_CHECKING:
    from mapdsl.runtime.sharded_adapter import ShardedAdapter


class ShareList(NameList):
    """Lists what would be taken of a state, as `shown`: optional tensors and those that wildcards name too.

    Of `tensors` only the names are looked at, and, where `alternative` is asked for, dtypes and shapes.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.shown: list[Listed] = []
        self.any_wild = False

    def drop(self, name: str, stored: Alternatives = AS_IS) -> None:
        """A dropped tensor is on the ranks as it is in the whole."""
        super().drop(name, stored)
        parts = (part for one in stored if isinstance(one, Codec) for part in one.names(name))
        for part in dict.fromkeys((name, *parts)):
            if part in self:
                self.shown.append(Listed(part, AS_IS, None, {}))

    def wild(self, pattern: str, *but: Wide) -> Iterator[tuple[str, ...]]:
        """See `StateNames.wild`; notes that names are read off the state."""
        self.any_wild = True
        return super().wild(pattern, *but)

    def shut(self, *names: str | Wide) -> None:
        """See `StateNames.shut`: no wildcard names these."""
        super().shut(*names)
        super(NameList, self).shut(*names)

    def is_there(self, shown: Listed) -> bool:
        """Whether the state has a tensor, in one of its formats."""
        return shown.name in self or self._elsewhere(shown.name, shown.stored)

    def storage(self, shown: Listed) -> Storage:
        """The format that a tensor of the state is in."""
        self._begin()
        codec = self._alternative(shown.name, shown.stored)
        return RAW_STORAGE if isinstance(codec, Raw) else codec.storage

    def parts(self, shown: Listed, storage: Storage) -> dict[str, str]:
        """What the state calls the parts of a tensor, by role: it may have legacy names."""
        return {role: self._spelled.get(part, part) for role, part in storage.part_names(shown.name).items()}

    def _note(self, of: Listed, optional: bool) -> None:
        super()._note(of, optional)
        self.shown.append(of)


def listed(adapter: ShardedAdapter, side: str, names: Mapping[str, object]) -> Iterable[tuple[Listed, str]]:
    """What a rank holds of a whole state of these names: see `with_whole_names`."""
    return with_whole_names(adapter, side, adapter.list_shares(side, names))  # type: ignore[arg-type]


def with_whole_names(adapter: ShardedAdapter, side: str, shares: ShareList) -> Iterable[tuple[Listed, str]]:
    """Each tensor that a rank may hold, with what a whole state calls it."""
    everywhere = shares
    if adapter.place.counts_locally:
        everywhere = adapter.counting_from_all().list_shares(side, shares.tensors)
    return zip(shares.shown, (one.name for one in everywhere.shown), strict=True)


def sizes_of(shown: Listed, shape: Sequence[int], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """The sizes of all axes of a rank's tensor; ConversionError where its shape does not fit the pattern."""
    if shown.pattern is None:
        return {}
    try:
        return axis_sizes(shown.pattern, shape, {**counted(shown.sizes), **(known or {})})
    except SizeError as problem:
        raise ConversionError(problem.code, f"{shown.name}: {problem}") from None
