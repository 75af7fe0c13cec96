"""Say at once what cannot be quantized, instead of failing halfway."""

import itertools
import re
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.errors import ModelError, UnsupportedError
from onnx_fliqs.passes._graph import all_nodes, constant_of, label
from onnx_fliqs.passes._qonnx_quantizers import is_qonnx

__all__ = [
    "refuse_bad_numbers",
    "refuse_quantized",
    "refuse_reserved_names",
    "refuse_training_mode",
    "refuse_unfeedable",
]

_QUANTIZED: Final = re.compile(
    r".*QuantizeLinear|QLinear\w+|QOrdered\w+|DynamicQuantize\w+|ConvInteger\w*"
    r"|MatMulInteger\w*|MatMulNBits|MatMulBnb4|MatMulFpQ4|QGemm|QMoE|QAttention"
    r"|QEmbedLayerNormalization|GatherBlockQuantized"
)
# An infinity in a mask or a bound is an honest number; in a weight it never is.
_WEIGHTED: Final = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LSTM", "GRU", "RNN")
)
_NOT_IN_NUMPY: Final = frozenset(
    dtype
    for dtype in ir.DataType
    if dtype is ir.DataType.BFLOAT16 or (dtype.is_floating_point() and dtype.bitwidth <= 8)
)
_RESERVED: Final = "onnx_fliqs."
"""How the names begin of what the passes add to a graph."""
_CHECKED_TYPES: Final = frozenset(
    (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
)


def refuse_quantized(model: ir.Model, *, removed: bool = False) -> None:
    """Raise if any node, in any graph or function, works on quantized numbers.

    Args:
        model: Any model.
        removed: Whether what can be removed has been.

    Raises:
        UnsupportedError: Such a node exists.
    """
    for node in all_nodes(model):
        if _QUANTIZED.fullmatch(node.op_type) or is_qonnx(node.domain, node.op_type):
            if removed:
                raise UnsupportedError(
                    f"the quantization of {label(node)} cannot be removed; give the float"
                    " model that this one was made from"
                )
            raise UnsupportedError(
                f"the model is already quantized (first such node: {label(node)}); give the"
                " float model that it was made from, or pass --remove-quantization"
            )


def refuse_unfeedable(model: ir.Model) -> None:
    """Raise if NumPy, and so ONNX Runtime in Python, lacks the type of an input or output.

    Raises:
        UnsupportedError: Such an input or output exists.
    """
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if isinstance(value.type, ir.TensorType) and value.type.dtype in _NOT_IN_NUMPY:
                raise UnsupportedError(
                    f"{kind} {value.name!r} is {value.type.dtype.name}, which ONNX Runtime"
                    " does not exchange with Python; export the model with float32 or float16"
                    " inputs and outputs"
                )


def refuse_reserved_names(model: ir.Model) -> None:
    """Raise if a value has a name such as the passes give to what they add.

    Raises:
        ModelError: Such a value exists.
    """
    for graph in model.graphs():
        made = (value for node in graph for value in node.outputs)
        for value in itertools.chain(graph.inputs, graph.initializers.values(), made):
            if value.name is not None and value.name.startswith(_RESERVED):
                raise ModelError(
                    f"{value.name!r}: names that begin with {_RESERVED!r} are reserved;"
                    " rename the tensor"
                )


def refuse_training_mode(model: ir.Model) -> None:
    """Raise if a normalisation or dropout would behave as in training.

    Raises:
        UnsupportedError: Such a node exists.
    """
    for node in all_nodes(model):
        if node.domain == "" and _trains(node):
            raise UnsupportedError(
                f"{label(node)} is in training mode; export the model in evaluation mode"
            )


def _trains(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        # Before opset 14 the further outputs, not an attribute, meant training.
        further = [value for value in node.outputs[1:] if value.name]
        return bool(further) or node.attributes.get_int("training_mode", 0) != 0
    if node.op_type == "Dropout" and len(node.inputs) > 2:
        training, ratio = constant_of(node.inputs[2]), constant_of(node.inputs[1])
        drops = ratio is None or bool(ratio.any())
        return training is not None and bool(training.any()) and drops
    return False


def refuse_bad_numbers(model: ir.Model) -> None:
    """Raise if an initializer holds NaN anywhere, or a weight holds an infinity.

    Raises:
        ModelError: Such an initializer exists.
    """
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.dtype not in _CHECKED_TYPES:
                continue
            numbers = tensor.numpy()
            if np.isfinite(numbers).all():
                continue
            if np.isnan(numbers).any():
                raise ModelError(f"initializer {name!r} holds NaN")
            if any(user.op_type in _WEIGHTED for user in value.consumers()):
                raise ModelError(f"initializer {name!r} is a weight and holds infinity")
