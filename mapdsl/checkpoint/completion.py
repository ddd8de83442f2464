"""The last moments of a conversion: between the name that it takes and the end of what was of use only until then.

Before the hidden folder takes its name, what came of the conversion is noted in it; that note is removed last. So a run
that was killed in between is told from a folder that somebody else has made, and `--resume` finishes it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.file_writing import flush
from mapdsl.checkpoint.files import bad_file, parse_object, read_text
from mapdsl.checkpoint.journal import WORK_PREFIX, partial_folder, require_same
from mapdsl.language.diagnostics import MapError

OUTCOME_FILE = f"{WORK_PREFIX}outcome"

OUTCOME = ("files", "carried", "kept_bytes", "checksums", "verified", "edited", "keeps_headers")
"""What is not known before a conversion has ended."""


def note_outcome(folder: Path, identity: Mapping[str, str], outcome: Mapping[str, Any]) -> None:
    """Note what came of a conversion, durably. OSError where the disk fails."""
    path = folder / OUTCOME_FILE
    path.write_text(json.dumps({"identity": dict(identity), "outcome": dict(outcome)}), encoding="utf-8")
    flush(path)


def is_finished(destination: Path) -> bool:
    """Whether a conversion to this destination is complete, but for the files that were of use until then."""
    return (destination / OUTCOME_FILE).is_file()


def finish(destination: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """Clean up a destination that is complete, and give what came of its conversion.

    C507 where it was another conversion, and where the note cannot be read.
    """
    path = destination / OUTCOME_FILE
    try:
        note = parse_object(path, read_text(path, "note of a conversion"), "note of a conversion")
        was, outcome = dict(note["identity"]), {key: note["outcome"][key] for key in OUTCOME}
    except (MapError, KeyError, TypeError, ValueError) as problem:
        message = f"the destination is complete, but {OUTCOME_FILE}, which says of what, cannot be read"
        advice = f"`mapdsl verify` looks at it; files in it called {WORK_PREFIX}* are of no use any more"
        raise bad_file(destination, message, advice) from problem
    require_same(destination, was, identity, "the destination is of another conversion", "choose another destination")
    clean_up(destination)
    return outcome


def clean_up(folder: Path) -> None:
    """Remove what was of use until a conversion was complete; the note that it was goes last."""
    paths = sorted(folder.glob(f"{WORK_PREFIX}*"), key=lambda path: path.name == OUTCOME_FILE)
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def check_resumable(destination: Path) -> None:
    """C507 where there is nothing to go on with since the destination is there, without a trace of work."""
    if destination.exists() and not partial_folder(destination).exists():
        message = "there is no unfinished conversion to go on with, and the destination exists"
        advice = "a conversion that is complete needs no more: `mapdsl verify` looks at it; else choose another one"
        raise bad_file(destination, message, advice)
