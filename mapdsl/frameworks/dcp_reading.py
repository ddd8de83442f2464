"""A checkpoint that a map reads, as torch Distributed Checkpoint reads one: into a model's own state, shards and all.

To torch the checkpoint has the names, shapes and dtypes of the model. Of each tensor every rank asks for what it holds;
where that lies in the stored tensors is told by links, and no other bytes are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from mapdsl.checkpoint.boxes import BoxReader
from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.frameworks.layouts import Block, slices
from mapdsl.frameworks.live import MissingTensorsError, dtype_of, stated
from mapdsl.frameworks.moves import Window, are_filled, fill
from mapdsl.frameworks.stored import decoded
from mapdsl.map import Map, load
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs.formats import FLOAT_DTYPES
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.errors import some_of
from mapdsl.runtime.links import Box, Link
from mapdsl.runtime.tracing import Target, Trace, trace


class MapStorageReader(StorageReader):
    """Reads the left side of a map as a checkpoint of its right side.

    `map` is a `Map`, a file or the name of a shipped one; `config` that of the checkpoint, by default its own
    `config.json`; `params` are params of the map by name. Tensors that are stored in a format are decoded to the
    dtype of the model's tensor, others are cast to it. `threads` tensors are read at a time.

    A state dict may ask for any part of the model. Raises MapError where the checkpoint cannot be opened, and
    ConversionError where its headers do not fit the map; while it is read, wrapped by torch in a CheckpointException:
    MapError where a file fails, MissingTensorsError where what a rank needs is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        map: Map | str | os.PathLike[str],  # noqa: A002 the word that users know
        config: Any = None,
        *,
        threads: int = 4,
        **params: Any,
    ) -> None:
        super().__init__()
        if threads < 1:
            raise ValueError(f"threads is 1 or more, not {threads}")
        self.map = map if isinstance(map, Map) else load(map)
        self.config, self.params = config, params
        self.threads = threads
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A read begins, of another checkpoint if one is given: its headers are read at once."""
        if checkpoint_id is None:
            return
        self.path = Path(checkpoint_id)
        checkpoint = open_checkpoint(self.path)
        config = checkpoint.config if self.config is None else self.config
        self._reading = _Reading(checkpoint, self.map.adapter(config, **self.params))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path of something that is there."""
        return os.path.exists(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The names, shapes and dtypes of the right side."""
        del args, kwargs
        reading = self._reading
        found = {name: _outline(target, reading.dtypes[name]) for name, target in reading.targets.items()}
        places = {
            MetadataIndex(name, torch.Size([0] * len(target.shape))): name for name, target in reading.targets.items()
        }
        return Metadata(dict(found), storage_data=places, storage_meta=StorageMeta(checkpoint_id=str(self.path)))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be set up: every rank reads headers for itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read, decode and place what the plan asks for."""
        reading = self._reading
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise bad_file(self.path, f"`{item.storage_index.fqn}` is no tensor: nothing else is stored")
        reading.check(plan.items)

        def read(item: ReadItem) -> None:
            target = planner.resolve_tensor(item).detach()
            reading.read(item, target)
            planner.commit_tensor(item, target)

        with BoxReader(reading.checkpoint) as reading.boxes, ThreadPoolExecutor(self.threads) as pool:
            for done in [pool.submit(read, item) for item in plan.items]:
                done.result()
        future: Future[None] = Future()
        future.set_result(None)
        return future


class _Reading:
    """A checkpoint, and what each tensor of the right side comes from."""

    boxes: BoxReader

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.state: Mapping[str, Tensor] = LazyState(checkpoint).meta()
        self.trace: Trace = trace(adapter, adapter.LEFT, self.state)
        self.targets: dict[str, Target] = self.trace.targets
        # What does not go together is told here: of an error in read_metadata torch tells half.
        self.dtypes = {name: dtype_of(self.trace, one, adapter.complement.right) for name, one in self.targets.items()}

    def check(self, items: list[ReadItem]) -> None:
        """Refuse to read anything where something that is needed is not there."""
        if not self.trace.lacking:
            return
        missing = []
        for item in items:
            box = _box(item)
            links = self.targets[item.storage_index.fqn].links()
            missing += [
                link.source for link in links if link.source in self.trace.lacking and link.within("target", box)
            ]
        if missing:
            names = sorted(set(missing))
            raise MissingTensorsError("R605", f"the checkpoint {self.checkpoint.path} lacks {some_of(names)}")

    def read(self, item: ReadItem, place: Tensor) -> None:
        """Fill a view of the model's memory with a box of one tensor."""
        target = self.targets[item.storage_index.fqn]
        box = _box(item)
        links = list(target.links())
        if not links:
            whole = stated(target, self.adapter.complement.right, place.device, place.dtype)
            place.copy_(whole[slices(box)])
            return
        dtype = self._dtype_for(place, target, links)
        is_direct = place.dtype == dtype and place.device.type == "cpu"
        made = place if is_direct else torch.empty(place.shape, dtype=dtype)
        if not are_filled(links, box):
            made.zero_()
        fill(made, [Block.alone(box)], links, partial(self._window, dtype))
        if not is_direct:
            place.copy_(made)

    def _dtype_for(self, place: Tensor, target: Target, links: Iterable[Link]) -> torch.dtype:
        """The dtype to make a tensor in: what is decoded is rounded once, to that of its place."""
        is_decoded = not any(isinstance(self.trace.sources[link.source].stored, Raw) for link in links)
        return place.dtype if is_decoded and place.dtype in FLOAT_DTYPES else self.dtypes[target.name]

    def _window(self, dtype: torch.dtype, name: str, box: Box) -> Window:
        source = self.trace.sources[name]
        if isinstance(source.stored, Raw):
            return self.boxes.read(source.parts[0], box), [Block.alone(box)]
        return decoded(source, box, self.boxes.read, dtype)


def _box(item: ReadItem) -> Box:
    begins = item.storage_offsets
    return tuple((begin, begin + length) for begin, length in zip(begins, item.lengths, strict=True))


def _outline(target: Target, dtype: torch.dtype) -> TensorStorageMetadata:
    size = torch.Size(target.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])


__all__ = ["MapStorageReader"]
