"""The number formats, as data, and the NumPy reference quantizer.

A format is a grid of representable numbers. Every integer and every minifloat is the same
function of four numbers, its :class:`GridCode`, so a graph that reads the code as an input
quantizes to any format without being rebuilt.

Names: ``int4``, ``uint8``, ``e4m3`` (sign, 4 exponent bits, 3 mantissa bits), and the formats
that keep a tensor's own scale: ``bf16``, ``fp16``, ``float32``. ``int4g32`` has a scale for
every 32 numbers along the axis that a product sums over.
"""

import enum
import math
import re
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.errors import ConfigError

__all__ = [
    "FORMATS",
    "GROUPS",
    "SPACES",
    "FloatFormat",
    "Format",
    "GridCode",
    "IntFormat",
    "Special",
    "fake_quantize",
    "grid_code",
    "is_passthrough",
    "parse_format",
    "quantize",
    "unsigned_variant",
]

Array: TypeAlias = npt.NDArray[np.float32]

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


class Special(enum.Enum):
    """Which codes of a minifloat are not finite numbers; they lower its maximum."""

    NONE = "none"
    """Every code is finite (OCP FP4 and FP6)."""
    NAN = "nan"
    """All ones is NaN, there is no infinity (ONNX FLOAT8E4M3FN, maximum 448)."""
    IEEE = "ieee"
    """The top exponent holds infinity and NaN (ONNX FLOAT8E5M2, float16, bfloat16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntFormat:
    """Integers of two's complement (signed) or plain binary (unsigned)."""

    bits: int
    signed: bool = True
    zero_point: int = 0
    """Of unsigned integers: the code that means 0. The numbers are the codes less this one."""
    group: int | None = None
    """How many numbers share a scale, where fewer than a channel's do."""
    step: int = 1
    """A power of two whose multiples all numbers are: what float32 needs to round them, where
    they are large."""

    @property
    def name(self) -> str:
        """``int4``, ``uint4``, ``uint8z37`` (with a zero point), ``int4g32`` (in groups)."""
        zero = f"z{self.zero_point}" if self.zero_point else ""
        step = f"x{self.step}" if self.step > 1 else ""
        name = f"{'int' if self.signed else 'uint'}{self.bits}"
        return f"{name}{zero}{step}{_suffix(self.group)}"

    @property
    def min(self) -> float:
        """The smallest number."""
        return -float(1 << (self.bits - 1)) if self.signed else -float(self.zero_point)

    @property
    def max(self) -> float:
        """The largest number."""
        return float((1 << (self.bits - self.signed)) - 1 - self.zero_point)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """Binary floating point with a sign, subnormals and the usual bias 2^(exponent-1) - 1."""

    exponent: int
    mantissa: int
    special: Special = Special.NONE
    alias: str | None = None
    """The name where it is not ``e<exponent>m<mantissa>``."""
    group: int | None = None
    """How many numbers share a scale, where fewer than a channel's do."""

    @property
    def name(self) -> str:
        """``e4m3``, ``bf16``, ``e2m1g16`` (in groups)."""
        return (self.alias or f"e{self.exponent}m{self.mantissa}") + _suffix(self.group)

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa bits together."""
        return 1 + self.exponent + self.mantissa

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def max(self) -> float:
        """The largest finite number."""
        top = (1 << (self.exponent - 1)) - (self.special is Special.IEEE)
        significand = 2.0 - math.ldexp(1.0, -self.mantissa)
        if self.special is Special.NAN:
            significand -= math.ldexp(1.0, -self.mantissa)
        return math.ldexp(significand, top)

    @property
    def min(self) -> float:
        """The most negative finite number."""
        return -self.max

    @property
    def smallest(self) -> float:
        """The smallest positive number, a subnormal: also the step of the subnormals."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa)


Format: TypeAlias = IntFormat | FloatFormat

GROUPS: Final = (16, 32, 64, 128, 256)
"""How many numbers may share a scale, where fewer than a channel's do."""


def _suffix(group: int | None) -> str:
    return "" if group is None else f"g{group}"


_MINIFLOATS: Final[tuple[FloatFormat, ...]] = tuple(
    FloatFormat(
        exponent=exponent,
        mantissa=bits - 1 - exponent,
        special={(4, 3): Special.NAN, (5, 2): Special.IEEE}.get(
            (exponent, bits - 1 - exponent), Special.NONE
        ),
    )
    for bits in range(4, 9)
    for exponent in range(2, min(5, bits - 2) + 1)
)
_PASSTHROUGH: Final[tuple[FloatFormat, ...]] = (
    FloatFormat(exponent=8, mantissa=7, special=Special.IEEE, alias="bf16"),
    FloatFormat(exponent=5, mantissa=10, special=Special.IEEE, alias="fp16"),
    FloatFormat(exponent=8, mantissa=23, special=Special.IEEE, alias="float32"),
)

_INTEGERS: Final[tuple[IntFormat, ...]] = tuple(
    IntFormat(bits=b, signed=s) for s in (True, False) for b in (*range(2, 9), 16)
)
_ALL: Final[tuple[Format, ...]] = (*_INTEGERS, *_MINIFLOATS, *_PASSTHROUGH)

