"""`mapdsl check --ranks`, whether a map's tensors can be cut over so many ranks; `explain --rank`, what one holds."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import mapdsl
from mapdsl.cli.main import main
from mapdsl.runtime.errors import ConversionError

MAP = """map attention: hf <-> native

param h = heads
param g = groups
param c = head_dim
param E = experts

index e < E

mesh tp shards h, g or copies, f
mesh ep shards e

codec fp8 = block_scaled(f8e4m3, block=128x128, scale="{key}_scale_inv")
codec rows = block_scaled(f8e4m3, block=1x*, scale="{key}_scale")

q.weight [(h c) d] as fp8 + k.weight [(g c) d] as fp8 <-> qk.weight [(h c + g c) d]
o.weight [d (h c)] as rows <-> o.weight [d (h c)]
experts.{e}.up.weight [f d] <-> experts.{e}.up.weight [f d]
norm.weight <-> norm.weight [d]
"""
PARAMS = {"h": 32, "g": 8, "c": 64, "E": 4}


def check(tmp_path: Path, *ranks: str, text: str = MAP, **params: int) -> int:
    file = tmp_path / "attention.map"
    file.write_text(text)
    words = [word for name, value in {**PARAMS, **params}.items() for word in ("--param", f"{name}={value}")]
    return main(["check", str(file), *words, *(word for one in ranks for word in ("--ranks", one))])


def test_what_divides_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "tp=4", "ep=2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[2:]] == [
        "over 4 ranks of tp x 2 ranks of ep: 7 hf names divided, 1 on every rank",
        "over 4 ranks of tp x 2 ranks of ep: 6 native names divided, 1 on every rank",
        "not checked, as neither map nor config says the size: `f`",
    ]


@pytest.mark.parametrize(
    ("ranks", "codes"),
    [
        (["tp=6"], ["P453: the axis `h` has 32", "P453: the axis `g` has 8"]),
        (["ep=3"], ["P453: the axis `e` has 4 positions, which do not divide over 3 ranks of `ep`"]),
        (["tp=32"], ["P454: a share ends at position 64", "P454: a share ends at position 64"]),
        (["tp=16"], ["P454: a share ends at position 64"]),  # of k alone: half of the ranks hold the same group
        (["tp=1"], []),
    ],
)
def test_what_does_not(ranks: list[str], codes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, *ranks) == bool(codes)
    found = [line.partition("error[")[2].replace("]:", ":", 1) for line in capsys.readouterr().out.splitlines()]
    found = [line for line in found if line]
    assert len(found) == len(codes)
    assert all(line.startswith(code) for line, code in zip(found, codes, strict=True))


def test_a_block_as_long_as_its_dimension_is_cut_with_it(tmp_path: Path) -> None:
    """Every rank has the scales of its rows, whichever of their columns it holds."""
    text = MAP.replace("] as fp8", "]")
    assert check(tmp_path, "tp=32", text=text) == 0


@pytest.mark.parametrize(
    ("codec", "shape", "message"),
    [
        # Bytes hold two elements, though one scale is for all of a row.
        (
            "block_scaled(f4e2m1, block=1x*)",
            "d h",
            "a share ends at position 3 of a dimension, within a block of 2",
        ),
        (
            "block_scaled(f4e2m1, block=1x4)",
            "d h",
            "a share ends at position 3 of a dimension, within a block of 4",
        ),
        ("block_scaled(f4e2m1, block=1x4)", "h d 16", ""),
        ("group_int(bits=8, groups=1)", "h d 16", "a tensor stored as few cannot be cut over ranks"),
    ],
)
def test_what_a_format_stores_as_one(
    codec: str, shape: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` refuses what the runtime does, in the same words."""
    text = "map m: hf <-> native\nparam h = heads\nparam d = width\nmesh tp shards h\n"
    text += f"codec few = {codec}\nw [{shape}] as few <-> v [{shape}] as few\n"
    file = tmp_path / "m.map"
    file.write_text(text)
    words = [str(file), "--param", "h=12", "--param", "d=8", "--tp", "4"]
    assert main(["check", *words]) == bool(message)
    assert message in capsys.readouterr().out
    adapter = mapdsl.load(file).adapter(None, h=12, d=8)
    (shown,) = adapter.list_shares("hf", {}).shown
    sizes = {"h": 12, "d": 8, "16": 16}
    state = shown.stored[0].encode("w", torch.randn([sizes[axis] for axis in shape.split()])).parts
    refuses = pytest.raises(ConversionError, match=message) if message else nullcontext()
    with refuses:
        adapter.shard(state, {"tp": 4}, {"tp": 1}, side="hf")


@pytest.mark.parametrize("how", ["unevenly", "by ceil"])
def test_shares_that_differ(how: str, tmp_path: Path) -> None:
    text = MAP.replace("shards h, g or copies, f", f"shards h {how}, g {how}, f").replace(" as fp8", "")
    assert check(tmp_path, "tp=6", text=text) == 0


def test_a_mesh_that_the_map_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "pp=2") == 1
    assert "error[N113]: the map has no mesh `pp`\nhelp: it has `tp`, `ep`" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["tp=0"], ["tp"], ["tp=two"], ["tp=2", "tp=2"]])
