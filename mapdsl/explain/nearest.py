"""Templates that look like a name that no rule has: for hints."""

from __future__ import annotations

import re

from mapdsl.compiler.check import Checked
from mapdsl.language.unparse import unparse_template

# Comparing takes time with the square of the length; a longer name has no near one.
_LONGEST = 400
_HOLE = re.compile(r"\{[^{}]*\}|[0-9]+")


def nearest(checked: Checked, name: str) -> list[str]:
    """At most three templates of either side, the nearest first."""
    from difflib import get_close_matches

    if len(name) > _LONGEST:
        return []
    templates = [unparse_template(t.template) for rule in checked.map.rules for side in rule.sides for t in side]
    by_shape: dict[str, str] = {}
    for template in templates:
        by_shape.setdefault(_HOLE.sub("#", template), template)
    return [by_shape[shape] for shape in get_close_matches(_HOLE.sub("#", name), by_shape, 3)]
