"""Which choices of a decision differ in one operand alone.

A layer that chooses the formats of weights and of activations apart has as many choices as
there are pairs. What it loses is close to a sum of what each operand loses, so that it is
enough to measure the formats of each operand, with the other one left precise.

How precise a format is depends on the values: of as many bits, int8, e4m3 and e5m2 round the
same tensor very differently. So lines are ordered by what was measured of the tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_fliqs.formats import Format, is_passthrough
from onnx_fliqs.precision import Precision

__all__ = ["OperandLine", "operand_lines", "references"]


@dataclass(frozen=True, slots=True)
class OperandLine:
    """Choices among which an operand is in every one of its formats."""

    choices: tuple[int, ...]
    """The most distorting first; the other operand is in one format, or neither is
    quantized."""
    positions: tuple[int, ...]
    """For each choice of the decision, which of ``choices`` has the operand in its format."""
    operands: tuple[int, ...]
    """What changes: 0 for weights, 1 for activations."""

    @property
    def of_weights(self) -> bool:
        """Whether weights change alone."""
        return self.operands == (0,)


def operand_lines(
    choices: Sequence[Precision], distortions: npt.NDArray[np.float64]
) -> tuple[OperandLine, ...]:
    """One line for weights and one for activations, where these are chosen apart.

    The first line ends with the *reference*: the choice that distorts least.

    Args:
        choices: Of a decision; of several that distort alike, the most precise last.
        distortions: [choices, 2]: what each does to weights and to activations.

    Returns:
        Where nothing is chosen apart, one line of all choices: of weights, where these are all
        that changes.
    """
    weights = [precision.weights for precision in choices]
    activations = [precision.activations for precision in choices]
    of_weights, of_activations = np.asarray(distortions, np.float64).T
    lines = (
        _line(weights, activations, of_weights, of_activations, 0),
        _line(activations, weights, of_activations, of_weights, 1),
    )
    apart = tuple(line for line in lines if line is not None and len(line.choices) > 1)
    if len(apart) == len(lines):
        return apart
    order = np.argsort(-(of_weights + of_activations), kind="stable")
    alone = len(set(activations)) == 1 or not of_activations.any()
    operands = (0,) if alone and len(set(weights)) > 1 else (0, 1)
    return (_ordered(order.tolist(), range(len(choices)), operands),)


def references(lines: Sequence[Sequence[OperandLine]]) -> tuple[int, ...]:
    """The choice of every decision that what its lines add is measured against."""
    return tuple(own[0].choices[-1] for own in lines)


def _line(
    own: Sequence[Format],
    other: Sequence[Format],
    own_distortions: npt.NDArray[np.float64],
    other_distortions: npt.NDArray[np.float64],
    operand: int,
) -> OperandLine | None:
    """The formats of an operand beside the least distorting one of the other operand.

    Activations alone are not quantized, so beside weights that stay float they have one format
    only. Then the next one is close enough.
    """
    # Of equals the last, as everywhere.
    besides = [other[c] for c in np.argsort(-other_distortions, kind="stable")[::-1]]
    for beside in dict.fromkeys(besides):
        found = {
            fmt: choice
            for choice, (fmt, its_other) in enumerate(zip(own, other, strict=True))
            if its_other == beside
        }
        if len(found) > 1:
            # What leaves both operands alone is the precise end of either line.
            for choice, pair in enumerate(zip(own, other, strict=True)):
                if pair[0] == pair[1] and is_passthrough(pair[0]):
                    found.setdefault(pair[0], choice)
        if found.keys() == set(own):
            chosen = list(found.values())
            order = np.argsort(-own_distortions[chosen], kind="stable")
            return _ordered(
                [chosen[i] for i in order], [found[fmt] for fmt in own], (operand,)
            )
        if not is_passthrough(beside):
            return None
    return None


def _ordered(
    choices: Sequence[int], taken: Sequence[int], operands: tuple[int, ...]
) -> OperandLine:
    """The line of some choices, given which of them each choice of the decision takes."""
    place = {choice: position for position, choice in enumerate(choices)}
    return OperandLine(tuple(choices), tuple(place[choice] for choice in taken), operands)
