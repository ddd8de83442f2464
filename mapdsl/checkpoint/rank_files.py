"""A checkpoint that lies in the shares of ranks: one checkpoint a rank, and what says which is whose.

Written by mapdsl: a folder a rank, `tp-0_ep-1`, and beside them `mapdsl.ranks.json`, which comes last. Read too: files
of Megatron and DeepSpeed, by their names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mapdsl.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_files
from mapdsl.checkpoint.files import bad_file, is_plain_name, read_object
from mapdsl.checkpoint.sources import with_tensors
from mapdsl.runtime.shares import Ranks, all_ranks

RANKS_FILE = "mapdsl.ranks.json"
INFERENCE_CONFIG = "ds_inference_config.json"
FORMAT = 1
MAX_RANKS = 100_000

# Megatron's `mp_rank_01/model_optim_rng.pt`, `mp_rank_01_000_003/...`: tensor, pipeline and expert parallel rank.
# DeepSpeed's `mp_rank_01_model_states.pt`.
_MEGATRON = re.compile(r"mp_rank_(?P<tp>\d{2,})(?:_(?P<pp>\d{3,}))?(?:_(?P<ep>\d{3,}))?(?P<rest>_model_states\.pt)?")
# DeepSpeed's pipelines: `layer_03-model_01-model_states.pt`, a file for each layer and tensor parallel rank.
_LAYER = re.compile(r"layer_(?P<layer>\d{2,})-model_(?P<tp>\d{2,})-model_states\.pt")
_INSIDE = ("model_optim_rng.pt", "model_rng.pt")


@dataclass(frozen=True)
class RankFiles:
    """The checkpoints of all ranks, in the order of `ranks`, the last mesh fastest."""

    path: Path
    ranks: dict[str, int]
    checkpoints: tuple[Checkpoint, ...]
    side: str | None = None

    def at(self, rank: Ranks) -> Checkpoint:
        """The checkpoint of one rank."""
        return self.checkpoints[list(all_ranks(self.ranks)).index({mesh: rank[mesh] for mesh in self.ranks})]


def rank_folder(rank: Ranks) -> str:
    """The name of a rank's folder: `tp-0_ep-1`."""
    return "_".join(f"{mesh}-{place}" for mesh, place in rank.items())


def is_cut(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds shares of ranks."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    has_list = any((folder / name).exists() for name in (RANKS_FILE, INFERENCE_CONFIG))
    return has_list or any(_megatron_files(folder)) or bool(_layer_files(folder))


def open_rank_files(path: str | os.PathLike[str], asked: Ranks) -> RankFiles:
    """The checkpoints of ranks; `asked` says over how many each mesh cuts them, which what is there must bear out.

    With nothing asked for it is what is there. Where all is of one rank any checkpoint will do. Raises a MapError,
    C507, where files of ranks are missing or are of others.
    """
    folder = Path(path)
    if folder.is_dir() and (folder / RANKS_FILE).exists():
        found = _listed(folder)
    elif folder.is_dir() and (folder / INFERENCE_CONFIG).exists():
        found = _of_inference(folder)
    elif folder.is_dir() and (layers := _layer_files(folder)):
        found = _of_layers(folder, layers)
    elif folder.is_dir() and (named := dict(_megatron_files(folder))):
        found = _named(folder, named)
    else:
        if any(count > 1 for count in asked.values()):
            message = f"the folder holds no shares of ranks: neither {RANKS_FILE} nor mp_rank_00 is there"
            raise bad_file(folder, message, "give the folder that holds those of all ranks")
        return RankFiles(folder, {}, (with_tensors(open_checkpoint(path)),))
    wrong = {mesh: count for mesh, count in asked.items() if found.ranks.get(mesh, 1) != count}
    if wrong:
        there = ", ".join(f"{mesh} {count}" for mesh, count in found.ranks.items())
        words = ", ".join(f"{mesh} {count}" for mesh, count in wrong.items())
        raise bad_file(folder, f"the checkpoint is cut over {there}, not over {words}", "say how many ranks there are")
    return found


def ranks_text(map_name: str, side: str, ranks: Ranks, places: Iterable[Ranks]) -> str:
    """What `mapdsl.ranks.json` says."""
    shares = [{"rank": dict(rank), "folder": rank_folder(rank)} for rank in places]
    value = {"format": FORMAT, "map": map_name, "side": side, "ranks": dict(ranks), "shares": shares}
    return json.dumps(value, indent=2) + "\n"


def _listed(folder: Path) -> RankFiles:
    file = folder / RANKS_FILE
    record = read_object(file, "list of ranks")
    try:
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r:.80}, expected {FORMAT}")
        ranks = {str(mesh): int(count) for mesh, count in record["ranks"].items()}
        names = {tuple(sorted(share["rank"].items())): str(share["folder"]) for share in record["shares"]}
        side = str(record["side"])
        if math.prod(ranks.values()) not in range(1, MAX_RANKS + 1) or min(ranks.values()) < 1:
            raise ValueError(f"its ranks are {ranks}")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        message = f"the file cannot be understood ({type(problem).__name__}: {problem})"
        raise bad_file(file, message, "convert again") from None
    found = []
    for rank in all_ranks(ranks):
        name = names.get(tuple(sorted(rank.items())))
        if name is None or not is_plain_name(name):
            raise bad_file(file, f"it names no folder for {rank_folder(rank)}", "convert again")
        found.append(with_tensors(open_checkpoint(folder / name)))
    return RankFiles(folder, ranks, tuple(found), side)


