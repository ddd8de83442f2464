"""`mapdsl convert --tp 2:8`: checkpoints from ranks to ranks, on one side or from one side to the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mapdsl.checkpoint import rank_layouts
from mapdsl.checkpoint.convert_ranks import convert_ranks
from mapdsl.checkpoint.files import leaves_folder
from mapdsl.checkpoint.journal import partial_folder
from mapdsl.checkpoint.rank_files import RANKS_FILE, open_rank_files, rank_folder
from mapdsl.cli import rank_options
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.resharding import places
from tests.helpers.execution import map_of
from tests.test_resharding import GPT, SIZES, State, assert_same, drawn

MAP = map_of(GPT)
PARAMS = [word for name, value in SIZES.items() for word in ("--param", f"{name}={value}")]


def state_of(adapter: Any) -> State:
    """A left state of any bits; free axes get unequal prime sizes."""
    whole = {"mlp.weight": (7, 5), "router.weight": (5, 5), "wte.weight": (11, 5), "ln_f.weight": (5,)}
    ends = dict.fromkeys(("w1.weight", "w3.weight"), (13, 5)) | {f"v{n}.weight": (5, 72) for n in range(3)}
    state = {}
    for name, (shape, _) in adapter.hf_keys().items():
        last = ".".join(name.split(".")[-2:])
        known = whole.get(last) or ends.get(last) or ((5, 13) if "down" in name else (*shape[:-1], 5))
        state[name] = drawn(tuple(known))
    return state


class Made:
    """A checkpoint `hf`, its tensors and those of the other side."""

    def __init__(self, folder: Path) -> None:
        self.adapter = MAP.adapter(None, **SIZES)
        self.hf = state_of(self.adapter)
        self.native = dict(self.adapter.from_hf(self.hf))
        self.folder = folder
        (folder / "hf").mkdir()
        save_file(self.hf, str(folder / "hf" / "model.safetensors"))
        (folder / "hf" / "config.json").write_text('{"vocab_size": 11}')
        (folder / "hf" / "tokenizer.json").write_text("{}")

    def assert_holds(self, place: Path, ranks: Mapping[str, int], side: str) -> None:
        """A folder holds what ranks are to hold of a side."""
        whole = self.hf if side == "hf" else self.native
        if not ranks:
            assert_same(loaded(place), whole)
            return
        for rank in places(self.adapter, ranks):
            assert_same(loaded(place / rank_folder(rank)), self.adapter.shard(whole, ranks, rank, side=side))


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(str(file)).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("shares"))


@pytest.fixture(scope="module")
def cut(made: Made) -> Path:
    """The native side over four ranks."""
    convert_ranks(made.folder / "hf", made.folder / "n4", MAP, ranks={"tp": (1, 4)}, params=SIZES)
    return made.folder / "n4"


def test_one_checkpoint_becomes_the_shares_of_ranks(made: Made, cut: Path) -> None:
    made.assert_holds(cut, {"tp": 4}, "native")
    record = json.loads((cut / RANKS_FILE).read_text())
    assert record["ranks"] == {"tp": 4}
    assert record["side"] == "native"
    assert sorted(path.name for path in cut.iterdir()) == [RANKS_FILE, "tp-0", "tp-1", "tp-2", "tp-3"]
    assert sorted(path.name for path in (cut / "tp-3").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("ranks", "to"),
    [
        ({"tp": (4, 2)}, "native"),
        ({"tp": (4, 8)}, "native"),
        ({"tp": (4, 1)}, "native"),
        ({"tp": (4, 1)}, "hf"),
        ({"tp": (4, 2), "ep": (1, 3)}, "hf"),
        ({"tp": (4, 1), "pp": (1, 2)}, "native"),
    ],
)
def test_from_ranks_to_ranks(made: Made, cut: Path, tmp_path: Path, ranks: Any, to: str) -> None:
    """Verified and with checksums: what is written is read again, and compared with the shares that it came from."""
    there = tmp_path / "there"
    done = convert_ranks(cut, there, MAP, ranks=ranks, to=to, params=SIZES, verify=True, checksums=True)
    after = {mesh: pair[1] for mesh, pair in ranks.items() if pair[1] > 1}
    assert (done.source_side, done.target_side, done.target_ranks) == ("native", to, after)
    made.assert_holds(there, {mesh: after[mesh] for mesh in ("pp", "tp", "ep") if mesh in after}, to)
    assert all(share.verified is not None and share.verified.tensors for share in done.shares)


def test_the_other_side_is_where_one_goes_if_none_is_said(made: Made, cut: Path, tmp_path: Path) -> None:
    done = convert_ranks(cut, tmp_path / "there", MAP, ranks={"tp": (4, 1)}, params=SIZES)
    assert (done.source_side, done.target_side) == ("native", "hf")
    made.assert_holds(tmp_path / "there", {}, "hf")


def test_the_command(made: Made, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpt.map"
    file.write_text(MAP.source.text)
    words = ["--map", str(file), *PARAMS]
    assert main(["convert", str(cut), str(tmp_path / "two"), *words, "--tp", "4:2", "--to", "native"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"native of 4 tp -> native of 2 tp: {tmp_path / 'two'}"
    made.assert_holds(tmp_path / "two", {"tp": 2}, "native")
    # What is there is enough to know over how many ranks it is cut.
    assert main(["convert", str(tmp_path / "two"), str(tmp_path / "one"), *words, "--quiet"]) == 0
    made.assert_holds(tmp_path / "one", {}, "hf")
    assert main(["convert", str(cut), str(tmp_path / "x"), *words, "--ranks", "tp=2:1"]) == 1
    assert "the checkpoint is cut over tp 4, not over tp 2" in capsys.readouterr().err
    assert main(["convert", str(cut), str(tmp_path / "x"), *words, "--tp", "4"]) == 2
    assert "expected N:M, from so many ranks to so many, found '4'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_json_events_tell_of_all_shares(cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpt.map"
    file.write_text(MAP.source.text)
    words = ["--map", str(file), *PARAMS, "--tp", "4:2", "--to", "native", "--json"]
    assert main(["convert", str(cut), str(tmp_path / "two"), *words]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "done"
    assert [Path(share["destination"]).name for share in last["shares"]] == ["tp-0", "tp-1"]


# --- what is in the way ---


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(MapError) as caught:
        convert_ranks(*arguments, **{"params": SIZES, **options})
    return "; ".join(f"{one.code}: {one.message} ({one.subject})" for one in caught.value.diagnostics)


def test_nothing_is_left_of_what_cannot_be_cut(cut: Path, tmp_path: Path) -> None:
    found = refused(cut, tmp_path / "there", MAP, ranks={"tp": (4, 3)}, to="native")
    assert found.startswith("P453: the axis `h` has 8 positions, which do not divide over 3 ranks of `tp`")
    assert not list(tmp_path.iterdir())


def test_copies_that_differ(cut: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(cut, tmp_path / "broken"))
    file = broken / "tp-2" / "model.safetensors"
    state = load_file(str(file))
    state["layers.1.router.weight"].view(torch.int16)[2, 1] ^= 1
    save_file(state, str(file))
    found = refused(broken, tmp_path / "there", MAP, ranks={"tp": (4, 2)}, to="native")
    assert found.startswith("R602: layers.1.router.weight differs from what another rank holds")
    assert "at [2, 1]" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    convert_ranks(broken, tmp_path / "there", MAP, ranks={"tp": (4, 2)}, to="native", compare=False, params=SIZES)


def test_a_share_that_is_missing(cut: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(cut, tmp_path / "broken"))
    shutil.rmtree(broken / "tp-1")
    assert "tp-1" in refused(broken, tmp_path / "there", MAP, ranks={"tp": (4, 2)}, to="native")


@pytest.mark.parametrize("folder", ["../n4/tp-1", "/tmp", "tp-1/.."])
def test_the_list_of_ranks_names_no_folder_elsewhere(cut: Path, tmp_path: Path, folder: str) -> None:
    broken = Path(shutil.copytree(cut, tmp_path / "broken"))
    record = json.loads((broken / RANKS_FILE).read_text())
    record["shares"][1]["folder"] = folder
    (broken / RANKS_FILE).write_text(json.dumps(record))
    assert "it names no folder for tp-1" in refused(broken, tmp_path / "there", MAP, ranks={"tp": (4, 2)}, to="native")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "ranks": [], "shares": [], "side": "a"}']
)
def test_a_list_of_ranks_that_cannot_be_understood(cut: Path, tmp_path: Path, text: str) -> None:
    broken = Path(shutil.copytree(cut, tmp_path / "broken"))
    (broken / RANKS_FILE).write_text(text)
    assert refused(broken, tmp_path / "there", MAP, ranks={"tp": (4, 2)}, to="native").startswith("C507")


def test_a_number_of_ranks_that_is_out_of_its_mind(cut: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(cut, tmp_path / "broken"))
    record = json.loads((broken / RANKS_FILE).read_text())
    (broken / RANKS_FILE).write_text(json.dumps({**record, "ranks": {"tp": 10**9}}))
    assert refused(broken, tmp_path / "there", MAP, ranks={}, to="native").startswith("C507")


def test_a_map_without_a_mesh(made: Made, tmp_path: Path) -> None:
    found = refused(made.folder / "hf", tmp_path / "x", map_of("a <-> b\n"), ranks={"tp": (1, 2)}, params={})
    assert found.startswith("N113: the map `m` has no mesh")


def test_a_checkpoint_that_is_not_cut(made: Made, tmp_path: Path) -> None:
    found = refused(made.folder / "hf", tmp_path / "x", MAP, ranks={"tp": (2, 1)})
    assert found.startswith("C507: the folder holds no shares of ranks")


# --- resuming ---


def test_a_run_that_was_cut_short_goes_on(
    made: Made, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mapdsl.checkpoint import convert_ranks as module

    there, real = tmp_path / "there", module.convert

    def stopped(share: Any, folder: Path, *words: Any, **options: Any) -> Any:
        if folder.name == "tp-1":
            raise KeyboardInterrupt
        return real(share, folder, *words, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "convert", stopped)
        convert_ranks(cut, there, MAP, ranks={"tp": (4, 2)}, to="native", params=SIZES)
    assert not there.exists()
    assert (partial_folder(there) / "tp-0").is_dir()
    found = refused(cut, there, MAP, ranks={"tp": (4, 2)}, to="native")
    assert "an unfinished conversion to this destination is there" in found
    done = convert_ranks(cut, there, MAP, ranks={"tp": (4, 2)}, to="native", params=SIZES, resume=True)
    assert [share.was_complete for share in done.shares] == [True, False]
    made.assert_holds(there, {"tp": 2}, "native")


# --- files of others ---


@pytest.mark.parametrize("names", ["mp_rank_{:02d}/model_optim_rng.pt", "mp_rank_{:02d}_model_states.pt"])
def test_files_of_megatron_and_deepspeed(made: Made, tmp_path: Path, names: str) -> None:
    for n, rank in enumerate(places(made.adapter, {"tp": 2})):
        path = tmp_path / "meg" / names.format(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"module": made.adapter.shard(made.native, {"tp": 2}, rank), "iteration": 7}, path)
    assert open_rank_files(tmp_path / "meg", {}).ranks == {"tp": 2}
    convert_ranks(tmp_path / "meg", tmp_path / "hf", MAP, ranks={"tp": (2, 1)}, params=SIZES)
    made.assert_holds(tmp_path / "hf", {}, "hf")
    assert not leaves_folder(tmp_path / "hf" / "model.safetensors")


# --- files for others ---


@pytest.mark.parametrize(
    ("layout", "ranks", "files"),
    [
        ("megatron", {"tp": (4, 2)}, ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"]),
        (
            "megatron",
            {"tp": (4, 1), "pp": (1, 2), "ep": (1, 2)},
            [f"mp_rank_00_{pp:03d}_{ep:03d}/model_optim_rng.pt" for pp in range(2) for ep in range(2)],
        ),
        ("deepspeed", {"tp": (4, 2)}, ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]),
        ("deepspeed", {"tp": (4, 1)}, ["mp_rank_00_model_states.pt"]),
        ("ds_inference", {"tp": (4, 2)}, ["ds_inference_config.json", "non-tp.pt", "tp_00_00.pt", "tp_01_00.pt"]),
    ],
)
def test_files_for_others(made: Made, cut: Path, tmp_path: Path, layout: str, ranks: Any, files: list[str]) -> None:
    there = tmp_path / "there"
    convert_ranks(cut, there, MAP, ranks=ranks, to="native", params=SIZES, layout=layout)
    found = sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
    assert found == sorted([*files, "config.json", "tokenizer.json"])
    # No tensor brings along more bytes than its own.
    size = sum(path.stat().st_size for path in there.rglob("*.pt"))
    assert size < 2 * sum(tensor.nbytes for tensor in made.native.values()) + 400_000
    convert_ranks(there, tmp_path / "hf", MAP, ranks={}, to="hf", params=SIZES)
    made.assert_holds(tmp_path / "hf", {}, "hf")


def test_the_command_knows_all_layouts() -> None:
    """Its parser has names of its own, as the layouts need torch."""
    assert tuple(rank_layouts.LAYOUTS) == rank_options.LAYOUTS


def test_what_stands_in_the_files_of_deepspeed(made: Made, cut: Path, tmp_path: Path) -> None:
    convert_ranks(cut, tmp_path / "x", MAP, ranks={"tp": (4, 2)}, to="native", params=SIZES, layout="deepspeed")
    state = torch.load(tmp_path / "x" / "mp_rank_01_model_states.pt", weights_only=True)
    assert state["mp_world_size"] == 2
    assert_same(state["module"], made.adapter.shard(made.native, {"tp": 2}, {"tp": 1}))
    for tensor in state["module"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_stands_in_the_files_for_inference(made: Made, cut: Path, tmp_path: Path) -> None:
    convert_ranks(cut, tmp_path / "x", MAP, ranks={"tp": (4, 2)}, to="native", params=SIZES, layout="ds_inference")
    record = json.loads((tmp_path / "x" / "ds_inference_config.json").read_text())
    assert record["checkpoints"] == {"non_tp": ["non-tp.pt"], "tp": ["tp_00_00.pt", "tp_01_00.pt"]}
    common = torch.load(tmp_path / "x" / "non-tp.pt", weights_only=True)
    assert {name.split(".")[-2] for name in common} == {"final", "router", *"01234"}
    own = torch.load(tmp_path / "x" / "tp_01_00.pt", weights_only=True)
    assert not common.keys() & own.keys()
    assert_same({**common, **own}, made.adapter.shard(made.native, {"tp": 2}, {"tp": 1}))


def test_files_that_have_no_room_for_a_mesh(cut: Path, tmp_path: Path) -> None:
    from mapdsl.checkpoint.passes import OptionError

    with pytest.raises(OptionError, match="files of deepspeed have no room for ranks of `ep`"):
        convert_ranks(cut, tmp_path / "x", MAP, ranks={"tp": (4, 2), "ep": (1, 2)}, layout="deepspeed", params=SIZES)


@pytest.mark.parametrize("text", ["[]", '{"checkpoints": []}', '{"checkpoints": {"non_tp": [], "tp": ["../x.pt"]}}'])
def test_an_inference_config_that_cannot_be_understood(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "ds_inference_config.json").write_text(text)
    assert refused(tmp_path / "x", tmp_path / "y", MAP, ranks={}).startswith("C507")


def test_files_of_the_layers_of_a_pipeline(made: Made, tmp_path: Path) -> None:
    """`layer_03-model_01-model_states.pt`: one file a layer, as DeepSpeed's pipelines save them."""
    text = "param h\nparam L\nindex i < L\nmesh tp shards h\n"
    text += "h.{i}.v2.weight [d (h x)] <-> layer_{i+3}.v2.weight\nwte [s d] <-> layer_1.word_embeddings.weight\n"
    map_ = map_of(text)
    adapter = map_.adapter(None, h=8, L=4)
    state = {f"layer_{i + 3}.v2.weight": drawn((5, 72)) for i in range(4)}
    state["layer_1.word_embeddings.weight"] = drawn((3, 5))
    (tmp_path / "pipe").mkdir()
    for n, rank in enumerate(places(adapter, {"tp": 2})):
        share = adapter.shard(state, {"tp": 2}, rank)
        for layer in (1, 3, 4, 5, 6):
            own = {k.partition(".")[2]: v for k, v in share.items() if k.startswith(f"layer_{layer}.")}
            torch.save(own, tmp_path / "pipe" / f"layer_{layer:02d}-model_{n:02d}-model_states.pt")
    convert_ranks(tmp_path / "pipe", tmp_path / "hf", map_, ranks={"tp": (2, 1)}, params={"h": 8, "L": 4})
    assert_same(loaded(tmp_path / "hf"), adapter.to_hf(state))
    (tmp_path / "pipe" / "layer_04-model_01-model_states.pt").unlink()
    found = refused(tmp_path / "pipe", tmp_path / "x", map_, ranks={"tp": (2, 1)}, params={"h": 8, "L": 4})
    assert "the file of layer 4 is there for other ranks than 1" in found


