"""Draws the states of a map: each match's tensors in a random format, with random bytes; constants as the map demands;
names that rules drop or carry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor

from mapdsl.checkpoint.dtypes import TORCH_DTYPES
from mapdsl.compiler import ir
from mapdsl.compiler.codecs import AnyCodec
from mapdsl.compiler.expand import Expansion, Match, Named
from mapdsl.language import tree
from mapdsl.language.diagnostics import error
from mapdsl.runtime.sizes import SizeError, axis_sizes, shape_of
from mapdsl.testing.bits import FLOATS, finite, ordinary, random_bits, small_numbers
from mapdsl.testing.configs import EVEN_SIZES, SIZES, ContradictionError, value_of
from mapdsl.testing.finishing import clear_padding, clear_zeros, make_copies, make_ties, respell
from mapdsl.testing.formats import Formats, cast_dtype, fits, holds_raw, packs, runtime_codec
from mapdsl.testing.readers import Readers
from mapdsl.testing.shares import partial_meshes
from mapdsl.testing.states import Group, Logical, State, wild_values

# A state larger than this is no example, and drawing it would only take memory and time; drawn ones are to be quick.
MAX_ELEMENTS = 50_000_000
QUICK_ELEMENTS = 200_000
_SEGMENTS = ("w", "extra", "norm", "bias", "0", "7", "12", "x_1", "a-b", 'quo"te', "back\\slash", "{brace}")
_TRIES = 8

# The tensors of a match before they are filled: name, logical shape, format.
Plan = list[tuple[Named, tuple[int, ...], "AnyCodec | None"]]


class Drawer:
    """Draws states under one config. `dtype` is that of decoded tensors in the conversions that follow.

    `multiples` are of axes that ranks share, of what their sizes should be multiples. With `quick` a state of many
    elements is a ContradictionError, otherwise only an absurd one is an error.
    """

    def __init__(
        self,
        expansion: Expansion,
        readers: Readers,
        rng: Random,
        dtype: torch.dtype,
        *,
        quick: bool,
        multiples: Mapping[str, int] | None = None,
    ) -> None:
        self.expansion, self.readers, self.rng, self.dtype = expansion, readers, rng, dtype
        self.multiples = multiples or {}
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
        make_ties(self.expansion, state)
        if side == "left":
            respell(self.expansion, state, self.rng)
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
            start = 0 if lower is None else value_of(lower, values)
            values[axis] = start + self.rng.randint(0, 2)
        holes = [p for t in (rule.left or rule.right) for p in ir.holes(t.template, tree.WildcardHole)]
        texts = {str(p.name): self._text(p.many) for p in holes if isinstance(p, tree.WildcardHole)}
        choice = {a: self.rng.randrange(rule.enumerations[a].size) for a in axes if a in rule.enumerations}
        match = Match(number, wild_values(values, texts), choice)
        if rule.guard is not None and not value_of(rule.guard, match.values):
            return None
        return match

    def _text(self, many: bool) -> str:
        return ".".join(self.rng.choice(_SEGMENTS) for _ in range(self.rng.randint(1, 3) if many else 1))

    # --- one match ---

    def _group(self, match: Match, rule: ir.Rule, side: str, ordinary_values: bool) -> Group:
        sizes = self._sizes(match, rule)
        group = Group(match, rule, sizes, [])
        if any(sizes.get(axis) == 0 for axis in self.expansion.checked.layouts[match.rule].repeated):
            raise ContradictionError("of no copies nothing can be told")
        if self.expansion.is_empty(match, sizes):
            return group
        self._check_sizes(match, rule, sizes)
        if rule.value is not None and not isinstance(rule.value.content, tree.Template):
            self._constant(group, side)
            return group
        plan = self._plan(match, rule, side, sizes)
        formats = self._formats(rule, plan, side, ordinary_values)
        if formats.must_encode:
            self._check_encodes(match, rule, side, sizes, plan[0][1] if plan else ())
        is_partial = any(partial_meshes(tensor) for tensor in (*rule.left, *rule.right))
        base = self.rng.choice(FLOATS) if is_partial else formats.base_dtype(self.dtype, self.rng)
        group.exact, group.moved_as = formats.is_exact(self.dtype, base), formats.undecoded
        group.unpacked = formats.unpacked
        variety = self.rng.random()
        for named, shape, codec in plan:
            if is_partial:
                parts = {named.name: small_numbers(self.generator, shape, base)}
            elif formats.must_encode:
                parts = self._tame_parts(rule, named.name, shape, codec, base)
            else:
                # Parts that move undecoded are joined, so they are alike in a group.
                parts = self._parts(named.name, shape, codec, base, variety if group.moved_as else self.rng.random())
            group.tensors.append(Logical(named, shape, codec, parts))
        make_copies(self.expansion, group, side)
        clear_padding(self.expansion, group, side)
        clear_zeros(self.expansion, group, side)
        return group

    def _sizes(self, match: Match, rule: ir.Rule) -> dict[str, int]:
        """The sizes of all axes: free ones get distinct sizes, that no other axis of the rule has."""
        sizes = self.expansion.sizes(match)
        layout = self.expansion.checked.layouts[match.rule]
        for axis in (axis for names in layout.in_names for axis in names if axis not in sizes):
            sizes[axis] = len(list(self.expansion.index_values([axis], dict(match.values))))
        shapes = [s for side in layout.shapes for s in side if s is not None]
        free = dict.fromkeys(a.name for s in shapes for a in ir.axes_of(s) if a.name and a.name not in sizes)
        used = {sizes[a.name] for s in shapes for a in ir.axes_of(s) if a.name in sizes}
        pool = [n for n in self._pool(rule) if n not in used]
        if len(shapes) > 4 or len(free) > 2:
            pool = [n for n in pool if n < 12]
        self.rng.shuffle(pool)
        for axis in free:
            if axis in self.multiples:
                fitting = [self.multiples[axis] * n for n in (1, 2, 3, 5)]
                sizes[axis] = self.rng.choice([n for n in fitting if n not in sizes.values()] or fitting)
        pool = [n for n in pool if n not in sizes.values()]
        return sizes | {axis: pool.pop() if pool else 2 for axis in free if axis is not None and axis not in sizes}

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

    def _plan(self, match: Match, rule: ir.Rule, side: str, sizes: dict[str, int]) -> Plan:
        """Name, shape and format of each tensor of a match. Mostly all are in one format, as in real checkpoints."""
        plan: Plan = []
        repeated = bool(self.expansion.checked.layouts[match.rule].repeated)
        across = [self.expansion.codecs(t) for t in (rule.right if side == "left" else rule.left)]
        moved_as_stored = any(across) and any(self.expansion.codecs(tensor) for tensor in rule.side(side))
        # What may be moved as it is stored may be mixed where the other side takes it decoded.
        alike = repeated or (moved_as_stored and not (side == "left" and all(map(holds_raw, across))))
        favourite, mixed = self.rng.random(), not alike and self.rng.random() < 0.3
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
        pool = self._pool(self.map.rules[number])
        if codecs and self.rng.random() < 0.1:
            pool = (126, 128, 130, 256)  # around the edge of a large block
            rank = min(rank, 2)
        return tuple(self.rng.choice(pool) for _ in range(rank))

    def _pool(self, rule: ir.Rule) -> tuple[int, ...]:
        """Sizes for the axes of a rule: even ones where a format packs two elements, always where it must."""
        packing = [packs(self.expansion.codecs(tensor)) for tensor in (*rule.left, *rule.right)]
        must = any(each and all(each) for each in packing) or any(
            each and each[0] for each in packing[len(rule.left) :]
        )
        may = any(any(each) for each in packing)
        return EVEN_SIZES if must or (may and self.rng.random() < 0.8) else SIZES

    def _count(self, rule: ir.Rule, shape: tuple[int, ...]) -> None:
        self.elements += math.prod(shape)
        if self.quick and self.elements > QUICK_ELEMENTS:
            raise ContradictionError("the tensors are too large to be drawn many times")
        if self.elements > MAX_ELEMENTS:
            message = f"the config makes tensors of more than {MAX_ELEMENTS:,} elements, too many for an example"
            raise error("C505", message, rule.span, help="give a small config, or none: then one is drawn")

    # --- tensors ---

    def _formats(self, rule: ir.Rule, plan: Plan, side: str, ordinary_values: bool) -> Formats:
        other = rule.right if side == "left" else rule.left
        here, across = ([self.expansion.codecs(t) for t in tensors] for tensors in (rule.side(side), other))
        return Formats(side, [codec for _, _, codec in plan], here, across, ordinary_values or side == "left")

    def _check_encodes(
        self, match: Match, rule: ir.Rule, side: str, sizes: dict[str, int], own: tuple[int, ...]
    ) -> None:
        """The first format of each tensor of the other side must fit its shape."""
        other = "right" if side == "left" else "left"
        for place, tensor in enumerate(rule.side(other)):
            pattern = self.expansion.pattern(match.rule, other, place)
            shape = own if pattern is None else tuple(size or 0 for size in shape_of(pattern, sizes))
            codecs = self.expansion.codecs(tensor)
            if codecs and not fits(codecs[0], shape):
                raise ContradictionError(f"{codecs[0].name} does not fit the shape {list(shape)}")

    def _tame_parts(
        self, rule: ir.Rule, key: str, shape: tuple[int, ...], codec: AnyCodec | None, base: torch.dtype
    ) -> dict[str, Tensor]:
        """A tensor of values that every format of the other side can hold."""
        kinds = {c.kind for t in (*rule.left, *rule.right) for c in self.expansion.codecs(t)}
        values = ordinary(self.generator, shape, base, negative="neg_exp" in kinds)
        if codec is None or codec.kind == "raw":
            return {key: values}
        return dict(runtime_codec(codec).encode(key, values).parts)

    def _parts(
        self, key: str, shape: tuple[int, ...], codec: AnyCodec | None, base: torch.dtype, variety: float
    ) -> dict[str, Tensor]:
        """A tensor of random bits in its format; `variety`, from 0 to 1, chooses among the dtypes of its parts."""
        if codec is None or codec.kind == "raw":
            return {key: random_bits(self.generator, shape, base)}
        parts = {}
        for role, stored in zip(codec.templates, codec.stored(key, shape), strict=True):
            dtypes = [TORCH_DTYPES[name] for name in stored.dtypes] or list(FLOATS)
            dtype = dtypes[int(variety * len(dtypes))]
            if stored.shape is None:
                raise ContradictionError(f"{stored.name} has no known shape")
            parts[stored.name] = self._part(role, codec, shape, stored.shape, dtype)
        return parts

    def _part(
        self, role: str, codec: AnyCodec, logical: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Random bits, as far as the part's role leaves it free."""
        match role:
            case "shape":
                return torch.tensor(logical, dtype=dtype)
            case "order":
                groups = codec.part_shapes(logical)["scale"][0]
                return torch.randint(0, max(1, groups), shape, generator=self.generator, dtype=dtype)
            case "scale" | "global":
                return finite(random_bits(self.generator, shape, dtype))
        return random_bits(self.generator, shape, dtype)

    def _constant(self, group: Group, side: str) -> None:
        """A one-sided rule's tensor that the map states, or anything where it is not compared."""
        rule, value = group.rule, group.rule.value
        assert value is not None
        for named in self.expansion.names(group.match, side):
            codecs = self.expansion.codecs(rule.side(side)[named.place])
            if any(codec.kind not in ("raw", "cast") for codec in codecs):
                raise ContradictionError(f"{named.name} is a constant in a format of blocks")
            tensor = self._stated(value, named, group, side)
            own = tensor.dtype if isinstance(value.content, tree.Generator) else self.dtype
            if side == "left":
                own = self.rng.choice(FLOATS)  # reading notes it
            tensor = tensor.to(cast_dtype(codecs[0]) if codecs and codecs[0].kind == "cast" else own)
            self._count(rule, tuple(tensor.shape))
            if not value.compared:
                tensor, group.exact = random_bits(self.generator, tuple(tensor.shape), tensor.dtype), False
            group.tensors.append(
                Logical(named, tuple(tensor.shape), codecs[0] if codecs else None, {named.name: tensor})
            )

    def _stated(self, value: tree.Value, named: Named, group: Group, side: str) -> Tensor:
        match value.content:
            case tree.Generator(name=name, arguments=arguments):
                import mapdsl.runtime.values as generators

                words = [value_of(a, group.match.values) for a in arguments]
                return getattr(generators, name)(*words)  # type: ignore[no-any-return]
            case tree.Number(value=number):
                shape = self._shape(group.match.rule, side, named.place, group.sizes, [])
                return torch.full(shape, float(number), dtype=torch.float64)
        raise AssertionError(value)
