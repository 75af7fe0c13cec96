"""Ways to an assignment: FLIQS's search, and the baselines it has to beat.

The baselines choose before training, from what is known of the float model, and then train the
assignment for all of the steps: the same step, data, thresholds and emission as the search.
Two of them need the *damage* of each choice: how much the loss on held-out samples
grows when that decision alone leaves the format that is most precise.
"""

import enum
from collections.abc import Callable, Sequence

import numpy as np

from onnx_fliqs.borders import Border, spent
from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.projection import project

__all__ = [
    "Strategy",
    "greedy_choices",
    "measure_damage",
    "program_choices",
    "random_choices",
    "single_changes",
    "uniform_choices",
]


class Strategy(enum.Enum):
    """How the assignment is chosen."""

    FLIQS = "fliqs"
    """While the weights are trained, by the policy controller."""
    ILP = "ilp"
    """The least sum of damages within the budget, by an integer program (HAWQ-V3)."""
    GREEDY = "greedy"
    """One step down at a time, the least damage first (AIMET's automatic mixed precision)."""
    UNIFORM = "uniform"
    """The most precise format that every layer can have."""
    RANDOM = "random"
    """Any assignment that spends the budget."""
    FIXED = "fixed"
    """The one that is given: nothing is chosen, so there is no budget."""


def single_changes(costs: CostTable) -> list[Choices]:
    """The assignment of the most precise formats, then each that differs in one decision.

    Choices are ordered by precision, so the last of each decision is its most precise.
    """
    best = tuple(len(row) - 1 for row in costs)
    changed = [
        (*best[:i], choice, *best[i + 1 :])
        for i, row in enumerate(costs)
        for choice in range(len(row) - 1)
    ]
    return [best, *changed]


def measure_damage(
    costs: CostTable, losses: Callable[[Sequence[Choices]], Sequence[float]]
) -> tuple[Row, ...]:
    """What each choice of each decision adds to the loss when it stands alone.

    Args:
        costs: For the number of choices of each decision.
        losses: Scores assignments on the same samples.

    Returns:
        For each decision, the damage of its choices: never negative, 0 for the most precise,
        and, since noise is no merit, never less than that of a more precise choice. A loss
        that is not finite counts as the largest that is.
    """
    found = np.asarray(losses(single_changes(costs)), np.float64)
    found = np.where(np.isfinite(found), found, np.max(found[np.isfinite(found)], initial=0.0))
    added = iter(found[1:] - found[0])
    rows = []
    for row in costs:
        raw = np.array([*(next(added) for _ in row[:-1]), 0.0])
        rows.append(np.maximum.accumulate(np.maximum(raw, 0.0)[::-1])[::-1])
    return tuple(rows)


def program_choices(
    costs: CostTable, damage: Sequence[Row], borders: Sequence[Border] = ()
) -> Choices:
    """The assignment with the least sum of damages among those that spend the budget.

    HAWQ-V3 (Yao et al. 2021, section 3.4) weighs squared weight errors by the trace of the
    Hessian; a measured difference of losses sees the activations as well.
    """
    return project([-row for row in damage], costs, borders=borders)


def greedy_choices(
    costs: CostTable, damage: Sequence[Row], borders: Sequence[Border] = ()
) -> Choices:
    """Lower the decision whose next step does the least damage until the budget is met.

    Raises:
        InfeasibleError: The cheapest formats together cost more than the budget.
    """
    chosen = [len(row) - 1 for row in costs]

    while spent(costs, borders, chosen) > 1 + 1e-9:
        steps = [
            (float(damage[i][c - 1]), -float(costs[i][c] - costs[i][c - 1]), i)
            for i, c in enumerate(chosen)
            # With borders, a step may pay only together with a later one.
            if c > 0 and (borders or costs[i][c] > costs[i][c - 1])
        ]
        if not steps:
            raise InfeasibleError("no assignment of formats meets the budget")
        chosen[min(steps)[2]] -= 1
    return tuple(chosen)


def uniform_choices(
    costs: CostTable, levels: Sequence[Choices], borders: Sequence[Border] = ()
) -> Choices:
    """The most precise uniform assignment that meets the budget.

    Args:
        costs: Cost of each choice as a share of the budget.
        levels: The uniform assignments, the cheapest first.
        borders: What neighbours cost together.

    Raises:
        InfeasibleError: Even the cheapest costs more than the budget.
    """
    for choices in reversed(levels):
        if spent(costs, borders, choices) <= 1 + 1e-9:
            return tuple(choices)
    raise InfeasibleError("no uniform format meets the budget")


def random_choices(
    costs: CostTable, rng: np.random.Generator, borders: Sequence[Border] = ()
) -> Choices:
    """A random assignment that spends the budget: random preferences, projected."""
    return project([-rng.exponential(size=len(row)) for row in costs], costs, borders=borders)
