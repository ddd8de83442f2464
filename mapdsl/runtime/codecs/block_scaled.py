"""`block_scaled` and symmetric `packed_int`: elements of few bits, one scale for each block of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Encoded, Slice, unflatten_index
from mapdsl.runtime.codecs.block_kernel import BlockKernel
from mapdsl.runtime.codecs.elements import TableElement, element_named
from mapdsl.runtime.codecs.formats import DTYPE_BY_SPELLING
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.matrices import Matrices
from mapdsl.runtime.codecs.quantise import first_unholdable, largest_of_matrices, quantise
from mapdsl.runtime.codecs.scales import (
    BlockFactors,
    is_power_dtype,
    reciprocal,
    written_global,
    written_powers,
    written_scale,
)
from mapdsl.runtime.codecs.storage import SCALES, BlockStorage
from mapdsl.runtime.codecs.strided import contiguous_copy
from mapdsl.runtime.codecs.tiles import BlockGrid, Tile
from mapdsl.runtime.errors import ConversionError


class BlockScaled(Codec):
    """A payload and, beside it, one scale a block: logical = element * scale, a float32 product rounded once.

    Serves DeepSeek-V3 and V4 (128x128 e4m3 with f32, bf16 or e8m0 scales; 1x32 e2m1 in bytes, low nibble first, with
    e8m0 scales), the MX formats of the OCP specification v1.0, gpt-oss' MXFP4 (`blocks`), NVFP4 (`global_scale`),
    compressed-tensors' packed integers (`shape_name`), int8 per channel, per-expert and per-tensor scales, and with the
    element `same` a plain tensor with a scale beside it (Gemma's `per_expert_scale`).

    Blocks lie over the last two dimensions, the others are batch; a block size of None is a whole dimension; a vector
    is one row; blocks at the edges may be partial. The scales' shape is the batch and the number of blocks each way;
    with `squeeze` whole dimensions are left out, which makes a per-tensor scale `[]`, or `[1]` with
    one of `scale_dims`, and per-expert scales `[e]`.
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
        scale_dims: int = 0,
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
                scale_dims=scale_dims,
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
        if of is None:
            self._decode_into(parts, values)
            return
        *_, (top, _), (left, _) = ((0, 1), (0, 1), *of.box)
        height, width = self.storage.block
        cut_off = left % (width or left or 1) if self.storage.blocks else left % self.storage.per
        offset = (top % height if height else 0, (left - cut_off) % width if width else 0)
        self._decode_into(parts, values, offset, cut_off)

    def _decode_into(
        self, parts: Mapping[str, Tensor], values: Tensor, offset: tuple[int, int] = (0, 0), cut_off: int = 0
    ) -> None:
        """Decode into logical values that may lie in any order; see `BlockGrid` for `offset`.

        Of each row's first values so many are cut off, and of the last what `values` has no room for.
        """
        payload = parts["payload"]
        grid = self._grid(self._code_shape(self.logical_shape(tuple(payload.shape))), offset)
        try:
            wide = values.view(*grid.elements[:2], values.shape[-1] if values.ndim else 1)
            parts["scale"].view(grid.blocks)
        except RuntimeError:
            # Matrices that do not follow each other in memory are decoded one by one.
            for place, matrix in enumerate(values.unbind()):
                scales = {role: _of_matrix(parts[role], place) for role in ("scale", "global") if role in parts}
                self._decode_into({"payload": payload[place], **scales}, matrix, offset, cut_off)
            return
        kernel = BlockKernel(self.element, grid, self._factors(grid, parts), values.dtype)
        kernel.decode(self._codes(grid, payload), wide, cut_off)

    # --- the complement ---

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The companions as stored, and the payload's elements that do not come back from `dtype` under them."""
        self.check_working(key, dtype)
        found = self.checked_parts(key, parts)
        payload = found.pop("payload")
        companions = {role: part.clone(memory_format=torch.contiguous_format) for role, part in found.items()}
        shape = self.logical_shape(tuple(payload.shape))
        grid = self._grid(self._code_shape(shape))
        codes = self._codes(grid, payload)
        kept = torch.empty(0, dtype=codes.dtype, device=payload.device)
        where: Tensor | None = torch.empty(0, dtype=torch.int64, device=payload.device)
        if payload.numel() and not payload.is_meta:
            found_again = BlockKernel(self.element, grid, self._factors(grid, companions), dtype).irreproducible(codes)
            if found_again is None:
                kept, where = contiguous_copy(payload).view(codes.dtype).view(self._code_shape(shape)), None
            else:
                kept, where = found_again
        return Kept(self.name, dtype, shape, kept, where, companions)

    # --- encoding ---

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None, *, out: Tensor | None = None) -> Encoded:
        """New blocks get amax / largest element as scale (see `written_scale`); e8m0: the next power of two."""
        tensor = tensor.detach()
        self.check_working(key, tensor.dtype)
        shape = tuple(tensor.shape)
        self.check_fit(key, shape)
        stored = self.storage.part_shapes(shape)["payload"]
        if kept is not None:
            self._check_kept_parts(key, tensor, kept)
            kept = kept.to(tensor.device).in_order()
        dtype = self.element.dtype if isinstance(self.element, TableElement) else tensor.dtype
        if kept is not None:
            dtype = kept.codes.dtype
        payload = self.memory(key, stored, torch.int32 if self._in_words else dtype, tensor.device, out)
        codes = payload.view(dtype).view(self._code_shape(shape))
        edited = 0
        if tensor.is_meta or not tensor.numel():
            companions = self._blank(tensor) if kept is None else kept.parts
        elif kept is None:
            companions = self._write_anew(key, tensor, codes)
        else:
            companions, edited = self._write_kept(key, tensor, codes, kept)
        names = self.storage.part_names(key)
        parts = {names["payload"]: payload}
        return Encoded(parts | {names[role]: part for role, part in companions.items()}, edited)

    def _write_kept(self, key: str, tensor: Tensor, codes: Tensor, kept: Kept) -> tuple[dict[str, Tensor], int]:
        """Fill `codes` as they were kept, edited blocks anew; gives the companions and the number of edited blocks."""
        grid = self._grid(codes.shape)
        kernel = BlockKernel(self.element, grid, self._factors(grid, kept.parts), kept.dtype)
        edited = kernel.encode(tensor, codes.view(grid.elements), kept.codes, kept.where)
        if not edited.any():
            return {role: part.clone() for role, part in kept.parts.items()}, 0
        return self._write_anew(key, tensor, codes, edited, kept.parts), int(edited.count_nonzero())

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
        grid = self._grid(codes.shape)
        companions = self._companions_to_fill(tensor, before)
        factors = self._factors(grid, companions)
        outgrown = []

        def choose(band: Tile, largest: Tensor) -> Tensor:
            scale = self._fresh_scale(largest, factors.whole(band), companions["scale"].dtype)
            if only is not None and factors.whole(band) is not None:
                reach = factors.made(scale, band) * self.element.largest
                if bool((band.blocks(only) & (largest > reach * 1.0625)).any()):
                    outgrown.append(band)
            return scale

        kernel = BlockKernel(self.element, grid, factors, tensor.dtype)
        if not quantise(kernel, tensor, codes.view(grid.elements), choose, only):
            self._refuse_unholdable(key, tensor, first_unholdable(self.element, grid, tensor, only))
        return self._write_anew(key, tensor, codes) if outgrown else companions

    def _refuse_unholdable(self, key: str, tensor: Tensor, place: int | None) -> None:
        """D403 for the value at a flat place, if there is one that no code stands for."""
        if place is not None:
            self.refuse_value(key, tensor, unflatten_index(place, tensor.shape), f"{self.element.name} cannot hold")

    def _companions_to_fill(self, tensor: Tensor, before: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Copies of the companions of `before`; or new ones, their scales not yet chosen."""
        if before is not None:
            return {role: part.clone() for role, part in before.items()}
        shapes = self.storage.part_shapes(tuple(tensor.shape))
        made = {"scale": torch.empty(shapes["scale"], dtype=self.scale_dtypes[0], device=tensor.device)}
        if "global" in shapes:
            # Under the largest scale that there is, the largest code means the largest value of each matrix.
            most = self.element.reach * torch.finfo(self.scale_dtypes[0]).max
            largest = largest_of_matrices(self.element, tensor, max(1, torch.Size(shapes["global"]).numel()))
            whole = written_global(largest, most, self.storage.global_inverse)
            made["global"] = whole.view(shapes["global"])
        if "shape" in shapes:
            made["shape"] = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
        return made

    def _fresh_scale(self, largest: Tensor, whole: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Scales to store for blocks with these largest magnitudes, under the scale over them, if there is one."""
        ratio = self.element.fresh_ratio(largest)
        if whole is not None:
            ratio = ratio * whole if self.storage.global_inverse else ratio / whole
        if is_power_dtype(dtype):
            return written_powers(largest, ratio, self.element.top_exponent, self.storage.rule).view(dtype)
        return written_scale(reciprocal(ratio) if self.storage.inverse else ratio, dtype)

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

    def _factors(self, grid: BlockGrid, parts: Mapping[str, Tensor]) -> BlockFactors:
        """What codes are multiplied with, by the companions of a whole tensor or a slice."""
        return BlockFactors(
            grid,
            parts["scale"],
            parts.get("global"),
            inverse=self.storage.inverse,
            whole_inverse=self.storage.global_inverse,
        )

    def _codes(self, grid: BlockGrid, payload: Tensor) -> Matrices:
        """The payload as bytes of packed elements, those of the grid."""
        return Matrices(payload, grid.elements, torch.uint8 if self._in_words else None)

    def _code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // self.element.per) if shape else shape

    def _grid(self, code_shape: tuple[int, ...], offset: tuple[int, int] = (0, 0)) -> BlockGrid:
        rows, columns = self.storage.block
        per = self.element.per
        return BlockGrid(tuple(code_shape), (rows, columns and columns // per), (offset[0], offset[1] // per))

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


def _of_matrix(scales: Tensor, place: int) -> Tensor:
    """The scales of one matrix of several; one scale may be that of all."""
    return scales[place] if scales.numel() > 1 else scales
