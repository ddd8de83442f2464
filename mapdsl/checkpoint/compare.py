"""Two checkpoints held against each other: names, dtypes, shapes, and all bytes, in strips of a few megabytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.byteranges import ByteRanges
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.elements import STRIP_BYTES, Difference, Tally, header_difference
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.progress import Reporter


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common and what not.

    `only_first` and `only_second` are tensors that one of them lacks; `differences` are told of tensors that both have,
    in the first one's order. `same` counts tensors that are equal in everything that was compared; `has_data` says
    whether bytes were, which listings have not.
    """

    first: Path
    second: Path
    only_first: tuple[StoredTensor, ...]
    only_second: tuple[StoredTensor, ...]
    differences: tuple[Difference, ...]
    same: int
    bytes_compared: int
    has_data: bool

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not (self.only_first or self.only_second or self.differences)

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {
            "equal": self.equal,
            "first": str(self.first),
            "second": str(self.second),
            "only_first": [tensor.name for tensor in self.only_first],
            "only_second": [tensor.name for tensor in self.only_second],
            "differences": [difference.as_json() for difference in self.differences],
            "same": self.same,
            "bytes_compared": self.bytes_compared,
            "data_compared": self.has_data,
        }


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    progress: bool = False,
) -> Comparison:
    """Compare two checkpoints of any kind by name, dtype, shape and bytes; where one is a listing, not by bytes.

    A NaN equals one with the same bits, 0.0 and -0.0 differ. With `progress` it is shown on standard error, as
    `convert` does.

    Raises a MapError, C507 and C506, where one of them cannot be read.
    """
    one, other = open_checkpoint(first), open_checkpoint(second)
    has_data = one.has_data and other.has_data
    pairs: list[tuple[StoredTensor, StoredTensor]] = []
    found: dict[str, Difference | None] = {}
    for name, tensor in one.tensors.items():
        if name in other.tensors:
            found[name] = header_difference(tensor, other.tensors[name])
            if has_data and found[name] is None:
                pairs.append((tensor, other.tensors[name]))
    total = sum(tensor.nbytes for tensor, _ in pairs)
    reporter = Reporter(progress)
    with ByteRanges(one) as mine, ByteRanges(other) as theirs, reporter.meter("comparing", total) as meter:
        for tensor, twin in pairs:
            tally = Tally(tensor)
            for offset in range(0, tensor.nbytes, STRIP_BYTES):
                size = min(STRIP_BYTES, tensor.nbytes - offset)
                tally.compare(offset, mine.read(tensor, offset, size), theirs.read(twin, offset, size))
                meter(size)
            found[tensor.name] = tally.difference()
    differences = tuple(difference for difference in found.values() if difference is not None)
    return Comparison(
        one.path,
        other.path,
        tuple(tensor for name, tensor in one.tensors.items() if name not in other.tensors),
        tuple(tensor for name, tensor in other.tensors.items() if name not in one.tensors),
        differences,
        len(found) - len(differences),
        total,
        has_data,
    )


__all__ = ["Comparison", "Difference", "compare"]
