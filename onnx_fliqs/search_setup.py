"""What a search starts from: the model, the data and the settings, checked and prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs._version import __version__
from onnx_fliqs.borders import Border
from onnx_fliqs.budget_shares import budget_shares
from onnx_fliqs.calibrate import distortions
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import Choices, Signal
from onnx_fliqs.cost import Budget, BudgetKind, CostTable, cost_of, default_budget
from onnx_fliqs.data import Dataset, check_labels, pieces
from onnx_fliqs.errors import ConfigError, DataError
from onnx_fliqs.evaluation import most_judged, run_dataset, scored_output
from onnx_fliqs.judged import exposed, judged_values
from onnx_fliqs.legality import check_pairs
from onnx_fliqs.model import fingerprint
from onnx_fliqs.objective import Metric, Objective, are_numbers, choose_objective
from onnx_fliqs.prepare import Prepared, calibrate, prepare, synthetic_data, weights_of
from onnx_fliqs.runtime import make_session
from onnx_fliqs.sampling import split
from onnx_fliqs.search_state import Scales
from onnx_fliqs.sites import ScaleTable, SearchSpace, SiteValues
from onnx_fliqs.sources import DataSource, ModelSource, dataset_of, model_of
from onnx_fliqs.target_files import parse_target, target_to_json
from onnx_fliqs.targets import Target
from onnx_fliqs.trainability import why_frozen

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["Setup", "set_up"]

Array: TypeAlias = npt.NDArray[Any]

_TARGET: Final = "generic"
_SYNTHETIC_SAMPLES: Final = 256
_LARGEST_VALIDATION: Final = 2000
_SAMPLE: Final = 64
"""Samples on which the float model's outputs are looked at, at most."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that does not change during a search."""

    config: SearchConfig
    target: Target
    prepared: Prepared
    scales: Scales
    distortions: tuple[npt.NDArray[np.float64], ...]
    """For each decision, [choices, 2]: relative squared errors of weights and activations."""
    budgets: tuple[Budget, ...]
    costs: CostTable
    """Of each choice of each decision, as a share of each budget."""
    borders: tuple[Border, ...]
    """Costs of pairs of decisions, as shares of a budget."""
    objective: Objective
    train: Dataset
    held_out: Dataset
    identity: Mapping[str, Any]
    warnings: tuple[str, ...]

    def values(self, choices: Choices, scales: ScaleTable) -> SiteValues:
        """What the sites are fed, for an assignment."""
        space = self.prepared.space
        return space.values(space.assign(choices), scales)


def set_up(source: ModelSource, data: DataSource | None, config: SearchConfig) -> Setup:
    """Read, check and prepare what a search needs.

    Args:
        source: The float model.
        data: Samples; None: they are made up.
        config: Settings.

    Raises:
        ConfigError: Target, space, rules or assignment do not exist, or do not fit the model.
        ModelError: The model cannot be read or quantized.
        DataError: The data does not fit the model.
        InfeasibleError: A budget cannot be met, alone or together with another.
    """
    target = _target(config)
    fixed = config.assignment
    precisions = (
        target.space(config.space, separate=config.separate)
        if fixed is None
        else fixed.space(target)
    )
    model = model_of(source)
    warnings = []
    dataset = None if data is None else dataset_of(data, model)
    prepared = prepare(
        model,
        dataset,
        target,
        precisions,
        rules=config.rules,
        distinct=fixed is None,
        remove_quantization=config.remove_quantization,
    )
    if config.separate:
        check_pairs(prepared.space, target)
    if fixed is not None:
        only = prepared.space.fixed(fixed.precisions(prepared.space))
        prepared = replace(prepared, space=only)
    budgets = _budgets(prepared.space, target, config)
    if config.latency_table is not None:
        config.latency_table.check(prepared.space, fingerprint(model), target.name)
    costs, borders = budget_shares(prepared.space, budgets, config.latency_table)
    if dataset is None:
        dataset = synthetic_data(prepared.canonical, _SYNTHETIC_SAMPLES, config.seed)
        warnings.append(
            "no data was given: thresholds, weights and quality rest on made-up inputs;"
            " pass --data for a model to ship"
        )
    if len(dataset) == 1:
        warnings.append("there is a single sample, which trains and judges")
    names = [judged.name for judged in judged_values(prepared.canonical)]
    session = make_session(exposed(prepared.canonical, names))
    most = min(_LARGEST_VALIDATION, most_judged(session, dataset, names))
    share = min(config.validation, most / len(dataset))
    train, held_out = split(dataset, share, config.seed)
    sample = train.take(np.arange(min(_SAMPLE, most, len(train))))
    objective = _objective(prepared, train, sample, config, session, names)
    _check_signal(config.controller.signal, train, objective)
    if train.stored_labels is not None and not objective.uses_labels and config.loss != "auto":
        warnings.append(
            f"the labels are not used: the loss {config.loss} compares with the float model"
            " alone"
        )
    warnings += objective.notes
    prepared, scales, samples = calibrate(
        prepared, target, train, config.seed, config.thresholds
    )
    weights = weights_of(prepared.canonical, prepared.space)
    prepared = _mark_frozen(prepared, objective.outputs)
    identity = {
        "version": __version__,
        "model": fingerprint(model),
        "data": dataset.fingerprint(),
        "settings": _settings(config, target, budgets),
    }
    return Setup(
        config,
        target,
        prepared,
        scales,
        distortions(prepared.space, samples, weights, scales),
        budgets,
        costs,
        borders,
        objective,
        train,
        held_out,
        identity,
        tuple(warnings),
    )


