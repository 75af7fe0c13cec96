"""Declares the oldest opset where nothing in the graph needs a newer one."""

from collections.abc import Sequence
from typing import Final

import onnx
import onnx_ir as ir

from onnx_fliqs.passes._graph import all_nodes
from onnx_fliqs.passes._opsets import extra_attributes, misfit, schema_of

__all__ = ["LowerOpsetPass"]

_IR_VERSIONS: Final = {21: 10, 19: 9}
"""The IR version that came with an opset and those after it."""
_IR_VERSION: Final = 8
"""For older opsets: the first that has model-local functions."""
_CHANGED: Final = {
    "BatchNormalization": 14,
    "GridSample": 20,
    "GroupNormalization": 21,
    "Resize": 19,
    "ScatterElements": 18,
    "ScatterND": 18,
}
"""Operators to which an opset gave another meaning, or an attribute another value."""


class LowerOpsetPass(ir.passes.InPlacePass):
    """Declare the oldest opset in which the graph means the same.

    Before:  <opset_import: ["" : 21]>  y = QuantizeLinear (x, scale, zero_point)
    After:   <opset_import: ["" : 20]>  y = QuantizeLinear (x, scale, zero_point)

    New opsets mostly add types. Older runtimes and tools read the older declaration.

    Requires: an opset that is not older than the first in question.
    Ensures: the opset is the oldest, from ``oldest`` on, that knows every operator, attribute
        and type in the graph, and the IR version the one of that opset.
    Idempotent: a graph of that opset is left alone.
    """

    def __init__(self, *, oldest: int) -> None:
        super().__init__()
        self.oldest = oldest

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Relabel if every node is known to an older opset."""
        opset = model.opset_imports.get("", 0)
        older = next((n for n in range(self.oldest, opset) if _fits(model, opset, n)), None)
        if older is None:
            return ir.passes.PassResult(model, modified=False)
        for node in all_nodes(model):
            schema = schema_of(node, older)
            if not node.domain and schema is not None:
                for name in extra_attributes(node, schema):  # at their defaults
                    del node.attributes[name]
        for imports in (
            model.opset_imports,
            *(graph.opset_imports for graph in model.graphs()),
            *(function.opset_imports for function in model.functions.values()),
        ):
            imports[""] = older
        model.ir_version = next(
            (version for since, version in _IR_VERSIONS.items() if older >= since), _IR_VERSION
        )
        return ir.passes.PassResult(model, modified=True)


def _fits(model: ir.Model, opset: int, older: int) -> bool:
    return all(
        node.domain
        or (
            _changed_in(node) <= older
            and misfit(node, opset, older) is None
            and _admits(node, older)
        )
        for node in all_nodes(model)
    )


def _changed_in(node: ir.Node) -> int:
    """The first opset in which the node means what it says."""
    if node.op_type == "Pad" and node.attributes.get_string("mode", "") == "wrap":
        return 19
    return _CHANGED.get(node.op_type, 0)


def _admits(node: ir.Node, opset: int) -> bool:
    """Whether an opset has a node's operator for the types of its operands."""
    schema = schema_of(node, opset)
    return schema is not None and all(
        value is None
        or not isinstance(value.type, ir.TensorType)
        or f"tensor({value.type.dtype.name.lower()})" in _formal(formal, index).types
        for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs))
        for index, value in enumerate(values)
    )


def _formal(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """What is declared of an operand; the last declaration may be of many."""
    return parameters[min(index, len(parameters) - 1)]
