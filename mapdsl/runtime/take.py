"""Taking tensors out of a state: each once, decoded, checked, and nothing left over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Alternatives, Complement, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.names import captures, filled
from mapdsl.runtime.sizes import SizeError, axis_sizes

AS_IS: Alternatives = (RAW,)


class Take:
    """The tensors of one side, handed out once each.

    `tensors` may be lazy: each of its values is asked for once. A tensor that is stored in one of several formats comes
    decoded, in `dtype`; what decoding loses goes to `complement`. With `partial`, groups that are absent as a whole are
    left out; a part of a group is an error always.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
        complement: Complement | None = None,
    ) -> None:
        self.tensors = tensors
        self.dtype = dtype
        self.partial = partial
        self.complement = complement if complement is not None else Complement()
        self._left = dict.fromkeys(tensors)
        self._spelled: dict[str, str] = {}
        self._fetched: dict[str, Tensor] = {}
        self._taken: set[str] = set()
        self._shut: set[str] = set()
        self._group: tuple[str, Alternatives] = ("", AS_IS)

    def __contains__(self, name: str) -> bool:
        return name in self._left or name in self._fetched

    def __call__(
        self,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        shape: str | None = None,
        optional: bool = False,
        **sizes: int,
    ) -> Tensor | None:
        """The tensor of a name, decoded; None where it may be absent and is.

        `shape` is a pattern such as `V d` that the tensor must fit, under the `sizes` known.
        """
        if not self.group((name,), stored, optional=optional):
            return None
        codec = self._alternative(name, stored)
        if isinstance(codec, Raw):
            tensor = self._take(name)
            if stored is not AS_IS:
                self.complement.entries[name] = (codec.name, None)
        else:
            parts = {part: self._take(part) for part in codec.names(name)}
            tensor = codec.decode(name, parts, self.dtype)
            self.complement.entries[name] = (codec.name, codec.keep(name, parts, self.dtype))
        if shape is not None:
            fitted(name, shape, tensor.shape, sizes)
        return tensor

    def group(
        self,
        names: Iterable[str],
        stored: Alternatives = AS_IS,
        *,
        shape: str | None = None,
        optional: bool = False,
        **sizes: int,
    ) -> bool:
        """Whether the tensors of one match are there: all, or an error; none is fine where they may be absent.

        `shape` and `sizes` say what each of them looks like, for those who list names only.
        """
        del shape, sizes
        wanted = list(names)
        self._group = (wanted[0] if wanted else "", stored)
        if not wanted:
            return False
        missing = [name for name in wanted if name not in self and not self._elsewhere(name, stored)]
        if not missing:
            return True
        if len(missing) == len(wanted) and (optional or self.partial):
            return False
        for name in missing:
            if name in self._taken:
                raise ConversionError("R604", f"{name} is asked for twice")
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        if len(wanted) == 1:
            raise ConversionError("R605", f"{shown} is missing")
        raise ConversionError("R605", f"{len(missing)} of {len(wanted)} tensors of a group are missing: {shown}")

    def into(
        self,
        view: Tensor,
        name: str,
        stored: Alternatives = AS_IS,
        *,
        copy: bool = False,
        shape: str | None = None,
        **sizes: int,
    ) -> None:
        """Take a tensor and write it to its place in another, `view`.

        Where `view` cuts the dimensions finer, `shape` states the tensor's own. A `copy` must equal what is there.
        """
        tensor = self(name, stored, shape=shape, **sizes)
        if tensor is None:
            return
        if shape is not None:
            tensor = tensor.reshape(view.shape)
        if copy:
            compare(view, tensor, name)
        else:
            place(view, tensor, name)

    def sizes(self, name: str, pattern: str, **known: int) -> tuple[int, ...]:
        """Sizes of the unknown axes of a pattern, in order of their first mention.

        They are read off a tensor of the group just found.
        """
        codec = self._alternative(name, self._group[1])
        shape = tuple(self._peek(name if isinstance(codec, Raw) else codec.payload(name)).shape)
        if isinstance(codec, Codec):
            shape = codec.logical_shape(shape)
        found = fitted(name, pattern, shape, known)
        return tuple(size for axis, size in found.items() if axis not in known)

    def empty(self, *shape: int) -> Tensor:
        """A new tensor to fill, of the dtype and on the device of the group just found, once decoded."""
        name, stored = self._group
        codec = self._alternative(name, stored)
        model = self._peek(name if isinstance(codec, Raw) else codec.payload(name))
        return torch.empty(shape, dtype=model.dtype if isinstance(codec, Raw) else self.dtype, device=model.device)

    # --- tensors of one side only ---

    def drop(self, name: str, stored: Alternatives = AS_IS) -> None:
        """Take a tensor, with its companions, that the other side does not have; it may be absent."""
        for part in (name, *(c for codec in stored if isinstance(codec, Codec) for c in codec.names(name))):
            if part in self:
                self._left.pop(part, None)
                self._fetched.pop(part, None)
                self._taken.add(part)

    def equal(self, name: str, value: float | Tensor, stored: Alternatives = AS_IS, **shape: int) -> None:
        """Take a tensor and see that every element is `value` in its dtype; R601 names the first that differs."""
        tensor = self(name, stored)
        if tensor is not None and not tensor.is_meta:
            wanted = torch.as_tensor(value, device=tensor.device).to(tensor.dtype)
            if wanted.ndim and wanted.shape != tensor.shape:
                raise ConversionError("R606", f"{name}: expected {list(wanted.shape)}, found {list(tensor.shape)}")
            same_bytes(name, tensor, wanted.expand(tensor.shape), "the value that the map states")

    def tied(self, name: str, other: str) -> None:
        """Take a tensor that must equal another of this side, not taken yet, byte for byte."""
        if not self.group((name, other)):
            return
        tensor, twin = self._take(name), self._peek(other)
        if tensor.is_meta:
            return
        if twin.shape != tensor.shape or twin.dtype != tensor.dtype:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise ConversionError("R601", f"{name} is {found}, its tied {other} {list(twin.shape)} {twin.dtype}")
        same_bytes(name, tensor, twin, other)

    # --- names ---

    def accept(self, old: str, new: str, stored: Alternatives = AS_IS) -> None:
        """Read a legacy spelling under its new name; `**` stands for the rest of a name."""
        if "*" in old:
            for name in list(self._left):
                if (texts := captures(old, name)) is not None:
                    self._respell(name, filled(new, texts))
            return
        olds, news = [old], [new]
        for codec in stored:
            if isinstance(codec, Codec):
                olds += codec.names(old)
                news += codec.names(new)
        for one, other in dict(zip(olds, news, strict=True)).items():
            if one in self._left:
                self._respell(one, other)

    def _respell(self, name: str, new: str) -> None:
        if new in self._left:
            raise ConversionError("C506", f"{name} is the legacy spelling of {new}, and both are there")
        del self._left[name]
        self._left[new] = None
        self._spelled[new] = name
        self.complement.spelled[new] = name

    def holds(self, pattern: str) -> bool:
        """Whether a name of this pattern is there (`#` a number, `*` a segment, `**` several)."""
        return any(captures(pattern, name) is not None for name in self._left)

    def wild(self, pattern: str) -> Iterator[tuple[str, ...]]:
        """What the wildcards of a pattern stand for, for every name not taken yet that fits it."""
        for name in list(self._left):
            if name not in self._shut and (texts := captures(pattern, name)) is not None:
                yield texts

    def shut(self, *names: str) -> None:
        """Names that a rule names but whose guard does not hold: no wildcard carries them."""
        self._shut.update(names)

    def finish(self) -> None:
        """Refuse what no rule has taken."""
        left = [*self._left, *(name for name in self._fetched if name not in self._left)]
        if left:
            shown = ", ".join(self._spelled.get(name, name) for name in islice(left, 5))
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise ConversionError("R603", f"no rule reads {shown}{more}")

    # --- within ---

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
                if codec.claims(name, dtype):
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
            self._fetched[name] = self.tensors[self._spelled.get(name, name)]
        return self._fetched[name]

    def _take(self, name: str) -> Tensor:
        if name not in self:
            kind = "R604" if name in self._taken else "R605"
            raise ConversionError(kind, f"{name} is {'asked for twice' if kind == 'R604' else 'missing'}")
        tensor = self._peek(name)
        del self._fetched[name]
        self._taken.add(name)
        return tensor


