"""Which weights the loss reaches through operators that ONNX Runtime can differentiate."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import onnx_ir as ir

from onnx_fliqs.site_functions import DOMAIN
from onnx_fliqs.sites import Layer

__all__ = ["stopped_operators", "trainable_parameters", "why_frozen"]

# Gradients that ONNX Runtime 1.19.2 defines (its gradient builder's registry) and has CPU
# kernels for, which ConvTranspose and Resize lack.
_DIFFERENTIABLE: Final = frozenset(
    """
    Abs Add AveragePool Cast Clip Concat Conv Div Dropout Erf Exp Expand Flatten
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Identity LayerNormalization
    LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mul Neg Pad Pow ReduceL2 ReduceLogSumExp
    ReduceMean ReduceSum Reciprocal Relu Reshape ScatterND Sigmoid Slice Softmax
    SoftmaxCrossEntropyLoss Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 - reads as a list
)
# Inputs that hold trainable numbers, by operator; the rest are data, shapes or bounds.
_PARAMETER_INPUTS: Final = {
    "Conv": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "LayerNormalization": (1, 2),
}
# Inputs through which the gradient passes, where those are not all.
_PASSING_INPUTS: Final = {
    **dict.fromkeys(("Clip", "Expand", "Gather", "GatherElements", "GatherND", "Pad"), (0,)),
    **dict.fromkeys(("Pow", "Reshape", "Slice", "Split", "Squeeze", "Tile"), (0,)),
    **dict.fromkeys(("ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceSum"), (0,)),
    "Unsqueeze": (0,),
    "ScatterND": (0, 2),
    "Where": (1, 2),
}
_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def _differentiable(node: ir.Node) -> bool:
    if node.domain == DOMAIN:
        return True
    if node.domain or node.op_type not in _DIFFERENTIABLE:
        return False
    restriction = _RESTRICTIONS.get(node.op_type)
    return restriction is None or restriction(node)


def _explicitly_padded(node: ir.Node) -> bool:
    # Canonical models have SAME_UPPER and SAME_LOWER only where sizes are unknown.
    return node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _to_float(node: ir.Node) -> bool:
    return node.attributes.get_int("to", 0) in _FLOATS


def _of_matrices(node: ir.Node) -> bool:
    shapes = [value.shape for value in node.inputs if value is not None]
    return all(shape is None or len(shape) > 1 for shape in shapes)


def _pads_with_constant(node: ir.Node) -> bool:
    # The gradient drops a fourth input, the axes.
    return node.attributes.get_string("mode", "constant") == "constant" and (
        len(node.inputs) < 4 or node.inputs[3] is None
    )


def _to_constant_power(node: ir.Node) -> bool:
    exponent = node.inputs[1]
    return exponent is not None and exponent.is_initializer()


def _forwards(node: ir.Node) -> bool:
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = node.inputs[4].const_value
    return steps is not None and bool((steps.numpy() > 0).all())


def _with_bias(node: ir.Node) -> bool:
    # A missing bias can be made up (see ExposeOptionalOutputsPass) beside a constant scale.
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    return has_bias or (node.inputs[1] is not None and node.inputs[1].is_initializer())


def _of_distinct(node: ir.Node) -> bool:
    return len(set(node.inputs)) == len(node.inputs)


# What ONNX Runtime's gradient of an operator asks of a node; where it is not met, the graph
# cannot be built, or the gradient is wrong.
_RESTRICTIONS: Final[dict[str, Callable[[ir.Node], bool]]] = {
    "AveragePool": _explicitly_padded,
    "Cast": _to_float,
    "Concat": _of_distinct,
    "Conv": _explicitly_padded,
    "LayerNormalization": _with_bias,
    "MatMul": _of_matrices,
    "MaxPool": _explicitly_padded,
    "Pad": _pads_with_constant,
    "Pow": _to_constant_power,
    "Slice": _forwards,
}


def _reached(outputs: Sequence[ir.Value]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Nodes that the gradient passes through, and those at which it stops."""
    blocked: set[ir.Node] = set()
    while True:
        passed, stopped = _walk(outputs, blocked)
        # The gradient of Split is made of the gradients of all its outputs.
        partial = {
            node
            for node in passed
            if node.op_type == "Split"
            and not all(_is_read(value, passed, outputs) for value in node.outputs)
        }
        if not partial:
            return passed, stopped
        blocked |= partial


def _walk(
    outputs: Iterable[ir.Value], blocked: set[ir.Node]
) -> tuple[set[ir.Node], set[ir.Node]]:
    passed: set[ir.Node] = set()
    stopped: set[ir.Node] = set()
    pending = [value.producer() for value in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in passed or node in stopped:
            continue
        if node in blocked or not _differentiable(node):
            stopped.add(node)
            continue
        passed.add(node)
        pending.extend(node.inputs[i].producer() for i in _passing(node))  # type: ignore[union-attr]
    return passed, stopped


def _passing(node: ir.Node) -> list[int]:
    """Indices of the inputs through which the gradient passes."""
    chosen = _PASSING_INPUTS.get(node.op_type, range(len(node.inputs)))
    return [i for i in chosen if i < len(node.inputs) and node.inputs[i] is not None]


def _is_read(value: ir.Value, passed: set[ir.Node], outputs: Sequence[ir.Value]) -> bool:
    return value in outputs or any(
        user in passed and index in _passing(user) for user, index in value.uses()
    )


def _values(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    return [value for value in model.graph.outputs if value.name in names]


def stopped_operators(model: ir.Model, outputs: Sequence[str]) -> tuple[str, ...]:
    """Names of the nodes at which the gradient stops, in the graph's order."""
    _, stopped = _reached(_values(model, outputs))
    return tuple(str(node.name) for node in model.graph if node in stopped)


def trainable_parameters(model: ir.Model, outputs: Sequence[str]) -> tuple[str, ...]:
    """Names of the float initializers that training may change, in the graph's order.

    These are the operands of layers and normalisations, and biases added to a MatMul, that
    the loss reaches from ``outputs``.
    """
    passed, _ = _reached(_values(model, outputs))
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
    passed, stopped = _reached(_values(model, outputs))
    nodes = {str(node.name): node for node in model.graph}
    reasons = {}
    for layer in layers:
        node = nodes[layer.name]
        if not layer.weights or node in passed:
            continue
        blockers = sorted({n.op_type for n in (node, *_users(node, model)) if n in stopped})
        reasons[layer.name] = (
            f"behind {', '.join(blockers)}, which ONNX Runtime cannot differentiate"
            if blockers
            else "no output of the loss depends on it"
        )
    return reasons


def _users(node: ir.Node, model: ir.Model) -> set[ir.Node]:
    """Every node of the main graph that the node's outputs lead to."""
    holders = {
        inner: top
        for top in model.graph
        for attribute in top.attributes.values()
        if attribute.type is ir.AttributeType.GRAPH
        for inner in attribute.as_graph().all_nodes()
    }
    seen: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().outputs:
            for user in (holders.get(reader, reader) for reader, _ in value.uses()):
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
    return seen
