"""Taking tensors out of a state: each once, decoded, checked, and nothing left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.values import Cast
from mapdsl.runtime.complement import RAW, Alternatives, Complement, Entries, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.fitting import Pattern, compare, fitted, fitted_together, place, reshaped, same_bytes, window
from mapdsl.runtime.sizes import Sized
from mapdsl.runtime.stored_forms import AS_IS, NOT_AT_ALL, StoredForms
from mapdsl.runtime.undecoded import Undecoded

# The names of one operand of a rule, the pattern of their shape, and how they are stored (as they are, if not said).
Names = str | Iterable[str]
Operand = tuple[Names, str] | tuple[Names, str, Alternatives]

# A state with fewer tensors than this asks for no more groups that are not there: the config is out of its mind.
MAX_ABSENT = 10_000_000


class Member(NamedTuple):
    """What is known of a tensor of the group at hand.

    `first` is the first name of its operand, `into` how the other side stores it, `moved` the codec that it is moved
    in, undecoded.
    """

    first: str
    stored: Alternatives
    shape: Pattern | None
    sizes: Mapping[str, int]
    into: Alternatives
    moved: Codec | None = None


class Take(StoredForms):
    """The tensors of one side, handed out once each.

    `tensors` may be lazy: each of its values is asked for once. A tensor that is stored in one of several formats comes
    decoded, in `dtype`; what decoding loses goes to `entries`, legacy spellings to `spelled`. With `partial`, groups
    that are absent as a whole are left out; a part of a group is an error always. Without `quantization` a tensor that
    may be stored as it is on the other side is decoded even where both sides share its codec. `decoded` are, by name,
    dtypes to decode to in the place of `dtype`.
    """

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
    ) -> None:
        super().__init__(tensors, spelled)
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
        self._last: str | None = None

    # --- single tensors ---

    def __call__(
        self,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        into: Alternatives = NOT_AT_ALL,
        **sizes: int,
    ) -> Tensor | None:
        """The tensor of a name, decoded; None where it may be absent and is.

        `shape` is the one that the tensor must have, or a pattern such as `V d` that it must fit, under the `sizes`
        known. `into` says how the other
        side stores it: in a format of blocks that both sides share it is moved undecoded, and a dtype that the map
        states there is decoded to.
        """
        if not self._gather([([name], shape, stored)], optional, into, sizes):
            return None
        return self.part(name)

    # --- groups ---

    def group(self, *operands: Operand, optional: bool = False, into: Alternatives = NOT_AT_ALL, **sizes: int) -> bool:
        """Whether the tensors of one match are there: all, or an error; none is fine where they may be absent.

        An operand is `(names, shape)` or `(names, shape, stored)`; `sizes` are those of axes known beforehand.
        """
        whole = []
        for names, shape, *rest in operands:
            listed = [names] if isinstance(names, str) else list(names)
            whole.append((listed, shape, rest[0] if rest else AS_IS))
        return self._gather(whole, optional, into, sizes)  # type: ignore[arg-type]

    def sizes(self, *axes: str) -> tuple[int, ...]:
        """Sizes of axes that are not known beforehand, read off the first tensor of each operand of the group."""
        found = self._joint_sizes()
        return tuple(found[axis] for axis in axes)

    def size(self, axis: str) -> int:
        """The size of one axis; see `sizes`."""
        return self.sizes(axis)[0]

    def empty(self, *shape: int) -> Tensor:
        """A new tensor to fill with the group: of the dtype, once decoded, and on the device of its first tensor."""
        name = self._firsts[0]
        member = self._members[name]
        if member.moved is not None:
            parts = tuple(self._peek(part) for part in member.moved.names(name))
            return cast(Tensor, Undecoded(member.moved, parts).new_empty(*shape))
        codec = self._alternative(name, member.stored)
        model = self._peek(name if isinstance(codec, Raw) else codec.payload(name))
        dtype = model.dtype if isinstance(codec, Raw) else self._decoded_dtype(name, codec)
        return self._allocate(shape, dtype, model.device)

    def part(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor of the group at hand, decoded (to `out`, if given) and checked against the shape of its operand."""
        member = self._members[name]
        codec = self._alternative(name, member.stored)
        if member.stored is not AS_IS:
            self._mixed |= self._last not in (None, codec.name)
            self._last = RAW.name if self._mixed else codec.name
        if member.moved is not None:
            assert codec is member.moved  # `_move_undecoded` has looked at all
            parts = {part: self._take(part) for part in codec.names(name)}
            # Without data, decoding is just the check that payload and companions belong together.
            codec.decode(name, {part: stored.to("meta") for part, stored in parts.items()}, self.dtype)
            tensor = cast(Tensor, Undecoded(codec, tuple(parts.values())))
            self.entries[name] = (codec.name, None)
        elif isinstance(codec, Raw):
            tensor = self._take(name)
            if member.stored is not AS_IS:
                self.entries[name] = (codec.name, None)
        else:
            parts = {part: self._take(part) for part in codec.names(name)}
            dtype = self._decoded_dtype(name, codec)
            tensor = codec.decode(name, parts, dtype, out=out)
            self.entries[name] = (codec.name, codec.keep(name, parts, dtype))
        self._shapes[name] = tuple(tensor.shape)
        if member.shape is not None:
            self._fit(name, member, self._shapes[name])
        expected = self._shapes.get(member.first)
        if expected is not None and expected != self._shapes[name]:
            found = f"expected {list(expected)} as in the rest of its group, found {list(tensor.shape)}"
            raise ConversionError("R606", f"{name}: {found}")
        return tensor

    def into(self, view: Tensor, name: str, *, copy: bool = False) -> None:
        """Take a tensor of the group at hand and write it to its place in another, `view`.

        `view` may cut the tensor's dimensions finer. A `copy` must equal what is there.
        """
        codec = self._alternative(name, self._members[name].stored)
        if not (copy or isinstance(codec, Raw) or self._members[name].moved):
            payload = self._peek(codec.payload(name))
            out = window(view, self._shape(name), self._decoded_dtype(name, codec), payload.device)
            if out is not None:
                self.part(name, out)
                return
        tensor = self.part(name)
        if tensor.shape != view.shape and self._members[name].shape is not None:
            tensor = reshaped(name, tensor, view)
        (compare if copy else place)(view, tensor, name)

    # --- tensors of one side only ---

    def drop(self, name: str, stored: Alternatives = AS_IS) -> None:
        """Take a tensor, with its companions, that the other side does not have; it may be absent."""
        for part in (name, *(c for codec in stored if isinstance(codec, Codec) for c in codec.names(name))):
            if part in self:
                self._left.pop(part, None)
                self._fetched.pop(part, None)
                self._taken.add(part)

    def equal(
        self,
        name: str,
        value: float | Tensor,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        **sizes: int,
    ) -> None:
        """Take a tensor and see that every element is `value` in its dtype; R601 names the first that differs."""
        if not self._gather([([name], shape, stored)], optional, NOT_AT_ALL, sizes):
            return
        tensor = self.part(name)
        if stored is AS_IS:
            self.entries[name] = (str(tensor.dtype).removeprefix("torch."), None)
        if isinstance(value, Tensor):
            wanted = value.to(tensor.device, tensor.dtype)
        else:
            wanted = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
        if wanted.ndim and wanted.shape != tensor.shape:
            raise ConversionError("R606", f"{name}: expected {list(wanted.shape)}, found {list(tensor.shape)}")
        if not tensor.is_meta:
            same_bytes(name, tensor, wanted.expand(tensor.shape), "the value that the map states")

    def tied(
        self,
        name: str,
        other: str,
        stored: Alternatives = AS_IS,
        *,
        shape: Pattern | None = None,
        optional: bool = False,
        **sizes: int,
    ) -> None:
        """Take a tensor that must equal another of this side, not taken yet, byte for byte as stored.

        In a partial state the other may be absent, and nothing is compared then.
        """
        if not self._gather([([name], shape, stored)], optional, NOT_AT_ALL, sizes):
            return
        codec = self._alternative(name, stored)
        if shape is not None:
            fitted(name, shape, self._shape(name), sizes)
        if other not in self and not self._elsewhere(other, stored):
            if not self.partial:
                raise ConversionError("R605", f"{other} is missing: {name} is tied to it")
            for part in [name] if isinstance(codec, Raw) else codec.names(name):
                self._take(part)
            return
        if isinstance(codec, Raw):
            pairs = [(name, other)]
        else:
            pairs = list(zip(codec.names(name), codec.names(other), strict=True))
        for one, twin_name in pairs:
            if twin_name not in self:
                raise ConversionError("R601", f"{one} is stored as {codec.name}, its tied {other} is not")
            tensor, twin = self._take(one), self._peek(twin_name)
            if twin.shape != tensor.shape or twin.dtype != tensor.dtype:
                found = f"{list(tensor.shape)} {tensor.dtype}"
                raise ConversionError("R601", f"{one} is {found}, its tied {twin_name} {list(twin.shape)} {twin.dtype}")
            if not tensor.is_meta:
                same_bytes(one, tensor, twin, twin_name)
        if stored is not AS_IS:
            self.entries[name] = (codec.name, None)

    @property
    def last(self) -> str | None:
        """The alternative that the group taken last was stored in, `raw` where its tensors were in several.

        None where they have but one way to be stored.
        """
        return self._last

    def finish(self) -> None:
        """Refuse what no rule has taken."""
        left = [*self._left, *(name for name in self._fetched if name not in self._left)]
        if left:
            shown = ", ".join(self._spelled.get(name, name) for name in islice(left, 5))
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise ConversionError("R603", f"no rule reads {shown}{more}")

    # --- within ---

    def _gather(
        self,
        operands: list[tuple[list[str], Pattern | None, Alternatives]],
        optional: bool,
        into: Alternatives,
        sizes: Mapping[str, int],
    ) -> bool:
        """Note the members of a group, and see whether it is there.

        A group may be absent whole where that is said, and where its tensors have no elements: no expert, no name.
        """
        self._members = {
            name: Member(names[0], stored, shape, sizes, into) for names, shape, stored in operands for name in names
        }
        self._begin()
        self._shapes = {}
        self._last = None
        self._firsts = [names[0] for names, _, _ in operands if names]
        members = self._members
        missing = [name for name, of in members.items() if name not in self and not self._elsewhere(name, of.stored)]
        if not missing:
            self._look_for_plain()
            self._move_undecoded(into)
            return bool(members)
        shapes = [shape for _, shape, _ in operands if isinstance(shape, tuple)]
        is_empty = any(0 in shape for shape in shapes) or min(sizes.values(), default=1) <= 0
        if len(missing) < len(members) or not (optional or self.partial or is_empty):
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
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        whole = f"{len(missing)} of {count} tensors of a group are missing: {shown}"
        raise ConversionError("R605", f"{shown} is missing" if count == 1 else whole)

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
            self._members = {name: member._replace(moved=shared[0]) for name, member in self._members.items()}

    def _decoded_dtype(self, name: str, codec: Codec) -> torch.dtype:
        """The dtype to decode to: that of what it is joined with, or the one that the other side states or had."""
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
