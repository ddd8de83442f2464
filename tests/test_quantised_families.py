"""Released quantised layouts: their header listings against small maps, and tiny checkpoints of them there and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import assert_same_files, write_state
from torch import Tensor

import mapdsl
from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.cli.main import main
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING
from mapdsl.runtime.errors import ConversionError
from mapdsl.testing.bits import bits, finite, random_bits
from tests.helpers.execution import assert_same

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Family:
    """A listing and its map; `tiny` are fields of a config of the same layout, `stored` counts tensors by format."""

    map: str
    listing: str
    stored: dict[str, int]
    tiny: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    read_only: bool = False

    @property
    def path(self) -> Path:
        return DATA / "maps" / f"{self.map}.map"

    @property
    def headers(self) -> Path:
        return DATA / "listings" / f"{self.listing}.list"

    def config(self) -> dict[str, Any]:
        """The released config, made small."""
        found = dict(json.loads(self.headers.with_suffix(".config.json").read_text()))
        return {**found, **self.tiny}


GPT_OSS = {
    "num_hidden_layers": 2,
    "vocab_size": 31,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 5,
}
ROUTED = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 17,
    "hidden_size": 134,
    "num_attention_heads": 6,
    "intermediate_size": 139,
    "moe_intermediate_size": 131,
    "n_routed_experts": 3,
}
GLM = ROUTED | {"num_key_value_heads": 2, "head_dim": 5}
V3 = ROUTED | {
    "q_lora_rank": 22,
    "kv_lora_rank": 130,
    "qk_rope_head_dim": 7,
    "qk_nope_head_dim": 23,
    "v_head_dim": 25,
}
LLAMA = {
    "num_hidden_layers": 2,
    "vocab_size": 31,
    "hidden_size": 256,
    "num_attention_heads": 3,
    "head_dim": 128,
    "intermediate_size": 136 * 8,
}
FAMILIES = {
    "gpt-oss in MXFP4": Family("gpt_oss", "gpt_oss_20b", {"as they are": 363, "mxfp4": 96}, GPT_OSS),
    "gpt-oss in e5m2": Family(
        "gpt_oss", "gpt_oss_20b_bf16", {"as they are": 363, "f8e5m2": 48}, GPT_OSS, {"packed": False}
    ),
    "GLM-4.5, FP8 per channel": Family(
        "glm_fp8", "glm_4_5_fp8", {"as they are": 749, "fp8": 2 * 43_852, "f32": 90}, GLM
    ),
    "DeepSeek-V3, edge blocks": Family(
        "deepseek_v3_fp8", "deepseek_v3", {"as they are": 316, "fp8": 2 * 45_808, "f32": 59}, V3
    ),
    "Llama 2 in AWQ": Family("llama_awq", "llama_2_7b_awq", {"as they are": 67, "awq": 672}, LLAMA, {}, True),
}
CASES = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


@pytest.mark.parametrize("path", sorted((DATA / "maps").glob("*.map")), ids=lambda path: path.stem)
def test_the_maps_hold_and_are_formatted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(path)]) == 0
    assert main(["fmt", "--check", str(path)]) == 0
    assert "lint" not in capsys.readouterr().out


@CASES
def test_the_listing_is_what_the_map_promises(family: Family) -> None:
    checkpoint = open_checkpoint(family.headers)
    found, summary = check_against(mapdsl.load(family.path).checked, checkpoint)
    assert found == []
    assert summary.formats == family.stored
    assert (summary.tensors, summary.dropped, summary.carried) == (len(checkpoint.tensors), 0, 0)


@CASES
def test_names_shapes_and_dtypes_of_the_config_are_the_listings(family: Family) -> None:
    checkpoint = open_checkpoint(family.headers)
    config = json.loads(family.headers.with_suffix(".config.json").read_text())
    keys = mapdsl.load(family.path).adapter(config, **family.params).left_keys()
    assert keys.keys() == checkpoint.tensors.keys()
    wrong = [name for name, (shape, _) in keys.items() if shape != checkpoint.tensors[name].shape]
    assert wrong == []
    stated = {name: dtype for name, (_, dtype) in keys.items() if dtype is not None}
    assert len(stated) == sum(count for name, count in family.stored.items() if name != "as they are")
    assert [n for n, dtype in stated.items() if dtype != DTYPE_BY_SPELLING[checkpoint.tensors[n].dtype]] == []


def tiny_state(adapter: Adapter, seed: int = 0) -> dict[str, Tensor]:
    """Random bytes in the parts of formats, as wild as those allow; plain tensors in bf16."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, (shape, dtype) in adapter.left_keys().items():
        assert shape is not None
        sizes = tuple(size for size in shape if size is not None)
        made = random_bits(generator, sizes, dtype or torch.bfloat16)
        state[name] = finite(made) if "scale" in name else made
    return state


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tiny_checkpoint_comes_back(family: Family, dtype: torch.dtype) -> None:
    adapter = mapdsl.load(family.path).adapter(family.config(), **family.params)
    state = tiny_state(adapter)
    native = adapter.read(state, dtype=dtype)
    decoded = {name for name, (_, stored) in adapter.left_keys().items() if stored is not None}
    assert decoded
    assert {tensor.dtype for tensor in native.values()} <= {dtype, torch.bfloat16, torch.float32}
    assert_same(adapter.write(native, quantization=True), state, "back")


