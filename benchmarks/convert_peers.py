"""What `mapdsl convert` is held against: the same bytes copied, and other libraries.

Each function prepares, imports among it, and gives the work. Whoever writes files also makes them durable, as `convert`
does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]
STRIP = 2**26


def mapdsl(source: str, destination: str, rules: str, workers: str) -> Work:
    """mapdsl itself."""
    import tqdm  # noqa: F401 (as the command has it)

    from mapdsl.checkpoint.convert import convert

    return lambda: convert(source, destination, rules, workers=int(workers))


def copied_in_the_system(source: str, destination: str) -> Work:
    """Every file of a folder copied by `copy_file_range`."""

    def work() -> None:
        os.mkdir(destination)
        for path in sorted(Path(source).iterdir()):
            with path.open("rb") as outof, (Path(destination) / path.name).open("wb") as into:
                left = path.stat().st_size
                while left:
                    left -= os.copy_file_range(outof.fileno(), into.fileno(), left)
                os.fsync(into.fileno())

    return work


def read_and_written(source: str, destination: str, size: str) -> Work:
    """All bytes of the weights in a folder read, and so many written: what no conversion can do without."""
    buffer = bytearray(STRIP)

    def work() -> None:
        for path in sorted(Path(source).glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        os.mkdir(destination)
        left = int(size)
        with (Path(destination) / "weights").open("wb", buffering=0) as into:
            while left:
                left -= into.write(memoryview(buffer)[: min(left, STRIP)])
            os.fsync(into.fileno())

    return work


def nemo_automodel(source: str, destination: str) -> Work:
    """All tensors loaded, converted by NeMo Automodel's adapter of DeepSeek-V4, and saved.

    Of the model's config the adapter reads four counts and the path, of the config of its experts their number.
    """
    import json
    from types import SimpleNamespace

    import torch
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.deepseek_v4.state_dict_adapter import DeepSeekV4StateDictAdapter
    from safetensors.torch import load_file, save_file

    config = json.loads((Path(source) / "config.json").read_text())
    experts = SimpleNamespace(n_routed_experts=config["n_routed_experts"])
    fields = SimpleNamespace(**config, _name_or_path=source)
    adapter = DeepSeekV4StateDictAdapter(fields, experts, BackendConfig(), dtype=torch.bfloat16)

    def work() -> None:
        stored: dict[str, torch.Tensor] = {}
        for path in sorted(Path(source).glob("*.safetensors")):
            stored.update(load_file(path))
        os.mkdir(destination)
        target = Path(destination) / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in adapter.from_hf(stored).items()}, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())

    return work
