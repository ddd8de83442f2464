"""What holds for every map, config and state. Each property raises PropertyError where an example breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mapdsl.checkpoint.answers import has_answers
from mapdsl.checkpoint.dtypes import DTYPE_NAMES
from mapdsl.compiler.expand import Key
from mapdsl.emit.expressions import attribute
from mapdsl.runtime.adapter import Keys
from mapdsl.testing.bits import bits
from mapdsl.testing.comparing import PropertyError, compare, same_names
from mapdsl.testing.configs import ContradictionError
from mapdsl.testing.rank_properties import RANK_PROPERTIES
from mapdsl.testing.reference import Placement
from mapdsl.testing.states import Group, State, made_anyway, made_names, place_of
from mapdsl.testing.suite import Counted, Example, Suite

SAMPLED = 3
_STRANGER = "mapdsl_test.stranger"


# --- the properties ---------------------------------------------------------------------------------------------------


def promised_names(example: Example) -> None:
    """The adapter's params and its promised names, shapes and dtypes are those of the map."""
    adapter = example.adapter(answered=True)
    for name, value in example.expansion.params.items():
        if getattr(adapter, attribute(name)) != value:
            raise PropertyError(f"param `{name}`: the adapter has {getattr(adapter, attribute(name))!r}, not {value!r}")
    expansion = example.expansion
    _promised(adapter.left_keys(quantization=False), expansion.keys("left", quantization=False))
    _promised(adapter.right_keys(), expansion.keys("right"))
    if _can_encode(example):
        _promised(adapter.left_keys(), expansion.keys("left"))


def placed(example: Example) -> None:
    """left -> right: the names that the map promises, and every element where its rule says."""
    _, made, _ = example.read
    expected = made_names(example.expansion, example.left, quantization=True)
    same_names(made, expected, "reading")
    for group in example.left.groups:
        if group.moves():
            _placed_group(example, group, made)


def there_and_back(example: Example) -> None:
    """left -> right -> left: the same names, shapes, dtypes and bytes."""
    back, _ = example.read_back
    stored, exact = example.left.canonical, example.left.kept()
    same_names(back, exact, "writing what was read", _made_anyway(example, "left"))
    for name, is_exact in exact.items():
        compare(name, back[name], stored[name], is_exact)


def back_and_there(example: Example) -> None:
    """right -> left -> right, unquantised: the same names, shapes, dtypes and bytes."""
    stored, _ = example.written
    same_names(stored, made_names(example.expansion, example.right, quantization=False), "writing")
    back = example.adapter(answered=True).read(stored, dtype=example.dtype)
    exact, known = example.right.kept(), example.right.canonical
    same_names(back, exact, "reading what was written", _made_anyway(example, "right"))
    for name, is_exact in exact.items():
        if is_exact or not example.right.is_unpacked(name):
            compare(name, back[name], known[name], is_exact)


def encoded_anew(example: Example) -> None:
    """right -> left, quantised without having read: the promised names and forms, and it can be read again."""
    if not _can_encode(example):
        return
    state, adapter = example.ordinary_right, example.adapter(answered=True)
    stored = adapter.write(state.tensors(), quantization=True, dtype=example.dtype)
    makers = made_names(example.expansion, state, quantization=True)
    same_names(stored, makers, "writing quantised")
    for key in example.expansion.keys("left"):
        if key.name not in stored or ((maker := makers[key.name]) is not None and maker.moved_as is not None):
            continue  # it keeps the format that it has on the right
        tensor = stored[key.name]
        if key.shape is not None and None not in key.shape and tuple(tensor.shape) != key.shape:
            raise PropertyError(f"{key.name} is written as {list(tensor.shape)}, the map promises {list(key.shape)}")
        if key.dtype is not None and DTYPE_NAMES[tensor.dtype] != key.dtype:
            raise PropertyError(f"{key.name} is written as {tensor.dtype}, the map promises {key.dtype}")
    back = adapter.read(stored, dtype=example.dtype)
    for name, tensor in state.canonical.items():
        if name in state.kept() and (name not in back or back[name].shape != tensor.shape):
            found = list(back[name].shape) if name in back else "nothing"
            raise PropertyError(f"{name} was {list(tensor.shape)}, after writing and reading it is {found}")


