"""Gradients of operators that read an image at other places than its pixels."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import (
    Call,
    Formula,
    Lowering,
    NoGradientError,
    input_of,
    rank_of,
)
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "LOWERINGS"]

_CUBIC: Final = -0.75
"""ONNX Runtime's coefficient of the cubic GridSample."""
_POOLED_RANKS: Final = (3, 4, 5)
_REPEATING: Final = frozenset(
    {
        ("asymmetric", "floor"),
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
        ("pytorch_half_pixel", "round_prefer_floor"),
        ("pytorch_half_pixel", "round_prefer_ceil"),
    }
)
"""Coordinates and rounding with which enlarging by a whole number repeats each element."""


# -- Resize ---------------------------------------------------------------------------------


def _resize(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """Resizing works along one axis after the other, and is linear in each."""
    node, x = call.node, call.node.inputs[0]
    rank = rank_of(x)
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoGradientError("it keeps the aspect ratio")
    factors = _factors(node, rank)
    if (kernel := _repeats(node, factors)) is not None:
        mean = op.AveragePool(call.dy, kernel_shape=kernel, strides=kernel)
        return {0: op.Mul(mean, float(math.prod(kernel)))}
    if rank == 1:
        raise NoGradientError("its input is a vector")
    gradient = call.dy
    for axis in range(rank):
        if factors[axis] != 1:
            gradient = _along(op, gradient, _matrix(op, call, axis, rank), axis, rank)
    return {0: gradient}


def _axes(node: ir.Node, rank: int) -> list[int]:
    return [axis % rank for axis in node.attributes.get_ints("axes", list(range(rank)))]


def _factors(node: ir.Node, rank: int) -> list[float | None]:
    """How much longer each axis becomes, None where that is not known."""
    axes = _axes(node, rank)
    found: list[float | None] = [1.0 if axis not in axes else None for axis in range(rank)]
    scales = constant_of(input_of(node, 2))
    cropping = node.attributes.get_string("coordinate_transformation_mode", "").startswith(
        "tf"
    )
    if scales is not None and scales.size:
        for axis, scale in zip(axes, scales.tolist(), strict=True):
            found[axis] = scale
    elif input_of(node, 3) is not None:
        before, after = node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
        for axis in axes:
            old, new = (None if s is None else s[axis] for s in (before, after))
            if isinstance(old, int) and isinstance(new, int):
                found[axis] = new / old
            elif old is not None and old == new and old != ir.SymbolicDim(None):
                found[axis] = 1.0
    # A crop changes an axis without making it longer.
    return [None if factor == 1 and cropping else factor for factor in found]


def _repeats(node: ir.Node, factors: Sequence[float | None]) -> list[int] | None:
    """How often each spatial element is repeated, if that is all that happens."""
    attributes = node.attributes
    mode = (
        attributes.get_string("coordinate_transformation_mode", "half_pixel"),
        attributes.get_string("nearest_mode", "round_prefer_floor"),
    )
    whole = [int(factor) for factor in factors if factor is not None and factor % 1 == 0]
    if (
        attributes.get_string("mode", "nearest") != "nearest"
        or mode not in _REPEATING
        or len(factors) not in _POOLED_RANKS
        or len(whole) < len(factors)
        or whole[:2] != [1, 1]
        or min(whole) < 1
    ):
        return None
    return whole[2:]


def _matrix(op: Ops, call: Call, axis: int, rank: int) -> ir.Value:
    """What resizing does along an axis, as a matrix [length before, length after].

    It is the resized identity, whose rows lie along another axis.
    """
    node, size = call.node, op.Shape(call.x(), start=axis, end=axis + 1)
    rows = 1 if axis == 0 else 0
    one = np.ones(1, np.int64)
    shape = op.Concat(*(size if i in (axis, rows) else one for i in range(rank)), axis=0)
    eye = op.EyeLike(op.zeros(op.Concat(size, size, axis=0)))
    image = op.Reshape(eye if axis > rows else op.Transpose(eye), shape)
    axes = np.array(_axes(node, rank), np.int64)
    here = axes == axis
    scales, sizes = call.optional(2), call.optional(3)
    if sizes is not None:
        sizes = op.Where(here, sizes, op.Gather(shape, axes))
        scales = None
    elif scales is not None:
        scales = op.Where(here, scales, np.ones(1, np.float32))
    resized = op.again(node, image, call.optional(1), scales, sizes, extrapolation_value=0.0)[
        0
    ]
    matrix = [size, np.array([-1])] if axis > rows else [np.array([-1]), size]
    flat = op.Reshape(resized, op.Concat(*matrix, axis=0))
    return flat if axis > rows else op.Transpose(flat)


def _along(op: Ops, value: ir.Value, matrix: ir.Value, axis: int, rank: int) -> ir.Value:
    """Multiply each vector along an axis by a matrix."""
    if axis == rank - 1:
        return op.MatMul(value, op.Transpose(matrix))
    if axis == rank - 2:
        return op.MatMul(matrix, value)
    swapped = list(range(rank))
    swapped[axis], swapped[-2] = swapped[-2], swapped[axis]
    return op.Transpose(op.MatMul(matrix, op.Transpose(value, perm=swapped)), perm=swapped)


# -- regions --------------------------------------------------------------------------------


def _roi_align(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """Aligning one-hot images tells the weight of each pixel in each mean."""
    if call.node.attributes.get_string("mode", "avg") != "avg":
        raise NoGradientError("its mode is max")
    regions, batch = call.x(1), call.x(2)
    outer, image = op.Shape(call.x(), end=2), op.Shape(call.x(), start=2)
    pixels = op.ReduceProd(image, keepdims=1)
    eye = op.EyeLike(op.zeros(op.Concat(pixels, pixels, axis=0)))
    images = op.Reshape(eye, op.Concat([1, -1], image, axis=0))
    first = op.Sub(batch, batch)
    aligned = op.again(call.node, images, regions, first)[0]
    weights = op.Transpose(op.Reshape(aligned, [0, 0, -1]), perm=[0, 2, 1])
    shares = op.MatMul(op.Reshape(call.dy, [0, 0, -1]), weights)
    zeros = op.zeros(op.Concat(outer, pixels, axis=0))
    summed = op.ScatterND(zeros, op.Unsqueeze(batch, [1]), shares, reduction="add")
    return {0: op.Reshape(summed, op.Shape(call.x()))}


# -- grids ----------------------------------------------------------------------------------


def _affine_grid(op: Ops, node: ir.Node) -> list[ir.Value]:
    """The grid of the identity, with a row of ones, times the transposed matrix."""
    theta, size = node.inputs
    shape = theta.shape if theta is not None else None
    dims = shape[1] if shape is not None and len(shape) == 3 else None
    if not isinstance(dims, int):
        raise NoGradientError("the number of its dimensions is not known")
    eye = np.eye(dims, dims + 1, dtype=op.dtype.numpy())[None]
    single = op.Concat([1], op.Slice(size, [1], [dims + 2]), axis=0)
    points = op.Reshape(op.again(node, eye, single)[0], [1, -1, dims])
    ones = op.full(op.Concat(op.Shape(points, end=2), [1], axis=0), 1.0)
    grid = op.MatMul(op.Concat(points, ones, axis=2), op.Transpose(theta, perm=[0, 2, 1]))
    outer, image = op.Slice(size, [0], [1]), op.Slice(size, [2], [dims + 2])
    return [op.Reshape(grid, op.Concat(outer, image, [dims], axis=0))]


def _grid_sample(op: Ops, node: ir.Node) -> list[ir.Value]:
    """A weighted sum of the pixels around each point."""
    x, grid = node.inputs
    axes = rank_of(x) - 2
    mode = node.attributes.get_string("mode", "linear")
    points = op.Reshape(grid, op.Concat(op.Shape(grid, end=1), [-1, axes], axis=0))
    taps = [_taps(op, node, mode, points, axis, axes) for axis in range(axes)]
    pixels = op.Reshape(x, [0, 0, -1])
    shape = op.Concat(op.Shape(x, end=2), op.Shape(points, start=1, end=2), axis=0)
    total = None
    for chosen in itertools.product(*taps):
        place, weight = chosen[0]
        for axis, (other, factor) in enumerate(chosen[1:], 1):
            length = op.Shape(x, start=2 + axis, end=3 + axis)
            place = op.Add(op.Mul(place, length), other)
            weight = op.Mul(weight, factor)
        everywhere = op.Expand(op.Unsqueeze(place, [1]), shape)
        read = op.GatherElements(pixels, everywhere, axis=2)
        part = op.Mul(read, op.Unsqueeze(weight, [1]))
        total = part if total is None else op.Add(total, part)
    outputs = op.Shape(grid, start=1, end=1 + axes)
    return [op.Reshape(total, op.Concat(op.Shape(x, end=2), outputs, axis=0))]


def _taps(
    op: Ops, node: ir.Node, mode: str, points: ir.Value, axis: int, axes: int
) -> list[tuple[ir.Value, ir.Value]]:
    """Along one axis: the pixels around each point, [N, P], and their weights."""
    length = op.Shape(node.inputs[0], start=2 + axis, end=3 + axis)
    size = op.cast(length)
    at = op.Gather(points, axes - 1 - axis, axis=2)
    if node.attributes.get_int("align_corners", 0):
        at = op.Mul(op.Div(op.Add(at, 1.0), 2.0), op.Sub(size, 1.0))
    else:
        at = op.Div(op.Sub(op.Mul(op.Add(at, 1.0), size), 1.0), 2.0)
    padding = node.attributes.get_string("padding_mode", "zeros")
    if mode == "nearest":
        first, weights = op.Round(at), [op.full(op.Shape(at), 1.0)]
    else:
        below = op.Floor(at)
        beyond = op.Sub(at, below)
        cubic = mode == "cubic"
        first = op.Sub(below, 1.0) if cubic else below
        weights = _cubic_weights(op, beyond) if cubic else [op.Sub(1.0, beyond), beyond]
    start = op.Cast(first, to=int(ir.DataType.INT64))
    found = []
    for number, weight in enumerate(weights):
        place = op.Add(start, number)
        inside = op.Min(op.Max(place, 0), op.Sub(length, 1))
        given = weight
        if padding == "zeros":
            given = op.Where(op.Equal(place, inside), given, 0.0)
        elif padding == "reflection":
            inside = _reflected(op, node, place, length)
        found.append((inside, given))
    return found


def _cubic_weights(op: Ops, beyond: ir.Value) -> list[ir.Value]:
    """Of the pixels at -1, 0, 1 and 2 (Keys 1981)."""
    rest = op.Sub(1.0, beyond)

    def near(t: ir.Value) -> ir.Value:  # ((a + 2) t - (a + 3)) t^2 + 1
        bend = op.Sub(op.Mul(t, _CUBIC + 2), _CUBIC + 3)
        return op.Add(op.Mul(bend, op.Mul(t, t)), 1.0)

    def far(t: ir.Value) -> ir.Value:  # a ((s - 5) s + 8) s - 4a, for s = t + 1
        s = op.Add(t, 1.0)
        bend = op.Add(op.Mul(op.Sub(s, 5.0), s), 8.0)
        return op.Mul(op.Sub(op.Mul(bend, s), 4.0), _CUBIC)

    return [far(beyond), near(beyond), near(rest), far(rest)]


def _reflected(op: Ops, node: ir.Node, place: ir.Value, length: ir.Value) -> ir.Value:
    """Fold places back into the image, at its outermost pixels or at their edges."""
    at_pixels = node.attributes.get_int("align_corners", 0)
    last = op.Sub(length, 1)
    period = op.Max(op.Mul(last if at_pixels else length, 2), 1)
    folded = op.Mod(place, period)
    back = op.Sub(period, folded) if at_pixels else op.Sub(op.Sub(period, 1), folded)
    return op.Where(op.LessOrEqual(folded, last), folded, back)


FORMULAS: Final[dict[str, Formula]] = {"Resize": _resize, "RoiAlign": _roi_align}
LOWERINGS: Final[dict[str, Lowering]] = {
    "AffineGrid": _affine_grid,
    "GridSample": _grid_sample,
}
