"""Adapter of deepseek_v4: hf <-> native.

Generated from deepseek_v4.map (sha256 9aac3a34cb814d2d).
Do not edit: change the map and run `mapdsl compile`.
"""

# torch has no annotations for `unflatten`.
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapdsl.runtime.adapter import Adapter, Keys, Tensor
from mapdsl.runtime.codecs.block_scaled import BlockScaled
from mapdsl.runtime.complement import RAW
from mapdsl.runtime.config import Config
from mapdsl.runtime.fitting import only_zeros
from mapdsl.runtime.items import positions
from mapdsl.runtime.put import Put
from mapdsl.runtime.take import Take

FP8 = BlockScaled(
    "fp8",
    "f8e4m3",
    block=(128, 128),
    scale="{stem}.scale",
    scale_dtypes=("f8e8m0", "f32", "bf16"),
)
FP8V3 = BlockScaled(
    "fp8v3",
    "f8e4m3",
    block=(128, 128),
    scale="{key}_scale_inv",
    scale_dtypes=("f32", "bf16", "f8e8m0"),
)
FP4 = BlockScaled(
    "fp4", "f4e2m1", block=(1, 32), scale="{stem}.scale", scale_dtypes=("f8e8m0",)
)
FP8_FP8V3_RAW = (FP8, FP8V3, RAW)
FP4_FP8_FP8V3_RAW = (FP4, FP8, FP8V3, RAW)
RAW_FP8_FP8V3 = (RAW, FP8, FP8V3)


