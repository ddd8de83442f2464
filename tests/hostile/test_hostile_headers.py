"""Safetensors headers that are broken or meant to harm: each is refused with a sentence that says why."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import safetensors as reference
from hostile_files import entry, messages, safetensors, with_length

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.headers import read_header
from mapdsl.language.diagnostics import MapError

ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HUGE = "9" * 4000

BROKEN = {
    "empty file": (b"", "the file has 0 bytes; a safetensors file begins with 8"),
    "seven bytes": (b"\0" * 7, "the file has 7 bytes"),
    "length beyond the file": (with_length(b"{}", length=3), "stated as 3 bytes, but 2 follow"),
    "length over 100 MB": (
        with_length(b"{}", length=100_000_001),
        "100,000,001 bytes, at most 100,000,000 are allowed",
    ),
    "length of 2**64 - 1": (with_length(b"{}", length=2**64 - 1), "18,446,744,073,709,551,615 bytes, at most"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html></html>", "the header's length is stated as"),
    "a pickle": (b"\x80\x04\x95\0\0\0\0\0\0\0}\x94.", "the header's length is stated as"),
    "not UTF-8": (with_length(b'{"a\xff":1}'), "the header is not UTF-8 text: byte 0xff at 3"),
    "empty header": (with_length(b""), "the header is not the JSON expected"),
    "not JSON": (with_length(b"{'a': 1}"), "the header is not the JSON expected: Expecting property name"),
    "two values": (with_length(b"{}{}"), "the header is not the JSON expected: Extra data"),
    "NUL after the header": (with_length(b"{}\0"), "the header is not the JSON expected"),
    "byte order mark": (with_length(b"\xef\xbb\xbf{}"), "the header is not the JSON expected"),
    "a list": (with_length(b"[]"), "the header is a JSON list, expected an object"),
    "nested too deeply": (with_length(b'{"a":' + b"[" * 200_000), "the header is nested too deeply"),
    "NaN": (with_length(b'{"a":NaN}'), "NaN is no JSON number"),
    "name twice": (with_length(f'{{"a":{ONE},"a":{ONE}}}'.encode(), b"\0"), "`a` is named twice in one object"),
    "name twice, escaped": (with_length(f'{{"a":{ONE},"\\u0061":{ONE}}}'.encode(), b"\0"), "`a` is named twice"),
    "field twice": (with_length(f'{{"a":{ONE[:-1]},"dtype":"I8"}}}}'.encode(), b"\0"), "`dtype` is named twice"),
    "half a character": (with_length(f'{{"\\ud800":{ONE}}}'.encode(), b"\0"), "half of a surrogate pair"),
    "no object": (safetensors({"a": 5}), "tensor `a` is 5, expected an object with dtype, shape, data_offsets"),
    "no offsets": (safetensors({"a": {"dtype": "U8", "shape": []}}), "expected an object with dtype, shape"),
    "unknown dtype": (safetensors({"a": entry("F12")}, b"\0"), "tensor `a` has dtype 'F12', expected one of BOOL, F4"),
    "dtype in torch's spelling": (safetensors({"a": entry("float32")}, b"\0"), "has dtype 'float32'"),
    "dtype is a list": (safetensors({"a": entry(["U8"])}, b"\0"), "tensor `a` has dtype ['U8']"),
    "shape is a number": (with_length(b'{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', b"\0"), "has shape 1,"),
    "negative size": (safetensors({"a": entry(shape=[-1])}, b"\0"), "has shape [-1], expected whole numbers that"),
    "two negative sizes": (safetensors({"a": entry(shape=[-1, -1])}, b"\0"), "that are not negative"),
    "size with a point": (safetensors({"a": entry(shape=[1.0])}, b"\0"), "has shape [1.0], expected whole numbers"),
    "size is true": (safetensors({"a": entry(shape=[True])}, b"\0"), "has shape [True], expected whole numbers"),
    "size is a string": (safetensors({"a": entry(shape=["1"])}, b"\0"), "has shape ['1'], expected whole numbers"),
    "too many elements": (safetensors({"a": entry(shape=[2**32, 2**32])}, b"\0"), "more elements than 2**63 - 1"),
    "overflow hidden by a zero": (
        safetensors({"a": entry(shape=[2**32, 2**32, 0], offsets=[0, 0])}),
        "more elements than 2**63 - 1",
    ),
    "size of 4,000 digits": (
        with_length(f'{{"a":{{"dtype":"U8","shape":[{HUGE}],"data_offsets":[0,1]}}}}'.encode(), b"\0"),
        "has shape [a number of 13,288 bits]: more elements",
    ),
    "size of 100,000 digits": (
        with_length(f'{{"a":{{"dtype":"U8","shape":[{"9" * 100_000}],"data_offsets":[0,1]}}}}'.encode(), b"\0"),
        "the header is not the JSON expected",
    ),
    "a thousand sizes": (safetensors({"a": entry(shape=[1] * 1000)}, b"\0"), "expected a list of at most 64 sizes"),
    "size of bits no byte holds": (
        safetensors({"a": entry("F4", [3], [0, 2])}, bytes(2)),
        "tensor `a` [3] of F4 fills 12 bits, expected whole bytes",
    ),
    "one offset": (safetensors({"a": entry(offsets=[0])}, b"\0"), "has data_offsets [0], expected [begin, end]"),
    "three offsets": (safetensors({"a": entry(offsets=[0, 1, 2])}, b"\0"), "expected [begin, end]"),
    "negative offset": (safetensors({"a": entry(offsets=[-1, 0])}, b"\0"), "has data_offsets [-1, 0], expected"),
    "offset of 4,000 digits": (
        with_length(f'{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[{HUGE},{HUGE}]}}}}'.encode()),
        "has data_offsets [a number of 13,288 bits, a number of 13,288 bits]",
    ),
    "end before begin": (safetensors({"a": entry(offsets=[1, 0])}, b"\0"), "tensor `a` ends before it begins"),
    "too few bytes": (
        safetensors({"a": entry("F32", [2, 3], [0, 20])}, bytes(20)),
        "tensor `a` [2, 3] of F32 needs 24 bytes, its data_offsets span 20",
    ),
    "file cut short": (
        safetensors({"a": entry("F32", [2], [0, 8])}, bytes(7)),
        "tensor `a` ends at byte 77, but the file has 76",
    ),
    "overlap": (
        safetensors({"a": entry(shape=[4], offsets=[0, 4]), "b": entry(shape=[4], offsets=[2, 6])}, bytes(6)),
        "tensor `b` begins at byte 130, within tensor `a` that ends at 132",
    ),
    "same place twice": (
        safetensors({"a": entry(), "b": entry()}, b"\0"),
        "tensor `b` begins at byte 128, within tensor `a` that ends at 129",
    ),
    "gap": (
        safetensors({"a": entry(), "b": entry(offsets=[2, 3])}, bytes(3)),
        "bytes 129 to 130, before tensor `b`, belong to no tensor",
    ),
    "gap at the start": (safetensors({"a": entry(offsets=[1, 2])}, bytes(2)), "bytes 68 to 69, before tensor `a`"),
    "trailing bytes": (safetensors({"a": entry()}, bytes(4)), "3 bytes follow the last tensor, expected none"),
    "bytes without a tensor": (safetensors({}, b"evil"), "4 bytes follow the last tensor"),
    "metadata is a list": (safetensors({"__metadata__": []}), "__metadata__ is [], expected an object of strings"),
    "metadata holds a number": (safetensors({"__metadata__": {"a": 1}}), "expected an object of strings"),
    "metadata is a tensor": (safetensors({"__metadata__": entry()}, b"\0"), "expected an object of strings"),
}

# Refused here, read by safetensors: what a name means would depend on the reader, or torch could not hold it.
STRICTER = {"name twice", "name twice, escaped", "a thousand sizes", "overflow hidden by a zero"}


@pytest.mark.parametrize("case", BROKEN)
def test_is_refused(tmp_path: Path, case: str) -> None:
    data, expected = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(MapError) as problem:
        open_checkpoint(path)
    assert time.perf_counter() - started < 2
    (found,) = problem.value.diagnostics
    assert found.code == "C507"
    assert expected in found.message
    assert found.subject == str(path)
    assert len(found.render()) < 2000


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - STRICTER))
def test_safetensors_refuses_it_too(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[case][0])
    with pytest.raises((reference.SafetensorError, OSError, ValueError)):
        reference.safe_open(path, "pt").__enter__().keys()


def test_a_file_that_is_none(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    ring = tmp_path / "ring.safetensors"
    ring.symlink_to(ring)
    for path, expected in (
        (pipe, "expected a regular file"),
        (folder, "expected a regular file"),
        (Path("/dev/zero"), "expected a regular file"),
        (ring, "cannot open the file: too many levels of symbolic links"),
        (tmp_path / "absent.safetensors", "cannot open the file: no such file or directory"),
        (tmp_path / "a\0b.safetensors", "cannot open the file"),
    ):
        with pytest.raises(MapError) as problem:
            read_header(path)
        assert expected in messages(problem.value)[0]


def test_a_huge_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((99_999_999_999).to_bytes(8, "little"))
        file.truncate(10**12)
    with pytest.raises(MapError, match="at most 100,000,000 are allowed"):
        open_checkpoint(path)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a\x1b[31m\n": entry("X1")}, b"\0"))
    with pytest.raises(MapError) as problem:
        open_checkpoint(path)
    assert "\x1b" not in str(problem.value)
