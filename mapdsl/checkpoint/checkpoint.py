"""A checkpoint as its headers tell it: names, dtypes, shapes, places; no tensor is read, torch is not needed.

The one exception are torch's own files (`.pt`, `.pth`, `.bin`), which only torch can read; it is imported for them.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mapdsl.checkpoint.dcp_metadata import DATA_SUFFIX, METADATA_FILE, SavedTensor, read_saved_state
from mapdsl.checkpoint.files import bad_file, is_plain_name, leaves_folder, natural_key, read_object, reason
from mapdsl.checkpoint.headers import StoredTensor, read_header
from mapdsl.checkpoint.listing import read_json_listing, read_listing
from mapdsl.language.diagnostics import Diagnostic, MapError

if TYPE_CHECKING:
    from mapdsl.checkpoint.shares import Shares

Kind = Literal["safetensors", "torch", "dcp", "listing", "shares"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_INDEX = ".index.json"
_SHOWN = 20  # missing files named one by one
_WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, DATA_SUFFIX, ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's headers, index and config say.

    `tensors` are in stored order: file by file, by offset. `metadata` holds each file's `__metadata__`, `files` the
    names of the files with tensors. `config` is `config.json`, or None without one. `other_files` are the names of
    files to carry over to a converted checkpoint (tokenizer, generation config, licence), `refused_files` of those
    that are not, because they are links that lead out of the folder. `left_out` are keys of a torch file or a
    Distributed Checkpoint that are not part of the model's state. `saved` says where the tensors of a Distributed
    Checkpoint are, `shares` where those are that a rank is to hold of a checkpoint of other ranks.
    """

    path: Path
    kind: Kind
    tensors: dict[str, StoredTensor]
    config: dict[str, Any] | None = None
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    other_files: tuple[str, ...] = ()
    refused_files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    saved: Mapping[str, SavedTensor] = field(default_factory=dict)
    shares: Shares | None = None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def config_path(self) -> Path:
        """Where its config is, if it has one: a listing may have one of its own beside it."""
        own = self.path.with_name(f"{self.path.stem}.config.json")
        is_own = self.kind == "listing" and not self.path.is_dir() and own.exists()
        return own if is_own else self.folder / "config.json"

    @property
    def has_data(self) -> bool:
        """Whether the tensors themselves are there, not only a listing of them."""
        return self.kind != "listing"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    `path` is a folder (with one `*.safetensors.index.json`, else all its `*.safetensors`, else `pytorch_model.bin` or
    its index, else the `.metadata` of a torch Distributed Checkpoint), an index, one `.safetensors`, one torch file, or
    a listing (`.list`, `.json`). Beside one file only its config is looked for; `NAME.config.json` goes before
    `config.json` for listings.

    Of a folder, `other_files` are the regular files directly in it: no subfolders, no names with a leading dot, no
    weights or indexes of any kind, no `config.json`. Links count if they stay in the folder, or in the `blobs` of the
    Hugging Face cache that it lies in; files with tensors may be links to anywhere.

    Raises a MapError: C507 for what is missing, broken or hostile, all files' findings at once; C506 for a tensor that
    lies in two files.
    """
    with no_collection():
        return _open(Path(path))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Hold garbage collection off: it would walk a hundred thousand new objects, and torch's, over and over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(path: Path) -> Checkpoint:
    name = path.name
    if os.path.isdir(path):  # False too for a name that no file system takes
        return _open_folder(path)
    if not os.path.lexists(path):
        raise bad_file(path, "there is no such file or folder")
    if name.endswith(_INDEX):
        return _open_index(path, path)
    if name == METADATA_FILE:
        return _open_dcp(path.parent)
    if name.endswith((".list", ".json")):
        return _open_listing(path)
    if name.endswith((".safetensors", *TORCH_SUFFIXES)):
        found = _checked(_gather([path]))
        return Checkpoint(
            path,
            _kind(path),
            found.tensors,
            _config(path.parent),
            found.metadata,
            (name,),
            left_out=tuple(found.left_out),
        )
    kinds = f"a folder, *{_INDEX}, *.safetensors, *.list, *.json, {', '.join('*' + s for s in TORCH_SUFFIXES)}"
    raise bad_file(path, "the name does not say what the file is", advice=f"a checkpoint is one of: {kinds}")


@dataclass
class _Gathered:
    """Headers put together; `problems` are kept until all files were read."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)


