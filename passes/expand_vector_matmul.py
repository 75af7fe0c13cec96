"""Let MatMul multiply matrices only."""

import logging

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    changed_constant,
    constant_of,
    formula_for,
    is_standard,
    replace_node,
    require_opset,
    used_names,
)

__all__ = ["ExpandVectorMatmulPass"]

logger = logging.getLogger(__name__)


class ExpandVectorMatmulPass(ir.passes.InPlacePass):
    """Write vectors that MatMul multiplies as matrices of one row or column.

    Before:  y = MatMul (x, w)                                        # x: [N,K], w: [K]
    After:   p = MatMul (x, w');  y = Squeeze (p, -1)                 # w': [K,1]

    ONNX Runtime's gradient of MatMul takes matrices only.

    Requires: opset >= 13; inferred shapes; constants are initializers.
    Ensures: no operand of a MatMul is known to be of rank 1; the results are the same up to
        float32 rounding; the graph's signature is unchanged.
    Idempotent: matrices are left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which Squeeze had an attribute."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite each product of vectors, in the main graph and in subgraphs."""
        taken = used_names(model)
        found = [
            node
            for node in model.graph.all_nodes()
            if is_standard(node, "MatMul") and any(map(_is_vector, node.inputs))
        ]
        for node in found:
            _expand(node, taken)
            logger.debug("expanded the vectors of %s", node.name)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 1


def _expand(node: ir.Node, taken: set[str]) -> None:
    op = formula_for(node)
    operands, squeezed = [], []
    for axis, value in enumerate(node.inputs):
        assert value is not None
        operands.append(value)
        if not _is_vector(value):
            continue
        squeezed.append(axis - 2)
        array = constant_of(value)
        if array is None:
            operands[-1] = op.Unsqueeze(value, [axis])
        else:
            matrix, suffix = np.expand_dims(array, axis), str(node.outputs[0].name)
            operands[-1] = changed_constant(node, value, matrix, suffix, taken)
    product = op.MatMul(*operands)
    replace_node(node, op, [op.Squeeze(product, squeezed)], heir=product)
