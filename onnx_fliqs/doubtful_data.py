"""Signs that data is not what a float model was made for.

Inputs that are scaled in another way and labels that count in another order are no errors: a
search trains on them, and gives back a model that is good for nothing.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import Dataset
from onnx_fliqs.objective import Metric, decisions, quality

__all__ = ["doubtful_data"]

Array: TypeAlias = npt.NDArray[Any]

_ERRORS: Final = 2.0
"""Standard errors of guessing that a model has to be better by."""
_LEAST: Final = 20
"""Samples of which one class for all says something."""


def doubtful_data(
    metric: Metric, outputs: Mapping[str, Array], dataset: Dataset
) -> str | None:
    """A warning, where the float model does no better than guess, or sees no difference.

    To guess a number is to say the mean of all.

    Args:
        metric: How its quality is measured.
        outputs: What it gave for the samples, by name; shape [N, classes, ...].
        dataset: The samples.
    """
    if metric is Metric.R2 or dataset.synthetic:
        return None
    labels, scores = dataset.labels, next(iter(outputs.values()))
    if metric is Metric.LABEL_R2:
        explained = quality(metric, outputs, labels=labels)
        if explained > 0:
            return None
        return (
            f"the float model is no closer to the labels than their mean (r2 {explained:.3g}"
            f" on {len(dataset)} samples): are inputs and labels prepared as for its training?"
        )
    if metric is Metric.ACCURACY and scores.shape[1] > 1:
        right, guessed = quality(metric, outputs, labels=labels), 1 / scores.shape[1]
        error = math.sqrt(guessed * (1 - guessed) / len(dataset))
        if right <= guessed + _ERRORS * error:
            return (
                f"the float model is right for {right:.1%} of {len(dataset)} samples, no"
                f" better than a guess among {scores.shape[1]} classes: are inputs and labels"
                " prepared as for its training?"
            )
    found = decisions(scores)
    alike = found.ndim == 1 and len(found) >= _LEAST and bool(np.all(found == found[0]))
    if alike and (labels is None or bool(np.any(labels != labels[0]))):
        return (
            f"the float model takes all of {len(found)} samples for class {found[0]}: are"
            " inputs prepared as for its training?"
        )
    return None
