"""Checks of compiled classes in Automodel's own loading and saving, in a job whose model lies on several processes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.distributed.mesh import ParallelismSizes
from nemo_automodel.components.distributed.mesh_utils import _create_fsdp2_device_mesh
from nemo_automodel.components.moe.parallelizer import apply_ep
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.differential.automodel import Case, State, contiguous, load
from tests.differential.automodel_target import FAMILIES, in_place_of
from tests.differential.quantised import fp8_checkpoint
from tests.helpers.deepseek_v4 import Storage, checkpoint, differences
from tests.helpers.dtensor_job import full
from tests.helpers.jobs import Checks

check = Checks()
logging.getLogger("nemo_automodel").setLevel(logging.ERROR)

QWEN, _DEEPSEEK = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"]
# FSDP cuts the inner size of experts, which it has to divide.
DEEPSEEK = replace(_DEEPSEEK, config={**_DEEPSEEK.config, "moe_intermediate_size": 142})
EVEN, UNEVEN = replace(QWEN, config={**QWEN.config, "num_experts": 4}), QWEN  # of three experts


def shared_folder() -> Path:
    """A new folder, the same on every rank."""
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(str(names[0]))


def saved(files: State) -> Path:
    """A folder with a checkpoint, the same on every rank."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        save_file(files, str(folder / "model.safetensors"))
    dist.barrier()
    return folder


def moe_mesh(ep: int = 2) -> tuple[DeviceMesh, DeviceMesh]:
    """The meshes of Automodel's own making: that of all ranks, and that of experts."""
    device_mesh, experts = _create_fsdp2_device_mesh(ParallelismSizes(ep_size=ep), world_size=dist.get_world_size())
    assert experts is not None
    return device_mesh, experts


def spread(case: Case, device_mesh: DeviceMesh, experts: DeviceMesh) -> torch.nn.Module:
    """The model with its experts over `ep` and `ep_shard`, and all else over all ranks, as Automodel does it."""
    model = case.family.build(case.config, case.dtype, "cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    apply_ep(model, experts["ep"])
    grouped = {module for name, module in model.named_modules() if name.endswith(".experts")}
    if experts["ep_shard"].size() > 1:
        for module in grouped:
            fully_shard(module, mesh=experts["ep_shard"], shard_placement_fn=lambda _: Shard(1))
    ignored = {parameter for module in grouped for parameter in module.parameters()}
    fully_shard(model, mesh=device_mesh["dp_shard_cp"], ignored_params=ignored)
    return model


def checkpointer(folder: Path, experts: DeviceMesh, **options: Any) -> Any:
    """Automodel's own."""
    plain = {"save_consolidated": "false", "checkpoint_dir": str(folder), "model_cache_dir": str(folder)}
    return CheckpointingConfig(**{**plain, **options}).build(dist.get_rank(), 0, 0, moe_mesh=experts)


def whole(model: torch.nn.Module) -> State:
    """The model's state, all of every tensor."""
    return {n: full(t) if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}


def finite(case: Case) -> State:
    """A random checkpoint: FSDP may copy a NaN into another one."""
    made = contiguous(case.theirs().to_hf(case.native()))
    return {name: tensor.nan_to_num(0.5) for name, tensor in made.items()}


def ours(model: torch.nn.Module, case: Case) -> torch.nn.Module:
    """The model with our adapter in the place of its own."""
    model.state_dict_adapter = in_place_of(model.state_dict_adapter, case)  # type: ignore[assignment]
    return model


def refused(action: Callable[[], object], kind: type[BaseException]) -> None:
    """The action fails on some rank, so that no rank may wait for another: it is called where nothing is exchanged."""
    try:
        action()
        failed = False
    except kind:
        failed = True
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, failed)
    assert any(seen)


def written(folder: Path) -> State:
    """All that a save wrote."""
    dist.barrier()
    out: State = {}
    for file in sorted(folder.rglob("*.safetensors")):
        out |= load_file(str(file))
    return out


