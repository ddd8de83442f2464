"""The names of a map under small configs, counted: what is used twice, whatever `check` thinks of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mapdsl.compiler import ir
from mapdsl.compiler.check import Checked
from mapdsl.compiler.codecs import codec_key, parse_codec
from mapdsl.compiler.collide import scope_of
from mapdsl.compiler.expand import expand, param_values
from mapdsl.compiler.resolve import resolve
from mapdsl.compiler.shapes import layout
from mapdsl.language.diagnostics import MapError
from mapdsl.language.source import Source
from mapdsl.language.syntax import parse


def unchecked(text: str) -> Checked:
    """A map as `expand` takes it, though nothing was proved of its names."""
    resolved, _ = resolve(parse(Source("test.map", text)))
    specs = [spec for rule in resolved.rules for tensor in (*rule.left, *rule.right) for spec in tensor.codecs]
    codecs = {codec_key(spec): parse_codec(spec) for spec in (*resolved.codecs.values(), *specs)}
    layouts = tuple(layout(rule, resolved.indices) for rule in resolved.rules)
    return Checked(resolved, layouts, codecs, scope_of(resolved), [])


def repeated_names(text: str, domains: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """The names that two tensors of one side have under some config of the domains, each with the first such config.

    Configs that the map refuses count for nothing. Rules with wildcards are not counted.
    """
    checked = unchecked(text)
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*domains.values()):
        config = dict(zip(domains, values, strict=True))
        for side in ("left", "right"):
            try:
                uses = Counter(_names(checked, param_values(checked, config, {}), side))
            except MapError:
                continue
            for name, count in uses.items():
                if count > 1:
                    found.setdefault(name, config)
    return found


def _names(checked: Checked, values: Mapping[str, Any], side: str) -> Iterator[str]:
    """Every stored name of a side, of each tensor in each of its formats."""
    expansion = expand(checked, values)
    for number, rule in enumerate(checked.map.rules):
        for match in expansion.matches(number):
            if not expansion.is_empty(match, expansion.sizes(match)):
                for named in expansion.names(match, side):
                    yield from _stored(checked, rule.side(side)[named.place], named.name)


def _stored(checked: Checked, tensor: ir.Tensor, name: str) -> set[str]:
    if not tensor.codecs:
        return {name}
    return {stored for spec in tensor.codecs for stored in checked.codecs[codec_key(spec)].names(name)}
