"""From measured assignments to what each choice and each border costs, by least squares.

Assignments with many changes at once tell more about each change than assignments with a
single one: every measurement speaks about all layers, and layers are seen in the company that
they will have. ``benchmarks/latency.py`` compares both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.borders import Border, spent
from onnx_fliqs.controller import Choices

__all__ = [
    "Fit",
    "Kinds",
    "Neighbours",
    "Observation",
    "Spread",
    "fit",
    "left_out_errors",
    "spread",
]

Row: TypeAlias = npt.NDArray[np.float64]
Kinds: TypeAlias = Sequence[tuple[str, ...]]
Neighbours: TypeAlias = Sequence[tuple[int, int]]

_SHRINKAGE: Final = 0.02
"""Weight of the prior that a choice or a border costs nothing."""
_MODEL_ERROR: Final = 0.02
"""What sums of costs leave unexplained, as a share: no measurement needs to be better."""
_RESAMPLES: Final = 24
_FOLDS: Final = 5


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured assignment."""

    choices: Choices
    latency: float
    """As a share of the float model's."""
    error: float
    """Standard error of the measurement, as a share of it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs that explain observations, as shares of the float model's latency."""

    base: float
    """All decisions at their last choice."""
    rows: tuple[Row, ...]
    """For each decision, what its choices add; 0 for the last."""
    borders: tuple[Border, ...]

    def predict(self, choices: Choices) -> float:
        """The latency of an assignment."""
        return self.base + spent(self.rows, self.borders, choices)


@dataclass(frozen=True, slots=True)
class Spread:
    """Quartiles of the costs over resampled observations."""

    rows: tuple[tuple[Row, Row], ...]
    borders: tuple[tuple[float, float], ...]


def fit(observations: Sequence[Observation], kinds: Kinds, near: Neighbours) -> Fit:
    """Explain observations; relative errors count, and no border has a negative cost.

    Args:
        observations: At least one.
        kinds: For each decision, the kind of numbers of each choice.
        near: Pairs of decisions with a border between them, if they can differ in kind.
    """
    from scipy.optimize import lsq_linear  # slow to import

    borders = [
        Border(a, b, (kinds[a], kinds[b]), 0.0)
        for a, b in near
        if len({*kinds[a], *kinds[b]}) > 1
    ]
    own = sum(len(row) - 1 for row in kinds)
    features = np.array([_features(item.choices, kinds, borders) for item in observations])
    measured = np.array([item.latency for item in observations])
    weights = 1 / np.hypot([item.error for item in observations], _MODEL_ERROR) * _MODEL_ERROR
    columns = features.shape[1]
    shrinkage = np.sqrt(_SHRINKAGE) * np.eye(columns)[1:]
    lowest = np.full(columns, -np.inf)
    lowest[1 + own :] = 0.0
    found = lsq_linear(
        np.vstack([features * (weights / measured)[:, None], shrinkage]),
        np.concatenate([weights, np.zeros(columns - 1)]),
        bounds=(lowest, np.full(columns, np.inf)),
    ).x
    ends = np.cumsum([len(row) - 1 for row in kinds])
    rows = np.split(found[1 : 1 + own], ends[:-1])
    return Fit(
        float(found[0]),
        tuple(np.append(row, 0.0) for row in rows),
        tuple(
            replace(border, cost=max(0.0, float(cost)))
            for border, cost in zip(borders, found[1 + own :], strict=True)
        ),
    )


def _features(choices: Choices, kinds: Kinds, borders: Sequence[Border]) -> list[float]:
    one_hot = [
        float(choice == index)
        for choice, row in zip(choices, kinds, strict=True)
        for index in range(len(row) - 1)
    ]
    return [1.0, *one_hot, *(float(border.crossed(choices)) for border in borders)]


def spread(
    observations: Sequence[Observation],
    kinds: Kinds,
    near: Neighbours,
    rng: np.random.Generator,
) -> Spread:
    """How much the costs depend on what happened to be observed, and on its noise."""
    count = len(observations)
    fits = [
        fit([observations[i] for i in rng.integers(count, size=count)], kinds, near)
        for _ in range(_RESAMPLES)
    ]
    rows = []
    for index in range(len(kinds)):
        low, high = np.percentile([found.rows[index] for found in fits], (25, 75), axis=0)
        rows.append((low, high))
    borders = np.array([[border.cost for border in found.borders] for found in fits])
    lows, highs = np.percentile(borders, (25, 75), axis=0)
    return Spread(tuple(rows), tuple(zip(lows.tolist(), highs.tolist(), strict=True)))


def left_out_errors(
    observations: Sequence[Observation], kinds: Kinds, near: Neighbours
) -> Row:
    """Relative errors of predictions for observations that the fit did not see."""
    errors = []
    for fold in range(_FOLDS):
        seen = [item for i, item in enumerate(observations) if i % _FOLDS != fold]
        unseen = observations[fold::_FOLDS]
        found = fit(seen, kinds, near)
        errors += [abs(found.predict(item.choices) / item.latency - 1) for item in unseen]
    return np.array(errors)
