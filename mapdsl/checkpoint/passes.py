"""The two passes of a conversion: one over meta tensors, which finds every output and every error of names and shapes
before data is touched, and one over the tensors themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.dtypes import dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.files import parse_object, read_text
from mapdsl.checkpoint.layout import Entry, FileLayout
from mapdsl.checkpoint.sidecar import SIDE_FILE, Forgetful, Origin, SideFile
from mapdsl.checkpoint.window import Window
from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError, error
from mapdsl.language.syntax import parse
from mapdsl.language.unparse import unparse_header, unparse_statement
from mapdsl.map import Map
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.errors import ConversionError

_HELP = {
    "R607": "convert without the side file (--no-complement): scales are then computed anew",
    "N115": "give the config of the stored side with --config, or the param with --param",
}
# What `mapdsl check --against` looks for: names and sizes.
_LISTED = ("R603", "R605", "R606", "X305")


def _meaning(file: tree.File) -> str:
    """The statements that say how tensors move, in canonical spelling, in the order of their texts."""
    held = (statement for statement in file.statements if not isinstance(statement, (tree.Example, tree.Law)))
    header = [unparse_header(file.header)] if file.header is not None else []
    return "\n".join([*header, *sorted(map(unparse_statement, held))])


class OptionError(ValueError):
    """An option that means nothing for the direction of the conversion."""


@dataclass(frozen=True)
class Request:
    """What is to be converted, and how."""

    map: Map
    checkpoint: Checkpoint
    dtype: torch.dtype | None = None
    quantize: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    config: Path | Mapping[str, Any] | None = None
    use_complement: bool = True

    @property
    def sides(self) -> tuple[str, str]:
        """The names of the left side and the right one."""
        return self.map.checked.map.left, self.map.checked.map.right

    @cached_property
    def map_hash(self) -> str:
        """A digest of what the map and those that it includes say: comments, layout and order are not part of it."""
        resolved = self.map.checked.map
        included = {rule.span.source.text: rule.span.source for rule in resolved.rules}
        included.pop(self.map.source.text, None)
        texts = [_meaning(resolved.file), *sorted(_meaning(parse(source)) for source in included.values())]
        return hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()

    def side_file(self) -> SideFile | None:
        """The side file beside the checkpoint's files, if there is one and it is wanted.

        Raises a MapError: C507 where it is damaged, R607 where it was made with another map or for other tensors.
        """
        path = self.checkpoint.folder / SIDE_FILE
        if not self.use_complement or not path.exists():
            return None
        side = SideFile(path)
        if side.origin.map_hash != self.map_hash:
            same = side.origin.map_name == self.map.checked.map.name
            message = f"it was made with another {'version of ' * same}map `{side.origin.map_name}`"
            advice = f"use {'the map as it was then' if same else 'that map'}, or"
            message = f"the side file does not fit: {message}"
            raise error("R607", message, subject=str(path), help=f"{advice} {_HELP['R607']}")
        if found := sorted(set(side.origin.names) ^ self.checkpoint.tensors.keys()):
            where = "is not there" if found[0] in side.origin.names else "was not there then"
            message = f"it was made with {len(side.origin.names):,} tensors, found {len(self.checkpoint.tensors):,}"
            message = f"the side file is of another checkpoint: {message}; `{found[0]}` {where}"
            raise error("R607", message, subject=str(path), help=_HELP["R607"])
        return side


@dataclass
class Plan:
    """What a conversion in one direction will write, as the pass over meta tensors found it.

    `entries` are the adapter's outputs in the order in which they will come, `dropped` the tensors that no output comes
    from. `config_text` is the config of the left side's checkpoint. `restored` are the source's own headers where the
    side file has them and they fit, `misfit` says why they do not.
    """

    request: Request
    to_right: bool
    adapter: Adapter
    config_text: str | None
    side: SideFile | None
    entries: list[Entry] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    restored: list[FileLayout] | None = None
    misfit: str = ""

    def name_of(self, output: str) -> str:
        """The name under which an output is written: of a restored layout, the legacy spelling that was read."""
        if self.restored is not None and self.side is not None:
            return self.side.spelled.get(output, output)
        return output


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
        raise _noted(problem, f"{count} are those of the {side} side: did you mean --to {other}?") from None


def _noted(problem: MapError, note: str) -> MapError:
    """The same error, with one more line of help."""
    *others, last = problem.diagnostics
    return MapError([*others, replace(last, help="\n".join([last.help, note]).strip())])


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
    return _noted(errors[way], note)


def _hits(request: Request, *, to_right: bool) -> int:
    """How many of the checkpoint's names are among those that the map and the config give to the side it would be."""
    with contextlib.suppress(MapError, ConversionError):
        adapter, _ = _adapter(request, None if to_right else _fitting(request))
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


