"""Latency as a cost: what is measured, what explains it, and budgets of it.

No test reads a real clock: a made-up runtime tells how long a graph takes.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

import support
from onnx_fliqs.borders import Border, neighbours, spent
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import (
    ConfigError,
    EnvironmentMissingError,
    FliqsError,
    InfeasibleError,
    RunError,
)
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.latency import Conditions, Estimate, LatencyBorder, LatencyTable
from onnx_fliqs.latency_budget import latency_shares
from onnx_fliqs.latency_profile import ProfileConfig, ProfileProgress, profile
from onnx_fliqs.latency_report import report_latency
from onnx_fliqs.model import fingerprint
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.prepare import synthetic_data
from onnx_fliqs.projection import cheapest, project
from onnx_fliqs.runners import Runtime, runtime_named, runtime_of, time_pairs
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.search_loop import search
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.target_files import parse_target
from onnx_fliqs.targets import TARGETS
from support import STRATEGIES

CHAIN = """
g (float[N,3,8,8] x) => (float[N,4] y) {
    [c1] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
    b = Relu (a)
    [c2] c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (b, w2)
    d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
    [c3] e = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d, w3)
    s = Add (d, e)
    [c4] f = Conv <kernel_shape = [1, 1]> (s, w4)
    p = ReduceMean <axes = [2, 3], keepdims = 0> (f)
    [fc] y = MatMul (p, w5)
}
"""
HEADER = '<ir_version: 8, opset_import: ["" : 13]>'
WEIGHTS = {
    "w1": (6, 3, 3, 3),
    "w2": (6, 6, 3, 3),
    "w3": (6, 6, 3, 3),
    "w4": (5, 6, 1, 1),
    "w5": (5, 4),
}
LAYERS = ("c1", "c2", "c3", "c4", "fc")
WEIGHT_OF = dict(zip(LAYERS, WEIGHTS, strict=True))
SAVED = {"c1": 0.5, "c2": 2.0, "c3": 1.5, "c4": -0.4, "fc": 0.2}
"""Milliseconds that int8 saves."""
FLOAT_MS = 8.0
CROSSING = 0.7
"""Milliseconds for two neighbours of different kinds."""
BORDERS = {("c1", "c2"), ("c2", "c3"), ("c2", "c4"), ("c3", "c4"), ("c4", "fc")}


def chain() -> ir.Model:
    return support.model(CHAIN, header=HEADER, weights=WEIGHTS)


def chain_space() -> SearchSpace:
    target = parse_target("ort-cpu")
    return find_layers(canonicalise(chain()), target, target.space(None))


def true_ms(chosen: Mapping[str, str]) -> float:
    own = sum(SAVED[name] for name, fmt in chosen.items() if fmt == "int8")
    return FLOAT_MS - own + CROSSING * sum(chosen[a] != chosen[b] for a, b in BORDERS)


def every_assignment() -> list[dict[str, str]]:
    rows = itertools.product(("int8", "float32"), repeat=len(LAYERS))
    return [dict(zip(LAYERS, row, strict=True)) for row in rows]


@dataclass
class World:
    """A runtime in which time passes as :func:`true_ms` says, more or less."""

    noise: float = 0.0
    factor: float = 1.0
    """Of everything but the float model."""
    now: float = 0.0
    loaded: list[dict[str, str]] = field(default_factory=list)
    fails_after: float = math.inf
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def clock(self) -> float:
        return self.now

    def load(
        self, model: ir.Model, feeds: Any, threads: int | None, level: OptimizationLevel
    ) -> Callable[[], None]:
        read = {str(node.name): node.inputs[1] for node in model.graph if node.name in LAYERS}
        chosen = {
            name: "float32" if value is not None and value.is_initializer() else "int8"
            for name, value in read.items()
        }
        self.loaded.append(chosen)
        self.now += 0.01
        factor = self.factor if "int8" in chosen.values() else 1.0

        def run() -> None:
            if self.now > self.fails_after:
                raise RuntimeError("out of\nsteam")
            self.now += true_ms(chosen) * factor / 1e3 * self.rng.lognormal(0, self.noise)

        return run

    @property
    def runtime(self) -> Runtime:
        return Runtime("made-up", lambda: "1.0", self.load)


def profiled(
    world: World, config: ProfileConfig | None = None, **options: Any
) -> tuple[LatencyTable, tuple[str, ...]]:
    return profile(chain(), None, config, runtime=world.runtime, clock=world.clock, **options)


def hand_made(of: ir.Model | None = None, **changes: Any) -> LatencyTable:
    """The truth as a table, for the ONNX Runtime of nowhere."""

    def exact(ms: float) -> Estimate:
        return Estimate(ms, ms, ms)

    table = LatencyTable(
        model=fingerprint(of or chain()),
        target="ort-cpu",
        conditions=Conditions(
            runtime="onnxruntime",
            version="0.0",
            machine="an abacus",
            threads=1,
            shapes={"x": (1, 3, 8, 8)},
        ),
        seed=0,
        assignments=32,
        repetitions=320,
        median_error=0.01,
        p90_error=0.04,
        float_model=exact(FLOAT_MS),
        base_ms=FLOAT_MS,
        layers={name: {"int8": exact(-SAVED[name]), "float32": exact(0.0)} for name in LAYERS},
        borders=tuple(LatencyBorder(pair, exact(CROSSING)) for pair in sorted(BORDERS)),
    )
    return replace(table, **changes)


# --- neighbours ----------------------------------------------------------------------------


def test_neighbours_hand_a_quantized_tensor_to_each_other() -> None:
    canonical = canonicalise(chain())
    target = parse_target("ort-cpu")
    space = find_layers(canonical, target, target.space(None))
    names = [decided[0] for decided in space.decisions]
    found = {(names[a], names[b]) for a, b in neighbours(canonical, space)}
    assert found == BORDERS


def test_where_each_layer_quantizes_its_inputs_the_maker_is_a_neighbour() -> None:
    canonical = canonicalise(chain())
    target = parse_target("generic")
    space = find_layers(canonical, target, target.space("int8,float32"))
    names = [decided[0] for decided in space.decisions]
    found = {(names[a], names[b]) for a, b in neighbours(canonical, space)}
    assert {("c1", "c2"), ("c2", "c3")} <= found


# --- timing --------------------------------------------------------------------------------


def test_pairs_are_timed_until_their_ratio_is_known() -> None:
    world = World(noise=0.1)
    fast, slow = (
        world.load(chain_graph(chosen), {}, None, OptimizationLevel.DEFAULT)
        for chosen in ("int8", "float32")
    )
    pairs = time_pairs(slow, fast, seconds=1e9, error=0.01, clock=world.clock)
    assert pairs.error <= 0.01
    assert pairs.ratio == pytest.approx((FLOAT_MS - sum(SAVED.values())) / FLOAT_MS, rel=0.04)
    few = time_pairs(slow, fast, seconds=0, clock=world.clock)
    assert len(few.other) < len(pairs.other)


def chain_graph(fmt: str) -> ir.Model:
    """The chain, with weights that the made-up runtime sees as quantized or not."""
    model = canonicalise(chain())
    if fmt == "int8":
        for node in list(model.graph):
            if node.name in LAYERS:
                made = ir.node("Identity", [node.inputs[1]])
                node.replace_input_with(1, made.outputs[0])
                model.graph.insert_before(node, made)
    return model


def test_a_runtime_that_gives_up_is_reported_in_one_line() -> None:
    with pytest.raises(RunError, match=r"^the runtime gave up .*: out of steam$"):
        profiled(World(fails_after=0.2))


# --- profile -------------------------------------------------------------------------------


def test_latencies_are_said_to_be_those_of_another_runtime_where_the_targets_is_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    monkeypatch.setattr("onnx_fliqs.latency_profile.runtime_of", lambda _: world.runtime)
    for target, expected in (("tensorrt", True), ("ort-cpu", False)):
        config = ProfileConfig(target=target)
        _, warnings = profile(chain(), config=config, clock=world.clock)
        said = any(f"no runtime for {target} is known here" in line for line in warnings)
        assert said is expected


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_table_explains_assignments_that_were_never_measured(noise: float) -> None:
    table, warnings = profiled(World(noise=noise))
    assert warnings == ()
    for chosen in every_assignment():
        assert table.predict(chosen) == pytest.approx(true_ms(chosen), rel=0.03 + noise / 5)
    assert table.p90_error < 0.06
    assert table.float_model.ms == pytest.approx(FLOAT_MS, rel=0.01)
    assert {name: row["float32"].ms for name, row in table.layers.items()} == dict.fromkeys(
        LAYERS, 0.0
    )
    for name in LAYERS:
        assert table.layers[name]["int8"].ms == pytest.approx(-SAVED[name], abs=0.3)
    assert all(border.cost.ms >= 0 for border in table.borders)


def test_entries_of_a_noisy_clock_have_a_wider_spread() -> None:
    def width(noise: float) -> float:
        table, _ = profiled(World(noise=noise), ProfileConfig(seconds=1))
        return sum(row["int8"].high - row["int8"].low for row in table.layers.values())

    assert width(0.3) > 2 * width(0.01)


def test_one_seed_measures_the_same_graphs() -> None:
    first, second, other = World(), World(), World()
    table, _ = profiled(first)
    again, _ = profiled(second)
    profiled(other, ProfileConfig(seed=1))
    assert first.loaded == second.loaded != other.loaded
    assert table == again


def test_time_is_kept_and_too_little_of_it_is_said() -> None:
    world = World()
    table, warnings = profiled(world, ProfileConfig(seconds=0.5))
    assert world.now < 3
    assert table.assignments == 10
    assert warnings[0] == (
        "the table is coarse: there was time for 10 of 33 graphs; give it more --seconds"
    )


def test_a_busy_machine_is_suspected() -> None:
    _, warnings = profiled(World(noise=1.5), ProfileConfig(seconds=1))
    assert any("was the machine busy" in warning for warning in warnings)


def test_progress_counts_graphs() -> None:
    steps: list[ProfileProgress] = []
    profiled(World(), progress=steps.append)
    assert [step.done for step in steps] == list(range(1, 34))
    assert {step.total for step in steps} == {33}
    assert steps[-1].float_ms == pytest.approx(FLOAT_MS)


def test_conditions_are_those_of_the_measurement() -> None:
    config = ProfileConfig(batch_size=4, threads=2)
    table, _ = profiled(World(), config)
    assert table.conditions.shapes == {"x": (4, 3, 8, 8)}
    assert table.batch_size == 4
    assert table.conditions.threads == 2
    assert (table.conditions.runtime, table.conditions.version) == ("made-up", "1.0")


def test_a_batch_size_that_the_model_fixes_is_kept() -> None:
    fixed = support.model(CHAIN.replace("[N,", "[2,"), header=HEADER, weights=WEIGHTS)
    world = World()
    options: dict[str, Any] = {"runtime": world.runtime, "clock": world.clock}
    table, _ = profile(fixed, None, None, **options)
    assert table.batch_size == 2
    with pytest.raises(ConfigError, match="fixes the batch size 2, got 3"):
        profile(fixed, None, ProfileConfig(batch_size=3), **options)


def test_a_space_without_float_is_measured_against_the_float_model() -> None:
    table, _ = profiled(World(), ProfileConfig(space="int8"))
    assert table.borders == ()
    assert table.layers["c1"] == {"int8": Estimate(0.0, 0.0, 0.0)}
    assert table.predict(dict.fromkeys(LAYERS, "int8")) == pytest.approx(
        FLOAT_MS - sum(SAVED.values())
    )
    assert table.float_model.ms == pytest.approx(FLOAT_MS)


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0}, {"seconds": math.nan}, {"threads": 0}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ProfileConfig(**wrong)


# --- the table as a file -------------------------------------------------------------------


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(hand_made().to_json(), encoding="utf-8")
    assert LatencyTable.read(path) == hand_made()
    assert hand_made().digest() == LatencyTable.read(path).digest()
    assert hand_made(base_ms=7.0).digest() != hand_made().digest()


def without(*keys: str) -> str:
    content = json.loads(hand_made().to_json())
    place = content
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return json.dumps(content)


def changed(value: object, *keys: str | int) -> str:
    content = json.loads(hand_made().to_json())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a latency table of schema 2"),
        (changed(1, "schema"), "is not a latency table of schema 2"),
        (without("layers"), "has no 'layers'"),
        (without("conditions", "version"), "has no 'version'"),
        (changed([], "layers"), "is damaged"),
        (changed("fast", "layers", "c1", "int8", "ms"), "'fast' is no number"),
        (changed(float("nan"), "base_ms"), "nan is no finite number"),
        (changed(0, "float_model", "ms"), "a latency of 0 ms"),
        (changed(1.5, "seed"), "1.5 is no whole number"),
        (changed(["c1"], "borders", 0, "layers"), "is damaged"),
        (changed(["c1", "c9"], "borders", 0, "layers"), "'c9', which has no entries"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"^table") as found:
        LatencyTable.from_json(text, "table")
    assert reason in str(found.value)
    assert "\n" not in str(found.value)


def test_a_table_of_something_else_is_refused() -> None:
    space, model = chain_space(), fingerprint(chain())
    hand_made().check(space, model, "ort-cpu")
    layers = dict(hand_made().layers)
    del layers["c3"]
    only_int8 = {name: {"int8": row["int8"]} for name, row in hand_made().layers.items()}
    for table, reason in (
        (hand_made(model="0"), "is of another model"),
        (hand_made(target="generic"), "is of target generic, not ort-cpu"),
        (hand_made(layers=layers), "has no layer 'c3'"),
        (hand_made(layers=only_int8), "has no float32 for layer 'c1'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            table.check(space, model, "ort-cpu")


# --- budgets -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_projection_with_borders_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [("a", "b", "b"), ("a", "b"), ("a", "b", "c"), ("b", "a"), ("a",)]
    costs = tuple(rng.uniform(0.05, 0.4, len(row)) for row in kinds)
    pairs = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4)]
    borders = [Border(a, b, (kinds[a], kinds[b]), rng.uniform(0, 0.2)) for a, b in pairs]
    preferences = [-rng.exponential(size=len(row)) for row in kinds]
    everything = list(itertools.product(*(range(len(row)) for row in kinds)))
    least = min(everything, key=lambda a: spent(costs, borders, a))
    found = cheapest(costs, borders)
    assert found is not None
    assert spent(costs, borders, found) == pytest.approx(spent(costs, borders, least))
    allowed = [a for a in everything if spent(costs, borders, a) <= 1]
    if not allowed:
        with pytest.raises(InfeasibleError):
            project(preferences, costs, 0.0, borders)
        return
    found = project(preferences, costs, 0.0, borders)
    assert spent(costs, borders, found) <= 1

    def merit(choices: tuple[int, ...]) -> float:
        return float(sum(row[c] for row, c in zip(preferences, choices, strict=True)))

    assert merit(found) == pytest.approx(max(map(merit, allowed)))


def test_shares_add_up_to_the_part_of_the_budget_that_is_spent() -> None:
    space, table = chain_space(), hand_made()
    costs, borders = latency_shares(space, Budget(BudgetKind.LATENCY, 0.8), table)
    assert all((row >= 0).all() for row in costs)
    for choices in itertools.product(range(2), repeat=len(LAYERS)):
        chosen = {name: fmt.name for name, fmt in space.assign(choices).items()}
        expected = true_ms(chosen) / (0.8 * FLOAT_MS)
        assert spent(costs, borders, choices) == pytest.approx(expected)


def test_the_least_budget_of_the_message_can_be_met() -> None:
    space, table = chain_space(), hand_made()
    with pytest.raises(InfeasibleError, match=r"reaches --latency 0\.\d+") as found:
        latency_shares(space, Budget(BudgetKind.LATENCY, 0.1), table)
    words = str(found.value).split()
    least = float(words[words.index("--latency", 3) + 1])
    assert least == pytest.approx(min(map(true_ms, every_assignment())) / FLOAT_MS, abs=1e-3)
    latency_shares(space, Budget(BudgetKind.LATENCY, least), table)


def test_a_budget_of_latency_needs_a_table() -> None:
    with pytest.raises(ConfigError, match="--latency needs --latency-table"):
        SearchConfig(budget=Budget(BudgetKind.LATENCY, 0.5))


# --- search --------------------------------------------------------------------------------


def samples(count: int = 24) -> Dataset:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((count, 3, 8, 8)).astype(np.float32)}
    return Dataset(inputs, None, input_specs(chain()))


QUICK = SearchConfig(
    target="ort-cpu", steps=8, batch_size=8, held_out_batch=8, draws=2, workers=1
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fraction", [0.6, 0.85])
def test_a_search_meets_a_budget_of_latency(fraction: float, strategy: Strategy) -> None:
    budget = Budget(BudgetKind.LATENCY, fraction)
    config = replace(QUICK, budget=budget, latency_table=hand_made(), strategy=strategy)
    result = search(chain(), samples(), config)
    truth = true_ms(result.assignment.layers)
    assert truth <= fraction * FLOAT_MS * (1 + 1e-9)
    assert result.latency is not None
    assert result.latency.predicted_ms == pytest.approx(truth)
    assert result.latency.float_ms == FLOAT_MS
    assert result.latency.measured_ms is None
    assert any(
        "latency was not measured: the latency table's runtime is" in text
        for text in result.warnings
    )
    assert result.to_dict()["latency"]["predicted_ms"] == pytest.approx(truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_meets_budgets_of_latency_and_of_size(strategy: Strategy) -> None:
    budgets = (Budget(BudgetKind.SIZE, 2.2), Budget(BudgetKind.LATENCY, 0.8))
    config = replace(QUICK, budget=budgets, latency_table=hand_made(), strategy=strategy)
    result = search(chain(), samples(), config)
    truth = true_ms(result.assignment.layers)
    assert truth <= 0.8 * FLOAT_MS * (1 + 1e-9)
    size, latency = result.budgets
    assert size.used <= 2.2
    assert latency.used == pytest.approx(truth / FLOAT_MS)


def test_beside_another_budget_a_table_only_predicts() -> None:
    config = replace(QUICK, latency_table=hand_made())
    plain = search(chain(), samples(), replace(config, latency_table=None))
    result = search(chain(), samples(), config)
    assert plain.latency is None
    assert plain.to_dict()["latency"] is None
    assert result.assignment == plain.assignment
    assert result.latency is not None
    assert result.latency.predicted_ms == pytest.approx(true_ms(result.assignment.layers))


def test_a_search_does_not_resume_with_another_table(tmp_path: Path) -> None:
    config = replace(QUICK, budget=Budget(BudgetKind.LATENCY, 0.8), latency_table=hand_made())
    search(chain(), samples(), config, checkpoint=tmp_path)
    other = replace(config, latency_table=hand_made(base_ms=7.9))
    with pytest.raises(FliqsError, match="of a search with another settings"):
        search(chain(), samples(), other, checkpoint=tmp_path, resume=True)


# --- predicted beside measured -------------------------------------------------------------


def test_under_the_conditions_of_the_table_latency_is_measured() -> None:
    table, _ = profiled(World())
    slower = World(factor=1.1)
    canonical = canonicalise(chain())
    chosen = dict.fromkeys(LAYERS, "int8")
    report, warnings = report_latency(
        table,
        chosen,
        canonical,
        chain_graph("int8"),
        OptimizationLevel.DEFAULT,
        synthetic_data(canonical, 1, 0),
        runtime=slower.runtime,
        clock=slower.clock,
    )
    assert warnings == ()
    assert report.measured_ms == pytest.approx(1.1 * true_ms(chosen))
    assert report.measured_float_ms == pytest.approx(FLOAT_MS)
    assert report.predicted_ms == table.predict(chosen)
    assert report.runtime == "made-up 1.0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2.0"}, "runtime is made-up 2.0; here it is made-up 1.0"),
        ({"machine": "an abacus"}, "machine is an abacus; here it is"),
        (
            {"shapes": {"x": (1, 3, 9, 9)}},
            r"inputs is x \[1,3,9,9\]; here it is x \[1,3,8,8\]",
        ),
    ],
)
def test_under_other_conditions_it_is_not(changes: dict[str, Any], reason: str) -> None:
    world = World()
    table, _ = profiled(world)
    canonical = canonicalise(chain())
    report, warnings = report_latency(
        replace(table, conditions=replace(table.conditions, **changes)),
        dict.fromkeys(LAYERS, "float32"),
        canonical,
        canonical,
        OptimizationLevel.DEFAULT,
        synthetic_data(canonical, 1, 0),
        runtime=world.runtime,
        clock=world.clock,
    )
    assert report.measured_ms is None
    assert report.measured_float_ms is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(*warnings)


def test_a_runtime_that_fails_at_the_end_costs_no_result() -> None:
    table, _ = profiled(World())
    broken = World(fails_after=0.1)
    canonical = canonicalise(chain())
    report, warnings = report_latency(
        table,
        dict.fromkeys(LAYERS, "float32"),
        canonical,
        canonical,
        OptimizationLevel.DEFAULT,
        synthetic_data(canonical, 1, 0),
        runtime=broken.runtime,
        clock=broken.clock,
    )
    assert report.measured_ms is None
    assert "out of steam" in warnings[0]


# --- command line --------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    ir.save(chain(), path)
    return path


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> World:
    """The command line in a runtime whose time is made up."""
    world = World()
    timed = functools.partial(profile, runtime=world.runtime, clock=world.clock)
    monkeypatch.setattr("onnx_fliqs.latency_profile.profile", timed)
    return world


def test_profile_writes_a_table_that_search_takes(model: Path, made_up: World) -> None:
    path = model.with_name("table.json")
    result = run("profile", model, "-o", path)
    assert result.exit_code == 0, result.output
    for word in ("c1", "int8, ms", "everywhere", "borders", "made-up 1.0", "left-out graphs"):
        assert word in result.stdout
    assert "33/33 graphs" in result.stderr
    result = run(
        *("search", model, "--target", "ort-cpu", "--latency", 0.7, "--latency-table", path),
        *("--steps", 4, "--batch-size", 8, "--threads", 1, "--json"),
    )
    assert result.exit_code == 0, result.output
    latency = json.loads(result.stdout)["latency"]
    assert latency["predicted_ms"] <= 0.7 * latency["float_ms"]
    assert latency["measured_ms"] is None


def test_profile_prints_one_json_object(model: Path, made_up: World) -> None:
    path = model.with_name("table.json")
    result = run("profile", model, "-o", path, "--seconds", 0.5, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == 2
    assert found["output"] == str(path)
    assert found["warnings"]
    assert {"ms", "low", "high"} == set(found["layers"]["c1"]["int8"])
    assert LatencyTable.read(path).assignments == found["assignments"]


def test_predicted_and_measured_are_printed_side_by_side(
    model: Path, made_up: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.with_name("table.json")
    run("profile", model, "-o", path)
    timed = functools.partial(report_latency, runtime=made_up.runtime, clock=made_up.clock)
    monkeypatch.setattr("onnx_fliqs.conclude.report_latency", timed)
    result = run(
        *("search", model, "--target", "ort-cpu", "--latency", 0.7, "--latency-table", path),
        *("--steps", 4, "--batch-size", 8, "--threads", 1),
    )
    assert result.exit_code == 0, result.output
    line = next(x for x in result.stdout.splitlines() if x.startswith("latency"))
    assert "x float), measured" in line
    assert line.endswith("made-up 1.0")


@pytest.mark.parametrize(
    ("code", "options", "reason"),
    [
        (2, ["--latency", 0.7], "--latency needs --latency-table"),
        (2, ["--latency", 0, "--latency-table", "good"], "--latency must be positive"),
        (2, ["--latency", 0.7, "--latency-table", "missing"], "there is no file"),
        (2, ["--latency", 0.7, "--latency-table", "bad"], "is not JSON"),
        (2, ["--latency", 0.7, "--latency-table", "other"], "is of another model"),
        (4, ["--latency", 0.1, "--latency-table", "good"], "this model reaches --latency"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    model: Path, code: int, options: list[object], reason: str
) -> None:
    loaded = ir.load(model)
    texts = {
        "good": hand_made(loaded).to_json(),
        "bad": "{",
        "other": hand_made(model="0").to_json(),
    }
    for name, text in texts.items():
        model.with_name(name).write_text(text, encoding="utf-8")
    arguments = [model.with_name(x) if x in {*texts, "missing"} else x for x in options]
    result = run("search", model, "--target", "ort-cpu", "--steps", 4, *arguments)
    assert result.exit_code == code, result.output
    lines = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not model.with_suffix(".fliqs.onnx").exists()


def test_the_formats_of_the_target_bound_what_can_be_profiled(model: Path) -> None:
    result = run("profile", model, "-o", model.with_name("t"), "--space", "int4")
    assert result.exit_code == 2
    assert "target ort-cpu cannot run int4" in result.stderr
    result = run("profile", model, "-o", model)
    assert result.exit_code == 2
    assert "it would be overwritten" in result.stderr


def test_a_profile_of_a_users_own_is_measured_in_the_runtime_that_it_names() -> None:
    assert runtime_of(TARGETS["ort-cpu"]).name == "onnxruntime"
    assert runtime_of(TARGETS["tensorrt"]).name == "onnxruntime"
    assert runtime_of(replace(TARGETS["openvino"], name="my-npu")).name == "openvino"
    with pytest.raises(EnvironmentMissingError, match="there is no runtime 'abacus'"):
        runtime_named("abacus")
