"""`check --against`: a map held against the headers of a checkpoint of its left side.

Every stored name has its rule, every promised name is there, and every shape and dtype is what map and config say.
Findings of one kind on one rule are told together: a wrong rule is wrong in every layer.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mapdsl.checkpoint.answers import has_answers
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.formats import Formats, Forms
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.compiler.expand import Expansion, Match, Named, expand, param_values
from mapdsl.compiler.formula import evaluate
from mapdsl.compiler.names import Pattern, Wildcard, number_holes, patterns, read, spelled
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic, MapError, ordered
from mapdsl.language.source import Span
from mapdsl.runtime.codecs.likeness import likeliest
from mapdsl.runtime.codecs.storage import RAW_STORAGE, Parts
from mapdsl.runtime.sizes import Sized, SizeError, axis_sizes, joint_sizes

SHOWN = 3
# A config of another model, or a broken one: no use in listing a million names.
TOO_MANY = 10_000


@dataclass
class Summary:
    """What a comparison saw: tensors in all, by format, dropped, and carried by wildcards."""

    tensors: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    carried: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """One line for people."""
        parts = [f"{count:,} {name}" for name, count in sorted(self.formats.items(), key=lambda item: -item[1])]
        parts += [f"{self.dropped:,} dropped"] * bool(self.dropped) + [f"{self.carried:,} carried"] * bool(self.carried)
        return f"{self.tensors:,} tensors: {', '.join(parts)}"


def check_against(
    checked: Checked, checkpoint: Checkpoint, params: Mapping[str, Any] | None = None
) -> tuple[list[Diagnostic], Summary]:
    """Everything in which the checkpoint differs from what the map promises, and what was seen.

    `params` are params of the map given by name; the others come from the checkpoint's config. Only headers are read.
    """
    comparison = _Comparison(checked, checkpoint, dict(params or {}))
    comparison.run()
    return ordered(comparison.found), comparison.summary


Kind = tuple[str, int, str]  # code, rule, and what it is about


class _Comparison:
    def __init__(self, checked: Checked, checkpoint: Checkpoint, params: dict[str, Any]) -> None:
        self.map = checked.map
        self.checkpoint = checkpoint
        self.subject = str(checkpoint.path)
        self.found: list[Diagnostic] = []
        self.left: dict[str, StoredTensor] = dict(checkpoint.tensors)
        self.together: dict[Kind, list[str]] = {}
        self.missing = self.told = 0
        self.formats: dict[int, list[Formats]] = {}  # of each rule's operands
        answers = has_answers(checked, self.left)
        values = param_values(checked, checkpoint.config, {**answers, **params})
        self.expansion: Expansion = expand(checked, values)
        self.summary = Summary(tensors=len(self.left), params=values)

    def run(self) -> None:
        """Respell legacy names, take every rule's tensors, and see what is left."""
        for accept in self.map.accepts:
            self._accept(accept)
        for number, rule in enumerate(self.map.rules):
            if rule.left and not rule.is_else:
                for match in self.expansion.matches(number):
                    self._match(match, rule)
        self._wildcards()
        if self._is_other_side():
            return
        self._leftovers()
        self._report()

    # --- legacy names ---

    def _accept(self, accept: ir.Accept) -> None:
        pairs = list(zip(patterns(accept.old), patterns(accept.new), strict=False))
        starts = tuple({start for old, _ in pairs for start in self._starts(old)})
        for name in [name for name in self.left if name.startswith(starts)]:
            for old, new in pairs:
                found = self._bound(old, name, accept.guard)
                if found is not None:
                    values, texts = found
                    self._respell(name, _filled(new, values, texts), accept.span)

    def _starts(self, pattern: Pattern) -> Iterator[str]:
        """How the names of a pattern begin, up to its first wildcard: few of many names are looked at closely."""
        indices = [n for hole in number_holes(pattern) for n in ir.names_in(hole.value) if n in self.map.indices]
        segments = list(itertools.takewhile(lambda segment: not isinstance(segment, Wildcard), pattern.segments))
        dot = "." if len(segments) < len(pattern.segments) else ""
        for values in self.expansion.index_values(list(dict.fromkeys(indices))):
            yield _filled(Pattern(tuple(segments), pattern.choice), values, {}) + dot if segments else ""

    def _respell(self, name: str, new: str, span: Span) -> None:
        if new in self.left:
            message = f"{name} is the legacy spelling of {new}, and both are stored"
            self._error("C506", message, span)
            del self.left[name]  # told once: it is not unknown besides
            return
        self.left[new] = self.left.pop(name)

    def _bound(
        self, pattern: Pattern, name: str, guard: tree.Expr | None
    ) -> tuple[dict[str, Any], dict[str, str]] | None:
        """The indices and texts under which a pattern reads a name, inside all ranges and the guard."""
        reading = read(pattern, name)
        if reading is None:
            return None
        numbers, texts = reading
        values = dict(self.expansion.params)
        for expr, number in numbers:
            index = _index_in(expr, self.map)
            if index is None:
                continue
            offset = _offset(expr, index, values)
            if offset is None:
                continue
            if values.setdefault(index, number - offset) != number - offset:
                return None
        for expr, number in numbers:
            if any(n in self.map.indices and n not in values for n in ir.names_in(expr)):
                return None
            if evaluate(expr, values) != number:
                return None
        for hole in number_holes(pattern):
            for index in (n for n in ir.names_in(hole.value) if n in self.map.indices):
                if not self._in_range(index, values):
                    return None
        if guard is not None and not evaluate(guard, values):
            return None
        return values, texts

    def _in_range(self, index: str, values: Mapping[str, Any]) -> bool:
        declared = self.map.indices[index]
        lower = 0 if declared.lower is None else evaluate(declared.lower, values)
        return bool(
            lower <= values[index] and (declared.upper is None or values[index] < evaluate(declared.upper, values))
        )

    # --- rules ---

    def _match(self, match: Match, rule: ir.Rule) -> None:
        """Take the tensors of one match: all there, or what is missing is told."""
        names = list(self.expansion.names(match, "left"))
        formats = self._operands(match.rule)
        missing = [named for named in names if not formats[named.place].is_there(named.name, self.left)]
        if missing:
            self._missing(match, rule, names, missing)
            return
        sizes = self.expansion.sizes(match)
        dtypes: dict[str, str] = {}
        unsolved: list[Sized] = []
        sound: dict[tuple[int, Forms], AnyCodec] = {}
        for named in names:
            forms = named.place, formats[named.place].forms(named.name, self.left)
            if (codec := sound.get(forms)) is not None:  # just like one that was looked at
                self._take_whole(codec, named.name, rule, dtypes)
            elif (codec := self._tensor(match, rule, named, sizes, dtypes, unsolved)) is not None:
                sound[forms] = codec
        try:
            joint_sizes(unsolved, sizes)  # by now the sizes that the others tell are known
        except SizeError as err:
            name, _, message = str(err).partition(": ")
            self._together("X305" if err.code == "X305" else "C503", match.rule, message, [name])
        if len(set(dtypes.values())) > 1 and len(list(self.expansion.names(match, "right"))) == 1:
            self._mixed(match, dtypes)

    def _operands(self, number: int) -> list[Formats]:
        """How the tensors of each operand of a rule may be stored."""
        if number not in self.formats:
            operands = self.map.rules[number].left
            codecs = [tuple(self.expansion.codecs(tensor)) or (RAW_STORAGE,) for tensor in operands]
            self.formats[number] = [Formats(alternatives, Parts.of(alternatives)) for alternatives in codecs]
        return self.formats[number]

    def _missing(self, match: Match, rule: ir.Rule, names: list[Named], missing: list[Named]) -> None:
        whole = len(missing) == len(names)
        may_be_absent = rule.optional or rule.arrow == "->"
        if whole and (may_be_absent or self.expansion.is_empty(match, self.expansion.sizes(match))):
            return
        if not whole:  # the rest of the group, companions too, is not worth a second finding
            for named in names:
                for codec in self._operands(match.rule)[named.place].codecs:
                    for part in codec.names(named.name):
                        self.left.pop(part, None)
        self.missing += len(missing)
        if self.missing > 4 * self.summary.tensors + TOO_MANY:
            message = f"the config promises far more tensors than the {self.summary.tensors:,} that are stored"
            raise MapError([Diagnostic("C505", message, (rule.span,), subject=self.subject)])
        what = "are missing" if whole else "are missing, the rest of their group is there"
        self._together("C502", match.rule, what, [named.name for named in missing])

    def _mixed(self, match: Match, dtypes: dict[str, str]) -> None:
        """Tensors that are laid into one as they are, and of several dtypes."""
        ((usual, _),) = Counter(dtypes.values()).most_common(1)
        for name, dtype in dtypes.items():
            if dtype != usual:
                what = f"has dtype {dtype}, expected {usual} as in the rest of its group"
                self._together("C504", match.rule, what, [name])

    def _tensor(
        self,
        match: Match,
        rule: ir.Rule,
        named: Named,
        sizes: dict[str, int],
        dtypes: dict[str, str],
        unsolved: list[Sized],
    ) -> AnyCodec | None:
        """Hold one tensor against its rule and take it; gives its format if nothing was found.

        The dtype of one that is stored as it is goes to `dtypes`, one whose sizes others must tell to `unsolved`.
        """
        told, left_open = self.told, len(unsolved)
        codec = self._format(match, rule, named)
        if codec is None:
            return None
        payload = codec.names(named.name)[0]
        shape = self.left[payload].shape
        if len(shape) < codec.needs_payload_dimensions():
            message = f"has shape {list(shape)}, too few dimensions for a tensor stored as {codec.name}"
            self._together("C503", match.rule, message, [payload])
            self._take_whole(codec, named.name, rule, dtypes)
            return None
        logical = codec.logical_shape(shape)
        pattern = self.expansion.pattern(match.rule, "left", named.place)
        if pattern is not None:
            try:
                sizes |= axis_sizes(pattern, logical, sizes)
            except SizeError as err:
                if err.code == "X304":
                    unsolved.append(Sized(named.name, pattern, logical))
                else:
                    self._together("X305" if err.code == "X305" else "C503", match.rule, str(err), [named.name])
        for stored in codec.stored(named.name, logical):
            tensor = self.left[stored.name]
            if stored.shape is not None and tensor.shape != stored.shape:
                message = f"has shape {list(tensor.shape)}, expected {list(stored.shape)} beside {list(logical)}"
                self._together("C503", match.rule, message, [stored.name])
            if stored.dtypes and tensor.dtype not in stored.dtypes:
                message = f"has dtype {tensor.dtype}, expected {' or '.join(stored.dtypes)}"
                self._together("C504", match.rule, message, [stored.name])
        self._take_whole(codec, named.name, rule, dtypes)
        return codec if (self.told, len(unsolved)) == (told, left_open) else None

    def _format(self, match: Match, rule: ir.Rule, named: Named) -> AnyCodec | None:
        """The alternative that a tensor is stored in: by its dtype, with all its companions."""
        formats = self._operands(match.rule)[named.place]
        codecs, claims = formats.codecs, formats.claiming(named.name, self.left)
        whole = [codec for codec in claims if all(name in self.left for name in codec.names(named.name))]
        if whole:
            return whole[likeliest(named.name, whole, lambda name: (self.left[name].dtype, self.left[name].shape))]
        if claims:
            payload, *companions = claims[0].names(named.name)
            lacking = [name for name in companions if name not in self.left]
            self._together("C502", match.rule, f"are missing: the tensor is stored as {claims[0].name}", lacking)
            self._take(payload, rule, "")
            return None
        raw = next((codec for codec in codecs if codec.kind == "raw"), None)
        beside = [name for codec in codecs for name in codec.names(named.name)[1:] if name in self.left]
        if raw is not None and not beside:
            return raw
        payload = next(p for p in (c.names(named.name)[0] for c in codecs) if p in self.left)
        names = "|".join(codec.name for codec in codecs if codec.kind != "raw")
        message = f"has dtype {self.left[payload].dtype}, which is none of {names}"
        self._together("C504", match.rule, f"{message} (stored beside {beside[0]})" if beside else message, [payload])
        for name in (payload, *beside):
            self.left.pop(name, None)
        return None

    def _take_whole(self, codec: AnyCodec, name: str, rule: ir.Rule, dtypes: dict[str, str]) -> None:
        """Take all parts of a tensor; the dtype of one that is stored as it is goes to `dtypes`."""
        for part in codec.names(name):
            if codec.kind == "raw":
                dtypes[part] = self.left[part].dtype
            self._take(part, rule, codec.name)

    def _take(self, name: str, rule: ir.Rule, codec: str) -> None:
        if self.left.pop(name, None) is None:
            return
        if rule.arrow == "->":
            self.summary.dropped += 1
        elif codec:
            label = codec if codec != "raw" or rule.left[0].codecs else "as they are"
            self.summary.formats[label] = self.summary.formats.get(label, 0) + 1

    # --- what is left ---

    def _wildcards(self) -> None:
        """Rules with wildcards or open indices take what no other rule names."""
        shut = self._shut_names()
        for number, rule in enumerate(self.map.rules):
            layout = self.expansion.checked.layouts[number]
            open_ = [a for a in layout.matched if a in self.map.indices and self.map.indices[a].upper is None]
            if not rule.left or not (open_ or any(axis[0] == "{" for axis in layout.matched)):
                continue
            for pattern in patterns(rule.left[0].template):
                for name in [n for n in self.left if n not in shut and self._bound(pattern, n, rule.guard) is not None]:
                    del self.left[name]
                    if rule.right:
                        self.summary.carried += 1
                    else:
                        self.summary.dropped += 1

    def _shut_names(self) -> set[str]:
        """Left-over names that a rule names though its guard shuts them out: no wildcard may carry them."""
        guarded = [
            (p, r)
            for r in self.map.rules
            if r.guard is not None and not r.is_else
            for t in r.left
            for p in patterns(t.template)
        ]
        return {n for n in self.left for p, _ in guarded if not p.is_wild and self._bound(p, n, None) is not None}

    def _is_other_side(self) -> bool:
        """Whether no tensor is of the stored side but most are of the other; told once, not name by name."""
        if self.summary.formats or self.summary.dropped or self.summary.carried:
            return False
        there = sum(key.name in self.left for key in self.expansion.keys("right"))
        if 2 * there <= self.summary.tensors:
            return False
        message = f"{there:,} of its {self.summary.tensors:,} names are those of the {self.map.right} side"
        advice = f"a map is held against a checkpoint of the stored side, {self.map.left}"
        self.found = [Diagnostic("C501", message, subject=self.subject, help=advice)]
        return True

    def _leftovers(self) -> None:
        groups: dict[str, list[str]] = {}
        for name in self.left:
            # Names that differ in their numbers only are told together.
            groups.setdefault("".join("#" if c.isdigit() else c for c in name), []).append(name)
        for names in groups.values():
            message = f"no rule reads {_listed(names)}"
            self.found.append(Diagnostic("C501", message, subject=self.subject))

    # --- findings ---

    def _together(self, code: str, rule: int, what: str, names: list[str]) -> None:
        self.told += 1
        self.together.setdefault((code, rule, what), []).extend(names)

    def _report(self) -> None:
        for (code, number, what), names in self.together.items():
            span = self.map.rules[number].span
            separator = " " if what.startswith(("are ", "has ")) else ": "
            text = what.replace("are missing", "is missing") if len(names) == 1 else what
            self.found.append(Diagnostic(code, f"{_listed(names)}{separator}{text}", (span,), subject=self.subject))

    def _error(self, code: str, message: str, *spans: Span) -> None:
        self.found.append(Diagnostic(code, message, spans, subject=self.subject))


def _index_in(expr: tree.Expr, resolved: ir.Map) -> str | None:
    """The one index of a hole; None where it has several."""
    found = {name for name in ir.names_in(expr) if name in resolved.indices}
    return found.pop() if len(found) == 1 else None


def _offset(expr: tree.Expr, index: str, values: Mapping[str, Any]) -> int | None:
    """What a hole adds to its index, if it is the index plus something known."""
    parts = ir.summands(expr)
    others = [part for part in parts if not (isinstance(part, tree.Name) and part.path == index)]
    return sum(int(evaluate(other, values)) for other in others) if len(others) == len(parts) - 1 else None


def _filled(pattern: Pattern, values: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    return spelled(pattern, lambda expr: evaluate(expr, values), lambda wildcard: texts[wildcard.name])


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


__all__ = ["MapError", "Summary", "check_against"]
