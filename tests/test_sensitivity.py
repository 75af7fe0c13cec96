"""What is measured of single layers, and what the critic hears of it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.controller import Choices, ControllerConfig
from onnx_fliqs.critic import Critic
from onnx_fliqs.sensitivity import measure_sensitivity, with_sensitivity

COSTS = tuple(np.linspace(0.1, 0.5, size) for size in (2, 3, 5))


def additive(table: Sequence[Sequence[float]], level: float = 1.0) -> dict[Choices, float]:
    """The losses of the assignments that are asked for."""
    asked = [(1, 2, 4), (0, 2, 4), (1, 0, 4), (1, 2, 0)]
    return {a: level + sum(row[c] for row, c in zip(table, a, strict=True)) for a in asked}


def test_each_decision_alone_takes_its_least_precise_choice() -> None:
    losses = additive([(0.5, 0.0), (0.25, 0.1, 0.0), (2.0, 1.0, 0.5, 0.25, 0.0)])
    asked: list[Choices] = []

    def score(candidates: Sequence[Choices]) -> list[float]:
        asked.extend(candidates)
        return [losses[a] for a in candidates]

    np.testing.assert_allclose(measure_sensitivity(COSTS, score), [0.5, 0.25, 2.0])
    assert asked == list(losses)


def test_what_lowers_the_loss_is_harmless_and_what_is_not_finite_is_worst() -> None:
    found = measure_sensitivity(COSTS, lambda _: [1.0, 0.9, float("nan"), 3.0])
    np.testing.assert_allclose(found, [0.0, 2.0, 2.0])


def test_nothing_finite_is_nothing_known() -> None:
    np.testing.assert_array_equal(measure_sensitivity(COSTS, lambda _: [np.nan] * 4), [0] * 3)


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
    count = len(distortions)
    growth = np.array(data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count)))
    told = with_sensitivity(distortions, growth)
    first = np.array([each[0] for each in told])
    for known, measured in zip(distortions, told, strict=True):
        assert measured.shape == (len(known), 3)
        assert np.isfinite(measured).all()
        assert (measured >= 0).all()
        assert (np.diff(measured, axis=0) <= 1e-12).all()
    largest = np.array([each[0].sum() for each in distortions])
    if largest.sum() > 1e-300:
        assert first[:, :2].sum() == pytest.approx(1)
    if growth.sum() > 1e-300 and (largest[growth > 0] > 1e-300).all():
        assert first[:, 2].sum() == pytest.approx(1)


def test_a_layer_that_the_network_minds_is_kept_precise_from_the_start() -> None:
    """Both distort their operands alike; only what was measured tells them apart."""
    costs = tuple(np.array([0.25, 0.75]) for _ in range(2))
    distortions: list[npt.NDArray[np.float64]] = [np.array([[0.5, 0.5], [0.1, 0.1]])] * 2
    for sensitive in range(2):
        growth = np.where(np.arange(2) == sensitive, 1.0, 0.1)
        critic = Critic(costs, with_sensitivity(distortions, growth), ControllerConfig())
        policy = critic.policy(critic.initial(), 1.0)
        assert policy[sensitive][1] > 0.999
        assert policy[1 - sensitive][0] > 0.999
