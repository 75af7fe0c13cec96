"""What single layers cost the float network: where a search starts from.

Distortions (:func:`~onnx_fliqs.calibrate.distortions`) tell how much a choice changes the
operands of a layer, but not how much the network minds. A few evaluations per decision tell
that: how far the outputs move from the float network's when the decision alone takes a choice.
With all other layers as they were, this is close to what is left of the damage once training
has mended the others.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.strategies import finite, most_precise, single_changes

__all__ = ["measure_sensitivity", "measured_choices"]

_MOST_MEASURED: Final = 6
_LEAST_GROWTH: Final = 1e-6
"""As a share of a decision's largest growth: there are logarithms of it."""
_LEAST_SLOPE: Final = 1e-3
"""Growth for distortion, as a share of that of all decisions together."""


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
    """How much a loss grows when each decision alone takes each of its choices.

    At most six choices of a decision are measured (:func:`measured_choices`), so that the
    number of evaluations does not grow with that of the formats. The growth of the others
    follows from their distortions: a power law between two that are measured, and in
    proportion below the smallest. More distortion is never taken to be harmless: each decision
    minds it a thousandth as much as all together do, and if none seems to, all mind it alike.

    Args:
        costs: For the number of choices of each decision, the most precise last.
        distortions: For each decision, [choices, operands].
        losses: Scores assignments on the same samples.

    Returns:
        For each decision one value per choice, never negative, and more for more distortion.
        A loss that is not finite counts as the largest that is.
    """
    measured = [measured_choices(len(row)) for row in costs]
    found = finite(losses(single_changes(most_precise(costs), measured)))
    growth = iter(np.maximum(found[1:] - found[0], 0.0))
    summed = [rows.sum(axis=1) for rows in distortions]
    grown = [
        _interpolated(row, own, np.array([next(growth) for _ in own]))
        for row, own in zip(summed, measured, strict=True)
    ]
    slope = _slope(grown, summed)
    return tuple(
        np.maximum(row, slope * distortion)
        for row, distortion in zip(grown, summed, strict=True)
    )


def _slope(growth: Sequence[Row], distortions: Sequence[Row]) -> float:
    """The least growth for distortion of any decision."""
    total = sum(float(row.max(initial=0.0)) for row in growth)
    largest = sum(float(row.max(initial=0.0)) for row in distortions)
    if total <= 0 or largest <= 0:
        return 1.0
    return _LEAST_SLOPE * total / largest


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
