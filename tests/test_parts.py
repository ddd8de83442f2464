"""Loading a quantised checkpoint in parts, as Automodel's loader asks for it on one process; without Automodel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mapdsl.frameworks.automodel import AutomodelAdapter
from mapdsl.frameworks.hub import folder_of
from mapdsl.frameworks.live import MissingTensorsError
from mapdsl.frameworks.parts import parts_of
from mapdsl.runtime.tracing import trace
from tests.helpers.execution import assert_same, map_of
from tests.helpers.live_job import CONFIG, adapter, native, stored

State = dict[str, Tensor]


def loader(folder: Path | None = None) -> AutomodelAdapter:
    made = adapter()
    type(made).LOAD_PART = SimpleNamespace
    made.config = SimpleNamespace(_name_or_path=None if folder is None else str(folder))
    return made


def blank(kind: str) -> State:
    return {name: torch.full_like(tensor, 7) for name, tensor in native(kind).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("raw", "fp8", "fp4")}
    for kind, folder in found.items():
        save_file(stored(kind), str(folder / "model.safetensors"))
    return found


@pytest.mark.parametrize("kind", ["raw", "fp8", "fp4"])
def test_the_parts_of_a_load_are_all_of_it(folders: Mapping[str, Path], kind: str) -> None:
    """Each is read alone, once, and is in the model before the next is asked for."""
    model, files, read = blank(kind), dict(stored(kind)), set[str]()
    extra: dict[str, Any] = {"model.layers.0.attn._extra_state": None}
    converter = loader(folders[kind])
    parts = converter.iter_checkpoint_load_parts(model | extra)
    assert parts is not None
    number, done = 0, set[str]()
    for part in parts:
        for name, tensor in part.checkpoint_tensors.items():
            assert (tensor.shape, tensor.dtype) == (files[name].shape, files[name].dtype)
            tensor.copy_(files.pop(name))
        part.finish()
        assert not part.model_keys & done and not read & set(part.checkpoint_tensors)
        done |= part.model_keys
        read |= set(part.checkpoint_tensors)
        own = {tensor.untyped_storage().data_ptr() for tensor in model.values()}
        for name, tensor in part.checkpoint_tensors.items():
            assert (name in part.temporary_checkpoint_keys) == (tensor.untyped_storage().data_ptr() not in own)
        names = part.model_keys - set(extra)
        assert_same({name: model[name] for name in names}, {name: native(kind)[name] for name in names}, kind)
        number += 1
    assert number > 3 and not files and done == set(model) | set(extra)
    assert_same(model, native(kind), kind)
    # What is then saved is as it was found, not as the last part was.
    reader = adapter()
    reader.from_hf(stored(kind))
    assert_same(converter.to_hf(model, quantization=True), reader.to_hf(model, quantization=True), kind)


def test_what_tells_a_variant_of_the_checkpoint_may_be_in_another_part(tmp_path: Path) -> None:
    class Toy(AutomodelAdapter):
        ADAPTER: ClassVar = map_of(
            "param new = has(mark)\nmark [d] <-> mark [d]\nw <-> w [c d] where not new\nv <-> w [c d] where new\n"
        ).adapter_class
        LOAD_PART: ClassVar = SimpleNamespace

    files = {"mark": torch.ones(2), "v": torch.arange(4.0).view(2, 2)}
    save_file(files, str(tmp_path / "model.safetensors"))
    model = {"mark": torch.zeros(2), "w": torch.zeros(2, 2)}
    parts = Toy(SimpleNamespace(_name_or_path=str(tmp_path))).iter_checkpoint_load_parts(model)
    assert parts is not None
    names = []
    for part in parts:
        names.append(sorted(part.checkpoint_tensors))
        for name, tensor in part.checkpoint_tensors.items():
            tensor.copy_(files[name])
        part.finish()
    assert names == [["mark"], ["v"]]
    assert_same(model, {"mark": files["mark"], "w": files["v"]}, "read")


def test_a_part_is_no_larger_than_it_must_be() -> None:
    """What is stored together is together; small ones are in one part, up to what the largest has."""
    text = "a.{i} [d] <-> a [i d]\nb [(d + d)] <-> b1 [d] + b2 [d]\nc.{i} <-> c.{i} [d]\n_ <- buffer\n"
    compiled = map_of(f"param L\nindex i < L\n{text}").adapter({"L": 4})
    sizes = {"b1": (8,), "a": (4, 8), "b2": (8,), "buffer": (3,)} | {f"c.{i}": (8,) for i in range(4)}
    state = {name: torch.zeros(shape) for name, shape in sizes.items()}
    found = trace(compiled, compiled.RIGHT, state, partial=True)
    assert parts_of(found, state) == [["b1", "b2", "buffer"], ["a"], ["c.0", "c.1", "c.2", "c.3"]]
    assert parts_of(trace(compiled, compiled.RIGHT, {}, partial=True), {}) == []


def test_many_small_ones_are_in_64_parts_at_most() -> None:
    compiled = map_of("param L\nindex i < L\nc.{i} <-> d.{i} [d]\n").adapter({"L": 1000})
    state = {f"d.{i}": torch.zeros(8) for i in range(1000)}
    parts = parts_of(trace(compiled, compiled.RIGHT, state, partial=True), state)
    assert 64 <= len(parts) <= 72 and [name for part in parts for name in part] == list(state)


def test_what_the_checkpoint_lacks_is_told_before_anything_is_read(tmp_path: Path) -> None:
    files = {name: tensor for name, tensor in stored("fp8").items() if "layers.1.experts.4.w2" not in name}
    save_file(files, str(tmp_path / "model.safetensors"))
    with pytest.raises(MissingTensorsError, match=r"layers\.1\.experts\.4\.w2\.weight"):
        loader(tmp_path).iter_checkpoint_load_parts(blank("fp8"))


def test_a_part_of_a_group_is_refused() -> None:
    model = blank("fp8")
    del model["model.layers.1.k2.weight"]
    with pytest.raises(MissingTensorsError, match=r"layers\.1\.k2"):
        loader().iter_checkpoint_load_parts(model)


def test_who_has_no_class_of_parts_has_no_parts() -> None:
    assert adapter().iter_checkpoint_load_parts(blank("raw")) is None


def test_what_is_stored_nowhere_is_not_waited_for() -> None:
    """A load ends with what was read: the next one is of a whole checkpoint again."""

    class Toy(AutomodelAdapter):
        ADAPTER: ClassVar = map_of("a <-> a [d]\nb <-> b [d]\n_ <- buffer\n").adapter_class

    files = {name: torch.arange(3.0) for name in "ab"}
    converter = Toy({})
    asked = converter.to_hf(
        {"a": torch.zeros(3), "b": torch.zeros(3), "buffer": torch.zeros(2)}, for_checkpoint_load=True
    )
    assert set(converter.from_hf(asked)) == {"a", "b"}
    with pytest.raises(MissingTensorsError, match="b"):
        converter.from_hf({"a": files["a"]})


def test_a_config_of_the_hub_tells_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in (None, "abc"):
        assert folder_of(SimpleNamespace(_name_or_path="some/model", _commit_hash=commit)) == snapshot
    assert folder_of(SimpleNamespace(_name_or_path="some/model", _commit_hash="def")) is None
    assert folder_of(SimpleNamespace(_name_or_path="another/model")) is None


def test_other_configs_tell_none(tmp_path: Path) -> None:
    assert folder_of(SimpleNamespace(_name_or_path=str(tmp_path))) == tmp_path
    for name in ("", None, "/no/such/folder", "a b"):
        assert folder_of(SimpleNamespace(_name_or_path=name)) is None
    assert folder_of({}) is None
