"""Where the checkpoint is that a config was read from."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any


def folder_of(config: Any) -> Path | None:
    """The folder that a config was read from: its own, or that of a repository in the local cache of Hugging Face."""
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        return None
    try:
        found = hub.try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except ValueError:  # it is no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


__all__ = ["folder_of"]
