"""Hypothesis strategies: random syntax trees, and random ways to lay the same tree out as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from mapdsl.language import tree
from mapdsl.language.breaking import joints
from mapdsl.language.source import Source, Span
from mapdsl.language.unparse import unparse_header, unparse_pair, unparse_statement

NOWHERE = Span(Source("", ""), 0, 0)


def node(kind: Callable[..., Any], *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nodes of one kind with the given fields; deferred, because the strategies' reprs would fill megabytes."""
    return st.deferred(lambda: st.tuples(*parts).map(lambda values: kind(*values, span=NOWHERE)))


def tuples_of(part: st.SearchStrategy[Any], least: int, most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(part, min_size=least, max_size=most).map(tuple)


none = st.none()
names = st.sampled_from(["i", "L", "x_1", "heads", "index", "where", "orient", "_a", "padding", "mapped", "has_x"])
paths = st.one_of(names, st.sampled_from(["text_config.n", "a.b.c"]))
words = st.sampled_from(["layers", "0", "w-1", "a/b", "q_proj", "index", "-x", "weight", "@v", "$", "1x2"])
strings = st.text(
    st.characters(exclude_characters='"\\', exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=4
)

# --- names ---

numbers = node(tree.Number, st.integers(0, 10**17))
affine = st.deferred(
    lambda: st.recursive(
        st.one_of(numbers, node(tree.Name, paths)),
        lambda inner: st.one_of(
            node(tree.Operation, st.sampled_from(["+", "-", "*", "//", "%"]), st.tuples(inner, inner)),
            node(tree.Operation, st.just("-"), st.tuples(inner)),
            node(tree.Lookup, node(tree.Name, paths), inner),
            node(tree.Call, names, tuples_of(inner, 1, 2)),
        ),
        max_leaves=4,
    )
)
marks = st.sampled_from([(False, False), (True, False), (False, True)])
number_holes = st.builds(lambda value, mark: tree.NumberHole(value, *mark, span=NOWHERE), affine, marks)
enum_holes = node(tree.EnumHole, names, tuples_of(st.sampled_from(["w1", "a.b", "0", "x-y"]), 1, 3), st.booleans())
wildcards = node(tree.WildcardHole, st.one_of(none, names), st.booleans())
texts = st.lists(words, min_size=2, max_size=3).map(lambda parts: tree.Text("." + ".".join(parts) + ".", span=NOWHERE))
holes = st.one_of(number_holes, enum_holes, wildcards)


def _template(first: str, pieces: list[tuple[Any, Any]]) -> tree.Template:
    parts = [tree.Text(first, span=NOWHERE)]
    for hole, text in pieces:
        parts += [hole, text] if text else [hole]
    return tree.Template(tuple(parts), span=NOWHERE)


templates = st.deferred(
    lambda: st.builds(
        _template,
        st.sampled_from(["a.b", "layers.", "x/y"]),
        st.lists(st.tuples(holes, st.one_of(none, texts)), max_size=3),
    )
)

# --- expressions ---

leaves = st.one_of(numbers, node(tree.Name, paths), node(tree.String, strings), node(tree.Boolean, st.booleans()))


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    binary = ["+", "-", "*", "//", "%", "==", "!=", "<", "<=", ">", ">=", "in"]
    return st.one_of(
        node(tree.Operation, st.sampled_from(binary), st.tuples(inner, inner)),
        node(tree.Operation, st.sampled_from(["-", "not"]), st.tuples(inner)),
        node(tree.Operation, st.sampled_from(["and", "or"]), tuples_of(inner, 2, 3)),
        node(tree.ListLiteral, tuples_of(inner, 0, 3)),
        node(tree.Lookup, inner, inner),
        node(tree.Call, names, tuples_of(inner, 1, 2)),
        node(tree.Has, templates),
    )


expressions = st.deferred(lambda: st.recursive(leaves, _compound, max_leaves=8))
defaults = st.one_of(expressions, node(tree.Default, tuples_of(expressions, 2, 3)))
guards = st.one_of(none, expressions)

# --- shapes ---

axes = st.one_of(
    st.builds(lambda name, repeat: tree.Axis(name, repeat=repeat, span=NOWHERE), names, st.booleans()),
    st.integers(1, 4096).map(lambda size: tree.Axis(size=size, span=NOWHERE)),
)


def _sums(factors: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return node(tree.Sum, tuples_of(node(tree.Product, tuples_of(factors, 1, 3), st.booleans()), 2, 3))


factors = st.recursive(axes, lambda inner: _sums(inner), max_leaves=5)
dimensions = st.one_of(
    axes,
    node(tree.Product, tuples_of(factors, 2, 3)),
    _sums(factors),
    node(tree.Pad, axes, expressions),
)
shapes = st.one_of(none, node(tree.Shape, tuples_of(dimensions, 0, 3)))

# --- rules ---

argument_words = tuples_of(st.sampled_from(["f8e4m3", "128x128", "*x1", "flat"]), 1, 2)
floats = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**16), 10**16))
arguments = node(tree.Argument, st.one_of(none, names), st.one_of(argument_words, strings, floats))
codec_uses = node(tree.CodecUse, names, tuples_of(arguments, 0, 2))
tensors = node(tree.Tensor, templates, shapes, tuples_of(codec_uses, 0, 2))
sides = tuples_of(tensors, 1, 2)
generators = node(tree.Generator, names, tuples_of(expressions, 0, 2))
values = node(tree.Value, st.one_of(node(tree.Number, floats), templates, generators), st.booleans())


