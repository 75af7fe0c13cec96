"""Gathers codes instead of numbers."""

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["DequantizeAfterGatherPass"]

_ELEMENTWISE: Final = ("DequantizeLinear", "Cast", "Mul")
# Gather takes every type but the 4-bit integers and float8.
_GATHERED: Final = frozenset(
    {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16}
    | {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)


class DequantizeAfterGatherPass(ir.passes.InPlacePass):
    """Dequantize the rows that a Gather reads, not the whole table in every run.

    Before:  table = DequantizeLinear (codes, scale, zero_point)
             y = Gather (table, indices)
    After:   y_codes = Gather (codes, indices)
             y = DequantizeLinear (y_codes, scale, zero_point)

    Likewise for a Cast of the codes, and a product with a scalar behind it. Other readers of
    the table keep it.

    Requires: nothing.
    Ensures: no Gather reads a table that is computed from stored codes by such operators with
        one scale, unless Gather cannot carry the codes; signature and outputs unchanged.
    Idempotent: a Gather of codes has nothing in front of it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Swap a Gather with what is in front of it, as often as there is something."""
        changed = False
        for node in list(model.graph.all_nodes()):
            gather = node
            while (maker := _movable(gather)) is not None:
                gather = _swap(gather, maker)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=changed)


def _movable(gather: ir.Node) -> ir.Node | None:
    """The operator that computes the table, if it may come behind."""
    if gather.op_type != "Gather" or gather.domain or gather.inputs[0] is None:
        return None
    maker = gather.inputs[0].producer()
    if maker is None or not _is_scalar_operator(maker):
        return None
    table = maker.inputs[0]
    stored = table
    while stored is not None and (earlier := stored.producer()) is not None:
        if not _is_scalar_operator(earlier):
            return None
        stored = earlier.inputs[0]
    if stored is None or not stored.is_initializer() or stored.dtype not in _GATHERED:
        return None
    return maker


def _is_scalar_operator(node: ir.Node) -> bool:
    """Whether it treats all elements of input 0 alike."""
    others = [value for value in node.inputs[1:] if value is not None]
    return (
        not node.domain
        and node.op_type in _ELEMENTWISE
        and all(v.const_value is not None and not v.const_value.shape.dims for v in others)
    )


def _swap(gather: ir.Node, maker: ir.Node) -> ir.Node:
    """Put the two in the other order; the Gather that is new."""
    result = gather.outputs[0]
    assert isinstance(gather.graph, ir.Graph)
    first = ir.node(
        "Gather",
        [maker.inputs[0], gather.inputs[1]],
        gather.attributes,
        name=gather.name,
    )
    first.outputs[0].name = f"{result.name}.{maker.op_type}.in"
    second = ir.node(
        maker.op_type,
        [first.outputs[0], *maker.inputs[1:]],
        maker.attributes,
        name=f"{gather.name}.{maker.op_type}",
    )
    ir.convenience.replace_nodes_and_values(
        gather.graph, gather, [gather], [first, second], [result], [second.outputs[0]]
    )
    return first
