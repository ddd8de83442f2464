"""The base of every compiled adapter: whole states in, whole states out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Complement
from mapdsl.runtime.config import Config, UndecidedError
from mapdsl.runtime.errors import ConversionError, rule_at_work
from mapdsl.runtime.name_list import Listed, NameList
from mapdsl.runtime.put import Put, Sink
from mapdsl.runtime.take import Take

Keys = dict[str, tuple["tuple[int | None, ...] | None", "torch.dtype | None"]]


class Adapter:
    """Converts states between the two sides of a map, left (what is stored) and right.

    A compiled adapter defines `set_params`, `accept`, and the two mirrored conversions `_to_right` and `_to_left`, and
    gives the public methods the names of its sides. `config` is the config of the left side's checkpoint: a mapping,
    an object with the fields, or the path of its config.json; `params` are params of the map given by name.
    """

    MAP = ""
    LEFT = "left"
    RIGHT = "right"

    def __init__(self, config: Any = None, **params: Any) -> None:
        self.complement = Complement()
        self.config = Config(config, params)
        self.set_params(self.config)
        self.config.finish()

    # --- what a compiled adapter defines ---

    def set_params(self, config: Config) -> None:
        """Set the params of the map as attributes."""
        raise NotImplementedError

    def accept(self, take: Take) -> None:
        """Respell legacy names, and look which layout variant is there."""

    def _to_right(self, take: Take, put: Put) -> None:
        """Read the left side, make the right one."""
        raise NotImplementedError

    def _to_left(self, take: Take, put: Put) -> None:
        """Read the right side, make the left one."""
        raise NotImplementedError

    def found(self, param: str) -> bool:
        """What reading found for a param that is `has(...)`; N115 where nothing was read."""
        if param not in self.complement.found:
            message = f"`{param}` depends on the checkpoint: read one first, or give {param}=True or False"
            raise UndecidedError("N115", message)
        return self.complement.found[param]

    def look(self, take: Take, param: str, *patterns: str) -> None:
        """Answer `has(...)`: does the checkpoint hold a name of one of the patterns? What the caller gave wins."""
        found = self.config.given.get(param, any(take.holds(pattern) for pattern in patterns))
        self.complement.found[param] = bool(found)
        self.set_params(self.config)

    # --- whole states ---

    def read(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
        keep: bool = True,
    ) -> dict[str, Tensor]:
        """The right side's state from the left's. Raises ConversionError where they do not fit.

        `dtype` is that of decoded tensors; others keep theirs. `partial` leaves out what is absent as a whole group.
        Without `keep` only the formats are remembered, not what decoding loses: then writing encodes anew.
        """
        made: dict[str, Tensor] = {}
        self.read_into(state_dict, made.__setitem__, made.__getitem__, dtype=dtype, partial=partial, keep=keep)
        return made

    def read_into(
        self,
        state_dict: Mapping[str, Tensor],
        sink: Sink,
        read_back: Any,
        *,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
        keep: bool = True,
    ) -> None:
        """Like `read`, each tensor given to `sink` as soon as it is made; `read_back` gives one of them again."""
        self.complement.clear()
        complement = self.complement
        take = Take(
            state_dict,
            dtype=dtype,
            partial=partial,
            entries=complement.entries,
            spelled=complement.spelled,
            keep=keep,
        )
        put = Put(
            sink,
            read_back,
            dtype=dtype,
            entries=complement.right,
            decoded=complement.decoded,
            named=self.right_names,
            source=take,
        )
        with naming_the_rule():
            self.accept(take)
            self._to_right(take, put)
        take.finish()

    def write(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        quantization: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
    ) -> dict[str, Tensor]:
        """The left side's state from the right's. Raises ConversionError where they do not fit.

        With `quantization` a tensor is stored as reading found it, its kept scales included, and in the map's first
        format where nothing was read; without, it is stored as it is wherever the map allows that. `dtype` is that of
        tensors which have a format on the right alone, unless reading found another, and of constants.
        """
        made: dict[str, Tensor] = {}
        sink, read_back = made.__setitem__, made.__getitem__
        self.write_into(state_dict, sink, read_back, quantization=quantization, dtype=dtype, partial=partial)
        return made

    def write_into(
        self,
        state_dict: Mapping[str, Tensor],
        sink: Sink,
        read_back: Any,
        *,
        quantization: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
    ) -> None:
        """Like `write`, each tensor given to `sink` as soon as it is made."""
        complement = self.complement
        complement.edited.clear()
        complement.right.clear()
        self.set_params(self.config)
        take = Take(
            state_dict,
            dtype=dtype,
            partial=partial,
            quantization=quantization,
            entries=complement.right,
            decoded=complement.decoded,
        )
        put = Put(
            sink,
            read_back,
            dtype=dtype,
            quantization=quantization,
            entries=complement.entries,
            edited=complement.edited,
            named=self.left_names,
            source=take,
        )
        with naming_the_rule():
            self._to_left(take, put)
        take.finish()

    def write_one(self, name: str, tensor: Tensor, *, quantization: bool = False) -> list[tuple[str, Tensor]]:
        """The left side's tensors of one tensor of the right; R605 where its rule needs others with it.

        None where the left has nothing of it, such as a tied tensor: alone it cannot be compared with its twin.
        """
        return list(self.write({name: tensor}, quantization=quantization, partial=True).items())

    # --- names ---

    def left_keys(self, *, quantization: bool = True) -> Keys:
        """Every stored name, companions included, with shape and dtype where map and config fix them.

        Optional tensors and what wildcards carry are not listed. With `quantization` formats are those that reading
        found, else the first of the map.
        """
        chooser = Put(refuse, refuse, quantization=quantization, entries=self.complement.entries)
        return _keys(self._listed(self._to_right), chooser)

    def right_keys(self) -> Keys:
        """Every name of the right side, with its shape where map and config fix it."""
        return _keys(self._listed(self._to_left), Put(refuse, refuse, entries=self.complement.right))

    def _listed(self, direction: Callable[[Any, Put], None]) -> NameList:
        """What a direction would take of a whole state."""
        self.set_params(self.config)
        names = NameList()
        with naming_the_rule():
            direction(names, Put(ignore, refuse, device=torch.device("meta")))
        return names

    @property
    def left_names(self) -> Callable[[], set[str]]:
        """What gives all stored names that the rules speak of, listed when it is first called."""
        return _once(lambda: self._listed(self._to_right).named)

    @property
    def right_names(self) -> Callable[[], set[str]]:
        """The same of the right side."""
        return _once(lambda: self._listed(self._to_left).named)

    def listed_left(self) -> list[Listed]:
        """The tensors of a whole stored state, with the formats that each may be in."""
        return self._listed(self._to_right).names

    def listed_right(self) -> list[Listed]:
        """The same of the right side."""
        return self._listed(self._to_left).names


def _keys(names: NameList, chooser: Put) -> Keys:
    keys: Keys = {}
    shapes = names.shapes()
    for name, stored, *_ in names.names:
        logical = shapes[name]
        codec = chooser.alternative(name, stored)
        if not isinstance(codec, Codec):
            keys[name] = (logical, None)
        elif logical is not None and None not in logical:
            parts = codec.stored(name, tuple(size or 0 for size in logical))
            keys |= {part: (form, dtype) for part, (dtype, form) in parts.items()}
        else:
            keys |= dict.fromkeys(codec.names(name), (None, None))
    return keys


def _once(names: Callable[[], set[str]]) -> Callable[[], set[str]]:
    """The function, called when its result is first asked for."""
    found: list[set[str]] = []

    def remembered() -> set[str]:
        if not found:
            found.append(names())
        return found[0]

    return remembered


@contextmanager
def naming_the_rule() -> Iterator[None]:
    """Errors out of a conversion name the rule that was at work."""
    try:
        yield
    except ConversionError as err:
        err.rule = err.rule or rule_at_work(err.__traceback__)
        raise
    except (ZeroDivisionError, TypeError) as err:
        # The map's own arithmetic on values of the config; whatever else raises these is not ours to explain.
        rule = rule_at_work(err.__traceback__, innermost=True)
        if not rule:
            raise
        if isinstance(err, ZeroDivisionError):
            raise ConversionError("C505", "a param that the map divides by is 0", rule) from None
        raise ConversionError("N118", f"values of the config are of the wrong kind: {err}", rule) from None


def ignore(name: str, tensor: Tensor) -> None:
    """Constants are made while names are listed, on the meta device, and go nowhere."""


def refuse(*_: Any) -> Any:
    raise AssertionError("nothing is put while names are listed")


__all__ = ["RAW", "Adapter", "Keys", "Tensor"]
