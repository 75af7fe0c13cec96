"""A controller for searches of hundreds of steps: an additive critic and a Boltzmann policy.

REINFORCE spreads the outcome of one draw over all decisions at once, and needs thousands of
draws to tell them apart. The critic is told how much each choice distorts its operands, and
learns only how much that matters: ::

    loss(a) = level of the batch + sum_i s_i e_i(a_i),        s_i >= 0

with e the known distortion and s the sensitivities, by ridge regression on the differences
between draws that were scored on the same batch. Among all policies whose expected cost is
the budget, the one that minimises the expected loss less temperature times entropy is, for
each decision, ``pi_i(a) ~ exp(-s_i e_i(a) / temperature - multiplier * cost_i(a))``: the soft
policy improvement of maximum-entropy reinforcement learning (Haarnoja et al. 2018, equation
4), in closed form because loss and cost are sums. The falling temperature does what FLIQS's
entropy schedule does: at the end the policy is deterministic. It never leaves the budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import (
    Choices,
    ControllerConfig,
    Policy,
    Row,
    Schedule,
    ramp,
)
from onnx_fliqs.cost import CostTable

__all__ = ["Critic", "CriticState"]

Matrix: TypeAlias = npt.NDArray[np.float64]

_COLDEST: Final = 1e-3
"""Share of the starting temperature that is left at the end."""
_LEAST_SENSITIVITY: Final = 0.05
"""Of the mean one: more distortion is never predicted to be harmless."""
_LARGEST_MULTIPLIER: Final = 1e9


@dataclass(frozen=True, slots=True)
class CriticState:
    """The normal equations of the regression."""

    gram: Matrix
    """[N, N]: products of distortions, summed over observations."""
    moment: Row
    """[N]: distortions times losses."""


class Critic:
    """Learns one sensitivity per decision."""

    slack = 0.1
    """Of the predicted loss, which is not known better than that."""

    def __init__(
        self, costs: CostTable, distortions: Sequence[Row], config: ControllerConfig
    ) -> None:
        """Name the decisions.

        Args:
            costs: Cost of each choice of each decision as a share of the budget.
            distortions: Not negative: how much each choice distorts its operands, in any unit.
            config: Settings.
        """
        self._costs = costs
        self._config = config
        self._distortions = tuple(np.asarray(row, np.float64) for row in distortions)
        # As matrices [decisions, most choices]: choices that a decision lacks have no chance.
        self._lacking = _padded([np.zeros(len(row)) for row in costs], -np.inf)
        self._cost_matrix = _padded(costs, 0.0)

    def initial(self) -> CriticState:
        """No observations."""
        count = len(self._costs)
        return CriticState(np.zeros((count, count)), np.zeros(count))

    def sensitivities(self, state: CriticState) -> Row:
        """The estimated s_i, shrunk towards their common value; all 1 before any is known."""
        count = len(self._costs)
        ones = np.ones(count)
        information = float(ones @ state.gram @ ones)
        common = float(ones @ state.moment) / information if information > 0 else 0.0
        if common <= 0:
            return ones
        weight = self._config.shrinkage * float(np.trace(state.gram)) / count
        solved = np.linalg.solve(
            state.gram + weight * np.eye(count), state.moment + weight * common * ones
        )
        result: Row = np.maximum(solved, _LEAST_SENSITIVITY * common)
        return result

    def preferences(self, state: CriticState) -> tuple[Row, ...]:
        """Predicted losses, negated."""
        sensitivities = self.sensitivities(state)
        return tuple(-s * e for s, e in zip(sensitivities, self._distortions, strict=True))

    def policy(self, state: CriticState, progress: float) -> Policy:
        """The Boltzmann policy whose expected cost is the budget, or less if all is cheap."""
        preferences = self.preferences(state)
        # The unit of the temperature: the spread of the predicted loss over uniform draws.
        unit = math.sqrt(sum(float(np.var(row)) for row in preferences)) or 1.0
        temperature = self._config.temperature * self._left(progress) * unit
        tilted = self._within_budget(_padded(preferences, 0.0) / temperature + self._lacking)
        return tuple(p[: len(row)] for p, row in zip(tilted, self._costs, strict=True))

    def _left(self, progress: float) -> float:
        """Share of the starting temperature."""
        if self._config.cooling is Schedule.CONSTANT:
            return 1.0
        return 1 - (1 - _COLDEST) * ramp(self._config.cooling, progress)

    def _within_budget(self, logits: Matrix) -> Matrix:
        """The smallest multiplier >= 0 that brings E[T] down to the budget, by bisection."""

        def tilted(multiplier: float) -> tuple[Matrix, float]:
            powers = logits - multiplier * self._cost_matrix
            powers = np.exp(powers - powers.max(axis=1, keepdims=True))
            chances = powers / powers.sum(axis=1, keepdims=True)
            return chances, float(np.sum(chances * self._cost_matrix))

        policy, cost = tilted(0.0)
        if cost <= 1:
            return policy
        low, high = 0.0, 1.0
        while tilted(high)[1] > 1 and high < _LARGEST_MULTIPLIER:
            low, high = high, high * 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tilted(middle)[1] > 1 else (low, middle)
        return tilted(high)[0]

    def observe(
        self, state: CriticState, draws: Sequence[Choices], losses: Sequence[float]
    ) -> CriticState:
        """Add the differences between the draws' losses; what was known before fades."""
        finite = [(a, q) for a, q in zip(draws, losses, strict=True) if math.isfinite(q)]
        if len(finite) < 2:
            return state
        features = np.array(
            [[row[c] for row, c in zip(self._distortions, a, strict=True)] for a, _ in finite]
        )
        values = np.array([loss for _, loss in finite])
        features -= features.mean(axis=0)
        values -= values.mean()
        memory = self._config.memory
        return CriticState(
            memory * state.gram + features.T @ features,
            memory * state.moment + features.T @ values,
        )

    def update(
        self,
        state: CriticState,
        draws: Sequence[Choices],
        losses: Sequence[float],
        progress: float,
    ) -> CriticState:
        """The same as :meth:`observe`."""
        return self.observe(state, draws, losses)

    def to_arrays(self, state: CriticState) -> dict[str, npt.NDArray[Any]]:
        """The state as arrays."""
        return {"gram": state.gram, "moment": state.moment}

    def from_arrays(self, arrays: Mapping[str, npt.NDArray[Any]]) -> CriticState:
        """The state that :meth:`to_arrays` wrote."""
        return CriticState(arrays["gram"], arrays["moment"])


def _padded(rows: Sequence[Row], fill: float) -> Matrix:
    matrix = np.full((len(rows), max(map(len, rows), default=0)), fill)
    for row, values in zip(matrix, rows, strict=True):
        row[: len(values)] = values
    return matrix
