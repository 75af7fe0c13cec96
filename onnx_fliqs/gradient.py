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
_ANY_INPUT: Final = set(range(32))


@functools.cache
def _register_sites() -> None:
    """Tell ONNX Runtime how sites are differentiated; its registry is global."""
    training = load_training()
    for site, (gradient, inputs) in GRADIENTS.items():
        node = training.GradientNodeDefinition()
        node.op_type, node.domain = gradient, DOMAIN
        node.inputs, node.outputs, node.attributes = list(inputs), ["GI(0)"], []
        key = f"{DOMAIN}::{site}"
        training.register_gradient_definition(key, [node])
        training.register_custom_stop_gradient_edges(key, _ANY_INPUT - {0})


@functools.cache
def _stop_at(operator: str) -> None:
    """Make the gradient end at an operator that has none."""
    load_training().register_custom_stop_gradient_edges(operator, _ANY_INPUT)


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
        stopped: Operators (``domain::type``) without a gradient.

    Returns:
        A model with two outputs, the loss and :data:`GRADIENT`.

    Raises:
        UnsupportedError: ONNX Runtime cannot differentiate the graph.
    """
    training = load_training()
    _register_sites()
    for operator in stopped:
        _stop_at(operator)
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
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
