"""`convert --verify` leaves nothing out: what comes back otherwise, or not at all, is compared in another way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MAP, assert_same_files, only, renames, write_state, write_tiny
from wrong_writing import flip_byte, refused, spoil_writing, stop_after

import mapdsl
from mapdsl.checkpoint import attendants, convert, engine, memory
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.following import Follower
from mapdsl.checkpoint.journal import partial_folder
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.sharing import Means
from mapdsl.language.diagnostics import MapError

DECODED = "model.layers.0.self_attn.wq_a.weight"


@pytest.fixture(scope="module")
def without_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, `source`, of which the map drops some tensors, and the model that it converts to, `there`."""
    folder = tmp_path_factory.mktemp("dropping")
    source = write_tiny(folder / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    mapdsl.convert(source, folder / "there", MAP)
    return folder


def test_what_was_dropped_once_is_held_against_the_side_file(without_mtp, tmp_path):
    dropped = [name for name in open_checkpoint(without_mtp / "source").tensors if name.startswith("mtp.")]
    done = mapdsl.convert(without_mtp / "there", tmp_path / "back", MAP, verify=True)
    assert_same_files(tmp_path / "back", without_mtp / "source")
    assert done.verified.kept == len(dropped) > 0


@pytest.mark.parametrize("name", ["mtp.0.attn.wq_a.weight", "mtp.0.attn.wq_a.scale", "mtp.0.norm.weight"])
def test_what_was_dropped_once_is_written_wrongly(without_mtp, tmp_path, monkeypatch, name):
    spoil_writing(monkeypatch, name)
    found = refused(without_mtp / "there", tmp_path / "back")
    assert (found.code, f"`{name}[" in found.message) == ("R601", True)


@pytest.mark.parametrize("is_spoiled", [False, True])
def test_what_an_earlier_run_has_kept_nothing_of(without_mtp, tmp_path, monkeypatch, is_spoiled):
    bare: dict[str, Any] = {"use_complement": False}
    with monkeypatch.context() as patched:
        stop_after(patched, 40)
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(without_mtp / "source", tmp_path / "there", MAP, workers=1, **bare)
    if is_spoiled:
        stored = open_checkpoint(without_mtp / "there").tensors[DECODED]
        flip_byte(partial_folder(tmp_path / "there") / stored.file.name, stored.begin)
        found = refused(without_mtp / "source", tmp_path / "there", resume=True, **bare)
        assert (found.code, f"`{DECODED}[0, 0]`" in found.message) == ("R601", True)
        return
    done = mapdsl.convert(without_mtp / "source", tmp_path / "there", MAP, resume=True, verify=True, **bare)
    assert done.verified.tensors_again > 0
    assert done.verified.reason == "an earlier run has kept nothing of them"
    # The rest of the source comes back: of each tensor that was converted again there are two, or more.
    assert done.verified.tensors + 2 * done.verified.tensors_again <= done.tensors_read - len(done.dropped)


# --- names that the way back does not give ----------------------------------------------------------------------------

LEGACY = """\
map renames: old <-> new
param N = n
index i < N
accept {i}.gamma for {i}.a
{i}.a <-> layer.{i}.a [x y]
top   <-> head
"""


@pytest.mark.parametrize("spoiled", [None, "layer.1.a"])
def test_legacy_names_that_nobody_keeps(tmp_path, monkeypatch, spoiled):
    monkeypatch.setattr(convert, "_keeps_for_now", lambda *_: False)  # as with several ranks
    file = tmp_path / "legacy.map"
    file.write_text(LEGACY)
    state = {f"{i}.gamma": torch.randn(3, 4) for i in range(3)} | {"top": torch.arange(5)}
    source = write_state(tmp_path / "source", state, {"n": 3})
    options: dict[str, Any] = {"verify": True, "use_complement": False}
    if spoiled is not None:
        spoil_writing(monkeypatch, spoiled)
        with pytest.raises(MapError, match=r"layer.1.a.*converted again it is"):
            mapdsl.convert(source, tmp_path / "there", file, **options)
        return
    done = mapdsl.convert(source, tmp_path / "there", file, **options)
    assert (done.verified.tensors, done.verified.tensors_again) == (1, 3)
    assert done.verified.reason == "the way back does not give them"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_needs_more_than_half_of_the_memory_is_compared_in_the_end(without_mtp, tmp_path, monkeypatch):
    taken: list[Means] = []
    start = Follower.__init__

    def noted(self: Follower, plan: Plan, layout: Any, journal: Any, kept: Any, means: Means, **rest: Any) -> None:
        taken.append(means)
        start(self, plan, layout, journal, kept, means, **rest)

    monkeypatch.setattr(attendants.Follower, "__init__", noted)
    largest = max(memory.held_bytes(mapdsl_plan(without_mtp / "source")))
    for size in (largest, 2 * largest - 1, 2 * largest):
        done = mapdsl.convert(without_mtp / "source", tmp_path / str(size), MAP, verify=True, memory=size)
        assert done.verified.tensors == done.tensors_read - len(done.dropped)
    assert [(means.memory, means.is_last) for means in taken] == [
        (largest, True),
        (2 * largest - 1, True),
        (largest, False),
    ]


def mapdsl_plan(source: Path) -> Plan:
    """The plan of a conversion to the right side."""
    from mapdsl.checkpoint.options import make_request
    from mapdsl.checkpoint.passes import make_plan
    from mapdsl.checkpoint.sources import open_tensors

    request = make_request(
        MAP,
        open_tensors(source),
        dtype=None,
        quantize=False,
        params=None,
        config=None,
        use_complement=True,
        format="safetensors",
    )
    return make_plan(request, to_right=True)


def test_a_way_back_that_needs_more_memory_is_not_gone(tmp_path, monkeypatch):
    file, source = renames(tmp_path)
    monkeypatch.setattr("mapdsl.checkpoint.following.held_bytes", lambda back: [0, 2**60, 0, 0])
    done = mapdsl.convert(source, tmp_path / "there", file, verify=True)
    assert (done.verified.tensors, done.verified.tensors_again) == (3, 1)
    assert done.verified.reason == "the way back needs more memory than there is for it"


# --- units that do not end --------------------------------------------------------------------------------------------


def test_a_unit_that_does_not_end_is_no_reason_to_wait(tmp_path, monkeypatch):
    """A bug of mapdsl, if it comes: an error then, where what follows the conversion would wait for ever."""
    file, source = renames(tmp_path)
    members = engine._Run.__init__

    def longer(self: Any, plan: Plan, *rest: Any) -> None:
        members(self, plan, *rest)
        sources, outputs = self.members[0]
        self.members = [([*sources, "never asked for"], outputs), *self.members[1:]]

    monkeypatch.setattr(engine._Run, "__init__", longer)
    monkeypatch.setattr(engine._Worker, "_progress_of", lambda self, *_: UNHEARD)
    with pytest.raises(AssertionError, match="did not come to an end"):
        mapdsl.convert(source, tmp_path / "there", file, verify=True)
    assert not (tmp_path / "there").exists()


class _Unheard:
    def read(self, name: str) -> None:
        """Nobody listens."""

    def finish(self) -> None:
        """Nor here."""


UNHEARD = _Unheard()


# --- journals that no run has written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"unit": 10**6},
        {"unit": -1},
        {"unit": "0"},
        {"unit": None},
        {"edited": []},
        {"edited": {"a": None}},
        {"kept": None},
        {"kept": [["a", "{", 0, []]]},
        {"kept": [["a", "{}", 0, [[3, "a|codes", 0, "U8", [1], 0, 1]]]]},
        {"kept": [["a", "{}", 0, [[8, "a|codes", "../../x", "U8", [1], 0, 1]]]]},
        {"kept": [["a", "{}", 0, [[8, "a|codes", 0, "U8", [1], -9, 1]]]]},
    ],
)
def test_a_record_that_cannot_be_understood(without_mtp, tmp_path, monkeypatch, change: Mapping[str, Any]):
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(without_mtp / "source", tmp_path / "there", MAP)
    hidden = tmp_path / ".there.partial"
    journal = hidden / ".mapdsl.journal"
    first, *records = journal.read_text().splitlines()
    records[0] = json.dumps(json.loads(records[0]) | change)
    journal.write_text("\n".join([first, *records]) + "\n")
    with pytest.raises(MapError) as caught:
        mapdsl.convert(without_mtp / "source", tmp_path / "there", MAP, resume=True)
    found = only(caught.value)
    assert (found.code, found.subject) == ("C507", str(journal))
    assert "cannot be understood" in found.message
    assert found.help == "start anew: leave out --resume"
    assert not hidden.exists()
