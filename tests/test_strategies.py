"""The baselines choose what their names say, within the budget."""

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.borders import Border
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.operand_lines import OperandLine, operand_lines
from onnx_fliqs.precision import parse_space, separated
from onnx_fliqs.projection import LEAST_SPENT
from onnx_fliqs.strategies import (
    greedy_choices,
    measure_damage,
    program_choices,
    random_choices,
    single_changes,
    uniform_choices,
)

Rows = tuple[npt.NDArray[np.float64], ...]

BITS = np.array([4.0, 6.0, 8.0])
LEVELS = [(0, 0), (1, 1), (2, 2)]
"""Of two decisions, in those bits."""
DISTORTIONS = [4.0 ** -BITS[:, None]] * 2
IN_A_LINE = np.triu(np.ones((3, 3), np.bool_))
"""Each choice is more precise than the one before."""
ONE_LINE: Final = (OperandLine((0, 1, 2), (0, 1, 2), (0, 1)),)


def costs(macs: Sequence[float], budget: float) -> Rows:
    """Costs of 4, 6 and 8 bits, as shares of a budget of so many effective bits."""
    total = sum(macs) * budget**2
    return tuple(m * BITS**2 / total for m in macs)


def greedy(table: Rows, damage: Rows) -> tuple[int, ...]:
    """From the last choice of each decision."""
    return greedy_choices(tuple(len(row) - 1 for row in table), table, damage)


def spent(table: Rows, choices: Sequence[int]) -> float:
    return float(sum(row[c] for row, c in zip(table, choices, strict=True)))


def test_of_choices_that_cost_nothing_and_do_no_harm_the_last_is_taken() -> None:
    free = np.zeros(3)
    table = (*costs([1.0], 6.0), free, free)
    damage = (np.array([3.0, 2.0, 1.0]), np.ones(3), np.array([2.0, 1.0, 1.0]))
    assert program_choices(table, damage) == (1, 2, 2)


def test_single_changes_differ_in_one_decision() -> None:
    found = single_changes((2, 2), [range(2)] * 2)
    assert found == [(2, 2), (0, 2), (1, 2), (2, 0), (2, 1)]


def test_damage_is_what_a_change_adds() -> None:
    table: dict[tuple[int, ...], float]
    table = {(2, 2): 1.0, (0, 2): 4.0, (1, 2): 1.5, (2, 0): 0.5, (2, 1): np.nan}
    first, second = measure_damage(
        costs([1, 1], 8), [ONE_LINE] * 2, [IN_A_LINE] * 2, lambda a: [table[x] for x in a]
    )
    np.testing.assert_array_equal(first, [3.0, 0.5, 0.0])
    # A loss below that of the most precise is noise; one that is not a number is the worst.
    np.testing.assert_array_equal(second, [3.0, 3.0, 0.0])


def test_the_program_finds_the_best_within_the_budget() -> None:
    table = costs([1, 1, 2], 6.6)
    damage = tuple(np.array(row) for row in ([9.0, 2, 0], [3.0, 1, 0], [1.0, 0.5, 0]))
    chosen = program_choices(table, damage)
    legal = [
        x for x in itertools.product(range(3), repeat=3) if LEAST_SPENT <= spent(table, x) <= 1
    ]
    assert len(legal) > 1
    losses: dict[tuple[int, ...], float] = {
        x: sum(row[c] for row, c in zip(damage, x, strict=True)) for x in legal
    }
    assert losses[chosen] == min(losses.values())


def test_greed_takes_the_harmless_steps_first() -> None:
    table = costs([1, 1, 1], 6.8)
    damage = tuple(np.array(row) for row in ([9.0, 8, 0], [0.2, 0.1, 0], [3.0, 1, 0]))
    assert greedy(table, damage) == (2, 0, 1)


def test_equal_damage_is_done_where_it_saves_most() -> None:
    table = costs([1, 3], 7.5)
    assert greedy(table, (np.zeros(3), np.zeros(3))) == (2, 1)


@pytest.mark.parametrize(("budget", "expected"), [(8.0, 2), (7.9, 1), (6.0, 1), (4.0, 0)])
def test_uniform_is_the_most_precise_that_fits(budget: float, expected: int) -> None:
    assert uniform_choices(costs([2, 5], budget), LEVELS, DISTORTIONS) == (expected,) * 2


def test_uniform_takes_levels_of_decisions_with_different_choices() -> None:
    table = (np.array([0.1, 0.4]), np.array([0.05, 0.2, 0.7]))
    levels = [(0, 0), (0, 1), (1, 2)]
    assert uniform_choices(table, levels, DISTORTIONS) == (0, 1)
    assert uniform_choices((table[0], table[1] / 2), levels, DISTORTIONS) == (1, 2)


@pytest.mark.parametrize("least", range(1, 4))
def test_of_uniform_formats_that_cost_the_same_the_least_distorting_is_taken(
    least: int,
) -> None:
    row = np.array([0.25, 1.0, 1.0, 1.0])
    table = (0.4 * row, 0.6 * row)
    levels = [(level, level) for level in range(4)]
    distortions = [np.array([[0.0], *([float(i != least)] for i in range(1, 4))])] * 2
    assert uniform_choices(table, levels, distortions) == (least, least)
    # What it saves to be coarser is no merit.
    assert uniform_choices((2 * table[0], 2 * table[1]), levels, distortions) == (0, 0)


