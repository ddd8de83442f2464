"""A map's checkpoint as torch Distributed Checkpoint reads and writes it, in one process; in jobs: test_live."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.frameworks.dcp import MapStorageReader, MapStorageWriter
from mapdsl.frameworks.live import MissingTensorsError
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same, map_of
from tests.helpers.links import boxes
from tests.helpers.live_job import CONFIG, map_, native, stored

State = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")
DOWN = "model.layers.1.mlp.experts.down_projs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The same model, stored as it is and in formats."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("raw", "fp8", "fp4")}
    for kind, folder in found.items():
        save_file(stored(kind), str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return found


@cache
def blank(dtype: torch.dtype = torch.bfloat16) -> State:
    return {name: torch.empty(tensor.shape, dtype=dtype) for name, tensor in native("raw").items()}


def fresh(dtype: torch.dtype = torch.bfloat16) -> State:
    return {name: torch.full_like(tensor, 7) for name, tensor in blank(dtype).items()}


def load(state: Mapping[str, Any], reader: MapStorageReader) -> MapStorageReader:
    dcp_load(dict(state), storage_reader=reader, no_dist=True)
    return reader


def save(state: Mapping[str, Any], writer: MapStorageWriter) -> None:
    dcp_save(dict(state), storage_writer=writer, no_dist=True)


def read_bytes(reader: MapStorageReader) -> int:
    assert reader._reading is not None
    return reader._reading.boxes.read_bytes


def cause(caught: pytest.ExceptionInfo[BaseException]) -> BaseException:
    """What torch has wrapped, or not."""
    if not isinstance(caught.value, CheckpointException):
        return caught.value
    ((problem, _),) = caught.value.failures.values()
    return problem


# --- reading ---


@pytest.mark.parametrize("kind", ["raw", "fp8", "fp4"])
def test_a_whole_model_is_read(folders: Mapping[str, Path], kind: str) -> None:
    """By the checkpoint's own config; all its bytes, once."""
    model = fresh()
    reader = load(model, MapStorageReader(folders[kind], map_()))
    assert_same(model, native(kind), kind)
    needed = sum(tensor.nbytes for tensor in stored(kind).values())
    assert needed <= read_bytes(reader) <= 2 * needed  # of a column of blocks the rows between are read, too


@pytest.mark.parametrize("kind", ["raw", "fp8"])
def test_values_are_decoded_in_the_models_dtype_or_cast_to_it(folders: Mapping[str, Path], kind: str) -> None:
    """What is decoded is rounded once."""
    for dtype in (torch.float32, torch.float16):
        model = fresh(dtype)
        load(model, MapStorageReader(folders[kind], map_()))
        expected = map_().adapter(CONFIG).read(stored(kind), dtype=dtype)
        for name, tensor in expected.items():
            assert torch.equal(model[name].nan_to_num(), tensor.to(dtype).nan_to_num()), name


def test_a_part_of_a_model_is_read_alone(folders: Mapping[str, Path]) -> None:
    """What is not asked for is left, and none of its bytes are looked at."""
    name = "model.layers.1.norm.weight"
    model = {name: torch.zeros(12, dtype=torch.bfloat16)}
    assert read_bytes(load(model, MapStorageReader(folders["raw"], map_()))) == 24
    assert_same(model, {name: native("raw")[name]}, name)
    layer = {name: tensor for name, tensor in fresh().items() if ".layers.1." in name}
    needed = sum(tensor.nbytes for name, tensor in stored("raw").items() if name.startswith("layers.1."))
    assert needed <= read_bytes(load(layer, MapStorageReader(folders["raw"], map_()))) <= 1.3 * needed
    assert_same(layer, {name: native("raw")[name] for name in layer}, "a layer")


