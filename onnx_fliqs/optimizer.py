"""The optimizer as an ONNX model: Adam with steps relative to each tensor's size."""

import enum
from collections.abc import Mapping, Sequence
from typing import Final

import onnx
from onnx import parser

__all__ = ["Optimizer", "build_optimizer"]

BETA1: Final = 0.9
BETA2: Final = 0.999
_CLIP: Final = 4.0
"""A gradient longer than this many times its running mean length is shortened to that."""
_VECTOR_FLOOR: Final = 1e-3
"""Least size of a bias, which may start at zero; Adafactor's epsilon_2."""
_TENSOR_FLOOR: Final = 1e-8


class Optimizer(enum.Enum):
    """How a tensor p steps, given the moments m^ and v^ of its gradient (their means)."""

    RELATIVE_ADAM = "relative-adam"
    """lr * size(p) * m^ / sqrt(v^), size(p) = max(rms(p), floor). Multiplying by the size of p
    makes one learning rate fit tensors of any scale, as in Adafactor (Shazeer and Stern 2018,
    section 8) and LAMB (You et al. 2020)."""
    RELATIVE_MOMENTUM = "relative-momentum"
    """lr * size(p) * m^ / sqrt(mean(v^)): gradient descent with momentum, normalized for each
    tensor as a whole (NovoGrad, Ginsburg et al. 2019)."""
    ADAM = "adam"
    """lr * m^ / sqrt(v^): Adam as published (Kingma and Ba 2015)."""


