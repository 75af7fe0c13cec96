"""What choices cost as shares of the budgets, however many there are and in whatever units."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_fliqs.borders import Border, shares
from onnx_fliqs.cost import (
    Budget,
    BudgetKind,
    CostTable,
    check_feasible,
    cost_table,
    rounded_up,
)
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.latency import LatencyTable
from onnx_fliqs.latency_budget import latency_shares
from onnx_fliqs.projection import cheapest
from onnx_fliqs.sites import SearchSpace

__all__ = ["BudgetReport", "budget_reports", "budget_shares"]


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A budget, and what an assignment costs of it."""

    kind: str
    value: float
    used: float
    """In the unit of the value."""


def budget_shares(
    space: SearchSpace, budgets: Sequence[Budget], table: LatencyTable | None
) -> tuple[CostTable, tuple[Border, ...]]:
    """Costs of all choices and borders, as shares of budgets that can be met together.

    Args:
        space: What can be chosen.
        budgets: At least one.
        table: For a budget of latency.

    Raises:
        ConfigError: The model has nothing that a budget counts.
        InfeasibleError: A budget cannot be met, alone or together with those before it.
    """
    tables, borders = [], []
    for number, budget in enumerate(budgets):
        costs, between = _shares(space, budget, table)
        tables.append(costs)
        borders += [replace(border, budget=number) for border in between]
        _check_together(budgets[: number + 1], _side_by_side(tables), borders)
    return _side_by_side(tables), tuple(borders)


def budget_reports(
    budgets: Sequence[Budget],
    costs: CostTable,
    borders: Sequence[Border],
    choices: Sequence[int],
) -> tuple[BudgetReport, ...]:
    """What an assignment costs of each budget.

    Args:
        budgets: In their order.
        costs: Of :func:`budget_shares`.
        borders: The same.
        choices: The assignment.
    """
    return tuple(
        BudgetReport(budget.kind.value, budget.value, budget.used(float(share)))
        for budget, share in zip(budgets, shares(costs, borders, choices), strict=True)
    )


def _shares(
    space: SearchSpace, budget: Budget, table: LatencyTable | None
) -> tuple[CostTable, tuple[Border, ...]]:
    """Costs as shares of one budget that can be met."""
    if budget.kind is BudgetKind.LATENCY:
        assert table is not None
        return latency_shares(space, budget, table)
    check_feasible(space, budget)
    limit = budget.limit(space)
    return tuple(row / limit for row in cost_table(space, budget.kind)), ()


def _side_by_side(tables: Sequence[CostTable]) -> CostTable:
    if len(tables) == 1:
        return tables[0]
    return tuple(np.stack(rows, axis=1) for rows in zip(*tables, strict=True))


def _check_together(
    budgets: Sequence[Budget], costs: CostTable, borders: Sequence[Border]
) -> None:
    """Refuse the last budget if nothing within the others meets it."""
    *others, last = budgets
    if not others:
        return
    found = cheapest(costs, borders, len(others))
    assert found is not None
    least = float(shares(costs, borders, found)[-1])
    if least > 1 + 1e-9:
        raise InfeasibleError(
            f"budget {last} cannot be met together with {' '.join(map(str, others))}: within"
            f" {'that' if len(others) == 1 else 'those'} this model reaches"
            f" --{last.kind.value} {rounded_up(last.used(least))} and more"
        )
