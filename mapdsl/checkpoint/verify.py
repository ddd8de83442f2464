"""Whether a checkpoint is the conversion of another one: converted again, and compared in the place of written."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mapdsl.checkpoint.checker import Checker, KeptChecker
from mapdsl.checkpoint.checkpoint import Checkpoint
from mapdsl.checkpoint.checksums import CHECKSUM_FILE
from mapdsl.checkpoint.direction import choose_plan
from mapdsl.checkpoint.elements import Difference
from mapdsl.checkpoint.engine import convert_tensors
from mapdsl.checkpoint.files import parse_object, read_text
from mapdsl.checkpoint.headers import StoredTensor
from mapdsl.checkpoint.layout import Entry
from mapdsl.checkpoint.options import check_direction, make_request
from mapdsl.checkpoint.origins import Origins
from mapdsl.checkpoint.passes import Plan, header_texts, make_plan, outputs_of
from mapdsl.checkpoint.progress import reporting, some_of
from mapdsl.checkpoint.sidecar import SIDE_FILE, Forgetful, SideFile
from mapdsl.checkpoint.sources import open_tensors
from mapdsl.checkpoint.window import Window
from mapdsl.language.diagnostics import MapError
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError

_FLOATS = ("F64", "F32", "BF16", "F16")
_WORDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Verification:
    """What verifying found.

    `missing` are tensors that the destination lacks, `unknown` those that it should not have, `differences` are told of
    the tensors that both have, `kept_differences` and `kept_problems` of the side file. `is_decoded` says that the
    destination was decoded, and the result held against the source: `expected` is then what the source holds.
    `not_compared` says in sentences what was not looked at.
    """

    source: Path
    destination: Path
    source_side: str
    target_side: str
    is_decoded: bool
    missing: tuple[StoredTensor, ...]
    unknown: tuple[StoredTensor, ...]
    differences: tuple[Difference, ...]
    kept_differences: tuple[Difference, ...]
    kept_problems: tuple[str, ...]
    tensors_compared: int
    bytes_compared: int
    kept_compared: int | None
    not_compared: tuple[str, ...]
    hints: tuple[str, ...] = ()
    edited: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        found = (self.missing, self.unknown, self.differences, self.kept_differences, self.kept_problems)
        return not any(found)

    def as_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {
            "holds": self.holds,
            "source": str(self.source),
            "destination": str(self.destination),
            "source_side": self.source_side,
            "target_side": self.target_side,
            "destination_decoded": self.is_decoded,
            "missing": [tensor.name for tensor in self.missing],
            "unknown": [tensor.name for tensor in self.unknown],
            "differences": [difference.as_json() for difference in self.differences],
            "kept_differences": [difference.as_json() for difference in self.kept_differences],
            "kept_problems": list(self.kept_problems),
            "tensors_compared": self.tensors_compared,
            "bytes_compared": self.bytes_compared,
            "kept_compared": self.kept_compared,
            "not_compared": list(self.not_compared),
            "hints": list(self.hints),
            "edited": dict(self.edited),
            "seconds": self.seconds,
        }


def verify(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    map: Map | str | os.PathLike[str],  # noqa: A002 (as `convert` has it)
    *,
    to: str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: bool = False,
    params: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    use_complement: bool = True,
    progress: bool = False,
) -> Verification:
    """Compare a checkpoint with what `convert`, under the same options, makes of `source`: every byte of every tensor.

    How tensors are shared out over files does not matter. To the right side, the destination's `mapdsl.complement` is
    compared too, if it has one. To the left side, tensors are as the source's `mapdsl.complement` has kept them; where
    there is none and the destination holds quantised tensors, it is decoded and held against the source, unless
    `quantize` says that `convert` has quantised them. `dtype` is that of the decoded tensors (bf16).

    Raises a MapError where either checkpoint cannot be read or does not fit the map, an OptionError for an option that
    means nothing for the direction.
    """
    started = time.monotonic()
    request = make_request(
        map,
        open_tensors(source, "compare"),
        dtype=dtype,
        quantize=quantize,
        params=params,
        config=config,
        use_complement=use_complement,
    )
    found = _verified(choose_plan(request, to), open_tensors(destination, "compare"), progress)
    return replace(found, seconds=time.monotonic() - started)


def _verified(plan: Plan, held: Checkpoint, progress: bool) -> Verification:
    """What one direction or the other finds."""
    request = plan.request
    if not plan.to_right and plan.side is None and not request.quantize and _is_quantised(plan, held):
        return _decoded(plan, held, progress)
    check_direction(plan)
    return _written(plan, held, progress)


def _is_quantised(plan: Plan, held: Checkpoint) -> bool:
    """Whether a checkpoint stores in some format what would be written as it is."""
    plain = [name for name, dtype, _ in plan.entries if dtype in _FLOATS]
    if any(name in held.tensors and held.tensors[name].dtype not in _FLOATS for name in plain):
        return True
    if all(name in held.tensors for name in plain):
        return False
    # Some formats keep the payload under another name.
    others = held.tensors.keys() - {name for name, _, _ in plan.entries}
    with contextlib.suppress(ConversionError):  # for a shape that the map's first format cannot have
        return bool(others & plan.adapter.left_keys(quantization=True).keys())
    return False


def _mostly_fits(plan: Plan, held: Checkpoint) -> bool:
    """Whether most of what would be written is there in its dtype."""
    there = [name in held.tensors and held.tensors[name].dtype == dtype for name, dtype, _ in plan.entries]
    return 2 * sum(there) > len(there)


def _written(plan: Plan, held: Checkpoint, progress: bool) -> Verification:
    """Make the destination again, and compare."""
    request, adapter = plan.request, plan.adapter
    spelled = plan.side.spelled if plan.side is not None and plan.restored is not None else {}
    expected = list(outputs_of(plan, spelled))
    kept, side_problems = _kept(plan, held)
    with _checking(plan, held, expected, _entries(plan, kept), progress) as checker:
        if plan.to_right:
            _check_dropped(plan, kept)
        elif plan.side is not None:
            for name in plan.side.stored_names:
                checker.write(name, plan.side.stored(name))
    differences = Origins(plan, held).told(checker.differences)
    return Verification(
        source=request.checkpoint.path,
        destination=held.path,
        source_side=request.sides[not plan.to_right],
        target_side=request.sides[plan.to_right],
        is_decoded=False,
        missing=tuple(checker.missing),
        unknown=tuple(checker.unknown),
        differences=differences,
        kept_differences=tuple(kept.differences),
        kept_problems=(*side_problems, *_record_problems(plan, kept), *kept.problems),
        tensors_compared=checker.compared,
        bytes_compared=checker.bytes_compared,
        kept_compared=len(kept.taken) if kept.side is not None else None,
        not_compared=(*_untold(checker), *_not_kept(plan, kept), *_other_files(held)),
        hints=tuple(_hints(plan, differences)),
        edited=dict(adapter.complement.edited),
    )


def _decoded(plan: Plan, held: Checkpoint, progress: bool) -> Verification:
    """Decode the destination, and hold what comes out against the source."""
    request = plan.request
    config = request.config
    if config is None and held.config is None and plan.config_text is not None:
        config = parse_object(request.checkpoint.path, plan.config_text, "config", lenient=True)
    try:
        back = make_plan(replace(request, checkpoint=held, config=config), to_right=True)
    except MapError as problem:
        if _mostly_fits(plan, held):  # what is quantised may be what is wrong
            return _written(plan, held, progress)
        left, right = request.sides
        note = f"the source has no {SIDE_FILE}, so the destination was to be decoded from {left} to {right}"
        raise MapError(
            [replace(d, help="\n".join(filter(None, (d.help, note)))) for d in problem.diagnostics]
        ) from None
    if not back.formats:  # nothing there is decoded
        return _written(plan, held, progress)
    source = request.checkpoint
    with _checking(back, source, back.entries, Forgetful(), progress, is_reference=True) as checker:
        differences = Origins(back, source).told(checker.differences)
    told = f"the source has no {SIDE_FILE}: the destination was decoded and held against the source; its scales and "
    told += "codes may be others for the same values"
    dropped = [f"dropped by the map: {some_of(back.dropped)}"] if back.dropped else []
    return Verification(
        source=source.path,
        destination=held.path,
        source_side=request.sides[1],
        target_side=request.sides[0],
        is_decoded=True,
        # What decoding does not give, the destination lacks.
        missing=tuple(checker.missing),
        unknown=tuple(checker.unknown),
        differences=differences,
        kept_differences=(),
        kept_problems=(),
        tensors_compared=checker.compared,
        bytes_compared=checker.bytes_compared,
        kept_compared=None,
        not_compared=(told, *dropped, *_untold(checker), *_other_files(held)),
        hints=tuple(_hints(back, differences, is_decoded=True)),
    )


@contextlib.contextmanager
def _checking(
    plan: Plan,
    held: Checkpoint,
    expected: Iterable[Entry],
    entries: MutableMapping[str, Any],
    progress: bool,
    *,
    is_reference: bool = False,
) -> Iterator[Checker]:
    """Run a conversion into a checker; a bar runs beside."""
    checker = Checker(held, expected, is_reference=is_reference)
    try:
        with reporting("comparing", checker.nbytes, progress=progress) as meter:
            convert_tensors(plan, checker, entries, workers=torch.get_num_threads(), progress=meter)
            yield checker
    finally:
        checker.close()


def _check_dropped(plan: Plan, kept: KeptChecker) -> None:
    """What the map drops, as the side file keeps it."""
    state = Window(plan.request.checkpoint)
    for name in plan.dropped:
        kept.stored(name, state[name])
    state.close()
    kept.finish()


def _kept(plan: Plan, held: Checkpoint) -> tuple[KeptChecker, list[str]]:
    """What compares with the destination's side file, and what is wrong with that as a whole."""
    path = held.folder / SIDE_FILE
    if not plan.to_right or not plan.request.use_complement or not path.exists():
        return KeptChecker(None), []
    try:
        side = SideFile(path)
    except MapError as problem:
        return KeptChecker(None), [problem.diagnostics[0].message]
    if side.origin.map_hash != plan.request.map_hash:
        return KeptChecker(None), [f"it was made with another map, or another version of `{side.origin.map_name}`"]
    return KeptChecker(side), []


