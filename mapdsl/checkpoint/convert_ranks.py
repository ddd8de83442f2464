"""A checkpoint from ranks to ranks: every share of the output is a conversion of its own, from what its rank holds.

A rank of the output needs slices of what the ranks of the source hold: of the side that is stored, or of the other one,
where the map's conversion of that rank is run on them. Nothing is merged on the way, unless one rank is to hold all.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.convert import Conversion, convert
from mapdsl.checkpoint.file_writing import flush, flush_folder
from mapdsl.checkpoint.files import bad_file
from mapdsl.checkpoint.journal import partial_folder
from mapdsl.checkpoint.options import make_request
from mapdsl.checkpoint.passes import OptionError, Request, adapter_of, placing
from mapdsl.checkpoint.progress import Report
from mapdsl.checkpoint.rank_files import RANKS_FILE, RankFiles, open_rank_files, rank_folder, ranks_text
from mapdsl.checkpoint.rank_layouts import LAYOUTS, RankLayout
from mapdsl.checkpoint.ranks import may_go_on
from mapdsl.checkpoint.shares import Shares, stored_of
from mapdsl.checkpoint.sources import check_destination
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.language.diagnostics import error
from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.codecs.base import Codec
from mapdsl.runtime.dtensors import Rank
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.resharding import Made, Resharding, places
from mapdsl.runtime.sharded_adapter import ShardedAdapter
from mapdsl.runtime.shares import Ranks, axes_in

UNCHANGED = "map unchanged: before <-> after\n{..} <-> {..} else\n"
"""What converts the share of a rank that stays on its side."""


@dataclass(frozen=True)
class RanksConversion:
    """What a conversion between ranks did: one `Conversion` a rank of the output, in the order of their folders.

    `dropped` are tensors of the source, as a whole state calls them, that by the map no rank of the output holds.
    """

    source: Path
    destination: Path
    source_side: str
    target_side: str
    source_ranks: Mapping[str, int]
    target_ranks: Mapping[str, int]
    shares: tuple[Conversion, ...]
    dropped: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        value = {key: item for key, item in asdict(replace(self, shares=())).items() if key != "shares"}
        shares = [share.as_json() for share in self.shares]
        return {**value, "source": str(self.source), "destination": str(self.destination), "shares": shares}


def convert_ranks(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    map: Map | str | os.PathLike[str],  # noqa: A002 (as `convert` has it)
    *,
    ranks: Mapping[str, tuple[int, int]],
    to: str | None = None,
    layout: str | None = None,
    compare: bool = True,
    resume: bool = False,
    report: Report | None = None,
    **options: Any,
) -> RanksConversion:
    """Convert what some ranks hold of a checkpoint to what others are to hold.

    `ranks` gives, by mesh of the map, the number of ranks in the source and in the destination: `{"tp": (2, 8)}`. `to`
    names the side to go to: the source's own to move tensors between ranks alone, by default the other one. A
    destination of several ranks is a folder with one checkpoint each, `tp-0`, `tp-1`, ..., and `mapdsl.ranks.json`; of
    one rank it is a checkpoint like any other. `layout` asks for the files of others instead: `megatron`, `deepspeed`
    or `ds_inference`. Without `compare`, of what several ranks hold the first one's is taken.
    `options` are those of `convert`. With `resume`, shares that are complete stay as they are.

    Raises what `convert` raises; and a MapError: C507 for files of ranks that do not belong together, P453 and P454
    for axes and blocks that cannot be cut so, R602 for copies that differ.
    """
    started = time.monotonic()
    destination = Path(destination)
    before, after = ({mesh: pair[n] for mesh, pair in ranks.items()} for n in (0, 1))
    after = {mesh: count for mesh, count in after.items() if count > 1}
    files_of = _layout(layout, after)
    if (after or files_of) and options.get("format", "safetensors") != "safetensors":
        message = "a Distributed Checkpoint holds whole tensors, which any number of ranks loads: write it for one rank"
        raise OptionError(message)
    files = open_rank_files(source, before)
    moving = _Moving(files, _request(files, map, options), to, compare=compare)
    options = {name: value for name, value in options.items() if moving.converts or name not in ("params", "dtype")}
    options |= {"resume": resume, "report": report}
    if not after and files_of is None:
        share = moving.share({}, {})
        shares = [convert(share, destination, moving.map, to=moving.inner_target, **options)]
    else:
        shares = _written(moving, destination, after, files_of, options)
    sides = moving.side, moving.target
    seconds = time.monotonic() - started
    counts = dict(files.ranks), after
    return RanksConversion(files.path, destination, *sides, *counts, tuple(shares), moving.dropped(), seconds)


def _request(files: RankFiles, map_: Any, options: Mapping[str, Any]) -> Request:
    chosen = {name: options[name] for name in ("dtype", "quantize", "params", "config") if name in options}
    return make_request(map_, files.checkpoints[0], use_complement=False, **chosen)


def _layout(name: str | None, ranks: Ranks) -> RankLayout | None:
    """The layout of a name; OptionError where there is none, or it has no room for these ranks."""
    if name is None:
        return None
    if name not in LAYOUTS:
        raise OptionError(f"files of ranks are laid out as one of {', '.join(LAYOUTS)}, not {name!r:.80}")
    LAYOUTS[name].check(ranks)
    return LAYOUTS[name]


def _written(
    moving: _Moving, destination: Path, after: Ranks, files_of: RankLayout | None, options: dict[str, Any]
) -> list[Conversion]:
    """Write the shares of all ranks into a hidden folder, which takes the destination's name at the end."""
    hidden = partial_folder(destination)
    resume = options["resume"]
    check_destination(moving.files.checkpoints[0], destination)
    if destination.absolute().is_relative_to(moving.files.path.absolute()):
        raise bad_file(destination, f"the destination lies in the source, {moving.files.path}", "choose another place")
    if hidden.exists() and not resume:
        advice = "go on with --resume, or remove it"
        raise bad_file(hidden, "an unfinished conversion to this destination is there", advice)
    all_places = list(places(moving.adapter, after))
    divided = moving.divided(after) if files_of is not None and files_of.apart is not None else set()
    hidden.mkdir(exist_ok=True)
    try:
        found = [_share(moving, hidden, after, rank, files_of, divided, options) for rank in all_places]
    except BaseException as problem:
        if not may_go_on(problem):
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    if files_of is not None:
        files_of.finish(hidden, after)
    else:
        text = ranks_text(moving.request.map.checked.map.name, moving.target, after, all_places)
        (hidden / RANKS_FILE).write_text(text, encoding="utf-8")
        flush(hidden / RANKS_FILE)
    flush_folder(hidden)
    os.rename(hidden, destination)
    flush_folder(destination.parent)
    return found