def _rules(left: Any, arrow: str, right: Any, value: Any) -> st.SearchStrategy[Any]:
    return node(tree.Rule, left, st.just(arrow), right, value, st.booleans(), st.booleans(), guards)


nothing = st.just(())
rules = st.deferred(
    lambda: st.one_of(
        _rules(sides, "<->", sides, none),
        _rules(sides, "->", nothing, none),
        _rules(nothing, "<-", sides, none),
        _rules(sides, "<->", nothing, values),
        _rules(nothing, "<->", sides, values),
    )
)

# --- statements ---

headers = node(tree.Header, names, names, names)
mesh_axes = node(tree.MeshAxis, names, st.booleans(), st.booleans(), st.booleans())
keys = st.sampled_from(["a.b", "layers.3.w", "error.x"])
grades = st.sampled_from(["bit", "bit, guarded", "value", "lossy", "none"])
declarations = st.deferred(
    lambda: st.one_of(
        node(tree.Param, names, defaults),
        node(tree.Index, names, st.one_of(none, expressions), expressions),
        node(tree.Index, names, expressions, none),
        node(tree.Codec, names, names, tuples_of(arguments, 0, 3)),
        node(tree.Mesh, names, tuples_of(mesh_axes, 1, 3)),
        node(tree.Example, keys, st.sampled_from(["->", "<-"]), keys),
        node(tree.Example, keys, st.just("->"), none),
        node(tree.Law, st.tuples(names, names, names), grades),
    )
)
bindings = node(tree.Binding, names, defaults)
others = st.deferred(
    lambda: st.one_of(
        rules,
        node(tree.Accept, templates, templates, guards),
        node(tree.Include, strings, tuples_of(bindings, 0, 2), guards),
        node(tree.Override, rules),
        node(tree.Remove, templates),
    )
)
prefixes = st.one_of(templates, st.just(tree.Template((), span=NOWHERE)))
same = prefixes.map(lambda prefix: (prefix, prefix))
pairs = st.deferred(
    lambda: st.builds(
        lambda sides, guard: tree.Pair(*sides, guard, span=NOWHERE),
        st.one_of(same, st.tuples(prefixes, prefixes)),
        guards,
    )
)
inside = st.deferred(
    lambda: st.recursive(
        others, lambda body: node(tree.Block, tuples_of(pairs, 1, 3), tuples_of(body, 1, 3)), max_leaves=6
    )
)
statements = st.one_of(declarations, inside)
files = st.deferred(
    lambda: st.builds(
        lambda header, body: tree.File(Source("", ""), header, body), headers, tuples_of(statements, 0, 5)
    )
)

# --- layouts ---

comments = st.sampled_from(["# note", '#"quoted', "#", "# a <-> b:", "## [ { ("])
blanks = st.sampled_from(["", "", "\n", "\n\n", "  \n\n \n"])


def scribble(draw: Callable[[Any], Any], file: tree.File) -> str:
    """The file as somebody in a hurry would write it: any indentation, broken lines, comments everywhere."""
    assert file.header is not None
    out = [draw(blanks), _untidy(draw, unparse_header(file.header), "")]
    _scribble_all(draw, file.statements, "", out)
    out.append(draw(blanks))
    return "".join(out) + draw(st.sampled_from(["", "# end", " "]))


def _scribble_all(draw: Any, body: tuple[tree.Statement, ...], indent: str, out: list[str]) -> None:
    for statement in body:
        out.append(draw(blanks))
        if draw(st.booleans()):
            out.append(" " * draw(st.integers(0, 9)) + draw(comments) + "\n")
        if isinstance(statement, tree.Block):
            head = ", ".join(unparse_pair(pair, short=draw(st.booleans())) for pair in statement.pairs)
            out.append(_untidy(draw, head + ":", indent))
            _scribble_all(draw, statement.body, indent + " " * draw(st.integers(1, 5)), out)
        else:
            out.append(_untidy(draw, unparse_statement(statement), indent))


def _untidy(draw: Any, text: str, indent: str) -> str:
    """One statement, cut at some of its joints, with wide gaps."""
    pieces = []
    before = 0
    for joint in joints(text):
        places = [joint.end, joint.start] if joint.is_arrow else [joint.end]
        if draw(st.integers(0, 3)) == 0:
            place = draw(st.sampled_from(places))
            pieces += [
                text[before:place],
                draw(st.sampled_from(["", "  "])),
                _line_end(draw),
                " " * draw(st.integers(0, 9)),
            ]
            before = place
    pieces.append(text[before:])
    return indent + "".join(pieces) + _line_end(draw)


def _line_end(draw: Any) -> str:
    comment = draw(st.one_of(st.just(""), comments))
    own = draw(st.one_of(st.just(""), comments))
    return f"{' ' * bool(comment)}{comment}\n" + (f"  {own}\n" if own else "") + draw(blanks)
