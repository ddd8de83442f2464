"""Which tensor goes where in a checkpoint to be written: shard names, header bytes, offsets. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.files import MAX_TEXT_BYTES, bad_file, is_plain_name
from mapdsl.checkpoint.headers import BITS, LENGTH_BYTES, StoredTensor, checked_size, header_bytes, parse_header

Entry = tuple[str, str, Sequence[int]]
"""Name, dtype in safetensors' spelling, stored shape of a tensor to be written."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}  # transformers refuses a file that does not say so

_PACKED_OVERHEAD = 4096  # bytes that torch.save and the metadata add to a tensor, names apart; 1.6 to 2.5 kB are usual
_DTYPE_ORDER = {name: place for place, name in enumerate(reversed(BITS))}


@dataclass(frozen=True)
class FileLayout:
    """One file to be written: its plain name, and its header byte for byte (length field and JSON)."""

    name: str
    header: bytes

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors that the header places, by offset; raises a MapError, C507, where the header is bad."""
        file = Path(self.name)
        stated = int.from_bytes(self.header[:LENGTH_BYTES], "little")
        if stated != len(self.header) - LENGTH_BYTES:
            raise bad_file(file, f"the header states {stated:,} bytes, it has {len(self.header) - LENGTH_BYTES:,}")
        return parse_header(self.header, file).tensors

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].end if self.tensors else len(self.header)


def layout_of(checkpoint: Checkpoint) -> list[FileLayout]:
    """The layout of a safetensors checkpoint, so that its files can be written again byte for byte.

    Raises a MapError, C507, for other kinds.
    """
    if checkpoint.kind != "safetensors":
        raise bad_file(checkpoint.path, f"a {checkpoint.kind} checkpoint has no safetensors layout to keep")
    return [FileLayout(name, header_bytes(checkpoint.folder / name)) for name in checkpoint.files]


def plan_layout(
    entries: Iterable[Entry],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    single_file: bool = False,
) -> list[FileLayout]:
    """Share tensors out over files: in the order given, a new shard where the next tensor would exceed the limit.

    A tensor larger than `max_shard_bytes` has a shard of its own. In each file tensors are ordered as safetensors does,
    the widest dtype first, then by name, so that all are aligned. `metadata` is each file's `__metadata__`; by default
    `{"format": "pt"}`, which transformers wants. Raises a MapError: C507 for a bad entry, C506 for a name given twice.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected more than 0")
    shards: list[list[tuple[Entry, int]]] = [[]]
    filled = 0
    seen: set[str] = set()
    for entry in entries:
        name, dtype, shape = entry
        if name in seen:
            raise bad_file("", f"tensor `{name}` is to be written twice", code="C506")
        seen.add(name)
        size = checked_size(Path(), name, dtype, tuple(shape))
        if not single_file and shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((entry, size))
        filled += size
    texts = dict(METADATA if metadata is None else metadata)
    if len(shards) == 1:
        return [FileLayout(SINGLE_FILE, _encode(shards[0], texts))]
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    return [FileLayout(name, _encode(shard, texts)) for name, shard in zip(names, shards, strict=True)]


def shared_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The `__metadata__` of new files for a checkpoint's tensors: what all of its files say alike, and torch's."""
    shared, *others = [dict(texts) for texts in checkpoint.metadata.values()] or [{}]
    alike = {key: text for key, text in shared.items() if all(texts.get(key) == text for texts in others)}
    return alike | METADATA


def index_text(layout: Sequence[FileLayout]) -> str:
    """The text of `model.safetensors.index.json`, as transformers writes it: total size in bytes, name to file."""
    stored = [(tensor, file.name) for file in layout for tensor in file.tensors]
    value = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in stored)},
        "weight_map": {tensor.name: name for tensor, name in stored},
    }
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def disk_needed(layout: Sequence[FileLayout], *, is_packed: bool = False) -> int:
    """Bytes of disk that files need while they are written: of those that are packed anew, one more than in the end."""
    sizes = [file.size for file in layout]
    if not is_packed:
        return sum(sizes)
    return sum(sizes) + max(sizes, default=0) + _PACKED_OVERHEAD * sum(len(file.tensors) for file in layout)


def _encode(shard: list[tuple[Entry, int]], metadata: dict[str, str]) -> bytes:
    """Header bytes as safetensors writes them: compact JSON, padded with spaces to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for (name, dtype, shape), size in sorted(shard, key=lambda item: (_DTYPE_ORDER[item[0][1]], item[0][0])):
        if name == "__metadata__":
            raise bad_file("", "a tensor cannot be called `__metadata__`: safetensors keeps that name")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise bad_file("", f"a tensor's name is not Unicode text: {problem.object[:200]!a}") from problem
    text += b" " * (-len(text) % LENGTH_BYTES)
    if len(text) > MAX_TEXT_BYTES:
        message = f"{len(shard):,} tensors need a header of {len(text):,} bytes, safetensors allows {MAX_TEXT_BYTES:,}"
        raise bad_file("", message, advice="write smaller shards (max_shard_bytes)")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def places_in(layout: Sequence[FileLayout]) -> dict[str, StoredTensor]:
    """Every tensor's place; refuses names that leave the folder, and tensors or files that come twice."""
    places: dict[str, StoredTensor] = {}
    names: set[str] = set()
    for file in layout:
        if not is_plain_name(file.name):
            raise bad_file(file.name, "a file of the layout has no plain name", advice="no folders, no `..`")
        if file.name in names:
            raise bad_file(file.name, "the layout has this file twice", code="C506")
        names.add(file.name)
        for tensor in file.tensors:
            if tensor.name in places:
                raise bad_file(file.name, f"tensor `{tensor.name}` is in {places[tensor.name].file} too", code="C506")
            places[tensor.name] = tensor
    return places
