"""The served assignment: the preferred one within the budget, against brute force."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.controller import Choices
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.projection import LEAST_SPENT, project

Vectors = tuple[npt.NDArray[np.float64], ...]

FREE = 0.0
"""Nothing is given up to spend the budget."""
ROUNDING = 1e-9
"""The documented tolerance on the budget."""


def total(costs: Vectors, choices: Choices) -> float:
    return sum(float(row[c]) for row, c in zip(costs, choices, strict=True))


def best(preferences: Vectors, costs: Vectors) -> float:
    """The largest preference within the budget."""
    return max(
        total(preferences, choices)
        for choices in itertools.product(*(range(len(row)) for row in costs))
        if total(costs, choices) <= 1 + ROUNDING
    )


@st.composite
def problems(draw: st.DrawFn, *, feasible: bool = True) -> tuple[Vectors, Vectors]:
    """Preferences, and costs as shares of a budget; at most 4^5 assignments."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    # Predicted losses may be tiny, logits of a collapsed preferences far apart.
    size_of_preference = draw(st.sampled_from([0.0, 1e-6, 1.0, 300.0]))
    preferences = [size_of_preference * rng.standard_normal(size) for size in sizes]
    # Some format may ruin the network where all others hardly matter.
    preferences[0][0] -= draw(st.sampled_from([0.0, 1e2, 1e5, 1e8])) * size_of_preference
    bits = np.array([4.0, 5.0, 6.0, 8.0])
    costs = [
        macs * bits[: len(row)] ** 2
        for macs, row in zip(10 ** rng.uniform(-2, 0, len(sizes)), preferences, strict=True)
    ]
    low, high = (sum(float(pick(row)) for row in costs) for pick in (min, max))
    place = draw(st.floats(0.0, 1.3))
    budget = low + place * (high - low) if feasible else low * draw(st.floats(0.1, 0.999))
    return tuple(preferences), tuple(row / budget for row in costs)


@pytest.mark.parametrize("excess", [1e-8, 1e-7, 9e-7, 2e-6])
def test_a_budget_is_not_exceeded_by_the_tolerance_of_the_solver(excess: float) -> None:
    costs = (np.array([0.3, 0.5 + excess]), np.array([0.2, 0.5]))
    preferences = (np.array([-1.0, 0.0]), np.array([-1.0, 0.0]))
    assert project(preferences, costs, FREE) in {(0, 1), (1, 0)}


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_it_is_preferred_as_much_as_the_best_of_all_assignments(
    problem: tuple[Vectors, Vectors],
) -> None:
    preferences, costs = problem
    found = project(preferences, costs, FREE)
    ideal = sum(float(row.max()) for row in preferences)
    lacking = ideal - best(preferences, costs)
    assert ideal - total(preferences, found) <= (1 + 1e-5) * lacking + 1e-11


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_the_budget_is_always_met(problem: tuple[Vectors, Vectors]) -> None:
    preferences, costs = problem
    found = project(preferences, costs, FREE)
    assert len(found) == len(preferences)
    assert all(0 <= c < len(row) for c, row in zip(found, costs, strict=True))
    assert total(costs, found) <= 1 + ROUNDING


@settings(deadline=None, max_examples=50)
@given(problem=problems(feasible=False))
def test_a_budget_below_every_assignment_is_infeasible(
    problem: tuple[Vectors, Vectors],
) -> None:
    with pytest.raises(InfeasibleError):
        project(*problem, FREE)


@settings(deadline=None, max_examples=50)
@given(problem=problems())
def test_the_argmax_is_taken_where_it_meets_the_budget(
    problem: tuple[Vectors, Vectors],
) -> None:
    preferences, costs = problem
    argmax = tuple(int(np.argmax(p)) for p in preferences)
    exact = tuple(row / total(costs, argmax) for row in costs)
    found = project(preferences, exact, FREE)
    # Another of the same probability is as good.
    spread = max(float(np.ptp(row)) for row in preferences)
    assert total(preferences, found) == pytest.approx(
        total(preferences, argmax), abs=1e-5 * spread + 1e-12
    )


def test_a_budget_that_only_one_assignment_meets_is_met_by_that() -> None:
    preferences = tuple(np.array([0.01, 0.99]) for _ in range(3))
    thirds = tuple(np.array([1 / 3, 2 / 3]) for _ in range(3))
    assert project(preferences, thirds) == (0, 0, 0)


def test_an_unlimited_budget_gives_the_dearest_when_it_is_probable() -> None:
    preferences = tuple(np.array([0.2, 0.8]) for _ in range(3))
    assert project(preferences, tuple(np.array([1e-6, 4e-6]) for _ in range(3))) == (1, 1, 1)


def test_the_least_preference_is_given_up_first() -> None:
    preferences = (np.array([0.4, 0.6]), np.array([0.01, 0.99]), np.array([0.2, 0.8]))
    costs = tuple(np.array([0.25, 0.5]) for _ in range(3))
    # The argmax costs 1.5; of the two that must become cheap, those that mind it least.
    assert project(preferences, costs, FREE) == (0, 1, 0)


def test_preferences_above_the_budget_still_give_an_assignment() -> None:
    preferences = tuple(np.array([-700.0, 0.0]) for _ in range(4))
    found = project(preferences, tuple(np.array([0.1, 0.4]) for _ in range(4)))
    assert sum(found) == 2


def test_layers_without_cost_follow_the_preferences() -> None:
    preferences = (np.array([0.1, 0.9]), np.array([0.9, 0.1]))
    assert project(preferences, (np.zeros(2), np.array([0.5, 1.0]))) in {(1, 0), (1, 1)}


@pytest.mark.parametrize("seed", range(3))
def test_a_large_network_is_projected_within_its_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = np.arange(4, 9, dtype=np.float64)
    macs = 10 ** rng.uniform(-2, 0, 100)
    # More bits are better, by a different measure for each layer, as the critic predicts.
    preferences = tuple(
        -sensitivity * 4.0 ** (4 - bits) for sensitivity in rng.lognormal(0, 1, 100)
    )
    costs = tuple(m * bits**2 / (25 * macs.sum()) for m in macs)
    found = project(preferences, costs, FREE)
    assert 0.98 <= total(costs, found) <= 1 + ROUNDING


def test_the_same_problem_gives_the_same_assignment() -> None:
    rng = np.random.default_rng(0)
    preferences = tuple(rng.dirichlet(np.ones(5)) for _ in range(30))
    costs = tuple(rng.uniform(0.01, 0.06, 5) for _ in range(30))
    assert len({project(preferences, costs, FREE) for _ in range(3)}) == 1


def test_a_budget_is_spent_if_that_costs_little() -> None:
    costs = tuple(np.array([0.1, 0.25]) for _ in range(4))
    indifferent = tuple(np.array([-1.0, -1.01]) for _ in range(4))
    assert project(indifferent, costs, FREE) == (0, 0, 0, 0)
    assert project(indifferent, costs, 0.1) == (1, 1, 1, 1)
    assert project(tuple(np.array([-1.0, -2.0]) for _ in range(4)), costs, 0.1) == (0, 0, 0, 0)
    assert project(tuple(np.array([-1.0, -2.0]) for _ in range(4)), costs) == (1, 1, 1, 1)


def test_a_budget_that_cannot_be_spent_is_met_below() -> None:
    costs = tuple(np.array([0.1, 0.2]) for _ in range(4))
    assert LEAST_SPENT > 0.8
    assert project(tuple(np.array([-2.0, -1.0]) for _ in range(4)), costs) == (1, 1, 1, 1)
