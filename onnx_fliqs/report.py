"""The result of a search, as data and as JSON."""

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_fliqs.assignment import Assignment
from onnx_fliqs.budget_shares import BudgetReport
from onnx_fliqs.containers import container_of
from onnx_fliqs.convergence import Convergence
from onnx_fliqs.cost import Cost, cost_of, layer_bops
from onnx_fliqs.latency_report import LatencyReport
from onnx_fliqs.model import atomic_write, save_model
from onnx_fliqs.precision import PrecisionMap
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.sites import Layer, SearchSpace, Skipped
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.verify import Verification

__all__ = ["LayerReport", "SearchResult", "layer_reports"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer of a result."""

    name: str
    op: str
    format: str
    """Name of its precision: of both operands, or ``weights:activations``."""
    bits: int
    """Of its weights; of its activations where it has none."""
    params: int
    macs: int
    share: float
    """Of the BOPs of the whole network."""
    trained: bool
    simulated: bool
    """Whether ONNX has no type for the format, so that it travels in a wider one."""
    reason: str | None = None
    """Why the weight was not trained."""
    weight_only: str | None = None
    """Why the activations stay float; None where they have the format too."""
    rule: str | None = None
    """The rule that said what it may take; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search, or an emission without one, gives back."""

    model: ir.Model
    """The graph to ship."""
    trained: ir.Model | None
    """The float model with the weights that were trained, to be emitted for other targets as
    well; None after an emission without a search."""
    assignment: Assignment
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    cost: Cost
    metric: str
    samples: int
    """That quality is measured on: those held out from the data; after an emission without a
    search, all that were given."""
    float_quality: float
    """Of the float model."""
    quantized_quality: float
    """Of the emitted graph on the same samples, run at ``optimization_level``."""
    untrained_loss: float | None
    """Loss of the assignment on the held-out samples, with the float model's weights; None
    after an emission without a search."""
    loss: float | None
    """The same with the weights that are served."""
    verification: Verification
    optimization_level: OptimizationLevel
    """The highest level at which ONNX Runtime computes the graph right."""
    steps: int
    seconds: float
    seed: int
    entropy: float | None
    """Mean entropy of the policy in nats when the assignment was fixed; None without one."""
    convergence: Convergence | None
    """None after an emission without a search."""
    strategy: Strategy | None
    """How the assignment was chosen; None after an emission without a search."""
    budgets: tuple[BudgetReport, ...] = ()
    """What was used of each; none after an emission without a search."""
    latency: LatencyReport | None = None
    """None without a latency table."""
    warnings: tuple[str, ...]

    def to_dict(
        self,
        output: str | PathLike[str] | None = None,
        assignment: str | PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """As JSON (schema 1)."""
        return {
            "schema": 1,
            "output": None if output is None else str(output),
            "assignment": None if assignment is None else str(assignment),
            "target": self.assignment.target,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [asdict(item) for item in self.skipped],
            "cost": asdict(self.cost),
            "budgets": [asdict(budget) for budget in self.budgets],
            "quality": {
                "metric": self.metric,
                "samples": self.samples,
                "float": self.float_quality,
                "quantized": self.quantized_quality,
                "untrained_loss": self.untrained_loss,
                "loss": self.loss,
            },
            "latency": None if self.latency is None else asdict(self.latency),
            "verification": self.verification.to_dict(),
            "optimization_level": self.optimization_level.value,
            "strategy": None if self.strategy is None else self.strategy.value,
            "policy_entropy": self.entropy,
            "convergence": None if self.convergence is None else self.convergence.to_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "seed": self.seed,
            "warnings": list(self.warnings),
        }

    def save(
        self,
        output: str | PathLike[str],
        assignment: str | PathLike[str] | None = None,
        *,
        trained: str | PathLike[str] | None = None,
    ) -> Path:
        """Write the graph, and beside it the assignment; each appears whole or not at all.

        Args:
            output: The model file.
            assignment: The JSON file; None: the output's name with ``.assignment.json``.
            trained: Where the float model with the trained weights goes as well; None:
                it does not.

        Returns:
            The assignment's path.

        Raises:
            FliqsError: A file cannot be written.
            ValueError: Nothing was trained.
        """
        if self.trained is None and trained is not None:
            raise ValueError("nothing was trained: there are no trained weights to save")
        output = Path(output)
        beside = output.with_suffix(".assignment.json")
        assignment = beside if assignment is None else Path(assignment)
        save_model(self.model, output)
        atomic_write(assignment, self.assignment.to_json().encode())
        if self.trained is not None and trained is not None:
            save_model(self.trained, Path(trained))
        return assignment


def layer_reports(space: SearchSpace, chosen: PrecisionMap) -> tuple[LayerReport, ...]:
    """The table of a result."""
    total = cost_of(space, chosen).bops

    def report(layer: Layer) -> LayerReport:
        precision = chosen[layer.name]
        formats = {precision.activations} if layer.weight_only is None else set()
        if layer.weights:
            formats.add(precision.weights)
        return LayerReport(
            name=layer.name,
            op=layer.op_type,
            format=precision.name,
            bits=(precision.weights if layer.weights else precision.activations).bits,
            params=layer.params,
            macs=layer.macs,
            share=layer_bops(layer, precision) / total if total else 0.0,
            trained=layer.frozen is None and bool(layer.weights),
            simulated=not all(container_of(fmt).native for fmt in formats),
            reason=layer.frozen,
            weight_only=layer.weight_only,
            rule=layer.rule,
        )

    return tuple(report(layer) for layer in space.layers)
