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
from mapdsl.runtime.codecs.strided import copy_strided
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
            zeros, scales = self._group_values(found, box)
            groups = self._groups_of_rows(key, found, box)
            for start, codes in self._strips(found["payload"], box):
                rows = slice(start, start + len(codes))
                codes -= zeros[groups[rows]]
                copy_strided(values[rows], round_product(codes.float(), scales[groups[rows]], values.dtype))
        return values

    def keep(self, key: str, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Kept:
        """The companions as stored, and the payload where rounding again does not give it back."""
        self.check_working(key, dtype)
        found = self.checked_parts(key, parts)
        payload = found.pop("payload")
        companions = {role: part.clone() for role, part in found.items()}
        shape = self.logical_shape(tuple(payload.shape))
        nothing = torch.empty(0, dtype=torch.int64, device=payload.device)
        kept = Kept(self.name, dtype, shape, payload.new_empty(0), nothing, companions)
        if payload.numel() and not payload.is_meta:
            again = self._requantised(key, self.decode(key, parts, dtype), kept)
            if bits_differ(again, payload):
                return Kept(self.name, dtype, shape, payload.clone(), None, companions)
        return kept

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
        if tensor.is_meta or not tensor.numel():
            form, size = self.stored(key, tuple(tensor.shape))[name]
            payload = torch.empty(size, dtype=form, device=tensor.device)
        else:
            payload = self._requantised(key, tensor, kept) if kept.where is not None else kept.codes.clone()
        parts = {name: self.written(key, payload, out)} | {
            n: kept.parts[role].clone() for role, n in self.companions(key).items()
        }
        if not tensor.is_meta and tensor.numel():
            meant = exact_cast(self.decode(key, parts, kept.dtype), tensor.dtype)
            if bits_differ(meant, tensor.contiguous()):
                what = f"has changed since it was read, and {self.name} cannot be written anew"
                raise ConversionError("D406", f"{name} {what}; write another format")
        return Encoded(parts)

    # --- within ---

    def _strips(self, payload: Tensor, box: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, Tensor]]:
        """Elements, int32, of some rows at a time: the first row's number in the box, and `[rows, columns]`."""
        (first, last), (left, right) = box
        step = max(1, STRIP_ELEMENTS // max(1, right - left) // self._run) * self._run
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
        if dim == 0:
            return self._unpacked(words.T, 1).T
        bits, run = self.storage.bits, self._run
        runs = words.reshape(words.shape[0], -1, run * bits // 32)
        codes = torch.empty(*runs.shape[:2], run, dtype=torch.int32, device=words.device)
        for place, element in enumerate(self._order):
            word, shift = divmod(place * bits, 32)
            value = runs[..., word] >> shift
            if shift + bits > 32:
                # The shift above drags the sign along; what it put over the low bits is replaced.
                value = value & ((1 << 32 - shift) - 1) | runs[..., word + 1] << 32 - shift
            codes[..., element] = value & (1 << bits) - 1
        return codes.flatten(1)

    def _packed(self, codes: Tensor, dim: int) -> Tensor:
        """The inverse of `_unpacked`."""
        if dim == 0:
            return self._packed(codes.T, 1).T.contiguous()
        bits, run = self.storage.bits, self._run
        runs = codes.reshape(codes.shape[0], -1, run)
        words = torch.zeros(*runs.shape[:2], run * bits // 32, dtype=torch.int32, device=codes.device)
        for place, element in enumerate(self._order):
            word, shift = divmod(place * bits, 32)
            words[..., word] |= runs[..., element] << shift
            if shift + bits > 32:
                words[..., word + 1] |= runs[..., element] >> 32 - shift
        return words.flatten(1)

    def _group_values(self, parts: Mapping[str, Tensor], box: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """Zero points, int32, and scales, float32, `[groups, columns]` of a box."""
        left, right = box[1]
        skip = left % self._run
        zeros = self._unpacked(parts["zeros"], 1)[:, skip : skip + right - left]
        return zeros + self.storage.zero_offset, parts["scale"].float()

    def _groups_of_rows(self, key: str, parts: Mapping[str, Tensor], box: tuple[tuple[int, int], ...]) -> Tensor:
        """The group of each row of a box, int64, counted from the first group of the parts."""
        order = parts.get("order")
        if order is None:
            rows = torch.arange(*box[0], device=parts["payload"].device)
            group = self.storage.group or box[0][1]
            return rows // group - box[0][0] // group
        groups = parts["scale"].shape[0]
        if order.min() < 0 or order.max() >= groups:
            name = self.companions(key)["order"]
            raise ConversionError("R606", f"{name} names groups {int(order.min())} to {int(order.max())} of {groups}")
        return order.long()

    def _requantised(self, key: str, tensor: Tensor, kept: Kept) -> Tensor:
        """The payload that rounding gives under kept scales and zero points."""
        box = tuple((0, size) for size in tensor.shape)
        parts = {"payload": tensor, **kept.parts}
        zeros, scales = self._group_values(parts, box)
        groups = self._groups_of_rows(key, parts, box)
        dim = 1 if self.storage.layout == "awq" else 0
        step = max(1, STRIP_ELEMENTS // max(1, tensor.shape[1]) // self._run) * self._run
        strips = []
        for start in range(0, len(tensor), step):
            rows = slice(start, start + step)
            quotient = (tensor[rows].float() / scales[groups[rows]]).nan_to_num(0.0).round()
            limit = 1 << self.storage.bits
            codes = (quotient.clamp(-limit * 2, limit * 2).int() + zeros[groups[rows]]).clamp(0, limit - 1)
            strips.append(self._packed(codes, dim))
        return torch.cat(strips)
