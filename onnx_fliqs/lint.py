"""Rules of a target's dialect that can be checked without its hardware."""

import onnx_ir as ir

from onnx_fliqs.targets import Target

__all__ = ["lint"]


def lint(model: ir.Model, target: Target) -> tuple[str, ...]:
    """List where a QDQ graph breaks the rules of a target, one line each."""
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
