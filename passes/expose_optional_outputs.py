"""Names the outputs that gradients read, although ONNX lets them be left out."""

from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._graph import is_standard

__all__ = ["ExposeOptionalOutputsPass"]

_OUTPUTS: Final = {
    "LayerNormalization": ("mean", "inv_std_dev"),
    "MaxPool": ("indices",),
    "SoftmaxCrossEntropyLoss": ("log_prob",),
}


class ExposeOptionalOutputsPass(ir.passes.InPlacePass):
    """Name the optional outputs that ONNX Runtime's gradient definitions need.

    Before:  y = LayerNormalization (x, scale, bias)
    After:   y, y.mean, y.inv_std_dev = LayerNormalization (x, scale, bias)

    Requires: nothing.
    Ensures: LayerNormalization, MaxPool and SoftmaxCrossEntropyLoss have all their outputs.
    Idempotent: a node that has them is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add what is missing or unnamed."""
        modified = False
        for node in model.graph.all_nodes():
            if not is_standard(node, *_OUTPUTS):
                continue
            extra = _OUTPUTS[node.op_type]
            if len(node.outputs) < 1 + len(extra):
                modified = True
                node.resize_outputs(1 + len(extra))
            for value, suffix in zip(node.outputs[1:], extra, strict=False):
                if not value.name:
                    modified = True
                    value.name = f"{node.outputs[0].name}.{suffix}"
        return ir.passes.PassResult(model, modified=modified)
