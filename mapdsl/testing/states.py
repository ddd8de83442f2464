"""States drawn for a map: the tensors of each match, and what a conversion promises to make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.compiler.expand import Expansion, Match, Named
from mapdsl.testing.formats import holds_raw, runtime_codec, written
from mapdsl.testing.reference import Place

SIDES = ("left", "right")


@dataclass
class Logical:
    """One tensor as a rule sees it: its name and shape, its format (None where it is stored as it is), its parts."""

    named: Named
    shape: tuple[int, ...]
    codec: AnyCodec | None
    parts: dict[str, Tensor]

    @property
    def place(self) -> Place:
        """Where it stands in its match."""
        return place_of(self.named)

    def value(self, dtype: torch.dtype) -> Tensor:
        """The decoded tensor; a plain one is itself."""
        if self.codec is None or self.codec.kind == "raw":
            return self.parts[self.named.name]
        return runtime_codec(self.codec).decode(self.named.name, self.parts, dtype)


def place_of(named: Named) -> Place:
    """Where a tensor stands in its match: its place in the rule, and what its name absorbs."""
    return named.place, tuple(sorted(named.position.items()))


@dataclass
class Group:
    """All tensors of one match on one side.

    `exact` says whether a trip to the other side and back promises every byte, `kept` whether anything comes back.
    `moved_as` is the format in which they move as they are stored, `unpacked` whether they come back plain.
    """

    match: Match
    rule: ir.Rule
    sizes: dict[str, int]
    tensors: list[Logical]
    exact: bool = True
    kept: bool = True
    moved_as: AnyCodec | None = None
    unpacked: bool = False

    @property
    def names(self) -> list[str]:
        """Every stored name, companions included."""
        return [name for tensor in self.tensors for name in tensor.parts]

    @property
    def plain_names(self) -> list[str]:
        """The names that the rules give, without companions."""
        return [tensor.named.name for tensor in self.tensors]

    def moves(self) -> bool:
        """Whether the other side has tensors for it."""
        return bool(self.rule.left and self.rule.right and self.tensors)


@dataclass
class State:
    """One side of a drawn example. `legacy` gives the old spelling of names that are stored so."""

    side: str
    groups: list[Group] = field(default_factory=list)
    legacy: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    @property
    def canonical(self) -> dict[str, Tensor]:
        """Every tensor under the name that rules know."""
        return {name: part for group in self.groups for t in group.tensors for name, part in t.parts.items()}

    def tensors(self, names: set[str] | None = None) -> dict[str, Tensor]:
        """The state as a checkpoint would hold it, or a part of it by canonical names; in a shuffled order."""
        known = self.canonical
        return {self.legacy.get(n, n): known[n] for n in self.order if names is None or n in names}

    def kept(self) -> dict[str, bool]:
        """The canonical names that come back from the other side, and whether with every byte."""
        return {n: g.exact for g in self.groups if g.kept for n in (g.plain_names if g.unpacked else g.names)}

    def is_unpacked(self, name: str) -> bool:
        """Whether a tensor comes back plain, of whatever shape its stored form was."""
        return any(group.unpacked and name in group.plain_names for group in self.groups)


def made_names(expansion: Expansion, state: State, *, quantization: bool) -> dict[str, Group | None]:
    """Every name that a conversion of a state makes on the other side, with the group that it comes from."""
    other = SIDES[state.side == "left"]
    made: dict[str, Group | None] = {}
    for group in state.groups:
        if group.moves():
            for named in expansion.names(group.match, other):
                codecs = expansion.codecs(group.rule.side(other)[named.place])
                codec = written(codecs, quantization)
                if group.moved_as is not None and (quantization or not holds_raw(codecs)):
                    codec = group.moved_as
                made |= dict.fromkeys([named.name] if codec is None else codec.names(named.name), group)
    ties: list[tuple[str, str]] = []
    for number, rule in enumerate(expansion.map.rules):
        if rule.value is None or rule.side(state.side) or not rule.side(other) or rule.arrow != "<->":
            continue
        for match in expansion.matches(number):
            for named in expansion.names(match, other):
                codec = written(expansion.codecs(rule.side(other)[named.place]), quantization)
                twin = tied_name(rule, match)
                if twin is None:
                    made |= dict.fromkeys([named.name] if codec is None else codec.names(named.name))
                else:
                    ties.append((named.name, twin))
    made |= {name: None for name, twin in ties if twin in made}
    return made


def made_anyway(expansion: Expansion, side: str) -> Iterator[tuple[Group, Named]]:
    """What a conversion to a side makes of nothing, though a state of it may lack it: optional constants and ties."""
    for number, rule in enumerate(expansion.map.rules):
        if rule.value is not None and rule.optional and rule.side(side) and rule.arrow == "<->":
            for match in expansion.matches(number):
                group = Group(match, rule, expansion.sizes(match), [])
                yield from ((group, named) for named in expansion.names(match, side))


def tied_name(rule: ir.Rule, match: Match) -> str | None:
    """The name that a one-sided rule's tensor equals, if the rule is a tie."""
    from mapdsl.compiler.collide import spell
    from mapdsl.compiler.names import patterns
    from mapdsl.language import tree

    if rule.value is None or not isinstance(rule.value.content, tree.Template):
        return None
    found = next(p for p in patterns(rule.value.content) if p.choice.items() <= match.choice.items())
    texts = {name[1:-1]: str(text) for name, text in match.values.items() if name[0] == "{"}
    return spell(found, dict(match.values), texts)


def wild_values(values: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Values of a match with the texts of its wildcards, as `Expansion.names` spells them."""
    return {**values, **{f"{{{name}}}": text for name, text in texts.items()}}
