"""The adapter module of a checked map: what fills `codegen/adapter.py.jinja`."""

from __future__ import annotations

import hashlib
import itertools
import keyword
from dataclasses import dataclass, field

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.collide import Collisions
from mapdsl.compiler.names import Pattern, TemplateError, patterns, unify
from mapdsl.emit.codecs import constructor
from mapdsl.emit.expressions import attribute, local, pattern_code, python, quoted
from mapdsl.emit.layout import INDENT, Bracketed, Code, call, flat, lines
from mapdsl.emit.rules import LEFT, RIGHT, Loop, RuleEmitter
from mapdsl.language import tree
from mapdsl.resources import resource


@dataclass
class Section:
    """Rules that share their loops over indices."""

    loops: tuple[Loop, ...]
    rules: list[RuleEmitter] = field(default_factory=list)


def adapter_source(checked: Checked, command: str = "mapdsl compile") -> str:
    """The Python source of the adapter."""
    return _AdapterEmitter(checked, command).source().rstrip("\n") + "\n"


def class_name(map_name: str) -> str:
    """`DeepseekV4Adapter` for `deepseek_v4`."""
    return "".join(word.capitalize() for word in map_name.split("_")) + "Adapter"


def environment() -> Environment:
    """Jinja's environment over `codegen/`: undefined names are errors, and nothing is escaped (it writes Python)."""
    loader = FileSystemLoader(resource("codegen"))
    return Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


