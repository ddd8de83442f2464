"""A checkpoint that a conversion writes, seen as the source of the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.files import parse_object
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.passes import Plan, Request, adapter_of, outputs_of, run_plan
from mapdsl.checkpoint.sidecar import Entry, Forgetful, SideFile
from mapdsl.checkpoint.window import PlanningWindow
from mapdsl.compiler import ir

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FoundFormats(Forgetful):
    """The `entries` of a complement, of which only this is noted: the format of each tensor that is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: dict[str, str] = {}

    def __setitem__(self, name: str, entry: Entry) -> None:
        if entry[1] is not None:
            self.formats[name] = entry[0]


@dataclass(frozen=True)
class BackRequest(Request):
    """What is to be converted back, with a side file that the caller has (None: there is none)."""

    side: SideFile | None = None

    def side_file(self) -> SideFile | None:
        """The caller's side file: none is looked for on disk."""
        return self.side


def written_checkpoint(layout: list[FileLayout] | tuple[FileLayout, ...], folder: Path) -> Checkpoint:
    """The checkpoint that lies, or will, in files of a folder; nothing is read."""
    tensors = [replace(tensor, file=folder / file.name) for file in layout for tensor in file.tensors]
    names = tuple(file.name for file in layout)
    return Checkpoint(folder, "safetensors", {tensor.name: tensor for tensor in tensors}, files=names)


def back_request(
    plan: Plan, checkpoint: Checkpoint, side: SideFile | None = None, dtype: torch.dtype | None = None
) -> BackRequest:
    """The request to convert what a plan writes back again."""
    request = plan.request
    config: Any = request.config
    if plan.config_text is not None and not isinstance(config, dict):
        config = parse_object(request.checkpoint.path, plan.config_text, "config", lenient=True)
    params = dict(request.params)
    if plan.side is not None:  # as `adapter_of` has it
        params = {**plan.side.found, **plan.side.origin.params, **params}
    return BackRequest(
        request.map,
        checkpoint,
        dtype=dtype or request.dtype,
        params=params,
        config=config,
        use_complement=side is not None,
        rank=request.rank,
        side=side,
    )


def written_formats(plan: Plan) -> dict[str, str]:
    """The format of each tensor that a plan to the left side encodes, by name, as reading them again finds it.

    Raises a MapError where they cannot be read.
    """
    folder = plan.request.checkpoint.folder
    tensors = _outlines(plan)
    checkpoint = Checkpoint(folder, "listing", tensors)
    request = back_request(plan, checkpoint)
    adapter, text = adapter_of(request, None)
    made: dict[str, Tensor] = {}
    found = FoundFormats()
    back = Plan(request, True, adapter, text, None)
    run_plan(back, PlanningWindow(checkpoint), made.__setitem__, made.__getitem__, found)
    return found.formats


def declared_formats(resolved: ir.Map) -> dict[str, ir.CodecSpec | None]:
    """The formats that the rules of a map speak of, by name; None for a name that two of them have."""
    found: dict[str, ir.CodecSpec | None] = {}
    for rule in resolved.rules:
        for tensor in (*rule.left, *rule.right):
            for codec in tensor.codecs:
                if found.setdefault(codec.name, codec) != codec:
                    found[codec.name] = None
    return found


def _outlines(plan: Plan) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name, dtype, tuple(shape)) for name, dtype, shape in outputs_of(plan, {})}


def common_dtype(back: Plan, source: Checkpoint) -> torch.dtype | None:
    """The dtype that decoded tensors had, where that is not the one that was planned for."""
    found: set[str] = set()
    for name, dtype, shape in back.entries:
        stored = source.tensors.get(name)
        if stored is not None and stored.dtype != dtype and tuple(stored.shape) == tuple(shape):
            found.add(stored.dtype)
    return _FLOATS.get(found.pop()) if len(found) == 1 else None
