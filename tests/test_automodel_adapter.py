"""What a map's adapter is to Automodel, in one process and without Automodel; on ranks: test_live."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mapdsl.frameworks.automodel import AutomodelAdapter
from mapdsl.frameworks.live import MissingTensorsError
from mapdsl.runtime.errors import ConversionError
from tests.helpers.execution import assert_same, map_of
from tests.helpers.live_job import CONFIG, adapter, map_, native, stored

State = dict[str, Tensor]

UP, DOWN = (f"model.layers.0.mlp.experts.{word}_projs" for word in ("gate_and_up", "down"))
QK = "model.layers.0.qk.weight"


def model(kind: str = "raw") -> State:
    """A model of its own memory."""
    return {name: tensor.clone() for name, tensor in native(kind).items()}


def memory(state: Mapping[str, Any]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in state.values() if isinstance(tensor, Tensor)}


def filled(asked: Mapping[str, Any], files: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a reader makes of a state: it overwrites the tensors, in their place."""
    for name, tensor in asked.items():
        if isinstance(tensor, Tensor) and name in files:
            assert (tensor.shape, tensor.dtype) == (files[name].shape, files[name].dtype), name
            tensor.copy_(files[name])
    return dict(asked)


def forms_of(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def written(state: State, **options: Any) -> State:
    return dict(map_().adapter(CONFIG).write(state, **options))


# --- out of the model ---


def test_a_save_has_memory_of_its_own() -> None:
    """But for what is stored as the model has it; nothing is noted for a load."""
    whole, converter = model(), adapter()
    made = converter.to_hf(whole)
    assert_same(made, written(whole), "saved")
    renamed = {"layers.0.norm.weight", "head.weight", "embed.weight"}
    moved = {name: tensor for name, tensor in made.items() if "experts" in name or ".q.weight" in name}
    assert moved and not memory(moved) & memory(whole)
    assert renamed <= set(made)
    assert not converter._load.layouts and not converter._load.views
    # So the load that follows converts what it is given, whatever memory that lies in.
    back = converter.from_hf(made)
    assert_same(back, native("raw"), "and back")
    assert converter.view_loaded_native_keys == set()


def test_a_load_goes_to_the_models_memory() -> None:
    whole = {name: torch.zeros_like(tensor) for name, tensor in native("raw").items()}
    kept, converter = dict(whole), adapter()
    asked = converter.to_hf(whole, for_checkpoint_load=True)
    views = {name for name, tensor in asked.items() if memory({name: tensor}) & memory(whole)}
    assert {"layers.0.experts.0.w1.weight", "layers.1.experts.4.w2.weight", "layers.0.q.weight"} <= views
    made = converter.from_hf(filled(asked, stored("raw")))
    in_model = converter.view_loaded_native_keys
    assert {UP, DOWN, QK} <= in_model and not in_model & set(made)
    assert set(whole) == set(kept) and all(whole[name] is kept[name] for name in kept)
    assert_same(made | {name: whole[name].contiguous() for name in in_model}, native("raw"), "loaded")


@pytest.mark.parametrize("backend", [{"experts": "te"}, {"dispatcher": "mok"}])
def test_experts_that_are_copies_are_not_written_to(backend: dict[str, str]) -> None:
    whole = {name: torch.zeros_like(tensor) for name, tensor in native("raw").items()}
    converter = adapter()
    converter.backend = SimpleNamespace(**backend)
    made = converter.from_hf(filled(converter.to_hf(whole, for_checkpoint_load=True), stored("raw")))
    assert {UP, DOWN} <= set(made) and QK in converter.view_loaded_native_keys
    assert_same({UP: made[UP]}, {UP: native("raw")[UP]}, "experts")
    assert not converter.supports_low_memory_dcp_load


def test_another_state_than_was_given_out_is_converted() -> None:
    """What was given out and is not what comes back is stale."""
    whole = {name: torch.zeros_like(tensor) for name, tensor in native("raw").items()}
    converter = adapter()
    converter.to_hf(whole, for_checkpoint_load=True)
    other = {name: tensor.clone() for name, tensor in stored("raw").items()}
    made = converter.from_hf(other)
    assert converter.view_loaded_native_keys == set()
    assert_same(made, native("raw"), "another")
    assert not any(tensor.any() for tensor in whole.values())
    # The load is over: what follows is a whole state again.
    assert_same(converter.from_hf(other), native("raw"), "once more")


def test_a_load_that_failed_is_over() -> None:
    converter = adapter()
    converter.to_hf(model(), for_checkpoint_load=True)
    half = {name: tensor for name, tensor in stored("raw").items() if "experts" not in name}
    with pytest.raises(MissingTensorsError):
        converter.from_hf(half)
    for _ in range(2):  # no part of a model was asked for any more
        with pytest.raises(MissingTensorsError, match="tensors are missing"):
            converter.from_hf({name: tensor for name, tensor in half.items() if name.startswith("layers.")})
    assert_same(converter.from_hf(stored("raw")), native("raw"), "after it")


def test_one_tensor_of_another_state_is_enough() -> None:
    """Of a tensor that was read in parts, all parts have to be its own."""
    whole = {name: torch.zeros_like(tensor) for name, tensor in native("raw").items()}
    converter = adapter()
    asked = filled(converter.to_hf(whole, for_checkpoint_load=True), stored("raw"))
    asked["layers.0.q.weight"] = asked["layers.0.q.weight"].clone()
    made = converter.from_hf(asked)
    assert QK in made and QK not in converter.view_loaded_native_keys
    assert_same({QK: made[QK]}, {QK: native("raw")[QK]}, "converted")


def test_a_load_in_two_parts_keeps_what_was_read_before() -> None:
    """As of two namespaces of a model; without that what was read before is forgotten."""
    for keep in (True, False):
        whole = {name: torch.zeros_like(tensor) for name, tensor in native("raw").items()}
        converter = adapter()
        asked = filled(converter.to_hf(whole, for_checkpoint_load=True), stored("raw"))
        first = {name: tensor for name, tensor in asked.items() if name.startswith("layers.0.")}
        rest = {name: tensor for name, tensor in asked.items() if name not in first}
        made = converter.from_hf(first, partial=True)
        one = converter.view_loaded_native_keys
        assert QK in one and not any(name.startswith("model.layers.1.") for name in one | set(made))
        made |= converter.from_hf(rest, partial=True, reset_view_loaded_keys=not keep)
        both = converter.view_loaded_native_keys
        assert (one <= both) == keep and both - one
        assert_same(made | {name: whole[name].contiguous() for name in one | both}, native("raw"), "both parts")
    one.add("mine")
    assert "mine" not in converter.view_loaded_native_keys


def test_a_pipeline_stage_has_a_part_of_the_layers() -> None:
    stage = {name: tensor for name, tensor in model().items() if ".layers.1." in name}
    expected = {name: tensor for name, tensor in stored("raw").items() if name.startswith("layers.1.")}
    assert_same(adapter().to_hf(stage), expected, "saved")
    assert adapter().get_hf_state_dict_keys(stage) == list(adapter().to_hf(stage))
    blank = {name: torch.zeros_like(tensor) for name, tensor in stage.items()}
    converter = adapter()
    asked = converter.to_hf(blank, for_checkpoint_load=True)
    assert set(asked) == set(expected)
    made = converter.from_hf(filled(asked, expected))
    made |= {name: blank[name].contiguous() for name in converter.view_loaded_native_keys}
    assert_same(made, stage, "loaded")  # what the map states of the model's other parts is not there
    ones = {"model.ones": torch.ones(12, dtype=torch.bfloat16)}
    assert_same(adapter().from_hf(expected, partial=True), made | ones, "read as a part")
    with pytest.raises(MissingTensorsError, match="layers.0"):
        adapter().from_hf(expected)


# --- what is no tensor of the model ---


@pytest.mark.parametrize("load", [False, True])
def test_what_modules_keep_besides_passes(load: bool) -> None:
    extra = {"model.layers.0.attn._extra_state": torch.ones(3), "model._extra_state": None, "step": 7}
    whole, converter = model(), adapter()
    made = converter.to_hf(whole | extra, for_checkpoint_load=load)
    assert all(made[name] is value for name, value in extra.items())
    back = converter.from_hf(made)
    assert all(back[name] is value for name, value in extra.items())
    assert set(converter.to_hf(whole | extra, exclude_key_regex=r".*_extra_state")) == set(made) - set(list(extra)[:2])
    names = converter.get_hf_state_dict_keys(whole | extra)
    assert sorted(names) == sorted(set(made) - set(list(extra)[:2]))


def test_names_are_excluded_from_their_beginning() -> None:
    made = adapter().to_hf(model(), exclude_key_regex=r"layers\.1\.|.*\.w2\.")
    assert made and set(made) == {n for n in stored("raw") if not n.startswith("layers.1.") and ".w2." not in n}
    assert set(adapter().to_hf(model(), exclude_key_regex="w2")) == set(stored("raw"))


@pytest.mark.parametrize("load", [False, True])
def test_what_is_given_is_not_changed(load: bool) -> None:
    whole, converter = model(), adapter()
    before, bits = dict(whole), {name: tensor.clone() for name, tensor in whole.items()}
    asked = converter.to_hf(whole, for_checkpoint_load=load)
    assert list(whole) == list(before) and all(whole[name] is before[name] for name in before)
    given = dict(asked)
    converter.from_hf(asked)
    assert list(asked) == list(given) and all(asked[name] is given[name] for name in given)
    assert_same(whole, bits, "the model")


def test_peft_names_have_their_prefix() -> None:
    words = (
        "layers.0.norm.lora_A.weight",
        "layers.0.norm.lora_B.weight",
        "embed.lora_embedding_A",
        "embed.lora_embedding_B",
    )
    lora = {f"model.{word}": torch.ones(2) for word in words}
    given = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    converter = adapter()
    made = converter.to_hf(given)
    assert set(made) == {f"base_model.model.{word}" for word in words}
    assert converter.get_hf_state_dict_keys(given) == list(made)
    back = converter.from_hf(made)
    assert_same({name: back[name] for name in given}, given, "and back")


# --- parts of groups ---


def test_one_tensor() -> None:
    name, tensor = "model.layers.0.rope.weight", model()["model.layers.0.rope.weight"]
    ((stored_name, made),) = adapter().convert_single_tensor_to_hf(name, tensor)
    assert stored_name == "layers.0.rope.weight"
    assert_same({stored_name: made}, {stored_name: stored("raw")[stored_name]}, "one")
    many = dict(adapter().convert_single_tensor_to_hf(DOWN, model()[DOWN]))
    assert sorted(many) == [f"layers.0.experts.{e}.w2.weight" for e in range(5)]
    assert adapter().convert_single_tensor_to_hf(DOWN, model()[DOWN], exclude_key_regex=".*") == []


@pytest.mark.parametrize("load", [False, True])
def test_one_of_several_that_are_joined_is_refused(load: bool) -> None:
    """`qkv` is made of `q2` and `k2`."""
    name = "model.layers.1.q2.weight"
    with pytest.raises(MissingTensorsError) as caught:
        adapter().convert_single_tensor_to_hf(name, model()[name], for_checkpoint_load=load)
    assert isinstance(caught.value, RuntimeError) and caught.value.code == "R605"
    assert "model.layers.1.k2.weight" in str(caught.value)
    with pytest.raises(ConversionError) as refused:
        adapter().get_hf_state_dict_keys({name: model()[name]})
    assert refused.value.code == "R605"


def test_what_is_missing_in_a_checkpoint_is_named() -> None:
    for gone in ("layers.0.experts.3.w1.weight", "layers.1.norm.weight"):
        with pytest.raises(MissingTensorsError) as caught:
            adapter().from_hf({name: tensor for name, tensor in stored("raw").items() if name != gone})
        assert gone in str(caught.value)
    without = {name: tensor for name, tensor in stored("fp8").items() if name != "embed.weight_scale_inv"}
    with pytest.raises(MissingTensorsError, match="embed.weight_scale_inv"):
        adapter().from_hf(without)
    loading = adapter()
    loading.to_hf(model(), for_checkpoint_load=True)
    with pytest.raises(MissingTensorsError, match="embed.weight_scale_inv"):
        loading.from_hf(without)


# --- formats ---


def test_quantization_encodes() -> None:
    whole = model("fp8")
    made = adapter().to_hf(whole, quantization=True)
    assert_same(made, written(whole, quantization=True), "in the map's first format")
    assert made["embed.weight"].dtype == torch.float8_e4m3fn
    assert_same(adapter().from_hf(made), adapter().from_hf(stored("fp8")), "read back")


@pytest.mark.parametrize("kind", ["raw", "fp8", "fp4"])
def test_quantization_is_as_it_was_read(kind: str) -> None:
    converter = adapter()
    whole = converter.from_hf(stored(kind))
    found = converter.to_hf(whole, quantization=True)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in stored(kind).items()}


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_formats_are_read_through_placeholders(kind: str) -> None:
    """On the model's device, of the forms that are stored: to be overwritten, then decoded."""
    whole = {name: torch.zeros_like(tensor) for name, tensor in native(kind).items()}
    converter = adapter()
    converter.expect_formats({name: tensor.to("meta") for name, tensor in stored(kind).items()})
    asked = converter.to_hf(whole, quantization=True, for_checkpoint_load=True)
    assert forms_of(asked) == forms_of(stored(kind))
    made = converter.from_hf(filled(asked, stored(kind)))
    made |= {name: whole[name].contiguous() for name in converter.view_loaded_native_keys}
    assert_same(made, native(kind), kind)


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("quantization", [False, True])
def test_a_model_without_elements(load: bool, quantization: bool) -> None:
    """Everything has its name, shape and dtype, and no elements."""
    blank = {name: tensor.to("meta") for name, tensor in model().items()}
    made = adapter().to_hf(blank, quantization=quantization, for_checkpoint_load=load)
    expected = written(model("fp8" if quantization else "raw"), quantization=quantization)
    assert forms_of(made) == forms_of(expected)
    assert all(tensor.is_meta for tensor in made.values())
    if not quantization:
        back = adapter().from_hf(made)
        assert forms_of(back) == forms_of(native("raw"))
        assert all(tensor.is_meta for name, tensor in back.items() if name != "model.ones")


