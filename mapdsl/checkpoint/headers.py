"""Safetensors headers, read with the standard library alone and trusted in nothing.

Format: 8 bytes, the length N of the header (unsigned, little-endian); N bytes of JSON, `{name: {"dtype", "shape",
"data_offsets"}}` and optionally `"__metadata__": {str: str}`; then the data, which the tensors cover without gap or
overlap (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.files import MAX_TEXT_BYTES, bad_file, decode, file_size, parse_object, read_bytes

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of each dtype, in safetensors' spelling and order: a file stores the last of these first."""

TORCH_SPELLINGS = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""Torch's names of these dtypes, as far as it has them."""

LENGTH_BYTES = 8
NO_FILE = Path()

_MAX_COUNT = 2**63 - 1  # what torch can index
_MAX_RANK = 64  # what torch can handle
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a header says of one tensor.

    `dtype` in safetensors' spelling (`F8_E4M3`); `shape` as stored; `begin` and `end` are byte offsets from the start
    of `file`. Without data to point at (listings, torch files) `begin == end == 0`; for listings `file` is `NO_FILE`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path = NO_FILE
    begin: int = 0
    end: int = 0

    @property
    def count(self) -> int:
        """The number of elements, as the stored shape has it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes, from dtype and shape."""
        return self.count * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """One file's header: its tensors by offset, its metadata, and where the data begin (length field included)."""

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    data_begin: int


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file.

    Raises a MapError, C507: the file is cut short or no safetensors file, the header is too long, no JSON, names a
    tensor twice, has an unknown dtype or a bad shape, or offsets that leave the file, overlap or leave gaps.
    """
    size = file_size(path)
    raw = header_bytes(path)
    return parse_header(raw, path, size - len(raw))


def header_bytes(path: Path) -> bytes:
    """The length field and the JSON of a safetensors file, byte for byte; C507 when they are not there."""
    size = file_size(path)
    if size < LENGTH_BYTES:
        raise bad_file(path, f"the file has {size} bytes; a safetensors file begins with 8 that state a length")
    length = int.from_bytes(read_bytes(path, LENGTH_BYTES, "header length"), "little")
    if length > min(MAX_TEXT_BYTES, size - LENGTH_BYTES):
        raise _bad_length(path, length, size - LENGTH_BYTES)
    return read_bytes(path, LENGTH_BYTES + length, "header", MAX_TEXT_BYTES + LENGTH_BYTES)


def parse_header(raw: bytes, file: Path, data_size: int | None = None) -> Header:
    """Validate header bytes (length field and JSON) of a file whose data have `data_size` bytes (None: any number)."""
    header = parse_object(file, decode(file, raw[LENGTH_BYTES:], "header"), "header")
    metadata = _metadata(file, header.pop("__metadata__", None))
    base = len(raw)
    tensors = []
    for name, info in header.items():
        dtype, shape, begin, end = _entry(file, name, info)
        tensors.append(StoredTensor(name, dtype, shape, file, base + begin, base + end))
    tensors.sort(key=attrgetter("begin", "end"))
    _check_cover(file, tensors, base, data_size)
    return Header(tuple(tensors), metadata, base)


def checked_size(file: Path, name: str, dtype: Any, shape: Any) -> int:
    """The bytes that a tensor needs; C507 when the dtype is unknown or the shape is no list of sane sizes."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad_file(file, f"tensor `{name}` has dtype {dtype!r}, expected one of {', '.join(BITS)}")
    if type(shape) not in (list, tuple) or len(shape) > _MAX_RANK:
        raise bad_file(file, f"tensor `{name}` has shape {_short(shape)}, expected a list of at most {_MAX_RANK} sizes")
    count, empty = 1, False
    for size in shape:
        if type(size) is not int or size < 0:
            message = f"tensor `{name}` has shape {_short(shape)}, expected whole numbers that are not negative"
            raise bad_file(file, message)
        empty = empty or size == 0
        count *= size or 1
        if count > _MAX_COUNT:
            raise bad_file(file, f"tensor `{name}` has shape {_short(shape)}: more elements than 2**63 - 1")
    bits = 0 if empty else count * BITS[dtype]
    if bits % 8:
        raise bad_file(file, f"tensor `{name}` {list(shape)} of {dtype} fills {bits} bits, expected whole bytes")
    return bits // 8


