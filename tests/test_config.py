"""The settings of a search: what is refused at once, in one line."""

import math
from typing import Any

import pytest

import support
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import ControllerConfig, Method
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.errors import ConfigError, FliqsError
from onnx_fliqs.search_loop import search
from onnx_fliqs.strategies import Strategy


def test_the_defaults_are_valid() -> None:
    config = SearchConfig()
    assert config.threads >= 1
    assert 0 <= config.delay <= config.freeze <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": "int-l"}, "leave out --space int-l"),
        ({"budget": Budget(BudgetKind.SIZE, 0.5)}, "leave out --size 0.5"),
        ({"strategy": Strategy.ILP}, "leave out --strategy ilp"),
        ({"assignment": None}, "'fixed' needs an assignment"),
    ],
)
def test_an_assignment_leaves_nothing_to_choose(change: dict[str, Any], words: str) -> None:
    given = {"strategy": Strategy.FIXED, "assignment": Assignment({"a": "int8"})}
    with pytest.raises(ConfigError, match=words):
        SearchConfig(**{**given, **change})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SearchConfig().steps = 3  # type: ignore[misc]


def test_the_number_of_threads_can_be_chosen() -> None:
    assert SearchConfig(workers=3).threads == 3


@pytest.mark.parametrize(
    "change",
    [
        {
            "steps": 1,
            "batch_size": 1,
            "draws": 2,
            "held_out_batch": 1,
            "refresh": 1,
            "threshold_rate": 0.0,
        },
        {"draws": 1, "freeze": 0.1, "controller": ControllerConfig(method=Method.REINFORCE)},
        {"checkpoint_every": 1},
        {"seed": 0},
        {"distillation": 0.0},
        {"distillation": 1.0},
        {"delay": 0.0, "freeze": 0.0},
        {"delay": 1.0, "freeze": 1.0},
        {"freeze": 0.0},
        {"refresh": None},
        {"threshold_rate": 0.0},
        {"budget": Budget(BudgetKind.SIZE, 0.5)},
        {"controller": ControllerConfig(entropy_end=0.0)},
        *({"loss": loss} for loss in ("auto", "cross-entropy", "kl", "mse")),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(change: dict[str, Any]) -> None:
    config = SearchConfig(**change)
    assert all(getattr(config, name) == value for name, value in change.items())


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in (
                "steps",
                "batch_size",
                "draws",  # the critic compares draws with each other
                "held_out_batch",
                "refresh",
                "checkpoint_every",
                "workers",
            )
            for value in (0, -1)
        ),
        {"seed": -1},
        *({"learning_rate": value} for value in (0.0, -1e-3, 1.0, math.nan, math.inf)),
        *({"distillation": value} for value in (-0.1, 1.1, math.nan)),
        *({"validation": value} for value in (0.0, 1.0, -0.1, math.nan)),
        *({"observe": value} for value in (-0.1, math.inf, math.nan)),
        *({"delay": value, "freeze": 0.5} for value in (-0.1, 0.9, math.nan)),
        {"delay": 0.1},  # weights do not train on draws
        {"freeze": 0.1, "strategy": Strategy.ILP},
        {"freeze": 0.0, "controller": ControllerConfig(method=Method.REINFORCE)},
        *({"freeze": value} for value in (-0.1, 1.1, math.nan)),
        {"delay": 0.2, "freeze": 0.1},
        {"loss": "hinge"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        SearchConfig(**change)
    assert next(iter(change)) in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "toaster"}, "unknown target 'toaster'"),
        ({"space": "int-xl"}, "unknown format 'int-xl'"),
        ({"space": ","}, "the search space is empty"),
        ({"space": ""}, "the search space is empty"),
        ({"space": "uint4"}, "uint4 cannot be searched"),
        ({"target": "ort-cpu", "space": "int4"}, "target ort-cpu cannot run int4"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_by_the_search(
    change: dict[str, Any], message: str
) -> None:
    model = support.model(
        "g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }", weights={"w": (4, 3)}
    )
    with pytest.raises(FliqsError, match=message) as error:
        search(model, None, SearchConfig(steps=1, **change))
    assert "\n" not in str(error.value)
