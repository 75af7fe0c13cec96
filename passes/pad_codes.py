"""Pad quantized tensors before they are dequantized."""

from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    add_initializer,
    constant_of,
    is_standard,
    only_reader,
    used_names,
)

__all__ = ["PadCodesPass"]

_OPSET: Final = 13
"""The first in which Pad takes 8-bit integers."""


class PadCodesPass(ir.passes.InPlacePass):
    """Let Pad read and write codes where both sides have the same grid.

    Before:  x = DequantizeLinear (c, s, z);  y = Pad (x, pads)
             d = QuantizeLinear (y, s, z);  v = DequantizeLinear (d, s, z)
    After:   d = Pad (c, pads, z);  v = DequantizeLinear (d, s, z)

    Of the operators that only rearrange, ONNX Runtime itself leaves none but Pad in float.

    Requires: opset >= 13; zero points are initializers.
    Ensures: no Pad with zeros lies between a DequantizeLinear and a QuantizeLinear with the
        same 8-bit zero point and scale; results and signature are unchanged.
    Idempotent: a Pad of codes is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes of the main graph."""
        if model.opset_imports.get("", 0) < _OPSET:
            return ir.passes.PassResult(model, modified=False)
        taken = used_names(model)
        count = sum([_pad_codes(node, taken) for node in list(model.graph)])
        return ir.passes.PassResult(model, modified=count > 0)


def _pad_codes(node: ir.Node, taken: set[str]) -> bool:
    if not is_standard(node, "Pad") or not _fills_with_zeros(node):
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    reader = only_reader(node.outputs[0])
    if source is None or reader is None:
        return False
    quantize = reader[0]
    if not is_standard(source, "DequantizeLinear") or not is_standard(
        quantize, "QuantizeLinear"
    ):
        return False
    grids = [_grid(source), _grid(quantize)]
    if grids[0] is None or grids[0] != grids[1]:
        return False
    zero = constant_of(source.inputs[2])
    assert zero is not None
    assert isinstance(node.graph, ir.Graph)
    graph, codes = node.graph, quantize.outputs[0]
    fill = add_initializer(graph, f"{codes.name}.fill", zero, taken)
    padded = ir.node(
        "Pad",
        [source.inputs[0], node.inputs[1], fill, *node.inputs[3:]],
        node.attributes,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, quantize, [node, quantize], [padded], [codes], [padded.outputs[0]]
    )
    if not source.outputs[0].uses() and not source.outputs[0].is_graph_output():
        graph.remove(source, safe=True)
    return True


def _fills_with_zeros(node: ir.Node) -> bool:
    """Whether zeros are all that a Pad adds, and given as such."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    fill = constant_of(value)
    return value is None or (fill is not None and not fill.any())


def _grid(node: ir.Node) -> tuple[bytes, bytes, str] | None:
    """Scale and zero point of a node, where there is one of each, of 8 bits."""
    scale, zero = (
        constant_of(node.inputs[index]) if len(node.inputs) > index else None
        for index in (1, 2)
    )
    if (
        scale is None
        or zero is None
        or scale.size != 1
        or zero.dtype not in (np.uint8, np.int8)
    ):
        return None
    return scale.tobytes(), zero.tobytes(), str(zero.dtype)
