"""The policy: a probability for each choice of each decision, and how it is learned.

A decision is an integer; what its choices mean is none of the policy's business. Two
controllers share one interface of pure functions over an explicit state:
:class:`~onnx_fliqs.reinforce.Reinforce`, FLIQS as published, and
:class:`~onnx_fliqs.critic.Critic`, which learns from far fewer scored draws.
"""

import enum
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
    "entropy",
    "expected_cost",
    "most_probable",
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


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of the controllers."""

    method: Method = Method.CRITIC
    temperature: float = 0.2
    """Critic: of the policy at the start of the search, in units of the spread of the losses
    that it predicts; falls linearly to almost 0."""
    memory: float = 0.998
    """Critic: how much an observation weighs after the next one."""
    shrinkage: float = 0.1
    """Critic: weight of the prior that all decisions are equally sensitive."""
    learning_rate: float = 0.05
    """REINFORCE: Adam's, on the logits."""
    beta: float = -1.0
    """REINFORCE: weight of the cost in the reward."""
    entropy_end: float = 0.5
    """REINFORCE: weight of the entropy penalty at the end of the search."""
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
