"""What is measured of single layers, and what the critic hears of it."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.controller import Choices, ControllerConfig
from onnx_fliqs.critic import Critic
from onnx_fliqs.sensitivity import measure_sensitivity, measured_choices, with_sensitivity

COSTS = tuple(np.linspace(0.1, 0.5, size) for size in (2, 3, 5))


DISTORTIONS = tuple(np.column_stack([4.0 ** -np.arange(len(row))] * 2) for row in COSTS)


def score(table: Sequence[Sequence[float]]) -> Callable[[Sequence[Choices]], list[float]]:
    return lambda asked: [
        1 + sum(row[c] for row, c in zip(table, a, strict=True)) for a in asked
    ]


@pytest.mark.parametrize(
    ("choices", "measured"),
    [
        (1, ()),
        (2, (0,)),
        (3, (0, 1)),
        (5, (0, 1, 2, 3)),
        (7, (0, 1, 2, 3, 4, 5)),
        (14, (0, 2, 5, 7, 10, 12)),
    ],
)
def test_at_most_six_choices_are_measured(choices: int, measured: tuple[int, ...]) -> None:
    assert measured_choices(choices) == measured


def test_what_is_measured_is_what_single_changes_add() -> None:
    table = [(0.5, 0.0), (0.25, 0.1, 0.0), (2.0, 1.0, 0.5, 0.25, 0.0)]
    found = measure_sensitivity(COSTS, DISTORTIONS, score(table))
    for row, expected in zip(found, table, strict=True):
        np.testing.assert_allclose(row[:-1], expected[:-1])
        assert 0 < row[-1] < row[-2]


def test_between_what_is_measured_the_growth_is_a_power_of_the_distortion() -> None:
    count = 14
    distortion: npt.NDArray[np.float64] = 4.0 ** -np.arange(float(count))[:, None]
    truth = 3.0 * distortion[:, 0] ** 0.5
    costs = (np.linspace(0.1, 0.5, count),)
    asked: list[int] = []

    def losses(candidates: Sequence[Choices]) -> list[float]:
        asked.extend(choice for (choice,) in candidates)
        return [1 + float(truth[choice]) * (choice < count - 1) for choice in asked]

    (found,) = measure_sensitivity(costs, [distortion], losses)
    assert asked == [13, 0, 2, 5, 7, 10, 12]
    np.testing.assert_allclose(found[:13], truth[:13], rtol=1e-6)


def test_what_lowers_the_loss_is_harmless_and_what_is_not_finite_is_worst() -> None:
    losses = [1.0, 0.9, np.nan, 3.0, 5.0, 0.5, 0.5, 0.5]
    found = measure_sensitivity(COSTS, DISTORTIONS, lambda _: losses)
    np.testing.assert_array_equal(found[0], [0.0, 0.0])
    np.testing.assert_allclose(found[1][:2], [4.0, 2.0])
    np.testing.assert_allclose(found[2][:2], [4.0, 4e-6])


def test_nothing_finite_is_nothing_known() -> None:
    found = measure_sensitivity(COSTS, DISTORTIONS, lambda _: [np.nan] * 8)
    assert all((row == 0).all() for row in found)


@given(
    st.lists(
        st.lists(st.tuples(*[st.floats(0, 1e3)] * 2), min_size=2, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_both_parts_weigh_as_much_as_the_other(
    rows: list[list[tuple[float, float]]], data: st.DataObject
) -> None:
    distortions = [np.sort(np.array(each), axis=0)[::-1] for each in rows]
    growth = [
        np.array(data.draw(st.lists(st.floats(0, 10), min_size=len(each), max_size=len(each))))
        for each in rows
    ]
    told = with_sensitivity(distortions, growth)
    for known, measured in zip(distortions, told, strict=True):
        assert measured.shape == (len(known), 3)
        assert np.isfinite(measured).all()
        assert (measured >= 0).all()
    if sum(each.sum(axis=1).max() for each in distortions) > 1e-300:
        assert sum(e[:, :2].sum(axis=1).max() for e in told) == pytest.approx(1)
    if sum(each.max() for each in growth) > 1e-300:
        assert sum(e[:, 2].max() for e in told) == pytest.approx(1)


def test_a_layer_that_the_network_minds_is_kept_precise_from_the_start() -> None:
    """Both distort their operands alike; only what was measured tells them apart."""
    costs = tuple(np.array([0.25, 0.75]) for _ in range(2))
    distortions: list[npt.NDArray[np.float64]] = [np.array([[0.5, 0.5], [0.1, 0.1]])] * 2
    for sensitive in range(2):
        growth = [np.array([1.0 if i == sensitive else 0.1, 0.0]) for i in range(2)]
        critic = Critic(costs, with_sensitivity(distortions, growth), ControllerConfig())
        policy = critic.policy(critic.initial(), 1.0)
        assert policy[sensitive][1] > 0.999
        assert policy[1 - sensitive][0] > 0.999
