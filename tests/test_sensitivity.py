"""What is measured of single layers, and what the critic hears of it."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.controller import Choices, ControllerConfig
from onnx_fliqs.critic import Critic
from onnx_fliqs.operand_lines import OperandLine, operand_lines
from onnx_fliqs.precision import parse_space, separated
from onnx_fliqs.sensitivity import measure_sensitivity, measured_choices


def one_line(size: int) -> tuple[OperandLine]:
    """Choices of a decision that are all measured alike."""
    return (OperandLine(tuple(range(size)), tuple(range(size)), (0, 1)),)


Matrix = npt.NDArray[np.float64]

SIZES = (2, 3, 5)
LINES = [one_line(size) for size in SIZES]
DISTORTIONS = tuple(np.column_stack([4.0 ** -np.arange(size)] * 2) for size in SIZES)
PAIRS = separated(parse_space("int2,int3,int4,int5,int6,int7,int8"))
SIZE = np.array([(p.weights.bits, p.activations.bits) for p in PAIRS])
PAIR_DISTORTIONS = np.where(SIZE < 8, 4.0**-SIZE, 0.0)
APART = operand_lines(PAIRS, PAIR_DISTORTIONS)


def _same(losses: Sequence[float], _: Sequence[Choices]) -> Sequence[float]:
    return losses


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
    assert measured_choices(one_line(choices)) == (measured,)


def test_what_is_measured_is_what_single_changes_add() -> None:
    table = [(0.5, 0.0), (0.25, 0.1, 0.0), (2.0, 1.0, 0.5, 0.25, 0.0)]
    found = measure_sensitivity(LINES, DISTORTIONS, score(table))
    for row, expected in zip(found, table, strict=True):
        np.testing.assert_allclose(row[:-1], expected[:-1])
        assert 0 < row[-1] < row[-2]


def test_between_what_is_measured_the_growth_is_a_power_of_the_distortion() -> None:
    count = 14
    distortion: npt.NDArray[np.float64] = 4.0 ** -np.arange(float(count))[:, None]
    truth = 3.0 * distortion[:, 0] ** 0.5
    asked: list[int] = []

    def losses(candidates: Sequence[Choices]) -> list[float]:
        asked.extend(choice for (choice,) in candidates)
        return [1 + float(truth[choice]) * (choice < count - 1) for choice in asked]

    (found,) = measure_sensitivity(
        [one_line(count)], [np.hstack([distortion, 0 * distortion])], losses
    )
    assert asked == [13, 0, 2, 5, 7, 10, 12]
    np.testing.assert_allclose(found[:13], truth[:13], rtol=1e-6)


def test_what_lowers_the_loss_is_nearly_harmless_and_what_is_not_finite_is_worst() -> None:
    losses = [1.0, 0.9, np.nan, 3.0, 5.0, 0.5, 0.5, 0.5]
    found = measure_sensitivity(LINES, DISTORTIONS, lambda _: losses)
    slope = 1e-3 * (0 + 4 + 4) / (3 * 2)
    np.testing.assert_allclose(found[0], slope * DISTORTIONS[0].sum(axis=1))
    np.testing.assert_allclose(found[1][:2], [4.0, 2.0])
    np.testing.assert_allclose(found[2][:2], [4.0, slope * 0.5])


def test_where_nothing_is_known_all_mind_a_distortion_alike() -> None:
    for losses in ([np.nan] * 8, [1.0] * 8):
        found = measure_sensitivity(LINES, DISTORTIONS, functools.partial(_same, losses))
        for row, distortion in zip(found, DISTORTIONS, strict=True):
            np.testing.assert_array_equal(row, distortion.sum(axis=1))


@given(
    st.lists(
        st.lists(st.tuples(*[st.floats(1e-6, 1e3)] * 2), min_size=2, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_more_distortion_is_never_held_to_be_less_harmful(
    rows: list[list[tuple[float, float]]], data: st.DataObject
) -> None:
    distortions = [np.sort(np.array(each), axis=0)[::-1] for each in rows]
    lines = [one_line(len(each)) for each in rows]
    count = 1 + sum(len(along) for own in lines for along in measured_choices(own))
    losses = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    for row in measure_sensitivity(lines, distortions, lambda _: losses):
        assert np.isfinite(row).all()
        assert (row > 0).all()
        assert (np.diff(row) <= 1e-12 * row[:-1]).all()


def test_of_formats_apart_four_of_each_operand_are_measured() -> None:
    weights, activations = measured_choices(APART)
    assert [PAIRS[c].name for c in weights] == [f"int{b}:int8" for b in (2, 4, 5, 7)]
    assert [PAIRS[c].name for c in activations] == [f"int8:int{b}" for b in (2, 4, 5, 7)]


@pytest.mark.parametrize("weight_damage", [0.0, 0.1, 1.0])
def test_apart_the_growth_is_that_of_both_operands(weight_damage: float) -> None:
    """As the distortion of each operand grows, and that of weights counts for less."""
    truth = PAIR_DISTORTIONS @ [2.0, 3.0]
    (found,) = measure_sensitivity(
        [APART],
        [PAIR_DISTORTIONS],
        lambda asked: [1 + float(truth[choice]) for (choice,) in asked],
        weight_damage,
    )
    expected = PAIR_DISTORTIONS @ [2.0 * weight_damage, 3.0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_of_a_layer_without_activations_count_for_less_too() -> None:
    """Beside layers that choose apart; where none does, for as much as anything."""
    choices = parse_space("int2,int4,int8")
    distortion = np.column_stack([4.0 ** -np.array([2, 4, 8]), np.zeros(3)])
    alone = operand_lines(choices, distortion)

    def measured(lines: list[Sequence[OperandLine]], rows: list[Matrix]) -> Matrix:
        table = [row.sum(axis=1) for row in rows]
        return measure_sensitivity(lines, rows, score(table), weight_damage=0.1)[0]

    beside = measured([alone, APART], [distortion, PAIR_DISTORTIONS])
    np.testing.assert_allclose(measured([alone], [distortion]), 10 * beside)


def test_a_layer_that_the_network_minds_is_kept_precise_from_the_start() -> None:
    """Both distort their operands alike; only what was measured tells them apart."""
    costs = tuple(np.array([0.25, 0.75]) for _ in range(2))
    for sensitive in range(2):
        growth = [np.array([1.0 if i == sensitive else 0.1, 0.0]) for i in range(2)]
        critic = Critic(costs, [row[:, None] for row in growth], ControllerConfig())
        policy = critic.policy(critic.initial(), 1.0)
        assert policy[sensitive][1] > 0.999
        assert policy[1 - sensitive][0] > 0.999
