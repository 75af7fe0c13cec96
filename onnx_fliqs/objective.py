"""What is optimised: the loss terms of a task, and the quality that is reported."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import ConfigError, DataError, UnsupportedError

__all__ = [
    "LossKind",
    "LossTerm",
    "Metric",
    "Objective",
    "choose_objective",
    "quality",
]

Array: TypeAlias = npt.NDArray[Any]


class LossKind(enum.Enum):
    """The loss of one output."""

    CROSS_ENTROPY = "cross-entropy"
    DIVERGENCE = "kl"
    """Kullback-Leibler divergence from the float model's class probabilities."""
    SQUARED_ERROR = "mse"
    """Squared difference from the float model, relative to that output's variance."""


class Metric(enum.Enum):
    """What is reported as quality; 1 is best."""

    ACCURACY = "accuracy"
    """Share of samples whose largest score is at the label."""
    AGREEMENT = "agreement"
    """Share of samples whose largest score is where the float model's is."""
    R2 = "r2"
    """1 - squared difference from the float model / its variance (may be negative)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """One summand of the loss."""

    kind: LossKind
    output: str
    """The graph output that it judges."""
    scores: str
    """The value that enters the loss: the input of a final Softmax, else the output."""
    weight: float = 1.0
    variance: float = 1.0
    """Variance of the float model's output; of interest to the squared error only."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the float model's output is compared with."""
        return self.kind is not LossKind.CROSS_ENTROPY


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss terms, and how quality is measured."""

    terms: tuple[LossTerm, ...]
    metric: Metric

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """Outputs for which the float model is asked."""
        return tuple(dict.fromkeys(t.output for t in self.terms if t.needs_teacher))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs by which quality is judged."""
        return tuple(dict.fromkeys(t.output for t in self.terms))

    @property
    def uses_labels(self) -> bool:
        """Whether labels enter the loss."""
        return any(t.kind is LossKind.CROSS_ENTROPY for t in self.terms)


def choose_objective(
    model: ir.Model,
    teacher: Mapping[str, Array],
    *,
    labelled: bool,
    distillation: float,
    loss: str = "auto",
) -> Objective:
    """Decide the loss from the model's outputs and the data.

    With labels: cross-entropy on the first float output, mixed with the divergence from the
    float model. Without: the divergence for class scores of shape [N, C], else the squared
    error; an output that has the shape of an input is a reconstruction, not class scores.

    Args:
        model: The canonical model.
        teacher: The float model's outputs on some samples, by name.
        labelled: Whether there are labels.
        distillation: Share of the divergence in a labelled loss, 0 to 1.
        loss: ``auto``, or ``cross-entropy``, ``kl`` or ``mse`` to override the choice.

    Raises:
        UnsupportedError: No output is a float tensor.
        ConfigError: Cross-entropy is asked for without labels.
        DataError: The labelled output has no class axis.
    """
    outputs = [str(v.name) for v in model.graph.outputs if v.dtype is ir.DataType.FLOAT]
    if not outputs:
        raise UnsupportedError("no output of the model is a float32 tensor")
    kind = None if loss == "auto" else LossKind(loss)
    if kind is LossKind.CROSS_ENTROPY and not labelled:
        raise ConfigError("the cross-entropy loss needs `labels` in the data")
    if labelled and kind in (None, LossKind.CROSS_ENTROPY):
        return _labelled(model, teacher, outputs, distillation)
    terms = tuple(_distilled(model, teacher, name, kind) for name in outputs)
    classes = all(term.kind is LossKind.DIVERGENCE for term in terms)
    return Objective(terms, Metric.AGREEMENT if classes else Metric.R2)


def _labelled(
    model: ir.Model, teacher: Mapping[str, Array], outputs: Sequence[str], share: float
) -> Objective:
    primary = next((name for name in outputs if teacher[name].ndim >= 2), None)
    if primary is None:
        raise DataError("labels were given, but no output has the shape [N, classes]")
    scores = _scores(model, primary)
    terms = [
        LossTerm(kind=kind, output=primary, scores=scores, weight=weight)
        for kind, weight in (
            (LossKind.CROSS_ENTROPY, 1 - share),
            (LossKind.DIVERGENCE, share),
        )
        if weight > 0
    ]
    return Objective(tuple(terms), Metric.ACCURACY)


def _distilled(
    model: ir.Model, teacher: Mapping[str, Array], output: str, kind: LossKind | None
) -> LossTerm:
    values = teacher[output]
    value = next(v for v in model.graph.outputs if v.name == output)
    scores = _scores(model, output)
    if kind is None:
        reconstruction = any(
            v.shape is not None and v.shape == value.shape for v in model.graph.inputs
        )
        is_classes = values.ndim == 2 and values.shape[1] > 1 and not reconstruction
        kind = LossKind.DIVERGENCE if is_classes else LossKind.SQUARED_ERROR
    if kind is LossKind.SQUARED_ERROR:
        scores = output
    return LossTerm(
        kind=kind,
        output=output,
        scores=scores,
        variance=max(float(np.var(values, dtype=np.float64)), 1e-12),
    )


def _scores(model: ir.Model, output: str) -> str:
    """The input of a Softmax over axis 1 that ends the model, else the output itself."""
    value = next(v for v in model.graph.outputs if v.name == output)
    node = value.producer()
    if node is not None and node.op_type == "Softmax" and not node.domain:
        scores = node.inputs[0]
        rank = len(value.shape) if value.shape is not None else 2
        if scores is not None and node.attributes.get_int("axis", -1) in (1, 1 - rank):
            return str(scores.name)
    return output


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
        labels: [N, ...] for accuracy.
        teacher: The float model's outputs, for the other metrics.
    """
    if metric is Metric.ACCURACY:
        scores = next(iter(outputs.values()))
        return float(np.mean(np.argmax(scores, axis=1) == labels))
    assert teacher is not None
    measure = _agreement if metric is Metric.AGREEMENT else _r2
    return float(np.mean([measure(values, teacher[name]) for name, values in outputs.items()]))


def _agreement(values: Array, teacher: Array) -> float:
    return float(np.mean(np.argmax(values, axis=1) == np.argmax(teacher, axis=1)))


def _r2(values: Array, teacher: Array) -> float:
    difference = np.mean(np.square(np.subtract(values, teacher, dtype=np.float64)))
    variance = np.var(teacher, dtype=np.float64)
    return 1.0 - float(difference / variance) if variance > 0 else float(difference == 0)
