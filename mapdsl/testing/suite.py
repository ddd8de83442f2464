"""Examples of a map: a drawn config, states of both sides, and the conversions of them, each made once."""

from __future__ import annotations

import importlib.util
import linecache
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.answers import has_answers
from mapdsl.compiler.check import Checked, check
from mapdsl.compiler.expand import Expansion
from mapdsl.compiler.fields import Fields, fields_of
from mapdsl.emit.adapter import adapter_source, class_name
from mapdsl.language import tree
from mapdsl.language.diagnostics import error
from mapdsl.map import Map, load
from mapdsl.testing.configs import ContradictionError, Drawn, draw_config, expanded, nested
from mapdsl.testing.cuts import Cuts, free_multiples
from mapdsl.testing.drawing import Drawer
from mapdsl.testing.readers import Readers
from mapdsl.testing.states import State

_TRIES = 40


class Counted(Mapping[str, Tensor]):
    """A lazy state that counts how often each of its tensors is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.asked: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self.asked[name] += 1
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Suite:
    """A map and the adapter that is tested with it: the compiled map's own, or one compiled before."""

    def __init__(self, tested: Map, adapter: type[Any] | None = None, params: Mapping[str, Any] | None = None) -> None:
        self.map = tested
        self.checked = tested.checked
        self.adapter = adapter or tested.adapter_class
        self.params = dict(params or {})

    @cached_property
    def fields(self) -> Fields:
        """What the map asks of a config."""
        return fields_of(self.checked)

    @cached_property
    def asks(self) -> tuple[str, ...]:
        """The params that a checkpoint's names decide: those made with `has(...)`."""
        return tuple(name for name, param in self.checked.map.params.items() if _has_in(param.value))

    def draw(self, seed: int | str) -> Example:
        """An example with a config of its own; MapError, C505, where no config is found."""
        rng = Random(f"config {seed}")
        problem = ""
        for attempt in range(_TRIES):
            drawn = draw_config(self.checked, self.fields, rng, self.params)
            try:
                return Example(self, drawn, f"{seed}.{attempt}", quick=True)
            except ContradictionError as err:
                problem = str(err)
        raise error("C505", f"no small config fits this map: {problem}", help="give one with --config")

    def example(self, config: Mapping[str, Any], seed: int | str, *, quick: bool = False) -> Example:
        """An example with this config; MapError where it has no value for a param, or no states go with it.

        With `quick` tensors of many elements are an error too.
        """
        problem = ""
        for attempt in range(_TRIES):
            rng = Random(f"answers {seed} {attempt}")
            answers = {text: rng.random() < 0.5 for text in self.fields.has}
            drawn = expanded(self.checked, config, {**answers, **self.params})
            try:
                return Example(self, drawn, f"{seed}.{attempt}", quick=quick)
            except ContradictionError as err:
                problem = str(err)
        raise error("C505", f"no checkpoint goes with this config: {problem}")

    def example_of(self, fields: Mapping[str, Any], seed: int | str) -> Example:
        """An example with a config of these fields by dotted path, None for an absent one; errors as of `example`."""
        return self.example(nested({p: v for p, v in fields.items() if v is not None}), seed, quick=True)

    def shuffled(self, order: int) -> type[Any]:
        """The adapter of the same map with its rules in another order; MapError if that does not hold."""
        rng = Random(order)
        file = self.checked.map.file
        return _adapter_of(check(replace(file, statements=_shuffle(file.statements, rng))), f"shuffled {order}")


