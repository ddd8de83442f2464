"""Maps that try to hide a collision, or to look as if they had one, held against counting under small configs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mapdsl.compiler.expand import param_values
from mapdsl.language.diagnostics import Diagnostic, MapError
from mapdsl.language.source import Source
from mapdsl.map import Map
from mapdsl.runtime.errors import ConversionError
from tests.helpers.counting import repeated_names

CASES = Path(__file__).parent / "cases" / "check"
DOMAINS: dict[str, list[Any]] = {
    "few": list(range(4)),
    "many": list(range(14)),
    "lists": [list(items) for length in range(4) for items in itertools.product((0, 1, 2), repeat=length)],
    "kinds": [list(items) for length in range(4) for items in itertools.product("ab", repeat=length)],
}


class Case(NamedTuple):
    title: str
    text: str
    domains: dict[str, list[Any]]


def read(file: str) -> list[Any]:
    """The maps of a case file with the values that each field of their configs may have."""
    found = []
    for part in (CASES / file).read_text(encoding="utf-8").split("\n=== ")[1:]:
        head, _, text = part.partition("\n")
        title, *domains = head.split(" | ")
        fields = dict(domain.split(": ", 1) for domain in domains)
        values = {name: DOMAINS[v] if v in DOMAINS else json.loads(v) for name, v in fields.items()}
        found.append(pytest.param(Case(title, f"map m: hf <-> native\n{text.rstrip()}\n", values), id=title))
    return found


def findings(text: str) -> list[Diagnostic]:
    return [found for found in Map(Source("test.map", text)).check() if found.severity != "lint"]


@pytest.mark.parametrize("case", read("accepted.case"))
def test_what_is_accepted_has_no_name_twice(case: Case) -> None:
    assert findings(case.text) == []
    assert repeated_names(case.text, case.domains) == {}


@pytest.mark.parametrize("case", read("refused.case"))
def test_what_is_refused_has_the_name_of_the_witness_twice(case: Case) -> None:
    code = case.title.split()[0]
    found = [finding for finding in findings(case.text) if finding.code == code]
    assert found, [str(finding) for finding in findings(case.text)]
    assert found[0].witness.rpartition(": ")[2] in repeated_names(case.text, case.domains)


def test_every_accepted_map_is_counted_under_some_config() -> None:
    """Fields left out of a case would make its configs all refused, and the count say nothing."""
    empty = [
        case.values[0].title
        for case in read("accepted.case")
        if not repeated_names(case.values[0].text + "twice <-> one\ntwice <-> two\n", case.values[0].domains)
    ]
    assert empty == []


# --- what cannot be counted: wildcards, legacy spellings, numbers that no name holds --------------------------------

SCALED = 'codec c = block_scaled(f8e4m3, block=1x32, payload="{key}_p", scale="{key}_s")\n'


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("param n\nparam L\nindex n - 2 <= j < L\na.{j} <-> b.{j}\n", "K205", "this hole can be negative"),
        ("param L\nindex i < L\na.{2-i} <-> b.{i}\n", "K205", "this hole can be negative"),
        (
            "param T = [2, 2]\nindex a < 2\na.{T[a]} <-> b.{a}\n",
            "K205",
            "the index table `T` holds 2 twice, so two tensors would have one name",
        ),
        (
            SCALED.replace("{key}_s", "{key}1") + "param L\nindex i < L\nx.{i} [a b] as c <-> y.{i} [a b]\n",
            "K203",
            "in the companion `{key}1` a hole touches another number, so the name can be read in two ways",
        ),
        (
            SCALED + "a.{n:*} [x y] as c <-> b.{n:*} [x y]\na.w_s <-> q\n",
            "D402",
            "a companion of `c` collides with another name",
        ),
        (
            SCALED + "a.{n:*} [x y] as c|raw <-> b.{n:*} [x y]\n",
            "D402",
            "a companion of one tensor may be called as another tensor of this rule",
        ),
        (
            SCALED.replace("{key}_s", "{stem}.s") + "a.{n:*} [x y] as c <-> b.{n:*} [x y]\n",
            "D402",
            "several tensors share the companion `{stem}.s`",
        ),
        (
            "param L\nindex i < L\na.{i} <-> b.{i}\naccept old for a.{i}\n",
            "X301",
            "`i` stands in the new spelling only",
        ),
        ("param L\nindex i < L\na <-> b\naccept old.{i} for a\n", "X301", "`i` stands in the old spelling only"),
        (
            SCALED + "x.w [a b] as c <-> y.w [a b]\nz.w_s <-> q\naccept z.w for x.w\n",
            "K201",
            "an accepted spelling is read by another rule too",
        ),
        (
            "param P\nparam L\nindex i < L\na.{i} <-> b.{i} where i % P == 9 and i < 9\naccept old.{i} for a.{i}\n"
            "old.{i} <-> c.{i} where i % P == 9 and i < 9\n",
            "K290",
            "is an accepted spelling read by another rule too? ",
        ),
        (  # two rules meet only where the index table holds 0 twice, which is refused when the config is read
            "param X = t\nparam A = positions(X, 0)\nparam B = t\nindex a < len(A)\nindex b < len(B)\n"
            "x.{B[b]} <-> y.{b}\nx.{A[a]} <-> z.{a} where a not in B\n",
            "K290",
            "two rules read the same tensor? ",
        ),
    ],
)
def test_refused(text: str, code: str, message: str) -> None:
    found = findings(f"map m: hf <-> native\n{text}")
    assert any(finding.code == code and finding.message.startswith(message) for finding in found), found


def test_wildcards_with_text_around_them_are_kept_apart() -> None:
    text = f"map m: hf <-> native\n{SCALED}a.{{n:*}} [x y] as c <-> b.{{n:*}} [x y]\na.w_q <-> q\na.p <-> r\n"
    assert findings(text) == []


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("param r\na <-> b where r < 1\n", {"r": 0.5}, "`r` holds 0.5, where the map counts or compares"),
        ("param r\nindex i < len(r)\na.{i} <-> b.{i} where r[i] < 1\n", {"r": [0.5]}, "`r` holds 0.5"),
        ("param A = n + off\nindex i < A\na.{i} <-> b.{i}\n", {"n": 3, "off": -1}, "`off` is -1; expected an integer"),
        ("param T\nindex i < len(T)\na.{T[i]} <-> b.{i}\n", {"T": [1, 1]}, "`T` holds 1 twice"),
        ("param T\nindex i < len(T)\na.{T[i]} <-> b.{i}\n", {"T": [-1]}, "`T` holds -1, but is an index table"),
    ],
)
def test_configs_that_no_proof_speaks_of_are_refused(text: str, fields: dict[str, Any], message: str) -> None:
    loaded = Map(Source("test.map", f"map m: hf <-> native\n{text}"))
    with pytest.raises(MapError) as caught:
        param_values(loaded.checked, fields, {})
    assert message in caught.value.diagnostics[0].message
    with pytest.raises(ConversionError):
        loaded.adapter(fields).to_hf({})
