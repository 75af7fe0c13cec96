"""The searchable site as model-local ONNX functions, with their straight-through gradients.

``SearchQDQ`` quantizes to any format of :mod:`onnx_fliqs.formats`; ``SearchIntQDQ`` leaves out
the rounding to a mantissa, which spaces of integers (and float32) do not need. Both read the
numbers of a :class:`~onnx_fliqs.formats.GridCode` as scalar inputs. The gradient passes
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
    "DOMAIN",
    "GRADIENT_KEY",
    "INTEGER_CODES",
    "INTEGER_SITE",
    "site_function",
    "site_gradient",
]

DOMAIN: Final = "onnx_fliqs"
GRADIENT_KEY: Final = "onnx_fliqs.gradient"
"""Metadata key of a function: the call that computes its gradient, as JSON. Its inputs and
outputs are in ONNX Runtime's notation: ``GO(0)`` is the gradient of the first output, ``I(0)``
the first input, ``O(0)`` the first output, ``GI(0)`` the gradient of the first input."""
ANY_SITE: Final = "SearchQDQ"
INTEGER_SITE: Final = "SearchIntQDQ"
ANY_CODES: Final = ("lo", "hi", "splitter", "magic", "threshold")
"""Fields of GridCode that ``SearchQDQ`` reads after the value and its scale, in order."""
INTEGER_CODES: Final = ("lo", "hi", "magic")
"""Likewise for ``SearchIntQDQ``."""

_domain = Opset(DOMAIN, 1)

# onnxscript reads the source of these functions: they are ONNX, written in Python's syntax.


@script(_domain, default_opset=op)
def SearchQDQ(x, scale, lo, hi, splitter, magic, threshold):  # type: ignore[no-untyped-def]  # noqa: N802
    t = op.Clip(op.Div(x, scale), lo, hi)
    fixed = op.Sub(op.Add(t, magic), magic)
    p = op.Mul(t, splitter)
    relative = op.Sub(p, op.Sub(p, t))
    return op.Mul(op.Where(op.Less(op.Abs(t), threshold), fixed, relative), scale)


@script(_domain, default_opset=op)
def SearchIntQDQ(x, scale, lo, hi, magic):  # type: ignore[no-untyped-def]  # noqa: N802
    t = op.Clip(op.Div(x, scale), lo, hi)
    return op.Mul(op.Sub(op.Add(t, magic), magic), scale)


@script(_domain, default_opset=op)
def ClippedStraightThrough(dy, x, scale, lo, hi):  # type: ignore[no-untyped-def]  # noqa: N802
    t = op.Div(x, scale)
    inside = op.Cast(op.Equal(t, op.Clip(t, lo, hi)), to=1)
    return op.Mul(dy, inside)  # in a third of the time that Where would take


_STRAIGHT_THROUGH: Final = {
    "function": "ClippedStraightThrough",
    "inputs": ["GO(0)", "I(0)", "I(1)", "I(2)", "I(3)"],
    "outputs": ["GI(0)"],
}


def _to_ir(function: Any) -> ir.Function:
    result: ir.Function = ir.from_proto(function.to_function_proto())
    return result


def site_function(name: str) -> ir.Function:
    """The function of one of the sites, to be put into a model."""
    function = _to_ir({ANY_SITE: SearchQDQ, INTEGER_SITE: SearchIntQDQ}[name])
    function.metadata_props[GRADIENT_KEY] = json.dumps(_STRAIGHT_THROUGH)
    return function


def site_gradient() -> ir.Function:
    """The function that the gradients of both sites call."""
    return _to_ir(ClippedStraightThrough)
