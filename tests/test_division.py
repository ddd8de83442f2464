"""How units are shared out among ranks."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

import mapdsl
from mapdsl.checkpoint.division import PAGE_BYTES, Division, divide
from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.options import checked_plan, make_request, planned_layout
from mapdsl.checkpoint.passes import Plan
from mapdsl.checkpoint.sources import open_tensors
from mapdsl.demo import small_config, write_release

Planned = tuple[Plan, list[FileLayout]]


@pytest.fixture(scope="module", params=["there", "back"])
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("division")
    write_release(folder / "there", small_config())
    mapdsl.convert(folder / "there", folder / "back", "deepseek_v4")
    plan = checked_plan(make_request("deepseek_v4", open_tensors(folder / request.param)), None)
    return plan, planned_layout(plan, 2_000_000)


def weights(plan: Plan) -> list[int]:
    stored = plan.request.checkpoint.tensors
    return [
        sum(stored[s].nbytes for s in sources) + sum(map(plan.nbytes, outs)) for sources, outs in plan.units.members()
    ]


def pages(plan: Plan, layout: list[FileLayout], units: tuple[int, ...]) -> set[tuple[str, int]]:
    """All pages that a rank writes to."""
    wanted = {plan.name_of(name) for name, unit in plan.units.of_output.items() if unit in units}
    return {
        (file.name, page)
        for file in layout
        for tensor in file.tensors
        if tensor.name in wanted and tensor.nbytes
        for page in range(tensor.begin // PAGE_BYTES, (tensor.end - 1) // PAGE_BYTES + 1)
    }


@pytest.mark.parametrize("count", [1, 2, 5, 400])
def test_every_unit_has_one_rank_and_ranks_have_alike(planned: Planned, count: int) -> None:
    plan, layout = planned
    found = divide(plan, layout, set(), ["a"] * count)
    assert len(found.parts) == count and not found.last
    assert sorted(unit for part in found.parts for unit in part) == list(range(plan.units.count))
    sizes = [sum(weights(plan)[unit] + 1 for unit in part) for part in found.parts]
    share, largest = (sum(weights(plan)) + plan.units.count) / count, max(weights(plan)) + 1
    assert all(share - largest <= size <= share + largest for size in sizes)


def test_what_is_done_is_nobodys(planned: Planned) -> None:
    plan, layout = planned
    done = set(range(0, plan.units.count, 3))
    found = divide(plan, layout, done, ["a", "b"])
    assert {*found.parts[0], *found.parts[1], *found.last} == set(range(plan.units.count)) - done
    everything = divide(plan, layout, set(range(plan.units.count)), ["a", "b"])
    assert everything == Division(((), ()))


@pytest.mark.parametrize("nodes", [["a", "b"], ["a", "b", "a", "c"], ["a", "a", "b", "b", "c"]])
def test_machines_share_no_page_until_all_others_are_done(planned: Planned, nodes: list[str]) -> None:
    plan, layout = planned
    found = divide(plan, layout, set(), nodes)
    of_node: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for node, part in zip(nodes, found.parts, strict=True):
        of_node[node] |= pages(plan, layout, part)
    assert sum(map(bool, found.parts)) > 1
    assert sum(map(len, of_node.values())) == len(set.union(*of_node.values()))
    assert found.last and sorted([*found.last, *(u for part in found.parts for u in part)]) == list(
        range(plan.units.count)
    )


def test_ranks_of_one_machine_work_side_by_side(planned: Planned) -> None:
    plan, layout = planned
    found = divide(plan, layout, set(), ["a", "a", "a"])
    order = {tensor.name: place for place, tensor in enumerate(t for file in layout for t in file.tensors)}
    outputs = plan.units.members()
    firsts = [[min(order[plan.name_of(name)] for name in outputs[unit][1]) for unit in part] for part in found.parts]
    assert all(max(one) < min(other) for one, other in pairwise(firsts))
