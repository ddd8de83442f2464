"""`mapdsl diff`: two checkpoints are equal in every name, dtype, shape and bit, or the first that is not is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from conversions import write_state, write_tiny
from hypothesis import given
from hypothesis import strategies as st
from spoiling import State, flip, flip_everywhere, rewritten, state_of

import mapdsl
from mapdsl.checkpoint.byteranges import _flat
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.elements import STRIP_BYTES, Tally, value_text
from mapdsl.checkpoint.headers import BITS, StoredTensor
from mapdsl.checkpoint.listing import write_listing
from mapdsl.cli.main import main

ROOT = Path(__file__).parent.parent


def bits(*values: int) -> torch.Tensor:
    """A float32 tensor of these bits."""
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two copies of one checkpoint with tensors in all of its formats, shared out over other files."""
    first = write_tiny(tmp_path / "first")
    return first, rewritten(first, lambda state: None, shard_bytes=90_000)


def test_files_and_order_make_no_difference(pair):
    found = mapdsl.compare(*pair)
    assert found.equal
    assert found.has_data
    assert len(open_checkpoint(pair[0]).files) != len(open_checkpoint(pair[1]).files)
    assert found.same == len(open_checkpoint(pair[0]).tensors)
    assert found.bytes_compared == sum(t.nbytes for t in open_checkpoint(pair[0]).tensors.values())


def test_a_byte_changed_in_every_tensor_is_found_where_it_is(pair):
    expected = flip_everywhere(pair[1], Random(1))
    found = mapdsl.compare(*pair)
    assert {d.name: d.index for d in found.differences} == expected
    assert {(d.kind, d.differing) for d in found.differences} == {("bytes", 1)}
    assert found.same == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_single_byte_is_found(pair, seed):
    rng = Random(seed)
    tensor = rng.choice(list(open_checkpoint(pair[1]).tensors.values()))
    index = flip(pair[1], tensor.name, rng.randrange(tensor.nbytes), 1 << rng.randrange(8))
    (found,) = mapdsl.compare(*pair).differences
    assert (found.name, found.index, found.differing, found.nbytes) == (tensor.name, index, 1, tensor.nbytes)


def test_the_first_of_several_is_told_and_all_bytes_are_counted(tmp_path):
    one = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    other = one.clone()
    other[1, 0, 2] += 1
    other[1, 2, 3] = -1
    first, second = write_state(tmp_path / "a", {"w": one}), write_state(tmp_path / "b", {"w": other})
    (found,) = mapdsl.compare(first, second).differences
    assert (found.index, found.expected, found.found) == ((1, 0, 2), "14", "15")
    assert (found.differing, found.nbytes) == (1 + 4, 96)
    assert found.place == "w[1, 0, 2]"


def test_bits_decide_not_values(tmp_path):
    nans, zeros = bits(0x7FC00001, 0xFFC00000), bits(0x00000000, 0x80000000)
    first = write_state(tmp_path / "a", {"nan": nans, "zero": zeros})
    assert mapdsl.compare(first, write_state(tmp_path / "same", {"nan": nans, "zero": zeros})).equal
    other = write_state(tmp_path / "b", {"nan": bits(0x7FC00001, 0x7FC00000), "zero": bits(0, 0)})
    nan, zero = sorted(mapdsl.compare(first, other).differences, key=lambda d: d.name)
    assert (nan.index, nan.expected, nan.found) == ((1,), "nan (0xffc00000)", "nan (0x7fc00000)")
    assert (zero.index, zero.expected, zero.found) == ((1,), "-0.0 (0x80000000)", "0.0 (0x00000000)")


