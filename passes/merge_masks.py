"""Multiplies by masks once, and makes them numbers the fast way."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    constant_of,
    formula_for,
    is_standard,
    only_reader,
    replace_node,
    require_opset,
)
from onnx_fliqs.passes._ops import Ops, known_shape

__all__ = ["MergeMasksPass"]

_Side: TypeAlias = tuple[str, str]
_BELOW: Final[_Side] = ("Less", "LessOrEqual")
_ABOVE: Final[_Side] = ("Greater", "GreaterOrEqual")


class MergeMasksPass(ir.passes.InPlacePass):
    """Multiply by the conjunction of masks, not by one after the other.

    Before:  y = Mul (Mul (x, Cast (Less (t, a))), Cast (Less (t, b)))      # a, b: numbers
    After:   y = Mul (x, DequantizeLinear (Cast <to = UINT8> (Less (t, Min (a, b))), 1))

    Gradients of a site behind a Relu or Clip look like that. Bytes become floats in a third of
    the time that truth values take; of a Cast after a Cast, ONNX Runtime would make one again.

    Requires: opset 13.
    Ensures: no float is made of a truth value directly; no product with a mask is used only by
        another one; a conjunction compares a tensor with one number from above and one from
        below, as far as its comparisons are alike; what only these read is gone; outputs and
        signature are unchanged.
    Idempotent: what is merged is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the opset."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the main graph."""
        modified = False
        for node in list(model.graph):
            modified |= _merge(node)
        for node in list(model.graph):
            modified |= _compare_once(node)
        for node in list(model.graph):
            modified |= _convert(node)
        return ir.passes.PassResult(model, modified=modified)


def _merge(node: ir.Node) -> bool:
    """Take over the mask of the product that a product with a mask reads."""
    found = _masked(node)
    inner = found[0].producer() if found is not None else None
    if found is None or inner is None or only_reader(found[0]) is None:
        return False
    within = _masked(inner)
    # Masks that are broadcast stay with what they were multiplied by.
    if within is None or None in (found[1].shape, within[1].shape):
        return False
    if found[1].shape != within[1].shape:
        return False
    ops = formula_for(node).part("mask")
    mask = ops.Cast(ops.And(within[1], found[1]), to=int(ir.DataType.FLOAT))
    result = ops.Mul(within[0], mask)
    mask.dtype, mask.shape = ir.DataType.FLOAT, found[1].shape
    masks = ops.nodes[0].outputs[0]
    masks.dtype, masks.shape = ir.DataType.BOOL, found[1].shape
    result.dtype, result.shape = ir.DataType.FLOAT, node.outputs[0].shape
    makers = {value.producer() for value in node.inputs if value is not None}
    replace_node(node, ops, [result])
    for maker in makers:
        _remove_unread(maker)
    return True


def _remove_unread(node: ir.Node | None) -> None:
    """Remove what made or used a mask: ONNX Runtime would run it though nothing reads it."""
    if node is None or not (
        is_standard(node, "And", "Mul", *_BELOW, *_ABOVE) or _is_conversion(node)
    ):
        return
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    makers = {value.producer() for value in node.inputs if value is not None}
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    for maker in makers:
        _remove_unread(maker)


def _compare_once(node: ir.Node) -> bool:
    """Let a conjunction compare each tensor with one number from above and from below."""
    if not is_standard(node, "And") or _is_inner(node):
        return False
    masks = list(_conjoined(node))
    alike: dict[tuple[ir.Value, _Side], list[ir.Node]] = defaultdict(list)
    for mask in masks:
        maker = mask.producer()
        if maker is not None and only_reader(mask) is not None and _compares(maker):
            assert maker.inputs[0] is not None
            side = _BELOW if maker.op_type in _BELOW else _ABOVE
            alike[maker.inputs[0], side].append(maker)
    ops = formula_for(node).part("mask")
    modified = False
    for (value, side), comparisons in alike.items():
        found = _in_one(ops, value, side, comparisons)
        if found is None:
            continue
        modified = True
        old = comparisons[0].outputs[0]
        found.type, found.shape = old.type, old.shape
        taken = {each.outputs[0] for each in comparisons}
        masks = [found, *(mask for mask in masks if mask not in taken)]
    if not modified:
        return False
    result = masks[0]
    for mask in masks[1:]:
        result = ops.And(result, mask)
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    makers = [value.producer() for value in node.inputs if value is not None]
    replace_node(node, ops, [result])
    for maker in makers:
        _remove_unread(maker)
    return True


