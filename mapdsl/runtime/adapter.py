"""The base of every compiled adapter: whole states in, whole states out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.complement import RAW, Complement
from mapdsl.runtime.config import Config
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.put import Put, Sink
from mapdsl.runtime.sizes import shape_of
from mapdsl.runtime.take import NameList, Take

Keys = dict[str, tuple["tuple[int | None, ...] | None", "torch.dtype | None"]]


class Adapter:
    """Converts states between the two sides of a map, left (what is stored) and right.

    A compiled adapter defines `set_params`, `accept`, and the two mirrored conversions `to_right` and `to_left`, and
    gives their public methods the names of its sides. `config` is the config of the left side's checkpoint: a mapping,
    an object with the fields, or the path of its config.json; `params` are params of the map given by name.
    """

    MAP = ""
    LEFT = "left"
    RIGHT = "right"

    def __init__(self, config: Any = None, **params: Any) -> None:
        self.complement = Complement()
        self.given = params
        values = Config(config, params)
        self.set_params(values)
        values.finish()

    # --- what a compiled adapter defines ---

    def set_params(self, config: Config) -> None:
        """Set the params of the map as attributes."""
        raise NotImplementedError

    def accept(self, take: Take) -> None:
        """Respell legacy names, and look which layout variant is there."""

    def to_right(self, take: Take, put: Put) -> None:
        """Read the left side, make the right one."""
        raise NotImplementedError

    def to_left(self, take: Take, put: Put) -> None:
        """Read the right side, make the left one."""
        raise NotImplementedError

    def found(self, param: str) -> bool:
        """What reading found for a param that is `has(...)`; N115 where nothing was read."""
        if param not in self.complement.found:
            raise ConversionError("N115", f"`{param}` depends on the checkpoint: read one first, or give {param}=True or False")
        return self.complement.found[param]

    def look(self, take: Take, param: str, pattern: str) -> bool:
        """Answer `has(...)`: does the checkpoint hold a name of the pattern? What the caller gave wins."""
        found = self.given.get(param, take.holds(pattern))
        self.complement.found[param] = bool(found)
        return bool(found)

    # --- whole states ---

    def read(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
    ) -> dict[str, Tensor]:
        """The right side's state from the left's. Raises ConversionError where they do not fit.

        `dtype` is that of decoded tensors; others keep theirs. `partial` leaves out what is absent as a whole group.
        """
        made: dict[str, Tensor] = {}
        self.read_into(state_dict, made.__setitem__, made.__getitem__, dtype=dtype, partial=partial)
        return made

    def read_into(
        self,
        state_dict: Mapping[str, Tensor],
        sink: Sink,
        read_back: Any,
        *,
        dtype: torch.dtype = torch.bfloat16,
        partial: bool = False,
    ) -> None:
        """Like `read`, each tensor given to `sink` as soon as it is made; `read_back` gives one of them again."""
        self.complement.clear()
        take = Take(state_dict, dtype=dtype, partial=partial, complement=self.complement)
        put = Put(sink, read_back, dtype=dtype, complement=self.complement)
        self.accept(take)
        self.to_right(take, put)
        take.finish()

    def write(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        quantization: bool = False,
        partial: bool = False,
    ) -> dict[str, Tensor]:
        """The left side's state from the right's. Raises ConversionError where they do not fit.

        With `quantization` a tensor is stored as reading found it, its kept scales included, and in the map's first
        format where nothing was read; without, it is stored as it is wherever the map allows that.
        """
        made: dict[str, Tensor] = {}
        self.write_into(state_dict, made.__setitem__, made.__getitem__, quantization=quantization, partial=partial)
        return made

    def write_into(
        self,
        state_dict: Mapping[str, Tensor],
        sink: Sink,
        read_back: Any,
        *,
        quantization: bool = False,
        partial: bool = False,
    ) -> None:
        """Like `write`, each tensor given to `sink` as soon as it is made."""
        self.complement.edited.clear()
        take = Take(state_dict, partial=partial, complement=self.complement)
        put = Put(sink, read_back, quantization=quantization, complement=self.complement)
        self.to_left(take, put)
        take.finish()

    def write_one(self, name: str, tensor: Tensor, *, quantization: bool = False) -> list[tuple[str, Tensor]]:
        """The left side's tensors of one tensor of the right; R605 where its rule needs others with it."""
        return list(self.write({name: tensor}, quantization=quantization, partial=True).items())

    # --- names ---

    def left_keys(self, *, quantization: bool = True) -> Keys:
        """Every stored name, companions included, with shape and dtype where map and config fix them.

        Optional tensors and what wildcards carry are not listed. With `quantization` formats are those that reading
        found, else the first of the map.
        """
        names = NameList()
        self.to_right(names, Put(_refuse, _refuse))
        chooser = Put(_refuse, _refuse, quantization=quantization, complement=self.complement)
        keys: Keys = {}
        for name, stored, shape, sizes in names.names:
            logical = None if shape is None else shape_of(shape, sizes)
            codec = chooser.alternative(name, stored)
            if not isinstance(codec, Codec):
                keys[name] = (logical, None)
            elif logical is not None and None not in logical:
                parts = codec.stored(name, tuple(size or 0 for size in logical))
                keys |= {part: (form, dtype) for part, (dtype, form) in parts.items()}
            else:
                keys |= dict.fromkeys(codec.names(name), (None, None))
        return keys

    def right_keys(self) -> Keys:
        """Every name of the right side, with its shape where map and config fix it."""
        names = NameList()
        self.to_left(names, Put(_refuse, _refuse))
        return {name: (None if shape is None else shape_of(shape, sizes), None) for name, _, shape, sizes in names.names}


def _refuse(*_: Any) -> Any:
    raise AssertionError("nothing is put while names are listed")


__all__ = ["RAW", "Adapter", "Keys"]
