"""What a rank holds of the stored parts of a tensor, by what it holds of the tensor. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from mapdsl.runtime.codecs.storage import BlockStorage, Storage
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.shares import Dimensions, Held, whole


def held_parts(name: str, storage: Storage, held: Dimensions) -> Mapping[str, Dimensions]:
    """What is held of each part of a tensor of this name, by role; see `cut_parts`. ConversionError, P454."""
    try:
        return cut_parts(storage, held)
    except CutError as problem:
        raise ConversionError("P454", f"{name}: {problem}; {problem.advice}") from None


class CutError(ValueError):
    """A share begins or ends within what a format stores as one; `advice` says what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


@lru_cache(maxsize=4096)  # most tensors of a model have few shapes
def cut_parts(storage: Storage, held: Dimensions) -> Mapping[str, Dimensions]:
    """What is held of each part, by role; the part that tells a shape is not among them.

    Raises CutError where a share begins or ends within a block that has one scale, or is packed as one.
    """
    if storage.is_elementwise:
        return {"payload": held}
    if isinstance(storage, BlockStorage):
        return {role: part for role, part in _of_blocks(storage, held).items() if role in storage.templates}
    if all(dimension.is_whole for dimension in held):
        shapes = storage.part_shapes(tuple(dimension.size for dimension in held))
        return {role: tuple(map(whole, shape)) for role, shape in shapes.items()}
    message = f"a tensor stored as {storage.name} cannot be cut over ranks"
    raise CutError(message, "decode the tensor before it is cut")


def _of_blocks(storage: BlockStorage, held: Dimensions) -> dict[str, Dimensions]:
    batch, last = held[:-2], held[-2:]
    blocks = storage.block[2 - len(last) :]
    pairs = list(zip(last, blocks, strict=True))
    kept = [(one, block) for one, block in pairs if not (storage.squeeze and block is None)]
    # One scale for a whole dimension is one for the part of it that a rank holds.
    scales = [whole(1) if block is None else _in_blocks(storage, one, block) for one, block in kept]
    return {
        "payload": _packed(storage, held),
        "scale": (*batch, *scales, *(whole(1),) * storage.scale_dims),
        "global": (*batch, *(whole(1),) * storage.global_dims),
    }


def _packed(storage: BlockStorage, held: Dimensions) -> Dimensions:
    if not held:
        return held
    if storage.blocks:
        width = storage.block[1] or held[-1].size or storage.per
        return (*held[:-1], _in_blocks(storage, held[-1], width), whole(width // storage.per))
    return (*held[:-1], _in_blocks(storage, held[-1], storage.per))


def _in_blocks(storage: BlockStorage, held: Held, block: int) -> Held:
    """A dimension counted in blocks; the last one may be cut off at the edge of the whole."""
    if block == 1:
        return held
    for run in held.runs:
        for edge in run:
            if edge % block and edge != held.size:
                message = f"a share ends at position {edge:,} of a dimension, within a block of {block} that "
                advice = "cut at multiples of the block (fewer ranks), or decode the tensor before it is cut"
                raise CutError(f"{message}`{storage.name}` stores", advice)
    return Held(-(-held.size // block), tuple((begin // block, -(-end // block)) for begin, end in held.runs))