def test_what_cannot_be_met_is_refused() -> None:
    table = costs([1, 1], 3.9)
    with pytest.raises(InfeasibleError, match="uniform"):
        uniform_choices(table, LEVELS, DISTORTIONS)
    with pytest.raises(InfeasibleError, match="meets the budget"):
        greedy(table, (np.zeros(3), np.zeros(3)))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    macs=st.lists(st.integers(1, 100), min_size=2, max_size=12),
    budget=st.floats(4.2, 8.0),
    seed=st.integers(0, 1000),
)
def test_every_baseline_meets_the_budget(macs: list[int], budget: float, seed: int) -> None:
    table = costs([float(m) for m in macs], budget)
    rng = np.random.default_rng(seed)
    damage = tuple(np.sort(rng.random(3))[::-1] for _ in macs)
    for chosen in (
        program_choices(table, damage),
        greedy(table, damage),
        uniform_choices(
            table, [(level,) * len(macs) for level in range(3)], DISTORTIONS[:1] * len(macs)
        ),
        random_choices(table, rng),
    ):
        assert spent(table, chosen) <= 1 + 1e-9


def test_random_assignments_differ_and_spend_the_budget() -> None:
    table = costs([float(m) for m in range(1, 15)], 6.0)
    drawn = {random_choices(table, np.random.default_rng(seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert all(spent(table, chosen) >= LEAST_SPENT for chosen in drawn)


# -- choices that are not in a line ---------------------------------------------------------

PAIRS = separated(parse_space("int4,int6,int8"))
AS_PRECISE = np.array([[b.as_precise_as(a) for b in PAIRS] for a in PAIRS])
IN_ONE: Final = (OperandLine(tuple(range(len(PAIRS))), tuple(range(len(PAIRS))), (0, 1)),)
"""Pairs that are all measured."""
APART: Final = operand_lines(
    PAIRS, np.array([(4.0**-p.weights.bits, 4.0**-p.activations.bits) for p in PAIRS])
)


def pair_costs(macs: Sequence[float], budget: float) -> Rows:
    """Costs of pairs of 4, 6 and 8 bits, as shares of a budget of so many effective bits."""
    bits = np.array([p.weights.bits * p.activations.bits for p in PAIRS])
    return tuple(m * bits / (sum(macs) * budget**2) for m in macs)


def test_damage_is_no_less_than_that_of_what_is_more_precise_in_both_operands() -> None:
    measured = {"int6:int8": 3.0, "int8:int6": 1.0, "int4:int8": 2.0}
    losses = [0.0, *(measured.get(p.name, 0.0) for p in PAIRS[:-1])]
    (damage,) = measure_damage(pair_costs([1], 8), [IN_ONE], [AS_PRECISE], lambda _: losses)
    expected = {
        "int8": 0.0,
        "int8:int6": 1.0,
        "int8:int4": 1.0,
        **dict.fromkeys(("int6:int8", "int4:int8", "int6", "int4:int6", "int6:int4"), 3.0),
        "int4": 3.0,
    }
    assert {p.name: x for p, x in zip(PAIRS, damage, strict=True)} == expected


def test_apart_the_damage_of_a_pair_is_the_sum_of_that_of_its_operands() -> None:
    names = [p.name for p in PAIRS]
    asked: list[str] = []

    def losses(candidates: Sequence[tuple[int, ...]]) -> list[float]:
        asked.extend(names[choice] for (choice,) in candidates)
        loss = {"int8": 1.0, "int4:int8": 3.0, "int6:int8": 1.5, "int8:int4": 2.0}
        return [loss.get(name, 0.5) for name in asked]

    (damage,) = measure_damage(pair_costs([1], 8), [APART], [AS_PRECISE], losses)
    assert asked == ["int8", "int4:int8", "int6:int8", "int8:int4", "int8:int6"]
    weights, activations = {"int4": 2.0, "int6": 0.5}, {"int4": 1.0}
    expected = [
        weights.get(p.weights.name, 0.0) + activations.get(p.activations.name, 0.0)
        for p in PAIRS
    ]
    np.testing.assert_array_equal(damage, expected)


def test_formats_of_as_many_bits_keep_the_damage_of_their_own() -> None:
    formats = parse_space("int4,e4m3,int8")
    finer = np.array([[b.as_precise_as(a) for b in formats] for a in formats])
    table = (np.array([0.25, 1.0, 1.0]),)
    lines = [operand_lines(formats, np.array([[0.1] * 2, [0.02] * 2, [0.01] * 2]))]
    (damage,) = measure_damage(table, lines, [finer], lambda _: [1.0, 1.5, 4.0])
    np.testing.assert_array_equal(damage, [3.0, 3.0, 0.0])
    assert greedy((table[0] * 1.5,), (damage,)) == (0,)


def test_a_minifloat_of_more_bits_lends_its_damage_to_those_that_it_holds_only() -> None:
    formats = parse_space("e2m1,e2m4,e5m2")
    finer = np.array([[b.as_precise_as(a) for b in formats] for a in formats])
    # Ordered by what they distort.
    lines = [operand_lines(formats, np.array([[0.3] * 2, [0.01] * 2, [0.1] * 2]))]
    (damage,) = measure_damage((np.ones(3),), lines, [finer], lambda _: [1.0, 1.5, 4.0])
    np.testing.assert_array_equal(damage, [3.0, 0.0, 3.0])


def test_a_precise_format_may_be_faster_than_a_coarse_one() -> None:
    """As int8 beside int4 in most runtimes: latency is nothing to be spent."""
    table = (np.array([0.5, 0.36, 0.7]),) * 2
    damage = (np.array([1.0, 0.1, 0.0]),) * 2
    border = Border(0, 1, (("a", "a", "b"),) * 2, 0.05)
    for borders in ((), (border,)):
        assert greedy_choices((2, 2), table, damage, borders) == (1, 1)
        assert program_choices(table, damage, borders, to_spend=[]) == (1, 1)
    assert program_choices((np.array([0.99, 0.5]),), [np.array([1.0, 0.0])], (), []) == (1,)


def test_greed_ends_where_borders_undo_what_it_saves() -> None:
    """Own costs fall towards the middle choice, and no assignment is cheap enough."""
    table = (np.array([0.5, 0.36, 0.7]),) * 2
    damage = (np.array([1.0, 0.1, 0.0]),) * 2
    border = Border(0, 1, (("a", "b", "c"), ("d", "e", "f")), 0.5)
    with pytest.raises(InfeasibleError):
        greedy_choices((2, 2), table, damage, (border,))


def test_greed_starts_where_it_is_told_to() -> None:
    """The last of several that cost the same need not be the most precise."""
    table = (np.array([0.25, 0.5, 0.5]),) * 2
    damage = (np.zeros(3), np.array([2.0, 0.0, 1.0]))
    assert greedy_choices((2, 1), table, damage) == (2, 1)
    assert greedy_choices((1, 1), tuple(1.2 * row for row in table), damage) == (0, 1)


def one_step_down(costs: Rows, damage: Rows) -> tuple[int, ...]:
    """Greed where choices are in a line."""
    chosen = [len(row) - 1 for row in costs]
    while spent(costs, chosen) > 1 + 1e-9:
        *_, i = min(
            (float(damage[i][c - 1]), -float(costs[i][c] - costs[i][c - 1]), i)
            for i, c in enumerate(chosen)
            if c > 0
        )
        chosen[i] -= 1
    return tuple(chosen)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    macs=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    budget=st.floats(4.0, 8.0),
    seed=st.integers(0, 1000),
)
def test_in_a_line_greed_takes_one_step_down_at_a_time(
    macs: list[int], budget: float, seed: int
) -> None:
    table = costs([float(m) for m in macs], budget)
    rng = np.random.default_rng(seed)
    # With ties, as damage that noise hides is 0.
    damage = tuple(np.sort([*rng.integers(0, 4, 2), 0.0])[::-1].astype(float) for _ in macs)
    assert greedy(table, damage) == one_step_down(table, damage)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    macs=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    budget=st.floats(4.0, 8.0),
    seed=st.integers(0, 1000),
)
def test_greed_among_pairs_leaves_no_choice_that_is_cheaper_and_less_harmful(
    macs: list[int], budget: float, seed: int
) -> None:
    table = pair_costs([float(m) for m in macs], budget)
    rng = np.random.default_rng(seed)
    raw = [1.0, *rng.integers(0, 5, len(macs) * (len(PAIRS) - 1)).astype(float)]
    order = [AS_PRECISE] * len(macs)
    damage = measure_damage(table, [IN_ONE] * len(macs), order, lambda _: raw)
    chosen = greedy(table, damage)
    assert spent(table, chosen) <= 1 + 1e-9
    for row, harm, c in zip(table, damage, chosen, strict=True):
        assert not any(harm[a] < harm[c] and row[a] <= row[c] for a in range(len(row)))


def test_greed_keeps_the_operand_that_matters() -> None:
    weights, activations = (
        np.array([4.0 ** -getattr(p, operand).bits for p in PAIRS])
        for operand in ("weights", "activations")
    )
    damage = (100 * weights + activations, weights + 100 * activations)
    damage = tuple(row - row[-1] for row in damage)
    chosen = greedy(pair_costs([1, 1], 5.7), damage)
    assert [PAIRS[c].name for c in chosen] == ["int8:int4", "int4:int8"]


def test_greed_passes_formats_that_save_nothing() -> None:
    table = (np.array([0.25, 1.0, 1.0]), np.array([0.25, 1.0, 1.0]))
    damage = (np.array([2.0, 1.0, 0.0]), np.array([3.0, 1.0, 0.0]))
    assert greedy(table, damage) == (0, 0)
    assert greedy(tuple(row * 0.75 for row in table), damage) == (0, 2)
