"""From what was learned to the assignment that is served: the best within the budget."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices
from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import InfeasibleError

__all__ = ["LEAST_SPENT", "project"]

LEAST_SPENT: Final = 0.98
"""An assignment is held to spend the budget if it costs at least this share of it."""


def project(
    preferences: Sequence[npt.NDArray[np.float64]], costs: CostTable, slack: float = math.inf
) -> Choices:
    """Choose the assignment that is preferred most among those that meet the budget.

    Maximises sum_i preference_i(a_i) subject to sum_i cost_i(a_i) <= 1, an integer program;
    twice: among the assignments that spend the budget, and among all. The first is taken
    unless the second is better by more than ``slack``.

    Args:
        preferences: Never positive, 0 is best: log-probabilities, or predicted losses negated,
            of each choice of each decision.
        costs: Cost of each choice as a share of the budget.
        slack: How much worse an assignment that spends the budget may be, as a share of what
            the best one lacks; infinity: it is taken whenever there is one.

    Raises:
        InfeasibleError: Every assignment costs more than the budget.
    """
    best = _solve(preferences, costs, 0.0)
    if best is None:
        raise InfeasibleError("no assignment of formats meets the budget")
    spending = _solve(preferences, costs, LEAST_SPENT)
    if spending is None:
        return best
    lacking, lacking_when_spending = (
        -_total(preferences, choices) for choices in (best, spending)
    )
    if math.isinf(slack) or lacking_when_spending <= (1 + slack) * lacking:
        return spending
    return best


def _total(rows: Sequence[npt.NDArray[np.float64]], choices: Sequence[int]) -> float:
    return float(sum(row[c] for row, c in zip(rows, choices, strict=True)))


def _solve(
    preferences: Sequence[npt.NDArray[np.float64]], costs: CostTable, least: float
) -> Choices | None:
    """The most preferred assignment with a cost between ``least`` and 1, if there is one."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import

    count = len(preferences)
    weights = -np.concatenate([row - row.max() for row in preferences])
    # The solver's tolerances are absolute: bring the differences that matter to about 1.
    weights /= max(float(weights.max()), 1e-300)
    cost = np.concatenate(list(costs))
    owner = np.repeat(np.arange(count), [len(row) for row in preferences])
    found = milp(
        weights,
        integrality=np.ones_like(weights),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.equal.outer(np.arange(count), owner).astype(float), 1, 1),
            # A budget that one assignment meets exactly must not fail by rounding.
            LinearConstraint(cost[None, :], least, 1 + 1e-9),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    chosen = [int(np.argmax(found.x[owner == i])) for i in range(count)]
    return _improved(chosen, preferences, costs, least)


def _improved(
    chosen: list[int],
    preferences: Sequence[npt.NDArray[np.float64]],
    costs: CostTable,
    least: float,
) -> Choices:
    """Take single changes for the better that the bounds allow, the best one first.

    The solver leaves differences under a millionth of the largest: the last bits of precision.
    """
    while True:
        spent = _total(costs, chosen)
        gains = [
            (float(row[a] - row[c]), i, a)
            for i, (row, c) in enumerate(zip(preferences, chosen, strict=True))
            for a in range(len(row))
            if row[a] > row[c] and least <= spent + costs[i][a] - costs[i][c] <= 1
        ]
        if not gains:
            return tuple(chosen)
        _, decision, choice = max(gains)
        chosen[decision] = choice
