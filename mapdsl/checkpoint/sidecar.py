"""The side file: what a conversion to the right side loses, so that the way back gives the same files, byte for byte.

`mapdsl.complement` is a safetensors file. Its tensors are what the codecs keep (`NAME|part.scale`, `NAME|codes`,
`NAME|where`; see `Kept`) and the stored tensors that the map drops (`NAME|stored`). The rest is JSON, deflated and in
base64, in `__metadata__`: which format each tensor was found in, the checkpoint's headers, index and config as they
were. The suffix is its own, because loaders read every `*.safetensors` of a folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.dtypes import dtype_name, stored_shape, torch_dtype, torch_shape
from mapdsl.checkpoint.files import MAX_TEXT_BYTES, bad_file, parse_object, reason
from mapdsl.checkpoint.headers import LENGTH_BYTES, read_header
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.rawbytes import buffer
from mapdsl.checkpoint.window import Window
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.codecs.kept import Kept

SIDE_FILE = "mapdsl.complement"
FORMAT = "mapdsl complement 1"

_MAX_RECORD_BYTES = 10 * MAX_TEXT_BYTES  # inflated
_WIDTHS = (8, 4, 2, 1)

Entry = tuple[str, "Kept | None"]


@dataclass
class Origin:
    """Where a side file comes from: the map, and the checkpoint's files that hold no tensors' data, as texts.

    `headers` are the JSON texts of the shards' headers by file name, in order; none for other kinds of checkpoint.
    `names` are those of the right side's tensors.
    """

    map_name: str
    map_hash: str
    params: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    index_name: str | None = None
    index_text: str = ""
    config_text: str | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Origin:
        """The inverse of `asdict`; TypeError where a field is not there, too many, or of another kind."""
        origin = cls(**record)
        texts = [origin.map_name, origin.map_hash, origin.index_text, *origin.names, *origin.headers.values()]
        texts += [text for text in (origin.index_name, origin.config_text) if text is not None]
        if not isinstance(origin.params, dict) or not all(isinstance(text, str) for text in texts):
            raise TypeError("a field is of another kind")
        return origin

    @property
    def layout(self) -> list[FileLayout]:
        """The shards' headers, byte for byte."""
        files = [(name, text.encode("utf-8")) for name, text in self.headers.items()]
        return [FileLayout(name, len(text).to_bytes(LENGTH_BYTES, "little") + text) for name, text in files]


class _Spooled(NamedTuple):
    """A tensor in a rank's temporary file."""

    rank: int
    dtype: str
    shape: list[int]
    begin: int
    nbytes: int


class WriteOnly(MutableMapping[str, Entry]):
    """The `entries` of a complement of which nothing is looked at again: the adapter finds nothing there."""

    def __getitem__(self, name: str) -> Entry:
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def clear(self) -> None:
        """There is nothing to forget."""


