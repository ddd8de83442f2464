"""Classes that `mapdsl compile --target automodel` writes, and a case of each family that NeMo Automodel has."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from mapdsl.emit.automodel import automodel_source
from mapdsl.frameworks.automodel import AutomodelAdapter
from tests.differential import test_automodel_gpt_oss as gpt_oss
from tests.differential.automodel import Case, Family, load
from tests.differential.automodel_glm import CASES as GLM
from tests.differential.automodel_qwen import CASES as QWEN
from tests.differential.test_automodel_deepseek_v3 import PLAIN as DEEPSEEK_V3
from tests.differential.test_automodel_ernie4_5_moe import CASES as ERNIE
from tests.differential.test_automodel_hy_v3 import CASES as HY
from tests.differential.test_automodel_ling_v2 import CASES as LING
from tests.differential.test_automodel_minimax_m2 import CASES as MINIMAX
from tests.differential.test_automodel_nemotron_v3 import CASES as NEMOTRON
from tests.helpers.deepseek_v4 import tiny_config

_V4_CONFIG = "nemo_automodel.components.models.deepseek_v4.config:DeepseekV4Config"
DEEPSEEK_V4 = Case("deepseek_v4", Family("deepseek_v4", "DeepseekV4ForCausalLM", _V4_CONFIG), tiny_config())

_KNOWN = {**QWEN, **GLM, **DEEPSEEK_V3, **MINIMAX, **HY, **LING, **NEMOTRON, **ERNIE}
FAMILIES: dict[str, Case] = {
    **{case.map: case for name, case in _KNOWN.items() if name.endswith(": one of each, bfloat16")},
    "deepseek_v4": DEEPSEEK_V4,
    "gpt_oss": gpt_oss.plain(),
}


@functools.cache
def target(name: str) -> type[AutomodelAdapter]:
    """The class that the map of that name compiles to."""
    module = types.ModuleType(f"emitted_{name}")
    sys.modules[module.__name__] = module
    exec(compile(automodel_source(load(name).checked), f"{name}.py", "exec"), module.__dict__)
    (found,) = (
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, AutomodelAdapter) and one.__module__ == module.__name__
    )
    return found


def drop_in(case: Case) -> Any:
    """Our adapter, made of what Automodel's model made its own of."""
    return in_place_of(case.theirs(), case)


def in_place_of(theirs: Any, case: Case) -> Any:
    """The same of a model at hand."""
    made = [getattr(theirs, name, None) for name in ("config", "moe_config", "backend", "dtype")]
    return target(case.map)(*made, **case.params)
