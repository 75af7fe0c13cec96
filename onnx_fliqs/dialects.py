"""Reads what files hold beyond the ONNX that onnx_ir and ONNX's checker know."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from onnx_fliqs.passes._qonnx_quantizers import is_qonnx
from onnx_fliqs.qonnx_functions import FLOAT_QUANT, OLDEST_OPSET, QUANT, qonnx_function

__all__ = ["CONTRIB", "translate"]

CONTRIB: Final = "com.microsoft"
"""The domain of the operators that only ONNX Runtime has."""

_CONSTANT_INITIALIZERS: Final = 4
_LOCAL_FUNCTIONS: Final = 8
"""The first IR version with model-local functions."""
_DEFINED: Final = (QUANT, "IntQuant", FLOAT_QUANT)
# ONNX Runtime's own operators that its optimizer and old converters write into the standard
# domain, and the opset in which ONNX has one of that name, if it has.
_UNMARKED: Final = {
    "LayerNormalization": 17,
    "SimplifiedLayerNormalization": None,
    "ImageScaler": None,
}


def translate(model: onnx.ModelProto) -> None:
    """Rewrite a model in place, so that nothing of it is refused or lost.

    Sparse constants become dense. Operators of ONNX Runtime that pose as ONNX's move to the
    domain where they belong, initializers need not be inputs, and nodes come after what they
    read. The quantizers of QONNX get definitions, with which ONNX Runtime runs them.

    Raises:
        IndexError, ValueError: A sparse constant contradicts itself, or nodes form a cycle.
    """
    # The first version in which an initializer need not be an input. ONNX Runtime's optimizer
    # adds initializers to files of older ones.
    model.ir_version = max(model.ir_version, _CONSTANT_INITIALIZERS)
    _translate(model)
    for function in model.functions:
        _translate(function)
    for graph in _bodies(model.graph.node):
        _make_dense(graph)
    _make_dense(model.graph)
    _sort(model)
    _define_quantizers(model)


def _sort(model: onnx.ModelProto) -> None:
    """Put makers before readers, where they are not.

    ONNX asks for it. ONNX Runtime does not, and its float16 converter writes other files.
    """
    graph = ir.from_proto(model).graph
    places = {node: index for index, node in enumerate(graph)}
    graph.sort()
    order = [places[node] for node in graph]
    if order != sorted(order):
        nodes = [
            onnx.NodeProto.FromString(model.graph.node[i].SerializeToString()) for i in order
        ]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _define_quantizers(model: onnx.ModelProto) -> None:
    """Define what a file of QONNX leaves to its readers, where our definitions fit."""
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    if opset < OLDEST_OPSET:
        return
    graphs = [model.graph, *_bodies(model.graph.node)]
    numbers = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    calls: dict[tuple[str, str], list[onnx.NodeProto]] = {}
    for node in (node for graph in graphs for node in graph.node):
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            numbers[node.output[0]] = node.attribute[0].t
        if is_qonnx(node.domain, node.op_type) and node.op_type in _DEFINED:
            calls.setdefault((node.domain, node.op_type), []).append(node)
    known = {(function.domain, function.name) for function in model.functions}
    for (domain, name), nodes in calls.items():
        if (domain, name) in known or not all(_is_usual(node, numbers) for node in nodes):
            continue
        model.ir_version = max(model.ir_version, _LOCAL_FUNCTIONS)
        model.functions.append(ir.to_proto(qonnx_function(name, opset, domain)))
        if not any(entry.domain == domain for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))


def _is_usual(node: onnx.NodeProto, numbers: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a quantizer rounds to nearest even, saturates, and has more than one bit."""
    given = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    if given.get("rounding_mode", b"ROUND").upper() not in (b"ROUND", b"HALF_EVEN"):
        return False
    if node.op_type == FLOAT_QUANT:
        return bool(given.get("saturation", 1))
    bits = numbers.get(node.input[3])
    return bits is not None and bool((onnx.numpy_helper.to_array(bits) > 1).all())


def _translate(scope: onnx.ModelProto | onnx.FunctionProto) -> None:
    """Rewrite the nodes of a model or function, those of its bodies included."""
    top = scope.graph.node if isinstance(scope, onnx.ModelProto) else scope.node
    nodes = [*top, *(node for graph in _bodies(top) for node in graph.node)]
    opset = next((entry.version for entry in scope.opset_import if not entry.domain), 0)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                dense = _dense(attribute.sparse_tensor)
                attribute.CopyFrom(onnx.helper.make_attribute("value", dense))
        since = _UNMARKED.get(node.op_type, 0)
        if not node.domain and (since is None or opset < since):
            node.domain = CONTRIB
    imported = any(entry.domain == CONTRIB for entry in scope.opset_import)
    if not imported and any(node.domain == CONTRIB for node in nodes):
        scope.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The bodies of control flow, and those inside."""
    for node in nodes:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield body
                yield from _bodies(body.node)


def _make_dense(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse))
    del graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values = onnx.numpy_helper.to_array(sparse.values)
    positions = onnx.numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if positions.ndim == 2:
        array[tuple(positions.T)] = values
    else:
        array.reshape(-1)[positions] = values
    return onnx.numpy_helper.from_array(array, sparse.values.name)
