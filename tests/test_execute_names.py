"""Names of all kinds, in states, configs, paths and comments: they stay names and never become code."""

from __future__ import annotations

import pytest
import torch

from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.names import Wide, captures
from tests.helpers.execution import assert_same, map_of
from tests.test_execute_errors import refused

ZEROS = torch.zeros

NASTY = [
    '"',
    "'",
    "\\",
    "\n",
    "{x}",
    "{",
    "}",
    '""" + 1 + """',
    "a.b\\'",
    "\u202e",
    "\x00",
    "é",
    "a b",
    "#",
    "x" * 10**6,
]


@pytest.mark.parametrize("name", NASTY, ids=lambda n: ascii(n)[:12])
def test_nasty_names_are_only_names(name: str) -> None:
    text = "a <-> b\nw.{..} <-> v.{..} else\n"
    adapter = map_of(text).adapter({name: 1})
    state = {"a": ZEROS(1), f"w.{name}": ZEROS(2)}
    found = adapter.read(state)
    assert set(found) == {"b", f"v.{name}"}
    assert_same(adapter.write(found), state, "back")
    with pytest.raises(ConversionError) as caught:
        adapter.read(state | {name: ZEROS(1)})
    assert caught.value.code == "R603"


@pytest.mark.parametrize("path", ['"""\nraise SystemExit\n"""', "a\\", 'x"', "line\nbreak.map", "\u202etxt.map"])
def test_the_path_of_a_map_is_no_code(path: str) -> None:
    source = map_of("a <-> b\n", path).compile()
    compile(source, "x", "exec")
    assert set(map_of("a <-> b\n", path).adapter({}).read({"a": ZEROS(1)})) == {"b"}
    assert "\nraise" not in source


def test_comments_of_a_map_are_no_code() -> None:
    text = 'a # """ + quit() \n  <-> b # raise SystemExit\nparam k\nc <-> d where k == "# \'"  # end\n'
    source = map_of(text).compile()
    assert set(map_of(text).adapter({"k": "# '"}).read({"a": ZEROS(1), "c": ZEROS(1)})) == {"b", "d"}
    assert "raise" not in source
    assert "quit" not in source


def test_huge_numbers_in_names_are_no_numbers() -> None:
    text = "param M\nindex x >= M\nmtp.{x}.{..} -> _ else\na <-> b\n"
    adapter = map_of(text).adapter({"M": 1})
    assert set(adapter.read({"a": ZEROS(1), "mtp.7.w": ZEROS(1)})) == {"b"}
    assert refused(text, {"M": 1}, left={"a": ZEROS(1), f"mtp.{'9' * 5000}.w": ZEROS(1)}).code == "R603"
    assert refused(text, {"M": 1}, left={"a": ZEROS(1), "mtp.07.w": ZEROS(1)}).code == "R603"


def test_numbers_in_names_are_canonical() -> None:
    assert captures("a.#.w", "a.7.w") == ("7",)
    assert captures("a.#.w", "a.0.w") == ("0",)
    assert captures("a.#.w", "a.07.w") is None
    assert captures("a.#.w", "a..w") is None
    assert captures("a.#b.**", "a.12b.c.d") == ("12", "c.d")
    assert captures("a.#.w", "a.\u0667.w") is None
    assert "a.7.w" in Wide("a.#.w", range(5, 9))
    assert "a.4.w" not in Wide("a.#.w", range(5, 9))


def test_reserved_names_are_those_of_the_adapter() -> None:
    from mapdsl.emit.reserved import ADAPTER_NAMES
    from mapdsl.runtime.sharded_adapter import ShardedAdapter

    made = type("Made", (ShardedAdapter,), {"set_params": lambda self, config: None})({})
    assert {name for name in dir(made) if not name.startswith("_")} == ADAPTER_NAMES
