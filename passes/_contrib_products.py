"""Products that ONNX Runtime fuses with what surrounds them, as formulas."""

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._contrib_rule import Rule, input_of, rank_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["PRODUCTS"]

# What the numbers of a fused activation mean, in order.
_ACTIVATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "HardSwish": (),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}


# --- activations ---------------------------------------------------------------------------


def _activation(node: ir.Node) -> str:
    return node.attributes.get_string("activation", "")


def _activated(op: Ops, node: ir.Node, x: ir.Value) -> ir.Value:
    """The activation of a fused node, with numbers as Conv or as Gemm writes them."""
    kind = _activation(node)
    numbers = node.attributes.get_floats("activation_params", ())
    if not kind:
        return x
    if kind == "Clip":
        return op.Clip(x, *(float(number) for number in numbers))
    named = {
        name: node.attributes.get_float(f"activation_{name}")
        for name in _ACTIVATIONS[kind]
        if f"activation_{name}" in node.attributes
    }
    attributes = dict(zip(_ACTIVATIONS[kind], numbers, strict=False)) or named
    return op.node(kind, [x], attributes)[0]


def _why_not_activated(node: ir.Node) -> str | None:
    kind = _activation(node)
    known = kind in ("", "Clip") or kind in _ACTIVATIONS
    return None if known else f"its activation {kind} is unknown"


# --- layers --------------------------------------------------------------------------------


def _conv(op: Ops, node: ir.Node) -> list[ir.Value]:
    residual = input_of(node, 3)
    own = {
        name: attribute
        for name, attribute in node.attributes.items()
        if not name.startswith("activation")
    }
    result = op.node("Conv", node.inputs[:3], own)[0]
    if residual is not None:
        result = op.Add(result, residual)
    return [_activated(op, node, result)]


def _gemm(op: Ops, node: ir.Node) -> list[ir.Value]:
    own = {
        name: attribute
        for name, attribute in node.attributes.items()
        if not name.startswith("activation")
    }
    return [_activated(op, node, op.node("Gemm", node.inputs, own)[0])]


def _matmul(op: Ops, node: ir.Node) -> list[ir.Value]:
    operands = []
    for value, side in zip(node.inputs, "AB", strict=True):
        perm = _permutation(node, side, rank_of(value))
        operands.append(value if perm is None else op.Transpose(value, perm=perm))
    product = op.MatMul(*operands)
    alpha = node.attributes.get_float("alpha", 1.0)
    return [product if alpha == 1.0 else op.Mul(product, alpha)]


def _permutation(node: ir.Node, side: str, rank: int | None) -> list[int] | None:
    """How an operand is transposed first; None if it is not."""
    batched = node.attributes.get_int(f"transBatch{side}", 0)
    transposed = node.attributes.get_int(f"trans{side}", 0)
    if not (batched or transposed) or rank is None or rank < 2:
        return None
    axes = list(range(rank))
    if batched:  # the first axis comes behind those of the batch
        axes = [*axes[1:-1], axes[0], axes[-1]]
    return [*axes[:-2], axes[-1], axes[-2]] if transposed else axes


def _why_not_matmul(node: ir.Node) -> str | None:
    for value, side in zip(node.inputs, "AB", strict=True):
        rearranged = any(
            node.attributes.get_int(f"{name}{side}", 0) for name in ("trans", "transBatch")
        )
        if rearranged and rank_of(value) is None:
            return "the rank of an operand is unknown"
    return None


PRODUCTS: Final[Mapping[str, Rule]] = {
    "FusedConv": Rule(_conv, _why_not_activated),
    "FusedGemm": Rule(_gemm, _why_not_activated),
    "FusedMatMul": Rule(_matmul, _why_not_matmul),
    "TransposeMatMul": Rule(_matmul, _why_not_matmul),
}