def open_files(paths: Sequence[Path]) -> Checkpoint:
    """Files of one folder as one checkpoint; errors as `open_checkpoint`."""
    folder = paths[0].parent
    return _with_folder(paths[0], folder, _checked(_gather(paths)), [path.name for path in paths])


def _open_folder(folder: Path) -> Checkpoint:
    try:
        # Names with a leading dot are no files of the checkpoint: macOS leaves a `._NAME` beside each file, for one.
        names = sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=natural_key)
    except OSError as problem:
        raise bad_file(folder, f"cannot read the folder: {reason(problem)}") from problem
    for suffix, single in ((".safetensors", None), (".bin", "pytorch_model.bin")):
        indexes = [name for name in names if name.endswith(suffix + _INDEX)]
        if len(indexes) > 1:
            message = f"the folder holds {len(indexes)} indexes, expected one: {', '.join(indexes)}"
            raise bad_file(folder, message, advice="give the path of the index that you mean")
        if indexes:
            return _open_index(folder, folder / indexes[0])
        shards = [name for name in names if (name == single if single else name.endswith(suffix))]
        if shards:
            return _with_folder(folder, folder, _checked(_gather([folder / name for name in shards])), shards)
    if (folder / METADATA_FILE).exists():
        return _open_dcp(folder)
    raise _no_weights(folder, names)


def _no_weights(folder: Path, names: list[str]) -> MapError:
    """What to say of a folder in which there is nothing to read."""
    if any(name.endswith(DATA_SUFFIX) for name in names):
        message = f"the folder holds *{DATA_SUFFIX}, but no {METADATA_FILE} that says what is in them"
        advice = "torch writes it last, and only where one rank coordinates the others: save again"
        return bad_file(folder, message, advice)
    message = f"the folder holds no *.safetensors, no *.safetensors{_INDEX} and no pytorch_model.bin"
    message = f"{message}, nor a torch Distributed Checkpoint's {METADATA_FILE}"
    return bad_file(folder, message, advice="for another file, give its own path")


def _open_dcp(folder: Path) -> Checkpoint:
    state = read_saved_state(folder)
    others, refused = _other_files(folder)
    found = Checkpoint(folder, "dcp", state.stored, _config(folder), {}, state.files, others, refused)
    return replace(found, left_out=state.left_out, saved=state.saved)


def _open_index(path: Path, index: Path) -> Checkpoint:
    """`path` is what the user gave, the index or its folder."""
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()), key=natural_key)
    places = {name: index.parent / name for name in names}
    absent = {name for name in names if not places[name].exists()}
    found = _gather([places[name] for name in names if name not in absent])
    lost = _by_first((file, name) for name, file in weight_map.items() if file in absent)
    for file in sorted(absent, key=natural_key)[:_SHOWN]:
        message = f"the index puts {_listed(lost[file])} into {file}, and there is no such file"
        found.problems.append(_finding(index, message))
    if len(absent) > _SHOWN:
        found.problems.append(_finding(index, f"{len(absent) - _SHOWN:,} more of its files are not there"))
    if not found.problems:
        found.problems += _index_problems(index, weight_map, places, found.tensors)
    return _with_folder(path, index.parent, _checked(found), names)


def _with_folder(path: Path, folder: Path, found: _Gathered, files: Sequence[str]) -> Checkpoint:
    others, refused = _other_files(folder)
    kind = _kind(folder / files[0]) if files else "safetensors"
    left_out = tuple(found.left_out)
    return Checkpoint(
        path, kind, found.tensors, _config(folder), found.metadata, tuple(files), others, refused, left_out
    )


def _open_listing(path: Path) -> Checkpoint:
    tensors = read_listing(path) if path.suffix == ".list" else read_json_listing(path)
    found = Checkpoint(path, "listing", tensors)
    return replace(found, config=_config_in(found.config_path))