def test_decoded_tensors_have_the_dtype_asked_for() -> None:
    made = adapter(dtype=torch.float32).from_hf(stored("fp8"))
    assert made["model.embed.weight"].dtype == torch.float32 and made[DOWN].dtype == torch.float32
    assert made["model.ones"].dtype == torch.float32
    assert made["model.layers.0.norm.weight"].dtype == torch.bfloat16


def test_stated_dtypes_are_told() -> None:
    """Where nothing else is possible."""
    text = "param d\nf [d] as f32 <-> f [d]\ng [d] as bf16|f32 <-> g [d]\nh [d] as f32|raw <-> h [d]\n"

    class Toy(AutomodelAdapter):
        ADAPTER: ClassVar = map_of(text).adapter_class

    converter = Toy({"d": 4})
    made = converter.to_hf({"f": torch.ones(4).bfloat16(), "g": torch.ones(4), "h": torch.ones(4)}, quantization=True)
    assert made["f"].dtype == torch.float32
    assert converter.forced_hf_dtype_mapping(made) == {"f": "F32", "g": "BF16"}
    assert converter.forced_hf_dtype_mapping({"f": made["f"].half(), "other": made["f"]}) == {}


def test_a_config_of_fewer_layers_finds_its_formats(tmp_path: Path) -> None:
    """A model is cut to a layer or two for a test: the checkpoint in the folder has more of them."""
    save_file(stored("fp8"), str(tmp_path / "model.safetensors"))

    class Toy(AutomodelAdapter):
        ADAPTER: ClassVar = type(map_().adapter(CONFIG))

    config = SimpleNamespace(**{**CONFIG, "L": 1}, _name_or_path=str(tmp_path))
    model = {name: tensor for name, tensor in native("fp8").items() if ".layers.1." not in name}
    asked = Toy(config).to_hf(model, quantization=True, for_checkpoint_load=True)
    assert forms_of(asked) == forms_of({n: t for n, t in stored("fp8").items() if not n.startswith("layers.1.")})


