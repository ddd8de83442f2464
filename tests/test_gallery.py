"""Real bugs of released converters, each with the test that shows why a map cannot have it.

Each was found in the converter that its section names. Those about ranks wait for sharding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mapdsl
from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.errors import ConversionError
from tests.helpers.deepseek_v4 import checkpoint, differences, same_bytes, tiny_config


def load(text: str) -> Map:
    return Map(Source("gallery.map", text))


def codes(text: str) -> list[str]:
    """The codes of all errors of a map."""
    return [found.code for found in load(text).check() if found.severity == "error"]


def adapter(text: str, **config: object) -> Adapter:
    return load(text).adapter(config)


def refusal(call: Callable[[dict[str, Tensor]], object], state: dict[str, Tensor]) -> ConversionError:
    with pytest.raises(ConversionError) as caught:
        call(state)
    return caught.value


def numbered(*shape: int) -> Tensor:
    """A tensor whose elements are all different, and exact in float32."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


# --- transformers --------------------------------------------------------------------------------------------------


def test_transformers_deepseek_v4_norm_and_kv_norm_end_in_one_name() -> None:
    """Its reverse of `.norm. -> .kv_norm.` hits `attn.kv_norm` too, so that saving writes `attn.norm.weight`."""
    rules = """
map t: hf <-> native
index i < 4
layers.{i}.attn.kv_norm.weight <-> model.layers.{i}.self_attn.kv_norm.weight
"""
    assert codes(rules) == []
    assert codes(rules + "layers.{i}.attn.norm.weight <-> model.layers.{i}.self_attn.kv_norm.weight\n") == ["K202"]
    assert codes(rules + "layers.{i}.attn.kv_norm.weight <-> model.layers.{i}.self_attn.norm.weight\n") == ["K201"]


def test_transformers_deepseek_v4_saves_what_it_loaded() -> None:
    """Load then save is tried, not only save then load: every stored name comes back."""
    config = tiny_config()
    converter, stored = mapdsl.load("deepseek_v4").adapter(config), checkpoint(config)
    assert {"layers.1.attn.kv_norm.weight", "layers.1.attn.compressor.norm.weight"} <= set(stored)
    assert differences(converter.to_hf(converter.from_hf(stored), quantization=True), stored) == []


EXPERTS = """
map t: hf <-> native
param E = experts
index e < E
experts.{e}.w1 [f d] <-> experts.w1 [e d f]
"""


def test_transformers_experts_with_gaps_are_not_renumbered() -> None:
    """Experts 0, 1, 3 and 7 of a checkpoint become 0 to 3 there."""
    stored = {f"experts.{e}.w1": numbered(3, 2) for e in (0, 1, 3, 7)}
    error = refusal(adapter(EXPERTS, experts=8).from_hf, stored)
    assert error.code == "R605"
    assert "experts.2.w1" in error.message
    error = refusal(adapter(EXPERTS, experts=4).from_hf, stored)
    assert error.code == "R605"


def test_transformers_olmo_hybrid_parts_keep_their_own_sizes() -> None:
    """Parts of 32, 32 and 64 rows are saved there as three thirds: 43, 43 and 42."""
    converter = adapter(
        """
map t: hf <-> native
param K = key_dim
param V = value_dim
q.conv [K c] + k.conv [K c] + v.conv [V c] <-> qkv.conv [(K + K + V) c]
""",
        key_dim=32,
        value_dim=64,
    )
    stored = {"q.conv": numbered(32, 4), "k.conv": numbered(32, 4) + 1000, "v.conv": numbered(64, 4) + 2000}
    native = converter.from_hf(stored)
    assert same_bytes(native["qkv.conv"], torch.cat(list(stored.values())))
    assert differences(converter.to_hf(native), stored) == []


# --- NeMo Automodel ------------------------------------------------------------------------------------------------

SCALED = """
map t: hf <-> native
codec fp8 = block_scaled(f8e4m3, block=128x128, scale="{key}_scale_inv")
w.weight as fp8 <-> w.weight
"""