@check(2, 4)
def a_checkpoint_is_loaded_and_saved() -> None:
    """Experts that the ranks share evenly, and others: of three, two ranks have 2 and 1."""
    device_mesh, experts = moe_mesh()
    for case in (EVEN, UNEVEN):
        files = finite(case)
        folder, expected = saved(files), load(case.map).adapter(case.config).from_hf(files)
        model = ours(spread(case, device_mesh, experts), case)
        engine = checkpointer(folder, experts)
        engine.load_model(model, str(folder), is_init_step=True)
        assert differences(whole(model), expected) == []
        in_model = model.state_dict_adapter.view_loaded_native_keys
        assert in_model == {name for name in expected if name.endswith("_projs")}, in_model
        engine.save_model(model, str(folder / "saved"))
        assert set(written(folder / "saved")) == set(files)
        resumed = ours(spread(case, device_mesh, experts), case)
        engine.load_model(resumed, str(folder / "saved" / "model"))
        assert differences(whole(resumed), expected) == []


@check(2)
def automodel_itself_loads_even_experts_the_same_and_no_others() -> None:
    device_mesh, experts = moe_mesh()
    files = finite(EVEN)
    folder = saved(files)
    model = spread(EVEN, device_mesh, experts)
    checkpointer(folder, experts).load_model(model, str(folder), is_init_step=True)
    assert differences(whole(model), whole_of_ours(EVEN, files)) == []
    uneven = spread(UNEVEN, device_mesh, experts)
    # It counts 2 and 1 experts, too; its DTensors, made of the parts, then have four and two of them.
    stated = UNEVEN.theirs().from_hf(finite(UNEVEN), device_mesh=experts["ep"])
    assert {t.shape[0] for name, t in stated.items() if name.endswith("_projs")} == {4 if dist.get_rank() == 0 else 2}
    made = ours(uneven, UNEVEN).state_dict_adapter.from_hf(finite(UNEVEN), device_mesh=experts["ep"])
    assert {t.shape[0] for name, t in made.items() if name.endswith("_projs")} == {3}


@check(4)
def four_ranks_have_five_experts() -> None:
    """2, 2, 1 and none as DTensors share them; Automodel counts 2, 1, 1, 1, and fails."""
    _, experts = moe_mesh(ep=4)
    case = replace(QWEN, config={**QWEN.config, "num_experts": 5})
    model = case.family.build(case.config, case.dtype, "cpu")
    apply_ep(model, experts["ep"])
    theirs, mine = model.state_dict_adapter, in_place_of(model.state_dict_adapter, case)
    state = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_projs")}
    refused(lambda: theirs.to_hf(dict(state)), ValueError)
    names = {name.split(".experts.")[1].split(".")[0] for name in mine.to_hf(state)}
    assert names == [{"0", "1"}, {"2", "3"}, {"4"}, set()][dist.get_rank()]


def whole_of_ours(case: Case, files: State) -> State:
    """What one process makes of a checkpoint."""
    return load(case.map).adapter(case.config).from_hf(files)


@check(2, 4)
def fp8_that_shards_cut_within_a_block_is_decoded_right() -> None:
    """134 rows over 2 ranks are 67 and 67, over 4 of them 34: no shard but the first begins at a block (B1)."""
    device_mesh, experts = moe_mesh()
    files = fp8_checkpoint(DEEPSEEK)
    folder, expected = saved(files), whole_of_ours(DEEPSEEK, files)
    model = ours(spread(DEEPSEEK, device_mesh, experts), DEEPSEEK)
    model.config.quantization_config = {"quant_method": "fp8"}
    checkpointer(folder, experts).load_model(model, str(folder), is_init_step=True)
    assert differences(whole(model), expected) == []
    if dist.get_world_size() > 2:
        return
    # Automodel does not make placeholders of uneven shards, such as those of 131 rows and of three experts.
    model = spread(DEEPSEEK, device_mesh, experts)
    shards = {n: t for n, t in model.state_dict().items() if ".experts." not in n and t.shape[0] % 2 == 0}
    asked = model.state_dict_adapter.to_hf(shards, quantization=True)
    read_into(asked, files)
    made = model.state_dict_adapter.from_hf(asked)
    wrong = differences({name: full(tensor) for name, tensor in made.items()}, {name: expected[name] for name in made})
    assert "model.layers.0.self_attn.o_proj.weight" in wrong
    assert "model.norm.weight" not in wrong


def read_into(asked: dict[str, Any], files: State) -> None:
    """Fill what was asked for, shards and all."""
    from torch.distributed.tensor import distribute_tensor

    for name, tensor in asked.items():
        if isinstance(tensor, DTensor):
            part = distribute_tensor(files[name].view(torch.uint8), tensor.device_mesh, tensor.placements)
            tensor.to_local().view(torch.uint8).copy_(part.to_local())
        else:
            tensor.copy_(files[name])


