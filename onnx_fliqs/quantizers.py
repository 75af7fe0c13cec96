"""Reads the QuantizeLinear and DequantizeLinear nodes of a graph, ours or anybody's."""

from dataclasses import dataclass
from typing import Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "Array",
    "Quantizer",
    "dequantizer",
    "quantizer",
    "quantizers",
]

Array: TypeAlias = npt.NDArray[np.float64]

_OPERATORS: Final = ("QuantizeLinear", "DequantizeLinear")
_DOMAINS: Final = ("", "com.microsoft")


@dataclass(frozen=True, slots=True)
class Quantizer:
    """One such node. What is computed while the graph runs is None."""

    node: ir.Node
    dtype: ir.DataType | None
    """Of the codes; None where nothing in the graph tells."""
    is_stored: bool
    """Whether what it reads is constant: weights, not activations."""

    @property
    def codes(self) -> npt.NDArray[np.generic] | None:
        """The numbers that it reads, where they are constant."""
        tensor = _constant(self.node.inputs[0])
        return None if tensor is None else tensor.numpy()

    @property
    def codes_shape(self) -> tuple[int, ...] | None:
        """Their shape, where they are constant."""
        tensor = _constant(self.node.inputs[0])
        return None if tensor is None else tuple(tensor.shape.numpy())

    @property
    def rank(self) -> int | None:
        """The number of axes of what it reads, where it is known."""
        value = _unquantized(self.node.inputs[0])
        tensor = _constant(value)
        shape = tensor.shape if tensor is not None else value.shape if value else None
        return None if shape is None else len(shape)

    @property
    def scale(self) -> Array | None:
        """All scales."""
        tensor = _constant(self.node.inputs[1])
        return None if tensor is None else tensor.numpy().astype(np.float64)

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Their shape."""
        tensor = _constant(self.node.inputs[1])
        return None if tensor is None else tuple(tensor.shape.numpy())

    @property
    def least_scale(self) -> float:
        """The smallest normal number of the scale's type."""
        tensor = _constant(self.node.inputs[1])
        if tensor is None:
            return 0.0
        kind = tensor.dtype.numpy()
        return float(ml_dtypes.finfo(kind).smallest_normal)  # type: ignore[no-untyped-call]

    @property
    def has_one_scale(self) -> bool:
        """Whether one scale is for all numbers, as far as is known."""
        tensor = _constant(self.node.inputs[1])
        return tensor is None or tensor.size == 1

    @property
    def spells_zero(self) -> bool:
        """Whether it has a zero point."""
        return len(self.node.inputs) > 2 and self.node.inputs[2] is not None

    @property
    def zero_point(self) -> Array | None:
        """All zero points; 0 where there is none."""
        if not self.spells_zero:
            return np.zeros(())
        tensor = _constant(self.node.inputs[2])
        return None if tensor is None else tensor.numpy().astype(np.float64)

    @property
    def has_zeros(self) -> bool:
        """Whether every zero point is 0, as far as is known."""
        zero_point = self.zero_point
        return zero_point is None or not zero_point.any()

    @property
    def axis(self) -> int:
        """Along which its scales lie, where there are several; from the front if possible."""
        axis, rank = self.node.attributes.get_int("axis", 1), self.rank
        return axis if axis >= 0 or rank is None else axis + rank

    @property
    def block(self) -> int:
        """How many numbers along the axis share a scale; 0 for all of them."""
        return self.node.attributes.get_int("block_size", 0)


def quantizers(graph: ir.Graph) -> list[Quantizer]:
    """All of a graph and of the bodies in it."""
    return [_read(node) for node in graph.all_nodes() if _is_quantizer(node)]


def dequantizer(value: ir.Value | None) -> Quantizer | None:
    """The DequantizeLinear that makes a value, if one does."""
    node = value.producer() if value is not None else None
    if node is None or not _is_quantizer(node) or node.op_type != "DequantizeLinear":
        return None
    return _read(node)


def quantizer(value: ir.Value) -> Quantizer | None:
    """The first QuantizeLinear that reads a value."""
    for node, index in value.uses():
        if index == 0 and _is_quantizer(node) and node.op_type == "QuantizeLinear":
            return _read(node)
    return None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The content of an initializer or Constant that no caller can override."""
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def _is_quantizer(node: ir.Node) -> bool:
    return node.op_type in _OPERATORS and node.domain in _DOMAINS


def _read(node: ir.Node) -> Quantizer:
    return Quantizer(node, _dtype(node), _constant(_unquantized(node.inputs[0])) is not None)


def _unquantized(value: ir.Value | None) -> ir.Value | None:
    """What codes were made from, as far as quantizers alone made them."""
    while value is not None and (node := value.producer()) is not None:
        if not _is_quantizer(node):
            break
        value = node.inputs[0]
    return value


def _dtype(node: ir.Node) -> ir.DataType | None:
    """The type of the codes that a node reads or writes."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    if node.op_type == "QuantizeLinear":
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    return _dtype_of(node.inputs[0])


def _dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The type of codes, through operators that hand them on where it is not written down."""
    while value is not None and value.dtype is None and (node := value.producer()) is not None:
        if _is_quantizer(node):
            return _dtype(node)
        value = node.inputs[0] if node.inputs else None
    return None if value is None else value.dtype
