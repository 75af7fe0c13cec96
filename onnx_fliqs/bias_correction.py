"""Bias correction: the mean error of what a layer computes is taken out of its bias.

Rounding shifts the mean of each output channel (Nagel et al. 2019, section 4.2), the more the
fewer weights make the channel. The shift is measured on calibration data, in the searchable
network, and subtracted from the bias.

What a layer is off by depends on the corrections of those before it. They need not be measured
one after the other, though: if all that comes behind a layer reads the output less its shift,
one run of the network gives the shifts of all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.emission import searchable
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._linear import LinearLayer, bias_input, linear_layer
from onnx_fliqs.passes._ops import Ops
from onnx_fliqs.precision import PrecisionMap
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session
from onnx_fliqs.sites import ScaleTable, SearchSpace

__all__ = ["corrected_biases"]

Array: TypeAlias = npt.NDArray[Any]

_MEAN: Final = "onnx_fliqs.mean."
"""Prefix of the mean of a layer's output, per channel."""
_EXPECTED: Final = "onnx_fliqs.expected."
"""Prefix of the mean that the float model has there."""


def corrected_biases(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: PrecisionMap,
    scales: ScaleTable,
    batches: Sequence[Mapping[str, Array]],
) -> dict[str, Array]:
    """The biases with which the quantized layers compute the right means.

    Args:
        canonical: A canonical model whose layers have biases of their own (see
            ``SeparateBiasesPass``); it is not changed.
        space: Its layers and sites.
        chosen: A precision for every layer.
        scales: Scales for every site in the format it takes.
        batches: Calibration data.

    Returns:
        By name, the initializers to replace. What cannot be corrected is not among them:
        products without a bias, and layers inside control flow.
    """
    layers = [node for node in canonical.graph if node.name in space.layer]
    found = {str(node.name): layer for node in layers if (layer := _correctable(node))}
    if not found:
        return {}
    names = [_MEAN + name for name in found]
    float_session = make_session(_with_means(canonical, found))
    quantized = searchable(canonical, space, chosen, scales)
    session = make_session(
        _with_means(quantized, found, corrected=True), level=OptimizationLevel.NONE
    )
    shifts = [np.zeros(1) for _ in names]
    for feeds in batches:
        expected = run_session(float_session, names, feeds)
        given = {_EXPECTED + name: mean for name, mean in zip(found, expected, strict=True)}
        means = run_session(session, names, {**feeds, **given})
        for index, (mean, right) in enumerate(zip(means, expected, strict=True)):
            shifts[index] = shifts[index] + (np.float64(mean) - right) / len(batches)
    return {
        str(_bias(layer).name): _corrected(layer, shift.reshape(-1))
        for layer, shift in zip(found.values(), shifts, strict=True)
    }


def _correctable(node: ir.Node) -> LinearLayer | None:
    """The node as a layer with a bias whose output has a known rank."""
    layer = linear_layer(node)
    known = node.outputs[0].shape is not None
    return layer if layer is not None and known and bias_input(layer) is not None else None


def _bias(layer: LinearLayer) -> ir.Value:
    found = bias_input(layer)
    assert found is not None
    node, index = found
    value = node.inputs[index]
    assert value is not None
    return value


def _corrected(layer: LinearLayer, shift: Array) -> Array:
    old = constant_of(_bias(layer))
    assert old is not None
    new: Array = (old.astype(np.float64) - layer.as_bias(shift)).astype(old.dtype)
    return new


def _with_means(
    model: ir.Model, layers: Mapping[str, LinearLayer], *, corrected: bool = False
) -> ir.Model:
    """A copy whose outputs are the means of layers, over all axes but that of the channels.

    Args:
        model: The float or the searchable network.
        layers: By the names of their nodes.
        corrected: Let what comes behind each layer read its output less the mean, plus another
            mean that is an input of the graph.
    """
    copy = model.clone()
    graph = copy.graph
    means = []
    for node in [node for node in graph if node.name in layers]:
        name, output = str(node.name), node.outputs[0]
        readers = list(output.uses())
        op = Ops(output.dtype, f"{name}/mean/")
        rank = len(output.shape or ())
        channel = layers[name].channel_axis % rank
        axes = [axis for axis in range(rank) if axis != channel]
        mean = op.ReduceMean(output, axes, keepdims=1)
        if corrected:
            expected = ir.val(_EXPECTED + name, output.dtype, [None] * rank)
            graph.inputs.append(expected)
            right = op.Sub(output, op.Sub(mean, expected))
            for reader, index in readers:
                reader.replace_input_with(index, right)
        graph.insert_after(node, op.nodes)
        mean.name = _MEAN + name
        mean.type, mean.shape = output.type, ir.Shape([None] * rank)
        means.append(mean)
    graph.outputs[:] = means
    return copy
