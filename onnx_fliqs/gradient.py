"""Builds the gradient graph: the one module that knows ONNX Runtime's training internals."""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Final

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes.define_gradients import STOP, STOP_KEY, DefineGradientsPass
from onnx_fliqs.passes.expose_optional_outputs import ExposeOptionalOutputsPass
from onnx_fliqs.passes.lower_for_gradient import LowerForGradientPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.runtime import load_training, quiet_options, reason_of
from onnx_fliqs.site_functions import DOMAIN, GRADIENT_KEY, site_gradients

__all__ = ["GRADIENT", "build_gradient", "promote_initializers"]

GRADIENT: Final = "onnx_fliqs.gradient"
"""Output of a gradient graph: all gradients, flattened, one after another."""


@functools.cache
def _register_stop() -> None:
    """Tell ONNX Runtime where to stop; once a process."""
    load_training().register_custom_stop_gradient_edges(f"{DOMAIN}::{STOP}::{STOP_KEY}::", {0})


@functools.cache
def _register(name: str, definition: str) -> None:
    """Tell ONNX Runtime how a function is differentiated; once a process."""
    training, call = load_training(), json.loads(definition)
    node = training.GradientNodeDefinition()
    node.op_type, node.domain = call["function"], DOMAIN
    node.inputs, node.outputs, node.attributes = call["inputs"], call["outputs"], []
    training.register_gradient_definition(f"{DOMAIN}::{name}", [node])


def _register_all(functions: Iterable[ir.Function]) -> None:
    _register_stop()
    for function in functions:
        if GRADIENT_KEY in function.metadata_props:
            _register(function.name, function.metadata_props[GRADIENT_KEY])


def promote_initializers(model: ir.Model, names: Sequence[str]) -> None:
    """Turn initializers into graph inputs, in the order of ``names``."""
    graph = model.graph
    for name in names:
        value = graph.initializers.pop(name)
        tensor = value.const_value
        assert tensor is not None
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        value.const_value = None
        graph.inputs.append(value)


def build_gradient(model: ir.Model, loss: str, parameters: Sequence[str]) -> onnx.ModelProto:
    """Differentiate a scalar output.

    Args:
        model: A model in which the parameters are inputs; it is not changed.
        loss: Name of the scalar output.
        parameters: Inputs to differentiate with respect to.

    Returns:
        A model with two outputs, the loss and :data:`GRADIENT`.

    Raises:
        UnsupportedError: ONNX Runtime cannot differentiate the graph.
    """
    graph = _differentiable(model, loss, parameters)
    _register_all(graph.functions.values())
    try:
        builder = load_training().GradientGraphBuilder(
            ir.to_proto(graph).SerializeToString(),
            {loss},
            set(parameters),
            loss,
            quiet_options(),
        )
        builder.build()
    except Exception as error:  # its exceptions share no base
        raise UnsupportedError(
            f"ONNX Runtime cannot differentiate the model: {reason_of(error)}"
        ) from error
    result = onnx.load_from_string(builder.get_model())
    _flatten_gradients(result.graph, parameters, loss)
    for index, node in enumerate(result.graph.node):
        # ONNX Runtime's own optimizers confuse nodes that have no name.
        node.name = node.name or f"onnx_fliqs.backward_{index}"
    return result


def _differentiable(model: ir.Model, loss: str, parameters: Sequence[str]) -> ir.Model:
    """A copy with the loss alone, in which the builder finds a gradient for every node."""
    copy = model.clone()
    outputs = copy.graph.outputs
    outputs[:] = [value for value in outputs if value.name == loss]
    for pass_ in (
        RemoveUnusedPass(),
        LowerForGradientPass(parameters),
        ExposeOptionalOutputsPass(),
        DefineGradientsPass(loss, parameters),
    ):
        pass_(copy)
    for function in site_gradients():
        copy.functions[function.identifier()] = function
    return copy


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
    # The gradients of pools read the sizes of what they compute from its declared shape.
    graph.value_info.extend(value for value in graph.output if value.name != loss)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(loss, TensorProto.FLOAT, []))
    graph.output.append(helper.make_tensor_value_info(GRADIENT, TensorProto.FLOAT, [None]))
