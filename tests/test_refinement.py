"""A refinement makes an assignment better where it can, and never leaves the budget."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.borders import Border, spent
from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.projection import LEAST_SPENT
from onnx_fliqs.refinement import MOST_CHANGES, RADII, Effort, Matrix, plan, refine

BITS = np.array([2.0, 3.0, 4.0, 6.0, 8.0])


class Network:
    """Losses that are known: what choices add, and a term for each pair of neighbours."""

    def __init__(self, seed: int, decisions: int, interaction: float) -> None:
        rng = np.random.default_rng(seed)
        macs = rng.lognormal(size=decisions)
        self.costs = tuple(m * BITS**2 / (macs.sum() * 4.0**2) for m in macs)
        self.damage = [s * 4.0**-BITS for s in rng.lognormal(sigma=2, size=decisions)]
        self.interaction = interaction
        self.asked: list[list[Choices]] = []

    def loss(self, choices: Choices) -> float:
        own = [float(row[c]) for row, c in zip(self.damage, choices, strict=True)]
        pairs = [math.sqrt(a * b) for a, b in itertools.pairwise(own)]
        return 1 + sum(own) + self.interaction * sum(pairs)

    def losses(
        self, candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]
    ) -> Matrix:
        self.asked.append(list(candidates))
        return np.array([[self.loss(choices) for choices in candidates]] * len(batches))

    @property
    def preferences(self) -> list[Row]:
        return [-row for row in self.damage]

    def refined(self, start: Choices, rounds: int = 20, decisions: int = 99) -> Choices:
        found, loss = refine(
            start,
            self.costs,
            self.preferences,
            self.losses,
            effort=Effort(rounds, decisions, 1),
        )
        if rounds:
            assert loss == pytest.approx(self.loss(found))
        return found


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    decisions=st.integers(1, 6),
    interaction=st.sampled_from([0.0, 1.0, -0.5]),
    window=st.integers(1, 8),
)
def test_it_ends_better_within_the_budget(
    seed: int, decisions: int, interaction: float, window: int
) -> None:
    network = Network(seed, decisions, interaction)
    start = (1,) * decisions
    found = network.refined(start, rounds=4, decisions=window)
    assert network.loss(found) <= network.loss(start)
    cost = spent(network.costs, (), found)
    assert min(LEAST_SPENT, spent(network.costs, (), start)) <= cost <= 1 + 1e-9


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), decisions=st.integers(2, 5))
def test_of_a_sum_it_finds_what_no_single_changes_improve(seed: int, decisions: int) -> None:
    network = Network(seed, decisions, 0.0)
    found = network.refined((2,) * decisions)
    for choices in itertools.product(*[{max(c - 1, 0), c, min(c + 1, 4)} for c in found]):
        if LEAST_SPENT <= spent(network.costs, (), choices) <= 1:
            assert network.loss(found) <= network.loss(choices) * (1 + 1e-9)


def test_evaluations_do_not_grow_with_the_choices() -> None:
    rng = np.random.default_rng(0)
    count, decisions = 40, 5
    costs = tuple(np.sort(rng.random(count)) / decisions for _ in range(decisions))
    damage = [np.sort(rng.random(count))[::-1] for _ in range(decisions)]
    sizes = []

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        sizes.append(len(candidates))
        row = [sum(r[c] for r, c in zip(damage, a, strict=True)) for a in candidates]
        return np.array([row] * len(batches))

    refine((3,) * decisions, costs, [-d for d in damage], losses, effort=Effort(1, 99, 1))
    single, verified, *confirmed = sizes
    assert confirmed in ([], [2])
    assert single <= 1 + MOST_CHANGES * decisions
    assert verified <= 1 + len(RADII)


def test_of_choices_that_cost_the_same_the_preferred_one_is_tried() -> None:
    costs = (np.array([0.5, 0.5, 0.5, 1.0]),)
    tried: list[Choices] = []

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        tried.extend(candidates)
        return np.array([[(4.0, 3.0, 2.0, 9.0)[a[0]] for a in candidates]] * len(batches))

    preferences = [np.array([-3.0, -2.0, -1.0, 0.0])]
    found, _ = refine((0,), costs, preferences, losses, effort=Effort(1, 1, 1))
    assert found == (2,)
    assert (1,) not in tried


def test_what_costs_nothing_stays_as_it_is() -> None:
    """A coarser format that looks better by chance is no reason to leave the most precise."""
    network = Network(3, 4, 0.1)
    network.costs = (*network.costs[:3], np.zeros(5))
    network.damage[3] = np.linspace(0.0, 1.0, 5)
    found = network.refined((1, 1, 1, 4))
    assert found[3] == 4
    assert all(choices[3] == 4 for asked in network.asked for choices in asked)


def test_windows_reach_every_decision() -> None:
    """In a round a third of the decisions is looked at, one window after another."""
    network, start, effort = Network(1, 6, 0.0), (1,) * 6, Effort(3, 2, 1)
    looked_at: list[set[int]] = []

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        if batches[0][1] == 0:
            changed = [
                i
                for choices in candidates
                for i, pair in enumerate(zip(choices, candidates[0], strict=True))
                if pair[0] != pair[1]
            ]
            looked_at.append(set(changed))
        return network.losses(candidates, batches)

    found, _ = refine(start, network.costs, network.preferences, losses, effort=effort)
    assert looked_at == [{0, 1}, {2, 3}, {4, 5}]
    assert network.loss(found) < network.loss(start)


def test_a_border_counts_in_the_budget() -> None:
    """Either layer would gain from the dearer kind, but crossing to it is not affordable."""
    costs = (np.array([0.3, 0.45]), np.array([0.3, 0.45]))
    border = Border(0, 1, (("int", "float"), ("int", "float")), 0.3)

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        row = [2.0 - 1.0 * a[0] - 0.5 * a[1] for a in candidates]
        return np.array([row] * len(batches))

    preferences = [np.array([-1.0, 0.0])] * 2
    apart, _ = refine(
        (0, 0), costs, preferences, losses, effort=Effort(3, 2, 1), borders=[border]
    )
    assert apart == (1, 1)
    tight = (np.array([0.3, 0.45]), np.array([0.3, 0.6]))
    stuck, _ = refine(
        (0, 0), tight, preferences, losses, effort=Effort(3, 2, 1), borders=[border]
    )
    assert stuck == (0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_no_improvement(bad: float) -> None:
    costs = (np.array([0.2, 0.4]), np.array([0.2, 0.4]))

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        row = [bad if a != (0, 0) else 1.0 for a in candidates]
        return np.array([row] * len(batches))

    found, loss = refine(
        (0, 0), costs, [np.array([-1.0, 0.0])] * 2, losses, effort=Effort(1, 2, 1)
    )
    assert (found, loss) == ((0, 0), 1.0)


def test_without_rounds_nothing_is_measured() -> None:
    network = Network(0, 3, 0.0)
    assert network.refined((2, 2, 2), rounds=0) == (2, 2, 2)
    assert not network.asked


def test_where_nothing_is_lost_the_budget_is_spent_as_preferred() -> None:
    costs = (np.array([0.2, 0.4, 0.6]), np.array([0.2, 0.4, 0.6]))
    preferences = [np.array([-1.0, -0.5, 0.0]), np.array([-9.0, -3.0, 0.0])]
    rng = np.random.default_rng(0)

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        row = [1 - 1e-9 * rng.random() * i for i in range(len(candidates))]
        return np.array([row] * len(batches))

    found, _ = refine((0, 0), costs, preferences, losses, effort=Effort(3, 2, 1))
    assert spent(costs, (), found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        (0, Effort(1, 4, 1)),
        (50, Effort(1, 8, 1)),
        (94, Effort(1, 23, 1)),
        (188, Effort(1, 23, 2)),
        (376, Effort(2, 23, 2)),
        (1e6, Effort(3, 23, 8)),
    ],
)
def test_effort_grows_with_what_may_be_evaluated(evaluations: float, expected: Effort) -> None:
    assert plan(evaluations, 23, 999) == expected


@given(st.floats(0, 1e5), st.integers(1, 500))
def test_effort_is_within_what_may_be_evaluated(evaluations: float, decisions: int) -> None:
    effort = plan(evaluations, decisions, 999)
    assert 1 <= effort.decisions <= decisions
    single = MOST_CHANGES * effort.decisions + 1
    used = effort.rounds * (effort.batches * (single + len(RADII) + 1) + 2 * effort.confirming)
    least = 1 + 4 * MOST_CHANGES + len(RADII) + 1 + 2 * Effort(1, 1, 1).confirming
    assert used <= max(evaluations, least)


@pytest.mark.parametrize(("gain", "fewest", "most"), [(0.0, 0, 10), (0.1, 45, 50)])
def test_what_may_be_noise_changes_nothing(gain: float, fewest: int, most: int) -> None:
    """Each batch prefers one or the other of two; the second is better by a gain."""
    costs = (np.array([0.2, 0.2]),)
    rng = np.random.default_rng(0)

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        noise = 0.1 * rng.standard_normal((len(batches), len(candidates)))
        return noise + 1 - gain * np.array([a[0] for a in candidates])

    changed = sum(
        refine((0,), costs, [np.zeros(2)], losses, effort=Effort(1, 1, 8))[0] == (1,)
        for _ in range(50)
    )
    assert fewest <= changed <= most


def test_a_faster_choice_that_is_better_is_taken_where_time_buys_no_precision() -> None:
    costs = (np.array([0.2, 0.45]),) * 2

    def losses(candidates: Sequence[Choices], batches: Sequence[tuple[int, int]]) -> Matrix:
        return np.array([[1.0 + sum(a) for a in candidates]] * len(batches))

    for to_spend, expected in (([], (0, 0)), ([0], (1, 1))):
        found, _ = refine(
            (1, 1),
            costs,
            [np.zeros(2)] * 2,
            losses,
            effort=Effort(1, 2, 1),
            to_spend=to_spend,
        )
        assert found == expected
