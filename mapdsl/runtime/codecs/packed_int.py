"""`packed_int` with zero points: what GPTQ and AWQ store, read exactly and given back as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mapdsl.runtime.codecs.base import Codec, Encoded, Slice
from mapdsl.runtime.codecs.formats import bits_differ, exact_cast, round_product
from mapdsl.runtime.codecs.integer_storage import PackedIntStorage
from mapdsl.runtime.codecs.kept import Kept
from mapdsl.runtime.codecs.storage import Box
from mapdsl.runtime.codecs.strided import contiguous, contiguous_copy, copy_strided
from mapdsl.runtime.codecs.tiles import STRIP_ELEMENTS
from mapdsl.runtime.errors import ConversionError

# Which column of eight lies in each nibble of a word, lowest first (AWQ's GEMM layout).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedInt(Codec):
    """Integers in 32-bit words with a scale and a zero point a group: logical = (element - zero) * scale, rounded once.

    The logical tensor is `[in, out]`, as stored. GPTQ (AutoGPTQ, GPTQModel): a bit stream down the input rows in
    `qweight [in * bits / 32, out]`, zero points along the outputs in `qzeros [groups, out * bits / 32]`, less one in
    the first version, `scales [groups, out]`, in `g_idx [in]` the group of each row. AWQ (AutoAWQ, GEMM): 4 bits along
    the outputs, `qweight [in, out / 8]` and `qzeros [groups, out / 8]`, in each word columns 0, 2, 4, 6, 1, 3, 5, 7.

    Both come out of a search over calibration data, so that nothing can be written anew: what was read and is unchanged
    is given back, anything else is refused (D406).
    """

    storage: PackedIntStorage

    def __init__(
        self,
        name: str,
        layout: str,
        bits: int = 4,
        group: int = 128,
        *,
        payload: str = "{stem}.qweight",
        zeros: str = "{stem}.qzeros",
        scale: str = "{stem}.scales",
        order: str = "{stem}.g_idx",
        zero_offset: int = 0,
    ) -> None:
        self.bind(
            PackedIntStorage(
                name,
                layout=layout,
                bits=bits,
                group=group,
                payload=payload,
                zeros=zeros,
                scale=scale,
                order=order,
                zero_offset=zero_offset,
            )
        )

    def bind(self, storage: PackedIntStorage) -> None:  # type: ignore[override]
        """See `Codec.bind`."""
        super().bind(storage)
        self._run = math.lcm(storage.bits, 32) // storage.bits  # elements that fill whole words
        self._dim = 1 if storage.layout == "awq" else 0  # along which a word has several elements
        self._order = _AWQ_ORDER if storage.layout == "awq" else tuple(range(self._run))

    def decode(
        self,
        key: str,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype = torch.bfloat16,
        *,
        out: Tensor | None = None,
        of: Slice | None = None,
    ) -> Tensor:
        """Differences to the zero point times scale, a float32 product rounded once."""
        self.check_working(key, dtype if out is None else out.dtype)
        found = self.checked_parts(key, parts, of)
        shape = self.logical_shape(tuple(found["payload"].shape)) if of is None else of.sizes
        values = self.output(key, shape, dtype, found["payload"].device, out)
        if values.numel() and not values.is_meta:
            box = ((0, shape[0]), (0, shape[1])) if of is None else of.box
            self._check_order(key, found)
            for start, codes in self._strips(found["payload"], box):
                rows = slice(start, start + len(codes))
                copy_strided(values[rows], _meant(codes, *self._group_values(found, rows, box), values.dtype))
        return values

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The companions as stored, and the payload where rounding again does not give it back."""
        self.check_working(key, dtype)
        found = self.checked_parts(key, parts)
        payload = found.pop("payload")
        companions = {role: part.clone() for role, part in found.items()}
        shape = self.logical_shape(tuple(payload.shape))
        nothing = torch.empty(0, dtype=torch.int64, device=payload.device)
        if payload.numel() and not payload.is_meta:
            self._check_order(key, found)
            for start, codes in self._strips(payload, box := _all_of(shape)):
                rows = slice(start, start + len(codes))
                groups = self._group_values(found, rows, box)
                again = self._requantised(_meant(codes, *groups, dtype), *groups)
                if bits_differ(again, payload[self._words(rows)].contiguous()):
                    return Kept(self.name, dtype, shape, contiguous_copy(payload), None, companions)
        return Kept(self.name, dtype, shape, payload.new_empty(0), nothing, companions)

    def encode(self, key: str, tensor: Tensor, kept: Kept | None = None, *, out: Tensor | None = None) -> Encoded:
        """What was kept; D406 where nothing was, or where the tensor has changed since."""
        tensor = tensor.detach()
        self.check_working(key, tensor.dtype)
        self.check_fit(key, tuple(tensor.shape))
        name = self.payload(key)
        if kept is None:
            what = "can be read, not written: it comes out of calibration data"
            raise ConversionError("D406", f"{name}: {self.name} {what}; write another format")
        self.check_kept(key, tensor, kept, self.storage.part_shapes(kept.shape)["payload"])
        kept = kept.to(tensor.device)
        form, size = self.stored(key, tuple(tensor.shape))[name]
        payload = self.memory(key, size, form, tensor.device, out)
        parts = {name: payload} | {n: kept.parts[role].clone() for role, n in self.companions(key).items()}
        if tensor.is_meta or not tensor.numel():
            return Encoded(parts)
        found = self.checked_parts(key, parts)
        self._check_order(key, found)
        step = self._step(tensor.shape[1])
        for start in range(0, len(tensor), step):
            rows = slice(start, start + step)
            groups = self._group_values(found, rows, _all_of(kept.shape))
            values, words = contiguous(tensor[rows]), payload[self._words(rows)]
            is_all = kept.where is None
            words.copy_(kept.codes[self._words(rows)] if is_all else self._requantised(values, *groups))
            codes = self._unpacked(words, self._dim)
            if bits_differ(exact_cast(_meant(codes, *groups, kept.dtype), values.dtype), values):
                what = f"has changed since it was read, and {self.name} cannot be written anew"
                raise ConversionError("D406", f"{name} {what}; write another format")
        return Encoded(parts)

    # --- within ---

    def _step(self, columns: int) -> int:
        """How many rows are worked on at a time; they fill whole words."""
        return max(1, STRIP_ELEMENTS // max(1, columns) // self._run) * self._run

    def _words(self, rows: slice) -> slice:
        """The rows of the payload that hold such rows, which fill whole words."""
        if self.storage.layout == "awq":
            return rows
        return slice(*(place * self.storage.bits // 32 for place in (rows.start, rows.stop)))

    def _strips(self, payload: Tensor, box: Box) -> Iterator[tuple[int, Tensor]]:
        """Elements, int32, of some rows at a time: the first row's number in the box, and `[rows, columns]`."""
        (first, last), (left, right) = box
        step = self._step(right - left)
        if self.storage.layout == "awq":
            skip = left % self._run
            for start in range(0, last - first, step):
                codes = self._unpacked(payload[start : start + step], 1)
                yield start, codes[:, skip : skip + right - left]
            return
        base, words = first // self._run * self._run, self._run * self.storage.bits // 32
        for row in range(base, last, step):
            at = (row - base) // self._run * words
            codes = self._unpacked(payload[at : at + step // self._run * words], 0)
            above, below = max(first - row, 0), min(last - row, len(codes))
            yield row + above - first, codes[above:below]

    def _unpacked(self, words: Tensor, dim: int) -> Tensor:
        """The elements of 32-bit words along a dimension, int32: a stream of bits, low ones first."""
        bits, run = self.storage.bits, self._run
        runs = _in_runs(words, dim, run * bits // 32)
        shape = *runs.shape[: dim + 1], run, *runs.shape[dim + 2 :]
        codes = torch.empty(shape, dtype=torch.int32, device=words.device)
        for place, element in enumerate(self._order):
            word, shift = divmod(place * bits, 32)
            value = runs.select(dim + 1, word) >> shift
            if shift + bits > 32:
                # The shift above drags the sign along; what it put over the low bits is replaced.
                value = value & ((1 << 32 - shift) - 1) | runs.select(dim + 1, word + 1) << 32 - shift
            torch.bitwise_and(value, (1 << bits) - 1, out=codes.select(dim + 1, element))
        return codes.flatten(dim, dim + 1)

    def _packed(self, codes: Tensor, dim: int) -> Tensor:
        """The inverse of `_unpacked`."""
        bits, run = self.storage.bits, self._run
        runs = _in_runs(codes, dim, run)
        shape = *runs.shape[: dim + 1], run * bits // 32, *runs.shape[dim + 2 :]
        words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
        for place, element in enumerate(self._order):
            word, shift = divmod(place * bits, 32)
            value = runs.select(dim + 1, element)
            words.select(dim + 1, word).bitwise_or_(value << shift)
            if shift + bits > 32:
                words.select(dim + 1, word + 1).bitwise_or_(value >> 32 - shift)
        return words.flatten(dim, dim + 1)

    def _requantised(self, values: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
        """The words that rounding the values of some rows gives, under their zero points and scales."""
        quotient, limit = values.to(torch.float32, copy=True).div_(scales), 1 << self.storage.bits
        integers = quotient.nan_to_num_(0.0).round_().clamp_(-limit * 2, limit * 2).int()
        return self._packed(integers.add_(zeros).clamp_(0, limit - 1), self._dim)

    def _group_values(self, parts: Mapping[str, Tensor], rows: slice, box: Box) -> tuple[Tensor, Tensor]:
        """Zero points, int32, and scales, float32, of each of some rows of a box; `[1, columns]` if all have one."""
        (top, bottom), (left, right) = box
        order = parts.get("order")
        if order is None:
            size = self.storage.group or bottom
            numbers = torch.arange(top, bottom, device=parts["scale"].device)[rows] // size - top // size
        else:
            numbers = order[rows].long()
        used, groups = torch.unique(numbers, return_inverse=True)
        skip = left % self._run
        zeros = self._unpacked(parts["zeros"][used], 1)[:, skip : skip + right - left]
        zeros, scales = zeros + self.storage.zero_offset, parts["scale"][used].float()
        return (zeros, scales) if len(used) == 1 else (zeros[groups], scales[groups])

    def _check_order(self, key: str, parts: Mapping[str, Tensor]) -> None:
        """R606 unless each row is of a group that there is."""
        order, groups = parts.get("order"), parts["scale"].shape[0]
        if order is not None and (order.min() < 0 or order.max() >= groups):
            name = self.companions(key)["order"]
            raise ConversionError("R606", f"{name} names groups {int(order.min())} to {int(order.max())} of {groups}")


def _meant(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of elements, int32, which are overwritten."""
    return round_product(codes.sub_(zeros).float(), scales, dtype)


def _in_runs(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A matrix with one of its dimensions as runs of a size and what is in them."""
    rows, columns = tensor.shape
    return tensor.reshape((rows, -1, size) if dim else (-1, size, columns))


def _all_of(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)
