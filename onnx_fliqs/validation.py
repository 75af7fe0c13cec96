"""Whether a graph, from here or from elsewhere, runs right."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs import openvino_runtime
from onnx_fliqs.data import Dataset
from onnx_fliqs.emission import TARGET_KEY, required_level
from onnx_fliqs.errors import FliqsError, VerificationError
from onnx_fliqs.judged import compared_names, tensor_outputs
from onnx_fliqs.lint import Problem, lint
from onnx_fliqs.locate import find_origin, named_node
from onnx_fliqs.prepare import calibration_batches, synthetic_data
from onnx_fliqs.runtime import OptimizationLevel, load_onnxruntime
from onnx_fliqs.target_files import parse_target, recorded_target
from onnx_fliqs.verify import (
    ONNX_RUNTIME,
    OPENVINO,
    Batches,
    Check,
    Comparison,
    Verification,
    compare,
    verify_graph,
    watch,
    way_of,
    worst,
)

__all__ = ["Validation", "validate_graph"]

_SAMPLES: Final = 32
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Validation:
    """Whether a graph runs right."""

    target: str
    verification: Verification
    level: OptimizationLevel
    """At which the graph asks to be run."""
    reference: Comparison | None
    """Unoptimised graph against the float model."""
    problems: tuple[Problem, ...]
    """Where the graph breaks the target's rules."""
    versions: dict[str, str]
    """Of the runtimes that checked it."""
    unchecked: dict[str, str]
    """Runtimes of the target that did not, and why."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON (schema 1)."""
        return {
            "schema": 1,
            "target": self.target,
            "optimization_level": self.level.value,
            "verification": self.verification.to_dict(),
            "versions": self.versions,
            "unchecked": self.unchecked,
            "reference_rms": None if self.reference is None else self.reference.rms,
            "problems": [asdict(problem) for problem in self.problems],
        }


def validate_graph(
    graph: ir.Model,
    *,
    target: str | None = None,
    reference: ir.Model | None = None,
    dataset: Dataset | None = None,
    runtimes: Sequence[str] = (),
) -> Validation:
    """Run a graph unoptimised and as its target's runtimes would, and compare.

    Args:
        graph: A QDQ graph.
        target: Check the rules of this target; None: the one that the graph names, if any.
        reference: The float model that it was made from.
        dataset: Samples to compare on; None: made-up inputs.
        runtimes: Which runtimes have to compute it right, instead of the target's.

    Raises:
        EnvironmentMissingError: A runtime that was asked for is not installed.
        VerificationError: A runtime that must compute the graph right does not, the graph
            breaks a rule of the target, or it has little to do with the reference.
    """
    profile = (
        parse_target(target)
        if target is not None
        else recorded_target(graph.metadata_props.get(TARGET_KEY, "generic"), "the model")
    )
    wanted, unchecked = list(runtimes or profile.runtimes), {}
    if OPENVINO in wanted and not openvino_runtime.is_installed():
        if runtimes:
            openvino_runtime.load_openvino()
        wanted.remove(OPENVINO)
        unchecked[OPENVINO] = "openvino is not installed"
    if dataset is None:
        dataset = synthetic_data(graph, _SAMPLES, _SEED)
    batches = [batch.inputs for batch in calibration_batches(dataset)[:2]]
    verification = verify_graph(graph, batches, runtimes=wanted)
    versions = {ONNX_RUNTIME: str(load_onnxruntime().__version__)}
    if OPENVINO in wanted:
        versions[OPENVINO] = openvino_runtime.version()
    level = required_level(graph)
    wrong = [
        f"{_title(check, versions)}: {_problem(check, graph, batches)}"
        for check in (*verification.levels, *verification.others)
        if not check.agrees and _counts(check, level)
    ]
    if wrong:
        raise VerificationError(f"this graph is not computed right: {'; '.join(wrong)}")
    problems = lint(graph, profile, level)
    difference = None if reference is None else _against(graph, reference, batches)
    return Validation(
        profile.name, verification, level, difference, problems, versions, unchecked
    )


def _counts(check: Check, level: OptimizationLevel) -> bool:
    """Whether a graph that is to be run at ``level`` must pass a check."""
    order = [each.value for each in OptimizationLevel]
    return check.name == OPENVINO or order.index(check.name) <= order.index(level.value)


def _title(check: Check, versions: dict[str, str]) -> str:
    if check.name == OPENVINO:
        return f"OpenVINO {versions[OPENVINO]}"
    return f"ONNX Runtime {versions[ONNX_RUNTIME]}, {check.name}"


def _problem(check: Check, graph: ir.Model, batches: Batches) -> str:
    """What is wrong, and at which node."""
    if check.difference is None:
        node = named_node(check.error or "", graph)
        return f"{check.problem} (at {node})" if node else check.problem
    origin = find_origin(graph, batches, check.name)
    where = "at no node that can be told: it vanishes when one looks inside"
    return f"{check.problem}, {where if origin is None else origin}"


def _against(graph: ir.Model, reference: ir.Model, batches: Batches) -> Comparison:
    outputs = [[value.name for value in item.graph.outputs] for item in (graph, reference)]
    if outputs[0] != outputs[1]:
        raise FliqsError("the reference has other outputs than the model")
    inside = ir.convenience.create_value_mapping(graph.graph)
    # What the outputs rest on, as far as the graph still has it under the same name.
    names = [name for name in compared_names(reference) if name in inside]
    names = names or tensor_outputs(reference)
    mine, theirs = (watch(item, names, batches, way_of("none")) for item in (graph, reference))
    difference = worst(compare(a, b) for a, b in zip(mine, theirs, strict=True))
    if not np.isfinite(difference.rms) or difference.rms >= 1.0:
        raise VerificationError(
            f"the graph differs from the reference by {difference.rms:.3g} of its output"
        )
    return difference