def _read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of an index, every file name in it plain and of the index's kind."""
    weight_map = read_object(index, "index").get("weight_map")
    if not isinstance(weight_map, dict):
        raise bad_file(index, "the index has no object `weight_map`")
    suffixes = TORCH_SUFFIXES if index.name.endswith(".bin" + _INDEX) else (".safetensors",)
    sound: set[str] = set()  # many names share a file
    for name, file in weight_map.items():
        if isinstance(file, str) and (file in sound or (is_plain_name(file) and file.endswith(suffixes))):
            sound.add(file)
            continue
        wanted = " or ".join("*" + suffix for suffix in suffixes)
        message = f"the index puts tensor `{name}` into {file!r:.200}, expected {wanted} in its own folder"
        raise bad_file(index, message, "no folders, no `..`, no absolute paths")
    return weight_map


def _gather(paths: Iterable[Path]) -> _Gathered:
    """Read every file's header; the problems of all of them are kept, with tensors that lie in two files."""
    found = _Gathered()
    for path in paths:
        try:
            tensors, found.metadata[path.name], left_out = _read_file(path)
        except MapError as problem:
            found.problems += problem.diagnostics
            continue
        found.left_out += left_out
        twice = [name for name in tensors if name in found.tensors]
        if twice:
            message = f"{_listed(twice)} is stored in {found.tensors[twice[0]].file.name} and again in {path.name}"
            advice = "give the path of the file or the index that you mean"
            found.problems.append(_finding(path, message, "C506", advice))
        found.tensors.update(tensors)
    return found


def _read_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str], tuple[str, ...]]:
    """Tensors, metadata, and the keys of what is not part of the model's state."""
    if path.name.endswith(TORCH_SUFFIXES):
        from mapdsl.checkpoint.torch_files import read_torch_headers  # imports torch

        tensors, left_out = read_torch_headers(path)
        return tensors, {}, left_out
    header = read_header(path)
    return {tensor.name: tensor for tensor in header.tensors}, header.metadata, ()


def _index_problems(
    index: Path, weight_map: dict[str, str], places: dict[str, Path], tensors: dict[str, StoredTensor]
) -> list[Diagnostic]:
    """Where the index and the headers disagree: one finding per pair of files, with an example."""
    wrong: list[tuple[tuple[str, str], str]] = []
    missing: list[tuple[str, str]] = []
    for name, file in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None:
            missing.append((file, name))
        elif tensor.file is not places[file]:
            wrong.append(((file, tensor.file.name), name))
    unlisted = [(tensor.file.name, name) for name, tensor in tensors.items() if name not in weight_map]
    lines = [
        f"the index puts {_listed(n)} into {file}, which does not hold it" for file, n in _by_first(missing).items()
    ]
    for (file, other), names in _by_first(wrong).items():
        lines.append(f"the index puts {_listed(names)} into {file}, found in {other}")
    for file, names in _by_first(unlisted).items():
        lines.append(f"{file} holds {_listed(names)}, which the index does not name")
    advice = "the index belongs to other files: fetch it again, or remove it to read all *.safetensors of the folder"
    return [_finding(index, line, advice=advice) for line in lines]


def _other_files(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files to carry over, and of links that lead elsewhere."""
    others, refused = [], []
    for name in sorted(os.listdir(folder), key=natural_key):
        path = folder / name
        if name.startswith(".") or name == "config.json" or name.endswith((*_WEIGHT_SUFFIXES, _INDEX)):
            continue
        if leaves_folder(path) or not is_plain_name(name):
            refused.append(name)
        elif path.is_file():
            others.append(name)
    return tuple(others), tuple(refused)


def _config(folder: Path) -> dict[str, Any] | None:
    return _config_in(folder / "config.json")


def _config_in(path: Path) -> dict[str, Any] | None:
    return read_object(path, "config", lenient=True) if path.exists() else None


def _kind(path: Path) -> Kind:
    return "torch" if path.name.endswith(TORCH_SUFFIXES) else "safetensors"


def _finding(path: Path, message: str, code: str = "C507", advice: str = "") -> Diagnostic:
    return Diagnostic(code, message, subject=str(path), help=advice)


def _checked(found: _Gathered) -> _Gathered:
    if found.problems:
        raise MapError(found.problems)
    return found


def _by_first(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups


def _listed(names: Sequence[str]) -> str:
    return f"tensor `{names[0]}`" + (f" (and {len(names) - 1:,} more)" if len(names) > 1 else "")
