"""What a layer chooses: a format for its weights and one for its activations.

Names: ``int8`` (both operands), ``int4:int8`` (weights in int4, activations in int8) and
``int4g32:float32`` (weights alone, with a scale for every 32 of them).
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.formats import (
    SPACES,
    FloatFormat,
    Format,
    IntFormat,
    is_passthrough,
    parse_format,
)

__all__ = [
    "Precision",
    "PrecisionMap",
    "in_words",
    "parse_precision",
    "parse_space",
    "separated",
]


@dataclass(frozen=True, slots=True)
class Precision:
    """The formats of the two operands of a layer."""

    weights: Format
    activations: Format

    @property
    def tied(self) -> bool:
        """Whether both operands are in one format."""
        return self.weights == self.activations

    @property
    def name(self) -> str:
        """One name if both are the same, else ``weights:activations``."""
        if self.tied:
            return self.weights.name
        return f"{self.weights.name}:{self.activations.name}"

    @property
    def order(self) -> tuple[int, int, float, str]:
        """By which precisions are sorted, the cheapest first."""
        share = 1 / self.weights.group if self.weights.group else 0.0
        return self.weights.bits * self.activations.bits, self.weights.bits, share, self.name

    def as_precise_as(self, other: "Precision") -> bool:
        """Whether each operand's grid holds all numbers of the other's, on some scale.

        A partial order, of which ``order`` is one extension. Of e5m2 and e2m4, or e4m3 and
        int8, neither is the more precise one: that depends on the values.
        """
        return _as_precise(self.weights, other.weights) and _as_precise(
            self.activations, other.activations
        )

    @property
    def in_integers(self) -> bool:
        """Whether runtimes may compute a layer of this precision in integers.

        These are the widths whose weights and activations both travel as 8-bit integers. The
        bias is then added to int32 sums, so it is rounded to the product of their scales.
        """
        return all(
            isinstance(fmt, IntFormat) and 4 < fmt.bits <= 8 and fmt.group is None
            for fmt in (self.weights, self.activations)
        )

    @property
    def needs_mantissa(self) -> bool:
        """Whether it rounds to a mantissa: any float format but float32."""
        return any(
            isinstance(fmt, FloatFormat) and fmt.mantissa < 23
            for fmt in (self.weights, self.activations)
        )


def _as_precise(first: Format, second: Format) -> bool:
    if replace(first, group=None) == replace(second, group=None):
        return (first.group or math.inf) <= (second.group or math.inf)
    if isinstance(first, IntFormat):
        if isinstance(second, IntFormat):
            return first.bits > second.bits
        # As whole multiples of the smallest number.
        return second.max / second.smallest <= first.max
    if isinstance(second, FloatFormat):
        return first.exponent >= second.exponent and first.mantissa >= second.mantissa
    # Up to here every multiple of the smallest number is there.
    return 1 << (first.mantissa + 1) >= -second.min


PrecisionMap: TypeAlias = Mapping[str, Precision]
"""Layer name → its precision."""


def parse_precision(name: str) -> Precision:
    """Read a precision's name, ignoring case.

    Raises:
        ConfigError: It names a format that does not exist, or that no layer can choose.
    """
    parts = [parse_format(part) for part in name.split(":")]
    if len(parts) > 2:
        raise ConfigError(f"{name!r} names more than weights:activations")
    for fmt in parts:
        if isinstance(fmt, IntFormat) and not fmt.signed:
            raise ConfigError(
                f"{fmt.name} cannot be searched: ask for {fmt.name[1:]}, which becomes"
                f" {fmt.name} wherever the values are never negative"
            )
    weights, activations = parts[0], parts[-1]
    if activations.group is not None:
        raise ConfigError(
            f"{name}: activations have no groups; name their format behind a colon, as in"
            f" {weights.name}:float32"
        )
    if _only_activations(weights, activations):
        raise ConfigError(f"{name}: activations alone are not quantized")
    return Precision(weights, activations)


def _only_activations(weights: Format, activations: Format) -> bool:
    return is_passthrough(weights) and not is_passthrough(activations)


def parse_space(text: str) -> tuple[Precision, ...]:
    """Turn ``int-l`` or ``int4,int8,int4:int8`` into precisions, cheapest first, no repeats.

    Raises:
        ConfigError: A name is unknown, or the list is empty.
    """
    names = SPACES.get(text.strip().lower()) or tuple(
        part for part in re.split(r"[,\s]+", text) if part
    )
    if not names:
        raise ConfigError("the search space is empty")
    return _sorted(map(parse_precision, names))


def separated(precisions: Iterable[Precision], *, left: bool = True) -> tuple[Precision, ...]:
    """A space in which the formats of weights and of activations are chosen apart.

    Every format that stands for both operands is paired with every other; pairs that were
    asked for by name stay as they are.

    Args:
        precisions: As :func:`parse_space` reads them.
        left: Whether a format that leaves tensors as they are (float32) is paired as well:
            weights alone are then quantized.

    Returns:
        Cheapest first, no repeats.
    """
    given = tuple(precisions)
    tied = [precision.weights for precision in given if precision.tied]
    formats = [fmt for fmt in tied if left or not is_passthrough(fmt)]
    pairs = (
        Precision(weights, activations)
        for weights, activations in itertools.product(formats, repeat=2)
        if not _only_activations(weights, activations)
    )
    return _sorted((*given, *pairs))


def in_words(precisions: Sequence[Precision]) -> str:
    """For people: formats of which every pair is among the precisions are named once."""
    tied = tuple(p for p in precisions if p.tied and not is_passthrough(p.weights))
    product = separated(tied)
    if len(tied) < 2 or not set(product) <= set(precisions):
        return ", ".join(precision.name for precision in precisions)
    others = [p.name for p in precisions if p not in product]
    names = ", ".join(precision.name for precision in tied)
    return ", ".join([f"{names} (weights and activations apart)", *others])


def _sorted(precisions: Iterable[Precision]) -> tuple[Precision, ...]:
    found = {precision.name: precision for precision in precisions}
    return tuple(sorted(found.values(), key=lambda precision: precision.order))
