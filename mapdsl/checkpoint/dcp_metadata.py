"""What the `.metadata` of a torch Distributed Checkpoint says of its tensors, trusted in nothing. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mapdsl.checkpoint.dcp_pickle import Record, TorchName, read_pickle
from mapdsl.checkpoint.files import bad_file, file_size, is_plain_name, natural_key
from mapdsl.checkpoint.headers import TORCH_SPELLINGS, StoredTensor, checked_size

METADATA_FILE = ".metadata"
DATA_SUFFIX = ".distcp"
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers put a model's state dict; the first that holds tensors is taken."""

_MAX_RANK = 64  # what torch can handle
_DTYPES = {spelling: name for name, spelling in TORCH_SPELLINGS.items()}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where it is stored: `length` bytes of `file` from `begin` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor as the folder has it: its full name there, torch's spelling of its dtype, its boxes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class SavedState:
    """The tensors of a folder by the names that mapdsl gives them, and the keys of what is left out."""

    stored: dict[str, StoredTensor]
    saved: dict[str, SavedTensor]
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def read_saved_state(folder: Path) -> SavedState:
    """Read and validate `.metadata`.

    Names are those that torch gives: the keys of nested dicts, joined by dots. Where one of `WRAPPERS` holds tensors,
    its dict is the state: its key is cut off, everything beside it is left out, and so are objects that are no tensors.

    Raises a MapError: C507 for a file that needs code to load, contradicts itself or the files beside it; C506 for two
    tensors of one name.
    """
    path = folder / METADATA_FILE
    metadata = vars(read_pickle(path))
    entries, places = metadata.get("state_dict_metadata"), _places(path, metadata.get("storage_data"))
    if type(entries) is not dict or not all(type(key) is str for key in entries):
        raise bad_file(path, "the metadata names no tensors: expected a dict `state_dict_metadata`")
    keys = [key for key, entry in entries.items() if getattr(entry, "kind", "") == "TensorStorageMetadata"]
    names, left_out = _names(path, keys, metadata.get("planner_data"))
    files = _Files(folder)
    stored, saved = {}, {}
    for key, name in names.items():
        tensor = _tensor(path, key, vars(entries[key]), places, files)
        dtype, shape = _stored_form(path, tensor)
        file = files.path(tensor.chunks[0].file) if tensor.chunks else path
        stored[name], saved[name] = StoredTensor(name, dtype, shape, file), tensor
    others = [key for key in entries if key not in names and key not in left_out]
    return SavedState(stored, saved, files.names, (*left_out, *others))


def _names(path: Path, keys: list[str], nesting: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """The name of each tensor that is taken, by key, and the keys of the others."""
    steps = {key: _steps(key, nesting) for key in keys}
    wrapped = {way[0] for way in steps.values() if len(way) > 1}
    wrapper = next((word for word in WRAPPERS if word in wrapped), None)
    names: dict[str, str] = {}
    for key, way in steps.items():
        if wrapper is None or (way[0] == wrapper and len(way) > 1):
            names[key] = key if wrapper is None else key[len(wrapper) + 1 :]
    for key, name in names.items():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise bad_file(path, f"a tensor's name is not Unicode text: {key[:200]!a}") from problem
    if len(set(names.values())) < len(names):
        raise bad_file(path, "two of its tensors have one name", code="C506")
    return names, tuple(key for key in keys if key not in names)


def _steps(key: str, nesting: Any) -> tuple[Any, ...]:
    """The keys of the nested dicts that lead to a tensor, where the file has them."""
    way = nesting.get(key) if type(nesting) is dict else None
    if type(way) is tuple and all(type(step) in (str, int) for step in way) and ".".join(map(str, way)) == key:
        return way
    return (key,)


def _places(path: Path, data: Any) -> Mapping[tuple[str, tuple[int, ...] | None], Record]:
    """Where boxes are stored, by key and offset."""
    if type(data) is not dict:
        raise bad_file(path, "the metadata does not say where tensors are: expected a dict `storage_data`")
    places: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for index, place in data.items():
        key, offset = getattr(index, "fqn", None), getattr(index, "offset", None)
        if type(key) is not str or not (offset is None or _is_sizes(offset)) or not isinstance(place, Record):
            raise bad_file(path, "an entry of `storage_data` does not say which tensor is where")
        places[key, offset] = place
    return places


def _tensor(
    path: Path,
    key: str,
    entry: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...] | None], Record],
    files: _Files,
) -> SavedTensor:
    dtype, shape = getattr(entry.get("properties"), "dtype", None), entry.get("size")
    if not isinstance(dtype, TorchName) or not _is_sizes(shape):
        raise bad_file(path, f"tensor `{key}` has no dtype, or a shape that is none")
    boxes = entry.get("chunks")
    if type(boxes) is not list:
        raise bad_file(path, f"tensor `{key}` has no list of chunks")
    chunks = []
    for box in boxes:
        offsets, sizes = getattr(box, "offsets", None), getattr(box, "sizes", None)
        if not (_is_sizes(offsets) and _is_sizes(sizes)):
            raise bad_file(path, f"tensor `{key}` has a chunk without offsets or sizes")
        place = places.get((key, offsets), places.get((key, None)))
        if place is None:
            raise bad_file(path, f"tensor `{key}` has a chunk at {list(offsets)} that is stored nowhere")
        chunks.append(_chunk(path, key, offsets, sizes, vars(place)))
        files.check(path, key, chunks[-1])
    _check_cover(path, key, shape, chunks)
    return SavedTensor(key, str(dtype), shape, tuple(chunks))


