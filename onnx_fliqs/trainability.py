"""Which weights the loss reaches through operators that ONNX Runtime can differentiate."""

from collections.abc import Iterable, Sequence
from typing import Final

import onnx_ir as ir

from onnx_fliqs.site_functions import DOMAIN
from onnx_fliqs.sites import Layer

__all__ = ["stopped_operators", "trainable_parameters", "why_frozen"]

# Gradients that ONNX Runtime 1.19.2 defines (its gradient builder's registry).
_DIFFERENTIABLE: Final = frozenset(
    """
    Abs Add AveragePool Cast Clip Concat Conv ConvTranspose Div Dropout Erf Exp Expand Flatten
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Identity LayerNormalization
    LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mul Neg Pad Pow ReduceL2 ReduceLogSumExp
    ReduceMean ReduceSum Reciprocal Relu Reshape Resize ScatterND Sigmoid Slice Softmax
    SoftmaxCrossEntropyLoss Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 - reads as a list
)
# Inputs that hold trainable numbers, by operator; the rest are data, shapes or bounds.
_PARAMETER_INPUTS: Final = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "LayerNormalization": (1, 2),
}


def _differentiable(node: ir.Node) -> bool:
    if node.domain == DOMAIN:
        return True
    if node.op_type == "Concat" and len(set(node.inputs)) < len(node.inputs):
        return False  # its gradient wants distinct inputs
    return not node.domain and node.op_type in _DIFFERENTIABLE


def _reached(outputs: Iterable[ir.Value]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Nodes that the gradient passes through, and those at which it stops."""
    passed: set[ir.Node] = set()
    stopped: set[ir.Node] = set()
    pending = [value.producer() for value in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in passed or node in stopped:
            continue
        if not _differentiable(node):
            stopped.add(node)
            continue
        passed.add(node)
        pending.extend(value.producer() for value in node.inputs if value is not None)
    return passed, stopped


def stopped_operators(model: ir.Model, outputs: Sequence[str]) -> tuple[str, ...]:
    """Operators (``domain::type`` as ONNX Runtime keys them) at which the gradient stops."""
    _, stopped = _reached(v for v in model.graph.outputs if v.name in outputs)
    return tuple(sorted({f"{node.domain}::{node.op_type}" for node in stopped}))


def trainable_parameters(model: ir.Model, outputs: Sequence[str]) -> tuple[str, ...]:
    """Names of the float initializers that training may change, in the graph's order.

    These are the operands of layers and normalisations, and biases added to a MatMul, that
    the loss reaches from ``outputs``.
    """
    passed, _ = _reached(v for v in model.graph.outputs if v.name in outputs)
    names: dict[str, None] = {}
    for node in model.graph:
        if node not in passed:
            continue
        for index in _PARAMETER_INPUTS.get(node.op_type, _bias_inputs(node)):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.is_initializer() and _is_float(value):
                names[str(value.name)] = None
    return tuple(names)


def _is_float(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and tensor.size > 0


def _bias_inputs(node: ir.Node) -> tuple[int, ...]:
    """Inputs of an Add that hold the bias of a MatMul."""
    if node.op_type != "Add" or node.domain:
        return ()
    makers = [value.producer() if value is not None else None for value in node.inputs]
    for index, maker in enumerate(makers):
        bias = node.inputs[1 - index]
        if maker is not None and maker.op_type == "MatMul" and bias is not None:
            return (1 - index,) if bias.is_initializer() else ()
    return ()


def why_frozen(
    model: ir.Model, layers: Sequence[Layer], outputs: Sequence[str]
) -> dict[str, str]:
    """For each layer whose weight is not trained: the reason, in words."""
    passed, stopped = _reached(v for v in model.graph.outputs if v.name in outputs)
    nodes = {str(node.name): node for node in model.graph}
    reasons = {}
    for layer in layers:
        node = nodes[layer.name]
        if layer.weight is None or node in passed:
            continue
        blockers = sorted({n.op_type for n in _users(node) if n in stopped})
        reasons[layer.name] = (
            f"behind {', '.join(blockers)}, which ONNX Runtime cannot differentiate"
            if blockers
            else "no output of the loss depends on it"
        )
    return reasons


def _users(node: ir.Node) -> set[ir.Node]:
    """Every node that the node's outputs lead to."""
    seen: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().outputs:
            for user, _ in value.uses():
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
    return seen
