"""Writing a torch Distributed Checkpoint, by `torch.distributed.checkpoint` itself.

Torch's writer fetches whole tensors, in an order of its own; conversions give them in theirs, slice by slice and from
several threads. So they are first written as safetensors shards, in the hidden folder. Then torch packs one shard after
the other, from a map of it, as if each came from one rank of a job; a packed shard is removed.

Extra disk while it is written: one shard. Memory: pages of the tensor that is packed, which the system can take back.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from mapdsl.checkpoint.dcp_metadata import DATA_SUFFIX, METADATA_FILE
from mapdsl.checkpoint.dtypes import torch_dtype, torch_shape
from mapdsl.checkpoint.gathering import Pieces
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.journal import WORK_PREFIX, Journal
from mapdsl.checkpoint.layout import MAX_SHARD_BYTES, Entry, FileLayout, disk_needed
from mapdsl.checkpoint.progress import Meter, Reporter
from mapdsl.checkpoint.rawbytes import buffer
from mapdsl.checkpoint.sources import check_disk
from mapdsl.checkpoint.tensors import map_file
from mapdsl.checkpoint.writer import CheckpointWriter

NOTES_FILE = f"{WORK_PREFIX}packed"
"""Says which shards are packed, while the folder has not yet its name."""


class DcpWriter(CheckpointWriter):
    """A `CheckpointWriter` whose folder is a torch Distributed Checkpoint.

    The state dict is flat: `dcp.load` gives tensors under their names, `dcp_to_torch_save` makes a file of them. Of the
    layout's shards each becomes `__N_0.distcp`; torch writes `.metadata`. Two runs write the same bytes.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        entries: Iterable[Entry] | None = None,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        layout: Sequence[FileLayout] | None = None,
        journal: Journal | None = None,
        beside_bytes: int = 0,
        reporter: Reporter | None = None,
    ) -> None:
        self._reporter = reporter or Reporter()
        options = {"max_shard_bytes": max_shard_bytes, "layout": layout, "journal": journal}
        options["beside_bytes"] = beside_bytes
        super().__init__(destination, entries, metadata={}, write_index=False, **options)  # type: ignore[arg-type]

    keeps_headers = False

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The names of the files that hold tensors."""
        return tuple(f"__{number}_0{DATA_SUFFIX}" for number in range(len(self.layout)))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """See `CheckpointWriter.write`; where an earlier run has packed the tensor already, nothing is to be done."""
        if not self._is_packed(name, tensor):
            super().write(name, tensor)

    def gather(self, name: str, tensor: torch.Tensor, pieces: Pieces) -> None:
        """See `CheckpointWriter.gather` and `write`."""
        if not self._is_packed(name, tensor):
            super().gather(name, tensor, pieces)

    def _is_packed(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether an earlier run has packed a tensor; it is written then."""
        stored = self._places.get(name)
        if stored is None or stored.file.name not in self._taken_over:
            return False
        self._begun(name, tensor)
        self._written.add(name)
        return True

    @cached_property
    def _taken_over(self) -> set[str]:
        return set(self._packed())

    def _is_there(self, file: FileLayout) -> bool:
        return file.name in self._taken_over or super()._is_there(file)

    def _check_space(self) -> None:
        needed = disk_needed(self.layout, is_packed=True) + self._beside_bytes
        check_disk(self.destination, needed, "smaller shards (--max-shard-size) need less on the way")

    def _finish_files(self) -> None:
        """Pack the shards; torch's `.metadata` comes last."""
        try:
            self._pack()
        except RuntimeError as problem:  # torch's own, around what the file system said
            raise _system_error(problem) from problem
        self._files -= {file.name for file in self.layout}
        self._files |= {*self.weight_files, METADATA_FILE}

    def _pack(self) -> None:
        planners = [_ShardPlanner(self._folder, file) for file in self.layout]
        plans: list[SavePlan] = []
        for number, planner in enumerate(planners):
            planner.set_up_planner(planner.outlines(), is_coordinator=number == 0)
            plans.append(planner.create_local_plan())
        writer = _Writer(self._folder, thread_count=1, per_thread_copy_ahead=0, sync_files=False, overwrite=False)
        writer.set_up_storage_writer(is_coordinator=True)
        (self._folder / METADATA_FILE).unlink(missing_ok=True)  # of a run that was killed just before its end
        plans = [writer.prepare_local_plan(plan) for plan in plans]
        plans, metadata = planners[0].create_global_plan(plans)
        plans = writer.prepare_global_plan(plans)
        with self._reporter.meter("packing", sum(file.size for file in self.layout)) as meter:
            results = self._pack_shards(writer, planners, plans, meter)
        writer.finish(metadata, results)

    def _pack_shards(
        self, writer: _Writer, planners: Sequence[_ShardPlanner], plans: Sequence[SavePlan], meter: Meter
    ) -> list[list[WriteResult]]:
        """Pack the shards that no earlier run has packed."""
        packed, results = self._packed(), []
        for planner, plan, file, name in zip(planners, plans, self.layout, self.weight_files, strict=True):
            if file.name in packed:
                meter.skip(file.size)
            else:
                found = writer.write_data(planner.finish_plan(plan), planner).value()
                planner.close()
                packed[file.name] = _places(found, name)
                self._note(file, packed[file.name])
                meter(file.size)
            (self._folder / file.name).unlink(missing_ok=True)
            # Made anew, so that a run that was gone on with pickles what another would.
            results.append([_result(item, name, packed[file.name]) for item in plan.items])
        return results

    def _note(self, file: FileLayout, places: Mapping[str, tuple[int, int]]) -> None:
        """Note that a shard is packed, and where its tensors are now."""
        with (self._folder / NOTES_FILE).open("ab") as notes:
            notes.write(json.dumps([file.name, places]).encode() + b"\n")

    def _packed(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Where the tensors of the shards are that an earlier run has packed; a line that was cut off says nothing."""
        path = self._folder / NOTES_FILE
        if not path.exists():
            return {}
        data = path.read_bytes()
        lines = data.split(b"\n")[:-1]
        os.truncate(path, sum(len(line) + 1 for line in lines))
        return dict(map(json.loads, lines))


def _places(results: Sequence[WriteResult], name: str) -> dict[str, tuple[int, int]]:
    """Where torch's writer put the tensors of a file."""
    if any(found.storage_data.relative_path != name for found in results):
        raise AssertionError(f"torch named a file {results[0].storage_data.relative_path}, expected {name}")
    return {found.index.fqn: (found.storage_data.offset, found.storage_data.length) for found in results}


def _result(item: WriteItem, file: str, places: Mapping[str, tuple[int, int]]) -> WriteResult:
    """What torch's writer said of a tensor."""
    begin, length = places[item.index.fqn]
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(file, begin, length))


