"""Searches of models with weight-only layers and with layers that decide together."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import support
from layer_forms import FORMS
from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.cli.render import print_inspection, print_result
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import ControllerConfig, Method
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.critic import Critic
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import ConfigError
from onnx_fliqs.projection import project
from onnx_fliqs.report import SearchResult
from onnx_fliqs.search_loop import search
from onnx_fliqs.strategies import Strategy

QUICK = SearchConfig(
    space="int4,int6,int8", steps=8, batch_size=8, held_out_batch=8, draws=2, workers=1
)
BITS_5 = Budget(BudgetKind.BITS, 5.0)
WORDS = """g (int64[N,3] i) => (float[N,4] y) {
    [words] t = Gather (table, i)
    s = Flatten (t)
    [fc] y = MatMul (s, w) }"""
WORDS_WEIGHTS = {"table": (64, 16), "w": (48, 4)}


def data_for(model: ir.Model, sizes: Mapping[str, tuple[int, ...]]) -> Dataset:
    """20 random samples; indices below 64."""
    rng = np.random.default_rng(0)
    inputs: dict[str, npt.NDArray[np.generic]] = {
        name: rng.integers(0, 64, (20, *size))
        if name == "i"
        else rng.standard_normal((20, *size)).astype(np.float32)
        for name, size in sizes.items()
    }
    return Dataset(inputs, None, input_specs(model))


def words_searched() -> SearchResult:
    model = support.model(WORDS, weights=WORDS_WEIGHTS)
    config = replace(QUICK, budget=BITS_5, separate=False)
    return search(model, data_for(model, {"i": (3,)}), config)


def test_only_weights_are_searched_within_a_budget_of_bytes() -> None:
    model = support.model(
        """g (int64[N,3] i) => (float[N,1,2] y) {
            [words] t = Gather (table, i)
            s = Transpose <perm = [1, 0, 2]> (t)
            [cell] all, h = LSTM <hidden_size = 2> (s, w, r)
            y = Transpose <perm = [1, 0, 2]> (h) }""",
        weights={"table": (64, 16), "w": (1, 8, 16), "r": (1, 8, 2)},
    )
    data = data_for(model, {"i": (3,)})
    for kind in (BudgetKind.BITS, BudgetKind.BOPS):
        with pytest.raises(ConfigError, match="bound their bytes with --size"):
            search(model, data, replace(QUICK, budget=Budget(kind, 0.9)))
    result = search(model, data, QUICK)
    # The default: five bits of eight.
    assert result.cost.weight_bytes <= (64 * 16 + 8 * 16 + 8 * 2) * 5 / 8
    assert result.cost.bops == 0
    assert [layer.share for layer in result.layers] == [0, 0]
    assert all(layer.weight_only for layer in result.layers)


def test_without_a_budget_of_bytes_weight_only_layers_are_as_precise_as_can_be() -> None:
    formats = words_searched().assignment.layers
    assert formats["words"] == "int8"
    assert formats["fc"] == "int4"


def test_a_table_takes_what_the_layers_that_read_it_can_ask_for() -> None:
    """Not every precision of the space."""
    model = support.model(
        """g (int64[N,3] i) => (float[N,4] y) {
            [words] t = Gather (table, i)
            s = Flatten (t)
            [fc] h = MatMul (s, w)
            [head] y = MatMul (h, v) }""",
        weights=WORDS_WEIGHTS | {"v": (4, 4)},
    )
    layers = {"fc": "int8:int16", "head": "int8"}
    assignment = Assignment(layers, "qnn")
    given = replace(QUICK, space=None, strategy=Strategy.FIXED, assignment=assignment)
    data = data_for(model, {"i": (3,)})
    found = dict(search(model, data, given).assignment.layers)
    assert {name: found[name] for name in layers} == layers


@pytest.mark.parametrize(
    ("method", "freeze"),
    [(Method.CRITIC, 0.0), (Method.CRITIC, 0.75), (Method.REINFORCE, 0.75)],
)
def test_layers_that_share_a_weight_get_one_format(method: Method, freeze: float) -> None:
    config = replace(
        QUICK, budget=BITS_5, controller=ControllerConfig(method=method), freeze=freeze
    )
    model = FORMS["weight_of_two_convolutions"].build()
    result = search(model, data_for(model, {"x": (2, 5, 5)}), config)
    formats = result.assignment.layers
    assert formats["once"] == formats["twice"]
    stored = [n for n in result.model.graph.initializers if n.endswith("w@once.codes")]
    assert len(stored) == 1
    assert [layer.params for layer in result.layers] == [36, 0]


def test_choices_that_cost_nothing_are_made_for_precision_alone() -> None:
    costs = (np.array([0.5, 1.0]), np.zeros(2), np.array([0.25, 0.5]))
    distortions = [np.array([[x], [y]]) for x, y in ((0.2, 0.1), (0.3, 0.1), (0.4, 0.0))]
    critic = Critic(costs, distortions, ControllerConfig())
    state = critic.initial()
    policy = critic.policy(state, 1.0)
    assert policy[1][1] > 0.999
    assert sum(float(p @ row) for p, row in zip(policy, costs, strict=True)) <= 1 + 1e-9
    assert project(critic.preferences(state), costs, critic.slack)[1] == 1
    nothing = tuple(np.zeros(2) for _ in costs)
    free = Critic(nothing, distortions, ControllerConfig())
    assert all(p[1] > 0.999 for p in free.policy(free.initial(), 1.0))
    assert project(free.preferences(free.initial()), nothing, free.slack) == (1, 1, 1)


def test_reports_tell_what_is_quantized_of_each_layer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = words_searched()
    reason = "it reads rows of a table and multiplies nothing"
    listed = {layer["name"]: layer["weight_only"] for layer in result.to_dict()["layers"]}
    assert listed == {"words": reason, "fc": None}
    print_result(result)
    printed = capsys.readouterr().out
    assert "int8 (weights)" in printed
    assert f"weights only: Gather words ({reason})" in printed

    inspection = api.inspect(FORMS["two_rnns_of_one_weight"].build())
    expected = "its activations lie inside a recurrent cell"
    assert [layer["weight_only"] for layer in inspection.to_dict()["layers"]] == [expected] * 2
    print_inspection(inspection)
    printed = capsys.readouterr().out
    assert f"weights only: RNN first, RNN second ({expected})" in printed


def test_the_cost_of_a_model_without_bit_operations_is_told_in_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    emitted = api.emit(FORMS["lstm"].build(), Assignment({"cell": "int8"}))
    print_result(emitted)
    printed = capsys.readouterr().out
    assert "cost     weights 48 bytes" in printed
    assert "BOPs" not in printed


def test_an_assignment_in_float32_names_no_layer_that_the_target_leaves_float() -> None:
    source = FORMS["layers_in_bodies"].build()
    layers = api.inspect(source.clone(), target="ort-cpu").layers
    chosen = Assignment({layer.name: "float32" for layer in layers}, "ort-cpu")
    result = api.emit(source, chosen)
    assert {row.name for row in result.layers} == {layer.name for layer in layers}
    assert not any(node.op_type == "DequantizeLinear" for node in result.model.graph)
