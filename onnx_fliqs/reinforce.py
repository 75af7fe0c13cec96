"""The controller of FLIQS as published: REINFORCE on independent softmax logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.borders import spent
from onnx_fliqs.controller import (
    Choices,
    ControllerConfig,
    Policy,
    RewardForm,
    Row,
    Schedule,
    ramp,
    softmax,
)
from onnx_fliqs.cost import CostTable

__all__ = ["Reinforce", "ReinforceState", "entropy_weight", "reward"]

_BETA1: Final = 0.9
_BETA2: Final = 0.999
_EPSILON: Final = 1e-8


@dataclass(frozen=True, slots=True)
class ReinforceState:
    """Everything that an update changes."""

    logits: tuple[Row, ...]
    """One vector per decision."""
    first: tuple[Row, ...]
    """Adam's first moments."""
    second: tuple[Row, ...]
    """Adam's second moments."""
    baseline: float = math.nan
    """Running mean reward; NaN before the first."""
    updates: int = 0


def entropy_weight(end: float, progress: float, schedule: Schedule = Schedule.COSINE) -> float:
    """FLIQS's entropy regularisation: from 0 to ``end``, or ``end`` all the time."""
    return end if schedule is Schedule.CONSTANT else end * ramp(schedule, progress)


def reward(
    quality: float, cost: float, beta: float, form: RewardForm = RewardForm.ABSOLUTE
) -> float:
    """R, higher is better.

    Args:
        quality: Q, higher is better; not negative for the exponential forms.
        cost: T/T0; of several budgets, the largest share. The sum over budgets would draw
            those that are not needed towards being spent as well.
        beta: Negative.
        form: How the two are combined.
    """
    match form:
        case RewardForm.ABSOLUTE:
            return quality + beta * abs(cost - 1)
        case RewardForm.ONE_SIDED:
            return quality + beta * max(0.0, cost - 1)
        case RewardForm.EXPONENTIAL:
            return quality * math.pow(cost, beta)
        case RewardForm.HARD_EXPONENTIAL:
            return quality * math.pow(max(1.0, cost), beta)


class Reinforce:
    """One draw per decision, a baseline, an entropy penalty that grows."""

    slack = math.inf
    """Log-probabilities do not tell how much worse another assignment would be."""

    def __init__(self, costs: CostTable, config: ControllerConfig) -> None:
        """Name the decisions.

        Args:
            costs: Cost of each choice of each decision as a share of the budget T0, or of each
                of several.
            config: Settings.
        """
        self._costs = costs
        self._config = config

    def initial(self) -> ReinforceState:
        """A uniform policy."""
        zeros = tuple(np.zeros(len(row)) for row in self._costs)
        return ReinforceState(zeros, zeros, zeros)

    def policy(self, state: ReinforceState, progress: float) -> Policy:
        """Softmax of the logits at temperature 1."""
        return tuple(softmax(row) for row in state.logits)

    def preferences(self, state: ReinforceState) -> tuple[Row, ...]:
        """Logarithms of the probabilities."""
        return tuple(
            row - row.max() - np.log(np.sum(np.exp(row - row.max()))) for row in state.logits
        )

    def observe(
        self, state: ReinforceState, draws: Sequence[Choices], losses: Sequence[float]
    ) -> ReinforceState:
        """During the delay only the running mean reward follows."""
        return self._follow(state, self._rewards(draws, losses)[1])

    def update(
        self,
        state: ReinforceState,
        draws: Sequence[Choices],
        losses: Sequence[float],
        progress: float,
    ) -> ReinforceState:
        """One step of Adam on the logits.

        With N decisions and K draws a_k of reward R_k, minimises
        ``-1/(N K) sum_k A_k log pi(a_k) + beta_H(s)/N sum_i H(pi_i)``. The advantage A_k is
        R_k less the mean reward of the other draws; for a single draw, less a running mean
        that this reward has already entered.
        """
        scored, rewards = self._rewards(draws, losses)
        state = self._follow(state, rewards)
        count = len(rewards)
        if count > 1:
            advantages = (rewards - rewards.mean()) * count / (count - 1)
        else:
            advantages = rewards - state.baseline
        config = self._config
        weight = entropy_weight(config.entropy_end, progress, config.entropy_schedule)
        gradients = []
        for i, p in enumerate(self.policy(state, progress)):
            log_p = np.log(np.maximum(p, 1e-300))
            gradient = -weight * p * (log_p - np.sum(p * log_p))
            for choices, advantage in zip(scored, advantages, strict=True):
                gradient -= advantage * (np.eye(len(p))[choices[i]] - p) / count
            gradients.append(gradient / len(self._costs))
        return self._adam(state, gradients)

    def _rewards(
        self, draws: Sequence[Choices], losses: Sequence[float]
    ) -> tuple[list[Choices], Row]:
        """The draws with a finite loss, and their rewards."""
        scored, rewards = [], []
        for choices, loss in zip(draws, losses, strict=True):
            if math.isfinite(loss):
                cost = spent(self._costs, (), choices)
                scored.append(choices)
                config = self._config
                rewards.append(reward(-loss, cost, config.beta, config.reward))
        return scored, np.array(rewards, np.float64)

    def _follow(self, state: ReinforceState, rewards: Row) -> ReinforceState:
        if len(rewards) == 0:
            return state
        mean, decay = float(rewards.mean()), self._config.baseline_decay
        old = mean if math.isnan(state.baseline) else state.baseline
        return replace(state, baseline=decay * old + (1 - decay) * mean)

    def _adam(self, state: ReinforceState, gradients: Sequence[Row]) -> ReinforceState:
        t = state.updates + 1
        first = tuple(
            _BETA1 * m + (1 - _BETA1) * g for m, g in zip(state.first, gradients, strict=True)
        )
        second = tuple(
            _BETA2 * v + (1 - _BETA2) * g**2
            for v, g in zip(state.second, gradients, strict=True)
        )
        logits = tuple(
            row
            - self._config.learning_rate
            * (m / (1 - _BETA1**t))
            / (np.sqrt(v / (1 - _BETA2**t)) + _EPSILON)
            for row, m, v in zip(state.logits, first, second, strict=True)
        )
        return replace(state, logits=logits, first=first, second=second, updates=t)

    def to_arrays(self, state: ReinforceState) -> dict[str, npt.NDArray[Any]]:
        """The state as arrays."""
        rows = {"logits": state.logits, "first": state.first, "second": state.second}
        return {
            **{
                f"{name}/{i}": row
                for name, value in rows.items()
                for i, row in enumerate(value)
            },
            "baseline": np.asarray(state.baseline),
            "updates": np.asarray(state.updates),
        }

    def from_arrays(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ReinforceState:
        """The state that :meth:`to_arrays` wrote."""
        logits, first, second = (
            tuple(np.asarray(arrays[f"{name}/{i}"]) for i in range(len(self._costs)))
            for name in ("logits", "first", "second")
        )
        return ReinforceState(
            logits, first, second, float(arrays["baseline"]), int(arrays["updates"])
        )