def test_nemo_qwen3_moe_a_scale_cannot_be_dropped_apart_from_its_payload() -> None:
    """Its mixin drops `_scale_inv` and keeps the codes for weights, a hundred times too large."""
    stored = {"w.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.full((1, 1), 0.01)}
    assert set(codes(SCALED + "w.weight_scale_inv -> _\n")) == {"D402"}
    plain = adapter("map t: hf <-> native\nw.weight <-> w.weight\n")
    assert refusal(plain.from_hf, stored).code == "R603"
    decoded = adapter(SCALED).from_hf(stored)["w.weight"]
    assert same_bytes(decoded, torch.full((2, 2), 0.01).bfloat16())


def test_nemo_deepseek_v4_one_missing_expert_is_named() -> None:
    """The whole stack is left out there, and nobody says so."""
    stored = {f"experts.{e}.w1": numbered(3, 2) for e in range(4) if e != 2}
    error = refusal(adapter(EXPERTS, experts=4).from_hf, stored)
    assert error.code == "R605"
    assert "experts.2.w1" in error.message


FP4 = """
map t: hf <-> native
codec fp4 = block_scaled(f4e2m1, block=1x32, packed=i8, scale="{stem}.scale", scale_dtype=f8e8m0)
w.weight as fp4 <-> w.weight
"""
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 254, 255])
def test_nemo_deepseek_v4_every_fp4_code_and_end_of_e8m0_is_decoded_by_the_specification(scale: int) -> None:
    """Code 8 is +0.0 there, scale byte 0 is 0 and 255 infinity; they are -0.0, 2**-127 and NaN."""
    nibbles = list(range(16))
    packed = [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
    stored = {
        "w.weight": torch.tensor([packed], dtype=torch.uint8).view(torch.int8),
        "w.scale": torch.tensor([[scale]], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    factor = float("nan") if scale == 255 else 2.0 ** (scale - 127)
    expected = torch.tensor([[(-1.0 if n > 7 else 1.0) * E2M1[n & 7] * factor for n in nibbles]], dtype=torch.float64)
    converter = adapter(FP4)
    found = converter.from_hf(stored, dtype=torch.float32)["w.weight"]
    assert torch.equal(found.double().nan_to_num(-5.0), expected.float().double().nan_to_num(-5.0))
    assert scale == 255 or torch.equal(torch.signbit(found), torch.signbit(expected))
    assert differences(converter.to_hf(converter.from_hf(stored), quantization=True), stored) == []


def test_nemo_quantised_writing_encodes() -> None:
    """No adapter there can write FP8 with right scales: they are ones, for a loader to overwrite."""
    converter, weight = adapter(SCALED), numbered(130, 3).mul(100).bfloat16()
    stored = converter.to_hf({"w.weight": weight}, quantization=True)
    assert stored["w.weight_scale_inv"].shape == (2, 1)
    assert (stored["w.weight_scale_inv"] != 1).all()
    error = (converter.from_hf(stored)["w.weight"].float() - weight.float()).abs()
    assert (error <= weight.float() / 16 + weight.float().max() * 2**-10).all()


LORA = """
map t: hf <-> native
index e < 2
experts.{e}.{repeat j:gate|up}_proj.lora_A.weight [x d] <-> experts.lora_gate_and_up_A [e d x]
"""


def test_nemo_lora_copies_of_one_matrix_are_compared() -> None:
    """`up_proj`'s `lora_A` is discarded there unseen, and an adapter of `up_proj` alone vanishes."""
    stored = {f"experts.{e}.{j}_proj.lora_A.weight": numbered(2, 3) + e for e in (0, 1) for j in ("gate", "up")}
    converter = adapter(LORA)
    native = converter.from_hf(stored)
    assert differences(converter.to_hf(native), stored) == []
    changed = stored | {"experts.1.up_proj.lora_A.weight": numbered(2, 3)}
    assert refusal(converter.from_hf, changed).code == "R602"
    alone = {name: tensor for name, tensor in stored.items() if "up" in name}
    error = refusal(converter.from_hf, alone)
    assert error.code == "R605"
    assert "experts.0.gate_proj.lora_A.weight" in error.message


# --- Megatron-Bridge -----------------------------------------------------------------------------------------------


def test_megatron_bridge_wildcards_are_told_apart_by_name() -> None:
    """Its `*` before `**` swaps what they stand for."""
    converter = adapter("""
map t: hf <-> native
layers.{n:*}.{rest:..} <-> {rest:..}.of.{n:*} else
""")
    stored = {"layers.a.b.c": numbered(2)}
    native = converter.from_hf(stored)
    assert list(native) == ["b.c.of.a"]
    assert differences(converter.to_hf(native), stored) == []


def test_megatron_bridge_a_permutation_is_inverted() -> None:
    """Its `permute_dims=(1, 2, 0)` is applied once more on the way back; only (0, 2, 1) and its like survive that."""
    converter = adapter("map t: hf <-> native\nw [a b c] <-> w [b c a]\n")
    stored = {"w": numbered(2, 3, 5)}
    native = converter.from_hf(stored)
    assert same_bytes(native["w"], stored["w"].permute(1, 2, 0))
    assert differences(converter.to_hf(native), stored) == []


# --- OLMo-core -----------------------------------------------------------------------------------------------------


def test_olmo_core_two_layer_norms_with_one_name() -> None:
    """The last one wins there."""
    assert codes("""
map t: hf <-> native
index i < 2
layers.{i}.post_attention_layernorm.weight <-> blocks.{i}.norm.weight
layers.{i}.post_feedforward_layernorm.weight <-> blocks.{i}.norm.weight
""") == ["K202"]


def test_olmo_core_four_rows_do_not_cut_in_three() -> None:
    """Chunking 4 rows in three gives two and two, and no `v`."""
    converter = adapter("map t: hf <-> native\nqkv [(j r) d] <-> {j:q|k|v} [r d]\n")
    stored = {"qkv": numbered(6, 2)}
    assert sorted(converter.from_hf(stored)) == ["k", "q", "v"]
    error = refusal(converter.from_hf, {"qkv": numbered(4, 2)})
    assert error.code == "X305"
    assert "qkv" in error.message


# --- slime ---------------------------------------------------------------------------------------------------------


def test_slime_gpt_oss_a_transpose_shows_though_the_sizes_are_equal() -> None:
    """With hidden = intermediate = 2880 a forgotten transpose fits; an axis that is a name cannot be forgotten."""
    assert "X301" in codes("map t: hf <-> native\nindex e < 2\nexperts.{e}.w1 [f d] <-> experts.w1 [e d g]\n")
    assert "X302" in codes("map t: hf <-> native\nindex e < 2\nexperts.{e}.w1 [d d] <-> experts.w1 [e d d]\n")
    square = {f"experts.{e}.w1": numbered(3, 3) + 10 * e for e in (0, 1)}
    native = adapter(EXPERTS, experts=2).from_hf(square)["experts.w1"]
    assert same_bytes(native, torch.stack([tensor.T for tensor in square.values()]))


# --- DeepSpeed -----------------------------------------------------------------------------------------------------


def test_deepspeed_the_order_of_a_joined_qkv_is_declared() -> None:
    """Version-0 QKV that is quantised is merged there by plain concatenation, which puts q, k and v out of order."""
    stored = {"qkv": numbered(12, 2)}
    rows = stored["qkv"]
    for shape, q in (("(j h c)", rows[:4]), ("(h j c)", rows[[0, 1, 6, 7]]), ("(h c j)", rows[[0, 3, 6, 9]])):
        text = f"map t: hf <-> native\nparam h = heads\nqkv [{shape} d] <-> {{j:q|k|v}} [(h c) d]\n"
        converter = adapter(text, heads=2)
        native = converter.from_hf(stored)
        assert same_bytes(native["q"], q)
        assert differences(converter.to_hf(native), stored) == []


def test_deepspeed_autotp_grouped_queries_have_their_own_sizes() -> None:
    """12 rows of q, 3 of k and 3 of v are cut there in three equal thirds."""
    converter = adapter(
        """
map t: hf <-> native
param h = heads
param g = groups
qkv.weight [(h c + g c + g c) d] <-> q.weight [(h c) d] + k.weight [(g c) d] + v.weight [(g c) d]
""",
        heads=4,
        groups=1,
    )
    stored = {"qkv.weight": numbered(18, 2)}
    native = converter.from_hf(stored)
    assert [native[name].shape[0] for name in ("q.weight", "k.weight", "v.weight")] == [12, 3, 3]
    assert same_bytes(native["k.weight"], stored["qkv.weight"][12:15])
    assert differences(converter.to_hf(native), stored) == []


def test_deepspeed_a_piece_does_not_keep_the_whole() -> None:
    """Its shards are views, so that each file of one eighth is as large as the whole."""
    converter = adapter(EXPERTS, experts=4)
    native = converter.from_hf({f"experts.{e}.w1": numbered(3, 2) for e in range(4)})
    for tensor in converter.to_hf(native).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
