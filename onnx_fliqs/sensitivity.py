"""What single layers cost the float network: where the critic starts from.

Distortions (:func:`~onnx_fliqs.calibrate.distortions`) tell how much a choice changes the
operands of a layer, but not how much the network minds. A few evaluations per decision tell
that: the growth of the loss when the decision alone takes a choice. With all other layers as
they were, this is close to what is left of the damage once training has mended the others.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.strategies import finite, most_precise, single_changes

__all__ = ["measure_sensitivity", "measured_choices", "with_sensitivity"]

_MOST_MEASURED: Final = 6
_LEAST_GROWTH: Final = 1e-6
"""As a share of a decision's largest growth: there are logarithms of it."""


def measured_choices(choices: int) -> tuple[int, ...]:
    """Which choices of a decision are measured: at most six, the least precise among them.

    The most precise is what they are measured against.
    """
    count = min(_MOST_MEASURED, choices - 1)
    return tuple(int(c) for c in np.linspace(0, max(choices - 2, 0), count).round())


def measure_sensitivity(
    costs: CostTable,
    distortions: Sequence[npt.NDArray[np.float64]],
    losses: Callable[[Sequence[Choices]], Sequence[float]],
) -> tuple[Row, ...]:
    """How much the loss grows when each decision alone takes each of its choices.

    At most six choices of a decision are measured (:func:`measured_choices`), so that the
    number of evaluations does not grow with that of the formats. The growth of the others
    follows from their distortions: a power law between two that are measured, and in
    proportion below the smallest.

    Args:
        costs: For the number of choices of each decision, the most precise last.
        distortions: For each decision, [choices, operands].
        losses: Scores assignments on the same samples.

    Returns:
        For each decision one value per choice, never negative, and never less for more
        distortion. A loss that is not finite counts as the largest that is.
    """
    measured = [measured_choices(len(row)) for row in costs]
    found = finite(losses(single_changes(most_precise(costs), measured)))
    growth = iter(np.maximum(found[1:] - found[0], 0.0))
    return tuple(
        _interpolated(rows.sum(axis=1), own, np.array([next(growth) for _ in own]))
        for rows, own in zip(distortions, measured, strict=True)
    )


def _interpolated(distortion: Row, measured: Sequence[int], growth: Row) -> Row:
    """The growth of all choices of a decision, from that of some."""
    result: Row = np.zeros(len(distortion))
    if not len(measured) or growth.max() <= 0:
        return result
    order = np.argsort(distortion[list(measured)], kind="stable")
    x = distortion[list(measured)][order]
    y = np.maximum.accumulate(growth[order])
    least = _LEAST_GROWTH * y[-1]
    positive = np.maximum(x, np.finfo(np.float64).tiny)
    inside = distortion >= x[0]
    result[inside] = np.exp(
        np.interp(
            np.log(np.maximum(distortion[inside], positive[0])),
            np.log(positive),
            np.log(np.maximum(y, least)),
        )
    )
    result[~inside] = max(y[0], least) * distortion[~inside] / positive[0]
    return result


def with_sensitivity(
    distortions: Sequence[npt.NDArray[np.float64]], sensitivity: Sequence[Row]
) -> tuple[npt.NDArray[np.float64], ...]:
    """Distortions, and what was measured as one operand more.

    Both are divided by their sum over the largest of all decisions, so that neither outweighs
    the other before anything is learned: one knows the formats, the other the network.

    Args:
        distortions: For each decision, [choices, operands].
        sensitivity: Of each choice of each decision, from :func:`measure_sensitivity`.

    Returns:
        For each decision, [choices, operands + 1].
    """
    largest = sum(float(rows.sum(axis=1).max()) for rows in distortions)
    growth = sum(float(row.max()) for row in sensitivity)
    return tuple(
        np.column_stack(
            [rows / largest if largest > 0 else rows, row / growth if growth > 0 else row]
        )
        for rows, row in zip(distortions, sensitivity, strict=True)
    )
