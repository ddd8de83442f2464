"""From Lark's parse tree to the syntax tree, second half: statements. One method a grammar rule, named as the rule."""

# Methods are named as the rules of the grammar, which documents them.
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

from lark import Token, Tree

from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError
from mapdsl.language.layout import comments
from mapdsl.language.parts import PartsBuilder
from mapdsl.language.source import Span

TOP_LEVEL = frozenset({"param", "index", "codec", "mesh", "example", "law"})
RESERVED = frozenset({"and", "or", "not", "in", "true", "false", "local", "repeat"})
GRADES = ("bit", "bit, guarded", "value", "lossy", "none")


class Builder(PartsBuilder):
    """Builds the statements of one source. What is wrong with them is in `found` afterwards."""

    def statements(self, nodes: list[Any]) -> tuple[tree.Statement, ...]:
        """The statements that could be built; a bad one does not hide the next."""
        built = []
        for node in nodes:
            try:
                built.append(self.build(node))
            except MapError as problem:
                self.found += problem.diagnostics
        return tuple(built)

    # --- file and declarations ---

    def file(self, node: Any) -> tree.File:
        header, *statements = node.children
        return tree.File(self.source, self.build(header), self.statements(statements), comments(self.source))

    def _check_free(self, name: Token | str, span: Span | None = None) -> None:
        """Names that mean something else inside an expression or a hole would be declared in vain."""
        if name in RESERVED:
            self.report(
                "S101", f"`{name}` is a word of the language", span or self.span(name), help="choose another name"
            )

    def header(self, node: Any) -> tree.Header:
        name, left, _, right = node.children
        return tree.Header(str(name), str(left), str(right), span=self.span(node))

    def param(self, node: Any) -> tree.Param:
        name, value = node.children
        self._check_free(name)
        field = tree.Name(str(name), span=self.span(name))
        return tree.Param(str(name), field if value is None else self.build(value), span=self.span(node))

    def index(self, node: Any) -> tree.Index:
        """`i < U`, `A <= i < U` or `i >= A`: the grammar reads sums, the one that is the index must be a plain name."""
        parts: list[Any] = [str(child) if isinstance(child, Token) else self.build(child) for child in node.children]
        span = self.span(node)
        match parts:
            case [tree.Name(path=name), "<", upper] if "." not in name:
                return tree.Index(name, None, upper, span=span)
            case [lower, "<=", tree.Name(path=name), "<", upper] if "." not in name:
                return tree.Index(name, lower, upper, span=span)
            case [tree.Name(path=name), ">=", lower] if "." not in name:
                return tree.Index(name, lower, None, span=span)
        hint = "write `index i < N`, `index A <= i < N` or `index i >= A`"
        self.report("S101", "this is no range of an index", span, help=hint)
        return tree.Index("", None, None, span=span)

    def codec(self, node: Any) -> tree.Codec:
        name, kind, arguments = node.children
        return tree.Codec(str(name), str(kind), self.maybe(arguments) or (), span=self.span(node))

    def arguments(self, node: Any) -> tuple[tree.Argument, ...]:
        return self.all(node.children)

    def argument(self, node: Any) -> tree.Argument:
        name, value = node.children
        content: tuple[str, ...] | str | int | float
        if isinstance(value, Token):
            content = value[1:-1] if value.type == "STRING" else self.number(value)
        else:
            content = tuple(map(str, value.children))
        return tree.Argument(None if name is None else str(name), content, span=self.span(node))

    def mesh(self, node: Any) -> tree.Mesh:
        name, *axes = node.children
        return tree.Mesh(str(name), self.all(axes), span=self.span(node))

    def mesh_axis(self, node: Any) -> tree.MeshAxis:
        name, uneven, by, _, either, _ = node.children
        return tree.MeshAxis(str(name), uneven is not None, by is not None, either is not None, span=self.span(node))

    def example(self, node: Any) -> tree.Example:
        name, arrow, target = node.children
        for key in (name, target):
            if "{" in key:
                self.report("S101", "an example names one tensor, without holes", self.span(key))
        goal = None if target == "error" and arrow.type == "TO" else str(target)
        return tree.Example(str(name), str(arrow), goal, span=self.span(node))

    def law(self, node: Any) -> tree.Law:
        first, _, middle, _, last, grade, guarded = node.children
        text = str(grade) if guarded is None else f"{grade}, {guarded}"
        if text not in GRADES:
            place = self.span(grade).to(self.span(guarded or grade))
            self.report(
                "S101", f"expected a grade, found `{text}`", place, help="a grade is one of: " + "; ".join(GRADES)
            )
        return tree.Law((str(first), str(middle), str(last)), text, span=self.span(node))

    def accept(self, node: Any) -> tree.Accept:
        old, new, guard = node.children
        return tree.Accept(self.template(old), self.template(new), self.maybe(guard), span=self.span(node))

    def include(self, node: Any) -> tree.Include:
        path, *bindings, guard = node.children
        found = self.all(bindings)
        return tree.Include(str(path)[1:-1], found, self.maybe(guard), span=self.span(node))

    def binding(self, node: Any) -> tree.Binding:
        name, value = node.children
        self._check_free(name)
        return tree.Binding(str(name), self.build(value), span=self.span(node))

    def override(self, node: Any) -> tree.Override:
        return tree.Override(self._rule(node.children[0]), span=self.span(node))

    def remove(self, node: Any) -> tree.Remove:
        return tree.Remove(self.template(node.children[0]), span=self.span(node))

    # --- rules ---

    def rule(self, node: Any) -> tree.Rule:
        return self._rule(node.children[0])

    def _rule(self, node: Any) -> tree.Rule:
        left, arrow, right, value, is_else, optional, guard = node.children
        span = self.span(node)
        rule = tree.Rule(
            self.build(left),
            "<->" if arrow is None else str(arrow.children[0]),
            () if right is None else self.build(right),
            self.maybe(value),
            is_else is not None,
            optional is not None,
            self.maybe(guard),
            span=span,
        )
        if arrow is None:
            hint = "write `STORED <-> MODEL`, or `:` at the end of a block head"
            self.report("S101", "a rule needs an arrow", span, help=hint)
        else:
            self._check_direction(rule, self.span(arrow))
        return rule

    def _check_direction(self, rule: tree.Rule, arrow: Span) -> None:
        """`->` drops, `<-` does not make; what only one side holds needs a value to be made from."""
        if not rule.left and not rule.right:
            self.report("S101", "expected the name of a tensor on one side at least, found `_` on both", rule.span)
        elif rule.arrow != "<->":
            away, kept = (rule.right, rule.left) if rule.arrow == "->" else (rule.left, rule.right)
            if away and kept:
                hint = "a rule holds in both directions: write `<->`; a tensor of one side only has `_` on the other"
                self.report("S106", f"`{rule.arrow}` needs `_` on one side", arrow, help=hint)
            elif away:
                turned = "`_ <- KEY`" if rule.arrow == "->" else "`KEY -> _`"
                where = "behind" if rule.arrow == "->" else "before"
                hint = f"write {turned}, or `<->` and the value to make the tensor of: `= 0`, `~ 0`"
                self.report("S106", f"`{rule.arrow}` needs `_` {where} it", arrow, help=hint)
            elif rule.value:
                hint = f"a tensor that `{rule.arrow}` drops is never made: leave the value away, or write `<->`"
                self.report("S106", f"`{rule.arrow}` takes no value", rule.value.span, help=hint)
        elif rule.left and rule.right and rule.value:
            self.report("S106", "a value stands beside an absent side, `_`", rule.value.span)
        elif not (rule.left and rule.right) and not rule.value:
            turned = "`_ <- KEY`" if rule.right else "`KEY -> _`"
            hint = f"write {turned}, or the value to make the tensor of: `= 0` (compared), `~ 0` (not compared)"
            self.report("S106", "`<->` needs a tensor on both sides, or a value beside `_`", arrow, help=hint)

    def side(self, node: Any) -> tuple[tree.Tensor, ...]:
        return self.trees(node)

    def tensor(self, node: Any) -> tree.Tensor:
        key, shape, *codecs = node.children
        return tree.Tensor(self.template(key), self.maybe(shape), self.all(codecs), span=self.span(node))

    def codec_use(self, node: Any) -> tree.CodecUse:
        name, arguments = node.children
        return tree.CodecUse(str(name), self.maybe(arguments) or (), span=self.span(node))

    def value(self, node: Any) -> tree.Value:
        mark, content = node.children
        made: tree.Number | tree.Template | tree.Generator
        if not isinstance(content, Token):
            made = self.build(content)
        elif content.type == "KEY":
            made = self.template(content)
        else:
            made = tree.Number(self.number(content), span=self.span(content))
        return tree.Value(made, mark.type == "EQUALS", span=self.span(node))

    def generator(self, node: Any) -> tree.Generator:
        name, *arguments = node.children
        return tree.Generator(str(name), self.all(arguments), span=self.span(node))

    # --- blocks ---

    def block(self, node: Any) -> tree.Block:
        heads = [child for child in node.children if child.data == "pair"]
        body = [child for child in node.children if child.data != "pair"]
        for child in body:
            self.check_inside_block(child)
        # The body first: a head nested too deep must not hide the body's errors.
        statements = self.statements(body)
        return tree.Block(tuple(map(self._pair, heads)), statements, span=self.span(node))

    def check_inside_block(self, node: Tree[Token]) -> None:
        """Declarations stand at the top level."""
        if node.data in TOP_LEVEL:
            span = self.span(node)
            word = Span(self.source, span.start, span.start + len(node.data))
            hint = "move it out of the block"
            self.report("S101", f"`{node.data}` stands at the top level, not in a block", word, help=hint)

    def head(self, node: Any) -> tuple[tree.Pair, ...]:
        """A block head by itself: the pairs, without a body."""
        return tuple(map(self._pair, node.children))

    def _pair(self, node: Any) -> tree.Pair:
        left, arrow, right, value, is_else, optional, guard = node.children
        span = self.span(node)
        sides = [side for side in (left, right) if side is not None]
        keys = [_only_key(side) for side in sides]
        plain = all(keys) and not any((value, is_else, optional)) and (arrow is None or arrow.children[0] == "<->")
        if not plain:
            hint = "write `A <-> B:`, or `A:` for the same prefix on both sides; `.` is the empty prefix"
            self.report("S105", "a block head is a pair of prefixes", span, help=hint)
            return tree.Pair(tree.Template((), span=span), tree.Template((), span=span), self.maybe(guard), span=span)
        prefixes = [self.prefix(key) for key in keys if key]
        return tree.Pair(prefixes[0], prefixes[-1], self.maybe(guard), span=span)


def _only_key(side: Any) -> Token | None:
    """The name of a side that is one tensor with neither shape nor codec."""
    match side.children:
        case [Tree(data="tensor", children=[key, None, *codecs])] if not any(codecs):
            return key if isinstance(key, Token) else None
    return None
