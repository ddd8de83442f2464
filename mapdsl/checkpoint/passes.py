"""The two passes of a conversion: one over meta tensors, which finds every output and every error of names and shapes
before data is touched, and one over the tensors themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import Checkpoint, no_collection
from mapdsl.checkpoint.dtypes import dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.files import parse_object, read_text
from mapdsl.checkpoint.headers import LENGTH_BYTES
from mapdsl.checkpoint.layout import Entry, FileLayout, layout_of
from mapdsl.checkpoint.sidecar import SIDE_FILE, Forgetful, Origin, SideFile
from mapdsl.checkpoint.units import Units
from mapdsl.checkpoint.window import PlanningWindow, Window
from mapdsl.language import tree
from mapdsl.language.diagnostics import MapError, error
from mapdsl.language.syntax import parse
from mapdsl.language.unparse import unparse_header, unparse_statement
from mapdsl.map import Map
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs import formats
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.dtensors import Rank
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.sharded_adapter import ShardedAdapter

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


class _Counting(Forgetful):
    """Forgets what is kept, but for its size and the formats that it was found in."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.formats: dict[str, str] = {}
        self._last: tuple[Kept | None, int] = None, 0

    def __setitem__(self, name: str, entry: Any) -> None:
        codec, kept = entry
        if kept is not None:
            if kept is not self._last[0]:  # of tensors that are alike it is the same
                self._last = kept, kept.nbytes
            self.formats[name] = codec
            self.nbytes += self._last[1]


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
    format: str = "safetensors"  # of the files to be written; or "dcp"
    rank: Rank | None = None  # the one whose share it is, of both sides

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
    from, `units` what can be converted apart, `kept_bytes` what the codecs keep, at least, and
    `formats` that of each decoded tensor. `config_text` is the config of the left side's checkpoint.
    `restored` are the source's own headers where the side file has them and they fit, `misfit` says why they do not.
    """

    request: Request
    to_right: bool
    adapter: Adapter
    config_text: str | None
    side: SideFile | None
    entries: list[Entry] = field(default_factory=list)
    units: Units = field(default_factory=Units)
    kept_bytes: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    restored: list[FileLayout] | None = None
    misfit: str = ""

    @cached_property
    def forms(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape, as tensors have them, of each output of the adapter."""
        return {name: (torch_dtype(dtype), torch_shape(dtype, tuple(shape))) for name, dtype, shape in self.entries}

    def nbytes(self, output: str) -> int:
        """The size of an output of the adapter."""
        dtype, shape = self.forms[output]
        return dtype.itemsize * math.prod(shape)

    def on_meta(self, output: str) -> Tensor:
        """An output of the adapter without its data."""
        dtype, shape = self.forms[output]
        return torch.empty(shape, dtype=dtype, device="meta")

    def name_of(self, output: str) -> str:
        """The name under which an output is written: of a restored layout, the legacy spelling that was read."""
        if self.restored is not None and self.side is not None:
            return self.side.spelled.get(output, output)
        return output


def float_dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that decoded tensors are asked to have; OptionError where it is none of theirs."""
    found = formats.DTYPE_BY_NAME.get(asked) if isinstance(asked, str) else asked
    if asked is not None and found not in formats.FLOAT_DTYPES:
        words = ", ".join(formats.dtype_name(dtype) for dtype in formats.FLOAT_DTYPES)
        raise OptionError(f"tensors are decoded to one of {words}, not {asked}")
    return found


def header_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """The JSON text of each safetensors file's header, as a side file keeps them."""
    layout = layout_of(checkpoint) if checkpoint.kind == "safetensors" else []
    return {file.name: file.header[LENGTH_BYTES:].decode("utf-8") for file in layout}


def noted(problem: MapError, note: str) -> MapError:
    """The same error, with one more line of help."""
    *others, last = problem.diagnostics
    return MapError([*others, replace(last, help="\n".join([last.help, note]).strip())])


@no_collection()
def make_plan(request: Request, *, to_right: bool) -> Plan:
    """Run the conversion over meta tensors. Raises a MapError for whatever speaks against it."""
    side = None if to_right else request.side_file()
    adapter, text = adapter_of(request, side)
    plan = Plan(request, to_right, adapter, text, side)
    made: dict[str, tuple[str, tuple[int, ...]]] = {}

    state = PlanningWindow(request.checkpoint)

    def sink(name: str, tensor: Tensor) -> None:
        made[name] = (dtype_name(tensor.dtype), stored_shape(tensor))
        state.units.output(name, tensor)

    def read_back(name: str) -> Tensor:
        dtype, shape = made[name]
        state.units.read_back(name)
        return torch.empty(torch_shape(dtype, shape), dtype=torch_dtype(dtype), device="meta")

    if side is not None:
        side.is_meta = True
    try:
        kept = _Counting()
        run_plan(plan, state, sink, read_back, side if side is not None else kept)
    except MapError as problem:
        if not to_right:
            raise
        raise _with_overview(problem, request) from None
    plan.entries = [(name, dtype, shape) for name, (dtype, shape) in made.items()]
    plan.units, plan.kept_bytes, plan.formats = state.units.finish(), kept.nbytes, kept.formats
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
    return noted(problem, f"all that does not fit is listed by: {shlex.join(words)}")


def run_plan(
    plan: Plan,
    state: Window,
    sink: Callable[[str, Tensor], None],
    read_back: Callable[[str], Tensor],
    entries: MutableMapping[str, Any],
    adapter: Adapter | None = None,
) -> None:
    """Run the conversion once, over meta tensors or real ones; `entries` are those of the adapter's complement.

    `adapter` is by default the plan's own; each thread needs another.
    """
    request, adapter = plan.request, plan.adapter if adapter is None else adapter
    complement = adapter.complement
    complement.entries, complement.right = entries, Forgetful()
    if plan.side is not None:
        complement.decoded = dict(plan.side.decoded)
    with placing(request.checkpoint):
        if plan.to_right:
            adapter.read_into(state, sink, read_back, dtype=request.dtype or torch.bfloat16)
        else:
            quantization = request.quantize or plan.side is not None
            adapter.write_into(state, sink, read_back, quantization=quantization)


def another_adapter(plan: Plan) -> Adapter:
    """An adapter like the plan's."""
    return adapter_of(plan.request, plan.side)[0]


def adapter_of(request: Request, side: SideFile | None) -> tuple[Adapter, str | None]:
    """The adapter, and the text of the config that it was made for."""
    checkpoint = request.checkpoint
    path: Path | str = checkpoint.config_path
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
        adapter = request.map.adapter(fields, **params)
        return adapter if request.rank is None else at_rank(adapter, request.rank), text
    except ConversionError as problem:
        raise _error(problem, path) from problem


def at_rank(adapter: Adapter, rank: Rank) -> Adapter:
    """The adapter of one rank; ConversionError, N113, where the map has no mesh."""
    if not isinstance(adapter, ShardedAdapter):
        raise ConversionError("N113", f"the map `{adapter.MAP}` has no mesh, so nothing says how it is cut over ranks")
    one: Adapter = adapter.at(*rank)
    return one


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
def placing(checkpoint: Checkpoint) -> Iterator[None]:
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
