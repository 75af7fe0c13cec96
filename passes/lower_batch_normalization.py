"""Replace batch normalization by a multiplication and an addition."""

import logging
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes._batch_normalization import affine_of
from onnx_fliqs.passes._graph import add_initializer, label, require_opset, used_names

__all__ = ["NORMALIZATION_KEY", "LowerBatchNormalizationPass"]

NORMALIZATION_KEY: Final = "onnx_fliqs.normalization"
"""Metadata key of what a normalization became; its value is the name of the normalization."""

logger = logging.getLogger(__name__)


class LowerBatchNormalizationPass(ir.passes.InPlacePass):
    """Turn BatchNormalization into a Mul and an Add with one constant per channel.

    Before:  y = BatchNormalization(x, scale, bias, mean, var)
    After:   y_scaled = Mul(x, y_scale);  y = Add(y_scaled, y_offset)

    Requires: opset >= 14; the normalization's parameters are constant and the rank of its
        input is known, else UnsupportedError.
    Ensures: no BatchNormalization is left; results change by float32 rounding only; the
        graph's signature is unchanged.
    Idempotent: without BatchNormalization nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which the training mode looks different."""
        require_opset(model, 14)

    def ensures(self, model: ir.Model) -> None:
        """No normalization is left in any graph."""
        for node in model.graph.all_nodes():
            if _is_normalization(node):
                raise ir.passes.PostconditionError(f"{label(node)} is left")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each normalization, in the main graph and in subgraphs."""
        taken = used_names(model)
        found = [node for node in model.graph.all_nodes() if _is_normalization(node)]
        for node in found:
            _lower(node, taken)
            logger.debug("lowered %s", node.name)
        logger.info("lowered %d batch normalizations", len(found))
        return ir.passes.PassResult(model, modified=bool(found))


def _is_normalization(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "BatchNormalization"


def _lower(node: ir.Node, taken: set[str]) -> None:
    source, result = node.inputs[0], node.outputs[0]
    if node.attributes.get_int("training_mode", 0):
        raise UnsupportedError(
            f"{label(node)} is in training mode; export the model in evaluation mode"
        )
    affine = affine_of(node)
    if affine is None:
        raise UnsupportedError(f"{label(node)} has parameters that are not constant")
    if source is None or source.shape is None:
        raise UnsupportedError(f"{label(node)} has an input of unknown rank")
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    dtype = (source.dtype or ir.DataType.FLOAT).numpy()
    shape = (-1, *(1,) * max(len(source.shape) - 2, 0))
    factor, offset = (part.reshape(shape).astype(dtype) for part in affine)
    scale = add_initializer(graph, f"{result.name}_scale", np.asarray(factor), taken)
    shift = add_initializer(graph, f"{result.name}_offset", np.asarray(offset), taken)
    scaled_name = f"{result.name}_scaled"
    while scaled_name in taken:
        scaled_name += "_"
    taken.add(scaled_name)
    scaled = ir.val(scaled_name, type=result.type, shape=source.shape)
    name = node.name or f"BatchNormalization_{result.name}"
    multiply = ir.node("Mul", [source, scale], outputs=[scaled], name=f"{name}_mul")
    add = ir.node("Add", [scaled, shift], name=f"{name}_add")
    for part in (multiply, add):
        part.metadata_props[NORMALIZATION_KEY] = name
    graph.insert_before(node, [multiply, add])
    added = add.outputs[0]
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], [result], [added])