def meta_tensors(example: Example) -> None:
    """Tensors on `meta` become the names, shapes and dtypes that real ones become, both ways."""
    made, adapter = example.read[1], example.adapter()
    right = adapter.read(_on_meta(example.left.tensors()), dtype=example.dtype)
    _same_forms(right, made, "reading meta tensors")
    for name, group in made_names(example.expansion, example.left, quantization=True).items():
        if group is not None and not right[name].is_meta:
            raise PropertyError(f"reading meta tensors: {name} is no meta tensor")
    _same_forms(adapter.write(right, quantization=True), example.read_back[0], "writing meta tensors")


def asked_once(example: Example) -> None:
    """Every tensor of a lazy state is asked for once, and those that are dropped never."""
    for source, state in ((example.read[2], example.left), (example.written[1], example.right)):
        dropped = {state.legacy.get(n, n) for group in state.groups if not group.kept for n in group.names}
        _asked(source, dropped)
    _asked(example.read_back[1], set())


def one_missing(example: Example) -> None:
    """Without one tensor of a group: R605 naming it, from either side."""
    for state in (example.left, example.right):
        for name, *others in _sampled(example, _needed(state)):
            rest = {n: t for n, t in state.tensors().items() if n != name}
            if state.side == "left" and _answers(example, rest) != _answers(example, state.tensors()):
                continue
            # Without a companion nobody can tell which one the payload had, nor without a payload which it was.
            _refused(example, state.side, rest, "R605", (name, *others), f"{name} is missing")


def one_too_many(example: Example) -> None:
    """With one tensor that no rule reads: R603 naming it, from either side."""
    for state in (example.left, example.right):
        names = [f"{name}.stranger" for name in _sampled(example, list(state.canonical))]
        for name in (_STRANGER, *names[:1]):
            if example.readers.of_name(name, state.side) or example.readers.is_legacy(name):
                continue
            more = {**state.tensors(), name: torch.zeros(2)}
            _refused(example, state.side, more, "R603", (name,), f"{name} is too many")


def single_groups(example: Example) -> None:
    """`partial=True` on one group alone gives what it gives in the whole state."""
    _, whole, _ = example.read
    made = made_names(example.expansion, example.left, quantization=True)
    always = {name for name, group in made.items() if group is None}
    groups = [group for group in example.left.groups if group.moves()]
    for group in _sampled(example, groups):
        part = example.left.tensors(set(group.names))
        if _answers(example, part) != _answers(example, example.left.tensors()):
            continue
        found = example.adapter().read(part, dtype=example.dtype, partial=True)
        mine = {name for name, maker in made.items() if maker is group}
        if not mine <= set(found) <= mine | always:
            same_names(found, mine, f"reading {group.names[0]} and its group alone")
        for name in mine:
            compare(name, found[name], whole[name], True)


def shuffled_rules(example: Example) -> None:
    """The rules of the file in another order change nothing."""
    adapter = _shuffled(example.suite, example.rng.randrange(2))(dict(example.config), **example.suite.params)
    found = adapter.read(example.left.tensors(), dtype=example.dtype)
    same_names(found, example.read[1], "reading with shuffled rules")
    for name, tensor in example.read[1].items():
        compare(name, found[name], tensor, True)
    back = adapter.write(found, quantization=True)
    same_names(back, example.read_back[0], "writing with shuffled rules")
    for name, tensor in example.read_back[0].items():
        compare(name, back[name], tensor, True)


PROPERTIES: dict[str, Callable[[Example], None]] = {
    function.__name__: function
    for function in (
        promised_names,
        placed,
        there_and_back,
        back_and_there,
        encoded_anew,
        meta_tensors,
        asked_once,
        one_missing,
        one_too_many,
        single_groups,
        shuffled_rules,
    )
} | RANK_PROPERTIES
"""Every property by name; those of `RANK_PROPERTIES` are for maps with a mesh."""


def properties_for(suite: Suite) -> list[str]:
    """The names of the properties that a map is held against: those of ranks only where it has a mesh."""
    has_ranks = bool(suite.checked.map.meshes)
    return [name for name in PROPERTIES if has_ranks or name not in RANK_PROPERTIES]


