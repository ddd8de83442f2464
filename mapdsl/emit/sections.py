"""The code of all rules in one direction: loops shared by rules, and the bodies of blocks that are stated once."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.collide import Collisions
from mapdsl.compiler.names import Pattern, is_narrower, patterns, unify
from mapdsl.emit.context import Context
from mapdsl.emit.expressions import local, name_code
from mapdsl.emit.layout import INDENT, Code, call, flat, lines
from mapdsl.emit.params import comment
from mapdsl.emit.reserved import fresh
from mapdsl.emit.rules import LEFT, RIGHT, Loop, RuleEmitter, guard_code
from mapdsl.emit.solving import mentions
from mapdsl.language import tree

DIRECTIONS = ("_to_right", "_to_left")
# A block with fewer rules is as easily read twice.
_WORTH_A_METHOD = 3


@dataclass(frozen=True)
class Call:
    """A call of a shared body under one pair of prefixes."""

    loops: tuple[Loop, ...]
    guard: tree.Expr | None
    method: str
    prefixes: tuple[str, str]
    place: int


@dataclass
class Body:
    """Rules of a block that read the same under each of its pairs of prefixes: they become a method of their own."""

    name: str
    variants: list[list[RuleEmitter]]
    calls: list[Call] = field(default_factory=list)

    def parameters(self, variables: tuple[str, str]) -> list[str]:
        """The variables of those prefixes that are not empty."""
        return [v for v, prefix in zip(variables, self.calls[0].prefixes, strict=True) if prefix]


class Directions:
    """Both directions of a checked map as code."""

    def __init__(self, checked: Checked, context: Context) -> None:
        self.checked = checked
        self.context = context
        pairs = zip(checked.map.rules, checked.layouts, strict=True)
        self.emitters = [RuleEmitter(rule, layout, context, guard=rule.guard) for rule, layout in pairs]
        self.order = {id(rule): number for number, rule in enumerate(checked.map.rules)}
        self.elses = [e for e in self.emitters if e.rule.is_else]
        self.wild = [e for e in self.emitters if any(_is_wild(t.template) for s in e.rule.sides for t in s)]
        for emitter in self.elses:
            self._find_narrower(emitter)
        self.bodies = self._shared()
        shared = {id(e.rule) for body in self.bodies for variant in body.variants for e in variant}
        self.single = [e for e in self.emitters if id(e.rule) not in shared]

    def code(self, source: int) -> list[str]:
        """The body of `_to_right` or `_to_left`.

        Ties are checked before and made after the other rules, as constants are, which take over the device of what was
        taken; wildcards come last.
        """
        named = [e for e in self.single if not e.rule.is_else]
        checked = [e for e in named if _is_tie(e.rule) and e.rule.sides[source]]
        made = [e for e in named if e.rule.value is not None and not e.rule.sides[source]]
        plain = [e for e in named if e not in checked and e not in made]
        parts: list[list[RuleEmitter | Call]] = [
            [*checked],
            sorted([*plain, *(call for body in self.bodies for call in body.calls)], key=self._place),
            [e for e in made if not _is_tie(e.rule)],
            [e for e in made if _is_tie(e.rule)],
        ]
        # Of wildcards the narrower ones come first, so that only neighbours share loops.
        elses = sorted(self.elses, key=lambda e: len(e.wild.narrow[source]))
        parts += [[*group] for _, group in itertools.groupby(elses, key=lambda e: _loops_key(e.index_loops()))]
        return [line for part in parts for line in self._sections(part, source)][:-1]

    def body(self, body: Body, source: int) -> list[str]:
        """The code of a shared body in one direction."""
        return self._sections(list(body.variants[0]), source)[:-1]

    # --- sections ---

    def _sections(self, items: list[RuleEmitter | Call], source: int) -> list[str]:
        """Rules of the same loops together, in order of their first: the order of rules changes nothing."""
        sections: dict[tuple[str, ...], list[RuleEmitter | Call]] = defaultdict(list)
        loops: dict[tuple[str, ...], Sequence[Loop]] = {}
        for item in items:
            these = item.loops if isinstance(item, Call) else item.index_loops()
            key = _loops_key(these)
            loops[key] = these
            sections[key].append(item)
        return [line for key, section in sections.items() for line in self._section(loops[key], section, source)]

    def _place(self, item: RuleEmitter | Call) -> int:
        """Calls stand where the first rule of their block stood."""
        return self.order[id(item.rule)] if isinstance(item, RuleEmitter) else item.place

    def _section(self, loops: Sequence[Loop], items: list[RuleEmitter | Call], source: int) -> list[str]:
        """The loops, and in them the rules, neighbours of one guard under one `if`."""
        depth = 2
        head: list[str] = []
        for loop in loops:
            head += loop.lines(depth)
            depth += 1
        body: list[str] = []
        for _, group in itertools.groupby(items, key=lambda item: flat(self._guard(item) or "")):
            rules = list(group)
            guard = self._guard(rules[0])
            inner = depth + (guard is not None)
            code = self._items(rules, source, inner)
            shut = self._shut(rules, source, depth) if guard is not None else []
            if code and guard is not None:
                code = [*lines(guard, depth, before="if ", after=":"), *code, *shut]
            body += code
        return [*head, *body, ""] if body else []

    def _guard(self, item: RuleEmitter | Call) -> Code | None:
        if isinstance(item, RuleEmitter):
            return item.outer_guard()
        return guard_code(item.guard, self.context.attributes)

    def _items(self, items: list[RuleEmitter | Call], source: int, depth: int) -> list[str]:
        """Rules and calls of shared bodies one after the other; neighbours that run over the same spellings share the
        loop over them.
        """
        out: list[str] = []
        emitted = [item for item in items if isinstance(item, Call) or item.emit(source, depth)]
        for _, group in itertools.groupby(emitted, key=lambda item: _loops_key(_inner_loops(item))):
            rules = list(group)
            loops = _inner_loops(rules[0])
            heads = [line for n, loop in enumerate(loops) for line in loop.lines(depth + n)]
            inner = depth + len(loops)
            if len(rules) == 1:  # its comment stands above the loop
                out += [*self._comment(rules[0], depth), *heads, *self._item(rules[0], source, inner)]
                continue
            out += heads
            for item in rules:
                out += [*self._comment(item, inner), *self._item(item, source, inner)]
        return out

    def _comment(self, item: RuleEmitter | Call, depth: int) -> list[str]:
        """A rule as it is written."""
        return comment(item.rule.span, depth, self.context.map) if isinstance(item, RuleEmitter) else []

    def _item(self, item: RuleEmitter | Call, source: int, depth: int) -> list[str]:
        """The code of one rule within its loops, or the call of a shared body."""
        if isinstance(item, RuleEmitter):
            return item.emit(source, depth)
        method = f"self.{item.method}{DIRECTIONS[source]}"
        return lines(call(method, "take", "put", *(p for p in item.prefixes if p)), depth)

    # --- wildcards ---

    def _find_narrower(self, emitter: RuleEmitter) -> None:
        """The names that other wildcards take before this one, on each side."""
        for side in (LEFT, RIGHT):
            mine = [p for t in emitter.rule.sides[side] for p in patterns(t.template)]
            for other in self.wild:
                for tensor in other.rule.sides[side]:
                    theirs = patterns(tensor.template)
                    narrower = is_narrower if other.rule.is_else else unify
                    if other is not emitter and any(narrower(a, b) not in (None, False) for a in theirs for b in mine):
                        names = other.wild.wide(tensor)
                        emitter.wild.narrow[side].extend(names)
                        emitter.wild.guarded[side].extend(names if other.rule.guard is not None else [])

    def _shut(self, rules: list[RuleEmitter | Call], source: int, depth: int) -> list[str]:
        """Names whose guard does not hold are carried by no wildcard: tell `take` where one would."""
        names: list[Code] = []
        for emitter in rules:
            if isinstance(emitter, Call) or emitter.rule.is_else:
                continue
            for tensor in emitter.rule.sides[source]:
                if self._meets_wildcard(tensor, source):
                    if emitter.wild.open_holes(tensor.template) or _is_wild(tensor.template):
                        names += emitter.wild.wide(tensor)
                    else:
                        names.append(emitter.all_names(source, tensor))
        return [f"{INDENT * depth}else:", *lines(call("take.shut", *names), depth + 1)] if names else []

    def _meets_wildcard(self, tensor: ir.Tensor, source: int) -> bool:
        wide = [p for e in self.elses for t in e.rule.sides[source] for p in patterns(t.template)]
        return any(self._may_meet(a, b) for a in patterns(tensor.template) for b in wide)

    def _may_meet(self, one: Pattern, other: Pattern) -> bool:
        equations = unify(one, other)
        if equations is None:
            return False
        collisions = Collisions(self.checked.map, self.checked.scope, "K201", "read")
        return collisions.meet(None, None, equations, one, other).status != "closed"

    # --- bodies that are stated once ---

    def _shared(self) -> list[Body]:
        """The bodies of blocks with several pairs of prefixes, as far as they read the same under each pair."""
        by_text: dict[tuple[int, int], list[RuleEmitter]] = defaultdict(list)
        for emitter in self.emitters:
            by_text[id(emitter.rule.span.source), emitter.rule.span.start].append(emitter)
        blocks: dict[tuple[int, tuple[int, ...]], list[list[RuleEmitter]]] = defaultdict(list)
        for versions in by_text.values():
            levels = _levels(versions)
            if levels and not versions[0].rule.is_else and versions[0].rule.value is None:
                shortened = [self._shortened(emitter, levels) for emitter in versions]
                if self._read_the_same(shortened, versions):
                    heads = tuple(id(head) for e in versions for head in e.rule.heads[:levels])
                    blocks[levels, heads].append(shortened)
        taken: set[str] = set()
        worth = {key: rules for key, rules in blocks.items() if len(rules) >= _WORTH_A_METHOD}
        return [self._make_body(rules, levels, taken) for (levels, _), rules in worth.items()]

    def _shortened(self, emitter: RuleEmitter, levels: int) -> RuleEmitter:
        """The rule as it reads under prefixes that stand in variables."""
        heads = emitter.rule.heads[:levels]
        return RuleEmitter(
            emitter.rule,
            emitter.layout,
            self.context,
            prefixes=self._prefix_codes(heads),
            guard=_rest_of_guard(emitter.rule, levels),
            bound=frozenset(_indices(heads, self.checked.map)),
        )

    def _prefix_codes(self, heads: tuple[tree.Pair, ...]) -> tuple[str, str]:
        codes = []
        for side in (LEFT, RIGHT):
            parts: list[tree.Part] = []
            for head in heads:
                piece = (head.left, head.right)[side].parts
                parts += [*([tree.Text(".", span=head.span)] if parts and piece else []), *piece]
            if any(isinstance(part, (tree.EnumHole, tree.WildcardHole)) for part in parts):
                return "", ""  # these are parts of the match, not of its prefix
            template = tree.Template(tuple(parts), span=heads[0].span)
            codes.append(name_code(template, self.context.words_of_names, {}).removeprefix("f")[1:-1])
        return codes[0], codes[1]

    def _read_the_same(self, shortened: list[RuleEmitter], versions: list[RuleEmitter]) -> bool:
        if not all(any(e.prefixes) for e in shortened):
            return False
        for emitter in shortened:
            if not emitter.bound <= set(emitter.layout.matched):
                return False
            if any(self._meets_wildcard(t, side) for side in (LEFT, RIGHT) for t in emitter.rule.sides[side]):
                return False
        texts = {tuple(line for source in (LEFT, RIGHT) for line in self._section((), [e], source)) for e in shortened}
        loops = {tuple(flat(loop.code) for loop in e.index_loops()) for e in shortened}
        if len(texts) > 1 or len(loops) > 1:
            return False
        bound = {local(name) for e in shortened for name in e.bound}
        code = "\n".join([*(line for line in texts.pop() if "# " not in line), *loops.pop()])
        return not any(mentions(code, name) for name in bound) and len(versions) > 1

    def _make_body(self, rules: list[list[RuleEmitter]], levels: int, taken: set[str]) -> Body:
        variants = [list(variant) for variant in zip(*rules, strict=True)]
        first = variants[0][0].rule.heads[:levels]
        body = Body(_method_name(first, taken), variants)
        for variant in variants:
            heads = variant[0].rule.heads[:levels]
            original = next(e for e in self.emitters if e.rule is variant[0].rule)
            bound = variant[0].bound
            loops = tuple(loop for loop in original.index_loops() if loop.axis in bound)
            codes = variant[0].prefixes
            left, right = (f'f"{c}"' if "{" in c else f'"{c}"' if c else "" for c in codes)
            guard = ir.conjunction(*(head.guard for head in heads))
            place = min(self.order[id(e.rule)] for e in variant)
            body.calls.append(Call(loops, guard, body.name, (left, right), place))
        return body


def _inner_loops(item: RuleEmitter | Call) -> list[Loop]:
    return item.inner_loops() if isinstance(item, RuleEmitter) else []


def _loops_key(loops: Sequence[Loop]) -> tuple[str, ...]:
    """Loops by what they say: rules with the same ones may share them."""
    return tuple(flat(loop.code) for loop in loops)


def _levels(versions: list[RuleEmitter]) -> int:
    """How many heads, from the outermost, take in all in which the versions of one rule differ."""
    if len(versions) < 2:
        return 0
    depth = len(versions[0].rule.heads)
    if any(len(e.rule.heads) != depth for e in versions):
        return 0
    for level in range(depth, 0, -1):
        if len({id(e.rule.heads[level - 1]) for e in versions}) > 1:
            return level
    return 0


def _rest_of_guard(rule: ir.Rule, levels: int) -> tree.Expr | None:
    """A rule's guard without those of its outermost heads."""
    outer = [head.guard for head in rule.heads[:levels] if head.guard is not None]
    if not outer or rule.guard is None:
        return rule.guard
    if rule.guard is outer[0]:
        return None
    operands = rule.guard.operands if isinstance(rule.guard, tree.Operation) else ()
    return ir.conjunction(*operands[len(outer) :])


def _indices(heads: tuple[tree.Pair, ...], resolved: ir.Map) -> set[str]:
    parts = [p for head in heads for template in (head.left, head.right) for p in template.parts]
    holes = [p.value for p in parts if isinstance(p, tree.NumberHole)]
    return {name for value in holes for name in ir.names_in(value) if name in resolved.indices}


def _method_name(heads: tuple[tree.Pair, ...], taken: set[str]) -> str:
    """`_layers` for a block under `layers.{i}`."""
    text = ".".join(p.text if isinstance(p, tree.Text) else "" for head in heads for p in head.left.parts)
    words = [word for word in re.split(r"\W+", text, flags=re.ASCII) if re.match("[A-Za-z]", word)]
    return fresh(f"_{words[-1].lower() if words else 'block'}", taken)


def _is_wild(template: tree.Template) -> bool:
    return any(isinstance(part, tree.WildcardHole) for part in template.parts)


def _is_tie(rule: ir.Rule) -> bool:
    return rule.value is not None and isinstance(rule.value.content, tree.Template)
