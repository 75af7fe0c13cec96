"""A controller for searches of hundreds of steps: an additive critic and a Boltzmann policy.

REINFORCE spreads the outcome of one draw over all decisions at once, and needs thousands of
draws to tell them apart. The critic is told how much each choice distorts its operands, and
learns only how much that matters: ::

    loss(a) = level of the batch + sum_io s_io e_io(a_i),     s_io >= 0

with e the known distortion of operand o (weights, activations) of decision i and s the
sensitivities, one for each operand of each decision, by ridge regression on the differences
between draws that were scored on the same batch. Among all policies whose expected cost is
the budget, the one that minimises the expected loss less temperature times entropy is, for
each decision, ``pi_i(a) ~ exp(-s_i . e_i(a) / temperature - multiplier * cost_i(a))``: the
soft policy improvement of maximum-entropy reinforcement learning (Haarnoja et al. 2018,
equation 4), in closed form because loss and cost are sums. Several budgets have a multiplier
each (:mod:`~onnx_fliqs.boltzmann`). The falling temperature does what FLIQS's entropy schedule
does: at the end the policy is deterministic. It never leaves the budget.

Operands have sensitivities of their own also where a layer has one format for both: their
relative errors need not matter alike, and nothing is lost where they do. A search that has
measured single changes tells those instead, as distortions of one operand.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.boltzmann import within_budgets
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

_COLDEST: Final = 1e-6
"""Share of the starting temperature that is left at the end."""
_LEAST_SENSITIVITY: Final = 0.05
"""Of the mean one: more distortion is never predicted to be harmless."""


@dataclass(frozen=True, slots=True)
class CriticState:
    """The normal equations of the regression."""

    gram: Matrix
    """[N K, N K] of N decisions with K operands: products of distortions, summed over
    observations."""
    moment: Row
    """[N K]: distortions times losses."""


class Critic:
    """Learns one sensitivity per operand of each decision."""

    slack = 0.1
    """Of the predicted loss, which is not known better than that."""

    def __init__(
        self, costs: CostTable, distortions: Sequence[Matrix], config: ControllerConfig
    ) -> None:
        """Name the decisions.

        Args:
            costs: Cost of each choice of each decision as a share of each budget.
            distortions: For each decision, [choices, operands], not negative: how much each
                choice distorts each operand, in any unit.
            config: Settings.
        """
        self._costs = costs
        self._config = config
        self._distortions = tuple(np.asarray(rows, np.float64) for rows in distortions)
        self._shape = len(costs), max((rows.shape[1] for rows in self._distortions), default=1)
        # As matrices [decisions, most choices]: choices that a decision lacks have no chance.
        self._lacking = _padded([np.zeros(len(row)) for row in costs], -np.inf)
        columns = zip(*(row.reshape(len(row), -1).T for row in costs), strict=True)
        self._cost_matrices = [_padded(rows, 0.0) for rows in columns]

    def initial(self) -> CriticState:
        """No observations."""
        count = self._shape[0] * self._shape[1]
        return CriticState(np.zeros((count, count)), np.zeros(count))

    def sensitivities(self, state: CriticState) -> Matrix:
        """The estimated s_io, shrunk towards their common value; all 1 before any is known.

        Returns:
            Of shape [decisions, operands].
        """
        count = len(state.moment)
        ones = np.ones(count)
        information = float(ones @ state.gram @ ones)
        common = float(ones @ state.moment) / information if information > 0 else 0.0
        if common <= 0:
            return ones.reshape(self._shape)
        weight = self._config.shrinkage * float(np.trace(state.gram)) / count
        solved = np.linalg.solve(
            state.gram + weight * np.eye(count), state.moment + weight * common * ones
        )
        result: Matrix = np.maximum(solved, _LEAST_SENSITIVITY * common)
        return result.reshape(self._shape)

    def preferences(self, state: CriticState) -> tuple[Row, ...]:
        """Predicted losses, negated."""
        sensitivities = self.sensitivities(state)
        return tuple(-e @ s for s, e in zip(sensitivities, self._distortions, strict=True))

    def policy(self, state: CriticState, progress: float) -> Policy:
        """The Boltzmann policy whose expected cost is the budget, or less if all is cheap.

        With several budgets it meets each, and those that decide exactly.
        """
        preferences = self.preferences(state)
        # The unit of the temperature: the spread of the predicted loss over uniform draws.
        unit = math.sqrt(sum(float(np.var(row)) for row in preferences)) or 1.0
        temperature = self._config.temperature * self._left(progress) * unit
        logits = _padded(preferences, 0.0) / temperature + self._lacking
        tilted = within_budgets(logits, self._cost_matrices)
        return tuple(p[: len(row)] for p, row in zip(tilted, self._costs, strict=True))

    def _left(self, progress: float) -> float:
        """Share of the starting temperature."""
        if self._config.cooling is Schedule.CONSTANT:
            return 1.0
        return 1 - (1 - _COLDEST) * ramp(self._config.cooling, progress)

    def observe(
        self, state: CriticState, draws: Sequence[Choices], losses: Sequence[float]
    ) -> CriticState:
        """Add the differences between the draws' losses; what was known before fades."""
        finite = [(a, q) for a, q in zip(draws, losses, strict=True) if math.isfinite(q)]
        if len(finite) < 2:
            return state
        features = np.array(
            [
                np.concatenate([e[c] for e, c in zip(self._distortions, a, strict=True)])
                for a, _ in finite
            ]
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
