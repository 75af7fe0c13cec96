"""Turns a node and the formula of its gradient into two model-local functions."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Call
from onnx_fliqs.passes._gradient_table import FORMULAS
from onnx_fliqs.passes._ops import Ops
from onnx_fliqs.passes.canonicalise import OPSET
from onnx_fliqs.site_functions import DOMAIN, GRADIENT_KEY

__all__ = ["CustomGradient", "arguments_of", "custom_gradient", "custom_inputs"]

_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class CustomGradient:
    """A function that does what a node does, and the one that computes its gradient."""

    forward: ir.Function
    """It reads what ``arguments_of`` says."""
    backward: ir.Function


def arguments_of(node: ir.Node, inputs: Collection[int]) -> list[int]:
    """The inputs of a node in the order in which its function takes them.

    ONNX Runtime understands a definition only if it gives the gradients of the first inputs.

    Args:
        node: What the function does.
        inputs: Those whose gradients are wanted.
    """
    present = [index for index, value in enumerate(node.inputs) if value is not None]
    return sorted(present, key=lambda index: (index not in inputs, index))


def custom_inputs(node: ir.Node) -> Sequence[int]:
    """The inputs for which the formula of a node gives a gradient.

    Raises:
        NoGradientError: It does not cover this node.
    """
    return sorted(_apply(node, range(len(node.outputs)))[1])


def custom_gradient(
    node: ir.Node, inputs: Collection[int], outputs: Collection[int]
) -> CustomGradient:
    """Define the gradient of a node.

    The names of the functions tell their contents, so that two nodes share them exactly if
    they are alike: ONNX Runtime keeps definitions by name, for the whole process.

    Args:
        node: An operator of ONNX with a formula.
        inputs: Those whose gradients are wanted.
        outputs: Those that have a gradient.

    Raises:
        NoGradientError: The formula does not cover the node.
    """
    call, gradients, op = _apply(node, outputs)
    results: list[ir.Value] = []
    formals = {*call.inputs, *call.outputs, *call.gradients}
    for index in sorted(inputs):
        value = gradients[index]
        if value in formals or value in results:
            value = op.Identity(value)
        value.name = f"dx{index}"
        results.append(value)
    body = _needed(op.nodes, results)
    for each in body:
        each.name = f"{node.op_type}Gradient/{each.name}"
    read = {value for each in body for value in each.inputs}
    present = arguments_of(node, inputs)
    operands = [call.inputs[index] for index in present]
    notation: dict[ir.Value, str] = {
        value: f"{letter}({index})"
        for letter, values in (("GO", call.gradients), ("I", operands), ("O", call.outputs))
        for index, value in enumerate(values)
        if value is not None
    }
    arguments = [value for value in notation if value in read]
    backward = _function(arguments, results, body)
    forward = _forward(node, present)
    content = b"".join(
        ir.to_proto(each).SerializeToString(deterministic=True) for each in (forward, backward)
    )
    forward.name = f"{node.op_type}_{hashlib.sha256(content).hexdigest()[:_DIGITS]}"
    backward.name = f"{forward.name}_gradient"
    definition = {
        "function": backward.name,
        "inputs": [notation[value] for value in arguments],
        "outputs": [f"GI({position})" for position in range(len(inputs))],
    }
    forward.metadata_props[GRADIENT_KEY] = json.dumps(definition)
    return CustomGradient(forward, backward)


def _apply(
    node: ir.Node, outputs: Collection[int]
) -> tuple[Call, Mapping[int, ir.Value], Ops]:
    """Write the gradients of all inputs, in terms of fresh values."""
    results = [_formal(f"y{index}", value) for index, value in enumerate(node.outputs)]
    call = Call(
        node,
        [
            None if value is None else _formal(f"x{index}", value)
            for index, value in enumerate(node.inputs)
        ],
        results,
        [
            _formal(f"dy{index}", value) if index in outputs else None
            for index, value in enumerate(results)
        ],
    )
    op = Ops(node.outputs[0].dtype)
    return call, FORMULAS[node.op_type](op, call), op


def _formal(name: str, value: ir.Value) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)


def _forward(node: ir.Node, present: Sequence[int]) -> ir.Function:
    formals = {index: ir.Value(name=f"x{index}") for index in present}
    results = [ir.Value(name=f"y{index}") for index in range(len(node.outputs))]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [formals.get(index) for index in range(len(node.inputs))],
        list(node.attributes.values()),
        outputs=results,
    )
    return _function(list(formals.values()), results, [copy])


def _function(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node]
) -> ir.Function:
    """A function without a name, and without types and shapes: they do not tell it apart."""
    for value in (*inputs, *(value for node in nodes for value in node.outputs)):
        value.type = value.shape = None
    imports = dict.fromkeys(sorted({"", *(node.domain for node in nodes)}), 1)
    imports[""] = OPSET
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=imports)
    return ir.Function(DOMAIN, "", graph=graph, attributes=[])


def _needed(nodes: Iterable[ir.Node], results: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that some results depend on."""
    wanted: set[ir.Value | None] = set(results)
    kept = []
    for node in reversed(list(nodes)):
        if not wanted.isdisjoint(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]
