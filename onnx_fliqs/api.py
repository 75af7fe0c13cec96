"""The verbs of the command line that need no training."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.assignment import Assignment
from onnx_fliqs.cost import cost_of
from onnx_fliqs.data import Dataset, input_specs, load_npz
from onnx_fliqs.emission import TARGET_KEY, required_level, ship
from onnx_fliqs.emission import emit as emit_verified
from onnx_fliqs.errors import (
    DataError,
    FliqsError,
    RunError,
    UnknownOperatorError,
    VerificationError,
)
from onnx_fliqs.evaluation import (
    Evaluation,
    evaluate_model,
    run_dataset,
    scored_output,
)
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.judged import compared_names, exposed, judged_values, tensor_outputs
from onnx_fliqs.lint import lint
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import Objective, choose_objective, quality
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.prepare import (
    Prepared,
    calibrate,
    calibration_batches,
    prepare,
    synthetic_data,
)
from onnx_fliqs.report import SearchResult, layer_reports
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session
from onnx_fliqs.sites import Layer, Skipped
from onnx_fliqs.targets import Target, parse_target
from onnx_fliqs.trainability import why_frozen
from onnx_fliqs.verify import Comparison, Verification, compare, verify_levels

__all__ = ["Inspection", "Validation", "emit", "evaluate", "inspect", "validate"]

_SYNTHETIC_SAMPLES: Final = 256
_VALIDATION_SAMPLES: Final = 32
_SEED: Final = 0


def _model(source: Path | ir.Model) -> ir.Model:
    return load_model(source) if isinstance(source, Path) else source


def _dataset(source: Path | Dataset, model: ir.Model) -> Dataset:
    return load_npz(source, input_specs(model)) if isinstance(source, Path) else source


# --- inspect -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a search would find in a model."""

    target: Target
    precisions: tuple[str, ...]
    """The target's default search space."""
    layers: tuple[Layer, ...]
    choices: Mapping[str, tuple[str, ...]]
    """Layer name → names of the precisions that it can take, cheapest first."""
    skipped: tuple[Skipped, ...]
    opset: int | None
    """Of the standard operators, in the file."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON (schema 1)."""
        return {
            "schema": 1,
            "target": self.target.name,
            "formats": list(self.precisions),
            "opset": self.opset,
            "layers": [
                {
                    "name": layer.name,
                    "op": layer.op_type,
                    "macs": layer.macs,
                    "params": layer.params,
                    "trainable": bool(layer.weights) and layer.frozen is None,
                    "reason": layer.frozen,
                    "weight_only": layer.weight_only,
                    "precisions": list(self.choices[layer.name]),
                }
                for layer in self.layers
            ],
            "skipped": [asdict(item) for item in self.skipped],
            "macs": sum(layer.macs for layer in self.layers),
            "params": sum(layer.params for layer in self.layers),
            "warnings": list(self.warnings),
        }


def inspect(
    model: Path | ir.Model, *, target: str = "generic", remove_quantization: bool = False
) -> Inspection:
    """List the layers of a model, what they cost, and what cannot be quantized or trained.

    Args:
        model: A float ONNX model.
        target: Name of a target.
        remove_quantization: Turn a quantized model back into a float model, not refuse it.

    Raises:
        ModelError: The model cannot be read, or nothing in it can be quantized.
    """
    profile = parse_target(target)
    precisions = profile.space(None)
    source = _model(model)
    warnings = []
    try:
        prepared = prepare(
            source, None, profile, precisions, remove_quantization=remove_quantization
        )
    except (DataError, RunError, UnknownOperatorError) as error:
        # Multiply-accumulates are counted by running the model.
        canonical = canonicalise(source.clone(), remove_quantization=remove_quantization)
        prepared = Prepared(canonical, find_layers(canonical, profile, precisions))
        warnings.append(f"multiply-accumulates are not counted: {error}")
    space = prepared.space
    outputs = [judged.name for judged in judged_values(prepared.canonical)]
    reasons = why_frozen(exposed(prepared.canonical, outputs), space.layers, outputs)
    return Inspection(
        profile,
        tuple(precision.name for precision in precisions),
        tuple(replace(x, frozen=reasons.get(x.name)) for x in space.layers),
        {
            name: tuple(precision.name for precision in choices)
            for names, choices in zip(space.decisions, space.choices, strict=True)
            for name in names
        },
        space.skipped,
        source.opset_imports.get(""),
        tuple(warnings),
    )


