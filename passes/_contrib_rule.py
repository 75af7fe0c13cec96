"""What a rule for an operator of ONNX Runtime looks like."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from onnx_fliqs.passes._ops import Ops

__all__ = ["Rule", "input_of", "is_read", "rank_of"]

Formula: TypeAlias = Callable[[Ops, ir.Node], Sequence[ir.Value | None]]
"""Gives what takes the place of the node's outputs; None for one that nothing reads."""


def _always(_: ir.Node) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Rule:
    """An operator in terms of ONNX's."""

    formula: Formula
    why_not: Callable[[ir.Node], str | None] = _always
    """Why the formula does not hold for a node, in words for users; None where it does."""


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def rank_of(value: ir.Value | None) -> int | None:
    """The number of axes, None where it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def is_read(node: ir.Node, index: int) -> bool:
    """Whether anything reads an output."""
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()
