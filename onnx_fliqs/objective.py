"""What is optimised: the loss terms of a task, and the quality that is reported."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import ConfigError, DataError, UnsupportedError
from onnx_fliqs.judged import FLOATS, Judged, judged_values

__all__ = [
    "NO_CLASSES",
    "LossKind",
    "LossTerm",
    "Metric",
    "Objective",
    "are_numbers",
    "before_cast",
    "choose_objective",
    "decisions",
    "fits_numbers",
    "metric_of",
    "no_output_for",
    "quality",
    "varies",
]

Array: TypeAlias = npt.NDArray[Any]

NO_CLASSES: Final = (
    "labels were given, but no output has the shape [N, classes]; numbers to regress must be"
    " floats"
)
_LEAST_VARIANCE: Final = 1e-12
_ROUNDING: Final = 1e-6
"""What of the largest number a standard deviation has to be."""


class LossKind(enum.Enum):
    """The loss of one value."""

    CROSS_ENTROPY = "cross-entropy"
    LABEL_ERROR = "label-mse"
    """Squared difference from labels that are numbers, relative to their variance."""
    DIVERGENCE = "kl"
    """Kullback-Leibler divergence from the float model's class probabilities."""
    SQUARED_ERROR = "mse"
    """Squared difference from the float model, relative to that value's variance."""


