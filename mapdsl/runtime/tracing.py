"""A conversion run without its tensors' elements: which element of which tensor each one of what it makes comes from.

The compiled adapter runs as it always does, over the names, shapes and dtypes of a state; its `take` hands out `Traced`
tensors, so its moves leave links. Unlike a conversion it does not mind that tensors of a group are absent: who needs
which of them is seen from the links, once it is known which part of the result is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from mapdsl.runtime.adapter import Adapter, naming_the_rule, refuse
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Alternatives, Raw
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.fitting import Pattern, fitted_together
from mapdsl.runtime.group import Member
from mapdsl.runtime.links import Axis, Dims, Link, Ranges, Region, Shape, joined_axes, whole_region
from mapdsl.runtime.put import Put
from mapdsl.runtime.sizes import Size, Sized, shape_of
from mapdsl.runtime.stored_forms import AS_IS, NOT_AT_ALL
from mapdsl.runtime.take import Take
from mapdsl.runtime.traced import Traced, Whole


@dataclass(frozen=True)
class Source:
    """A tensor that was taken: how it is stored, and shape and dtype once it is decoded; `parts` are its stored names.

    Of an absent one no dtype is known. `whole` is what traced tensors are parts of.
    """

    name: str
    shape: Shape
    stored: Codec | Raw
    dtype: torch.dtype | None
    parts: tuple[str, ...]

    whole: Whole

    @property
    def is_there(self) -> bool:
        """Whether the state has it."""
        return self.dtype is not None


@dataclass(frozen=True)
class Target:
    """A tensor that is made: how it is to be stored, its shape before it is encoded, where its elements come from.

    `value` is that of a tensor which the map states: a number, or a tensor.
    """

    name: str
    shape: Shape
    stored: Codec | Raw
    traced: Traced | None = None
    value: float | Tensor | None = None

    def origins(self) -> Iterator[str]:
        """The names of what its elements come from, some of them more than once."""
        if self.traced is None:
            return
        whole = self.traced.whole
        if whole.name is not None:
            yield whole.name
        for part in whole.parts:
            assert part.traced.whole.name is not None, f"{self.name} is made in two steps"
            yield part.traced.whole.name

    @property
    def has_zeros(self) -> bool:
        """Whether elements of it come from nothing: they are zeros."""
        if self.traced is None or self.traced.whole.name is not None:
            return False
        filled = sum(part.traced.numel() for part in self.traced.whole.parts if not part.copy)
        return filled < math.prod(self.shape)

    def links(self) -> Iterator[Link]:
        """Where its elements come from; what no link speaks of is zeros."""
        if self.traced is None:
            return
        whole, region = self.traced.whole, self.traced.region
        if whole.name is not None:
            everything = whole_region(self.shape)
            yield Link(whole.name, region.at, self.name, everything.at, _axes(region, everything))
            return
        assert region == whole_region(whole.shape), f"{self.name} is a part of what was filled"
        for part in whole.parts:
            source = part.traced
            assert source.whole.name is not None, f"{self.name} is made in two steps"
            axes = _axes(source.region, part.place)
            yield Link(source.whole.name, source.region.at, self.name, part.place.at, axes, part.copy)


def _axes(source: Region, target: Region) -> tuple[Axis, ...]:
    """The axes of a link. Where a part begins is of no matter, so that all experts of all layers have the same."""
    return _axes_of(source.dims, target.dims)


@lru_cache(maxsize=4096)
def _axes_of(source: Dims, target: Dims) -> tuple[Axis, ...]:
    return joined_axes(Region((), source), Region((), target))


@dataclass
class Trace:
    """What a conversion reads and makes. `values` and `ties` are what it holds tensors of the source side against."""

    sources: dict[str, Source] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    values: dict[str, float | Tensor] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, None] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)

    def stored_names(self) -> Iterator[str]:
        """The names of what the targets are stored in."""
        for target in self.targets.values():
            yield from [target.name] if isinstance(target.stored, Raw) else target.stored.names(target.name)

    def dtype(self, target: Target) -> torch.dtype | None:
        """The dtype of a target before it is encoded: that of what it comes from; None where nothing of that is there.

        Raises ConversionError, R606, where it comes from tensors of several dtypes.
        """
        first: Source | None = None
        for name in dict.fromkeys(target.origins()):
            source = self.sources[name]
            if source.is_there:
                first = first or source
                if source.dtype != first.dtype:
                    message = f"expected {first.dtype} as in {first.name} of its group, found {source.dtype}"
                    raise ConversionError("R606", f"{name}: {message}")
        return None if first is None else first.dtype


def trace(
    adapter: Adapter,
    side: str,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    partial: bool = False,
    quantization: bool = True,
    others: bool = False,
) -> Trace:
    """What converting a side of a map takes from where.

    Of the state only names, dtypes and shapes are looked at, those of DTensors being of all ranks together; `dtype`,
    `partial` and `quantization` are as of `Adapter.read` and `Adapter.write`. A name that no rule reads is an
    error, R603, unless there may be `others`.
    """
    complement = adapter.complement
    is_left = side == adapter.LEFT
    if is_left:
        complement.clear()
    else:
        complement.right.clear()
    adapter.set_params(adapter.config)
    found = Trace(spelled=complement.spelled if is_left else {})
    entries = complement.entries if is_left else complement.right
    # What has a format on the right alone goes back in the dtype that it had on the left.
    was = None if is_left else complement.decoded
    take = TracingTake(found, state, dtype=dtype, partial=partial, entries=entries, spelled=found.spelled, decoded=was)
    other = complement.right if is_left else complement.entries
    named = adapter.right_names if is_left else adapter.left_names
    put = TracingPut(
        found,
        refuse,
        refuse,
        dtype=dtype,
        quantization=quantization,
        entries=other,
        decoded=complement.decoded if is_left else None,
        named=named,
        source=take,
    )
    with naming_the_rule():
        if is_left:
            adapter.accept(take)
            adapter._to_right(take, put)
        else:
            adapter._to_left(take, put)
    if not others:
        take.finish()
    return found


def _stated(member: Member, sizes: Mapping[str, int]) -> Shape | None:
    """The shape that a tensor has, if the map and the sizes of axes tell it."""
    if not isinstance(member.shape, str):
        return member.shape
    shape = shape_of(member.shape, sizes)
    return None if None in shape else cast(Shape, shape)


class TracingTake(Take):
    """Hands out `Traced` tensors, also in the place of absent ones of a group, if their shape is known."""

    def __init__(self, found: Trace, state: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__(state, **options)
        self.found = found
        self._absent_here: set[str] = set()  # of the group at hand

    def __call__(
        self,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        into: Alternatives = NOT_AT_ALL,
        **sizes: Size,
    ) -> Tensor | None:
        """See `Take`."""
        # Most tensors are there and stored as they are: what is asked of a group is needless for them.
        if stored is AS_IS and isinstance(shape, tuple) and name in self:
            tensor = self._take(name)
            if tuple(tensor.shape) != shape:
                message = f"{name}: expected {list(shape)}, found {list(tensor.shape)}"
                raise ConversionError("R606", message)
            self._last = None
            spelled = (self._spelled.get(name, name),)
            return self._note(Source(name, shape, RAW, tensor.dtype, spelled, Whole(name, shape)))
        return super().__call__(name, stored, shape=shape, optional=optional, into=into, **sizes)

    def _gather(
        self,
        operands: list[tuple[list[str], Pattern | None, Alternatives]],
        optional: bool,
        into: Alternatives,
        sizes: Mapping[str, Size],
    ) -> bool:
        self._absent_here = set()
        if super()._gather(operands, optional, into, sizes):
            return True
        for name in self._absent_here:
            self.found.lacking[name] = None
        if not self._absent_here:
            return False
        sizes = self._sizes_at_hand()
        self._shapes = {name: shape for name, member in self._members.items() if (shape := _stated(member, sizes))}
        return all(name in self._shapes for name in self._absent_here)

    def _refuse_incomplete(self, missing: list[str], count: int) -> None:
        if any(name in self._taken for name in missing):
            super()._refuse_incomplete(missing, count)
        self._absent_here = set(missing)

    def _move_undecoded(self, into: Alternatives) -> None:
        """Nothing is moved in its stored form: which part of it a rank needs is seen of logical tensors alone."""

    def _sizes_at_hand(self) -> Mapping[str, int]:
        """The sizes of axes as far as those of the group tell them that are there, one of each operand."""
        there = {member.first: name for name, member in self._members.items() if name not in self._absent_here}
        patterns = ((name, self._members[name].shape) for name in there.values())
        tensors = [Sized(name, shape, self._shape(name)) for name, shape in patterns if isinstance(shape, str)]
        known = next(iter(self._members.values())).sizes
        return {**known, **fitted_together(tensors, known)}

    def part(self, name: str, out: Tensor | None = None) -> Tensor:
        """A traced tensor in the place of one of the group at hand."""
        del out
        member = self._members[name]
        if name in self._absent_here:
            shape = self._shapes[name]
            return self._note(Source(name, shape, RAW, None, (), Whole(name, shape)))
        codec = self._alternative(name, member.stored)
        shape = self._shape(name)
        parts = (name,) if isinstance(codec, Raw) else tuple(codec.names(name))
        dtype = self._peek(name).dtype if isinstance(codec, Raw) else self._decoded_dtype(name, codec)
        for part in parts:
            self._take(part)
        if member.stored is not AS_IS:
            self.entries[name] = (codec.name, None)
            self._mixed |= self._last not in (None, codec.name)
            self._last = RAW.name if self._mixed else codec.name
        self._check_shape(name, member, shape)
        spelled = tuple(self._spelled.get(part, part) for part in parts)
        return self._note(Source(name, shape, codec, dtype, spelled, Whole(name, shape)))

    def _note(self, source: Source) -> Tensor:
        self.found.sources[source.name] = source
        return cast(Tensor, Traced.all_of(source.whole))

    def empty(self, *shape: int) -> Tensor:
        """A tensor to fill with the group."""
        return cast(Tensor, Traced.empty(*shape))

    def zeros(self, *shape: int) -> Tensor:
        """A tensor like `empty`: what nothing fills is zeros."""
        return cast(Tensor, Traced.empty(*shape))

    def into(self, view: Tensor, name: str, *, copy: bool | None = False) -> None:
        """Note that a tensor of the group at hand goes to a part of another."""
        source, place = cast(Traced, self.part(name)), cast(Traced, view)
        if source.numel() != place.numel():
            expected, found = list(place.shape), list(source.shape)
            raise ConversionError("R606", f"{name}: expected {expected} as in the rest of its group, found {found}")
        place.copy_(source.reshape(place.shape) if source.shape != place.shape else source, copy=bool(copy))

    def refuse_lacking(self) -> None:
        """R605 for what groups lack."""
        if self.found.lacking:
            raise ConversionError("R605", f"parts of groups are missing: {some_of(list(self.found.lacking))}")

    def equal(
        self,
        name: str,
        value: float | Tensor,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        **sizes: Size,
    ) -> None:
        """Take a tensor, and note what it is to be held against."""
        if self._gather([([name], shape, stored)], optional, NOT_AT_ALL, sizes):
            self.part(name)
            self.found.values[name] = value

    def tied(
        self,
        name: str,
        other: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        **sizes: Size,
    ) -> None:
        """Take a tensor, and note which other it is to be held against."""
        if self._gather([([name], shape, stored)], optional, NOT_AT_ALL, sizes):
            self.part(name)
            self.found.ties[name] = other


class TracingPut(Put):
    """Notes what is put out."""

    def __init__(self, found: Trace, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.found = found

    def __call__(self, name: str, tensor: Tensor | None, stored: Alternatives = AS_IS) -> None:
        """Note a tensor."""
        if tensor is None:
            return
        codec = self.alternative(name, stored)
        if isinstance(tensor, Traced):
            target = Target(name, tensor.shape, codec, tensor)
            if isinstance(codec, Codec) and (dtype := self.found.dtype(target)) is not None:
                self.decoded[name] = dtype
            self._note(target)
        else:
            self._note(Target(name, tuple(tensor.shape), codec, value=tensor))

    def part(self, name: str, view: Tensor, stored: Alternatives = AS_IS) -> None:
        """Note a piece of a larger tensor."""
        self(name, view, stored)

    def made(self, name: str, tensor: Tensor, stored: Alternatives = AS_IS) -> None:
        """Note a tensor that the map computes, with its values."""
        self._note(Target(name, tuple(tensor.shape), self.alternative(name, self._unread(name, stored)), value=tensor))

    def full(self, name: str, shape: tuple[int, ...], value: float, stored: Alternatives = AS_IS) -> None:
        """Note a constant."""
        self._note(Target(name, shape, self.alternative(name, self._unread(name, stored)), value=value))

    def tie(self, name: str, other: str, stored: Alternatives = AS_IS) -> None:
        """Note a tensor that equals another one."""
        twin = self.found.targets.get(other)
        if twin is not None:
            self._note(Target(name, twin.shape, twin.stored, twin.traced, twin.value))

    def _note(self, target: Target) -> None:
        if target.name in self.found.targets:
            raise ConversionError("R604", f"{target.name} is put out twice")
        self.found.targets[target.name] = target


__all__ = ["Ranges", "Source", "Target", "Trace", "trace"]
