"""Latency as the cost of a search: the decisions' own shares, and those of borders."""

import numpy as np

from onnx_fliqs.borders import Border, spent
from onnx_fliqs.cost import Budget, CostTable
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.latency import LatencyTable, choice_names, kind_of
from onnx_fliqs.projection import cheapest
from onnx_fliqs.sites import SearchSpace

__all__ = ["latency_shares"]


def latency_shares(
    space: SearchSpace, budget: Budget, table: LatencyTable
) -> tuple[CostTable, tuple[Border, ...]]:
    """Costs of all choices and borders, as shares of a budget of latency.

    What no choice changes is spread evenly over the decisions.

    Args:
        space: What can be chosen.
        budget: Of the kind LATENCY.
        table: Fits the space (:meth:`~onnx_fliqs.latency.LatencyTable.check`).

    Raises:
        InfeasibleError: The message names the range that can be reached.
    """
    names = choice_names(space)
    float_ms = table.float_model.ms
    limit = budget.value * float_ms
    rows = [
        np.array(
            [sum(table.layers[name][choice].ms for name in decided) for choice in choices]
        )
        for decided, choices in zip(space.decisions, names, strict=True)
    ]
    constant = table.base_ms + sum(float(row.min()) for row in rows)
    costs = tuple((row - row.min() + constant / len(rows)) / limit for row in rows)
    decision = {name: i for i, decided in enumerate(space.decisions) for name in decided}
    kinds = [tuple(map(kind_of, row)) for row in names]
    borders = []
    for border in table.borders:
        first, second = (decision[name] for name in border.layers)
        borders.append(
            Border(first, second, (kinds[first], kinds[second]), border.cost.ms / limit)
        )
    found = cheapest(costs, borders)
    assert found is not None
    least = spent(costs, borders, found) * budget.value
    if least > budget.value * (1 + 1e-9):
        raise InfeasibleError(
            f"budget {budget} cannot be met: with these formats this model reaches"
            f" --latency {_rounded_up(least)} and more of the float model's {float_ms:.4g} ms"
        )
    return costs, tuple(borders)


def _rounded_up(value: float) -> str:
    """Three digits, never less than the value: a budget typed with them must be met."""
    return f"{np.ceil(value * 1000) / 1000:.3f}"
