"""The controllers: gradients and policies as documented, and planted optima that are found."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.controller import (
    Choices,
    Controller,
    ControllerConfig,
    Policy,
    RewardForm,
    Schedule,
    Signal,
    entropy,
    expected_cost,
    most_probable,
    ramp,
    sample,
    softmax,
    uniform,
)
from onnx_fliqs.critic import Critic, CriticState
from onnx_fliqs.errors import ConfigError
from onnx_fliqs.projection import project
from onnx_fliqs.reinforce import Reinforce, ReinforceState, entropy_weight, reward

Vectors = tuple[npt.NDArray[np.float64], ...]

SIZES = (2, 3, 5)
# Central differences of float64 with a step of 1e-5: errors of about 1e-10.
DIFFERENCES = 1e-8


def random_costs(seed: int = 1, sizes: Sequence[int] = SIZES) -> Vectors:
    """Rising, and about 1 for a middling assignment of three decisions."""
    rng = np.random.default_rng(seed)
    return tuple(np.sort(rng.uniform(0.1, 0.6, size)) for size in sizes)


def random_distortions(seed: int = 2, sizes: Sequence[int] = SIZES) -> Vectors:
    rng = np.random.default_rng(seed)
    return tuple(np.sort(rng.uniform(0.0, 1.0, size))[::-1].copy() for size in sizes)


def one_operand(distortions: Sequence[npt.NDArray[np.float64]]) -> Vectors:
    """As the critic takes them: [choices, operands]."""
    return tuple(row[:, None] for row in distortions)


def draws_of(policy: Policy, count: int, seed: int = 3) -> list[Choices]:
    rng = np.random.default_rng(seed)
    return [sample(policy, rng) for _ in range(count)]


def total(table: Vectors, choices: Choices) -> float:
    return sum(float(row[c]) for row, c in zip(table, choices, strict=True))


def critic(seed: int = 1, **changes: Any) -> Critic:
    distortions = one_operand(random_distortions(seed))
    return Critic(random_costs(seed), distortions, ControllerConfig(**changes))


def reinforce(**changes: Any) -> Reinforce:
    return Reinforce(random_costs(), ControllerConfig(**changes))


def random_state(seed: int = 0) -> ReinforceState:
    rng = np.random.default_rng(seed)
    zeros = tuple(np.zeros(size) for size in SIZES)
    return ReinforceState(tuple(rng.standard_normal(size) for size in SIZES), zeros, zeros)


# --- policies ------------------------------------------------------------------------------


def random_policy(seed: int = 0) -> Policy:
    rng = np.random.default_rng(seed)
    return tuple(rng.dirichlet(np.ones(size)) for size in SIZES)


def test_a_uniform_policy_is_uniform() -> None:
    policy = uniform(SIZES)
    for size, row in zip(SIZES, policy, strict=True):
        np.testing.assert_array_equal(row, np.full(size, 1 / size))
    assert entropy(policy) == pytest.approx(float(np.mean(np.log(SIZES))), rel=1e-14)
    assert most_probable(policy) == (0, 0, 0)


def test_extreme_logits_give_probabilities() -> None:
    np.testing.assert_array_equal(softmax(np.array([1e4, -1e4, 0.0])), [1, 0, 0])
    assert entropy((np.array([1.0, 0.0, 0.0]),)) == 0


def test_draws_follow_the_probabilities() -> None:
    policy, count = random_policy(), 4000
    draws = draws_of(policy, count)
    for i, row in enumerate(policy):
        shares = np.bincount([d[i] for d in draws], minlength=len(row)) / count
        # Five standard deviations of a share.
        np.testing.assert_allclose(shares, row, atol=5 * math.sqrt(0.25 / count))


def test_the_same_generator_draws_the_same() -> None:
    policy = random_policy()
    assert draws_of(policy, 9, seed=1) == draws_of(policy, 9, seed=1)
    assert draws_of(policy, 9, seed=1) != draws_of(policy, 9, seed=2)


def test_the_expected_cost_is_the_mean_over_all_assignments() -> None:
    policy, costs = random_policy(), random_costs()
    mean = sum(
        math.prod(float(p[c]) for p, c in zip(policy, choices, strict=True))
        * total(costs, choices)
        for choices in itertools.product(*map(range, SIZES))
    )
    assert expected_cost(policy, costs) == pytest.approx(mean, rel=1e-13)


# --- what both controllers promise ---------------------------------------------------------

CONTROLLERS: dict[str, Callable[[], Controller[Any]]] = {
    "reinforce": lambda: reinforce(entropy_end=0.5),
    "critic": critic,
}
both = pytest.mark.parametrize("name", list(CONTROLLERS))


def assert_same(controller: Controller[Any], found: object, wanted: object) -> None:
    mine, theirs = controller.to_arrays(found), controller.to_arrays(wanted)
    assert list(mine) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)


def after_some(controller: Controller[Any], steps: int = 3) -> Any:
    rng = np.random.default_rng(5)
    state = controller.initial()
    for step in range(steps):
        draws = [sample(controller.policy(state, step / 10), rng) for _ in range(4)]
        losses = [float(loss) for loss in rng.uniform(0.1, 1.0, 4)]
        state = controller.update(state, draws, losses, step / 10)
    return state


@both
def test_policies_are_probabilities(name: str) -> None:
    controller = CONTROLLERS[name]()
    for state in (controller.initial(), after_some(controller)):
        for progress in (0.0, 0.5, 1.0):
            policy = controller.policy(state, progress)
            assert tuple(map(len, policy)) == SIZES
            for row in policy:
                assert (row >= 0).all()
                assert row.sum() == pytest.approx(1, rel=1e-14)


@both
@pytest.mark.parametrize("verb", ["update", "observe"])
def test_learning_changes_nothing_that_it_was_given(name: str, verb: str) -> None:
    controller = CONTROLLERS[name]()
    state = after_some(controller)
    for array in controller.to_arrays(state).values():
        array.flags.writeable = False
    before = copy.deepcopy(state)
    draws, losses = draws_of(uniform(SIZES), 3), [3.0, 1.0, 2.0]

    def learn() -> Any:
        if verb == "observe":
            return controller.observe(state, draws, losses)
        return controller.update(state, draws, losses, 0.4)

    first = learn()
    assert_same(controller, state, before)
    assert losses == [3.0, 1.0, 2.0]
    assert_same(controller, learn(), first)


@both
@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_survives_its_arrays(name: str, steps: int) -> None:
    controller = CONTROLLERS[name]()
    state = after_some(controller, steps)
    arrays = {key: np.array(array) for key, array in controller.to_arrays(state).items()}
    again = CONTROLLERS[name]().from_arrays(arrays)
    assert_same(controller, again, state)
    draws = draws_of(uniform(SIZES), 3)
    assert_same(
        controller,
        controller.update(again, draws, [0.1, 0.7, 0.3], 0.9),
        controller.update(state, draws, [0.1, 0.7, 0.3], 0.9),
    )


def test_more_than_ten_decisions_keep_their_order_in_the_arrays() -> None:
    costs = tuple(np.full(2, 0.05) for _ in range(12))
    controller = Reinforce(costs, ControllerConfig())
    draws = draws_of(uniform([2] * 12), 4)
    state = controller.update(controller.initial(), draws, [0.1, 0.2, 0.3, 0.4], 0.0)
    assert_same(controller, controller.from_arrays(controller.to_arrays(state)), state)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("verb", ["update", "observe"])
def test_draws_without_a_finite_loss_are_left_out(name: str, bad: float, verb: str) -> None:
    controller = CONTROLLERS[name]()
    state = after_some(controller)
    draws = draws_of(uniform(SIZES), 4)

    def learn(taken: Sequence[Choices], losses: Sequence[float]) -> Any:
        if verb == "observe":
            return controller.observe(state, taken, losses)
        return controller.update(state, taken, losses, 0.5)

    assert_same(
        controller,
        learn(draws, [0.3, bad, 0.1, bad]),
        learn([draws[0], draws[2]], [0.3, 0.1]),
    )
    nothing = learn(draws, [bad] * 4)
    for array in controller.to_arrays(nothing).values():
        assert np.isfinite(array).all()


def test_the_probability_of_better_draws_rises() -> None:
    controller = Reinforce(tuple(np.full(2, 0.3) for _ in range(3)), ControllerConfig())
    better, worse, state = (1, 1, 0), (0, 1, 1), controller.initial()
    after = controller.update(state, [better, worse], [0.1, 0.9], 0.0)
    policy = controller.policy(after, 0.0)
    assert log_probability(policy, better) > log_probability(uniform([2] * 3), better)
    assert log_probability(policy, worse) < log_probability(uniform([2] * 3), worse)


def test_the_critic_spends_on_the_decision_that_was_seen_to_matter() -> None:
    costs = tuple(np.array([0.2, 0.6]) for _ in range(2))
    controller = Critic(costs, (np.array([[1.0], [0.0]]),) * 2, ControllerConfig())
    draws = [(0, 0), (0, 1), (1, 0), (1, 1)]
    state = controller.observe(controller.initial(), draws, [1.0, 0.9, 0.1, 0.0])
    first, second = controller.policy(state, 0.5)
    assert first[1] > 0.9 > second[1]


# --- REINFORCE -----------------------------------------------------------------------------


def descent(state: ReinforceState) -> Vectors:
    """The gradient of the first update: what Adam's first moments took in, a tenth of it."""
    assert state.updates == 1
    return tuple(row / (1 - 0.9) for row in state.first)