def _chunk(path: Path, key: str, offsets: Any, sizes: Any, place: Mapping[str, Any]) -> Chunk:
    file, begin, length = place.get("relative_path"), place.get("offset"), place.get("length")
    transforms = place.get("transform_descriptors") or ()
    if type(file) is not str:
        raise bad_file(path, f"tensor `{key}` has a chunk that lies in no file")
    if type(begin) is not int or type(length) is not int or begin < 0 or length < 0:
        raise bad_file(path, f"tensor `{key}` lies at no place in {file!r:.200}")
    if type(transforms) not in (list, tuple) or not all(type(word) is str for word in transforms):
        raise bad_file(path, f"tensor `{key}` is packed in a way that nobody can name")
    return Chunk(offsets, sizes, file, begin, length, tuple(transforms))


def _check_cover(path: Path, key: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """The boxes cover the tensor once: torch would leave whatever is in memory where there is none."""
    for chunk in chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
            offset + size <= whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        )
        if not inside:
            message = f"tensor `{key}` {list(shape)} has a chunk {list(chunk.sizes)} at {list(chunk.offsets)}"
            raise bad_file(path, f"{message}, which does not lie in it")
    held, whole = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    if held < whole:
        raise bad_file(path, f"the chunks of tensor `{key}` hold {held:,} elements of {whole:,}")
    if held > whole or next(_overlaps([chunk for chunk in chunks if math.prod(chunk.sizes)]), None):
        raise bad_file(path, f"chunks of tensor `{key}` overlap")


def _overlaps(chunks: list[Chunk]) -> Iterator[tuple[Chunk, Chunk]]:
    """Pairs of boxes with a common element, found by a sweep along the axis that is cut most."""
    if len(chunks) < 2:
        return
    axes = range(len(chunks[0].offsets))
    axis = max(axes, key=lambda a: len({chunk.offsets[a] for chunk in chunks}))
    reached: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda c: c.offsets[axis]):
        reached = [box for box in reached if box.offsets[axis] + box.sizes[axis] > chunk.offsets[axis]]
        for box in reached:
            if all(_begins_before(box, chunk, a) and _begins_before(chunk, box, a) for a in axes):
                yield box, chunk
        reached.append(chunk)


def _begins_before(chunk: Chunk, box: Chunk, axis: int) -> bool:
    """Whether one box begins before the other one ends."""
    return chunk.offsets[axis] < box.offsets[axis] + box.sizes[axis]


class _Files:
    """The files with tensors; each is looked at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, tuple[Path, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(sorted(self._found, key=natural_key))

    def path(self, name: str) -> Path:
        """The path of a file that was checked."""
        return self._found[name][0]

    def check(self, path: Path, key: str, chunk: Chunk) -> None:
        """C507 where a box is in another folder, ends behind its file's end, or the file is not there."""
        if chunk.file not in self._found:
            if not is_plain_name(chunk.file) or not chunk.file.endswith(DATA_SUFFIX):
                message = f"the metadata puts tensor `{key}` into {chunk.file!r:.200}"
                message = f"{message}, expected *{DATA_SUFFIX} in its own folder"
                raise bad_file(path, message, "no folders, no `..`, no absolute paths")
            file = self._folder / chunk.file
            self._found[chunk.file] = file, file_size(file)
        size = self._found[chunk.file][1]
        if chunk.begin + chunk.length > size:
            message = f"tensor `{key}` ends at byte {chunk.begin + chunk.length:,} of {chunk.file}, which has {size:,}"
            raise bad_file(path, message, advice="the file is cut short, or belongs to another checkpoint")


def _stored_form(path: Path, tensor: SavedTensor) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape in safetensors' terms."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise bad_file(path, f"tensor `{tensor.key}`: safetensors has no dtype for torch.{tensor.dtype}", code="C504")
    shape = tensor.shape
    if dtype == "F4" and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    checked_size(path, tensor.key, dtype, shape)
    return dtype, shape


def _is_sizes(value: Any) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and len(value) <= _MAX_RANK and all(type(n) is int and 0 <= n < 2**63 for n in value)
