"""Where the gradient of some outputs goes, on its way to the parameters."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._custom_gradient import custom_inputs
from onnx_fliqs.passes._gradient_rule import NoGradientError
from onnx_fliqs.passes._gradient_table import FORMULAS, why_not_differentiable
from onnx_fliqs.passes._native_gradients import native_inputs

__all__ = ["GRADIENT_INPUTS", "REFUSAL", "Flow", "gradient_inputs", "trace", "varying"]

GRADIENT_INPUTS: Final = "onnx_fliqs.gradient_inputs"
"""Metadata key of a call of a function with a gradient: the inputs that have one."""
REFUSAL: Final = "onnx_fliqs.no_gradient"
"""Metadata key of a node that could not be lowered: why."""
_OF_PLACES: Final = ("MaxPool", "TopK")
"""Operators whose further outputs are places."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The way of a gradient through a graph."""

    inputs: Mapping[ir.Node, Sequence[int]]
    """The nodes that it passes, and by which inputs it leaves them."""
    stopped: Mapping[ir.Value, str]
    """The computed values at which it ends, and why."""

    def reads(self, value: ir.Value) -> bool:
        """Whether the gradient comes by a value from some node that reads it."""
        return any(index in self.inputs.get(user, ()) for user, index in value.uses())


def gradient_inputs(node: ir.Node) -> Sequence[int]:
    """The inputs of a node to which a gradient passes.

    Raises:
        NoGradientError: There is none.
    """
    native = native_inputs(node)
    if native is not None:
        return native
    if REFUSAL in node.metadata_props:
        raise NoGradientError(node.metadata_props[REFUSAL])
    if GRADIENT_INPUTS in node.metadata_props:
        return [int(index) for index in node.metadata_props[GRADIENT_INPUTS].split()]
    if node.domain or node.op_type not in FORMULAS:
        raise NoGradientError(why_not_differentiable(node))
    return custom_inputs(node)


def trace(outputs: Iterable[ir.Value]) -> Flow:
    """Follow the gradient backwards from some outputs."""
    inputs: dict[ir.Node, Sequence[int]] = {}
    stopped: dict[ir.Value, str] = {}
    seen: set[ir.Value] = set()
    pending = list(outputs)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type in _OF_PLACES and value is not node.outputs[0]:
            stopped[value] = "its result is an integer"
            continue
        if node in inputs:
            continue
        try:
            inputs[node] = gradient_inputs(node)
        except NoGradientError as error:
            stopped[value] = str(error)
            continue
        read = [node.inputs[index] for index in inputs[node]]
        pending.extend(value for value in read if value is not None)
    return Flow(inputs, stopped)


def varying(model: ir.Model, parameters: Collection[str]) -> set[ir.Value]:
    """The values that change with the parameters, and not only their shapes."""
    graph = model.graph
    candidates = (*graph.inputs, *graph.initializers.values())
    found = {value for value in candidates if value.name in parameters}
    for node in graph:
        if node.op_type not in ("Shape", "Size") and not found.isdisjoint(_read(node)):
            found.update(node.outputs)
    return found


def _read(node: ir.Node) -> set[ir.Value | None]:
    """What a node reads, with the values that its bodies take from outside."""
    values = set(node.inputs)
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                values.update(inner.inputs)
    return values
