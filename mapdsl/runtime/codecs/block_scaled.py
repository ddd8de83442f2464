"""`block_scaled`: elements of few bits, one scale for each block of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Encoded, StoredForm, unflatten_index
from mapdsl.runtime.codecs.block_kernel import BlockKernel, first_unholdable, largest_magnitudes
from mapdsl.runtime.codecs.elements import MiniFloat, element_named
from mapdsl.runtime.codecs.formats import DTYPE_BY_NAME, as_bits, dtype_name
from mapdsl.runtime.codecs.kept import Kept, choose_kept
from mapdsl.runtime.codecs.scales import FLOAT_SCALE_DTYPES, SCALE_DTYPES, written_scale
from mapdsl.runtime.codecs.tiles import BlockGrid
from mapdsl.runtime.errors import ConversionError


class BlockScaled(Codec):
    """A payload and, beside it, one scale a block: logical = element * scale, a float32 product rounded once.

    Serves DeepSeek-V3 and V4 (128x128 e4m3 with f32, bf16 or e8m0 scales; 1x32 e2m1 in bytes, low nibble first, with
    e8m0 scales), the MX formats of the OCP specification v1.0, per-row, per-expert and per-tensor scales, and with the
    element `same` a plain tensor with a scale beside it (Gemma's `per_expert_scale`).

    Blocks lie over the last two dimensions, the others are batch; a block size of None is a whole dimension; a vector
    is one row; blocks at the edges may be partial. The scales' shape is the batch and the number of blocks each way;
    with `squeeze` whole dimensions are left out, which makes a per-tensor scale `[]` and per-expert scales `[e]`.
    """

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
    ) -> None:
        super().__init__(name, {"scale": scale}, payload)
        self.element = element_named(element, packed)
        self.block, self.squeeze = block, squeeze
        # Unless the map says which, any float will do; bytes are not taken for e8m0 unasked.
        self.scale_dtypes = tuple(DTYPE_BY_NAME[word] for word in scale_dtypes) or FLOAT_SCALE_DTYPES
        if not set(self.scale_dtypes) <= set(SCALE_DTYPES):
            raise ValueError(f"codec {name}: scales are stored as f32, bf16, f16, f8e8m0 or u8")
        if any(size is not None and size < 1 for size in block) or (block[1] or 0) % self.element.per:
            raise ValueError(f"codec {name}: a block of {block} holds no whole number of stored elements")

    def claims(self, key: str, dtype: torch.dtype) -> bool:
        """By the payload's dtype alone."""
        return self.element.accepts(dtype)

    def logical_shape(self, payload_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The payload's, with the last dimension doubled where two elements share a byte."""
        if self.element.per == 1:
            return tuple(payload_shape)
        return (*payload_shape[:-1], payload_shape[-1] * self.element.per)

    def stored(self, key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> dict[str, StoredForm]:
        """Payload and scales; `dtype` matters for the element `same` only, which stores what it is given."""
        element = self.element.dtype if isinstance(self.element, MiniFloat) else dtype
        return {
            self.payload(key): (element, self._payload_shape(key, shape)),
            self.companions(key)["scale"]: (self.scale_dtypes[0], self._scale_shape(shape)),
        }

    def decode(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Products of element and scale; -0.0, denormals and the sign of NaNs survive."""
        payload, scale = self._checked(key, parts, dtype)
        values = torch.empty(self.logical_shape(payload.shape), dtype=dtype, device=payload.device)
        if values.numel() and not values.is_meta:
            grid = self._grid(payload.shape)
            kernel = BlockKernel(self.element, grid, scale, dtype)
            kernel.decode(payload.reshape(grid.elements), values.view(self._wide(grid)))
        return values

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The scales as stored, and the payload's elements that do not come back from `dtype` under them."""
        payload, scale = self._checked(key, parts, dtype)
        where = torch.empty(0, dtype=torch.int64, device=payload.device)
        if payload.numel() and not payload.is_meta:
            grid = self._grid(payload.shape)
            where = BlockKernel(self.element, grid, scale, dtype).irreproducible(payload.reshape(grid.elements))
        codes, positions = choose_kept(payload, where)
        shape = self.logical_shape(payload.shape)
        return Kept(self.name, dtype, shape, codes, positions, {"scale": scale.clone()})

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None) -> Encoded:
        """New blocks get amax / largest element as scale (see `written_scale`); e8m0: the next power of two."""
        tensor = tensor.detach().contiguous()
        self.check_working(key, tensor.dtype)
        shape = self._payload_shape(key, tuple(tensor.shape))
        if kept is not None:
            self._check_kept_scale(key, tensor, kept, shape)
            kept = kept.to(tensor.device)
        fresh = self.element.dtype if isinstance(self.element, MiniFloat) else tensor.dtype
        codes = torch.empty(shape, dtype=fresh if kept is None else kept.codes.dtype, device=tensor.device)
        edited = 0
        if tensor.is_meta or not tensor.numel():
            scale = self._blank_scale(tensor) if kept is None else kept.parts["scale"]
        elif kept is None:
            scale = self._write_anew(key, tensor, codes)
        else:
            scale, edited = self._write_kept(key, tensor, codes, kept)
        return Encoded({self.payload(key): codes, self.companions(key)["scale"]: scale}, edited)

    def _write_kept(self, key: str, tensor: Tensor, codes: Tensor, kept: Kept) -> tuple[Tensor, int]:
        """Fill `codes` as they were kept, edited blocks anew; gives the scales and the number of edited blocks."""
        grid, scale = self._grid(codes.shape), kept.parts["scale"]
        values, flat = tensor.view(self._wide(grid)), codes.view(grid.elements)
        kernel = BlockKernel(self.element, grid, scale, kept.dtype)
        kernel.encode(values, flat)
        kernel.restore(flat, values, kept.codes, kept.where)
        edited = kernel.unlike(flat, values)
        if not edited.any():
            return scale.clone(), 0
        fresh = self._write_anew(key, tensor, codes, edited, scale.dtype)
        merged = torch.where(edited.view(scale.shape), as_bits(fresh), as_bits(scale)).view(scale.dtype)
        return merged, int(edited.sum())

    def _write_anew(
        self, key: str, tensor: Tensor, codes: Tensor, only: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Quantise into `codes`, all blocks or those that `only` picks; gives new scales for all blocks."""
        grid = self._grid(codes.shape)
        values = tensor.view(self._wide(grid))
        largest, finite = largest_magnitudes(grid, values, self.element.per)
        place = None if finite else first_unholdable(self.element, grid, values, only)
        if place is not None:
            found = f"element {unflatten_index(place, tensor.shape)} is {tensor.flatten()[place].item()}"
            raise ConversionError("D403", f"{self.payload(key)}: {found}, which {self.element.name} cannot hold")
        scale = written_scale(self.element.fresh_ratio(largest), dtype or self.scale_dtypes[0])
        BlockKernel(self.element, grid, scale, tensor.dtype).encode(values, codes.view(grid.elements), only)
        return scale.view(self._scale_shape(tuple(tensor.shape)))

    def _blank_scale(self, tensor: Tensor) -> Tensor:
        """The scales of no blocks: ones for an empty tensor, shape and dtype alone on `meta`."""
        ones = torch.ones(self._scale_shape(tuple(tensor.shape)), dtype=torch.float32, device=tensor.device)
        return written_scale(ones, self.scale_dtypes[0])

    def _grid(self, payload_shape: tuple[int, ...]) -> BlockGrid:
        rows, columns = self.block
        return BlockGrid(tuple(payload_shape), (rows, columns and columns // self.element.per))

    def _wide(self, grid: BlockGrid) -> tuple[int, int, int]:
        matrices, rows, columns = grid.elements
        return matrices, rows, columns * self.element.per

    def _payload_shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.element.per == 1:
            return shape
        if not shape or shape[-1] % self.element.per:
            found = f"shape {list(shape)} has no even last dimension"
            raise ConversionError("D401", f"{self.payload(key)}: {found}, and {self.name} packs two elements in a byte")
        return (*shape[:-1], shape[-1] // self.element.per)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        batch, last = shape[:-2], shape[-2:]
        sizes = self.block[2 - len(last) :]
        pairs = [(size, block) for size, block in zip(last, sizes, strict=True) if not (self.squeeze and block is None)]
        return (*batch, *(1 if block is None else -(-size // block) for size, block in pairs))

    def _checked(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Payload and scales, each there, of a dtype that the codec reads and of the right shape."""
        self.check_working(key, dtype)
        name, beside = self.payload(key), self.companions(key)["scale"]
        payload, scale = self.part(key, parts, name), self.part(key, parts, beside)
        if not self.element.accepts(payload.dtype):
            found = dtype_name(payload.dtype)
            raise ConversionError("C504", f"{name} is {found}, which is not how {self.name} stores {self.element.name}")
        if scale.dtype not in self.scale_dtypes:
            words = "|".join(dtype_name(one) for one in self.scale_dtypes)
            raise ConversionError(
                "C504", f"{beside} is {dtype_name(scale.dtype)}, the scales of {self.name} are {words}"
            )
        if self.element.per > 1 and not payload.ndim:
            raise ConversionError("R606", f"{name} is a scalar, {self.name} packs two elements in a byte of a row")
        expected = self._scale_shape(self.logical_shape(payload.shape))
        if tuple(scale.shape) != expected:
            what = f"{name} of {list(self.logical_shape(payload.shape))} in blocks of {_block_text(self.block)}"
            found = f"{beside} has shape {list(scale.shape)}"
            raise ConversionError("R606", f"{found}, {what} needs scales of {list(expected)}")
        return payload.contiguous(), scale

    def _check_kept_scale(self, key: str, tensor: Tensor, kept: Kept, shape: tuple[int, ...]) -> None:
        """R607 unless the complement's scales are those of this codec and shape."""
        self.check_kept(key, tensor, kept, shape)
        scale = kept.parts.get("scale")
        if scale is None or scale.dtype not in self.scale_dtypes or scale.shape != self._scale_shape(kept.shape):
            beside = self.companions(key)["scale"]
            raise ConversionError("R607", f"{beside}: the complement holds no scales of this shape and dtype")


def _block_text(block: tuple[int | None, int | None]) -> str:
    return "x".join("*" if size is None else str(size) for size in block)
