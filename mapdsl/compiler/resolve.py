"""From the syntax tree to the flat map: blocks unfolded, includes taken in, every name bound or reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import CASTS
from mapdsl.compiler.include import Scope, take_in
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, MapError, has_errors
from mapdsl.language.source import Span

# Codecs that need no declaration: a cast to a dtype, a change of value, and "as it is".
BUILT_IN = {"raw": "raw", "partial": "raw", "add": "add", "neg_exp": "neg_exp", **dict.fromkeys(CASTS, "cast")}
KINDS = ir.QUANTISED
GENERATORS = ("inv_freq",)


def resolve(file: tree.File) -> tuple[ir.Map, list[Diagnostic]]:
    """The map of a file, and what resolving found; MapError where nothing could be made of it."""
    resolver = Resolver(file)
    resolved = resolver.run()
    return resolved, resolver.found


class Resolver:
    """Resolves one file; included files are taken in by `include.take_in` first."""

    def __init__(self, file: tree.File) -> None:
        self.file = file
        self.found: list[Diagnostic] = []
        self.scope = Scope()
        self.rules: list[ir.Rule] = []
        self.accepts: list[ir.Accept] = []
        self.overrides: list[tuple[tree.Override, ir.Rule]] = []
        self.removes: list[tuple[tree.Remove, tree.Template]] = []

    def report(self, code: str, message: str, *spans: Span, **fields: str) -> None:
        """Note a finding and go on."""
        self.found.append(Diagnostic(code, message, spans, **fields))

    def run(self) -> ir.Map:
        """The resolved map; MapError where there are errors."""
        header = self.file.header
        if header is None:
            start = Span(self.file.source, 0, 0)
            self.report("S101", "expected `map NAME: LEFT <-> RIGHT` first", start)
            raise MapError(self.found)
        statements = take_in(self.file, self.scope, self.found)
        self._declare(statements)
        for statement, included in statements:
            self._statement(statement, (), included)
        self._apply_changes()
        if has_errors(self.found):
            raise MapError(self.found)
        of_file = [s for s, included in statements if not included]
        return ir.Map(
            header.name,
            header.left,
            header.right,
            {n: ir.Param(n, p.value, p.span) for n, p in self.scope.params.items()},
            {n: ir.Index(n, x.lower, x.upper, x.span) for n, x in self.scope.indices.items()},
            {n: ir.CodecSpec(n, c.kind, c.arguments, c.span) for n, c in self.scope.codecs.items()},
            tuple(self.scope.meshes),
            tuple(self.rules),
            tuple(self.accepts),
            tuple(s for s in of_file if isinstance(s, tree.Example)),
            tuple(s for s in of_file if isinstance(s, tree.Law)),
            self.file,
        )

    # --- declarations ---

    def _declare(self, statements: list[tuple[tree.Statement, bool]]) -> None:
        """Bind the declared names; each once, whatever its kind."""
        seen: dict[str, Span] = {}
        for statement, _ in statements:
            if not isinstance(statement, (tree.Param, tree.Index, tree.Codec)):
                if isinstance(statement, tree.Mesh):
                    self._join(statement)
                continue
            name = statement.name
            kind = "codec " if isinstance(statement, tree.Codec) else ""
            if kind + name in seen or (kind and name in BUILT_IN):
                spans = (statement.span, *([seen[kind + name]] if kind + name in seen else []))
                self.report(
                    "N114", f"`{name}` is declared twice" if len(spans) > 1 else f"`{name}` is built in", *spans
                )
                continue
            seen[kind + name] = statement.span
            self.scope.bind(statement)
        for index in self.scope.indices.values():
            self._check_names(index.lower, frozenset(self.scope.indices), "bound")
            self._check_names(index.upper, frozenset(self.scope.indices), "bound")
        self._check_order()
        for codec in self.scope.codecs.values():
            if codec.kind not in KINDS:
                self.report("N113", f"no codec kind `{codec.kind}`", codec.span, help=f"kinds: {', '.join(KINDS)}")

    def _join(self, mesh: tree.Mesh) -> None:
        """Declare a mesh; one that an include declares too cuts the axes of both."""
        meshes = self.scope.meshes
        for place, other in enumerate(meshes):
            if other.name == mesh.name:
                more = tuple(axis for axis in mesh.axes if axis not in other.axes)
                meshes[place] = replace(other, axes=other.axes + more)
                return
        meshes.append(mesh)

    def _check_order(self) -> None:
        """Params and index bounds may use only what stands before them, so that none depends on itself."""
        earlier: set[str] = set()
        for name, param in self.scope.params.items():
            for used in ir.names_in(param.value):
                if used in self.scope.indices:
                    self.report("N111", f"a param cannot depend on the index `{used}`", param.span)
                elif used in self.scope.params and used not in earlier and used != name:
                    self.report("N111", f"`{used}` is declared after `{name}`, which uses it", param.span)
            earlier.add(name)
        bound: set[str] = set()
        for name, index in self.scope.indices.items():
            for expr in (index.lower, index.upper):
                for used in ir.names_in(expr) if expr is not None else ():
                    if used in self.scope.indices and used not in bound:
                        self.report("N111", f"`{used}` is no index declared before `{name}`", index.span)
            bound.add(name)

    def _check_names(self, expr: tree.Expr | None, indices: frozenset[str], where: str) -> None:
        """Names of a guard, bound or hole are params or the indices at hand; meshes only inside `size()`."""
        if expr is None:
            return
        for used in ir.names_in(expr):
            if used in self.scope.params or used in indices:
                continue
            if used in self.scope.indices:
                message = f"the {where} uses the index `{used}`, which is not bound here"
                self.report("N111", message, expr.span, help="a guard speaks of indices that stand in the rule's names")
            elif used not in {mesh.name for mesh in self.scope.meshes}:
                self.report("N111", f"no param or index `{used}`", expr.span, help=self._nearest(used))

    def _nearest(self, name: str) -> str:
        from difflib import get_close_matches  # only imported when there is something to suggest

        near = get_close_matches(name, [*self.scope.params, *self.scope.indices, *self.scope.codecs], 1)
        return f"did you mean `{near[0]}`?" if near else "declare it with `param` or `index`"

    # --- rules ---

    def _statement(self, statement: tree.Statement, heads: tuple[tree.Pair, ...], included: bool) -> None:
        match statement:
            case tree.Block():
                for pair in statement.pairs:
                    for inner in statement.body:
                        self._statement(inner, (*heads, pair), included)
            case tree.Rule():
                if rule := self._rule(statement, heads, included):
                    self.rules.append(rule)
            case tree.Accept():
                self._accept(statement, heads)
            case tree.Override():
                if rule := self._rule(statement.rule, heads, False):
                    self.overrides.append((statement, rule))
            case tree.Remove():
                self.removes.append((statement, _joined(heads, 0, statement.template)))

    def _rule(self, rule: tree.Rule, heads: tuple[tree.Pair, ...], included: bool) -> ir.Rule | None:
        before = len(self.found)
        prefixed = [
            [replace(t, template=_joined(heads, n, t.template)) for t in side]
            for n, side in enumerate((rule.left, rule.right))
        ]
        templates = [t.template for side in prefixed for t in side]
        enumerations = self._enumerations(templates)
        sides = []
        for side in prefixed:
            spelled = [self._template(t.template, enumerations, templates) for t in side]
            sides.append(tuple(self._tensor(t, name) for t, name in zip(side, spelled, strict=True)))
        self._check_shapes_known(rule, enumerations)
        guard = ir.conjunction(*(pair.guard for pair in heads), rule.guard)
        bound = frozenset(used for side in sides for t in side for used in self._indices_of(t.template))
        self._check_names(guard, bound, "guard")
        value = rule.value
        if value is not None:
            value = self._value(rule, value, heads, enumerations, templates)
        if len(self.found) > before and has_errors(self.found[before:]):
            return None
        return ir.Rule(
            sides[0],
            rule.arrow,
            sides[1],
            value,
            rule.is_else,
            rule.optional,
            guard,
            enumerations,
            heads,
            rule.span,
            included,
        )

    def _value(
        self,
        rule: tree.Rule,
        value: tree.Value,
        heads: tuple[tree.Pair, ...],
        enumerations: dict[str, ir.Enumeration],
        templates: list[tree.Template],
    ) -> tree.Value:
        """The value of an absent side; a name in it stands under the prefix of the side that has tensors."""
        if rule.left and rule.right:
            self.report("S106", "a value stands beside an absent side, `_`", value.span)
        match value.content:
            case tree.Template() as template:
                side = 0 if rule.left else 1
                tied = self._template(_joined(heads, side, template), enumerations, templates)
                return replace(value, content=tied)
            case tree.Generator() as generator:
                if generator.name not in GENERATORS:
                    names = ", ".join(GENERATORS)
                    self.report("N113", f"no generator `{generator.name}`", generator.span, help=f"generators: {names}")
        return value

    def _accept(self, statement: tree.Accept, heads: tuple[tree.Pair, ...]) -> None:
        old, new = (_joined(heads, 0, t) for t in (statement.old, statement.new))
        enumerations = self._enumerations([old, new])
        pair = [self._template(t, enumerations, [old, new]) for t in (old, new)]
        guard = ir.conjunction(*(p.guard for p in heads), statement.guard)
        self._check_names(guard, frozenset(used for t in pair for used in self._indices_of(t)), "guard")
        self.accepts.append(ir.Accept(pair[0], pair[1], guard, enumerations, statement.span))

    def _tensor(self, tensor: tree.Tensor, template: tree.Template) -> ir.Tensor:
        return ir.Tensor(template, tensor.shape, tuple(map(self._codec, tensor.codecs)), tensor.span)

    def _codec(self, use: tree.CodecUse) -> ir.CodecSpec:
        if use.name in self.scope.codecs:
            codec = self.scope.codecs[use.name]
            return ir.CodecSpec(codec.name, codec.kind, codec.arguments, codec.span)
        if use.name not in BUILT_IN:
            self.report("N113", f"no codec `{use.name}`", use.span, help=self._nearest(use.name))
        return ir.CodecSpec(use.name, BUILT_IN.get(use.name, "raw"), use.arguments, use.span)

    # --- names ---

    def _enumerations(self, templates: list[tree.Template]) -> dict[str, ir.Enumeration]:
        """The enumerations that the templates of one rule declare; all spellings of one have one length."""
        found: dict[str, ir.Enumeration] = {}
        for template in templates:
            for part in template.parts:
                if not isinstance(part, tree.EnumHole):
                    continue
                name, size = part.name, len(part.spellings)
                if name in self.scope.params or name in self.scope.indices:
                    self.report(
                        "N114", f"`{name}` is declared already; an enumeration needs a name of its own", part.span
                    )
                if len(set(part.spellings)) < size:
                    self.report("K206", f"`{name}` spells two positions the same", part.span)
                if found.setdefault(name, ir.Enumeration(name, size)).size != size:
                    message = f"`{name}` has {found[name].size} positions elsewhere in the rule, {size} here"
                    self.report("K206", message, part.span)
        return found

    def _template(
        self, template: tree.Template, enumerations: dict[str, ir.Enumeration], of_rule: list[tree.Template]
    ) -> tree.Template:
        """The template with `{j}` spelled out, unnamed wildcards named, and every hole bound."""
        first = {
            p.name: p.spellings for t in reversed(of_rule) for p in reversed(t.parts) if isinstance(p, tree.EnumHole)
        }
        parts: list[tree.Part] = []
        for part in template.parts:
            match part:
                case tree.NumberHole(value=tree.Name(path=name)) if name in enumerations:
                    parts.append(tree.EnumHole(name, first[name], part.repeat, span=part.span))
                case tree.NumberHole():
                    self._check_hole(part)
                    parts.append(part)
                case tree.WildcardHole(name=None):
                    parts.append(replace(part, name=".." if part.many else "*"))
                case _:
                    parts.append(part)
        return tree.Template(tuple(parts), span=template.span)

    def _check_hole(self, hole: tree.NumberHole) -> None:
        used = set(ir.names_in(hole.value))
        unknown = used - set(self.scope.params) - set(self.scope.indices)
        if unknown:
            name = sorted(unknown)[0]
            self.report("N112", f"no index or enumeration `{name}`", hole.span, help=self._nearest(name))
        elif not used & set(self.scope.indices):
            self.report("N112", "a hole needs an index", hole.span, help="declare one with `index`")

    def _indices_of(self, template: tree.Template) -> Iterator[str]:
        for part in template.parts:
            if isinstance(part, tree.NumberHole):
                yield from (name for name in ir.names_in(part.value) if name in self.scope.indices)

    def _check_shapes_known(self, rule: tree.Rule, enumerations: dict[str, ir.Enumeration]) -> None:
        """`repeat j` and params in shapes are declared; free axes need no declaration."""
        for tensor in (*rule.left, *rule.right):
            for axis in ir.axes_of(tensor.shape) if tensor.shape else ():
                if axis.repeat and axis.name not in enumerations and axis.name not in self.scope.indices:
                    self.report("N112", f"`repeat {axis.name}` needs an index or an enumeration", axis.span)

    # --- override and remove ---

    def _apply_changes(self) -> None:
        for statement, rule in self.overrides:
            tensors = rule.left or rule.right
            if (
                place := self._find(statement.span, tensors[0].template, "right" if not rule.left else "left")
            ) is not None:
                self.rules[place] = rule
        for removal, template in self.removes:
            if (place := self._find(removal.span, template, "left")) is not None:
                del self.rules[place]

    def _find(self, span: Span, template: tree.Template, side: str) -> int | None:
        """Position of the one included rule known by a template."""
        wanted = skeleton(template)
        hits = []
        for place, rule in enumerate(self.rules):
            known = rule.left or (rule.right if side == "right" or not rule.left else ())
            if rule.included and known and skeleton(known[0].template) == wanted:
                hits.append(place)
        if len(hits) == 1:
            return hits[0]
        what = "no included rule has this name" if not hits else f"{len(hits)} included rules have this name"
        self.report("N117", what, span, help="name one rule of an include by its left template, prefixes joined")
        return None


def skeleton(template: tree.Template) -> str:
    """A template's text with its holes blank: two templates of one skeleton differ in the names of their holes only."""
    parts = []
    for part in template.parts:
        match part:
            case tree.Text(text=text):
                parts.append(text)
            case tree.EnumHole(spellings=spellings):
                parts.append("{" + "|".join(spellings) + "}")
            case tree.WildcardHole(many=many):
                parts.append("{..}" if many else "{*}")
            case _:
                parts.append("{}")
    return "".join(parts)


def _joined(heads: tuple[tree.Pair, ...], side: int, template: tree.Template) -> tree.Template:
    """The template under its block prefixes, joined with dots; neighbouring texts become one."""
    pieces = [(head.left, head.right)[side] for head in heads] + [template]
    parts: list[tree.Part] = []
    for piece in pieces:
        for number, part in enumerate(piece.parts):
            if number == 0 and parts:
                parts.append(tree.Text(".", span=part.span))
            parts.append(part)
    merged: list[tree.Part] = []
    for part in parts:
        if merged and isinstance(part, tree.Text) and isinstance(last := merged[-1], tree.Text):
            merged[-1] = tree.Text(last.text + part.text, span=part.span)
        else:
            merged.append(part)
    return tree.Template(tuple(merged), span=template.span)