def _entries(plan: Plan, kept: KeptChecker) -> MutableMapping[str, Any]:
    if plan.to_right:
        return kept
    return plan.side if plan.side is not None else Forgetful()


def _record_problems(plan: Plan, kept: KeptChecker) -> Iterator[str]:
    """Where the side file's record of the source is not that of this one."""
    if kept.side is None:
        return
    origin, complement, source = kept.side.origin, plan.adapter.complement, plan.request.checkpoint
    headers = header_texts(source)
    for name in [name for name in {**headers, **origin.headers} if headers.get(name) != origin.headers.get(name)]:
        yield f"it has another header for {name} than the source"
    if origin.index_name is not None:
        path = source.folder / origin.index_name
        if not path.exists() or read_text(path, "index") != origin.index_text:
            yield f"it has another {origin.index_name} than the source"
    if origin.config_text != plan.config_text:
        yield "it has another config.json than the source"
    if set(origin.names) != {name for name, _, _ in plan.entries}:
        yield "it was made for other names"
    records = ("found", complement.found), ("spelled", complement.spelled), ("decoded", complement.decoded)
    for what, value in records:
        if getattr(kept.side, what) != value:
            yield f"its record `{what}` is not what reading the source finds"


def _untold(checker: Checker) -> Iterator[str]:
    for name, twin in checker.untold.items():
        yield f"{name}: it is tied to {twin}, which differs or is missing"


