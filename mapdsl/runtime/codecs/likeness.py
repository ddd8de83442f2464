"""Which of several formats a tensor is stored in, where the parts of more than one of them are there. No torch here.

The compiler refuses formats that nothing tells apart, the runtime and `check --against` tell the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mapdsl.runtime.codecs.storage import DTYPES, FLOAT_SCALES, BlockStorage, Shape, Storage


def likeliest(key: str, formats: Sequence[Storage], form: Callable[[str], tuple[str, Shape]]) -> int:
    """The place of the format that the parts' dtypes and shapes fit, of most parts where several do; else of the first.

    `form` says dtype (in safetensors' spelling) and shape of a stored tensor; all parts of all formats are there.
    """
    if len(formats) == 1:
        return 0
    ranked = sorted(range(len(formats)), key=lambda place: -len(formats[place].templates))
    return next((place for place in ranked if _fits(key, formats[place], form)), ranked[0])


def _fits(key: str, one: Storage, form: Callable[[str], tuple[str, Shape]]) -> bool:
    """Whether the parts of one format have its dtypes and shapes."""
    parts = {role: form(name) for role, name in one.part_names(key).items()}
    payload = parts["payload"][1]
    if len(payload) < one.needs_payload_dimensions():
        return False
    shape = one.logical_shape(payload)
    if one.unfit(shape) is not None:
        return False
    dtypes, shapes = one.part_dtypes(), one.part_shapes(shape)
    return all(
        (not dtypes[role] or dtype in dtypes[role]) and size == shapes[role] for role, (dtype, size) in parts.items()
    )


def look_alike(one: Storage, other: Storage) -> bool:
    """Whether one checkpoint may be read as either format and mean different things: by names, dtypes and shapes."""
    if "raw" in (one.kind, other.kind):
        # What no format claims is stored as it is: one that claims every float leaves nothing.
        return not any(each.payload_dtypes or each.companions for each in (one, other))
    mine, theirs = _dtypes(one), _dtypes(other)
    if mine.keys() != theirs.keys() or one.payload != other.payload:
        return False
    if not all(mine[name] & theirs[name] for name in mine):
        return False
    return not (isinstance(one, BlockStorage) and isinstance(other, BlockStorage) and _told_by_shape(one, other))


def _dtypes(one: Storage) -> dict[str, set[str]]:
    """The dtypes of each part, by the template of its name; where any will do, those are the floats."""
    floats = {DTYPES[word] for word in FLOAT_SCALES}
    return {template: set(one.part_dtypes()[role]) or floats for role, template in one.templates.items()}


def _told_by_shape(one: BlockStorage, other: BlockStorage) -> bool:
    """Whether the scales of two block-scaled formats have the same shape only where they mean the same."""
    if (one.per, one.blocks) != (other.per, other.blocks):
        return False
    shown = [[not (each.squeeze and size is None) for size in each.block] for each in (one, other)]
    dims = [sum(each) + of.scale_dims for each, of in zip(shown, (one, other), strict=True)]
    if dims[0] != dims[1] or (one.global_scale and one.global_dims != other.global_dims):
        return True  # the number of dimensions tells
    pairs = [pair for pair in zip(one.block, other.block, strict=True) if pair[0] != pair[1]]
    return shown[0] == shown[1] and bool(pairs) and all(_counted_apart(*pair) for pair in pairs)


def _counted_apart(one: int | None, other: int | None) -> bool:
    """Whether blocks of two sizes are never equally many in one dimension, unless each is the whole of it.

    Of 100 and of 128 two cover 150; of a size and one that is twice that or more, one alone is as many as the other.
    """
    small, large = sorted(math.inf if size is None else size for size in (one, other))
    return large >= 2 * small