def _entry(file: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape and offsets of one tensor, each checked by itself."""
    if type(info) is not dict or not info.keys() >= _FIELDS:
        raise bad_file(file, f"tensor `{name}` is {_short(info)}, expected an object with dtype, shape, data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    needed = checked_size(file, name, dtype, shape)
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or not (0 <= begin <= _MAX_COUNT and 0 <= end <= _MAX_COUNT):
        raise bad_file(file, f"tensor `{name}` has data_offsets {_short(offsets)}, expected [begin, end]")
    if end < begin:
        raise bad_file(file, f"tensor `{name}` ends before it begins: data_offsets {_short(offsets)}")
    if end - begin != needed:
        message = f"tensor `{name}` {shape} of {dtype} needs {needed:,} bytes, its data_offsets span {end - begin:,}"
        raise bad_file(file, message)
    return dtype, tuple(shape), begin, end


def _check_cover(file: Path, tensors: list[StoredTensor], base: int, data_size: int | None) -> None:
    """The tensors, sorted by offset, cover the data once, from the first byte to the last."""
    previous, covered = "", base
    stop = None if data_size is None else base + data_size
    for tensor in tensors:
        if stop is not None and tensor.end > stop:
            message = f"tensor `{tensor.name}` ends at byte {tensor.end:,}, but the file has {stop:,}"
            raise bad_file(file, message, advice="the file is cut short: fetch it again")
        if tensor.begin > covered:
            message = f"bytes {covered:,} to {tensor.begin:,}, before tensor `{tensor.name}`, belong to no tensor"
            raise bad_file(file, message)
        if tensor.begin < covered:
            message = f"tensor `{tensor.name}` begins at byte {tensor.begin:,}, within tensor `{previous}`"
            raise bad_file(file, f"{message} that ends at {covered:,}")
        previous, covered = tensor.name, tensor.end
    if stop is not None and covered < stop:
        raise bad_file(file, f"{stop - covered:,} bytes follow the last tensor, expected none")


def _metadata(file: Path, value: Any) -> dict[str, str]:
    """The `__metadata__` entry; absent and null are empty, as in safetensors."""
    if value is None:
        return {}
    if type(value) is not dict or any(type(text) is not str for text in value.values()):
        raise bad_file(file, f"__metadata__ is {_short(value)}, expected an object of strings")
    return value


def _bad_length(path: Path, length: int, rest: int) -> Exception:
    """What to say of a length that cannot be: often the file is something else."""
    pointer = read_bytes(path, min(rest, 24), "header").startswith(b"version https://git-lfs")
    if pointer:
        return bad_file(path, "found a Git LFS pointer, expected a safetensors file", advice="run `git lfs pull`")
    if length > MAX_TEXT_BYTES:
        message = f"the header's length is stated as {length:,} bytes, at most {MAX_TEXT_BYTES:,} are allowed"
        return bad_file(path, message, advice="is this a safetensors file?")
    message = f"the header's length is stated as {length:,} bytes, but {rest:,} follow"
    return bad_file(path, message, advice="the file is cut short, or is no safetensors file")


def _short(value: Any, depth: int = 2) -> str:
    """A value as text, never long: `repr` of a hostile number or list can take minutes."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, (list, tuple, dict)):
        kept = [_short(item, depth - 1) for item in list(value)[:8]] if depth else []
        inner = ", ".join(kept + ["..."] * (len(value) > len(kept)))
        return f"{{{inner}}}" if isinstance(value, dict) else f"[{inner}]"
    return repr(value[:80] if isinstance(value, str) else value)
