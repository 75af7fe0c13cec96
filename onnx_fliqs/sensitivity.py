"""What single layers cost the float network: where a search starts from.

Distortions (:func:`~onnx_fliqs.calibrate.distortions`) tell how much a choice changes the
operands of a layer, but not how much the network minds. A few evaluations per decision tell
that: how far the outputs move from the float network's when the decision alone takes a choice.
With all other layers as they were, this is close to what is left of the damage once training
has mended the others.

Formats of weights and of activations that are chosen apart are measured apart. They differ in
what training does: weights learn to lie on their grid, while the rounding of activations
stays. So what weights lose counts for less.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.operand_lines import OperandLine, references
from onnx_fliqs.strategies import finite, single_changes

__all__ = ["measure_sensitivity", "measured_choices"]

_MOST_MEASURED: Final = {1: 6, 2: 4}
"""Choices of each line, by how many lines a decision has."""
_LEAST_GROWTH: Final = 1e-6
"""As a share of a line's largest growth: there are logarithms of it."""
_LEAST_SLOPE: Final = 1e-3
"""Growth for distortion, as a share of that of all decisions together."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A line of a decision, as far as its growth is known."""

    line: OperandLine
    distortion: Row
    growth: Row
    """Of all its choices, as ``distortion``."""


def measured_choices(lines: Sequence[OperandLine]) -> tuple[tuple[int, ...], ...]:
    """Which choices of a decision are measured, along each of its lines.

    At most six, or four where weights and activations are chosen apart: the most distorting
    among them, but not the reference, which is what they are measured against.
    """
    result = []
    for line in lines:
        last = len(line.choices) - 2
        count = min(_MOST_MEASURED[len(lines)], last + 1)
        places = np.linspace(0, max(last, 0), count).round().astype(int)
        result.append(tuple(line.choices[place] for place in places))
    return tuple(result)


def measure_sensitivity(
    lines: Sequence[Sequence[OperandLine]],
    distortions: Sequence[npt.NDArray[np.float64]],
    losses: Callable[[Sequence[Choices]], Sequence[float]],
    weight_damage: float = 1.0,
) -> tuple[Row, ...]:
    """How much a loss grows when each decision alone takes each of its choices.

    Some choices of a decision are measured (:func:`measured_choices`), so that the
    number of evaluations does not grow with that of the formats. The growth of the others
    follows from their distortions: a power law between two that are measured, and in
    proportion below the smallest. More distortion is never taken to be harmless: each decision
    minds it a thousandth as much as all together do, and if none seems to, all mind it alike.

    Args:
        lines: For each decision, the choices along which something changes; where there are
            two, the growth of a choice is the sum of that along both.
        distortions: For each decision, [choices, operands].
        losses: Scores assignments on the same samples.
        weight_damage: By what the growth along a line of weights counts, if any decision
            chooses weights and activations apart.

    Returns:
        For each decision one value per choice, never negative, and more for more distortion.
        A loss that is not finite counts as the largest that is.
    """
    measured = [measured_choices(own) for own in lines]
    changed = [[choice for along in own for choice in along] for own in measured]
    found = finite(losses(single_changes(references(lines), changed)))
    growth = iter(np.maximum(found[1:] - found[0], 0.0))
    known = [
        [_known(line, rows, along, growth) for line, along in zip(own, its, strict=True)]
        for own, rows, its in zip(lines, distortions, measured, strict=True)
    ]
    slope = _slope([each for own in known for each in own])
    # Where no decision chooses apart, there is nothing that weights would count less than.
    counts = weight_damage if any(len(own) > 1 for own in lines) else 1.0
    return tuple(
        np.sum([_along(each, slope, counts) for each in own], axis=0) for own in known
    )


def _known(
    line: OperandLine,
    distortions: npt.NDArray[np.float64],
    measured: Sequence[int],
    growth: Iterator[float],
) -> _Measured:
    """Takes as many numbers of the growth as were measured along the line."""
    distortion = distortions[np.ix_(line.choices, line.operands)].sum(axis=1)
    places = [line.choices.index(choice) for choice in measured]
    found = np.array([next(growth) for _ in places])
    return _Measured(line, distortion, _interpolated(distortion, places, found))


def _along(known: _Measured, slope: float, weight_damage: float) -> Row:
    """What each choice of the decision adds by its position on a line."""
    row = np.maximum(known.growth, slope * known.distortion)[list(known.line.positions)]
    counted: Row = row * weight_damage if known.line.of_weights else row
    return counted


def _slope(known: Sequence[_Measured]) -> float:
    """The least growth for distortion along any line."""
    total = sum(float(each.growth.max(initial=0.0)) for each in known)
    largest = sum(float(each.distortion.max(initial=0.0)) for each in known)
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
