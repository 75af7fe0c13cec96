"""Fold multiplications by constants, and additions of them, into the layer before."""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    constant_of,
    is_standard,
    only_reader,
    require_opset,
    take_over_output,
    used_names,
)
from onnx_fliqs.passes._linear import LinearLayer, linear_layer

__all__ = ["FoldScalingPass"]

_Array: TypeAlias = npt.NDArray[np.float64]
_COMMUTATIVE: Final = ("Mul", "Add")


class FoldScalingPass(ir.passes.InPlacePass):
    """Fold Mul, Div, Add and Sub by one number per channel into the layer before it.

    Before:  c = Conv (x, w, b);  s = Mul (c, factor);  y = Add (s, offset)
    After:   y = Conv (x, w', b')

    Between integer kernels each of them would be computed in float. The layer is a Conv,
    ConvTranspose, Gemm or, for Mul and Div, MatMul, whose Add is its bias.

    Requires: opset >= 14; constant weights are initializers.
    Ensures: no such node is the only reader of a layer with constant weights; results change
        by float32 rounding only; the graph's signature is unchanged.
    Idempotent: without such a node nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which operands broadcast differently."""
        require_opset(model, 14)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold node by node, in the graph's order, so that chains disappear."""
        taken = used_names(model)
        count = sum([_fold(node, taken) for node in list(model.graph.all_nodes())])
        return ir.passes.PassResult(model, modified=count > 0)


@dataclass(frozen=True, slots=True)
class _Scaling:
    """What a node computes of one operand: ``x * factor + offset``."""

    operand: ir.Value
    factor: _Array
    offset: _Array
    """Of the same shape."""


def _fold(node: ir.Node, taken: set[str]) -> bool:
    scaling = _scaling(node)
    if scaling is None or only_reader(scaling.operand) is None:
        return False
    layer = linear_layer(scaling.operand.producer())
    if layer is None or layer.node.graph is not node.graph:
        return False
    if layer.node.op_type == "MatMul" and scaling.offset.any():
        return False
    if not _is_per_channel(scaling.factor, layer):
        return False
    factor, offset = scaling.factor.reshape(-1), scaling.offset.reshape(-1)
    weight = layer.times_outputs(factor)
    if weight is None or not np.isfinite(weight).all():
        return False
    suffix = str(node.outputs[0].name)
    layer.write(weight, suffix, taken, factor=factor, shift=layer.as_bias(offset))
    take_over_output(node, scaling.operand)
    return True


def _scaling(node: ir.Node) -> _Scaling | None:
    """The node as a function of its computed operand, if the other one is constant."""
    if not is_standard(node, *_COMMUTATIVE, "Div", "Sub"):
        return None
    constants = [constant_of(value) for value in node.inputs]
    places = [index for index, array in enumerate(constants) if array is not None]
    if len(places) != 1 or (places == [0] and node.op_type not in _COMMUTATIVE):
        return None
    operand, array = node.inputs[1 - places[0]], constants[places[0]]
    assert operand is not None
    assert array is not None
    if array.dtype.kind != "f" or (node.op_type == "Div" and not array.all()):
        return None
    constant = array.astype(np.float64)
    if node.op_type in ("Add", "Sub"):
        offset = -constant if node.op_type == "Sub" else constant
        return _Scaling(operand, np.ones_like(offset), offset)
    factor = 1 / constant if node.op_type == "Div" else constant
    return _Scaling(operand, factor, np.zeros_like(factor))


def _is_per_channel(constant: _Array, layer: LinearLayer) -> bool:
    """Whether a constant is one number, or varies along the channels of a layer's output only.

    It must not make the output larger, as one of a higher rank does.
    """
    if constant.ndim > (layer.rank or 2):
        return False
    axis = (
        layer.channel_axis
        if layer.channel_axis < 0
        else layer.channel_axis - (layer.rank or 2)
    )
    along = constant.shape[axis] if constant.ndim >= -axis else 1
    return constant.size == along
