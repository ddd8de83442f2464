"""Which tensors the map promises to give back byte for byte, when what was made of them is converted back."""

from __future__ import annotations

from mapdsl.checkpoint.origins import Origins
from mapdsl.checkpoint.passes import Plan
from mapdsl.compiler import ir
from mapdsl.compiler.laws import rule_law
from mapdsl.compiler.shapes import Layout

_EXACT = ("bit", "bit, guarded")


class Promises:
    """Asked of outputs of `back`, the way back of a conversion; what is kept is at hand, nothing was encoded anew."""

    def __init__(self, back: Plan, origins: Origins) -> None:
        checked = back.request.map.checked
        to_right = not back.to_right
        pairs = zip(checked.map.rules, checked.layouts, strict=True)
        self._exact = [_is_exact(rule, layout, to_right=to_right) for rule, layout in pairs]
        self._origins = origins

    def hold(self, output: str) -> bool:
        """Whether this output has the bytes of the tensor that it once was."""
        if all(self._exact):
            return True
        rule = self._origins.rule_of(output)
        return rule is None or self._exact[rule]


def _is_exact(rule: ir.Rule, layout: Layout, *, to_right: bool) -> bool:
    if to_right:
        grade = rule_law(rule, layout).left
        return grade is None or grade.grade in _EXACT
    # What the left side stores is kept, or encoded anew and known for that; of the right side's formats nothing is.
    return all(codec.kind == "raw" or codec.name == "f32" for tensor in rule.right for codec in tensor.codecs)
