"""Tests that import a peer are read only where it is installed: `make heavy` installs all of them."""

from __future__ import annotations

import importlib.util

_OF_AUTOMODEL = [
    "test_automodel_checkpointer.py",
    "test_automodel_target.py",
    "test_automodel_target_deviations.py",
]

collect_ignore = [] if importlib.util.find_spec("nemo_automodel") else _OF_AUTOMODEL
