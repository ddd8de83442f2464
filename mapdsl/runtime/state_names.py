"""The names of a state: which are left to be taken, legacy spellings, and what wildcards may carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Alternatives
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.names import Wide, captures, literal_end, literal_start

AS_IS: Alternatives = (RAW,)


class StateNames:
    """Names of tensors that nobody has taken yet; `spelled` notes the legacy ones by what they are read as."""

    def __init__(self, names: Iterable[str], spelled: dict[str, str] | None) -> None:
        self._left = dict.fromkeys(names)
        self._spelled = spelled if spelled is not None else {}
        self._fetched: dict[str, Tensor] = {}
        self._shut: set[str] = set()
        self._shut_wide: list[Wide] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left or name in self._fetched

    def accept(self, old: str, new: str, stored: Alternatives = AS_IS) -> None:
        """Read a legacy spelling, companions included, under its new name; what was respelled is not so again."""
        pairs = {old: new}
        for codec in stored:
            if isinstance(codec, Codec):
                pairs |= dict(zip(codec.names(old), codec.names(new), strict=True))
        for name, spelled in pairs.items():
            if name not in self._left or name in self._spelled:
                continue
            if spelled in self._left:
                raise ConversionError("C506", f"{name} is the legacy spelling of {spelled}, and both are there")
            del self._left[name]
            self._left[spelled] = None
            self._spelled[spelled] = name

    def holds(self, pattern: str) -> bool:
        """Whether a name of this pattern is there (`#` a number, `*` a segment, `**` several)."""
        return any(True for _ in self._fitting(pattern))

    def wild(self, pattern: str, *but: Wide) -> Iterator[tuple[str, ...]]:
        """What the wildcards of a pattern stand for, for every name not taken yet that fits it.

        `but` are names that narrower wildcards carry, or would if their guards held.
        """
        for name, texts in list(self._fitting(pattern)):
            closed = name in self._shut or any(name in wide for wide in (*but, *self._shut_wide))
            if name in self and not closed:
                yield texts

    def shut(self, *names: str | Wide) -> None:
        """Names that a rule names but whose guard does not hold: no wildcard carries them."""
        self._shut.update(name for name in names if isinstance(name, str))
        self._shut_wide += [name for name in names if isinstance(name, Wide)]

    def _fitting(self, pattern: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names not taken yet that fit a pattern, with what its wildcards stand for."""
        start, end = literal_start(pattern), literal_end(pattern)
        for name in [*self._left, *self._fetched]:
            if name.startswith(start) and name.endswith(end) and (texts := captures(pattern, name)) is not None:
                yield name, texts
