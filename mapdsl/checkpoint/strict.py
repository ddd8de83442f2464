"""Checkers that stop a verification at the first difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mapdsl.checkpoint.checker import Checker
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.elements import Difference
from mapdsl.checkpoint.layout import Entry
from mapdsl.checkpoint.origins import Origins
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.promises import Promises
from mapdsl.language.diagnostics import MapError

Differs = Callable[[Difference, "Origins | None"], MapError]
"""Makes the error of a difference; of the way back there are origins."""


class StrictChecker(Checker):
    """Compares with what was written; the first difference is an error."""

    def __init__(
        self,
        held: Checkpoint,
        entries: Iterable[Entry],
        scratch: Path,
        differs: Differs,
    ) -> None:
        super().__init__(held, entries)
        self.scratch = scratch
        self._differs = differs

    def write(self, name: str, tensor: Tensor) -> None:
        """Compare one tensor."""
        super().write(name, tensor)
        found = self.differences.get(name)
        if found is not None:
            raise self._differs(found, None)


class BackChecker(Checker):
    """Compares what comes back with the source, where it has the legacy names that were read.

    `unlike` are outputs with another dtype or shape than what they were, `unpromised` those that have other bytes, by
    what the map says of them.
    """

    def __init__(
        self,
        source: Checkpoint,
        back: Plan,
        spelled: Mapping[str, str],
        scratch: Path,
        promises: Promises,
        differs: Differs,
    ) -> None:
        entries = [(spelled.get(name, name), dtype, shape) for name, dtype, shape in back.entries]
        super().__init__(source, entries, is_reference=True)
        self.scratch = scratch
        own = {spelled.get(name, name): name for name, _, _ in back.entries}
        self.unlike = [own[name] for name in self.differences]
        self.unpromised: list[str] = []
        self.promises = promises
        self._spelled, self._differs, self._origins = spelled, differs, Origins(back, source)

    def write(self, name: str, tensor: Tensor) -> None:
        """Compare one tensor."""
        stored = self._spelled.get(name, name)
        was_known = stored in self.differences
        super().write(stored, tensor)
        found = self.differences.get(stored)
        if found is None or was_known:
            return
        if self.promises.hold(name):
            raise self._differs(found, self._origins)
        self.unpromised.append(name)

    def view(self, name: str) -> Tensor | None:
        """See `Checker.view`."""
        return super().view(self._spelled.get(name, name))

    def read(self, name: str) -> Tensor:
        """See `Checker.read`."""
        return super().read(self._spelled.get(name, name))
