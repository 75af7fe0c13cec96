"""From what was learned to the assignment that is served: the best within the budget."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices
from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import InfeasibleError

__all__ = ["project"]


def project(
    preferences: Sequence[npt.NDArray[np.float64]], costs: CostTable, least: float = 0.0
) -> Choices:
    """Choose the assignment that is preferred most among those that meet the budget.

    Maximises sum_i preference_i(a_i) subject to least <= sum_i cost_i(a_i) <= 1, an integer
    program. If the argmax of every decision lies there, that is the result.

    Args:
        preferences: A finite number for each choice of each decision, higher is better.
        costs: Cost of each choice as a share of the budget.
        least: Least cost, unless nothing lies between it and the budget.

    Raises:
        InfeasibleError: Every assignment costs more than the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import

    count = len(preferences)
    weights = -np.concatenate([row - row.max() for row in preferences])
    # The solver's tolerances are absolute: bring the differences that matter to about 1.
    weights /= max(float(weights.max()), 1e-300)
    cost = np.concatenate(list(costs))
    owner = np.repeat(np.arange(count), [len(row) for row in preferences])
    one_each = np.equal.outer(np.arange(count), owner).astype(float)
    for bound in dict.fromkeys((least, 0.0)):
        found = milp(
            weights,
            integrality=np.ones_like(weights),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                # A budget that one assignment meets exactly must not fail by rounding.
                LinearConstraint(cost[None, :], bound, 1 + 1e-9),
            ],
            options={"mip_rel_gap": 0},
        )
        if found.x is not None:
            return tuple(int(np.argmax(found.x[owner == i])) for i in range(count))
    raise InfeasibleError("no assignment of formats meets the budget")
