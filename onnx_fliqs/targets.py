"""Hardware profiles, as data: what a target can run and how its graph has to look."""

import enum
from dataclasses import dataclass
from typing import Final

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.formats import Format, parse_format, parse_space

__all__ = ["TARGETS", "Dialect", "Placement", "Target", "parse_target"]


class Dialect(enum.Enum):
    """How a graph says that a tensor is quantized."""

    QDQ = "QDQ"
    """QuantizeLinear and DequantizeLinear of ONNX."""
    QONNX = "QONNX"
    """Quant and FloatQuant of QONNX: the exchange format of Brevitas, FINN and hls4ml."""


class Placement(enum.Enum):
    """Which activations get a site."""

    LAYER_INPUTS = "layer inputs"
    """Each layer quantizes its own inputs, in its own format."""
    TENSORS = "tensors"
    """Each tensor is quantized once, where it is made: what integer kernels need, which read
    and write integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A hardware profile."""

    name: str
    description: str
    formats: tuple[str, ...] | None
    """Names of the formats that it runs; None for all of them."""
    default_space: str
    default_bits: float
    """Budget in effective bits where the user names none."""
    dialect: Dialect
    placement: Placement
    unsigned_container: bool
    """Whether signed 8-bit activations travel as uint8 with zero point 128. ONNX Runtime turns
    int8 activations into uint8 itself; 1.31.1 then cannot load some of those graphs."""
    shared_scale_ops: tuple[str, ...]
    """Operators whose inputs and output share one scale, besides those that only rearrange."""
    weight_only_ops: tuple[str, ...] | None
    """Operators of which it runs quantized weights beside float activations well; None for all
    of them."""
    qdq_types: tuple[str, ...] | None
    """ONNX types that its QuantizeLinear and DequantizeLinear take; None for all of them."""

    def space(self, text: str | None) -> tuple[Format, ...]:
        """The formats to search: those asked for, or the target's own.

        Raises:
            ConfigError: The target cannot run a format that was asked for.
        """
        formats = parse_space(text or self.default_space)
        if self.formats is not None:
            illegal = [fmt.name for fmt in formats if fmt.name not in self.formats]
            if illegal:
                raise ConfigError(
                    f"target {self.name} cannot run {', '.join(illegal)};"
                    f" it runs {', '.join(self.formats)}"
                )
        return formats

    def check(self, format_name: str) -> Format:
        """Look up one format that the target must be able to run.

        Raises:
            ConfigError: The format is unknown, or the target cannot run it.
        """
        fmt = parse_format(format_name)
        if self.formats is not None and fmt.name not in self.formats:
            raise ConfigError(
                f"target {self.name} cannot run {fmt.name}; it runs {', '.join(self.formats)}"
            )
        return fmt


TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        Target(
            name="generic",
            description="standard ONNX QDQ; formats without a type of their own are simulated",
            formats=None,
            default_space="int-l",
            default_bits=5.0,
            dialect=Dialect.QDQ,
            placement=Placement.LAYER_INPUTS,
            unsigned_container=True,
            shared_scale_ops=(),
            weight_only_ops=None,
            qdq_types=None,
        ),
        Target(
            name="ort-cpu",
            description="int8 and float on ONNX Runtime's integer CPU kernels",
            formats=("int8", "float32"),
            default_space="int8,float32",
            default_bits=8.0,
            dialect=Dialect.QDQ,
            placement=Placement.TENSORS,
            unsigned_container=True,
            shared_scale_ops=("Concat",),
            # An LSTM whose weights are dequantized in every run takes 1.05 to 2.8 times as
            # long as in float; of a table only the rows that are read are dequantized.
            weight_only_ops=("Gather",),
            qdq_types=("UINT8", "INT8", "INT32"),
        ),
        Target(
            name="qonnx",
            description="any width for FINN and hls4ml, as QONNX (Quant and FloatQuant)",
            formats=None,
            default_space="int-l",
            default_bits=5.0,
            dialect=Dialect.QONNX,
            # Hardware without floats between the layers: each tensor is quantized once, where
            # it is made, residual additions included.
            placement=Placement.TENSORS,
            unsigned_container=False,
            shared_scale_ops=("Concat",),
            weight_only_ops=None,
            qdq_types=(),
        ),
    )
}


def parse_target(name: str) -> Target:
    """Look a target up by name.

    Raises:
        ConfigError: There is no such target.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
