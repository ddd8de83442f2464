"""Small configs for a map: every field that it reads, drawn so that guards are true and false over the examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from mapdsl.compiler.check import Checked
from mapdsl.compiler.expand import Expansion, expand, param_values
from mapdsl.compiler.fields import Field, Fields
from mapdsl.compiler.formula import EvaluationError, evaluate
from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError, error

# Sizes of axes: primes where nothing is packed, so that no transpose can hide in a square; and around a block's edge.
SIZES = (2, 3, 5, 7, 11, 13, 17, 19)
EVEN_SIZES = (2, 4, 6, 8, 10, 12, 14, 22, 34, 38, 62, 66)
# Over how many ranks sizes are drawn to divide, and how often each number: of a multiple, more than once.
RANKS = {1: 1, 2: 3, 3: 2, 4: 4, 6: 2, 8: 1}
# A state of more tensors is no example: comparing it in every way would take hours.
MAX_TENSORS = 20_000
_TRIES = 200


class ContradictionError(Exception):
    """A config, or the states drawn for it, that no checkpoint can have: draw another."""


@dataclass(frozen=True)
class Drawn:
    """A config, the params given beside it (`has(...)` by its text among them), and the map under both."""

    config: Mapping[str, Any]
    given: Mapping[str, Any]
    expansion: Expansion


def draw_config(checked: Checked, fields: Fields, rng: Random, given: Mapping[str, Any]) -> Drawn:
    """A small config under which every param has a value; C505 where none of many draws is one."""
    problem: MapError | None = None
    for _ in range(_TRIES):
        config = nested({path: value for path, value in _values(fields, rng).items() if value is not None})
        answers = {text: rng.random() < 0.5 for text in fields.has}
        try:
            return expanded(checked, config, {**answers, **given})
        except MapError as err:
            problem = err
            if any(diagnostic.code == "N111" for diagnostic in err.diagnostics):
                raise  # a param was given that the map does not have: no config mends that
    reason = problem.diagnostics[0].message if problem else ""
    raise error("C505", f"no small config fits this map: {reason}", help="give one with --config")


def expanded(checked: Checked, config: Mapping[str, Any], given: Mapping[str, Any]) -> Drawn:
    """The map under a config; MapError where it has no value for a param, a guard or an index."""
    expansion = expand(checked, param_values(checked, config, given))
    count = 0
    for number, rule in enumerate(checked.map.rules):
        for match in expansion.matches(number):
            expansion.sizes(match)
            for side in ("left", "right"):
                for _ in expansion.names(match, side):
                    count += 1
                    if count > MAX_TENSORS:
                        message = f"the config makes more than {MAX_TENSORS:,} tensors, too many for an example"
                        raise error("C505", message, rule.span, help="give a small config, or none: then one is drawn")
    return Drawn(config, given, expansion)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"text_config.hidden_size": 8}` as a config holds it: `{"text_config": {"hidden_size": 8}}`."""
    config: dict[str, Any] = {}
    for path, value in values.items():
        *outer, name = path.split(".")
        place = config
        for word in outer:
            place = place.setdefault(word, {})
            if not isinstance(place, dict):
                raise error("N118", f"the map reads `{path}`, and `{word}` as a value of its own")
        place[name] = value
    return config


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _values(fields: Fields, rng: Random) -> dict[str, Any]:
    sizes = list(EVEN_SIZES if fields.packs and rng.random() < 0.8 else SIZES)
    rng.shuffle(sizes)
    values: dict[str, Any] = {}
    counts: list[int] = []
    ranks = draw_ranks(rng) if any(field.is_cut for field in fields.of.values()) else 1
    for path, field in fields.of.items():
        if field.kind == "list":
            continue
        if field.optional and rng.random() < 0.2:
            values[path] = None
        elif field.is_cut and rng.random() < 0.9:
            values[path] = _divided(field, ranks, rng, [size for size in values.values() if isinstance(size, int)])
        else:
            values[path] = scalar(field, fields.reach, rng, sizes)
        if field.bounds_index and isinstance(values[path], int):
            counts.append(values[path])
    for path, field in fields.of.items():
        if field.kind == "list":
            absent = field.optional and rng.random() < 0.2
            values[path] = None if absent else _list(field, fields.reach, rng, counts, sizes)
    return values


def scalar(field: Field, reach: int, rng: Random, sizes: list[int]) -> Any:
    """One value of a field that is no list; `sizes` are used up, so that no two axes have the same."""
    if field.kind == "bool":
        return rng.random() < 0.5
    if field.kind == "str":
        return rng.choice([*field.literals, "other"])
    if field.kind == "number":
        return rng.choice([10000.0, 500000, 1e6])
    if field.bounds_index:
        return rng.choices(range(reach + 1), weights=[1, 2, *[3] * (reach - 1)])[0]
    near = [n for literal in field.literals for n in (literal - 1, literal, literal + 1) if n >= 0]
    if near and rng.random() < 0.7:
        return rng.choice(near)
    if field.is_divisor or field.is_divided:
        return rng.choice((1, 2, 2, 3, 4) if field.is_divisor else (4, 8, 12, 24))
    if field.is_size or field.is_factor:
        # What is multiplied with others stays small, so that their product does.
        fitting = [size for size in sizes if not field.is_factor or size < 15]
        if fitting:
            sizes.remove(fitting[-1])
            return fitting[-1]
        return rng.choice((1, 2, 3, 4))
    return rng.randint(0, 6)


def draw_ranks(rng: Random) -> int:
    """A number of ranks that sizes are to divide over."""
    return rng.choices(list(RANKS), weights=list(RANKS.values()))[0]


def _divided(field: Field, ranks: int, rng: Random, used: list[int]) -> int:
    """The size of an axis that so many ranks share, or a part of them."""
    if field.bounds_index:
        return rng.choice([n for n in (0, ranks, ranks, ranks // 2, 2, 3, 4) if n <= 6])
    sizes = [field.multiple * ranks * n for n in (1, 1, 2, 3, 5)]
    return rng.choice([size for size in sizes if size not in used] or sizes)


def _list(field: Field, reach: int, rng: Random, counts: list[int], sizes: list[int]) -> list[Any]:
    """A list: as long as one of the counts where its length matters, else long enough for every lookup."""
    element = field.items()
    length = rng.choice([*counts, *counts, rng.randint(0, reach)]) if field.measured else 3 * reach + 2
    if field.distinct:
        return rng.sample(range(2 * length + 2), length)
    if element.kind == "list":
        return [_list(element, reach, rng, counts, sizes) for _ in range(length)]
    if element.bounds_index or not element.literals:
        return [scalar(element, min(reach, 3), rng, list(sizes)) for _ in range(length)]
    others: list[Any] = ["other"] if element.kind == "str" else [0, 1] if element.kind == "int" else [True, False]
    pool = [*element.literals, *element.literals, *others]
    return [rng.choice(pool) for _ in range(length)]


def value_of(expr: tree.Expr, values: Mapping[str, Any]) -> Any:
    """The value of an expression; ContradictionError where it has none."""
    try:
        return evaluate(expr, values)
    except EvaluationError as err:
        raise ContradictionError(str(err.message)) from None
