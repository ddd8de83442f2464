"""A model's own state, shards and all, saved by torch Distributed Checkpoint as the checkpoint that a map reads.

The coordinator knows all tensors of the model from the plans, so it lays out the files of the stored ones, each of its
final size. Then every rank writes the bytes that its shards make to their places, and nobody gathers anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from mapdsl.checkpoint.boxes import BoxWriter
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.dtypes import dtype_name
from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.layout import MAX_SHARD_BYTES, Entry, FileLayout, places_in, plan_layout
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.frameworks.dcp_files import config_of, config_text, others_of
from mapdsl.frameworks.layouts import Block
from mapdsl.frameworks.live import MissingTensorsError, check_piece, dtype_of, stated
from mapdsl.frameworks.moves import piece
from mapdsl.frameworks.stored import encoded
from mapdsl.map import Map, load
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.complement import Raw
from mapdsl.runtime.errors import ConversionError, some_of
from mapdsl.runtime.fitting import same_bytes
from mapdsl.runtime.links import Box, Link, Ranges, boxes_of
from mapdsl.runtime.part_shares import held_parts
from mapdsl.runtime.shares import Held
from mapdsl.runtime.tracing import Target, Trace, trace

Outline = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of the model's tensors."""

Pieces = dict[tuple[str, Box], Tensor]
"""What a rank saves: tensors by name and by the box of the whole one that they are."""


@dataclass(frozen=True)
class Orders:
    """What the coordinator tells every rank: the model's tensors, and the files that are to be filled."""

    outline: Outline
    folder: Path
    layout: tuple[FileLayout, ...]


