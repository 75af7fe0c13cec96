"""Remove dropout, which does nothing at inference."""

import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of, require_opset

__all__ = ["RemoveDropoutPass"]


class RemoveDropoutPass(ir.passes.InPlacePass):
    """Turn each Dropout that drops nothing into an Identity.

    Before:  y = Dropout(x, ratio)
    After:   y = Identity(x)

    Requires: opset >= 12.
    Ensures: a Dropout is left only where somebody reads its mask, or where neither its
        training mode is a constant false nor its ratio a constant zero.
    Idempotent: Identity is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which dropout looks different."""
        require_opset(model, 12)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite nodes where they stand."""
        found = [node for node in model.graph.all_nodes() if _does_nothing(node)]
        for node in found:
            node.resize_inputs(1)
            node.resize_outputs(1)
            node.op_type = "Identity"
            node.attributes.clear()
        return ir.passes.PassResult(model, modified=bool(found))


def _does_nothing(node: ir.Node) -> bool:
    if node.domain != "" or node.op_type != "Dropout":
        return False
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    training = constant_of(node.inputs[2])
    ratio = constant_of(node.inputs[1])
    return (training is not None and not training.any()) or (
        ratio is not None and not ratio.any()
    )
