"""Quality and agreement of model files in ONNX Runtime."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.data import Dataset, check_labels, input_specs
from onnx_fliqs.emission import required_level
from onnx_fliqs.errors import ConfigError, DataError, UnsupportedError
from onnx_fliqs.judged import chosen_outputs, exposed, judged_values, tensor_outputs
from onnx_fliqs.objective import (
    NO_CLASSES,
    Metric,
    are_numbers,
    fits_numbers,
    metric_of,
    no_output_for,
    quality,
    varies,
)
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = [
    "Evaluation",
    "evaluate_model",
    "feeds_of",
    "most_judged",
    "not_finite",
    "open_session",
    "run_dataset",
    "scored_output",
    "without_filling",
]

Array: TypeAlias = npt.NDArray[Any]

_BATCH: Final = 64
_MOST_KEPT: Final = 1 << 28
"""Numbers of all samples together."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The quality of a model on a data set."""

    metric: Metric
    value: float
    """1 is best; accuracy and agreement are fractions."""
    samples: int
    level: OptimizationLevel
    """At which ONNX Runtime ran it."""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON (schema 1)."""
        return {
            "schema": 1,
            "metric": self.metric.value,
            "value": self.value,
            "samples": self.samples,
            "optimization_level": self.level.value,
            "warnings": list(self.warnings),
        }


def feeds_of(dataset: Dataset) -> Iterator[dict[str, Array]]:
    """The whole data set in batches; a fixed batch size is filled up with repetitions."""
    size = dataset.batch_within(_BATCH)
    for start in range(0, len(dataset), size):
        indices = np.arange(start, start + size)
        if dataset.fixed_batch is None:
            indices = indices[indices < len(dataset)]
        yield dataset.batch(np.minimum(indices, len(dataset) - 1))


def run_dataset(
    session: "InferenceSession", dataset: Dataset, names: Sequence[str]
) -> dict[str, Array]:
    """Some outputs over a whole data set, joined along the samples.

    What is no tensor of numbers, or has another shape in another batch, is left out.
    """
    if not names:
        return {}
    # One batch after another: all inputs together may be larger than the memory.
    rows = [run_session(session, names, feeds) for feeds in feeds_of(dataset)]
    joined = {}
    for i, name in enumerate(names):
        parts = [row[i] for row in rows]
        if not all(isinstance(part, np.ndarray) and part.dtype.kind != "O" for part in parts):
            continue
        if parts[0].ndim == 0:
            joined[name] = parts[0]
        elif len({part.shape[1:] for part in parts}) == 1:
            fed = len(rows) * dataset.fixed_batch if dataset.fixed_batch else len(dataset)
            joined[name] = without_filling(np.concatenate(parts), fed, len(dataset))
    return joined


def most_judged(session: "InferenceSession", dataset: Dataset, names: Sequence[str]) -> int:
    """How many samples of a data set can be kept at once: inputs, and some outputs.

    At most as many as have 2^28 numbers of either (1 GiB in float32); at least one. Scores of
    each place of large images are what makes it fewer than there are.
    """
    count = dataset.fixed_batch or 1
    few = dataset.take(np.arange(count) % len(dataset))
    outputs = run_dataset(session, few, names)
    inputs = few.batch(np.arange(count))
    most = (sum(array.size for array in arrays.values()) for arrays in (inputs, outputs))
    return max(1, _MOST_KEPT * count // max(1, *most))


def not_finite(
    reference: Mapping[str, Array], outputs: Mapping[str, Array]
) -> tuple[str, ...]:
    """Warnings of outputs that are not finite where they should be.

    Args:
        reference: What the float model gave, by name.
        outputs: What the quantized model gave for the same samples.
    """
    warnings = []
    for name, found in outputs.items():
        wanted = reference.get(name)
        if found.dtype.kind != "f" or wanted is None or wanted.shape != found.shape:
            continue
        bad = np.isfinite(np.atleast_1d(wanted)) & ~np.isfinite(np.atleast_1d(found))
        if bad.any():
            count = int(bad.reshape(len(bad), -1).any(axis=1).sum())
            warnings.append(
                f"{name!r} of the quantized model is not finite for {count} of {len(bad)}"
                " samples where that of the float model is"
            )
    return tuple(warnings)


def without_filling(joined: Array, fed: int, samples: int) -> Array:
    """Cut off what the samples gave that only filled up the last batch.

    Args:
        joined: An output over several batches; its first axis has the same number of rows for
            each sample, or else is left as it is.
        fed: Samples that were run.
        samples: Samples that there are.
    """
    if joined.ndim == 0 or len(joined) % fed:
        return joined
    return joined[: len(joined) // fed * samples]


def open_session(
    model: ir.Model, level: OptimizationLevel | None = None
) -> tuple["InferenceSession", OptimizationLevel]:
    """A session at the level that the model asks for in its metadata, or at a given one."""
    level = level or required_level(model)
    return make_session(model, level=level), level


def evaluate_model(
    model: ir.Model,
    dataset: Dataset,
    *,
    against: ir.Model | None = None,
    level: OptimizationLevel | None = None,
) -> Evaluation:
    """Measure how well labels are met, or without labels the agreement with another model.

    Args:
        model: Any ONNX model.
        dataset: What to run.
        against: The model to agree with; needed where there are no labels.
        level: Overrides the optimisation level that an emitted model asks for.

    Raises:
        ConfigError: Neither labels nor a model to compare with, or one of another signature.
        DataError: The labels do not fit the model's output.
        UnsupportedError: The models have no outputs that can be compared.
    """
    if dataset.stored_labels is None and against is None:
        raise ConfigError("the data has no `labels`: name the float model with --against")
    if against is not None:
        _check_signature(model, against)
    session, used = open_session(model, level)
    names = tensor_outputs(model)
    outputs = run_dataset(session, dataset, names)
    labels = dataset.labels
    if labels is not None and against is None:
        numbers = are_numbers(labels)
        metric = Metric.LABEL_R2 if numbers else Metric.ACCURACY
        found = outputs if numbers else _scores(model, outputs, dataset, used)
        value = quality(metric, scored_output(found, dataset), labels=labels)
        return Evaluation(metric, value, len(dataset), used)
    assert against is not None
    # The other model may fix another batch size.
    same = replace(dataset, specs=input_specs(against))
    reference = run_dataset(open_session(against)[0], same, names)
    compared, left_out = _comparable(outputs, reference)
    if not compared:
        raise UnsupportedError("no output of the two models can be compared" + _why(left_out))
    metric = metric_of(against, {name: reference[name] for name in compared})
    value = quality(metric, {n: outputs[n] for n in compared}, teacher=reference)
    warnings = tuple(f"output {name!r} is not compared: it {why}" for name, why in left_out)
    return Evaluation(metric, value, len(dataset), used, warnings)


def _scores(
    model: ir.Model, outputs: Mapping[str, Array], dataset: Dataset, level: OptimizationLevel
) -> Mapping[str, Array]:
    """What labels may be compared with: outputs, or what they rest on.

    The largest scores in their order, say, are no scores of classes.
    """
    assert dataset.stored_labels is not None
    count = math.prod((len(dataset), *dataset.stored_labels.shape[1:]))
    whole = {k: v for k, v in outputs.items() if v.dtype.kind in "biu"}
    chosen = chosen_outputs(model) - whole.keys()
    kept = {name: values for name, values in outputs.items() if name not in chosen}
    if any(v.ndim >= 2 for k, v in kept.items() if k not in whole):
        return kept
    if any(v.size == count for v in whole.values()):
        return kept
    judged = [each.name for each in judged_values(model)]
    behind = run_dataset(make_session(exposed(model, judged), level=level), dataset, judged)
    return behind if any(v.ndim >= 2 for v in behind.values()) else outputs


def _comparable(
    outputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the outputs to compare, and of others with the reason why not.

    Floats where there are any; otherwise whole numbers, for equality.
    """
    whole: list[str] = []
    floats: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name, expected in reference.items():
        if name not in outputs or outputs[name].shape != expected.shape:
            left_out.append((name, "has a shape that depends on the numbers in it"))
        elif not expected.size:
            left_out.append((name, "is empty"))
        else:
            (whole if expected.dtype.kind in "biu" else floats).append(name)
    varied = [name for name in floats if varies(reference[name])] or floats
    left_out += [
        (name, "is the same for all samples") for name in floats if name not in varied
    ]
    return varied or whole, left_out


