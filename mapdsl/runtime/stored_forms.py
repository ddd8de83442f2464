"""How the tensors of a state are stored: which of its alternatives each one is in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING, FLOAT_DTYPES
from mapdsl.runtime.codecs.likeness import likeliest
from mapdsl.runtime.complement import RAW, Alternatives, Raw
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.state_names import StateNames
from mapdsl.runtime.watched import WatchedState

AS_IS: Alternatives = (RAW,)
NOT_AT_ALL: Alternatives = ()
_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPE_BY_SPELLING.items()}


class StoredForms(StateNames):
    """The tensors of a state, which may be lazy: each is asked for once, and held until it is taken."""

    def __init__(self, tensors: Mapping[str, Tensor], spelled: dict[str, str] | None = None) -> None:
        super().__init__(tensors, spelled)
        self.tensors = tensors
        self._watched = tensors if isinstance(tensors, WatchedState) else None
        self._device = None if self._watched is None else self._watched.device
        self._alternatives: dict[str, Codec | Raw] = {}  # of the group at hand

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors, once one was taken."""
        return self._device

    def _begin(self) -> None:
        """A group of tensors is to be asked for."""
        self._alternatives = {}
        if self._watched is not None:
            self._watched.begin()

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a tensor that is to be filled with the group."""
        if self._watched is not None:
            return self._watched.allocate(shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device)

    def _alternative(self, name: str, stored: Alternatives) -> Codec | Raw:
        """The alternative that a stored tensor is in, by the companions beside it, and the dtypes and shapes of all."""
        if stored is AS_IS:
            return RAW
        if name not in self._alternatives:
            self._alternatives[name] = self._recognised(name, stored)
        return self._alternatives[name]

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
        names = "|".join(codec.name for codec in stored)
        dtype_text = f" of {self._peek(there[0]).dtype}" if there else ""
        raise ConversionError("C504", f"{name}{dtype_text} is stored as none of {names}")

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
        beside = [codec.companions(name).values() for codec in stored if isinstance(codec, Codec)]
        if all(beside):
            return any(companion in self for companions in beside for companion in companions)
        return self._alternative(name, stored) is not RAW

    def _elsewhere(self, name: str, stored: Alternatives) -> bool:
        """Whether a codec keeps the payload under another name, and that is there."""
        return any(isinstance(c, Codec) and c.payload(name) != name and c.payload(name) in self for c in stored)

    def _peek(self, name: str) -> Tensor:
        if self._watched is not None:
            self._watched.touch(self._spelled.get(name, name))
        if name not in self._fetched:
            self._left.pop(name, None)
            tensor = self.tensors[self._spelled.get(name, name)]
            self._fetched[name] = tensor
            if self._watched is None or self._watched.device is None:
                self._device = tensor.device
        return self._fetched[name]
