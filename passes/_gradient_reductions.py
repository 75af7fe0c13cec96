"""Gradients of operators that reduce axes, or run along one."""

from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Call, Formula, NoGradientError, input_of, rank_of
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "others_product"]

_LP_NORM: Final = 2


def _kept(op: Ops, call: Call, value: ir.Value) -> ir.Value:
    """A value of the shape of the output, so that it broadcasts against the input."""
    axes = call.optional(1)
    kept = call.node.attributes.get_int("keepdims", 1)
    return value if kept or axes is None else op.Unsqueeze(value, axes)


def _reduce(op: Ops, call: Call, op_type: str, value: ir.Value) -> ir.Value:
    """Reduce a value of the shape of the input along the same axes, which stay with size 1."""
    empty = call.node.attributes.get_int("noop_with_empty_axes", 0)
    (reduced,) = op.node(
        op_type, [value, call.optional(1)], {"keepdims": 1, "noop_with_empty_axes": empty}
    )
    return reduced


def _elementwise(derivative: Callable[[Ops, ir.Value, ir.Value], ir.Value]) -> Formula:
    """The gradient of a sum of functions of the elements, or of a function of that sum."""

    def formula(op: Ops, call: Call) -> Mapping[int, ir.Value]:
        if _does_nothing(call.node):
            return {0: call.dy}
        slope = derivative(op, call.x(), _kept(op, call, call.y))
        return {0: op.Expand(op.Mul(_kept(op, call, call.dy), slope), op.Shape(call.x()))}

    return formula


def _does_nothing(node: ir.Node) -> bool:
    """Whether no axis is reduced; ONNX Runtime then hands on the input."""
    if not node.attributes.get_int("noop_with_empty_axes", 0):
        return False
    axes = input_of(node, 1)
    known = constant_of(axes)
    if axes is not None and known is None:
        raise NoGradientError("whether it has axes is known only when it runs")
    return known is None or known.size == 0


def _l1(op: Ops, x: ir.Value, _y: ir.Value) -> ir.Value:
    return op.Sign(x)


def _l2(op: Ops, x: ir.Value, y: ir.Value) -> ir.Value:
    return op.Div(x, op.Where(op.Equal(y, 0.0), 1.0, y))


def _log_sum(op: Ops, _x: ir.Value, y: ir.Value) -> ir.Value:
    return op.Exp(op.Neg(y))


def _log_sum_exp(op: Ops, x: ir.Value, y: ir.Value) -> ir.Value:
    return op.Exp(op.Sub(x, y))


def _sum_square(op: Ops, x: ir.Value, _y: ir.Value) -> ir.Value:
    return op.Mul(x, 2.0)


def _extreme(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """Elements that are equally large share the gradient."""
    found = op.cast(op.Equal(call.x(), _kept(op, call, call.y)))
    share = op.Div(_kept(op, call, call.dy), _reduce(op, call, "ReduceSum", found))
    return {0: op.Mul(found, share)}


def others_product(op: Ops, value: ir.Value, product: ir.Value, zeros: ir.Value) -> ir.Value:
    """For each factor the product of the others, also where some are zero.

    Args:
        op: Where to write.
        value: The factors.
        product: For each factor the product of all that are not zero.
        zeros: For each factor the number of all that are zero.
    """
    zero = op.Equal(value, 0.0)
    alone = op.Where(op.Equal(zeros, 1.0), product, 0.0)
    divided = op.Div(product, op.Where(zero, 1.0, value))
    return op.Where(zero, alone, op.Where(op.Equal(zeros, 0.0), divided, 0.0))


def _product(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    zero = op.Equal(call.x(), 0.0)
    zeros = _reduce(op, call, "ReduceSum", op.cast(zero))
    product = _reduce(op, call, "ReduceProd", op.Where(zero, 1.0, call.x()))
    others = others_product(op, call.x(), product, zeros)
    return {0: op.Mul(_kept(op, call, call.dy), others)}


def _global_max(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    found = op.cast(op.Equal(call.x(), call.y))
    count = op.ReduceSum(op.Reshape(found, [0, 0, -1]), [2])
    share = op.Div(call.dy, op.Reshape(count, op.Shape(call.y)))
    return {0: op.Mul(found, share)}


def _global_lp(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    power = call.node.attributes.get_int("p", _LP_NORM)
    ratio = op.Div(call.x(), op.Where(op.Equal(call.y, 0.0), 1.0, call.y))
    size = op.Pow(op.Abs(ratio), float(power - 1))
    return {0: op.Mul(call.dy, op.Mul(op.Sign(call.x()), size))}


def _cumulative_sum(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    reverse = call.node.attributes.get_int("reverse", 0)
    return {0: op.again(call.node, call.dy, call.x(1), reverse=1 - reverse)[0]}


def _determinant(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    rank = rank_of(call.node.inputs[0])
    if op.dtype is not ir.DataType.FLOAT:
        raise NoGradientError("ONNX Runtime inverts matrices in float32 only")
    (inverse,) = op.contrib("Inverse", call.x())
    transposed = op.Transpose(inverse, perm=[*range(rank - 2), rank - 1, rank - 2])
    slope = op.Unsqueeze(op.Mul(call.dy, call.y), [-2, -1])
    return {0: op.Mul(slope, transposed)}


FORMULAS: Final[dict[str, Formula]] = {
    "CumSum": _cumulative_sum,
    "Det": _determinant,
    "GlobalLpPool": _global_lp,
    "GlobalMaxPool": _global_max,
    "ReduceL1": _elementwise(_l1),
    "ReduceL2": _elementwise(_l2),
    "ReduceLogSum": _elementwise(_log_sum),
    "ReduceLogSumExp": _elementwise(_log_sum_exp),
    "ReduceMax": _extreme,
    "ReduceMin": _extreme,
    "ReduceProd": _product,
    "ReduceSumSquare": _elementwise(_sum_square),
}
