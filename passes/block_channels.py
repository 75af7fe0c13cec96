"""Computes the convolutions of a gradient graph in blocked channels."""

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._blocked_convolution import (
    DOMAIN,
    Convolution,
    blocked_bias_gradient,
    blocked_convolution,
    blocked_input_gradient,
    blocked_weight_gradient,
    from_blocked,
    to_blocked,
)
from onnx_fliqs.passes._graph import (
    constant_of,
    is_standard,
    require_opset,
    with_bodies,
)
from onnx_fliqs.passes._ops import Ops, known_shape
from onnx_fliqs.site_functions import INNER_PRODUCT

__all__ = ["BlockChannelsPass"]

_ELEMENTWISE: Final = frozenset(
    """
    Abs Add And Cast Ceil Clip Cos DequantizeLinear Div Equal Erf Exp Floor Greater
    GreaterOrEqual Identity LeakyRelu Less LessOrEqual Log Max Min Mul Neg Not Or Pow
    QuantizeLinear Reciprocal Relu Round Sigmoid Sign Sin Sqrt Sub Sum Tanh Where Xor
    """.split()  # noqa: SIM905 - reads as a list
)
"""Operators for which the order of the numbers in memory does not matter."""
_IMAGE: Final = 4
_EXACT: Final = frozenset(
    getattr(ir.DataType, name)
    for name in "FLOAT FLOAT16 BFLOAT16 BOOL INT8 UINT8 INT16 UINT16".split()  # noqa: SIM905
)
"""Types of which float32 has every number: only that can be rearranged."""


class BlockChannelsPass(ir.passes.InPlacePass):
    """Let convolutions, their gradients, and what lies between them use blocked channels.

    Before:  y = Conv (x, w, b);  z = Relu (y)
             dx, dw, db = com.microsoft.ConvGrad (dy, x, w)
    After:   x_b = com.microsoft.nchwc.ReorderInput (x)
             z_b = com.microsoft.nchwc.Conv <activation = "Relu"> (x_b, w_b, b)
             z = com.microsoft.nchwc.ReorderOutput (z_b);  ...

    ONNX Runtime's own conversion takes constant weights only and knows no gradients. An
    elementwise operator stays in blocked channels where one of its operands is; everything
    else reads images as they were.

    Requires: opset 13; inferred shapes and types; calls of functions are inlined, but for
        ``onnx_fliqs.InnerProduct``.
    Ensures: the same outputs and signature, to within float rounding. Convolutions whose
        numbers of channels are no multiples of the block, or whose sizes are unknown, stay.
    Idempotent: convolutions in blocked channels are left alone.
    """

    def __init__(self, block: int, batch: int) -> None:
        """Say what the graph will run on.

        Args:
            block: Channels of a block: as many as ONNX Runtime's kernels want on this machine;
                with 1 there are none, and nothing is done.
            batch: About how many samples the graph will be run on.
        """
        super().__init__()
        self._block = block
        self._batch = batch

    def requires(self, model: ir.Model) -> None:
        """Check the opset."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the main graph in the order of execution."""
        if self._block == 1:
            return ir.passes.PassResult(model, modified=False)
        work = _Work(model.graph, self._block, self._batch)
        for node in list(model.graph):
            work.visit(node)
        if not work.finish():
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)