def _not_kept(plan: Plan, kept: KeptChecker) -> Iterator[str]:
    """What the decoded values and the side file do not tell."""
    if plan.to_right and kept.side is None:
        if count := len(plan.formats):
            yield f"what decoding loses of {count:,} tensors (scales, other codes for a value): no {SIDE_FILE}"
        if plan.dropped:
            yield f"dropped by the map: {some_of(plan.dropped)}"
    elif not plan.to_right and plan.side is None and plan.dropped:
        yield f"without a counterpart on the {plan.request.sides[0]} side: {some_of(plan.dropped)}"


def _other_files(held: Checkpoint) -> Iterator[str]:
    files = [name for name in held.other_files if name not in (SIDE_FILE, CHECKSUM_FILE)]
    files += ["config.json"] if held.config is not None else []
    if files:
        yield f"files without tensors: {some_of(files)}"


def _hints(plan: Plan, differences: Iterable[Difference], *, is_decoded: bool = False) -> Iterator[str]:
    """What may be meant where dtypes differ throughout, or values do."""
    asked = [d.expected if is_decoded else d.found for d in differences if d.kind == "dtype"]
    words = {form.split()[0] for form in asked}
    if plan.to_right and len(words) == 1 and (word := _WORDS.get(words.pop())):
        yield f"were tensors decoded to another dtype? --dtype {word}"
    if is_decoded and any(d.kind == "bytes" for d in differences):
        yield "was it quantised by `mapdsl convert --quantize`? then give --quantize here, too"
