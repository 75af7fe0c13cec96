"""Rules of graphs in the dialect of QONNX."""

import numpy as np

from onnx_fliqs.lint_rule import Findings, QdqGraph
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._qonnx_quantizers import is_qonnx
from onnx_fliqs.targets import Dialect, Target

__all__ = ["quantizers_of_qonnx"]


def quantizers_of_qonnx(graph: QdqGraph, target: Target) -> Findings:
    """What FINN and hls4ml refuse, whatever the rest of the graph is."""
    if target.dialect is not Dialect.QONNX:
        return
    for node in graph.model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield node, "it is no quantizer of QONNX"
        if not is_qonnx(node.domain, node.op_type):
            continue
        parameters = [constant_of(value) for value in node.inputs[1:]]
        if any(array is None for array in parameters):
            yield node, "it has a scale, zero point or width that is not constant"
        elif node.op_type in ("Quant", "IntQuant") and np.any(parameters[1]):
            yield node, "it has a zero point other than 0"
