"""`mapdsl explain FILE NAME`: where a tensor comes from and goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mapdsl
from mapdsl.cli.main import main

LISTINGS = Path(__file__).parent / "data" / "listings"
CONFIG = str(LISTINGS / "deepseek_v4_flash.config.json")

MAP = """\
map moves: hf <-> native

param L = layers
param h = heads
param g = groups
param r = h // g

index i < L
index s < 3
index t >= L

codec fp8 = block_scaled(f8e4m3, block=128x128, scale="{key}_s", payload="{key}_q")

layers.{i}.q.weight [(h c) d] + layers.{i}.k.weight [(g c) d] + layers.{i}.v.weight [(g c) d] <->
    layers.{i}.qkv.weight [(h c + g c + g c) d]
Q.weight [(g r c) d] + K.weight [(g c) d] + V.weight [(g c) d] <-> QKV.weight [(g (r c + c + c)) d]
{j:q|k|v}_proj.weight [(h c) d]   <-> query_key_value.weight [(h j c) d]
c_attn.weight [d (j h c)]         <-> attn.{j:q|k|v}.weight [(h c) d]
wq.weight [(h t 2) d] as fp8|raw  <-> rotated.weight [(h 2 t) d]
scan.{s}.kernel [d f]             <-> scan.kernel [d s f]
e.{repeat j:gate|up}.lora [x d]   <-> e.lora [x d]
layers.{i}.bias                   <-> layers.{i}.bias where i >= 2
tied.weight [h d]                 <-> tied.weight
rotary                            ->  _
_                                 <-  made.{i}.bias
_                                 <-> head.weight [h d] = tied.weight
_                                 <-> ones [h] = 1
maybe.weight                      <-> perhaps.weight optional
keep.{..}                         <-> kept.{..} else
accept old.{i}.bias for layers.{i}.bias
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moves.map").write_text(MAP.replace("index t >= L\n", ""))
    return tmp_path