class NameList(Take):
    """Takes nothing: writes down what would be taken. Running a conversion over it lists the names of its side."""

    def __init__(self) -> None:
        super().__init__({}, partial=True)
        self.names: list[tuple[str, Alternatives, str | None, dict[str, int]]] = []

    def __call__(
        self, name: str, stored: Alternatives = AS_IS, *, shape: str | None = None, optional: bool = False, **sizes: int
    ) -> None:
        """Note one name."""
        if not optional:
            self.names.append((name, stored, shape, sizes))

    def group(
        self,
        names: Iterable[str],
        stored: Alternatives = AS_IS,
        *,
        shape: str | None = None,
        optional: bool = False,
        **sizes: int,
    ) -> bool:
        """Note the names of a group."""
        if not optional:
            self.names += [(name, stored, shape, sizes) for name in names]
        return False

    def drop(self, name: str, stored: Alternatives = AS_IS) -> None:
        """A dropped tensor is no part of the layout."""


def fitted(name: str, pattern: str, shape: Iterable[int], known: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all axes of a pattern against a tensor's shape; an error names the tensor."""
    try:
        return axis_sizes(pattern, tuple(shape), known)
    except SizeError as err:
        raise ConversionError(err.code, f"{name}: {err}") from None


def place(view: Tensor, tensor: Tensor, name: str) -> None:
    """Copy a tensor to its place in another, where shape and dtype must agree."""
    if view.shape != tensor.shape:
        expected, found = list(view.shape), list(tensor.shape)
        raise ConversionError("R606", f"{name}: expected {expected} as in the rest of its group, found {found}")
    if view.dtype != tensor.dtype:
        raise ConversionError("R606", f"{name}: expected {view.dtype} as in the rest of its group, found {tensor.dtype}")
    view.copy_(tensor)


def compare(view: Tensor, tensor: Tensor, name: str) -> None:
    """R602 unless a copy equals the first one, byte for byte."""
    if view.shape != tensor.shape or view.dtype != tensor.dtype:
        expected, found = f"{list(view.shape)} {view.dtype}", f"{list(tensor.shape)} {tensor.dtype}"
        raise ConversionError("R602", f"{name}: expected {expected} as in its other copies, found {found}")
    if not view.is_meta:
        same_bytes(name, tensor, view, "the first of its copies", "R602")


def same_bytes(name: str, tensor: Tensor, wanted: Tensor, what: str, code: str = "R601") -> None:
    """R601 (or R602) at the first element whose bytes differ."""
    if tensor.numel() == 0:
        return
    one = tensor.contiguous().reshape(-1).view(torch.uint8)
    other = wanted.contiguous().reshape(-1).view(torch.uint8)
    if not torch.equal(one, other):
        flat = int((one != other).nonzero()[0]) // tensor.element_size()
        place_ = [int(n) for n in torch.unravel_index(torch.tensor(flat), tensor.shape)]
        found, expected = tensor.reshape(-1)[flat].item(), wanted.reshape(-1)[flat].item()
        raise ConversionError(code, f"{name} differs from {what} at {place_}: expected {expected}, found {found}")
