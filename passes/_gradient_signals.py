"""Gradients of Fourier transforms."""

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import (
    Call,
    Formula,
    Lowering,
    NoGradientError,
    input_of,
    rank_of,
)
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "LOWERINGS"]

_SCALAR: Final = np.zeros(0, np.int64)
"""The shape of a scalar."""


def _dft(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """The adjoint of a transform is the opposite one, but for a factor."""
    node, x = call.node, call.x()
    rank = rank_of(node.inputs[0])
    parts = node.inputs[0].shape[rank - 1]  # type: ignore[union-attr, index]
    if not isinstance(parts, int):
        raise NoGradientError("whether its input is complex is not known")
    axis = -2 if input_of(node, 2) is None else constant_of(input_of(node, 2))
    if axis is None:
        raise NoGradientError("its axis is computed")
    along = int(np.asarray(axis).reshape(-1)[0]) % rank
    inverse = node.attributes.get_int("inverse", 0)
    if inverse and node.attributes.get_int("onesided", 0):
        raise NoGradientError("it is one-sided and inverse")
    samples = op.Shape(x, start=along, end=along + 1)
    given = call.optional(1)
    length = samples if given is None else op.Reshape(given, [1])
    # A shorter gradient, of the one side, is filled up with zeros.
    scalar = op.Reshape(length, _SCALAR)
    opposite = op.DFT(call.dy, scalar, along, inverse=1 - inverse)
    scale = op.cast(scalar)
    gradient = op.Div(opposite, scale) if inverse else op.Mul(opposite, scale)
    if parts == 1:
        gradient = op.Slice(gradient, [0], [1], [rank - 1])
    if given is not None:
        gradient = op.Slice(gradient, [0], samples, [along])
        unread = op.Max(op.Sub(samples, length), 0)
        pads = [unread if i == rank + along else np.array([0]) for i in range(2 * rank)]
        gradient = op.Pad(gradient, op.Concat(*pads, axis=0))
    return {0: gradient}


def _stft(op: Ops, node: ir.Node) -> list[ir.Value]:
    """Cut out the frames, weigh them, transform them."""
    signal, step, window = node.inputs[:3] if len(node.inputs) > 2 else (*node.inputs, None)
    columns = op.Unsqueeze(signal, [-1]) if rank_of(signal) == 2 else signal
    size = op.Size(window) if window is not None else op.Reshape(input_of(node, 3), _SCALAR)
    stride = op.Reshape(step, _SCALAR)
    total = op.Squeeze(op.Shape(signal, start=1, end=2), [0])
    count = op.Add(op.Div(op.Sub(total, size), stride), 1)
    starts = op.Mul(op.Range(0, count, 1), stride)
    places = op.Add(op.Unsqueeze(starts, [1]), op.Range(0, size, 1))
    frames = op.Gather(columns, places, axis=1)
    if window is not None:
        frames = op.Mul(frames, op.Unsqueeze(window, [-1]))
    onesided = node.attributes.get_int("onesided", 1)
    return [op.DFT(frames, None, 2, onesided=onesided)]


FORMULAS: Final[dict[str, Formula]] = {"DFT": _dft}
LOWERINGS: Final[dict[str, Lowering]] = {"STFT": _stft}
