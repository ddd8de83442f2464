"""Runs the properties of a map over many examples, and makes what fails small."""

from __future__ import annotations

import copy
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mapdsl.language.diagnostics import MapError
from mapdsl.testing.comparing import PropertyError
from mapdsl.testing.configs import flat, nested
from mapdsl.testing.properties import PROPERTIES, properties_for
from mapdsl.testing.suite import Example, Suite

_SHRINKS = 150
_SHRINK_SECONDS = 20.0


@dataclass
class Row:
    """One property: how often it held, and the time it took in seconds."""

    name: str
    held: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A property that does not hold, on the smallest example found.

    `seed` and `config` give the example again: `suite.example(config, seed)`. `also` are properties that failed on the
    same example in the same way.
    """

    name: str
    title: str
    message: str
    config: Mapping[str, Any]
    seed: str
    tensors: tuple[int, int]
    params: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every property that failed so."""
        return (self.name, *self.also)

    def text(self, map_path: str) -> str:
        """The failure with all that is needed to see it again."""
        left, right = self.tensors
        params = f", params={dict(self.params)!r}" if self.params else ""
        lines = [
            f"{self.name} does not hold: {self.title}",
            *("  " + line for line in self.message.splitlines()),
            f"  states: {left} tensors on the left, {right} on the right",
            *([f"  the same on this example: {', '.join(self.also)}"] if self.also else []),
            "to see it again:",
            "  from mapdsl.testing import PROPERTIES, load_suite",
            f"  config = {dict(self.config)!r}",
            f"  example = load_suite({map_path!r}{params}).example(config, {self.seed!r})",
            f"  PROPERTIES[{self.name!r}](example)",
        ]
        return "\n".join(lines)


@dataclass
class Report:
    """What a run found: one row a property, at most one failure each."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    examples: int = 0
    tensors: int = 0


def run(suite: Suite, *, config: Mapping[str, Any] | None = None, examples: int = 25, seed: int | str = 0) -> Report:
    """Hold every property against `examples` examples, all from one seed; with a config given, all of that config.

    A property that failed is not tried again. MapError where no example can be drawn.
    """
    report = Report([Row(name) for name in properties_for(suite)])
    shrinker = _Shrinker(suite, fixed=config is not None)
    for number in range(examples):
        own = f"{seed}.{number}"
        example = suite.draw(own) if config is None else suite.example(config, own)
        report.examples += 1
        report.tensors += len(example.left.order)
        alike: dict[str, list[str]] = {}
        for row in report.rows:
            if any(row.name in failure.names for failure in report.failures):
                continue
            start = time.perf_counter()
            message = broken(example, row.name)
            row.seconds += time.perf_counter() - start
            if message is None:
                row.held += 1
            else:
                alike.setdefault(message, []).append(row.name)
        for message, (name, *also) in alike.items():
            report.failures.append(replace(shrinker.smallest(name, example, message), also=tuple(also)))
    return report


def broken(example: Example, name: str) -> str | None:
    """How an example breaks a property; None where it holds. A crash breaks it too."""
    try:
        PROPERTIES[name](example)
    except PropertyError as err:
        return str(err)
    except Exception as err:  # whatever a conversion raises on a state that it should take
        frames = traceback.extract_tb(err.__traceback__)[-2:]
        where = "; ".join(f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames)
        return f"{type(err).__name__}: {err}\nat {where}"
    return None


class _Shrinker:
    """Makes failures small, within one budget of tries and time for all of a run."""

    def __init__(self, suite: Suite, *, fixed: bool) -> None:
        self.suite, self.fixed = suite, fixed
        self.tries, self.seconds = _SHRINKS, _SHRINK_SECONDS
        self.small: list[Mapping[str, Any]] = []

    def smallest(self, name: str, example: Example, message: str) -> Failure:
        """The failure on the smallest config found that still shows it, one field after the other made smaller."""
        start = time.perf_counter()
        config = copy.deepcopy(dict(example.config))
        # A config given again draws its states anew, so the failure as it is told must be one of those.
        best = self._fails(name, config, example.seed)
        if best is None:
            return Failure(name, self.title(name), message, config, example.seed, _counts(example), self.suite.params)
        candidates = iter(self._candidates(best))
        while (smaller := next(candidates, None)) is not None and self._goes_on(start):
            found = self._fails(name, smaller, example.seed)
            if found is not None:
                best, candidates = found, iter(self._candidates(found, known=False))
        self.seconds -= time.perf_counter() - start
        self.small.append(best.config)
        return best

    def title(self, name: str) -> str:
        """What a property says, in the map's own words for its sides."""
        resolved = self.suite.checked.map
        return re.sub(
            r"\b(left|right)\b",
            lambda side: resolved.left if side[0] == "left" else resolved.right,
            PROPERTIES[name].__doc__ or "",
        )

    def _candidates(self, best: Failure, *, known: bool = True) -> Iterator[Mapping[str, Any]]:
        if self.fixed:
            return
        yield from self.small if known else ()
        sizes = {p for p, f in self.suite.fields.of.items() if f.is_size or f.is_factor or f.is_divisor}
        yield from _smaller(dict(best.config), sizes)

    def _goes_on(self, start: float) -> bool:
        self.tries -= 1
        return self.tries >= 0 and time.perf_counter() - start < self.seconds

    def _fails(self, name: str, config: Mapping[str, Any], seed: str) -> Failure | None:
        """The failure of a property under a config, with the first of a few seeds that shows it."""
        for number in range(3):
            own = f"{seed}/{number}"
            try:
                example = self.suite.example(config, own)
            except MapError:
                return None
            message = broken(example, name)
            if message is not None:
                return Failure(name, self.title(name), message, config, own, _counts(example), self.suite.params)
        return None


def _counts(example: Example) -> tuple[int, int]:
    return len(example.left.order), len(example.right.order)


def _smaller(config: dict[str, Any], sizes: set[str]) -> Iterator[dict[str, Any]]:
    """Configs with one field smaller; sizes of tensors stay above 0, where another failure may wait."""
    values = flat(config)
    for path, value in values.items():
        for smaller in _smaller_values(value, 1 if path in sizes else 0):
            yield nested({**values, path: smaller})


def _smaller_values(value: Any, least: int) -> Iterator[Any]:
    match value:
        case bool():
            if value:
                yield False
        case int():
            yield from dict.fromkeys(n for n in (0, 1, 2, value // 2, value - 1) if least <= n < value)
        case [*items] if items and len(items) > 1:
            yield items[: len(items) // 2]
            yield items[:-1]


__all__ = ["Failure", "Report", "Row", "broken", "run"]
