"""The verbs of the command line that need no training."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.assignment import Assignment
from onnx_fliqs.bias_correction import corrected_biases
from onnx_fliqs.cost import cost_of
from onnx_fliqs.data import Dataset
from onnx_fliqs.doubtful_data import doubtful_data
from onnx_fliqs.emission import emit as emit_verified
from onnx_fliqs.emission import ship
from onnx_fliqs.errors import (
    DataError,
    RunError,
    UnknownOperatorError,
)
from onnx_fliqs.evaluation import (
    Evaluation,
    evaluate_model,
    most_judged,
    not_finite,
    run_dataset,
    scored_output,
)
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.judged import exposed, judged_values
from onnx_fliqs.legality import check_pairs
from onnx_fliqs.objective import Objective, choose_objective, quality
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import in_words, parse_precision
from onnx_fliqs.prepare import (
    Prepared,
    calibrate,
    calibration_batches,
    prepare,
    synthetic_data,
    with_weights,
)
from onnx_fliqs.report import SearchResult, layer_reports
from onnx_fliqs.rules import Rule
from onnx_fliqs.runtime import OptimizationLevel, make_session
from onnx_fliqs.sites import Layer, Skipped
from onnx_fliqs.sources import DataSource, ModelSource, dataset_of, model_of
from onnx_fliqs.target_files import parse_target
from onnx_fliqs.targets import Target
from onnx_fliqs.trainability import why_frozen
from onnx_fliqs.validation import Validation, validate_graph

__all__ = ["Inspection", "Validation", "emit", "evaluate", "inspect", "validate"]

_SYNTHETIC_SAMPLES: Final = 256
_SEED: Final = 0


# --- inspect -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a search would find in a model."""

    target: Target
    precisions: tuple[str, ...]
    """The search space, with all its pairs where they are chosen apart."""
    layers: tuple[Layer, ...]
    choices: Mapping[str, tuple[str, ...]]
    """Layer name → names of the precisions that it can take, cheapest first."""
    shared: tuple[tuple[str, ...], ...]
    """Names of the layers that share a precision."""
    skipped: tuple[Skipped, ...]
    opset: int | None
    """Of the standard operators, in the file."""
    warnings: tuple[str, ...]

    @property
    def searched(self) -> str:
        """The search space in words."""
        return in_words([parse_precision(name) for name in self.precisions])

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
                    "rule": layer.rule,
                }
                for layer in self.layers
            ],
            "shared": [list(names) for names in self.shared],
            "skipped": [asdict(item) for item in self.skipped],
            "macs": sum(layer.macs for layer in self.layers),
            "params": sum(layer.params for layer in self.layers),
            "warnings": list(self.warnings),
        }


def inspect(
    model: ModelSource,
    *,
    target: str = "generic",
    space: str | None = None,
    separate: bool | None = None,
    rules: Sequence[Rule] = (),
    remove_quantization: bool = False,
) -> Inspection:
    """List the layers of a model, what they cost, and what cannot be quantized or trained.

    Args:
        model: A float ONNX model.
        target: Name of a target, or path of a profile.
        space: A named space or a comma list of formats; None: the target's own.
        separate: Choose the formats of weights and of activations apart; None: those that
            are quantized, unless the space names pairs itself.
        rules: For single layers.
        remove_quantization: Turn a quantized model back into a float model, not refuse it.

    Raises:
        ConfigError: The target does not run the space, or lets no layer choose formats apart
            that should; or a rule does not fit the model.
        ModelError: The model cannot be read, or nothing in it can be quantized.
    """
    profile = parse_target(target)
    precisions = profile.space(space, separate=separate)
    source = model_of(model)
    warnings = []
    try:
        prepared = prepare(
            source,
            None,
            profile,
            precisions,
            rules=rules,
            remove_quantization=remove_quantization,
        )
    except (DataError, RunError, UnknownOperatorError) as error:
        # Multiply-accumulates are counted by running the model.
        canonical = canonicalise(source.clone(), remove_quantization=remove_quantization)
        prepared = Prepared(canonical, find_layers(canonical, profile, precisions, rules))
        warnings.append(f"multiply-accumulates are not counted: {error}")
    found = prepared.space
    if separate:
        check_pairs(found, profile)
    outputs = [judged.name for judged in judged_values(prepared.canonical)]
    reasons = why_frozen(exposed(prepared.canonical, outputs), found.layers, outputs)
    return Inspection(
        profile,
        tuple(precision.name for precision in precisions),
        tuple(replace(x, frozen=reasons.get(x.name)) for x in found.layers),
        {
            name: tuple(precision.name for precision in choices)
            for names, choices in zip(found.decisions, found.choices, strict=True)
            for name in names
        },
        tuple(names for names in found.decisions if len(names) > 1),
        found.skipped,
        source.opset_imports.get(""),
        tuple(warnings),
    )


# --- emit ----------------------------------------------------------------------------------


