"""What a conversion is of: what must be the same for a run to go on where another ended."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mapdsl.checkpoint.layout import FileLayout
    from mapdsl.checkpoint.passes import Plan

FOLLOWING = ("what mapdsl makes of it", "the size of shards")
"""What other changes bring along."""


def identity_of(plan: Plan, layout: Sequence[FileLayout]) -> dict[str, str]:
    """Hashes, by what they are of: a journal keeps them, ranks compare them. The source is one with files."""
    request, checkpoint = plan.request, plan.request.checkpoint
    places = [(tensor.name, tensor.dtype, tensor.shape, tensor.begin) for tensor in checkpoint.tensors.values()]
    states = [(name, os.stat(checkpoint.folder / name)) for name in sorted(checkpoint.files)]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    options = (plan.to_right, str(request.dtype), request.quantize, request.use_complement, request.format)
    found = {
        "the source": (str(checkpoint.path.resolve()), places, files),
        "the map": request.map_hash,
        "the config, or a param,": (plan.config_text, sorted((name, repr(v)) for name, v in request.params.items())),
        "an option": (options, request.rank, plan.side is not None),
        "what mapdsl makes of it": (sorted(plan.units.of_source.items()), sorted(plan.units.of_output.items())),
        "the size of shards": [hashlib.sha256(file.header).hexdigest() for file in layout],
    }
    return {what: hashlib.sha256(repr(value).encode("utf-8")).hexdigest() for what, value in found.items()}
