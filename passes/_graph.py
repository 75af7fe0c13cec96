"""Small questions that several passes ask of a graph, and how they replace a node."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._ops import Ops

__all__ = [
    "add_initializer",
    "all_nodes",
    "changed_constant",
    "constant_of",
    "formula_for",
    "is_standard",
    "label",
    "only_reader",
    "replace_node",
    "require_opset",
    "take_over_output",
    "used_names",
    "weight_bytes",
    "with_bodies",
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


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of these operators of ONNX itself."""
    return node.domain == "" and node.op_type in op_types


def only_reader(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The node that reads a value, and at which input, if nothing else sees the value."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node, uses[0].idx


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


def changed_constant(
    reader: ir.Node,
    value: ir.Value,
    array: npt.NDArray[np.generic],
    suffix: str,
    taken: set[str],
) -> ir.Value:
    """A constant with other content, for one of its readers.

    It stays the same initializer, by which users know a weight, unless something else reads
    that too: then it is ``<old name>_<suffix>``.
    """
    graph = reader.graph
    assert isinstance(graph, ir.Graph)
    old = constant_of(value)
    if old is not None and np.array_equal(array, old):
        return value
    if only_reader(value) is not None and value.is_initializer() and value.graph is graph:
        value.const_value = ir.tensor(array, name=value.name)
        value.shape = ir.Shape(array.shape)
        return value
    return add_initializer(graph, f"{value.name}_{suffix}", array, taken)


def formula_for(node: ir.Node) -> Ops:
    """An empty formula to replace a node, in the type that the node computes in."""
    values = (*node.inputs, *node.outputs)
    dtypes = (value.dtype for value in values if value is not None and value.dtype)
    dtype = next((dtype for dtype in dtypes if dtype.is_floating_point()), None)
    return Ops(dtype, f"{node.outputs[0].name or node.op_type}/")


def replace_node(
    node: ir.Node,
    formula: Ops,
    results: Sequence[ir.Value | None],
    heir: ir.Value | None = None,
) -> None:
    """Put a formula in the place of a node.

    Args:
        node: It is removed.
        formula: Its nodes.
        results: What the node's outputs are called and read as from now on; None for one that
            nothing reads.
        heir: A value of the formula; the node that computes it gets the old node's name, by
            which users know a layer.
    """
    graph = node.graph
    assert graph is not None
    own = {value for each in formula.nodes for value in each.outputs}
    old, new = [], []
    for value, result in zip(node.outputs, results, strict=False):
        if result is not None and (value.uses() or value.is_graph_output()):
            old.append(value)
            new.append(result if result in own else formula.Identity(result))
    maker = heir.producer() if heir is not None else None
    if maker is not None:
        maker.name = node.name
    graph.insert_before(node, formula.nodes)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], old, new)


def take_over_output(node: ir.Node, operand: ir.Value) -> None:
    """Let what a node reads be what it computed, under the same name; the node goes."""
    result = node.outputs[0]
    assert node.graph is not None
    name, result.name = result.name, f"{result.name}_folded"
    ir.convenience.replace_all_uses_with(result, operand, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    operand.name = name
    operand.shape = result.shape if result.shape is not None else operand.shape
    operand.type = result.type if result.type is not None else operand.type


def weight_bytes(model: ir.Model) -> int:
    """What the initializers of all graphs occupy."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def with_bodies(node: ir.Node) -> Iterator[ir.Node]:
    """The node, and every node of its bodies, which may read outer values."""
    yield node
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type is ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()