def _is_inner(node: ir.Node) -> bool:
    """Whether only another conjunction reads it."""
    reader = only_reader(node.outputs[0])
    return reader is not None and is_standard(reader[0], "And")


def _conjoined(node: ir.Node) -> Iterator[ir.Value]:
    for value in node.inputs:
        assert value is not None
        maker = value.producer()
        if maker is not None and is_standard(maker, "And") and _is_inner(maker):
            yield from _conjoined(maker)
        else:
            yield value


def _compares(node: ir.Node) -> bool:
    """Whether it compares a tensor of float32 with one number."""
    if not is_standard(node, *_BELOW, *_ABOVE):
        return False
    value, bound = node.inputs
    if value is None or bound is None or value.dtype is not ir.DataType.FLOAT:
        return False
    constant = constant_of(bound)
    return (known_shape(bound) if constant is None else list(constant.shape)) == []


def _in_one(
    ops: Ops, value: ir.Value, side: _Side, makers: Sequence[ir.Node]
) -> ir.Value | None:
    """What several comparisons of a value say together; None if they cannot be one."""
    operators = {maker.op_type for maker in makers}
    bounds = [
        maker.inputs[1] if len(operators) == 1 else _attained(maker, side) for maker in makers
    ]
    if len(makers) == 1 or any(bound is None for bound in bounds):
        return None
    number = ops.Min(*bounds) if side is _BELOW else ops.Max(*bounds)
    number.dtype, number.shape = ir.DataType.FLOAT, ir.Shape([])
    operator = operators.pop() if len(operators) == 1 else side[-1]
    return ops.node(operator, [value, number])[0]


def _attained(node: ir.Node, side: _Side) -> ir.Value | npt.NDArray[np.float32] | None:
    """The last number that a comparison lets pass, if known: a neighbour of the bound."""
    bound = node.inputs[1]
    if node.op_type == side[-1]:
        return bound
    number = constant_of(bound)
    if number is None:
        return None
    end = np.float32(-np.inf if side is _BELOW else np.inf)
    return np.asarray(np.nextafter(number.astype(np.float32), end))


def _masked(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """What a product multiplies by a mask, and the mask."""
    if not is_standard(node, "Mul"):
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        cast = other.producer() if other is not None else None
        if value is None or cast is None or not _is_conversion(cast):
            continue
        (mask,) = cast.inputs
        assert mask is not None
        return value, mask
    return None


def _is_conversion(node: ir.Node) -> bool:
    """Whether a node makes floats of truth values."""
    if not is_standard(node, "Cast"):
        return False
    (source,) = node.inputs
    to_float = node.attributes.get_int("to", 0) == ir.DataType.FLOAT
    return to_float and source is not None and source.dtype is ir.DataType.BOOL


def _convert(node: ir.Node) -> bool:
    """Make a conversion of truth values go by way of bytes."""
    if not _is_conversion(node):
        return False
    ops = formula_for(node).part("mask")
    octets = ops.Cast(node.inputs[0], to=int(ir.DataType.UINT8))
    octets.dtype, octets.shape = ir.DataType.UINT8, node.outputs[0].shape
    result = ops.DequantizeLinear(octets, 1.0)
    result.dtype, result.shape = ir.DataType.FLOAT, node.outputs[0].shape
    replace_node(node, ops, [result])
    return True
