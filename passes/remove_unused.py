"""Remove what nothing reads."""

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["RemoveUnusedPass"]


class RemoveUnusedPass(ir.passes.InPlacePass):
    """Remove nodes and initializers that nothing reads, and optional outputs likewise.

    Before:  a = Exp(x);  y, mask = Dropout(x)
    After:   y = Dropout(x)

    onnx_ir's own pass leaves the initializers of subgraphs, takes a node as used where its
    reader went together with a removed If, and does not report the outputs that it drops.

    Requires: nothing.
    Ensures: each node has a reader or makes a graph output, each initializer likewise; the
        graph's signature is unchanged.
    Idempotent: what is left is read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Repeat until nothing goes: a removed If frees what its bodies read."""
        before = after = _census(model)
        while True:
            _forget_removed_readers(model)
            common.RemoveUnusedNodesPass()(model)
            _remove_initializers(model)
            previous, after = after, _census(model)
            if after == previous:
                return ir.passes.PassResult(model, modified=after != before)


def _remove_initializers(model: ir.Model) -> None:
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            kept = value.is_graph_output() or value.is_graph_input()
            if not kept and not value.uses():
                del graph.initializers[name]


def _forget_removed_readers(model: ir.Model) -> None:
    """Unlink the nodes of removed If and Loop bodies, which still count as readers."""
    present = set(model.graph.all_nodes())
    values = [value for node in present for value in node.outputs]
    for graph in model.graphs():
        values += [*graph.inputs, *graph.initializers.values()]
    for value in values:
        for reader, index in list(value.uses()):
            if reader not in present:
                reader.replace_input_with(index, None)


def _census(model: ir.Model) -> tuple[int, ...]:
    nodes = list(model.graph.all_nodes())
    return (
        len(nodes),
        sum(len(node.inputs) for node in nodes),
        sum(len(node.outputs) for node in nodes),
        sum(1 for node in nodes for value in node.outputs if value.name),
        sum(len(node.attributes) for node in nodes),
        sum(len(graph.initializers) for graph in model.graphs()),
    )
