"""Write sums and means with the operators that have integer kernels."""

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of, formula_for, is_standard, replace_node
from onnx_fliqs.passes._ops import Ops

__all__ = ["PreferIntegerOperatorsPass"]


class PreferIntegerOperatorsPass(ir.passes.InPlacePass):
    """Write Sum as Add, and the mean over an image as GlobalAveragePool.

    Before:  s = Sum (a, b, c);  m = ReduceMean (s, [2, 3])
    After:   t = Add (a, b);  s = Add (t, c);  m = GlobalAveragePool (s)

    Runtimes have integer kernels of Add and GlobalAveragePool only. Means without kept
    dimensions get a Flatten.

    Requires: opset >= 18, where the axes of ReduceMean are an input; inferred shapes.
    Ensures: no Sum of several tensors is left, nor a ReduceMean over both last axes of a
        tensor of rank 4; results change by float32 rounding only; the graph's signature is
        unchanged.
    Idempotent: without such a node nothing changes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes of all graphs."""
        found = list(model.graph.all_nodes())
        count = sum([_split_sum(node) or _pool(node) for node in found])
        return ir.passes.PassResult(model, modified=count > 0)


def _split_sum(node: ir.Node) -> bool:
    if not is_standard(node, "Sum") or len(node.inputs) < 2:
        return False
    op = formula_for(node)
    total = node.inputs[0]
    for value in node.inputs[1:]:
        total = op.Add(total, value)
    _replace(node, op, total)
    return True


def _pool(node: ir.Node) -> bool:
    if not is_standard(node, "ReduceMean"):
        return False
    image = node.inputs[0]
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if image is None or image.shape is None or len(image.shape) != 4 or axes is None:
        return False
    if sorted(np.asarray(axes).reshape(-1) % 4) != [2, 3]:
        return False
    op = formula_for(node)
    mean = op.GlobalAveragePool(image)
    if not node.attributes.get_int("keepdims", 1):
        mean = op.Flatten(mean, axis=1)
    _replace(node, op, mean)
    return True


def _replace(node: ir.Node, op: Ops, result: ir.Value | None) -> None:
    """Put the formula in the node's place; what it computes keeps type and shape."""
    assert result is not None
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    replace_node(node, op, [result])