def build_optimizer(
    shapes: Mapping[str, Sequence[int]],
    shares: Sequence[float],
    optimizer: Optimizer = Optimizer.RELATIVE_ADAM,
) -> onnx.ModelProto:
    """Build the update of all parameters from the gradients of the parts of a batch.

    The gradient is the weighted mean of the parts' gradients, shortened where its length
    exceeds 4 times its running mean. Where it is not finite, nothing changes.

    Args:
        shapes: Parameter name → shape, in the order in which the gradients are flattened.
        shares: Each part's share of the batch; they add up to 1.
        optimizer: The step that follows from it.

    Returns:
        A model. Inputs: ``p<i>`` for each parameter, ``g<j>`` for each part, ``m`` and ``v``
        (flat), ``length`` (running mean gradient length, 0 at first), the scalars ``lr``,
        ``correction1`` and ``correction2`` (1 / (1 - beta^t)). Outputs: ``p<i>_next``,
        ``m_next``, ``v_next``, ``length_next`` and ``norm``, the length of this gradient.
    """
    lines = [
        *_gradient_lines(shares),
        *_moment_lines(),
        *_direction_lines(len(shapes), optimizer),
        "rate = Where (ok, lr, zero)",
    ]
    initializers = ["int64[1] flat = {-1}"]
    sizes = []
    for i, shape in enumerate(shapes.values()):
        size = 1
        for dimension in shape:
            size *= dimension
        sizes.append(size)
        floor = "vector_floor" if len(shape) <= 1 else "tensor_floor"
        dims = ", ".join(str(d) for d in shape)
        initializers.append(f"int64[{len(shape)}] shape{i} = {{{dims}}}")
        if optimizer is Optimizer.ADAM:
            lines.append(f"rate{i} = Identity (rate)")
        else:
            lines += [
                f"square{i} = Mul (p{i}, p{i})",
                f"mean{i} = ReduceMean <keepdims = 0> (square{i})",
                f"rms{i} = Sqrt (mean{i})",
                f"size{i} = Max (rms{i}, {floor})",
                f"rate{i} = Mul (rate, size{i})",
            ]
        lines += [
            f"scaled{i} = Mul (u{i}, rate{i})",
            f"shaped{i} = Reshape (scaled{i}, shape{i})",
            f"p{i}_next = Sub (p{i}, shaped{i})",
        ]
    initializers.append(f"int64[{len(sizes)}] sizes = {{{', '.join(map(str, sizes))}}}")
    initializers += [f"float share{j} = {{{share!r}}}" for j, share in enumerate(shares)]
    initializers += [f"float {name} = {{{value!r}}}" for name, value in _CONSTANTS.items()]
    parameters = [
        f"float[{', '.join(map(str, shape))}] p{i}" if shape else f"float p{i}"
        for i, shape in enumerate(shapes.values())
    ]
    total = sum(sizes)
    inputs = [
        *parameters,
        *(f"float[{total}] g{j}" for j in range(len(shares))),
        f"float[{total}] m",
        f"float[{total}] v",
        *(f"float {name}" for name in ("length", "lr", "correction1", "correction2")),
    ]
    outputs = [
        *(f"{p}_next" for p in parameters),
        f"float[{total}] m_next",
        f"float[{total}] v_next",
        "float length_next",
        "float norm",
    ]
    body = "\n".join(lines)
    return parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        optimizer ({", ".join(inputs)}) => ({", ".join(outputs)})
        <{", ".join(initializers)}> {{
        {body}
        }}"""
    )


_CONSTANTS: Final = {
    "zero": 0.0,
    "one": 1.0,
    "largest": 3e38,
    "epsilon": 1e-16,
    "beta1": BETA1,
    "beta2": BETA2,
    "rest1": 1 - BETA1,
    "rest2": 1 - BETA2,
    "clip": _CLIP,
    "keep": 0.95,
    "take": 0.05,
    "vector_floor": _VECTOR_FLOOR,
    "tensor_floor": _TENSOR_FLOOR,
}


def _gradient_lines(shares: Sequence[float]) -> list[str]:
    """The mean gradient, its length, and the shortened gradient."""
    parts = [f"part{j}" for j in range(len(shares))]
    return [
        *(f"part{j} = Mul (g{j}, share{j})" for j in range(len(shares))),
        f"gradient = Sum ({', '.join(parts)})",
        "norm = ReduceL2 <keepdims = 0> (gradient)",
        # False for NaN and infinity as well.
        "ok = Less (norm, largest)",
        "known = Greater (length, zero)",
        "bound = Mul (length, clip)",
        "limit = Where (known, bound, norm)",
        "long = Greater (norm, limit)",
        "shrink = Div (limit, norm)",
        "factor = Where (long, shrink, one)",
        "clipped = Mul (gradient, factor)",
        "counted = Min (norm, limit)",
        "kept = Mul (length, keep)",
        "taken = Mul (counted, take)",
        "blended = Add (kept, taken)",
        "running = Where (known, blended, norm)",
        "length_next = Where (ok, running, length)",
    ]


def _moment_lines() -> list[str]:
    """Adam's moments; unchanged where the gradient is not finite."""
    return [
        "m_kept = Mul (m, beta1)",
        "m_taken = Mul (clipped, rest1)",
        "m_blended = Add (m_kept, m_taken)",
        "m_next = Where (ok, m_blended, m)",
        "squared = Mul (clipped, clipped)",
        "v_kept = Mul (v, beta2)",
        "v_taken = Mul (squared, rest2)",
        "v_blended = Add (v_kept, v_taken)",
        "v_next = Where (ok, v_blended, v)",
        "m_corrected = Mul (m_next, correction1)",
        "v_corrected = Mul (v_next, correction2)",
    ]


def _direction_lines(count: int, optimizer: Optimizer) -> list[str]:
    """For each parameter, the direction of its step, about 1 in size."""

    def split(source: str, prefix: str) -> str:
        names = ", ".join(f"{prefix}{i}" for i in range(count))
        return f"{names} = Split <axis = 0> ({source}, sizes)"

    if optimizer is not Optimizer.RELATIVE_MOMENTUM:
        return [
            "root = Sqrt (v_corrected)",
            "deviation = Add (root, epsilon)",
            "step = Div (m_corrected, deviation)",
            split("step", "u"),
        ]
    lines = [split("m_corrected", "first"), split("v_corrected", "second")]
    for i in range(count):
        lines += [
            f"power{i} = ReduceMean <keepdims = 0> (second{i})",
            f"root{i} = Sqrt (power{i})",
            f"deviation{i} = Add (root{i}, epsilon)",
            f"u{i} = Div (first{i}, deviation{i})",
        ]
    return lines
