"""Which weights the gradient of the loss reaches, and what keeps it from the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import onnx
import onnx_ir as ir

from onnx_fliqs.passes._gradient_flow import Flow, trace
from onnx_fliqs.passes._graph import is_standard
from onnx_fliqs.passes.canonicalise import OPSET
from onnx_fliqs.passes.expose_optional_outputs import ExposeOptionalOutputsPass
from onnx_fliqs.passes.lower_batch_normalization import NORMALIZATION_KEY
from onnx_fliqs.passes.lower_for_gradient import LowerForGradientPass
from onnx_fliqs.sites import Layer

__all__ = ["trainable_parameters", "why_frozen"]

# Inputs that hold trainable numbers, by operator; the rest are data, shapes or bounds.
_PARAMETER_INPUTS: Final[Mapping[str, Sequence[int]]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": range(16),
    "GRU": (1, 2, 3),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
}
_TABLE_RANK: Final = 2
_BIASED: Final = ("Conv", "ConvTranspose", "Einsum", "MatMul")
"""Operators whose bias may be a separate Add."""


def trainable_parameters(model: ir.Model, outputs: Sequence[str]) -> tuple[str, ...]:
    """Names of the float initializers that training may change, in the graph's order.

    These are the operands of layers and normalizations, slopes, embeddings, and biases that
    are added to the result of a layer, as far as the loss reaches them from ``outputs``.

    Args:
        model: A canonical model.
        outputs: Names of the graph outputs that the loss judges.
    """
    candidates = _candidates(model)
    lowered, flow = _flow(model, candidates, outputs)
    return tuple(name for name in candidates if flow.reads(lowered.graph.initializers[name]))


def why_frozen(
    model: ir.Model, layers: Sequence[Layer], outputs: Sequence[str]
) -> dict[str, str]:
    """For each layer with weights of which none is trained: the reason, in words.

    Args:
        model: A canonical model.
        layers: Its layers.
        outputs: Names of the graph outputs that the loss judges.
    """
    candidates = _candidates(model)
    lowered, flow = _flow(model, candidates, outputs)
    values = _initializers(lowered)
    reasons = {}
    for layer in layers:
        weights = [values[name] for name in layer.weights]
        if weights and not any(flow.reads(v) for v in weights if v.name in candidates):
            reasons[layer.name] = _reason(lowered, flow, weights)
    return reasons


def _candidates(model: ir.Model) -> dict[str, None]:
    """Initializers that would be trained if the gradient came there."""
    names: dict[str, None] = {}
    for node in model.graph:
        for index in _parameter_inputs(node):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.is_initializer() and _is_float(value):
                names[str(value.name)] = None
    return names


def _is_float(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and tensor.size > 0


def _parameter_inputs(node: ir.Node) -> Sequence[int]:
    if node.domain:
        return ()
    if NORMALIZATION_KEY in node.metadata_props:
        return (1,)
    if node.op_type == "Add":
        return _bias_inputs(node)
    if node.op_type == "Gather" and not _is_embedding(node):
        return ()
    return _PARAMETER_INPUTS.get(node.op_type, ())


def _is_embedding(node: ir.Node) -> bool:
    """Whether a Gather reads rows of a table; what else is read are positions and shapes."""
    table = node.inputs[0].const_value if node.inputs[0] is not None else None
    by_rows = node.attributes.get_int("axis", 0) == 0
    return by_rows and table is not None and len(table.shape) == _TABLE_RANK


def _bias_inputs(node: ir.Node) -> tuple[int, ...]:
    """The input of an Add that holds the bias of a layer."""
    makers = [value.producer() if value is not None else None for value in node.inputs]
    for index, maker in enumerate(makers):
        bias = node.inputs[1 - index]
        if maker is not None and is_standard(maker, *_BIASED) and bias is not None:
            return (1 - index,) if bias.is_initializer() else ()
    return ()


def _flow(
    model: ir.Model, parameters: Collection[str], outputs: Sequence[str]
) -> tuple[ir.Model, Flow]:
    """The graph that will be differentiated, and where the gradient goes in it."""
    lowered = model.clone()
    LowerForGradientPass(parameters)(lowered)
    ExposeOptionalOutputsPass()(lowered)
    return lowered, trace(value for value in lowered.graph.outputs if value.name in outputs)


def _initializers(model: ir.Model) -> dict[str, ir.Value]:
    """The initializers of all graphs, by name."""
    return {
        name: value for graph in model.graphs() for name, value in graph.initializers.items()
    }


def _reason(model: ir.Model, flow: Flow, weights: Sequence[ir.Value]) -> str:
    """What lies between some weights and the outputs."""
    holders = _holders(model)
    blockers: set[str] = set()
    seen: set[ir.Value] = set()
    pending = list(weights)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for reader, index in value.uses():
            user = holders.get(reader, reader)
            ends = [output for output in user.outputs if output in flow.stopped]
            blockers.update(f"{user.op_type} ({flow.stopped[output]})" for output in ends)
            if user not in flow.inputs:
                pending.extend(output for output in user.outputs if output not in ends)
            elif index in flow.inputs[user]:
                return "training takes it for a constant"
            else:
                blockers.add(f"the {_formal_input(user, index)} of {user.op_type}")
    if not blockers:
        return "no output of the loss depends on it"
    return f"no gradient comes through {' or '.join(sorted(blockers))}"


def _formal_input(node: ir.Node, index: int) -> str:
    formal = onnx.defs.get_schema(node.op_type, OPSET, node.domain).inputs
    return str(formal[min(index, len(formal) - 1)].name)


def _holders(model: ir.Model) -> dict[ir.Node, ir.Node]:
    """For nodes in bodies: the node of the main graph that holds them."""
    return {
        inner: top
        for top in model.graph
        for attribute in top.attributes.values()
        if attribute.type is ir.AttributeType.GRAPH
        for inner in attribute.as_graph().all_nodes()
    }
