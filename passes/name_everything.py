"""Give every node and every value a name of its own."""

import onnx_ir as ir

__all__ = ["NameEverythingPass"]


class NameEverythingPass(ir.passes.InPlacePass):
    """Name unnamed nodes and values, and tell apart those that share a name.

    Before:  y = Relu(x)
    After:   [Relu_y] y = Relu(x)

    A name is unique in the whole model, subgraphs included: ONNX Runtime's gradient builder
    and its optimizers confuse nodes otherwise. The second node called ``relu`` becomes
    ``relu_<its first output>``; the second value called ``a`` becomes ``a_<its node>``.

    Requires: no model-local functions.
    Ensures: all nodes and all values have names, each once; omitted optional outputs stay
        omitted; the graph's signature is unchanged.
    Idempotent: unique names are kept.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse functions: their names live in scopes of their own."""
        if model.functions:
            raise ir.passes.PreconditionError(
                f"the model has {len(model.functions)} functions, but needs 0: inline them"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name the values first: the nodes are named after them."""
        renamed = _name_values(model) + _name_nodes(model)
        return ir.passes.PassResult(model, modified=renamed > 0)


def _name_values(model: ir.Model) -> int:
    signature = [*model.graph.inputs, *model.graph.outputs]
    done = set(signature)
    taken = {value.name or "" for value in signature}
    renamed = 0
    for value, owner in _values(model):
        if value in done:
            continue
        done.add(value)
        name = _unique(value.name or f"{owner}_output", owner, taken)
        if name != value.name:
            value.name = name
            renamed += 1
    return renamed


def _values(model: ir.Model) -> list[tuple[ir.Value, str]]:
    """All values that exist, with the name of what makes them."""
    found = [
        (value, graph.name or "graph")
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values())
    ]
    for node in model.graph.all_nodes():
        owner = node.name or f"{node.op_type}_{_first_input(node)}"
        present = [v for v in node.outputs if v.name or v.uses() or v.is_graph_output()]
        found += [(value, owner) for value in present]
    return found


def _first_input(node: ir.Node) -> str:
    return next((value.name for value in node.inputs if value and value.name), "0")


def _name_nodes(model: ir.Model) -> int:
    taken: set[str] = set()
    renamed = 0
    for node in model.graph.all_nodes():
        output = next((value.name for value in node.outputs if value.name), "0")
        name = _unique(node.name or f"{node.op_type}_{output}", output, taken)
        if name != node.name:
            node.name = name
            renamed += 1
    return renamed


def _unique(name: str, suffix: str, taken: set[str]) -> str:
    """``name``, made unique by the suffix and, should that not be enough, by underscores."""
    if name in taken:
        name = f"{name}_{suffix}"
    while name in taken:
        name += "_"
    taken.add(name)
    return name
