"""Inference-mode batch normalization as ``x * factor + offset`` per channel."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import ModelError
from onnx_fliqs.passes._graph import constant_of, is_standard, label

__all__ = ["ChannelAffine", "affine_of", "is_batch_normalization"]


class ChannelAffine(NamedTuple):
    """What a normalization does to each channel, in float64, shape [C]."""

    factor: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]

    def spread(self, rank: int) -> "ChannelAffine":
        """In the shape that broadcasts against a tensor of the rank: [1,C,1,...]."""
        shape = (1, -1, *(1,) * (rank - 2))
        return ChannelAffine(self.factor.reshape(shape), self.offset.reshape(shape))


def is_batch_normalization(node: ir.Node) -> bool:
    """Whether a node normalizes with constant statistics, as in inference."""
    return is_standard(node, "BatchNormalization") and not node.attributes.get_int(
        "training_mode", 0
    )


def affine_of(node: ir.Node) -> ChannelAffine | None:
    """The affine function of a BatchNormalization; None where a parameter is not constant.

    Raises:
        ModelError: A variance is negative, so that the result would be NaN.
    """
    parameters = [constant_of(value) for value in node.inputs[1:5]]
    if any(array is None for array in parameters):
        return None
    scale, bias, mean, variance = (np.asarray(array, dtype=np.float64) for array in parameters)
    shifted = variance + node.attributes.get_float("epsilon", 1e-5)
    if (shifted <= 0).any():
        raise ModelError(f"{label(node)} has a negative or zero variance")
    factor = scale / np.sqrt(shifted)
    return ChannelAffine(factor, bias - mean * factor)
