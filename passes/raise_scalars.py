"""Gives scalars as many axes as the tensors that they are combined with."""

from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of, is_standard, require_opset
from onnx_fliqs.passes._ops import Ops, known_shape

__all__ = ["RaiseScalarsPass"]

_BROADCASTING: Final = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less
    LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor
    """.split()  # noqa: SIM905 - reads as a list


class RaiseScalarsPass(ir.passes.InPlacePass):
    """Give scalars the rank of tensors whose last axis has one element.

    Before:  y = Mul (w, s)                                        # w: [960, 160, 1, 1], s: []
    After:   y = Mul (w, Reshape (s, [1, 1, 1, 1]))

    Where ranks differ, ONNX Runtime's broadcasting takes the axes of w one by one and starts
    with the last: it calls its kernel for each element.

    Requires: opset 5; inferred shapes.
    Ensures: nothing that broadcasts combines one number with a tensor of higher rank whose
        last axis is known to have one element; the same outputs and signature.
    Idempotent: what has the rank already is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the opset."""
        require_opset(model, 5)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the main graph; a scalar is reshaped once for each rank."""
        raised: dict[tuple[ir.Value, int], ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if is_standard(node, *_BROADCASTING):
                modified |= _raise(node, raised)
        return ir.passes.PassResult(model, modified=modified)


def _raise(node: ir.Node, raised: dict[tuple[ir.Value, int], ir.Value]) -> bool:
    shapes = [_shape(value) for value in node.inputs]
    tensors = [shape for shape in shapes if shape and set(shape) != {1}]
    rank = max((len(shape) for shape in tensors if shape[-1] == 1), default=0)
    # Of a tensor of higher rank, the last axis is another one.
    if any(shape is None or len(shape) > rank for shape in shapes):
        return False
    modified = False
    for index, (value, shape) in enumerate(zip(node.inputs, shapes, strict=True)):
        if value is None or shape is None or len(shape) == rank or shape in tensors:
            continue
        if (value, rank) not in raised:
            ops = Ops(None, f"{value.name}/rank_{rank}/")
            result = ops.Reshape(value, [1] * rank)
            result.type, result.shape = value.type, ir.Shape([1] * rank)
            assert node.graph is not None
            node.graph.insert_before(node, ops.nodes)
            raised[value, rank] = result
        node.replace_input_with(index, raised[value, rank])
        modified = True
    return modified


def _shape(value: ir.Value | None) -> list[int | str] | None:
    if value is None:
        return None
    constant = constant_of(value)
    return list(constant.shape) if constant is not None else known_shape(value)
