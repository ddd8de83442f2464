"""The adapter module of a map for NeMo Automodel: the adapter, and a class that stands in the place of Automodel's."""

from __future__ import annotations

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.emit.adapter import adapter_source, class_name, environment
from mapdsl.emit.expressions import pattern_code
from mapdsl.emit.layout import Bracketed, lines, listed
from mapdsl.emit.wild import spelled_out
from mapdsl.language import tree

_BASE = ("mapdsl.frameworks.automodel", "AutomodelAdapter")
_ABSTRACT = ("nemo_automodel.components.checkpoint.state_dict_adapter", "StateDictAdapter")
_LOAD_PART = (_ABSTRACT[0], "CheckpointLoadPart")
_MIXIN = ("nemo_automodel.components.moe.state_dict_mixin", "MoESplitExpertsStateDictMixin")


def automodel_source(checked: Checked, command: str = "mapdsl compile") -> str:
    """The Python source of the module; MapError where there is none of the adapter."""
    experts = expert_patterns(checked)
    # Automodel's own code asks for its mixin to tell that a model has experts; whatever it does, the base does.
    bases = [_BASE, *([_MIXIN] if experts else []), _ABSTRACT]
    module = adapter_source(checked, f"{command} --target automodel", [*bases, _LOAD_PART])
    name = class_name(checked.map.name)
    classes = Bracketed(f"{name.removesuffix('Adapter')}StateDictAdapter", [base for _, base in bases])
    head = lines(classes, 0, before="class ", after=":")
    text = (
        environment()
        .get_template("automodel.py.jinja")
        .render(
            head="\n".join(head),
            name=checked.map.name,
            adapter=name,
            experts=lines(listed(experts), 1, before="EXPERTS = ") if experts else [],
        )
    )
    return module.rstrip() + "\n" + text.rstrip() + "\n"


def expert_patterns(checked: Checked) -> list[str]:
    """The right side's names, as code of the runtime's patterns, of grouped experts.

    Those begin with an index of the map, and lie in a module that Automodel calls `experts`.
    """
    resolved = checked.map
    found: dict[str, None] = {}
    for rule, layout in zip(resolved.rules, checked.layouts, strict=True):
        for tensor, shape in zip(rule.right, layout.shapes[1], strict=True):
            first = shape.dimensions[0] if shape is not None and shape.dimensions else None
            if isinstance(first, tree.Axis) and first.name in resolved.indices:
                found |= dict.fromkeys(name for name in _patterns(tensor) if ".experts." in name)
    return sorted(found)


def _patterns(tensor: ir.Tensor) -> list[str]:
    """The names of a tensor, every number open, one pattern for each spelling of its enumerations."""
    out = []
    for template in spelled_out(tensor.template):
        numbers = [part for part in template.parts if isinstance(part, tree.NumberHole)]
        out.append(pattern_code(template, {}, {}, numbers))
    return out


__all__ = ["automodel_source", "expert_patterns"]