def explained(name: str, *words: str, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Label and text of every line that explains a name; a line without a label goes on with the one before."""
    assert main(["explain", "moves.map", name, *words]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == name
    label, found = "", []
    for line in lines:
        if not line:
            break
        width = len(line) - len(line.lstrip())
        if width == 2:
            label, _, text = line[2:].partition("  ")
        else:
            text = line
        found.append((label, text.strip()))
    return found


SIZES = ("--param", "L=4", "--param", "h=8", "--param", "g=2")


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("layers.1.q.weight", "goes to", "layers.1.qkv.weight[0:h*c]"),
        ("layers.1.k.weight", "goes to", "layers.1.qkv.weight[h*c:h*c+g*c]"),
        ("layers.1.v.weight", "goes to", "layers.1.qkv.weight[h*c+g*c:h*c+g*c+g*c]"),
        ("layers.1.qkv.weight", "comes from", "piece 2: [h*c:h*c+g*c] is layers.1.k.weight"),
        ("K.weight", "goes to", "QKV.weight seen as [g (r c + c + c) d], [:, r*c:r*c+c]"),
        ("QKV.weight", "comes from", "piece 1: seen as [g (r c + c + c) d], [:, 0:r*c] is Q.weight"),
        ("k_proj.weight", "goes to", "query_key_value.weight seen as [h j c d], [:, 1]"),
        ("query_key_value.weight", "comes from", "seen as [h j c d], [:, j] is {j:q|k|v}_proj.weight"),
        ("query_key_value.weight", "comes from", "for j = 0 (`q`), 1 (`k`), 2 (`v`)"),
        (
            "c_attn.weight",
            "goes to",
            "[:, j*h*c:(j+1)*h*c] is attn.{j:q|k|v}.weight, axes h c d there in the order d h c here",
        ),
        ("attn.v.weight", "comes from", "c_attn.weight[:, 2*h*c:3*h*c], axes d h c there in the order h c d here"),
        ("attn.v.weight", "with", "j = 2 (`v`)"),
        ("wq.weight", "goes to", "rotated.weight, axes h 2 t d there in the order h t 2 d here"),
        ("wq.weight_s", "part of", "wq.weight, where that is stored as fp8"),
        ("wq.weight_q", "part of", "wq.weight, where that is stored as fp8"),
        ("wq.weight", "formats", "fp8: wq.weight_q F8_E4M3, with wq.weight_s F32 or BF16 or F16, one a 128x128 block"),
        ("wq.weight", "formats", "raw: as it is"),
        ("rotated.weight", "in hf", "raw: as it is"),
        ("wq.weight", "law", "hf -> native -> hf: bit; without the complement lossy (fp8: scales are found anew)"),
        ("wq.weight", "law", "native -> hf -> native: lossy (rounded to fp8)"),
        ("scan.1.kernel", "goes to", "scan.kernel[:, 1]"),
        ("scan.kernel", "comes from", "[:, s] is scan.{s}.kernel"),
        ("scan.kernel", "comes from", "for 0 <= s < 3"),
        ("e.up.lora", "law", "hf -> native -> hf: bit, guarded (copies of j are compared)"),
        ("layers.3.bias", "rule", "moves.map:21: layers.{i}.bias <-> layers.{i}.bias where i >= 2"),
        ("layers.3.bias", "range", "0 <= i < L"),
        ("layers.3.bias", "where", "i >= 2"),
        ("layers.3.bias", "where", "for example L = 4"),
        ("layers.3.bias", "also as", "old.3.bias  (moves.map:29)"),
        ("old.3.bias", "legacy", "an old spelling of layers.3.bias  (moves.map:29)"),
        ("old.3.bias", "goes to", "layers.3.bias"),
        ("rotary", "goes to", "nothing: read if there, not kept, never written"),
        ("rotary", "law", "hf -> native -> hf: none (dropped)"),
        ("made.0.bias", "comes from", "nothing: not made when reading, dropped when writing"),
        ("head.weight", "value", "= tied.weight: made when reading; compared when writing"),
        ("ones", "value", "= 1: made when reading; compared when writing"),
        ("maybe.weight", "optional", "it may be absent"),
        ("maybe.weight", "shape", "kept as it is"),
        ("keep.a.b", "with", "{..} = `a.b`"),
        ("keep.a.b", "goes to", "kept.a.b"),
        ("kept.a.b", "comes from", "keep.a.b"),
        ("kept.a.b", "side", "native (native)"),
    ],
)
def test_without_a_config(name: str, label: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (label, text) in explained(name, capsys=capsys)


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("layers.1.k.weight", "range", "0 <= i < L = 4"),
        ("layers.1.k.weight", "shape", "[(g c) d] with g = 2"),
        ("layers.1.k.weight", "goes to", "layers.1.qkv.weight[h*c:h*c+g*c]"),
        ("K.weight", "shape", "[(g c) d] with g = 2"),
    ],
)
def test_with_params(name: str, label: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (label, text) in explained(name, *SIZES, capsys=capsys)


def test_a_guard_that_shuts_a_name_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "moves.map", "layers.1.bias", *SIZES]) == 1
    shown = capsys.readouterr().out
    assert "it does not apply under this config: its guard does not hold" in shown
    assert "goes to" not in shown


def test_a_number_outside_of_its_range(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "moves.map", "layers.9.bias", *SIZES]) == 1
    stored, _ = capsys.readouterr().out.split("\n\n")
    shown = [line.split(None, 1) for line in stored.splitlines()[1:]]
    reason = "it does not apply under this config: a number lies outside the range of its index"
    assert [text for label, text in shown if label in ("with", "but", "range")] == ["i = 9", reason, "0 <= i < L = 4"]


def test_the_params_of_a_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moves.map").write_text(
        "map m: hf <-> native\nparam D = d\nparam T = t\nindex i < 4\na.{i} <-> b.{i} where i >= D and T[i] > 0\n"
    )
    lines = explained("a.3", "--param", "D=1", "--param", "T=[0,0,0,1]", capsys=capsys)
    assert ("where", "i >= D and T[i] > 0  (D = 1)") in lines


def test_a_wildcard_carries_only_what_no_rule_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "keep.{i}.bias <-> narrow.{i}.bias where i >= 2\nkeep.{..} <-> kept.{..} else\n"
    text = "map wild: hf <-> native\n\nparam L = layers\n\nindex i < L\n\n"
    (folder / "wild.map").write_text(text + rule)
    assert main(["explain", "wild.map", "keep.3.bias"]) == 0
    shown = capsys.readouterr().out
    assert "goes to  narrow.3.bias" in shown
    assert "kept.3" not in shown
    # A guard is no part of a name: it shuts the name out, from the wildcard too. A range is part of it.
    assert main(["explain", "wild.map", "keep.1.bias", "--param", "L=4"]) == 1
    assert "kept.1" not in capsys.readouterr().out
    assert main(["explain", "wild.map", "keep.9.bias", "--param", "L=4"]) == 0
    assert "goes to  kept.9.bias" in capsys.readouterr().out


def test_both_sides_of_one_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "moves.map", "layers.3.bias"]) == 0
    stored, native = capsys.readouterr().out.split("\n\n")
    assert "side     stored (hf)" in stored
    assert "side        native (native)" in native


def test_hints_at_names_that_are_near(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "moves.map", "layers.1.q.wieght"]) == 1
    assert "help: near: layers.{i}.q.weight" in capsys.readouterr().err


def test_sizes_of_the_released_config(capsys: pytest.CaptureFixture[str]) -> None:
    name = "layers.3.ffn.experts.7.w3.weight"
    assert main(["explain", "deepseek_v4", name, "--config", CONFIG]) == 0
    target = "model.layers.3.mlp.experts.gate_and_up_projs[7, :, 2048:4096], "
    assert f"goes to  {target}" in capsys.readouterr().out


def test_layers_behind_the_last_are_those_of_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "deepseek_v4", "layers.43.ffn.gate.weight", "--config", CONFIG]) == 0
    shown = capsys.readouterr().out
    assert "an old spelling of mtp.0.ffn.gate.weight" in shown


# --- what is told is what happens --------------------------------------------------------------------------------


def test_slices_are_where_the_adapter_puts_the_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The slices that explain tells, held against the compiled adapter on numbered elements."""
    source = MAP.split("{j:q")[0].replace("index s < 3\nindex t >= L\n", "")
    (folder / "sums.map").write_text(source)
    sizes = {"h": 6, "g": 3, "c": 5, "d": 7}
    rows = {"q": 30, "k": 15, "v": 15, "Q": 30, "K": 15, "V": 15}
    names = {**{k: f"layers.0.{k}.weight" for k in "qkv"}, **{k: f"{k}.weight" for k in "QKV"}}
    numbers = iter(range(10**6))
    state = {
        names[k]: torch.tensor([next(numbers) for _ in range(rows[k] * sizes["d"])]).reshape(rows[k], sizes["d"])
        for k in rows
    }
    native = mapdsl.load("sums.map").adapter(L=1, h=6, g=3).from_hf(state)
    for name, tensor in state.items():
        assert main(["explain", "sums.map", name]) == 0
        target = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  goes to"))[9:].strip()
        assert torch.equal(_followed(target, native, {**sizes, "r": 2}).reshape(tensor.shape), tensor)


def _followed(target: str, native: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
    """The elements that `NAME seen as [SHAPE], [SLICES]` stands for."""
    whole, _, slices = target.partition(" seen as ")
    if slices:
        view, _, slices = slices.partition(", [")
        tensor = native[whole].reshape(sizes["g"], -1, sizes["d"])
        assert view == "[g (r c + c + c) d]"
    else:
        whole, _, slices = whole.partition("[")
        tensor = native[whole]
    places = []
    for text in slices.rstrip("]").split(", "):
        begin, _, end = text.partition(":")
        places.append(slice(_number(begin, sizes), _number(end, sizes)))
    return tensor[tuple(places)]


def _number(text: str, sizes: dict[str, int]) -> int | None:
    """The value of `h*c+g*c`."""
    total = 0
    for term in text.split("+") if text else ():
        product = 1
        for factor in term.split("*"):
            product *= sizes.get(factor) or int(factor)
        total += product
    return total if text else None
