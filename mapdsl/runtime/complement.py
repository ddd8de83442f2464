"""The complement: what decoding would lose, kept so that writing gives the stored bytes back."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.kept import Kept


class Raw:
    """The alternative of a tensor that is stored as it is."""

    name = "raw"


RAW = Raw()
Alternatives = tuple["Codec | Raw", ...]

# By name of a tensor: the alternative found, and what its codec keeps (None for a raw tensor, or one moved undecoded).
Entries = MutableMapping[str, "tuple[str, Kept | None]"]


@dataclass
class Complement:
    """What reading found of the left side, by stored name, and what writing found of the right side, if it has codecs.

    `found` also holds the answers of `has(...)` by param. After writing, `edited` counts by stored name the blocks
    whose value had changed, so that they were encoded anew. `spelled` holds the legacy spellings that were read, by the
    names that they were read as. `decoded` holds, by name on the right, the dtype that a tensor had on the left where
    the right has a format for it. Of constants `entries` and `right` hold the dtype in the place of the alternative. A
    caller may put a mapping of its own in the place of `entries`, one that keeps them on disk.
    """

    entries: Entries = field(default_factory=dict)
    right: Entries = field(default_factory=dict)
    decoded: dict[str, torch.dtype] = field(default_factory=dict)
    found: dict[str, bool] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    edited: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Keep what is known of the left side while a part of it is read, which tells anew of what it reads."""
        known: list[tuple[MutableMapping[str, Any], dict[str, Any]]]
        known = [(notes, dict(notes)) for notes in (self.entries, self.decoded, self.found, self.spelled)]
        yield
        for notes, before in known:
            for name, note in before.items():
                notes.setdefault(name, note)

    def clear(self) -> None:
        """Forget the left side: a new checkpoint is read."""
        self.entries.clear()
        self.decoded.clear()
        self.found.clear()
        self.spelled.clear()
        self.edited.clear()
