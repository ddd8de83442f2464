"""`convert --verify` with maps that make tensors, or that do not keep all bytes."""

from __future__ import annotations

import pytest
import torch
from conversions import assert_same_files, only, renames, write_state
from spoiling import state_of
from wrong_writing import spoil_writing

import mapdsl
from mapdsl.language.diagnostics import MapError

ONE_SIDED = """\
map sided: old <-> new
param N = n
index i < N
{i}.a <-> layer.{i}.a
top   <-> head
_ <-> head.twin [v] = head
_ <-> ones [4] = 1
_ <-> zeros [3] ~ 0
old.{..} -> _ else
"""


def test_what_the_map_makes_is_compared(tmp_path):
    file = tmp_path / "sided.map"
    file.write_text(ONE_SIDED)
    _, old = renames(tmp_path)
    state = state_of(old) | {"old.step": torch.arange(3)}
    source = write_state(tmp_path / "source", state, {"n": 3})
    done = mapdsl.convert(source, tmp_path / "there", file, verify=True)
    assert done.verified.tensors == 4
    assert (done.verified.tensors_again, done.verified.reason) == (4, "the way back does not give them")
    assert done.verified.not_compared == ()
    back = mapdsl.convert(tmp_path / "there", tmp_path / "back", file, verify=True)
    assert_same_files(tmp_path / "back", source)
    assert back.verified.tensors_again == 0


@pytest.mark.parametrize("name", ["ones", "zeros", "head.twin"])
def test_what_the_map_makes_is_written_wrongly(tmp_path, monkeypatch, name):
    file = tmp_path / "sided.map"
    file.write_text(ONE_SIDED)
    _, old = renames(tmp_path)
    spoil_writing(monkeypatch, name)
    with pytest.raises(MapError) as caught:
        mapdsl.convert(old, tmp_path / "there", file, verify=True)
    found = only(caught.value)
    assert found.code == "R601"
    assert name in found.message
    assert not (tmp_path / "there").exists()


ROUNDED = """\
map rounded: old <-> new
a [x y] <-> b [x y] as bf16
c [x y] <-> d [y x]
"""


@pytest.mark.parametrize("spoiled", [None, "b", "d"])
def test_bytes_that_the_map_does_not_promise_are_no_difference(tmp_path, monkeypatch, spoiled):
    file = tmp_path / "rounded.map"
    file.write_text(ROUNDED)
    source = write_state(tmp_path / "source", {"a": torch.randn(4, 6), "c": torch.randn(4, 6)}, {})
    if spoiled is not None:
        spoil_writing(monkeypatch, spoiled)
        with pytest.raises(MapError, match="R601"):
            mapdsl.convert(source, tmp_path / "there", file, to="new", verify=True)
        return
    done = mapdsl.convert(source, tmp_path / "there", file, to="new", verify=True)
    assert (done.verified.tensors_again, done.verified.reason) == (1, "the way back does not give them")
