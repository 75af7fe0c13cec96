"""Multiplies by masks once, and makes them numbers the fast way."""

import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    formula_for,
    is_standard,
    only_reader,
    replace_node,
    require_opset,
)

__all__ = ["MergeMasksPass"]


class MergeMasksPass(ir.passes.InPlacePass):
    """Multiply by the conjunction of masks, not by one after the other.

    Before:  y = Mul (Mul (x, Cast (m)), Cast (n))                   # m, n: bool
    After:   y = Mul (x, DequantizeLinear (Cast <to = UINT8> (And (m, n)), 1))

    Gradients of a site behind a Relu look like that. Bytes become floats in a third of the
    time that truth values take; of a Cast after a Cast, ONNX Runtime would make one again.

    Requires: opset 13.
    Ensures: no float is made of a truth value directly; no product with a mask is used only by
        another one; what only these read is gone; outputs and signature are unchanged.
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
    ops = formula_for(node)
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
    """Remove a product or conversion, which ONNX Runtime would run though nothing reads it."""
    if node is None or not (is_standard(node, "Mul") or _is_conversion(node)):
        return
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    makers = {value.producer() for value in node.inputs if value is not None}
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    for maker in makers:
        _remove_unread(maker)


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
    ops = formula_for(node)
    octets = ops.Cast(node.inputs[0], to=int(ir.DataType.UINT8))
    octets.dtype, octets.shape = ir.DataType.UINT8, node.outputs[0].shape
    result = ops.DequantizeLinear(octets, 1.0)
    result.dtype, result.shape = ir.DataType.FLOAT, node.outputs[0].shape
    replace_node(node, ops, [result])
    return True
