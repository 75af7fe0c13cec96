"""Remove Identity nodes."""

import onnx_ir as ir

__all__ = ["RemoveIdentitiesPass"]


class RemoveIdentitiesPass(ir.passes.InPlacePass):
    """Let readers of an Identity read its input.

    Before:  a = Relu(x);  y = Identity(a)
    After:   y = Relu(x)

    onnx_ir's own pass renames a value that is already a graph output, and hands values of an
    outer graph out of a subgraph, which ONNX Runtime refuses; this one keeps those nodes.

    Requires: nothing.
    Ensures: an Identity is left only where a graph output needs one: its input is a graph
        input, an initializer, another graph output, or a value of an outer graph.
    Idempotent: the nodes that are left are needed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove each node that can go, in the main graph and in subgraphs."""
        found = [
            node
            for node in model.graph.all_nodes()
            if node.domain == "" and node.op_type == "Identity"
        ]
        removed = [_remove(node) for node in found]
        return ir.passes.PassResult(model, modified=any(removed))


def _remove(node: ir.Node) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    if source is None:
        return False
    if result.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not node.graph or source.is_graph_output():
            return False
        # Readers of a renamed value in an inner graph keep following the object.
        name, result.name = result.name, f"{result.name}_identity"
        source.name = name
        source.type = source.type if result.type is None else result.type
        source.shape = source.shape if result.shape is None else result.shape
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True
