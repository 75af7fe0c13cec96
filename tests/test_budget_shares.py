"""Several budgets at once: every one is met, by whatever chooses the assignment."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from onnx_fliqs.borders import Border, shares, spent
from onnx_fliqs.budget_shares import budget_reports, budget_shares
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import Choices, ControllerConfig, Method, expected_cost
from onnx_fliqs.cost import Budget, BudgetKind, cost_of
from onnx_fliqs.critic import Critic
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import ConfigError, FliqsError, InfeasibleError, InterruptedSearchError
from onnx_fliqs.model import save_model
from onnx_fliqs.precision import parse_space
from onnx_fliqs.prepare import prepare
from onnx_fliqs.progress import Progress
from onnx_fliqs.projection import LEAST_SPENT, cheapest, project
from onnx_fliqs.reinforce import Reinforce
from onnx_fliqs.report import SearchResult
from onnx_fliqs.search_loop import search
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.strategies import Strategy, greedy_choices, random_choices, uniform_choices
from onnx_fliqs.targets import TARGETS
from support import STRATEGIES

Vectors = tuple[npt.NDArray[np.float64], ...]
Problem = tuple[Vectors, Vectors, tuple[Border, ...]]

ROUNDING = 1e-9


def greedy(table: Vectors, damage: Vectors) -> Choices:
    """From the last choice of each decision."""
    return greedy_choices(tuple(len(row) - 1 for row in table), table, damage)


def total(rows: Vectors, choices: Choices) -> float:
    return sum(float(row[c]) for row, c in zip(rows, choices, strict=True))


def everything(costs: Vectors) -> list[Choices]:
    return list(itertools.product(*(range(len(row)) for row in costs)))


def within(problem: Problem) -> list[Choices]:
    _, costs, borders = problem
    return [x for x in everything(costs) if spent(costs, borders, x) <= 1 + ROUNDING]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Preferences, and costs as shares of two or three budgets; at most 3^5 assignments."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    count = draw(st.integers(2, 3))
    preferences = tuple(rng.standard_normal(size) for size in sizes)
    costs = tuple(rng.uniform(0.05, 1.0, (size, count)) for size in sizes)
    borders = []
    if len(sizes) > 1 and draw(st.booleans()):
        kinds = tuple(tuple(rng.choice(["a", "b"], size)) for size in sizes[:2])
        borders = [Border(0, 1, (kinds[0], kinds[1]), 0.3, budget=draw(st.integers(0, 1)))]
    # Each budget is what some assignments cost, so that about half of them meet it.
    every = [shares(costs, borders, x) for x in everything(costs)]
    limits = np.quantile(every, draw(st.floats(0.2, 0.9)), axis=0)
    scaled = tuple(replace(b, cost=b.cost / limits[b.budget]) for b in borders)
    return preferences, tuple(row / limits for row in costs), scaled


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_the_projection_is_the_best_of_all_assignments(problem: Problem) -> None:
    preferences, costs, borders = problem
    legal = within(problem)
    if not legal:
        with pytest.raises(InfeasibleError):
            project(preferences, costs, 0.0, borders)
        return
    found = project(preferences, costs, 0.0, borders)
    assert spent(costs, borders, found) <= 1 + ROUNDING
    best = max(total(preferences, x) for x in legal)
    assert total(preferences, found) == pytest.approx(best, abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_one_of_the_budgets_is_spent_where_that_can_be(problem: Problem) -> None:
    preferences, costs, borders = problem
    spending = [x for x in within(problem) if spent(costs, borders, x) >= LEAST_SPENT]
    if spending:
        found = project(preferences, costs, borders=borders)
        assert LEAST_SPENT - ROUNDING <= spent(costs, borders, found) <= 1 + ROUNDING
        best = max(total(preferences, x) for x in spending)
        assert total(preferences, found) == pytest.approx(best, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_the_cheapest_in_one_budget_meets_the_others(problem: Problem) -> None:
    _, costs, borders = problem
    legal = [
        x for x in everything(costs) if (shares(costs, borders, x)[1:] <= 1 + ROUNDING).all()
    ]
    found = cheapest(costs, borders)
    assert (found is None) == (not legal)
    if found is not None:
        least = min(shares(costs, borders, x)[0] for x in legal)
        assert shares(costs, borders, found)[0] == pytest.approx(least, abs=1e-6)


def two_budgets(
    macs: Sequence[float], params: Sequence[float], bits: float, size: float
) -> Vectors:
    """Costs of 4, 6 and 8 bits in operations and in bytes."""
    widths = np.array([4.0, 6.0, 8.0])
    operations, weights = sum(macs) * bits**2, sum(params) * 8 * size
    return tuple(
        np.stack([m * widths**2 / operations, p * widths / weights], axis=1)
        for m, p in zip(macs, params, strict=True)
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    layers=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=9),
    bits=st.floats(4.2, 8.0),
    size=st.floats(0.52, 1.0),
    seed=st.integers(0, 1000),
)
def test_every_baseline_meets_both_budgets(
    layers: list[tuple[int, int]], bits: float, size: float, seed: int
) -> None:
    table = two_budgets(
        [float(a) for a, _ in layers], [float(b) for _, b in layers], bits, size
    )
    rng = np.random.default_rng(seed)
    damage = tuple(np.sort(rng.random(3))[::-1] for _ in layers)
    for chosen in (
        greedy(table, damage),
        uniform_choices(
            table,
            [(level,) * len(layers) for level in range(3)],
            [np.arange(3.0)[::-1, None]] * len(layers),
        ),
        random_choices(table, rng),
    ):
        assert (shares(table, (), chosen) <= 1 + ROUNDING).all()


def test_greed_lowers_what_the_exceeded_budget_counts() -> None:
    # The first layer has no weights: only the second can make the model smaller.
    table = two_budgets([100.0, 1.0], [0.0, 100.0], 8.0, 0.6)
    damage = (np.array([0.2, 0.1, 0.0]), np.array([9.0, 8.0, 0.0]))
    assert greedy((table[0][:, :1], table[1][:, :1]), damage) == (2, 2)
    assert greedy(table, damage) == (2, 0)


def test_greed_passes_over_steps_that_save_nothing() -> None:
    # int8:int8, then int8:int4 with weights as large, then int4:int8.
    row = np.array([0.2, 0.8, 0.8])
    assert greedy((row, row), (np.array([2.0, 1, 0]), np.array([3.0, 1, 0]))) == (0, 2)


def test_greed_ends_where_budgets_contradict_each_other() -> None:
    row = np.array([[1.2, 0.5], [0.5, 1.2]])
    with pytest.raises(InfeasibleError, match="step by step"):
        greedy((row,), (np.array([0.1, 0.0]),))


def test_one_column_is_one_budget() -> None:
    rng = np.random.default_rng(1)
    costs = tuple(np.sort(rng.uniform(0.1, 0.6, 3)) for _ in range(4))
    columns = tuple(row[:, None] for row in costs)
    damage = tuple(np.sort(rng.random(3))[::-1] for _ in costs)
    told = tuple(row[:, None] for row in damage)
    config = ControllerConfig()
    assert project(damage, costs) == project(damage, columns)
    assert greedy(costs, damage) == greedy(columns, damage)
    for first, second in (
        (Critic(costs, told, config), Critic(columns, told, config)),
        (Reinforce(costs, config), Reinforce(columns, config)),
    ):
        draws: list[Choices] = [(0, 1, 2, 0), (2, 1, 0, 0), (1, 1, 1, 1)]
        policies = [
            each.policy(each.update(each.initial(), draws, [0.3, 0.1, 0.2], 0.5), 0.5)  # type: ignore[arg-type]
            for each in (first, second)
        ]
        for mine, theirs in zip(*policies, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_critics_policy_meets_both_budgets(progress: float) -> None:
    rng = np.random.default_rng(2)
    macs, params = 10 ** rng.uniform(-2, 0, (2, 20))
    table = two_budgets(list(macs), list(params), 5.5, 0.65)
    falling = np.array([[1.0], [1 / 16], [1 / 256]])
    distortions = tuple(rng.lognormal(0, 1) * falling for _ in table)
    critic = Critic(table, distortions, ControllerConfig())
    policy = critic.policy(critic.initial(), progress)
    assert expected_cost(policy, table) <= 1 + 1e-6
    for column in range(2):
        alone = tuple(row[:, column] for row in table)
        assert expected_cost(policy, alone) == pytest.approx(1, abs=1e-6)


def test_reinforce_is_rewarded_by_the_budget_that_binds() -> None:
    table = (np.array([[0.5, 0.1], [1.0, 0.2], [1.5, 0.3]]),)
    alone = (table[0][:, 0],)
    config = ControllerConfig(method=Method.REINFORCE)
    draws: list[Choices] = [(0,), (1,), (2,)]
    states = [
        each.update(each.initial(), draws, [0.1, 0.1, 0.1], 0.0)
        for each in (Reinforce(table, config), Reinforce(alone, config))
    ]
    np.testing.assert_array_equal(states[0].logits[0], states[1].logits[0])
    assert np.argmax(states[0].logits[0]) == 1


# --- of a model ----------------------------------------------------------------------------

NETWORK = """g (float[N,4,16] x) => (float[N,5] y) {
    [conv] a = Conv <kernel_shape = [3], pads = [1, 1]> (x, w1)
    b = Relu (a)
    [wide] c = Conv <kernel_shape = [1]> (b, w2)
    d = Relu (c)
    e = Flatten (d)
    [fc] f = Gemm (e, w3, b3)
    h = Relu (f)
    [head] y = Gemm (h, w4, b4) }"""
WEIGHTS = {"w1": (8, 4, 3), "w2": (8, 8, 1), "w3": (128, 20), "b3": (20,)}
WEIGHTS |= {"w4": (20, 5), "b4": (5,)}
BOTH = (Budget(BudgetKind.BITS, 5.5), Budget(BudgetKind.SIZE, 0.6))
QUICK = SearchConfig(
    space="int4,int5,int6,int8",
    budget=BOTH,
    steps=12,
    batch_size=8,
    held_out_batch=8,
    draws=2,
    workers=1,
)


def network() -> ir.Model:
    return support.model(NETWORK, weights=WEIGHTS)


def samples(count: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 4, 16)).astype(np.float32)
    return Dataset({"x": x}, rng.integers(0, 5, count), input_specs(network()))


def network_space(text: str = "int4,int5,int6,int8") -> SearchSpace:
    return prepare(network(), samples(), TARGETS["generic"], parse_space(text)).space


def test_shares_are_those_of_each_budget() -> None:
    space = network_space()
    costs, borders = budget_shares(space, BOTH, None)
    assert borders == ()
    choices = (3, 1, 0, 2)
    cost = cost_of(space, space.assign(choices))
    params = sum(layer.params for layer in space.layers)
    np.testing.assert_allclose(
        shares(costs, borders, choices),
        [cost.effective_bits**2 / 5.5**2, cost.weight_bytes / (0.6 * params)],
    )
    bits, size = budget_reports(BOTH, costs, borders, choices)
    assert (bits.kind, bits.value) == ("bits", 5.5)
    assert bits.used == pytest.approx(cost.effective_bits)
    assert size.used == pytest.approx(cost.weight_bytes / params)


def test_the_least_that_a_message_names_can_be_met() -> None:
    # Precisions that are cheap in operations or in bytes, not in both.
    space = network_space("int4:int16,int8:int4")
    bits = Budget(BudgetKind.BITS, 6.0)
    for budget in (bits, Budget(BudgetKind.SIZE, 0.5)):
        budget_shares(space, (budget,), None)
    with pytest.raises(
        InfeasibleError, match="cannot be met together with --bits 6:"
    ) as found:
        budget_shares(space, (bits, Budget(BudgetKind.SIZE, 0.5)), None)
    words = str(found.value).split()
    assert words[:3] == ["budget", "--size", "0.5"]
    least = float(words[words.index("reaches") + 2])
    assert 0.5 < least < 1
    budget_shares(space, (bits, Budget(BudgetKind.SIZE, least)), None)
    with pytest.raises(InfeasibleError):
        budget_shares(space, (bits, Budget(BudgetKind.SIZE, least - 1e-3)), None)


def assert_within(result: SearchResult) -> None:
    used = {budget.kind: budget.used / budget.value for budget in result.budgets}
    assert set(used) == {"bits", "size"}
    assert max(used.values()) <= 1 + ROUNDING
    assert result.cost.effective_bits == pytest.approx(5.5 * used["bits"])
    params = sum(layer.params for layer in result.layers)
    assert result.cost.weight_bytes / params == pytest.approx(0.6 * used["size"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_meets_both_budgets(strategy: Strategy) -> None:
    seen: list[Progress] = []
    result = search(
        network(), samples(), replace(QUICK, strategy=strategy), progress=seen.append
    )
    assert_within(result)
    largest = max((b.used / b.value) ** (2 if b.kind == "bits" else 1) for b in result.budgets)
    assert seen[-1].cost == pytest.approx(largest)
    found = json.loads(json.dumps(result.to_dict()))["budgets"]
    assert [(b["kind"], b["value"]) for b in found] == [("bits", 5.5), ("size", 0.6)]


def test_reinforce_meets_both_budgets() -> None:
    config = replace(QUICK, controller=ControllerConfig(method=Method.REINFORCE), freeze=0.75)
    assert_within(search(network(), samples(), config))


def test_a_budget_that_is_slack_changes_nothing() -> None:
    config, bits = QUICK, Budget(BudgetKind.BITS, 5.5)
    alone = search(network(), samples(), replace(config, budget=bits))
    beside = search(
        network(), samples(), replace(config, budget=(bits, Budget(BudgetKind.SIZE, 2.0)))
    )
    assert beside.assignment == alone.assignment
    assert beside.loss == alone.loss
    assert len(alone.budgets) == 1


def test_a_search_within_two_budgets_resumes_to_the_same_result(tmp_path: Path) -> None:
    def stop(report: Progress) -> None:
        if report.step == 7 and report.phase.trains:
            raise KeyboardInterrupt

    config = replace(QUICK, checkpoint_every=1)
    whole = search(network(), samples(), config)
    with pytest.raises(InterruptedSearchError):
        search(network(), samples(), config, checkpoint=tmp_path, progress=stop)
    other = replace(config, budget=BOTH[:1])
    with pytest.raises(FliqsError, match="of a search with another settings"):
        search(network(), samples(), other, checkpoint=tmp_path, resume=True)
    again = search(network(), samples(), config, checkpoint=tmp_path, resume=True)
    assert again.assignment == whole.assignment
    assert again.loss == whole.loss


def test_a_budget_of_a_kind_is_given_once() -> None:
    with pytest.raises(ConfigError, match="one budget of a kind: got --bits 5 --bits 6"):
        SearchConfig(budget=(Budget(BudgetKind.BITS, 5), Budget(BudgetKind.BITS, 6)))
    assert SearchConfig(budget=()).budgets == SearchConfig().budgets == ()


@pytest.mark.parametrize(
    ("size", "code", "text"),
    [(0.6, 0, "of --bits 5.5, 0."), (0.2, 4, "budget --size 0.2 cannot be met")],
)
def test_the_command_line_takes_several(
    tmp_path: Path, size: float, code: int, text: str
) -> None:
    path = tmp_path / "model.onnx"
    save_model(network(), path)
    np.savez(tmp_path / "data.npz", x=samples().stored_inputs["x"])
    found = CliRunner().invoke(
        main,
        [
            *("search", str(path), "--data", str(tmp_path / "data.npz")),
            *("--space", "int4,int5,int6,int8", "--bits", "5.5", "--size", str(size)),
            *("--steps", "4", "--batch-size", "8", "--threads", "1"),
        ],
    )
    assert found.exit_code == code, found.output
    assert text in (found.stdout if code == 0 else found.stderr)
