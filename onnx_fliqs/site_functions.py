"""The searchable site as model-local ONNX functions, with their straight-through gradients.

``SearchQDQ`` quantizes to any format of :mod:`onnx_fliqs.formats`; ``SearchIntQDQ`` leaves out
the rounding to a mantissa, which spaces of integers (and float32) do not need;
``SearchByteQDQ`` is for integers of at most 8 bits with one scale, and the fastest;
``SearchPositiveQDQ`` is ``SearchQDQ`` for values that are never negative, with one scale. They
read numbers of a :class:`~onnx_fliqs.formats.GridCode` as scalar inputs. The gradient passes
where the value lay inside the clipping range and is zero outside (Bengio et al. 2013; the
range mask as in PACT, Choi et al. 2018).
"""

import json
from typing import Any, Final

import onnx_ir as ir
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

__all__ = [
    "ANY_CODES",
    "ANY_SITE",
    "BYTE_CODES",
    "BYTE_SITE",
    "DOMAIN",
    "GRADIENT_KEY",
    "INNER_PRODUCT",
    "INTEGER_CODES",
    "INTEGER_SITE",
    "POSITIVE_SITE",
    "SITES",
    "STRAIGHT_THROUGH",
    "inner_product",
    "site_function",
    "site_gradients",
]

DOMAIN: Final = "onnx_fliqs"
GRADIENT_KEY: Final = "onnx_fliqs.gradient"
"""Metadata key of a function: the call that computes its gradient, as JSON. Its inputs and
outputs are in ONNX Runtime's notation: ``GO(0)`` is the gradient of the first output, ``I(0)``
the first input, ``O(0)`` the first output, ``GI(0)`` the gradient of the first input."""
ANY_SITE: Final = "SearchQDQ"
INTEGER_SITE: Final = "SearchIntQDQ"
BYTE_SITE: Final = "SearchByteQDQ"
POSITIVE_SITE: Final = "SearchPositiveQDQ"
SITES: Final = (ANY_SITE, INTEGER_SITE, BYTE_SITE, POSITIVE_SITE)
"""All sites."""
STRAIGHT_THROUGH: Final = ("StraightThrough", "PositiveStraightThrough")
"""Their gradients, which read the gradient of what is quantized before the site's inputs."""
INNER_PRODUCT: Final = "InnerProduct"
"""The sum of the products of two tensors, whatever the order of their numbers; [1, 1]."""
ANY_CODES: Final = ("lo", "hi", "factor", "least")
"""Fields of GridCode that ``SearchQDQ`` reads after the value and its scale, in order; those
of ``SearchPositiveQDQ`` are the same."""
INTEGER_CODES: Final = ("lo", "hi", "least")
"""Likewise for ``SearchIntQDQ``."""
BYTE_CODES: Final = ("lo", "hi")
"""Likewise for ``SearchByteQDQ``."""

_domain = Opset(DOMAIN, 1)

# onnxscript reads the source of these functions: they are ONNX, written in Python's syntax.


@script(_domain, default_opset=op)
def SearchQDQ(x, scale, lo, hi, factor, least):  # type: ignore[no-untyped-def]  # noqa: N802
    t = op.Clip(op.Div(x, scale), lo, hi)
    size = op.Abs(t)
    # Clip takes two thirds of the time of Max.
    anchor = op.Clip(op.Mul(size, factor), least)
    rounded = op.Sub(anchor, op.Sub(anchor, size))
    # Sign would take eight times as long as a multiplication, and Where forty times. What is
    # below 1e-32 becomes still smaller.
    large = op.Mul(t, op.Constant(value_float=1e32))
    sign = op.Clip(large, op.Constant(value_float=-1.0), op.Constant(value_float=1.0))
    return op.Mul(op.Mul(rounded, scale), sign)


@script(_domain, default_opset=op)
def SearchPositiveQDQ(x, scale, lo, hi, factor, least):  # type: ignore[no-untyped-def]  # noqa: N802
    t = op.Clip(op.Div(x, scale), lo, hi)
    anchor = op.Clip(op.Mul(t, factor), least)
    return op.Mul(op.Sub(anchor, op.Sub(anchor, t)), scale)


