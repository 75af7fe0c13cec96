"""The settings of a search."""

import math
import os
from dataclasses import dataclass, field
from typing import Final

from onnx_fliqs.assignment import Assignment
from onnx_fliqs.controller import ControllerConfig, Method
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.errors import ConfigError
from onnx_fliqs.latency import LatencyTable
from onnx_fliqs.optimizer import Optimizer
from onnx_fliqs.rules import Rule
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.thresholds import Statistics, Thresholds

__all__ = ["LOSSES", "SearchConfig"]

LOSSES: Final = ("auto", "cross-entropy", "kl", "mse")
"""What ``SearchConfig.loss`` may be."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of a search; what is None follows from the target or the machine."""

    target: str | None = None
    """A name, or the path of a profile. None: the assignment's, or ``generic`` without one."""
    space: str | None = None
    """A named space or a comma list of formats; None: the target's own."""
    separate: bool | None = None
    """Choose the formats of weights and of activations apart: every pair that is legal. None:
    every pair of formats that are quantized, unless the space names pairs itself."""
    budget: Budget | tuple[Budget, ...] | None = None
    """One, or several of different kinds that are all to be met; None: the target's default,
    as far as the space reaches."""
    rules: tuple[Rule, ...] = ()
    """What single layers choose from instead of the space, and which share a precision."""
    latency_table: LatencyTable | None = None
    """What a budget of latency rests on; beside another budget, latency is only reported."""
    strategy: Strategy = Strategy.FLIQS
    """How the assignment is chosen: by the search, or by a baseline before training."""
    assignment: Assignment | None = None
    """What ``Strategy.FIXED`` trains; it says space and cost itself."""
    remove_quantization: bool = False
    """Turn a model that is already quantized back into a float model, not refuse it."""
    steps: int = 500
    batch_size: int = 64
    seed: int = 0
    learning_rate: float = 2e-3
    """Largest change of a weight per step, relative to its tensor's root mean square (for
    ``Optimizer.ADAM``: absolute)."""
    loss: str = "auto"
    """``auto``: labels and the float model, or without labels the float model alone, by
    classes (``kl``) or by numbers (``mse``). ``cross-entropy``: classes alone. ``kl``,
    ``mse``: the float model alone."""
    distillation: float = 0.5
    """Share of the float model in the loss where that is ``auto`` and there are labels."""
    validation: float = 0.1
    """Share of the data that does not train: it measures formats and tells which weights are
    best. At most 2,000 samples, and as many as have 2^28 numbers of inputs or of outputs."""
    observe: float = 0.0
    """Critic: rounds of draws that are scored on the float network before anything trains, as
    a share of the steps. 0: the policy is that of what single changes cost; with
    ``freeze`` it begins with how much formats distort, and nothing is measured."""
    weight_damage: float = 0.1
    """Critic: by what the damage of weights counts beside that of activations, where their
    formats are chosen apart: what training leaves of it."""
    delay: float = 0.0
    """Share of the steps before the policy learns, if weights train on its draws: formats are
    drawn uniformly. REINFORCE, which knows nothing before, wants about 0.2."""
    freeze: float = 0.0
    """Share of the steps in which weights train on draws of the policy, which learns from
    them. Then the assignment is fixed, and the rest trains it alone. 0: it is fixed before the
    first step. REINFORCE, which learns from draws only, wants about 0.75."""
    draws: int = 4
    """Assignments of the policy that are scored on one held-out batch, where draws are scored
    (``observe``, ``freeze``)."""
    held_out_batch: int = 64
    threshold_rate: float = 10.0
    """Learning rate of the clipping thresholds of activations and weights, as a multiple of
    ``learning_rate``: by what their logarithm changes in a step. 0: they stay as calibrated
    on the float network, and the weights learn to live with them."""
    refresh: int | None = None
    """Steps between recalculations of the clipping thresholds, where they are not learned."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    workers: int | None = None
    """Threads; None: one per core. Part of the result, since sums round differently."""
    thresholds: Thresholds = Thresholds.SWITCHED
    """Where values are clipped."""
    statistics: Statistics = Statistics.RUNNING
    """Which activations thresholds rest on that are refreshed (see ``refresh``)."""
    optimizer: Optimizer = Optimizer.RELATIVE_ADAM
    """How weights follow their gradients."""
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "held_out_batch", "checkpoint_every")
        optional = ("refresh", "workers")
        for name in (*counts, *(n for n in optional if getattr(self, n) is not None)):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        fewest = 2 if self.controller.method is Method.CRITIC else 1
        if self.draws < fewest:
            raise ConfigError(
                f"the {self.controller.method.value} controller needs at least {fewest} draws,"
                f" got {self.draws}"
            )
        if self.loss not in LOSSES:
            raise ConfigError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        kinds = [budget.kind for budget in self.budgets]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"one budget of a kind: got {' '.join(map(str, self.budgets))}")
        if BudgetKind.LATENCY in kinds and self.latency_table is None:
            raise ConfigError(
                "--latency needs --latency-table, which `onnx-fliqs profile` writes"
            )
        self._check_assignment()
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(
                f"learning_rate must be between 0 and 1, got {self.learning_rate:g}"
            )
        if not 0 <= self.threshold_rate < math.inf:
            raise ConfigError(
                f"threshold_rate must not be negative, got {self.threshold_rate:g}"
            )
        if self.refresh is not None and self.threshold_rate > 0:
            raise ConfigError(
                "thresholds are learned or refreshed: refresh needs threshold_rate=0"
            )
        if not 0 <= self.distillation <= 1:
            raise ConfigError(f"distillation must be in [0, 1], got {self.distillation:g}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation must be between 0 and 1, got {self.validation:g}")
        if not 0 <= self.observe < math.inf:
            raise ConfigError(f"observe must not be negative, got {self.observe:g}")
        if not 0 <= self.weight_damage < math.inf:
            raise ConfigError(
                f"weight_damage must not be negative, got {self.weight_damage:g}"
            )
        if not 0 <= self.delay <= self.freeze <= 1:
            raise ConfigError("delay and freeze must satisfy 0 <= delay <= freeze <= 1")
        if self.freeze > 0 and self.strategy is not Strategy.FLIQS:
            raise ConfigError(
                f"the strategy {self.strategy.value!r} fixes formats before training: leave"
                " out freeze"
            )
        reinforce = self.controller.method is Method.REINFORCE
        if self.freeze == 0 and reinforce and self.strategy is Strategy.FLIQS:
            raise ConfigError(
                "REINFORCE learns from the draws that weights train on: it needs freeze above"
                " 0, about 0.75"
            )

    def _check_assignment(self) -> None:
        """An assignment leaves nothing to choose."""
        if self.assignment is None:
            if self.strategy is Strategy.FIXED:
                raise ConfigError("the strategy 'fixed' needs an assignment to train")
            return
        contradictions = {
            f"--strategy {self.strategy.value}": self.strategy is not Strategy.FIXED,
            f"--space {self.space}": self.space is not None,
            "--separate": self.separate is True,
            "--tied": self.separate is False,
            "--rules": bool(self.rules),
            " ".join(map(str, self.budgets)): bool(self.budgets),
        }
        for option, given in contradictions.items():
            if given:
                raise ConfigError(
                    f"--assignment fixes the format of every layer: leave out {option}"
                )

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Those that are given."""
        if isinstance(self.budget, Budget):
            return (self.budget,)
        return self.budget or ()

    @property
    def threads(self) -> int:
        """The number of worker threads."""
        return self.workers or _cores()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