class SideWriter(WriteOnly):
    """Takes what codecs keep, as the `entries` of an adapter's complement, to disk; nothing can be read from it.

    Until `finish` all lies in files of `folder`, where the conversion to `destination` is made, and with which a later
    run, or another rank, can go on (`record`, `restore`). Entries may come from several threads, in any order: the side
    file has its own. Each `rank` of several processes has files of its own.
    """

    def __init__(self, destination: Path, folder: Path, rank: int = 0) -> None:
        self._destination, self._folder, self._rank = destination, folder, rank
        self._spools: dict[int, IO[bytes]] = {}
        self._kept: dict[int, dict[str, _Spooled]] = {width: {} for width in _WIDTHS}
        self._entries: dict[str, tuple[str, int]] = {}
        self._texts: dict[str, str] = {}
        self._stored: dict[str, int] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def __setitem__(self, name: str, entry: Entry) -> None:
        alternative, kept = entry
        form: dict[str, Any] = {"alternative": alternative}
        check = 0
        if kept is not None:
            form |= {"kept": kept.to_meta(), "empty": {}, "roles": []}
            for role, tensor in kept.to_tensors().items():
                if tensor.numel():
                    form["roles"].append(role)
                    check = self._add(f"{name}|{role}", tensor, check)
                else:  # most tensors have nothing but scales to keep: no need for an entry that says so
                    form["empty"][role] = [dtype_name(tensor.dtype), list(tensor.shape)]
        self._entries[name] = (self._shared(json.dumps(form, sort_keys=True)), check)

    def add_stored(self, name: str, tensor: Tensor) -> None:
        """Keep a stored tensor as it is."""
        self._stored[name] = self._add(f"{name}|stored", tensor, 0)

    def finish(
        self,
        path: Path,
        origin: Origin,
        found: Mapping[str, bool],
        spelled: Mapping[str, str],
        decoded: Mapping[str, torch.dtype],
    ) -> None:
        """Write the side file. Raises a MapError, C507, where the disk fails or the header becomes too large."""
        numbers: dict[str, int] = {}
        entries = {
            name: (numbers.setdefault(text, len(numbers)), check)
            for name, (text, check) in sorted(self._entries.items())
        }
        record = {
            "origin": asdict(origin),
            "forms": [json.loads(text) for text in numbers],
            "entries": entries,
            "stored": dict(sorted(self._stored.items())),
            "found": dict(found),
            "spelled": dict(spelled),
            "decoded": {name: dtype_name(dtype) for name, dtype in decoded.items()},
        }
        header = self._header(record)
        try:
            with path.open("wb") as file:
                file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
                for width in _WIDTHS:
                    self._write_kept(width, file)
        except OSError as problem:
            raise self._unwritable(problem) from problem
        self.close()  # the files of `folder` go at the commit: until then a later run may need them

    def _write_kept(self, width: int, file: IO[bytes]) -> None:
        """What all ranks have kept of elements of a width, in order of names."""
        if width in self._spools:
            self._spools[width].flush()
        with contextlib.ExitStack() as opened:
            ranks = {kept.rank for kept in self._kept[width].values()}
            spools = {rank: opened.enter_context(self.spool_path(width, rank).open("rb")) for rank in ranks}
            for _, kept in sorted(self._kept[width].items()):
                spools[kept.rank].seek(kept.begin)
                file.write(spools[kept.rank].read(kept.nbytes))

    def record(self, names: Iterable[str]) -> list[Any]:
        """What is kept of some tensors, for a journal; their bytes are with the system when this returns."""
        with self._lock:
            for spool in self._spools.values():
                spool.flush()
        return [[name, *self._entries[name], self._spooled_of(name)] for name in names]

    def holds(self, names: Iterable[str]) -> bool:
        """Whether entries of all of these tensors were taken."""
        return all(name in self._entries for name in names)

    def restore(self, record: Iterable[Any]) -> None:
        """Take over what an earlier run has kept: what `record` gave. ValueError or the like for anything else."""
        for name, text, check, spooled in record:
            json.loads(text)
            self._entries[str(name)] = (self._shared(text), int(check))
            for width, role, *rest in spooled:
                place = _Spooled(*rest)
                torch_dtype(place.dtype)
                if min(place.rank, place.begin, place.nbytes, *place.shape) < 0:
                    raise ValueError(f"{role} lies nowhere")
                self._kept[width][str(role)] = place
                self.nbytes += place.nbytes

    def _shared(self, text: str) -> str:
        """One text for all that are the same: there are few."""
        return self._texts.setdefault(text, text)

    def _spooled_of(self, name: str) -> list[Any]:
        roles = [f"{name}|{role}" for role in json.loads(self._entries[name][0]).get("roles", ())]
        return [[width, role, *kept[role]] for width, kept in self._kept.items() for role in roles if role in kept]

    def _spool(self, width: int) -> IO[bytes]:
        """A file for elements of a width, open at its end."""
        spool = self.spool_path(width, self._rank).open("ab")
        spool.seek(0, os.SEEK_END)
        return spool

    def spool_path(self, width: int, rank: int) -> Path:
        """Where what a rank keeps of elements of a width lies, until `finish`; see `record`."""
        return self._folder / (f".mapdsl.kept-{width}-{rank}" if rank else f".mapdsl.kept-{width}")

    def close(self) -> None:
        """Give up the temporary files. What was kept can be had from them still: `record`, from any thread."""
        with self._lock:
            for spool in self._spools.values():
                spool.close()
            self._spools.clear()

    def _unwritable(self, problem: OSError) -> MapError:
        advice = "free space; what is done is kept, and the same command with --resume goes on"
        return bad_file(self._destination / SIDE_FILE, f"cannot write the side file: {reason(problem)}", advice)

    def _header(self, record: dict[str, Any]) -> bytes:
        packed = zlib.compress(json.dumps(record, separators=(",", ":")).encode("utf-8"))
        texts = {"format": FORMAT, "record": base64.b64encode(packed).decode("ascii")}
        header: dict[str, Any] = {"__metadata__": texts}
        begin = 0
        for width in _WIDTHS:  # the widest first, as everywhere: all tensors are aligned
            for name, kept in sorted(self._kept[width].items()):
                end = begin + kept.nbytes
                header[name] = {"dtype": kept.dtype, "shape": kept.shape, "data_offsets": [begin, end]}
                begin = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % LENGTH_BYTES)
        if len(text) > MAX_TEXT_BYTES:
            message = f"the side file needs a header of {len(text):,} bytes, safetensors allows {MAX_TEXT_BYTES:,}"
            raise bad_file(self._destination / SIDE_FILE, message, advice="convert without one (--no-complement)")
        return text

    def _add(self, name: str, tensor: Tensor, check: int) -> int:
        """Write one tensor; gives the checksum of what `check` stands for and of its bytes."""
        tensor = tensor.contiguous()
        data = buffer(tensor)
        width = tensor.element_size() if tensor.element_size() in _WIDTHS else 8
        try:
            with self._lock:
                if width not in self._spools:
                    self._spools[width] = self._spool(width)
                begin = self._spools[width].tell()
                self._spools[width].write(data)
                self.nbytes += len(data)
        except OSError as problem:
            raise self._unwritable(problem) from problem
        form = dtype_name(tensor.dtype), list(stored_shape(tensor))
        self._kept[width][name] = _Spooled(self._rank, *form, begin, len(data))
        return zlib.crc32(data, check)


