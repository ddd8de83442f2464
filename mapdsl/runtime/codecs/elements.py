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
    largest: float = math.inf  # magnitude of a finite code
    reach: float = math.inf  # magnitude that new scales give the largest value of a block
    top_exponent: int = 0  # of the largest power of two

    @abstractmethod
    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether a payload may have this dtype."""

    @abstractmethod
    def read(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode `[..., w]` stored elements to `[..., w * per]` values of `dtype`; `factors` are `[..., 1]`."""

    @abstractmethod
    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype, scratch: Tensor | None = None) -> Tensor:
        """Divide `[..., w * per]` values by their scales and round: `[..., w]` elements of the dtype `stored`.

        `scratch` is float32 memory of as many elements as there are values, or none.
        """

    def fresh_ratio(self, largest: Tensor) -> Tensor:
        """The scale, before it is rounded to its dtype, of blocks with these largest finite magnitudes (float32)."""
        return largest / self.reach

    @abstractmethod
    def cannot_hold(self, values: Tensor) -> Tensor:
        """A mask of the values that no code stands for, whatever the scale."""

    @abstractmethod
    def reproduces(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> bool:
        """Whether it is certain, without trying, that these codes survive decoding to `dtype` and encoding again."""


class TableElement(Element):
    """An element of eight bits or fewer, `per` in a byte, low bits first; `values` are those of its codes, in order."""

    def __init__(self, name: str, dtype: torch.dtype, values: list[float], per: int) -> None:
        self.name, self.dtype, self.per, self.table_size = name, dtype, per, 256
        magnitudes = [abs(value) for value in values if math.isfinite(value)]
        self.largest, self.smallest = max(magnitudes), min(value for value in magnitudes if value > 0)
        # Tables are made once, on the CPU: whoever asks first may be under `torch.device("meta")`.
        by_code = torch.tensor(values, dtype=torch.float32, device="cpu")
        codes = torch.arange(256, device="cpu")
        bits = 8 // per
        self._by_byte = torch.stack([by_code[codes >> bits * place & (1 << bits) - 1] for place in range(per)], dim=-1)
        self._copies: dict[torch.device, Tensor] = {}

    def accepts(self, dtype: torch.dtype) -> bool:
        """The declared one only: bytes of another dtype mean something else."""
        return dtype == self.dtype

    def _values(self, device: torch.device) -> Tensor:
        """On a device, the values of each byte, float32 `[256, per]`."""
        if device not in self._copies:
            self._copies[device] = self._by_byte.to(device)
        return self._copies[device]

    def table(self, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """For `[n]` scales the bits of all decoded bytes, `[n * 256]`: one integer for the `per` values of a byte."""
        values = round_product(self._values(factors.device), factors[:, None, None], dtype)
        return values.view(integer_dtype(dtype.itemsize * self.per)).view(-1)

    def read(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Products in float32 of value and scale, rounded once to `dtype`."""
        # As one integer a byte: rows of a table are gathered far more slowly than its elements.
        table = self._values(codes.device).view(integer_dtype(4 * self.per)).view(-1)
        picked = table.index_select(0, codes.view(torch.uint8).flatten().int()).view(torch.float32)
        return round_product(picked.view(*codes.shape, self.per), factors[..., None], dtype).flatten(-2)

    def packed(self, codes: Tensor, stored: torch.dtype) -> Tensor:
        """Codes, one in each uint8 of the last dimension, put `per` into a byte."""
        if self.per == 2:
            pairs = codes.contiguous().view(torch.int16)
            codes = (pairs | pairs >> 4).to(torch.uint8)
        return codes.view(stored)

    def reproduces(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> bool:
        """Scales in a range, and no code but those that are written."""
        return self.are_harmless(factors, dtype) and not self.holds_unwritten(codes)

    def are_harmless(self, factors: Tensor, dtype: torch.dtype) -> bool:
        """Whether any code that is written survives decoding to `dtype` under these scales.

        The range: products normal in float32, finite in `dtype`, and two of its denormal steps or more. Then a decoded
        value is off by 2**-8 of itself at most (bf16 rounds twice: 2**-9 and 2**-24) and a quarter of the distance to
        the next code, which is 2**-4 of it or more: dividing and rounding finds the code. Of integers up to 128 it is
        off by 2**-2 at most. Zeros keep their sign.
        """
        sizes = factors.abs()
        limits, single = torch.finfo(dtype), torch.finfo(torch.float32)
        low = max(2 * limits.tiny * limits.eps, single.tiny) / self.smallest
        safe = (sizes >= low) & (sizes <= min(limits.max, single.max) / self.largest)
        return bool(safe.all())

    def holds_unwritten(self, codes: Tensor) -> bool:
        """Whether there are codes that encoding would never write."""
        return False


class MiniFloat(TableElement):
    """A float of eight bits or fewer, a sign among them; `specials` are positive codes that mean something else."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        exponent_bits: int,
        mantissa_bits: int,
        specials: dict[int, float],
        per: int = 1,
    ) -> None:
        self.exponent_bits, self.mantissa_bits = exponent_bits, mantissa_bits
        self.magnitudes = values = _minifloat_values(exponent_bits, mantissa_bits, specials)
        super().__init__(name, dtype, values + [math.copysign(value, -1.0) for value in values], per)
        self.reach = self.largest  # amax / 448, / 57344, / 6
        self.holds_inf = math.inf in values
        self.holds_nan = any(math.isnan(value) for value in values)
        self.top_exponent = math.frexp(self.largest)[1] - 1
        second, first = sorted(value for value in values if math.isfinite(value))[-2:]
        # The smallest magnitude that rounds to more than the largest code; where infinity follows, a tie does.
        self.overflow = first + (first - second) / 2
        self._rounding_copies: dict[torch.device, Tensor] = {}

    def _codes(self, device: torch.device) -> Tensor:
        """On a device, the code of each odd-rounded float, uint8 `[65536]`."""
        if device not in self._rounding_copies:
            self._rounding_copies[device] = _rounding_table(self.magnitudes).to(device)
        return self._rounding_copies[device]

    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype, scratch: Tensor | None = None) -> Tensor:
        """Round to nearest, ties to the even code, saturating; NaN keeps its sign, infinity is kept if there is one."""
        quotient = _quotient(values, factors, scratch)
        if self.dtype == torch.float8_e4m3fn:
            # torch's cast rounds so too, and twice as fast; what is too large it makes NaN.
            codes = quotient.clamp_(-self.largest, self.largest).to(self.dtype).view(torch.uint8)
        else:
            codes = self._codes(values.device).index_select(0, _odd_sixteen(quotient).view(-1)).view(values.shape)
        if self.holds_nan and (codes & 0x7F).max() == 0x7F:
            # Division may lose the sign of a NaN.
            nan = (codes & 0x7F) == 0x7F
            codes[nan] = values[nan].signbit().to(torch.uint8) * 128 + 0x7F
        return self.packed(codes, stored)

    def cannot_hold(self, values: Tensor) -> Tensor:
        """Infinities where the format has none, NaNs likewise."""
        mask = torch.zeros_like(values, dtype=torch.bool) if self.holds_inf else values.isinf()
        return mask if self.holds_nan else mask | values.isnan()

    def holds_unwritten(self, codes: Tensor) -> bool:
        """Of e5m2's three NaNs of each sign one is written."""
        if not (self.holds_inf and self.holds_nan):
            return False
        magnitudes = codes.view(torch.uint8) & 0x7F
        return bool(magnitudes.max() > 0x7C) and bool(((magnitudes > 0x7C) & (magnitudes < 0x7F)).any())


class Integer(TableElement):
    """A signed integer of up to eight bits: two's complement in an int8 of its own, or packed, with an offset."""

    def __init__(self, name: str, dtype: torch.dtype, bits: int, per: int, offset: bool) -> None:
        self.low, self.high = -(1 << bits - 1), (1 << bits - 1) - 1
        self.offset = -self.low if offset else 0
        width = 8 // per
        codes = range(1 << width)
        signed = [float(code - (1 << width) * (code >> width - 1)) for code in codes]
        super().__init__(name, dtype, [float(code + self.low) for code in codes] if offset else signed, per)
        self.top_exponent = bits - 2
        self.reach = (self.high - self.low) / 2  # half the range: amax / 7.5 and / 127.5, as compressed-tensors

    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype, scratch: Tensor | None = None) -> Tensor:
        """Round to nearest, ties to even, saturating."""
        return self.packed(self.rounded(_quotient(values, factors, scratch)), stored)

    def rounded(self, quotient: Tensor) -> Tensor:
        """The codes, uint8, nearest to quotients, which are overwritten; of a block whose scale is zero, zero."""
        integers = quotient.nan_to_num_(0.0).round_().clamp_(self.low, self.high).add_(self.offset)
        return integers.to(torch.int8 if not self.offset else torch.uint8).view(torch.uint8)

    def holds_unwritten(self, codes: Tensor) -> bool:
        """Integers beyond the range of narrow ones that have a byte each."""
        if self.offset or self.per > 1 or self.high == 127:
            return False
        return bool(codes.min() < self.low) or bool(codes.max() > self.high)

    def cannot_hold(self, values: Tensor) -> Tensor:
        """What is not finite."""
        return ~values.isfinite()