class DeepseekV4Adapter(Adapter):
    """Converts states of deepseek_v4 between `hf` (stored) and `native`."""

    MAP = "deepseek_v4"
    LEFT = "hf"
    RIGHT = "native"

    def set_params(self, config: Config) -> None:
        """Params of the map, from the config of the `hf` checkpoint."""
        self.L = config.count("L", lambda: config.field("num_hidden_layers"))
        self.H = config.number(
            "H",
            lambda: config.field("num_hash_layers"),
            lambda: len(positions(config.field("mlp_layer_types"), "hash_moe")),
            lambda: 0,
        )
        self.M = config.count(
            "M", lambda: config.field("num_nextn_predict_layers"), lambda: 0
        )
        self.vision = config.number(
            "vision", lambda: config.field("vision_n_layers"), lambda: 0
        )
        self.stated = config.number(
            "stated",
            lambda: len(config.field("compress_ratios")),
            lambda: len(config.field("layer_types")),
            lambda: 0,
        )
        self.sliding = config.items(
            "sliding",
            lambda: positions(config.field("compress_ratios"), 0),
            lambda: positions(config.field("layer_types"), "sliding_attention"),
            list,
        )
        self.sparse = config.items(
            "sparse",
            lambda: positions(config.field("compress_ratios"), 4),
            lambda: positions(
                config.field("layer_types"), "compressed_sparse_attention"
            ),
            list,
        )
        self.V = config.size("V", lambda: config.field("vocab_size"))
        self.D = config.size("D", lambda: config.field("hidden_size"))
        self.Din = config.size("Din", lambda: config.field("hidden_size"))
        self.A = config.size("A", lambda: config.field("num_attention_heads"))
        self.C = config.size("C", lambda: config.field("head_dim"))
        self.Q = config.size("Q", lambda: config.field("q_lora_rank"))
        self.G = config.size("G", lambda: config.field("o_groups"))
        self.O = config.size("O", lambda: config.field("o_lora_rank"))
        self.P = config.size(
            "P",
            lambda: (
                config.field("num_attention_heads")
                * config.field("head_dim")
                // config.field("o_groups")
            ),
        )
        self.IA = config.size("IA", lambda: config.field("index_n_heads"))
        self.IC = config.size("IC", lambda: config.field("index_head_dim"))
        self.E = config.count("E", lambda: config.field("n_routed_experts"))
        self.T = config.size("T", lambda: config.field("num_experts_per_tok"))
        self.F = config.size("F", lambda: config.field("moe_intermediate_size"))
        self.S = config.size("S", lambda: config.field("n_shared_experts"), lambda: 1)
        self.Z = config.size(
            "Z",
            lambda: config.field("moe_latent_size"),
            lambda: config.field("hidden_size"),
        )
        self.R = config.size("R", lambda: config.field("hc_mult"))
        self.W = config.size(
            "W", lambda: config.field("hc_mult") * config.field("hidden_size")
        )
        self.X = config.size(
            "X", lambda: config.field("hc_mult") * (config.field("hc_mult") + 2)
        )
        self.lora_fused = config.flag("lora_fused", lambda: False)
        self.lora_gate = config.flag(
            "lora_gate", lambda: self.found("lora_gate"), lambda: True
        )
        self.lora_up = config.flag(
            "lora_up", lambda: self.found("lora_up"), lambda: True
        )

    def accept(self, take: Take) -> None:
        """Legacy spellings and layout variants of the `hf` side."""
        # 125: accept layers.{L+k}.{..} for mtp.{k}.{..}
        for k in range(self.M):
            for (rest,) in take.wild(f"layers.{self.L + k}.**"):
                take.accept(f"layers.{self.L + k}.{rest}", f"mtp.{k}.{rest}")
        # 126: accept model.layers.{L+k}.{..} for mtp.{k}.{..}
        for k in range(self.M):
            for (rest,) in take.wild(f"model.layers.{self.L + k}.**"):
                take.accept(f"model.layers.{self.L + k}.{rest}", f"mtp.{k}.{rest}")
        self.look(take, "lora_gate", "**.experts.*.w1.lora_A.weight")
        self.look(take, "lora_up", "**.experts.*.w3.lora_A.weight")

    def from_hf(
        self, state_dict: Mapping[str, Tensor], **options: Any
    ) -> dict[str, Tensor]:
        """The `native` state of a `hf` state; options as in `Adapter.read`."""
        return self.read(state_dict, **options)

    def to_hf(
        self, state_dict: Mapping[str, Tensor], **options: Any
    ) -> dict[str, Tensor]:
        """The `hf` state of a `native` state; options as in `Adapter.write`."""
        return self.write(state_dict, **options)

    def convert_single_tensor_to_hf(
        self, name: str, tensor: Tensor, **options: Any
    ) -> list[tuple[str, Tensor]]:
        """The `hf` tensors of one `native` tensor."""
        return self.write_one(name, tensor, **options)

    def hf_keys(self, *, quantization: bool = True) -> Keys:
        """Names of the `hf` side, shapes and dtypes where they are fixed."""
        return self.left_keys(quantization=quantization)

    def native_keys(self) -> Keys:
        """Names of the `native` side, shapes and dtypes where they are fixed."""
        return self.right_keys()

    def _to_right(self, take: Take, put: Put) -> None:
        """`hf` -> `native`."""
        # 43: embed.weight <-> model.embed_tokens.weight [V D]
        put("model.embed_tokens.weight", take("embed.weight", shape=(self.V, self.D)))
        # 44: norm.weight <-> model.norm.weight [D]
        put("model.norm.weight", take("norm.weight", shape=(self.D,)))
        # 45: head.weight <-> lm_head.weight [V D]
        put("lm_head.weight", take("head.weight", shape=(self.V, self.D)))
        # 46: hc_head_fn <-> model.hc_head.hc_fn [R W]
        put("model.hc_head.hc_fn", take("hc_head_fn", shape=(self.R, self.W)))
        # 47: hc_head_base <-> model.hc_head.hc_base [R]
        put("model.hc_head.hc_base", take("hc_head_base", shape=(self.R,)))
        # 48: hc_head_scale <-> model.hc_head.hc_scale [1]
        put("model.hc_head.hc_scale", take("hc_head_scale", shape=(1,)))
        if self.vision > 0:
            # 117: image_{t:start|end|newline|pad} <-> model.image_{t} [D] where vision > 0
            for t in ("start", "end", "newline", "pad"):
                put(f"model.image_{t}", take(f"image_{t}", shape=(self.D,)))

        for i in range(self.L):
            self._layers_to_right(take, put, f"layers.{i}", f"model.layers.{i}")
            self._experts_to_right(
                take, put, f"layers.{i}.ffn.experts", f"model.layers.{i}.mlp.experts"
            )
            if i < self.H:
                # 82: ffn.gate.tid2eid <-> mlp.gate.tid2eid [V T] where i < H
                put(
                    f"model.layers.{i}.mlp.gate.tid2eid",
                    take(f"layers.{i}.ffn.gate.tid2eid", shape=(self.V, self.T)),
                )
            if i >= self.H or self.vision > 0:
                # 83: ffn.gate.bias <-> mlp.gate.e_score_correction_bias [E] where i >= H or vision > 0
                put(
                    f"model.layers.{i}.mlp.gate.e_score_correction_bias",
                    take(f"layers.{i}.ffn.gate.bias", shape=(self.E,)),
                )
            if i < self.stated and i not in self.sliding:
                # 97: compressor.norm.weight <-> compressor.kv_norm.weight [C]
                put(
                    f"model.layers.{i}.self_attn.compressor.kv_norm.weight",
                    take(f"layers.{i}.attn.compressor.norm.weight", shape=(self.C,)),
                )
            if i in self.sparse:
                self._attn_to_right(
                    take, put, f"layers.{i}.attn", f"model.layers.{i}.self_attn"
                )
            if i < self.stated and i not in self.sliding and i not in self.sparse:
                # 113: compressor.ape <-> compressor.ape_param.weight [r C]
                put(
                    f"model.layers.{i}.self_attn.compressor.ape_param.weight",
                    take(f"layers.{i}.attn.compressor.ape", shape="r C", C=self.C),
                )
                # 114: compressor.{w:wgate|wkv}.weight <-> compressor.{w}.weight [C D]
                for w in ("wgate", "wkv"):
                    put(
                        f"model.layers.{i}.self_attn.compressor.{w}.weight",
                        take(
                            f"layers.{i}.attn.compressor.{w}.weight",
                            shape=(self.C, self.D),
                        ),
                    )

        for k in range(self.M):
            self._layers_to_right(take, put, f"mtp.{k}", f"mtp.layers.{k}")
            self._experts_to_right(
                take, put, f"mtp.{k}.ffn.experts", f"mtp.layers.{k}.mlp.experts"
            )
            # 87: ffn.gate.bias <-> mlp.gate.e_score_correction_bias [E]
            put(
                f"mtp.layers.{k}.mlp.gate.e_score_correction_bias",
                take(f"mtp.{k}.ffn.gate.bias", shape=(self.E,)),
            )
            # 88: {w:e_proj|h_proj}.weight as fp8|fp8v3|raw <-> {w}.weight [D Din]
            for w in ("e_proj", "h_proj"):
                put(
                    f"mtp.layers.{k}.{w}.weight",
                    take(
                        f"mtp.{k}.{w}.weight", FP8_FP8V3_RAW, shape=(self.D, self.Din)
                    ),
                )
            # 89: {n:enorm|hnorm|norm}.weight <-> {n}.weight [D]
            for n in ("enorm", "hnorm", "norm"):
                put(
                    f"mtp.layers.{k}.{n}.weight",
                    take(f"mtp.{k}.{n}.weight", shape=(self.D,)),
                )
            # 90: hc_head_fn <-> hc_head.hc_fn [R W]
            put(
                f"mtp.layers.{k}.hc_head.hc_fn",
                take(f"mtp.{k}.hc_head_fn", shape=(self.R, self.W)),
            )
            # 91: hc_head_base <-> hc_head.hc_base [R]
            put(
                f"mtp.layers.{k}.hc_head.hc_base",
                take(f"mtp.{k}.hc_head_base", shape=(self.R,)),
            )
            # 92: hc_head_scale <-> hc_head.hc_scale [1]
            put(
                f"mtp.layers.{k}.hc_head.hc_scale",
                take(f"mtp.{k}.hc_head_scale", shape=(1,)),
            )
            if self.L + k < self.stated and self.L + k not in self.sliding:
                # 97: compressor.norm.weight <-> compressor.kv_norm.weight [C]
                put(
                    f"mtp.layers.{k}.self_attn.compressor.kv_norm.weight",
                    take(f"mtp.{k}.attn.compressor.norm.weight", shape=(self.C,)),
                )
            if self.L + k in self.sparse:
                self._attn_to_right(
                    take, put, f"mtp.{k}.attn", f"mtp.layers.{k}.self_attn"
                )
            if (
                self.L + k < self.stated
                and self.L + k not in self.sliding
                and self.L + k not in self.sparse
            ):
                # 113: compressor.ape <-> compressor.ape_param.weight [r C]
                put(
                    f"mtp.layers.{k}.self_attn.compressor.ape_param.weight",
                    take(f"mtp.{k}.attn.compressor.ape", shape="r C", C=self.C),
                )
                # 114: compressor.{w:wgate|wkv}.weight <-> compressor.{w}.weight [C D]
                for w in ("wgate", "wkv"):
                    put(
                        f"mtp.layers.{k}.self_attn.compressor.{w}.weight",
                        take(
                            f"mtp.{k}.attn.compressor.{w}.weight",
                            shape=(self.C, self.D),
                        ),
                    )

        if self.vision > 0:
            # 118: vision.{..} <-> model.vision.{..} else where vision > 0
            for (rest,) in take.wild("vision.**"):
                put.carried(f"model.vision.{rest}", take(f"vision.{rest}"))
            # 119: aligner.{..} <-> model.aligner.{..} else where vision > 0
            for (rest,) in take.wild("aligner.**"):
                put.carried(f"model.aligner.{rest}", take(f"aligner.{rest}"))
        # 122: mtp.{x}.{..} -> _ else
        for number, rest in take.wild("mtp.#.**"):
            x = int(number)
            if x >= self.M:
                take.drop(f"mtp.{x}.{rest}")
        # 123: layers.{L+x}.{..} -> _ else
        for number, rest in take.wild("layers.#.**"):
            x = int(number) - self.L
            if x >= self.M:
                take.drop(f"layers.{self.L + x}.{rest}")
        # 124: model.layers.{L+x}.{..} -> _ else
        for number, rest in take.wild("model.layers.#.**"):
            x = int(number) - self.L
            if x >= self.M:
                take.drop(f"model.layers.{self.L + x}.{rest}")

    def _layers_to_right(self, take: Take, put: Put, hf: str, native: str) -> None:
        """`hf` -> `native`, of the tensors under `hf` and `native`."""
        # 52: attn_norm.weight <-> input_layernorm.weight [D]
        put(
            f"{native}.input_layernorm.weight",
            take(f"{hf}.attn_norm.weight", shape=(self.D,)),
        )
        # 53: ffn_norm.weight <-> post_attention_layernorm.weight [D]
        put(
            f"{native}.post_attention_layernorm.weight",
            take(f"{hf}.ffn_norm.weight", shape=(self.D,)),
        )
        for s in ("attn", "ffn"):
            # 54: hc_{s:attn|ffn}_fn <-> {s}_hc.fn [X W]
            put(f"{native}.{s}_hc.fn", take(f"{hf}.hc_{s}_fn", shape=(self.X, self.W)))
            # 55: hc_{s:attn|ffn}_base <-> {s}_hc.base [X]
            put(f"{native}.{s}_hc.base", take(f"{hf}.hc_{s}_base", shape=(self.X,)))
            # 56: hc_{s:attn|ffn}_scale <-> {s}_hc.scale [3]
            put(f"{native}.{s}_hc.scale", take(f"{hf}.hc_{s}_scale", shape=(3,)))
        # 58: attn.attn_sink <-> self_attn.sinks_param.weight [A]
        put(
            f"{native}.self_attn.sinks_param.weight",
            take(f"{hf}.attn.attn_sink", shape=(self.A,)),
        )
        # 59: attn.q_norm.weight <-> self_attn.q_norm.weight [Q]
        put(
            f"{native}.self_attn.q_norm.weight",
            take(f"{hf}.attn.q_norm.weight", shape=(self.Q,)),
        )
        # 60: attn.kv_norm.weight <-> self_attn.kv_norm.weight [C]
        put(
            f"{native}.self_attn.kv_norm.weight",
            take(f"{hf}.attn.kv_norm.weight", shape=(self.C,)),
        )
        # 61: attn.wq_a.weight as fp8|fp8v3|raw <-> self_attn.wq_a.weight [Q D]
        put(
            f"{native}.self_attn.wq_a.weight",
            take(f"{hf}.attn.wq_a.weight", FP8_FP8V3_RAW, shape=(self.Q, self.D)),
        )
        # 62: attn.wq_b.weight as fp8|fp8v3|raw <-> self_attn.wq_b.weight [(A C) Q]
        put(
            f"{native}.self_attn.wq_b.weight",
            take(
                f"{hf}.attn.wq_b.weight", FP8_FP8V3_RAW, shape=(self.A * self.C, self.Q)
            ),
        )
        # 63: attn.wkv.weight as fp8|fp8v3|raw <-> self_attn.wkv.weight [C D]
        put(
            f"{native}.self_attn.wkv.weight",
            take(f"{hf}.attn.wkv.weight", FP8_FP8V3_RAW, shape=(self.C, self.D)),
        )
        # 64: attn.wo_a.weight as fp8|fp8v3|raw <-> self_attn.wo_a.weight [(G O) P]
        put(
            f"{native}.self_attn.wo_a.weight",
            take(
                f"{hf}.attn.wo_a.weight", FP8_FP8V3_RAW, shape=(self.G * self.O, self.P)
            ),
        )
        # 65: attn.wo_b.weight as fp8|fp8v3|raw <-> self_attn.wo_b.weight [D (G O)]
        put(
            f"{native}.self_attn.wo_b.weight",
            take(
                f"{hf}.attn.wo_b.weight", FP8_FP8V3_RAW, shape=(self.D, self.G * self.O)
            ),
        )
        # 67: ffn.gate.weight <-> mlp.gate.weight [E D]
        put(
            f"{native}.mlp.gate.weight",
            take(f"{hf}.ffn.gate.weight", shape=(self.E, self.D)),
        )
        if self.vision > 0:
            # 68: ffn.gate.bias_vl <-> mlp.gate.bias_vl [E] where vision > 0
            put(
                f"{native}.mlp.gate.bias_vl",
                take(f"{hf}.ffn.gate.bias_vl", shape=(self.E,)),
            )
        # 69: ffn.shared_experts.{j:w1|w3}.weight as fp8|fp8v3|raw <-> mlp.shared_experts.{j:gate|up}_proj.weight [(S F) D]
        for hf_j, native_j in (("w1", "gate"), ("w3", "up")):
            put(
                f"{native}.mlp.shared_experts.{native_j}_proj.weight",
                take(
                    f"{hf}.ffn.shared_experts.{hf_j}.weight",
                    FP8_FP8V3_RAW,
                    shape=(self.S * self.F, self.D),
                ),
            )
        # 70: ffn.shared_experts.w2.weight as fp8|fp8v3|raw <-> mlp.shared_experts.down_proj.weight [D (S F)]
        put(
            f"{native}.mlp.shared_experts.down_proj.weight",
            take(
                f"{hf}.ffn.shared_experts.w2.weight",
                FP8_FP8V3_RAW,
                shape=(self.D, self.S * self.F),
            ),
        )
        # 71: ffn.experts.{e}.{j:w1|w3}.weight [F Z] as fp4|fp8|fp8v3|raw <-> mlp.experts.gate_and_up_projs [e Z (j F)]
        experts_names = {
            (e, j): f"{hf}.ffn.experts.{e}.{hf_j}.weight"
            for e in range(self.E)
            for j, hf_j in enumerate(("w1", "w3"))
        }
        if take.group(
            (experts_names.values(), "F Z", FP4_FP8_FP8V3_RAW), F=self.F, Z=self.Z
        ):
            gate_and_up_projs = take.empty(self.E, self.Z, 2 * self.F)
            for (e, j), name in experts_names.items():
                take.into(gate_and_up_projs.unflatten(2, (2, self.F))[e, :, j].T, name)
            put(f"{native}.mlp.experts.gate_and_up_projs", gate_and_up_projs)
        # 72: ffn.experts.{e}.w2.weight [Z F] as fp4|fp8|fp8v3|raw <-> mlp.experts.down_projs [e F Z]
        w2_names = {e: f"{hf}.ffn.experts.{e}.w2.weight" for e in range(self.E)}
        if take.group(
            (w2_names.values(), "Z F", FP4_FP8_FP8V3_RAW), Z=self.Z, F=self.F
        ):
            down_projs = take.empty(self.E, self.F, self.Z)
            for e, name in w2_names.items():
                take.into(down_projs[e].T, name)
            put(f"{native}.mlp.experts.down_projs", down_projs)
        # 73: ffn.fc1_latent_proj.weight as raw|fp8|fp8v3 <-> mlp.fc1_latent_proj.weight [u D] optional
        put(
            f"{native}.mlp.fc1_latent_proj.weight",
            take(
                f"{hf}.ffn.fc1_latent_proj.weight",
                RAW_FP8_FP8V3,
                shape="u D",
                D=self.D,
                optional=True,
            ),
        )
        # 74: ffn.fc2_latent_proj.weight as raw|fp8|fp8v3 <-> mlp.fc2_latent_proj.weight [D u] optional
        put(
            f"{native}.mlp.fc2_latent_proj.weight",
            take(
                f"{hf}.ffn.fc2_latent_proj.weight",
                RAW_FP8_FP8V3,
                shape="D u",
                D=self.D,
                optional=True,
            ),
        )

    def _experts_to_right(self, take: Take, put: Put, hf: str, native: str) -> None:
        """`hf` -> `native`, of the tensors under `hf` and `native`."""
        if not self.lora_fused:
            # experts_w.map:15: {e}.w2.lora_A.weight [x F] <-> lora_down_A [e F x] optional
            lora_A_names = {
                e_2: f"{hf}.{e_2}.w2.lora_A.weight" for e_2 in range(self.E)
            }
            if take.group((lora_A_names.values(), "x_2 F"), F=self.F, optional=True):
                x_2 = take.size("x_2")
                lora_down_A = take.empty(self.E, self.F, x_2)
                for e_2, name in lora_A_names.items():
                    take.into(lora_down_A[e_2].T, name)
                put(f"{native}.lora_down_A", lora_down_A)
            # experts_w.map:16: {e}.w2.lora_B.weight [D x] <-> lora_down_B [e x D] optional
            lora_B_names = {
                e_2: f"{hf}.{e_2}.w2.lora_B.weight" for e_2 in range(self.E)
            }
            if take.group((lora_B_names.values(), "Z x_2"), Z=self.Z, optional=True):
                x_2 = take.size("x_2")
                lora_down_B = take.empty(self.E, x_2, self.Z)
                for e_2, name in lora_B_names.items():
                    take.into(lora_down_B[e_2].T, name)
                put(f"{native}.lora_down_B", lora_down_B)
        if not self.lora_fused and self.lora_gate == self.lora_up:
            # experts_w.map:20: {e}.{repeat j:w1|w3}.lora_A.weight [x D] <-> lora_gate_and_up_A [e D x] optional
            lora_A_names2 = {
                (e_2, j): f"{hf}.{e_2}.{hf_j}.lora_A.weight"
                for e_2 in range(self.E)
                for j, hf_j in enumerate(("w1", "w3"))
            }
            if take.group((lora_A_names2.values(), "x_2 Z"), Z=self.Z, optional=True):
                x_2 = take.size("x_2")
                lora_gate_and_up_A = take.empty(self.E, self.Z, x_2)
                for (e_2, j), name in lora_A_names2.items():
                    take.into(lora_gate_and_up_A[e_2].T, name, copy=j > 0)
                put(f"{native}.lora_gate_and_up_A", lora_gate_and_up_A)
            # experts_w.map:21: {e}.{j:w1|w3}.lora_B.weight [F x] <-> lora_gate_and_up_B [e x (j F)] optional
            lora_B_names2 = {
                (e_2, j): f"{hf}.{e_2}.{hf_j}.lora_B.weight"
                for e_2 in range(self.E)
                for j, hf_j in enumerate(("w1", "w3"))
            }
            if take.group((lora_B_names2.values(), "F x_2"), F=self.F, optional=True):
                x_2 = take.size("x_2")
                lora_gate_and_up_B = take.empty(self.E, x_2, 2 * self.F)
                for (e_2, j), name in lora_B_names2.items():
                    take.into(
                        lora_gate_and_up_B.unflatten(2, (2, self.F))[e_2, :, j].T, name
                    )
                put(f"{native}.lora_gate_and_up_B", lora_gate_and_up_B)
        if not self.lora_fused and self.lora_gate and not self.lora_up:
            # experts_w.map:25: {e}.w1.lora_A.weight [x D] <-> lora_gate_and_up_A [e D x] optional
            lora_A_names = {
                e_2: f"{hf}.{e_2}.w1.lora_A.weight" for e_2 in range(self.E)
            }
            if take.group((lora_A_names.values(), "x_2 Z"), Z=self.Z, optional=True):
                x_2 = take.size("x_2")
                lora_gate_and_up_A = take.empty(self.E, self.Z, x_2)
                for e_2, name in lora_A_names.items():
                    take.into(lora_gate_and_up_A[e_2].T, name)
                put(f"{native}.lora_gate_and_up_A", lora_gate_and_up_A)
            # experts_w.map:26: {e}.w1.lora_B.weight [F x] <-> lora_gate_and_up_B [e x (F + zeros(F))] optional
            lora_B_names = {
                e_2: f"{hf}.{e_2}.w1.lora_B.weight" for e_2 in range(self.E)
            }
            if take.group((lora_B_names.values(), "F x_2"), F=self.F, optional=True):
                x_2 = take.size("x_2")
                lora_gate_and_up_B = take.zeros(self.E, x_2, self.F + self.F)
                for e_2, name in lora_B_names.items():
                    take.into(lora_gate_and_up_B.narrow(2, 0, self.F)[e_2].T, name)
                put(f"{native}.lora_gate_and_up_B", lora_gate_and_up_B)
        if not self.lora_fused and self.lora_up and not self.lora_gate:
            # experts_w.map:28: {e}.w3.lora_A.weight [x D] <-> lora_gate_and_up_A [e D x] optional
            lora_A_names = {
                e_2: f"{hf}.{e_2}.w3.lora_A.weight" for e_2 in range(self.E)
            }
            if take.group((lora_A_names.values(), "x_2 Z"), Z=self.Z, optional=True):
                x_2 = take.size("x_2")
                lora_gate_and_up_A = take.empty(self.E, self.Z, x_2)
                for e_2, name in lora_A_names.items():
                    take.into(lora_gate_and_up_A[e_2].T, name)
                put(f"{native}.lora_gate_and_up_A", lora_gate_and_up_A)
            # experts_w.map:29: {e}.w3.lora_B.weight [F x] <-> lora_gate_and_up_B [e x (zeros(F) + F)] optional
            lora_B_names = {
                e_2: f"{hf}.{e_2}.w3.lora_B.weight" for e_2 in range(self.E)
            }
            if take.group((lora_B_names.values(), "F x_2"), F=self.F, optional=True):
                x_2 = take.size("x_2")
                lora_gate_and_up_B = take.zeros(self.E, x_2, self.F + self.F)
                for e_2, name in lora_B_names.items():
                    take.into(lora_gate_and_up_B.narrow(2, self.F, self.F)[e_2].T, name)
                put(f"{native}.lora_gate_and_up_B", lora_gate_and_up_B)

    def _attn_to_right(self, take: Take, put: Put, hf: str, native: str) -> None:
        """`hf` -> `native`, of the tensors under `hf` and `native`."""
        # 102: compressor.ape <-> compressor.ape_param.weight [4 (2 C)]
        put(
            f"{native}.compressor.ape_param.weight",
            take(f"{hf}.compressor.ape", shape=(4, 2 * self.C)),
        )
        # 103: compressor.{w:wgate|wkv}.weight <-> compressor.{w}.weight [(2 C) D]
        for w in ("wgate", "wkv"):
            put(
                f"{native}.compressor.{w}.weight",
                take(f"{hf}.compressor.{w}.weight", shape=(2 * self.C, self.D)),
            )
        # 104: indexer.compressor.ape <-> compressor.indexer.ape_param.weight [4 (2 IC)]
        put(
            f"{native}.compressor.indexer.ape_param.weight",
            take(f"{hf}.indexer.compressor.ape", shape=(4, 2 * self.IC)),
        )
        # 105: indexer.compressor.norm.weight <-> compressor.indexer.kv_norm.weight [IC]
        put(
            f"{native}.compressor.indexer.kv_norm.weight",
            take(f"{hf}.indexer.compressor.norm.weight", shape=(self.IC,)),
        )
        # 106: indexer.compressor.{w:wgate|wkv}.weight <-> compressor.indexer.{w}.weight [(2 IC) D]
        for w in ("wgate", "wkv"):
            put(
                f"{native}.compressor.indexer.{w}.weight",
                take(
                    f"{hf}.indexer.compressor.{w}.weight", shape=(2 * self.IC, self.D)
                ),
            )
        # 107: indexer.wq_b.weight as fp8|fp8v3|raw <-> compressor.indexer.wq_b.weight [(IA IC) Q]
        put(
            f"{native}.compressor.indexer.wq_b.weight",
            take(
                f"{hf}.indexer.wq_b.weight",
                FP8_FP8V3_RAW,
                shape=(self.IA * self.IC, self.Q),
            ),
        )
        # 108: indexer.weights_proj.weight <-> compressor.indexer.weights_proj.weight [IA D]
        put(
            f"{native}.compressor.indexer.weights_proj.weight",
            take(f"{hf}.indexer.weights_proj.weight", shape=(self.IA, self.D)),
        )

    def _to_left(self, take: Take, put: Put) -> None:
        """`native` -> `hf`."""
        # 43: embed.weight <-> model.embed_tokens.weight [V D]
        put("embed.weight", take("model.embed_tokens.weight", shape=(self.V, self.D)))
        # 44: norm.weight <-> model.norm.weight [D]
        put("norm.weight", take("model.norm.weight", shape=(self.D,)))
        # 45: head.weight <-> lm_head.weight [V D]
        put("head.weight", take("lm_head.weight", shape=(self.V, self.D)))
        # 46: hc_head_fn <-> model.hc_head.hc_fn [R W]
        put("hc_head_fn", take("model.hc_head.hc_fn", shape=(self.R, self.W)))
        # 47: hc_head_base <-> model.hc_head.hc_base [R]
        put("hc_head_base", take("model.hc_head.hc_base", shape=(self.R,)))
        # 48: hc_head_scale <-> model.hc_head.hc_scale [1]
        put("hc_head_scale", take("model.hc_head.hc_scale", shape=(1,)))
        if self.vision > 0:
            # 117: image_{t:start|end|newline|pad} <-> model.image_{t} [D] where vision > 0
            for t in ("start", "end", "newline", "pad"):
                put(f"image_{t}", take(f"model.image_{t}", shape=(self.D,)))

        for i in range(self.L):
            self._layers_to_left(take, put, f"layers.{i}", f"model.layers.{i}")
            self._experts_to_left(
                take, put, f"layers.{i}.ffn.experts", f"model.layers.{i}.mlp.experts"
            )
            if i < self.H:
                # 82: ffn.gate.tid2eid <-> mlp.gate.tid2eid [V T] where i < H
                put(
                    f"layers.{i}.ffn.gate.tid2eid",
                    take(f"model.layers.{i}.mlp.gate.tid2eid", shape=(self.V, self.T)),
                )
            if i >= self.H or self.vision > 0:
                # 83: ffn.gate.bias <-> mlp.gate.e_score_correction_bias [E] where i >= H or vision > 0
                put(
                    f"layers.{i}.ffn.gate.bias",
                    take(
                        f"model.layers.{i}.mlp.gate.e_score_correction_bias",
                        shape=(self.E,),
                    ),
                )
            if i < self.H and self.vision == 0:
                # 84: _ <- mlp.gate.e_score_correction_bias where i < H and vision == 0
                take.drop(f"model.layers.{i}.mlp.gate.e_score_correction_bias")
            if i < self.stated and i not in self.sliding:
                # 97: compressor.norm.weight <-> compressor.kv_norm.weight [C]
                put(
                    f"layers.{i}.attn.compressor.norm.weight",
                    take(
                        f"model.layers.{i}.self_attn.compressor.kv_norm.weight",
                        shape=(self.C,),
                    ),
                )
            if i in self.sparse:
                self._attn_to_left(
                    take, put, f"layers.{i}.attn", f"model.layers.{i}.self_attn"
                )
            if i < self.stated and i not in self.sliding and i not in self.sparse:
                # 113: compressor.ape <-> compressor.ape_param.weight [r C]
                put(
                    f"layers.{i}.attn.compressor.ape",
                    take(
                        f"model.layers.{i}.self_attn.compressor.ape_param.weight",
                        shape="r C",
                        C=self.C,
                    ),
                )
                # 114: compressor.{w:wgate|wkv}.weight <-> compressor.{w}.weight [C D]
                for w in ("wgate", "wkv"):
                    put(
                        f"layers.{i}.attn.compressor.{w}.weight",
                        take(
                            f"model.layers.{i}.self_attn.compressor.{w}.weight",
                            shape=(self.C, self.D),
                        ),
                    )

        for k in range(self.M):
            self._layers_to_left(take, put, f"mtp.{k}", f"mtp.layers.{k}")
            self._experts_to_left(
                take, put, f"mtp.{k}.ffn.experts", f"mtp.layers.{k}.mlp.experts"
            )
            # 87: ffn.gate.bias <-> mlp.gate.e_score_correction_bias [E]
            put(
                f"mtp.{k}.ffn.gate.bias",
                take(
                    f"mtp.layers.{k}.mlp.gate.e_score_correction_bias", shape=(self.E,)
                ),
            )
            # 88: {w:e_proj|h_proj}.weight as fp8|fp8v3|raw <-> {w}.weight [D Din]
            for w in ("e_proj", "h_proj"):
                put(
                    f"mtp.{k}.{w}.weight",
                    take(f"mtp.layers.{k}.{w}.weight", shape=(self.D, self.Din)),
                    FP8_FP8V3_RAW,
                )
            # 89: {n:enorm|hnorm|norm}.weight <-> {n}.weight [D]
            for n in ("enorm", "hnorm", "norm"):
                put(
                    f"mtp.{k}.{n}.weight",
                    take(f"mtp.layers.{k}.{n}.weight", shape=(self.D,)),
                )
            # 90: hc_head_fn <-> hc_head.hc_fn [R W]
            put(
                f"mtp.{k}.hc_head_fn",
                take(f"mtp.layers.{k}.hc_head.hc_fn", shape=(self.R, self.W)),
            )
            # 91: hc_head_base <-> hc_head.hc_base [R]
            put(
                f"mtp.{k}.hc_head_base",
                take(f"mtp.layers.{k}.hc_head.hc_base", shape=(self.R,)),
            )
            # 92: hc_head_scale <-> hc_head.hc_scale [1]
            put(
                f"mtp.{k}.hc_head_scale",
                take(f"mtp.layers.{k}.hc_head.hc_scale", shape=(1,)),
            )
            if self.L + k < self.stated and self.L + k not in self.sliding:
                # 97: compressor.norm.weight <-> compressor.kv_norm.weight [C]
                put(
                    f"mtp.{k}.attn.compressor.norm.weight",
                    take(
                        f"mtp.layers.{k}.self_attn.compressor.kv_norm.weight",
                        shape=(self.C,),
                    ),
                )
            if self.L + k in self.sparse:
                self._attn_to_left(
                    take, put, f"mtp.{k}.attn", f"mtp.layers.{k}.self_attn"
                )
            if (
                self.L + k < self.stated
                and self.L + k not in self.sliding
                and self.L + k not in self.sparse
            ):
                # 113: compressor.ape <-> compressor.ape_param.weight [r C]
                put(
                    f"mtp.{k}.attn.compressor.ape",
                    take(
                        f"mtp.layers.{k}.self_attn.compressor.ape_param.weight",
                        shape="r C",
                        C=self.C,
                    ),
                )
                # 114: compressor.{w:wgate|wkv}.weight <-> compressor.{w}.weight [C D]
                for w in ("wgate", "wkv"):
                    put(
                        f"mtp.{k}.attn.compressor.{w}.weight",
                        take(
                            f"mtp.layers.{k}.self_attn.compressor.{w}.weight",
                            shape=(self.C, self.D),
                        ),
                    )

        if self.vision > 0:
            # 118: vision.{..} <-> model.vision.{..} else where vision > 0
            for (rest,) in take.wild("model.vision.**"):
                put.carried(f"vision.{rest}", take(f"model.vision.{rest}"))
            # 119: aligner.{..} <-> model.aligner.{..} else where vision > 0
            for (rest,) in take.wild("model.aligner.**"):
                put.carried(f"aligner.{rest}", take(f"model.aligner.{rest}"))

    def _layers_to_left(self, take: Take, put: Put, hf: str, native: str) -> None:
        """`native` -> `hf`, of the tensors under `hf` and `native`."""
        # 52: attn_norm.weight <-> input_layernorm.weight [D]
        put(
            f"{hf}.attn_norm.weight",
            take(f"{native}.input_layernorm.weight", shape=(self.D,)),
        )
        # 53: ffn_norm.weight <-> post_attention_layernorm.weight [D]
        put(
            f"{hf}.ffn_norm.weight",
            take(f"{native}.post_attention_layernorm.weight", shape=(self.D,)),
        )
        for s in ("attn", "ffn"):
            # 54: hc_{s:attn|ffn}_fn <-> {s}_hc.fn [X W]
            put(f"{hf}.hc_{s}_fn", take(f"{native}.{s}_hc.fn", shape=(self.X, self.W)))
            # 55: hc_{s:attn|ffn}_base <-> {s}_hc.base [X]
            put(f"{hf}.hc_{s}_base", take(f"{native}.{s}_hc.base", shape=(self.X,)))
            # 56: hc_{s:attn|ffn}_scale <-> {s}_hc.scale [3]
            put(f"{hf}.hc_{s}_scale", take(f"{native}.{s}_hc.scale", shape=(3,)))
        # 58: attn.attn_sink <-> self_attn.sinks_param.weight [A]
        put(
            f"{hf}.attn.attn_sink",
            take(f"{native}.self_attn.sinks_param.weight", shape=(self.A,)),
        )
        # 59: attn.q_norm.weight <-> self_attn.q_norm.weight [Q]
        put(
            f"{hf}.attn.q_norm.weight",
            take(f"{native}.self_attn.q_norm.weight", shape=(self.Q,)),
        )
        # 60: attn.kv_norm.weight <-> self_attn.kv_norm.weight [C]
        put(
            f"{hf}.attn.kv_norm.weight",
            take(f"{native}.self_attn.kv_norm.weight", shape=(self.C,)),
        )
        # 61: attn.wq_a.weight as fp8|fp8v3|raw <-> self_attn.wq_a.weight [Q D]
        put(
            f"{hf}.attn.wq_a.weight",
            take(f"{native}.self_attn.wq_a.weight", shape=(self.Q, self.D)),
            FP8_FP8V3_RAW,
        )
        # 62: attn.wq_b.weight as fp8|fp8v3|raw <-> self_attn.wq_b.weight [(A C) Q]
        put(
            f"{hf}.attn.wq_b.weight",
            take(f"{native}.self_attn.wq_b.weight", shape=(self.A * self.C, self.Q)),
            FP8_FP8V3_RAW,
        )
        # 63: attn.wkv.weight as fp8|fp8v3|raw <-> self_attn.wkv.weight [C D]
        put(
            f"{hf}.attn.wkv.weight",
            take(f"{native}.self_attn.wkv.weight", shape=(self.C, self.D)),
            FP8_FP8V3_RAW,
        )
        # 64: attn.wo_a.weight as fp8|fp8v3|raw <-> self_attn.wo_a.weight [(G O) P]
        put(
            f"{hf}.attn.wo_a.weight",
            take(f"{native}.self_attn.wo_a.weight", shape=(self.G * self.O, self.P)),
            FP8_FP8V3_RAW,
        )
        # 65: attn.wo_b.weight as fp8|fp8v3|raw <-> self_attn.wo_b.weight [D (G O)]
        put(
            f"{hf}.attn.wo_b.weight",
            take(f"{native}.self_attn.wo_b.weight", shape=(self.D, self.G * self.O)),
            FP8_FP8V3_RAW,
        )
        # 67: ffn.gate.weight <-> mlp.gate.weight [E D]
        put(
            f"{hf}.ffn.gate.weight",
            take(f"{native}.mlp.gate.weight", shape=(self.E, self.D)),
        )
        if self.vision > 0:
            # 68: ffn.gate.bias_vl <-> mlp.gate.bias_vl [E] where vision > 0
            put(
                f"{hf}.ffn.gate.bias_vl",
                take(f"{native}.mlp.gate.bias_vl", shape=(self.E,)),
            )
        # 69: ffn.shared_experts.{j:w1|w3}.weight as fp8|fp8v3|raw <-> mlp.shared_experts.{j:gate|up}_proj.weight [(S F) D]
        for hf_j, native_j in (("w1", "gate"), ("w3", "up")):
            put(
                f"{hf}.ffn.shared_experts.{hf_j}.weight",
                take(
                    f"{native}.mlp.shared_experts.{native_j}_proj.weight",
                    shape=(self.S * self.F, self.D),
                ),
                FP8_FP8V3_RAW,
            )
        # 70: ffn.shared_experts.w2.weight as fp8|fp8v3|raw <-> mlp.shared_experts.down_proj.weight [D (S F)]
        put(
            f"{hf}.ffn.shared_experts.w2.weight",
            take(
                f"{native}.mlp.shared_experts.down_proj.weight",
                shape=(self.D, self.S * self.F),
            ),
            FP8_FP8V3_RAW,
        )
        # 71: ffn.experts.{e}.{j:w1|w3}.weight [F Z] as fp4|fp8|fp8v3|raw <-> mlp.experts.gate_and_up_projs [e Z (j F)]
        gate_and_up_projs = take(
            f"{native}.mlp.experts.gate_and_up_projs",
            shape=(self.E, self.Z, 2 * self.F),
        )
        if gate_and_up_projs is not None:
            for e in range(self.E):
                for j, hf_j in enumerate(("w1", "w3")):
                    put.part(
                        f"{hf}.ffn.experts.{e}.{hf_j}.weight",
                        gate_and_up_projs.unflatten(2, (2, self.F))[e, :, j].T,
                        FP4_FP8_FP8V3_RAW,
                    )
        # 72: ffn.experts.{e}.w2.weight [Z F] as fp4|fp8|fp8v3|raw <-> mlp.experts.down_projs [e F Z]
        down_projs = take(
            f"{native}.mlp.experts.down_projs", shape=(self.E, self.F, self.Z)
        )
        if down_projs is not None:
            for e in range(self.E):
                put.part(
                    f"{hf}.ffn.experts.{e}.w2.weight",
                    down_projs[e].T,
                    FP4_FP8_FP8V3_RAW,
                )
        # 73: ffn.fc1_latent_proj.weight as raw|fp8|fp8v3 <-> mlp.fc1_latent_proj.weight [u D] optional
        put(
            f"{hf}.ffn.fc1_latent_proj.weight",
            take(
                f"{native}.mlp.fc1_latent_proj.weight",
                shape="u D",
                D=self.D,
                optional=True,
            ),
            RAW_FP8_FP8V3,
        )
        # 74: ffn.fc2_latent_proj.weight as raw|fp8|fp8v3 <-> mlp.fc2_latent_proj.weight [D u] optional
        put(
            f"{hf}.ffn.fc2_latent_proj.weight",
            take(
                f"{native}.mlp.fc2_latent_proj.weight",
                shape="D u",
                D=self.D,
                optional=True,
            ),
            RAW_FP8_FP8V3,
        )

    def _experts_to_left(self, take: Take, put: Put, hf: str, native: str) -> None:
        """`native` -> `hf`, of the tensors under `hf` and `native`."""
        if not self.lora_fused:
            # experts_w.map:15: {e}.w2.lora_A.weight [x F] <-> lora_down_A [e F x] optional
            lora_down_A = take(
                f"{native}.lora_down_A",
                shape="e_2 F x_2",
                e_2=self.E,
                F=self.F,
                optional=True,
            )
            if lora_down_A is not None:
                for e_2 in range(self.E):
                    put.part(f"{hf}.{e_2}.w2.lora_A.weight", lora_down_A[e_2].T)
            # experts_w.map:16: {e}.w2.lora_B.weight [D x] <-> lora_down_B [e x D] optional
            lora_down_B = take(
                f"{native}.lora_down_B",
                shape="e_2 x_2 Z",
                e_2=self.E,
                Z=self.Z,
                optional=True,
            )
            if lora_down_B is not None:
                for e_2 in range(self.E):
                    put.part(f"{hf}.{e_2}.w2.lora_B.weight", lora_down_B[e_2].T)
        if not self.lora_fused and self.lora_gate == self.lora_up:
            # experts_w.map:20: {e}.{repeat j:w1|w3}.lora_A.weight [x D] <-> lora_gate_and_up_A [e D x] optional
            lora_gate_and_up_A = take(
                f"{native}.lora_gate_and_up_A",
                shape="e_2 Z x_2",
                e_2=self.E,
                Z=self.Z,
                optional=True,
            )
            if lora_gate_and_up_A is not None:
                for e_2 in range(self.E):
                    for hf_j in ("w1", "w3"):
                        put.part(
                            f"{hf}.{e_2}.{hf_j}.lora_A.weight",
                            lora_gate_and_up_A[e_2].T,
                        )
            # experts_w.map:21: {e}.{j:w1|w3}.lora_B.weight [F x] <-> lora_gate_and_up_B [e x (j F)] optional
            lora_gate_and_up_B = take(
                f"{native}.lora_gate_and_up_B",
                shape="e_2 x_2 (j F)",
                e_2=self.E,
                j=2,
                F=self.F,
                optional=True,
            )
            if lora_gate_and_up_B is not None:
                for e_2 in range(self.E):
                    for j, hf_j in enumerate(("w1", "w3")):
                        put.part(
                            f"{hf}.{e_2}.{hf_j}.lora_B.weight",
                            lora_gate_and_up_B.unflatten(2, (2, self.F))[e_2, :, j].T,
                        )
        if not self.lora_fused and self.lora_gate and not self.lora_up:
            # experts_w.map:25: {e}.w1.lora_A.weight [x D] <-> lora_gate_and_up_A [e D x] optional
            lora_gate_and_up_A = take(
                f"{native}.lora_gate_and_up_A",
                shape="e_2 Z x_2",
                e_2=self.E,
                Z=self.Z,
                optional=True,
            )
            if lora_gate_and_up_A is not None:
                for e_2 in range(self.E):
                    put.part(f"{hf}.{e_2}.w1.lora_A.weight", lora_gate_and_up_A[e_2].T)
            # experts_w.map:26: {e}.w1.lora_B.weight [F x] <-> lora_gate_and_up_B [e x (F + zeros(F))] optional
            lora_gate_and_up_B = take(
                f"{native}.lora_gate_and_up_B",
                shape="e_2 x_2 (F + F)",
                e_2=self.E,
                F=self.F,
                optional=True,
            )
            if lora_gate_and_up_B is not None:
                only_zeros(
                    lora_gate_and_up_B.narrow(2, self.F, self.F),
                    f"{native}.lora_gate_and_up_B",
                )
                for e_2 in range(self.E):
                    put.part(
                        f"{hf}.{e_2}.w1.lora_B.weight",
                        lora_gate_and_up_B.narrow(2, 0, self.F)[e_2].T,
                    )
        if not self.lora_fused and self.lora_up and not self.lora_gate:
            # experts_w.map:28: {e}.w3.lora_A.weight [x D] <-> lora_gate_and_up_A [e D x] optional
            lora_gate_and_up_A = take(
                f"{native}.lora_gate_and_up_A",
                shape="e_2 Z x_2",
                e_2=self.E,
                Z=self.Z,
                optional=True,
            )
            if lora_gate_and_up_A is not None:
                for e_2 in range(self.E):
                    put.part(f"{hf}.{e_2}.w3.lora_A.weight", lora_gate_and_up_A[e_2].T)
            # experts_w.map:29: {e}.w3.lora_B.weight [F x] <-> lora_gate_and_up_B [e x (zeros(F) + F)] optional
            lora_gate_and_up_B = take(
                f"{native}.lora_gate_and_up_B",
                shape="e_2 x_2 (F + F)",
                e_2=self.E,
                F=self.F,
                optional=True,
            )
            if lora_gate_and_up_B is not None:
                only_zeros(
                    lora_gate_and_up_B.narrow(2, 0, self.F),
                    f"{native}.lora_gate_and_up_B",
                )
                for e_2 in range(self.E):
                    put.part(
                        f"{hf}.{e_2}.w3.lora_B.weight",
                        lora_gate_and_up_B.narrow(2, self.F, self.F)[e_2].T,
                    )

    def _attn_to_left(self, take: Take, put: Put, hf: str, native: str) -> None:
        """`native` -> `hf`, of the tensors under `hf` and `native`."""
        # 102: compressor.ape <-> compressor.ape_param.weight [4 (2 C)]
        put(
            f"{hf}.compressor.ape",
            take(f"{native}.compressor.ape_param.weight", shape=(4, 2 * self.C)),
        )
        # 103: compressor.{w:wgate|wkv}.weight <-> compressor.{w}.weight [(2 C) D]
        for w in ("wgate", "wkv"):
            put(
                f"{hf}.compressor.{w}.weight",
                take(f"{native}.compressor.{w}.weight", shape=(2 * self.C, self.D)),
            )
        # 104: indexer.compressor.ape <-> compressor.indexer.ape_param.weight [4 (2 IC)]
        put(
            f"{hf}.indexer.compressor.ape",
            take(
                f"{native}.compressor.indexer.ape_param.weight", shape=(4, 2 * self.IC)
            ),
        )
        # 105: indexer.compressor.norm.weight <-> compressor.indexer.kv_norm.weight [IC]
        put(
            f"{hf}.indexer.compressor.norm.weight",
            take(f"{native}.compressor.indexer.kv_norm.weight", shape=(self.IC,)),
        )
        # 106: indexer.compressor.{w:wgate|wkv}.weight <-> compressor.indexer.{w}.weight [(2 IC) D]
        for w in ("wgate", "wkv"):
            put(
                f"{hf}.indexer.compressor.{w}.weight",
                take(
                    f"{native}.compressor.indexer.{w}.weight",
                    shape=(2 * self.IC, self.D),
                ),
            )
        # 107: indexer.wq_b.weight as fp8|fp8v3|raw <-> compressor.indexer.wq_b.weight [(IA IC) Q]
        put(
            f"{hf}.indexer.wq_b.weight",
            take(
                f"{native}.compressor.indexer.wq_b.weight",
                shape=(self.IA * self.IC, self.Q),
            ),
            FP8_FP8V3_RAW,
        )
        # 108: indexer.weights_proj.weight <-> compressor.indexer.weights_proj.weight [IA D]
        put(
            f"{hf}.indexer.weights_proj.weight",
            take(
                f"{native}.compressor.indexer.weights_proj.weight",
                shape=(self.IA, self.D),
            ),
        )