def test_scalars_and_empty_tensors(tmp_path):
    state = {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    first = write_state(tmp_path / "a", state)
    assert mapdsl.compare(first, write_state(tmp_path / "same", state)).same == 2
    other = write_state(tmp_path / "b", {"scalar": torch.tensor(2.5), "empty": torch.empty(3, 0)})
    found = {d.name: d for d in mapdsl.compare(first, other).differences}
    assert (found["scalar"].place, found["scalar"].expected) == ("scalar", "1.5 (0x3fc00000)")
    assert (found["empty"].kind, found["empty"].found) == ("shape", "F32 [3, 0]")


def test_a_difference_beyond_the_first_strip(tmp_path):
    rows = 2 * STRIP_BYTES // 1000 + 7
    one = torch.zeros(rows, 1000, dtype=torch.uint8)
    first = write_state(tmp_path / "a", {"w": one})
    one[rows - 1, 999] = 3
    one[STRIP_BYTES // 1000 + 1, 17] = 2
    second = write_state(tmp_path / "b", {"w": one})
    (found,) = mapdsl.compare(first, second).differences
    assert (found.index, found.expected, found.found) == ((STRIP_BYTES // 1000 + 1, 17), "0 (0x00)", "2 (0x02)")
    assert found.differing == 2


# --- elements of every dtype -----------------------------------------------------------------------------------------


def test_a_strip_holds_whole_elements_of_every_dtype():
    assert all(STRIP_BYTES * 8 % width == 0 for width in BITS.values())
    assert STRIP_BYTES % 3 == 0  # four elements of six bits


@given(st.sampled_from(sorted(BITS)), st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_first_element_by_the_plain_reading(dtype, rows, columns, data):
    """Elements cut from one long number of bits, the lowest first."""
    width, columns = BITS[dtype], 4 * columns
    size = rows * columns * width // 8
    one = data.draw(st.binary(min_size=size, max_size=size))
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))
    other = bytearray(one)
    for place in places:
        other[place] ^= data.draw(st.integers(1, 255))
    stored = StoredTensor("w", dtype, (rows, columns))
    tally = Tally(stored)
    half = size // 24 * 12  # strips begin where an element does, of any width
    if half % (max(width // 8, 1)):
        half = 0
    for begin, end in ((0, half), (half, size)):
        tally.compare(begin, bytearray(one[begin:end]), memoryview(other)[begin:end])
    found = tally.difference()
    assert found is not None
    numbers = [int.from_bytes(text, "little") for text in (one, other)]
    elements = [[n >> at & ((1 << width) - 1) for at in range(0, 8 * size, width)] for n in numbers]
    first = next(n for n, (a, b) in enumerate(zip(*elements, strict=True)) if a != b)
    assert found.index == divmod(first, columns)
    assert found.differing == len(places)
    for text, element in zip((found.expected, found.found), (elements[0][first], elements[1][first]), strict=True):
        shown = text.rpartition("(")[2].rstrip(")")
        assert int(shown, 0) & ((1 << width) - 1) == element


@pytest.mark.parametrize(
    ("dtype", "data", "text"),
    [
        ("BF16", b"\x80\x3f", "1.0 (0x3f80)"),
        ("F16", b"\x00\x80", "-0.0 (0x8000)"),
        ("F8_E4M3", b"\x7f", "nan (0x7f)"),
        ("F8_E8M0", b"\x80", "2.0 (0x80)"),
        ("I64", b"\xff" * 8, "-1"),
        ("BOOL", b"\x01", "True (0x01)"),
        ("I8", b"\xfe", "-2 (0xfe)"),
        ("F64", b"\0" * 7 + b"\x40", "2.0 (0x4000000000000000)"),
        ("C64", b"\0\0\x80\x3f\0\0\0\0", "(1+0j) (0x000000003f800000)"),
    ],
)
def test_values_are_told_with_their_bits(dtype, data, text):
    assert value_text(dtype, data) == text


def test_four_bits_are_told_as_numbers():
    tally = Tally(StoredTensor("w", "F4", (2, 2)))
    tally.compare(0, bytearray(b"\x10\x2f"), bytearray(b"\x10\x7f"))
    found = tally.difference()
    assert found is not None
    assert (found.index, found.expected, found.found) == ((1, 1), "1.0 (0x2)", "6.0 (0x7)")


# --- names, dtypes, shapes -------------------------------------------------------------------------------------------


def test_names_on_one_side_only(pair, capsys):
    def change(state: State) -> None:
        for number in (0, 1):
            state.pop(f"layers.{number}.attn_norm.weight")
        state["norm.wait"] = state.pop("norm.weight")

    other = rewritten(pair[1], change)
    found = mapdsl.compare(pair[0], other)
    assert {t.name for t in found.only_first} == {f"layers.{n}.attn_norm.weight" for n in (0, 1)} | {"norm.weight"}
    assert [t.name for t in found.only_second] == ["norm.wait"]
    assert main(["diff", str(pair[0]), str(other)]) == 1
    out = capsys.readouterr().out
    assert f"only in {pair[0]}:\n" in out
    assert "  layers.{0..1}.attn_norm.weight BF16 256\n" in out
    assert f"only in {other}:\n  norm.wait BF16 256\n" in out
    assert out.splitlines()[-1].startswith("different: 3 only in A, 1 only in B, 147 equal, ")


def test_dtypes_and_shapes(tmp_path, capsys):
    first = write_state(tmp_path / "a", {f"{n}.w": torch.zeros(4, 6) for n in range(3)} | {"v": torch.zeros(4)})
    other = {f"{n}.w": torch.zeros(6, 4) for n in range(3)} | {"v": torch.zeros(4, dtype=torch.int32)}
    second = write_state(tmp_path / "b", other)
    assert main(["diff", str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert "  {0..2}.w: another shape: A has F32 [4, 6], B has F32 [6, 4]\n" in out
    assert "  v: another dtype: A has F32 [4], B has I32 [4]\n" in out
    assert out.splitlines()[-1] == "different: 4 differ, 0 equal, 0 B compared"


# --- other kinds -----------------------------------------------------------------------------------------------------


def test_a_torch_file_against_safetensors(tmp_path):
    state = {"w": torch.randn(40, 30), "n": torch.arange(7), "b": torch.randn(3).bfloat16()}
    first = write_state(tmp_path / "a", state)
    strided = {**state, "w": state["w"].T.contiguous().T}
    torch.save(strided, tmp_path / "b.pt")
    assert mapdsl.compare(first, tmp_path / "b.pt").equal
    assert mapdsl.compare(tmp_path / "b.pt", first).equal
    strided["w"][17, 3] = 0
    torch.save(strided, tmp_path / "b.pt")
    (found,) = mapdsl.compare(first, tmp_path / "b.pt").differences
    assert found.index == (17, 3)


@given(st.lists(st.integers(1, 4), max_size=4), st.randoms(use_true_random=False))
def test_ranges_of_strided_tensors(shape, rng):
    order = list(range(len(shape)))
    rng.shuffle(order)
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).permute(order)
    flat = tensor.reshape(-1)
    begin = rng.randint(0, len(flat) - 1)
    end = rng.randint(begin + 1, len(flat))
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in _flat(tensor, begin, end)]), flat[begin:end])


def test_a_listing_is_compared_by_its_headers(pair, tmp_path, capsys):
    listing = tmp_path / "some.list"
    listing.write_text(write_listing(open_checkpoint(pair[0]).tensors.values()))
    flip(pair[1], "norm.weight", 3)
    assert main(["diff", str(pair[1]), str(listing)]) == 0
    assert capsys.readouterr().out == "equal: 150 tensors, no bytes compared: a listing has none\n"
    listing.write_text(listing.read_text().replace("norm.weight BF16 256", "norm.weight BF16 255").split("\n", 2)[2])
    found = mapdsl.compare(pair[1], listing)
    assert found.differences
    assert {d.kind for d in found.differences} == {"shape"}


# --- the command -----------------------------------------------------------------------------------------------------


def test_equal_checkpoints_have_status_0(pair, capsys):
    assert main(["diff", str(pair[0]), str(pair[1])]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("equal: 150 tensors, 1.8 MB compared\n", "")


def test_a_difference_has_status_1_and_is_told(pair, capsys):
    flip(pair[1], "norm.weight", 7, 0x80)
    value = float(state_of(pair[0])["norm.weight"][3])
    assert main(["diff", str(pair[0]), str(pair[1])]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"in {pair[0]} (A) and {pair[1]} (B):"
    assert lines[1].startswith(f"  norm.weight[3]: A has {value} (0x")
    assert f", B has {-value} (0x" in lines[1]
    assert lines[1].endswith("; 1 of 512 bytes differ")
    assert lines[2] == "different: 1 differs, 149 equal, 1.8 MB compared"


def test_the_command_as_json(pair, capsys):
    flip(pair[1], "norm.weight", 7)
    assert main(["diff", str(pair[0]), str(pair[1]), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert [(d["name"], d["index"], d["bytes_differing"]) for d in found["differences"]] == [("norm.weight", [3], 1)]
    assert main(["diff", str(pair[0]), str(pair[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


@pytest.mark.parametrize("words", [[], ["one"], ["one", "two", "three"], ["one", "two", "--what"]])
def test_bad_usage_has_status_2(words, capsys):
    assert main(["diff", *words]) == 2
    assert "usage: mapdsl diff" in capsys.readouterr().err


def test_bad_input_is_told_without_a_traceback(pair, capsys):
    file = pair[1] / open_checkpoint(pair[1]).files[2]
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    assert main(["diff", str(pair[0]), str(pair[1])]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{file}: error[C507]")
    assert main(["diff", str(pair[0]), str(pair[0] / "nothing")]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err


def test_a_file_cut_while_it_is_read(pair, monkeypatch, capsys):
    from mapdsl.checkpoint import compare

    checkpoint = open_checkpoint(pair[1])
    opened = {pair[0]: open_checkpoint(pair[0]), pair[1]: checkpoint}
    monkeypatch.setattr(compare, "open_checkpoint", lambda path: opened[Path(path)])
    os.truncate(pair[1] / checkpoint.files[0], 20_000)
    assert main(["diff", str(pair[0]), str(pair[1])]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{pair[1] / checkpoint.files[0]}: error[C507]: the file ends within tensor")


def test_names_that_bring_control_characters(tmp_path, capsys):
    first = write_state(tmp_path / "a", {"w\x1b[31m": torch.zeros(2), "{x}": torch.zeros(2)})
    second = write_state(tmp_path / "b", {"w\x1b[31m": torch.ones(2), "{x}": torch.zeros(3)})
    assert main(["diff", str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "  {x}: another shape: A has F32 [2], B has F32 [3]\n" in out


def test_names_that_are_no_text(tmp_path, capsys):
    torch.save({"w\udc80": torch.zeros(2), "v": torch.zeros(1)}, tmp_path / "a.pt")
    torch.save({"v": torch.zeros(1)}, tmp_path / "b.pt")
    status = main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")])
    out, err = capsys.readouterr()
    assert status == 1
    assert "w\\udc80 F32 [2]" in out
    assert err == ""


def test_a_bar_is_drawn_on_a_terminal_where_it_is_asked_for(pair, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    mapdsl.compare(*pair)
    assert capsys.readouterr().err == ""
    mapdsl.compare(*pair, progress=True)
    assert "comparing: " in capsys.readouterr().err


# --- what it takes ---------------------------------------------------------------------------------------------------

RUN = """
import pathlib, re, sys
from mapdsl.cli.main import main
status = main(sys.argv[1:])
loaded = sorted({"torch", "numpy", "tqdm"} & sys.modules.keys())
peak = re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print(status, int(peak) // 1024, *loaded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells there what a process took")
def test_large_tensors_are_compared_in_little_memory_and_without_torch(tmp_path):
    """Half a gigabyte in one tensor, of zeros that the disk does not hold."""
    size = 2**29
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    for name in ("a.safetensors", "b.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    words = [sys.executable, "-c", RUN, "diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    line = done.stdout.splitlines()[-1].split()
    assert (line[0], line[2:]) == ("0", [])
    assert int(line[1]) < 100
