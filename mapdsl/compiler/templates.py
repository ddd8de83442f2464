"""What is proved of single templates: each is read in one way, spells no two tensors the same, and no negative number.

The names that codecs derive from a template are held to the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec, codec_key
from mapdsl.compiler.collide import PRIME, indices_of, witness
from mapdsl.compiler.companions import companion
from mapdsl.compiler.formula import Scope, Verdict, decide, rename
from mapdsl.compiler.names import Pattern, TemplateError, Wildcard, number_holes, patterns, unify
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic


def check_templates(resolved: ir.Map, scope: Scope, codecs: dict[str, AnyCodec]) -> list[Diagnostic]:
    """K203, K205, K206, K207 of the templates of rules, `accept` lines and `has(...)`, D402 of companions."""
    return _Templates(resolved, scope, codecs).run()


class _Templates:
    def __init__(self, resolved: ir.Map, scope: Scope, codecs: dict[str, AnyCodec]) -> None:
        self.map = resolved
        self.scope = scope
        self.codecs = codecs
        self.found: list[Diagnostic] = []

    def run(self) -> list[Diagnostic]:
        for rule in self.map.rules:
            for tensor in (*rule.left, *rule.right):
                if self._template(tensor.template, rule.guard) and tensor.codecs:
                    self._companions(tensor, rule)
        for accept in self.map.accepts:
            for template in (accept.old, accept.new):
                self._template(template, accept.guard)
        for param in self.map.params.values():
            options = param.value.options if isinstance(param.value, tree.Default) else (param.value,)
            for option in options:
                if isinstance(option, tree.Has):
                    self._asked(option.template)
        return self.found

    def _asked(self, template: tree.Template) -> None:
        """The template of `has(...)`, which is read as others are, for any values of what stands in it."""
        try:
            patterns(template)
        except TemplateError as err:
            self.found.append(Diagnostic(err.code, err.message, (err.span,)))

    def _template(self, template: tree.Template, guard: tree.Expr | None) -> bool:
        try:
            found = patterns(template)
        except TemplateError as err:
            self.found.append(Diagnostic(err.code, err.message, (err.span,)))
            return False
        holes = list(number_holes(found[0]))
        for hole in holes:
            self._table(hole)
        if any(not _is_plain(hole.value, self.map) for hole in holes):
            self._injective(found[0], template, guard)
        return True

    # --- numbers ---

    def _table(self, hole: tree.NumberHole) -> None:
        """K205 where a map itself gives a table with a number twice; one of a config is looked at when that is read."""
        if not _is_table(hole.value, self.map):
            return
        param = self.map.params[hole.value.value.path]  # type: ignore[union-attr]
        for option in param.value.options if isinstance(param.value, tree.Default) else (param.value,):
            numbers = [item.value for item in getattr(option, "items", ()) if isinstance(item, tree.Number)]
            if len(set(numbers)) < len(numbers):
                twice = next(number for number in numbers if numbers.count(number) > 1)
                message = f"the index table `{param.name}` holds {twice} twice, so two tensors would have one name"
                self.found.append(Diagnostic("K205", message, (hole.span, option.span)))

    def _injective(self, pattern: Pattern, template: tree.Template, guard: tree.Expr | None) -> None:
        """K205: two values of an index must not spell one name, and no hole may be negative."""
        used = indices_of(pattern, self.map)
        for hole in number_holes(pattern):
            if _is_table(hole.value, self.map):
                continue
            facts: list[tree.Expr] = [tree.Operation("<", (hole.value, tree.Number(0, span=hole.span)), span=hole.span)]
            verdict = decide(self.scope, facts + ([guard] if guard else []), used)
            if verdict.status == "open":
                shown = ", ".join(f"{name} = {value}" for name, value in verdict.witness)
                self.found.append(Diagnostic("K205", "this hole can be negative", (hole.span,), witness=shown))
                return
        verdict = self._spells_twice(pattern, used, guard, template)
        if verdict.status == "open":
            message = "two values of the indices spell the same name"
            self.found.append(Diagnostic("K205", message, (template.span,), witness=witness(verdict, pattern)))
        elif verdict.status == "unknown":
            message = f"do two values of the indices spell the same name? {verdict.tried}"
            self.found.append(Diagnostic("K290", message, (template.span,)))

    def _spells_twice(
        self, pattern: Pattern, used: Sequence[str], guard: tree.Expr | None, node: tree.Template
    ) -> Verdict:
        """Can the pattern spell one name for two values of the indices? The second values are primed."""
        primed = {name: name + PRIME for name in used}
        holes = [hole.value for hole in number_holes(pattern)]
        facts: list[tree.Expr] = [tree.Operation("==", (h, rename(h, primed)), span=h.span) for h in holes]
        pairs = [(tree.Name(n, span=node.span), tree.Name(primed[n], span=node.span)) for n in used]
        differ = [tree.Operation("!=", pair, span=node.span) for pair in pairs]
        facts.append(differ[0] if len(differ) == 1 else tree.Operation("or", tuple(differ), span=node.span))
        facts += [guard, rename(guard, primed)] if guard else []
        return decide(self.scope, facts, [*used, *primed.values()])

    # --- companions ---

    def _companions(self, tensor: ir.Tensor, rule: ir.Rule) -> None:
        """K203, D402: a companion belongs to one tensor, so its name has to tell which."""
        codecs = [self.codecs[codec_key(spec)] for spec in tensor.codecs]
        templates = dict.fromkeys(
            t for codec in codecs for t in (getattr(codec, "payload", "{key}"), *codec.companions)
        )
        for pattern in patterns(tensor.template):
            try:
                derived = {template: companion(pattern, template, tensor.span) for template in templates}
            except TemplateError as err:
                self.found.append(Diagnostic(err.code, err.message, (err.span,)))
                return
            if any(self._is_shared(template, name, pattern, rule.guard, tensor) for template, name in derived.items()):
                return
            for one, other in itertools.combinations(derived.values(), 2):
                if pattern.is_wild and not rule.is_else and unify(one, other) is not None:
                    message = "a companion of one tensor may be called as another tensor of this rule"
                    shown = witness(_ANY, one, other)
                    self.found.append(Diagnostic("D402", message, (tensor.span,), witness=shown))
                    return

    def _is_shared(
        self, template: str, derived: Pattern, pattern: Pattern, guard: tree.Expr | None, tensor: ir.Tensor
    ) -> bool:
        """Whether two tensors of one pattern have the same companion: what tells them apart is not in its name."""
        message = f"several tensors share the companion `{template}`"
        help_ = "name the companion by `{key}`, or give the tensors folders of their own"
        if _wildcards(pattern) - _wildcards(derived):
            self.found.append(Diagnostic("D402", message, (tensor.span,), witness=witness(_ANY, derived), help=help_))
            return True
        used = indices_of(pattern, self.map)
        if set(used) <= set(indices_of(derived, self.map)):
            return False
        verdict = self._spells_twice(derived, used, guard, tensor.template)
        if verdict.status == "open":
            shown = witness(verdict, derived)
            self.found.append(Diagnostic("D402", message, (tensor.span,), witness=shown, help=help_))
        elif verdict.status == "unknown":
            self.found.append(Diagnostic("K290", f"{message}? {verdict.tried}", (tensor.span,)))
        return verdict.status != "closed"


_ANY = Verdict("open")


def _wildcards(pattern: Pattern) -> set[str]:
    return {segment.name for segment in pattern.segments if isinstance(segment, Wildcard)}


def _is_table(value: tree.Expr, resolved: ir.Map) -> bool:
    """Whether a hole is an element of an index table, `{A[a]}`: a list of distinct numbers from 0."""
    match value:
        case tree.Lookup(value=tree.Name(path=table), index=tree.Name(path=index)):
            return table in resolved.params and index in resolved.indices
    return False


def _is_plain(value: tree.Expr, resolved: ir.Map) -> bool:
    """Whether a hole is an index alone, plus a number or a param, or in a table: injective and never negative."""
    if _is_table(value, resolved):
        return True
    match value:
        case tree.Name(path=path):
            return path not in resolved.indices or _starts_at_zero(resolved.indices[path], resolved)
        case tree.Operation(operator="+", operands=(one, other)):
            indices = [n for n in ir.names_in(value) if n in resolved.indices]
            simple = isinstance(one, (tree.Name, tree.Number)) and isinstance(other, (tree.Name, tree.Number))
            return simple and len(indices) == 1 and _starts_at_zero(resolved.indices[indices[0]], resolved)
    return False


def _starts_at_zero(index: ir.Index, resolved: ir.Map) -> bool:
    """Whether it is seen at once that an index is never negative: a number or a param is its lower bound, or none."""
    match index.lower:
        case None | tree.Number():
            return True
        case tree.Name(path=path):
            return path in resolved.params
    return False
