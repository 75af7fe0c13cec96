"""Normalizations and losses, in terms of what has a gradient."""

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Lowering, NoGradientError, input_of, rank_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["LOWERINGS"]

# The defaults of ONNX.
_EPSILON: Final = 1e-5
_LP_NORM: Final = 2
_LRN_ALPHA: Final = 1e-4
_LRN_BETA: Final = 0.75
_LRN_BIAS: Final = 1.0
_MEAN_VARIANCE_AXES: Final = (0, 2, 3)
_MEAN_VARIANCE_EPSILON: Final = 1e-9


def _standardized(op: Ops, rows: ir.Value, epsilon: float) -> ir.Value:
    """Rows of mean 0 and variance 1, by the fused kernel, which has a fused gradient."""
    width = op.Shape(rows, start=-1)
    ones, zeros = op.full(width, 1.0), op.zeros(width)
    return op.LayerNormalization(rows, ones, zeros, axis=-1, epsilon=epsilon)


def _per_channel(op: Ops, rows: ir.Value, node: ir.Node) -> list[ir.Value]:
    """Scale and shift [N, C, L], back in the shape of the node's input."""
    scale, bias = (op.Unsqueeze(node.inputs[index], [-1]) for index in (1, 2))
    return [op.Reshape(op.Add(op.Mul(rows, scale), bias), op.Shape(node.inputs[0]))]


def _instance(op: Ops, node: ir.Node) -> list[ir.Value]:
    rows = op.Reshape(node.inputs[0], [0, 0, -1])
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    return _per_channel(op, _standardized(op, rows, epsilon), node)


def _group(op: Ops, node: ir.Node) -> list[ir.Value]:
    groups = node.attributes.get_int("num_groups")
    rows = op.Reshape(node.inputs[0], [0, groups, -1])
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    channels = op.Concat(op.Shape(node.inputs[0], end=2), [-1], axis=0)
    rows = op.Reshape(_standardized(op, rows, epsilon), channels)
    return _per_channel(op, rows, node)


def _layer(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Without a bias, or with statistics that something else reads."""
    x, scale = node.inputs[:2]
    bias = input_of(node, 2)
    if not _is_read(node, 1) and not _is_read(node, 2):
        zeros = op.zeros(op.Shape(scale))
        return op.again(node, x, scale, zeros if bias is None else bias)[:1]
    rank = rank_of(x)
    axes = list(range(node.attributes.get_int("axis", -1) % rank, rank))
    mean = op.ReduceMean(x, axes)
    centred = op.Sub(x, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), axes)
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    scaled = op.Mul(op.Mul(centred, inverse), scale)
    return [scaled if bias is None else op.Add(scaled, bias), mean, inverse]


def _lp(op: Ops, node: ir.Node) -> list[ir.Value]:
    x, axis = node.inputs[0], node.attributes.get_int("axis", -1)
    first = node.attributes.get_int("p", _LP_NORM) == 1
    length = op.ReduceL1(x, [axis]) if first else op.ReduceL2(x, [axis])
    return [op.Div(x, op.Where(op.Equal(length, 0.0), 1.0, length))]


def _local_response(op: Ops, node: ir.Node) -> list[ir.Value]:
    x, size = node.inputs[0], node.attributes.get_int("size")
    before = (size - 1) // 2
    # One image of C rows per sample, and a pool that runs over the rows.
    flat = op.Reshape(x, [0, 0, -1])
    squares = op.Unsqueeze(op.Mul(flat, flat), [1])
    mean = op.AveragePool(
        squares,
        kernel_shape=[size, 1],
        pads=[before, 0, size - 1 - before, 0],
        count_include_pad=1,
    )
    alpha = node.attributes.get_float("alpha", _LRN_ALPHA)
    bias = node.attributes.get_float("bias", _LRN_BIAS)
    beta = node.attributes.get_float("beta", _LRN_BETA)
    base = op.Add(op.Mul(op.Squeeze(mean, [1]), alpha), bias)
    return [op.Reshape(op.Div(flat, op.Pow(base, beta)), op.Shape(x))]


def _mean_variance(op: Ops, node: ir.Node) -> list[ir.Value]:
    axes = list(node.attributes.get_ints("axes", _MEAN_VARIANCE_AXES))
    centred = op.Sub(node.inputs[0], op.ReduceMean(node.inputs[0], axes))
    variance = op.ReduceMean(op.Mul(centred, centred), axes)
    return [op.Div(centred, op.Add(op.Sqrt(variance), _MEAN_VARIANCE_EPSILON))]


# -- losses ---------------------------------------------------------------------------------


def _likelihood(op: Ops, node: ir.Node) -> list[ir.Value]:
    assert node.inputs[0] is not None
    return [_negative_likelihood(op, node, node.inputs[0])]


def _cross_entropy(op: Ops, node: ir.Node) -> list[ir.Value]:
    """With log-probabilities that something else reads."""
    scores = op.LogSoftmax(node.inputs[0], axis=1)
    return [_negative_likelihood(op, node, scores), scores]


def _negative_likelihood(op: Ops, node: ir.Node, scores: ir.Value) -> ir.Value:
    target, weight = node.inputs[1], input_of(node, 2)
    ignored = node.attributes.get_int("ignore_index", None)
    if target is None or target.dtype is None:
        raise NoGradientError("the type of its labels is not known")
    # Labels beside the class axis, at least 0 where they are ignored.
    label = op.Cast(target, to=int(ir.DataType.INT64))
    counted = None if ignored is None else op.Not(op.Equal(label, ignored))
    if counted is not None:
        label = op.Where(counted, label, 0)
    picked = op.Squeeze(op.GatherElements(scores, op.Unsqueeze(label, [1]), axis=1), [1])
    share = op.full(op.Shape(label), 1.0) if weight is None else op.Gather(weight, label)
    if counted is not None:
        share = op.Where(counted, share, 0.0)
    losses = op.Neg(op.Mul(picked, share))
    reduction = node.attributes.get_string("reduction", "mean")
    if reduction == "none":
        return losses
    total = op.ReduceSum(losses, keepdims=0)
    return total if reduction == "sum" else op.Div(total, op.ReduceSum(share, keepdims=0))


def _is_read(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    return bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output()


LOWERINGS: Final[dict[str, Lowering]] = {
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LRN": _local_response,
    "LayerNormalization": _layer,
    "LpNormalization": _lp,
    "MeanVarianceNormalization": _mean_variance,
    "NegativeLogLikelihoodLoss": _likelihood,
    "SoftmaxCrossEntropyLoss": _cross_entropy,
}
