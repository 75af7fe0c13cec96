"""Gives nodes what their gradients read, although ONNX lets it be left out."""

from typing import Final

import numpy as np
import onnx_ir as ir

__all__ = ["ExposeOptionalOutputsPass"]

_OUTPUTS: Final = {
    "LayerNormalization": ("mean", "inv_std_dev"),
    "MaxPool": ("indices",),
    "SoftmaxCrossEntropyLoss": ("log_prob",),
}


class ExposeOptionalOutputsPass(ir.passes.InPlacePass):
    """Name the optional outputs and inputs that ONNX Runtime's gradient definitions need.

    Before:  y = LayerNormalization (x, scale)
    After:   y, y.mean, y.inv_std_dev = LayerNormalization (x, scale, y.bias)    # zeros

    Requires: nothing.
    Ensures: LayerNormalization, MaxPool and SoftmaxCrossEntropyLoss have all their outputs;
        LayerNormalization has a bias where its scale is constant.
    Idempotent: a node that has them is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add what is missing or unnamed."""
        modified = False
        for node in model.graph.all_nodes():
            extra = _OUTPUTS.get(node.op_type, ()) if not node.domain else ()
            if extra and len(node.outputs) < 1 + len(extra):
                modified = True
                node.resize_outputs(1 + len(extra))
            for value, suffix in zip(node.outputs[1:], extra, strict=False):
                if not value.name:
                    modified = True
                    value.name = f"{node.outputs[0].name}.{suffix}"
            if extra and node.op_type == "LayerNormalization":
                modified |= _add_bias(node)
        return ir.passes.PassResult(model, modified=modified)


def _add_bias(node: ir.Node) -> bool:
    """Give a normalisation a bias of zeros if it has none."""
    scale = node.inputs[1]
    tensor = scale.const_value if scale is not None else None
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_bias or tensor is None or node.graph is None:
        return False
    name = f"{node.outputs[0].name}.bias"
    zeros = np.zeros(tensor.shape.numpy(), tensor.dtype.numpy())
    bias = ir.val(name, const_value=ir.tensor(zeros, name=name))
    if not isinstance(node.graph, ir.Graph):
        return False
    node.graph.register_initializer(bias)
    node.resize_inputs(3)
    node.replace_input_with(2, bias)
    return True
