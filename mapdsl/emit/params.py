"""The code that sets the params of a map, looks which variant a checkpoint is, and respells legacy names."""

from __future__ import annotations

from mapdsl.compiler import ir
from mapdsl.compiler.names import TemplateError, patterns, unify
from mapdsl.compiler.shapes import Layout
from mapdsl.emit.context import Context
from mapdsl.emit.expressions import python, quoted
from mapdsl.emit.kinds import param_kinds
from mapdsl.emit.layout import INDENT, Code, breakable, call, lines
from mapdsl.emit.rules import LEFT, RuleEmitter
from mapdsl.language import tree
from mapdsl.language.source import Span


def params_code(context: Context) -> list[str]:
    """The body of `set_params`."""
    out: list[str] = []
    known: dict[str, str] = {}
    kinds = param_kinds(context.map)
    for param in context.map.params.values():
        options: list[Code] = [_option(param.name, option, known) for option in _options(param)]
        code = call(f"config.{kinds[param.name]}", quoted(param.name), *options)
        out += lines(code, 2, before=f"self.{context.attributes[param.name]} = ")
        known[param.name] = context.attributes[param.name]
    return out + _limits(context)


def _limits(context: Context) -> list[str]:
    """Ranges that are computed from params may be too long although no param is too large."""
    out: list[str] = []
    for index in context.map.indices.values():
        upper = index.upper
        if upper is None or isinstance(upper, (tree.Name, tree.Number)):
            continue
        if not any(name in context.map.indices for name in ir.names_in(upper)):
            out += lines(call("config.limit", quoted(index.name), python(upper, context.attributes)), 2)
    return out


def _options(param: ir.Param) -> tuple[tree.Expr, ...]:
    return param.value.options if isinstance(param.value, tree.Default) else (param.value,)


def _option(name: str, option: tree.Expr, known: dict[str, str]) -> Code:
    if isinstance(option, tree.Has):
        return f"lambda: self.found({quoted(name)})"
    code = python(option, known, lambda path: f"config.field({quoted(path)})")
    return "list" if code == "[]" else breakable(code, "lambda: ")


def accept_code(context: Context) -> list[str]:
    """The body of `accept`: legacy names first, so that `has` sees the names that they stand for.

    A spelling that is accepted in some variants only has to wait for the answer.
    """
    looks = [code for param in context.map.params.values() for code in _look(param)]
    guarded = [a for a in context.map.accepts if a.guard is not None]
    plain = [a for a in context.map.accepts if a.guard is None]
    out: list[str] = []
    for accept in plain:
        out += _accept(accept, context)
    out += looks
    for accept in guarded:
        out += _accept(accept, context)
    return out


def _look(param: ir.Param) -> list[str]:
    """`self.look(take, "P", "layers.#.w")` for a param that asks `has(layers.{i}.w)`."""
    found: list[str] = []
    for option in _options(param):
        if isinstance(option, tree.Has):
            codes = [quoted(text) for text in _look_patterns(option.template)]
            found += lines(call("self.look", "take", quoted(param.name), *codes), 2)
    return found


def _look_patterns(template: tree.Template) -> list[str]:
    """A template as runtime patterns, one for each choice of its enumerations."""
    texts = [""]
    for part in template.parts:
        match part:
            case tree.Text(text=text):
                texts = [before + text for before in texts]
            case tree.EnumHole(spellings=spellings):
                texts = [before + spelling for before in texts for spelling in spellings]
            case tree.WildcardHole(many=many):
                texts = [before + ("**" if many else "*") for before in texts]
            case _:
                texts = [f"{before}#" for before in texts]
    return texts


def _accept(accept: ir.Accept, context: Context) -> list[str]:
    """Under the loops over its indices, each legacy name respelled."""
    old, new = (ir.Tensor(template, None, (), accept.span) for template in (accept.old, accept.new))
    enumerations = accept.enumerations
    rule = ir.Rule((old,), "<->", (new,), None, False, False, accept.guard, enumerations, (), accept.span)
    axes = tuple(dict.fromkeys(_axes(accept.old, context.map)))
    shapes = ((None,), (None,))
    emitter = RuleEmitter(rule, Layout(axes, ((), ()), frozenset(), (), shapes), context, guard=accept.guard)
    out = comment(accept.span, 2, context.map)
    depth = 2
    for loop in (*emitter.index_loops(), *emitter.inner_loops()):
        out += loop.lines(depth)
        depth += 1
    if guard := emitter.guard():
        out += lines(guard, depth, before="if ", after=":")
        depth += 1
    head, depth = emitter.wild.head(accept.old, LEFT, depth)
    codecs = _codecs_behind(accept.new, context)
    code = call("take.accept", emitter.name(old), emitter.name(new), context.stored(codecs))
    return out + head + lines(code, depth)


def _axes(template: tree.Template, resolved: ir.Map) -> list[str]:
    out: list[str] = []
    for part in template.parts:
        if isinstance(part, tree.NumberHole):
            out += [name for name in ir.names_in(part.value) if name in resolved.indices]
        elif isinstance(part, tree.EnumHole):
            out.append(part.name)
    return out


def _codecs_behind(template: tree.Template, context: Context) -> tuple[ir.CodecSpec, ...]:
    """The codecs of the rules that read the names of a template: their companions are respelled too.

    A template with `{..}` fits the companions by itself.
    """
    found: dict[str, ir.CodecSpec] = {}
    if any(isinstance(part, tree.WildcardHole) and part.many for part in template.parts):
        return ()
    try:
        wanted = patterns(template)
    except TemplateError:
        return ()
    for rule in context.map.rules:
        for tensor in rule.left:
            if tensor.codecs and any(unify(a, b) is not None for a in wanted for b in patterns(tensor.template)):
                found |= {codec.name: codec for codec in tensor.codecs}
    return tuple(found.values()) if any(codec.kind != "raw" for codec in found.values()) else ()


def comment(span: Span, depth: int, resolved: ir.Map) -> list[str]:
    """The rule as it is written, with its line, and its file if that is included; nothing in it ends the comment."""
    place = str(span.line) if span.source is resolved.file.source else f"{file_name(span.source.path)}:{span.line}"
    shown = "".join(letter if letter.isprintable() else " " for letter in _without_comments(span.text))
    return [f"{INDENT * depth}# {place}: {' '.join(shown.split())}"]


def file_name(path: str) -> str:
    """The last part of a path, fit for a comment or a docstring."""
    last = path.replace("\\", "/").rpartition("/")[2]
    return "".join(letter if letter.isprintable() and letter not in '"\\' else "_" for letter in last)


def _without_comments(text: str) -> str:
    out, quoted_now, skipped = [], False, False
    for letter in text:
        skipped = (skipped or (letter == "#" and not quoted_now)) and letter != "\n"
        quoted_now ^= letter == '"' and not skipped
        out.append(" " if skipped else letter)
    return "".join(out)


__all__ = ["accept_code", "comment", "file_name", "params_code"]
