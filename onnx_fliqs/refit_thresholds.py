"""Thresholds that follow the weights while they train, and with them the activations."""

from typing import Final

import numpy as np

from onnx_fliqs.calibrate import (
    activation_scales,
    blended,
    fit_to_activations,
    sample_values,
    weight_scales,
)
from onnx_fliqs.controller import Choices
from onnx_fliqs.prepare import make_batch, weights_of
from onnx_fliqs.scoring import EVALUATION_BATCH
from onnx_fliqs.search_setup import Setup
from onnx_fliqs.search_state import Scales
from onnx_fliqs.thresholds import Statistics
from onnx_fliqs.train_step import TrainState, TrainStep

__all__ = ["refit_thresholds"]

_KEPT_SCALE: Final = 0.5
"""Share of the old thresholds in the running ones."""


def refit_thresholds(
    setup: Setup, step: TrainStep, train: TrainState, scales: Scales, choices: Choices
) -> Scales:
    """Fit thresholds to the weights as they are, and to activations as the settings say.

    Args:
        setup: Of the search.
        step: Runs the searchable graph.
        train: The weights.
        scales: The thresholds so far.
        choices: The assignment under which activations are looked at.
    """
    space, config = setup.prepared.space, setup.config
    trained = {name: value.numpy() for name, value in train.parameters.items()}
    weights = weights_of(setup.prepared.canonical, space) | trained
    if config.statistics is Statistics.CALIBRATED:
        kept = setup.scales
    else:
        kept = _activation_scales(setup, step, train, scales, choices)
    fitted = kept | weight_scales(space, weights, config.seed, config.thresholds)
    return fit_to_activations(space, fitted, weights)


def _activation_scales(
    setup: Setup, step: TrainStep, train: TrainState, scales: Scales, choices: Choices
) -> Scales:
    """Of what the network as it is now makes of some training samples."""
    space, config, data = setup.prepared.space, setup.config, setup.train
    names = [site.tensor for site in space.sites if not site.is_weight]
    size = data.batch_within(EVALUATION_BATCH)
    count = max(1, min(EVALUATION_BATCH, len(data)) // size)
    values, wanted = setup.values(choices, scales), list(dict.fromkeys(names))
    rows = (np.arange(count * size) % len(data)).reshape(count, size)
    seen = (step.observe(train, make_batch(data, row), values, wanted) for row in rows)
    samples = sample_values(seen, count, config.seed)
    latest = activation_scales(space, samples, config.thresholds)
    if config.statistics is Statistics.LATEST or space.power_of_two_scales:
        return latest
    return blended(scales, latest, _KEPT_SCALE)
