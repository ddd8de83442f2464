"""What was asked for, checked: the options of `convert`, `plan` and `verify`, before and after there is a plan."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.direction import choose_plan
from mapdsl.checkpoint.layout import FileLayout, plan_layout, shared_metadata
from mapdsl.checkpoint.passes import OptionError, Plan, Request, float_dtype, outputs_of
from mapdsl.map import Map, load

FORMATS = ("safetensors", "dcp")
"""What checkpoints are written as."""

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) *(?:([KMGT])(i?)B)?", re.IGNORECASE)


def make_request(
    map: Map | str | os.PathLike[str],  # noqa: A002 (as `convert` has it)
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    quantize: bool = False,
    params: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    use_complement: bool = True,
    format: str = "safetensors",  # noqa: A002 (as `convert` has it)
) -> Request:
    """What is to be converted, and how. OptionError for a value that an option does not have."""
    if format not in FORMATS:
        raise OptionError(f"a checkpoint is written as one of {', '.join(FORMATS)}, not {format!r:.80}")
    return Request(
        map if isinstance(map, Map) else load(map),
        checkpoint,
        float_dtype(dtype),
        quantize,
        dict(params or {}),
        config if config is None or isinstance(config, Mapping) else Path(config),
        use_complement and checkpoint.shares is None,  # what was kept of other tensors than these fits nothing
        format,
        None if checkpoint.shares is None else checkpoint.shares.rank,
    )


def checked_plan(request: Request, to: str | None) -> Plan:
    """The plan of a conversion that writes. OptionError for an option that means nothing for its direction."""
    plan = choose_plan(request, to)
    check_direction(plan)
    return plan


def check_direction(plan: Plan) -> None:
    """OptionError for an option that means nothing for the direction of a plan."""
    left, right = plan.request.sides
    if plan.to_right and plan.request.quantize:
        raise OptionError(f"--quantize is for the way to {left}; this goes to {right}, where nothing is quantised")
    if not plan.to_right and plan.request.dtype is not None:
        raise OptionError(f"--dtype is for the way to {right}, where tensors are decoded; this goes to {left}")


def planned_layout(plan: Plan, shard_bytes: int) -> list[FileLayout]:
    """The files to be written: those that were read once, where the side file has them; else new ones."""
    if plan.restored:
        return plan.restored
    metadata = shared_metadata(plan.request.checkpoint)
    return plan_layout(outputs_of(plan, {}), max_shard_bytes=shard_bytes, metadata=metadata)


def size_in_bytes(text: int | str, what: str = "a shard's size") -> int:
    """`5GB`, `500 MB`, `2GiB` or a number of bytes; OptionError where it is none of these."""
    found = _SIZE.fullmatch(str(text).strip())
    if found is None:
        raise OptionError(f"{what} is a number of bytes, or one such as 500MB or 2GiB, not {str(text)[:80]!r}")
    number, unit, binary = found.groups()
    exponent = " KMGT".index(unit.upper()) if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** exponent)
    if not size:
        raise OptionError(f"{what} is one byte at least")
    return size


def memory_bound(asked: int | str | None) -> int | None:
    """The bytes that outputs under way may take, if somebody says so. OptionError where it is no size."""
    return None if asked is None else size_in_bytes(asked, "--memory")


def worker_count(asked: int | None) -> int:
    """How many workers to have: by default as many as torch has threads. OptionError for none."""
    if asked is not None and asked < 1:
        raise OptionError("--workers is 1 or more")
    return asked or torch.get_num_threads()