class _Writer(FileSystemWriter):
    """Torch's writer, that says nothing of this machine."""

    def storage_meta(self) -> StorageMeta | None:
        """No path, no number that another run would not have."""
        return StorageMeta()


class _ShardPlanner(DefaultSavePlanner):
    """Plans for the tensors of one shard, and gives them from a map of it."""

    def __init__(self, folder: Path, file: FileLayout) -> None:
        super().__init__()
        self._tensors: Mapping[str, StoredTensor] = {
            tensor.name: replace(tensor, file=folder / file.name) for tensor in file.tensors
        }
        self._pages: mmap.mmap | None = None
        self._given: tuple[StoredTensor, torch.Tensor] | None = None

    def outlines(self) -> dict[str, torch.Tensor]:
        """Meta tensors, from which a plan is made."""
        return {name: _empty(tensor, "meta") for name, tensor in self._tensors.items()}

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """One tensor, in a storage of just its size: torch would copy others."""
        self._release()
        stored = self._tensors[index.fqn]
        if not stored.nbytes:
            return _empty(stored, "cpu")
        if self._pages is None:
            self._pages = map_file(stored)
        if self._pages is None:
            tensor = _read(stored)
        else:
            tensor = torch.frombuffer(self._pages, dtype=torch.uint8, count=stored.nbytes, offset=stored.begin)
        self._given = (stored, tensor)
        return tensor.view(torch_dtype(stored.dtype)).view(torch_shape(stored.dtype, stored.shape))

    def close(self) -> None:
        """Let go of the shard."""
        self._release()
        self._pages = None

    def _release(self) -> None:
        """Give back the memory of the last tensor: torch keeps all of a file's tensors until the file is written."""
        if self._given is None:
            return
        stored, tensor = self._given
        self._given = None
        if self._pages is None:
            tensor.untyped_storage().resize_(0)
        elif hasattr(mmap, "MADV_DONTNEED"):
            begin = stored.begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_DONTNEED, begin, stored.end - begin)


def _empty(stored: StoredTensor, device: str) -> torch.Tensor:
    return torch.empty(torch_shape(stored.dtype, stored.shape), dtype=torch_dtype(stored.dtype), device=device)


def _system_error(problem: BaseException) -> OSError:
    """The failure of the file system that led to an error; the error's first line if there was none."""
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return OSError(0, str(problem).split("\n")[0])


def _read(stored: StoredTensor) -> torch.Tensor:
    """A tensor's bytes in fresh memory, where the system maps no file of that size."""
    tensor = torch.empty(stored.nbytes, dtype=torch.uint8)
    with stored.file.open("rb") as file:
        file.seek(stored.begin)
        file.readinto(buffer(tensor))
    return tensor
