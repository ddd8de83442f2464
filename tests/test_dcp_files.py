"""What torch Distributed Checkpoint leaves beside the tensors that it saves by a map: config.json, and other files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import save as dcp_save

from mapdsl.checkpoint.checksums import CHECKSUM_FILE
from mapdsl.checkpoint.sidecar import SIDE_FILE
from mapdsl.frameworks.dcp import MapStorageWriter
from tests.helpers.live_job import CONFIG, map_, native, stored

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")


def save(state: Mapping[str, Tensor], writer: MapStorageWriter) -> None:
    dcp_save(dict(state), storage_writer=writer, no_dist=True)


def test_the_config_says_what_is_written(tmp_path: Path) -> None:
    """It comes as a training job has it. `quantization_config` stays where something is quantised, and nowhere else."""
    quantised = CONFIG | {"quantization_config": {"quant_method": "fp8"}, "text": {"quantization_config": {}, "a": 1}}
    like = tmp_path / "like"
    like.mkdir()
    save_file(stored("raw"), str(like / "model.safetensors"))
    (like / "config.json").write_text(json.dumps(quantised, indent=3))
    given: dict[str, dict[str, Any]] = {
        "mapping": {"config": quantised},
        "file": {"config": like / "config.json"},
        "folder": {"config": str(like)},
        "like": {"like": like},
        "object": {"config": Released(quantised)},
    }
    for name, options in given.items():
        for quantization in (False, True):
            out = tmp_path / f"{name}-{quantization}"
            save(native("fp8"), MapStorageWriter(out, map_(), quantization=quantization, **options))
            written = json.loads((out / "config.json").read_text())
            assert written == (quantised if quantization else CONFIG | {"text": {"a": 1}}), name
    assert (tmp_path / "like-True" / "config.json").read_text() == json.dumps(quantised, indent=3)


class Released:
    """A config as transformers has one: fields are attributes."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__ |= fields

    def to_json_string(self) -> str:
        return json.dumps(self.__dict__)


def test_what_speaks_of_the_bytes_of_another_checkpoint_is_not_carried_over(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    save_file(stored("raw"), str(like / "model.safetensors"))
    for name in (SIDE_FILE, CHECKSUM_FILE, "tokenizer.json"):
        (like / name).write_text("{}")
    save(native("raw"), MapStorageWriter(tmp_path / "out", map_(), CONFIG, like=like))
    found = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert found == ["config.json", "model.safetensors", "tokenizer.json"]
