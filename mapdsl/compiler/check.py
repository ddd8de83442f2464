"""Everything that is proved of a map without a tensor."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from mapdsl.compiler import ir
from mapdsl.compiler.accepts import check_accepts
from mapdsl.compiler.codecs import AnyCodec, CodecError, codec_key, parse_codec
from mapdsl.compiler.collide import Collisions, entries, scope_of
from mapdsl.compiler.examples import check_examples
from mapdsl.compiler.formula import Scope, decide
from mapdsl.compiler.laws import check_laws
from mapdsl.compiler.lint import lint
from mapdsl.compiler.made import check_made
from mapdsl.compiler.meshes import check_meshes, cut_routers
from mapdsl.compiler.resolve import resolve
from mapdsl.compiler.shapes import Layout, ShapeError, layout, name_axes
from mapdsl.compiler.solvable import check_fit, check_sizes
from mapdsl.compiler.templates import check_templates
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, MapError, has_errors, ordered
from mapdsl.runtime.codecs.likeness import look_alike


@dataclass(frozen=True)
class Checked:
    """A map that holds: `layouts` has one entry a rule, `codecs` the parsed codecs by `codec_key`.

    `diagnostics` are warnings and lints.
    """

    map: ir.Map
    layouts: tuple[Layout, ...]
    codecs: dict[str, AnyCodec]
    scope: Scope = field(repr=False)
    diagnostics: list[Diagnostic]


def check(file: tree.File) -> Checked:
    """The checked map of a file; MapError with every error found."""
    resolved, found = resolve(file)
    return _Checker(resolved, found).run()


class _Checker:
    def __init__(self, resolved: ir.Map, found: list[Diagnostic]) -> None:
        self.map = resolved
        self.found = found
        self.scope = scope_of(resolved)

    def run(self) -> Checked:
        codecs = self._codecs()
        self._stop_at_errors()
        layouts = self._rules(codecs)
        self.found += check_templates(self.map, self.scope, codecs)
        self._stop_at_errors()
        self.found += check_meshes(self.map, layouts)
        self._stop_at_errors()
        for rule in self.map.rules:
            self.found += check_made(rule, self.map)
        self._stop_at_errors()
        left, right = (entries(self.map, codecs, side) for side in ("left", "right"))
        self.found += Collisions(self.map, self.scope, "K201", "read").run(left)
        self.found += Collisions(self.map, self.scope, "K202", "write").run(right)
        self.found += check_accepts(self.map, self.scope, codecs, left)
        self.found += check_examples(self.map, self.scope, left, right)
        self.found += check_laws(self.map, layouts)
        self.found += [*lint(self.map), *cut_routers(self.map, layouts)]
        self._stop_at_errors()
        return Checked(self.map, tuple(layouts), codecs, self.scope, ordered(self.found))

    def _stop_at_errors(self) -> None:
        if has_errors(self.found):
            raise MapError(ordered(self.found))

    # --- codecs ---

    def _codecs(self) -> dict[str, AnyCodec]:
        codecs: dict[str, AnyCodec] = {}
        used = [codec for rule in self.map.rules for t in (*rule.left, *rule.right) for codec in t.codecs]
        for spec in (*self.map.codecs.values(), *used):
            if codec_key(spec) in codecs:
                continue
            try:
                codecs[codec_key(spec)] = parse_codec(spec)
            except CodecError as err:
                spans = (err.span,) if err.span else ()
                self.found.append(Diagnostic(err.code, err.message, spans, help=err.help))
        if not has_errors(self.found):
            self._look_alikes(codecs)
        return codecs

    def _look_alikes(self, codecs: dict[str, AnyCodec]) -> None:
        """Alternatives are told apart by the names, dtypes and shapes of payload and companions."""
        for rule in self.map.rules:
            for tensor in (*rule.left, *rule.right):
                for first, second in itertools.combinations(tensor.codecs, 2):
                    if look_alike(codecs[codec_key(first)], codecs[codec_key(second)]):
                        message = f"`{first.name}` and `{second.name}` look the same in a checkpoint"
                        self.found.append(Diagnostic("D407", message, (tensor.span,)))

    # --- single rules ---

    def _rules(self, codecs: dict[str, AnyCodec]) -> list[Layout]:
        layouts, kept = [], []
        for rule in self.map.rules:
            try:
                found = layout(rule, self.map.indices)
            except ShapeError as err:
                self.found.append(Diagnostic(err.code, err.message, (err.span,), help=err.help))
                continue
            if rule.included and self._never_holds(rule, found):
                continue  # a variant that the including map decides against, by a param or a guard
            layouts.append(found)
            kept.append(rule)
            self.found += check_sizes(rule, found, self.map)
            self.found += check_fit(rule, found, codecs)
            self._guard(rule, found)
            self._wildcards(rule)
            self._open_ranges(rule)
        self.map = replace(self.map, rules=tuple(kept))
        return layouts

    def _guard(self, rule: ir.Rule, found: Layout) -> None:
        """K210: a guard chooses whole matches, so it cannot speak of an axis that a match absorbs. K208: never true."""
        if rule.guard is None:
            return
        if absorbed := self._absorbed(rule.guard, found):
            hint = "a guard speaks of indices that stand in the names of both sides"
            message = f"the guard mentions `{absorbed[0]}`, which the rule moves into a shape"
            self.found.append(Diagnostic("K210", message, (rule.guard.span,), help=hint))
        elif self._never_holds(rule, found):
            self.found.append(Diagnostic("K208", "this guard holds for no config", (rule.guard.span,)))

    def _absorbed(self, guard: tree.Expr, found: Layout) -> list[str]:
        return [n for n in ir.names_in(guard) if n in self.map.indices and n not in found.matched]

    def _never_holds(self, rule: ir.Rule, found: Layout) -> bool:
        if rule.guard is None or self._absorbed(rule.guard, found):
            return False
        used = [axis for axis in found.matched if axis in self.map.indices]
        return decide(self.scope, [rule.guard], used).status == "closed"

    def _wildcards(self, rule: ir.Rule) -> None:
        sides = [[{a for a in name_axes(t.template, {}) if a[0] == "{"} for t in side] for side in rule.sides]
        wild = [names for side in sides for names in side]
        many = any(p.many for s in rule.sides for t in s for p in ir.holes(t.template, tree.WildcardHole))  # type: ignore
        if many and not rule.is_else:
            hint = "end the rule in `else`: it carries the names that no other rule names"
            self.found.append(Diagnostic("K207", "a rule with `{..}` ends in `else`", (rule.span,), help=hint))
        elif rule.is_else and not many:
            self.found.append(Diagnostic("K207", "`else` belongs to a rule with `{..}`", (rule.span,)))
        if any(names != wild[0] for names in wild):
            message = "the wildcards of both sides are not the same"
            self.found.append(Diagnostic("K207", message, (rule.span,), help="name them: `{n:..}` on both sides"))

    def _open_ranges(self, rule: ir.Rule) -> None:
        """An index without an upper bound names no finite set, so it may only be dropped, and is read off its name."""
        is_dropped = rule.arrow != "<->" and not (rule.left and rule.right)
        for side in rule.sides:
            for tensor in side:
                for part in tensor.template.parts:
                    if isinstance(part, tree.NumberHole):
                        self._open_hole(part.value)
                for name in name_axes(tensor.template, self.map.indices):
                    index = self.map.indices.get(name)
                    if index is not None and index.upper is None and not is_dropped:
                        message = f"`{name}` has no upper bound, so it may stand only in what is dropped"
                        self.found.append(Diagnostic("N112", message, (tensor.span, index.span)))

    def _open_hole(self, value: tree.Expr) -> None:
        for name in ir.names_in(value):
            if name in self.map.indices and self.map.indices[name].upper is None:
                parts = ir.summands(value)
                rest = [part for part in parts if not (isinstance(part, tree.Name) and part.path == name)]
                if len(rest) != len(parts) - 1 or any(n in self.map.indices for p in rest for n in ir.names_in(p)):
                    message = f"`{name}` has no upper bound, so a hole may only add a number or a param to it"
                    self.found.append(Diagnostic("N112", message, (value.span,)))
                    return
