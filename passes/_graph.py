"""Small questions that several passes ask of a graph."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "add_initializer",
    "all_nodes",
    "constant_of",
    "label",
    "require_opset",
    "used_names",
    "weight_bytes",
]


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph, its subgraphs and the model's functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def label(node: ir.Node) -> str:
    """A node as a user can find it: ``Conv 'conv1'``, by its output where it has no name."""
    name = node.name or next((value.name for value in node.outputs if value.name), "")
    return f"{node.op_type} {name!r}"


def constant_of(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The numbers of an initializer or Constant that no caller can override, else None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def require_opset(model: ir.Model, opset: int) -> None:
    """Check a precondition of passes.

    Raises:
        onnx_ir.passes.PreconditionError: The model's opset is older.
    """
    found = model.opset_imports.get("", 0)
    if found < opset:
        raise ir.passes.PreconditionError(f"opset is {found}, but needs to be >= {opset}")


def used_names(model: ir.Model) -> set[str]:
    """The names of all values of all graphs."""
    names = {value.name or "" for node in all_nodes(model) for value in node.outputs}
    for graph in model.graphs():
        names.update(graph.initializers)
        names.update(value.name or "" for value in graph.inputs)
    return names


def add_initializer(
    graph: ir.Graph, name: str, array: npt.NDArray[np.generic], taken: set[str]
) -> ir.Value:
    """Register a constant under ``name``, lengthened by ``_`` while that is taken."""
    while name in taken:
        name += "_"
    taken.add(name)
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def weight_bytes(model: ir.Model) -> int:
    """What the initializers of all graphs occupy."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
