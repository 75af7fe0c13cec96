"""Gives scalars as many axes as the tensors that they are combined with."""

from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._graph import is_standard, require_opset
from onnx_fliqs.passes._ops import Ops, known_shape

__all__ = ["AlignScalarsPass"]

_BROADCASTING: Final = tuple(
    """
    Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Pow Sub Sum Xor
    """.split()  # noqa: SIM905 - reads as a list
)


class AlignScalarsPass(ir.passes.InPlacePass):
    """Give scalars the rank of tensors whose last axis has one element.

    Before:  y = Mul (w, s)                   # w: [960, 160, 1, 1], s: []
    After:   y = Mul (w, Reshape (s, [1, 1, 1, 1]))

    Where ranks differ, ONNX Runtime's broadcasting takes the axes of w one by one and starts
    with the last: it calls its kernel for each element, which takes seventy times as long.

    Requires: opset 13; inferred shapes.
    Ensures: no standard arithmetic combines one number with a tensor of higher rank whose last
        axis is known to have one element; the same outputs and signature.
    Idempotent: what has the rank already is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the opset."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the main graph; a scalar is reshaped once for each rank."""
        aligned: dict[tuple[ir.Value, int], ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if is_standard(node, *_BROADCASTING):
                modified |= _align(node, aligned)
        return ir.passes.PassResult(model, modified=modified)


def _align(node: ir.Node, aligned: dict[tuple[ir.Value, int], ir.Value]) -> bool:
    shapes = [known_shape(value) for value in node.inputs if value is not None]
    rank = max((len(shape) for shape in shapes if shape is not None), default=0)
    if not any(shape and len(shape) == rank and shape[-1] == 1 for shape in shapes):
        return False
    modified = False
    for index, value in enumerate(node.inputs):
        shape = known_shape(value) if value is not None else None
        if value is None or shape is None or len(shape) == rank or set(shape) - {1}:
            continue
        if (value, rank) not in aligned:
            aligned[value, rank] = _reshaped(node, value, rank)
        node.replace_input_with(index, aligned[value, rank])
        modified = True
    return modified


def _reshaped(node: ir.Node, value: ir.Value, rank: int) -> ir.Value:
    ops = Ops(value.dtype, f"{value.name}/rank_{rank}/")
    result = ops.Reshape(value, [1] * rank)
    result.type, result.shape = value.type, ir.Shape([1] * rank)
    assert node.graph is not None
    node.graph.insert_before(node, ops.nodes)
    return result
