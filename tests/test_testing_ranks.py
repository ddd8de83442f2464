"""The properties of ranks can each fail: what cuts, merges or converts shares is broken, and some property sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError
from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime import assembling, part_shares, place, resharding, shares
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.sharded_adapter import ShardedAdapter
from mapdsl.runtime.shares import Held, whole
from mapdsl.testing import Suite, properties_for, run, runner
from mapdsl.testing.rank_properties import RANK_PROPERTIES
from mapdsl.testing.runner import broken
from mapdsl.testing.shares import shared_out
from mapdsl.testing.suite import Example
from tests.test_resharding import GPT

CASES = Path(__file__).parent / "cases" / "testing"

TEXT = """map m: hf <-> native
param L = n
param h = heads
param V = vocab
index i < L
mesh pp shards i
mesh tp shards h, f, V
mesh ep shards y unevenly
codec fp8 = block_scaled(f8e4m3, block=2x2, scale="{key}_scale")
w.{i} [(3 h 2) d] <-> w.{local i} [(h 2 3) d]
emb [V d] <-> emb [pad(V, 2*size(tp)) d]
q [f d] as fp8 <-> q [f d] as fp8
y [y d] <-> y
"""


@pytest.fixture(scope="module")
def tested() -> Suite:
    return Suite(Map(Source("m.map", TEXT)))


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    """What was worked out with a broken function is not known to the next test."""
    for forget in (shares.assembly.cache_clear, part_shares.cut_parts.cache_clear):
        forget()
    yield
    for forget in (shares.assembly.cache_clear, part_shares.cut_parts.cache_clear):
        forget()


def failing(tested: Suite, names: Iterable[str] = tuple(RANK_PROPERTIES)) -> set[str]:
    """Those properties that one of a few examples breaks."""
    drawn = [tested.draw(f"ranks {number}") for number in range(8)]
    return {name for name in names if any(broken(example, name) for example in drawn)}


def test_what_is_right_breaks_nothing(tested: Suite) -> None:
    assert failing(tested) == set()
    assert set(RANK_PROPERTIES) < set(properties_for(tested))


# --- what is broken, and which properties see it ----------------------------------------------------------------------


def nested_from_the_first(outer: Held, inner: Held) -> Held:
    """As much as is held of an axis, from the first position on."""
    right = NESTED(outer, inner)
    if inner.is_whole:
        return right
    return Held(right.size, ((0, right.local_size),) if right.local_size else ())


def whole_scales(name: str, storage: Any, held: tuple[Held, ...]) -> dict[str, tuple[Held, ...]]:
    """Scales that every rank has all of."""
    found = HELD_PARTS(name, storage, held)
    return {role: part if role == "payload" else tuple(whole(one.size) for one in part) for role, part in found.items()}


def rounded_down(size: int, ranks: int, rank: int, how: Any = "evenly") -> Held | None:
    """Shares of what does not divide: the last positions belong to nobody."""
    return SHARE(size, ranks, rank, how) or SHARE(size // ranks * ranks, ranks, rank)


def more_at_the_end(size: int, ranks: int, rank: int, how: Any = "evenly") -> Held | None:
    """The last ranks have one more, not the first."""
    found = SHARE(size, ranks, ranks - 1 - rank, how)
    if how != "unevenly" or found is None:
        return SHARE(size, ranks, rank, how)
    return Held(size, tuple((size - end, size - begin) for begin, end in found.runs))


def through_blocks(storage: Any, held: Held, block: int) -> Held:
    """Blocks that two ranks share."""
    runs = tuple((begin // block, max(begin // block + 1, end // block)) for begin, end in held.runs)
    return Held(-(-held.size // block), runs)


def without_local_numbers(self: Any, held: range, positions: range) -> int:
    del self, held
    return positions.start


def padding_of_ones(shape: Iterable[int], **options: Any) -> Tensor:
    return torch.ones(tuple(shape), **options)


def first_rank_alone(self: Any, states: Any, ranks: Any, to: Any, rank: Any, *, side: str = "", compare: Any = True):
    """Over several ranks to several: rank 0 of the others for all of them."""
    own = dict.fromkeys(rank, 0) if ranks and to else rank
    return RESHARD(self, states, ranks, to, own, side=side, compare=compare)


def forgiving(self: Any, states: Any, ranks: Any, *, side: str = "", compare: bool = True) -> Any:
    """Overlooks tensors that no rule reads."""
    known = set.intersection(*({*state} for state in states)) if states else set()
    try:
        return MERGE(self, states, ranks, side=side, compare=compare)
    except ConversionError as err:
        if err.code != "R603":
            raise
        return MERGE(self, [{n: t for n, t in s.items() if n in known} for s in states], ranks, side=side)


def first_layers(self: Any, axis: str, positions: range) -> range:
    """Every rank of `pp` takes the first layers."""
    held = HELD(self, axis, positions)
    return held if axis != "i" else positions[: len(held)]


NESTED, HELD_PARTS, SHARE = shares.nested, part_shares.held_parts, shares.share
RESHARD, MERGE, HELD = ShardedAdapter.reshard, ShardedAdapter.merge, ShardedAdapter.held


@pytest.mark.parametrize(
    ("where", "name", "wrong", "seen_by"),
    [
        (shares, "nested", nested_from_the_first, {"split_and_merged", "rank_by_rank"}),
        (resharding, "held_parts", whole_scales, {"split_and_merged"}),
        (assembling, "same_bytes", lambda *_: None, {"ranks_agree"}),
        (place, "share", more_at_the_end, {"split_and_merged"}),
        (place, "share", rounded_down, {"cuts_refused"}),
        (part_shares, "_in_blocks", through_blocks, {"cuts_refused"}),
        (ShardedAdapter, "counted_from", without_local_numbers, {"split_and_merged"}),
        (ShardedAdapter, "reshard", first_rank_alone, {"resharded"}),
        (ShardedAdapter, "merge", forgiving, {"ranks_agree"}),
        (ShardedAdapter, "held", first_layers, {"split_and_merged"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_each_property_can_fail(
    tested: Suite, where: Any, name: str, wrong: Callable[..., Any], seen_by: set[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(where, name, wrong)
    assert failing(tested, seen_by) == seen_by


def test_padding_that_is_no_zeros(tested: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        """torch, but for `zeros`."""

        zeros = staticmethod(padding_of_ones)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(assembling, "torch", Torch())
    assert failing(tested, ["split_and_merged"])


def test_code_that_converts_a_share_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves shares is right, what converts them is not: `(h 2 3)` read as `(2 h 3)` where h is cut."""
    right, wrong = Map(Source("m.map", TEXT)), Map(Source("w.map", TEXT.replace("(h 2 3) d", "(2 h 3) d")))

    class Broken(right.adapter_class):  # type: ignore[name-defined, misc]
        def _to_right(self, take: Any, put: Any) -> None:
            cls = wrong.adapter_class if self.mesh_size("tp") > 1 else right.adapter_class
            cls._to_right(self, take, put)

    assert failing(Suite(right, Broken)) == {"rank_by_rank"}


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_failure_is_told_on_the_fewest_ranks(tested: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "nested", nested_from_the_first)
    monkeypatch.setattr(runner, "properties_for", lambda _: ["split_and_merged"])
    (failure,) = run(tested, examples=4, seed="ranks").failures
    assert failure.message.startswith("the left side over pp 1, tp 2, ep 1: rank pp 0, tp 0, ep 0: w.0: ")
    assert (failure.config["n"], failure.config["heads"]) == (1, 2)
    assert failure.title.startswith("Each rank holds what its axes say of the hf and of the native")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.map"
    path.write_text(TEXT)
    assert main(["test", str(path), "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^split_and_merged  holds       2 examples", out, re.M)
    monkeypatch.setattr(assembling, "same_bytes", lambda *_: None)
    assert main(["test", str(path), "--examples", "2"]) == 1
    out = capsys.readouterr().out
    assert "ranks_agree does not hold" in out
    assert "merging: expected R602 naming" in out


# --- what is drawn ----------------------------------------------------------------------------------------------------


def examples(tested: Suite, count: int) -> list[Example]:
    return [tested.draw(number) for number in range(count)]


def ranks_of(example: Example) -> set[tuple[int, ...]]:
    return {tuple(reading.ranks.values()) for reading in example.cuts.fine}


def test_sizes_divide_over_many_numbers_of_ranks(tested: Suite) -> None:
    found = set.union(*(ranks_of(example) for example in examples(tested, 30)))
    assert {(1, 8, 1), (4, 2, 1), (2, 2, 2), (3, 2, 1), (1, 1, 7), (1, 6, 1)} <= found


def test_sizes_do_not_divide_too(tested: Suite) -> None:
    drawn = examples(tested, 10)
    uneven = [problem for e in drawn for reading in e.cuts.readings for problem in e.cuts.uneven(reading, "left")]
    assert {problem.axis for problem in uneven} == {"i", "h", "f"}
    assert any(e.cuts.cut_blocks(reading, "left") for e in drawn for reading in e.cuts.fine)


def test_copies_and_other_shares() -> None:
    def numbers(shared: list[Tensor] | None) -> list[list[int]] | None:
        return None if shared is None else [one.tolist() for one in shared]

    assert numbers(shared_out(5, 3, "unevenly")) == [[0, 1], [2, 3], [4]]
    assert numbers(shared_out(5, 4, "by ceil")) == [[0, 1], [2, 3], [4], []]
    assert numbers(shared_out(2, 4, "or copies")) == [[0], [0], [1], [1]]
    assert shared_out(2, 3, "or copies") is None
    assert shared_out(6, 4, "evenly") is None


def test_the_map_of_the_tests_of_resharding() -> None:
    text = GPT if GPT.lstrip().startswith("map ") else f"map m: hf <-> native\n{GPT}"
    report = run(Suite(Map(Source("gpt.map", text))), examples=3, seed="gpt")
    assert not report.failures, report.failures[0].text("gpt.map")


def test_guards_that_give_ranks_other_tensors_than_the_whole() -> None:
    """Over such numbers of ranks a state is not the whole, cut: they are left out, others are tested."""
    text = "map m: a <-> b\nparam L = n\nindex i < L\nmesh pp shards i\nmesh tp shards h\n"
    text += "u.{i} [h d] <-> u.{local i}\nx [d] <-> x where rank(pp) == size(pp) - 1\n"
    text += "y [d] <-> y where size(pp) == 1\nz [d] <-> z where size(pp) > 1 and rank(pp) == 0\n"
    tested = Suite(Map(Source("m.map", text)))
    found = set.union(*(ranks_of(example) for example in examples(tested, 10)))
    assert {pp for pp, _ in found} == {1}
    assert {tp for _, tp in found} > {1, 2}


def test_a_pad_to_nothing() -> None:
    text = "map m: a <-> b\nparam V = v\nparam k = multiple\nmesh tp shards V\nu [pad(V, k*size(tp)) d] <-> u [V d]\n"
    tested = Suite(Map(Source("m.map", text)))
    with pytest.raises(MapError, match="cannot be padded to a multiple of 0"):
        tested.example({"v": 3, "multiple": 0}, 0)
    assert not run(tested, examples=3).failures


def test_the_names_of_a_map_with_guards_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    params = ["L=1", "h=2", "g=2", "c=2", "r=1", "V=3", "E=1"]
    words = [word for param in params for word in ("--param", param)]
    assert main(["keys", str(CASES / "ranks.map"), "--side", "native", *words]) == 0
    assert "word.weight ? 4,?\n" in capsys.readouterr().out
