"""Cut constants beforehand."""

import logging

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    add_initializer,
    constant_of,
    is_standard,
    require_opset,
    used_names,
)

__all__ = ["FoldSplitsPass"]

logger = logging.getLogger(__name__)


class FoldSplitsPass(ir.passes.InPlacePass):
    """Compute each Split of a constant.

    Before:  q, k, v = Split <axis = 1> (w)
    After:   q, k and v are initializers

    onnxscript's constant folder leaves operators with several outputs.

    Requires: opset >= 13.
    Ensures: no Split of a constant into sizes that are known is left, but for outputs of the
        graph; the graph's signature and outputs are unchanged.
    Idempotent: without such a Split nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which the sizes are an attribute."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut each constant, in the main graph and in subgraphs."""
        taken = used_names(model)
        found = [node for node in model.graph.all_nodes() if is_standard(node, "Split")]
        count = sum([_fold(node, taken) for node in found])
        logger.info("folded %d Split nodes", count)
        return ir.passes.PassResult(model, modified=count > 0)


def _fold(node: ir.Node, taken: set[str]) -> bool:
    array, graph = constant_of(node.inputs[0]), node.graph
    if array is None or any(value.is_graph_output() for value in node.outputs):
        return False
    axis = node.attributes.get_int("axis", 0)
    sizes = _sizes(node, array.shape[axis])
    if sizes is None:
        return False
    assert isinstance(graph, ir.Graph)
    parts = np.split(array, np.cumsum(sizes)[:-1], axis)
    for value, part in zip(node.outputs, parts, strict=True):
        if not value.uses():
            continue
        name, value.name = str(value.name), None
        taken.discard(name)
        constant = add_initializer(graph, name, part.copy(), taken)
        ir.convenience.replace_all_uses_with(value, constant)
    graph.remove(node, safe=True)
    return True


def _sizes(node: ir.Node, total: int) -> list[int] | None:
    """The sizes of the parts, None if they are not constant."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = constant_of(node.inputs[1])
        return None if sizes is None else [int(size) for size in sizes]
    # All are as long, but the last, which may be shorter.
    count = len(node.outputs)
    whole = -(-total // count)
    return [*[whole] * (count - 1), total - whole * (count - 1)]
