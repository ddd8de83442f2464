"""mapdsl: a small language for moving model weights between checkpoint layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mapdsl.checkpoint.compare import Comparison, compare
    from mapdsl.checkpoint.convert import Conversion, convert
    from mapdsl.checkpoint.convert_ranks import RanksConversion, convert_ranks
    from mapdsl.checkpoint.verify import Verification, verify
    from mapdsl.language.diagnostics import Diagnostic, MapError
    from mapdsl.map import Map, load
    from mapdsl.runtime.adapter import Adapter
    from mapdsl.runtime.errors import ConversionError

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Comparison",
    "Conversion",
    "ConversionError",
    "Diagnostic",
    "Map",
    "MapError",
    "RanksConversion",
    "Verification",
    "__version__",
    "compare",
    "convert",
    "convert_ranks",
    "load",
    "verify",
]

_HOMES = {
    "Adapter": "mapdsl.runtime.adapter",
    "Comparison": "mapdsl.checkpoint.compare",
    "Conversion": "mapdsl.checkpoint.convert",
    "ConversionError": "mapdsl.runtime.errors",
    "Diagnostic": "mapdsl.language.diagnostics",
    "Map": "mapdsl.map",
    "MapError": "mapdsl.language.diagnostics",
    "RanksConversion": "mapdsl.checkpoint.convert_ranks",
    "Verification": "mapdsl.checkpoint.verify",
    "compare": "mapdsl.checkpoint.compare",
    "convert": "mapdsl.checkpoint.convert",
    "convert_ranks": "mapdsl.checkpoint.convert_ranks",
    "load": "mapdsl.map",
    "verify": "mapdsl.checkpoint.verify",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that commands which need no torch import none.
    if name not in _HOMES:
        raise AttributeError(f"module 'mapdsl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