class _Work:
    """What is known of a graph half way through."""

    def __init__(self, graph: ir.Graph, block: int, batch: int) -> None:
        self._graph = graph
        self._block = block
        self._batch = batch
        self._blocked: dict[ir.Value, ir.Value] = {}
        """Images of the old graph, in blocked channels."""
        self._native: set[ir.Value] = set()
        """Those of them that are computed so."""
        self._plain: dict[ir.Value, ir.Value] = {}
        """Images of the old graph that are computed in blocked channels, rearranged back."""
        self._gone: list[ir.Node] = []

    def visit(self, node: ir.Node) -> None:
        """Rewrite a node, or let it read what its inputs have become."""
        ops = Ops(ir.DataType.FLOAT, f"{node.name}/blocked/")
        if is_standard(node, "Conv"):
            done = self._convolution(node, ops)
        elif node.op_type == "ConvGrad":
            done = self._gradient(node, ops)
        elif node.op_type == INNER_PRODUCT:
            done = self._inner_product(node, ops)
        else:
            done = self._elementwise(node, ops)
        if not done:
            for reader in with_bodies(node):
                for index, value in enumerate(reader.inputs):
                    if value in self._native:
                        reader.replace_input_with(index, self._as_plain(value, ops))
        self._graph.insert_before(node, ops.nodes)
        if done:
            self._gone.append(node)

    def finish(self) -> bool:
        """Hand out outputs and remove what has been replaced; whether anything has."""
        ops = Ops(ir.DataType.FLOAT, "blocked/outputs/")
        for index, value in enumerate(self._graph.outputs):
            if value in self._native:
                plain = self._as_plain(value, ops)
                value.name, plain.name = f"{value.name}.unblocked", value.name
                plain.type, plain.shape = value.type, value.shape
                self._graph.outputs[index] = plain
        self._graph.extend(ops.nodes)
        for node in reversed(self._gone):
            self._graph.remove(node, safe=True)
        return bool(self._gone)

    # --- images in both forms ----------------------------------------------------------------

    def _as_plain(self, image: ir.Value, ops: Ops) -> ir.Value:
        if image not in self._native:
            return image
        if image not in self._plain:
            shape = known_shape(image)
            assert shape is not None
            assert isinstance(shape[1], int)
            blocked = self._blocked[image]
            if image.dtype in (None, ir.DataType.FLOAT):
                back = from_blocked(ops, blocked, shape[1])
            else:
                back = from_blocked(ops, ops.cast(blocked), shape[1])
                back = ops.Cast(back, to=int(image.dtype))
            back.shape, back.type = image.shape, image.type
            self._plain[image] = back
        return self._plain[image]

    def _as_blocked(self, image: ir.Value, ops: Ops) -> ir.Value:
        if image not in self._blocked:
            self._blocked[image] = to_blocked(ops, image)
        return self._blocked[image]

    def _computed(
        self, image: ir.Value, blocked: ir.Value, shape: Sequence[int | str]
    ) -> None:
        """An image of the old graph is computed in blocked channels from now on."""
        image.shape = ir.Shape(shape)
        image.type = image.type or ir.TensorType(ir.DataType.FLOAT)
        blocked.shape, blocked.type = image.shape, image.type
        self._blocked[image] = blocked
        self._native.add(image)

    # --- operators ---------------------------------------------------------------------------

    def _convolution(self, node: ir.Node, ops: Ops) -> bool:
        image, weight, bias = (*node.inputs, None)[:3]
        assert image is not None
        assert weight is not None
        conv = Convolution.of(node, image, weight)
        if conv is None or not conv.fits(self._block):
            return False
        shape = known_shape(image)
        assert shape is not None
        reads = self._as_plain if conv.reads_plain(self._block) else self._as_blocked
        result = blocked_convolution(ops, reads(image, ops), weight, bias, conv, self._block)
        self._computed(node.outputs[0], result, [shape[0], conv.filters, *conv.output_size])
        return True

    def _gradient(self, node: ir.Node, ops: Ops) -> bool:
        gradient, image, weight = node.inputs
        assert gradient is not None
        assert image is not None
        assert weight is not None
        conv = Convolution.of(node, image, weight)
        if conv is None or not conv.fits(self._block):
            return False
        d_image, d_weight, d_bias = _wanted(node)
        if d_image is None and d_bias is None and not conv.weight_gradient_fits(self._batch):
            return False
        results: dict[ir.Value, ir.Value] = {}
        if d_image is not None:
            if not conv.input_gradient_fits(self._block):
                return False
            shape = known_shape(image)
            assert shape is not None
            d_blocked = self._as_blocked(gradient, ops)
            part = ops.part("input")
            result = blocked_input_gradient(part, d_blocked, weight, conv, self._block)
            self._computed(d_image, result, shape)
        if d_weight is not None:
            results[d_weight] = self._weight_gradient(node, ops.part("kernel"), conv)
        if d_bias is not None:
            d_blocked = self._as_blocked(gradient, ops)
            part = ops.part("bias")
            results[d_bias] = blocked_bias_gradient(part, d_blocked, conv, self._block)
        for old, new in results.items():
            new.shape, new.type = old.shape, old.type
            old.name, new.name = f"{old.name}.unblocked", old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        return True

    def _weight_gradient(self, node: ir.Node, ops: Ops, conv: Convolution) -> ir.Value:
        gradient, image, weight = node.inputs
        assert gradient is not None
        assert image is not None
        if conv.weight_gradient_fits(self._batch):
            reads = self._as_plain if conv.reads_plain(self._block) else self._as_blocked
            return blocked_weight_gradient(
                ops, reads(image, ops), self._as_blocked(gradient, ops), conv, self._block
            )
        operands = [self._as_plain(gradient, ops), self._as_plain(image, ops), weight]
        _, found = ops.node(
            "ConvGrad", operands, node.attributes, domain=node.domain, outputs=2
        )
        ops.nodes[-1].outputs[0].name = ""
        return found

    def _inner_product(self, node: ir.Node, ops: Ops) -> bool:
        """Of two images in blocked channels: these have the same numbers in one order."""
        blocked = [self._blocked.get(value) for value in node.inputs if value is not None]
        if self._native.isdisjoint(node.inputs) or None in blocked:
            return False
        (result,) = ops.again(node, *blocked)
        old = node.outputs[0]
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result)
        return True

    def _elementwise(self, node: ir.Node, ops: Ops) -> bool:
        if not is_standard(node, *_ELEMENTWISE) or self._native.isdisjoint(node.inputs):
            return False
        images = [v for v in node.inputs if v is not None and not _is_number(v)]
        shapes = {tuple(known_shape(image) or ()) for image in images}
        if len(shapes) != 1 or len(next(iter(shapes))) != _IMAGE:
            return False
        (shape,) = shapes
        if self._fuse_activation(node, shape):
            return True
        if node.outputs[0].dtype not in _EXACT or any(
            image.dtype is not ir.DataType.FLOAT
            for image in images
            if image not in self._native
        ):
            return False
        operands = [self._as_blocked(v, ops) if v in images else v for v in node.inputs]
        (result,) = ops.again(node, *operands)
        self._computed(node.outputs[0], result, shape)
        return True

    def _fuse_activation(self, node: ir.Node, shape: Sequence[int | str]) -> bool:
        """Let the convolution in front compute it, if nothing else reads that."""
        image = node.inputs[0]
        parameters = _parameters(node)
        if parameters is None or image is None or image not in self._native:
            return False
        blocked = self._blocked[image]
        maker = blocked.producer()
        if maker is None or maker.op_type != "Conv" or "activation" in maker.attributes:
            return False
        if blocked.uses() or len(image.uses()) > 1 or image.is_graph_output():
            return False
        maker.attributes["activation"] = ir.AttrString("activation", node.op_type)
        if parameters:
            maker.attributes["activation_params"] = ir.AttrFloat32s(
                "activation_params", parameters
            )
        self._computed(node.outputs[0], blocked, shape)
        return True


def _wanted(node: ir.Node) -> list[ir.Value | None]:
    """Those of the three gradients of a convolution that are read."""
    values = [value if value.name else None for value in node.outputs]
    return [*values, None, None][:3]


def _parameters(node: ir.Node) -> list[float] | None:
    """Those of an activation that a convolution can compute; None if it cannot."""
    if is_standard(node, "Relu"):
        return []
    bounds = [constant_of(value) for value in node.inputs[1:]]
    if not is_standard(node, "Clip") or len(bounds) != 2 or None in bounds:
        return None
    return [float(bound.item()) for bound in bounds if bound is not None]


def _is_number(value: ir.Value) -> bool:
    constant = constant_of(value)
    shape = constant.shape if constant is not None else known_shape(value)
    return shape is not None and len(shape) < _IMAGE and all(size == 1 for size in shape)
