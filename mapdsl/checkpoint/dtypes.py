"""Dtype names of safetensors and of torch, and the shapes that torch gives to packed elements."""

from __future__ import annotations

import torch

from mapdsl.checkpoint.headers import BITS, TORCH_SPELLINGS
from mapdsl.language.diagnostics import error

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, spelling) for name, spelling in TORCH_SPELLINGS.items() if hasattr(torch, spelling)
}
"""Safetensors' dtype names to torch's dtypes, as far as this torch has them."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The same table, the other way."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; a MapError, C504, where torch has none (`F6_E2M3`)."""
    if name in TORCH_DTYPES:
        return TORCH_DTYPES[name]
    spelling = TORCH_SPELLINGS.get(name)
    if spelling:
        raise error("C504", f"this torch, {torch.__version__}, has no {spelling} for {name}", help="update torch")
    known = "torch has no such dtype" if name in BITS else f"expected one of {', '.join(BITS)}"
    raise error("C504", f"there is no tensor of dtype {name}: {known}")


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a torch dtype; a MapError, C504, where it has none (`complex128`, quantized ints)."""
    if dtype in DTYPE_NAMES:
        return DTYPE_NAMES[dtype]
    raise error("C504", f"safetensors has no dtype for {dtype}", help=f"convert to one of {', '.join(TORCH_SPELLINGS)}")


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives to a stored shape: of F4, two elements make one of torch's, along the last axis.

    A MapError, C503, where an F4 tensor has no last axis of even size.
    """
    if dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise error("C503", f"torch holds F4 in pairs along the last axis, which shape {list(shape)} cannot give")
    return (*shape[:-1], shape[-1] // 2)


def stored_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that a header gives to a tensor; the inverse of `torch_shape`."""
    shape = tuple(tensor.shape)
    if dtype_name(tensor.dtype) == "F4" and shape:
        return (*shape[:-1], shape[-1] * 2)
    return shape
