"""Keep the weights of control-flow bodies in the main graph."""

import onnx_ir as ir

from onnx_fliqs.passes._graph import used_names

__all__ = ["HoistInitializersPass"]


class HoistInitializersPass(ir.passes.InPlacePass):
    """Move the float initializers of If, Loop and Scan bodies to the main graph.

    Before:  y = If (c) <then_branch = t () => (p) <float[4,4] w> { p = MatMul (x, w) }, ...>
    After:   <float[4,4] w>  y = If (c) <then_branch = t () => (p) { p = MatMul (x, w) }, ...>

    There they are found and quantized like others; bodies that hold the same share it.
    Scalars and integers stay: they are bounds, axes and shapes, which shape inference reads
    only where they stand.

    Requires: no initializer is an input of its graph.
    Ensures: a body has no float initializer of rank 1 or more; the graph's signature is
        unchanged.
    Idempotent: what is in the main graph stays there.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Take the weights out of the bodies, inner ones included, then find them names."""
        weights = [_taken_out(value) for value in _weights_of_bodies(model)]
        taken = used_names(model)
        kept: dict[object, list[ir.Value]] = {}
        for value in weights:
            assert value.const_value is not None
            alike = kept.setdefault((value.dtype, tuple(value.const_value.shape)), [])
            content = value.const_value.tobytes()
            same = next((v for v in alike if v.const_value.tobytes() == content), None)  # type: ignore[union-attr]
            if same is not None:
                ir.convenience.replace_all_uses_with(value, same)
                continue
            while value.name in taken:
                value.name += "_"
            taken.add(str(value.name))
            alike.append(value)
            model.graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=bool(weights))


def _weights_of_bodies(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for body in model.graph.subgraphs()
        for value in body.initializers.values()
        if not value.is_graph_input() and _is_weight(value.const_value)
    ]


def _is_weight(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 0


def _taken_out(value: ir.Value) -> ir.Value:
    """Remove an initializer from its graph; what returned it returns a copy."""
    graph, name = value.graph, str(value.name)
    assert isinstance(graph, ir.Graph)
    del graph.initializers[name]
    if value.is_graph_output():
        result = ir.Value(name=name, type=value.type, shape=value.shape)
        copy = ir.node("Identity", [value], outputs=[result], name=f"Identity_{name}")
        graph.append(copy)
        graph.outputs[:] = [result if v is value else v for v in graph.outputs]
    return value
