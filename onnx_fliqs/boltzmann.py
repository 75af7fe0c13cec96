"""Boltzmann policies within budgets: probabilities tilted by the price of each choice.

Among all policies whose expected costs are within the budgets, the one of the largest
expected preference plus entropy is ``pi_i(a) ~ exp(logit_i(a) - sum_k m_k cost_ik(a))``. The
multipliers m_k >= 0 minimise the convex dual ::

    D(m) = sum_i log sum_a exp(logit_i(a) - sum_k m_k cost_ik(a)) + sum_k m_k

whose gradient is 1 - E[T_k], and whose Hessian is the covariance of the costs. One multiplier
is found by bisection. With several, mostly one budget decides and the others are met with it.
Where several bind, Newton's method finds their multipliers, from soft logits to sharp ones: at
low temperatures the dual is made of planes with no curvature to start from.
"""

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["within_budgets"]

Matrix: TypeAlias = npt.NDArray[np.float64]
Row: TypeAlias = npt.NDArray[np.float64]

_LARGEST_MULTIPLIER: Final = 1e9
"""For logits that differ by 1."""
_MET: Final = 1e-9
"""How far above a budget an expected cost is within it: rounding."""
_MOST_STEPS: Final = 50
_SHARPENING: Final = 2.0
_LEAST_DECREASE: Final = 1e-4
_SHORTEST_STEP: Final = 1e-9


def within_budgets(logits: Matrix, costs: Sequence[Matrix]) -> Matrix:
    """The policy of the least multipliers that bring every E[T_k] down to 1.

    Where no policy does, the multipliers stop at a large bound.

    Args:
        logits: [decisions, choices]; -inf for choices that a decision lacks.
        costs: Of each budget, the same shape: shares of it; 0 for choices that are lacking.

    Returns:
        Probabilities, of the same shape.
    """
    policy = _tilted(logits)
    if _expected(policy, costs).max() <= 1:
        return policy
    for cost in costs:
        policy = _within_one(logits, cost)
        if len(costs) == 1 or _expected(policy, costs).max() <= 1 + _MET:
            return policy
    stacked = np.stack(costs)
    return _tilted(logits - np.tensordot(_multipliers(logits, stacked), stacked, 1))


def _tilted(powers: Matrix) -> Matrix:
    powers = np.exp(powers - powers.max(axis=1, keepdims=True))
    result: Matrix = powers / powers.sum(axis=1, keepdims=True)
    return result


def _expected(policy: Matrix, costs: Sequence[Matrix]) -> Row:
    return np.array([np.sum(policy * cost) for cost in costs])


def _within_one(logits: Matrix, cost: Matrix) -> Matrix:
    """The smallest multiplier >= 0 that brings E[T] down to the budget, by bisection."""

    def tilted(multiplier: float) -> tuple[Matrix, float]:
        chances = _tilted(logits - multiplier * cost)
        return chances, float(np.sum(chances * cost))

    policy, expected = tilted(0.0)
    if expected <= 1:
        return policy
    low, high, most = 0.0, 1.0, _LARGEST_MULTIPLIER * max(_spread(logits), 1.0)
    while tilted(high)[1] > 1 and high < most:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(middle)[1] > 1 else (low, middle)
    return tilted(high)[0]


def _multipliers(logits: Matrix, costs: Matrix) -> Row:
    """One multiplier for each budget, by projected Newton steps on ever sharper logits.

    Args:
        logits: [decisions, choices].
        costs: [budgets, decisions, choices].
    """
    levels = math.ceil(math.log(max(_spread(logits), 1.0), _SHARPENING))
    multipliers = np.zeros(len(costs))
    for level in range(levels, -1, -1):
        softer = logits / _SHARPENING**level
        most = _LARGEST_MULTIPLIER * max(_spread(softer), 1.0)
        multipliers = _newton(softer, costs, np.minimum(multipliers, most), most)
        if level:
            # Prices scale with the logits that they outweigh.
            multipliers = multipliers * _SHARPENING
    return multipliers


def _spread(logits: Matrix) -> float:
    """The largest difference between two logits of a decision."""
    finite = np.where(np.isfinite(logits), logits, np.nan)
    return float(np.max(np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1)))


def _newton(logits: Matrix, costs: Matrix, start: Row, most: float) -> Row:
    """Minimise the dual by Newton steps on the multipliers that are free (Bertsekas 1982)."""

    def dual(multipliers: Row) -> tuple[float, Matrix]:
        powers = logits - np.tensordot(multipliers, costs, 1)
        top = powers.max(axis=1, keepdims=True)
        powers = np.exp(powers - top)
        sums = powers.sum(axis=1, keepdims=True)
        value = float(np.sum(top) + np.sum(np.log(sums)) + multipliers.sum())
        return value, powers / sums

    multipliers = start
    value, policy = dual(multipliers)
    for _ in range(_MOST_STEPS):
        gradient = 1 - np.tensordot(costs, policy, 2)
        free = (multipliers > 0) | (gradient < 0)
        if np.abs(gradient[free]).max(initial=0.0) <= _MET:
            break
        means = np.sum(costs * policy, axis=2)
        moments = np.einsum("kia,lia,ia->kl", costs, costs, policy)
        hessian = (moments - means @ means.T)[np.ix_(free, free)]
        # Budgets that count the same are as good one as the other.
        hessian += (1e-12 + 1e-9 * np.trace(hessian)) * np.eye(len(hessian))
        direction = np.zeros(len(costs))
        direction[free] = -np.linalg.solve(hessian, gradient[free])
        size = 1.0
        while size > _SHORTEST_STEP:
            tried = np.clip(multipliers + size * direction, 0.0, most)
            new_value, new_policy = dual(tried)
            if new_value <= value + _LEAST_DECREASE * float(gradient @ (tried - multipliers)):
                break
            size /= 4
        else:
            break
        multipliers, value, policy = tried, new_value, new_policy
    return multipliers
