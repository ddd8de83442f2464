"""Whether anything notices that a map is wrong: `check`, then tensors, then the released listing.

The tensors are converted by the mutant and by the adapter that `tests/golden` keeps, which the differential tests hold
against NeMo Automodel's own, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.against import check_against
from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.language.diagnostics import MapError, has_errors
from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.errors import ConversionError
from tests.golden.deepseek_v4_adapter import DeepseekV4Adapter
from tests.helpers.deepseek_v4 import VISION, Storage, checkpoint, differences, tiny_config

LISTING = Path(__file__).parent.parent / "data" / "listings" / "deepseek_v4_flash.list"
STAGES = ("check", "tensors", "listing")

TRANSFORMERS = {
    "compress_ratios": None,
    "num_hash_layers": None,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
}
# Fewer layers than a real test would have, but one of each kind: a mutant has to be judged in a second.
TWO_MTP = tiny_config(num_nextn_predict_layers=2, compress_ratios=[4, 0, 128, 4, 4, 3], num_hash_layers=2)


@dataclass(frozen=True)
class Case:
    """A checkpoint and the config that it is read with."""

    config: dict[str, Any]
    stored: dict[str, Tensor]


@lru_cache(maxsize=1)
def cases() -> list[Case]:
    """Checkpoints that between them show every line of the map."""
    plain = tiny_config(num_nextn_predict_layers=1)
    latent = tiny_config(num_hidden_layers=1, moe_latent_size=38, n_shared_experts=2, compress_ratios=[0, 0])
    vision = tiny_config(num_hidden_layers=2, **VISION)
    bare = tiny_config(num_hidden_layers=1, num_hash_layers=None, num_nextn_predict_layers=None, compress_ratios=None)
    bare |= {"n_shared_experts": 1}
    no_shared = {name: value for name, value in bare.items() if name != "n_shared_experts"}
    unquantised = Storage("raw", "raw", seed=1)
    in_words = tiny_config(**TRANSFORMERS)
    heavy = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=None, compress_ratios=[0, 128])
    unknown = {name: {name: torch.ones(2)} for name in ("vision.x", "aligner.x", "mtp.0.x", "layers.4.x")}
    return [
        Case(plain, checkpoint(plain, Storage(wild=True))),
        Case(TWO_MTP, checkpoint(TWO_MTP, unquantised)),
        Case(TWO_MTP, checkpoint(TWO_MTP, unquantised, mtp="layers.{n}")),
        Case(TWO_MTP, checkpoint(TWO_MTP, unquantised, mtp="model.layers.{n}")),
        Case({**TWO_MTP, "num_nextn_predict_layers": 1}, checkpoint(TWO_MTP, unquantised)),
        Case({**TWO_MTP, "num_nextn_predict_layers": 1}, checkpoint(TWO_MTP, unquantised, mtp="layers.{n}")),
        Case({**TWO_MTP, "num_nextn_predict_layers": 0}, checkpoint(TWO_MTP, unquantised, mtp="model.layers.{n}")),
        Case(plain, checkpoint(plain, Storage("fp8", scales=torch.float32, wild=True))),
        Case(plain, checkpoint(plain, Storage("fp8", scales=torch.bfloat16, wild=True))),
        Case(plain, checkpoint(plain, Storage("fp8", v3=True, scales=torch.float32, wild=True))),
        Case(plain, checkpoint(plain, Storage("fp8", v3=True, scales=torch.bfloat16, wild=True))),
        Case(plain, checkpoint(plain, Storage("fp8", v3=True, wild=True))),
        Case(latent, checkpoint(latent, unquantised, latent=38)),
        Case(latent, checkpoint(latent, _QuantisedLatent(seed=2), latent=38)),
        Case(latent, checkpoint(latent, _QuantisedLatent(v3=True, seed=3), latent=38)),
        Case(vision, checkpoint(vision, unquantised)),
        Case(tiny_config(num_hidden_layers=2), checkpoint(vision, unquantised)),
        Case(bare, checkpoint(bare, unquantised)),
        Case(no_shared, checkpoint(bare, unquantised)),
        Case(in_words, checkpoint(plain, unquantised)),
        Case(heavy, checkpoint(heavy, unquantised)),
        *(Case(plain, checkpoint(plain, unquantised) | more) for more in unknown.values()),
    ]


class _QuantisedLatent(Storage):
    """Latent projections in FP8, which no release has and the map allows."""

    def kind(self, name: str, kind: str) -> str:
        return super().kind(name, "dense" if "latent_proj" in name else kind)


@lru_cache(maxsize=1)
def _released() -> Checkpoint:
    return open_checkpoint(LISTING)


@lru_cache(maxsize=1)
def _reference() -> list[list[Any]]:
    return [_outcomes(DeepseekV4Adapter, case) for case in cases()]


def prepare() -> None:
    """Make what all mutants are held against, before there are several processes."""
    torch.set_num_threads(1)
    _reference()
    _released()


def noticed(text: str) -> str:
    """The stage that notices a mutant, or nothing where it survives all."""
    mutant = Map(Source("mutant.map", text))
    if has_errors(mutant.check()):
        return "check"
    if any(not _alike(mutant, case, expected) for case, expected in zip(cases(), _reference(), strict=True)):
        return "tensors"
    return "listing" if _listing_differs(mutant) else ""


def _alike(mutant: Map, case: Case, expected: list[Any]) -> bool:
    steps = _steps(mutant.adapter_class, case)
    found: list[Any] = []
    for step, wanted in zip(steps, expected, strict=True):
        found.append(_outcome(step, found))
        if not _same(found[-1], wanted):
            return False
    return True


def _outcomes(adapter: Callable[..., Adapter], case: Case) -> list[Any]:
    found: list[Any] = []
    for step in _steps(adapter, case):
        found.append(_outcome(step, found))
    return found


Step = Callable[[list[Any]], Any]


def _steps(make: Callable[..., Adapter], case: Case) -> list[Step]:
    """What is tried with an adapter; each step sees what those before it gave."""
    adapters: list[Adapter] = []

    def read(_: list[Any]) -> Any:
        adapters.append(make(case.config))
        return adapters[0].from_hf(case.stored)

    def with_all_biases(native: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"model.layers.{i}.mlp.gate.e_score_correction_bias": torch.ones(3) for i in range(2)} | native

    return [
        lambda _: make(case.config).hf_keys(),
        lambda _: make(case.config).native_keys(),
        read,
        lambda found: adapters[0].to_hf(found[2], quantization=True),
        lambda found: adapters[0].to_hf(with_all_biases(found[2])),
        lambda found: _finite(make(case.config), found[2]),
    ]


def _finite(adapter: Adapter, native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written without anything read before, so that formats are the map's first and all is encoded anew."""
    values = {n: t.nan_to_num(0, 0, 0).clamp(-8, 8) if t.is_floating_point() else t for n, t in native.items()}
    return adapter.to_hf(values, quantization=True)


def _outcome(step: Step, found: list[Any]) -> Any:
    """What a step gives, or the code of its error; nothing where the one before it gave nothing to go on with."""
    if len(found) > 2 and isinstance(found[2], str):
        return "no state"
    try:
        return step(found)
    except (ConversionError, MapError) as problem:
        return getattr(problem, "code", "error")


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, str) or isinstance(wanted, str):
        return bool(found == wanted)
    if all(isinstance(tensor, Tensor) for tensor in (*found.values(), *wanted.values())):
        return not differences(found, wanted)
    return bool(found == wanted)


def _listing_differs(mutant: Map) -> bool:
    try:
        found, _ = check_against(mutant.checked, _released())
    except MapError:
        return True
    return has_errors(found)