def slope(objective: Callable[[Policy], float], state: ReinforceState) -> Vectors:
    """Central differences over every logit."""
    step = 1e-5
    rows = []
    for i, row in enumerate(state.logits):
        slopes = np.zeros_like(row)
        for j in range(len(row)):
            values = []
            for sign in (1, -1):
                logits = [r.copy() for r in state.logits]
                logits[i][j] += sign * step
                values.append(objective(tuple(softmax(r) for r in logits)))
            slopes[j] = (values[0] - values[1]) / (2 * step)
        rows.append(slopes)
    return tuple(rows)


def assert_gradient(found: Vectors, wanted: Vectors) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=DIFFERENCES)


def log_probability(policy: Policy, choices: Choices) -> float:
    return sum(math.log(p[c]) for p, c in zip(policy, choices, strict=True))


@pytest.mark.parametrize("count", [2, 4, 7])
def test_the_gradient_of_reinforce_is_that_of_its_objective(count: int) -> None:
    state, costs = random_state(), random_costs()
    controller = reinforce(beta=-0.7, entropy_end=0.3)
    draws = draws_of(controller.policy(state, 0.0), count)
    losses = [float(loss) for loss in np.random.default_rng(4).normal(size=count)]
    after = controller.update(state, draws, losses, 0.6)

    rewards = [-q - 0.7 * abs(total(costs, a) - 1) for a, q in zip(draws, losses, strict=True)]
    others = [(sum(rewards) - r) / (count - 1) for r in rewards]
    weight = 0.3 * (1 - math.cos(0.6 * math.pi)) / 2

    def objective(policy: Policy) -> float:
        terms = [
            (r - o) * log_probability(policy, d)
            for r, o, d in zip(rewards, others, draws, strict=True)
        ]
        return -sum(terms) / (len(SIZES) * count) + weight * entropy(policy)

    assert_gradient(descent(after), slope(objective, state))


