"""The operators of QONNX as model-local ONNX functions.

QONNX (Pappalardo et al. 2022, the exchange format of Brevitas, FINN and hls4ml) writes a
quantizer as one node with a float result. Its tools know the nodes by name; a file that brings
these definitions along also runs in every ONNX runtime.

Both compute what a searchable site does (:mod:`onnx_fliqs.site_functions`), in the same order:
divide, clip, round to nearest even, multiply. Of QONNX they cover the rounding mode ``ROUND``
and saturation; of ``Quant``, not the one-bit signed case, which has no zero.
"""

from typing import Any, Final

import onnx_ir as ir
from onnxscript import opset12, script
from onnxscript.values import Opset

__all__ = ["FLOAT_QUANT", "OLDEST_OPSET", "QONNX", "QUANT", "qonnx_function"]

QONNX: Final = "qonnx.custom_op.general"
"""The domain. Brevitas also writes ``onnx.brevitas``."""
QUANT: Final = "Quant"
"""Integers. QONNX 1.0 also calls it ``IntQuant``, but FINN and most of QONNX's own
transformations look for the old name only."""
FLOAT_QUANT: Final = "FloatQuant"
"""Minifloats; since QONNX 1.0."""
OLDEST_OPSET: Final = 12
"""The first opset of the standard operators that these definitions can be written in."""

_domain = Opset(QONNX, 1)
# Its own type hints know too few of the types that an operator takes.
op: Any = opset12

# onnxscript reads the source of these functions: they are ONNX, written in Python's syntax.


@script(_domain, default_opset=op)
def Quant(  # type: ignore[no-untyped-def]  # noqa: N802
    x, scale, zeropt, bitwidth, signed: int, narrow: int, rounding_mode: str = "ROUND"
):
    one, two = op.Constant(value_float=1.0), op.Constant(value_float=2.0)
    has_sign = op.Cast(signed, to=1)
    is_narrow = op.Cast(narrow, to=1)
    count = op.Pow(two, op.Sub(op.Cast(bitwidth, to=1), has_sign))
    lo = op.Mul(has_sign, op.Sub(is_narrow, count))
    hi = op.Sub(op.Sub(count, one), op.Mul(is_narrow, op.Sub(one, has_sign)))
    t = op.Max(op.Min(op.Add(op.Div(x, scale), zeropt), hi), lo)
    return op.Mul(op.Sub(op.Round(t), zeropt), scale)


@script(_domain, default_opset=op)
def FloatQuant(  # type: ignore[no-untyped-def]  # noqa: N802
    x,
    scale,
    exponent_bitwidth,
    mantissa_bitwidth,
    exponent_bias,
    max_val,
    has_inf: int,
    has_nan: int,
    has_subnormal: int,
    saturation: int,
    rounding_mode: str = "ROUND",
):
    one, two = op.Constant(value_float=1.0), op.Constant(value_float=2.0)
    top = op.Sub(op.Sub(op.Pow(two, exponent_bitwidth), one), exponent_bias)
    significand = op.Sub(two, op.Pow(two, op.Neg(mantissa_bitwidth)))
    hi = op.Min(op.Mul(significand, op.Pow(two, top)), max_val)
    t = op.Max(op.Min(op.Div(x, scale), hi), op.Neg(hi))
    # To a multiple of the smallest number: 1.5 * 2^23 times that.
    smallest = op.Sub(op.Sub(one, exponent_bias), mantissa_bitwidth)
    wide = op.Pow(two, op.Add(smallest, op.Constant(value_float=23.0)))
    magic = op.Mul(op.Constant(value_float=1.5), wide)
    fixed = op.Sub(op.Add(t, magic), magic)
    # To the mantissa.
    spare = op.Sub(op.Constant(value_float=23.0), mantissa_bitwidth)
    p = op.Mul(t, op.Add(op.Pow(two, spare), one))
    relative = op.Sub(p, op.Sub(p, t))
    threshold = op.Pow(two, op.Sub(one, exponent_bias))
    return op.Mul(op.Where(op.Less(op.Abs(t), threshold), fixed, relative), scale)


def qonnx_function(name: str, opset: int, domain: str = QONNX) -> ir.Function:
    """The definition of a node, to be put into a model.

    Args:
        name: ``Quant``, or ``IntQuant``, which is the same; or ``FloatQuant``.
        opset: The model's opset of the standard operators, ``OLDEST_OPSET`` to 21.
        domain: Another name of the domain.
    """
    definitions: dict[str, Any] = {QUANT: Quant, "IntQuant": Quant, FLOAT_QUANT: FloatQuant}
    function: ir.Function = ir.from_proto(definitions[name].to_function_proto())
    function.name, function.domain = name, domain
    function.opset_imports[""] = opset
    return function
