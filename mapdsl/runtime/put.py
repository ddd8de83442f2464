"""Putting tensors out: encoded as asked, as they were read, or as the map says first."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.strided import contiguous, contiguous_copy
from mapdsl.runtime.complement import RAW, Alternatives, Complement, Entries, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.stored_forms import AS_IS, MAX_KNOWN
from mapdsl.runtime.take import Take
from mapdsl.runtime.undecoded import Undecoded

Sink = Callable[[str, Tensor], None]
_Part = tuple[str, torch.dtype, torch.Size]


class Put:
    """Hands finished tensors to `sink`, each name once.

    `quantization` decides among the alternatives of a stored tensor: True takes what reading found (`entries`), else
    the one that it was taken in from `source`, else the first; False takes `raw` where the map allows it. `edited`
    counts blocks that were encoded anew; `decoded` notes the dtype of what is encoded. `named` gives the names that
    rules without `{..}` speak of; `device` is that of what the map makes, by default the one of the tensors taken.
    """

    def __init__(
        self,
        sink: Sink,
        read_back: Callable[[str], Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        quantization: bool = True,
        entries: Entries | None = None,
        edited: dict[str, int] | None = None,
        decoded: dict[str, torch.dtype] | None = None,
        named: Callable[[], Container[str]] = frozenset,
        source: Take | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.sink = sink
        self.read_back = read_back
        self.dtype = dtype
        self.quantization = quantization
        self.entries = entries if entries is not None else Complement().entries
        self.edited = edited if edited is not None else {}
        self.decoded = decoded if decoded is not None else {}
        self._named = named
        self._source = source
        self._own_device = device
        self._names: set[str] = set()
        # Of tensors without data, by codec, dtype and shape: role, dtype and shape of each part.
        self._encodings: dict[tuple[Codec, torch.dtype, torch.Size] | None, list[_Part]] = {}

    def __call__(self, name: str, tensor: Tensor | None, stored: Alternatives = AS_IS) -> None:
        """Put a tensor under a name; None (an absent tensor) puts nothing."""
        if tensor is None:
            return
        if isinstance(tensor, Undecoded):
            for part, value in zip(tensor.codec.names(name), tensor.parts, strict=True):
                self._out(part, value)
            return
        codec = self.alternative(name, stored)
        if isinstance(codec, Raw):
            self._out(name, tensor)
            return
        self.decoded[name] = tensor.dtype
        entry = self.entries.get(name)
        kept = entry[1] if entry is not None and entry[0] == codec.name else None
        for part, value in self._encoded(name, tensor, codec, kept):
            self._out(part, value)

    def part(self, name: str, view: Tensor, stored: Alternatives = AS_IS) -> None:
        """Put a piece of a larger tensor: it gets memory of its own."""
        if isinstance(view, Undecoded):
            view = view.contiguous_clone()
        elif self.alternative(name, stored) is RAW:
            # Without data there is nothing to copy, and torch takes its time for that.
            is_blank = view.is_meta and not view.requires_grad
            view = torch.empty(view.shape, dtype=view.dtype, device="meta") if is_blank else contiguous_copy(view)
        self(name, view, stored)

    def carried(
        self, name: str, tensor: Tensor | None, stored: Alternatives = AS_IS, *, but: Sequence[Container[str]] = ()
    ) -> None:
        """Put a tensor that a wildcard carries; R603 for a name of another rule, or of a narrower wildcard, `but`."""
        if tensor is not None:
            self.own(name, but=but)
            self(name, tensor, stored)

    def own(self, *names: str, but: Sequence[Container[str]] = ()) -> None:
        """R603 for a name that a wildcard would carry a tensor over to, if it is another rule's."""
        for name in names:
            if name in self._named() or any(name in narrower for narrower in but):
                raise ConversionError("R603", f"a wildcard would carry a tensor over to {name}, a name of another rule")

    def full(self, name: str, shape: tuple[int, ...], value: float, stored: Alternatives = AS_IS) -> None:
        """Put a constant tensor, in the dtype that it was found in; one without elements only if it was found."""
        if 0 in shape and name not in self.entries:
            return
        dtype = self._found_dtype(name, stored) or self.dtype
        self(name, torch.full(shape, value, dtype=dtype, device=self._device), self._unread(name, stored))

    def made(self, name: str, tensor: Tensor, stored: Alternatives = AS_IS) -> None:
        """Put a tensor that the map computes, in the dtype that it was found in."""
        dtype = self._found_dtype(name, stored) or tensor.dtype
        self(name, tensor.to(self._device or tensor.device, dtype), self._unread(name, stored))

    def tie(self, name: str, other: str, stored: Alternatives = AS_IS) -> None:
        """Put a tensor that equals one put before, companions included."""
        pairs = {name: other}
        for codec in stored:
            if isinstance(codec, Codec):
                pairs |= dict(zip(codec.names(name), codec.names(other), strict=True))
        for mine, twin in pairs.items():
            if twin in self._names:
                self._out(mine, self.read_back(twin))

    def alternative(self, name: str, stored: Alternatives) -> Codec | Raw:
        """The format that a tensor is written in."""
        if len(stored) == 1:
            return stored[0]
        if not self.quantization and RAW in stored:
            return RAW
        entry = self.entries.get(name)
        found = entry[0] if entry is not None else self._source.last if self._source is not None else None
        return next((codec for codec in stored if codec.name == found), stored[0])

    def _encoded(self, name: str, tensor: Tensor, codec: Codec, kept: Kept | None) -> Iterator[tuple[str, Tensor]]:
        """The stored parts of a tensor. Without data, all of one shape and dtype have the same: that is looked up."""
        form = (codec, tensor.dtype, tensor.shape) if tensor.is_meta and kept is None else None
        if form in self._encodings:
            names = codec.storage.part_names(name)
            for role, dtype, shape in self._encodings[form]:
                yield names[role], torch.empty(shape, dtype=dtype, device="meta")
            return
        encoded = codec.encode(name, tensor, kept)
        if encoded.edited:
            self.edited[name] = encoded.edited
        elif form is not None and len(self._encodings) < MAX_KNOWN:
            roles = {part: role for role, part in codec.storage.part_names(name).items()}
            self._encodings[form] = [(roles[part], one.dtype, one.shape) for part, one in encoded.parts.items()]
        for part, value in encoded.parts.items():
            yield part, contiguous(value)  # a cast of a transposed view is transposed in memory too

    def _found_dtype(self, name: str, stored: Alternatives) -> torch.dtype | None:
        """The dtype that a constant was found in, if it was and is stored as it is; `Take.equal` notes it."""
        entry = self.entries.get(name) if stored is AS_IS else None
        dtype = getattr(torch, entry[0], None) if entry is not None else None
        return dtype if isinstance(dtype, torch.dtype) else None

    def _unread(self, name: str, stored: Alternatives) -> Alternatives:
        """The alternatives of a tensor that was made, not taken: the first, unless there is a reason for another."""
        wants_raw = not self.quantization and RAW in stored
        return stored if wants_raw or name in self.entries else stored[:1]

    @property
    def _device(self) -> torch.device | None:
        return self._own_device or (self._source.device if self._source is not None else None)

    def _out(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise ConversionError("R604", f"{name} is put out twice")
        self._names.add(name)
        self.sink(name, tensor)
