"""Policies within several budgets: what they cost, and that no other is better."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from onnx_fliqs.boltzmann import within_budgets

Matrix = npt.NDArray[np.float64]


def expected(policy: Matrix, costs: Sequence[Matrix]) -> Matrix:
    return np.array([np.sum(policy * cost) for cost in costs])


def merit(policy: Matrix, logits: Matrix) -> float:
    """Expected preference plus entropy: what the policy is to maximise."""
    seen = np.maximum(policy, 1e-300)
    return float(np.sum(policy * np.where(policy > 0, logits - np.log(seen), 0.0)))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Matrix, list[Matrix]]:
    """Logits of any sharpness, and budgets that some mixture of assignments meets."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, choices = draw(st.integers(1, 25)), draw(st.integers(2, 12))
    bits = np.sort(rng.choice(np.arange(2, 17), choices, replace=False)).astype(np.float64)
    sensitivities = rng.lognormal(0, 1.5, layers)[:, None]
    preferred = -sensitivities * 4.0 ** (4 - bits)
    logits = preferred / np.std(preferred) * 10 ** draw(st.floats(-1, 4))
    lacking = rng.random(logits.shape) < 0.2
    lacking[:, rng.integers(choices)] = False
    possible = rng.dirichlet(np.full(choices, 0.5), layers) * ~lacking
    possible /= np.maximum(possible.sum(axis=1, keepdims=True), 1e-300)
    only = possible.sum(axis=1) < 0.5
    possible[only] = ~lacking[only] / (~lacking[only]).sum(axis=1, keepdims=True)
    costs = []
    for power in (2.0, 1.0, 0.5)[: draw(st.integers(2, 3))]:
        cost = 10 ** rng.uniform(-2, 0, (layers, 1)) * bits**power * ~lacking
        costs.append(cost / np.sum(possible * cost) / 1.001)
    return np.where(lacking, -np.inf, logits), costs


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_every_expected_cost_is_within_its_budget(
    problem: tuple[Matrix, list[Matrix]],
) -> None:
    logits, costs = problem
    policy = within_budgets(logits, costs)
    assert (policy[np.isneginf(logits)] == 0).all()
    np.testing.assert_allclose(policy.sum(axis=1), 1, rtol=1e-12)
    assert expected(policy, costs).max() <= 1 + 1e-6


@pytest.mark.parametrize("budgets", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_sharp_logits_leave_no_tight_budget(seed: int, budgets: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 1e7 * rng.standard_normal((12, 5))
    bits = np.array([4.0, 5.0, 6.0, 7.0, 8.0])
    shares = rng.lognormal(size=(budgets, 12, 1))
    costs = list(shares * bits**2 / (16.05 * shares.sum(axis=1, keepdims=True)))
    assert expected(within_budgets(logits, costs), costs).max() <= 1 + 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_no_other_policy_within_the_budgets_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((4, 3))
    costs = [rng.uniform(0.05, 0.5, logits.shape) for _ in range(2)]
    possible = rng.dirichlet(np.ones(3), 4)
    costs = [cost / np.sum(possible * cost) for cost in costs]

    def policy_of(free: Matrix) -> Matrix:
        powers = np.exp(free.reshape(logits.shape))
        found: Matrix = powers / powers.sum(axis=1, keepdims=True)
        return found

    best = minimize(  # type: ignore[call-overload]
        lambda free: -merit(policy_of(free), logits),
        np.log(possible).reshape(-1),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: 1 - expected(policy_of(x), costs)},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    found = within_budgets(logits, costs)
    assert expected(found, costs).max() <= 1 + 1e-8
    assert merit(found, logits) == pytest.approx(-best.fun, abs=1e-6)


def test_a_budget_that_does_not_decide_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    logits, cost = rng.standard_normal((6, 4)), rng.uniform(0.05, 0.3, (6, 4))
    alone = within_budgets(logits, [cost])
    assert np.sum(alone * cost) == pytest.approx(1, abs=1e-9)
    slack = rng.uniform(0, 0.1, cost.shape)
    for costs in ([cost, slack], [slack, cost], [cost, cost], [cost, cost / 2]):
        np.testing.assert_array_equal(within_budgets(logits, costs), alone)


def test_both_budgets_are_spent_where_both_bind() -> None:
    logits = np.zeros((2, 2))
    # The first layer counts in one budget, the second in the other.
    first = np.array([[0.5, 2.0], [0.0, 0.0]])
    second = first[::-1] / 1.1
    policy = within_budgets(logits, [first, second])
    np.testing.assert_allclose(expected(policy, [first, second]), 1, atol=1e-8)
    np.testing.assert_allclose(policy[0], [2 / 3, 1 / 3], atol=1e-8)