@script(_domain, default_opset=op)
def SearchIntQDQ(x, scale, lo, hi, least):  # type: ignore[no-untyped-def]  # noqa: N802
    t = op.Clip(op.Div(x, scale), lo, hi)
    return op.Mul(op.Sub(op.Add(t, least), least), scale)


@script(_domain, default_opset=op)
def SearchByteQDQ(x, scale, lo, hi):  # type: ignore[no-untyped-def]  # noqa: N802
    # Vectorized kernels of ONNX Runtime; the numbers -128 to 127 become the codes 0 to 255.
    zero_point = op.Cast(op.Neg(lo), to=2)
    inside = op.Clip(x, op.Mul(lo, scale), op.Mul(hi, scale))
    codes = op.QuantizeLinear(inside, scale, zero_point)  # type: ignore[type-var]
    return op.DequantizeLinear(codes, scale, zero_point)  # type: ignore[type-var]


# What the gradients need, they compute again from x, which is kept anyway: intermediate values
# of the sites would be many times the memory. The bounds are wider by a few roundings, so that
# the largest value of a tensor, from which its scale was taken, counts as inside.


@script(_domain, default_opset=op)
def StraightThrough(dy, x, scale, lo, hi):  # type: ignore[no-untyped-def]  # noqa: N802
    unit = op.Mul(scale, op.Constant(value_float=1.000001))
    above = op.GreaterOrEqual(x, op.Mul(unit, lo))
    inside = op.And(above, op.LessOrEqual(x, op.Mul(unit, hi)))
    # A product takes a third of the time that Where would take.
    return op.Mul(dy, op.Cast(inside, to=1))


@script(_domain, default_opset=op)
def PositiveStraightThrough(dy, x, scale, lo, hi):  # type: ignore[no-untyped-def]  # noqa: N802
    unit = op.Mul(scale, op.Constant(value_float=1.000001))
    return op.Mul(dy, op.Cast(op.LessOrEqual(x, op.Mul(unit, hi)), to=1))


@script(_domain, default_opset=op)
def InnerProduct(x, y):  # type: ignore[no-untyped-def]  # noqa: N802
    row = op.Constant(value_ints=[1, -1])
    # Reads as fast as memory allows. MatMul with a column takes ten times as long; ReduceSum
    # of the product writes as much as it reads.
    return op.Gemm(op.Reshape(x, row), op.Reshape(y, row), transB=1)  # type: ignore[arg-type]


_SITES: Final = {
    ANY_SITE: (SearchQDQ, StraightThrough),
    POSITIVE_SITE: (SearchPositiveQDQ, PositiveStraightThrough),
    INTEGER_SITE: (SearchIntQDQ, StraightThrough),
    BYTE_SITE: (SearchByteQDQ, StraightThrough),
}


def _to_ir(function: Any) -> ir.Function:
    result: ir.Function = ir.from_proto(function.to_function_proto())
    for index, node in enumerate(result):
        # As which profiles list it, once it is inlined.
        node.name = f"{result.name}/{node.op_type}_{index}"
    return result


def site_function(name: str) -> ir.Function:
    """The function of one of the sites, to be put into a model."""
    site, gradient = _SITES[name]
    function = _to_ir(site)
    call = {
        "function": gradient.name,
        "inputs": ["GO(0)", *(f"I({index})" for index in range(4))],
        "outputs": ["GI(0)"],
    }
    function.metadata_props[GRADIENT_KEY] = json.dumps(call)
    return function


def site_gradients() -> list[ir.Function]:
    """The functions that the gradients of the sites call."""
    return [_to_ir(gradient) for gradient in (StraightThrough, PositiveStraightThrough)]


def inner_product() -> ir.Function:
    """The function of :data:`INNER_PRODUCT`, to be put into a model."""
    return _to_ir(InnerProduct)
