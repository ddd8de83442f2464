"""What the tests of `verify` and `diff` share: ways to make a checkpoint another one, and what is found then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conversions import MAP, write_state, write_tiny
from torch import Tensor

import mapdsl
from mapdsl import Verification
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.headers import BITS, StoredTensor
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.checkpoint.tensors import LazyState

State = dict[str, Tensor]
EXPERTS = "model.layers.1.mlp.experts.down_projs"
"""A stack of the model's side that is made of quantised tensors."""


@pytest.fixture(scope="module", params=["fp4", "fp8", "raw"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `converted` makes, of experts in each format."""
    return converted(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "work"))


def flip(folder: Path, name: str, place: int, bits: int = 1) -> tuple[int, ...]:
    """Change bits of one byte of a tensor, in the file; gives the index of the element that it belongs to."""
    stored = open_checkpoint(folder).tensors[name]
    with stored.file.open("r+b") as file:
        file.seek(stored.begin + place)
        byte = file.read(1)[0]
        file.seek(stored.begin + place)
        file.write(bytes([byte ^ bits]))
    return index_of(stored, place)


def index_of(stored: StoredTensor, place: int) -> tuple[int, ...]:
    """The index of the element that a byte belongs to, of dtypes that have whole bytes."""
    index, element = [], place * 8 // BITS[stored.dtype]
    for size in reversed(stored.shape):
        index.append(element % size)
        element //= size
    return tuple(reversed(index))


def flip_everywhere(folder: Path, rng: Random) -> dict[str, tuple[int, ...]]:
    """One byte changed in every tensor that has some; gives the elements' indices."""
    stored = {name: tensor.nbytes for name, tensor in open_checkpoint(folder).tensors.items() if tensor.nbytes}
    return {name: flip(folder, name, rng.randrange(size), 1 << rng.randrange(8)) for name, size in stored.items()}


def state_of(folder: Path) -> State:
    """The tensors in memory of their own."""
    return {name: tensor.clone() for name, tensor in LazyState(open_checkpoint(folder)).items()}


def rewritten(folder: Path, change: Callable[[State], object], *, shard_bytes: int = 10**9) -> Path:
    """The checkpoint beside, under another name, with `change` made to its state; config and side file go along."""
    state = state_of(folder)
    change(state)
    other = write_state(folder.with_name(f"{folder.name}-rewritten"), state, shard_bytes=shard_bytes)
    for name in ("config.json", SIDE_FILE):
        if (folder / name).exists():
            shutil.copyfile(folder / name, other / name)
    return other


def value_at(tensor: Tensor, index: tuple[int, ...]) -> bytes:
    """The bytes of one element."""
    return bytes(tensor[index].clone().reshape(1).view(torch.uint8).tolist())


def element(tensor: Tensor, text: str) -> str:
    """The bits of the element that a text such as `w[1, 2]` names, as hexadecimal digits."""
    index = tuple(int(n) for n in text[text.index("[") + 1 : -1].split(","))
    return value_at(tensor, index)[::-1].hex()


def renamed(state: State) -> None:
    """Another name for one tensor of the model's side."""
    state["model.norm.wait"] = state.pop("model.norm.weight")


def converted(folder: Path, experts: str) -> Path:
    """A folder with a release, `source`, what it was converted to, `there`, and the way back, `back`."""
    write_tiny(folder / "source", experts)
    mapdsl.convert(folder / "source", folder / "there", MAP)
    mapdsl.convert(folder / "there", folder / "back", MAP)
    return folder


def verified(source: Path, destination: Path, **options: Any) -> Verification:
    """`verify`, with the shipped map if no other is given."""
    return mapdsl.verify(source, destination, options.pop("map", MAP), **options)


def places(found: Verification) -> dict[str, tuple[int, ...]]:
    """The first differing element of each tensor that differs in bytes."""
    assert {d.kind for d in found.differences} <= {"bytes"}
    return {d.name: d.index for d in found.differences}