def _of_inference(folder: Path) -> RankFiles:
    """What DeepSpeed has written for inference: a rank has the files that all have, and its own of each group."""
    file = folder / INFERENCE_CONFIG
    record = read_object(file, "checkpoint's config")
    found = record.get("checkpoints")
    lists = (found.get("non_tp"), found.get("tp")) if isinstance(found, dict) else (None, None)
    if not all(isinstance(names, list) and all(map(is_plain_name, names)) for names in lists):
        message = 'expected `"checkpoints": {"non_tp": [...], "tp": [...]}` with names of files in its folder'
        raise bad_file(file, message, "a ds_model checkpoint that DeepSpeed or mapdsl has saved has them")
    common, divided = (list(map(str, names)) for names in lists if names is not None)
    count = record.get("tp_size") or record.get("mp_size") or len(divided)
    if type(count) is not int or not 1 <= count <= MAX_RANKS or not divided or len(divided) % count:
        raise bad_file(file, f"{len(divided)} files are not those of {count!r:.20} ranks")
    shares = [[*common, *divided[rank::count]] for rank in range(count)]
    checkpoints = (with_tensors(open_files([folder / name for name in names])) for names in shares)
    return RankFiles(folder, {"tp": count} if count > 1 else {}, tuple(checkpoints))


def _layer_files(folder: Path) -> dict[int, dict[int, Path]]:
    """Files of the layers of a pipeline, by tensor parallel rank and layer."""
    found: dict[int, dict[int, Path]] = {}
    for name in sorted(os.listdir(folder)):
        if (matched := _LAYER.fullmatch(name)) is not None:
            found.setdefault(int(matched["tp"]), {})[int(matched["layer"])] = folder / name
    return found


def _of_layers(folder: Path, layers: Mapping[int, Mapping[int, Path]]) -> RankFiles:
    """The ranks of a pipeline's files: what stands in `layer_03-...` is called `layer_3.` and its name there."""
    checkpoints = []
    first = layers.get(0, {})
    for rank in range(max(layers) + 1):
        files = layers.get(rank, {})
        if lacking := sorted(first.keys() ^ files.keys()):
            message = f"the file of layer {lacking[0]} is there for other ranks than {rank}, or for this one alone"
            raise bad_file(folder, message, "files of all layers and ranks belong together")
        opened = {layer: open_files([path]) for layer, path in files.items()}
        tensors = {f"layer_{n}.{name}": stored for n, one in opened.items() for name, stored in one.tensors.items()}
        one = next(iter(opened.values()))
        left_out = tuple(dict.fromkeys(key for found in opened.values() for key in found.left_out))
        names = tuple(path.name for path in files.values())
        checkpoints.append(with_tensors(replace(one, tensors=tensors, files=names, left_out=left_out)))
    ranks = {"tp": len(checkpoints)} if len(checkpoints) > 1 else {}
    return RankFiles(folder, ranks, tuple(checkpoints))


def _named(folder: Path, named: Mapping[tuple[int, ...], Path]) -> RankFiles:
    meshes = ("tp", "pp", "ep")
    counts = [max(place[n] for place in named) + 1 for n in range(len(meshes))]
    if math.prod(counts) > MAX_RANKS:
        raise bad_file(folder, f"its files are those of {math.prod(counts):,} ranks")
    ranks = {mesh: count for mesh, count in zip(meshes, counts, strict=True) if count > 1}
    found = []
    for rank in all_ranks(ranks):
        place = tuple(rank.get(mesh, 0) for mesh in meshes)
        if place not in named:
            there = ", ".join(sorted(path.name for path in named.values())[:8])
            raise bad_file(folder, f"the share of {rank_folder(rank)} is missing; there are {there}")
        found.append(with_tensors(open_checkpoint(named[place])))
    return RankFiles(folder, ranks, tuple(found))


def _megatron_files(folder: Path) -> Iterator[tuple[tuple[int, ...], Path]]:
    """Files of Megatron's or DeepSpeed's ranks, by their tensor, pipeline and expert parallel ranks."""
    for name in sorted(os.listdir(folder)):
        matched = _MEGATRON.fullmatch(name)
        if matched is None:
            continue
        place = tuple(int(matched[mesh] or 0) for mesh in ("tp", "pp", "ep"))
        path = folder / name
        if path.is_dir() and not matched["rest"]:
            inside = next((path / file for file in _INSIDE if (path / file).exists()), None)
            if inside is not None:
                yield place, inside
        elif matched["rest"] and path.is_file():
            yield place, path
