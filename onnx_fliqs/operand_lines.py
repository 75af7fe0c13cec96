"""Which choices of a decision differ in one operand alone.

A layer that chooses the formats of weights and of activations apart has as many choices as
there are pairs. What it loses is close to a sum of what each operand loses, so that it is
enough to measure the formats of each operand, with the other one left precise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_fliqs.formats import Format, is_passthrough
from onnx_fliqs.precision import Precision

__all__ = ["OperandLine", "operand_lines"]


@dataclass(frozen=True, slots=True)
class OperandLine:
    """Choices among which an operand is in every one of its formats."""

    choices: tuple[int, ...]
    """The least precise first; the other operand is in one format, or neither is quantized."""
    positions: tuple[int, ...]
    """For each choice of the decision, which of ``choices`` has the operand in its format."""
    operands: tuple[int, ...]
    """What changes: 0 for weights, 1 for activations."""

    @property
    def of_weights(self) -> bool:
        """Whether weights change alone."""
        return self.operands == (0,)


def operand_lines(choices: Sequence[Precision]) -> tuple[OperandLine, ...]:
    """One line for weights and one for activations, where these are chosen apart.

    Args:
        choices: Of a decision, the most precise last.

    Returns:
        Otherwise one line of all choices.
    """
    weights = [precision.weights for precision in choices]
    activations = [precision.activations for precision in choices]
    lines = _line(weights, activations, 0), _line(activations, weights, 1)
    apart = tuple(line for line in lines if line is not None and len(line.choices) > 1)
    if len(apart) == len(lines):
        return apart
    every = tuple(range(len(choices)))
    return (OperandLine(every, every, (0, 1)),)


def _line(own: Sequence[Format], other: Sequence[Format], operand: int) -> OperandLine | None:
    """The formats of an operand beside the most precise one of the other operand.

    Activations alone are not quantized, so beside weights that stay float they have one format
    only. Then the next one is close enough.
    """
    for beside in dict.fromkeys(reversed(other)):
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
            place = {fmt: position for position, fmt in enumerate(found)}
            positions = tuple(place[fmt] for fmt in own)
            return OperandLine(tuple(found.values()), positions, (operand,))
        if not is_passthrough(beside):
            return None
    return None