# --- how they compare -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _shuffled(suite: Suite, order: int) -> type[Any]:
    return suite.shuffled(order)


def _promised(found: Keys, expected: list[Key]) -> None:
    """The adapter's list of names, shapes and dtypes against the map's."""
    same_names(found, (key.name for key in expected), "the adapter's list of names")
    for key in expected:
        form, dtype = found[key.name]
        if form != key.shape:
            raise PropertyError(f"the adapter lists {key.name} with shape {form}, the map with {key.shape}")
        if key.dtype is not None and dtype is not None and DTYPE_NAMES[dtype] != key.dtype:
            raise PropertyError(f"the adapter lists {key.name} with dtype {dtype}, the map with {key.dtype}")


def _made_anyway(example: Example, side: str) -> Iterator[str]:
    return (named.name for _, named in made_anyway(example.expansion, side))


def _can_encode(example: Example) -> bool:
    """Whether the first format of every stored tensor, in which it is written anew, fits its shape."""
    try:
        return bool(example.ordinary_right)
    except ContradictionError:
        return False


def _same_forms(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    same_names(found, expected, what)
    for name, tensor in expected.items():
        one, other = (found[name].shape, found[name].dtype), (tensor.shape, tensor.dtype)
        if one != other:
            raise PropertyError(f"{what}: {name} is {list(one[0])} {one[1]}, real ones {list(other[0])} {other[1]}")


def _placed_group(example: Example, group: Group, made: Mapping[str, Tensor]) -> None:
    """Hold what a group became against the plain reading of its rule."""
    expansion, rule = example.expansion, group.rule
    codecs = {n: expansion.codecs(tensor) for n, tensor in enumerate(rule.right)}
    if any(codecs.values()):
        return  # its values are rounded; the round trips compare them
    wanted = list(expansion.names(group.match, "right"))
    placement = Placement(rule, example.checked.layouts[group.match.rule], example.checked.map.indices, group.sizes)
    values = {tensor.place: tensor.value(example.dtype) for tensor in group.tensors}
    dtype = next(iter(values.values())).dtype
    shapes = {place_of(named): tuple(made[named.name].shape) for named in wanted}
    try:
        expected = placement.moved({place: bits(value) for place, value in values.items()}, shapes, 0)
    except (RuntimeError, IndexError) as err:
        raise PropertyError(f"{wanted[0].name} has a shape that its rule does not fit: {err}") from None
    for named in wanted:
        tensor = expected[place_of(named)]
        compare(named.name, made[named.name], tensor.view(dtype) if dtype != torch.bool else tensor.bool(), True)


def _on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _asked(source: Counted, may_be_left: set[str]) -> None:
    for name in source:
        count = source.asked[name]
        if count > 1 or (count == 0 and name not in may_be_left):
            raise PropertyError(f"{name} is asked for {count} times")


def _needed(state: State) -> list[tuple[str, ...]]:
    """Names whose absence alone is an error, with their payload's and the rule's: not of what may be absent alone."""
    needed: list[tuple[str, ...]] = []
    for group in state.groups:
        may_be_absent = not group.kept or (group.rule.optional and len(group.tensors) == 1)
        if may_be_absent or any(key[0] == "{" for key in group.match.values):
            continue
        for tensor in group.tensors:
            needed += [(n, next(iter(tensor.parts)), tensor.named.name) for n in tensor.parts if n not in state.legacy]
    return needed


def _sampled(example: Example, items: list[Any]) -> list[Any]:
    return example.rng.sample(items, min(SAMPLED, len(items)))


def _answers(example: Example, names: Mapping[str, Any]) -> dict[str, bool]:
    return has_answers(example.checked, names)


def _refused(
    example: Example, side: str, tensors: Mapping[str, Tensor], code: str, names: tuple[str, ...], what: str
) -> None:
    """The conversion of a side must fail with this code and name one of the tensors."""
    try:
        if side == "left":
            example.adapter().read(tensors, dtype=example.dtype)
        else:
            example.adapter(answered=True).write(tensors)
    except ValueError as err:
        if getattr(err, "code", None) != code or not any(name in str(err) for name in names):
            raise PropertyError(f"{what}: expected {code} naming it, found {err}") from None
        return
    raise PropertyError(f"{what}: expected {code} naming it, found no error")
