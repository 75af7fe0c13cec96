"""The policy controller: which choice each decision takes, learned by REINFORCE.

A decision is an integer; what its choices mean is none of the policy's business. State goes in
and out of pure functions. The method is FLIQS's (independent softmax logits, one draw for all
decisions, a baseline, an entropy penalty on a cosine schedule), with two changes for
searches of hundreds instead of many thousands of steps, which ``CostTerm`` and ``samples`` switch:
the cost, known in closed form, is differentiated instead of sampled, and several draws are
scored on the same held-out batch, each against the mean of the others.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import ConfigError

__all__ = [
    "Choices",
    "ControllerConfig",
    "ControllerState",
    "CostTerm",
    "entropy",
    "expected_cost",
    "initial",
    "most_probable",
    "probabilities",
    "sample",
    "update",
]

Choices: TypeAlias = tuple[int, ...]
"""One index per decision."""
_Array: TypeAlias = npt.NDArray[np.float64]

_ADAM_BETA1: Final = 0.9
_ADAM_BETA2: Final = 0.999
_LEAST_SPREAD: Final = 1e-8


class CostTerm(enum.Enum):
    """How the cost enters."""

    REWARD = "reward"
    """R = Q + beta |T/T0 - 1|, beta < 0, of each draw (FLIQS, TuNAS's absolute reward)."""
    LAGRANGIAN = "lagrangian"
    """The gradient of multiplier * E[T]/T0 in closed form, the multiplier raised and lowered
    by dual ascent on E[T]/T0 - 1."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of the controller."""

    learning_rate: float = 0.05
    """Adam, on the logits."""
    cost: CostTerm = CostTerm.LAGRANGIAN
    beta: float = -1.0
    """Weight of the cost in the reward."""
    dual_rate: float = 0.05
    """How fast the multiplier follows the violation of the budget."""
    entropy_end: float = 0.5
    """Weight of the entropy penalty at the end of the search."""
    baseline_decay: float = 0.99
    """Of the running mean reward, the baseline of a single draw."""
    spread_decay: float = 0.95
    """Of the running size of an advantage, the unit in which advantages are counted."""

    def __post_init__(self) -> None:
        if self.beta >= 0:
            raise ConfigError(f"beta must be negative, got {self.beta:g}")
        if self.learning_rate <= 0:
            raise ConfigError(
                f"controller learning rate must be positive, got {self.learning_rate:g}"
            )


@dataclass(frozen=True, slots=True)
class ControllerState:
    """Everything that an update changes."""

    logits: tuple[_Array, ...]
    """One vector per decision."""
    first: tuple[_Array, ...]
    """Adam's first moments."""
    second: tuple[_Array, ...]
    """Adam's second moments."""
    baseline: float = math.nan
    """Running mean reward; NaN before the first."""
    spread: float = math.nan
    """Running size of an advantage; NaN before the first."""
    multiplier: float = 0.0
    """Weight of the cost in the Lagrangian."""
    updates: int = 0

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The state as arrays, for a checkpoint."""
        rows = {"logits": self.logits, "first": self.first, "second": self.second}
        return {
            **{
                f"{name}/{i}": row
                for name, value in rows.items()
                for i, row in enumerate(value)
            },
            "scalars": np.array([self.baseline, self.spread, self.multiplier]),
            "updates": np.int64(self.updates),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "ControllerState":
        """The state that :meth:`arrays` wrote."""
        count = sum(name.startswith("logits/") for name in arrays)
        logits, first, second = (
            tuple(np.asarray(arrays[f"{name}/{i}"], np.float64) for i in range(count))
            for name in ("logits", "first", "second")
        )
        baseline, spread, multiplier = map(float, arrays["scalars"])
        return cls(logits, first, second, baseline, spread, multiplier, int(arrays["updates"]))


def initial(sizes: Sequence[int]) -> ControllerState:
    """A uniform policy.

    Args:
        sizes: Number of choices of each decision.
    """
    zeros = tuple(np.zeros(size) for size in sizes)
    return ControllerState(zeros, zeros, zeros)


def probabilities(state: ControllerState) -> tuple[_Array, ...]:
    """The probability of each choice of each decision: softmax at temperature 1."""
    shifted = (np.exp(row - row.max()) for row in state.logits)
    return tuple(row / row.sum() for row in shifted)


def sample(state: ControllerState, rng: np.random.Generator) -> Choices:
    """One independent draw per decision."""
    return tuple(int(rng.choice(len(p), p=p)) for p in probabilities(state))


def most_probable(state: ControllerState) -> Choices:
    """The argmax of each decision, the first of equals."""
    return tuple(int(np.argmax(row)) for row in state.logits)


def entropy(state: ControllerState) -> float:
    """Mean entropy of the decisions, in nats."""
    rows = [-float(np.sum(p * np.log(np.maximum(p, 1e-300)))) for p in probabilities(state)]
    return float(np.mean(rows)) if rows else 0.0


def expected_cost(state: ControllerState, costs: CostTable) -> float:
    """E[T] under the policy, in the unit of ``costs``."""
    return float(sum(p @ row for p, row in zip(probabilities(state), costs, strict=True)))


def entropy_weight(config: ControllerConfig, progress: float) -> float:
    """Cosine schedule: beta_end (1 - cos(pi s)) / 2 (FLIQS's entropy regularisation).

    Args:
        config: Holds beta_end.
        progress: s, 0 at the end of the delay to 1 at the end of the search.
    """
    return config.entropy_end * (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def update(
    state: ControllerState,
    draws: Sequence[Choices],
    qualities: Sequence[float],
    costs: CostTable,
    progress: float,
    config: ControllerConfig,
) -> ControllerState:
    """One step on the policy.

    Minimises, with N decisions and K draws a_k of reward R_k,
    ``-1/(N K) sum_k A_k log pi(a_k) + beta_H(s) / N sum_i H(pi_i)`` (+ multiplier * E[T]/T0),
    where the advantage A_k is R_k less the mean reward of the other draws (of a running mean for
    a single draw), in units of its running size.

    Args:
        state: Before.
        draws: The choices that were scored, all on the same batch.
        qualities: Q of each, higher is better; a draw that is not finite is left out.
        costs: Cost of each choice as a share of the budget T0.
        progress: s of the entropy schedule.
        config: Settings.
    """
    scored = [(a, q) for a, q in zip(draws, qualities, strict=True) if math.isfinite(q)]
    rewards = np.array([_reward(a, q, costs, config) for a, q in scored])
    advantages, state = _advantages(state, rewards, config)
    weight = entropy_weight(config, progress)
    count = len(state.logits)
    expected = expected_cost(state, costs)
    multiplier = state.multiplier
    gradients = []
    for i, (p, cost) in enumerate(zip(probabilities(state), costs, strict=True)):
        taken = np.zeros_like(p)
        for (choices, _), advantage in zip(scored, advantages, strict=True):
            taken -= advantage * (np.eye(len(p))[choices[i]] - p) / max(1, len(scored))
        log_p = np.log(np.maximum(p, 1e-300))
        entropies = -p * (log_p - np.sum(p * log_p))
        gradient = (taken + weight * entropies) / count
        if config.cost is CostTerm.LAGRANGIAN:
            gradient += multiplier * p * (cost - p @ cost)
        gradients.append(gradient)
    if config.cost is CostTerm.LAGRANGIAN:
        multiplier = max(0.0, multiplier + config.dual_rate * (expected - 1))
    return replace(_adam(state, gradients, config), multiplier=multiplier)


def _reward(
    choices: Choices, quality: float, costs: CostTable, config: ControllerConfig
) -> float:
    if config.cost is CostTerm.LAGRANGIAN:
        return quality
    total = float(sum(row[choice] for row, choice in zip(costs, choices, strict=True)))
    return quality + config.beta * abs(total - 1)


def _advantages(
    state: ControllerState, rewards: _Array, config: ControllerConfig
) -> tuple[_Array, ControllerState]:
    """Advantages in units of their running size, and the state with its running values."""
    if len(rewards) == 0:
        return rewards, state
    mean = float(rewards.mean())
    decay = config.baseline_decay
    baseline = (
        mean if math.isnan(state.baseline) else decay * state.baseline + (1 - decay) * mean
    )
    if len(rewards) > 1:  # leave-one-out
        raw = (rewards - mean) * len(rewards) / (len(rewards) - 1)
    else:
        raw = rewards - baseline
    size = float(np.sqrt(np.mean(raw**2)))
    decay = config.spread_decay
    spread = size if math.isnan(state.spread) else decay * state.spread + (1 - decay) * size
    return raw / max(spread, _LEAST_SPREAD), replace(state, baseline=baseline, spread=spread)


def _adam(
    state: ControllerState, gradients: Sequence[_Array], config: ControllerConfig
) -> ControllerState:
    t = state.updates + 1
    first = tuple(
        _ADAM_BETA1 * m + (1 - _ADAM_BETA1) * g
        for m, g in zip(state.first, gradients, strict=True)
    )
    second = tuple(
        _ADAM_BETA2 * v + (1 - _ADAM_BETA2) * g**2
        for v, g in zip(state.second, gradients, strict=True)
    )
    logits = tuple(
        row
        - config.learning_rate
        * (m / (1 - _ADAM_BETA1**t))
        / (np.sqrt(v / (1 - _ADAM_BETA2**t)) + 1e-8)
        for row, m, v in zip(state.logits, first, second, strict=True)
    )
    return replace(state, logits=logits, first=first, second=second, updates=t)
