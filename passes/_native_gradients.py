"""What ONNX Runtime 1.19.2 differentiates by itself, and rightly, on the CPU.

Its gradients were compared with finite differences, operator by operator. Where one is wrong
or cannot be built, the condition that avoids it stands here. Those of Relu and LeakyRelu are
left out: they branch at every element, which takes eight times as long as a multiplication.
That of Clip is left out because it keeps what was clipped, that of Gelu without approximation
because it takes twice the time of its formula.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import input_of
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import known_shape
from onnx_fliqs.site_functions import (
    ANY_SITE,
    BYTE_SITE,
    DOMAIN,
    INTEGER_SITE,
    POSITIVE_SITE,
)

__all__ = ["NATIVE", "native_inputs"]

_FIRST: Final = """
    Abs AveragePool Cast Cos Erf Exp Expand Flatten Gather GatherElements GatherND Gelu
    GlobalAveragePool Identity Log LogSoftmax MaxPool Neg Pad Pow Reciprocal ReduceL2
    ReduceLogSumExp ReduceMean ReduceSum Reshape Sigmoid Sin Slice Softmax
    SoftmaxCrossEntropyLoss Split Sqrt Squeeze Tanh Tile TopK Transpose Trilu Unsqueeze
    """.split()  # noqa: SIM905 - reads as a list
_ALL: Final = ("Add", "Concat", "Conv", "Div", "Gemm", "LayerNormalization", "MatMul")
_ALL_TOO: Final = ("Max", "Min", "Mul", "Sub")

NATIVE: Final[Mapping[tuple[str, str], tuple[int, ...] | None]] = {
    **{("", op_type): (0,) for op_type in _FIRST},
    **{("", op_type): None for op_type in (*_ALL, *_ALL_TOO)},
    **{("", op_type): (0, 2) for op_type in ("ScatterElements", "ScatterND")},
    ("", "Where"): (1, 2),
    ("com.microsoft", "GRUTraining"): (0, 1, 2, 3, 5),
    ("com.microsoft", "LSTMTraining"): (0, 1, 2, 3, 5, 6),
    **{(DOMAIN, site): (0,) for site in (ANY_SITE, POSITIVE_SITE, INTEGER_SITE, BYTE_SITE)},
}
"""(domain, operator) → the inputs that have a gradient; None: all."""

_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_FLAT_KERNEL: Final = 2
_MATRIX: Final = 2


def native_inputs(node: ir.Node) -> tuple[int, ...] | None:
    """The inputs that ONNX Runtime's gradient of a node reaches; None if none is right."""
    key = node.domain, node.op_type
    if key not in NATIVE or not _CONDITIONS.get(node.op_type, _always)(node):
        return None
    indices = NATIVE[key]
    chosen = range(len(node.inputs)) if indices is None else indices
    return tuple(i for i in chosen if input_of(node, i) is not None)


def _always(_node: ir.Node) -> bool:
    return True


def _padding_is_written(node: ir.Node) -> bool:
    # The gradients take SAME_UPPER or SAME_LOWER for no padding, or for the other one.
    return node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _is_plain_average(node: ir.Node) -> bool:
    # The gradient ignores dilations, is wrong in three dimensions, and takes the size of its
    # result from the graph.
    dilations = node.attributes.get_ints("dilations", [])
    flat = len(node.attributes.get_ints("kernel_shape", [])) <= _FLAT_KERNEL
    plain = _padding_is_written(node) and flat and all(each == 1 for each in dilations)
    return plain and _has_numbers(node.inputs[0], 0)


def _has_numbers(value: ir.Value | None, first: int) -> bool:
    """Whether the sizes of a value are numbers, from one axis on."""
    shape = value.shape if value is not None else None
    return shape is not None and all(isinstance(size, int) for size in list(shape)[first:])


def _is_approximate(node: ir.Node) -> bool:
    return node.attributes.get_string("approximate", "none") != "none"


def _casts_to_float(node: ir.Node) -> bool:
    return node.attributes.get_int("to", 0) in _FLOATS


def _has_bias_alone(node: ir.Node) -> bool:
    # The gradient reads a bias, and knows nothing of the statistics as results.
    return input_of(node, 2) is not None and not _reads_more(node)


