"""The alternatives to the choices of a search: each takes effect, repeats, and resumes."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import support
from onnx_fliqs.checkpoint import Checkpoint
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import ControllerConfig, Method, RewardForm, Schedule, Signal
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import ConfigError, InterruptedSearchError
from onnx_fliqs.optimizer import Optimizer
from onnx_fliqs.progress import Progress
from onnx_fliqs.report import SearchResult
from onnx_fliqs.schedule import Phase
from onnx_fliqs.search_loop import _Run, search
from onnx_fliqs.search_setup import set_up
from onnx_fliqs.search_state import SearchState
from onnx_fliqs.sensitivity import measure_sensitivity
from onnx_fliqs.thresholds import Statistics, Thresholds

CONFIG = SearchConfig(
    space="int2,int4,int8",
    separate=False,
    steps=12,
    seed=1,
    batch_size=16,
    held_out_batch=32,
    draws=4,
    refresh=3,
    threshold_rate=0.0,
    workers=1,
    learning_rate=1e-2,
    observe=0.5,
    delay=0.2,
    freeze=0.5,
)
FIXED = replace(CONFIG, delay=0.0, freeze=0.0, refresh=None, threshold_rate=10.0)
APART = replace(FIXED, separate=None, observe=0.0)


def change(controller: Mapping[str, Any] | None = None, **settings: Any) -> SearchConfig:
    return replace(CONFIG, controller=ControllerConfig(**(controller or {})), **settings)


def policy_gradient(**settings: Any) -> SearchConfig:
    return change({"method": Method.REINFORCE, "learning_rate": 0.5, **settings})


PLAIN = {"critic": CONFIG, "reinforce": policy_gradient(), "fixed": FIXED, "apart": APART}
# Name → which of the two it changes, and how.
CHOICES: dict[str, tuple[str, SearchConfig]] = {
    "loss": ("critic", change({"signal": Signal.LOSS})),
    "accuracy": ("critic", change({"signal": Signal.ACCURACY})),
    "agreement": ("critic", change({"signal": Signal.AGREEMENT})),
    "cosine cooling": ("critic", change({"cooling": Schedule.COSINE})),
    "constant cooling": ("critic", change({"cooling": Schedule.CONSTANT})),
    "shared": ("critic", change(thresholds=Thresholds.SHARED)),
    "percentile": ("critic", change(thresholds=Thresholds.PERCENTILE)),
    "maximum": ("critic", change(thresholds=Thresholds.MAXIMUM)),
    "latest": ("critic", change(statistics=Statistics.LATEST)),
    "calibrated": ("critic", change(statistics=Statistics.CALIBRATED)),
    "momentum": ("critic", change(optimizer=Optimizer.RELATIVE_MOMENTUM)),
    "adam": ("critic", change(optimizer=Optimizer.ADAM)),
    "fixed": ("critic", FIXED),
    "fixed, not observed": ("fixed", replace(FIXED, observe=0.0)),
    "formats apart": ("fixed", APART),
    "damage of weights": ("apart", replace(APART, weight_damage=10.0)),
    "learned thresholds": ("critic", change(refresh=None, threshold_rate=10.0)),
    "learned thresholds, momentum": (
        "fixed",
        replace(FIXED, optimizer=Optimizer.RELATIVE_MOMENTUM),
    ),
    "slowly learned thresholds": ("fixed", replace(FIXED, threshold_rate=1)),
    "thresholds that stay": ("fixed", replace(FIXED, threshold_rate=0.0)),
    "reinforce, learned thresholds": (
        "reinforce",
        replace(policy_gradient(), refresh=None, threshold_rate=10.0),
    ),
    "fixed, refreshed": ("fixed", replace(FIXED, refresh=3, threshold_rate=0.0)),
    "one-sided": ("reinforce", policy_gradient(reward=RewardForm.ONE_SIDED)),
    "exponential": (
        "reinforce",
        policy_gradient(reward=RewardForm.EXPONENTIAL, signal=Signal.ACCURACY),
    ),
    "linear penalty": ("reinforce", policy_gradient(entropy_schedule=Schedule.LINEAR)),
    "constant penalty": ("reinforce", policy_gradient(entropy_schedule=Schedule.CONSTANT)),
}


def network() -> ir.Model:
    return support.model(
        "g (float[N,6] x) => (float[N,3] y)"
        " { h = Gemm (x, w, b) r = Relu (h) k = MatMul (r, v) s = Relu (k)"
        " y = MatMul (s, u) }",
        weights={"w": (6, 8), "b": (8,), "v": (8, 8), "u": (8, 3)},
    )


def samples(*, labels: bool = True) -> Dataset:
    """The classes of the network itself, but for a few."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)).astype(np.float32)
    (scores,) = support.run(network(), {"x": x})
    classes = np.where(rng.random(400) < 0.1, 0, np.argmax(scores, axis=1))
    return Dataset({"x": x}, classes if labels else None, input_specs(network()))


@functools.cache
def course(config: SearchConfig) -> tuple[str, ...]:
    """What every step of a search reports, and every round before it."""
    reports: list[Progress] = []
    search(network(), samples(), config, progress=reports.append)
    return tuple(repr(report) for report in reports if report.phase is not Phase.MEASURE)


def written(result: SearchResult) -> bytes:
    content: bytes = ir.to_proto(result.model).SerializeToString()
    return content


@pytest.mark.parametrize("name", list(CHOICES))
def test_every_choice_changes_the_course_of_a_search(name: str) -> None:
    method, config = CHOICES[name]
    found = course(config)
    rounds = round(config.observe * config.steps) if method != "reinforce" else 0
    assert len(found) == rounds + config.steps
    assert found != course(PLAIN[method])


