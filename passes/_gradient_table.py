"""For every operator of ONNX: where its gradient comes from, or why it has none."""

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes import (
    _gradient_elementwise,
    _gradient_normalizations,
    _gradient_products,
    _gradient_recurrent,
    _gradient_reductions,
    _gradient_sampling,
    _gradient_selections,
    _gradient_signals,
    _gradient_windows,
)
from onnx_fliqs.passes._gradient_rule import Formula, Lowering

__all__ = ["FORMULAS", "LOWERINGS", "NOT_DIFFERENTIABLE", "why_not_differentiable"]

FORMULAS: Final[Mapping[str, Formula]] = {
    **_gradient_elementwise.FORMULAS,
    **_gradient_products.FORMULAS,
    **_gradient_reductions.FORMULAS,
    **_gradient_sampling.FORMULAS,
    **_gradient_selections.FORMULAS,
    **_gradient_signals.FORMULAS,
    **_gradient_windows.FORMULAS,
}
"""Operators of ONNX whose gradient is defined here."""

LOWERINGS: Final[Mapping[str, Lowering]] = {
    **_gradient_elementwise.LOWERINGS,
    **_gradient_normalizations.LOWERINGS,
    **_gradient_products.LOWERINGS,
    **_gradient_recurrent.LOWERINGS,
    **_gradient_sampling.LOWERINGS,
    **_gradient_selections.LOWERINGS,
    **_gradient_signals.LOWERINGS,
    **_gradient_windows.LOWERINGS,
}
"""Operators of ONNX that are replaced by others; those that also have a formula here, or that
ONNX Runtime knows, are replaced where that does not cover them."""

_REASONS: Final = {
    "its derivative is zero": "Bernoulli Ceil EyeLike Floor Hardmax Round Sign",
    "its result is true or false": """
        And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not OptionalHasElement Or
        RegexFullMatch Xor""",
    "its result is an integer": """
        ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor ConvInteger
        MatMulInteger Multinomial NonMaxSuppression NonZero QLinearConv QLinearMatMul
        QuantizeLinear DynamicQuantizeLinear SequenceLength Shape Size""",
    "its operand is an integer": """
        BlackmanWindow ConstantOfShape DequantizeLinear HammingWindow HannWindow
        MelWeightMatrix""",
    "it computes from nothing": "Constant RandomNormal RandomUniform",
    "its result does not depend on its operand": "RandomNormalLike RandomUniformLike",
    "it is control flow": "If Loop Scan SequenceMap",
    "it works on sequences": """
        ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase
        SequenceInsert SplitToSequence""",
    "it works on optional values": "Optional OptionalGetElement",
    "it works on text": "StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    "it decodes an image": "ImageDecoder",
    "ONNX Runtime 1.19.2 cannot compute it": "DeformConv",
    "ONNX Runtime has no cell that trains": "RNN",
    "it normalizes by the batch": "BatchNormalization",
    "it drops at random": "Dropout",
}
NOT_DIFFERENTIABLE: Final[Mapping[str, str]] = {
    op_type: reason for reason, names in _REASONS.items() for op_type in names.split()
}
"""Operators of ONNX without a gradient, and why."""


def why_not_differentiable(node: ir.Node) -> str:
    """The reason for which an operator has no gradient, whatever its operands."""
    if node.domain:
        return f"it is an operator of {node.domain}"
    if node.op_type == "Cast":
        return "it rounds to integers"
    return NOT_DIFFERENTIABLE.get(node.op_type, "ONNX Runtime has no gradient of it")
