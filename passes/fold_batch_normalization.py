"""Fold batch normalization into the layer before it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._batch_normalization import affine_of, is_batch_normalization
from onnx_fliqs.passes._graph import (
    constant_of,
    only_reader,
    require_opset,
    take_over_output,
    used_names,
)
from onnx_fliqs.passes._linear import (
    LinearLayer,
    constant_addend,
    linear_layer,
    set_addend,
)
from onnx_fliqs.passes._rearranging import backwards, channels, rearranges

__all__ = ["FoldBatchNormalizationPass"]

_Array: TypeAlias = npt.NDArray[np.float64]

logger = logging.getLogger(__name__)


class FoldBatchNormalizationPass(ir.passes.InPlacePass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it.

    Before:  c = Conv (x, w, b);  y = BatchNormalization (c, scale, bias, mean, var)
    After:   y = Conv (x, w', b')

    w' and b' keep the names of w and b or, where another node reads those too, become
    ``<w>_<y>`` and ``<b>_<y>``. A missing bias becomes ``<w'>_bias``; MatMul gets an Add for
    it. Between the two there may be nodes that only rearrange, and additions of constants.

    Requires: opset >= 14; constant weights are initializers.
    Ensures: no BatchNormalization in inference mode is the only reader of a layer with
        constant weights, unless it normalizes another axis; results change by float32
        rounding only; the graph's signature is unchanged.
    Idempotent: without such a BatchNormalization nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which the training mode looks different."""
        require_opset(model, 14)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold each normalization, in the main graph and in subgraphs."""
        taken = used_names(model)
        found = [node for node in model.graph.all_nodes() if is_batch_normalization(node)]
        count = sum([_fold(node, taken) for node in found])
        logger.info("folded %d batch normalizations", count)
        return ir.passes.PassResult(model, modified=count > 0)


@dataclass(frozen=True, slots=True)
class _Found:
    """The layer before a normalization, and what the normalization does to its output."""

    layer: LinearLayer
    factor: _Array
    offset: _Array
    addends: Sequence[tuple[ir.Node, int, _Array]]
    """Additions on the way, with the constants that they have to add from now on."""


def _fold(node: ir.Node, taken: set[str]) -> bool:
    found = _layer_before(node)
    if found is None:
        return False
    layer = found.layer
    factor = channels(found.factor, layer.channel_axis)
    offset = channels(found.offset, layer.channel_axis)
    weight = None if factor is None else layer.times_outputs(factor)
    if weight is None or factor is None or offset is None:
        return False
    suffix, name = str(node.outputs[0].name), layer.node.name
    for add, index, array in found.addends:
        set_addend(add, index, array, suffix, taken)
    layer.write(weight, suffix, taken, factor=factor, shift=layer.as_bias(offset))
    assert node.inputs[0] is not None
    take_over_output(node, node.inputs[0])
    logger.debug("folded %s into %s", node.name, name)
    return True


def _layer_before(node: ir.Node) -> _Found | None:
    """The layer that only this normalization reads, through nodes that it commutes with."""
    affine, value = affine_of(node), node.inputs[0]
    rank = None if value is None else _rank(value)
    if affine is None or rank is None:
        return None
    factor, offset = affine.spread(rank)
    addends: list[tuple[ir.Node, int, _Array]] = []
    while value is not None and only_reader(value) is not None:
        producer = value.producer()
        if producer is None or producer.graph is not node.graph:
            return None
        layer = linear_layer(producer)
        if layer is not None:
            return _Found(layer, factor, offset, addends)
        index = constant_addend(producer)
        if index is not None:
            addend = constant_of(producer.inputs[index])
            value = producer.inputs[1 - index]
            rank = None if value is None else _rank(value)
            if (
                addend is None
                or rank is None
                or any(size > 1 for size in factor.shape[:-rank])
            ):
                return None
            total = _trimmed(addend.astype(np.float64) * factor + offset, addend.ndim)
            addends.append((producer, index, total))
            factor = factor.reshape(factor.shape[-rank:])
            offset = np.zeros_like(factor)
        elif rearranges(producer):
            moved = [backwards(producer, array) for array in (factor, offset)]
            if moved[0] is None or moved[1] is None:
                return None
            factor, offset = moved[0], moved[1]
            value = producer.inputs[0]
        else:
            return None
    return None


def _rank(value: ir.Value) -> int | None:
    if value.shape is not None:
        return len(value.shape)
    layer = linear_layer(value.producer())
    return None if layer is None else layer.rank


def _trimmed(array: _Array, rank: int) -> _Array:
    """Without leading axes of size 1 that broadcasting brought."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    return array