@pytest.mark.parametrize("name", list(CHOICES))
def test_every_choice_resumes_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    config = CHOICES[name][1]
    whole = search(network(), samples(), config)

    def stop(report: Progress) -> None:
        if report.step == 5 and report.phase.trains:
            raise KeyboardInterrupt

    folder = tmp_path / "c"
    with pytest.raises(InterruptedSearchError, match="after 5 of 12 steps"):
        search(network(), samples(), config, checkpoint=folder, progress=stop)
    resumed = search(network(), samples(), config, checkpoint=folder, resume=True)
    assert written(resumed) == written(whole)
    assert resumed.verification == whole.verification


@pytest.mark.parametrize("name", list(CHOICES))
def test_a_choice_is_part_of_what_a_checkpoint_belongs_to(name: str, tmp_path: Path) -> None:
    method, config = CHOICES[name]
    one, other = (set_up(network(), samples(), c).identity for c in (config, PLAIN[method]))
    store = Checkpoint(tmp_path / "c", one)
    store.write({"a": np.zeros(1)})
    assert store.read() is not None
    assert one["settings"] != other["settings"]
    assert one["data"] == other["data"]


def test_the_loss_of_the_draws_is_reported_whatever_the_signal() -> None:
    """During the delay nothing is learned yet, so that the draws are the same."""
    reports: dict[Signal, list[Progress]] = {signal: [] for signal in Signal}
    for signal, seen in reports.items():
        config = replace(change({"signal": signal}), observe=0.0, delay=0.5, freeze=0.5)
        search(network(), samples(), config, progress=seen.append)
    losses = [[report.held_out for report in seen[:6]] for seen in reports.values()]
    assert all(rest == losses[0] for rest in losses)
    assert all(loss > 0 for loss in losses[0])


def test_calibrated_statistics_keep_the_scales_of_activations(tmp_path: Path) -> None:
    config = replace(change(statistics=Statistics.CALIBRATED), checkpoint_every=1)
    setup = set_up(network(), samples(), config)
    folder = tmp_path / "c"
    search(network(), samples(), config, checkpoint=folder)
    arrays = Checkpoint(folder, setup.identity).read()
    assert arrays is not None
    changed = {
        (site, fmt): not np.array_equal(arrays[f"scales/{fmt}/{site}"], scale)
        for (site, fmt), scale in setup.scales.items()
    }
    weights = {site.name for site in setup.prepared.space.sites if site.is_weight}
    assert not any(moved for (site, _), moved in changed.items() if site not in weights)
    assert any(moved for (site, _), moved in changed.items() if site in weights)


@pytest.mark.parametrize("labels", [True, False])
def test_labels_that_the_loss_leaves_out_are_noticed(labels: bool) -> None:
    config = SearchConfig(steps=2, batch_size=8, workers=1, loss="kl")
    result = search(network(), samples(labels=labels), config)
    assert labels == any("the labels are not used" in line for line in result.warnings)
    assert result.metric == "agreement"


def test_an_accuracy_without_labels_is_refused() -> None:
    config = change({"signal": Signal.ACCURACY})
    with pytest.raises(ConfigError, match="rests on `labels`, which the data needs to have"):
        search(network(), samples(labels=False), config)
    with pytest.raises(ConfigError, match="rests on `labels`, which the loss leaves out"):
        search(network(), samples(), replace(config, loss="kl"))


def test_an_agreement_without_classes_is_refused() -> None:
    config = replace(change({"signal": Signal.AGREEMENT}), loss="mse")
    with pytest.raises(ConfigError, match="needs a model whose outputs are class scores"):
        search(network(), samples(), config)
    search(network(), samples(labels=False), replace(config, loss="auto"))


@pytest.mark.parametrize("observe", [0.0, 0.5])
def test_weights_train_on_what_the_policy_prefers_from_the_first_step(
    observe: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, ...]] = []
    train = _Run._train

    def noted(run: _Run, state: SearchState, choices: tuple[int, ...]) -> Any:
        trained.append(choices)
        return train(run, state, choices)

    monkeypatch.setattr(_Run, "_train", noted)
    monkeypatch.setattr("onnx_fliqs.choose_formats.project", lambda *_: (0, 1, 0))
    result = search(network(), samples(), replace(FIXED, steps=2, observe=observe))
    assert trained == [(0, 1, 0)] * 2
    assert list(result.assignment.layers.values()) == ["int2", "int4", "int2"]


def test_without_draws_the_policy_is_that_of_single_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer that the float network minds most is the one that stays precise."""
    count = 3
    for sensitive in range(count):
        growth = [
            np.array([10.0, 0.1, 0.0]) if i == sensitive else np.array([0.2, 0.1, 0.0])
            for i in range(count)
        ]
        monkeypatch.setattr(
            "onnx_fliqs.choose_formats.measure_sensitivity", lambda *_, g=growth: tuple(g)
        )
        config = replace(FIXED, steps=2, observe=0.0)
        chosen = list(search(network(), samples(), config).assignment.layers.values())
        assert chosen[sensitive] != "int2"


def test_single_changes_are_judged_by_the_divergence_from_the_float_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the weights are trained on."""
    seen: list[tuple[float, ...]] = []

    def noted(*args: Any) -> Any:
        rows = measure_sensitivity(*args)
        seen.append(tuple(float(value) for row in rows for value in row))
        return rows

    monkeypatch.setattr("onnx_fliqs.choose_formats.measure_sensitivity", noted)
    for loss in ("cross-entropy", "kl"):
        search(network(), samples(), replace(FIXED, steps=2, loss=loss, distillation=0.0))
    assert seen[0] == seen[1]
    assert max(seen[0]) > 0