def test_numbers_of_ranks(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(check(tmp_path, *words))
    assert ended.value.code == 2
    assert "--ranks" in capsys.readouterr().err


# --- explain ---


def explain(tmp_path: Path, name: str, *words: str, text: str = MAP, **params: int) -> int:
    file = tmp_path / "attention.map"
    file.write_text(text)
    given = [word for key, value in {**PARAMS, **params}.items() for word in ("--param", f"{key}={value}")]
    return main(["explain", str(file), name, *given, *words])


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        (
            "qk.weight",
            ["--ranks", "tp=4", "--rank", "tp=2"],
            [
                "tp 2 of 4",
                "hf: q.weight[1024:1536, :]",
                "hf: k.weight[256:384, :]",
                "native: qk.weight[1024:1536 + 2304:2432, :]",
            ],
        ),
        (
            "k.weight",
            ["--ranks", "tp=16", "--rank", "tp=15"],
            [
                "tp 15 of 16",
                "hf: q.weight[1920:2048, :]",
                "hf: k.weight[448:512, :]",
                "native: qk.weight[1920:2048 + 2496:2560, :]",
            ],
        ),
        (
            "norm.weight",
            ["--ranks", "tp=4"],
            ["tp 0 of 4", "hf: norm.weight, all of it", "native: norm.weight, all of it"],
        ),
        (
            "experts.1.up.weight",
            ["--ranks", "ep=2", "--rank", "ep=1"],
            ["ep 1 of 2", "hf: experts.1.up.weight, not here", "native: experts.1.up.weight, not here"],
        ),
        (
            "experts.2.up.weight",
            ["--ranks", "ep=2", "--rank", "ep=1", "--ranks", "tp=2"],
            [
                "ep 1 of 2, tp 0 of 2",
                "hf: experts.2.up.weight[a share of f, :]",
                "native: experts.2.up.weight[a share of f, :]",
            ],
        ),
    ],
)
def test_what_a_rank_holds(
    name: str, words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path, name, *words) == 0
    first, *_ = capsys.readouterr().out.split("\n\n")
    lines = [line.strip() for line in first.partition("on rank")[2].splitlines()]
    assert lines == expected


def test_shares_of_a_transposed_and_of_an_interleaved_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = MAP.replace("o.weight [d (h c)] as rows <-> o.weight [d (h c)]", "o.weight [d (h c)] <-> o.weight [(c h) d]")
    assert explain(tmp_path, "o.weight", "--ranks", "tp=16", "--rank", "tp=1", text=text, h=32, c=2) == 0
    out = capsys.readouterr().out
    assert "hf: o.weight[:, 4:8]" in out and "native: o.weight[2:4 + 34:36, :]" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--ranks", "tp=4", "--rank", "tp=4"], 2, "--rank tp=4 is none of 4 (--ranks tp=N says how many)"),
        (["--rank", "tp=1"], 2, "--rank tp=1 is none of 1"),
        (["--ranks", "tp=5"], 1, "error[P453]: the axis `h` has 32 positions"),
        (["--ranks", "pp=5"], 1, "error[N113]: the map has no mesh `pp`"),
        (["--ranks", "tp=4", "--rank", "tp=x"], 2, "expected MESH=R with R from 0 on, found 'tp=x'"),
    ],
)
def test_ranks_that_there_are_not(
    words: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(explain(tmp_path, "o.weight", *words))
    assert ended.value.code == status
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


PADDED = """map padded: hf <-> native

param V = vocab

mesh pp shards s
mesh tp shards V

wte.weight [V d] <-> emb.weight [pad(V, 4*size(tp)) d] where rank(pp) == 0
ln.weight [d] <-> norm.weight where rank(pp) == size(pp) - 1
x.weight [s d] <-> x.weight
"""


def test_what_is_padded_is_rounded_up_before_it_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "padded.map"
    file.write_text(PADDED)
    words = ["--param", "V=11", "--tp", "4"]
    assert main(["check", str(file), *words]) == 0
    assert main(["explain", str(file), "emb.weight", *words, "--rank", "2"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == ["hf: wte.weight[8:11, :]", "native: emb.weight[8:12, :]"]
    assert "where       rank(pp) == 0" in lines
    assert main(["explain", str(file), "emb.weight", *words, "--rank", "3"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == ["hf: wte.weight[nothing, :]", "native: emb.weight[12:16, :]"]


def test_what_stands_in_padding_is_not_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "padded.map"
    file.write_text(PADDED)
    assert main(["laws", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "wte.weight" in line)
    assert line.split()[-10:] == ["bit", "bit", "lossy", "what", "stands", "in", "padding", "is", "not", "kept"]


@pytest.mark.parametrize(("guard", "holds"), [("rank(pp) >= size(pp)", False), ("rank(pp) == size(pp) - 1", True)])
def test_ranks_are_numbered_from_0(tmp_path: Path, capsys: pytest.CaptureFixture[str], guard: str, holds: bool) -> None:
    file = tmp_path / "padded.map"
    file.write_text(PADDED.replace("rank(pp) == 0", guard))
    assert main(["check", str(file)]) == (0 if holds else 1)
    assert ("K208" in capsys.readouterr().out) is not holds
