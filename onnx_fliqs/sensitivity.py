"""What single layers cost the float network: where the critic starts from.

Distortions (:func:`~onnx_fliqs.calibrate.distortions`) tell how much a choice changes the
operands of a layer, but not how much the network minds. One evaluation per decision tells
that roughly: the growth of the loss when the decision alone takes its least precise choice.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.strategies import finite

__all__ = ["measure_sensitivity", "with_sensitivity"]


def measure_sensitivity(
    costs: CostTable, losses: Callable[[Sequence[Choices]], Sequence[float]]
) -> Row:
    """How much the loss grows when each decision alone takes its least precise choice.

    As many evaluations as decisions, and one, however many choices there are.

    Args:
        costs: For the number of choices of each decision, the most precise last.
        losses: Scores assignments on the same samples.

    Returns:
        One value per decision, never negative. A loss that is not finite counts as the
        largest that is.
    """
    best = tuple(len(row) - 1 for row in costs)
    changed = [(*best[:i], 0, *best[i + 1 :]) for i in range(len(best))]
    found = finite(losses([best, *changed]))
    growth: Row = np.maximum(found[1:] - found[0], 0.0)
    return growth


def with_sensitivity(
    distortions: Sequence[npt.NDArray[np.float64]], sensitivity: Row
) -> tuple[npt.NDArray[np.float64], ...]:
    """Distortions, and as one operand more the same scaled to what was measured.

    Both are divided by their sum over the least precise choices of all decisions, so that
    neither outweighs the other before anything is learned: one knows the formats, the other
    the network.

    Args:
        distortions: For each decision, [choices, operands].
        sensitivity: Of each decision, from :func:`measure_sensitivity`.

    Returns:
        For each decision, [choices, operands + 1].
    """
    sums = [rows.sum(axis=1) for rows in distortions]
    largest = np.array([row[0] for row in sums])
    total, growth = float(largest.sum()), float(sensitivity.sum())
    result = []
    for rows, row, single in zip(distortions, sums, sensitivity, strict=True):
        share = single / growth if growth > 0 else 0.0
        measured = row / row[0] * share if row[0] > 0 else np.zeros(len(row))
        known = rows / total if total > 0 else rows
        result.append(np.concatenate([known, measured[:, None]], axis=1))
    return tuple(result)
