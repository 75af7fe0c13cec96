"""Rules of a target's dialect that can be checked without its hardware."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of, label
from onnx_fliqs.passes._qonnx_quantizers import is_qonnx
from onnx_fliqs.targets import Dialect, Target

__all__ = ["lint"]


def lint(model: ir.Model, target: Target) -> tuple[str, ...]:
    """List where a graph breaks the rules of a target, one line each."""
    if target.dialect is Dialect.QONNX:
        return tuple(_qonnx_problems(model))
    problems = []
    for node in model.graph.all_nodes():
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        dtype = codes.dtype if codes is not None else None
        if target.qdq_types is not None and dtype is not None:
            allowed = target.qdq_types
            if dtype.name not in allowed:
                problems.append(
                    f"{node.op_type} {node.name}: {dtype.name} is not among"
                    f" {', '.join(allowed)}"
                )
    return tuple(problems)


def _qonnx_problems(model: ir.Model) -> Iterator[str]:
    """What FINN and hls4ml refuse, whatever the rest of the graph is."""
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield f"{label(node)} is no quantizer of QONNX"
        if not is_qonnx(node.domain, node.op_type):
            continue
        parameters = [constant_of(value) for value in node.inputs[1:]]
        if any(array is None for array in parameters):
            yield f"{label(node)} has a scale, zero point or width that is not constant"
        elif node.op_type in ("Quant", "IntQuant") and np.any(parameters[1]):
            yield f"{label(node)} has a zero point other than 0"