def test_what_no_rank_is_to_hold_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.map"
    file.write_text("map m: hf <-> native\nmesh pp shards s\na [s d] <-> a\nb [d] <-> b where size(pp) > 1\n")
    (tmp_path / "two").mkdir()
    for rank in range(2):
        path = tmp_path / "two" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt"
        path.parent.mkdir()
        torch.save({"model": {"a": drawn((2, 3)), "b": torch.ones(3)}}, path)
    words = ["--map", str(file), "--to", "native", "--pp", "2:1"]
    assert main(["convert", str(tmp_path / "two"), str(tmp_path / "x"), *words]) == 0
    assert "dropped, as by the map no rank of the destination holds them: b" in capsys.readouterr().out


def test_padding_is_zeros_in_every_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is put together strip by strip, in one piece of memory: what one strip held is not in the next."""
    monkeypatch.setattr("mapdsl.checkpoint.gathering.STRIP_BYTES", 64)
    map_ = map_of("param V\nmesh tp shards V\nwte [V d] <-> emb [pad(V, 64*size(tp)) d]\n")
    adapter = map_.adapter(None, V=200)
    state = {"wte": drawn((200, 3))}
    save_file(state, str(tmp_path / "model.safetensors"))
    options = {"params": {"V": 200}}
    convert_ranks(tmp_path / "model.safetensors", tmp_path / "four", map_, ranks={"tp": (1, 4)}, **options)
    convert_ranks(tmp_path / "four", tmp_path / "two", map_, ranks={"tp": (4, 2)}, to="native", **options)
    native = adapter.from_hf(state)
    for rank in places(adapter, {"tp": 2}):
        assert_same(loaded(tmp_path / "two" / rank_folder(rank)), adapter.shard(native, {"tp": 2}, rank))


@pytest.mark.parametrize("to", ["native", "hf"])
def test_ranks_of_two_dtypes(cut: Path, tmp_path: Path, to: str) -> None:
    broken = Path(shutil.copytree(cut, tmp_path / "broken"))
    file = broken / "tp-1" / "model.safetensors"
    state = load_file(str(file))
    name = "layers.1.v1.weight"
    save_file({**state, name: state[name].to(torch.float16)}, str(file))
    found = refused(broken, tmp_path / "there", MAP, ranks={"tp": (4, 2 if to == "native" else 1)}, to=to)
    assert found.startswith(f"R606: {name}: {name} of rank 1 is torch.float16, of rank 0 torch.bfloat16")