def emit(
    model: ModelSource,
    assignment: Assignment,
    data: DataSource | None = None,
    *,
    target: str | None = None,
    remove_quantization: bool = False,
    equalize: bool = False,
    bias_correction: bool = True,
) -> SearchResult:
    """Emit an assignment with the model's own weights: post-training quantization.

    Args:
        model: A float ONNX model.
        assignment: A format for every layer.
        data: Samples to calibrate the activations' thresholds, and to measure the quality on
            as many as can be kept (2^28 numbers of inputs or of outputs); None: made-up
            inputs.
        target: Name of a target, or path of a profile; None: the assignment's.
        remove_quantization: Turn a quantized model back into a float model, not refuse it.
        equalize: Equalize the weight ranges of the channels between layers first.
        bias_correction: Take the mean error of each layer, measured on the data, out of its
            bias. Made-up inputs do not tell it: without data the biases stay.

    Raises:
        ConfigError: The assignment does not fit the model or the target.
        ModelError: The model cannot be read or quantized.
        DataError: The data does not fit the model.
        VerificationError: The emitted graph does not compute what was simulated.
    """
    started = time.monotonic()
    profile = assignment.own_target() if target is None else parse_target(target)
    source = model_of(model)
    warnings = []
    dataset = None if data is None else dataset_of(data, source)
    prepared = prepare(
        source,
        dataset,
        profile,
        assignment.space(profile),
        distinct=False,
        remove_quantization=remove_quantization,
        equalize=equalize,
        separate_biases=bias_correction and dataset is not None,
    )
    chosen = assignment.precisions(prepared.space)
    if dataset is None:
        dataset = synthetic_data(prepared.canonical, _SYNTHETIC_SAMPLES, _SEED)
        warnings.append(
            "no data was given: thresholds rest on made-up inputs, and biases are not"
            " corrected; pass --data"
        )
    prepared, scales, _ = calibrate(prepared, profile, dataset, _SEED)
    batches = [batch.inputs for batch in calibration_batches(dataset)]
    shipped = prepared.canonical
    if bias_correction and not dataset.synthetic:
        biases = corrected_biases(shipped, prepared.space, chosen, scales, batches)
        shipped = with_weights(shipped, biases)
    emitted = emit_verified(shipped, prepared.space, chosen, scales, profile, batches[:2])
    objective, samples, float_quality, quantized, doubts = _qualities(
        prepared.canonical, emitted.graph, emitted.level, dataset
    )
    shipped, notes = ship(emitted.graph, profile, dataset)
    return SearchResult(
        model=shipped,
        trained=None,
        assignment=Assignment.of(prepared.space, chosen, profile.name),
        layers=tuple(
            replace(row, trained=False) for row in layer_reports(prepared.space, chosen)
        ),
        skipped=prepared.space.skipped,
        cost=cost_of(prepared.space, chosen),
        metric=objective.metric.value,
        samples=samples,
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
        convergence=None,
        strategy=None,
        warnings=(*warnings, *objective.notes, *emitted.warnings, *notes, *doubts),
    )


def _qualities(
    canonical: ir.Model, graph: ir.Model, level: OptimizationLevel, dataset: Dataset
) -> tuple[Objective, int, float, float, tuple[str, ...]]:
    """What is judged; samples; quality of the float model and of the graph; warnings."""
    names = [judged.name for judged in judged_values(canonical)]
    session = make_session(exposed(canonical, names))
    most = most_judged(session, dataset, names)
    if most < len(dataset):
        order = np.random.default_rng(_SEED).permutation(len(dataset))
        dataset = dataset.take(order[:most])
    reference = run_dataset(session, dataset, names)
    watched = make_session(exposed(graph, names), level=level)
    outputs = run_dataset(watched, dataset, names)
    labels = dataset.labels
    if labels is not None:
        scored_output(reference, dataset)
    objective = choose_objective(canonical, reference, labels=labels, distillation=0.0)
    first, second = (
        quality(
            objective.metric,
            {name: found[name] for name in objective.outputs},
            labels=labels,
            teacher=reference,
        )
        for found in (reference, outputs)
    )
    judged = {name: reference[name] for name in objective.outputs}
    doubt = doubtful_data(objective.metric, judged, dataset)
    warnings = (*((doubt,) if doubt else ()), *not_finite(reference, outputs))
    return objective, len(dataset), first, second, warnings


# --- evaluate and validate -----------------------------------------------------------------


def evaluate(
    model: ModelSource,
    data: DataSource,
    *,
    against: ModelSource | None = None,
) -> Evaluation:
    """Measure accuracy, or the agreement with another model.

    Args:
        model: Any ONNX model; an emitted one runs at the optimisation level it asks for.
        data: Samples, with ``labels`` unless ``against`` is given.
        against: Measure agreement with this model instead of accuracy.

    Raises:
        ConfigError: Neither labels nor a model to compare with, or one of another signature.
        ModelError: A model cannot be read.
        DataError: The data does not fit the model.
        UnsupportedError: The models have no outputs that can be compared.
    """
    loaded = model_of(model)
    other = None if against is None else model_of(against)
    return evaluate_model(loaded, dataset_of(data, loaded), against=other)


def validate(
    model: ModelSource,
    *,
    target: str | None = None,
    reference: ModelSource | None = None,
    data: DataSource | None = None,
    runtimes: Sequence[str] = (),
) -> Validation:
    """Run a graph unoptimised and as its target's runtimes would, and compare.

    Args:
        model: A quantized graph, from here or from elsewhere.
        target: Check the rules of this target; None: the one that the graph names, if any.
        reference: The float model that it was made from.
        data: Samples to compare on; None: made-up inputs.
        runtimes: Which runtimes (``onnxruntime``, ``openvino``) have to compute it right,
            instead of the target's.

    Raises:
        EnvironmentMissingError: A runtime that was asked for is not installed.
        VerificationError: A runtime that must compute the graph right does not, the graph
            breaks a rule of the target, or it has little to do with the reference.
    """
    graph = model_of(model)
    return validate_graph(
        graph,
        target=target,
        reference=None if reference is None else model_of(reference),
        dataset=None if data is None else dataset_of(data, graph),
        runtimes=runtimes,
    )
