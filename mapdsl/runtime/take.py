"""Taking tensors out of a state: each once, decoded, checked, and nothing left over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Alternatives, Raw
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.fitting import Pattern, compare, fitted, place, reshaped, same_bytes, window
from mapdsl.runtime.group import GroupAtHand
from mapdsl.runtime.sizes import Size, counted
from mapdsl.runtime.stored_forms import AS_IS, NOT_AT_ALL
from mapdsl.runtime.undecoded import Undecoded

# The names of one operand of a rule, the pattern of their shape, and how they are stored (as they are, if not said).
Names = str | Iterable[str]
Operand = tuple[Names, str] | tuple[Names, str, Alternatives]


class Take(GroupAtHand):
    """The tensors of one side, handed out once each.

    `tensors` may be lazy: each of its values is asked for once. A tensor that is stored in one of several formats comes
    decoded, in `dtype`; what decoding loses goes to `entries`, legacy spellings to `spelled`. With `partial`, groups
    that are absent as a whole are left out; a part of a group is an error always. Without `quantization` a tensor that
    may be stored as it is on the other side is decoded even where both sides share its codec. `decoded` are, by name,
    dtypes to decode to in the place of `dtype`. Without `keep` nothing is remembered of a tensor but its format.
    """

    # --- single tensors ---

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

    def group(self, *operands: Operand, optional: bool = False, into: Alternatives = NOT_AT_ALL, **sizes: Size) -> bool:
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

    def zeros(self, *shape: int) -> Tensor:
        """A new tensor like `empty`, of zeros, where what is padded stays so."""
        return self.empty(*shape).zero_()

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
            tensor = self._decoded(name, codec, out)
        self._check_shape(name, member, tuple(tensor.shape))
        return tensor

    def into(self, view: Tensor, name: str, *, copy: bool | None = None) -> None:
        """Take a tensor of the group at hand and write it to its place in another, `view`.

        `view` may cut the tensor's dimensions finer. A `copy` must equal what is there; of several the first is none,
        False, and what has no copies neither.
        """
        codec = self._alternative(name, self._members[name].stored)
        if not (copy or isinstance(codec, Raw) or self._members[name].moved):
            out = window(view, *self._outline(name, codec))
            if out is not None:
                self.part(name, out)
                return
        tensor = self.part(name)
        if tensor.shape != view.shape and self._members[name].shape is not None:
            tensor = reshaped(name, tensor, view)
        if copy is None:
            place(view, tensor, name)
            return
        spot = (view.storage_offset(), tuple(view.shape)) if isinstance(view, Tensor) else ()
        if copy:
            compare(view, tensor, name, self._first_copies.get(spot))
        else:
            place(view, tensor, name)
            self._first_copies[spot] = name

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
        **sizes: Size,
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
        **sizes: Size,
    ) -> None:
        """Take a tensor that must equal another of this side, not taken yet, byte for byte as stored.

        In a partial state the other may be absent, and nothing is compared then.
        """
        if not self._gather([([name], shape, stored)], optional, NOT_AT_ALL, sizes):
            return
        codec = self._alternative(name, stored)
        if shape is not None:
            fitted(name, shape, self._shape(name), counted(sizes))
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
            names = [self._spelled.get(name, name) for name in left]
            raise ConversionError("R603", f"no rule reads {some_of(names)}")
