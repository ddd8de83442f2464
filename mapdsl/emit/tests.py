"""The property tests of one map as a pytest file: what fills `codegen/tests.py.jinja`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mapdsl.compiler.check import Checked
from mapdsl.compiler.fields import Field, fields_of
from mapdsl.emit.adapter import environment
from mapdsl.emit.expressions import quoted
from mapdsl.emit.layout import Bracketed, Code, call, lines
from mapdsl.emit.params import file_name
from mapdsl.resources import shipped_maps

# Sizes of axes: distinct primes show a transpose; packed formats need even ones.
_SIZES = (2, 3, 5, 7)
_EVEN_SIZES = (2, 4, 6, 8)
# Sizes, in multiples of blocks, of axes that ranks share: most numbers of ranks divide some of them.
_SHARED_SIZES = (1, 2, 4, 6)


def tests_source(
    checked: Checked,
    test_path: str | os.PathLike[str] = "tests.py",
    adapter_path: str | os.PathLike[str] | None = None,
    command: str = "mapdsl compile --tests",
) -> str:
    """The source of a test file that is to stand at `test_path`.

    It tests the adapter module at `adapter_path`; where none is given, the map is compiled anew whenever it runs.
    """
    resolved = checked.map
    folder = Path(os.path.abspath(test_path)).parent
    places = [_map_place(resolved.file.source.path, folder)]
    places += [_place(adapter_path, folder)] if adapter_path is not None else []
    fields = fields_of(checked)
    items: list[Code] = [
        _entry(path, _strategy(field, fields.reach, fields.packs)) for path, field in fields.of.items()
    ]
    configs = call("st.fixed_dictionaries", Bracketed("", items, brackets="{}"))
    text = (
        environment()
        .get_template("tests.py.jinja")
        .render(
            name=resolved.name,
            left=resolved.left,
            right=resolved.right,
            source=file_name(resolved.file.source.path),
            digest=hashlib.sha256(resolved.file.source.text.encode()).hexdigest()[:16],
            command=command,
            has_ranks=bool(resolved.meshes),
            uses_here=any("HERE" in place for place in places),
            suite=lines(call("load_suite", *places), 0, before="SUITE = "),
            configs=lines(configs, 0, before="CONFIGS = "),
        )
    )
    return text.rstrip("\n") + "\n"


def _map_place(path: str, folder: Path) -> str:
    """Code that names the map: a shipped one by its name, another by its path from the test file."""
    for name, place in shipped_maps().items():
        if os.path.realpath(place) == os.path.realpath(path):
            return quoted(name)
    return _place(path, folder)


def _place(path: str | os.PathLike[str], folder: Path) -> str:
    target = os.path.abspath(path)
    try:
        return f"HERE / {quoted(Path(os.path.relpath(target, folder)).as_posix())}"
    except ValueError:  # another drive
        return f"Path({quoted(target)})"


def _entry(path: str, strategy: Code) -> Code:
    if isinstance(strategy, str):
        return f"{quoted(path)}: {strategy}"
    return Bracketed(f"{quoted(path)}: {strategy.before}", strategy.items, strategy.after, strategy.brackets)


def _strategy(field: Field, reach: int, packs: bool) -> Code:
    """A Hypothesis strategy for the values of a field; `reach` is the largest count worth drawing."""
    if field.kind == "list":
        strategy: Code = _list(field, reach, packs)
    else:
        strategy = _scalar(field, reach, packs)
    if not field.optional:
        return strategy
    return call("st.one_of", "st.none()", strategy)


def _scalar(field: Field, reach: int, packs: bool) -> Code:
    if field.kind == "bool":
        return "st.booleans()"
    if field.kind == "str":
        return _sampled([*field.literals, "other"])
    if field.kind == "number":
        return _sampled([10000.0, 500000])
    if field.bounds_index:
        return _sampled([0, 1, 2, 4]) if field.is_cut else f"st.integers(0, {reach})"
    if field.is_cut:
        return _sampled([field.multiple * size for size in _SHARED_SIZES])
    near = sorted({n for literal in field.literals for n in (literal - 1, literal, literal + 1) if n >= 0})
    if field.is_divisor or field.is_divided:
        return _sampled([1, 2, 4] if field.is_divisor else [4, 8, 12])
    if field.is_size or field.is_factor:
        return _sampled([*(_EVEN_SIZES if packs else _SIZES), *near])
    return _sampled(sorted({0, 1, 2, *near})) if near else "st.integers(0, 6)"


def _list(field: Field, reach: int, packs: bool) -> Code:
    element = field.items()
    longest = 3 * reach + 2
    if field.distinct:
        numbers = f"st.integers(0, {2 * longest})"
        return call("st.lists", numbers, *_length(field, reach, longest), "unique=True")
    if element.kind == "list":
        inner = _list(element, reach, packs)
    elif element.bounds_index or not element.literals:
        inner = _scalar(element, min(reach, 3), packs)
    else:
        others: list[object] = (
            ["other"] if element.kind == "str" else [0, 1] if element.kind == "int" else [True, False]
        )
        inner = _sampled(list(dict.fromkeys([*element.literals, *others])))
    return call("st.lists", inner, *_length(field, reach, longest))


def _length(field: Field, reach: int, longest: int) -> list[Code]:
    """The length: one that matters is drawn, another is long enough for every lookup."""
    return [f"max_size={reach}"] if field.measured else [f"min_size={longest}", f"max_size={longest}"]


def _sampled(values: list[object]) -> Code:
    words = [quoted(value) if isinstance(value, str) else repr(value) for value in dict.fromkeys(values)]
    return call("st.sampled_from", Bracketed("", list(words), brackets="[]"))
