"""What codecs keep, given back while a conversion still runs: the side file that is not yet written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.dtypes import dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.passes import Plan, run_plan
from mapdsl.checkpoint.rawbytes import buffer
from mapdsl.checkpoint.sidecar import Entry, Origin, SideFile, SideWriter, WriteOnly
from mapdsl.checkpoint.window import Window
from mapdsl.runtime.codecs.kept import Kept


class _Outlines(WriteOnly):
    """What will be kept of each tensor, by a pass over meta tensors: forms, of which few are different."""

    def __init__(self) -> None:
        self.forms: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def __setitem__(self, name: str, entry: Entry) -> None:
        alternative, kept = entry
        form: dict[str, Any] = {"alternative": alternative}
        if kept is not None:
            parts = {role: (dtype_name(part.dtype), stored_shape(part)) for role, part in kept.to_tensors().items()}
            form |= {"kept": kept.to_meta(), "parts": parts}
        text = json.dumps(form)
        self.forms[name] = self._texts.setdefault(text, text)


class LiveSide(SideFile):
    """A side file in the making, for the way back of units that are converted: see `SideFile`.

    What is kept is read from the files where `writer` has put it, and held against its checksum. Of tensors that are
    not converted yet there are outlines, without data.
    """

    def __init__(self, plan: Plan, writer: SideWriter) -> None:  # nothing is opened: there is no file yet
        outlines = _Outlines()
        run_plan(plan, Window(plan.request.checkpoint, device="meta"), _ignore, plan.on_meta, outlines)
        complement = plan.adapter.complement
        self.path = Path()
        self.is_meta = False
        self.layout = []
        self.origin = Origin(plan.request.map.checked.map.name, plan.request.map_hash, dict(plan.request.params))
        self.found, self.spelled = dict(complement.found), dict(complement.spelled)
        self.decoded = dict(complement.decoded)
        self._stored = {}
        self._forms_of = outlines.forms
        self._writer = writer

    def entry(self, name: str, *, is_meta: bool) -> Entry:
        """See `SideFile.entry`."""
        return self._outline(name) if is_meta else self._kept(name)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether what is kept of some tensors is there: an earlier run may have converted them and kept nothing."""
        return self._writer.holds(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms_of)

    def __len__(self) -> int:
        return len(self._forms_of)

    def _outline(self, name: str) -> Entry:
        form = json.loads(self._forms_of[name])
        if "kept" not in form:
            return form["alternative"], None
        parts = {role: _empty(dtype, shape, "meta") for role, (dtype, shape) in form["parts"].items()}
        return form["alternative"], Kept.from_tensors(parts, form["kept"])

    def _kept(self, name: str) -> Entry:
        ((_, text, check, spooled),) = self._writer.record([name])
        form = json.loads(text)
        if "kept" not in form:
            return form["alternative"], None
        tensors = {role.rpartition("|")[2]: self._read(width, *place) for width, role, *place in spooled}
        found = 0
        for role in form["roles"]:
            found = zlib.crc32(buffer(tensors[role]), found)
        if found != check:
            message = f"what is kept of `{name}` has checksum {found:08x} on disk, expected {check:08x}"
            raise bad_file(
                self._writer.spool_path(0, 0).parent, message, "convert again; if it comes again, look at the disk"
            )
        tensors |= {role: _empty(dtype, shape, "cpu") for role, (dtype, shape) in form["empty"].items()}
        return form["alternative"], Kept.from_tensors(tensors, form["kept"])

    def _read(self, width: int, rank: int, dtype: str, shape: list[int], begin: int, nbytes: int) -> Tensor:
        tensor, path = _empty(dtype, shape, "cpu"), self._writer.spool_path(width, rank)
        try:
            with path.open("rb") as file:
                file.seek(begin)
                if file.readinto(buffer(tensor)) != nbytes:
                    raise OSError(0, f"{path.name} is cut short")
        except OSError as problem:
            raise bad_file(path, f"cannot read what was kept: {reason(problem)}") from problem
        return tensor


def _empty(dtype: str, shape: list[int], device: str) -> Tensor:
    return torch.empty(torch_shape(dtype, tuple(shape)), dtype=torch_dtype(dtype), device=device)


def _ignore(name: str, tensor: Tensor) -> None:
    """Outputs of the pass over meta tensors go nowhere."""
