"""What the quantizers of QONNX do to numbers, in all their forms."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of

__all__ = ["activation_ends", "is_qonnx", "quantized_by"]

_Array: TypeAlias = npt.NDArray[Any]

_DOMAINS: Final = ("qonnx", "onnx.brevitas", "finn")
_QUANTIZERS: Final = ("Quant", "IntQuant", "FloatQuant", "BipolarQuant", "Trunc")
_ROUNDINGS: Final[Mapping[str, Callable[[_Array], _Array]]] = {
    "ROUND": np.rint,
    "HALF_EVEN": np.rint,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": lambda x: np.sign(x) * np.ceil(np.abs(x)),
    "DOWN": np.trunc,
    "HALF_UP": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
    "HALF_DOWN": lambda x: np.sign(x) * np.ceil(np.abs(x) - 0.5),
}


def is_qonnx(domain: str, op_type: str) -> bool:
    """Whether an operator is a quantizer of QONNX, by any name of its domain."""
    return domain.startswith(_DOMAINS) and op_type in _QUANTIZERS


def quantized_by(node: ir.Node) -> _Array | None:
    """What a quantizer makes of a constant; None if something is not constant or not known."""
    arrays = [constant_of(value) for value in node.inputs]
    rounding = _ROUNDINGS.get(node.attributes.get_string("rounding_mode", "ROUND").upper())
    if any(array is None for array in arrays) or rounding is None:
        return None
    # As QONNX does; only the widths go beyond float32 on their way.
    x, scale = (np.asarray(array, np.float32) for array in arrays[:2])
    parameters = [np.asarray(array, np.float64) for array in arrays[2:]]
    if node.op_type == "BipolarQuant":
        numbers = np.where(x >= 0, scale, -scale)
    elif node.op_type == "FloatQuant":
        numbers = _minifloats(x / scale, rounding, *parameters) * scale
    elif node.op_type in ("Quant", "IntQuant"):
        zero, bits = parameters
        codes = x / scale + zero
        if _is_bipolar(node, bits):
            codes = np.where(codes >= 0, 1.0, -1.0)
        else:
            codes = rounding(np.clip(codes, *_ends(node, bits)))
        numbers = (codes - zero) * scale
    else:
        return None
    return numbers.astype(np.float32)


def _is_bipolar(node: ir.Node, bits: _Array) -> bool:
    """Whether the codes are -1 and 1, as Brevitas exports one signed bit."""
    return bool(np.all(bits == 1)) and _flag(node, "signed") == 1


def _flag(node: ir.Node, name: str) -> int:
    return node.attributes.get_int(name, {"signed": 1, "narrow": 0}[name])


def _ends(node: ir.Node, bits: _Array) -> tuple[_Array, _Array]:
    """The smallest and the largest code."""
    signed, narrow = _flag(node, "signed"), _flag(node, "narrow")
    count = np.exp2(bits - signed)
    return signed * (narrow - count), count - 1 - narrow * (1 - signed)


def _minifloats(
    x: _Array,
    rounding: Callable[[_Array], _Array],
    exponent: _Array,
    mantissa: _Array,
    bias: _Array,
    largest: _Array,
) -> _Array:
    step = np.exp2(np.maximum(np.frexp(x)[1] - 1, 1 - bias) - mantissa)
    top = np.exp2(exponent) - 1 - bias
    end = np.minimum((2 - np.exp2(-mantissa)) * np.exp2(top), largest)
    result: _Array = np.clip(rounding(x / step) * step, -end, end)
    return result


def activation_ends(node: ir.Node) -> tuple[float, float] | None:
    """Between which numbers a quantizer of activations gives its results.

    Both are infinite where they are not known to be the same for all channels. None for
    quantizers of one bit, and of accumulators: no float operator is like them.
    """
    if node.op_type == "FloatQuant":
        return -np.inf, np.inf
    if node.op_type not in ("Quant", "IntQuant"):
        return None
    scale, zero, bits = (constant_of(value) for value in node.inputs[1:4])
    if bits is None or _is_bipolar(node, bits):
        return None
    if scale is None or zero is None or max(scale.size, zero.size, bits.size) > 1:
        return -np.inf, np.inf
    low, high = ((end - zero) * scale for end in _ends(node, bits))
    return float(low.item()), float(high.item())
