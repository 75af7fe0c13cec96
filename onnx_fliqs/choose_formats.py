"""Which formats the weights of a search train on: those of its policy, or of a baseline.

The policy starts from what single layers cost the float network; ``ilp`` and ``greedy``
measure every format of every layer when they choose.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from onnx_fliqs.controller import Choices, Controller, Method, Row
from onnx_fliqs.cost import BudgetKind
from onnx_fliqs.critic import Critic
from onnx_fliqs.operand_lines import operand_lines, references
from onnx_fliqs.projection import project
from onnx_fliqs.reinforce import Reinforce
from onnx_fliqs.scoring import Scoring
from onnx_fliqs.search_setup import Setup
from onnx_fliqs.search_state import SearchState
from onnx_fliqs.sensitivity import measure_sensitivity, measured_choices
from onnx_fliqs.strategies import (
    Strategy,
    greedy_choices,
    measure_damage,
    program_choices,
    random_choices,
    uniform_choices,
)
from onnx_fliqs.train_step import TrainState

__all__ = ["FormatChooser", "make_controller"]

_DAMAGE_SAMPLES: Final = 256
"""Held-out samples on which the baselines measure single changes of format, at most."""
_MOST_MEASURED: Final = 512
"""Held-out samples on which single changes of the float network are scored, at most. All
together they are no more than the weights train on."""


def make_controller(setup: Setup, known: tuple[Row, ...]) -> Controller[Any]:
    """The controller of a search, told what is known of the layers before anything is drawn.

    Args:
        setup: Of the search.
        known: What :meth:`FormatChooser.measure` found; empty if it did not measure.
    """
    config = setup.config.controller
    if config.method is Method.REINFORCE:
        return Reinforce(setup.costs, config)
    distortions = tuple(row[:, None] for row in known) or setup.distortions
    return Critic(setup.costs, distortions, config)


class FormatChooser:
    """What is measured of single layers, and what is chosen from it."""

    def __init__(
        self, setup: Setup, scoring: Scoring, measured: Callable[[int, int], None]
    ) -> None:
        """Measures nothing yet.

        Args:
            setup: Of the search.
            scoring: Its held-out samples.
            measured: Called with the batches that single changes have been scored on so far,
                and with how many there are.
        """
        self._setup = setup
        self._scoring = scoring
        self._measured = measured
        self._space = setup.prepared.space
        self._lines = [
            operand_lines(choices, rows)
            for choices, rows in zip(self._space.choices, setup.distortions, strict=True)
        ]
        self._to_spend = [
            number
            for number, budget in enumerate(setup.budgets)
            if budget.kind is not BudgetKind.LATENCY
        ]

    def measure(self, initial: TrainState) -> tuple[Row, ...]:
        """How far single changes take the float network from what it was.

        Args:
            initial: Its weights.
        """
        setup = self._setup
        changes = (along for own in self._lines for along in measured_choices(own))
        evaluations = 1 + sum(map(len, changes))
        trained_on = setup.config.steps * setup.config.batch_size
        samples = min(trained_on // evaluations, _MOST_MEASURED)
        return measure_sensitivity(
            self._lines,
            setup.distortions,
            lambda candidates: self._scoring.divergences(
                candidates, initial, setup.scales, samples, self._measured
            ),
            setup.config.weight_damage,
        )

    def choose(self, state: SearchState, controller: Controller[Any]) -> Choices:
        """The assignment that the strategy asks for, within the budgets."""
        setup = self._setup
        strategy, costs, borders = setup.config.strategy, setup.costs, setup.borders
        if strategy is Strategy.FIXED:
            # The space has no other choices.
            return (0,) * len(costs)
        if strategy is Strategy.UNIFORM:
            levels = self._space.uniform_choices
            return uniform_choices(costs, levels, setup.distortions, borders)
        if strategy is Strategy.RANDOM:
            rng = np.random.default_rng(setup.config.seed)
            return random_choices(costs, rng, borders)
        if strategy is Strategy.FLIQS:
            preferences = controller.preferences(state.controller)
            return project(preferences, costs, controller.slack, borders, self._to_spend)
        damage = measure_damage(
            costs,
            self._lines,
            self._space.as_precise,
            lambda candidates: self._scoring.losses(
                candidates, state.train, state.scales, _DAMAGE_SAMPLES, self._measured
            ),
        )
        if strategy is Strategy.GREEDY:
            return greedy_choices(references(self._lines), costs, damage, borders)
        return program_choices(costs, damage, borders, self._to_spend)
