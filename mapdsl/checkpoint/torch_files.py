"""Torch's own files (`.pt`, `.pth`, `.bin`), read without running what they hold: `weights_only=True` everywhere.

Those that torch 1.6 or later wrote are mapped from disk. Older ones, which are no zip archives, can only be read as a
whole into memory.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.dcp_metadata import WRAPPERS
from mapdsl.checkpoint.dtypes import dtype_name, stored_shape
from mapdsl.checkpoint.files import bad_file, file_size
from mapdsl.checkpoint.headers import StoredTensor, checked_size
from mapdsl.checkpoint.rawbytes import release_pages
from mapdsl.language.diagnostics import MapError

_MAX_DEPTH = 32


def read_torch_headers(path: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Names, dtypes and shapes of a torch file, and the keys of what is not part of the state; no tensor is read.

    Raises a MapError, C507: no torch file, needs code to load, or holds no dict of tensors.
    """
    tensors = {}
    state, left_out = _state(path, load_torch_file(path, "meta"))
    for name, tensor in state.items():
        try:
            dtype, shape = dtype_name(tensor.dtype), stored_shape(tensor)
        except MapError as problem:
            raise bad_file(path, f"tensor `{name}`: {problem.diagnostics[0].message}") from problem
        checked_size(path, name, dtype, shape)
        tensors[name] = StoredTensor(name, dtype, shape, path)
    return tensors, left_out


class MappedFile:
    """The `tensors` of a torch file, mapped from disk where its format allows; C507 as `read_torch_headers`."""

    def __init__(self, path: Path) -> None:
        self.tensors = _state(path, load_torch_file(path, "cpu"))[0]
        for name, tensor in self.tensors.items():
            if tensor.device.type != "cpu":
                raise bad_file(path, f"tensor `{name}` was saved without data, on device {tensor.device}")
        self._is_clean = _is_zip(path) and _has_own_byte_order(path)

    def release(self, name: str) -> None:
        """Let the pages of a tensor leave this process; they are read from the file again when they are used."""
        if self._is_clean:
            release_pages(self.tensors[name])


def load_torch_file(path: Path, device: str = "cpu", *, mapped: bool = True) -> Any:
    """Whatever a torch file holds, its tensors mapped from disk where its format allows and `mapped` is left on.

    Raises a MapError, C507, for what is no torch file or needs code to load.
    """
    file_size(path)
    try:
        try:
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped and _is_zip(path))
        except RuntimeError as problem:
            if device != "meta" or "mmap" not in str(problem):
                raise
            return torch.load(path, map_location=device, weights_only=True)  # larger than memory, and not read
    except pickle.UnpicklingError as problem:
        advice = "load it where you trust it, and save the state dict as safetensors"
        raise bad_file(path, f"the file needs code to load, or is broken: {_first_line(problem)}", advice) from problem
    except Exception as problem:  # a broken file makes torch raise almost anything
        message, advice = f"torch cannot load the file: {_first_line(problem)}", ""
        if "allocate memory" in str(problem) and not _is_zip(path):
            advice = "torch reads its old format as a whole only: load it on a larger machine, and save it again"
        raise bad_file(path, message, advice) from problem


def _is_zip(path: Path) -> bool:
    """Whether torch 1.6 or later wrote the file; earlier ones cannot be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _has_own_byte_order(path: Path) -> bool:
    """Whether the file's bytes are those of this machine; torch swaps others in its own copy of the pages."""
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return all(order == sys.byteorder.encode() for order in orders)


def _state(path: Path, value: Any) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The state dict in a loaded value, nested dicts' keys joined by dots, and the keys of what is left out.

    None and `_extra_state` entries are left out, others must be tensors; so is whatever lies beside a wrapper.
    """
    left_out: list[str] = []
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict) and _any_tensor(value[key]):
            left_out += [str(other)[:200] for other in value if other != key]
            value = value[key]
            break
    if not isinstance(value, dict) or not (_any_tensor(value) or not value):
        advice = f"expected a dict of tensors, by itself or under one of {', '.join(WRAPPERS)}"
        raise bad_file(path, f"the file holds a {type(value).__name__} without tensors", advice)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _leaves(path, value, ""):
        if tensor is None or name.endswith("_extra_state"):
            left_out.append(name)
            continue
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
            found = f"a {tensor.layout} tensor" if is_plain else f"of {type(tensor)}"
            raise bad_file(path, f"entry {name!r:.200} is {found}, expected a dense tensor under a string")
        if name in state:
            raise bad_file(path, f"two tensors are called `{name}`, once nested dicts are joined by dots", code="C506")
        state[name] = tensor.detach()
    return state, tuple(left_out)


def _leaves(path: Path, value: dict[Any, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts that is no dict, by its keys joined by dots."""
    if depth > _MAX_DEPTH:
        raise bad_file(path, f"dicts are nested more than {_MAX_DEPTH} deep")
    for key, item in value.items():
        if not isinstance(key, str):
            found = f"a {item.layout} tensor" if isinstance(item, torch.Tensor) else f"of {type(item)}"
            raise bad_file(path, f"entry {key!r:.200} is {found}, expected a dense tensor under a string")
        if isinstance(item, dict):
            yield from _leaves(path, item, f"{prefix}{key}.", depth + 1)
        else:
            yield prefix + key, item


def _any_tensor(value: dict[Any, Any], depth: int = 0) -> bool:
    """Whether a tensor is in nested dicts."""
    return depth <= _MAX_DEPTH and any(
        isinstance(item, torch.Tensor) or (isinstance(item, dict) and _any_tensor(item, depth + 1))
        for item in value.values()
    )


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0][:300]
