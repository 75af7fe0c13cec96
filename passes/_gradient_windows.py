"""Gradients of convolutions and pools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Call, Formula, Lowering, NoGradientError
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "LOWERINGS"]

_LP_NORM: Final = 2
_SAME: Final = ("SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True, slots=True)
class _Window:
    """How a convolution or pool moves over its input; one number per spatial axis."""

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    pads: Sequence[int]
    """At the beginnings, then at the ends, as far as they are written down."""
    auto_pad: str

    @property
    def axes(self) -> int:
        return len(self.kernel)

    @property
    def extent(self) -> list[int]:
        """From the first to the last element that a window touches."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return [(size - 1) * dilation + 1 for size, dilation in pairs]

    def attributes(self, pads: Sequence[int] | None = None) -> dict[str, object]:
        """What a Conv of the same windows has."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": list(self.pads if pads is None else pads),
        }


def _window(node: ir.Node) -> _Window:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    shape = list(weight.shape)[2:] if weight is not None and weight.shape is not None else []
    static = [size for size in shape if isinstance(size, int)]
    kernel = node.attributes.get_ints("kernel_shape", static)
    if not kernel or len(static) != len(shape):
        raise NoGradientError("the size of its kernel is not known")
    ones = [1] * len(kernel)
    return _Window(
        kernel,
        node.attributes.get_ints("strides", ones),
        node.attributes.get_ints("dilations", ones),
        node.attributes.get_ints("pads", [0] * 2 * len(kernel)),
        node.attributes.get_string("auto_pad", "NOTSET"),
    )


# -- convolutions ---------------------------------------------------------------------------


def _paddings(op: Ops, window: _Window, sizes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What is padded at the beginnings and at the ends, for an input of some sizes."""
    if window.auto_pad not in _SAME:
        pads = list(window.pads if window.auto_pad == "NOTSET" else [0] * 2 * window.axes)
        return op.vector(pads[: window.axes]), op.vector(pads[window.axes :])
    strides, extent = (np.array(v, np.int64) for v in (window.strides, window.extent))
    steps = op.Sub(op.Div(op.Add(sizes, strides - 1), strides), 1)
    total = op.Max(op.Sub(op.Add(op.Mul(steps, strides), extent), sizes), 0)
    small = op.Div(total, 2)
    large = op.Sub(total, small)
    return (small, large) if window.auto_pad == "SAME_UPPER" else (large, small)


def _conv(op: Ops, node: ir.Node) -> list[ir.Value]:
    """A Conv that works out its padding."""
    x = node.inputs[0]
    begins, ends = _paddings(op, _window(node), op.Shape(x, start=2))
    padded = op.Pad(x, op.Concat([0, 0], begins, [0, 0], ends, axis=0))
    return [op.again(node, padded, *node.inputs[1:], auto_pad=None)[0]]


