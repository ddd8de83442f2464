"""Tensors that exist on one side only and are made on the other's behalf: constants, ties, generated buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mapdsl.compiler import ir
from mapdsl.compiler.names import TemplateError, patterns, unify
from mapdsl.compiler.solvable import known_axes
from mapdsl.language import tree
from mapdsl.language.diagnostics import Diagnostic

# Largest finite value of the dtypes that `as` may cast to.
LARGEST = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "f32": 3.4028234663852886e38}
GENERATOR_ARGUMENTS = {"inv_freq": 2}


def check_made(rule: ir.Rule, resolved: ir.Map) -> Iterator[Diagnostic]:
    """Whether the value of an absent side can be built: D403, D405, X304, X307."""
    if rule.value is None or bool(rule.left) == bool(rule.right):
        return
    match rule.value.content:
        case tree.Number(value=number):
            yield from _constant(rule, float(number), resolved)
        case tree.Template() as template:
            yield from _tie(rule, template, resolved)
        case tree.Generator() as generator:
            yield from _generated(generator)


def _constant(rule: ir.Rule, number: float, resolved: ir.Map) -> Iterator[Diagnostic]:
    """A constant is made from nothing, so its shape is stated and every axis known."""
    for tensor in rule.left or rule.right:
        if tensor.shape is None:
            yield Diagnostic("X307", "a constant needs a shape", (tensor.span,), help="`KEY [n] = 1`, or `[]`")
            continue
        for axis in ir.axes_of(tensor.shape):
            if axis.name is not None and axis.name not in known_axes(rule, resolved):
                message = f"the size of `{axis.name}` is not known, so the constant cannot be made"
                yield Diagnostic("X304", message, (axis.span,), help=f"declare it: `param {axis.name} = ...`")
        for codec in tensor.codecs:
            if codec.name in LARGEST and math.isfinite(number) and abs(number) > LARGEST[codec.name]:
                message = f"{codec.name} cannot hold {number:g}; its largest value is {LARGEST[codec.name]:g}"
                yield Diagnostic("D403", message, (tensor.span,))


def _tie(rule: ir.Rule, template: tree.Template, resolved: ir.Map) -> Iterator[Diagnostic]:
    """A tensor is tied to one that another rule makes."""
    side = "left" if rule.left else "right"
    try:
        wanted = patterns(template)
    except TemplateError as err:
        yield Diagnostic(err.code, err.message, (err.span,))
        return
    others = [t for other in resolved.rules if other is not rule and other.value is None for t in other.side(side)]
    if not any(unify(a, b) is not None for a in wanted for t in others for b in patterns(t.template)):
        message = f"no rule makes `{template.span.text}`, so nothing can be tied to it"
        yield Diagnostic("D405", message, (template.span,), help="name a tensor of the same side that another rule has")


def _generated(generator: tree.Generator) -> Iterator[Diagnostic]:
    wanted = GENERATOR_ARGUMENTS[generator.name]
    if len(generator.arguments) != wanted:
        message = f"`{generator.name}` takes {wanted} arguments, found {len(generator.arguments)}"
        yield Diagnostic("D405", message, (generator.span,), help="`inv_freq(rope_theta, count)`")