@CASES
def test_every_file_of_a_tiny_checkpoint_comes_back(family: Family, tmp_path: Path) -> None:
    one = mapdsl.load(family.path)
    config = family.config()
    state = tiny_state(one.adapter(config, **family.params), seed=1)
    source = write_state(tmp_path / "source", state, config, shard_bytes=200_000)
    mapdsl.convert(source, tmp_path / "there", one, to="native")
    mapdsl.convert(tmp_path / "there", tmp_path / "back", one, to="hf")
    assert_same_files(tmp_path / "back", source)


def test_gpt_oss_decodes_by_the_definition() -> None:
    """`gate_up [e, in, out]`: code times power, gate and up interleaved as they were."""
    family = FAMILIES["gpt-oss in MXFP4"]
    adapter = mapdsl.load(family.path).adapter(family.config())
    state = tiny_state(adapter)
    native = adapter.read(state, dtype=torch.float32)["layers.1.gate_up"]
    blocks = state["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    scales = state["model.layers.1.mlp.experts.gate_up_proj_scales"]
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    sizes = torch.where(codes > 7, -table[codes & 7], table[codes & 7]).double()
    powers = torch.where(scales == 255, torch.nan, 2.0 ** (scales.double() - 127))
    expected = (sizes * powers[..., None]).flatten(-2).transpose(1, 2).float()
    assert torch.equal(native.isnan(), expected.isnan())
    assert torch.equal(native.nan_to_num(0.0), expected.nan_to_num(0.0))
    assert 0.02 < expected.isnan().float().mean() < 0.3


def test_awq_is_read_and_not_written() -> None:
    family = FAMILIES["Llama 2 in AWQ"]
    adapter = mapdsl.load(family.path).adapter(family.config())
    native = adapter.read(tiny_state(adapter))
    native["layers.0.o"][3, 5] += 1000
    with pytest.raises(ConversionError) as caught:
        adapter.write(native, quantization=True)
    assert caught.value.code == "D406"
    plain = mapdsl.load(family.path).adapter(family.config()).write(native)
    assert plain["model.layers.0.self_attn.o_proj.weight"].shape == (384, 256)


# --- Kimi-K2.5, of which there is no listing: names, dtypes and shapes of a layer as its config gives them ---

KIMI = {
    "text_config": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "hidden_size": 96,
        "moe_intermediate_size": 64,
        "n_routed_experts": 3,
    }
}


def kimi_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {"language_model.lm_head.weight": random_bits(generator, (7, 96), torch.bfloat16)}
    for layer in (1, 2):
        for expert in range(3):
            for name, (rows, columns) in {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}.items():
                key = f"language_model.model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                state[f"{key}_packed"] = random_bits(generator, (rows, columns // 8), torch.int32)
                state[f"{key}_scale"] = finite(random_bits(generator, (rows, columns // 32), torch.bfloat16))
                state[f"{key}_shape"] = torch.tensor([rows, columns], dtype=torch.int32)
    return state


def test_kimi_int4_there_and_back(tmp_path: Path) -> None:
    one, state = mapdsl.load(DATA / "maps" / "kimi_int4.map"), kimi_state()
    source = write_state(tmp_path / "source", state, KIMI)
    found, summary = check_against(one.checked, open_checkpoint(source))
    assert found == []
    assert summary.formats == {"int4": 54}
    assert summary.carried == 1
    adapter = one.adapter(KIMI)
    native = adapter.read(state, dtype=torch.float32)
    assert tuple(native["layers.2.experts.gate_up"].shape) == (3, 96, 128)
    key = "language_model.model.layers.2.mlp.experts.1.up_proj.weight"
    word, scale = int(state[f"{key}_packed"][5, 9]), float(state[f"{key}_scale"][5, 2])
    expected = torch.tensor([((word >> 4 * place & 15) - 8) * scale for place in range(8)])
    assert torch.equal(native["layers.2.experts.gate_up"][1, 72:80, 64 + 5], expected)
    assert_same(adapter.write(native, quantization=True), state, "back")
    mapdsl.convert(source, tmp_path / "there", one, to="native")
    mapdsl.convert(tmp_path / "there", tmp_path / "back", one, to="hf")
    assert_same_files(tmp_path / "back", source)
    assert bits(native["layers.1.experts.down"]).numel() == 3 * 96 * 64
