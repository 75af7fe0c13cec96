"""What a rule for the gradient of an operator looks like.

There are two kinds. A *formula* leaves the node as it is and says how the gradients of its
inputs follow from those of its outputs. A *lowering* replaces the node by others that have a
gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from onnx_fliqs.passes._ops import Ops

__all__ = ["Call", "Formula", "Lowering", "NoGradientError", "input_of", "rank_of"]


class NoGradientError(Exception):
    """A rule does not cover a node; the message, a phrase for users, says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """A node, seen from inside the function that computes its gradient."""

    node: ir.Node
    inputs: Sequence[ir.Value | None]
    outputs: Sequence[ir.Value]
    gradients: Sequence[ir.Value | None]
    """Of the outputs; None where the loss does not depend on one."""

    def x(self, index: int = 0) -> ir.Value:
        """An input that is there."""
        value = self.inputs[index]
        assert value is not None
        return value

    def optional(self, index: int) -> ir.Value | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def y(self) -> ir.Value:
        """The first output."""
        return self.outputs[0]

    @property
    def dy(self) -> ir.Value:
        """The gradient of the first output."""
        value = self.gradients[0]
        assert value is not None
        return value


Formula: TypeAlias = Callable[[Ops, Call], Mapping[int, ir.Value]]
"""Gives the gradient of every input that has one, by its index."""

Lowering: TypeAlias = Callable[[Ops, ir.Node], Sequence[ir.Value] | None]
"""Gives what takes the place of the node's outputs, as far as they are read; None if the
operator's formula will do."""


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def rank_of(value: ir.Value | None) -> int:
    """The number of axes.

    Raises:
        NoGradientError: It is not known.
    """
    if value is None or value.shape is None:
        raise NoGradientError("the rank of an operand is not known")
    return len(value.shape)
