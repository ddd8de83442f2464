"""`block_scaled` and symmetric `packed_int`: elements of few bits, one scale for each block of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Encoded, Slice, unflatten_index
from mapdsl.runtime.codecs.block_kernel import BlockKernel, first_unholdable, largest_magnitudes
from mapdsl.runtime.codecs.elements import TableElement, element_named
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING, as_bits
from mapdsl.runtime.codecs.kept import Kept, choose_kept
from mapdsl.runtime.codecs.scales import (
    is_power_dtype,
    reciprocal,
    scale_values,
    written_global,
    written_powers,
    written_scale,
)
from mapdsl.runtime.codecs.storage import SCALES, BlockStorage
from mapdsl.runtime.codecs.tiles import BlockGrid
from mapdsl.runtime.errors import ConversionError


class Factors(NamedTuple):
    """What codes are multiplied with, float32 of the scales' shape, and the bytes of scales that are powers."""

    values: Tensor
    powers: Tensor | None


class BlockScaled(Codec):
    """A payload and, beside it, one scale a block: logical = element * scale, a float32 product rounded once.

    Serves DeepSeek-V3 and V4 (128x128 e4m3 with f32, bf16 or e8m0 scales; 1x32 e2m1 in bytes, low nibble first, with
    e8m0 scales), the MX formats of the OCP specification v1.0, gpt-oss' MXFP4 (`blocks`), NVFP4 (`global_scale`),
    compressed-tensors' packed integers (`shape_name`), int8 per channel, per-expert and per-tensor scales, and with the
    element `same` a plain tensor with a scale beside it (Gemma's `per_expert_scale`).

    Blocks lie over the last two dimensions, the others are batch; a block size of None is a whole dimension; a vector
    is one row; blocks at the edges may be partial. The scales' shape is the batch and the number of blocks each way;
    with `squeeze` whole dimensions are left out, which makes a per-tensor scale `[]` and per-expert scales `[e]`.
    """

    storage: BlockStorage
    _in_words = False  # whether the payload is stored as 32-bit words of elements

    def __init__(
        self,
        name: str,
        element: str,
        block: tuple[int | None, int | None],
        scale: str = "{stem}.scale",
        scale_dtypes: tuple[str, ...] = (),
        squeeze: bool = False,
        packed: str = "i8",
        payload: str = "{key}",
        *,
        blocks: bool = False,
        inverse: bool = False,
        global_scale: str = "",
        global_dims: int = 0,
        global_inverse: bool = False,
        shape: str = "",
        rule: str = "up",
    ) -> None:
        self.bind(
            BlockStorage(
                name,
                element=element,
                block=block,
                scale=scale,
                scale_dtypes=scale_dtypes,
                squeeze=squeeze,
                packed=packed,
                payload=payload,
                blocks=blocks,
                inverse=inverse,
                global_scale=global_scale,
                global_dims=global_dims,
                global_inverse=global_inverse,
                shape=shape,
                rule=rule,
            )
        )

    def bind(self, storage: BlockStorage) -> None:  # type: ignore[override]
        """See `Codec.bind`."""
        super().bind(storage)
        self.element = element_named(storage.element, storage.packed)
        self._in_words = storage.packed == "i32"
        if not set(storage.scale_dtypes) <= set(SCALES):
            raise ValueError(f"codec {storage.name}: scales are stored as {', '.join(SCALES)}")
        self.scale_dtypes = tuple(DTYPE_BY_SPELLING[word] for word in storage.part_dtypes()["scale"])
        block, per = storage.block, self.element.per
        if any(size is not None and size < 1 for size in block) or (block[1] or 0) % per:
            raise ValueError(f"codec {storage.name}: a block of {block} holds no whole number of stored elements")

    # --- decoding ---

    def decode(
        self,
        key: str,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype = torch.bfloat16,
        *,
        out: Tensor | None = None,
        of: Slice | None = None,
    ) -> Tensor:
        """Products of element and scale; -0.0, denormals and the sign of NaNs survive."""
        self.check_working(key, dtype if out is None else out.dtype)
        found = self.checked_parts(key, parts, of)
        payload = found["payload"]
        shape = self.logical_shape(tuple(payload.shape)) if of is None else of.sizes
        values = self.output(key, shape, dtype, payload.device, out)
        if values.numel() and not values.is_meta:
            self._decode(found, values, of)
        return values

    def _decode(self, parts: Mapping[str, Tensor], values: Tensor, of: Slice | None) -> None:
        """Write a tensor, or the slice of one that the parts hold; first and last elements may share a byte."""
        codes, factors = self._codes(parts["payload"]), self._factors(parts)
        if of is None:
            self._decode_into(codes, factors, values, (0, 0))
            return
        *_, (top, _), (left, _) = ((0, 1), (0, 1), *of.box)
        height, width = self.storage.block
        cut_off = left % (width or left or 1) if self.storage.blocks else left % self.storage.per
        offset = (top % height if height else 0, (left - cut_off) % width if width else 0)
        wide = (*codes.shape[:-1], codes.shape[-1] * self.element.per)
        if wide == tuple(values.shape):
            self._decode_into(codes, factors, values, offset)
        else:
            whole = torch.empty(wide, dtype=values.dtype, device=values.device)
            self._decode_into(codes, factors, whole, offset)
            values.copy_(whole.narrow(-1, cut_off, values.shape[-1]))

    def _decode_into(self, codes: Tensor, factors: Factors, values: Tensor, offset: tuple[int, int]) -> None:
        """Decode bytes into logical values that may lie in any order; see `BlockGrid` for `offset`."""
        grid = self._grid(codes.shape, offset)
        try:
            wide = values.view(self._wide(grid))
        except RuntimeError:
            # Matrices that do not follow each other in memory are decoded one by one.
            for place, matrix in enumerate(values.unbind()):
                powers = None if factors.powers is None else factors.powers[place]
                self._decode_into(codes[place], Factors(factors.values[place], powers), matrix, offset)
            return
        kernel = BlockKernel(self.element, grid, factors.values, values.dtype, factors.powers)
        kernel.decode(codes.reshape(grid.elements), wide)

    # --- the complement ---

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The companions as stored, and the payload's elements that do not come back from `dtype` under them."""
        self.check_working(key, dtype)
        found = self.checked_parts(key, parts)
        payload = found.pop("payload")
        codes = self._codes(payload)
        where = torch.empty(0, dtype=torch.int64, device=payload.device)
        if payload.numel() and not payload.is_meta:
            grid, factors = self._grid(codes.shape), self._factors(found)
            kernel = BlockKernel(self.element, grid, factors.values, dtype, factors.powers)
            where = kernel.irreproducible(codes.reshape(grid.elements))
        kept, positions = choose_kept(codes, where)
        shape = self.logical_shape(tuple(payload.shape))
        return Kept(self.name, dtype, shape, kept, positions, {role: part.clone() for role, part in found.items()})

    # --- encoding ---

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None) -> Encoded:
        """New blocks get amax / largest element as scale (see `written_scale`); e8m0: the next power of two."""
        tensor = tensor.detach().contiguous()
        self.check_working(key, tensor.dtype)
        shape = tuple(tensor.shape)
        self.check_fit(key, shape)
        stored = self.storage.part_shapes(shape)["payload"]
        if kept is not None:
            self._check_kept_parts(key, tensor, kept)
            kept = kept.to(tensor.device)
        fresh = self.element.dtype if isinstance(self.element, TableElement) else tensor.dtype
        codes = torch.empty(
            self._code_shape(shape), dtype=fresh if kept is None else kept.codes.dtype, device=tensor.device
        )
        edited = 0
        if tensor.is_meta or not tensor.numel():
            companions = self._blank(tensor) if kept is None else kept.parts
        elif kept is None:
            companions = self._write_anew(key, tensor, codes)
        else:
            companions, edited = self._write_kept(key, tensor, codes, kept)
        names = self.storage.part_names(key)
        payload = codes.view(torch.int32) if self._in_words else codes
        parts = {names["payload"]: payload.view(stored)}
        return Encoded(parts | {names[role]: part for role, part in companions.items()}, edited)

    def _write_kept(self, key: str, tensor: Tensor, codes: Tensor, kept: Kept) -> tuple[dict[str, Tensor], int]:
        """Fill `codes` as they were kept, edited blocks anew; gives the companions and the number of edited blocks."""
        grid, factors = self._grid(codes.shape), self._factors(kept.parts)
        values, flat = tensor.view(self._wide(grid)), codes.view(grid.elements)
        kernel = BlockKernel(self.element, grid, factors.values, kept.dtype, factors.powers)
        kernel.encode(values, flat)
        kernel.restore(flat, values, kept.codes, kept.where)
        edited = kernel.unlike(flat, values)
        if not edited.any():
            return {role: part.clone() for role, part in kept.parts.items()}, 0
        return self._write_anew(key, tensor, codes, edited, kept.parts), int(edited.sum())

    def _write_anew(
        self,
        key: str,
        tensor: Tensor,
        codes: Tensor,
        only: Tensor | None = None,
        before: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Quantise into `codes`, all blocks or those that `only` picks; gives the companions.

        Blocks that are not picked keep their scales of `before`, as does the global scale, unless it is too small.
        """
        grid, values, largest = self._measured(key, tensor, codes, only)
        companions = self._fresh_companions(tensor, largest, before or {})
        if only is not None and before is not None:
            if self._overflows(companions, largest, only):
                return self._write_anew(key, tensor, codes)
            scale, kept = companions["scale"], before["scale"]
            picked = only.view(scale.shape)
            companions["scale"] = torch.where(picked, as_bits(scale), as_bits(kept)).view(scale.dtype)
        factors = self._factors(companions)
        kernel = BlockKernel(self.element, grid, factors.values, tensor.dtype, factors.powers)
        kernel.encode(values, codes.view(grid.elements), only)
        return companions

    def _measured(
        self, key: str, tensor: Tensor, codes: Tensor, only: Tensor | None
    ) -> tuple[BlockGrid, Tensor, Tensor]:
        """The blocks of a tensor, its values in their shape, and each one's largest; D403 for what no code holds."""
        grid = self._grid(codes.shape)
        values = tensor.view(self._wide(grid))
        largest, finite = largest_magnitudes(grid, values, self.element.per)
        place = None if finite else first_unholdable(self.element, grid, values, only)
        if place is not None:
            found = f"element {unflatten_index(place, tensor.shape)} is {tensor.flatten()[place].item()}"
            raise ConversionError("D403", f"{self.payload(key)}: {found}, which {self.element.name} cannot hold")
        return grid, values, largest

    def _fresh_companions(self, tensor: Tensor, largest: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scales for blocks with these largest magnitudes, in the dtypes and under the global scale of `before`."""
        shapes = self.storage.part_shapes(tuple(tensor.shape))
        dtype = before["scale"].dtype if before else self.scale_dtypes[0]
        ratio = self.element.fresh_ratio(largest)
        made: dict[str, Tensor] = {}
        if "global" in shapes:
            made["global"] = before["global"] if before else self._fresh_global(ratio, shapes["global"])
            whole = self._per_block(made["global"], ratio)
            ratio = ratio * whole if self.storage.global_inverse else ratio / whole
        if is_power_dtype(dtype):
            scale = written_powers(largest, ratio, self.element.top_exponent, self.storage.rule).view(dtype)
        else:
            scale = written_scale(reciprocal(ratio) if self.storage.inverse else ratio, dtype)
        made["scale"] = scale.view(shapes["scale"])
        if "shape" in shapes:
            size = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
            made["shape"] = before.get("shape", size)
        return {role: made[role] for role in shapes if role != "payload"}

    def _fresh_global(self, ratio: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The scale over the scales of each matrix: the largest of them becomes the largest that their dtype holds."""
        matrices = max(1, torch.Size(shape).numel())
        whole = written_global(ratio.reshape(matrices, -1).amax(-1), self.scale_dtypes[0], self.storage.global_inverse)
        return whole.view(shape)

    def _per_block(self, whole: Tensor, grid: Tensor) -> Tensor:
        """A global scale for each block of a grid, in the grid's shape."""
        each = whole.reshape(-1, 1).expand(-1, max(1, grid.numel() // max(1, whole.numel())))
        return each.reshape(grid.shape)

    def _overflows(self, companions: Mapping[str, Tensor], largest: Tensor, only: Tensor) -> bool:
        """Whether blocks that were edited have grown beyond what the kept global scale lets their scales reach."""
        if "global" not in companions:
            return False
        reach = self._factors(companions).values.reshape(largest.shape) * self.element.largest
        return bool((only & (largest > reach * 1.0625)).any())

    def _blank(self, tensor: Tensor) -> dict[str, Tensor]:
        """The companions of no blocks: ones for an empty tensor, shape and dtype alone on `meta`."""
        forms = self.stored("", tuple(tensor.shape), tensor.dtype)
        made = {}
        for role, name in self.companions("").items():
            dtype, shape = forms[name]
            if role == "shape":
                made[role] = torch.tensor(tensor.shape, dtype=dtype, device=tensor.device)
            else:
                made[role] = torch.ones(shape, device=tensor.device).to(dtype)
        return made

    # --- within ---

    def _factors(self, parts: Mapping[str, Tensor]) -> Factors:
        """What codes are multiplied with, by the companions of a whole tensor or a slice."""
        scale = parts["scale"]
        values = scale_values(scale)
        powers = scale.view(torch.uint8) if is_power_dtype(scale.dtype) else None
        if self.storage.inverse:
            values, powers = reciprocal(values), None
        whole = parts.get("global")
        if whole is None:
            return Factors(values, powers)
        over = self._per_block(whole, values)
        return Factors(values / over if self.storage.global_inverse else values * over, None)

    def _codes(self, payload: Tensor) -> Tensor:
        """The payload as bytes of packed elements, `[..., rows, bytes]`."""
        payload = payload.contiguous()
        if self._in_words:
            payload = payload.view(torch.uint8)
        return payload.flatten(-2) if self.storage.blocks else payload

    def _code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // self.element.per) if shape else shape

    def _grid(self, code_shape: tuple[int, ...], offset: tuple[int, int] = (0, 0)) -> BlockGrid:
        rows, columns = self.storage.block
        per = self.element.per
        return BlockGrid(tuple(code_shape), (rows, columns and columns // per), (offset[0], offset[1] // per))

    def _wide(self, grid: BlockGrid) -> tuple[int, int, int]:
        matrices, rows, columns = grid.elements
        return matrices, rows, columns * self.element.per

    def _check_kept_parts(self, key: str, tensor: Tensor, kept: Kept) -> None:
        """R607 unless the complement's companions are those of this codec and shape."""
        code_dtype = self.element.dtype if isinstance(self.element, TableElement) else None
        self.check_kept(key, tensor, kept, self._code_shape(tuple(tensor.shape)), code_dtype)
        shapes, dtypes = self.storage.part_shapes(kept.shape), self.storage.part_dtypes()
        for role, name in self.companions(key).items():
            part = kept.parts.get(role)
            accepted = {DTYPE_BY_SPELLING[word] for word in dtypes[role]}
            if part is None or part.dtype not in accepted or tuple(part.shape) != shapes[role]:
                raise ConversionError("R607", f"{name}: the complement holds no {role} of this shape and dtype")
