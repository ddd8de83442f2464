"""Properties that hold for every map, and examples drawn for any: what `mapdsl test` and compiled tests run."""

from __future__ import annotations

from mapdsl.testing import properties
from mapdsl.testing.properties import PROPERTIES, PropertyError
from mapdsl.testing.runner import Failure, Report, run
from mapdsl.testing.suite import Example, Suite, load_suite

__all__ = ["PROPERTIES", "Example", "Failure", "PropertyError", "Report", "Suite", "load_suite", "properties", "run"]