# --- what people get wrong ---


def test_zeros_of_the_model_are_not_left_as_they_were() -> None:
    """What no stored tensor fills is zeros, whatever a model's memory has: such a tensor is not loaded in place."""

    class Toy(AutomodelAdapter):
        ADAPTER: ClassVar = map_of("a [d] <-> m [(d + zeros(3))]\nb [d] <-> n [d 1]\n").adapter_class

    converter, model = Toy({}), {"m": torch.full((5,), 7.0), "n": torch.full((2, 1), 7.0)}
    asked = converter.to_hf(model, for_checkpoint_load=True)
    made = converter.from_hf(filled(asked, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}))
    assert converter.view_loaded_native_keys == {"n"} and set(made) == {"m"}
    assert_same(made, {"m": torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0])}, "read")


@pytest.mark.parametrize("load", [False, True])
def test_what_is_made_of_parameters_is_out_of_their_graph(load: bool) -> None:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in model().items()}
    made = adapter().to_hf(parameters, for_checkpoint_load=load)
    assert not any(tensor.requires_grad for tensor in made.values())
    if load:
        assert memory(made) & memory(parameters)
    else:
        assert_same(made, stored("raw"), "saved")


@pytest.mark.parametrize(("gone", "left"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_of_a_low_rank_adapter_is_refused(gone: str, left: str) -> None:
    stem = "base_model.model.layers.0.o"
    state = {f"{stem}.{left}.weight": torch.ones(2, 3)}
    with pytest.raises(MissingTensorsError, match=rf"{stem}\.{gone}\.weight is missing, {stem}\.{left}\.weight"):
        adapter().from_hf(state)
    with pytest.raises(MissingTensorsError, match="lora_embedding_B is missing"):
        adapter().from_hf({"layers.0.o.lora_embedding_A": torch.ones(2)})


def test_names_of_another_spelling_are_told_with_what_is_missing() -> None:
    wrong = {f"model.{name}": tensor for name, tensor in stored("raw").items()}
    with pytest.raises(MissingTensorsError, match=r"tensors are missing: .*; no rule reads model\.embed\.weight"):
        adapter().from_hf(wrong)


def test_meta_tensors_among_others_are_named() -> None:
    mixed = stored("raw") | {"head.weight": stored("raw")["head.weight"].to("meta")}
    with pytest.raises(ConversionError, match=r"C504.*they have no values: head\.weight"):
        adapter().from_hf(mixed)
