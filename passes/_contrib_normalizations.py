"""Normalizations that ONNX Runtime fuses with the additions before them, as formulas."""

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._contrib_rule import Rule, input_of, is_read, rank_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["NORMALIZATIONS"]

_EPSILON: Final = 1e-12
"""The default of the operators that include an addition."""


# --- layer normalization -------------------------------------------------------------------


def _layer_normalization(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    return op.node(node.op_type, node.inputs, node.attributes, outputs=len(node.outputs))


def _simplified(op: Ops, node: ir.Node) -> list[ir.Value | None]:
    x, scale = node.inputs[:2]
    axis = node.attributes.get_int("axis", -1)
    first = axis if axis < 0 else axis - (rank_of(x) or 0)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    rms = _rms(op, x, list(range(first, 0)), epsilon)
    inverse = op.Reciprocal(rms) if is_read(node, 1) else None
    return [op.Mul(op.Div(x, rms), scale), inverse]


def _why_not_simplified(node: ir.Node) -> str | None:
    counted = node.attributes.get_int("axis", -1) < 0
    known = counted or rank_of(node.inputs[0]) is not None
    return None if known else "the rank of its input is unknown"


def _rms(op: Ops, x: ir.Value | None, axes: list[int], epsilon: float) -> ir.Value:
    """The root of the mean square."""
    return op.Sqrt(op.Add(op.ReduceMean(op.Mul(x, x), axes, keepdims=1), epsilon))


# --- with what is added before -------------------------------------------------------------


def _skip(op: Ops, node: ir.Node) -> list[ir.Value | None]:
    total = _sum(op, node, bias=4)
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    scale, bias = node.inputs[2], input_of(node, 3)
    result = op.LayerNormalization(total, scale, bias, axis=-1, epsilon=epsilon)
    return [result, None, None, total]


def _skip_simplified(op: Ops, node: ir.Node) -> list[ir.Value | None]:
    total = _sum(op, node, bias=3)
    rms = _rms(op, total, [-1], node.attributes.get_float("epsilon", _EPSILON))
    return [op.Mul(op.Div(total, rms), node.inputs[2]), None, None, total]


def _sum(op: Ops, node: ir.Node, bias: int) -> ir.Value:
    total = op.Add(*node.inputs[:2])
    addend = input_of(node, bias)
    return total if addend is None else op.Add(total, addend)


def _why_not_skip(node: ir.Node) -> str | None:
    return "its statistics are read" if is_read(node, 1) or is_read(node, 2) else None


def _embedding(op: Ops, node: ir.Node) -> list[ir.Value | None]:
    """Words, positions and segments, added and normalized."""
    words, segments = node.inputs[0], input_of(node, 1)
    word_table, position_table, segment_table = node.inputs[2:5]
    scale, bias, mask, positions = (input_of(node, index) for index in range(5, 9))
    if positions is None:
        count = op.Shape(words, start=1, end=2)
        placed = op.Slice(position_table, [0], count, [0])
    else:
        placed = op.Gather(position_table, positions)
    total = op.Add(op.Gather(word_table, words), placed)
    if segments is not None:
        total = op.Add(total, op.Gather(segment_table, segments))
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    result = op.LayerNormalization(total, scale, bias, axis=-1, epsilon=epsilon)
    return [result, _lengths(op, node, mask), total]


def _lengths(op: Ops, node: ir.Node, mask: ir.Value | None) -> ir.Value | None:
    """How many words each sequence has, as an attention expects it."""
    if not is_read(node, 1):
        return None
    if mask is None:
        batch = op.Shape(node.inputs[0], start=0, end=1)
        return op.Expand(op.Cast([0], to=ir.DataType.INT32), batch)
    return op.ReduceSum(mask, [1], keepdims=0)


NORMALIZATIONS: Final[Mapping[str, Rule]] = {
    "EmbedLayerNormalization": Rule(_embedding),
    "LayerNormalization": Rule(_layer_normalization),
    "SimplifiedLayerNormalization": Rule(_simplified, _why_not_simplified),
    "SkipLayerNormalization": Rule(_skip, _why_not_skip),
    "SkipSimplifiedLayerNormalization": Rule(_skip_simplified, _why_not_skip),
}