def test_the_gradient_of_a_single_draw_is_weighed_by_the_running_mean() -> None:
    start = random_state()
    state = ReinforceState(start.logits, start.first, start.second, baseline=0.25)
    controller = reinforce(entropy_end=0.1, baseline_decay=0.9)
    choices = (1, 2, 0)
    after = controller.update(state, [choices], [0.4], 0.0)
    gained = -0.4 - abs(total(random_costs(), choices) - 1)
    # The mean follows before the advantage is taken.
    mean = 0.9 * 0.25 + 0.1 * gained
    assert after.baseline == pytest.approx(mean, rel=1e-14)
    assert_gradient(
        descent(after),
        slope(lambda p: -(gained - mean) * log_probability(p, choices) / len(SIZES), state),
    )


def test_without_advantages_the_gradient_is_the_entropys() -> None:
    state = random_state()
    controller = reinforce(entropy_end=0.8)
    after = controller.update(state, [(0, 0, 0)] * 3, [0.5] * 3, 1.0)
    assert_gradient(descent(after), slope(lambda p: 0.8 * entropy(p), state))


def test_the_entropy_is_penalised() -> None:
    state, controller = random_state(), reinforce(entropy_end=0.5)
    for _ in range(20):
        after = controller.update(state, [], [], 1.0)
        assert entropy(controller.policy(after, 1.0)) < entropy(controller.policy(state, 1.0))
        state = after


