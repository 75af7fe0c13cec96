"""Fold batch normalization into the layer before it."""

import logging

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._batch_normalization import ChannelAffine, affine_of
from onnx_fliqs.passes._graph import (
    add_initializer,
    constant_of,
    require_opset,
    used_names,
)

__all__ = ["FoldBatchNormalizationPass"]

logger = logging.getLogger(__name__)


class FoldBatchNormalizationPass(ir.passes.InPlacePass):
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm that feeds it.

    Before:  c = Conv(x, w, b);  y = BatchNormalization(c, scale, bias, mean, var)
    After:   y = Conv(x, w', b')

    w' and b' keep the names of w and b, or, where another node reads those too, become
    ``<w>_<y>`` and ``<b>_<y>``. A missing bias becomes ``<w'>_bias``.

    Requires: opset >= 14; constant weights are initializers.
    Ensures: no BatchNormalization in inference mode is the only reader of a layer with
        constant weights; results change by float32 rounding only; the graph's signature is
        unchanged.
    Idempotent: without such a BatchNormalization nothing changes.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which the training mode looks different."""
        require_opset(model, 14)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold each normalization, in the main graph and in subgraphs."""
        taken = used_names(model)
        count = sum([_fold(node, taken) for node in list(model.graph.all_nodes())])
        logger.info("folded %d batch normalizations", count)
        return ir.passes.PassResult(model, modified=count > 0)


def _fold(node: ir.Node, taken: set[str]) -> bool:
    layer = _layer_before(node)
    if layer is None or (affine := affine_of(node)) is None:
        return False
    weight = constant_of(layer.inputs[1])
    old_bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    bias = np.zeros(1) if old_bias is None else constant_of(old_bias)
    if weight is None or bias is None:
        return False
    # In float64, rounded once, to the type that the layer already has.
    new_weight = _scaled_weight(layer, weight, affine).astype(weight.dtype)
    beta = layer.attributes.get_float("beta", 1.0) if layer.op_type == "Gemm" else 1.0
    new_bias = (beta * bias.astype(np.float64) * affine.factor + affine.offset).astype(
        weight.dtype
    )
    output = node.outputs[0]
    if layer.op_type == "Gemm":
        layer.attributes.pop("beta", None)
    weight_value = _replace_input(layer, 1, new_weight, f"_{output.name}", taken)
    if old_bias is None:
        assert layer.graph is not None
        layer.resize_inputs(3)
        name = f"{weight_value.name}_bias"
        layer.replace_input_with(2, add_initializer(layer.graph, name, new_bias, taken))
    else:
        _replace_input(layer, 2, new_bias, f"_{output.name}", taken)
    _take_over_output(layer, node)
    logger.debug("folded %s into %s", node.name, layer.name)
    return True


def _layer_before(node: ir.Node) -> ir.Node | None:
    """The layer that only this normalization reads, if it is one that can absorb it."""
    if node.domain != "" or node.op_type != "BatchNormalization":
        return None
    source = node.inputs[0]
    if len(node.outputs) != 1 or source is None:
        return None
    if node.attributes.get_int("training_mode", 0) != 0:
        return None
    layer = source.producer()
    if layer is None or layer.domain != "" or layer.graph is not node.graph:
        return None
    if len(source.uses()) != 1 or source.is_graph_output():
        return None
    return layer if layer.op_type in ("Conv", "ConvTranspose", "Gemm") else None


def _scaled_weight(
    layer: ir.Node, weight: npt.NDArray[np.generic], affine: ChannelAffine
) -> npt.NDArray[np.float64]:
    """Multiply what makes each output channel by its factor."""
    exact = weight.astype(np.float64)
    if layer.op_type == "Gemm":
        transposed = layer.attributes.get_int("transB", 0) != 0
        return exact * (affine.factor[:, None] if transposed else affine.factor)
    tail = (1,) * (weight.ndim - 2)
    if layer.op_type == "Conv":
        return exact * affine.factor.reshape(-1, 1, *tail)
    # ConvTranspose: [inputs, outputs / group, ...], the inputs group by group.
    group = layer.attributes.get_int("group", 1)
    grouped = exact.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    return (grouped * affine.factor.reshape(group, 1, -1, *tail)).reshape(weight.shape)


def _replace_input(
    layer: ir.Node, index: int, array: npt.NDArray[np.generic], suffix: str, taken: set[str]
) -> ir.Value:
    """Give the layer its own constant, under the old name if nobody else reads that."""
    old = layer.inputs[index]
    assert old is not None
    assert old.name is not None
    assert layer.graph is not None
    own = len(old.uses()) == 1 and not old.is_graph_output() and old.graph is layer.graph
    if own and old.is_initializer():
        old.const_value = ir.tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        return old
    new = add_initializer(layer.graph, old.name + suffix, array, taken)
    layer.replace_input_with(index, new)
    return new


def _take_over_output(layer: ir.Node, node: ir.Node) -> None:
    """Let the layer compute what the normalization computed, under the same name."""
    old, result = layer.outputs[0], node.outputs[0]
    name, result.name = result.name, f"{result.name}_folded"
    ir.convenience.replace_all_uses_with(result, old, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    old.name = name
    old.shape = result.shape if result.shape is not None else old.shape
    old.type = result.type if result.type is not None else old.type
