"""`load`: one rank's state out of a checkpoint of as many shards, of more or of fewer."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mapdsl.deepspeed.files import AUTO, CheckpointEngine, Files, Shard
from mapdsl.deepspeed.quantise import Quantiser
from mapdsl.deepspeed.shards import MAP, PREFIX, Model, layout_of, map_of, resharded
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError

Loaded = tuple["str | os.PathLike[str]", "dict[Any, Any]", "tuple[Tensor | None, int]"]


class MegatronSDLoader:
    """Loads shards of tensor parallel ranks for another number of ranks; see `SDLoaderFactory.get_sd_loader`."""

    def __init__(
        self,
        ckpt_list: Sequence[str | os.PathLike[str]],
        version: float | None,
        checkpoint_engine: CheckpointEngine | None,
        *,
        config: Mapping[str, Any] | Any = None,
        num_heads: int | None = None,
        map: Map | str | os.PathLike[str] = MAP,  # noqa: A002 - what it is
        compare: bool = True,
    ) -> None:
        if isinstance(ckpt_list, (str, os.PathLike)) or not len(ckpt_list):
            raise ConversionError("C505", f"expected a list of files, one a rank, found {ckpt_list!r}")
        self.ckpt_list = list(ckpt_list)
        self.version = version
        self.checkpoint_engine = checkpoint_engine
        self.module_key: str | None = None
        self._map, self._compare = map_of(map), compare
        self._files = Files(self.ckpt_list, checkpoint_engine)
        if version is not None:
            layout_of(version, "")
        first = self._files.read(0)
        self._check_count(first)
        self._layout(self._files.name(0), first)
        arguments = first.get("args")
        known = arguments if isinstance(arguments, (argparse.Namespace, Mapping)) else None
        self._model = Model.of(config, num_heads, known)

    def load(
        self,
        mp_world_size: int,
        mp_rank: int,
        module_key: str | None = AUTO,
        is_pipe_parallel: bool = False,
        quantize: bool = False,
        quantize_bits: int = 8,
        quantize_groups: int = 64,
        mlp_extra_grouping: bool = True,
    ) -> Loaded:
        """The file that was read, or the first of them, the state of a rank, and `(scales, merge_count)`.

        Of as many ranks as there are shards each loads its own. Of fewer each merges `merge_count` shards, of more each
        loads a part of one; tensors of the module are then new, and what lies beside it is a copy of the first
        shard's, with `mp_world_size` that of the ranks. `module_key` is where a file has the state of the module, or
        None where the file is that itself; "auto" is `module` or `model`. With `is_pipe_parallel` and a key the
        files are all alike where their number is not that of the ranks, and the first is loaded.

        With `quantize` four weights a layer become int8; the scales are what to multiply with, [layers, 4, groups].

        Raises ConversionError, or MapError for a file that cannot be read.
        """
        self.module_key = module_key
        count = len(self._files)
        if mp_world_size < 1 or not 0 <= mp_rank < mp_world_size:
            raise ConversionError("N113", f"there is no rank {mp_rank} of {mp_world_size}")
        number = mp_rank * count // mp_world_size
        if is_pipe_parallel and module_key is not None and mp_world_size != count:
            mp_world_size, number = count, 0
        quantiser = Quantiser(quantize_bits, quantize_groups, mlp_extra_grouping) if quantize else None
        if mp_world_size == count:
            state, scales = self._same(number, quantiser)
            return self.ckpt_list[number], state, (scales, 1)
        if count % mp_world_size and mp_world_size % count:
            message = f"{count} shards cannot be merged or split for {mp_world_size} ranks: neither divides the other"
            raise ConversionError("P453", message)
        merged = max(count // mp_world_size, 1)
        state, scales = self._other(range(number, number + merged), mp_world_size, mp_rank, quantiser)
        return self.ckpt_list[number], state, (scales, merged)

    # --- the cases ---

    def _same(self, number: int, quantiser: Quantiser | None) -> tuple[dict[Any, Any], Tensor | None]:
        """One file, as it is."""
        if quantiser is None:
            return self._files.read(number, mapped=False), None
        shard = self._files.shard(number, self.module_key)
        return shard.with_tensors(quantiser.quantised(shard.tensors)), quantiser.scales(shard.tensors)

    def _other(
        self, numbers: range, mp_world_size: int, mp_rank: int, quantiser: Quantiser | None
    ) -> tuple[dict[Any, Any], Tensor | None]:
        """The state of a rank that holds several shards, or a part of one."""
        shards = [self._files.shard(number, self.module_key) for number in numbers]
        states: list[dict[str, Tensor]] = [shard.tensors for shard in shards]
        params = self._model.params(self._common_layout(shards), states[0])
        _check_names(shards)
        if quantiser is not None and len(shards) > 1:
            states = quantiser.across(states)
        counts = len(self._files), mp_world_size
        rank = 0 if len(shards) > 1 else mp_rank % (mp_world_size // len(self._files))
        with _naming(shards):
            made = resharded(self._map, params, states, counts, rank, compare=self._compare)
        if quantiser is not None:
            made = quantiser.quantised(made, len(shards))
        out = shards[0].with_tensors(made)
        if "mp_world_size" in out:
            out["mp_world_size"] = mp_world_size
        return out, quantiser.scales(states[0]) if quantiser else None

    # --- what files say of themselves ---

    def _check_count(self, first: Mapping[Any, Any]) -> None:
        saved = first.get("mp_world_size")
        if saved is not None and saved != len(self._files):
            message = f"{self._files.name(0)} is one of {saved} shards (`mp_world_size`), {len(self._files)} were given"
            raise ConversionError("C505", message)

    def _layout(self, path: str, found: Mapping[Any, Any]) -> int:
        """How a file fuses queries, keys and values: as was asked for, which it must not contradict."""
        saved = found.get("checkpoint_version")
        if self.version is None:
            return layout_of(0 if saved is None else saved, f" of {path}")
        asked = layout_of(self.version, "")
        if saved is not None and layout_of(saved, f" of {path}") != asked:
            message = f"{path} has checkpoint version {saved}, and is to be loaded as version {self.version}"
            raise ConversionError("C505", f"{message}: queries, keys and values would be mixed up")
        return asked

    def _common_layout(self, shards: Sequence[Shard]) -> int:
        layouts = {self._layout(shard.path, shard.holds): shard.path for shard in shards}
        if len(layouts) > 1:
            files = " and ".join(layouts.values())
            raise ConversionError("C505", f"{files} have different checkpoint versions, they cannot be merged")
        return next(iter(layouts))


def _check_names(shards: Sequence[Shard]) -> None:
    """All shards hold parts of the same tensors, R605."""
    for one, other in itertools.permutations(shards, 2):
        for name in one.tensors:
            if name not in other.tensors:
                raise ConversionError("R605", f"{name} is missing in {other.path}, {one.path} has it")


@contextmanager
def _naming(shards: Sequence[Shard]) -> Iterator[None]:
    """Errors name the files, and say what to do about tensors that the map does not know."""
    try:
        yield
    except ConversionError as err:
        advice = ""
        if err.code == "R603":
            advice = f"; how it is cut is said by a rule of a map that includes `{MAP}.map`, given as `map=`"
        files = ", ".join(f"rank {number} is {shard.path}" for number, shard in enumerate(shards))
        message = f"{err.message.replace(PREFIX, '')}{advice} ({files})"
        raise ConversionError(err.code, message, err.rule) from None


__all__ = ["MegatronSDLoader"]
