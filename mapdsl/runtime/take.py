"""Taking tensors out of a state: each once, decoded, checked, and nothing left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.formats import FLOAT_DTYPES
from mapdsl.runtime.complement import RAW, Alternatives, Complement, Entries, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.fitting import compare, fitted, place, reshaped, same_bytes
from mapdsl.runtime.sizes import parse_pattern
from mapdsl.runtime.state_names import StateNames
from mapdsl.runtime.undecoded import Undecoded

AS_IS: Alternatives = (RAW,)
NOT_AT_ALL: Alternatives = ()

# The names of one operand of a rule, the pattern of their shape, and how they are stored (as they are, if not said).
Names = str | Iterable[str]
Operand = tuple[Names, str] | tuple[Names, str, Alternatives]

# A state with fewer tensors than this asks for no more groups that are not there: the config is out of its mind.
MAX_ABSENT = 10_000_000


class Member(NamedTuple):
    """What is known of a tensor of the group at hand.

    `first` is the first name of its operand, `moved` the codec that it is moved in, undecoded.
    """

    first: str
    stored: Alternatives
    shape: str | None
    sizes: Mapping[str, int]
    moved: Codec | None


class Take(StateNames):
    """The tensors of one side, handed out once each.

    `tensors` may be lazy: each of its values is asked for once. A tensor that is stored in one of several formats comes
    decoded, in `dtype`; what decoding loses goes to `entries`, legacy spellings to `spelled`. With `partial`, groups
    that are absent as a whole are left out; a part of a group is an error always. Without `quantization` a tensor that
    may be stored as it is on the other side is decoded even where both sides share its codec.
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
    ) -> None:
        super().__init__(tensors, spelled)
        self.tensors = tensors
        self.dtype = dtype
        self.partial = partial
        self.quantization = quantization
        self.entries = entries if entries is not None else Complement().entries
        self._taken: set[str] = set()
        self._members: dict[str, Member] = {}
        self._firsts: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._absent = 0
        self._last: str | None = None
        self._device: torch.device | None = None

    # --- single tensors ---

    def __call__(
        self,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        shape: str | None = None,
        optional: bool = False,
        into: Alternatives = NOT_AT_ALL,
        **sizes: int,
    ) -> Tensor | None:
        """The tensor of a name, decoded; None where it may be absent and is.

        `shape` is a pattern such as `V d` that the tensor must fit, under the `sizes` known. `into` says how the other
        side stores it: in a codec that both sides share it is moved undecoded.
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
        patterns = [self._members[name].shape or "" for name in self._firsts]
        shapes = [size for name in self._firsts for size in self._shape(name)]
        known = self._members[self._firsts[0]].sizes
        for name in self._firsts:
            if len(self._firsts) > 1:
                self._check_dimensions(name)
        found = fitted(" + ".join(self._firsts), " ".join(patterns), shapes, known)
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
        return torch.empty(shape, dtype=model.dtype if isinstance(codec, Raw) else self.dtype, device=model.device)

    def part(self, name: str) -> Tensor:
        """A tensor of the group at hand, decoded and checked against the shape of its operand."""
        member = self._members[name]
        codec = self._alternative(name, member.stored)
        self._last = codec.name if member.stored is not AS_IS else None
        if member.moved is not None:
            if codec is not member.moved:
                found = f"{name} is stored as {codec.name}, the rest of its group as {member.moved.name}"
                raise ConversionError("R606", found)
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
            tensor = codec.decode(name, parts, self.dtype)
            self.entries[name] = (codec.name, codec.keep(name, parts, self.dtype))
        if member.shape is not None:
            fitted(name, member.shape, tensor.shape, member.sizes)
        self._shapes[name] = tuple(tensor.shape)
        expected = self._shapes.get(member.first)
        if expected is not None and expected != self._shapes[name]:
            found = f"expected {list(expected)} as in the rest of its group, found {list(tensor.shape)}"
            raise ConversionError("R606", f"{name}: {found}")
        return tensor

    def into(self, view: Tensor, name: str, *, copy: bool = False) -> None:
        """Take a tensor of the group at hand and write it to its place in another, `view`.

        `view` may cut the tensor's dimensions finer. A `copy` must equal what is there.
        """
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
        shape: str | None = None,
        optional: bool = False,
        **sizes: int,
    ) -> None:
        """Take a tensor and see that every element is `value` in its dtype; R601 names the first that differs."""
        if not self._gather([([name], shape, stored)], optional, NOT_AT_ALL, sizes):
            return
        tensor = self.part(name)
        wanted = torch.as_tensor(value, device=tensor.device).to(tensor.dtype)
        if wanted.ndim and wanted.shape != tensor.shape:
            raise ConversionError("R606", f"{name}: expected {list(wanted.shape)}, found {list(tensor.shape)}")
        if not tensor.is_meta:
            same_bytes(name, tensor, wanted.expand(tensor.shape), "the value that the map states")

    def tied(self, name: str, other: str, stored: Alternatives = AS_IS, *, optional: bool = False) -> None:
        """Take a tensor that must equal another of this side, not taken yet, byte for byte as stored."""
        if name not in self and (optional or self.partial) and not self._elsewhere(name, stored):
            return
        if not self._gather([([name, other], None, stored)], optional, NOT_AT_ALL, {}):
            return
        codec = self._alternative(name, stored)
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
        """The alternative that the tensor taken last was stored in; None where it has but one way to be stored."""
        return self._last

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors, once one was taken."""
        return self._device

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
        operands: list[tuple[list[str], str | None, Alternatives]],
        optional: bool,
        into: Alternatives,
        sizes: Mapping[str, int],
    ) -> bool:
        """Note the members of a group, and see whether it is there.

        A group may be absent whole where that is said, and where its tensors have no elements: no expert, no name.
        """
        self._members = {
            name: Member(names[0], stored, shape, sizes, None) for names, shape, stored in operands for name in names
        }
        self._shapes = {}
        self._firsts = [names[0] for names, _, _ in operands if names]
        members = self._members
        missing = [name for name, of in members.items() if name not in self and not self._elsewhere(name, of.stored)]
        if not missing:
            self._move_undecoded(into)
            return bool(members)
        if len(missing) < len(members) or not (optional or self.partial or min(sizes.values(), default=1) <= 0):
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

    def _move_undecoded(self, into: Alternatives) -> None:
        """Members whose codec, judged by the first, the other side has too are moved in their stored form."""
        if not into or not self._firsts or (not self.quantization and RAW in into):
            return
        first = self._firsts[0]
        codec = self._alternative(first, self._members[first].stored)
        if isinstance(codec, Codec) and codec in into:
            self._members = {name: member._replace(moved=codec) for name, member in self._members.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, once decoded, without taking it."""
        if name in self._shapes:
            return self._shapes[name]
        codec = self._alternative(name, self._members[name].stored)
        if isinstance(codec, Raw):
            return tuple(self._peek(name).shape)
        return codec.logical_shape(tuple(self._peek(codec.payload(name)).shape))

    def _check_dimensions(self, name: str) -> None:
        """Of several operands each has the dimensions that its own pattern says, before they are solved together."""
        wanted, found = len(parse_pattern(self._members[name].shape or "")), list(self._shape(name))
        if wanted != len(found):
            pattern = self._members[name].shape
            raise ConversionError("R606", f"{name}: expected {wanted} dimensions, [{pattern}], found {found}")

    def _alternative(self, name: str, stored: Alternatives) -> Codec | Raw:
        """The alternative that a stored tensor is in, by the dtype of its payload and the companions beside it."""
        if stored is AS_IS:
            return RAW
        payloads = {c.payload(name) for c in stored if isinstance(c, Codec)} | ({name} if RAW in stored else set())
        there = [payload for payload in payloads if payload in self]
        claimed = None
        for codec in stored:
            if isinstance(codec, Codec) and codec.payload(name) in there:
                dtype = self._peek(codec.payload(name)).dtype
                if codec.recognises(name, dtype, self.__contains__):
                    return codec
                # A float of 16 bits or more stands by itself; a narrow one means nothing without its scales.
                if codec.claims(name, dtype) and not (RAW in stored and dtype in FLOAT_DTYPES):
                    claimed = claimed or codec
        if claimed is not None:
            lacking = next(part for part in claimed.companions(name).values() if part not in self)
            raise ConversionError("R605", f"{name} is stored as {claimed.name}, but its companion {lacking} is missing")
        if RAW in stored and name in self:
            return RAW
        names = "|".join(codec.name for codec in stored)
        dtype_text = f" of {self._peek(there[0]).dtype}" if there else ""
        raise ConversionError("C504", f"{name}{dtype_text} is stored as none of {names}")

    def _elsewhere(self, name: str, stored: Alternatives) -> bool:
        """Whether a codec keeps the payload under another name, and that is there."""
        return any(isinstance(c, Codec) and c.payload(name) != name and c.payload(name) in self for c in stored)

    def _peek(self, name: str) -> Tensor:
        if name not in self._fetched:
            self._left.pop(name, None)
            tensor = self.tensors[self._spelled.get(name, name)]
            self._fetched[name] = tensor
            self._device = tensor.device
        return self._fetched[name]

    def _take(self, name: str) -> Tensor:
        if name not in self:
            kind = "R604" if name in self._taken else "R605"
            raise ConversionError(kind, f"{name} is {'asked for twice' if kind == 'R604' else 'missing'}")
        tensor = self._peek(name)
        del self._fetched[name]
        self._taken.add(name)
        return tensor
