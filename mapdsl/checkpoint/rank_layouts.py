"""The files that others want of ranks: Megatron's, DeepSpeed's, and those of DeepSpeed's inference.

A share is written as safetensors first, piece by piece; what packs it into a torch file maps it, so that no more of it
is in memory than the system likes to keep.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mapdsl.checkpoint.file_writing import flush, flush_folder
from mapdsl.checkpoint.files import bad_file, reason
from mapdsl.checkpoint.passes import OptionError
from mapdsl.checkpoint.rank_files import INFERENCE_CONFIG
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.runtime.shares import Ranks

_MEGATRON_MESHES = ("tp", "pp", "ep")


@dataclass(frozen=True)
class RankLayout:
    """How the files of ranks are called, and what stands in them beside the tensors.

    `path_of` gives the file of a rank among others, in the folder of the checkpoint; `key` is what the state stands
    under; `meshes` those that its names have room for.
    """

    name: str
    meshes: tuple[str, ...]
    key: str | None
    path_of: Callable[[Ranks, Ranks], str]
    apart: str | None = None  # the file of what no mesh cuts

    def check(self, ranks: Ranks) -> None:
        """OptionError for a mesh that the files have no room for."""
        if wrong := [mesh for mesh, count in ranks.items() if count > 1 and mesh not in self.meshes]:
            raise OptionError(f"files of {self.name} have no room for ranks of `{wrong[0]}`: {', '.join(self.meshes)}")

    def pack(self, share: Path, target: Path, ranks: Ranks, rank: Ranks, divided: Container[str]) -> None:
        """Write the torch files of a rank, into the folder `target`, from its share, which is removed.

        `divided` are the tensors of which ranks hold different parts.
        """
        checkpoint = open_checkpoint(share)
        names = list(checkpoint.tensors)
        if self.apart is not None:
            if not any(rank.values()):
                self._save([name for name in names if name not in divided], checkpoint, target / self.apart, ranks)
            names = [name for name in names if name in divided]
        self._save(names, checkpoint, target / self.path_of(ranks, rank), ranks)
        if not any(rank.values()):
            for name in (*checkpoint.other_files, *(["config.json"] if checkpoint.config is not None else [])):
                shutil.copyfile(share / name, target / name)
        shutil.rmtree(share)

    def is_packed(self, target: Path, ranks: Ranks, rank: Ranks) -> bool:
        """Whether an earlier run has packed the share of a rank."""
        return (target / self.path_of(ranks, rank)).exists()

    def finish(self, target: Path, ranks: Ranks) -> None:
        """Write what says which files there are, where that is wanted."""
        if self.apart is None:
            return
        files = [self.path_of(ranks, {"tp": place}) for place in range(ranks.get("tp", 1))]
        found = {
            "type": "ds_model",
            "base_dir": ".",
            "checkpoints": {"non_tp": [self.apart], "tp": files},
            "version": 1.0,
            "parallelization": "tp",
            "tp_size": ranks.get("tp", 1),
        }
        (target / INFERENCE_CONFIG).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        flush(target / INFERENCE_CONFIG)

    def _save(self, names: list[str], checkpoint: Checkpoint, path: Path, ranks: Ranks) -> None:
        """Write one torch file, under another name until it is whole."""
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        with closing(LazyState(checkpoint)) as mapped:
            state: dict[str, Any] = {name: _apart(mapped[name]) for name in names}
            if self.key is not None:
                state = {self.key: state, "mp_world_size": ranks.get("tp", 1)}
            try:
                torch.save(state, unfinished)
            except (OSError, RuntimeError) as problem:  # torch's own writer raises the latter for a full disk
                why = reason(problem) if isinstance(problem, OSError) else str(problem).split("\n")[0]
                cause = problem if isinstance(problem, OSError) else OSError(str(problem))
                raise bad_file(path, f"cannot write the file: {why}", "free space, and go on with --resume") from cause
        flush(unfinished)
        os.rename(unfinished, path)
        flush_folder(path.parent)


def _apart(tensor: Tensor) -> Tensor:
    """The same memory as a storage of the tensor's own size: torch saves all of a storage."""
    begin = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[begin : begin + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _megatron(ranks: Ranks, rank: Ranks) -> str:
    """`mp_rank_01`, with `_002` for a rank of the pipeline and another for one of the experts, as Megatron has it."""
    name = f"mp_rank_{rank.get('tp', 0):02d}"
    if ranks.get("pp", 1) > 1 or ranks.get("ep", 1) > 1:
        name += f"_{rank.get('pp', 0):03d}"
    if ranks.get("ep", 1) > 1:
        name += f"_{rank.get('ep', 0):03d}"
    return f"{name}/model_optim_rng.pt"


LAYOUTS = {
    layout.name: layout
    for layout in (
        RankLayout("megatron", _MEGATRON_MESHES, "model", _megatron),
        RankLayout("deepspeed", ("tp",), "module", lambda _, rank: f"mp_rank_{rank.get('tp', 0):02d}_model_states.pt"),
        RankLayout("ds_inference", ("tp",), None, lambda _, rank: f"tp_{rank.get('tp', 0):02d}_00.pt", "non-tp.pt"),
    )
}
"""Files of others, by the name of `--layout`."""
