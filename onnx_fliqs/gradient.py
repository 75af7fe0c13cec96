"""Builds the gradient graph: the one module that knows ONNX Runtime's training internals."""

import functools
from collections.abc import Sequence
from typing import Final

import onnx
from onnx import TensorProto, helper

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.runtime import load_training, quiet_options
from onnx_fliqs.site_functions import DOMAIN, GRADIENTS

__all__ = ["GRADIENT", "build_gradient", "promote_initializers"]

GRADIENT: Final = "onnx_fliqs.gradient"
"""Output of a gradient graph: all gradients, flattened, one after another."""
_STOP: Final = "ATen"
"""Name of a function, an identity, at whose input the gradient ends. ONNX Runtime heeds the
registered stop edges of operators of this name only, in whichever domain they are."""
_STOP_KEY: Final = "stop"


@functools.cache
def _register() -> None:
    """Tell ONNX Runtime how sites are differentiated, and where to stop; once a process."""
    training = load_training()
    for site, (gradient, inputs) in GRADIENTS.items():
        node = training.GradientNodeDefinition()
        node.op_type, node.domain = gradient, DOMAIN
        node.inputs, node.outputs, node.attributes = list(inputs), ["GI(0)"], []
        training.register_gradient_definition(f"{DOMAIN}::{site}", [node])
    training.register_custom_stop_gradient_edges(f"{DOMAIN}::{_STOP}::{_STOP_KEY}::", {0})


def _stop_behind(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Let the gradient end behind some nodes, by an identity after each of their outputs.

    The builder would otherwise ask for the gradient of every node between a parameter and the
    loss, and the process dies where it comes to control flow that reads outer values.
    """
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.name not in names:
            continue
        for index, name in enumerate(node.output):
            if name:
                node.output[index] = f"{name}.passed"
                stop = helper.make_node(_STOP, [f"{name}.passed"], [name], domain=DOMAIN)
                stop.attribute.append(helper.make_attribute("operator", _STOP_KEY))
                stop.name = f"{name}.stop"
                nodes.append(stop)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    identity = helper.make_node("Identity", ["x"], ["y"])
    opset = next(entry for entry in model.opset_import if not entry.domain)
    model.functions.append(
        helper.make_function(DOMAIN, _STOP, ["x"], ["y"], [identity], [opset], ["operator"])
    )
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def promote_initializers(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Turn initializers into graph inputs, in the order of ``names``."""
    chosen = {
        tensor.name: tensor for tensor in model.graph.initializer if tensor.name in names
    }
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in chosen]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(
        helper.make_tensor_value_info(name, chosen[name].data_type, list(chosen[name].dims))
        for name in names
    )


def build_gradient(
    model: onnx.ModelProto, loss: str, parameters: Sequence[str], stopped: Sequence[str]
) -> onnx.ModelProto:
    """Differentiate a scalar output.

    Args:
        model: A model in which the parameters are inputs and optional outputs that gradients
            read are named. It must hold the gradient functions of its sites.
        loss: Name of the scalar output.
        parameters: Inputs to differentiate with respect to.
        stopped: Names of the nodes that cannot be differentiated.

    Returns:
        A model with two outputs, the loss and :data:`GRADIENT`.

    Raises:
        UnsupportedError: ONNX Runtime cannot differentiate the graph.
    """
    training = load_training()
    _register()
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    if stopped:
        _stop_behind(graph, stopped)
    del graph.graph.output[:]
    graph.graph.output.extend(value for value in model.graph.output if value.name == loss)
    try:
        builder = training.GradientGraphBuilder(
            graph.SerializeToString(), {loss}, set(parameters), loss, quiet_options()
        )
        builder.build()
    except Exception as error:  # its exceptions share no base
        reason = " ".join(str(error).split())
        raise UnsupportedError(
            f"ONNX Runtime cannot differentiate the model: {reason}"
        ) from error
    result = onnx.load_from_string(builder.get_model())
    _flatten_gradients(result.graph, parameters, loss)
    for index, node in enumerate(result.graph.node):
        # ONNX Runtime's own optimizers confuse nodes that have no name.
        node.name = node.name or f"onnx_fliqs.backward_{index}"
    return result


def _flatten_gradients(graph: onnx.GraphProto, parameters: Sequence[str], loss: str) -> None:
    """Concatenate the gradients into one vector."""
    flat = []
    graph.initializer.append(
        helper.make_tensor(f"{GRADIENT}.shape", TensorProto.INT64, [1], [-1])
    )
    for name in parameters:
        flat.append(f"{name}_grad.flat")
        graph.node.append(
            helper.make_node("Reshape", [f"{name}_grad", f"{GRADIENT}.shape"], [flat[-1]])
        )
    graph.node.append(helper.make_node("Concat", flat, [GRADIENT], axis=0))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(loss, TensorProto.FLOAT, []))
    graph.output.append(helper.make_tensor_value_info(GRADIENT, TensorProto.FLOAT, [None]))