class Example:
    """One config with a state of each side, all drawn from a seed.

    `dtype` is that of decoded tensors. ContradictionError where the drawn states do not go together.
    """

    def __init__(self, suite: Suite, drawn: Drawn, seed: str, *, quick: bool = False) -> None:
        self.suite, self.drawn, self.seed, self.quick = suite, drawn, seed, quick
        self.config = drawn.config
        self.expansion: Expansion = drawn.expansion
        self.rng = Random(f"states {seed}")
        self.dtype = self.rng.choice([torch.bfloat16, torch.bfloat16, torch.float32])
        self.readers = Readers(self.expansion)
        self.multiples = free_multiples(self.expansion, Random(f"ranks {seed}"))
        self.left = self._drawer(self.rng).state("left")
        self._check_answers()
        self.right = self._drawer(self.rng).state("right")

    @property
    def checked(self) -> Checked:
        """The map."""
        return self.suite.checked

    def _drawer(self, rng: Random) -> Drawer:
        return Drawer(self.expansion, self.readers, rng, self.dtype, quick=self.quick, multiples=self.multiples)

    def _check_answers(self) -> None:
        """Every `has(...)` must be answered by the left state as it was when the states were drawn."""
        found = has_answers(self.checked, self.left.tensors())
        for text, answer in found.items():
            if text in self.drawn.given and self.drawn.given[text] != answer:
                raise ContradictionError(f"`{text}` cannot be {str(not answer).lower()} in this config")

    def adapter(self, *, answered: bool = False) -> Any:
        """A new adapter. `answered` gives it the answers of `has(...)`, as a caller who writes without reading must."""
        params = {name: self.expansion.params[name] for name in self.suite.asks} if answered else {}
        return self.suite.adapter(dict(self.config), **{**params, **self.suite.params})

    # --- conversions, each made once ---

    @cached_property
    def read(self) -> tuple[Any, dict[str, Tensor], Counted]:
        """The right state of the left one, with the adapter that made it and the counted source."""
        adapter, source = self.adapter(), Counted(self.left.tensors())
        return adapter, adapter.read(source, dtype=self.dtype), source

    @cached_property
    def read_back(self) -> tuple[dict[str, Tensor], Counted]:
        """The left state written back by the adapter that read it."""
        adapter, made, _ = self.read
        source = Counted(made)
        return adapter.write(source, quantization=True), source

    @cached_property
    def written(self) -> tuple[dict[str, Tensor], Counted]:
        """The left state of the right one, unquantised where the map allows it."""
        source = Counted(self.right.tensors())
        return self.adapter(answered=True).write(source, quantization=False, dtype=self.dtype), source

    @cached_property
    def cuts(self) -> Cuts:
        """The numbers of ranks that its states can be cut over, and the shares."""
        return Cuts(self)

    @cached_property
    def ordinary_right(self) -> State:
        """A right state of values that every format on the left can hold."""
        return self._drawer(Random(f"ordinary {self.seed}")).state("right", ordinary_values=True)


def load_suite(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> Suite:
    """The suite of a map, by path or shipped name, and of a compiled adapter module; `params` are given ones."""
    tested = load(path)
    if adapter is None:
        return Suite(tested, params=params)
    spec = importlib.util.spec_from_file_location(f"mapdsl_tested_{Path(adapter).stem}", adapter)
    if spec is None or spec.loader is None or not Path(adapter).is_file():
        raise error("C507", f"there is no adapter module {Path(adapter)}; compile it with `mapdsl compile -o`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    name = class_name(tested.checked.map.name)
    if not hasattr(module, name):
        raise error("C507", f"{Path(adapter)} has no {name}: it is compiled from another map")
    return Suite(tested, getattr(module, name), params)


def _has_in(expr: tree.Expr) -> bool:
    match expr:
        case tree.Has():
            return True
        case tree.Default(options=items) | tree.Operation(operands=items) | tree.Call(arguments=items):
            return any(_has_in(item) for item in items)
    return False


def _shuffle(statements: tuple[Any, ...], rng: Random) -> tuple[Any, ...]:
    """Rules and blocks in another order, in blocks too; what is declared keeps its place."""
    moving = [n for n, s in enumerate(statements) if isinstance(s, (tree.Rule, tree.Block, tree.Accept))]
    bodies = {n: _shuffled_body(statements[n], rng) for n in moving}
    order = list(moving)
    rng.shuffle(order)
    out = list(statements)
    for place, source in zip(moving, order, strict=True):
        out[place] = bodies[source]
    return tuple(out)


def _shuffled_body(statement: Any, rng: Random) -> Any:
    return replace(statement, body=_shuffle(statement.body, rng)) if isinstance(statement, tree.Block) else statement


def _adapter_of(checked: Checked, what: str) -> type[Any]:
    """The adapter's class of a checked map; tracebacks show its source."""
    source = adapter_source(checked)
    filename = f"<mapdsl {checked.map.file.source.path}, {what}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = ModuleType(f"mapdsl_{checked.map.name}")
    exec(compile(source, filename, "exec"), module.__dict__)
    return getattr(module, class_name(checked.map.name))  # type: ignore[no-any-return]


__all__ = ["ContradictionError", "Counted", "Example", "Suite", "load_suite"]
