"""Draws the states of a map: each match's tensors in a random format, with random bytes, names that rules drop or carry,
legacy spellings, copies, constants and ties as the map demands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.compiler.expand import Expansion, Match, Named
from mapdsl.compiler.formula import EvaluationError, evaluate
from mapdsl.compiler.names import patterns
from mapdsl.language import tree
from mapdsl.language.diagnostics import error
from mapdsl.runtime.sizes import SizeError, axis_sizes, shape_of
from mapdsl.testing.bits import FLOATS, PLAIN_DTYPES, bits, ordinary, random_bits
from mapdsl.testing.configs import EVEN_SIZES, SIZES, ContradictionError
from mapdsl.testing.readers import Readers, bindings
from mapdsl.testing.reference import Placement
from mapdsl.testing.states import Group, Logical, State, fits, tied_name, wild_values

# A state larger than this is no example, and drawing it would only take memory and time; drawn ones are to be quick.
MAX_ELEMENTS = 50_000_000
QUICK_ELEMENTS = 500_000
_SEGMENTS = ("w", "extra", "norm", "bias", "0", "7", "12", "x_1", "a-b", 'quo"te', "back\\slash", "{brace}")
_TRIES = 8


class Drawer:
    """Draws states under one config. `dtype` is that of decoded tensors in the conversions that follow.

    With `quick` a state of many elements is a ContradictionError, otherwise only an absurd one is an error.
    """

    def __init__(
        self, expansion: Expansion, readers: Readers, rng: Random, dtype: torch.dtype, *, quick: bool
    ) -> None:
        self.expansion, self.readers, self.rng, self.dtype = expansion, readers, rng, dtype
        self.map = expansion.map
        self.generator = torch.Generator().manual_seed(rng.getrandbits(62))
        self.quick, self.elements = quick, 0

    def state(self, side: str, *, ordinary_values: bool = False) -> State:
        """A state of one side; with `ordinary_values` what has a format on the left is something that it can hold."""
        state = State(side)
        for number, rule in enumerate(self.map.rules):
            if rule.side(side):
                state.groups += self._groups(number, rule, side, ordinary_values)
        state.groups = [group for group in state.groups if group.tensors]
        self._tie(state)
        if side == "left":
            self._respell(state)
        state.order = list(state.canonical)
        self.rng.shuffle(state.order)
        return state

    # --- matches ---

    def _groups(self, number: int, rule: ir.Rule, side: str, ordinary_values: bool) -> list[Group]:
        other = rule.right if side == "left" else rule.left
        dropped = not other and rule.value is None
        if rule.arrow != "<->" and not dropped:
            return []
        out = []
        for match in self._matches(number, rule):
            if (rule.optional or dropped) and self.rng.random() < 0.4:
                continue
            group = self._group(match, rule, side, ordinary_values)
            group.kept = not dropped
            out.append(group)
        return out

    def _matches(self, number: int, rule: ir.Rule) -> list[Match]:
        axes = self.expansion.checked.layouts[number].matched
        indices = self.map.indices
        open_ = [axis for axis in axes if axis in indices and indices[axis].upper is None]
        if not open_ and not any(axis[0] == "{" for axis in axes):
            return list(self.expansion.matches(number))
        found: dict[tuple[str, ...], Match] = {}
        for _ in range(_TRIES):
            match = self._wild_match(number, rule, axes, open_)
            if match is None or self.rng.random() < 0.5:
                continue
            names = {side: self._names(match, side) for side in ("left", "right")}
            if all(self.readers.is_free(name, side, number) for side, group in names.items() for name in group):
                found.setdefault(tuple(names["left"] + names["right"]), match)
        return list(found.values())

    def _names(self, match: Match, side: str) -> list[str]:
        """Every stored name that a match may have on a side, whatever the format."""
        rule, names = self.map.rules[match.rule], []
        for named in self.expansion.names(match, side):
            codecs = self.expansion.codecs(rule.side(side)[named.place])
            names += [named.name, *(name for codec in codecs for name in codec.names(named.name))]
        return names

    def _wild_match(self, number: int, rule: ir.Rule, axes: tuple[str, ...], open_: list[str]) -> Match | None:
        """A match of a rule with wildcards or open indices, with texts and numbers of its own."""
        closed = [axis for axis in axes if axis in self.map.indices and axis not in open_]
        rows = list(self.expansion.index_values(closed))
        if not rows:
            return None
        values = dict(self.rng.choice(rows))
        for axis in open_:
            lower = self.map.indices[axis].lower
            start = 0 if lower is None else _value(lower, values)
            values[axis] = start + self.rng.randint(0, 2)
        holes = [p for t in (rule.left or rule.right) for p in ir.holes(t.template, tree.WildcardHole)]
        texts = {str(p.name): self._text(p.many) for p in holes if isinstance(p, tree.WildcardHole)}
        choice = {a: self.rng.randrange(rule.enumerations[a].size) for a in axes if a in rule.enumerations}
        match = Match(number, wild_values(values, texts), choice)
        if rule.guard is not None and not _value(rule.guard, match.values):
            return None
        return match

    def _text(self, many: bool) -> str:
        return ".".join(self.rng.choice(_SEGMENTS) for _ in range(self.rng.randint(1, 3) if many else 1))

    # --- one match ---

    def _group(self, match: Match, rule: ir.Rule, side: str, ordinary_values: bool) -> Group:
        sizes = self._sizes(match, rule)
        absorbed = {axis for names in self.expansion.checked.layouts[match.rule].in_names for axis in names}
        if empty := sorted(axis for axis in absorbed if not sizes.get(axis, 1)):
            # One side would have a tensor without elements, the other none at all.
            raise ContradictionError(f"the axis `{empty[0]}` is empty, and lives in names on one side only")
        self._check_sizes(match, rule, sizes)
        group = Group(match, rule, sizes, [])
        if rule.value is not None and not isinstance(rule.value.content, tree.Template):
            self._constant(group, side)
            return group
        plan = self._plan(match, rule, side, sizes)
        chosen = [codec for _, _, codec in plan]
        base = self._base_dtype(rule, chosen, side, ordinary_values)
        group.exact = self._is_exact(rule, chosen, side, base)
        tame = self._is_tame(rule, side, ordinary_values)
        for named, shape, codec in plan:
            group.tensors.append(Logical(named, shape, codec, self._parts(rule, named.name, shape, codec, base, tame)))
        self._copies(group, side)
        return group

    def _sizes(self, match: Match, rule: ir.Rule) -> dict[str, int]:
        """The sizes of all axes: free ones get distinct sizes, that no other axis of the rule has."""
        sizes = self.expansion.sizes(match)
        shapes = [s for side in self.expansion.checked.layouts[match.rule].shapes for s in side if s is not None]
        free = dict.fromkeys(a.name for s in shapes for a in ir.axes_of(s) if a.name and a.name not in sizes)
        packs = any(getattr(c, "per", 1) > 1 for t in (*rule.left, *rule.right) for c in self.expansion.codecs(t))
        used = {sizes[a.name] for s in shapes for a in ir.axes_of(s) if a.name in sizes}
        pool = [n for n in (EVEN_SIZES if packs and self.rng.random() < 0.8 else SIZES) if n not in used]
        if len(shapes) > 4 or len(free) > 2:
            pool = [n for n in pool if n < 8] + [8, 9]
        self.rng.shuffle(pool)
        return sizes | {axis: pool.pop() if pool else 2 for axis in free if axis is not None}

    def _check_sizes(self, match: Match, rule: ir.Rule, sizes: dict[str, int]) -> None:
        """Sizes must follow from the tensors of each side: of `(g c)` with no g, nobody can tell c."""
        for side in ("left", "right"):
            known = self.expansion.sizes(match)
            for place in range(len(rule.side(side))):
                pattern = self.expansion.pattern(match.rule, side, place)
                shape = () if pattern is None else shape_of(pattern, sizes)
                if pattern is None or None in shape:
                    continue
                try:
                    known |= axis_sizes(pattern, [size or 0 for size in shape], known)
                except SizeError as err:
                    raise ContradictionError(str(err)) from None

    def _plan(
        self, match: Match, rule: ir.Rule, side: str, sizes: dict[str, int]
    ) -> list[tuple[Named, tuple[int, ...], AnyCodec | None]]:
        """Name, shape and format of each tensor of a match. Mostly all are in one format, as in real checkpoints."""
        plan: list[tuple[Named, tuple[int, ...], AnyCodec | None]] = []
        repeated = bool(self.expansion.checked.layouts[match.rule].repeated)
        favourite, mixed = self.rng.random(), not repeated and self.rng.random() < 0.3
        for named in self.expansion.names(match, side):
            codecs = self.expansion.codecs(rule.side(side)[named.place])
            shape = self._shape(match.rule, side, named.place, sizes, codecs)
            self._count(rule, shape)
            fitting = [codec for codec in codecs if fits(codec, shape)]
            if codecs and not fitting:
                raise ContradictionError(f"no format of {named.name} fits the shape {list(shape)}")
            number = int((self.rng.random() if mixed else favourite) * len(fitting))
            plan.append((named, shape, fitting[number] if codecs else None))
        return plan

    def _shape(
        self, number: int, side: str, place: int, sizes: dict[str, int], codecs: list[AnyCodec]
    ) -> tuple[int, ...]:
        pattern = self.expansion.pattern(number, side, place)
        if pattern is not None:
            shape = shape_of(pattern, sizes)
            if None in shape:
                raise ContradictionError(f"[{pattern}] has an axis of unknown size")
            return tuple(size or 0 for size in shape)
        rank = self.rng.choice((1, 2, 2, 2, 3) if codecs else (0, 1, 1, 2, 2, 3))
        pool = EVEN_SIZES if any(getattr(c, "per", 1) > 1 for c in codecs) and self.rng.random() < 0.8 else SIZES
        if codecs and self.rng.random() < 0.1:
            pool = (126, 128, 130, 256)  # around the edge of a large block
            rank = min(rank, 2)
        return tuple(self.rng.choice(pool) for _ in range(rank))

    def _count(self, rule: ir.Rule, shape: tuple[int, ...]) -> None:
        self.elements += math.prod(shape)
        if self.quick and self.elements > QUICK_ELEMENTS:
            raise ContradictionError("the tensors are too large to be drawn many times")
        if self.elements > MAX_ELEMENTS:
            message = f"the config makes tensors of more than {MAX_ELEMENTS:,} elements, too many for an example"
            raise error("C505", message, rule.span, help="give a small config, or none: then one is drawn")

    # --- dtypes and promises ---

    def _base_dtype(
        self, rule: ir.Rule, chosen: list[AnyCodec | None], side: str, ordinary_values: bool
    ) -> torch.dtype:
        """The dtype of a match's plain tensors: one for all, since they may be joined on the other side."""
        formats = [codec for codec in chosen if codec is not None and codec.kind != "raw"]
        tensors = rule.right if side == "left" else rule.left
        codecs = [codec for tensor in (*rule.left, *rule.right) for codec in self.expansion.codecs(tensor)]
        across = [self.expansion.codecs(tensor) for tensor in tensors]
        if side == "left" and any(across):
            return torch.bfloat16  # what writing decodes to
        must_encode = any(c and (ordinary_values or not any(x.kind == "raw" for x in c)) for c in across)
        if formats or must_encode:
            return self.dtype
        free = [dtype for dtype in PLAIN_DTYPES if not any(_claims(codec, dtype) for codec in codecs)]
        if not free:
            raise ContradictionError("no dtype is left for a plain tensor")
        return self.rng.choice([*free, *(dtype for dtype in free if dtype in FLOATS)])

    def _is_exact(self, rule: ir.Rule, chosen: list[AnyCodec | None], side: str, base: torch.dtype) -> bool:
        """Whether a trip from this side and back promises every byte, in the formats chosen."""
        across = [self.expansion.codecs(t) for t in (rule.right if side == "left" else rule.left)]
        here = [self.expansion.codecs(t) for t in rule.side(side)]
        if any(across) and across[0] == here[0] and len(across) == len(here) == 1:
            return True  # moved undecoded
        decoded = self.dtype if side == "left" else torch.bfloat16
        if any(codec is not None and codec.kind == "cast" and not _holds(decoded, codec) for codec in chosen):
            return False
        if any(across) and side == "left":
            return all(c and c[0].kind == "cast" and _casts_back(c[0], base) for c in across)
        if side == "right" and any(here):
            return not any(codec is not None and codec.kind != "raw" for codec in chosen)
        return all(
            not codecs or any(c.kind == "raw" for c in codecs) or _casts_back(codecs[0], base) for codecs in across
        )

    def _is_tame(self, rule: ir.Rule, side: str, ordinary_values: bool) -> bool:
        """Whether the values must be such that every format of the other side can hold them."""
        across = [self.expansion.codecs(t) for t in (rule.right if side == "left" else rule.left)]
        needed = [c for c in across if c and (ordinary_values or side == "left" or all(x.kind != "raw" for x in c))]
        return bool(needed)

    # --- tensors ---

    def _parts(
        self, rule: ir.Rule, key: str, shape: tuple[int, ...], codec: AnyCodec | None, base: torch.dtype, tame: bool
    ) -> dict[str, Tensor]:
        if codec is None or codec.kind == "raw":
            if tame:
                kinds = {c.kind for t in (*rule.left, *rule.right) for c in self.expansion.codecs(t)}
                return {key: ordinary(self.generator, shape, base, negative="neg_exp" in kinds)}
            return {key: random_bits(self.generator, shape, base)}
        parts = {}
        for stored in codec.stored(key, shape):
            dtype = self.rng.choice([TORCH_DTYPES[name] for name in stored.dtypes] or list(FLOATS))
            if stored.shape is None:
                raise ContradictionError(f"{stored.name} has no known shape")
            parts[stored.name] = random_bits(self.generator, stored.shape, dtype)
        return parts

    def _copies(self, group: Group, side: str) -> None:
        """Make the copies of `repeat` equal: tensors by name, places in a shape element by element."""
        layout = self.expansion.checked.layouts[group.match.rule]
        if not layout.repeated:
            return
        first: dict[object, Logical] = {}
        for tensor in group.tensors:
            key = (tensor.named.place, *(kv for kv in tensor.place[1] if kv[0] not in layout.repeated))
            model = first.setdefault(key, tensor)
            tensor.parts = dict(zip(tensor.parts, model.parts.values(), strict=True))
        number = 0 if side == "left" else 1
        placement = Placement(group.rule, layout, self.map.indices, group.sizes)
        for pair in layout.pieces:
            piece = pair[number]
            inside = [axis for axis in piece.axes if axis in layout.repeated]
            for tensor in [t for t in group.tensors if t.named.place == piece.tensor] if inside else []:
                if len(tensor.parts) > 1 or tensor.named.name not in tensor.parts:
                    # One byte everywhere: equal blocks under equal scales.
                    tensor.parts = {n: torch.ones_like(bits(p)).view(p.dtype) for n, p in tensor.parts.items()}
                    continue
                plain = tensor.parts[tensor.named.name]
                view = placement.view(plain, piece, number)
                for axis in inside:
                    at = piece.axes.index(axis)
                    view.copy_(view.narrow(at, 0, 1).clone().expand_as(view))

    def _constant(self, group: Group, side: str) -> None:
        """A one-sided rule's tensor that the map states, or anything where it is not compared."""
        rule, value = group.rule, group.rule.value
        assert value is not None
        made_in = torch.bfloat16 if side == "left" else self.dtype
        for named in self.expansion.names(group.match, side):
            codecs = self.expansion.codecs(rule.side(side)[named.place])
            if any(codec.kind not in ("raw", "cast") for codec in codecs):
                raise ContradictionError(f"{named.name} is a constant in a format of blocks")
            dtype = TORCH_DTYPES[codecs[0].dtypes[0]] if codecs and codecs[0].kind == "cast" else made_in
            tensor = self._stated(value, named, group, side).to(dtype)
            if isinstance(value.content, tree.Generator) and not codecs:
                tensor = self._stated(value, named, group, side)
            self._count(rule, tuple(tensor.shape))
            if not value.compared:
                tensor, group.exact = random_bits(self.generator, tuple(tensor.shape), tensor.dtype), False
            group.tensors.append(Logical(named, tuple(tensor.shape), codecs[0] if codecs else None, {named.name: tensor}))

    def _stated(self, value: tree.Value, named: Named, group: Group, side: str) -> Tensor:
        match value.content:
            case tree.Generator(name=name, arguments=arguments):
                import mapdsl.runtime.values as generators

                words = [_value(a, group.match.values) for a in arguments]
                return getattr(generators, name)(*words)  # type: ignore[no-any-return]
            case tree.Number(value=number):
                shape = self._shape(group.match.rule, side, named.place, group.sizes, [])
                return torch.full(shape, float(number), dtype=torch.float64)
        raise AssertionError(value)

    def _tie(self, state: State) -> None:
        """Tied tensors become those that they equal; a tie needs its twin."""
        known: dict[str, Any] = state.canonical
        for group in state.groups:
            twin = tied_name(group.rule, group.match) if group.rule.value is not None else None
            if twin is None or group.rule.value is None:
                continue
            if twin not in known:
                raise ContradictionError(f"{group.names[0]} is tied to {twin}, which is absent")
            tensor = group.tensors[0]
            if group.rule.value.compared:
                tensor.parts, tensor.shape = {tensor.named.name: known[twin]}, tuple(known[twin].shape)
            else:
                group.exact = False

    def _respell(self, state: State) -> None:
        """Store some tensors under a legacy spelling."""
        taken = set(state.canonical)
        for accept in self.map.accepts:
            if self.rng.random() < 0.4:
                continue
            for old, new in zip(patterns(accept.old), patterns(accept.new), strict=True):
                for group in state.groups:
                    for tensor in group.tensors:
                        self._respell_one(state, accept, (old, new), tensor, taken)

    def _respell_one(self, state: State, accept: ir.Accept, pair: tuple[Any, Any], tensor: Logical, taken: set[str]) -> None:
        from mapdsl.compiler.collide import spell

        old, new = pair
        for values, texts in bindings(self.expansion, new, tensor.named.name):
            if accept.guard is not None and not _value(accept.guard, values):
                continue
            key = spell(old, dict(values), texts)
            codec = tensor.codec
            olds = [key] if codec is None or codec.kind == "raw" else codec.names(key)
            if not taken & set(olds):
                state.legacy |= dict(zip(tensor.parts, olds, strict=True))
                taken.update(olds)


def _claims(codec: AnyCodec, dtype: torch.dtype) -> bool:
    """Whether a plain tensor of this dtype would be taken for one of the codec's."""
    if codec.kind == "raw":
        return False
    if getattr(codec, "payload_dtypes", getattr(codec, "dtypes", ())) == ():
        return dtype in FLOATS
    return codec.claims(DTYPE_NAMES[dtype])


def _holds(dtype: torch.dtype, codec: AnyCodec) -> bool:
    """Whether decoding a cast to this dtype loses nothing."""
    stored = TORCH_DTYPES[codec.stored("x", ())[0].dtypes[0]]
    return dtype in (torch.float32, stored)


def _casts_back(codec: AnyCodec, dtype: torch.dtype) -> bool:
    """Whether a cast holds every value of this dtype."""
    if codec.kind != "cast":
        return False
    stored = TORCH_DTYPES[codec.stored("x", ())[0].dtypes[0]]
    return stored in (torch.float32, dtype)


def _value(expr: tree.Expr, values: Mapping[str, Any]) -> Any:
    try:
        return evaluate(expr, values)
    except EvaluationError as err:
        raise ContradictionError(str(err.message)) from None
