"""The public object: a map, loaded, checked, compiled, and its adapters."""

from __future__ import annotations

import linecache
import os
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mapdsl.compiler.check import Checked, check
from mapdsl.language.diagnostics import Diagnostic, MapError, error
from mapdsl.language.source import Source
from mapdsl.language.syntax import parse, read_source
from mapdsl.resources import shipped_maps

if TYPE_CHECKING:
    from mapdsl.runtime.adapter import Adapter


def load(path_or_name: str | os.PathLike[str]) -> Map:
    """A map from a `.map` file, or a shipped one by its name (`deepseek_v4`). MapError where it cannot be read."""
    path = Path(path_or_name)
    if path.suffix != ".map" and not os.path.isfile(path):  # False too for a name that no file system takes
        shipped = shipped_maps()
        if str(path_or_name) in shipped:
            path = shipped[str(path_or_name)]
        elif not os.path.exists(path):
            raise error("N116", f"there is no file and no shipped map `{path_or_name}`", help=_hint(path, shipped))
    return Map(read_source(path))


def _hint(path: Path, shipped: dict[str, Path]) -> str:
    """The file that was meant, if it lies beside; else what is shipped of a name like that."""
    meant = f"{path}.map"
    if os.path.isfile(meant):
        return f"did you mean {meant}?"
    from difflib import get_close_matches

    close = get_close_matches(str(path).lower().replace("-", "_")[:100], shipped)
    if close:
        return f"did you mean {' or '.join(close)}? `mapdsl maps` lists the shipped maps"
    return "`mapdsl maps` lists the shipped maps" if shipped else ""


class Map:
    """One `.map` file. Nothing is parsed before it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @cached_property
    def checked(self) -> Checked:
        """The checked map; MapError with every error of the file."""
        return check(parse(self.source))

    def check(self) -> list[Diagnostic]:
        """Everything found, sorted: errors, warnings, lints."""
        try:
            return self.checked.diagnostics
        except MapError as err:
            return err.diagnostics

    def compile(self) -> str:
        """Python source of the adapter; MapError where the map does not hold."""
        from mapdsl.emit.adapter import adapter_source

        return adapter_source(self.checked)

    @cached_property
    def adapter_class(self) -> type[Adapter]:
        """The adapter's class, made from the compiled source; debuggers and tracebacks show that source."""
        from mapdsl.emit.adapter import class_name

        source = self.compile()
        filename = f"<mapdsl {self.source.path}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        module = ModuleType(f"mapdsl_{self.checked.map.name}")
        exec(compile(source, filename, "exec"), module.__dict__)
        return getattr(module, class_name(self.checked.map.name))  # type: ignore[no-any-return]

    def adapter(self, config: Any = None, **params: Any) -> Adapter:
        """An adapter for the config of a left-side checkpoint: a dict, a path, or an object with the fields.

        `params` gives params of the map by name; they win over the config.
        """
        return self.adapter_class(config, **params)
