"""The policy: a probability for each choice of each decision, and how it is learned.

A decision is an integer; what its choices mean is none of the policy's business. Two
controllers share one interface of pure functions over an explicit state:
:class:`~onnx_fliqs.reinforce.Reinforce`, FLIQS as published, and
:class:`~onnx_fliqs.critic.Critic`, which learns from far fewer scored draws.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import ConfigError

__all__ = [
    "Choices",
    "Controller",
    "ControllerConfig",
    "Method",
    "Policy",
    "RewardForm",
    "Schedule",
    "Signal",
    "entropy",
    "expected_cost",
    "most_probable",
    "ramp",
    "sample",
    "softmax",
    "uniform",
]

Row: TypeAlias = npt.NDArray[np.float64]
Choices: TypeAlias = tuple[int, ...]
"""One index per decision."""
Policy: TypeAlias = tuple[Row, ...]
"""For each decision, the probabilities of its choices."""
State = TypeVar("State")


class Method(enum.Enum):
    """How the policy is learned."""

    CRITIC = "critic"
    REINFORCE = "reinforce"


class Signal(enum.Enum):
    """What draws are scored by on held-out samples."""

    LOG_LOSS = "log-loss"
    """The logarithm of the loss that the weights are trained on: what layers add to the loss
    grows with what the others have added, and a few bad draws must not outweigh all others."""
    LOSS = "loss"
    """The loss itself."""
    ACCURACY = "accuracy"
    """The share of the samples whose class is the label."""
    AGREEMENT = "agreement"
    """The share of the samples whose class is that of the float model."""


class Schedule(enum.Enum):
    """How a setting goes from its start to its end in the course of the search."""

    LINEAR = "linear"
    COSINE = "cosine"
    """Slow at both ends: (1 - cos(pi s)) / 2."""
    CONSTANT = "constant"
    """Not at all: the setting keeps the one value that is configured."""


class RewardForm(enum.Enum):
    """How quality Q and cost T/T0 make a reward (compared in TuNAS, Bender et al. 2020)."""

    ABSOLUTE = "absolute"
    """Q + beta |T/T0 - 1|: cheaper than the budget is as bad as dearer (TuNAS, FLIQS)."""
    ONE_SIDED = "one-sided"
    """Q + beta max(0, T/T0 - 1)."""
    EXPONENTIAL = "exponential"
    """Q (T/T0)^beta (MNasNet, Tan et al. 2019)."""
    HARD_EXPONENTIAL = "hard-exponential"
    """Q max(1, T/T0)^beta."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of the controllers.

    The critic's count where draws are scored (``SearchConfig.observe`` and ``freeze``): by
    default it is told what single changes cost, and ``cooling`` alone leaves a trace, in the
    entropy that is reported.
    """

    method: Method = Method.CRITIC
    signal: Signal = Signal.LOG_LOSS
    """What the policy learns from."""
    temperature: float = 0.2
    """Critic: of the policy at the start of the search, in units of the spread of the losses
    that it predicts; falls to almost 0."""
    cooling: Schedule = Schedule.LINEAR
    """Critic: how the temperature falls."""
    memory: float = 0.998
    """Critic: how much an observation weighs after the next one."""
    shrinkage: float = 0.1
    """Critic: weight of the prior that all decisions are equally sensitive."""
    learning_rate: float = 0.05
    """REINFORCE: Adam's, on the logits."""
    beta: float = -1.0
    """REINFORCE: weight of the cost in the reward, or its exponent."""
    reward: RewardForm = RewardForm.ABSOLUTE
    """REINFORCE: exponential forms need a quality that is not negative, no loss."""
    entropy_end: float = 0.5
    """REINFORCE: weight of the entropy penalty at the end of the search."""
    entropy_schedule: Schedule = Schedule.COSINE
    """REINFORCE: how that weight rises from 0."""
    baseline_decay: float = 0.99
    """REINFORCE: of the running mean reward, the baseline of a single draw."""

    def __post_init__(self) -> None:
        # Written so that NaN fails as well.
        for name in ("temperature", "shrinkage", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name):g}")
        for name in ("memory", "baseline_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name):g}")
        if not self.entropy_end >= 0:
            raise ConfigError(f"entropy_end must not be negative, got {self.entropy_end:g}")
        if not self.beta < 0:
            raise ConfigError(f"beta must be negative, got {self.beta:g}")
        exponential = self.reward in (RewardForm.EXPONENTIAL, RewardForm.HARD_EXPONENTIAL)
        if exponential and self.signal in (Signal.LOG_LOSS, Signal.LOSS):
            raise ConfigError(
                f"the {self.reward.value} reward multiplies a quality that is not negative:"
                " choose the signal accuracy or agreement"
            )


class Controller(Protocol[State]):
    """Learns a policy from scored draws."""

    slack: float
    """What :func:`~onnx_fliqs.projection.project` may give up to spend the budget."""

    def initial(self) -> State:
        """Before anything is known."""
        ...

    def policy(self, state: State, progress: float) -> Policy:
        """The policy at a time of the search, 0 (its start) to 1 (its end)."""
        ...

    def preferences(self, state: State) -> tuple[Row, ...]:
        """How good each choice of each decision is held to be, its cost left aside."""
        ...

    def observe(
        self, state: State, draws: Sequence[Choices], losses: Sequence[float]
    ) -> State:
        """Take note of scored draws while the policy is not learning yet (the delay)."""
        ...

    def update(
        self,
        state: State,
        draws: Sequence[Choices],
        losses: Sequence[float],
        progress: float,
    ) -> State:
        """Learn from draws that were scored on the same batch; lower losses are better."""
        ...

    def to_arrays(self, state: State) -> dict[str, npt.NDArray[Any]]:
        """The state as arrays, for a checkpoint."""
        ...

    def from_arrays(self, arrays: Mapping[str, npt.NDArray[Any]]) -> State:
        """The state that :meth:`to_arrays` wrote."""
        ...


def ramp(schedule: Schedule, progress: float) -> float:
    """Share of the way from start to end, 0 to 1, at a time of the search.

    Args:
        schedule: Not constant: whether start or end is kept is up to the setting.
        progress: 0 to 1; times outside are taken to be the nearest of these.
    """
    time = min(max(progress, 0.0), 1.0)
    return (1 - math.cos(math.pi * time)) / 2 if schedule is Schedule.COSINE else time


def softmax(logits: Row) -> Row:
    """Probabilities proportional to exp(logits)."""
    powers = np.exp(logits - logits.max())
    result: Row = powers / powers.sum()
    return result


def uniform(sizes: Sequence[int]) -> Policy:
    """Every choice as likely as the others."""
    return tuple(np.full(size, 1 / size) for size in sizes)


def sample(policy: Policy, rng: np.random.Generator) -> Choices:
    """One independent draw per decision."""
    return tuple(int(rng.choice(len(p), p=p)) for p in policy)


def most_probable(policy: Policy) -> Choices:
    """The argmax of each decision, the first of equals."""
    return tuple(int(np.argmax(p)) for p in policy)


def entropy(policy: Policy) -> float:
    """Mean entropy of the decisions, in nats."""
    rows = [-float(np.sum(p * np.log(np.maximum(p, 1e-300)))) for p in policy]
    return float(np.mean(rows)) if rows else 0.0


def expected_cost(policy: Policy, costs: CostTable) -> float:
    """E[T] under the policy, in the unit of ``costs``: of several budgets, the largest."""
    return float(np.max(sum(p @ row for p, row in zip(policy, costs, strict=True))))