# --- emit ----------------------------------------------------------------------------------


def emit(
    model: Path | ir.Model,
    assignment: Assignment,
    data: Path | Dataset | None = None,
    *,
    target: str | None = None,
    remove_quantization: bool = False,
) -> SearchResult:
    """Emit an assignment with the model's own weights: post-training quantization.

    Args:
        model: A float ONNX model.
        assignment: A format for every layer.
        data: Samples to calibrate the activations' thresholds; None: made-up inputs.
        target: Name of a target; None: the assignment's.
        remove_quantization: Turn a quantized model back into a float model, not refuse it.

    Raises:
        ConfigError: The assignment does not fit the model or the target.
        VerificationError: The emitted graph does not compute what was simulated.
    """
    started = time.monotonic()
    profile = parse_target(target or assignment.target)
    named = {name: profile.check(name) for name in assignment.layers.values()}
    source = _model(model)
    warnings = []
    dataset = None if data is None else _dataset(data, source)
    ordered = sorted(set(named.values()), key=lambda precision: precision.order)
    prepared = prepare(
        source, dataset, profile, ordered, remove_quantization=remove_quantization
    )
    chosen = assignment.precisions(prepared.space)
    if dataset is None:
        dataset = synthetic_data(prepared.canonical, _SYNTHETIC_SAMPLES, _SEED)
        warnings.append("no data was given: thresholds rest on made-up inputs; pass --data")
    prepared, scales, _ = calibrate(prepared, profile, dataset, _SEED)
    batches = [batch.inputs for batch in calibration_batches(dataset)[:2]]
    emitted = emit_verified(
        prepared.canonical, prepared.space, chosen, scales, profile, batches
    )
    objective, float_quality, quantized = _qualities(
        prepared.canonical, emitted.graph, emitted.level, dataset
    )
    shipped, notes = ship(emitted.graph, profile, dataset)
    return SearchResult(
        model=shipped,
        trained=None,
        assignment=Assignment(
            {layer.name: chosen[layer.name].name for layer in prepared.space.layers},
            profile.name,
        ),
        layers=tuple(
            replace(row, trained=False) for row in layer_reports(prepared.space, chosen)
        ),
        skipped=prepared.space.skipped,
        cost=cost_of(prepared.space, chosen),
        metric=objective.metric.value,
        float_quality=float_quality,
        quantized_quality=quantized,
        untrained_loss=None,
        loss=None,
        verification=emitted.verification,
        optimization_level=emitted.level,
        steps=0,
        seconds=time.monotonic() - started,
        seed=_SEED,
        entropy=None,
        strategy=None,
        warnings=(*warnings, *objective.notes, *emitted.warnings, *notes),
    )


def _qualities(
    canonical: ir.Model, graph: ir.Model, level: OptimizationLevel, dataset: Dataset
) -> tuple[Objective, float, float]:
    """What is judged; quality of the float model and of the graph on the calibration data."""
    names = [judged.name for judged in judged_values(canonical)]
    reference = run_dataset(make_session(exposed(canonical, names)), dataset, names)
    watched = make_session(exposed(graph, names), level=level)
    outputs = run_dataset(watched, dataset, names)
    labelled = dataset.labels is not None
    if labelled:
        scored_output(reference, dataset)
    objective = choose_objective(canonical, reference, labelled=labelled, distillation=0.0)
    first, second = (
        quality(
            objective.metric,
            {name: found[name] for name in objective.outputs},
            labels=dataset.labels,
            teacher=reference,
        )
        for found in (reference, outputs)
    )
    return objective, first, second


# --- evaluate and validate -----------------------------------------------------------------


