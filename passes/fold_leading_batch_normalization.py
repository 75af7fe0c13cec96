"""Fold batch normalization into the layer after it."""

import logging
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._batch_normalization import affine_of, is_batch_normalization
from onnx_fliqs.passes._graph import only_reader, require_opset, used_names
from onnx_fliqs.passes._linear import LinearLayer, linear_layer
from onnx_fliqs.passes._rearranging import channels, forwards, rearranges

__all__ = ["FoldLeadingBatchNormalizationPass"]

_Array: TypeAlias = npt.NDArray[np.float64]

logger = logging.getLogger(__name__)


class FoldLeadingBatchNormalizationPass(ir.passes.InPlacePass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul that reads it.

    Before:  n = BatchNormalization (x, scale, bias, mean, var);  y = Conv (n, w, b)
    After:   y = Conv (x, w', b')

    The names of w' and b' follow the rule of FoldBatchNormalizationPass. Between the two there
    may be nodes that only rearrange. Where the layer pads, the normalization has to map zero
    to zero.

    Requires: opset >= 14; inferred shapes; constant weights are initializers.
    Ensures: no BatchNormalization in inference mode has as its only reader an unpadded layer
        with constant weights, unless it normalizes another axis; results change by float32
        rounding only; the graph's signature is unchanged.
    Idempotent: without such a BatchNormalization nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which the training mode looks different."""
        require_opset(model, 14)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the last first: the one before may then meet the layer."""
        taken = used_names(model)
        found = [node for node in model.graph.all_nodes() if is_batch_normalization(node)]
        count = sum([_fold(node, taken) for node in reversed(found)])
        logger.info("folded %d leading batch normalizations", count)
        return ir.passes.PassResult(model, modified=count > 0)


def _fold(node: ir.Node, taken: set[str]) -> bool:
    found = _layer_after(node)
    if found is None:
        return False
    layer, per_channel = found
    factor, offset = (channels(array, layer.channel_axis) for array in per_channel)
    if factor is None or offset is None:
        return False
    weight, shift = layer.times_inputs(factor), layer.response(offset)
    if weight is None or shift is None:
        return False
    name = layer.node.name
    layer.write(weight, str(node.outputs[0].name), taken, shift=shift)
    source = node.inputs[0]
    assert source is not None
    assert node.graph is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
    node.graph.remove(node, safe=True)
    logger.debug("folded %s into %s", node.name, name)
    return True


def _layer_after(node: ir.Node) -> tuple[LinearLayer, tuple[_Array, _Array]] | None:
    """The only reader of a normalization, and factor and offset of each of its inputs."""
    affine, source = affine_of(node), node.inputs[0]
    if affine is None or source is None or source.shape is None:
        return None
    factor, offset = affine.spread(len(source.shape))
    value = node.outputs[0]
    while (reader := only_reader(value)) is not None:
        user, index = reader
        layer = linear_layer(user)
        if user.graph is not node.graph:
            return None
        if layer is not None:
            return (layer, (factor, offset)) if _sums_over(layer, index) else None
        if not rearranges(user):
            return None
        moved = [forwards(user, array) for array in (factor, offset)]
        if moved[0] is None or moved[1] is None:
            return None
        factor, offset = moved[0], moved[1]
        value = user.outputs[0]
    return None


def _sums_over(layer: LinearLayer, index: int) -> bool:
    """Whether an input of a layer is the one whose channels it sums over."""
    transposed = layer.node.attributes.get_int("transA", 0)
    return index == 1 - layer.weight_index and not transposed
