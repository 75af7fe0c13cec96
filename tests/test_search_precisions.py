"""Short searches of pairs, of groups, and for targets that ask for other scales."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import support
from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.calibrate import weight_scales
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import ControllerConfig, Method
from onnx_fliqs.cost import Budget, BudgetKind, cost_of
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import ConfigError, FliqsError, InterruptedSearchError
from onnx_fliqs.model import save_model
from onnx_fliqs.precision import parse_space
from onnx_fliqs.prepare import prepare
from onnx_fliqs.progress import Progress
from onnx_fliqs.report import SearchResult
from onnx_fliqs.search_loop import search
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.targets import TARGETS, Activations, Bias, Placement, Target
from support import STRATEGIES, initializer, ops, random_feeds, run

SPACE = "int4g16:float32,int8,int4:int8"
QUICK = SearchConfig(space=SPACE, steps=12, batch_size=8, held_out_batch=8, draws=2, workers=1)
MLP = """g (float[N,32] x) => (float[N,5] y) {
    [one] a = Gemm (x, w1, b1)
    r = Relu (a)
    [two] b = MatMul (r, w2)
    s = Sigmoid (b)
    t = Mul (b, s)
    [three] y = Gemm <transB = 1> (t, w3, b3) }"""
WEIGHTS = {"w1": (32, 48), "b1": (48,), "w2": (48, 20), "w3": (5, 20), "b3": (5,)}


def mlp() -> ir.Model:
    return support.model(MLP, weights=WEIGHTS)


def samples(count: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 32)).astype(np.float32)
    return Dataset({"x": x}, rng.integers(0, 5, count), input_specs(mlp()))


def assert_sound(result: SearchResult) -> None:
    """Valid ONNX that computes what was searched, and a report that is JSON."""
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert result.verification.searched is not None
    assert result.verification.searched.rms < 1e-3
    json.dumps(result.to_dict(), allow_nan=False)
    assert support.formats(result) == dict(result.assignment.layers)


def codes_of(graph: ir.Model) -> dict[str, str]:
    """Weight → the type of its codes."""
    found = {}
    for name, value in graph.graph.initializers.items():
        if "@" in name and name.endswith(".codes") and value.dtype is not None:
            found[name.partition("@")[0]] = value.dtype.name
    return found


# -- spaces of pairs and groups -------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "budget", [Budget(BudgetKind.BITS, 7.0), Budget(BudgetKind.SIZE, 0.8)], ids=str
)
def test_every_strategy_searches_pairs_and_groups_within_the_budget(
    strategy: Strategy, budget: Budget
) -> None:
    result = search(mlp(), samples(), replace(QUICK, strategy=strategy, budget=budget))
    assert_sound(result)
    layers = result.assignment.layers
    assert set(layers.values()) <= set(SPACE.split(","))
    # 20 numbers are no whole groups of 16.
    assert "int4g16:float32" not in (layers["two"], layers["three"]) or WEIGHTS["w2"][0] == 48
    assert layers["three"] != "int4g16:float32"
    space = prepare(mlp(), samples(), TARGETS["generic"], parse_space(SPACE)).space
    cost = cost_of(space, result.assignment.precisions(space))
    spent = cost.weight_bytes if budget.kind is BudgetKind.SIZE else cost.bops
    assert spent <= budget.limit(space) * (1 + 1e-9)
    types = {"int8": "INT8", "int4:int8": "INT4", "int4g16:float32": "INT4"}
    stored = codes_of(result.model)
    for layer, weight in (("one", "w1"), ("two", "w2"), ("three", "w3")):
        assert stored[weight] == types[layers[layer]]


@pytest.mark.parametrize(
    ("method", "freeze"),
    [(Method.CRITIC, 0.0), (Method.CRITIC, 0.75), (Method.REINFORCE, 0.75)],
)
def test_every_controller_learns_choices_that_differ_between_decisions(
    method: Method, freeze: float
) -> None:
    config = replace(
        QUICK,
        budget=Budget(BudgetKind.BITS, 8.5),
        controller=ControllerConfig(method=method),
        freeze=freeze,
    )
    assert_sound(search(mlp(), samples(), config))


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (
            "int4g16:float32",
            {"one": "int4g16:float32", "two": "int4g16:float32", "three": "float32"},
        ),
        ("int4:int8", dict.fromkeys(("one", "two", "three"), "int4:int8")),
        ("int8:int16", dict.fromkeys(("one", "two", "three"), "int8:int16")),
        ("e2m1:e4m3", dict.fromkeys(("one", "two", "three"), "e2m1:e4m3")),
    ],
)
def test_a_space_of_one_precision_is_that_precision(
    space: str, expected: dict[str, str]
) -> None:
    result = search(mlp(), samples(), replace(QUICK, space=space, steps=6))
    assert_sound(result)
    assert dict(result.assignment.layers) == expected


def test_groups_are_trained_and_emitted_as_blocks() -> None:
    result = search(mlp(), samples(), replace(QUICK, space="int4g16:float32"))
    assert_sound(result)
    assert all(layer.trained for layer in result.layers)
    blocks = [
        node.attributes.get_int("block_size", 0)
        for node in result.model.graph
        if node.op_type == "DequantizeLinear"
    ]
    assert blocks == [16, 16]
    assert "QuantizeLinear" not in ops(result.model)
    assert result.model.opset_imports[""] == 21
    assert result.cost.weight_bytes == (32 * 48 + 48 * 20) * 6 / 8
    assert [s.name for s in result.skipped] == ["three"]
    assert "cannot be cut into the groups of int4g16:float32" in result.skipped[0].reason


def test_a_search_repeats_and_continues_with_the_same_bytes(tmp_path: Path) -> None:
    config = replace(QUICK, budget=Budget(BudgetKind.BITS, 7.0), checkpoint_every=1)
    whole = search(mlp(), samples(), config)
    seen: list[int] = []

    def interrupt(report: Progress) -> None:
        seen.append(report.step)
        if report.step == 7 and report.phase.trains:
            raise KeyboardInterrupt

    folder = tmp_path / "checkpoint"
    with pytest.raises(InterruptedSearchError):
        search(mlp(), samples(), config, checkpoint=folder, progress=interrupt)
    result = search(mlp(), samples(), config, checkpoint=folder, resume=True)
    for other in (search(mlp(), samples(), config), result):
        assert other.assignment == whole.assignment
        assert (
            ir.to_proto(other.model).SerializeToString()
            == ir.to_proto(whole.model).SerializeToString()
        )
    assert seen[-1] == 7


# -- formats of weights and of activations apart --------------------------------------------

APART = replace(QUICK, space="int4,int8", separate=True, budget=Budget(BudgetKind.BITS, 5.6))
PAIRS = {"int4", "int4:int8", "int8:int4", "int8"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", Method)
def test_every_strategy_chooses_operands_apart_within_the_budget(
    strategy: Strategy, method: Method
) -> None:
    by_draws = strategy is Strategy.FLIQS and method is Method.REINFORCE
    config = replace(
        APART,
        strategy=strategy,
        controller=ControllerConfig(method=method),
        freeze=0.75 if by_draws else 0.0,
    )
    result = search(mlp(), samples(), config)
    assert_sound(result)
    assert set(result.assignment.layers.values()) <= PAIRS
    assert result.cost.effective_bits <= 5.6 * (1 + 1e-9)
    stored = codes_of(result.model)
    for layer, weight in (("one", "w1"), ("two", "w2"), ("three", "w3")):
        expected = result.assignment.layers[layer].partition(":")[0].upper()
        assert stored[weight] == expected


@pytest.mark.parametrize(
    ("space", "target"),
    [("int8,e4m3,e2m1", "generic"), ("int4,e4m3", "generic"), ("int3,int6", "qonnx")],
)
def test_pairs_of_every_kind_are_searched_and_emitted(space: str, target: str) -> None:
    formats = space.split(",")
    config = replace(APART, space=space, target=target, budget=None, strategy=Strategy.RANDOM)
    found = set()
    for seed in range(3):
        result = search(mlp(), samples(), replace(config, seed=seed, steps=3))
        assert_sound(result)
        found |= set(result.assignment.layers.values())
    assert found <= {a if a == b else f"{a}:{b}" for a in formats for b in formats}
    assert any(":" in name for name in found)


def test_size_is_of_weights_alone() -> None:
    config = replace(APART, budget=Budget(BudgetKind.SIZE, 0.5), strategy=Strategy.UNIFORM)
    assert set(search(mlp(), samples(), config).assignment.layers.values()) == {"int4:int8"}


def test_a_search_of_pairs_continues_with_the_same_bytes(tmp_path: Path) -> None:
    config = replace(APART, checkpoint_every=1)
    whole = search(mlp(), samples(), config)

    def interrupt(report: Progress) -> None:
        if report.step == 7 and report.phase.trains:
            raise KeyboardInterrupt

    folder = tmp_path / "checkpoint"
    with pytest.raises(InterruptedSearchError):
        search(mlp(), samples(), config, checkpoint=folder, progress=interrupt)
    tied = replace(config, separate=False)
    with pytest.raises(FliqsError, match="of a search with another settings"):
        search(mlp(), samples(), tied, checkpoint=folder, resume=True)
    result = search(mlp(), samples(), config, checkpoint=folder, resume=True)
    assert result.assignment == whole.assignment
    assert (
        ir.to_proto(result.model).SerializeToString()
        == ir.to_proto(whole.model).SerializeToString()
    )


def test_what_was_searched_apart_is_emitted_and_validated(tmp_path: Path) -> None:
    path, output, again = (tmp_path / name for name in ("m.onnx", "o.onnx", "again.onnx"))
    save_model(mlp(), path)
    options = ("--space", "int4,int8", "--separate", "--strategy", "random", "--seed", 1)
    found = invoke(
        "search", path, *options, "--bits", 5.6, "--steps", 2, "--threads", 1, "-o", output,
        "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    layers = {row["name"]: row["format"] for row in json.loads(found.stdout)["layers"]}
    assert any(":" in name for name in layers.values())
    assignment = output.with_suffix(".assignment.json")
    assert json.loads(assignment.read_text())["layers"] == layers
    for arguments in (
        ("emit", path, "--assignment", assignment, "-o", again),
        ("validate", again, "--reference", path),
        ("validate", output, "--target", "generic"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
    assert {row["name"]: set(row["precisions"]) for row in _inspected(path)} == {
        name: {
            a if a == b else f"{a}:{b}"
            for a in ("int4", "int5", "int6", "int7", "int8")
            for b in ("int4", "int5", "int6", "int7", "int8")
        }
        for name in layers
    }


def _inspected(path: Path) -> list[dict[str, Any]]:
    found = invoke("inspect", path, "--separate", "--json")
    assert found.exit_code == 0, found.output
    layers: list[dict[str, Any]] = json.loads(found.stdout)["layers"]
    return layers


@pytest.mark.parametrize("verb", ["search", "inspect", "profile"])
def test_a_target_without_pairs_refuses_in_one_line(verb: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    conv = "g (float[N,2,4,4] x) => (float[N,2,4,4] y) { [c] y = Conv (x, w) }"
    save_model(support.model(conv, weights={"w": (2, 2, 1, 1)}), path)
    output = ("-o", tmp_path / "out") if verb != "inspect" else ()
    found = invoke(verb, path, "--separate", "--target", "ort-cpu", *output)
    assert found.exit_code == ConfigError.exit_code
    assert found.stderr.splitlines()[-1] == (
        "Error: --separate changes nothing: target ort-cpu runs no layer of this model in"
        " different formats of int8, float32; leave it out, or ask for other formats"
    )


# -- emission and the command line ----------------------------------------------------------


def test_an_assignment_of_pairs_and_groups_is_emitted() -> None:
    layers = {"one": "int4g16:float32", "two": "INT4:INT8", "three": "int8:int16"}
    emitted = api.emit(mlp(), Assignment(layers), samples())
    assert_sound(emitted)
    assert dict(emitted.assignment.layers) == {name: p.lower() for name, p in layers.items()}
    assert codes_of(emitted.model) == {"w1": "INT4", "w2": "INT4", "w3": "INT8"}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"three": "int4g16:float32"}, "gives layer 'three' int4g16:float32, which generic"),
        ({"one": "int4g16"}, "activations have no groups"),
        ({"one": "float32:int8"}, "activations alone are not quantized"),
    ],
)
def test_an_assignment_that_a_layer_cannot_take_is_refused(
    layers: dict[str, str], message: str
) -> None:
    whole = dict.fromkeys(("one", "two", "three"), "int8") | layers
    with pytest.raises(ConfigError, match=message):
        api.emit(mlp(), Assignment(whole), samples())


def test_the_command_line_takes_and_writes_pairs(tmp_path: Path) -> None:
    path, output, again = (tmp_path / name for name in ("m.onnx", "o.onnx", "again.onnx"))
    save_model(mlp(), path)
    options = ("--steps", 4, "--batch-size", 8, "--threads", 1, "--size", 0.8)
    found = invoke("search", path, "--space", SPACE, *options, "-o", output)
    assert found.exit_code == 0, found.output
    assignment = output.with_suffix(".assignment.json")
    layers = json.loads(assignment.read_text())["layers"]
    assert set(layers.values()) <= set(SPACE.split(","))
    emitted = invoke("emit", path, "--assignment", assignment, "-o", again)
    assert emitted.exit_code == 0, emitted.output
    refusal = invoke("search", path, "--space", "int4g16", *options, "-o", output)
    assert refusal.exit_code == ConfigError.exit_code
    assert "activations have no groups" in refusal.stderr


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# -- targets that ask for other scales ------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "shifts": {"power_of_two_scales": True},
    "shifts and zero points": {
        "power_of_two_scales": True,
        "activations": Activations.ASYMMETRIC,
    },
    "zero points": {"activations": Activations.ASYMMETRIC},
    "signed": {"activations": Activations.SYMMETRIC, "activation_type": "INT8"},
    "biases of weights": {"bias": Bias.WEIGHT},
    "float biases": {"bias": Bias.FLOAT},
    "one scale per weight": {"per_channel_ops": ()},
    "tensors": {"placement": Placement.TENSORS, "between_ops": ("Mul",)},
}


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The generic target with some change, known by the name ``mine``."""
    mine = replace(TARGETS["generic"], name="mine", **CHANGES[request.param])
    monkeypatch.setitem(TARGETS, "mine", mine)
    return mine