def evaluate(
    model: Path | ir.Model,
    data: Path | Dataset,
    *,
    against: Path | ir.Model | None = None,
) -> Evaluation:
    """Measure accuracy, or the agreement with another model.

    Args:
        model: Any ONNX model; an emitted one runs at the optimisation level it asks for.
        data: Samples, with ``labels`` unless ``against`` is given.
        against: Measure agreement with this model instead of accuracy.

    Raises:
        DataError: The data does not fit the model.
    """
    loaded = _model(model)
    other = None if against is None else _model(against)
    return evaluate_model(loaded, _dataset(data, loaded), against=other)


@dataclass(frozen=True, slots=True)
class Validation:
    """Whether a graph runs right."""

    target: str
    verification: Verification
    level: OptimizationLevel
    """At which the graph asks to be run."""
    reference: Comparison | None
    """Unoptimised graph against the float model."""
    problems: tuple[str, ...]
    """Where the graph breaks the target's rules."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON (schema 1)."""
        return {
            "schema": 1,
            "target": self.target,
            "optimization_level": self.level.value,
            "verification": self.verification.to_dict(),
            "reference_rms": None if self.reference is None else self.reference.rms,
            "problems": list(self.problems),
        }


def validate(
    model: Path | ir.Model,
    *,
    target: str | None = None,
    reference: Path | ir.Model | None = None,
    data: Path | Dataset | None = None,
) -> Validation:
    """Run a graph unoptimised, at the basic and at the default level, and compare.

    Args:
        model: A QDQ graph, from here or from elsewhere.
        target: Check the rules of this target; None: the one that the graph names, if any.
        reference: The float model that it was made from.
        data: Samples to compare on; None: made-up inputs.

    Raises:
        VerificationError: A level that must compute the graph right does not, the graph breaks
            a rule of the target, or it has little to do with the reference.
    """
    graph = _model(model)
    profile = parse_target(target or graph.metadata_props.get(TARGET_KEY, "generic"))
    dataset = (
        synthetic_data(graph, _VALIDATION_SAMPLES, _SEED)
        if data is None
        else _dataset(data, graph)
    )
    batches = [batch.inputs for batch in calibration_batches(dataset)[:2]]
    verification = verify_levels(graph, batches)
    level = required_level(graph)
    wrong = [
        check
        for check in verification.levels
        if not check.agrees and _reaches(level, check.level)
    ]
    if wrong:
        raise VerificationError(
            f"ONNX Runtime does not compute this graph right: {verification.why()}"
        )
    problems = lint(graph, profile)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VerificationError(f"not a graph for {profile.name}: {problems[0]}{more}")
    difference = None
    if reference is not None:
        difference = _against(graph, _model(reference), batches)
    return Validation(profile.name, verification, level, difference, problems)


def _reaches(level: OptimizationLevel, other: OptimizationLevel) -> bool:
    """Whether a graph to be run at ``level`` must be right at the ``other``."""
    order = list(OptimizationLevel)
    return order.index(other) <= order.index(level)


def _against(graph: ir.Model, reference: ir.Model, batches: list[Any]) -> Comparison:
    outputs = [[value.name for value in item.graph.outputs] for item in (graph, reference)]
    if outputs[0] != outputs[1]:
        raise FliqsError("the reference has other outputs than the model")
    inside = ir.convenience.create_value_mapping(graph.graph)
    # What the outputs rest on, as far as the graph still has it under the same name.
    names = [name for name in compared_names(reference) if name in inside]
    names = names or tensor_outputs(reference)
    sessions = [
        make_session(exposed(item, names), level=OptimizationLevel.NONE)
        for item in (graph, reference)
    ]
    rows = [
        [dict(zip(names, run_session(s, names, f), strict=True)) for f in batches]
        for s in sessions
    ]
    found = [compare(mine, theirs) for mine, theirs in zip(*rows, strict=True)]
    worst = Comparison(max(c.rms for c in found), max(c.largest for c in found))
    if not np.isfinite(worst.rms) or worst.rms >= 1.0:
        raise VerificationError(
            f"the graph differs from the reference by {worst.rms:.3g} of its output"
        )
    return worst
