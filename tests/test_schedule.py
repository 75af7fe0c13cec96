"""What happens at which step of a search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import ControllerConfig, Method
from onnx_fliqs.schedule import Phase, Schedule
from onnx_fliqs.strategies import Strategy

shares = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    delay, freeze = sorted((draw(shares), draw(shares)))
    strategy = draw(st.sampled_from([Strategy.FLIQS, Strategy.ILP, Strategy.UNIFORM]))
    draws = strategy is Strategy.FLIQS and draw(st.booleans())
    return Schedule.of(
        SearchConfig(
            strategy=strategy,
            steps=draw(st.integers(1, 300)),
            observe=draw(st.floats(0, 2)),
            delay=delay if draws else 0.0,
            freeze=freeze if draws else 0.0,
        )
    )


@given(schedules())
def test_phases_follow_each_other(schedule: Schedule) -> None:
    order = [Phase.DELAY, Phase.SEARCH, Phase.TRAIN]
    phases = [order.index(schedule.phase(step)) for step in range(schedule.steps)]
    assert phases == sorted(phases)
    assert order[phases[-1]] is Phase.TRAIN
    assert phases.count(0) == schedule.delay
    assert schedule.draws == (phases.count(2) < schedule.steps)
    assert schedule.delay <= schedule.look_back <= schedule.freeze


@given(schedules())
def test_the_last_weights_are_measured_and_only_those_of_a_fixed_assignment(
    schedule: Schedule,
) -> None:
    measured = [n for n in range(1, schedule.steps + 1) if schedule.evaluates(n)]
    assert measured[-1] == schedule.steps
    assert len(measured) <= 10
    assert all(schedule.phase(n - 1) is Phase.TRAIN for n in measured)


@given(schedules())
def test_rates_rise_and_fall(schedule: Schedule) -> None:
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    top = rates.index(max(rates))
    assert min(rates) > 0
    assert max(rates) <= schedule.learning_rate
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@given(schedules())
def test_a_policy_cools_until_the_assignment_is_fixed(schedule: Schedule) -> None:
    rounds = [schedule.observed(number) for number in range(schedule.rounds)]
    steps = [schedule.cooled(step) for step in range(schedule.freeze + 1)]
    assert steps[-1] == 1
    assert [*rounds, *steps] == sorted([*rounds, *steps])


@pytest.mark.parametrize("strategy", [Strategy.FLIQS, Strategy.GREEDY])
def test_by_default_formats_are_fixed_before_the_first_step(strategy: Strategy) -> None:
    schedule = Schedule.of(SearchConfig(strategy=strategy, steps=10))
    assert (schedule.freeze, schedule.rounds, schedule.cooled(0)) == (0, 0, 1.0)
    assert {schedule.phase(step) for step in range(10)} == {Phase.TRAIN}
    assert [n for n in range(11) if schedule.evaluates(n)] == [7, 8, 9, 10]


@given(st.integers(1, 3000))
def test_weights_are_looked_for_at_the_same_steps_by_all_strategies(steps: int) -> None:
    looks = [
        [n for n in range(steps + 1) if Schedule.of(config).evaluates(n)]
        for strategy in Strategy
        if strategy is not Strategy.FIXED
        for config in [SearchConfig(strategy=strategy, steps=steps)]
    ]
    assert looks == [looks[0]] * len(looks)
    assert 1 <= len(looks[0]) <= 5
    assert looks[0][-1] == steps


def test_reinforce_observes_nothing() -> None:
    config = SearchConfig(
        steps=100, delay=0.2, freeze=0.75, controller=ControllerConfig(method=Method.REINFORCE)
    )
    schedule = Schedule.of(config)
    assert (schedule.delay, schedule.freeze, schedule.look_back) == (20, 75, 62)
    assert schedule.rounds == 0
    assert schedule.cooled(20) == 0
    assert schedule.cooled(75) == 1