def for_targets(names: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", names, indirect=True)


@for_targets(list(CHANGES))
def test_every_kind_of_target_is_searched(target: Target) -> None:
    config = replace(
        QUICK,
        target=target.name,
        space="int4,int8,int4:int8,float32",
        budget=Budget(BudgetKind.BITS, 6.0),
    )
    result = search(mlp(), samples(), config)
    assert_sound(result)
    assert result.assignment.target == "mine"


@for_targets(["shifts", "shifts and zero points"])
def test_after_a_search_with_refreshes_every_scale_is_a_power_of_two(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[dict[tuple[str, str], npt.NDArray[np.float32]]] = []

    def noted(*arguments: Any) -> Any:
        tables.append(weight_scales(*arguments))
        return tables[-1]

    monkeypatch.setattr("onnx_fliqs.refit_thresholds.weight_scales", noted)
    config = replace(QUICK, target=target.name, space="int4,int8,int4:int8")
    refreshed = replace(config, refresh=3, threshold_rate=0.0)
    assert_powers_of_two(search(mlp(), samples(), refreshed))
    assert len(tables) >= 3
    for table in tables:
        for scale in table.values():
            np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
    # By default thresholds are learned, but not these.
    assert_powers_of_two(search(mlp(), samples(), config))


def assert_powers_of_two(result: SearchResult) -> None:
    assert_sound(result)
    scales = [n for n in result.model.graph.initializers if n.endswith(".scale")]
    assert len(scales) >= 6
    for name in scales:
        np.testing.assert_array_equal(np.frexp(initializer(result.model, name))[0], 0.5)


@for_targets(["zero points"])
def test_a_search_keeps_the_zero_points_of_its_calibration(target: Target) -> None:
    result = search(
        mlp(), samples(), replace(QUICK, target=target.name, space="int8,int8:int16")
    )
    assert_sound(result)
    points = {}
    for node in result.model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[2] is not None
            array = initializer(result.model, str(node.inputs[2].name))
            points[str(node.name).partition("@")[0]] = int(array) / np.iinfo(array.dtype).max
    assert points["r"] == 0  # behind the Relu
    assert 0 < points["t"] < 0.4  # x * sigmoid(x)
    assert 0.3 < points["x"] < 0.7
    feeds = random_feeds(result.model, 5, batch=4)
    # The graph of 8 bits computes nearly what the float model of its weights does.
    assert result.trained is not None
    (want,), (got,) = run(result.trained, feeds), run(result.model, feeds)
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.1 * np.sqrt(np.mean(want**2))


@for_targets(["biases of weights"])
def test_biases_like_weights_are_trained_with_pairs_and_groups(target: Target) -> None:
    result = search(mlp(), samples(), replace(QUICK, target=target.name))
    assert_sound(result)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "generic"])
def test_each_profile_is_searched_in_its_default_space(name: str) -> None:
    text = """g (float[N,3,8,8] x) => (float[N,5] y) {
        [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        r = Relu (a)
        [c2] b = Conv (r, w2, b2)
        s = Add (b, r)
        [c3] c = Conv (s, w3, b3)
        p = GlobalAveragePool (c)
        f = Flatten (p)
        [fc] y = Gemm <transB = 1> (f, w4, b4) }"""
    weights = {
        "w1": (20, 3, 3, 3),
        "b1": (20,),
        "w2": (20, 20, 1, 1),
        "b2": (20,),
        "w3": (64, 20, 3, 3),
        "b3": (64,),
        "w4": (5, 64),
        "b4": (5,),
    }
    plain = support.model(text, weights=weights)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (40, 3, 8, 8)).astype(np.float32)
    data = Dataset({"x": x}, rng.integers(0, 5, 40), input_specs(plain))
    result = search(plain, data, replace(QUICK, target=name, space=None, steps=8))
    assert_sound(result)
    runs = TARGETS[name].precisions
    assert runs is None or set(result.assignment.layers.values()) <= set(runs)
