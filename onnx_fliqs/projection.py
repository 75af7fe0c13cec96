"""From what was learned to the assignment that is served: the best within the budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.borders import Border, spent
from onnx_fliqs.controller import Choices
from onnx_fliqs.cost import CostTable, by_budget
from onnx_fliqs.errors import InfeasibleError

__all__ = ["LEAST_SPENT", "cheapest", "project"]

LEAST_SPENT: Final = 0.98
"""An assignment is held to spend the budget if it costs at least this share of it; of several
budgets, one has to be spent."""
_ROUNDING: Final = 1e-9
"""A budget that one assignment meets exactly must not fail by rounding."""
_MUCH: Final = 4
"""How many times worse than an assignment a choice has to be for the program to be solved once
more, cut off there."""
_SCALE: Final = 1e3
"""Of the costs that the solver sees. Its tolerance is absolute, a millionth: without this, it
takes assignments that cost as much more than a budget."""


def project(
    preferences: Sequence[npt.NDArray[np.float64]],
    costs: CostTable,
    slack: float = math.inf,
    borders: Sequence[Border] = (),
    to_spend: Sequence[int] | None = None,
) -> Choices:
    """Choose the assignment that is preferred most among those that meet every budget.

    Maximises sum_i preference_i(a_i) subject to sum_i cost_i(a_i) <= 1, borders included, an
    integer program: among the assignments that spend one of the budgets, and among all. The
    first is taken unless the second is better by more than ``slack``.

    Args:
        preferences: Never positive, 0 is best: log-probabilities, or predicted losses negated,
            of each choice of each decision.
        costs: Cost of each choice as a share of each budget.
        slack: How much worse an assignment that spends the budget may be, as a share of what
            the best one lacks; infinity: it is taken whenever there is one.
        borders: Costs of pairs of decisions, as shares of a budget.
        to_spend: Numbers of the budgets that buy precision, as latency does not: int8 may be
            faster than int4. None: all do.

    Raises:
        InfeasibleError: Every assignment costs more than a budget.
    """
    program = _program(costs, borders)
    best = _solve(preferences, costs, borders, program, None)
    if best is None:
        raise InfeasibleError("no assignment of formats meets the budget")
    found = [
        _solve(preferences, costs, borders, program, budget)
        for budget in (range(len(program.costs)) if to_spend is None else to_spend)
    ]
    spending = max(
        (choices for choices in found if choices is not None),
        key=lambda choices: _total(preferences, choices),
        default=None,
    )
    if spending is None:
        return best
    lacking, lacking_when_spending = (
        -_total(preferences, choices) for choices in (best, spending)
    )
    if math.isinf(slack) or lacking_when_spending <= (1 + slack) * lacking:
        return spending
    return best


def cheapest(
    costs: CostTable, borders: Sequence[Border] = (), budget: int = 0
) -> Choices | None:
    """The assignment that costs least of one budget among those that meet the others, if any.

    Args:
        costs: Cost of each choice as a share of each budget.
        borders: Costs of pairs of decisions, as shares of a budget.
        budget: Which one is free.
    """
    program = _program(costs, borders)
    most = np.full(len(program.costs), 1 + _ROUNDING)
    most[budget] = math.inf
    return _optimum(program, program.costs[budget], np.zeros(len(most)), most)


def _total(rows: Sequence[npt.NDArray[np.float64]], choices: Sequence[int]) -> float:
    return float(sum(row[c] for row, c in zip(rows, choices, strict=True)))


@dataclass(frozen=True, slots=True)
class _Program:
    """The constraints of all assignments: 0/1 variables for choices, then one per border."""

    costs: npt.NDArray[np.float64]
    """[budgets, variables]"""
    owner: npt.NDArray[np.int64]
    """Of each choice: its decision."""
    decisions: int
    crossings: npt.NDArray[np.float64]
    """Rows that may not be negative: they set the variable of a border exactly if it is
    crossed."""
    offsets: npt.NDArray[np.float64]
    """To be added to the rows."""


def _program(costs: CostTable, borders: Sequence[Border]) -> _Program:
    starts = np.cumsum([0, *map(len, costs)])
    choices = int(starts[-1])
    rows, offsets = [], []
    own = by_budget(costs)
    crossing = np.zeros((len(own), len(borders)))

    def chosen(decision: int, kinds: Sequence[str], kind: str) -> npt.NDArray[np.float64]:
        """1 in the product with an assignment if the decision has this kind."""
        row = np.zeros(choices + len(borders))
        row[starts[decision] : starts[decision + 1]] = [float(k == kind) for k in kinds]
        return row

    for number, border in enumerate(borders):
        crossed = np.zeros(choices + len(borders))
        crossed[choices + number] = 1.0
        crossing[border.budget, number] = border.cost
        for kind in sorted({*border.kinds[0], *border.kinds[1]}):
            first = chosen(border.first, border.kinds[0], kind)
            second = chosen(border.second, border.kinds[1], kind)
            rows += [crossed - first + second, crossed + first - second]
            rows.append(-crossed - first - second)
            offsets += [0.0, 0.0, 2.0]
    return _Program(
        np.concatenate([own, crossing], axis=1),
        np.repeat(np.arange(len(costs)), [len(row) for row in costs]),
        len(costs),
        np.array(rows).reshape(len(rows), choices + len(borders)),
        np.array(offsets),
    )


def _optimum(
    program: _Program,
    weights: npt.NDArray[np.float64],
    least: npt.NDArray[np.float64],
    most: npt.NDArray[np.float64],
) -> Choices | None:
    """The assignment of the least weight with costs between two bounds, if there is one."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import

    owner, count = program.owner, program.decisions
    one_each = np.zeros((count, len(weights)))
    one_each[owner, np.arange(len(owner))] = 1.0
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(_SCALE * program.costs, _SCALE * least, _SCALE * most),
    ]
    if len(program.offsets):
        constraints.append(LinearConstraint(program.crossings, -program.offsets, np.inf))
    found = milp(
        weights,
        integrality=np.ones(len(weights), np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    values = found.x[: len(owner)]
    return tuple(int(np.argmax(values[owner == i])) for i in range(count))


def _solve(
    preferences: Sequence[npt.NDArray[np.float64]],
    costs: CostTable,
    borders: Sequence[Border],
    program: _Program,
    budget: int | None,
) -> Choices | None:
    """The most preferred assignment within all budgets that spends one, if there is one.

    Args:
        preferences: As for :func:`project`.
        costs: The same.
        borders: The same.
        program: Of these costs.
        budget: Which one has to be spent; None: it does not matter.
    """
    least = np.zeros(len(program.costs))
    if budget is not None:
        least[budget] = LEAST_SPENT
    lacking = [row.max() - row for row in preferences]
    weights = np.append(np.concatenate(lacking), np.zeros(len(borders)))
    most = np.full(len(least), 1 + _ROUNDING)
    # The solver's tolerances are absolute: bring the differences that matter to about 1. A
    # choice that lacks more than a whole assignment does is not part of the best, and how much
    # more is of no interest: it would hide what tells the others apart.
    ceiling = max(float(weights.max()), 1e-300)
    while True:
        chosen = _optimum(program, np.minimum(weights, ceiling) / ceiling, least, most)
        if chosen is None:
            return None
        total = _total(lacking, chosen)
        if not 0 < total < ceiling / _MUCH:
            break
        ceiling = 2 * total
    return _improved(list(chosen), preferences, costs, borders, float(least.max()))


def _improved(
    chosen: list[int],
    preferences: Sequence[npt.NDArray[np.float64]],
    costs: CostTable,
    borders: Sequence[Border],
    least: float,
) -> Choices:
    """Take single changes for the better that the bounds allow, the best one first.

    The solver leaves differences under a millionth of the largest: the last bits of precision.
    """
    while True:
        gains = [
            (float(row[a] - row[c]), i, a)
            for i, (row, c) in enumerate(zip(preferences, chosen, strict=True))
            for a in range(len(row))
            if row[a] > row[c]
            and least <= spent(costs, borders, [*chosen[:i], a, *chosen[i + 1 :]]) <= 1
        ]
        if not gains:
            return tuple(chosen)
        _, decision, choice = max(gains)
        chosen[decision] = choice