def _conv_transpose(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """It is the transpose of a convolution, which therefore computes its gradient."""
    node, window = call.node, _window(call.node)
    if op.dtype is not ir.DataType.FLOAT:
        raise NoGradientError("ONNX Runtime has the gradient of Conv in float32 only")
    attributes = window.attributes(_transposed_pads(node, window))
    attributes["group"] = node.attributes.get_int("group", 1)
    gradients = {0: op.Conv(call.dy, call.x(1), **attributes)}
    operands = (call.x(0), call.dy, call.x(1))
    gradients[1] = op.contrib("ConvGrad", *operands, outputs=3, only=1, **attributes)[1]
    if call.optional(2) is not None:
        gradients[2] = op.ReduceSum(call.dy, [0, *range(2, 2 + window.axes)], keepdims=0)
    return gradients


def _transposed_pads(node: ir.Node, window: _Window) -> Sequence[int]:
    """The padding of a ConvTranspose, written down."""
    zeros = [0] * window.axes
    extra = node.attributes.get_ints("output_padding", zeros)
    wanted = node.attributes.get_ints("output_shape", None)
    if wanted is None and any(a >= b for a, b in zip(extra, window.strides, strict=True)):
        raise NoGradientError("its output_padding is not less than its strides")
    if wanted is None and window.auto_pad not in _SAME:
        return window.pads if window.auto_pad == "NOTSET" else [0] * 2 * window.axes
    # Without padding, the output reaches this much beyond (input size) * stride.
    beyond = [
        extent + more - stride
        for extent, more, stride in zip(window.extent, extra, window.strides, strict=True)
    ]
    if wanted is None:
        totals = [max(each, 0) for each in beyond]
    else:
        scaled = zip(_sizes(node), window.strides, beyond, wanted, strict=True)
        totals = [size * stride + more - goal for size, stride, more, goal in scaled]
        if min(totals) < 0:
            raise NoGradientError("its output_shape is larger than what it computes")
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    upper = window.auto_pad == "SAME_UPPER"
    return [*small, *large] if upper else [*large, *small]


def _sizes(node: ir.Node) -> list[int]:
    x = node.inputs[0]
    sizes = list(x.shape)[2:] if x is not None and x.shape is not None else [None]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise NoGradientError("it has an output_shape, but the size of its input is not known")
    return known


def _column_to_image(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """A convolution that picks each element of a block cuts the image into columns again."""
    node, shape = call.node, op.Shape(call.x())
    image, block = call.x(1), call.x(2)
    channels = op.Reshape(call.dy, op.Concat([-1, 1], image, axis=0))
    count = op.ReduceProd(block, keepdims=1)
    eye = op.EyeLike(op.zeros(op.Concat(count, count, axis=0)))
    kernel = op.Reshape(eye, op.Concat(count, [1], block, axis=0))
    names = ("dilations", "pads", "strides")
    attributes = {name: node.attributes[name] for name in names if name in node.attributes}
    return {0: op.Reshape(op.Conv(channels, kernel, **attributes), shape)}


# -- pools ----------------------------------------------------------------------------------


def _spread(op: Ops, call: Call, window: _Window, value: ir.Value) -> ir.Value:
    """Add up, for each element of the input, one value per window that it lies in.

    Args:
        op: Where to write.
        call: A pool.
        window: Its windows.
        value: In the shape of its output.
    """
    sizes = op.Shape(call.x(), start=2)
    begins = _paddings(op, window, sizes)[0]
    kernel = np.ones((1, 1, *window.kernel), op.dtype.numpy())
    attributes = window.attributes([0] * 2 * window.axes)
    sums = op.ConvTranspose(_by_channel(op, value), kernel, **attributes)
    # Past the last window, up to a stride less one element may be left.
    rest = [0] * (4 + window.axes) + [stride - 1 for stride in window.strides]
    axes = list(range(2, 2 + window.axes))
    inside = op.Slice(op.Pad(sums, rest), begins, op.Add(begins, sizes), axes)
    return op.Reshape(inside, op.Shape(call.x()))


def _by_channel(op: Ops, x: ir.Value) -> ir.Value:
    return op.Reshape(x, op.Concat([-1, 1], op.Shape(x, start=2), axis=0))


def _filled(op: Ops, call: Call, window: _Window) -> ir.Value:
    """How many elements of the input each window holds, for one channel."""
    sizes = op.Shape(call.x(), start=2)
    begins = _paddings(op, window, sizes)[0]
    total: ir.Value | None = None
    for axis in range(window.axes):
        count = op.Gather(op.Shape(call.y), 2 + axis)
        starts = op.Mul(op.Range(0, count, 1), window.strides[axis])
        steps = np.arange(window.kernel[axis]) * window.dilations[axis]
        first = op.Sub(op.Unsqueeze(starts, [1]), op.Gather(begins, axis))
        places = op.Add(first, steps)
        inside = op.And(op.GreaterOrEqual(places, 0), op.Less(places, op.Gather(sizes, axis)))
        along = [1, 1, *(-1 if other == axis else 1 for other in range(window.axes))]
        found = op.Reshape(op.ReduceSum(op.cast(inside), [1]), along)
        total = found if total is None else op.Mul(total, found)
    assert total is not None
    return op.Max(total, 1.0)


def _average_pool(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    window = _window(call.node)
    share = op.Reciprocal(_filled(op, call, window))
    if call.node.attributes.get_int("count_include_pad", 0):
        # The mean of ones and of padding tells by how much the mean is smaller.
        ones = op.full(op.Concat([1, 1], op.Shape(call.x(), start=2), axis=0), 1.0)
        share = op.Mul(share, op.again(call.node, ones)[0])
    return {0: _spread(op, call, window, op.Mul(call.dy, share))}


def _lp_pool(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    power = float(call.node.attributes.get_int("p", _LP_NORM))
    # The root of zero has no derivative.
    roots = op.Where(op.Equal(call.y, 0.0), 1.0, call.y)
    shares = op.Mul(call.dy, op.Pow(roots, 1 - power))
    slope = op.Mul(op.Sign(call.x()), op.Pow(op.Abs(call.x()), power - 1))
    return {0: op.Mul(_spread(op, call, _window(call.node), shares), slope)}


FORMULAS: Final[dict[str, Formula]] = {
    "AveragePool": _average_pool,
    "Col2Im": _column_to_image,
    "ConvTranspose": _conv_transpose,
    "LpPool": _lp_pool,
}
LOWERINGS: Final[dict[str, Lowering]] = {"Conv": _conv}
