"""Which way a checkpoint is to be converted: asked for, or found by its names."""

from __future__ import annotations

import contextlib

from mapdsl.checkpoint.passes import OptionError, Plan, Request, adapter_of, make_plan, noted
from mapdsl.checkpoint.sidecar import SideFile
from mapdsl.language.diagnostics import MapError, error
from mapdsl.runtime.errors import ConversionError


def choose_plan(request: Request, to: str | None) -> Plan:
    """The plan for the side that is asked for, else for the one whose names the checkpoint does not hold.

    Raises a MapError: whatever speaks against the conversion; where no side is asked for, C501 if neither side's names
    are there, D407 if both are.
    """
    sides = request.sides
    if to is not None:
        if to not in sides:
            raise OptionError(f"the map has the sides {sides[0]} and {sides[1]}, and no `{to}`")
        return _asked_plan(request, to_right=to == sides[1])
    plans: list[Plan] = []
    errors: dict[bool, MapError] = {}
    for to_right in (True, False):
        try:
            plans.append(make_plan(request, to_right=to_right))
        except MapError as problem:
            errors[to_right] = problem
    if len(plans) == 1:
        return plans[0]
    if plans:
        message = f"the names are those of {sides[0]} and of {sides[1]} as well"
        advice = f"say where to go: --to {sides[0]}, or --to {sides[1]}"
        raise error("D407", message, subject=str(request.checkpoint.path), help=advice)
    raise _neither(request, errors)


def _asked_plan(request: Request, *, to_right: bool) -> Plan:
    """The plan for a side that was asked for; where it fails on a checkpoint of that very side, a note says so."""
    try:
        return make_plan(request, to_right=to_right)
    except MapError as problem:
        there, here = (_hits(request, to_right=way) for way in (not to_right, to_right))
        if there <= here:
            raise
        side, other = request.sides[to_right], request.sides[not to_right]
        count = f"{there:,} of its {len(request.checkpoint.tensors):,} names"
        raise noted(problem, f"{count} are those of the {side} side: did you mean --to {other}?") from None


def _neither(request: Request, errors: dict[bool, MapError]) -> MapError:
    """The error of the side that the checkpoint looks most like; a general one if it looks like neither."""
    if errors[True] == errors[False]:  # of the config, say, which has nothing to do with sides
        return errors[True]
    (left, right), count = request.sides, len(request.checkpoint.tensors)
    hits = {to_right: _hits(request, to_right=to_right) for to_right in (True, False)}
    if hits[True] == hits[False]:
        reasons = [f"{side}: {errors[way].diagnostics[0].message}" for way, side in ((True, left), (False, right))]
        message = f"the {count:,} tensors are neither those of {left} nor those of {right}"
        return error("C501", message, subject=str(request.checkpoint.path), help="\n".join(reasons))
    way = hits[True] > hits[False]
    side = left if way else right
    if not hits[not way] and 2 * hits[way] >= count:
        return errors[way]
    note = f"this was taken for the {side} side, which has {hits[way]:,} of its {count:,} names; --to says otherwise"
    return noted(errors[way], note)


def _hits(request: Request, *, to_right: bool) -> int:
    """How many of the checkpoint's names are among those that the map and the config give to the side it would be."""
    with contextlib.suppress(MapError, ConversionError):
        adapter, _ = adapter_of(request, None if to_right else _fitting(request))
        listed: set[str] = set()
        for quantization in (True, False):
            listed |= (adapter.left_keys(quantization=quantization) if to_right else adapter.right_keys()).keys()
        return len(listed & request.checkpoint.tensors.keys())
    return 0


def _fitting(request: Request) -> SideFile | None:
    """The side file, if there is one and it fits."""
    try:
        return request.side_file()
    except MapError:
        return None
