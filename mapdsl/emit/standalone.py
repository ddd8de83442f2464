"""An adapter in one file that needs torch alone: the modules of the runtime that it uses, taken in, and the adapter.

The runtime's modules are read as they are when this runs. Their imports of each other go, the others are merged at the
top, and each module's code follows those that it needs, so that nothing is used before it stands there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mapdsl import __version__
from mapdsl.compiler.check import Checked
from mapdsl.emit.adapter import adapter_source, environment
from mapdsl.emit.layout import INDENT, WIDTH


@dataclass
class Module:
    """One module: what it needs of the runtime, what it imports from elsewhere, its definitions, and the lines left.

    `typed` are imports from elsewhere that only type checkers need.
    """

    name: str
    title: str
    needs: list[str]
    imports: list[ast.Import | ast.ImportFrom]
    typed: list[ast.ImportFrom]
    definitions: dict[str, ast.stmt]
    lines: Lines

    @property
    def code(self) -> str:
        """Its code without imports and docstring."""
        return self.lines.text()


def standalone_source(checked: Checked, command: str = "mapdsl compile --standalone") -> str:
    """The source of an adapter of which torch and the standard library are all that it imports."""
    adapter = _module("adapter", adapter_source(checked, command))
    modules = list(_in_order(adapter.needs, {}))
    _unite([*modules, adapter])
    text = (
        environment()
        .get_template("standalone.py.jinja")
        .render(
            title=adapter.title,
            version=__version__,
            has_unflatten=".unflatten(" in adapter.code,
            imports=_import_lines([*modules, adapter]),
            typed=sorted({ast.unparse(node) for module in modules for node in module.typed}),
            modules=modules,
            adapter=adapter.code,
        )
    )
    return text.rstrip("\n") + "\n"


def _in_order(names: list[str], seen: dict[str, None]) -> Iterator[Module]:
    """The modules of these names and all that they need, what is needed first."""
    for name in names:
        if name in seen:
            continue
        seen[name] = None
        module = _module(name, _source_of(name))
        yield from _in_order(module.needs, seen)
        yield module


def _source_of(name: str) -> str:
    spec = find_spec(name)
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        raise AssertionError(f"{name} is no module of the runtime that can be taken in")
    return Path(spec.origin).read_text(encoding="utf-8")


def _module(name: str, source: str) -> Module:
    """A module in its parts."""
    parsed = ast.parse(source)
    title = ast.get_docstring(parsed, clean=False) or ""
    needs: list[str] = []
    imports: list[ast.Import | ast.ImportFrom] = []
    typed: list[ast.ImportFrom] = []
    cut = Lines(source)
    for number, node in enumerate(parsed.body):
        if number == 0 and title:
            cut.remove(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            _sort_import(node, needs, imports)
            cut.remove(node)
        elif _is_type_checking(node):
            typed += [one for one in ast.walk(node) if isinstance(one, ast.ImportFrom) and not _is_ours(one)]
            cut.remove(node)
        elif _assigned(node) == {"__all__"}:
            cut.remove(node)
    for part in ast.walk(parsed):
        # An import inside a function goes too: what it names stands in the same file.
        is_inner = isinstance(part, ast.ImportFrom) and part not in parsed.body
        if isinstance(part, ast.ImportFrom) and is_inner and _is_ours(part) and not cut.holds(part):
            _sort_import(part, needs, [])
            cut.remove(part)
    definitions = {word: node for node in parsed.body for word in _assigned(node) if word != "__all__"}
    return Module(name, title, list(dict.fromkeys(needs)), imports, typed, definitions, cut)


class Lines:
    """The lines of a source, some of them taken out. A comment above what is taken out goes with it."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.gone: set[int] = set()

    def remove(self, node: ast.stmt) -> None:
        """Take out the lines of a statement."""
        first = node.lineno - 1
        while first and self.lines[first - 1].lstrip().startswith("#"):
            first -= 1
        self.gone |= set(range(first, node.end_lineno or node.lineno))

    def holds(self, node: ast.stmt) -> bool:
        """Whether it is out already."""
        return node.lineno - 1 in self.gone

    def text(self) -> str:
        """What is left, with at most two empty lines together."""
        kept: list[str] = []
        for number, line in enumerate(self.lines):
            if number in self.gone or (not line.strip() and kept[-2:] in ([], ["", ""])):
                continue
            kept.append(line.rstrip())
        return "\n".join(kept).strip("\n")


def _sort_import(
    node: ast.Import | ast.ImportFrom, needs: list[str], imports: list[ast.Import | ast.ImportFrom]
) -> None:
    """Note an import as one of the runtime's own or as another one."""
    if not _is_ours(node):
        imports.append(node)
        return
    if isinstance(node, ast.Import) or any(alias.asname for alias in node.names):
        raise AssertionError(f"the runtime says `{ast.unparse(node)}`; `from MODULE import NAME` can be taken in")
    needs.append(node.module or "")


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return any(name == "mapdsl" or name.startswith("mapdsl.") for name in names)


def _is_type_checking(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:`; what it imports of the runtime is there already."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _assigned(node: ast.stmt) -> set[str]:
    """The names that a statement of a module defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


def _unite(modules: list[Module]) -> None:
    """One name has one meaning: a definition that stands word for word in two modules is taken once.

    Two meanings of one name are a defect of the runtime, that a test of every shipped map would show.
    """
    homes: dict[str, Module] = {}
    for module in modules:
        for name, node in module.definitions.items():
            home = homes.setdefault(name, module)
            if home is module:
                continue
            if ast.unparse(home.definitions[name]) != ast.unparse(node):
                raise AssertionError(f"{name} is defined in {home.name} and in {module.name}; one needs another name")
            module.lines.remove(node)


def _import_lines(modules: list[Module]) -> list[str]:
    """All imports from outside, merged, as linters sort them: the standard library, then torch."""
    plain: set[str] = set()
    members: dict[str, set[str]] = {}
    for module in modules:
        for node in module.imports:
            if isinstance(node, ast.Import):
                plain |= {ast.unparse(alias) for alias in node.names}
            else:
                members.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    members.pop("__future__", None)
    if not any(module.typed for module in modules):
        members.get("typing", set()).discard("TYPE_CHECKING")
    members = {name: words for name, words in members.items() if words}
    lines = {f"import {name}": name for name in sorted(plain)}
    for name, words in sorted(members.items()):
        lines[_from_import(name, sorted(words, key=_order))] = name
    own = [line for line, name in lines.items() if name.partition(".")[0] in sys.stdlib_module_names]
    return [*own, "", *(line for line in lines if line not in own)]


def _from_import(module: str, names: list[str]) -> str:
    """`from MODULE import NAMES` as formatters want it: in parentheses, one name a line, where it is too long."""
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"from {module} import (", *(f"{INDENT}{name}," for name in names), ")"])


def _order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