class Shard(DefaultLoadPlanner):
    """Asks for a box of one tensor, as a rank that holds no more does."""

    def __init__(self, name: str, box: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.name, self.box = name, box

    def create_local_plan(self) -> LoadPlan:
        begins, sizes = ([b for b, _ in self.box], [e - b for b, e in self.box])
        item = ReadItem(
            LoadItemType.TENSOR,
            MetadataIndex(self.name),
            torch.Size([0] * len(sizes)),
            MetadataIndex(self.name),
            torch.Size(begins),
            torch.Size(sizes),
        )
        return LoadPlan([item])


@settings(max_examples=40)
@given(st.sampled_from(sorted(native("raw"))), st.sampled_from(["raw", "fp8", "fp4"]), st.data())
def test_a_shard_is_read_alone(folders: Mapping[str, Path], name: str, kind: str, data: st.DataObject) -> None:
    """Whatever box of whatever tensor."""
    whole = native(kind)[name]
    box = data.draw(boxes(whole.shape))
    place = torch.full([end - begin for begin, end in box], 7, dtype=whole.dtype)
    reader = MapStorageReader(folders[kind], map_())
    dcp_load({name: place}, storage_reader=reader, planner=Shard(name, box), no_dist=True)
    assert_same({name: place}, {name: whole[tuple(slice(*span) for span in box)]}, f"{box}")
    if not place.numel():
        assert read_bytes(reader) == 0


def test_the_bytes_of_a_shard(folders: Mapping[str, Path]) -> None:
    """One expert of five, and of its matrix the rows that a rank has: their bytes, no scale but theirs."""
    for box, elements in ((((2, 3), (0, 8), (0, 12)), 96), (((0, 5), (0, 4), (0, 12)), 5 * 48)):
        place = torch.zeros([end - begin for begin, end in box], dtype=torch.bfloat16)
        reader = MapStorageReader(folders["raw"], map_())
        dcp_load({DOWN: place}, storage_reader=reader, planner=Shard(DOWN, box), no_dist=True)
        # Of `[D F]`, stored, columns are asked for: what lies between them is read.
        assert elements * 2 <= read_bytes(reader) <= elements * 4
    place = torch.zeros((1, 8, 12), dtype=torch.bfloat16)
    reader = MapStorageReader(folders["fp4"], map_())
    dcp_load({DOWN: place}, storage_reader=reader, planner=Shard(DOWN, ((2, 3), (0, 8), (0, 12))), no_dist=True)
    assert read_bytes(reader) == 96 // 2 + 96 // 4


def test_what_the_map_states_is_read(tmp_path: Path) -> None:
    """Constants and what the map computes come from no file; numbers are rounded to the model's dtype alone."""
    text = "param d\nw <-> w [d]\n_ <-> inv [d] = inv_freq(100, d)\n_ <-> tenth [2 d] = 0.1\n"
    found = map_of(text)
    state = {"w": torch.arange(8.0)}
    save_file(state, str(tmp_path / "model.safetensors"))
    expected = found.adapter({"d": 8}).read(state, dtype=torch.float32)
    model = {name: torch.full_like(tensor, 7, dtype=torch.float32) for name, tensor in expected.items()}
    load(model, MapStorageReader(tmp_path, found, {"d": 8}))
    for name, tensor in expected.items():
        assert torch.equal(model[name], tensor.to(torch.float32)), name
    part = torch.zeros(2)
    reader = MapStorageReader(tmp_path, found, {"d": 8})
    dcp_load({"inv": part}, storage_reader=reader, planner=Shard("inv", ((1, 3),)), no_dist=True)
    assert torch.equal(part, expected["inv"][1:3])


def test_legacy_names_are_read(tmp_path: Path) -> None:
    found = map_of("param d\nindex i < 2\naccept a.{i}.gamma for a.{i}.weight\na.{i}.weight [d] <-> b.{i}.weight [d]\n")
    save_file({"a.0.gamma": torch.ones(3), "a.1.weight": torch.ones(3) * 2}, str(tmp_path / "model.safetensors"))
    model = {"b.0.weight": torch.zeros(3), "b.1.weight": torch.zeros(3)}
    load(model, MapStorageReader(tmp_path, found, {"d": 3}))
    assert model["b.0.weight"].tolist() == [1] * 3 and model["b.1.weight"].tolist() == [2] * 3


# --- what cannot be read ---


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """Before anything is read; whoever does not need it is not troubled."""
    gone = "layers.1.experts.0.w2.weight"
    save_file({name: tensor for name, tensor in stored("raw").items() if name != gone}, str(tmp_path / "m.safetensors"))
    model = fresh()
    with pytest.raises(CheckpointException) as caught:
        load(model, MapStorageReader(tmp_path / "m.safetensors", map_(), CONFIG))
    problem = cause(caught)
    assert isinstance(problem, MissingTensorsError) and isinstance(problem, RuntimeError)
    assert gone in str(problem) and str(tmp_path) in str(problem)
    assert_same(model, fresh(), "nothing is touched")
    del model[DOWN]
    load(model, MapStorageReader(tmp_path / "m.safetensors", map_(), CONFIG))
    others = torch.zeros((4, 8, 12), dtype=torch.bfloat16)
    reader = MapStorageReader(tmp_path / "m.safetensors", map_(), CONFIG)
    dcp_load({DOWN: others}, storage_reader=reader, planner=Shard(DOWN, ((1, 5), (0, 8), (0, 12))), no_dist=True)
    assert_same({DOWN: others}, {DOWN: native("raw")[DOWN][1:]}, "other experts")


@pytest.mark.parametrize("asked", [{"nobody": torch.zeros(2)}, {"step": 3}])
def test_what_the_map_does_not_make_is_named(folders: Mapping[str, Path], asked: dict[str, Any]) -> None:
    with pytest.raises(CheckpointException) as caught:
        load(fresh() | asked, MapStorageReader(folders["raw"], map_()))
    assert next(iter(asked)) in str(cause(caught))


def test_what_a_reader_is_given_wrong(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Each told in a line with a code: what, where, what to do."""
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(stored("raw"), str(bare / "model.safetensors"))
    strange = tmp_path / "strange"
    strange.mkdir()
    save_file(stored("raw") | {"stranger": torch.zeros(2)}, str(strange / "model.safetensors"))
    scaleless = tmp_path / "scaleless"
    scaleless.mkdir()
    scale = "embed.weight_scale_inv"
    state = {name: tensor for name, tensor in stored("fp8").items() if name != scale}
    save_file(state, str(scaleless / "model.safetensors"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    expert = "layers.1.experts.0.w2.weight"
    save_file({**stored("raw"), expert: stored("raw")[expert].float()}, str(mixed / "model.safetensors"))
    wrong: list[tuple[str, str, Any]] = [
        ("N115", "`L`", lambda: MapStorageReader(bare, map_())),
        ("N115", "`D`", lambda: MapStorageReader(bare, map_(), {"L": 2})),
        ("N111", "`depth`", lambda: MapStorageReader(folders["raw"], map_(), depth=2)),
        ("N116", "nobodys_map", lambda: MapStorageReader(folders["raw"], "nobodys_map")),
        ("C507", "no such file or folder", lambda: MapStorageReader(tmp_path / "nowhere", map_(), CONFIG)),
        ("C507", "no *.safetensors", lambda: MapStorageReader(tmp_path, map_(), CONFIG)),
        ("R603", "stranger", lambda: MapStorageReader(strange, map_(), CONFIG)),
        ("R603", "layers.1.", lambda: MapStorageReader(bare, map_(), CONFIG | {"L": 1})),
        ("R606", "expected 13", lambda: MapStorageReader(bare, map_(), CONFIG | {"D": 13})),
        ("R605", scale, lambda: MapStorageReader(scaleless, map_(), CONFIG)),
        ("R606", "float32", lambda: MapStorageReader(mixed, map_(), CONFIG)),
    ]
    for code, what, make in wrong:
        with pytest.raises((CheckpointException, MapError, ConversionError)) as caught:
            load(fresh(), make())
        problem = cause(caught)
        assert isinstance(problem, (MapError, ConversionError)), problem
        assert f"error[{code}]" in str(problem) and what in str(problem), (code, what, problem)


# --- writing ---


@pytest.mark.parametrize("quantization", [False, True])
def test_a_whole_model_is_written(tmp_path: Path, quantization: bool) -> None:
    whole = native("fp8" if quantization else "raw")
    save(whole, MapStorageWriter(tmp_path / "out", map_(), CONFIG, quantization=quantization, max_shard_bytes=3000))
    expected = map_().adapter(CONFIG).to_hf(whole, quantization=quantization)
    assert_same(dict(LazyState(open_checkpoint(tmp_path / "out"))), expected, "written")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = fresh()
    load(model, MapStorageReader(tmp_path / "out", map_()))
    assert_same(model, map_().adapter(CONFIG).from_hf(expected), "and read")


def test_what_is_not_stored_is_looked_at(tmp_path: Path) -> None:
    """What is stated, tied or has to be zeros would be lost if it were anything else."""
    text = "param d\nw <-> w [d]\n_ <-> t [d] = w\n_ <-> ones [d] = 1\n_ <-> inv [d] = inv_freq(100, d)\n"
    text += "p [3 d] <-> p [3 (d + zeros(2))]\n"
    found = map_of(text)
    whole = found.adapter({"d": 6}).read({"w": torch.arange(6.0), "p": torch.arange(18.0).reshape(3, 6)})
    save(whole, MapStorageWriter(tmp_path / "out", found, {"d": 6}))
    assert_same(dict(LazyState(open_checkpoint(tmp_path / "out"))), found.adapter({"d": 6}).write(whole), "written")
    for name in ("t", "ones", "inv", "p"):
        spoilt = {**whole, name: whole[name].clone()}
        spoilt[name][..., -1] += 1
        with pytest.raises(CheckpointException) as caught:
            save(spoilt, MapStorageWriter(tmp_path / f"without-{name}", found, {"d": 6}))
        assert "error[R601]" in str(cause(caught)) and name in str(cause(caught))
        assert not (tmp_path / f"without-{name}").exists()


def test_other_files_are_carried_over(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """And the config, where none is given."""
    like = tmp_path / "like"
    like.mkdir()
    for file in folders["raw"].iterdir():
        (like / file.name).write_bytes(file.read_bytes())
    (like / "tokenizer.json").write_text("{}")
    save(native("raw"), MapStorageWriter(tmp_path / "out", map_(), like=like))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


@pytest.mark.parametrize("quantization", [False, True])
def test_a_format_that_is_another_layout_is_written_where_it_is_asked_for(tmp_path: Path, quantization: bool) -> None:
    """A map has a param for it, as that of gpt-oss, and whoever gives it decides."""
    text = "param packed = packed ?? true\nindex e < 2\n"
    text += 'codec fp4 = block_scaled(f4e2m1, block=1x32, scale="{key}_scale")\n'
    text += "w [e f d] as fp4 <-> m [e d f] where packed\nw [e d f] <-> m [e d f] where not packed\n"
    found = map_of(text)
    whole = {"m": torch.randn(2, 64, 8, dtype=torch.bfloat16)}
    for name, params in (("asked", {}), ("given", {"packed": not quantization})):
        save(whole, MapStorageWriter(tmp_path / name, found, quantization=quantization, **params))
        is_packed = params.get("packed", quantization)
        expected = found.adapter(packed=is_packed).to_hf(whole, quantization=quantization)
        assert set(expected) == ({"w", "w_scale"} if is_packed else {"w"})
        assert_same(dict(LazyState(open_checkpoint(tmp_path / name))), expected, name)


def test_what_has_no_values_is_not_written(tmp_path: Path) -> None:
    name = "model.layers.0.norm.weight"
    with pytest.raises(CheckpointException) as caught:
        save(native("raw") | {name: native("raw")[name].to("meta")}, MapStorageWriter(tmp_path / "out", map_(), CONFIG))
    assert "error[C504]" in str(cause(caught)) and f"{name} is a meta tensor" in str(cause(caught))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is left where the files would be, and what is there stays as it is."""
    whole = dict(native("raw"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note").write_text("mine")
    half = {name: tensor for name, tensor in whole.items() if name != "model.layers.0.q2.weight"}
    wrong: list[tuple[str, str, str, Mapping[str, Any], Any]] = [
        ("C507", "the destination exists already", "there", whole, CONFIG),
        ("C507", "make it first", "no/where", whole, CONFIG),
        ("C507", "`step` is no tensor", "out", whole | {"step": 3}, CONFIG),
        ("R603", "nobody", "out", whole | {"nobody": torch.zeros(2)}, CONFIG),
        ("R605", "model.layers.0.q2.weight", "out", half, CONFIG),
        ("R606", "model.layers.0.norm.weight", "out", whole | {"model.layers.0.norm.weight": torch.zeros(5)}, CONFIG),
        ("N115", "`L`", "out", whole, None),
        ("C505", "config.json", "out", whole, tmp_path / "config.json"),
        ("C505", "dtype", "out", whole, CONFIG | {"torch_dtype": torch.bfloat16}),
    ]
    for code, what, where, state, config in wrong:
        with pytest.raises((CheckpointException, ConversionError)) as caught:
            save(state, MapStorageWriter(tmp_path / where, map_(), config))
        problem = cause(caught)
        assert isinstance(problem, (MapError, ConversionError)), problem
        assert f"error[{code}]" in str(problem) and what in str(problem), (code, what, problem)
        assert [file.name for file in tmp_path.rglob("*")] == ["there", "note"], code
    with pytest.raises(MapError, match="N116"):
        MapStorageWriter(tmp_path / "out", "nobodys_map", CONFIG)
    with pytest.raises(MapError, match="no such file or folder"):
        MapStorageWriter(tmp_path / "out", map_(), like=tmp_path / "nowhere")


@pytest.mark.parametrize("word", ["threads", "max_shard_bytes"])
def test_numbers_that_are_none_are_refused_at_once(tmp_path: Path, word: str) -> None:
    with pytest.raises(ValueError, match=f"{word} is 1 or more, not 0"):
        MapStorageWriter(tmp_path / "out", map_(), CONFIG, **{word: 0})
    if word == "threads":
        with pytest.raises(ValueError, match="threads is 1 or more, not -1"):
            MapStorageReader(tmp_path, map_(), CONFIG, threads=-1)
    assert not list(tmp_path.iterdir())
