"""Attention as ONNX Runtime fuses it, as formulas.

Sizes: B samples, S queries, T keys, N heads.
"""

import math
from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._contrib_rule import Rule, input_of, is_read, rank_of
from onnx_fliqs.passes._graph import is_standard
from onnx_fliqs.passes._ops import Ops

__all__ = ["ATTENTION"]

_BY_HEAD: Final = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
"""From [B,T,N,H] to [B,N,T,H] or, for the keys, to [B,N,H,T]."""
_MASK: Final = -10000.0
"""What is added to the scores of masked keys unless the operator says otherwise."""


# --- Attention: one packed projection for queries, keys and values ------------------------


def _attention(op: Ops, node: ir.Node) -> list[ir.Value | None]:
    x, weight, bias, mask, _, addend = (input_of(node, index) for index in range(6))
    projected = op.MatMul(x, weight)
    if bias is not None:
        projected = op.Add(projected, bias)
    sizes = _projected_sizes(node)
    query, key, value = op.node("Split", [projected, sizes], {"axis": 2}, outputs=3)
    return [_attended(op, node, (query, key, value), sizes, mask, addend)]


def _projected_sizes(node: ir.Node) -> list[int]:
    """The widths of queries, keys and values, all heads together; empty if unknown."""
    given = node.attributes.get_ints("qkv_hidden_sizes", ())
    if given:
        return list(given)
    weight = input_of(node, 1)
    width = weight.shape[-1] if weight is not None and weight.shape is not None else None
    return [width // 3] * 3 if isinstance(width, int) else []


def _why_not_attention(node: ir.Node) -> str | None:
    if input_of(node, 4) is not None or is_read(node, 1):
        return "it keeps keys and values of earlier runs"
    if node.attributes.get_int("do_rotary", 0):
        return "it rotates its queries and keys"
    if not _projected_sizes(node):
        return "the shape of its weight is unknown"
    return _why_not_mask(input_of(node, 3), node.inputs[0])


# --- MultiHeadAttention: queries, keys and values are projected before --------------------


def _multi_head(op: Ops, node: ir.Node) -> list[ir.Value | None]:
    query, key, value, bias, mask, addend = (input_of(node, index) for index in range(6))
    sizes = [_width(each) or 0 for each in (query, key, value)]
    operands = [query, key, value]
    if bias is not None:
        parts = op.node("Split", [bias, sizes], {"axis": 0}, outputs=3)
        operands = [op.Add(x, part) for x, part in zip(operands, parts, strict=True)]
    q, k, v = operands
    assert q is not None
    assert k is not None
    assert v is not None
    return [_attended(op, node, (q, k, v), sizes, mask, addend)]


def _width(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _why_not_multi_head(node: ir.Node) -> str | None:
    further = any(value is not None for value in node.inputs[6:])
    if further or is_read(node, 1) or is_read(node, 2):
        return "it keeps keys and values of earlier runs"
    operands = [input_of(node, index) for index in range(3)]
    if any(rank_of(value) != 3 or _width(value) is None for value in operands):
        return "its queries, keys and values are packed, or their sizes are unknown"
    return _why_not_mask(input_of(node, 4), operands[1])


# --- what both do --------------------------------------------------------------------------


def _attended(
    op: Ops,
    node: ir.Node,
    operands: tuple[ir.Value, ir.Value, ir.Value],
    sizes: list[int],
    mask: ir.Value | None,
    addend: ir.Value | None,
) -> ir.Value:
    """The attention itself, from [B,S,width] to [B,S,width].

    Args:
        op: The formula.
        node: Its attributes count.
        operands: Queries, keys and values.
        sizes: Their widths.
        mask: Which keys count: [B] as their number, [B,T] or [B,S,T] as ones and zeros.
        addend: What is added to the scores, [B or 1,N or 1,S,T].
    """
    heads = node.attributes.get_int("num_heads")
    query, key, value = (
        op.Transpose(op.Reshape(operand, [0, 0, heads, size // heads]), perm=perm)
        for operand, size, perm in zip(operands, sizes, _BY_HEAD, strict=True)
    )
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(sizes[0] // heads)
    scores = op.Mul(op.MatMul(query, key), scale)
    masked = node.attributes.get_float("mask_filter_value", _MASK)
    if mask is not None:
        scores = op.Add(scores, op.Where(_visible(op, mask, operands[1]), 0.0, masked))
    if node.attributes.get_int("unidirectional", 0):
        earlier = _earlier(op, operands[0], operands[1])
        lowest = float(ml_dtypes.finfo(op.dtype.numpy()).min)  # type: ignore[no-untyped-call]
        scores = op.Add(scores, op.Where(earlier, 0.0, lowest))
    if addend is not None:
        scores = op.Add(scores, addend)
    mixed = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, sizes[2]])


def _visible(op: Ops, mask: ir.Value, keys: ir.Value) -> ir.Value:
    """Which keys count, of shape [B,1,1,T] or [B,1,S,T]."""
    if rank_of(mask) == 1:
        number = op.Unsqueeze(op.Cast(mask, to=ir.DataType.INT64), [1, 2, 3])
        return op.Less(_positions(op, keys), number)
    axes = [1, 2] if rank_of(mask) == 2 else [1]
    return op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), axes)


def _earlier(op: Ops, queries: ir.Value, keys: ir.Value) -> ir.Value:
    """Which keys are not behind a query, of shape [S,T]."""
    rows = op.Unsqueeze(_positions(op, queries), [1])
    return op.LessOrEqual(_positions(op, keys), rows)


def _positions(op: Ops, sequence: ir.Value) -> ir.Value:
    """0, 1, 2, ... along a sequence."""
    length = op.Squeeze(op.Shape(sequence, start=1, end=2))
    return op.Range(np.array(0), length, np.array(1))


def _why_not_mask(mask: ir.Value | None, keys: ir.Value | None) -> str | None:
    if mask is None:
        return None
    rank = rank_of(mask)
    if rank is None or rank > 3:
        return "the form of its mask is unknown" if rank is None else "its mask has four axes"
    if rank == 1 and not _is_per_sample(mask, keys):
        return "the form of its mask is unknown"
    return None


def _is_per_sample(mask: ir.Value, keys: ir.Value | None) -> bool:
    """Whether a mask has one number per sample: [2·B] and [3·B+2] mean something else."""
    maker = mask.producer()
    if maker is not None and is_standard(maker, "ReduceSum"):
        return True  # the lengths that EmbedLayerNormalization computes
    batches = [v.shape[0] for v in (mask, keys) if v is not None and v.shape is not None]
    return len(batches) == 2 and batches[0] == batches[1]


ATTENTION: Final[Mapping[str, Rule]] = {
    "Attention": Rule(_attention, _why_not_attention),
    "MultiHeadAttention": Rule(_multi_head, _why_not_multi_head),
}