class _AdapterEmitter:
    def __init__(self, checked: Checked, command: str) -> None:
        self.checked = checked
        self.map = checked.map
        self.layouts = checked.layouts
        self.command = command
        self.alternatives: dict[tuple[str, ...], str] = {}
        self.codecs: dict[str, ir.CodecSpec] = {}
        for rule in self.map.rules:
            for tensor in (*rule.left, *rule.right):
                self._note_codecs(tensor.codecs)
        self.emitters = [
            RuleEmitter(rule, layout, self.map, self.alternatives)
            for rule, layout in zip(self.map.rules, self.layouts, strict=True)
        ]

    def _note_codecs(self, codecs: tuple[ir.CodecSpec, ...]) -> None:
        if codecs:
            names = tuple(codec.name for codec in codecs)
            self.codecs |= {codec.name: codec for codec in codecs if codec.kind != "raw"}
            self.alternatives[names] = "_".join(_constant(codec) for codec in codecs) + ("_ONLY" * (len(codecs) == 1))

    def source(self) -> str:
        text = self.map.file.source.text
        to_right, to_left = self._direction(LEFT), self._direction(RIGHT)
        codecs = self._codec_lines()
        accepts = self._accepts()
        body = "\n".join([*codecs, *self._params(), *accepts, *to_right, *to_left])
        left = self.map.left
        return (
            environment()
            .get_template("adapter.py.jinja")
            .render(
                title=f"Adapter of {self.map.name}: {self.map.left} <-> {self.map.right}.",
                source=self.map.file.source.path.replace("\\", "/").rpartition("/")[2],
                digest=hashlib.sha256(text.encode()).hexdigest()[:16],
                command=self.command,
                imports="\n".join(_imports(body)),
                codecs=codecs,
                class_name=class_name(self.map.name),
                name=self.map.name,
                left=self.map.left,
                right=self.map.right,
                quoted_name=quoted(self.map.name),
                quoted_left=quoted(self.map.left),
                quoted_right=quoted(self.map.right),
                params=self._params(),
                accepts=accepts,
                to_right=to_right or [f"{INDENT * 2}del take, put"],
                to_left=to_left or [f"{INDENT * 2}del take, put"],
                from_signature=_signature(f"from_{left}", "state_dict: Mapping[str, Tensor]", "dict[str, Tensor]"),
                to_signature=_signature(f"to_{left}", "state_dict: Mapping[str, Tensor]", "dict[str, Tensor]"),
                single_signature=_signature(
                    f"convert_single_tensor_to_{left}", "name: str, tensor: Tensor", "list[tuple[str, Tensor]]"
                ),
            )
        )

    # --- declarations ---

    def _codec_lines(self) -> list[str]:
        out: list[str] = []
        for name, codec in self.codecs.items():
            out += lines(constructor(codec), 0, before=f"{_constant(codec)} = ")
            del name
        for names, constant in self.alternatives.items():
            words = [_constant(self.codecs[n]) if n in self.codecs else "RAW" for n in names]
            text = f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"
            out.append(f"{constant} = {text}")
        return ["", *out] if out else []

    def _params(self) -> list[str]:
        out: list[str] = []
        declared: list[str] = []
        for param in self.map.params.values():
            options = param.value.options if isinstance(param.value, tree.Default) else (param.value,)
            thunks = [self._option(param.name, option, declared) for option in options]
            code = call("config.param", quoted(param.name), *thunks)
            out += lines(code, 2, before=f"self.{attribute(param.name)} = ")
            declared.append(param.name)
        return out

    def _option(self, name: str, option: tree.Expr, declared: list[str]) -> str:
        if isinstance(option, tree.Has):
            # What reading found; before that, and when nothing was read, the next option.
            return f"lambda: self.found({quoted(name)})"
        return f"lambda: {python(option, declared, lambda path: f'config.field({quoted(path)})')}"

    def _accepts(self) -> list[str]:
        out: list[str] = []
        for param in self.map.params.values():
            options = param.value.options if isinstance(param.value, tree.Default) else (param.value,)
            for option in options:
                if isinstance(option, tree.Has):
                    code = f"self.look(take, {quoted(param.name)}, {_look_pattern(option.template)})"
                    out.append(f"{INDENT * 2}self.{attribute(param.name)} = {code}")
        for accept in self.map.accepts:
            out += self._accept(accept)
        return out

    def _accept(self, accept: ir.Accept) -> list[str]:
        rule = ir.Rule(
            (ir.Tensor(accept.old, None, (), accept.span),),
            "<->",
            (ir.Tensor(accept.new, None, (), accept.span),),
            None,
            False,
            False,
            accept.guard,
            accept.enumerations,
            (),
            accept.span,
        )
        from mapdsl.compiler.shapes import layout

        emitter = RuleEmitter(rule, layout(rule, self.map.indices), self.map, self.alternatives)
        out = _comment(accept.span, 2)
        depth = 2
        for loop in (*emitter.index_loops(), *emitter.inner_loops()):
            out.append(f"{INDENT * depth}{loop.code}:")
            depth += 1
        if guard := emitter.guard():
            out.append(f"{INDENT * depth}if {guard}:")
            depth += 1
        names = [pattern_code(t, self.map.params, emitter.spelled) for t in (accept.old, accept.new)]
        return out + lines(call("take.accept", *names, self._stored_of(accept.new)), depth)

    def _stored_of(self, template: tree.Template) -> str | None:
        """The alternatives of the rule that reads a template without wildcards: its companions are respelled too."""
        try:
            wanted = patterns(template)
        except TemplateError:
            return None
        for rule in self.map.rules:
            for tensor in rule.left:
                if tensor.codecs and any(
                    unify(a, b) is not None for a in wanted if not a.is_wild for b in patterns(tensor.template)
                ):
                    return self.alternatives[tuple(codec.name for codec in tensor.codecs)]
        return None

    # --- rules ---

    def _direction(self, source: int) -> list[str]:
        """All rules from one side: ties are checked before and made after the others, wildcards come last."""
        named = [e for e in self.emitters if not e.rule.is_else]
        ties = [e for e in named if e.rule.value is not None and isinstance(e.rule.value.content, tree.Template)]
        plain = [e for e in named if e not in ties]
        made = [e for e in ties if not e.rule.sides[source]]
        checked = [e for e in ties if e.rule.sides[source]]
        elses = sorted((e for e in self.emitters if e.rule.is_else), key=_width)
        out: list[str] = []
        for rules in (checked, plain, made, elses):
            for section in _sections(rules):
                out += self._section(section, source, elses)
        while out and not out[-1]:
            out.pop()
        return out

    def _section(self, section: Section, source: int, elses: list[RuleEmitter]) -> list[str]:
        """The loops, and in them the rules, neighbours of one guard under one `if`."""
        depth = 2
        head: list[str] = []
        for loop in section.loops:
            head.append(f"{INDENT * depth}{loop.code}:")
            depth += 1
        body: list[str] = []
        for guard, group in itertools.groupby(section.rules, key=RuleEmitter.outer_guard):
            rules = list(group)
            inner = depth + (guard is not None)
            code = [line for emitter in rules for line in self._rule(emitter, source, inner)]
            if code and guard is not None:
                code = [f"{INDENT * depth}if {guard}:", *code, *self._shut(rules, source, elses, depth)]
            body += code
        return [*head, *body, ""] if body else []

    def _rule(self, emitter: RuleEmitter, source: int, depth: int) -> list[str]:
        """One rule: a comment with its text, the loops over its enumerations, its code."""
        loops = emitter.inner_loops()
        code = emitter.emit(source, depth + len(loops))
        heads = [f"{INDENT * (depth + n)}{loop.code}:" for n, loop in enumerate(loops)]
        return [*_comment(emitter.rule.span, depth), *heads, *code] if code else []

    def _shut(self, rules: list[RuleEmitter], source: int, elses: list[RuleEmitter], depth: int) -> list[str]:
        """Names whose guard does not hold are carried by no wildcard: tell `take` where one would."""
        names: list[Code] = []
        wild: list[str] = []
        for emitter in rules:
            for tensor in emitter.rule.sides[source]:
                mine = patterns(tensor.template)
                wide = [p for e in elses if e is not emitter for t in e.rule.sides[source] for p in patterns(t.template)]
                if not any(self._may_meet(a, b) for a in mine for b in wide):
                    continue
                if emitter.rule.is_else:
                    wild += emitter.shut_wild(tensor, depth + 1)
                else:
                    names.append(emitter.all_names(tensor))
        if names:
            wild = [*lines(Bracketed("take.shut", names), depth + 1), *wild]
        return [f"{INDENT * depth}else:", *wild] if wild else []

    def _may_meet(self, one: Pattern, other: Pattern) -> bool:
        equations = unify(one, other)
        if equations is None:
            return False
        collisions = Collisions(self.map, self.checked.scope, "K201", "read")
        return collisions.meet(None, None, equations, one, other).status != "closed"


