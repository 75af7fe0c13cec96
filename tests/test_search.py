"""The search from end to end: budgets, the same bytes, interruptions, and refusals."""

import functools
import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_fliqs
import support
from onnx_fliqs import api
from onnx_fliqs.api import emit
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import ControllerConfig, Method, Signal
from onnx_fliqs.cost import Budget, BudgetKind, cost_of
from onnx_fliqs.critic import Critic, CriticState
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.errors import (
    ConfigError,
    DataError,
    FliqsError,
    InfeasibleError,
    InterruptedSearchError,
    ModelError,
    UnsupportedError,
)
from onnx_fliqs.evaluation import evaluate_model
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import LossKind
from onnx_fliqs.precision import parse_precision, parse_space, separated
from onnx_fliqs.prepare import prepare
from onnx_fliqs.progress import Progress
from onnx_fliqs.report import SearchResult
from onnx_fliqs.schedule import Phase
from onnx_fliqs.search_loop import search
from onnx_fliqs.search_setup import set_up
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.target_files import parse_target
from onnx_fliqs.targets import TARGETS
from onnx_fliqs.train_step import Batch, TrainState, TrainStep

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "examples" / "digits_cnn.onnx"
TRAIN = ROOT / "examples" / "digits_train.npz"
TEST = ROOT / "examples" / "digits_test.npz"

QUICK = SearchConfig(
    space="int4,int6,int8",
    steps=24,
    batch_size=16,
    held_out_batch=16,
    draws=2,
    observe=0.5,
    workers=1,
    seed=3,
)
SMALL = SearchConfig(steps=8, batch_size=8, held_out_batch=8, draws=2, workers=1)

MLP = (
    "g (float[N,4] x) => (float[N,3] y) { h = Gemm (x, w, b) r = Relu (h) y = MatMul (r, v) }"
)
MLP_WEIGHTS = {"w": (4, 6), "b": (6,), "v": (6, 3)}


@functools.cache
def digits(samples: int = 300) -> Dataset:
    data = load_npz(TRAIN, input_specs(load_model(DIGITS)))
    return data.take(np.arange(samples))


def mlp() -> ir.Model:
    return support.model(MLP, weights=MLP_WEIGHTS)


def samples(
    model: ir.Model, count: int = 40, *, labels: bool = True, seed: int = 0
) -> Dataset:
    rng = np.random.default_rng(seed)
    specs = input_specs(model)
    inputs = {
        spec.name: rng.standard_normal((count, *(d or 1 for d in (spec.shape or ())[1:])))
        for spec in specs
    }
    return Dataset(inputs, rng.integers(0, 3, count) if labels else None, specs)


def written(result: SearchResult) -> tuple[bytes, str]:
    """What would lie in the two files."""
    return ir.to_proto(result.model).SerializeToString(), result.assignment.to_json()


def saved(result: SearchResult, folder: Path) -> tuple[bytes, bytes]:
    output = folder / "out.onnx"
    assignment = result.save(output)
    return output.read_bytes(), assignment.read_bytes()


def assert_sound(result: SearchResult) -> None:
    """Valid ONNX that runs at the level it asks for, and a report that is JSON."""
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    assert support.formats(result) == dict(result.assignment.layers)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["schema"] == 1


def share_of(
    result: SearchResult, budget: Budget, space: str, target: str = "generic"
) -> float:
    """The cost of a result as a share of a budget on the digits."""
    prepared = prepare(
        load_model(DIGITS), digits(), parse_target(target), parse_space(space)
    ).space
    cost = cost_of(prepared, result.assignment.precisions(prepared))
    spent = cost.weight_bytes if budget.kind is BudgetKind.SIZE else cost.bops
    return spent / budget.limit(prepared)


def never(report: Progress) -> None:
    raise AssertionError(f"{report.phase.value} began")


