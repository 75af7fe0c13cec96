"""Compute sizes of tensors beforehand, one by one."""

import logging

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    constant_of,
    formula_for,
    is_standard,
    replace_node,
    require_opset,
)

__all__ = ["FoldKnownSizesPass"]

logger = logging.getLogger(__name__)


class FoldKnownSizesPass(ir.passes.InPlacePass):
    """Replace sizes that are taken from a Shape by constants, where they are known.

    Before:  s = Shape (x);  c = Gather (s, 1)                            # x: [N,3,8,8]
    After:   c = Constant <value = 3> ()

    onnxscript's constant folder does so where all sizes of x are known.

    Requires: opset >= 13; inferred shapes; constants are initializers.
    Ensures: no Gather or Slice takes only known sizes from a Shape; the graph's signature and
        outputs are unchanged.
    Idempotent: without such a node nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which Slice had attributes."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each, in the main graph and in subgraphs."""
        found = [
            (node, sizes)
            for node in model.graph.all_nodes()
            if (sizes := _known_sizes(node)) is not None
        ]
        for node, sizes in found:
            op = formula_for(node)
            replace_node(node, op, [op.Constant(value=ir.tensor(sizes))])
        logger.info("folded %d sizes", len(found))
        return ir.passes.PassResult(model, modified=bool(found))


def _known_sizes(node: ir.Node) -> npt.NDArray[np.int64] | None:
    """What a Gather or Slice takes from a Shape, if those are numbers."""
    if not is_standard(node, "Gather", "Slice") or node.inputs[0] is None:
        return None
    maker = node.inputs[0].producer()
    if maker is None or not is_standard(maker, "Shape"):
        return None
    source = maker.inputs[0]
    if source is None or source.shape is None:
        return None
    # Sizes are not negative: -1 stands for those that are unknown.
    sizes = [size if isinstance(size, int) else -1 for size in source.shape]
    start, end = maker.attributes.get_int("start", 0), maker.attributes.get_int("end", None)
    every = np.array(sizes[start:end], np.int64)
    taken = _gathered(node, every) if node.op_type == "Gather" else _sliced(node, every)
    return None if taken is None or (taken < 0).any() else taken


def _gathered(node: ir.Node, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    indices = constant_of(node.inputs[1])
    if indices is None or not all(-sizes.size <= int(i) < sizes.size for i in indices.flat):
        return None
    return np.asarray(sizes[indices.astype(np.int64)])


def _sliced(node: ir.Node, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    bounds: list[int | None] = []
    for index in (1, 2, 4):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = constant_of(value)
        if value is not None and (array is None or array.size != 1):
            return None
        bounds.append(None if array is None else int(array.item()))
    return sizes[slice(*bounds)]
