"""Gradients of operators that move, repeat or leave out elements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._gradient_reductions import others_product
from onnx_fliqs.passes._gradient_rule import Call, Formula, Lowering, input_of
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "LOWERINGS"]

_TO_THE_END: Final = np.iinfo(np.int64).max
_BEFORE_THE_START: Final = -(1 << 30)
"""What an exporter writes for the end of a slice that runs backwards to the first element."""


def _numbered(op: Ops, x: ir.Value) -> ir.Value:
    """The numbers of the elements, from 1, in the shape of a tensor."""
    return op.Reshape(op.Range(1, op.Add(op.Size(x), 1), 1), op.Shape(x))


def _send_back(op: Ops, call: Call, origins: ir.Value) -> Mapping[int, ir.Value]:
    """Add each element of the gradient to the element of the input that it came from.

    Args:
        op: Where to write.
        call: The node.
        origins: In the shape of the output, the numbers of those elements, 0 for none.
    """
    x = call.x()
    zeros = op.zeros(op.Reshape(op.Add(op.Size(x), 1), [1]))
    flat = [op.Reshape(value, [-1]) for value in (origins, call.dy)]
    summed = op.ScatterElements(zeros, *flat, axis=0, reduction="add")
    elements = op.Slice(summed, [1], [_TO_THE_END])
    return {0: op.Reshape(elements, op.Shape(x))}


def _moved(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """The operator itself, run on the numbers of the elements, tells where each one went."""
    numbers = _numbered(op, call.x())
    return _send_back(op, call, op.again(call.node, numbers, *call.inputs[1:])[0])


def _pad(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    numbers = _numbered(op, call.x())
    origins = op.again(call.node, numbers, call.x(1), None, call.optional(3))
    return _send_back(op, call, origins[0])


def _slice(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    if _turns_around(call.node):
        return {0: op.again(call.node, call.dy, *call.inputs[1:])[0]}
    return _moved(op, call)


def _turns_around(node: ir.Node) -> bool:
    """Whether a Slice keeps everything, in the opposite order."""
    starts, ends, steps = (constant_of(input_of(node, index)) for index in (1, 2, 4))
    if starts is None or ends is None or steps is None:
        return False
    first = np.equal(starts, -1) | np.greater_equal(starts, np.iinfo(np.int32).max)
    last = np.less_equal(ends, _BEFORE_THE_START) & np.equal(steps, -1)
    return bool(np.all(first & last))


def _max_roi_pool(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """The ranks of the elements are all different: the largest one tells its element."""
    count = op.Size(call.x())
    values = op.Reshape(call.x(), [-1])
    _, order = op.node("TopK", [values, op.Reshape(count, [1])], {"largest": 0}, outputs=2)
    # Every place of ``order``, here no more than a tensor of the right size, is overwritten.
    ranks = op.ScatterElements(order, order, op.Range(1, op.Add(count, 1), 1), axis=0)
    image = op.cast(op.Reshape(ranks, op.Shape(call.x())))
    pooled = op.Cast(op.again(call.node, image, call.x(1))[0], to=int(ir.DataType.INT64))
    numbers = op.Concat([0], op.Add(order, 1), axis=0)  # an empty region has no origin
    return _send_back(op, call, op.Gather(numbers, pooled))


def _max_pool(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    return _send_back(op, call, op.Add(call.outputs[1], 1))


def _max_unpool(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    return {0: op.Gather(op.Reshape(call.dy, [-1]), call.x(1))}


def _depth_to_space(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    block = call.node.attributes.get_int("blocksize")
    packed = op.SpaceToDepth(call.dy, blocksize=block)
    if call.node.attributes.get_string("mode", "DCR") == "DCR":
        return {0: packed}
    shape = op.Shape(call.x())
    image = op.Shape(call.x(), start=2)
    split = op.Reshape(packed, op.Concat([0, block * block, -1], image, axis=0))
    return {0: op.Reshape(op.Transpose(split, perm=[0, 2, 1, 3, 4]), shape)}


def _space_to_depth(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    return {0: op.DepthToSpace(call.dy, blocksize=call.node.attributes.get_int("blocksize"))}


def _split(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """Also where the loss does not depend on some of the parts."""
    parts = [
        op.zeros(op.Shape(part)) if gradient is None else gradient
        for part, gradient in zip(call.outputs, call.gradients, strict=True)
    ]
    return {0: op.Concat(*parts, axis=call.node.attributes.get_int("axis", 0))}


# -- scattering -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Places:
    """The places of a tensor that a node scatters to."""

    op: Ops
    call: Call
    gather: str
    """The operator that reads such places."""

    def read(self, value: ir.Value) -> ir.Value:
        """The elements that lie there."""
        axis = {name: a for name, a in self.call.node.attributes.items() if name == "axis"}
        return self.op.node(self.gather, [value, self.call.x(1)], axis)[0]

    def write(self, into: ir.Value, what: ir.Value, reduction: str) -> ir.Value:
        """Scatter other elements there."""
        indices = self.call.x(1)
        return self.op.again(self.call.node, into, indices, what, reduction=reduction)[0]


def _overwritten(op: Ops, call: Call, places: _Places) -> Mapping[int, ir.Value]:
    nothing = op.zeros(op.Shape(call.x(2)))
    return {0: places.write(call.dy, nothing, "none"), 2: places.read(call.dy)}


def _added(_op: Ops, call: Call, places: _Places) -> Mapping[int, ir.Value]:
    return {0: call.dy, 2: places.read(call.dy)}


def _multiplied(op: Ops, call: Call, places: _Places) -> Mapping[int, ir.Value]:
    data, updates = call.x(0), call.x(2)
    zeros = op.Equal(data, 0.0), op.Equal(updates, 0.0)
    count = places.write(op.cast(zeros[0]), op.cast(zeros[1]), "add")
    product = places.write(
        op.Where(zeros[0], 1.0, data), op.Where(zeros[1], 1.0, updates), "mul"
    )
    others = others_product(op, data, product, count)
    read_others = others_product(op, updates, places.read(product), places.read(count))
    return {0: op.Mul(call.dy, others), 2: op.Mul(places.read(call.dy), read_others)}


def _extreme(op: Ops, call: Call, places: _Places) -> Mapping[int, ir.Value]:
    """Elements that are equally large share the gradient."""
    kept = op.cast(op.Equal(call.x(0), call.y))
    taken = op.cast(op.Equal(call.x(2), places.read(call.y)))
    share = op.Div(call.dy, places.write(kept, taken, "add"))
    return {0: op.Mul(kept, share), 2: op.Mul(taken, places.read(share))}


_SCATTERED: Final = {
    "add": _added,
    "max": _extreme,
    "min": _extreme,
    "mul": _multiplied,
    "none": _overwritten,
}


def _scattered(gather: str) -> Formula:
    def formula(op: Ops, call: Call) -> Mapping[int, ir.Value]:
        reduction = call.node.attributes.get_string("reduction", "none")
        return _SCATTERED[reduction](op, call, _Places(op, call, gather))

    return formula


def _expand(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    return {0: op.sum_to(call.dy, call.x(), call.y)}


FORMULAS: Final[dict[str, Formula]] = {
    "CenterCropPad": _moved,
    "Compress": _moved,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "MaxPool": _max_pool,
    "MaxRoiPool": _max_roi_pool,
    "MaxUnpool": _max_unpool,
    "Pad": _pad,
    "ReverseSequence": _moved,
    "ScatterElements": _scattered("GatherElements"),
    "ScatterND": _scattered("GatherND"),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
}


def _unique(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    (x,) = node.inputs
    axis = node.attributes.get_int("axis", None)
    _, *rest = op.node("Unique", [x], node.attributes, outputs=4)
    source = op.Reshape(x, [-1]) if axis is None else x
    return [op.Gather(source, rest[0], axis=axis or 0), *rest]


def _one_hot(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    indices, depth, values = node.inputs
    off, on = (op.Gather(values, index) for index in (0, 1))
    places = np.array([0, 1], op.dtype.numpy())
    return [op.Add(op.Mul(op.again(node, indices, depth, places)[0], op.Sub(on, off)), off)]


def _range(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    start, limit, delta = node.inputs
    count = op.Size(op.Range(start, limit, delta))
    return [op.Add(start, op.Mul(delta, op.cast(op.Range(0, count, 1))))]


def _computed_fill(op: Ops, node: ir.Node) -> Sequence[ir.Value] | None:
    """A Pad whose fill has a gradient."""
    x, pads, fill, axes = (input_of(node, index) for index in range(4))
    if fill is None or constant_of(fill) is not None:
        return None
    inside = op.full(op.Shape(x), 1.0)
    mask = op.Greater(op.again(node, inside, pads, None, axes)[0], 0.0)
    return [op.Where(mask, op.again(node, x, pads, None, axes)[0], fill)]


def _with_indices(op: Ops, node: ir.Node) -> Sequence[ir.Value] | None:
    """A MaxPool that shows the places of its maxima, counted by rows."""
    by_columns = node.attributes.get_int("storage_order", 0)
    if len(node.outputs) > 1 and not by_columns:
        return None
    attributes = {**node.attributes, "storage_order": 0}
    values, indices = op.node("MaxPool", node.inputs, attributes, outputs=2)
    if len(node.outputs) > 1 and node.outputs[1].uses():
        indices = op.again(node, *node.inputs)[1]
    return [values, indices]


LOWERINGS: Final[dict[str, Lowering]] = {
    "MaxPool": _with_indices,
    "OneHot": _one_hot,
    "Pad": _computed_fill,
    "Range": _range,
    "Unique": _unique,
}