def make_plan(request: Request, *, to_right: bool) -> Plan:
    """Run the conversion over meta tensors. Raises a MapError for whatever speaks against it."""
    side = None if to_right else request.side_file()
    adapter, text = _adapter(request, side)
    plan = Plan(request, to_right, adapter, text, side)
    made: dict[str, tuple[str, tuple[int, ...]]] = {}

    def sink(name: str, tensor: Tensor) -> None:
        made[name] = (dtype_name(tensor.dtype), stored_shape(tensor))

    def read_back(name: str) -> Tensor:
        dtype, shape = made[name]
        return torch.empty(torch_shape(dtype, shape), dtype=torch_dtype(dtype), device="meta")

    state = Window(request.checkpoint, device="meta")
    if side is not None:
        side.is_meta = True
    try:
        run_plan(plan, state, sink, read_back, side if side is not None else Forgetful())
    except MapError as problem:
        if not to_right:
            raise
        raise _with_overview(problem, request) from None
    plan.entries = [(name, dtype, shape) for name, (dtype, shape) in made.items()]
    plan.dropped = [name for name in request.checkpoint.tensors if name not in state.asked]
    if side is not None:
        _restore_layout(plan, side)
        side.is_meta = False
    return plan


def _with_overview(problem: MapError, request: Request) -> MapError:
    """The error with the command that lists, at once, all of the checkpoint that the map does not fit."""
    if problem.diagnostics[-1].code not in _LISTED:
        return problem
    words = ["mapdsl", "check", request.map.source.path, "--against", str(request.checkpoint.path)]
    words += ["--config", str(request.config)] if isinstance(request.config, Path) else []
    for name, value in request.params.items():
        words += ["--param", f"{name}={json.dumps(value, default=str)}"]
    return _noted(problem, f"all that does not fit is listed by: {shlex.join(words)}")


def run_plan(
    plan: Plan,
    state: Window,
    sink: Callable[[str, Tensor], None],
    read_back: Callable[[str], Tensor],
    entries: MutableMapping[str, Any],
) -> None:
    """Run the conversion once, over meta tensors or real ones; `entries` are those of the adapter's complement."""
    request, adapter, complement = plan.request, plan.adapter, plan.adapter.complement
    complement.entries, complement.right = entries, Forgetful()
    if plan.side is not None:
        complement.decoded = dict(plan.side.decoded)
    with _placing(request.checkpoint):
        if plan.to_right:
            adapter.read_into(state, sink, read_back, dtype=request.dtype or torch.bfloat16)
        else:
            quantization = request.quantize or plan.side is not None
            adapter.write_into(state, sink, read_back, quantization=quantization)


