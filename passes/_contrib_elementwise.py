"""Activations that ONNX Runtime fuses, and old converters' preprocessing, as formulas."""

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._contrib_rule import Rule, input_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["ELEMENTWISE"]


def _gelu(op: Ops, node: ir.Node) -> list[ir.Value]:
    return [op.Gelu(node.inputs[0])]


def _bias_gelu(op: Ops, node: ir.Node) -> list[ir.Value]:
    return [op.Gelu(op.Add(*node.inputs))]


def _fast_gelu(op: Ops, node: ir.Node) -> list[ir.Value]:
    bias = input_of(node, 1)
    argument = node.inputs[0] if bias is None else op.Add(node.inputs[0], bias)
    return [op.Gelu(argument, approximate="tanh")]


def _quick_gelu(op: Ops, node: ir.Node) -> list[ir.Value]:
    x = node.inputs[0]
    return [op.Mul(x, op.Sigmoid(op.Mul(x, node.attributes.get_float("alpha", 1.702))))]


def _image_scaler(op: Ops, node: ir.Node) -> list[ir.Value]:
    bias = np.array(node.attributes.get_floats("bias"), op.dtype.numpy()).reshape(-1, 1, 1)
    scaled = op.Mul(node.inputs[0], node.attributes.get_float("scale", 1.0))
    return [op.Add(scaled, bias)]


ELEMENTWISE: Final[Mapping[str, Rule]] = {
    "BiasGelu": Rule(_bias_gelu),
    "FastGelu": Rule(_fast_gelu),
    "Gelu": Rule(_gelu),
    "ImageScaler": Rule(_image_scaler),
    "QuickGelu": Rule(_quick_gelu),
}