class MapStorageWriter(StorageWriter):
    """Writes the right side of a map as a checkpoint of its left side, in safetensors files.

    All ranks write to one folder, so they have to see the same file system. `map` is a `Map`, a file or the name of a
    shipped one; `config` a mapping, a config of transformers, or the path of a config.json or of its folder, which is
    written along; `params` are params of the map by name. `like` is a checkpoint whose other files are carried over,
    and whose config is taken where none is given. Where nothing is stored quantised `quantization_config` is left out.
    With `quantization` tensors are stored in the map's first format, otherwise as they are, which a param `packed` of
    the map follows; a format of blocks wants the model's shards to end where blocks end.

    Everything is written in a hidden folder beside `path`, which takes its name at the end; what failed half way is
    left there. Raises, wrapped by torch in a CheckpointException: MapError where the destination exists or cannot be
    written, ConversionError where the state does not fit the map, P454 where a shard ends within a block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        map: Map | str | os.PathLike[str],  # noqa: A002 the word that users know
        config: Any = None,
        *,
        like: str | os.PathLike[str] | None = None,
        quantization: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        threads: int = 4,
        **params: Any,
    ) -> None:
        super().__init__()
        for word, value in (("threads", threads), ("max_shard_bytes", max_shard_bytes)):
            if value < 1:
                raise ValueError(f"{word} is 1 or more, not {value}")
        self.map = map if isinstance(map, Map) else load(map)
        self.like = None if like is None else open_checkpoint(like)
        if config is None and self.like is not None and self.like.config is not None:
            config = self.like.config_path
        if "packed" in self.map.checked.map.params:  # a quantised tensor has another layout there
            params.setdefault("packed", quantization)
        self.adapter = self.map.adapter(config, **params)
        self.config = config_text(config)
        self.quantization, self.max_shard_bytes, self.threads = quantization, max_shard_bytes, threads
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A save begins, to another folder if one is given."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)
        self._files: CheckpointWriter | None = None
        self._config: str | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path whose folder is there."""
        return Path(checkpoint_id).parent.is_dir()

    def storage_meta(self) -> StorageMeta:
        """What torch's metadata say of the storage."""
        return StorageMeta(checkpoint_id=str(self.path))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be set up before the plans are there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay the files out, make them, and tell all ranks of them."""
        outline: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for item in (item for plan in plans for item in plan.items):
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise bad_file(self.path, f"`{item.index.fqn}` is no tensor: nothing else is stored")
            outline[item.index.fqn] = tuple(item.tensor_data.size), item.tensor_data.properties.dtype
        saving = _Saving(self.adapter, outline, quantization=self.quantization)
        layout = plan_layout(saving.entries, max_shard_bytes=self.max_shard_bytes)
        self._config = None if self.config is None else config_of(self.config, saving.entries)
        self._files = CheckpointWriter(self.path, layout=layout)
        for name, tensor in saving.constants.items():
            self._files.write(name, tensor)
        orders = Orders(outline, self._files.folder, tuple(layout))
        return [replace(plan, storage_data=orders) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what this rank's shards make."""
        orders: Orders = plan.storage_data
        saving = _Saving(self.adapter, orders.outline, quantization=self.quantization)

        pieces: Pieces = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            pieces[item.index.fqn, _box(item)] = tensor.detach()
        saving.check(pieces)

        def write(item: WriteItem) -> WriteResult:
            name, box = item.index.fqn, _box(item)
            size = saving.write(files, name, box, pieces[name, box])
            return WriteResult(index=item.index, size_in_bytes=size, storage_data=None)

        with BoxWriter(orders.folder, places_in(orders.layout)) as files, ThreadPoolExecutor(self.threads) as pool:
            results = [done.result() for done in [pool.submit(write, item) for item in plan.items]]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Add what is not tensors, and give the folder its name."""
        assert self._files is not None, "the coordinator has made the files"
        self._files.take_over(self._files.missing)
        if self._config is not None:
            self._files.write_bytes("config.json", self._config.encode("utf-8"))
        if self.like is not None:
            self._files.carry_over(self.like, others_of(self.like))
        self._files.commit()


class _Saving:
    """What the tensors of a model make."""

    def __init__(self, adapter: Adapter, outline: Outline, *, quantization: bool) -> None:
        self.adapter = adapter
        blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in outline.items()}
        self.trace: Trace = trace(adapter, adapter.RIGHT, blank, quantization=quantization)
        if self.trace.lacking:
            raise MissingTensorsError("R605", f"the state lacks {some_of(list(self.trace.lacking))}")

    @cached_property
    def entries(self) -> list[Entry]:
        """Every stored tensor."""
        found: list[Entry] = []
        for target in self.trace.targets.values():
            if isinstance(target.stored, Raw):
                found.append((target.name, dtype_name(self._dtype(target)), target.shape))
            else:
                forms = target.stored.stored(target.name, target.shape, self._dtype(target))
                found += [(name, dtype_name(dtype), shape) for name, (dtype, shape) in forms.items()]
        return found

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Stored tensors that the map states."""
        out: dict[str, Tensor] = {}
        for target in self.trace.targets.values():
            if target.traced is None:
                value = stated(target, self.adapter.complement.entries, torch.device("cpu"))
                out |= {target.name: value} if isinstance(target.stored, Raw) else encoded(target, value)
        return out

    @cached_property
    def _made_of(self) -> dict[str, list[tuple[Target, Link]]]:
        """By tensor of the model, what it makes."""
        found: dict[str, list[tuple[Target, Link]]] = {}
        for target in self.trace.targets.values():
            for link in target.links():
                found.setdefault(link.source, []).append((target, link))
        return found

    def _dtype(self, target: Target) -> torch.dtype:
        return dtype_of(self.trace, target, self.adapter.complement.entries)

    def check(self, pieces: Pieces) -> None:
        """Hold what is not stored against what the map states of it; R601 names what differs, C504 what has no values.

        A tie is looked at where a rank has the same box of both.
        """
        for (name, box), tensor in pieces.items():
            if tensor.is_meta:
                raise ConversionError("C504", f"{name} is a meta tensor: it has no values to be saved")
            if name in self.trace.sources:
                check_piece(self.trace, self.trace.sources[name], tensor, [Block.alone(box)])
            twin = pieces.get((self.trace.ties.get(name, ""), box))
            if twin is not None and twin.dtype == tensor.dtype:
                same_bytes(name, tensor, twin, self.trace.ties[name])

    def write(self, files: BoxWriter, name: str, box: Box, tensor: Tensor) -> int:
        """Write what a box of a tensor of the model makes; how many bytes that are."""
        size = 0
        for target, link in self._made_of.get(name, ()):
            for ranges in link.within("source", box):
                made = piece(tensor, Block.alone(box), link, ranges)
                for part, own, value in self._stored(target, link, ranges, made):
                    files.write(part, own, value)
                    size += value.nbytes
        return size

    def _stored(self, target: Target, link: Link, ranges: Ranges, made: Tensor) -> Sequence[tuple[str, Box, Tensor]]:
        """The boxes of stored tensors that some positions make."""
        found: list[tuple[str, Box, Tensor]] = []
        for box, at in boxes_of(link.runs("target", ranges)):
            value = made[tuple(slice(begin, begin + end - first) for begin, (first, end) in zip(at, box, strict=True))]
            if isinstance(target.stored, Raw):
                found.append((target.name, box, value))
                continue
            storage = target.stored.storage
            held = tuple(Held(size, (run,)) for size, run in zip(target.shape, box, strict=True))
            parts = held_parts(target.name, storage, held)
            stored = encoded(target, value)
            names = storage.part_names(target.name)
            for role, name in names.items():
                if role in parts:
                    own = tuple(dimension.runs[0] for dimension in parts[role])
                    found.append((name, own, stored[name].reshape([end - begin for begin, end in own])))
        return found


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return tuple((begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))


__all__ = ["MapStorageWriter"]