@check(2)
def a_format_that_is_not_the_maps_first_is_asked_of_the_checkpoint() -> None:
    """DeepSeek-V4 with experts in FP8 and scales in f32: the config tells the folder, where Automodel looks, too."""
    device_mesh, experts = moe_mesh()
    case = FAMILIES["deepseek_v4"]
    files = checkpoint(dict(case.config), Storage("fp8", scales=torch.float32))
    folder, expected = saved(files), whole_of_ours(case, files)
    model = spread(case, device_mesh, experts)
    model.config.quantization_config = {"quant_method": "fp8"}
    model.config._name_or_path = str(folder)
    checkpointer(folder, experts).load_model(ours(model, case), str(folder), is_init_step=True)
    found = whole(model)
    assert differences(found, {name: tensor.to(found[name].dtype) for name, tensor in expected.items()}) == []


@check(2)
def experts_under_fsdp_alone_are_loaded() -> None:
    """Three experts over two ranks as FSDP shares them, without a mesh of experts: global shapes stay (B22, B29)."""
    device_mesh, _ = moe_mesh()
    files = finite(UNEVEN)
    folder, expected = saved(files), whole_of_ours(UNEVEN, files)
    engine = CheckpointingConfig(save_consolidated="false", checkpoint_dir=str(folder)).build(dist.get_rank(), 0, 0)
    for path, is_first in ((folder, True), (folder / "saved" / "model", False)):
        model = UNEVEN.family.build(UNEVEN.config, UNEVEN.dtype, "cpu")
        fully_shard(model, mesh=device_mesh["dp_shard_cp"])
        engine.load_model(ours(model, UNEVEN), str(path), is_init_step=is_first)
        assert differences(whole(model), expected) == []
        engine.save_model(model, str(folder / "saved"))


@check(2)
def a_save_leaves_nothing_behind() -> None:
    """After a save, and after a load that nobody ended, another checkpoint is read whole (B8)."""
    device_mesh, experts = moe_mesh()
    model = ours(spread(EVEN, device_mesh, experts), EVEN)
    adapter = model.state_dict_adapter
    files = finite(EVEN)
    expected = whole_of_ours(EVEN, files)
    adapter.to_hf(model.state_dict(), quantization=False, v4_compatible=True)
    made = adapter.from_hf(files, device_mesh=experts["ep"])
    assert set(made) == set(expected)
    assert adapter.view_loaded_native_keys == set()
    adapter.to_hf(model.state_dict(), for_checkpoint_load=True)
    made = adapter.from_hf(files, device_mesh=experts["ep"])
    assert set(made) == set(expected)
    assert adapter.view_loaded_native_keys == set()
    assert differences({n: full(t) if isinstance(t, DTensor) else t for n, t in made.items()}, expected) == []


@check(2)
def lora_of_experts_is_exported_and_resumed() -> None:
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules

    device_mesh, experts = moe_mesh()
    for case in (EVEN, UNEVEN):
        found = []
        for is_ours in (True, False):
            folder = shared_folder()
            model = adapted(case, PeftConfig, apply_lora_to_linear_modules, device_mesh, experts, is_ours)
            engine = checkpointer(folder, experts, is_peft=True)
            settings = PeftConfig(target_modules=["*_proj", "*.experts"], dim=4, alpha=8)
            engine.save_model(model, str(folder), peft_config=settings)
            found.append(written(folder))
            again = adapted(case, PeftConfig, apply_lora_to_linear_modules, device_mesh, experts, is_ours, blank=True)
            engine.load_model(again, str(folder / "model"))
            assert differences(lora(again), lora(model)) == [], is_ours
        assert differences(*found) == []


def lora(model: torch.nn.Module) -> State:
    """The adapter of a model."""
    return {name: tensor for name, tensor in whole(model).items() if "lora" in name}


def adapted(
    case: Case,
    settings: Any,
    apply: Any,
    device_mesh: DeviceMesh,
    experts: DeviceMesh,
    is_ours: bool,
    blank: bool = False,
) -> torch.nn.Module:
    """A model with LoRA of its linear layers and experts, spread over the ranks."""
    model = case.family.build(case.config, case.dtype, "cpu")
    apply(model, settings(target_modules=["*_proj", "*.experts"], dim=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        drawn: Tensor = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(torch.zeros_like(drawn) if blank else drawn)
    apply_ep(model, experts["ep"])
    return ours(model, case) if is_ours else model


if __name__ == "__main__":
    check.main()
