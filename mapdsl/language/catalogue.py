"""The catalogue of error codes. Numbers are never reused; each code has a page for `mapdsl explain`."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """A code's short name, the gist of its message, and the phases that find it.

    Phases: p parse, r resolve, c check, a `--against`, t run time.
    """

    name: str
    gist: str
    phases: str
    severity: str = "error"


CATALOGUE: dict[str, Entry] = {
    "S101": Entry("unexpected-token", "expected X, found Y", "p"),
    "S102": Entry("unclosed-bracket", "this `[` is never closed", "p"),
    "S103": Entry("indentation", "tab, uneven indent, or a body without a head", "p"),
    "S104": Entry("unknown-arrow", "`=>` is no arrow; write `<->`", "p"),
    "S105": Entry("bad-head", "a block head is a pair of prefixes", "p"),
    "S106": Entry("one-way", "`->` needs `_` on one side", "p"),
    "N111": Entry("unknown-name", "no param or index of this name", "r"),
    "N112": Entry("unknown-hole", "no index or enumeration of this name", "r"),
    "N113": Entry("unknown-codec", "no codec, kind, generator or mesh of this name", "r"),
    "N114": Entry("declared-twice", "name declared twice", "r"),
    "N115": Entry("no-field", "config.json lacks the field; no `??`", "at"),
    "N116": Entry("bad-include", "file missing, or includes itself", "r"),
    "N117": Entry("no-such-rule", "`override` must match one included rule", "r"),
    "N118": Entry("wrong-type", "boolean or string used as a size", "ra"),
    "K201": Entry("read-twice", "two rules read the same tensor", "c"),
    "K202": Entry("written-twice", "two rules write the same tensor", "c"),
    "K203": Entry("ambiguous-name", "the template can be read in two ways", "c"),
    "K205": Entry("not-injective", "affine hole repeats or is negative", "c"),
    "K206": Entry("bad-enumeration", "alternatives repeat or counts differ", "c"),
    "K207": Entry("bad-wildcard", "`{..}` without `else`, or two in one template; an unnamed hole twice", "c"),
    "K208": Entry("never-true", "the guard holds for no config", "c"),
    "K210": Entry("guarded-axis", "a guard mentions an absorbed axis", "c"),
    "K211": Entry("example-fails", "`example` does not hold", "c"),
    "K213": Entry("idle-accept", "no rule reads the accepted name", "c"),
    "K290": Entry("not-proved", "checked up to a bound only", "c", "warning"),
    "X301": Entry("axis-lost", "axis on one side only", "c"),
    "X302": Entry("axis-twice", "axis twice on one side", "c"),
    "X303": Entry("bad-sum", "terms and tensors differ in number, or two sums", "c"),
    "X304": Entry("unknown-size", "size cannot be derived in one direction", "c"),
    "X305": Entry("not-divisible", "size does not divide", "at"),
    "X307": Entry("shape-missing", "this rule needs a shape on both sides", "c"),
    "D401": Entry("codec-shape", "the codec does not fit this shape", "c"),
    "D402": Entry("companion-clash", "a companion collides with another name", "c"),
    "D403": Entry("not-representable", "dtype cannot hold the value", "ct"),
    "D404": Entry("law-broken", "weaker than the pinned law", "c"),
    "D405": Entry("bad-constant", "the value cannot be built", "c"),
    "D406": Entry("read-only", "codec cannot write", "ct"),
    "D407": Entry("same-looking", "alternatives cannot be told apart", "c"),
    "P452": Entry("sharded-twice", "axis on two mesh dimensions", "c"),
    "P453": Entry("uneven-shard", "axis does not divide over the ranks", "t"),
    "P454": Entry("block-cut", "a shard cuts a codec block", "t"),
    "P455": Entry("not-cut", "this cannot be cut over ranks", "c"),
    "P456": Entry("no-placement", "no placement of a DTensor says how ranks hold this", "t"),
    "C501": Entry("unknown-tensor", "no rule reads this stored name", "a"),
    "C502": Entry("missing-tensor", "a rule's tensor is absent", "a"),
    "C503": Entry("wrong-size", "header contradicts a known size", "a"),
    "C504": Entry("wrong-dtype", "dtype is not the codec's", "a"),
    "C505": Entry("bad-config", "config value outside its range", "a"),
    "C506": Entry("stored-twice", "one tensor twice (files, or OLD and NEW)", "a"),
    "C507": Entry("bad-file", "header broken or hostile", "a"),
    "R601": Entry("value-differs", "constant, tie or padding differs", "t"),
    "R602": Entry("copies-differ", "repeats or replicas differ", "t"),
    "R603": Entry("left-over", "tensor that no rule reads", "t"),
    "R604": Entry("taken-twice", "tensor asked for twice (internal)", "t"),
    "R605": Entry("group-incomplete", "part of a group is missing", "t"),
    "R606": Entry("wrong-shape", "tensor does not fit the rule", "t"),
    "R607": Entry("foreign-complement", "complement of another checkpoint", "t"),
    "R608": Entry("not-finite", "a scale is infinite or NaN", "t"),
    "L701": Entry("unused", "unused index or codec", "c", "lint"),
    "L703": Entry("unformatted", "run `mapdsl fmt`", "c", "lint"),
    "L704": Entry("mergeable", "lines differ in one word", "c", "lint"),
    "L706": Entry("long-line", "over 120 columns", "c", "lint"),
    "L707": Entry("look-alike", "free axis differs from a declared one by case", "c", "lint"),
    "L708": Entry("cut-router", "an index is cut in a shape of both sides", "c", "lint"),
}