def _why(left_out: Sequence[tuple[str, str]]) -> str:
    return f": {left_out[0][0]!r} {left_out[0][1]}" if left_out else ""


def _check_signature(model: ir.Model, against: ir.Model) -> None:
    """Refuse two models that cannot be compared, input by input and output by output."""
    for kind, named in (("inputs", _fed), ("outputs", _given)):
        mine, theirs = named(model), named(against)
        if mine != theirs:
            raise ConfigError(
                f"the {kind} of the model ({_listing(mine)}) and of the one to compare with"
                f" ({_listing(theirs)}) have different names"
            )


def _fed(model: ir.Model) -> set[str]:
    return {str(v.name) for v in model.graph.inputs if not v.is_initializer()}


def _given(model: ir.Model) -> set[str]:
    return {str(v.name) for v in model.graph.outputs}


def _listing(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def scored_output(outputs: Mapping[str, Array], dataset: Dataset) -> dict[str, Array]:
    """The first output with a class axis, once the labels are known to fit it.

    Without one: the first output of whole numbers that has one for each label. Where labels
    are floats: the first output of their shape.

    Raises:
        DataError: There is none, or the labels have another shape or too large a value.
    """
    stored = dataset.stored_labels
    assert stored is not None
    if are_numbers(stored):
        for name, values in outputs.items():
            if fits_numbers(values, stored):
                return {name: values}
        raise DataError(no_output_for(stored))
    shape = (len(dataset), *stored.shape[1:])
    whole = {k: v for k, v in outputs.items() if v.dtype.kind in "biu"}
    scored = ((k, v) for k, v in outputs.items() if k not in whole and v.ndim >= 2)
    found = next(scored, None)
    if found is None:
        decided = ((k, v) for k, v in whole.items() if v.size == math.prod(shape))
        for name, classes in decided:
            return {name: classes.reshape(shape)}
        raise DataError(NO_CLASSES)
    name, scores = found
    expected = (len(dataset), *scores.shape[2:])
    if shape != expected:
        # The samples here may be some of those in the file.
        own, wanted = (", ".join(["N", *map(str, found[1:])]) for found in (shape, expected))
        raise DataError(f"labels have the shape [{own}], but output {name!r} needs [{wanted}]")
    check_labels(dataset, scores.shape[1])
    return {name: scores}
