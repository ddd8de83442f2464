"""The group of tensors that a rule asks for: whether it is there, how its members are stored, what they decode to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.values import Cast
from mapdsl.runtime.complement import RAW, Alternatives, Complement, Entries, Raw
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.fitting import Pattern, fitted, fitted_together
from mapdsl.runtime.partial import Partial
from mapdsl.runtime.sizes import Size, Sized, counted
from mapdsl.runtime.stored_forms import MAX_KNOWN, Found, StoredForms

# A state with fewer tensors than this asks for no more groups that are not there: the config is out of its mind.
MAX_ABSENT = 10_000_000

_META = torch.device("meta")


class Member(NamedTuple):
    """What is known of the tensors of one operand of the group at hand.

    `first` is the first name of the operand, `into` how the other side stores it, `moved` the codec that it is moved
    in, undecoded.
    """

    first: str
    stored: Alternatives
    shape: Pattern | None
    sizes: Mapping[str, int]
    into: Alternatives
    moved: Codec | None = None


def has_no_elements(shapes: Iterable[tuple[int, ...]], sizes: Mapping[str, int]) -> bool:
    """Whether a group of tensors of some shapes, and of axes of some sizes, has no elements: it may be absent."""
    return any(0 in shape for shape in shapes) or min(sizes.values(), default=1) <= 0


class GroupAtHand(StoredForms):
    """The state of a `Take`, and what concerns one group of it after the other; see there for the arguments."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
        quantization: bool = True,
        entries: Entries | None = None,
        spelled: dict[str, str] | None = None,
        decoded: Mapping[str, torch.dtype] | None = None,
        keep: bool = True,
    ) -> None:
        super().__init__(tensors, spelled)
        self.keep = keep
        self.dtype = dtype
        self.partial = partial
        self.quantization = quantization
        self.entries = entries if entries is not None else Complement().entries
        self.decoded = decoded if decoded is not None else {}
        self._taken: set[str] = set()
        self._members: dict[str, Member] = {}
        self._firsts: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._mixed = False
        self._plain_dtype: torch.dtype | None = None
        self._absent = 0
        # Of tensors without data, by their forms and the dtype to decode to: the shape, and what a codec keeps.
        self._decodings: dict[tuple[Found | None, torch.dtype], tuple[tuple[int, ...], Kept | None]] = {}
        self._last: str | None = None
        # The name of the first of several copies, by its place in the tensor that all of them go to.
        self._first_copies: dict[tuple[object, ...], str] = {}

    def _gather(
        self,
        operands: list[tuple[list[str], Pattern | None, Alternatives]],
        optional: bool,
        into: Alternatives,
        sizes: Mapping[str, Size],
    ) -> bool:
        """Note the members of a group, and see whether it is there.

        A group may be absent whole where that is said, and where its tensors have no elements: no expert, no name.
        """
        self._members = {}
        known = counted(sizes)
        for names, shape, stored in operands:
            if names:
                self._members |= dict.fromkeys(names, Member(names[0], stored, shape, known, into))
        self._begin()
        self._shapes = {}
        self._last = None
        self._firsts = [names[0] for names, _, _ in operands if names]
        members = self._members
        absent = [name for name in members if name not in self]
        missing = [name for name in absent if not self._elsewhere(name, members[name].stored)]
        if not missing:
            self._look_for_plain()
            self._move_undecoded(into)
            return bool(members)
        shapes = [shape for _, shape, _ in operands if isinstance(shape, tuple)]
        if len(missing) < len(members) or not (optional or self.partial or has_no_elements(shapes, known)):
            self._refuse_incomplete(missing, len(members))
        self._count_absent()
        return False

    def _count_absent(self) -> None:
        self._absent += 1
        if self._absent > MAX_ABSENT:
            message = (
                f"more than {MAX_ABSENT:,} groups of tensors are not there: the config cannot be that of the state"
            )
            raise ConversionError("C505", message)

    def _refuse_incomplete(self, missing: list[str], count: int) -> None:
        for name in missing:
            if name in self._taken:
                raise ConversionError("R604", f"{name} is asked for twice")
        whole = f"{len(missing)} of {count} tensors of a group are missing: {some_of(missing)}"
        raise ConversionError("R605", f"{missing[0]} is missing" if count == 1 else whole)

    def _look_for_plain(self) -> None:
        """In a group of which some are stored as they are, what is decoded takes their dtype: all are to be joined."""
        plain = [name for name, member in self._members.items() if not self._is_coded(name, member.stored)]
        self._mixed = 0 < len(plain) < len(self._members)
        self._plain_dtype = None
        if self._mixed:
            self._alternative(plain[0], self._members[plain[0]].stored)  # it may lack a companion
            self._plain_dtype = self._peek(plain[0]).dtype

    def _move_undecoded(self, into: Alternatives) -> None:
        """Members of one codec, which the other side has too, are moved in their stored form.

        The other side stores the group as one, so members of several formats are decoded, for it to store as they are.
        """
        if all(codec is RAW or isinstance(codec, Cast) for codec in into) or (not self.quantization and RAW in into):
            return
        found = {name: self._alternative(name, member.stored) for name, member in self._members.items()}
        formats = dict.fromkeys(found.values())
        self._mixed = len(formats) > 1
        shared = [codec for codec in formats if isinstance(codec, Codec) and codec in into]
        if self._mixed and shared and RAW not in into:
            one, other = (next(name for name, codec in found.items() if codec is wanted) for wanted in [*formats][:2])
            message = (
                f"{one} is stored as {found[one].name}, {other} of the same group as {found[other].name}; the other "
                f"side stores them as one, as {' or '.join(codec.name for codec in into)}: "
                "with `raw` among its formats in the map it could take them decoded"
            )
            raise ConversionError("R606", message)
        if shared and not self._mixed:
            moved = {id(member): member._replace(moved=shared[0]) for member in self._members.values()}
            self._members = {name: moved[id(member)] for name, member in self._members.items()}

    def _decoded_dtype(self, name: str, codec: Codec) -> torch.dtype:
        """The dtype to decode to: that of what it is joined with, or the one that the other side states or had."""
        if isinstance(codec, Partial):
            return self._peek(codec.payload(name)).dtype
        if self._plain_dtype is not None:
            return self._plain_dtype
        into = self._members[name].into
        if RAW not in into or self.quantization:
            target = next((other for other in into if other.name == codec.name), into[0] if into else None)
            if isinstance(target, Cast):
                return target.dtype
        return self.decoded.get(name, self.dtype)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, once decoded, without taking it."""
        if name in self._shapes:
            return self._shapes[name]
        codec = self._alternative(name, self._members[name].stored)
        if isinstance(codec, Raw):
            return tuple(self._peek(name).shape)
        return codec.logical_shape(tuple(self._peek(codec.payload(name)).shape))

    def _joint_sizes(self) -> dict[str, int]:
        """The sizes of all axes of the group, which may take several of its tensors to tell."""
        tensors = [Sized(name, str(self._members[name].shape), self._shape(name)) for name in self._firsts]
        return fitted_together(tensors, self._members[self._firsts[0]].sizes)

    def _outline(self, name: str, codec: Codec) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        """Shape, dtype and device of a tensor, once decoded, without taking it."""
        dtype = self._decoded_dtype(name, codec)
        if (known := self._decodings.get((self._found.get(name), dtype))) is not None:
            return known[0], dtype, _META
        return self._shape(name), dtype, self._peek(codec.payload(name)).device

    def _decoded(self, name: str, codec: Codec, out: Tensor | None) -> Tensor:
        """Take a tensor and decode it; what decoding loses goes to the entries.

        Of tensors without data, all of the same forms are decoded to the same: that is looked up.
        """
        dtype = self._decoded_dtype(name, codec)
        found = self._found.get(name) if out is None or out.dtype == dtype else None
        known = self._decodings.get((found, dtype)) if found is not None else None
        if known is not None and found is not None:
            shape, kept = known
            for part, form in zip(self._named[name], found[1], strict=True):
                if form is not None:
                    self._pass_over(part)
            tensor = codec.output(name, shape, dtype, _META, out)
        else:
            parts = {part: self._take(part) for part in codec.names(name)}
            tensor = codec.decode(name, parts, dtype, out=out)
            kept = codec.keep(name, parts, dtype) if self.keep else None
            if found is not None and len(self._decodings) < MAX_KNOWN:
                self._decodings[found, dtype] = tuple(tensor.shape), kept
        self.entries[name] = (codec.name, kept)
        return tensor

    def _check_shape(self, name: str, member: Member, shape: tuple[int, ...]) -> None:
        """Hold the shape of a tensor that was taken against its operand's pattern, and against the first one's."""
        expected = self._shapes.get(member.first)
        self._shapes[name] = shape
        if shape == expected:  # and the first one fits
            return
        if member.shape is not None:
            self._fit(name, member, shape)
        if expected is not None:
            found = f"expected {list(expected)} as in the rest of its group, found {list(shape)}"
            raise ConversionError("R606", f"{name}: {found}")

    def _fit(self, name: str, member: Member, shape: tuple[int, ...]) -> None:
        """Hold a tensor's shape against its pattern."""
        try:
            fitted(name, member.shape or (), shape, member.sizes)
        except ConversionError as problem:
            if problem.code != "X304" or len(self._firsts) == 1:
                raise
            fitted(name, member.shape or (), shape, self._joint_sizes())

    def _take(self, name: str) -> Tensor:
        if name not in self:
            kind = "R604" if name in self._taken else "R605"
            raise ConversionError(kind, f"{name} is {'asked for twice' if kind == 'R604' else 'missing'}")
        tensor = self._peek(name)
        del self._fetched[name]
        self._taken.add(name)
        return tensor

    def _pass_over(self, name: str) -> None:
        """Take a tensor of which nothing is to be seen."""
        self._touch(name)
        if name in self._left:
            del self._left[name]
        elif name in self._fetched:
            del self._fetched[name]
        else:
            self._take(name)  # refuses it
        self._taken.add(name)
