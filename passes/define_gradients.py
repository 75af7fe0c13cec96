"""Tells ONNX Runtime's gradient builder what it does not know by itself."""

from collections.abc import Collection
from typing import Final

import onnx_ir as ir
from onnx import helper

from onnx_fliqs.passes._custom_gradient import arguments_of, custom_gradient
from onnx_fliqs.passes._gradient_flow import GRADIENT_INPUTS, Flow, trace, varying
from onnx_fliqs.passes._native_gradients import native_inputs
from onnx_fliqs.passes.canonicalise import OPSET
from onnx_fliqs.site_functions import DOMAIN

__all__ = ["STOP", "STOP_KEY", "DefineGradientsPass"]

STOP: Final = "ATen"
"""Name of a function, an identity, at whose input the gradient ends. ONNX Runtime heeds the
registered stop edges of operators of this name only, in whichever domain they are."""
STOP_KEY: Final = "stop"
"""What the attribute ``operator`` of its calls says."""


class DefineGradientsPass(ir.passes.InPlacePass):
    """Turn nodes with a gradient of ours into functions, and end the gradient at the others.

    Before:  e = Elu (x);  n = Round (x);  y = Add (e, n)
    After:   e = onnx_fliqs.Elu_3f2a... (x);  n = Round (x)
             s = onnx_fliqs.ATen <operator = "stop"> (n);  y = Add (e, s)

    The builder asks for the gradient of every node between a parameter and the loss, and the
    process dies where it meets control flow that reads outer values, even aside from the
    parameters: behind that it always ends. Functions carry the definition of their gradient
    as metadata.

    Requires: unique names; the loss is an output.
    Ensures: on the ways from parameters to the loss lie only nodes that ONNX Runtime
        differentiates, functions with a gradient, and stops; a node does not read a parameter
        twice, which the builder cannot tell apart; outputs and signature are unchanged.
    Idempotent: functions and stops are left alone.
    """

    def __init__(self, loss: str, parameters: Collection[str]) -> None:
        super().__init__()
        self._loss = loss
        self._parameters = frozenset(parameters)

    def requires(self, model: ir.Model) -> None:
        """The loss is an output."""
        if all(value.name != self._loss for value in model.graph.outputs):
            raise ir.passes.PreconditionError(f"the graph has no output {self._loss!r}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go along the ways from the parameters to the loss."""
        loss = [value for value in model.graph.outputs if value.name == self._loss]
        flow, affected = trace(loss), varying(model, self._parameters)
        modified = False
        for node in list(model.graph):
            modified |= _stop_behind_bodies(node, model)
            if node in flow.inputs and not affected.isdisjoint(node.inputs):
                modified |= _separate(node, flow, affected)
                modified |= _stop(node, model, flow, affected)
                modified |= _define(node, model, flow, affected)
        return ir.passes.PassResult(model, modified=modified)


def _separate(node: ir.Node, flow: Flow, affected: set[ir.Value]) -> bool:
    """Let a node read a parameter only once, and copies of it elsewhere."""
    seen: set[ir.Value] = set()
    modified = False
    for index in flow.inputs[node]:
        value = node.inputs[index]
        if value in seen:
            modified = True
            copy = ir.node("Identity", [value], name=f"{node.name}.{index}")
            _put_before(node, index, copy)
            affected.update(copy.outputs)
        elif value is not None and value.producer() is None:
            seen.add(value)
    return modified


def _stop(node: ir.Node, model: ir.Model, flow: Flow, affected: Collection[ir.Value]) -> bool:
    """Let the gradient end at inputs that have none, and at nodes that have none."""
    modified = False
    for index, value in enumerate(node.inputs):
        if value is None or value not in affected:
            continue
        if index in flow.inputs[node] and value not in flow.stopped:
            continue
        if (maker := value.producer()) is not None and _is_stop(maker):
            continue
        modified = True
        _put_before(node, index, _new_stop(node, index))
    if modified:
        _import(model, _stop_function())
    return modified


def _stop_behind_bodies(node: ir.Node, model: ir.Model) -> bool:
    """Let the gradient end behind If, Loop and Scan."""
    types = {attribute.type for attribute in node.attributes.values()}
    if types.isdisjoint({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}):
        return False
    uses = [
        (user, index)
        for value in node.outputs
        for user, index in value.uses()
        if user.graph is node.graph and not _is_stop(user)
    ]
    for user, index in uses:
        _put_before(user, index, _new_stop(user, index))
    if uses:
        _import(model, _stop_function())
    return bool(uses)


def _new_stop(node: ir.Node, index: int) -> ir.Node:
    """A stop for one operand of a node."""
    attributes = {"operator": STOP_KEY}
    name = f"{node.name}.{index}"
    return ir.node(STOP, [node.inputs[index]], attributes, domain=DOMAIN, name=name)


def _put_before(node: ir.Node, index: int, new: ir.Node) -> None:
    (value,) = new.inputs
    assert value is not None
    (output,) = new.outputs
    output.name, output.type, output.shape = f"{new.name}.operand", value.type, value.shape
    assert node.graph is not None
    node.graph.insert_before(node, new)
    node.replace_input_with(index, output)


def _is_stop(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == STOP


def _stop_function() -> ir.Function:
    identity = helper.make_node("Identity", ["x"], ["y"])
    imports = [helper.make_opsetid("", OPSET)]
    proto = helper.make_function(DOMAIN, STOP, ["x"], ["y"], [identity], imports, ["operator"])
    function = ir.from_proto(proto)
    assert isinstance(function, ir.Function)
    return function


def _define(node: ir.Node, model: ir.Model, flow: Flow, affected: set[ir.Value]) -> bool:
    """Replace a node by a call of a function that has a gradient."""
    inputs = [i for i in flow.inputs[node] if node.inputs[i] in affected]
    outputs = [
        i
        for i, value in enumerate(node.outputs)
        if value.is_graph_output() or flow.reads(value)
    ]
    # The gradient of Split is made of the gradients of all its outputs.
    incomplete = node.op_type == "Split" and len(outputs) < len(node.outputs)
    native = native_inputs(node) is not None and not incomplete
    if native or GRADIENT_INPUTS in node.metadata_props or not inputs or not outputs:
        return False
    defined = custom_gradient(node, inputs, outputs)
    call = ir.Node(
        DOMAIN,
        defined.forward.name,
        [node.inputs[index] for index in arguments_of(node, inputs)],
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props={GRADIENT_INPUTS: " ".join(map(str, range(len(inputs))))},
    )
    assert isinstance(node.graph, ir.Graph)
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [call], node.outputs, call.outputs
    )
    affected.update(call.outputs)
    for function in (defined.forward, defined.backward):
        _import(model, function)
    return True


def _import(model: ir.Model, function: ir.Function) -> None:
    model.functions[function.identifier()] = function
    for domain, version in {DOMAIN: 1, **function.opset_imports}.items():
        model.opset_imports.setdefault(domain, version)