FORMATS: Final[dict[str, Format]] = {fmt.name: fmt for fmt in _ALL}
"""Every format with one scale for a tensor or channel, by name."""

SPACES: Final[dict[str, tuple[str, ...]]] = {
    "int-s": ("int4", "int8"),
    "int-l": ("int4", "int5", "int6", "int7", "int8"),
    "fp-s": ("e2m1", "e4m3"),
    "fp-l": tuple(fmt.name for fmt in _MINIFLOATS),
}
"""The named search spaces: FLIQS-S and FLIQS-L, for integers and for minifloats."""


def parse_format(name: str) -> Format:
    """Look a format up by name, ignoring case.

    Raises:
        ConfigError: There is no such format.
    """
    text = name.strip().lower()
    base, separator, size = text.partition("g")
    fmt = FORMATS.get(base)
    group = int(size) if re.fullmatch(r"[0-9]{1,6}", size) else 0
    if fmt is None or (separator and (group not in GROUPS or is_passthrough(fmt))):
        raise ConfigError(
            f"unknown format {name.strip()!r}; known: {', '.join(FORMATS)}, and those of at"
            f" most 16 bits with g{', g'.join(map(str, GROUPS))} for a scale per group"
        )
    return replace(fmt, group=group) if separator else fmt


def is_passthrough(fmt: Format) -> bool:
    """Whether the format keeps the tensor's own scale (bf16, fp16, float32)."""
    return isinstance(fmt, FloatFormat) and fmt.bits >= 16


def unsigned_variant(fmt: Format, negative: float = 0.0) -> Format:
    """The integers whose range is not symmetric: ``uint4`` for ``int4``; other formats stay.

    Args:
        fmt: A format.
        negative: Share of the range that lies below zero, 0 to 1.
    """
    if not isinstance(fmt, IntFormat):
        return fmt
    # Something above zero can always be represented.
    zero_point = min(round(negative * ((1 << fmt.bits) - 1)), (1 << fmt.bits) - 2)
    return IntFormat(bits=fmt.bits, signed=False, zero_point=zero_point)


class GridCode(NamedTuple):
    """What a format feeds into a searchable site (one row of the site-code matrix).

    With t = clip(x / scale, lo, hi) and ``anchor = max(|t| * factor, least)`` the site
    computes ``anchor - (anchor - |t|)``, with the sign of t, times scale, in float32.
    Subtracting from a number of which the last bit is worth a step rounds to that step, to
    nearest even. For floats, factor is 2^(23 - mantissa): the last bit of ``|t| * factor`` is
    worth what the last of |t| is in the format. ``least`` is 1.5 * 2^23 smallest steps: for
    subnormals, and for all integers. The result equals :func:`quantize`, but for the sign of
    zero, which is lost.
    """

    lo: float
    hi: float
    factor: float
    least: float


def grid_code(fmt: Format) -> GridCode:
    """The four numbers with which a site rounds to ``fmt``.

    ``float32`` is the identity: nothing is clipped, and nothing is added.
    """
    if isinstance(fmt, IntFormat):
        return GridCode(fmt.min, fmt.max, 0.0, 1.5 * (1 << 23) * fmt.step)
    if fmt.mantissa == 23:
        return GridCode(-_FLOAT32_MAX, _FLOAT32_MAX, 0.0, 0.0)
    factor = float(1 << (23 - fmt.mantissa))
    # |t| * factor must stay finite; this only lowers the ends of bf16, to 5e33.
    end = min(fmt.max, _FLOAT32_MAX / (factor + 1))
    return GridCode(-end, end, factor, 1.5 * (1 << 23) * fmt.smallest)


def quantize(x: npt.ArrayLike, fmt: Format) -> Array:
    """Round to the nearest number of the format, ties to even, saturating at its ends.

    Args:
        x: Finite numbers of any shape, already divided by the scale.
        fmt: The format.

    Returns:
        float32 numbers of the same shape, each representable in ``fmt``.
    """
    value = np.asarray(x, dtype=np.float32)
    if isinstance(fmt, IntFormat):
        step = np.float32(fmt.step)
        whole: Array = np.rint(value / step) * step
        return np.clip(whole, np.float32(fmt.min), np.float32(fmt.max))
    if fmt.mantissa == 23:
        return value
    exponent = np.frexp(value)[1] - 1
    step = np.ldexp(1.0, np.maximum(exponent, fmt.min_exponent) - fmt.mantissa)
    rounded: npt.NDArray[np.float64] = np.rint(value / step) * step  # exact in float64
    return np.clip(rounded, fmt.min, fmt.max).astype(np.float32)


def fake_quantize(x: Array, scale: npt.ArrayLike, fmt: Format) -> Array:
    """Quantize and dequantize: the numbers that a site with this scale hands on.

    Args:
        x: float32 values of any shape.
        scale: Positive, broadcastable to ``x``.
        fmt: The format.
    """
    s = np.asarray(scale, dtype=np.float32)
    return quantize(x / s, fmt) * s
