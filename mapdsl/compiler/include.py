"""Includes: another map's statements, with names of their own, under the prefixes of the block they stand in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, MapError
from mapdsl.language.rewrite import rewrite
from mapdsl.language.syntax import parse, read_source
from mapdsl.resources import shipped_maps

MAX_DEPTH = 16


@dataclass
class Scope:
    """What is declared: one namespace for params, indices, meshes and enumerations, one for codecs."""

    params: dict[str, tree.Param] = field(default_factory=dict)
    indices: dict[str, tree.Index] = field(default_factory=dict)
    codecs: dict[str, tree.Codec] = field(default_factory=dict)
    meshes: list[tree.Mesh] = field(default_factory=list)

    def bind(self, statement: tree.Param | tree.Index | tree.Codec) -> None:
        """Declare it under its name."""
        match statement:
            case tree.Param():
                self.params[statement.name] = statement
            case tree.Index():
                self.indices[statement.name] = statement
            case tree.Codec():
                self.codecs[statement.name] = statement


Flagged = tuple[tree.Statement, bool]


def take_in(file: tree.File, scope: Scope, found: list[Diagnostic]) -> list[Flagged]:
    """All statements of a file with its includes replaced by what they hold, each marked whether it was included."""
    return _Including(found).statements(file, _own_path(file), ())


def _own_path(file: tree.File) -> Path:
    return Path(file.source.path).resolve()


class _Including:
    def __init__(self, found: list[Diagnostic]) -> None:
        self.found = found
        self.taken: set[str] = set()
        self.free: set[str] = set()
        self.unseen: list[tree.File] = []  # files whose free axes are not in `free` yet
        self.params: set[str] = set()

    def statements(self, file: tree.File, path: Path, stack: tuple[Path, ...]) -> list[Flagged]:
        self.taken |= {s.name for s in file.statements if isinstance(s, _DECLARED)}
        self.unseen.append(file)
        self.params |= {s.name for s in file.statements if isinstance(s, tree.Param)}
        out: list[Flagged] = []
        for statement in file.statements:
            out += self._statement(statement, path, (*stack, path))
        return out

    def _statement(self, statement: tree.Statement, path: Path, stack: tuple[Path, ...]) -> list[Flagged]:
        match statement:
            case tree.Include():
                return [(inner, True) for inner in self._include(statement, path, stack)]
            case tree.Block():
                body: list[tree.Statement] = []
                out: list[Flagged] = []
                for inner in statement.body:
                    expanded = self._statement(inner, path, stack)
                    rules = [s for s, _ in expanded if not isinstance(s, _DECLARED)]
                    out += [(s, True) for s, _ in expanded if isinstance(s, _DECLARED)]
                    if any(flag for _, flag in expanded):
                        out.append((replace(statement, body=tuple(rules)), True))
                    else:
                        body += rules
                return [*out, *([(replace(statement, body=tuple(body)), False)] if body else [])]
        return [(statement, False)]

    def _include(self, include: tree.Include, path: Path, stack: tuple[Path, ...]) -> list[tree.Statement]:
        target = self._locate(include, path)
        if target is None:
            return []
        if target in stack:
            chain = " -> ".join(p.name for p in (*stack[stack.index(target) :], target))
            return self._refuse(include, f"`{include.path}` includes itself: {chain}")
        if len(stack) >= MAX_DEPTH:
            return self._refuse(include, f"includes go deeper than {MAX_DEPTH} files")
        try:
            file = parse(read_source(target))
        except MapError as err:
            self.found += err.diagnostics
            return []
        renamed = self._with_own_names(file, include)
        inner = [statement for statement, _ in self.statements(renamed, target, stack)]
        inner = [s for s in inner if not isinstance(s, (tree.Example, tree.Law))]
        if include.guard is None:
            return inner
        return [s if isinstance(s, _DECLARED) else _guarded(s, include.guard) for s in inner]

    def _locate(self, include: tree.Include, path: Path) -> Path | None:
        """A file beside the including one, or a shipped map; never a path that leaves those folders."""
        wanted = Path(include.path)
        if wanted.is_absolute() or ".." in wanted.parts:
            self._refuse(include, f"`{include.path}` leaves the folder of this map")
            return None
        beside = path.parent / wanted
        if beside.is_file():
            return beside.resolve()
        shipped = shipped_maps().get(wanted.with_suffix("").as_posix())
        if shipped is None:
            self._refuse(include, f"there is no `{include.path}` beside this map, and no shipped map of this name")
            return None
        return shipped.resolve()

    def _with_own_names(self, file: tree.File, include: tree.Include) -> tree.File:
        """The included file with clashing names changed, `config` moved and params bound as the include says.

        Free axes and enumerations are of their rules alone: their names may be used again, but not declared, or a size
        would be stated that nobody meant.
        """
        while self.unseen:
            self.free |= _undeclared(self.unseen.pop())
        declared = [s for s in file.statements if isinstance(s, _DECLARED)]
        # A mesh is of the ranks, not of a map: one that both declare is the same, and cuts the axes of both.
        names = [s.name for s in declared if not isinstance(s, tree.Mesh)]
        new_names = {name: _free_name(name, self.taken | self.free) for name in names}
        local_names = {name: _free_name(name, self.taken) for name in _undeclared(file)}
        bindings = {binding.name: binding for binding in include.bindings}
        config = bindings.pop("config", None)
        prefix = ""
        if config is not None:
            if not isinstance(config.value, tree.Name):
                self.found.append(Diagnostic("N116", "`config` takes the name of a config field", (config.span,)))
            else:
                prefix = config.value.path + "."
        params = {s.name for s in declared if isinstance(s, tree.Param)}
        for name in sorted(bindings.keys() - params):
            self.found.append(Diagnostic("N111", f"`{include.path}` has no param `{name}`", (bindings[name].span,)))
        same = self._same_params(bindings)
        new_names |= {name: path for name, path in same.items() if name in params}
        kept = [s for s in file.statements if not (isinstance(s, tree.Param) and s.name in same)]
        statements = [_renamed(s, new_names, local_names, prefix, bindings) for s in kept]
        return replace(file, statements=tuple(statements))

    def _same_params(self, bindings: dict[str, tree.Binding]) -> dict[str, str]:
        """Params of the included map that are bound to a param of this one: they are that one."""
        values = {name: binding.value for name, binding in bindings.items()}
        return {n: v.path for n, v in values.items() if isinstance(v, tree.Name) and v.path in self.params}

    def _refuse(self, include: tree.Include, message: str) -> list[tree.Statement]:
        self.found.append(Diagnostic("N116", message, (include.span,)))
        return []


_DECLARED = (tree.Param, tree.Index, tree.Codec, tree.Mesh)


def _guarded(statement: tree.Statement, guard: tree.Expr) -> tree.Statement:
    """The statement inside a block of empty prefixes that carries the guard."""
    nothing = tree.Template((), span=guard.span)
    return tree.Block((tree.Pair(nothing, nothing, guard, span=guard.span),), (statement,), span=statement.span)


def _free_name(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{n}" for n in range(2, 10_000) if f"{name}_{n}" not in taken)


def _renamed(
    statement: tree.Statement,
    new_names: dict[str, str],
    local_names: dict[str, str],
    prefix: str,
    bindings: dict[str, tree.Binding],
) -> tree.Statement:
    axes = {**local_names, **new_names}
    enumerations = _enumerations(statement)

    def change(node: tree.Node) -> tree.Node:
        match node:
            case tree.Name(path=path) if path in enumerations:
                return replace(node, path=axes.get(path, path))
            case tree.Name(path=path):
                # Names that the included map does not declare are fields of its config.
                return replace(node, path=new_names.get(path) or prefix + path)
            case tree.Axis(name=str(name)) if name in axes:
                return replace(node, name=axes[name])
            case tree.EnumHole(name=name) if name in axes:
                return replace(node, name=axes[name])
            case tree.CodecUse(name=name) if name in new_names:
                return replace(node, name=new_names[name])
            case tree.MeshAxis(name=name) if name in axes:
                return replace(node, name=axes[name])
        return node

    result = rewrite(statement, change)
    if isinstance(result, _DECLARED):
        binding = bindings.get(result.name)
        result = replace(result, name=new_names.get(result.name, result.name))
        if binding is not None and isinstance(result, tree.Param):
            # The bound expression speaks of the including map's names, so it replaces the renamed one whole.
            result = replace(result, value=binding.value)
    return result


def _undeclared(file: tree.File) -> set[str]:
    """The names that a file uses without a declaration of its own: free axes and enumerations."""
    names: set[str] = set()

    def note(node: tree.Node) -> tree.Node:
        if isinstance(node, (tree.EnumHole, tree.Axis)) and node.name:
            names.add(node.name)
        return node

    for statement in file.statements:
        rewrite(statement, note)
    return names - {s.name for s in file.statements if isinstance(s, _DECLARED)}


def _enumerations(statement: tree.Statement) -> set[str]:
    names: set[str] = set()

    def note(node: tree.Node) -> tree.Node:
        if isinstance(node, tree.EnumHole):
            names.add(node.name)
        return node

    rewrite(statement, note)
    return names
