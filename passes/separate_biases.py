"""Give every layer a bias that is its alone."""

from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    add_initializer,
    constant_of,
    only_reader,
    used_names,
)
from onnx_fliqs.passes._linear import LinearLayer, bias_input, linear_layer

__all__ = ["SeparateBiasesPass"]

_SUFFIX: Final = "separate"


class SeparateBiasesPass(ir.passes.InPlacePass):
    """Give every Conv, ConvTranspose and Gemm a bias that nothing else reads.

    Before:  y = Conv (x, w)
    After:   y = Conv (x, w, w_bias)

    The new bias is 0. One that several nodes read is copied for each but the last of them, as
    ``<bias>_separate``; so is the constant that an Add behind a MatMul adds. A MatMul without
    such an Add stays without.

    Requires: constant weights are initializers.
    Ensures: every convolution and Gemm with a constant weight has a bias that it alone reads,
        unless the bias is computed; outputs and signature unchanged.
    Idempotent: a bias that only one node reads stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at each layer, in the main graph and in subgraphs."""
        taken = used_names(model)
        layers = [layer for node in model.graph.all_nodes() if (layer := linear_layer(node))]
        changed = [_separate(layer, taken) for layer in layers]
        return ir.passes.PassResult(model, modified=any(changed))


def _separate(layer: LinearLayer, taken: set[str]) -> bool:
    found = bias_input(layer)
    graph = layer.node.graph
    assert isinstance(graph, ir.Graph)
    if found is not None:
        node, index = found
        old = node.inputs[index]
        array = constant_of(old)
        assert old is not None
        assert array is not None
        if only_reader(old) is not None:
            return False
        name = f"{old.name}_{_SUFFIX}"
    elif layer.node.op_type == "MatMul":
        return False
    else:
        node, index = layer.node, 2
        weight = node.inputs[layer.weight_index]
        assert weight is not None
        stored = constant_of(weight)
        assert stored is not None
        array = np.zeros(layer.channels[1], stored.dtype)
        name = f"{weight.name}_bias"
        node.resize_inputs(3)
    node.replace_input_with(index, add_initializer(graph, name, array, taken))
    return True