def _sections(emitters: list[RuleEmitter]) -> list[Section]:
    """Rules of the same loops together, in order of their first: the order of rules changes nothing."""
    sections: dict[tuple[Loop, ...], Section] = {}
    for emitter in emitters:
        loops = tuple(emitter.index_loops())
        sections.setdefault(loops, Section(loops)).rules.append(emitter)
    return list(sections.values())


def _width(emitter: RuleEmitter) -> tuple[int, str]:
    """Narrower wildcards first: those with more literal segments."""
    tensor = (emitter.rule.left or emitter.rule.right)[0]
    segments = patterns(tensor.template)[0].segments
    return -len(segments), tensor.template.span.text


def _constant(codec: ir.CodecSpec) -> str:
    """The module constant of a codec: `FP8`; for a built-in with arguments `ADD_1`."""
    words = [codec.name.upper()]
    if codec.kind in ("add",):
        words += [str(a.value).replace("-", "MINUS_").replace(".", "_") for a in codec.arguments]
    name = "_".join(words)
    return f"{name}_" if keyword.iskeyword(name) else name


def _comment(span: object, depth: int) -> list[str]:
    """The rule as it is written, with its line."""
    text = " ".join(span.text.split())  # type: ignore[attr-defined]
    return [f"{INDENT * depth}# {span.line}: {text}"]  # type: ignore[attr-defined]


def _signature(name: str, parameters: str, result: str) -> str:
    items = ["self", *parameters.split(", "), "**options: Any"]
    if "Mapping" in parameters:
        items = ["self", parameters, "**options: Any"]
    return "\n".join(lines(Bracketed(name, items), 1, before="def ", after=f" -> {result}:"))


def _look_pattern(template: tree.Template) -> str:
    text = "".join(p.text if isinstance(p, tree.Text) else _look_part(p) for p in template.parts)
    return quoted(text)


def _look_part(part: tree.Part) -> str:
    if isinstance(part, tree.WildcardHole):
        return "**" if part.many else "*"
    return "#"


def _imports(body: str) -> list[str]:
    """Import lines for what the body uses, sorted as linters want them."""
    wanted = {
        "mapdsl.runtime.adapter": {"Adapter", "Keys"},
        "mapdsl.runtime.config": {"Config"},
        "mapdsl.runtime.put": {"Put"},
        "mapdsl.runtime.take": {"Take"},
    }
    for module, names in USED.items():
        used = {name for name in names if any(f"{name}{end}" in body for end in "(,)")}
        if used:
            wanted.setdefault(module, set()).update(used)
    out = ["from torch import Tensor", ""]
    return (
        sorted(["import torch"] if "torch." in body else [])
        + out
        + [
            flat(f"from {module} import {', '.join(sorted(names, key=_import_order))}")
            for module, names in sorted(wanted.items())
        ]
    )


def _import_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


# Names of the runtime that a body may use, by module.
USED = {
    "mapdsl.runtime.complement": ("RAW",),
    "mapdsl.runtime.take": ("place",),
    "mapdsl.runtime.items": ("positions",),
    "mapdsl.runtime.values": ("inv_freq",),
    "mapdsl.runtime.codecs.block_scaled": ("BlockScaled",),
    "mapdsl.runtime.codecs.values": ("Add", "Cast", "NegExp"),
}

__all__ = ["adapter_source", "attribute", "class_name", "environment", "local"]