def _target(config: SearchConfig) -> Target:
    """The one that is asked for, else the one that the assignment was chosen for."""
    if config.target is None and config.assignment is not None:
        return config.assignment.own_target()
    return parse_target(config.target or _TARGET)


def _budgets(space: SearchSpace, target: Target, config: SearchConfig) -> tuple[Budget, ...]:
    """What is asked for, else the target's; of a given assignment its own cost."""
    if config.assignment is not None:
        cost = cost_of(space, space.assign([0] * len(space.decisions)))
        if cost.bops:
            return (Budget(BudgetKind.BITS, cost.effective_bits),)
    return config.budgets or (default_budget(space, target.default_bits),)


def _settings(
    config: SearchConfig, target: Target, budgets: tuple[Budget, ...]
) -> dict[str, Any]:
    """The settings that change the result, as JSON values."""
    settings = asdict(config)
    # The path of a profile does not tell whether somebody has edited it.
    settings["target"] = target_to_json(target)
    settings["budget"] = [(budget.kind.value, budget.value) for budget in budgets]
    table = config.latency_table
    settings["latency_table"] = None if table is None else table.digest()
    settings["workers"] = config.threads
    del settings["checkpoint_every"]
    return _with_values(settings)


def _with_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the values of enumerations in their place."""
    return {
        name: _with_values(value)
        if isinstance(value, dict)
        else value.value
        if isinstance(value, Enum)
        else value
        for name, value in settings.items()
    }


def _objective(
    prepared: Prepared,
    train: Dataset,
    sample: Dataset,
    config: SearchConfig,
    session: "InferenceSession",
    names: Sequence[str],
) -> Objective:
    """Choose the loss by a look at the float model's outputs; check the labels against it.

    Args:
        prepared: With the canonical model.
        train: What trains.
        sample: Some of it, to look at.
        config: Of the search.
        session: Of the canonical model.
        names: Its judged values.
    """
    teacher = run_dataset(session, sample, names)
    fewer = sample.take(np.arange(max(1, len(sample) // 2)))
    mixing = _mixing(teacher, run_dataset(session, fewer, names))
    teacher = {name: values for name, values in teacher.items() if name not in mixing}
    labels = None
    if train.stored_labels is not None and config.loss in ("auto", "cross-entropy"):
        # Of numbers the variance counts, which a few samples may not show: a few million do.
        labels = next(pieces(train.stored_labels, train.rows))
    if labels is not None and not are_numbers(labels):
        scores = next(iter(scored_output(teacher, sample).values()))
        check_labels(train, scores.shape[1])
    objective = choose_objective(
        prepared.canonical,
        teacher,
        labels=labels,
        distillation=config.distillation,
        loss=config.loss,
    )
    for name in objective.outputs:
        if not np.isfinite(teacher[name]).all():
            raise DataError(
                f"{name!r}, which is judged, is not finite in the float model for some samples"
            )
    notes = tuple(
        f"{name!r} is not judged: its shape depends on the number of samples in a batch"
        for name in mixing
    )
    return replace(objective, notes=(*objective.notes, *notes))


def _mixing(outputs: Mapping[str, Array], of_fewer: Mapping[str, Array]) -> tuple[str, ...]:
    """Outputs with more than one axis of samples, as similarities of pairs have."""
    return tuple(
        name
        for name, values in of_fewer.items()
        if name in outputs and values.shape[1:] != outputs[name].shape[1:]
    )


def _check_signal(signal: Signal, data: Dataset, objective: Objective) -> None:
    """Refuse a signal that the data or the model cannot give.

    Raises:
        ConfigError: It needs labels, or classes.
    """
    if signal is Signal.ACCURACY and objective.metric is not Metric.ACCURACY:
        used = objective.metric is Metric.LABEL_R2
        left = (
            "the loss leaves out"
            if data.stored_labels is not None
            else "the data needs to have"
        )
        why = "need to be classes" if used else left
        raise ConfigError(f"the signal accuracy rests on `labels`, which {why}")
    if signal is Signal.AGREEMENT and not objective.metric.of_classes:
        raise ConfigError("the signal agreement needs a model whose outputs are class scores")


def _mark_frozen(prepared: Prepared, outputs: tuple[str, ...]) -> Prepared:
    """Note on each layer why its weight will not be trained."""
    judged = exposed(prepared.canonical, outputs)
    reasons = why_frozen(judged, prepared.space.layers, outputs)
    layers = tuple(
        replace(layer, frozen=reasons.get(layer.name)) for layer in prepared.space.layers
    )
    return replace(prepared, space=replace(prepared.space, layers=layers))
