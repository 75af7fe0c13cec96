"""Rules of a target that can be checked on any QDQ graph without its hardware.

Each rule is a function from the graph and the target to its problems. The numbers and names
that it needs are fields of :class:`~onnx_fliqs.targets.Target`; what holds for every target
follows from ONNX and from ONNX Runtime.
"""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnx_fliqs import lint_operands, lint_qonnx, lint_scales, lint_session
from onnx_fliqs.lint_rule import QdqGraph, Rule
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import Target

__all__ = ["RULES", "Problem", "lint"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Where a graph breaks a rule."""

    rule: str
    """The name of the rule."""
    node: str
    """Operator and name of the node; empty where it is none."""
    message: str

    def __str__(self) -> str:
        """One line."""
        where = f"{self.node}: " if self.node else ""
        return f"{where}{self.message} [{self.rule}]"


RULES: Final[tuple[Rule, ...]] = (
    lint_scales.types,
    lint_scales.opset,
    lint_scales.block_shapes,
    lint_scales.static_shapes,
    lint_scales.constant_scales,
    lint_scales.normal_scales,
    lint_scales.symmetric,
    lint_scales.symmetric_weights,
    lint_scales.power_of_two_scales,
    lint_scales.per_tensor_activations,
    lint_operands.channels,
    lint_operands.blocks,
    lint_operands.operand_types,
    lint_operands.one_activation_type,
    lint_operands.weight_range,
    lint_operands.bias,
    lint_operands.shared_scales,
    lint_operands.fixed_ranges,
    lint_session.kept_relu,
    lint_session.loaded_groups,
    lint_qonnx.quantizers_of_qonnx,
)
"""All rules, in the order of their reports."""


def lint(
    model: ir.Model, target: Target, level: OptimizationLevel = OptimizationLevel.DEFAULT
) -> tuple[Problem, ...]:
    """List where a QDQ graph breaks the rules of a target.

    Args:
        model: The graph.
        target: What it is for.
        level: The level at which ONNX Runtime is to run it, where the target has that runtime.
    """
    graph = QdqGraph(model, level)
    return tuple(
        Problem(rule.__name__.replace("_", "-"), _label(node), message)
        for rule in RULES
        for node, message in rule(graph, target)
    )


def _label(node: ir.Node | None) -> str:
    if node is None:
        return ""
    name = node.name or next((value.name for value in node.outputs if value.name), "")
    return f"{node.op_type} {name}"