def _adapter(request: Request, side: SideFile | None) -> tuple[Adapter, str | None]:
    """The adapter, and the text of the config that it was made for."""
    checkpoint = request.checkpoint
    path: Path | str = checkpoint.folder / "config.json"
    fields: Mapping[str, Any] | None = None
    text: str | None = None
    if isinstance(request.config, Mapping):
        fields, text, path = request.config, json.dumps(request.config, indent=2) + "\n", "config"
    elif request.config is not None:
        path = request.config / "config.json" if request.config.is_dir() else request.config
        text = read_text(path, "config")
    elif side is not None and side.origin.config_text is not None:
        path, text = side.path, side.origin.config_text
    elif Path(path).exists():
        text = read_text(Path(path), "config")
    else:
        path = checkpoint.path
    if fields is None and text is not None:
        fields = parse_object(Path(path), text, "config", lenient=True)
    known = {} if side is None else {**side.found, **side.origin.params}
    params = {**known, **request.params}
    try:
        return request.map.adapter(fields, **params), text
    except ConversionError as problem:
        raise _error(problem, path) from problem


def _restore_layout(plan: Plan, side: SideFile) -> None:
    """Take the source's own headers if they hold just what will be written; say why not otherwise."""
    if not side.layout:
        plan.misfit = "the checkpoint that was read had no safetensors files"
        return
    there = {tensor.name: (tensor.dtype, tensor.shape) for file in side.layout for tensor in file.tensors}
    for name, dtype, shape in outputs_of(plan, side.spelled):
        expected = there.pop(name, None)
        if expected is None:
            plan.misfit = f"tensor `{name}` was not there"
        elif expected != (dtype, tuple(shape)):
            found, was = f"{dtype} {list(shape)}", f"{expected[0]} {list(expected[1])}"
            plan.misfit = f"tensor `{name}` is now {found}, it was {was}"
        if plan.misfit:
            return
    if there:
        plan.misfit = f"tensor `{next(iter(there))}` is no longer there"
        return
    plan.restored = side.layout


def outputs_of(plan: Plan, spelled: Mapping[str, str]) -> Iterator[Entry]:
    """Name, dtype and shape of everything to be written: the adapter's outputs, and what was kept as it was stored."""
    for name, dtype, shape in plan.entries:
        yield spelled.get(name, name), dtype, shape
    if plan.side is not None:
        was_meta, plan.side.is_meta = plan.side.is_meta, True
        for name in plan.side.stored_names:
            tensor = plan.side.stored(name)
            yield name, dtype_name(tensor.dtype), stored_shape(tensor)
        plan.side.is_meta = was_meta


def origin_of(plan: Plan, headers: dict[str, str], index: tuple[str, str] | None) -> Origin:
    """What the side file of a conversion to the right side says of where it comes from."""
    request = plan.request
    return Origin(
        map_name=request.map.checked.map.name,
        map_hash=request.map_hash,
        params=dict(request.params),
        names=[name for name, _, _ in plan.entries],
        headers=headers,
        index_name=index[0] if index else None,
        index_text=index[1] if index else "",
        config_text=plan.config_text,
    )


@contextlib.contextmanager
def _placing(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns an error of the runtime into one that also names the file."""
    try:
        yield
    except ConversionError as problem:
        raise _error(problem, _file_in(problem.message, checkpoint)) from problem
    except RuntimeError as problem:
        if "allocate memory" not in str(problem):
            raise
        message = "there is not enough memory for one group of tensors"
        raise error("C507", message, subject=str(checkpoint.path), help=str(problem).split("\n")[0]) from problem


def _error(problem: ConversionError, place: Path | str) -> MapError:
    at_work = f"the rule at work, with its line in the map: {problem.rule}" if problem.rule else ""
    advice = "\n".join(filter(None, (at_work, _HELP.get(problem.code, ""))))
    return error(problem.code, problem.message, subject=str(place), help=advice)


def _file_in(message: str, checkpoint: Checkpoint) -> Path:
    """The file of the first stored tensor that a message names; the checkpoint's path if it names none."""
    for word in message.replace("`", " ").split():
        stored = checkpoint.tensors.get(word) or checkpoint.tensors.get(word.rstrip(",:;."))
        if stored is not None and stored.file.name:
            return stored.file
    return checkpoint.path
