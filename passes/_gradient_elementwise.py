"""Gradients of operators that work on each element by itself."""

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Call, Formula, Lowering, NoGradientError, input_of
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "LOWERINGS"]

Derivative: TypeAlias = Callable[[Ops, ir.Value, ir.Value, ir.Node], ir.Value]
"""dy/dx from x, y and the node."""

# The defaults of ONNX.
_CELU_ALPHA: Final = 1.0
_ELU_ALPHA: Final = 1.0
_HARD_SIGMOID_ALPHA: Final = 0.2
_LEAKY_RELU_ALPHA: Final = 0.01
_SELU_ALPHA: Final = 1.67326319217681884765625
_SELU_GAMMA: Final = 1.05070102214813232421875
_SHRINK_LAMBD: Final = 0.5
_THRESHOLDED_RELU_ALPHA: Final = 1.0


def _of(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes.get_float(name, default))


def _unary(derivative: Derivative) -> Formula:
    def formula(op: Ops, call: Call) -> Mapping[int, ir.Value]:
        return {0: op.Mul(call.dy, derivative(op, call.x(), call.y, call.node))}

    return formula


def _acos(op: Ops, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return op.Neg(_asin(op, x, y, node))


def _acosh(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Reciprocal(op.Sqrt(op.Sub(op.Mul(x, x), 1.0)))


def _asin(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Reciprocal(op.Sqrt(op.Sub(1.0, op.Mul(x, x))))


def _asinh(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Reciprocal(op.Sqrt(op.Add(op.Mul(x, x), 1.0)))


def _atan(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Reciprocal(op.Add(op.Mul(x, x), 1.0))


def _atanh(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Reciprocal(op.Sub(1.0, op.Mul(x, x)))


def _celu(op: Ops, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    below = op.Add(op.Div(y, _of(node, "alpha", _CELU_ALPHA)), 1.0)
    return _choose(op, op.Less(x, 0.0), below, 1.0)


def _cosh(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Sinh(x)


def _elu(op: Ops, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    below = op.Add(y, _of(node, "alpha", _ELU_ALPHA))
    return _choose(op, op.Less(x, 0.0), below, 1.0)


def _gelu(op: Ops, x: ir.Value, _y: ir.Value, node: ir.Node) -> ir.Value:
    """The normal distribution and x times its density, in half the time of ONNX Runtime's."""
    if node.attributes.get_string("approximate", "none") != "none":
        raise NoGradientError("its approximation is another function")
    z = op.Mul(x, math.sqrt(0.5))
    density = op.Exp(op.Sub(-0.5 * math.log(math.pi), op.Mul(z, z)))
    below = op.Add(op.Mul(op.Erf(z), 0.5), 0.5)
    return op.Add(below, op.Mul(z, density))


def _hard_sigmoid(op: Ops, _x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    inside = op.And(op.Greater(y, 0.0), op.Less(y, 1.0))
    return op.Mul(op.cast(inside), _of(node, "alpha", _HARD_SIGMOID_ALPHA))


def _hard_swish(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    gate = op.HardSigmoid(x, alpha=1 / 6, beta=0.5)
    inside = op.cast(op.Less(op.Abs(x), 3.0))
    return op.Add(gate, op.Mul(op.Div(x, 6.0), inside))


def _leaky_relu(op: Ops, x: ir.Value, _y: ir.Value, node: ir.Node) -> ir.Value:
    alpha = _of(node, "alpha", _LEAKY_RELU_ALPHA)
    return op.Add(op.Mul(op.cast(op.Less(x, 0.0)), alpha - 1), 1.0)


def _mish(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    gate = op.Tanh(op.Softplus(x))
    slope = op.Mul(op.Sigmoid(x), op.Sub(1.0, op.Mul(gate, gate)))
    return op.Add(gate, op.Mul(x, slope))


def _relu(op: Ops, _x: ir.Value, y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.cast(op.Greater(y, 0.0))


def _clip(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """From the result, as for Relu: what was clipped need not be kept."""
    low, high = call.optional(1), call.optional(2)
    inside = []
    if low is not None:
        inside.append(op.Greater(call.y, low))
    if high is not None:
        inside.append(op.Less(call.y, high))
    if not inside:
        return {0: op.Identity(call.dy)}
    mask = inside[0] if len(inside) == 1 else op.And(*inside)
    return {0: op.Mul(call.dy, op.cast(mask))}


def _selu(op: Ops, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    gamma = _of(node, "gamma", _SELU_GAMMA)
    below = op.Add(y, gamma * _of(node, "alpha", _SELU_ALPHA))
    return _choose(op, op.Less(x, 0.0), below, gamma)


def _shrink(op: Ops, x: ir.Value, _y: ir.Value, node: ir.Node) -> ir.Value:
    return op.cast(op.Greater(op.Abs(x), _of(node, "lambd", _SHRINK_LAMBD)))


def _sinh(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Cosh(x)


def _softplus(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Sigmoid(x)


def _softsign(op: Ops, x: ir.Value, _y: ir.Value, _node: ir.Node) -> ir.Value:
    size = op.Add(op.Abs(x), 1.0)
    return op.Reciprocal(op.Mul(size, size))


def _tan(op: Ops, _x: ir.Value, y: ir.Value, _node: ir.Node) -> ir.Value:
    return op.Add(op.Mul(y, y), 1.0)


def _thresholded_relu(op: Ops, x: ir.Value, _y: ir.Value, node: ir.Node) -> ir.Value:
    return op.cast(op.Greater(x, _of(node, "alpha", _THRESHOLDED_RELU_ALPHA)))


def _choose(op: Ops, condition: ir.Value, yes: ir.Value, no: float) -> ir.Value:
    """What Where does, by arithmetic: ONNX Runtime's Where is eight times as slow on signs."""
    return op.Add(op.Mul(op.cast(condition), op.Sub(yes, no)), no)


# -- several operands -----------------------------------------------------------------------


# Of these, ONNX Runtime has gradients for operands whose sizes it knows.


def _difference(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    return {
        0: op.sum_to(call.dy, call.x(0), call.y),
        1: op.sum_to(op.Neg(call.dy), call.x(1), call.y),
    }


def _factors(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    left, right = call.x(0), call.x(1)
    return {
        0: op.sum_to(op.Mul(call.dy, right), left, call.y),
        1: op.sum_to(op.Mul(call.dy, left), right, call.y),
    }


def _quotient(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    share = op.Div(call.dy, call.x(1))
    return {
        0: op.sum_to(share, call.x(0), call.y),
        1: op.sum_to(op.Neg(op.Mul(share, call.y)), call.x(1), call.y),
    }


def _extreme(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """Operands that are equally large share the gradient."""
    operands = [call.x(index) for index in range(len(call.inputs))]
    found = [op.cast(op.Equal(value, call.y)) for value in operands]
    share = op.Div(call.dy, op.Sum(*found))
    return {
        index: op.sum_to(op.Mul(share, mask), value, call.y)
        for index, (value, mask) in enumerate(zip(operands, found, strict=True))
    }


# These have none, or a wrong one.


def _sum(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    return {i: op.sum_to(call.dy, call.x(i), call.y) for i in range(len(call.inputs))}


def _mean(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    count = len(call.inputs)
    share = op.Div(call.dy, float(count))
    return {i: op.sum_to(share, call.x(i), call.y) for i in range(count)}


def _mod(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    if not call.node.attributes.get_int("fmod", 0):
        raise NoGradientError("the remainder of integers has no derivative")
    # x = quotient * divisor + y, and the quotient is constant between its jumps.
    quotient = op.Round(op.Div(op.Sub(call.x(0), call.y), call.x(1)))
    return {
        0: op.sum_to(call.dy, call.x(0), call.y),
        1: op.sum_to(op.Neg(op.Mul(call.dy, quotient)), call.x(1), call.y),
    }


def _pow(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    base, exponent = call.x(0), call.x(1)
    gradients = {}
    power = op.cast(exponent)
    slope = op.Mul(power, op.Pow(base, op.Sub(power, 1.0)))
    # 0 * 0 ** -1 is not a number.
    safe = op.Where(op.Equal(power, 0.0), 0.0, slope)
    gradients[0] = op.sum_to(op.Mul(call.dy, safe), base, call.y)
    if exponent.dtype in (None, op.dtype):
        # Of a negative base only integer powers exist, which have no neighbours.
        logarithm = op.Log(op.Where(op.Greater(base, 0.0), base, 1.0))
        slope = op.Mul(call.y, logarithm)
        gradients[1] = op.sum_to(op.Mul(call.dy, slope), exponent, call.y)
    return gradients


def _prelu(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    x, slope = call.x(0), call.x(1)
    falling = op.Mul(call.dy, op.cast(op.Less(x, 0.0)))
    change = op.Mul(falling, op.Sub(slope, 1.0))
    return {
        0: op.Add(call.dy, change),
        1: op.sum_to(op.Mul(falling, x), slope, call.y),
    }


def _where(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    chosen = op.Mul(call.dy, op.cast(call.x(0)))
    return {
        1: op.sum_to(chosen, call.x(1), call.y),
        2: op.sum_to(op.Sub(call.dy, chosen), call.x(2), call.y),
    }


FORMULAS: Final[dict[str, Formula]] = {
    "Add": _sum,
    "Div": _quotient,
    "Max": _extreme,
    "Min": _extreme,
    "Mul": _factors,
    "Sub": _difference,
    "Acos": _unary(_acos),
    "Acosh": _unary(_acosh),
    "Asin": _unary(_asin),
    "Asinh": _unary(_asinh),
    "Atan": _unary(_atan),
    "Atanh": _unary(_atanh),
    "Celu": _unary(_celu),
    "Clip": _clip,
    "Cosh": _unary(_cosh),
    "Elu": _unary(_elu),
    "Gelu": _unary(_gelu),
    "HardSigmoid": _unary(_hard_sigmoid),
    "HardSwish": _unary(_hard_swish),
    "LeakyRelu": _unary(_leaky_relu),
    "Mean": _mean,
    "Mish": _unary(_mish),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pow": _pow,
    "Relu": _unary(_relu),
    "Selu": _unary(_selu),
    "Shrink": _unary(_shrink),
    "Sinh": _unary(_sinh),
    "Softplus": _unary(_softplus),
    "Softsign": _unary(_softsign),
    "Sum": _sum,
    "Tan": _unary(_tan),
    "ThresholdedRelu": _unary(_thresholded_relu),
    "Where": _where,
}


def _computed_bounds(op: Ops, node: ir.Node) -> list[ir.Value] | None:
    """A Clip whose bounds have gradients too."""
    value = node.inputs[0]
    low, high = input_of(node, 1), input_of(node, 2)
    if all(bound is None or constant_of(bound) is not None for bound in (low, high)):
        return None
    if low is not None:
        value = op.Max(value, low)
    if high is not None:
        value = op.Min(value, high)
    assert value is not None
    return [value]


def _cast_like(op: Ops, node: ir.Node) -> list[ir.Value]:
    pattern = node.inputs[1]
    if pattern is None or pattern.dtype is None:
        raise NoGradientError("the type it casts to is not known")
    return [op.Cast(node.inputs[0], to=int(pattern.dtype))]


LOWERINGS: Final[dict[str, Lowering]] = {"CastLike": _cast_like, "Clip": _computed_bounds}