class PlainElement(Element):
    """`same`: the payload is a plain float tensor, scaled by the companion (Gemma's `per_expert_scale`)."""

    name = "same"

    def accepts(self, dtype: torch.dtype) -> bool:
        """Any float of 16 bits or more."""
        return dtype in FLOAT_DTYPES

    def read(self, codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
        """Payload times scale in float32, rounded once."""
        return round_product(exact_cast(codes, torch.float32), factors, dtype)

    def write(self, values: Tensor, factors: Tensor, stored: torch.dtype, scratch: Tensor | None = None) -> Tensor:
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


def _quotient(values: Tensor, factors: Tensor, scratch: Tensor | None) -> Tensor:
    """Values over scales in float32, in the scratch if there is any: new memory costs more than dividing."""
    if scratch is None:
        return values.float() / factors
    return scratch[: values.numel()].view(values.shape).copy_(values).div_(factors)


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
def power_table(element: TableElement, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All 256 e8m0 scales by all 256 bytes: the entry of a byte under a scale is at `scale * 256 + byte`."""
    scales = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    return element.table(scale_values(scales), dtype)


@functools.cache
def element_named(name: str, packed: str) -> Element:
    """The element of a codec's declaration: `f8e4m3`, `f8e5m2`, `f4e2m1` and `i4` (packed in `packed`), `i8`, `same`.

    FP8: OCP 8-bit floating point specification v1.0 (e4m3 has one NaN a sign and no infinity). FP4: OCP MX v1.0.
    Integers in 32-bit words are read as the bytes of the words, low ones first.
    """
    container = {"i8": torch.int8, "u8": torch.uint8, "i32": torch.uint8}[packed]
    if name == "f8e4m3":
        return MiniFloat(name, torch.float8_e4m3fn, 4, 3, {0x7F: math.nan})
    if name == "f8e5m2":
        specials = {0x7C: math.inf, 0x7D: math.nan, 0x7E: math.nan, 0x7F: math.nan}
        return MiniFloat(name, torch.float8_e5m2, 5, 2, specials)
    if name == "f4e2m1":
        return MiniFloat(name, container, 2, 1, {}, per=2)
    if name in ("i4", "i8"):
        bits = int(name[1:])
        return Integer(name, container, bits, 8 // bits, offset=packed != "i8")
    if name == "same":
        return PlainElement()
    raise ValueError(f"no block-scaled element is called {name!r}")
