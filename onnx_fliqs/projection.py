"""From a policy to the assignment that is served: the most probable one within the budget."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices
from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import InfeasibleError

__all__ = ["project"]

LEAST_SPENT: Final = (0.995, 0.98, 0.0)
"""Least cost to be served as a share of the budget; the next where nothing lies above one."""
_LEAST_PROBABILITY: Final = 1e-9


def project(policy: Sequence[npt.NDArray[np.float64]], costs: CostTable) -> Choices:
    """Choose the assignment of the largest probability whose cost meets the budget.

    Maximises sum_i log pi_i(a_i) subject to 0.995 <= sum_i cost_i(a_i) <= 1, an integer
    program; the lower bound is loosened to 0.98 and then dropped where nothing lies between.
    If the argmax of every decision lies there, that is the result.

    Args:
        policy: Probabilities of the choices of each decision.
        costs: Cost of each choice as a share of the budget.

    Raises:
        InfeasibleError: Every assignment costs more than the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    weights = np.concatenate([-np.log(np.maximum(p, _LEAST_PROBABILITY)) for p in policy])
    cost = np.concatenate(list(costs))
    owner = np.repeat(np.arange(len(policy)), [len(p) for p in policy])
    one_each = LinearConstraint(
        np.equal.outer(np.arange(len(policy)), owner).astype(float), 1, 1
    )
    most = sum(float(row.max()) for row in costs)
    for share in LEAST_SPENT:
        least = min(share, most * (1 - 1e-9))
        # 1e-9: a budget that one assignment meets exactly must not fail by rounding.
        spend = LinearConstraint(cost[None, :], least, 1 + 1e-9)
        found = milp(
            weights,
            integrality=np.ones_like(weights),
            bounds=Bounds(0, 1),
            constraints=[one_each, spend],
        )
        if found.x is not None:
            taken = found.x > 0.5
            return tuple(int(np.argmax(taken[owner == i])) for i in range(len(policy)))
    raise InfeasibleError("no assignment of formats meets the budget")
