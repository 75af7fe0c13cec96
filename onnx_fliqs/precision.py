"""What a layer chooses: a format for its weights and one for its activations.

Names: ``int8`` (both operands), ``int4:int8`` (weights in int4, activations in int8) and
``int4g32:float32`` (weights alone, with a scale for every 32 of them).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
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

__all__ = ["Precision", "PrecisionMap", "parse_precision", "parse_space"]


@dataclass(frozen=True, slots=True)
class Precision:
    """The formats of the two operands of a layer."""

    weights: Format
    activations: Format

    @property
    def name(self) -> str:
        """One name if both are the same, else ``weights:activations``."""
        if self.weights == self.activations:
            return self.weights.name
        return f"{self.weights.name}:{self.activations.name}"

    @property
    def order(self) -> tuple[int, int, float, str]:
        """By which precisions are sorted, the cheapest first."""
        share = 1 / self.weights.group if self.weights.group else 0.0
        return self.weights.bits * self.activations.bits, self.weights.bits, share, self.name

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
    if is_passthrough(weights) and not is_passthrough(activations):
        raise ConfigError(f"{name}: activations alone are not quantized")
    return Precision(weights, activations)


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
    found = {precision.name: precision for precision in map(parse_precision, names)}
    return tuple(sorted(found.values(), key=lambda precision: precision.order))