def _share(
    moving: _Moving,
    hidden: Path,
    after: Ranks,
    rank: Ranks,
    files_of: RankLayout | None,
    divided: Container[str],
    options: Mapping[str, Any],
) -> Conversion:
    """Write the share of one rank, or what is left of it."""
    resume = options["resume"]
    folder, share = hidden / (rank_folder(rank) or "whole"), moving.share(after, rank)
    is_packed = resume and files_of is not None and files_of.is_packed(hidden, after, rank)
    if is_packed or (resume and folder.is_dir() and not partial_folder(folder).exists()):
        done = moving.done(share, folder)
    else:
        goes_on = resume and partial_folder(folder).exists()
        done = convert(share, folder, moving.map, to=moving.inner_target, **{**options, "resume": goes_on})
    if files_of is not None and not is_packed:
        files_of.pack(folder, hidden, after, rank, divided)
    return done


class _Moving:
    """What is moved: from which ranks and which side, to which side."""

    def __init__(self, files: RankFiles, request: Request, to: str | None, *, compare: bool) -> None:
        self.files, self.request, self._compare = files, request, compare
        adapter, _ = adapter_of(request, None)
        if not isinstance(adapter, ShardedAdapter):
            message = f"the map `{adapter.MAP}` has no mesh, so nothing says how it is cut over ranks"
            raise error("N113", message, subject=request.map.source.path, help="declare one: `mesh tp shards h, f`")
        self.adapter: ShardedAdapter = adapter
        if to is not None and to not in request.sides:
            raise OptionError(f"the map has the sides {request.sides[0]} and {request.sides[1]}, and no `{to}`")
        self.side = self._source_side(to)
        self.target = to or next(side for side in request.sides if side != self.side)
        self.converts = self.target != self.side
        self.map = request.map if self.converts else Map(Source("unchanged.map", UNCHANGED))
        self.inner_target = self.target if self.converts else "after"
        with placing(files.checkpoints[0]):
            self._places = list(places(adapter, files.ranks))
            self._checkpoints = [files.at(rank) for rank in self._places]
            states = [LazyState(checkpoint, device="meta") for checkpoint in self._checkpoints]
            self._resharding = Resharding(adapter, self.side, states, files.ranks)
        self._compared: set[tuple[Any, ...]] = set()

    def share(self, ranks: Ranks, rank: Ranks) -> Checkpoint:
        """What one rank is to hold of the source's side, as a checkpoint."""
        with placing(self.files.checkpoints[0]):
            made = dict(self._once_compared(self._resharding.target(ranks, rank)))
        first = self._checkpoints[0]
        tensors = {name: stored_of(name, one, self._checkpoints) for name, one in made.items()}
        shares = Shares(self._checkpoints, made, Rank(ranks, rank) if self.converts else None, self._compare)
        folders = [os.path.relpath(one.folder, first.folder) for one in self._checkpoints]
        files = [os.path.join(f, name) for f, one in zip(folders, self._checkpoints, strict=True) for name in one.files]
        return replace(first, kind="shares", tensors=tensors, metadata={}, files=tuple(files), shares=shares)

    def dropped(self) -> tuple[str, ...]:
        """The tensors of the source that no rank of the destination is to hold, when all were asked for."""
        return tuple(self._resharding.dropped())

    def done(self, share: Checkpoint, folder: Path) -> Conversion:
        """The share of a rank that an earlier run has written."""
        written = list(folder.glob("*.safetensors"))
        count, size = len(share.tensors), sum(stored.nbytes for stored in share.tensors.values())
        names = tuple(sorted(path.name for path in written))
        sides = self.side, self.target
        return Conversion(share.path, folder, *sides, count, size, count, size, names, was_complete=True)

    def divided(self, ranks: Ranks) -> set[str]:
        """The names, on the first rank of the destination, of tensors of which other ranks hold other parts."""
        one = self.adapter.at(ranks, dict.fromkeys(ranks, 0))
        found: set[str] = set()
        for shown in one.list_shares(self.target, {}).shown:
            if any(one.place.mesh_of(axis) is not None for axis in axes_in(shown.pattern or "")):
                codecs = (codec for codec in shown.stored if isinstance(codec, Codec))
                found |= {shown.name, *(part for codec in codecs for part in codec.names(shown.name))}
        return found

    def _once_compared(self, made: Mapping[str, Made]) -> Iterator[tuple[str, Made]]:
        """What several ranks of the output hold is compared with its copies for the first of them alone."""
        for name, one in made.items():
            key = one.sources, one.replicas
            is_known = bool(one.replicas) and key in self._compared
            self._compared.add(key)
            yield name, replace(one, replicas=()) if is_known else one

    def _source_side(self, to: str | None) -> str:
        """The side that the source is of: what its files say, or its names."""
        left, right = self.request.sides
        if self.files.side is not None:
            if self.files.side not in (left, right):
                message = f"the files are of the side `{self.files.side}`, the map has {left} and {right}"
                raise bad_file(self.files.path, message, "give the map that they were written with")
            return self.files.side
        rank = next(places(self.adapter, self.files.ranks))
        names = self.files.at(rank).tensors.keys()
        one = self.adapter.at(self.files.ranks, rank)
        hits = {}
        for side, keys in ((left, one.left_keys), (right, one.right_keys)):
            try:
                hits[side] = len(names & keys().keys())
            except ConversionError:  # of an axis that does not divide, say: told when it is cut
                hits[side] = 0
        if hits[left] == hits[right]:
            if to is None or not hits[left]:
                message = f"the names are those of {left} as much as those of {right}"
                raise error("D407", message, subject=str(self.files.path), help=f"say where to go: --to {right}")
            return left if to == right else right
        return max(hits, key=lambda side: hits[side])
