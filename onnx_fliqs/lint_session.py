"""Rules of ONNX Runtime's default session: what it computes wrongly, or refuses to load.

All of it was seen in 1.19.2 and in 1.31.1, and is right at the basic level.
"""

from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_fliqs.lint_rule import Findings, QdqGraph, type_name
from onnx_fliqs.quantizers import Quantizer, dequantizer, quantizer
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import Target

__all__ = ["kept_relu", "loaded_groups"]

_FLOAT8: Final = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
_LOSES_RELU: Final = frozenset({*_FLOAT8, "INT4", "UINT4", "INT2", "UINT2"})
_WITHOUT_KERNEL: Final = frozenset({*_FLOAT8, "INT2", "UINT2"})
_PRODUCTS: Final = frozenset({"Conv", "Gemm", "MatMul"})
_FUSED: Final = _PRODUCTS | {
    *("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"),
    *("Sigmoid", "Softmax", "LeakyRelu"),
}


def kept_relu(graph: QdqGraph, target: Target) -> Findings:
    """A Relu stays in front of a narrow type: it is dropped where the zero point is given."""
    if not _is_default_session(graph, target):
        return
    for each in graph.quantizers:
        value = each.node.inputs[0]
        relu = value.producer() if value is not None else None
        if each.node.op_type != "QuantizeLinear" or relu is None or relu.op_type != "Relu":
            continue
        narrow = type_name(each.dtype) in _LOSES_RELU and each.spells_zero
        if narrow and _is_only_reader(each.node) and not _clips_negatives(each):
            message = (
                f"ONNX Runtime drops the Relu in front of it; give {type_name(each.dtype)} as"
                " output_dtype in place of a zero point"
            )
            yield each.node, message


def loaded_groups(graph: QdqGraph, target: Target) -> Findings:
    """No group is fused into an operator that has no kernel."""
    if not _is_default_session(graph, target):
        return
    for node in graph.nodes:
        if node.op_type not in _FUSED:
            continue
        written = quantizer(node.outputs[0])
        read = [each for value in node.inputs[:2] if (each := dequantizer(value)) is not None]
        if written is None or not _is_only_reader(written.node) or len(read) < _operands(node):
            continue
        reason = _why_refused(node, read, written)
        if reason is not None:
            message = f"ONNX Runtime refuses to load it between quantizers of {reason}"
            yield node, message


def _why_refused(node: ir.Node, read: list[Quantizer], written: Quantizer) -> str | None:
    names = [type_name(each.dtype) for each in read]
    types = set(names)
    if node.op_type == "Gemm" and not written.spells_zero:
        return None
    if types & _WITHOUT_KERNEL:
        return min(types & _WITHOUT_KERNEL)
    if node.op_type == "Conv" and names == ["INT4", "INT8"]:
        return "INT4 and INT8"
    # The operators that the group becomes read a zero point that is left out as UINT8.
    if node.op_type not in _PRODUCTS and types == {"INT8"} and not written.spells_zero:
        return "INT8 without zero points"
    return None


def _is_default_session(graph: QdqGraph, target: Target) -> bool:
    return "onnxruntime" in target.runtimes and graph.level is OptimizationLevel.DEFAULT


def _is_only_reader(node: ir.Node) -> bool:
    """Whether nothing else sees what a node reads."""
    value = node.inputs[0]
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _operands(node: ir.Node) -> int:
    """How many of the first two inputs are quantized in a group."""
    return min(2, len(node.inputs))


def _clips_negatives(each: Quantizer) -> bool:
    """Whether the zero point is the smallest code."""
    if each.dtype is None or each.zero_point is None or not each.dtype.is_integer():
        return False
    least = ml_dtypes.iinfo(each.dtype.numpy()).min  # type: ignore[no-untyped-call]
    return bool(np.all(each.zero_point == least))
