"""Random rules: those that obey the law of shapes run as the reference says, others are refused."""

from __future__ import annotations

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mapdsl.language.diagnostics import MapError
from tests.helpers.execution import LEFT, RIGHT, assert_same, drawn, map_of
from tests.helpers.random_rules import CONFIG, FREE, RandomRule, broken, joins, moves
from tests.helpers.reference import Reference

QUIET = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@QUIET
@given(st.one_of(moves(), joins()))
def test_random_rules_run_as_the_reference_says(rule: RandomRule) -> None:
    map_ = map_of(rule.text())
    errors = [found for found in map_.check() if found.code[0] != "L"]
    # A size that does not follow in one direction is an honest refusal; nothing else may be wrong with these.
    assert all(found.code == "X304" for found in errors), (rule.text(), errors)
    assume(not errors)
    adapter, reference = map_.adapter(CONFIG), Reference(map_.checked, CONFIG)
    run = {"free": FREE}
    left = drawn(reference, LEFT, run)
    right = adapter.read(left)
    assert_same(right, reference.to_right(left), "reading")
    assert_same(adapter.write(right), left, "and back")
    right = drawn(reference, RIGHT, run)
    left = adapter.write(right)
    assert_same(left, reference.to_left(right), "writing")
    assert_same(adapter.read(left), right, "and back")


@QUIET
@given(broken())
def test_rules_that_break_the_law_are_refused(broken_rule: tuple[RandomRule, str]) -> None:
    rule, what = broken_rule
    try:
        accepted = map_of(rule.text()).checked
    except MapError as err:
        codes = {found.code for found in err.diagnostics}
        assert codes & {"X301", "X302", "X303"}, (rule.text(), what, codes)
    else:
        raise AssertionError(f"accepted {accepted.map.rules}, although an axis was {what}: {rule.text()}")