@pytest.mark.parametrize(
    ("cost", "budget", "beta", "quality", "expected"),
    [
        (15, 5, -1.0, 0.8, -1.2),
        (3, 5, -2.0, 0.95, 0.15),
        (5, 5, -1.0, 0.5, 0.5),
        (10, 5, -0.1, 0.5, 0.4),
    ],
)
def test_the_absolute_reward_has_its_worked_values(
    cost: float, budget: float, beta: float, quality: float, expected: float
) -> None:
    # Three roundings of float64.
    assert reward(quality, cost / budget, beta) == pytest.approx(expected, abs=1e-15)
    controller = Reinforce((np.array([cost / budget]),), ControllerConfig(beta=beta))
    # The first reward starts the running mean.
    state = controller.update(controller.initial(), [(0,)], [-quality], 0.0)
    assert state.baseline == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("form", "cheap", "dear"),
    [
        (RewardForm.ABSOLUTE, 0.3, 0.3),
        (RewardForm.ONE_SIDED, 0.8, 0.3),
        (RewardForm.EXPONENTIAL, 1.6, 0.8 / 1.5),
        (RewardForm.HARD_EXPONENTIAL, 0.8, 0.8 / 1.5),
    ],
)
def test_the_forms_of_the_reward_differ_in_what_they_punish(
    form: RewardForm, cheap: float, dear: float
) -> None:
    for cost, expected in ((0.5, cheap), (1.0, 0.8), (1.5, dear)):
        found = reward(0.8, cost, -1.0, form)
        assert found == pytest.approx(expected, abs=1e-15)
        # A quality is minus what the controller is told to make small.
        config = ControllerConfig(reward=form, signal=Signal.ACCURACY)
        controller = Reinforce((np.array([cost]),), config)
        state = controller.observe(controller.initial(), [(0,)], [-0.8])
        assert state.baseline == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("form", [RewardForm.EXPONENTIAL, RewardForm.HARD_EXPONENTIAL])
def test_an_exponential_reward_of_a_loss_is_refused(form: RewardForm) -> None:
    with pytest.raises(ConfigError, match=f"the {form.value} reward .* choose the signal"):
        ControllerConfig(reward=form)
    for signal in (Signal.ACCURACY, Signal.AGREEMENT):
        assert ControllerConfig(reward=form, signal=signal).reward is form


@pytest.mark.parametrize(
    ("schedule", "quarter"),
    [(Schedule.LINEAR, 0.25), (Schedule.COSINE, (1 - math.sqrt(0.5)) / 2)],
)
def test_a_ramp_goes_from_0_to_1(schedule: Schedule, quarter: float) -> None:
    for time, expected in ((-1, 0), (0, 0), (0.25, quarter), (0.5, 0.5), (1, 1), (2, 1)):
        assert ramp(schedule, time) == pytest.approx(expected, abs=1e-15)
        assert entropy_weight(0.4, time, schedule) == pytest.approx(0.4 * expected, abs=1e-15)


