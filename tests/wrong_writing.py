"""What the tests of `convert --verify` share: ways to write something wrong, and what is left when it is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import MAP, only

import mapdsl
from mapdsl.checkpoint.journal import Journal, partial_folder
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.language.diagnostics import MapError


def flip_byte(path: Path, place: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def spoil_writing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Change a byte of one tensor in its file, as soon as it is written, however that is done."""

    def spoiled(method: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: CheckpointWriter, given: str, *rest: Any) -> Any:
            result = method(self, given, *rest)
            stored = self._places[given]
            if given == name:
                flip_byte(self._folder / stored.file, stored.begin + stored.nbytes // 2)
            return result

        return changed

    for way in ("write", "copy", "viewed"):
        monkeypatch.setattr(CheckpointWriter, way, spoiled(getattr(CheckpointWriter, way)))


def left_over() -> list[threading.Thread]:
    """Threads of a conversion; those of the codecs stay for the next one."""
    mine = (thread for thread in threading.enumerate() if thread.name.startswith("mapdsl"))
    return [thread for thread in mine if not thread.name.startswith("mapdsl-codecs")]


def refused(source: Path, destination: Path, **options: Any) -> Any:
    """The one diagnostic of a conversion that verifying refuses; nothing is left of it, no thread either."""
    with pytest.raises(MapError) as caught:
        mapdsl.convert(source, destination, MAP, verify=True, **options)
    assert not destination.exists()
    assert not partial_folder(destination).exists()
    assert not left_over()
    return only(caught.value)


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    """End a conversion, as Ctrl-C does, when so many units are done."""
    add = Journal.add

    def stopped(self, record):
        add(self, record)
        if len(self.done) == units:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stopped)
