"""Headers: read as safetensors reads them, by the standard library alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.headers import BITS, header_bytes, parse_header, read_header
from mapdsl.language.diagnostics import MapError


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(5, dtype=torch.int8), "c": torch.zeros((), dtype=torch.int64)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "ключ": "é\n"})
    header = read_header(path)
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors] == [
        ("c", "I64", (), 8),
        ("b", "F32", (2, 3), 24),
        ("a", "I8", (5,), 5),
    ]
    assert header.metadata == {"format": "pt", "ключ": "é\n"}
    data = path.read_bytes()
    assert header.data_begin == len(header_bytes(path))
    assert header.tensors[0].begin == header.data_begin
    assert header.tensors[-1].end == len(data)
    assert data.startswith(header_bytes(path))


def test_order_in_the_text_does_not_matter() -> None:
    text = json.dumps(
        {
            "b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "note": "ignored, as safetensors does"},
            "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [1, 1]},
            "__metadata__": None,
        }
    ).encode()
    header = parse_header(len(text).to_bytes(8, "little") + text, Path("x"), 2)
    assert [tensor.name for tensor in header.tensors] == ["a", "empty", "b"]
    assert header.metadata == {}


@pytest.mark.parametrize(("dtype", "bits"), BITS.items())
def test_bits_of_each_dtype_agree_with_safetensors(tmp_path: Path, dtype: str, bits: int) -> None:
    path = tmp_path / "x.safetensors"
    for size, is_sound in ((bits, True), (bits + 1, False)):
        text = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        assert _accepts(path) is is_sound
        assert _reference_accepts(path) is is_sound


_NUMBERS = st.one_of(st.integers(0, 9), st.sampled_from([-1, 2**31, 2**62, 2**64, 1.0, True, None, "1"]))
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "X9", None]),
        "shape": st.one_of(st.lists(_NUMBERS, max_size=3), st.none()),
        "data_offsets": st.lists(_NUMBERS, min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3), _ENTRIES, max_size=3), st.integers(0, 40), st.randoms())
def test_verdict_is_that_of_safetensors_on_noise(header: dict[str, Any], size: int, random: Any) -> None:
    _compare(header, size, random)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(BITS)), st.lists(st.integers(0, 4), max_size=3)), max_size=5), st.randoms()
)
def test_verdict_is_that_of_safetensors_near_sound_files(tensors: list[tuple[str, list[int]]], random: Any) -> None:
    header, offset = {}, 0
    for number, (dtype, shape) in enumerate(tensors):
        bits = BITS[dtype]
        for dim in shape:
            bits *= dim
        header[str(number)] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bits // 8]}
        offset += bits // 8
    if header and random.random() < 0.5:
        offsets = header[random.choice(list(header))]["data_offsets"]
        offsets[random.randrange(2)] += random.choice([-1, 1])
    _compare(header, offset + random.choice([0, 0, 0, 1]), random)


def _compare(header: dict[str, Any], size: int, random: Any) -> None:
    items = list(header.items())
    random.shuffle(items)
    text = json.dumps(dict(items), ensure_ascii=random.random() < 0.5).encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        assert _accepts(path) is _reference_accepts(path)


def _accepts(path: Path) -> bool:
    try:
        read_header(path)
    except MapError as problem:
        assert [d.code for d in problem.diagnostics] == ["C507"]
        return False
    return True


def _reference_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as file:
            file.keys()
    except (safetensors.SafetensorError, OSError, ValueError):
        return False
    return True


CHECK_IMPORTS = """
import sys
{extra}
from mapdsl.checkpoint import checkpoint, folding, headers, layout, listing
path = sys.argv[1]
assert len(checkpoint.open_checkpoint(path).tensors) == 459
found = sorted({{"torch", "numpy", "safetensors"}} & sys.modules.keys())
sys.exit(f"imported: {{found}}" if found else 0)
"""


@pytest.mark.parametrize("extra", ["", "import numpy"])
def test_headers_need_neither_torch_nor_numpy(extra: str) -> None:
    """With the second parameter: the test can fail."""
    listing = Path(__file__).parent / "data" / "listings" / "gpt_oss_20b.list"
    command = [sys.executable, "-c", CHECK_IMPORTS.format(extra=extra), str(listing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is not bool(extra), done.stderr
    assert ("imported: ['numpy']" in done.stderr) is bool(extra)


def test_a_hundred_thousand_tensors_open(tmp_path: Path) -> None:
    shards, count = 50, 2000
    weight_map = {}
    for shard in range(shards):
        header = {}
        for number in range(count):
            name = f"model.layers.{shard}.mlp.experts.{number}.down_proj.weight"
            offsets = [number * 2**20, (number + 1) * 2**20]
            header[name] = {"dtype": "BF16", "shape": [512, 1024], "data_offsets": offsets}
            weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        text = json.dumps(header).encode()
        with (tmp_path / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + count * 2**20)  # sparse
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == shards * count
