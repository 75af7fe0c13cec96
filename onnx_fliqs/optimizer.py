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
    share: float = 1.0,
    optimizer: Optimizer = Optimizer.RELATIVE_ADAM,
    sizes: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """Build the update of all parameters from the gradient of a batch.

    The gradient is shortened where its length exceeds 4 times its running mean. Factors that
    are the same for all parameters are gathered in scalars, since each operation on all of
    them reads and writes as much memory as they take.

    Args:
        shapes: Parameter name → shape, in the order in which the gradients are flattened.
        share: What makes the mean gradient of the one that is given, which may be a sum.
        optimizer: The step that follows from it.
        sizes: Of some parameters, by what the learning rate is multiplied for them, whatever
            they are.

    Returns:
        A model. Inputs: ``p<i>`` for each parameter, ``gradient``, ``m`` and ``v`` (all flat),
        ``length`` (running mean gradient length, 0 at first), the scalars ``lr``,
        ``correction1`` and ``correction2`` (1 / (1 - beta^t)). Outputs: ``p<i>_next``,
        ``m_next``, ``v_next``, ``length_next`` and ``norm``, the length of this gradient.
        Where that is not finite, neither are the others, and the caller keeps what it had.
    """
    lines = [
        *_gradient_lines(),
        *_moment_lines(),
        *_direction_lines(len(shapes), optimizer),
    ]
    initializers = ["int64[1] flat = {-1}"]
    fixed, lengths = sizes or {}, []
    for i, (name, shape) in enumerate(shapes.items()):
        size = 1
        for dimension in shape:
            size *= dimension
        lengths.append(size)
        # A bias may have axes of length 1 beside its own.
        is_vector = sum(dimension > 1 for dimension in shape) <= 1
        floor = "vector_floor" if is_vector else "tensor_floor"
        dims = ", ".join(str(d) for d in shape)
        initializers.append(f"int64[{len(shape)}] shape{i} = {{{dims}}}")
        initializers.append(f"float per_root{i} = {{{max(size, 1) ** -0.5!r}}}")
        if name in fixed:
            initializers.append(f"float size{i} = {{{float(fixed[name])!r}}}")
            lines.append(f"rate{i} = Mul (rate, size{i})")
        elif optimizer is Optimizer.ADAM:
            lines.append(f"rate{i} = Identity (rate)")
        else:
            lines += [
                f"length{i} = ReduceL2 <keepdims = 0> (p{i})",
                f"rms{i} = Mul (length{i}, per_root{i})",
                f"size{i} = Max (rms{i}, {floor})",
                f"rate{i} = Mul (rate, size{i})",
            ]
        lines += [
            f"scaled{i} = Mul (u{i}, rate{i})",
            f"shaped{i} = Reshape (scaled{i}, shape{i})",
            f"p{i}_next = Sub (p{i}, shaped{i})",
        ]
    initializers.append(f"int64[{len(lengths)}] sizes = {{{', '.join(map(str, lengths))}}}")
    initializers.append(f"float share = {{{share!r}}}")
    initializers += [f"float {name} = {{{value!r}}}" for name, value in _CONSTANTS.items()]
    parameters = [
        f"float[{', '.join(map(str, shape))}] p{i}" if shape else f"float p{i}"
        for i, shape in enumerate(shapes.values())
    ]
    total = sum(lengths)
    inputs = [
        *parameters,
        *(f"float[{total}] {name}" for name in ("gradient", "m", "v")),
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


def _gradient_lines() -> list[str]:
    """The scale that makes a gradient the shortened mean gradient."""
    return [
        "length_of_sum = ReduceL2 <keepdims = 0> (gradient)",
        "norm = Mul (length_of_sum, share)",
        "known = Greater (length, zero)",
        "bound = Mul (length, clip)",
        "limit = Where (known, bound, norm)",
        "long = Greater (norm, limit)",
        "shrink = Div (limit, norm)",
        "factor = Where (long, shrink, one)",
        "scale = Mul (factor, share)",
        "counted = Min (norm, limit)",
        "kept = Mul (length, keep)",
        "taken = Mul (counted, take)",
        "blended = Add (kept, taken)",
        "length_next = Where (known, blended, norm)",
    ]


def _moment_lines() -> list[str]:
    """Adam's moments, and what corrects them and the learning rate for their start."""
    return [
        "part_of_m = Mul (scale, rest1)",
        "m_kept = Mul (m, beta1)",
        "m_taken = Mul (gradient, part_of_m)",
        "m_next = Add (m_kept, m_taken)",
        "scale_squared = Mul (scale, scale)",
        "part_of_v = Mul (scale_squared, rest2)",
        "squared = Mul (gradient, gradient)",
        "v_kept = Mul (v, beta2)",
        "v_taken = Mul (squared, part_of_v)",
        "v_next = Add (v_kept, v_taken)",
        "root_of_correction = Sqrt (correction2)",
        "least = Div (epsilon, root_of_correction)",
        "correction = Div (correction1, root_of_correction)",
        "rate = Mul (lr, correction)",
    ]


def _direction_lines(count: int, optimizer: Optimizer) -> list[str]:
    """For each parameter, the direction of its step, about 1 in size when corrected."""

    def split(source: str, prefix: str) -> str:
        names = ", ".join(f"{prefix}{i}" for i in range(count))
        return f"{names} = Split <axis = 0> ({source}, sizes)"

    if optimizer is not Optimizer.RELATIVE_MOMENTUM:
        return [
            "root = Sqrt (v_next)",
            "deviation = Add (root, least)",
            "step = Div (m_next, deviation)",
            split("step", "u"),
        ]
    lines = [split("m_next", "first"), split("v_next", "second")]
    for i in range(count):
        lines += [
            f"power{i} = ReduceMean <keepdims = 0> (second{i})",
            f"root{i} = Sqrt (power{i})",
            f"deviation{i} = Add (root{i}, least)",
            f"u{i} = Div (first{i}, deviation{i})",
        ]
    return lines
