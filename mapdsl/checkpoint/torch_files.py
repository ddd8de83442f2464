"""Torch's own files (`.pt`, `.pth`, `.bin`), read without running what they hold: `weights_only=True` everywhere."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.dtypes import dtype_name, stored_shape
from mapdsl.checkpoint.files import bad_file, file_size
from mapdsl.checkpoint.headers import StoredTensor, checked_size
from mapdsl.language.diagnostics import MapError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers put the state dict; the first that holds a dict of tensors is taken."""


def read_torch_headers(path: Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes of a torch file; no tensor is read.

    Raises a MapError, C507: no torch file, needs code to load, or holds no dict of tensors.
    """
    tensors = {}
    for name, tensor in _state(path, _load(path, "meta")).items():
        try:
            dtype, shape = dtype_name(tensor.dtype), stored_shape(tensor)
        except MapError as problem:
            raise bad_file(path, f"tensor `{name}`: {problem.diagnostics[0].message}") from problem
        checked_size(path, name, dtype, shape)
        tensors[name] = StoredTensor(name, dtype, shape, path)
    return tensors


def load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch file, mapped from disk where its format allows; C507 as `read_torch_headers`."""
    return _state(path, _load(path, "cpu"))


def _load(path: Path, device: str) -> Any:
    file_size(path)
    try:
        try:
            return torch.load(path, map_location=device, weights_only=True, mmap=_is_zip(path))
        except RuntimeError as problem:
            if device != "meta" or "mmap" not in str(problem):
                raise
            return torch.load(path, map_location=device, weights_only=True)  # larger than memory, and not read
    except pickle.UnpicklingError as problem:
        advice = "load it where you trust it, and save the state dict as safetensors"
        raise bad_file(path, f"the file needs code to load, or is broken: {_first_line(problem)}", advice) from problem
    except Exception as problem:  # a broken file makes torch raise almost anything
        raise bad_file(path, f"torch cannot load the file: {_first_line(problem)}") from problem


def _is_zip(path: Path) -> bool:
    """Whether torch 1.6 or later wrote the file; earlier ones cannot be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _state(path: Path, value: Any) -> dict[str, torch.Tensor]:
    """The state dict in a loaded value. None and `_extra_state` entries are left out, others must be tensors."""
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict) and _any_tensor(value[key]):
            value = value[key]
            break
    if not isinstance(value, dict) or not (_any_tensor(value) or not value):
        advice = f"expected a dict of tensors, by itself or under one of {', '.join(WRAPPERS)}"
        raise bad_file(path, f"the file holds a {type(value).__name__} without tensors", advice)
    state = {}
    for name, tensor in value.items():
        if tensor is None or (isinstance(name, str) and name.endswith("_extra_state")):
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            found = f"a {tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else f"of {type(tensor)}"
            raise bad_file(path, f"entry {name!r:.200} is {found}, expected a dense tensor under a string")
        state[name] = tensor.detach()
    return state


def _any_tensor(value: dict[Any, Any]) -> bool:
    return any(isinstance(item, torch.Tensor) for item in value.values())


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0][:300]
