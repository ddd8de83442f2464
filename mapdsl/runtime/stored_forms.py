"""How the tensors of a state are stored: which of its alternatives each one is in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING, FLOAT_DTYPES, dtype_name
from mapdsl.runtime.codecs.likeness import likeliest
from mapdsl.runtime.codecs.memory import fresh
from mapdsl.runtime.codecs.storage import RAW_STORAGE, Parts
from mapdsl.runtime.complement import RAW, Alternatives, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.state_names import StateNames
from mapdsl.runtime.watched import Form, WatchedState

AS_IS: Alternatives = (RAW,)
NOT_AT_ALL: Alternatives = ()
_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPE_BY_SPELLING.items()}

# How many kinds of tensors without data are told apart; what comes then is looked at closely, each by itself.
MAX_KNOWN = 10_000

# Alternatives of a tensor, and the form of each part that it may have (None: not there), in the order of `Parts`.
Found = tuple[Alternatives, tuple["Form | None", ...]]


class StoredForms(StateNames):
    """The tensors of a state, which may be lazy: each is asked for once, and held until it is taken."""

    def __init__(self, tensors: Mapping[str, Tensor], spelled: dict[str, str] | None = None) -> None:
        super().__init__(tensors, spelled)
        self.tensors = tensors
        self._watched = tensors if isinstance(tensors, WatchedState) else None
        self._device = None if self._watched is None else self._watched.device
        self._alternatives: dict[str, Codec | Raw] = {}  # of the group at hand
        self._found: dict[str, Found] = {}  # those of them that have no data
        self._named: dict[str, list[str]] = {}  # the names of all parts that they may have
        self._touched: set[str] = set()  # what it has looked at
        self._parts: dict[Alternatives, Parts] = {}
        self._recognitions: dict[Found, Codec | Raw] = {}

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors, once one was taken."""
        return self._device

    def _begin(self) -> None:
        """A group of tensors is to be asked for."""
        self._alternatives, self._found, self._named = {}, {}, {}
        self._touched.clear()
        if self._watched is not None:
            self._watched.begin()

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a tensor that is to be filled with the group."""
        if self._watched is not None:
            return self._watched.allocate(shape, dtype, device)
        return fresh(shape, dtype, device)

    def _alternative(self, name: str, stored: Alternatives) -> Codec | Raw:
        """The alternative that a stored tensor is in, by the companions beside it, and the dtypes and shapes of all."""
        if stored is AS_IS:
            return RAW
        codec = self._alternatives.get(name)
        if codec is None:
            codec = self._alternatives[name] = self._looked_up(name, stored)
        return codec

    def _looked_up(self, name: str, stored: Alternatives) -> Codec | Raw:
        """The alternative of a tensor; of those without data, the one that another of the same forms had."""
        found = self._forms(name, stored)
        if found is None:
            return self._recognised(name, stored)
        codec = self._recognitions.get(found)
        if codec is None:
            codec = self._recognised(name, stored)
            # Where a part is there that this alternative does not have, more groups than this one may look at it.
            own = {name} if isinstance(codec, Raw) else {*codec.names(name)}
            there = {part for part, form in zip(self._named[name], found[1], strict=True) if form is not None}
            if not there <= own or len(self._recognitions) >= MAX_KNOWN:
                return codec
            self._recognitions[found] = codec
        self._found[name] = found
        return codec

    def _forms(self, name: str, stored: Alternatives) -> Found | None:
        """The forms of all parts of a tensor, where its state says them: it has no data."""
        if self._watched is None:
            return None
        named = self._names_of_parts(name, stored)
        for payload in named[: len(self._parts[stored].payloads)]:
            if payload in self:
                self._touch(payload)
        forms: list[Form | None] = []
        for part in named:
            form = None
            if part in self and (form := self._watched.form(self._spelled.get(part, part))) is None:
                return None
            forms.append(form)
        return stored, tuple(forms)

    def _names_of_parts(self, name: str, stored: Alternatives) -> list[str]:
        """The names of all parts that a tensor of the group at hand may have, in the order of `Parts`."""
        named = self._named.get(name)
        if named is None:
            if stored not in self._parts:
                formats = (one.storage if isinstance(one, Codec) else RAW_STORAGE for one in stored)
                self._parts[stored] = Parts.of(formats)
            named = self._named[name] = self._parts[stored].names(name)
        return named

    def _recognised(self, name: str, stored: Alternatives) -> Codec | Raw:
        payloads = {c.payload(name) for c in stored if isinstance(c, Codec)} | ({name} if RAW in stored else set())
        there = [payload for payload in payloads if payload in self]
        claimed, recognised = None, []
        for codec in stored:
            if isinstance(codec, Codec) and codec.payload(name) in there:
                dtype = self._peek(codec.payload(name)).dtype
                if codec.recognises(name, dtype, self.__contains__):
                    recognised.append(codec)
                # A float of 16 bits or more stands by itself; a narrow one means nothing without its scales.
                elif codec.claims(name, dtype) and not (RAW in stored and dtype in FLOAT_DTYPES):
                    claimed = claimed or codec
        if recognised:
            return self._likeliest(name, recognised)
        if claimed is not None:
            lacking = next(part for part in claimed.companions(name).values() if part not in self)
            raise ConversionError("R605", f"{name} is stored as {claimed.name}, but its companion {lacking} is missing")
        if RAW in stored and name in self:
            return RAW
        names = " or ".join(codec.name for codec in stored)
        found = f"is {dtype_name(self._peek(there[0]).dtype)}" if there else "has another form"
        raise ConversionError("C504", f"{name} {found}, the map stores it as {names}")

    def _likeliest(self, name: str, codecs: list[Codec]) -> Codec:
        """Of formats whose parts are all there, the one that dtypes and shapes fit."""

        def form(part: str) -> tuple[str, tuple[int, ...]]:
            tensor = self._peek(part)
            return _SPELLINGS.get(tensor.dtype, ""), tuple(tensor.shape)

        return codecs[likeliest(name, [codec.storage for codec in codecs], form)]

    def _is_coded(self, name: str, stored: Alternatives) -> bool:
        """Whether a tensor is in one of the codecs, told by the companions beside it where that is enough."""
        if RAW not in stored or stored is AS_IS:
            return stored is not AS_IS
        named, parts = self._names_of_parts(name, stored), self._parts[stored]
        if parts.all_have_companions:
            return any(companion in self for companion in named[len(parts.payloads) :])
        return self._alternative(name, stored) is not RAW

    def _elsewhere(self, name: str, stored: Alternatives) -> bool:
        """Whether a codec keeps the payload under another name, and that is there."""
        return any(isinstance(c, Codec) and c.payload(name) != name and c.payload(name) in self for c in stored)

    def _touch(self, name: str) -> None:
        """The group at hand looks at a tensor: its state is told, once."""
        if self._watched is not None and name not in self._touched:
            self._touched.add(name)
            self._watched.touch(self._spelled.get(name, name))

    def _peek(self, name: str) -> Tensor:
        self._touch(name)
        if name not in self._fetched:
            self._left.pop(name, None)
            tensor = self.tensors[self._spelled.get(name, name)]
            self._fetched[name] = tensor
            if self._watched is None or self._watched.device is None:
                self._device = tensor.device
        return self._fetched[name]
