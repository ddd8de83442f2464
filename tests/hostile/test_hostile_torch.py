"""Torch files that want to run code, or hold something else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.language.diagnostics import MapError


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_is_run(tmp_path: Path, suffix: str, is_zip: bool) -> None:
    path, mark = tmp_path / f"model{suffix}", tmp_path / "pwned"
    value = {"a": torch.zeros(1), "b": _Payload(mark)}
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(MapError, match="the file needs code to load, or is broken"):
        open_checkpoint(path)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_runs_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "pwned"
    path.write_bytes(pickle.dumps(_Payload(mark)))
    with pytest.raises(MapError):
        open_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 100, b"junk", b"\x80\x02."])
def test_broken_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(MapError) as problem:
        open_checkpoint(path)
    assert problem.value.diagnostics[0].code == "C507"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2], "the file holds a list without tensors"),
        ({"lr": 0.1}, "the file holds a dict without tensors"),
        (torch.zeros(2), "the file holds a Tensor without tensors"),
        ({"a": torch.zeros(2), "step": 3}, "entry 'step' is of <class 'int'>, expected a dense tensor under a string"),
        (
            {"a": torch.zeros(2), 3: torch.zeros(2)},
            "entry 3 is a torch.strided tensor, expected a dense tensor under a string",
        ),
        ({"a": torch.zeros(2).to_sparse()}, "entry 'a' is a torch.sparse_coo tensor, expected a dense tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "tensor `a`: safetensors has no dtype for torch.complex128"),
    ],
)
def test_other_contents(tmp_path: Path, value: Any, expected: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(value, path)
    with pytest.raises(MapError, match=expected.replace("(", r"\(")):
        open_checkpoint(path)
