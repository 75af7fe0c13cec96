"""Say at once what cannot be quantized, instead of failing halfway."""

import re
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.errors import ModelError, UnsupportedError
from onnx_fliqs.passes._graph import all_nodes, constant_of, label

__all__ = ["refuse_bad_numbers", "refuse_quantized", "refuse_training_mode"]

_QUANTIZED: Final = re.compile(
    r".*QuantizeLinear|QLinear\w+|QOrdered\w+|DynamicQuantize\w+|ConvInteger\w*"
    r"|MatMulInteger\w*|MatMulNBits|MatMulBnb4|MatMulFpQ4|QGemm|QMoE|QAttention"
    r"|QEmbedLayerNormalization|GatherBlockQuantized"
)
_QUANTIZED_IN_DOMAIN: Final = re.compile(r"(Int|Float|Bipolar)?Quant|Trunc")
_QUANTIZED_DOMAINS: Final = ("qonnx", "onnx.brevitas", "finn")
# An infinity in a mask or a bound is an honest number; in a weight it never is.
_WEIGHTED: Final = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LSTM", "GRU", "RNN")
)
_CHECKED_TYPES: Final = frozenset(
    (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
)


def refuse_quantized(model: ir.Model) -> None:
    """Raise if any node, in any graph or function, works on quantized numbers.

    Raises:
        UnsupportedError: Such a node exists.
    """
    for node in all_nodes(model):
        foreign = node.domain.startswith(_QUANTIZED_DOMAINS)
        if _QUANTIZED.fullmatch(node.op_type) or (
            foreign and _QUANTIZED_IN_DOMAIN.fullmatch(node.op_type)
        ):
            raise UnsupportedError(
                f"the model is already quantized (first such node: {label(node)}); give the"
                " float model that it was made from"
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