class Recorder:
    """Collects the progress, and may stop the search at a step."""

    def __init__(self, stop: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.measured: list[Progress] = []
        self.rounds: list[Progress] = []
        self.reports: list[Progress] = []
        self._stop, self._error = stop, error

    def __call__(self, report: Progress) -> None:
        if not report.phase.trains:
            (self.rounds if report.phase is Phase.OBSERVE else self.measured).append(report)
            return
        self.reports.append(report)
        if report.step == self._stop:
            raise self._error


# --- the result ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick() -> SearchResult:
    return search(DIGITS, digits(), QUICK)


def test_a_search_on_the_example_keeps_its_quality_within_its_budget() -> None:
    budget = Budget(BudgetKind.BITS, 4.5)
    config = SearchConfig(steps=60, batch_size=32, budget=budget, workers=2)
    recorder = Recorder()
    result = search(DIGITS, TRAIN, config, progress=recorder)
    assert_sound(result)
    assert 0.98 <= share_of(result, budget, "int-l") <= 1.0
    assert 4.5 * 0.98 <= result.cost.effective_bits <= 4.5
    assert result.metric == "accuracy"
    assert result.float_quality > 0.95
    assert result.quantized_quality > 0.9
    assert result.warnings == ()
    test = load_npz(TEST, input_specs(result.model))
    assert evaluate_model(result.model, test).value > 0.9
    assert [report.step for report in recorder.reports] == list(range(1, 61))


@pytest.mark.parametrize(
    ("kind", "value"), [(BudgetKind.BITS, 6.0), (BudgetKind.BOPS, 0.3), (BudgetKind.SIZE, 0.6)]
)
def test_every_kind_of_budget_is_met(kind: BudgetKind, value: float) -> None:
    budget = Budget(kind, value)
    result = search(DIGITS, digits(), replace(QUICK, budget=budget, observe=0.0))
    assert 0.98 <= share_of(result, budget, "int-l") <= 1.0


@pytest.mark.parametrize("value", [4.0, 8.0, 20.0])
def test_budgets_at_and_beyond_the_ends_of_the_space_are_met(value: float) -> None:
    model = mlp()
    result = search(
        model, samples(model), replace(SMALL, budget=Budget(BudgetKind.BITS, value))
    )
    expected = {4.0: 4.0, 8.0: 8.0, 20.0: 8.0}[value]
    assert result.cost.effective_bits == expected


def test_the_least_budget_that_the_message_names_can_be_searched() -> None:
    model, config = mlp(), replace(SMALL, space="int5,int8")
    with pytest.raises(InfeasibleError) as error:
        search(model, None, replace(config, budget=Budget(BudgetKind.BOPS, 0.1)))
    typed = float(str(error.value).split("--bops ")[-1].split(" to ")[0])
    result = search(
        model, samples(model), replace(config, budget=Budget(BudgetKind.BOPS, typed))
    )
    assert set(result.assignment.layers.values()) == {"int5"}


@pytest.mark.parametrize("space", ["fp-l", "int4,int8,e4m3", "fp-s", "int4,bf16,float32"])
def test_every_kind_of_space_is_searched(space: str) -> None:
    result = search(DIGITS, digits(), replace(QUICK, space=space, steps=12))
    assert_sound(result)
    names = {fmt.name for fmt in separated(parse_space(space), left=False)}
    assert set(result.assignment.layers.values()) <= names
    assert result.verification.searched is not None
    assert result.verification.searched.rms < 1e-3


def test_a_space_of_one_format_is_that_format() -> None:
    result = search(DIGITS, digits(), replace(QUICK, space="int6", steps=6))
    assert set(result.assignment.layers.values()) == {"int6"}
    assert result.cost.effective_bits == 6


@pytest.mark.parametrize(("bits", "uniform"), [(None, True), (12.0, False)])
def test_the_ort_cpu_target_gets_what_it_runs(bits: float | None, uniform: bool) -> None:
    budget = None if bits is None else Budget(BudgetKind.BITS, bits)
    result = search(
        DIGITS, digits(), replace(QUICK, target="ort-cpu", space=None, budget=budget)
    )
    assert_sound(result)
    used = set(result.assignment.layers.values())
    assert used <= set(TARGETS["ort-cpu"].precisions or ())
    assert (used == {"int8"}) == uniform
    assert result.assignment.target == "ort-cpu"
    assert result.quantized_quality > 0.9


def test_the_progress_tells_the_phases_in_order() -> None:
    recorder = Recorder()
    draws = replace(QUICK, delay=0.2, freeze=0.75)
    search(DIGITS, digits(), draws, progress=recorder)
    reports = recorder.reports
    assert [report.step for report in reports] == list(range(1, 25))
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == [Phase.DELAY, Phase.SEARCH, Phase.TRAIN]
    assert sorted(reports, key=lambda r: phases.index(r.phase)) == reports
    for report in reports:
        assert report.steps == 24
        assert np.isfinite(report.loss)
        judged = report.phase is not Phase.TRAIN or report.quality is not None
        assert np.isfinite(report.held_out) == judged
        assert report.cost > 0
        assert report.entropy >= 0
        if report.phase is not Phase.TRAIN:
            assert report.quality is None
    frozen = [r for r in reports if r.phase is Phase.TRAIN]
    assert all(r.cost <= 1.000001 for r in frozen)
    assert frozen[-1].quality is not None
    assert 0 <= frozen[-1].quality <= 1


@pytest.mark.parametrize("strategy", list(Strategy))
def test_by_default_nothing_is_delayed(strategy: Strategy, quick: SearchResult) -> None:
    assignment = quick.assignment if strategy is Strategy.FIXED else None
    config = replace(SMALL, strategy=strategy, assignment=assignment)
    recorder = Recorder()
    search(DIGITS, digits(), config, progress=recorder)
    phases = [report.phase for report in recorder.reports]
    assert phases == [Phase.TRAIN] * 8
    measures = strategy in (Strategy.FLIQS, Strategy.ILP, Strategy.GREEDY)
    counts = [(report.step, report.steps) for report in recorder.measured]
    assert bool(counts) == measures
    assert counts == [(n, len(counts)) for n in range(1, len(counts) + 1)]


def test_a_search_that_resumes_measures_nothing_again(
    quick: SearchResult, tmp_path: Path
) -> None:
    folder, recorder = tmp_path / "c", Recorder()
    with pytest.raises(InterruptedSearchError):
        search(DIGITS, digits(), QUICK, checkpoint=folder, progress=Recorder(1))
    resumed = search(
        DIGITS, digits(), QUICK, checkpoint=folder, resume=True, progress=recorder
    )
    assert not recorder.measured
    assert written(resumed) == written(quick)


class Told:
    """Whether weights had changed when the critic was told; ``stop``: Ctrl-C before that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.trained: list[bool] = []
        self.updates = 0
        observe, losses = Critic.observe, TrainStep.losses

        def counted(critic: Critic, *args: Any) -> CriticState:
            if stop is not None and len(self.trained) == stop:
                raise KeyboardInterrupt
            self.trained.append(self.updates > 0)
            return observe(critic, *args)

        def watched(step: TrainStep, state: TrainState, *args: Any) -> list[float]:
            self.updates = state.updates
            return losses(step, state, *args)

        monkeypatch.setattr(Critic, "observe", counted)
        monkeypatch.setattr(TrainStep, "losses", watched)


@pytest.mark.parametrize("freeze", [0.0, 0.5])
@pytest.mark.parametrize(("observe", "rounds"), [(0.0, 0), (0.5, 4), (1.5, 12)])
def test_the_critic_observes_before_anything_trains(
    observe: float, rounds: int, freeze: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, recorder = Told(monkeypatch), Recorder()
    config = replace(SMALL, freeze=freeze, observe=observe)
    search(DIGITS, digits(), config, progress=recorder)
    assert [report.step for report in recorder.rounds] == list(range(1, rounds + 1))
    for report in recorder.rounds:
        assert report.steps == rounds
        assert np.isfinite([report.held_out, report.cost, report.entropy]).all()
    # Where weights train on draws, the critic goes on learning in the four steps of the search
    # phase, of which the first trains before it scores.
    assert told.trained == [False] * rounds + [True] * (4 if freeze else 0)


def test_a_search_that_is_interrupted_while_it_observes_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, observe=0.5)
    with monkeypatch.context() as context:
        Told(context, stop=2)
        with pytest.raises(InterruptedSearchError, match="before the first step"):
            search(DIGITS, digits(), config, checkpoint=tmp_path)
    resumed = search(DIGITS, digits(), config, checkpoint=tmp_path, resume=True)
    assert written(resumed) == written(search(DIGITS, digits(), config))


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("draws", [2, 3])
def test_every_method_ends_in_the_budget(method: Method, draws: int) -> None:
    config = replace(
        QUICK, draws=draws, controller=ControllerConfig(method=method), steps=12, freeze=0.75
    )
    budget = Budget(BudgetKind.BITS, 5.0)
    result = search(DIGITS, digits(), replace(config, budget=budget))
    # The critic leaves a few per cent of the budget of so small a network, where what would
    # spend them is predicted to be worse.
    least = 0.98 if method is Method.REINFORCE else 0.9
    assert least <= share_of(result, budget, "int-l") <= 1.0


@pytest.mark.parametrize(
    "strategy", [s for s in Strategy if s not in (Strategy.FLIQS, Strategy.FIXED)]
)
def test_a_baseline_chooses_before_training(strategy: Strategy, tmp_path: Path) -> None:
    budget = Budget(BudgetKind.BITS, 5.0)
    config = replace(QUICK, strategy=strategy, budget=budget)
    recorder = Recorder()
    result = search(DIGITS, digits(), config, progress=recorder)
    assert_sound(result)
    assert {report.phase for report in recorder.reports} == {Phase.TRAIN}
    assert result.entropy is None
    assert result.to_dict()["strategy"] == strategy.value
    cost = share_of(result, budget, "int-l")
    formats = set(result.assignment.layers.values())
    if strategy is Strategy.UNIFORM:
        assert len(formats) == 1
    else:
        assert len(formats) > 1
        assert cost > 0.9
    assert cost <= 1
    # Stopped and resumed, it is the same search.
    with pytest.raises(InterruptedSearchError):
        search(DIGITS, digits(), config, checkpoint=tmp_path, progress=Recorder(stop=13))
    resumed = search(DIGITS, digits(), config, checkpoint=tmp_path, resume=True)
    assert written(resumed) == written(result)


@pytest.mark.parametrize("strategy", [Strategy.FLIQS, Strategy.UNIFORM, Strategy.GREEDY])
@pytest.mark.parametrize("separate", [False, True])
def test_formats_of_as_many_bits_are_told_apart_by_what_they_do(
    strategy: Strategy, separate: bool
) -> None:
    """Of as many bits, e5m2 rounds the most coarsely, but stands last in its space."""
    budget = Budget(BudgetKind.BITS, 8.0)
    config = replace(
        SMALL, space="e3m4,e5m2", separate=separate, strategy=strategy, budget=budget
    )
    result = search(DIGITS, digits(), config)
    assert set(result.assignment.layers.values()) == {"e3m4"}


def test_a_given_assignment_is_trained_in_all_steps(
    quick: SearchResult, tmp_path: Path
) -> None:
    config = replace(QUICK, space=None, strategy=Strategy.FIXED, assignment=quick.assignment)
    recorder = Recorder()
    result = search(DIGITS, digits(), config, progress=recorder)
    assert_sound(result)
    assert result.assignment == quick.assignment
    assert result.cost == quick.cost
    assert {report.phase for report in recorder.reports} == {Phase.TRAIN}
    assert [report.cost for report in recorder.reports] == pytest.approx([1.0] * 24)
    assert result.entropy is None
    assert result.to_dict()["strategy"] == "fixed"
    with pytest.raises(InterruptedSearchError):
        search(DIGITS, digits(), config, checkpoint=tmp_path, progress=Recorder(stop=13))
    resumed = search(DIGITS, digits(), config, checkpoint=tmp_path, resume=True)
    assert written(resumed) == written(result)
    # A checkpoint of another assignment is another search.
    layers = dict.fromkeys(quick.assignment.layers, "int4")
    other = replace(config, assignment=Assignment(layers))
    with pytest.raises(InterruptedSearchError):
        search(DIGITS, digits(), config, checkpoint=tmp_path, progress=Recorder(stop=13))
    with pytest.raises(FliqsError, match="another settings"):
        search(DIGITS, digits(), other, checkpoint=tmp_path, resume=True)


def test_a_uniform_assignment_trains_as_the_uniform_strategy_does() -> None:
    model = mlp()
    config = replace(SMALL, space="int5", strategy=Strategy.UNIFORM)
    uniform = search(model, samples(model), config)
    given = replace(
        SMALL, strategy=Strategy.FIXED, assignment=Assignment(dict(uniform.assignment.layers))
    )
    assert written(search(model, samples(model), given)) == written(uniform)


def test_what_a_target_leaves_in_float_stays_so_for_another_one() -> None:
    """Its assignment is also what the same search would train again."""
    result = search(DIGITS, digits(64), replace(SMALL, steps=2, target="tensorrt"))
    left = {item.name for item in result.skipped}
    assert left
    assert all(result.assignment.layers[name] == "float32" for name in left)
    assert result.trained is not None
    emitted = api.emit(result.trained, result.assignment, digits(64), target="generic")
    assert emitted.assignment.layers == result.assignment.layers
    again = replace(SMALL, steps=2, strategy=Strategy.FIXED, assignment=result.assignment)
    assert search(DIGITS, digits(64), again).assignment == result.assignment


def test_an_assignment_brings_its_target_and_its_float_layers() -> None:
    model = mlp()
    names = list(search(model, samples(model), SMALL).assignment.layers)
    for layers in (
        dict.fromkeys(names, "float32"),
        {names[0]: "int8", names[1]: "float32"},
    ):
        assignment = Assignment(layers, "ort-cpu")
        config = replace(SMALL, strategy=Strategy.FIXED, assignment=assignment)
        result = search(model, samples(model), config)
        assert result.assignment == assignment
        assert_sound(result)
    elsewhere = replace(config, target="generic")
    assert search(model, samples(model), elsewhere).assignment.target == "generic"


@pytest.mark.parametrize(
    ("layers", "target", "words"),
    [
        ({}, "generic", "no format for layer"),
        ({"nowhere": "int8"}, "generic", "layer 'nowhere', which the model does not have"),
        ({"nowhere": "int4"}, "ort-cpu", "ort-cpu cannot run int4"),
        ({}, "my-npu", "target 'my-npu', which is none of"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused(
    layers: dict[str, str], target: str, words: str
) -> None:
    model = mlp()
    names = list(search(model, samples(model), SMALL).assignment.layers)
    if layers:
        layers = dict.fromkeys(names, "int8") | layers
    config = replace(SMALL, strategy=Strategy.FIXED, assignment=Assignment(layers, target))
    with pytest.raises(ConfigError, match=words):
        search(model, samples(model), config, progress=never)


def test_a_search_that_ends_too_early_says_so() -> None:
    recorder = Recorder()
    budget = Budget(BudgetKind.BITS, 2.1)
    config = replace(QUICK, space="int2,int3", budget=budget, freeze=0.75)
    result = search(DIGITS, digits(), config, progress=recorder)
    assert result.convergence is not None
    assert not result.convergence.converged
    assert "only 6 steps" in result.warnings[-1]
    report = result.to_dict()["convergence"]
    assert not report["converged"]
    curves = report["curves"]
    assert curves["step"] == tuple(range(-11, 25))
    reports = [*recorder.rounds, *recorder.reports]
    for name in ("loss", "held_out", "cost", "entropy"):
        told = [getattr(report, name) for report in reports]
        known = [math.nan if value is None else value for value in curves[name]]
        assert known == pytest.approx(told, nan_ok=True)


def test_what_loses_nothing_has_converged(quick: SearchResult) -> None:
    assert quick.quantized_quality == quick.float_quality
    assert quick.convergence is not None
    assert quick.convergence.converged
    assert quick.warnings == ()


def test_a_model_in_memory_is_left_as_it_is() -> None:
    model = mlp()
    before = support.serialized(ir.to_proto(model))
    result = search(model, samples(model), SMALL)
    assert support.serialized(ir.to_proto(model)) == before
    assert_sound(result)


def test_a_saved_result_is_read_again(quick: SearchResult, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    assignment = quick.save(output)
    assert assignment == tmp_path / "out.assignment.json"
    assert Assignment.read(assignment) == quick.assignment
    data = load_npz(TEST, input_specs(load_model(output)))
    assert evaluate_model(load_model(output), data).value > 0.8
    named = quick.save(output, tmp_path / "other.json")
    assert named.read_bytes() == assignment.read_bytes()
    report = quick.to_dict(output, named)
    assert report["output"] == str(output)
    assert report["assignment"] == str(named)


def test_the_report_adds_up(quick: SearchResult) -> None:
    report = quick.to_dict()
    assert report["schema"] == 1
    assert report["seed"] == 3
    assert report["steps"] == 24
    assert report["quality"]["metric"] == "accuracy"
    assert sum(layer["share"] for layer in report["layers"]) == pytest.approx(1.0)
    chosen = [parse_precision(layer["format"]) for layer in report["layers"]]
    assert report["cost"]["bops"] == sum(
        layer["macs"] * precision.weights.bits * precision.activations.bits
        for layer, precision in zip(report["layers"], chosen, strict=True)
    )
    for layer, precision in zip(report["layers"], chosen, strict=True):
        assert layer["bits"] == precision.weights.bits
        assert layer["trained"]
        assert layer["reason"] is None
    json.dumps(report, allow_nan=False)


def test_the_loss_is_told_before_and_after_training() -> None:
    data = replace(digits(), stored_labels=None)
    result = search(DIGITS, data, replace(QUICK, space="int4", budget=None))
    assert result.loss is not None
    assert result.untrained_loss is not None
    assert 0 < result.loss < result.untrained_loss
    # Weights that training has not made better are the untrained ones.
    harmed = search(DIGITS, data, replace(QUICK, learning_rate=0.9))
    assert harmed.loss == harmed.untrained_loss


def test_a_result_outlives_the_search_that_made_it() -> None:
    # Training does nothing but harm, so the weights that came are served: as copies.
    config = replace(QUICK, learning_rate=0.9)
    result = search(DIGITS, digits(), config)
    before = written(result)
    search(DIGITS, digits(), config)
    assert written(result) == before


# --- the same bytes ------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(quick: SearchResult, tmp_path: Path) -> None:
    again = search(DIGITS, digits(), QUICK)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert saved(again, tmp_path / "a") == saved(quick, tmp_path / "b")


def test_several_workers_give_the_same_files_twice() -> None:
    config = replace(QUICK, workers=2, steps=12)
    assert written(search(DIGITS, digits(), config)) == written(
        search(DIGITS, digits(), config)
    )


def test_another_seed_gives_other_files(quick: SearchResult) -> None:
    other = search(DIGITS, digits(), replace(QUICK, seed=4))
    assert written(other)[0] != written(quick)[0]


def test_checkpoints_do_not_change_the_result(quick: SearchResult, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    result = search(DIGITS, digits(), replace(QUICK, checkpoint_every=1), checkpoint=folder)
    assert written(result) == written(quick)
    assert folder.is_dir()


@pytest.mark.parametrize("step", [1, 6, 7, 14, 15, 23, 24])
def test_an_interrupted_search_resumes_to_the_same_bytes(
    quick: SearchResult, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "c"
    with pytest.raises(InterruptedSearchError, match=f"after {step} of 24 steps"):
        search(DIGITS, digits(), QUICK, checkpoint=folder, progress=Recorder(step))
    recorder = Recorder()
    resumed = search(
        DIGITS, digits(), QUICK, checkpoint=folder, resume=True, progress=recorder
    )
    assert [report.step for report in recorder.reports] == list(range(step + 1, 25))
    assert written(resumed) == written(quick)
    assert resumed.convergence == quick.convergence
    assert (resumed.float_quality, resumed.quantized_quality, resumed.entropy) == (
        quick.float_quality,
        quick.quantized_quality,
        quick.entropy,
    )


def test_a_search_that_is_interrupted_again_and_again_ends_with_the_same_bytes(
    quick: SearchResult, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    for step in (2, 3, 9, 20):
        with pytest.raises(InterruptedSearchError):
            search(
                DIGITS,
                digits(),
                QUICK,
                checkpoint=folder,
                resume=True,
                progress=Recorder(step),
            )
    resumed = search(DIGITS, digits(), QUICK, checkpoint=folder, resume=True)
    assert written(resumed) == written(quick)


@pytest.mark.parametrize("step", [9, 21])
def test_a_search_that_failed_resumes_from_its_last_checkpoint(
    quick: SearchResult, tmp_path: Path, step: int
) -> None:
    folder, config = tmp_path / "c", replace(QUICK, checkpoint_every=4)
    with pytest.raises(MemoryError):
        search(
            DIGITS,
            digits(),
            config,
            checkpoint=folder,
            progress=Recorder(step, MemoryError),
        )
    recorder = Recorder()
    resumed = search(
        DIGITS, digits(), config, checkpoint=folder, resume=True, progress=recorder
    )
    assert recorder.reports[0].step == step // 4 * 4 + 1
    assert written(resumed) == written(quick)


def test_a_finished_search_resumes_to_its_result(quick: SearchResult, tmp_path: Path) -> None:
    folder, config = tmp_path / "c", replace(QUICK, checkpoint_every=8)
    search(DIGITS, digits(), config, checkpoint=folder)
    again = search(DIGITS, digits(), config, checkpoint=folder, resume=True, progress=never)
    assert written(again) == written(quick)


def test_an_interruption_without_a_checkpoint_says_how_far_it_came() -> None:
    with pytest.raises(InterruptedSearchError, match="after 2 of 24 steps"):
        search(DIGITS, digits(), QUICK, progress=Recorder(2))


CHILD = """
import sys
from pathlib import Path
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.schedule import Phase
from onnx_fliqs.search_loop import search

def told(report):
    if report.phase.trains:
        print(report.step, flush=True)

if __name__ == "__main__":
    model, data, folder = map(Path, sys.argv[1:])
    config = SearchConfig(
        steps=24, batch_size=16, held_out_batch=16, draws=2, workers=1, seed=3,
        space="int4,int6,int8", observe=0.5, checkpoint_every=2,
    )
    search(model, data, config, checkpoint=folder, progress=told)
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_search_that_is_killed_resumes_to_the_same_bytes(
    quick: SearchResult, tmp_path: Path, seed: int
) -> None:
    folder, data = tmp_path / "c", tmp_path / "data.npz"
    part = digits()
    image = part.batch(np.arange(len(part)))["image"]
    np.savez(data, image=image, labels=part.labels)  # type: ignore[arg-type]
    moment = random.Random(seed)
    step = moment.randrange(3, 23)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(DIGITS), str(data), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= step:
                break
        try:
            # A step takes some 10 ms: the blow falls within one, or while a file is written.
            child.wait(moment.uniform(0, 0.03))
        except subprocess.TimeoutExpired:
            child.kill()
    assert child.returncode < 0 or step >= 22
    recorder = Recorder()
    config = replace(QUICK, checkpoint_every=2)
    resumed = search(DIGITS, data, config, checkpoint=folder, resume=True, progress=recorder)
    assert not recorder.reports or recorder.reports[0].step >= step - 2
    assert written(resumed) == written(quick)
    assert [path.name for path in folder.iterdir() if path.suffix == ".npz"] == ["state.npz"]


def interrupted(
    model: ir.Model, data: Dataset | None, config: SearchConfig, folder: Path
) -> None:
    with pytest.raises(InterruptedSearchError):
        search(model, data, config, checkpoint=folder, progress=Recorder(3))


def test_the_error_of_numbers_counts_by_the_variance_of_many_that_train() -> None:
    """Not of the few samples by which the loss is chosen: most labels are alike."""
    model = mlp()
    numbers = np.zeros((400, 3))
    numbers[::100] = 8
    data = replace(samples(model, 400), stored_labels=numbers)
    setup = set_up(model, data, SMALL)
    assert setup.train.labels is not None
    (term,) = (t for t in setup.objective.terms if t.kind is LossKind.LABEL_ERROR)
    assert term.variance == pytest.approx(float(setup.train.labels.var()))


def test_as_many_samples_judge_as_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others train. Of the inputs there are 4 numbers in a sample."""
    model, data = mlp(), samples(mlp())
    monkeypatch.setattr("onnx_fliqs.evaluation._MOST_KEPT", 11)
    setup = set_up(model, data, SMALL)
    assert (len(setup.train), len(setup.held_out)) == (38, 2)
    result = search(model, data, SMALL)
    assert result.samples == 2
    emitted = emit(model, result.assignment, data)
    assert emitted.samples == 2
    assert emitted.quantized_quality in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model", "model"),
        ("data", "data"),
        ("labels", "data"),
        ("seed", "settings"),
        ("budget", "settings"),
        ("controller", "settings"),
        ("steps", "settings"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(
    tmp_path: Path, change: str, named: str
) -> None:
    model, folder = mlp(), tmp_path / "c"
    data, config = samples(model), SMALL
    interrupted(model, data, config, folder)
    if change == "model":
        model = support.model(MLP, weights={**MLP_WEIGHTS, "w": (4, 6), "b": (6,)})
        weights = model.graph.initializers["w"]
        assert weights.const_value is not None
        weights.const_value = ir.tensor(weights.const_value.numpy() * np.float32(2), name="w")
    elif change == "data":
        data = samples(model, seed=1)
    elif change == "labels":
        data = samples(model, labels=False)
    elif change == "controller":
        config = replace(config, controller=ControllerConfig(entropy_end=0.123))
    elif change == "budget":
        config = replace(config, budget=Budget(BudgetKind.BITS, 6))
    elif change == "seed":
        config = replace(config, seed=9)
    else:
        config = replace(config, steps=9)
    with pytest.raises(FliqsError, match=f"of a search with another {named};"):
        search(model, data, config, checkpoint=folder, resume=True, progress=never)


def test_how_often_checkpoints_are_written_may_change_on_the_way(tmp_path: Path) -> None:
    model, folder = mlp(), tmp_path / "c"
    interrupted(model, samples(model), SMALL, folder)
    config = replace(SMALL, checkpoint_every=1)
    resumed = search(model, samples(model), config, checkpoint=folder, resume=True)
    assert written(resumed) == written(search(model, samples(model), SMALL))


def test_without_resume_a_checkpoint_is_not_continued(tmp_path: Path) -> None:
    model, folder = mlp(), tmp_path / "c"
    interrupted(model, samples(model), SMALL, folder)
    recorder = Recorder()
    search(model, samples(model), SMALL, checkpoint=folder, progress=recorder)
    assert recorder.reports[0].step == 1


def test_resuming_without_a_checkpoint_begins(tmp_path: Path) -> None:
    model, recorder = mlp(), Recorder()
    search(
        model,
        samples(model),
        SMALL,
        checkpoint=tmp_path / "c",
        resume=True,
        progress=recorder,
    )
    assert recorder.reports[0].step == 1


def test_a_search_deletes_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    model = mlp()
    search(model, samples(model), SMALL, checkpoint=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_checkpoint_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    model = mlp()
    config = replace(SMALL, checkpoint_every=1)
    with pytest.raises(FliqsError, match="cannot make the checkpoint folder"):
        search(model, samples(model), config, checkpoint=tmp_path / "c")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model, folder = mlp(), tmp_path / "c"
    interrupted(model, samples(model), SMALL, folder)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FliqsError, match="cannot be read"):
        search(model, samples(model), SMALL, checkpoint=folder, resume=True, progress=never)


# --- data ----------------------------------------------------------------------------------


def test_without_labels_agreement_with_the_float_model_counts() -> None:
    data = replace(digits(), stored_labels=None)
    result = search(DIGITS, data, QUICK)
    assert_sound(result)
    assert result.metric == "agreement"
    assert result.float_quality == 1.0
    assert result.quantized_quality > 0.8


def test_labels_can_be_left_out_of_the_loss() -> None:
    model = mlp()
    result = search(model, samples(model), replace(SMALL, loss="mse"))
    assert result.metric == "r2"
    assert result.float_quality == 1.0


def test_without_data_there_is_a_warning_and_a_model() -> None:
    result = search(DIGITS, None, replace(QUICK, steps=6))
    assert_sound(result)
    assert any("no data was given" in warning for warning in result.warnings)
    assert result.metric == "agreement"


def test_a_regression_is_measured_by_its_variance() -> None:
    model = support.model(
        "g (float[N,2,4] x) => (float[N,2,3] y) { h = MatMul (x, w) y = Tanh (h) }",
        weights={"w": (4, 3)},
    )
    result = search(model, samples(model, labels=False), replace(SMALL, space="int8"))
    assert result.metric == "r2"
    assert result.float_quality == 1.0
    assert 0.9 < result.quantized_quality < 1.0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_samples_than_a_batch_are_enough(count: int) -> None:
    model = mlp()
    assert_sound(search(model, samples(model, count), SMALL))


@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_model_with_a_fixed_batch_is_fed_nothing_else(count: int) -> None:
    model = support.model(MLP.replace("N", "4"), weights=MLP_WEIGHTS)
    result = search(model, samples(model, count), SMALL)
    assert_sound(result)
    assert [list(v.shape or ()) for v in result.model.graph.inputs] == [[4, 4]]


def test_what_fills_up_a_fixed_batch_counts_for_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses are means over whole batches: not 27 of 32 of them of one sample."""
    judged: list[Batch] = []
    judge = TrainStep.judge

    def spy(self: TrainStep, train: TrainState, batches: Any, *others: Any) -> Any:
        judged[:] = batches
        return judge(self, train, batches, *others)

    monkeypatch.setattr(TrainStep, "judge", spy)
    model = support.model(MLP.replace("N", "8"), weights=MLP_WEIGHTS)
    search(model, samples(model, 90), SMALL)
    assert [batch.size for batch in judged] == [8, 8]
    rows = [batch.rows for batch in judged if batch.rows is not None]
    assert sorted(np.bincount(np.concatenate(rows))) == [1, 1, *[2] * 7]


def test_a_fixed_batch_does_not_decide_how_many_samples_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exports often have a batch of one."""
    seen: dict[str, set[int]] = {}
    for name in ("losses", "divergences"):
        method = getattr(TrainStep, name)

        def spy(
            self: TrainStep,
            train: TrainState,
            batch: Batch,
            values: Any,
            method: Any = method,
            name: str = name,
        ) -> Any:
            assert batch.rows is not None
            seen.setdefault(name, set()).update(batch.rows.tolist())
            return method(self, train, batch, values)

        monkeypatch.setattr(TrainStep, name, spy)
    counts = {}
    for size in ("N", "1", "4"):
        model = support.model(MLP.replace("N", size), weights=MLP_WEIGHTS)
        for strategy, freeze in (
            (Strategy.FLIQS, 0.0),
            (Strategy.FLIQS, 0.5),
            (Strategy.ILP, 0.0),
        ):
            seen.clear()
            config = replace(SMALL, steps=12, batch_size=64, strategy=strategy, freeze=freeze)
            search(model, samples(model, 900), config)
            for name, rows in seen.items():
                counts[size, strategy, freeze, name] = len(rows)
    for (size, *what), count in counts.items():
        if what[-1] == "losses":
            assert count == counts[("N", *what)], (size, what)  # type: ignore[index]
        else:
            assert count >= 32


def test_the_unit_of_the_loss_does_not_depend_on_a_fixed_batch() -> None:
    """The variance of one sample is none."""
    text = (
        "g (float[N,4] x) => (float[N,6] y, float[N,1] z)"
        " { y = MatMul (x, w) z = MatMul (x, v) }"
    )
    weights = {"w": (4, 6), "v": (4, 1)}
    free, one = (
        support.model(text.replace("N", size), weights=weights) for size in ("N", "1")
    )
    first, second = (
        set_up(model, samples(model, 90, labels=False), replace(SMALL, loss="mse")).objective
        for model in (free, one)
    )
    variances = [term.variance for term in first.terms]
    assert min(variances) > 0.01
    np.testing.assert_allclose(variances, [t.variance for t in second.terms], rtol=1e-5)


def test_similarities_of_pairs_of_samples_are_not_judged() -> None:
    """What the float model gave for a sample beside others is not what it gives elsewhere."""
    model = support.model(
        "g (float[N,4] x) => (float[N,N] s, float[N,6] y)"
        " { y = MatMul (x, w) t = Transpose (y) s = MatMul (y, t) }",
        weights={"w": (4, 6)},
    )
    # Held-out batches, the last one and training batches differ in size.
    result = search(model, samples(model, 150, labels=False), replace(SMALL, steps=40))
    assert any(w.startswith("'s' is not judged: its shape depends") for w in result.warnings)
    assert result.quantized_quality > 0.8
    alone = support.model(
        "g (float[N,4] x) => (float[N,N] s) { t = Transpose (x) h = MatMul (x, w)"
        " s = MatMul (h, t) }",
        weights={"w": (4, 4)},
    )
    with pytest.raises(UnsupportedError, match="the same shape for all data"):
        search(alone, samples(alone, 150, labels=False), SMALL)


def test_a_state_with_its_samples_along_another_axis_is_refused() -> None:
    model = support.model(
        "g (float[N,4] x, float[2,N,4] h) => (float[N,6] y)"
        " { m = ReduceMean <keepdims = 0> (h, a) s = Add (x, m) y = MatMul (s, w) }",
        weights={"w": (4, 6)},
        constants={"a": [0]},
    )
    with pytest.raises(DataError, match=r"'h' has its samples along axis 1.*'N'.* to 1"):
        search(model, None, SMALL)
    found = api.inspect(model)
    assert [layer.op_type for layer in found.layers] == ["MatMul"]
    assert "'h' has its samples along axis 1" in found.warnings[0]


def test_the_budget_of_a_checkpoint_is_exact() -> None:
    model = mlp()
    first, second = (
        set_up(model, samples(model), replace(SMALL, budget=Budget(BudgetKind.BITS, bits)))
        for bits in (4.780914437337575, 4.780911)
    )
    assert first.identity != second.identity


def test_ctrl_c_while_single_changes_are_measured_stops_cleanly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    close = TrainStep.close

    def noted(step: TrainStep) -> None:
        closed.append(True)
        close(step)

    monkeypatch.setattr(TrainStep, "divergences", stop)
    monkeypatch.setattr(TrainStep, "close", noted)
    model = mlp()
    with pytest.raises(InterruptedSearchError, match="before the first step"):
        search(model, samples(model), SMALL)
    assert closed == [True]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_search_of_few_steps_still_ends_in_a_model(steps: int) -> None:
    model = mlp()
    assert_sound(search(model, samples(model), replace(SMALL, steps=steps)))


@pytest.mark.parametrize(
    ("delay", "freeze"), [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.0, 0.5)]
)
def test_phases_may_be_empty(delay: float, freeze: float) -> None:
    model = mlp()
    assert_sound(search(model, samples(model), replace(SMALL, delay=delay, freeze=freeze)))


def first_too_large(data: Dataset) -> Iterator[Dataset]:
    assert data.labels is not None
    for index in range(len(data)):
        labels = data.labels.copy()
        labels[index] = 3
        yield replace(data, stored_labels=labels)


def regression(count: int = 400) -> tuple[ir.Model, Dataset]:
    """A float model whose last bias is off by one, and what it should give."""
    model = support.model(
        "g (float[N,4] x) => (float[N,1] y)"
        " { h = Gemm (x, w, b) r = Tanh (h) y = Gemm (r, v, c) }",
        weights={"w": (4, 6), "b": (6,), "v": (6, 1), "c": (1,)},
    )
    data = samples(model, count, labels=False)
    right = support.run(model, {"x": data.stored_inputs["x"].astype(np.float32)})[0]
    return model, replace(data, stored_labels=right[:, 0] + 1)


def test_numbers_train_the_weights(tmp_path: Path) -> None:
    model, data = regression()
    config = SearchConfig(space="int8", steps=150, batch_size=32, workers=1, distillation=0.0)
    result = search(model, data, replace(config, learning_rate=0.02))
    assert result.metric == "label-r2"
    assert result.quantized_quality > result.float_quality + 0.2
    assert result.quantized_quality > 0.9
    result.save(tmp_path / "q.onnx")
    found = onnx_fliqs.evaluate(tmp_path / "q.onnx", data)
    assert found.metric.value == "label-r2"
    assert found.value == pytest.approx(result.quantized_quality, abs=0.05)
    emitted = onnx_fliqs.emit(model, result.assignment, data)
    assert emitted.metric == "label-r2"
    assert emitted.quantized_quality == pytest.approx(result.float_quality, abs=0.05)


def test_classes_of_a_regression_are_refused_with_a_hint() -> None:
    model, data = regression(40)
    whole = replace(data, stored_labels=np.arange(40))
    with pytest.raises(DataError, match="has 1 classes; numbers to regress must be floats"):
        search(model, whole, SMALL, progress=never)
    accuracy = replace(SMALL, controller=ControllerConfig(signal=Signal.ACCURACY))
    with pytest.raises(ConfigError, match="which need to be classes"):
        search(model, data, accuracy, progress=never)


def test_one_label_out_of_range_is_refused_wherever_it_is() -> None:
    model = mlp()
    for data in first_too_large(samples(model, 12)):
        with pytest.raises(DataError, match="labels run from 0 to 3"):
            search(model, data, SMALL, progress=never)


def test_many_labels_out_of_range_are_refused() -> None:
    model = mlp()
    data = samples(model, 200)
    with pytest.raises(DataError, match="3 classes"):
        search(model, replace(data, stored_labels=np.arange(200)), SMALL, progress=never)


def test_a_rare_label_out_of_range_beyond_the_first_batch_is_refused() -> None:
    data = digits()
    assert data.labels is not None
    labels = data.labels.copy()
    labels[-1] = 10
    with pytest.raises(DataError, match="10 classes"):
        search(DIGITS, replace(data, stored_labels=labels), QUICK, progress=never)


@pytest.mark.parametrize("shape", [(40, 1), (40, 3), (40, 2, 2)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = mlp()
    data = replace(samples(model), stored_labels=np.zeros(shape, np.int64))
    named = ", ".join(map(str, shape[1:]))
    with pytest.raises(DataError, match=rf"labels have the shape \[N, {named}\], .* \[N\]$"):
        search(model, data, SMALL, progress=never)


def test_a_float_model_that_overflows_is_refused_in_one_line(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = mlp()
    data = samples(model)
    huge = replace(
        data, stored_inputs={"x": np.full_like(data.stored_inputs["x"], 3e38, np.float32)}
    )
    with pytest.raises(DataError, match="'y', which is judged, is not finite"):
        search(model, huge, SMALL, progress=never)
    assert not recwarn.list


def test_labels_without_an_output_of_classes_are_refused() -> None:
    model = support.model(
        "g (float[N,4] x) => (float[N] y) { m = MatMul (x, w) y = Squeeze (m) }",
        weights={"w": (4, 1)},
    )
    with pytest.raises(DataError, match="no output has the shape"):
        search(model, samples(model), SMALL, progress=never)


def test_cross_entropy_without_labels_is_refused() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="needs `labels`"):
        search(model, samples(model, labels=False), replace(SMALL, loss="cross-entropy"))


# --- refusals before any work --------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "space"),
    [
        (Budget(BudgetKind.BITS, 3.9), "int-l"),
        (Budget(BudgetKind.BOPS, 0.2), "int-l"),
        (Budget(BudgetKind.SIZE, 0.4), "int-l"),
        (Budget(BudgetKind.BITS, 7.0), "int8"),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_any_training(
    tmp_path: Path, budget: Budget, space: str
) -> None:
    with pytest.raises(InfeasibleError) as error:
        search(
            DIGITS,
            digits(),
            replace(QUICK, budget=budget, space=space),
            checkpoint=tmp_path / "c",
            progress=never,
        )
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        search(tmp_path / "none.onnx", None, SMALL, progress=never)


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        search(DIGITS, tmp_path / "none.npz", SMALL, progress=never)


def test_a_model_without_layers_is_refused() -> None:
    model = support.model("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }")
    with pytest.raises(ModelError, match="no quantizable layer"):
        search(model, None, SMALL, progress=never)


# --- training that cannot be ---------------------------------------------------------------


def test_a_model_that_cannot_be_trained_is_still_searched(tmp_path: Path) -> None:
    model = support.model(
        """
        g (float[N,5,4] x) => (float[N,5,5] y) {
            h = MatMul (x, w)
            r = Relu (h)
            m = MatMul (r, v)
            s = Round (m)
            t = Transpose <perm = [0, 2, 1]> (s)
            y = MatMul (s, t)
        }
        """,
        weights={"w": (4, 6), "v": (6, 3)},
    )
    recorder, data = Recorder(), samples(model, labels=False)
    result = search(model, data, SMALL, progress=recorder)
    assert_sound(result)
    assert all(not layer.trained for layer in result.layers)
    first, second, product = result.layers
    assert "Round" in (first.reason or "")
    assert "Round" in (second.reason or "")
    assert product.reason is None
    assert all(np.isnan(report.loss) for report in recorder.reports)
    folder = tmp_path / "c"
    interrupted(model, data, SMALL, folder)
    resumed = search(model, data, SMALL, checkpoint=folder, resume=True)
    assert written(resumed) == written(result)


def test_layers_behind_an_operator_without_a_gradient_are_named() -> None:
    model = support.model(
        """
        g (float[N,4] x) => (float[N,3] y) {
            h = MatMul (x, w)
            r = Round (h)
            y = MatMul (r, v)
        }
        """,
        weights={"w": (4, 6), "v": (6, 3)},
    )
    first, second = search(model, samples(model), SMALL).layers
    assert not first.trained
    assert "Round" in (first.reason or "")
    assert second.trained
    assert second.reason is None


def test_products_of_activations_have_no_weight_to_train() -> None:
    model = support.model(
        "g (float[N,4,5] x) => (float[N,4,4] y)"
        " { k = MatMul (x, w) t = Transpose <perm = [0, 2, 1]> (k) y = MatMul (x, t) }",
        weights={"w": (5, 5)},
    )
    result = search(model, samples(model, labels=False), SMALL)
    assert_sound(result)
    assert [layer.trained for layer in result.layers] == [True, False]


def test_training_without_a_finite_gradient_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # What is small beside the largest input is rounded to 0, whose logarithm is not finite.
    model = support.model(
        "g (float[N,4] x) => (float[N,3] y) { m = MatMul (x, variance) y = Log (m) }",
        weights={"variance": (4, 3)},
    )
    x = np.full((40, 4), 1e-4, np.float32)
    x[::4] = 1.0
    data = Dataset({"x": x}, None, input_specs(model))
    recorder = Recorder()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(FliqsError, match=r"diverged: no finite gradient .* --learning-rate"),
    ):
        search(model, data, replace(SMALL, steps=100, loss="mse"), progress=recorder)
    assert "the gradient is not finite" in caplog.text
    assert 0 < len(recorder.reports) < 100
    short = search(model, data, replace(SMALL, steps=4, loss="mse"))
    lost = "4 of 4 steps changed nothing: their gradient was not finite"
    assert lost in short.warnings
    assert any("'y' of the quantized model is not finite for" in w for w in short.warnings)


def test_a_learning_rate_that_is_far_too_large_still_ends_in_a_sound_model() -> None:
    # What is served is never worse on the held-out samples than the weights that came.
    config = replace(QUICK, learning_rate=0.9)
    result = search(DIGITS, digits(), config)
    assert_sound(result)
    assert result.quantized_quality > 0.5


def test_the_served_weights_are_at_least_as_good_as_the_untrained() -> None:
    config = replace(QUICK, space="int4", learning_rate=0.3)
    spoiled = search(DIGITS, digits(), config)
    careful = search(DIGITS, digits(), replace(config, learning_rate=1e-8))
    assert spoiled.quantized_quality >= careful.quantized_quality


def test_a_pool_of_any_size_may_come_before_all_weights() -> None:
    model = support.model(
        "g (float[N,1,H,W] x) => (float[N,A,B,C] y)"
        " { z = MaxPool <kernel_shape = [2, 2]> (x) y = Conv (z, w) }",
        weights={"w": (1, 1, 1, 1)},
    )
    (layer,) = search(model, None, replace(SMALL, steps=2)).layers
    assert layer.trained
