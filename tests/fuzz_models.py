"""Random small models out of the operators that exporters write, for the fuzz test.

A model grows operator by operator. Each reads a value that is already there, so any sequence
of operators is a valid model. Numbers stay moderate: what multiplies two activations bounds
one of them first, and weights are as large as their fan-in allows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fuzz_builder import VOCABULARY, Builder, FuzzModel, Value, value_info

__all__ = ["fuzz_models"]

_LARGEST: Final = 400
"""Elements of a value for one sample."""
_MOST_OPERATORS: Final = 8

Operation: TypeAlias = Callable[[Builder], "Value | list[Value]"]


# --- rearrangements ------------------------------------------------------------------------


def reshape(b: Builder) -> Value:
    return b.reshaped(b.pick(), b.choose(3, 2, 4, 5))


def flatten(b: Builder) -> Any:
    x = b.pick(4, 3)
    return b.node("Flatten", [x], (x.size,), axis=b.choose(1, 1 - x.rank))


def transpose(b: Builder) -> Any:
    x = b.pick(3, 4, 5)
    order = b.draw(st.permutations(range(1, x.rank)))
    return b.node("Transpose", [x], [x.dims[i - 1] for i in order], perm=[0, *order])


def unsqueeze_and_squeeze(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    axis = b.whole(1, x.rank)
    inputs, attributes = b.axes(13, axis)
    longer = (*x.dims[: axis - 1], 1, *x.dims[axis - 1 :])
    y = b.node("Unsqueeze", [x, *inputs], longer, **attributes)
    if b.choose(False, True):
        return y
    inputs, attributes = b.axes(13, b.choose(axis, axis - y.rank))
    return b.node("Squeeze", [activation(b, y), *inputs], x.dims, **attributes)


def slice_(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    axis = b.whole(1, x.rank - 1)
    size = x.dims[axis - 1]
    start = b.whole(0, size - 1)
    end, step = b.choose((size, 1), (1 << 60, 1), (-(1 << 60), -1), (size, 2))
    count = len(range(*slice(start, None if abs(end) > size else end, step).indices(size)))
    operands = [b.ints(start), b.ints(end), b.ints(b.choose(axis, axis - x.rank))]
    dims = (*x.dims[: axis - 1], count, *x.dims[axis:])
    return b.node("Slice", [x, *operands, *([b.ints(step)] if step != 1 else [])], dims)


def split(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    axis = b.whole(1, x.rank - 1)
    size = x.dims[axis - 1]
    if size < 2:
        return activation(b, x)
    first = b.whole(1, size - 1)
    sizes = [first, size - first]
    dims = [(*x.dims[: axis - 1], part, *x.dims[axis:]) for part in sizes]
    if b.opset < 13:
        parts = b.node("Split", [x], *dims, axis=axis, split=sizes)
    else:
        parts = b.node("Split", [x, b.ints(*sizes)], *dims, axis=axis)
    return parts[: b.choose(2, 1)]


def concat(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    axis = b.whole(1, x.rank - 1)
    other = b.choose(lambda: activation(b, x), lambda: x)()
    dims = (*x.dims[: axis - 1], 2 * x.dims[axis - 1], *x.dims[axis:])
    return b.node("Concat", [x, other], dims, axis=b.choose(axis, axis - x.rank))


def pad(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    mode = b.choose("constant", "reflect", "edge")
    most = [min(2, size - 1) if mode == "reflect" else 2 for size in x.dims]
    begin, end = ([b.whole(0, size) for size in most] for _ in range(2))
    fill = [b.scalar(b.choose(0.5, -1.0, 0.0))] if b.choose(False, True) else []
    dims = [s + low + high for s, low, high in zip(x.dims, begin, end, strict=True)]
    if math.prod(dims) > _LARGEST:
        return activation(b, x)
    operands = [b.ints(0, *begin, 0, *end), *fill]
    return b.node("Pad", [x, *operands], dims, mode=mode)


def tile(b: Builder) -> Any:
    x = b.pick(2, 3)
    repeats = [b.choose(2, 1) for _ in x.dims]
    dims = [size * count for size, count in zip(x.dims, repeats, strict=True)]
    if math.prod(dims) > _LARGEST:
        return activation(b, x)
    return b.node("Tile", [x, b.ints(1, *repeats)], dims)


def expand(b: Builder) -> Any:
    x = b.pick(2, 3)
    inputs, attributes = b.axes(13, 1)
    y = b.node("Unsqueeze", [x, *inputs], (1, *x.dims), **attributes)
    return b.node("Expand", [y, b.ints(1, 2, *(1 for _ in x.dims))], (2, *x.dims))


def gather(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    axis = b.whole(1, x.rank - 1)
    size = x.dims[axis - 1]
    chosen = [b.whole(-size, size - 1) for _ in range(b.whole(1, 3))]
    dims = (*x.dims[: axis - 1], len(chosen), *x.dims[axis:])
    return b.node("Gather", [x, b.ints(*chosen)], dims, axis=axis)


def depth_and_space(b: Builder) -> Any:
    x = b.pick(4)
    channels, height, width = x.dims
    if channels % 4 == 0 and b.choose(True, False):
        dims = (channels // 4, 2 * height, 2 * width)
        mode = b.choose("DCR", "CRD")
        return b.node("DepthToSpace", [x], dims, blocksize=2, mode=mode)
    if height % 2 == 0 and width % 2 == 0:
        dims = (4 * channels, height // 2, width // 2)
        return b.node("SpaceToDepth", [x], dims, blocksize=2)
    return activation(b, x)


# --- elementwise ---------------------------------------------------------------------------

_ACTIVATIONS: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "Relu": (6, {}),
    "Sigmoid": (6, {}),
    "Tanh": (6, {}),
    "LeakyRelu": (6, {"alpha": 0.2}),
    "HardSwish": (14, {}),
    "HardSigmoid": (6, {"alpha": 0.3, "beta": 0.4}),
    "Elu": (6, {"alpha": 0.7}),
    "Selu": (6, {"alpha": 1.5, "gamma": 1.1}),
    "Celu": (12, {"alpha": 1.3}),
    "ThresholdedRelu": (10, {"alpha": 0.3}),
    "Softplus": (1, {}),
    "Softsign": (1, {}),
    "Mish": (18, {}),
    "Gelu": (20, {}),
    "Erf": (9, {}),
    "Abs": (6, {}),
    "Neg": (6, {}),
    "Identity": (1, {}),
    "Sin": (7, {}),
    "Cos": (7, {}),
    "Atan": (7, {}),
}
_PLAIN_ACTIVATIONS: Final = frozenset(("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Abs", "Neg"))


def activation(b: Builder, x: Value | None = None) -> Any:
    x = x or b.pick()
    op = b.choose(*(name for name, (since, _) in _ACTIVATIONS.items() if since <= b.opset))
    attributes = _ACTIVATIONS[op][1]
    if op not in _PLAIN_ACTIVATIONS and b.choose(False, True):
        attributes = {}
    return b.node(op, [x], x.dims, **attributes)


def bounded(b: Builder, x: Value) -> Value:
    """Into about -1..1, so that products of activations stay moderate."""
    op = b.choose("Tanh", "Sigmoid", "Softmax", "Clip", "HardSigmoid")
    if op == "Clip":
        y = b.node(op, [x, b.scalar(-1.0), b.scalar(1.0)], x.dims)
    else:
        y = b.node(op, [x], x.dims, **({"axis": x.rank - 1} if op == "Softmax" else {}))
    result: Value = y
    return result


def clip(b: Builder) -> Any:
    x = b.pick()
    low, high = b.choose((0.0, 6.0), (-0.5, 0.5), (None, 0.8), (-0.8, None))
    ends = [b.scalar(end) if end is not None else "" for end in (low, high)]
    return b.node("Clip", [x, *ends], x.dims)


def prelu(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    shape = b.choose((x.dims[0], *(1 for _ in x.dims[1:])), (1,))
    return b.node("PRelu", [x, b.initializer(b.numbers(*shape, low=0.0))], x.dims)


def positive_function(b: Builder) -> Any:
    """What is defined for positive numbers only, or grows fast."""
    x = bounded(b, b.pick())
    op = b.choose("Exp", "Log", "Sqrt", "Reciprocal", "Pow")
    if op == "Exp":
        return b.node(op, [x], x.dims)
    if op == "Pow":
        return b.node(op, [x, b.scalar(b.choose(2.0, 3.0))], x.dims)
    return b.node(op, [b.node("Add", [x, b.scalar(1.5)], x.dims)], x.dims)


def with_constant(b: Builder) -> Any:
    x = b.pick()
    op = b.choose("Add", "Mul", "Sub", "Div", "Min", "Max")
    low, high = (0.5, 1.5) if op in ("Mul", "Div") else (-1.0, 1.0)
    shape = b.choose(
        (),
        (x.dims[0] if x.dims else 1, *(1 for _ in x.dims[1:])),
        x.dims[-1:],
        x.dims,
        (1, *x.dims),
    )
    constant = b.constant(b.numbers(*shape, low=low, high=high))
    swapped = op != "Div" and b.choose(False, True)
    return b.node(op, [constant, x] if swapped else [x, constant], x.dims)


def of_two(b: Builder) -> Any:
    x = b.pick()
    y = b.choose(
        lambda: next(v for v in b.values if v.dims == x.dims),
        lambda: Value(b.feed(TensorProto.FLOAT, *x.dims), x.dims),
        lambda: activation(b, x),
    )()
    op = b.choose("Add", "Mul", "Sub", "Div", "Min", "Max", "Sum", "Mean", "gate")
    if op == "Mul":
        y = bounded(b, y)
    elif op == "Div":
        y = b.node("Add", [b.node("Abs", [y], y.dims), b.scalar(1.0)], y.dims)
    elif op == "gate":
        op, y = "Mul", bounded(b, _reduced(b, y))
    operands = [y, x] if op != "Div" and b.choose(False, True) else [x, y]
    return b.node(op, operands, x.dims)


def sum_of_some(b: Builder) -> Any:
    x = b.pick()
    others = [v for v in b.values if v.dims == x.dims]
    operands = [b.choose(*others) for _ in range(b.whole(1, 3))]
    return b.node(b.choose("Sum", "Mean", "Max", "Min"), operands, x.dims)


def where(b: Builder) -> Any:
    x = b.pick()
    y = activation(b, x)
    if b.choose(False, True):
        mask = b.constant(b.numbers(*x.dims) > 0)
    else:
        other = b.feed(TensorProto.FLOAT, *x.dims)
        mask = b.node("Greater", [other, b.scalar(0.1)], ()).name
    return b.node("Where", [mask, x, y], x.dims)


def cast(b: Builder) -> Any:
    x = b.pick()
    y = b.node("Cast", [x], x.dims, to=TensorProto.DOUBLE)
    return b.node("Cast", [y], x.dims, to=TensorProto.FLOAT)


def dropout(b: Builder) -> Any:
    x = b.pick()
    if b.opset < 12:
        return b.node("Dropout", [x], x.dims, ratio=0.4)
    return b.node("Dropout", [x, *b.choose([], [b.scalar(0.4)])], x.dims)


def cumsum(b: Builder) -> Any:
    x = b.pick(2, 3)
    axis = b.constant(np.array(b.whole(1, x.rank - 1)))
    return b.node("CumSum", [x, axis], x.dims, exclusive=b.choose(0, 1))


# --- reductions, pools, normalisations -----------------------------------------------------


def _reduced(b: Builder, x: Value) -> Value:
    """The mean over the last axis, kept."""
    if not x.dims:
        return x
    inputs, attributes = b.axes(18, -1)
    dims = (*x.dims[:-1], 1)
    result: Value = b.node("ReduceMean", [x, *inputs], dims, keepdims=1, **attributes)
    return result


def reduce_(b: Builder) -> Any:
    x = b.pick(2, 3, 4, 5)
    op = b.choose(
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceSumSquare",
        "ReduceProd",
    )
    if op in ("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"):
        x = b.node("Add", [bounded(b, x), b.scalar(1.5)], x.dims)
    elif op == "ReduceProd":
        x = b.node("Add", [b.node("Sigmoid", [x], x.dims), b.scalar(0.5)], x.dims)
    first = b.whole(1, x.rank - 1)
    last = first if op == "ReduceProd" else b.whole(first, x.rank - 1)
    keep = b.choose(1, 0)
    chosen = [axis - b.choose(0, x.rank) for axis in range(first, last + 1)]
    inputs, attributes = b.axes(13 if op == "ReduceSum" else 18, *chosen)
    middle = (1,) * (last - first + 1) if keep else ()
    dims = (*x.dims[: first - 1], *middle, *x.dims[last:])
    return b.node(op, [x, *inputs], dims, keepdims=keep, **attributes)


def softmax(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    op = b.choose("Softmax", "LogSoftmax")
    axis = b.choose(None, *range(1, x.rank), -1)
    return b.node(op, [x], x.dims, **({} if axis is None else {"axis": axis}))


def pool(b: Builder) -> Any:
    x = b.pick(*b.choose((4,), (3,), (5,)))
    spatial = x.dims[1:]
    op = b.choose("MaxPool", "AveragePool")
    kernel = [b.whole(1, min(3, size)) for size in spatial]
    strides = [b.whole(1, 2) for _ in spatial]
    more: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    form = b.choose("none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "ceil")
    pads = [b.whole(0, size - 1) for size in (*kernel, *kernel)] if form == "pads" else None
    if pads is not None:
        more["pads"] = pads
        if op == "AveragePool":
            more["count_include_pad"] = b.choose(0, 1)
    elif form == "ceil":
        more["ceil_mode"] = 1
        kernel[:] = strides[:] = [min(2, size) for size in spatial]
    elif form != "none":
        more["auto_pad"] = form
    sizes = _windows(spatial, kernel, strides, [1] * len(spatial), form, pads)
    return b.node(op, [x], (x.dims[0], *sizes), **more)


def _windows(
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    form: str,
    pads: Sequence[int] | None,
) -> list[int]:
    """Output sizes of a convolution or pool."""
    count = len(spatial)
    total = [sum(pads[i::count]) if pads is not None else 0 for i in range(count)]
    sizes = []
    for size, k, stride, dilation, extra in zip(
        spatial, kernel, strides, dilations, total, strict=True
    ):
        if form in ("SAME_UPPER", "SAME_LOWER"):
            sizes.append(-(-size // stride))
            continue
        room = size + extra - (dilation * (k - 1) + 1)
        sizes.append((-(-room // stride) if form == "ceil" else room // stride) + 1)
    return sizes


def global_pool(b: Builder) -> Any:
    x = b.pick(*b.choose((4,), (3,), (5,)))
    op = b.choose("GlobalAveragePool", "GlobalMaxPool")
    return b.node(op, [x], (x.dims[0], *(1 for _ in x.dims[1:])))


def batch_normalization(b: Builder, x: Value | None = None) -> Any:
    x = x or b.pick(4, 2, 3, 5)
    channels = x.dims[0]
    positive = {"low": 0.5, "high": 1.5}
    numbers = [
        b.numbers(channels, **positive),
        b.numbers(channels),
        b.numbers(channels),
        b.numbers(channels, **positive),
    ]
    operands = [b.constant(array) for array in numbers]
    return b.node("BatchNormalization", [x, *operands], x.dims, epsilon=1e-3)


def normalization(b: Builder) -> Any:
    op = b.choose(
        "LayerNormalization",
        "InstanceNormalization",
        "LpNormalization",
        *(["GroupNormalization"] if b.opset == 21 else []),
    )
    if op == "LpNormalization":
        x = b.pick(2, 3)
        positive = b.node("Add", [bounded(b, x), b.scalar(1.5)], x.dims)
        return b.node(op, [positive], x.dims, axis=x.rank - 1, p=b.choose(2, 1))
    if op == "GroupNormalization":
        x = b.pick(4, 3)
        groups = b.choose(*(g for g in range(1, x.dims[0] + 1) if x.dims[0] % g == 0))
        scale, bias = (b.initializer(b.numbers(x.dims[0])) for _ in range(2))
        return b.node(op, [x, scale, bias], x.dims, num_groups=groups, epsilon=1e-2)
    if op == "InstanceNormalization" or b.opset < 17:
        x = b.pick(4, 3)
        scale, bias = (b.initializer(b.numbers(x.dims[0])) for _ in range(2))
        return b.node("InstanceNormalization", [x, scale, bias], x.dims, epsilon=1e-2)
    x = b.pick(2, 3, 4)
    operands = [b.initializer(b.numbers(x.dims[-1])) for _ in range(b.choose(2, 1))]
    return b.node(op, [x, *operands], x.dims, axis=b.choose(-1, x.rank - 1), epsilon=1e-2)


def resize(b: Builder) -> Any:
    x = b.pick(4)
    channels, height, width = x.dims
    if x.size > _LARGEST // 4:
        return activation(b, x)
    mode, coordinates = b.choose(
        ("nearest", "asymmetric"), ("linear", "half_pixel"), ("linear", "align_corners")
    )
    more = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        more["nearest_mode"] = "floor"
    roi = b.initializer(np.zeros(0, np.float32))
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    return b.node("Resize", [x, roi, scales], (channels, 2 * height, 2 * width), **more)


# --- layers --------------------------------------------------------------------------------


def _bias(b: Builder, channels: int) -> list[str]:
    return b.choose([b.initializer(b.numbers(channels))], [])  # type: ignore[no-any-return]


def _followed(b: Builder, y: Value) -> Any:
    """Often by batch normalization, as layers are."""
    return batch_normalization(b, y) if b.choose(False, False, True) else y


def conv(b: Builder) -> Any:
    x = b.pick(*b.choose((4,), (3,), (5,)))
    channels, *spatial = x.dims
    group = b.choose(*(g for g in range(1, channels + 1) if channels % g == 0))
    kernel = [b.whole(1, min(3, size)) for size in spatial]
    strides = [b.whole(1, 2) for _ in spatial]
    form = b.choose("none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID")
    dilations = [1] * len(spatial)
    if not form.startswith("SAME"):
        dilations = [
            b.choose(1, 2) if 2 * (k - 1) < size else 1
            for k, size in zip(kernel, spatial, strict=True)
        ]
    pads = [b.whole(0, 2) for _ in range(2 * len(spatial))] if form == "pads" else None
    sizes = _windows(spatial, kernel, strides, dilations, form, pads)
    most = max(1, min(3, _LARGEST // math.prod(sizes) // group))
    out = group * b.whole(1, most)
    more: dict[str, Any] = {"group": group, "strides": strides, "dilations": dilations}
    if pads is not None:
        more["pads"] = pads
    elif form != "none":
        more["auto_pad"] = form
    if b.choose(True, False):
        more["kernel_shape"] = kernel
    fan_in = channels // group * math.prod(kernel)
    w = b.weight(out, channels // group, *kernel, fan_in=fan_in)
    return _followed(b, b.node("Conv", [x, w, *_bias(b, out)], (out, *sizes), **more))


def conv_transpose(b: Builder) -> Any:
    x = b.pick(*b.choose((4,), (3,), (5,)))
    channels, *spatial = x.dims
    group = b.choose(*(g for g in range(1, channels + 1) if channels % g == 0))
    strides = [b.whole(1, 2) for _ in spatial]
    kernel = [b.whole(1, 3) for _ in spatial]
    extra = [b.whole(0, stride - 1) for stride in strides]
    form = b.choose("none", "pads", "VALID", "SAME_UPPER", "SAME_LOWER")
    more: dict[str, Any] = {"group": group, "strides": strides}
    sizes = [
        (size - 1) * stride + k + e
        for size, stride, k, e in zip(spatial, strides, kernel, extra, strict=True)
    ]
    if form == "pads":
        pads = [b.whole(0, min(1, (size - 1) // 2)) for size in (*sizes, *sizes)]
        sizes = [size - sum(pads[i :: len(sizes)]) for i, size in enumerate(sizes)]
        more["pads"] = pads
    elif form.startswith("SAME"):
        if any(k < stride for k, stride in zip(kernel, strides, strict=True)):
            return activation(b, x)
        extra = [0] * len(spatial)
        sizes = [size * stride for size, stride in zip(spatial, strides, strict=True)]
        more["auto_pad"] = form
    elif form == "VALID":
        more["auto_pad"] = form
    if any(extra):
        more["output_padding"] = extra
    out = group * b.whole(1, max(1, min(2, _LARGEST // math.prod(sizes) // group)))
    w = b.weight(channels, out // group, *kernel, fan_in=channels // group * 2)
    y = b.node("ConvTranspose", [x, w, *_bias(b, out)], (out, *sizes), **more)
    return _followed(b, y)


def gemm(b: Builder) -> Any:
    x = b.pick(2)
    (inner,) = x.dims
    out = b.whole(1, 5)
    more: dict[str, Any] = {}
    if b.choose(False, True):
        more = {"alpha": b.choose(0.5, -1.5), "beta": b.choose(1.0, 2.0)}
    if b.choose("right", "right", "left") == "left":
        shape, flag = b.choose(((out, inner), 0), ((inner, out), 1))
        w = b.weight(*shape, fan_in=inner)
        transposed = b.node("Transpose", [x], (), perm=[1, 0])
        y = b.node("Gemm", [w, transposed], (), transA=flag, **more)
        return b.node("Transpose", [y], (out,), perm=[1, 0])
    shape, flag = b.choose(((out, inner), 1), ((inner, out), 0))
    w = b.weight(*shape, fan_in=inner)
    operand = x
    if b.choose(False, False, True):
        more["transA"] = 1
        operand = b.node("Transpose", [x], (), perm=[1, 0])
    bias = b.choose([(out,)], [], [(1, out)], [()], [(1,)])
    terms = [b.initializer(b.numbers(*sizes)) for sizes in bias]
    y = b.node("Gemm", [operand, w, *terms], (out,), transB=flag, **more)
    return _followed(b, y)


def matmul(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    *outer, inner = x.dims
    out = b.whole(1, 5)
    form = b.choose("right", "vector", "left", "stack")
    if form == "left" and x.rank > 2:
        w = b.weight(out, x.dims[-2], fan_in=x.dims[-2])
        return b.node("MatMul", [w, x], (*x.dims[:-2], out, inner))
    if form == "vector":
        return b.node("MatMul", [x, b.weight(inner, fan_in=inner)], outer)
    stack = [b.choose(1, size) for size in x.dims[:-2]] if form == "stack" else []
    w = b.weight(*stack, inner, out, fan_in=inner)
    y = b.node("MatMul", [x, w], (*outer, out))
    if b.choose(False, True):
        y = b.node("Add", [y, b.initializer(b.numbers(out))], y.dims)
    return y if y.rank > 2 else _followed(b, y)


def attention(b: Builder) -> Any:
    x = b.pick(3, 4)
    y = activation(b, x)
    *outer, steps, _ = x.dims
    order = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    turned = b.node("Transpose", [bounded(b, y)], (*outer, x.dims[-1], steps), perm=order)
    scores = b.node("MatMul", [x, turned], (*outer, steps, steps))
    p = b.node("Softmax", [scores], scores.dims, axis=x.rank - 1)
    return b.node("MatMul", [p, x], x.dims)


_WEIGHTED_EINSUMS: Final = {
    2: ("nf,fm->nm", "fm,nf->nm", "ab,cb", "NF,MF->NM"),
    3: ("ntf,fm->ntm", "ntf, mf -> ntm", "ntf,tm->nmf", "...f,fm->...m", "ntf,f->nt"),
    4: ("nchw,cd->ndhw", "bhqd,de->bhqe", "nhtd,hde->nthe", "nchw,chw->n"),
}
_ACTIVATION_EINSUMS: Final = {
    2: ("nf,nf->n",),
    3: ("ntf,nsf->nts", "bij,bjk->bik", "bti,btj->bij"),
    4: ("bhid,bhjd->bhij", "bhij,bhjd->bhid", "bihd,bjhd->bhij"),
}


def einsum(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    weighted = b.choose(True, False)
    equation = b.choose(*(_WEIGHTED_EINSUMS if weighted else _ACTIVATION_EINSUMS)[x.rank])
    left, _, result = equation.replace(" ", "").partition("->")
    first, second = left.split(",")
    if equation.startswith("fm"):
        first, second = second, first
    result = result or "ac"
    named = first.replace("...", "BT"[: x.rank - len(first.replace("...", ""))])
    sizes = dict(zip(named, (0, *x.dims), strict=True))
    for letter in second.replace("...", ""):
        sizes.setdefault(letter, b.whole(1, 4))
    if weighted:
        inner = math.prod(sizes[k] for k in set(second) & set(named) - set(result)) or 1
        w: Value | str = b.weight(*(sizes[letter] for letter in second), fan_in=inner)
    else:
        w = _like(b, x, [sizes[letter] for letter in second][1:])
    named = result.replace("...", named[: x.rank - 1])
    operands = [w, x] if equation.startswith("fm") else [x, w]
    return b.node(
        "Einsum", operands, [sizes[letter] for letter in named[1:]], equation=equation
    )


def _like(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    """A bounded value of other sizes, made from the first numbers of another."""
    flat = b.reshaped(x, 2)
    size = math.prod(dims)
    w = b.weight(flat.size, size, fan_in=flat.size)
    return bounded(b, b.reshape(b.node("MatMul", [flat, w], (size,)), dims))


def embedding(b: Builder) -> Any:
    steps, out = b.whole(1, 4), b.whole(2, 5)
    ids = b.feed(TensorProto.INT64, steps)
    table = b.weight(VOCABULARY, out, fan_in=1)
    return b.node("Gather", [table, ids], (steps, out))


def recurrent(b: Builder) -> Any:
    op, gates = b.choose(("LSTM", 4), ("GRU", 3), ("RNN", 1))
    x = b.pick(3)
    steps, size = x.dims
    hidden = b.whole(1, 3)
    direction = b.choose("forward", "reverse", "bidirectional")
    ways = 2 if direction == "bidirectional" else 1
    w = b.weight(ways, gates * hidden, size, fan_in=size)
    r = b.weight(ways, gates * hidden, hidden, fan_in=hidden)
    bias = b.choose([b.initializer(b.numbers(ways, 2 * gates * hidden))], [])
    more = {"linear_before_reset": b.choose(0, 1)} if op == "GRU" else {}
    turned = b.node("Transpose", [x], (), perm=[1, 0, 2])
    every, last = b.node(
        op, [turned, w, r, *bias], (), (), hidden_size=hidden, direction=direction, **more
    )
    if b.choose(True, False):
        return b.node("Transpose", [every], (steps, ways, hidden), perm=[2, 0, 1, 3])
    return b.node("Transpose", [last], (ways, hidden), perm=[1, 0, 2])


def conditional(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    if b.choose(True, False):
        condition = b.feed(TensorProto.BOOL)
    else:
        condition = b.constant(np.array(b.choose(True, False)))
    graphs = []
    for name in ("then", "else"):
        with b.body() as scope:
            plain = name == "else" and b.choose(False, True)
            y = activation(b, x) if plain else _same_size_layer(b, x)
        info = value_info(y.name, TensorProto.FLOAT, [b.batch or "N", *x.dims])
        graphs.append(helper.make_graph(scope.nodes, name, [], [info], scope.initializers))
    return b.node("If", [condition], x.dims, then_branch=graphs[0], else_branch=graphs[1])


def loop(b: Builder) -> Any:
    x = b.pick(2, 3, 4)
    sizes = [b.batch or "N", *x.dims]
    trips, go = b.initializer(np.array(2)), b.initializer(np.array(True))
    count, state = b.fresh(), Value(b.fresh(), x.dims)
    with b.body() as scope:
        goes_on = b.node("Identity", [go], ())
        y = bounded(b, _same_size_layer(b, state))
    inputs = [
        value_info(count, TensorProto.INT64, []),
        value_info(f"{count}.go", TensorProto.BOOL, []),
        value_info(state.name, TensorProto.FLOAT, sizes),
    ]
    outputs = [
        value_info(goes_on.name, TensorProto.BOOL, []),
        value_info(y.name, TensorProto.FLOAT, sizes),
    ]
    body = helper.make_graph(scope.nodes, "body", inputs, outputs, scope.initializers)
    return b.node("Loop", [trips, go, x], x.dims, body=body)


def _same_size_layer(b: Builder, x: Value) -> Value:
    inner = x.dims[-1]
    if x.rank == 4:
        w = b.weight(x.dims[0], x.dims[0], 1, 1, fan_in=x.dims[0])
        y = b.node("Conv", [x, w], x.dims)
        y = batch_normalization(b, y) if b.choose(False, True) else y
    elif x.rank == 2:
        w = b.weight(inner, inner, fan_in=inner)
        y = b.node("Gemm", [x, w, *_bias(b, inner)], x.dims, transB=1)
    else:
        y = b.node("MatMul", [x, b.weight(inner, inner, fan_in=inner)], x.dims)
    result: Value = activation(b, y) if b.choose(False, True) else y
    return result


# --- models --------------------------------------------------------------------------------

_LAYERS: Final[tuple[Operation, ...]] = (
    conv,
    gemm,
    matmul,
    conv_transpose,
    attention,
    einsum,
    embedding,
    recurrent,
    conditional,
    loop,
)
_OTHERS: Final[tuple[Operation, ...]] = (
    activation,
    with_constant,
    of_two,
    clip,
    reshape,
    transpose,
    flatten,
    batch_normalization,
    pool,
    global_pool,
    reduce_,
    softmax,
    concat,
    split,
    slice_,
    pad,
    gather,
    normalization,
    prelu,
    positive_function,
    sum_of_some,
    where,
    cast,
    dropout,
    cumsum,
    tile,
    expand,
    unsqueeze_and_squeeze,
    depth_and_space,
    resize,
)
_SINCE: Final[dict[Operation, int]] = {einsum: 12}
_FIRST_SIZES: Final = {2: (6,), 3: (3, 6), 4: (4, 5, 6), 5: (2, 3, 4, 3)}


@st.composite
def fuzz_models(draw: st.DrawFn) -> FuzzModel:
    """Models with at least one operator that looks like a layer."""
    b = Builder(draw)
    most = _FIRST_SIZES[b.choose(4, 2, 3, 5)]
    dims = tuple(b.whole(2, size) for size in most)
    b.values.append(Value(b.feed(TensorProto.FLOAT, *dims), dims))
    layers = [layer for layer in _LAYERS if _SINCE.get(layer, 0) <= b.opset]
    for position in range(b.whole(1, _MOST_OPERATORS)):
        kind = layers if position == 0 or b.choose(True, False, False) else _OTHERS
        made = b.choose(*kind)(b)
        b.values += made if isinstance(made, list) else [made]
    computed = [v for v in b.values if not v.name.startswith("x")]
    outputs = {computed[-1].name: computed[-1]}
    for _ in range(b.whole(0, 2)):
        value = b.choose(*computed)
        outputs[value.name] = value
    return b.finish(list(outputs.values()))