class Metric(enum.Enum):
    """What is reported as quality; 1 is best."""

    ACCURACY = "accuracy"
    """Share of samples whose largest score is at the label."""
    AGREEMENT = "agreement"
    """Share of samples whose largest score, or whole number, is where, or what, the float
    model's is."""
    R2 = "r2"
    """1 - squared difference from the float model / its variance (may be negative)."""
    LABEL_R2 = "label-r2"
    """The same from labels that are numbers."""

    @property
    def of_classes(self) -> bool:
        """Whether it counts samples."""
        return self in (Metric.ACCURACY, Metric.AGREEMENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """One summand of the loss."""

    kind: LossKind
    output: str
    """The value that it judges: a graph output, or what one rests on (see ``judged``)."""
    scores: str
    """The value that enters the loss: the judged one before a final Cast and Softmax."""
    weight: float = 1.0
    variance: float = 1.0
    """Of what a squared error is taken from: the float model's value, or the labels."""

    @property
    def needs_labels(self) -> bool:
        """Whether the labels are compared with."""
        return self.kind in (LossKind.CROSS_ENTROPY, LossKind.LABEL_ERROR)

    @property
    def needs_teacher(self) -> bool:
        """Whether the float model's value is compared with."""
        return not self.needs_labels


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss terms, and how quality is measured."""

    terms: tuple[LossTerm, ...]
    comparison: tuple[LossTerm, ...]
    """What tells how far outputs are from the float model's; without labels, the loss."""
    metric: Metric
    notes: tuple[str, ...] = ()
    """What a user should know about the choice."""

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """Values for which the float model is asked."""
        return tuple(dict.fromkeys(term.output for term in self.comparison))

    @property
    def distills(self) -> bool:
        """Whether the float model enters the loss."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Values by which quality is judged; not all are graph outputs."""
        return tuple(dict.fromkeys(t.output for t in self.terms))

    @property
    def uses_labels(self) -> bool:
        """Whether labels enter the loss."""
        return any(t.needs_labels for t in self.terms)


def before_cast(value: ir.Value) -> ir.Value:
    """What a Cast between floats that ends the model reads, else the value itself.

    The loss is taken there: the gradient of a Cast to float16 would pass through float16.
    """
    node = value.producer()
    if node is not None and node.op_type == "Cast" and not node.domain:
        source = node.inputs[0]
        if source is not None and source.dtype in FLOATS and value.dtype in FLOATS:
            return source
    return value


def choose_objective(
    model: ir.Model,
    teacher: Mapping[str, Array],
    *,
    labels: Array | None,
    distillation: float,
    loss: str = "auto",
) -> Objective:
    """Decide the loss from the values that are judged, and the data.

    With labels that are classes: cross-entropy on the first value with a class axis, mixed
    with the divergence from the float model. With labels that are numbers: the squared error
    of the first value of their shape, mixed with that from the float model. Without: the
    divergence for class scores of shape [N, C] and for what ArgMax compares along axis 1, else
    the squared error; a value with the shape of an input is a reconstruction, not scores.

    Args:
        model: The canonical model.
        teacher: The float model's judged values on some samples, by name; those that are
            missing are not judged.
        labels: Of some samples; whole numbers are classes. None: there are none.
        distillation: Share of the float model in a labelled loss, 0 to 1.
        loss: ``auto``, or ``cross-entropy`` for labels alone, ``kl`` or ``mse`` for the float
            model alone.

    Raises:
        UnsupportedError: No output is, or rests on, a tensor of floating-point numbers.
        ConfigError: Cross-entropy is asked for without classes.
        DataError: No output has a class axis, or the shape of the numbers.
    """
    judged = [j for j in judged_values(model) if _is_usable(teacher.get(j.name))]
    if not judged:
        raise UnsupportedError(
            "no output of the model is, or rests on, a tensor of floating-point numbers that"
            " has the same shape for all data"
        )
    kind = None if loss == "auto" else LossKind(loss)
    if kind is LossKind.CROSS_ENTROPY:
        if labels is None:
            raise ConfigError("the cross-entropy loss needs `labels` in the data")
        if are_numbers(labels):
            raise ConfigError(
                "the cross-entropy loss needs `labels` that are classes: integers"
            )
        return _classified(model, teacher, judged, 0.0)
    if labels is not None and kind is None:
        if are_numbers(labels):
            return _regressed(teacher, judged, labels, distillation)
        return _classified(model, teacher, judged, distillation)
    # In units of a variance of zero, rounding would outweigh all other outputs.
    varied = [j for j in judged if varies(teacher[j.name])] or judged
    still = tuple(
        f"{j.name!r} is not judged: the float model gives the same number for all samples"
        for j in judged
        if j not in varied
    )
    terms = tuple(_distilled(model, teacher[j.name], j, kind) for j in varied)
    classes = all(term.kind is LossKind.DIVERGENCE for term in terms)
    metric = Metric.AGREEMENT if classes else Metric.R2
    return Objective(terms, terms, metric, (*_notes(varied), *still))


def metric_of(model: ir.Model, outputs: Mapping[str, Array]) -> Metric:
    """How the outputs of two models are compared: by classes, or by numbers.

    Args:
        model: One of the models.
        outputs: Some of its outputs on some samples, by name.
    """
    classes = all(
        values.dtype.kind in "biu" or _is_classes(model, Judged(name, name), values)
        for name, values in outputs.items()
    )
    return Metric.AGREEMENT if classes else Metric.R2


def are_numbers(labels: Array) -> bool:
    """Whether labels are numbers to come close to, not classes."""
    return labels.dtype.kind == "f"


def fits_numbers(values: Array, labels: Array) -> bool:
    """Whether an output has a number for each label; axes of length 1 do not matter."""
    own, wanted = ([n for n in each.shape[1:] if n != 1] for each in (values, labels))
    return values.dtype.kind == "f" and values.ndim > 0 and own == wanted


def varies(values: Array) -> bool:
    """Whether an output tells samples or numbers apart, by more than rounding.

    A number that has no axis of samples, as a mean over a batch, does not.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max(initial=0.0))
    return values.ndim > 0 and _variance(values) > (_ROUNDING * largest) ** 2


def _is_usable(values: Array | None) -> bool:
    return values is not None and values.dtype.kind not in "biu" and values.size > 0


def _notes(judged: Sequence[Judged]) -> tuple[str, ...]:
    """One line for each output that is judged by what it rests on."""
    behind: dict[str, list[str]] = {}
    for each in judged:
        if each.name != each.output:
            behind.setdefault(each.output, []).append(each.name)
    return tuple(
        f"output {output!r} has no gradient or no fixed shape: loss and quality are those of"
        f" {', '.join(map(repr, names))}, on which it rests"
        for output, names in behind.items()
    )


def _regressed(
    teacher: Mapping[str, Array], judged: Sequence[Judged], labels: Array, share: float
) -> Objective:
    found = next((j for j in judged if fits_numbers(teacher[j.name], labels)), None)
    if found is None:
        raise DataError(no_output_for(labels))
    name = found.name
    own = LossTerm(
        kind=LossKind.SQUARED_ERROR,
        output=name,
        scores=name,
        variance=max(_variance(teacher[name]), _LEAST_VARIANCE),
    )
    given = replace(
        own,
        kind=LossKind.LABEL_ERROR,
        variance=max(_variance(labels), _LEAST_VARIANCE),
    )
    weighted = (replace(given, weight=1 - share), replace(own, weight=share))
    terms = tuple(term for term in weighted if term.weight > 0)
    return Objective(terms, (own,), Metric.LABEL_R2, _notes([found]))


def no_output_for(labels: Array) -> str:
    """What to say where labels are numbers, and no output fits them."""
    shape = ", ".join(["N", *map(str, labels.shape[1:])])
    return (
        f"labels are floats of the shape [{shape}], which no output has: to be regressed they"
        " need its shape, and as classes to be integers"
    )


def _classified(
    model: ir.Model, teacher: Mapping[str, Array], judged: Sequence[Judged], share: float
) -> Objective:
    found = next((j for j in judged if teacher[j.name].ndim >= 2), None)
    if found is None:
        raise DataError(NO_CLASSES)
    primary = found.name
    scores = _scores(model, primary)
    terms = [
        LossTerm(kind=kind, output=primary, scores=scores, weight=weight)
        for kind, weight in (
            (LossKind.CROSS_ENTROPY, 1 - share),
            (LossKind.DIVERGENCE, share),
        )
        if weight > 0
    ]
    divergence = LossTerm(kind=LossKind.DIVERGENCE, output=primary, scores=scores)
    return Objective(tuple(terms), (divergence,), Metric.ACCURACY, _notes([found]))


def _distilled(
    model: ir.Model, values: Array, judged: Judged, kind: LossKind | None
) -> LossTerm:
    if kind is None:
        is_classes = _is_classes(model, judged, values)
        kind = LossKind.DIVERGENCE if is_classes else LossKind.SQUARED_ERROR
    squares = kind is LossKind.SQUARED_ERROR
    return LossTerm(
        kind=kind,
        output=judged.name,
        scores=judged.name if squares else _scores(model, judged.name),
        variance=max(_variance(values), _LEAST_VARIANCE),
    )


def _is_classes(model: ir.Model, judged: Judged, values: Array) -> bool:
    """Whether a value holds the scores of classes along axis 1."""
    if judged.class_axis is not None:
        return judged.class_axis == 1
    shape = _value(model, judged.name).shape
    reconstruction = any(v.shape is not None and v.shape == shape for v in model.graph.inputs)
    return values.ndim == 2 and values.shape[1] > 1 and not reconstruction


def _value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]


def _scores(model: ir.Model, name: str) -> str:
    """The input of a Softmax over axis 1 that makes a value, else what makes it."""
    value = before_cast(_value(model, name))
    node = value.producer()
    if node is not None and node.op_type == "Softmax" and not node.domain:
        scores = node.inputs[0]
        rank = len(value.shape) if value.shape is not None else 2
        if scores is not None and node.attributes.get_int("axis", -1) in (1, 1 - rank):
            return str(scores.name)
    return str(value.name)


def quality(
    metric: Metric,
    outputs: Mapping[str, Array],
    *,
    labels: Array | None = None,
    teacher: Mapping[str, Array] | None = None,
) -> float:
    """Measure quality.

    Args:
        metric: What to measure.
        outputs: Output name → values of shape [N, ...]; accuracy looks at the first.
        labels: [N, ...] for the metrics that compare with them.
        teacher: The float model's outputs, for the other metrics.
    """
    first = next(iter(outputs.values()))
    if metric is Metric.ACCURACY:
        return float(np.mean(decisions(first) == labels))
    if metric is Metric.LABEL_R2:
        assert labels is not None
        return _r2(first, labels.reshape(first.shape))
    assert teacher is not None
    measure = _agreement if metric is Metric.AGREEMENT else _r2
    return float(np.mean([measure(values, teacher[name]) for name, values in outputs.items()]))


def decisions(values: Array) -> Array:
    """The class of each place, shape [N, ...]: -1, which is none, where a score is NaN.

    Args:
        values: Scores, shape [N, classes, ...], or whole numbers, which are their own.
    """
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    undecided = np.any(np.isnan(values), axis=1)
    return np.where(undecided, -1, np.argmax(values, axis=1))


def _agreement(values: Array, teacher: Array) -> float:
    mine, theirs = decisions(values), decisions(teacher)
    decided = values.dtype.kind in "biu" or mine >= 0
    return float(np.mean((mine == theirs) & decided))


def _r2(values: Array, teacher: Array) -> float:
    # A mask's infinities are the same in both, and no numbers.
    same = values == teacher
    difference = np.zeros(values.shape)
    np.subtract(values, teacher, out=difference, where=~same, dtype=np.float64)
    error = float(np.mean(np.square(difference)))
    variance = _variance(teacher)
    return 1.0 - error / variance if variance > 0 else float(error == 0)


def _variance(values: Array) -> float:
    """Of what is finite."""
    finite = values[np.isfinite(values)]
    return float(np.var(finite, dtype=np.float64)) if finite.size else 0.0