def test_a_constant_schedule_keeps_what_is_configured() -> None:
    assert [entropy_weight(0.4, s, Schedule.CONSTANT) for s in (0.0, 0.3, 1.0)] == [0.4] * 3
    warm, cold = critic(cooling=Schedule.CONSTANT), critic()
    state = after_some(warm)
    for progress in (0.0, 0.5, 1.0):
        policy = warm.policy(state, progress)
        for ours, theirs in zip(policy, cold.policy(state, 0.0), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_schedule_of_the_penalty_reaches_its_gradient() -> None:
    state = random_state()
    gradients = {
        schedule: descent(
            reinforce(entropy_end=0.8, entropy_schedule=schedule).update(state, [], [], 0.25)
        )
        for schedule in Schedule
    }
    whole = gradients[Schedule.CONSTANT]
    for schedule in (Schedule.LINEAR, Schedule.COSINE):
        share = ramp(schedule, 0.25)
        assert_gradient(gradients[schedule], tuple(share * row for row in whole))


def test_a_temperature_on_a_cosine_falls_later_than_on_a_line() -> None:
    linear, cosine = critic(), critic(cooling=Schedule.COSINE)
    state = after_some(linear)
    assert entropy(cosine.policy(state, 0.2)) > entropy(linear.policy(state, 0.2))
    assert entropy(cosine.policy(state, 0.8)) < entropy(linear.policy(state, 0.8))
    np.testing.assert_allclose(cosine.policy(state, 0.5)[0], linear.policy(state, 0.5)[0])


def test_the_running_mean_follows_the_rewards_in_the_delay_too() -> None:
    controller = Reinforce((np.array([1.0, 1.0]),), ControllerConfig(baseline_decay=0.9))
    state = controller.observe(controller.initial(), [(0,)], [-1.0])
    assert state.baseline == 1.0
    state = controller.observe(state, [(1,), (0,)], [-2.0, -4.0])
    assert state.baseline == pytest.approx(0.9 + 0.3, rel=1e-15)
    assert state.updates == 0
    np.testing.assert_array_equal(state.logits[0], [0, 0])


def test_the_entropy_schedule_is_a_cosine_from_nothing_to_its_end() -> None:
    assert entropy_weight(0.5, 0.0) == 0.0
    assert entropy_weight(0.5, 0.5) == pytest.approx(0.25, rel=1e-15)
    assert entropy_weight(0.5, 1.0) == 0.5
    assert entropy_weight(0.5, -1.0) == 0.0
    assert entropy_weight(0.5, 7.0) == 0.5
    values = [entropy_weight(0.5, s) for s in np.linspace(0, 1, 50)]
    assert values == sorted(values)


# --- the critic ----------------------------------------------------------------------------


def additive_losses(
    sensitivities: Sequence[float], distortions: Vectors, draws: Sequence[Choices]
) -> list[float]:
    return [
        sum(s * float(e[c]) for s, e, c in zip(sensitivities, distortions, a, strict=True))
        for a in draws
    ]


def test_sensitivities_are_recovered_from_losses_that_are_sums() -> None:
    controller = critic(shrinkage=1e-9)
    planted, state = [0.3, 2.0, 1.0], controller.initial()
    for step in range(40):
        draws = draws_of(uniform(SIZES), 4, seed=step)
        losses = additive_losses(planted, random_distortions(1), draws)
        # The level of a batch is its own affair.
        state = controller.observe(state, draws, [loss + 100 * step for loss in losses])
    # Differences of numbers up to 4000 in float64, and the ridge.
    found = controller.sensitivities(state)
    np.testing.assert_allclose(found[:, 0], planted, rtol=1e-6)


def test_few_observations_leave_sensitivities_near_their_common_value() -> None:
    controller = critic(shrinkage=1e6)
    draws = draws_of(uniform(SIZES), 6)
    losses = additive_losses([0.3, 2.0, 1.0], random_distortions(1), draws)
    found = controller.sensitivities(controller.observe(controller.initial(), draws, losses))
    assert found[0, 0] > 0
    np.testing.assert_allclose(found, np.full((3, 1), found[0, 0]), rtol=1e-4)


def test_before_any_observation_all_are_equally_sensitive() -> None:
    controller = critic()
    found = controller.sensitivities(controller.initial())
    np.testing.assert_array_equal(found, np.ones((3, 1)))
    once = controller.observe(controller.initial(), [(0, 0, 0)], [1.0])
    assert_same(controller, once, controller.initial())


def test_sensitivities_are_never_negative() -> None:
    controller, rng = critic(), np.random.default_rng(0)
    for _ in range(20):
        draws = draws_of(uniform(SIZES), 8, seed=int(rng.integers(1000)))
        losses = [float(loss) for loss in rng.standard_normal(8)]
        state = controller.observe(controller.initial(), draws, losses)
        assert (controller.sensitivities(state) > 0).all()


@st.composite
def critics(draw: st.DrawFn) -> tuple[Critic, CriticState, Vectors, Vectors]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    bits = np.array([4.0, 5.0, 6.0, 7.0, 8.0])
    macs = 10 ** rng.uniform(-2, 0, len(sizes))
    costs = [m * bits[:size] ** 2 for m, size in zip(macs, sizes, strict=True)]
    low, high = (sum(float(pick(row)) for row in costs) for pick in (min, max))
    budget = low + draw(st.floats(0.0, 1.2)) * (high - low)
    shares = tuple(row / budget for row in costs)
    distortions = tuple(
        10 ** rng.uniform(-6, 0) * 4.0 ** -np.arange(size, dtype=np.float64) for size in sizes
    )
    controller = Critic(shares, one_operand(distortions), ControllerConfig())
    state = controller.initial()
    for _ in range(draw(st.integers(0, 3))):
        draws = [sample(uniform(sizes), rng) for _ in range(4)]
        losses = [float(loss) for loss in rng.exponential(size=4)]
        state = controller.observe(state, draws, losses)
    return controller, state, shares, distortions


@settings(deadline=None, max_examples=100)
@given(made=critics(), progress=st.floats(0, 1))
def test_the_critics_policy_never_leaves_the_budget(
    made: tuple[Critic, CriticState, Vectors, Vectors], progress: float
) -> None:
    controller, state, costs, _ = made
    policy = controller.policy(state, progress)
    assert all(np.isfinite(row).all() for row in policy)
    # Where only the cheapest assignment fits, its cost is 1 to within rounding, and what is
    # left of the others' probability comes on top.
    assert expected_cost(policy, costs) <= 1 + 1e-6


def test_the_critics_policy_spends_the_budget() -> None:
    controller = critic()
    least, most = (sum(float(pick(r)) for r in random_costs(1)) for pick in (min, max))
    assert least < 1 < most
    for progress in (0.0, 0.3, 0.9):
        policy = controller.policy(controller.initial(), progress)
        assert expected_cost(policy, random_costs(1)) == pytest.approx(1.0, abs=1e-9)


def test_the_critics_policy_is_a_boltzmann_distribution_of_loss_and_cost() -> None:
    controller, costs, distortions = critic(), random_costs(1), random_distortions(1)
    state = after_some(controller)
    policy = controller.policy(state, 0.2)
    scale = controller.sensitivities(state)[:, 0]
    # log p(a) - log p(0) = -(l(a) - l(0)) / temperature - multiplier * (c(a) - c(0)), with one
    # temperature and one multiplier for all decisions.
    rows, odds = [], []
    for p, s, e, c in zip(policy, scale, distortions, costs, strict=True):
        for a in range(1, len(p)):
            rows.append([-s * (e[a] - e[0]), -(c[a] - c[0])])
            odds.append(math.log(p[a] / p[0]))
    (cold, multiplier), *_ = np.linalg.lstsq(np.array(rows), np.array(odds), rcond=None)
    assert cold > 0
    assert multiplier >= 0
    np.testing.assert_allclose(np.array(rows) @ [cold, multiplier], odds, atol=1e-9)


def test_the_critics_policy_becomes_deterministic() -> None:
    controller = critic()
    state = after_some(controller)
    entropies = [entropy(controller.policy(state, float(s))) for s in np.linspace(0, 1, 11)]
    assert entropies == sorted(entropies, reverse=True)
    # All decisions but the one that takes what is left of the budget.
    last = sorted(float(row.max()) for row in controller.policy(state, 1.0))
    assert last[1] > 0.99


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_loss_does_not_matter_to_the_critic(scale: float) -> None:
    controller = critic()
    draws = draws_of(uniform(SIZES), 5)
    losses = additive_losses([0.3, 2.0, 1.0], random_distortions(1), draws)
    plain = controller.observe(controller.initial(), draws, losses)
    scaled = controller.observe(controller.initial(), draws, [scale * x for x in losses])
    for ours, theirs in zip(
        controller.policy(plain, 0.3), controller.policy(scaled, 0.3), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_choices_without_distortion_are_no_obstacle() -> None:
    costs = tuple(np.array([0.1, 0.4]) for _ in range(3))
    controller = Critic(costs, tuple(np.zeros((2, 1)) for _ in costs), ControllerConfig())
    state = controller.observe(controller.initial(), [(0, 0, 0), (1, 1, 1)], [1.0, 2.0])
    policy = controller.policy(state, 0.5)
    assert expected_cost(policy, costs) <= 1


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *({"beta": value} for value in (0.0, 1.0, math.nan)),
        *({"learning_rate": value} for value in (0.0, -1.0, math.nan)),
        *({"temperature": value} for value in (0.0, -1.0, math.nan)),
        *({"shrinkage": value} for value in (0.0, -1.0, math.nan)),
        *({"memory": value} for value in (0.0, 1.1, math.nan)),
        *({"baseline_decay": value} for value in (-0.1, 1.1, math.nan)),
        {"entropy_end": -0.1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as error:
        ControllerConfig(**change)  # type: ignore[arg-type]
    assert next(iter(change)) in str(error.value)


# --- do they find what they should? --------------------------------------------------------


def learned(
    controller: Controller[Any],
    utilities: Sequence[npt.NDArray[np.float64]],
    seed: int,
    *,
    steps: int,
    noise: float = 0.1,
) -> Any:
    """The controller's state after a search whose loss is a noisy sum."""
    rng = np.random.default_rng(seed)
    state = controller.initial()
    for step in range(steps):
        policy = controller.policy(state, step / steps)
        draws = [sample(policy, rng) for _ in range(4)]
        level = rng.standard_normal()  # of the batch
        losses = [
            level - total(tuple(utilities), d) + noise * rng.standard_normal() for d in draws
        ]
        state = controller.update(state, draws, losses, step / steps)
    return state


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_finds_the_best_of_every_decision(seed: int) -> None:
    rng = np.random.default_rng([seed, 99])
    best = tuple(int(c) for c in rng.integers(0, 3, 5))
    # Every assignment costs exactly the budget.
    controller = Reinforce(tuple(np.full(3, 0.2) for _ in best), ControllerConfig())
    state = learned(controller, [np.eye(3)[c] for c in best], seed, steps=400)
    policy = controller.policy(state, 1.0)
    assert most_probable(policy) == best
    assert all(p[c] > 0.9 for p, c in zip(policy, best, strict=True))


@pytest.mark.parametrize("seed", range(5))
@both
def test_bits_go_to_the_decisions_that_need_them(seed: int, name: str) -> None:
    """Half of the layers gain much by 8 bits, the others hardly; the budget pays for half."""
    rng = np.random.default_rng([seed, 7])
    needy = rng.permutation(6) < 3
    utilities = [np.array([0.0, 1.0 if need else 0.05]) for need in needy]
    costs = tuple(np.array([16.0, 64.0]) / (6 * 40.0) for _ in needy)
    config = ControllerConfig(beta=-4.0)
    controller: Controller[Any] = (
        Reinforce(costs, config)
        if name == "reinforce"
        else Critic(costs, tuple(np.array([[1.0], [0.0]]) for _ in needy), config)
    )
    state = learned(controller, utilities, seed, steps=400)
    assert project(controller.preferences(state), costs) == tuple(map(int, needy))


def served_gain(seed: int) -> float:
    """What the critic serves: 1 for the best that the budget allows, 0 for the mean."""
    rng = np.random.default_rng([seed, 5])
    bits = np.array([4.0, 5.0, 6.0, 8.0])
    macs = rng.uniform(0.3, 1.0, 5)
    sensitivities = rng.uniform(0.3, 3.0, 5)
    # Each further bit quarters what a layer loses, as quantization noise does.
    distortions = tuple(4.0 ** (4 - bits) for _ in macs)
    utilities = tuple(-s * e for s, e in zip(sensitivities, distortions, strict=True))
    limit = 5.5**2 * float(macs.sum())
    costs = tuple(m * bits**2 / limit for m in macs)
    affordable = [
        total(utilities, choices)
        for choices in itertools.product(range(4), repeat=5)
        if total(costs, choices) <= 1
    ]
    mean = float(np.mean(affordable))
    controller = Critic(costs, one_operand(distortions), ControllerConfig())
    state = learned(controller, utilities, seed, steps=200)
    served = total(utilities, project(controller.preferences(state), costs))
    return (served - mean) / (max(affordable) - mean)


def test_what_the_critic_serves_is_close_to_the_best_that_the_budget_allows() -> None:
    gains = [served_gain(seed) for seed in range(8)]
    assert float(np.mean(gains)) > 0.9
    assert min(gains) > 0.8


# --- operands ------------------------------------------------------------------------------

PAIRS = tuple(itertools.product((4, 5, 6, 8), repeat=2))
"""Bits of weights and of activations."""


def test_each_operand_has_a_sensitivity_of_its_own() -> None:
    rng = np.random.default_rng(0)
    distortions = tuple(rng.uniform(0.0, 1.0, (size, 2)) for size in SIZES)
    controller = Critic(random_costs(), distortions, ControllerConfig(shrinkage=1e-9))
    planted, state = np.array([[0.3, 4.0], [2.0, 0.5], [1.0, 1.0]]), controller.initial()
    for step in range(40):
        draws = draws_of(uniform(SIZES), 8, seed=step)
        losses = [
            sum(float(s @ e[c]) for s, e, c in zip(planted, distortions, a, strict=True))
            for a in draws
        ]
        state = controller.observe(state, draws, losses)
    # Two choices tell only the sum over the operands; more tell them apart.
    found = controller.sensitivities(state)
    np.testing.assert_allclose(found[1:], planted[1:], rtol=1e-6)
    preferences = controller.preferences(state)
    for row, s, e in zip(preferences, planted, distortions, strict=True):
        np.testing.assert_allclose(row - row[0], -(e - e[0]) @ s, atol=1e-6)


def test_an_operand_that_is_not_there_is_no_obstacle() -> None:
    distortions = tuple(np.stack([row, 0 * row], 1) for row in random_distortions(1))
    controller = Critic(random_costs(1), distortions, ControllerConfig())
    policy = controller.policy(after_some(controller), 0.5)
    assert all(np.isfinite(row).all() for row in policy)
    assert expected_cost(policy, random_costs(1)) <= 1 + 1e-9


def served_among_pairs(seed: int, *, summed: bool) -> float:
    """What is served among pairs: 0 for the best that the budget allows, 1 for uniform."""
    rng = np.random.default_rng([seed, 11])
    bits = np.array(PAIRS)
    macs = rng.uniform(0.3, 1.0, 6)
    sensitivities = rng.uniform(0.3, 3.0, 6)[:, None] * rng.lognormal(0, 0.7, (6, 2))
    distortions = 4.0 ** (4.0 - bits)
    utilities = tuple(-distortions @ s for s in sensitivities)
    costs = tuple(m * bits.prod(axis=1) / (5**2 * float(macs.sum())) for m in macs)
    told = distortions.sum(axis=1, keepdims=True) if summed else distortions
    controller = Critic(costs, (told,) * 6, ControllerConfig())
    state = learned(controller, utilities, seed, steps=200)
    served = total(utilities, project(controller.preferences(state), costs))
    best = total(utilities, project([row - row.max() for row in utilities], costs))
    return (best - served) / (best - total(utilities, (PAIRS.index((5, 5)),) * 6))


def test_the_critic_tells_the_operands_of_a_layer_apart() -> None:
    apart, summed = (
        float(np.mean([served_among_pairs(seed, summed=one) for seed in range(4)]))
        for one in (False, True)
    )
    assert apart < 0.2
    assert apart < summed / 2
