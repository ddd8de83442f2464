"""The files of shards: what each holds, and where in it the module's state is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.torch_files import load_torch_file
from mapdsl.deepspeed.nested import flat, own, refilled

AUTO = "auto"
_MODULE_KEYS = ("module", "model")


class CheckpointEngine(Protocol):
    """What reads a file, DeepSpeed's `CheckpointEngine` for one."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Whatever the file holds."""


class Files:
    """The files of all shards, in the order of their ranks.

    Without an `engine` they are read by torch with `weights_only=True`: nothing in them is run. Beside tensors and
    plain values they may hold the `argparse.Namespace` in which Megatron keeps its arguments.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], engine: CheckpointEngine | None) -> None:
        self.paths = list(paths)
        self._engine = engine

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        """The path of a file."""
        return os.fspath(self.paths[number])

    def read(self, number: int, *, mapped: bool = True) -> dict[Any, Any]:
        """What a file holds; `mapped` where its tensors are copied before the file may change."""
        path = self.name(number)
        if self._engine is None:
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = load_torch_file(Path(path), mapped=mapped)
        elif not os.path.exists(path):
            raise bad_file(path, "there is no such file")
        else:
            found = self._engine.load(path, map_location="cpu")
        if not isinstance(found, dict):
            raise bad_file(path, f"expected a dict with the state of a module, found a {type(found).__name__}")
        return found

    def shard(self, number: int, key: str | None, *, mapped: bool = True) -> Shard:
        """What a file holds, with the state of its module under a key; C507 where there is none."""
        found, path = self.read(number, mapped=mapped), self.name(number)
        if key == AUTO:
            there = [key for key in _MODULE_KEYS if key in found]
            if len(there) != 1:
                what = "both `module` and `model`" if there else "neither `module` nor `model`"
                advice = "say which holds the weights, `module_key=KEY`, or None where the file itself does"
                raise bad_file(path, f"the file has {what}", advice)
            key = there[0]
        module = found if key is None else found.get(key)
        if not isinstance(module, Mapping):
            what = f"a {type(module).__name__} under `{key}`" if key in found else f"no `{key}`"
            raise bad_file(path, f"the file has {what}, expected the state of a module there")
        return Shard(path, found, key, flat(module, path))


@dataclass(frozen=True)
class Shard:
    """What a file `holds`, under which `key` the state of its module is (None: it is that), and its `tensors`."""

    path: str
    holds: dict[Any, Any]
    key: str | None
    tensors: dict[str, Tensor]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
        """What the file holds, but other tensors in the module; all of it copied."""
        if self.key is None:
            return refilled(self.holds, tensors)
        return {
            name: refilled(value, tensors) if name == self.key else own(value) for name, value in self.holds.items()
        }
