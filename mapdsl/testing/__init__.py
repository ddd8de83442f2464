"""Properties that hold for every map, and examples drawn for any: what `mapdsl test` and compiled tests run."""

from __future__ import annotations

from mapdsl.testing import properties, rank_properties
from mapdsl.testing.comparing import PropertyError
from mapdsl.testing.properties import PROPERTIES, properties_for
from mapdsl.testing.runner import Failure, Report, run
from mapdsl.testing.suite import Example, Suite, load_suite

__all__ = [
    "PROPERTIES",
    "Example",
    "Failure",
    "PropertyError",
    "Report",
    "Suite",
    "load_suite",
    "properties",
    "properties_for",
    "rank_properties",
    "run",
]