def _reads_more(node: ir.Node) -> bool:
    """Whether an output beside the first is used."""
    return any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def _is_of_matrices(node: ir.Node) -> bool:
    left, right = (value.shape if value is not None else None for value in node.inputs)
    if right is not None and len(right) == _MATRIX:
        return True
    if left is None or right is None or min(len(left), len(right)) < _MATRIX:
        return False
    return _fit([tuple(left)[:-_MATRIX], tuple(right)[:-_MATRIX]])


def _broadcasts_visibly(node: ir.Node) -> bool:
    # The gradients take sizes of different names for equal, though one of them may be 1.
    return _are_visible(node.inputs)


def _expands_visibly(node: ir.Node) -> bool:
    return _are_visible([node.inputs[0], node.outputs[0]])


def _adds_visibly(node: ir.Node) -> bool:
    addend = input_of(node, 2)
    return addend is None or _are_visible([addend, node.outputs[0]])


def _are_visible(values: Sequence[ir.Value | None]) -> bool:
    shapes = [value.shape for value in values if value is not None]
    return None not in shapes and _fit([tuple(shape) for shape in shapes if shape is not None])


def _fit(shapes: Sequence[Sequence[int | ir.SymbolicDim]]) -> bool:
    """Whether each axis has, where it is not 1, one size, be it a number or a name."""
    for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        longer = {size if isinstance(size, int) else size.value for size in sizes} - {1}
        if len(longer) > 1 or None in longer:
            return False
    return True


def _points_into_known_sizes(node: ir.Node) -> bool:
    # The gradient takes the size of an image from the graph, and dies where that has none.
    by_rows = not node.attributes.get_int("storage_order", 0)
    return by_rows and _has_numbers(node.inputs[0], 1)


def _pads_all_axes_with_constant(node: ir.Node) -> bool:
    fill = input_of(node, 2)
    return (
        node.attributes.get_string("mode", "constant") == "constant"
        and input_of(node, 3) is None
        and (fill is None or constant_of(fill) is not None)
    )


def _has_constant_power(node: ir.Node) -> bool:
    # The gradient wants both of one type, and does not undo the broadcasting of the base.
    base, exponent = node.inputs
    power = constant_of(exponent)
    if base is None or power is None or base.dtype is None:
        return False
    return base.dtype.numpy() == power.dtype and (power.ndim == 0 or _all_of_one_shape(node))


def _all_of_one_shape(node: ir.Node) -> bool:
    """Whether no operand with a gradient is repeated to fill the output."""
    shape = known_shape(node.outputs[0])
    operands = [node.inputs[i] for i in NATIVE[node.domain, node.op_type] or ()]
    return shape is not None and all(
        value is not None and known_shape(value) == shape for value in operands
    )


def _keeps_or_names_axes(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("keepdims", 1)) or input_of(node, 1) is not None


def _overwrites(node: ir.Node) -> bool:
    # The gradient does not look at the reduction.
    return node.attributes.get_string("reduction", "none") == "none"


def _goes_forwards(node: ir.Node) -> bool:
    if input_of(node, 4) is None:
        return True
    steps = constant_of(input_of(node, 4))
    return steps is not None and bool(np.all(np.greater(steps, 0)))


_CONDITIONS: Final[Mapping[str, Callable[[ir.Node], bool]]] = {
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "Sub"), _broadcasts_visibly),
    "AveragePool": _is_plain_average,
    "Cast": _casts_to_float,
    "Conv": _padding_is_written,
    "Expand": _expands_visibly,
    "Gelu": _is_approximate,
    "Gemm": _adds_visibly,
    "LayerNormalization": _has_bias_alone,
    "MatMul": _is_of_matrices,
    "MaxPool": _points_into_known_sizes,
    "Pad": _pads_all_axes_with_constant,
    "Pow": _has_constant_power,
    "ReduceL2": _keeps_or_names_axes,
    "ReduceLogSumExp": _keeps_or_names_axes,
    "ScatterElements": _overwrites,
    "ScatterND": _overwrites,
    "Slice": _goes_forwards,
    "SoftmaxCrossEntropyLoss": lambda node: not _reads_more(node),
    "Where": _all_of_one_shape,
}
