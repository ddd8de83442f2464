"""What is saved beside a model's tensors: config.json, and the other files of a checkpoint that it is to be like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.checksums import CHECKSUM_FILE
from mapdsl.checkpoint.json_members import without_members
from mapdsl.checkpoint.layout import Entry
from mapdsl.checkpoint.model_config import FIELD, looks_quantised
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.runtime.errors import ConversionError


def config_text(config: Any) -> str | None:
    """What to write as config.json of a config as it is given: None where it does not say that.

    It is a mapping, the path of a config.json or of its folder, or one that can tell its own text, as those of
    transformers do. C505 for a mapping that JSON cannot hold.
    """
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
    if isinstance(config, Mapping):
        try:
            return json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as err:
            raise ConversionError("C505", f"the config cannot be written as config.json: {err}") from None
    own = getattr(config, "to_json_string", None)
    return str(own()) if callable(own) else None


def config_of(text: str, entries: Iterable[Entry]) -> str:
    """A config.json as it is beside these tensors: loaders go by a field of it whether any are quantised."""
    is_quantised = any(looks_quantised(dtype, shape) for _, dtype, shape in entries)
    return text if is_quantised else without_members(text, FIELD)[0]


def others_of(like: Checkpoint) -> tuple[str, ...]:
    """The files of a checkpoint that are so of another one, too: not what speaks of its bytes."""
    return tuple(name for name in like.other_files if name not in (SIDE_FILE, CHECKSUM_FILE))


__all__ = ["config_of", "config_text", "others_of"]
