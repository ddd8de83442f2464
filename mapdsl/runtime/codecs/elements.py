"""The elements of block-scaled formats: FP8 e4m3 and e5m2, FP4 e2m1, and a plain tensor beside its scale.

Every question about a format of eight bits or fewer is answered by two small tables, so that -0.0, NaNs, denormals and
saturation are the same on every device and in every release of torch.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mapdsl.runtime.codecs.formats import FLOAT_DTYPES, exact_cast, integer_dtype, round_product
from mapdsl.runtime.codecs.scales import scale_values


class Element(ABC):
    """How one stored element of a block-scaled payload spells `per` logical values."""

    name: str
    per: int = 1
    table_size: int = 0  # codes that a table can list; 0: too many, decode by multiplication

    @abstractmethod
    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether a payload may have this dtype."""

    @abstractmethod
    def read(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode `[..., w]` stored elements to `[..., w * per]` values of `dtype`; `factors` are `[..., 1]`."""

    @abstractmethod
    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype) -> Tensor:
        """Divide `[..., w * per]` values by their scales and round: `[..., w]` elements of the dtype `stored`."""

    @abstractmethod
    def fresh_ratio(self, largest: Tensor) -> Tensor:
        """The scale, before it is rounded to its dtype, of blocks with these largest finite magnitudes (float32)."""

    @abstractmethod
    def cannot_hold(self, values: Tensor) -> Tensor:
        """A mask of the values that no code stands for, whatever the scale."""

    @abstractmethod
    def reproduces(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> bool:
        """Whether it is certain, without trying, that these codes survive decoding to `dtype` and encoding again."""


class MiniFloat(Element):
    """A float of eight bits or fewer, `per` in a byte, low bits first; `values` are those of its positive codes."""

    def __init__(self, name: str, dtype: torch.dtype, values: list[float], per: int = 1) -> None:
        self.name, self.dtype, self.per, self.table_size = name, dtype, per, 256
        finite = [value for value in values if math.isfinite(value)]
        self.largest, self.smallest = max(finite), min(value for value in finite if value > 0)
        self.holds_inf = math.inf in values
        self.holds_nan = any(math.isnan(value) for value in values)
        # Tables are made once, on the CPU: whoever asks first may be under `torch.device("meta")`.
        halves = torch.tensor(values, dtype=torch.float32, device="cpu")
        by_code = torch.cat([halves, torch.copysign(halves, -torch.ones_like(halves))])
        codes = torch.arange(256, device="cpu")
        nibbles = [codes] if per == 1 else [codes & 15, codes >> 4]
        self._by_byte = torch.stack([by_code[nibble] for nibble in nibbles], dim=-1)
        self._rounding = _rounding_table(values)
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def accepts(self, dtype: torch.dtype) -> bool:
        """The declared one only: bytes of another dtype mean something else."""
        return dtype == self.dtype

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """On a device, the values of each byte, float32 `[256, per]`, and the code of each odd-rounded float."""
        if device not in self._copies:
            self._copies[device] = self._by_byte.to(device), self._rounding.to(device)
        return self._copies[device]

    def table(self, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """For `[n]` scales the bits of all decoded bytes, `[n * 256]`: one integer for the `per` values of a byte."""
        values = round_product(self._on(factors.device)[0], factors[:, None, None], dtype)
        return values.view(integer_dtype(dtype.itemsize * self.per)).view(-1)

    def read(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Products in float32 of value and scale, rounded once to `dtype`."""
        # As one integer a byte: rows of a table are gathered far more slowly than its elements.
        table = self._on(codes.device)[0].view(integer_dtype(4 * self.per)).view(-1)
        picked = table.index_select(0, codes.view(torch.uint8).flatten().int()).view(torch.float32)
        return round_product(picked.view(*codes.shape, self.per), factors[..., None], dtype).flatten(-2)

    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype) -> Tensor:
        """Round to nearest, ties to the even code, saturating; NaN keeps its sign, infinity is kept if there is one."""
        quotient = values.float() / factors
        table = self._on(values.device)[1]
        codes = table.index_select(0, _odd_sixteen(quotient).view(-1)).view(values.shape)
        if self.holds_nan and (codes & 0x7F).max() == 0x7F:
            # Division may lose the sign of a NaN.
            nan = (codes & 0x7F) == 0x7F
            codes[nan] = values[nan].signbit().to(torch.uint8) * 128 + 0x7F
        if self.per == 2:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        return codes.view(stored)

    def fresh_ratio(self, largest: Tensor) -> Tensor:
        """The largest magnitude becomes the largest code: amax / 448, / 57344, / 6."""
        return largest / self.largest

    def cannot_hold(self, values: Tensor) -> Tensor:
        """Infinities where the format has none, NaNs likewise."""
        mask = torch.zeros_like(values, dtype=torch.bool) if self.holds_inf else values.isinf()
        return mask if self.holds_nan else mask | values.isnan()

    def reproduces(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> bool:
        """Scales in a range, and no NaN code but the one that is written.

        The range: products normal in float32, finite in `dtype`, and two of its denormal steps or more. Then a decoded
        value is off by 2**-8 of itself at most (bf16 rounds twice: 2**-9 and 2**-24) and a quarter of the distance to
        the next code, which is 2**-4 of it or more: dividing and rounding finds the code. Zeros keep their sign.
        """
        sizes = factors.abs()
        limits, single = torch.finfo(dtype), torch.finfo(torch.float32)
        low = max(2 * limits.tiny * limits.eps, single.tiny) / self.smallest
        safe = (sizes >= low) & (sizes <= min(limits.max, single.max) / self.largest)
        if not safe.all():
            return False
        if not (self.holds_inf and self.holds_nan):
            return True
        magnitudes = codes.view(torch.uint8) & 0x7F
        return bool(magnitudes.max() <= 0x7C) or not ((magnitudes > 0x7C) & (magnitudes < 0x7F)).any()


class PlainElement(Element):
    """`same`: the payload is a plain float tensor, scaled by the companion (Gemma's `per_expert_scale`)."""

    name = "same"

    def accepts(self, dtype: torch.dtype) -> bool:
        """Any float of 16 bits or more."""
        return dtype in FLOAT_DTYPES

    def read(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Payload times scale in float32, rounded once."""
        return round_product(exact_cast(codes, torch.float32), factors, dtype)

    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype) -> Tensor:
        """Values over scale in float32, rounded once; NaNs pass, and a scale of one changes no bit."""
        quotient = exact_cast(values.float() / factors, stored)
        return torch.where((factors == 1) | values.isnan(), exact_cast(values, stored), quotient)

    def fresh_ratio(self, largest: Tensor) -> Tensor:
        """One: nothing needs scaling."""
        return torch.ones_like(largest)

    def cannot_hold(self, values: Tensor) -> Tensor:
        """Nothing."""
        return torch.zeros_like(values, dtype=torch.bool)

    def reproduces(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> bool:
        """Only where nothing happens at all: rounding a product may join two neighbours."""
        return False


def _minifloat_values(exponent_bits: int, mantissa_bits: int, specials: dict[int, float]) -> list[float]:
    """The values of the non-negative codes, by the formula of the OCP specifications; `specials` overrides codes."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, fraction = divmod(code, steps)
        magnitude = math.ldexp(fraction + steps * (exponent > 0), max(exponent, 1) - bias - mantissa_bits)
        values.append(specials.get(code, magnitude))
    return values


def _odd_sixteen(values: Tensor) -> Tensor:
    """The upper 16 bits of each float32, the lowest set if any bit below it is (round to odd), as int32 indices.

    Rounding the result to a format of fewer than seven mantissa bits gives what rounding the float32 gives, ties and
    all (Boldo and Melquiond 2008), so that a table of 65,536 entries decides for every float32.
    """
    bits = values.contiguous().view(torch.int32)
    odd = bits & 0xFFFF
    odd += 0xFFFF
    odd |= bits
    odd >>= 16
    odd &= 0xFFFF
    return odd


def _rounding_table(values: list[float]) -> Tensor:
    """The code, uint8 `[65536]`, of each float of 16 bits with an 8-bit exponent: nearest, ties to even, saturating."""
    finite = [value for value in values if math.isfinite(value)]
    grid = torch.tensor(finite, dtype=torch.float64, device="cpu")
    patterns = torch.arange(0x8000, dtype=torch.int32, device="cpu") << 16
    magnitudes = patterns.view(torch.float32).double()
    below = torch.searchsorted(grid, magnitudes, right=True).clamp(max=len(finite)) - 1
    above = (below + 1).clamp(max=len(finite) - 1)
    middle = (grid[below] + grid[above]) / 2
    up = (magnitudes > middle) | ((magnitudes == middle) & (below % 2 == 1))
    codes = torch.where(up, above, below)
    if math.inf in values:
        codes[magnitudes.isinf()] = values.index(math.inf)
    if len(values) > len(finite):
        codes[magnitudes.isnan()] = len(values) - 1
    return torch.cat([codes, codes + len(values)]).to(torch.uint8)


@functools.lru_cache(maxsize=32)
def power_table(element: MiniFloat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All 256 e8m0 scales by all 256 bytes: the entry of a byte under a scale is at `scale * 256 + byte`."""
    scales = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    return element.table(scale_values(scales), dtype)


@functools.cache
def element_named(name: str, packed: str) -> Element:
    """The element of a codec's declaration: `f8e4m3`, `f8e5m2`, `f4e2m1` (two to a byte, of dtype `packed`), `same`.

    FP8: OCP 8-bit floating point specification v1.0 (e4m3 has one NaN a sign and no infinity). FP4: OCP MX v1.0.
    """
    if name == "f8e4m3":
        return MiniFloat(name, torch.float8_e4m3fn, _minifloat_values(4, 3, {0x7F: math.nan}))
    if name == "f8e5m2":
        specials = {0x7C: math.inf, 0x7D: math.nan, 0x7E: math.nan, 0x7F: math.nan}
        return MiniFloat(name, torch.float8_e5m2, _minifloat_values(5, 2, specials))
    if name == "f4e2m1":
        return MiniFloat(name, {"i8": torch.int8, "u8": torch.uint8}[packed], _minifloat_values(2, 1, {}), per=2)
    if name == "same":
        return PlainElement()
    raise ValueError(f"no block-scaled element is called {name!r}")
