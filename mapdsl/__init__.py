"""mapdsl: a small language for moving model weights between checkpoint layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mapdsl.checkpoint.convert import Conversion, convert
    from mapdsl.language.diagnostics import Diagnostic, MapError
    from mapdsl.map import Map, load
    from mapdsl.runtime.adapter import Adapter
    from mapdsl.runtime.errors import ConversionError

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Conversion",
    "ConversionError",
    "Diagnostic",
    "Map",
    "MapError",
    "__version__",
    "convert",
    "load",
]

_HOMES = {
    "Adapter": "mapdsl.runtime.adapter",
    "Conversion": "mapdsl.checkpoint.convert",
    "ConversionError": "mapdsl.runtime.errors",
    "Diagnostic": "mapdsl.language.diagnostics",
    "Map": "mapdsl.map",
    "MapError": "mapdsl.language.diagnostics",
    "convert": "mapdsl.checkpoint.convert",
    "load": "mapdsl.map",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that commands which need no torch import none.
    if name not in _HOMES:
        raise AttributeError(f"module 'mapdsl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