class Forgetful(dict[str, Entry]):
    """The `entries` of a complement that nobody wants."""

    def __setitem__(self, name: str, entry: Entry) -> None:
        """Forget it."""


class SideFile(MutableMapping[str, Entry]):
    """A side file, opened: as the `entries` of an adapter's complement it gives what was kept of each stored tensor.

    `is_meta` makes it give meta tensors. Raises a MapError, C507, where the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            header = read_header(path)
        except MapError as problem:
            if isinstance(problem.__cause__, OSError):
                raise
            raise self._damaged(problem.diagnostics[0].message) from problem
        if header.metadata.get("format") != FORMAT:
            raise self._damaged(f"its format is {header.metadata.get('format')!r:.80}, expected {FORMAT!r}")
        checkpoint = Checkpoint(path, "safetensors", {tensor.name: tensor for tensor in header.tensors})
        self._state = Window(checkpoint)
        self._meta = self._state.meta()
        self.is_meta = False
        self._lock = threading.Lock()
        record = self._record(header.metadata.get("record", ""))
        try:
            self.origin = Origin.from_record(record["origin"])
            self.layout = self.origin.layout
            self.found = {str(name): bool(answer) for name, answer in record["found"].items()}
            self.spelled = {str(new): str(old) for new, old in record["spelled"].items()}
            self.decoded = {str(name): torch_dtype(word) for name, word in record["decoded"].items()}
            self._forms: list[dict[str, Any]] = [dict(form) for form in record["forms"]]
            self._entries = {name: (self._forms[form], int(check)) for name, (form, check) in record["entries"].items()}
            self._stored = {str(name): int(check) for name, check in record["stored"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as problem:
            raise self._damaged(f"its record cannot be understood ({type(problem).__name__}: {problem})") from problem

    @property
    def stored_names(self) -> Iterable[str]:
        """Names of the stored tensors that the map drops."""
        return self._stored

    def stored(self, name: str) -> Tensor:
        """One of the stored tensors that the map drops."""
        state = self._meta if self.is_meta else self._state
        try:
            tensor = state[f"{name}|stored"]
        except KeyError as problem:
            raise self._damaged(f"it lacks the tensor {problem}") from None
        if not self.is_meta:
            self._check(name, [tensor], self._stored[name])
        return tensor

    def __getitem__(self, name: str) -> Entry:
        return self.entry(name, is_meta=self.is_meta)

    def entry(self, name: str, *, is_meta: bool) -> Entry:
        """What was kept of a stored tensor, or its dtypes and shapes alone. Threads may ask at once."""
        form, check = self._entries[name]
        try:
            if "kept" not in form:
                return form["alternative"], None
            with self._lock:
                state = self._meta if is_meta else self._state
                tensors = {role: state[f"{name}|{role}"] for role in form["roles"]}
            if not is_meta:
                self._check(name, list(tensors.values()), check)
            for role, (dtype, shape) in form["empty"].items():
                device = "meta" if is_meta else "cpu"
                tensors[role] = torch.empty(torch_shape(dtype, tuple(shape)), dtype=torch_dtype(dtype), device=device)
            return form["alternative"], Kept.from_tensors(tensors, form["kept"])
        except MapError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            raise self._damaged(f"what it keeps of `{name}` cannot be understood ({problem})") from problem

    def __setitem__(self, name: str, entry: Entry) -> None:
        """What the right side's formats would keep is not wanted."""

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """The file keeps what it has."""

    def _check(self, name: str, tensors: list[Tensor], expected: int) -> None:
        found = 0
        for tensor in tensors:
            found = zlib.crc32(buffer(tensor.contiguous()), found)
        if found != expected:
            raise self._damaged(f"what it keeps of `{name}` has checksum {found:08x}, expected {expected:08x}")

    def _record(self, packed: str) -> dict[str, Any]:
        try:
            inflate = zlib.decompressobj()
            data = inflate.decompress(base64.b64decode(packed, validate=True), _MAX_RECORD_BYTES)
            if not inflate.eof:
                raise ValueError("it is cut short, or too large")
            return parse_object(self.path, data.decode("utf-8"), "record")
        except MapError as problem:
            raise self._damaged(problem.diagnostics[0].message) from problem
        except (ValueError, zlib.error) as problem:
            raise self._damaged(f"its record cannot be read ({problem})") from problem

    def _damaged(self, what: str) -> MapError:
        advice = "fetch it again, or convert without it (--no-complement): scales are then computed anew"
        return bad_file(self.path, f"the side file is damaged: {what}", advice)
