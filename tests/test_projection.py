"""The served assignment: the most probable one within the budget, against brute force."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.controller import Choices
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.projection import LEAST_SPENT, project

Vectors = tuple[npt.NDArray[np.float64], ...]

ROUNDING = 1e-9
"""The documented tolerance on the budget."""


def total(costs: Vectors, choices: Choices) -> float:
    return sum(float(row[c]) for row, c in zip(costs, choices, strict=True))


def likelihood(policy: Vectors, choices: Choices) -> float:
    return sum(math.log(p[c]) for p, c in zip(policy, choices, strict=True))


def best(policy: Vectors, costs: Vectors) -> float:
    """The largest likelihood within the budget, spent as far as documented."""
    every = [
        (total(costs, choices), likelihood(policy, choices))
        for choices in itertools.product(*(range(len(row)) for row in costs))
    ]
    most = max(cost for cost, _ in every)
    for share in LEAST_SPENT:
        inside = [
            value
            for cost, value in every
            if min(share, most) - ROUNDING <= cost <= 1 + ROUNDING
        ]
        if inside:
            return max(inside)
    raise AssertionError("the problem has no solution")


@st.composite
def problems(draw: st.DrawFn, *, feasible: bool = True) -> tuple[Vectors, Vectors]:
    """A policy and costs as shares of a budget, at most 4^5 assignments."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    sharpness = draw(st.sampled_from([0.0, 1.0, 4.0]))
    policy = []
    for size in sizes:
        logits = sharpness * rng.standard_normal(size)
        weights = np.exp(logits - logits.max())
        policy.append(weights / weights.sum())
    bits = np.array([4.0, 5.0, 6.0, 8.0])
    costs = [
        macs * bits[: len(p)] ** 2
        for macs, p in zip(10 ** rng.uniform(-2, 0, len(sizes)), policy, strict=True)
    ]
    low, high = (sum(float(pick(row)) for row in costs) for pick in (min, max))
    place = draw(st.floats(0.0, 1.3))
    budget = low + place * (high - low) if feasible else low * draw(st.floats(0.1, 0.999))
    return tuple(policy), tuple(row / budget for row in costs)


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_it_is_as_probable_as_the_best_of_all_assignments(
    problem: tuple[Vectors, Vectors],
) -> None:
    policy, costs = problem
    found = project(policy, costs)
    # Probabilities under 1e-9 count as 1e-9; those of the problems lie above. The solver stops
    # within 1e-4 of the optimum.
    value = likelihood(policy, found)
    wanted = best(policy, costs)
    assert value >= wanted - 1e-4 * max(1.0, abs(wanted))


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_the_budget_is_always_met(problem: tuple[Vectors, Vectors]) -> None:
    policy, costs = problem
    found = project(policy, costs)
    assert len(found) == len(policy)
    assert all(0 <= c < len(row) for c, row in zip(found, costs, strict=True))
    assert total(costs, found) <= 1 + ROUNDING


@settings(deadline=None, max_examples=50)
@given(problem=problems(feasible=False))
def test_a_budget_below_every_assignment_is_infeasible(
    problem: tuple[Vectors, Vectors],
) -> None:
    with pytest.raises(InfeasibleError):
        project(*problem)


@settings(deadline=None, max_examples=50)
@given(problem=problems())
def test_the_argmax_is_taken_where_it_spends_the_budget(
    problem: tuple[Vectors, Vectors],
) -> None:
    policy, costs = problem
    argmax = tuple(int(np.argmax(p)) for p in policy)
    exact = tuple(row / total(costs, argmax) for row in costs)
    found = project(policy, exact)
    # Another of the same probability is as good.
    assert likelihood(policy, found) == pytest.approx(likelihood(policy, argmax), abs=1e-4)


def test_a_budget_that_only_one_assignment_meets_is_met_by_that() -> None:
    policy = tuple(np.array([0.01, 0.99]) for _ in range(3))
    thirds = tuple(np.array([1 / 3, 2 / 3]) for _ in range(3))
    assert project(policy, thirds) == (0, 0, 0)


def test_an_unlimited_budget_gives_the_dearest_when_it_is_probable() -> None:
    policy = tuple(np.array([0.2, 0.8]) for _ in range(3))
    assert project(policy, tuple(np.array([1e-6, 4e-6]) for _ in range(3))) == (1, 1, 1)


def test_the_least_probable_is_given_up_first() -> None:
    policy = (np.array([0.4, 0.6]), np.array([0.01, 0.99]), np.array([0.2, 0.8]))
    costs = tuple(np.array([0.25, 0.5]) for _ in range(3))
    # The argmax costs 1.5; of the two that must become cheap, those that mind it least.
    assert project(policy, costs) == (0, 1, 0)


def test_a_deterministic_policy_above_the_budget_still_gives_an_assignment() -> None:
    policy = tuple(np.array([0.0, 1.0]) for _ in range(4))
    found = project(policy, tuple(np.array([0.1, 0.4]) for _ in range(4)))
    assert sum(found) == 2


def test_layers_without_cost_follow_the_policy() -> None:
    policy = (np.array([0.1, 0.9]), np.array([0.9, 0.1]))
    assert project(policy, (np.zeros(2), np.array([0.5, 1.0]))) in {(1, 0), (1, 1)}


@pytest.mark.parametrize("seed", range(3))
def test_a_large_network_is_projected_within_its_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = np.arange(4, 9, dtype=np.float64)
    macs = 10 ** rng.uniform(-2, 0, 100)
    policy = tuple(rng.dirichlet(np.ones(5)) for _ in macs)
    costs = tuple(m * bits**2 / (25 * macs.sum()) for m in macs)
    found = project(policy, costs)
    assert 0.98 <= total(costs, found) <= 1 + ROUNDING


def test_the_same_problem_gives_the_same_assignment() -> None:
    rng = np.random.default_rng(0)
    policy = tuple(rng.dirichlet(np.ones(5)) for _ in range(30))
    costs = tuple(rng.uniform(0.01, 0.06, 5) for _ in range(30))
    assert len({project(policy, costs) for _ in range(3)}) == 1
