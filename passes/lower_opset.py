"""Declares the older opset where nothing in the graph needs the newer one."""

from typing import Final

import onnx
import onnx_ir as ir

__all__ = ["LowerOpsetPass"]

_OPSET: Final = 20
_IR_VERSION: Final = 9
# The types that opset 21 brought to QuantizeLinear, DequantizeLinear and others.
_NEW_TYPES: Final = frozenset(
    (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16)
)
_CHANGED: Final = frozenset(("GroupNormalization",))
"""Operators to which opset 21 gave another meaning."""


class LowerOpsetPass(ir.passes.InPlacePass):
    """Declare opset 20 in place of 21 if the graph means the same in it.

    Before:  <opset_import: ["" : 21]>  y = QuantizeLinear (x, scale, zero_point)
    After:   <opset_import: ["" : 20]>  y = QuantizeLinear (x, scale, zero_point)

    Opset 21 mostly added types. Older runtimes run the older declaration, and ONNX Runtime
    1.19.2 has its 8-bit MatMul kernel only for it.

    Requires: nothing.
    Ensures: opset 20 and IR version 9, unless an operator, an attribute or a type is newer.
    Idempotent: other opsets than 21 are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Relabel if every node is known to the older opset."""
        if model.opset_imports.get("") != _OPSET + 1 or not _fits(model):
            return ir.passes.PassResult(model, modified=False)
        for graph in model.graphs():
            graph.opset_imports[""] = _OPSET
        model.opset_imports[""] = _OPSET
        model.ir_version = _IR_VERSION
        return ir.passes.PassResult(model, modified=True)


def _fits(model: ir.Model) -> bool:
    for node in model.graph.all_nodes():
        if node.domain:
            continue
        if node.op_type in _CHANGED or not _known(node):
            return False
        values = (*node.inputs, *node.outputs)
        if any(value is not None and value.dtype in _NEW_TYPES for value in values):
            return False
    return True


def _known(node: ir.Node) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, _OPSET)
    except onnx.defs.SchemaError:
        return False
    return set(node.attributes) <= set(schema.attributes)
