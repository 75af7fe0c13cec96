"""What a rule of :mod:`~onnx_fliqs.lint` looks at, and what it says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import onnx_ir as ir

from onnx_fliqs.layer_operators import PRODUCTS
from onnx_fliqs.quantizers import Quantizer, dequantizer, quantizers
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import Target

__all__ = ["Findings", "Product", "QdqGraph", "Rule", "is_hardware", "type_name"]


Findings: TypeAlias = Iterator[tuple[ir.Node | None, str]]
"""Nodes, and what is wrong with each; None for the whole graph."""


@dataclass(frozen=True)
class QdqGraph:
    """What the rules look at."""

    model: ir.Model
    level: OptimizationLevel
    """At which ONNX Runtime is to run it."""

    @cached_property
    def quantizers(self) -> list[Quantizer]:
        """All QuantizeLinear and DequantizeLinear nodes, in the bodies too."""
        return quantizers(self.model.graph)

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """All operators of ONNX itself, in the bodies too."""
        return [node for node in self.model.graph.all_nodes() if not node.domain]

    @cached_property
    def products(self) -> "list[Product]":
        """The products whose operands are both quantized."""
        found = []
        for node in self.nodes:
            if node.op_type in PRODUCTS and len(node.inputs) > 1:
                first, second = map(dequantizer, node.inputs[:2])
                if first is not None and second is not None:
                    found.append(Product(node, first, second))
        return found


@dataclass(frozen=True, slots=True)
class Product:
    """A product of dequantized operands."""

    node: ir.Node
    first: Quantizer
    second: Quantizer

    @property
    def activations(self) -> Quantizer:
        """The operand that is computed; the first, if both are."""
        return self.second if self.first.is_stored else self.first

    @property
    def weights(self) -> Quantizer:
        """The other one."""
        return self.first if self.first.is_stored else self.second


Rule: TypeAlias = Callable[[QdqGraph, Target], Findings]
"""Called in reports by the name of the function."""


def type_name(dtype: ir.DataType | None) -> str:
    """How messages call a type."""
    return "an unknown type" if dtype is None else dtype.name


def is_hardware(target: Target) -> bool:
    """Whether a target has kernels of its own; any other takes all that ONNX can say."""
    return target.kernels is not None
