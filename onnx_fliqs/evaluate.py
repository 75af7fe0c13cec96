"""Quality and agreement of model files in ONNX Runtime."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.data import Dataset, check_labels, input_specs
from onnx_fliqs.emit import required_level
from onnx_fliqs.errors import ConfigError, DataError
from onnx_fliqs.objective import Metric, choose_objective, quality
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["Evaluation", "evaluate_model", "feeds_of", "open_session", "run_dataset"]

Array: TypeAlias = npt.NDArray[Any]

_BATCH: Final = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The quality of a model on a data set."""

    metric: Metric
    value: float
    """1 is best; accuracy and agreement are fractions."""
    samples: int
    level: OptimizationLevel
    """At which ONNX Runtime ran it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON (schema 1)."""
        return {
            "schema": 1,
            "metric": self.metric.value,
            "value": self.value,
            "samples": self.samples,
            "optimization_level": self.level.value,
        }


def feeds_of(dataset: Dataset) -> Iterator[dict[str, Array]]:
    """The whole data set in batches; a fixed batch size is filled up with repetitions."""
    size = dataset.fixed_batch or _BATCH
    for start in range(0, len(dataset), size):
        indices = np.arange(start, start + size)
        if dataset.fixed_batch is None:
            indices = indices[indices < len(dataset)]
        yield dataset.batch(np.minimum(indices, len(dataset) - 1))


def run_dataset(
    session: "InferenceSession", dataset: Dataset, names: Sequence[str]
) -> dict[str, Array]:
    """Some outputs over a whole data set, joined along the samples."""
    rows = [run_session(session, names, feeds) for feeds in feeds_of(dataset)]
    joined = {}
    for i, name in enumerate(names):
        parts = [row[i] for row in rows]
        if parts[0].ndim == 0:
            joined[name] = parts[0]
            continue
        whole = np.concatenate(parts)
        joined[name] = whole[: len(dataset)] if dataset.fixed_batch else whole
    return joined


def open_session(
    model: ir.Model, level: OptimizationLevel | None = None
) -> tuple["InferenceSession", OptimizationLevel]:
    """A session at the level that the model asks for in its metadata, or at a given one."""
    level = level or required_level(model)
    return make_session(ir.to_proto(model).SerializeToString(), level=level), level


def evaluate_model(
    model: ir.Model,
    dataset: Dataset,
    *,
    against: ir.Model | None = None,
    level: OptimizationLevel | None = None,
) -> Evaluation:
    """Measure accuracy, or without labels the agreement with another model.

    Args:
        model: Any ONNX model.
        dataset: What to run.
        against: The model to agree with; needed where there are no labels.
        level: Overrides the optimisation level that an emitted model asks for.

    Raises:
        ConfigError: Neither labels nor a model to compare with, or one of another signature.
        DataError: The labels do not fit the model's output.
    """
    if dataset.labels is None and against is None:
        raise ConfigError("the data has no `labels`: name the float model with --against")
    if against is not None:
        _check_signature(model, against)
    session, used = open_session(model, level)
    names = [str(v.name) for v in model.graph.outputs if v.dtype in (None, ir.DataType.FLOAT)]
    outputs = run_dataset(session, dataset, names)
    if dataset.labels is not None and against is None:
        scores = scored_output(outputs, dataset)
        value = quality(Metric.ACCURACY, scores, labels=dataset.labels)
        return Evaluation(Metric.ACCURACY, value, len(dataset), used)
    assert against is not None
    # The other model may fix another batch size.
    same = replace(dataset, specs=input_specs(against))
    reference = run_dataset(open_session(against)[0], same, names)
    objective = choose_objective(against, reference, labelled=False, distillation=1.0)
    value = quality(objective.metric, outputs, teacher=reference)
    return Evaluation(objective.metric, value, len(dataset), used)


def _check_signature(model: ir.Model, against: ir.Model) -> None:
    """Refuse two models that cannot be compared, input by input and output by output."""
    for kind in ("inputs", "outputs"):
        mine, theirs = (
            {str(v.name) for v in getattr(m.graph, kind) if not v.is_initializer()}
            for m in (model, against)
        )
        if mine != theirs:
            raise ConfigError(
                f"the {kind} of the model ({_listing(mine)}) and of the one to compare with"
                f" ({_listing(theirs)}) have different names"
            )


def _listing(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def scored_output(outputs: Mapping[str, Array], dataset: Dataset) -> dict[str, Array]:
    """The first output with a class axis, once the labels are known to fit it.

    Raises:
        DataError: There is none, or the labels have another shape or too large a value.
    """
    found = next(((k, v) for k, v in outputs.items() if v.ndim >= 2), None)
    if found is None:
        raise DataError("labels were given, but no output has the shape [N, classes]")
    name, scores = found
    assert dataset.labels is not None
    expected = (len(dataset), *scores.shape[2:])
    if dataset.labels.shape != expected:
        raise DataError(
            f"labels have the shape {list(dataset.labels.shape)}, but output {name!r} needs"
            f" {list(expected)}"
        )
    check_labels(dataset, scores.shape[1])
    return {name: scores}
