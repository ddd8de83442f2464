"""NeMo Automodel's hand-written adapter of DeepSeek-V4, built as its own model builds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

PEERS = "python -m pip install transformers pillow && python -m pip install --no-deps nemo-automodel==0.7.0"


def nemo_adapter(config: dict[str, Any], *, dtype: torch.dtype = torch.bfloat16, path: str = "") -> Any:
    """The adapter for a config as DeepSeek writes it; `path` is the checkpoint's folder, where its config.json is.

    Of the model's config it reads four counts and the path, of the config of its experts their number.
    """
    try:
        from nemo_automodel.components.models.common import BackendConfig
        from nemo_automodel.components.models.deepseek_v4.state_dict_adapter import DeepSeekV4StateDictAdapter
    except ImportError as problem:
        raise RuntimeError(f"the differential tests run against NeMo Automodel: {PEERS}") from problem
    fields = SimpleNamespace(**config, _name_or_path=path)
    experts = SimpleNamespace(n_routed_experts=config["n_routed_experts"])
    return DeepSeekV4StateDictAdapter(fields, experts, BackendConfig(), dtype=dtype)


def nemo_model(config: dict[str, Any], **experts: Any) -> torch.nn.Module:
    """The model itself, without memory; `experts` changes the config of its experts."""
    try:
        from nemo_automodel.components.models.common import BackendConfig
        from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
        from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
    except ImportError as problem:
        raise RuntimeError(f"the differential tests run against NeMo Automodel: {PEERS}") from problem
    with torch.device("meta"):
        return DeepseekV4ForCausalLM(DeepseekV4Config(**config), backend=BackendConfig(), moe_overrides=experts)
