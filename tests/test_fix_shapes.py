"""Graphs of fixed shapes, for hardware that compiles them for one size."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs import Assignment, emit, evaluate
from onnx_fliqs.api import validate
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.emission import ship
from onnx_fliqs.passes.fix_shapes import FixShapesPass
from onnx_fliqs.targets import TARGETS
from support import check_pass, model, random_feeds
from support import evaluate as run_all

TEXT = """g (float[N,3,H,8] x, float[4] bias) => (float[N,K] y, float[N,4,A,B] r) {
    [c] a = Conv <pads = [1, 1, 1, 1]> (x, w)
    [r] r = Relu (a)
    [s] s = Shape <end = 1> (r)
    [j] t = Concat <axis = 0> (s, rest)
    [f] f = Reshape (r, t)
    [m] g1 = ReduceMean <keepdims = 0> (r, axes)
    [b] y = Add (g1, bias) }"""


def network() -> ir.Model:
    return model(TEXT, weights={"w": (4, 3, 3, 3)}, constants={"rest": [-1], "axes": [2, 3]})


def shapes(graph: ir.Model) -> dict[str, list[int | str | None]]:
    values = [*graph.graph.inputs, *(v for node in graph.graph for v in node.outputs)]
    return {
        str(v.name): [n if isinstance(n, int) else n.value for n in v.shape or ()]
        for v in values
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_every_shape_follows_from_those_of_the_inputs(batch: int) -> None:
    before = network()
    fixing = FixShapesPass({"x": (batch, 3, 6, 8)})
    after = check_pass(fixing, before, signature=False)
    found = shapes(after)
    assert (found["x"], found["bias"]) == ([batch, 3, 6, 8], [4])
    assert (found["r"], found["y"]) == ([batch, 4, 6, 8], [batch, 4])
    assert all(isinstance(size, int) for sizes in found.values() for size in sizes)
    assert [n.name for n in after.graph] == [n.name for n in before.graph]
    feeds = random_feeds(before)
    feeds["x"] = np.resize(feeds["x"], (batch, 3, 6, 8))
    first, second = run_all((before, after), feeds)
    for want, got in zip(first, second, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_graph_of_fixed_shapes_is_left_alone() -> None:
    given = model("g (float[1,4] x) => (float[N,4] y) { y = Relu (x) }")
    assert not FixShapesPass({})(given).modified


def test_zero_and_minus_one_count_as_free() -> None:
    given = model("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }")
    given.graph.inputs[0].shape = ir.Shape([0, 4])
    fixed = FixShapesPass({"x": (1, 4)})(given).model
    assert shapes(fixed) == {"x": [1, 4], "y": [1, 4]}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "no sizes are given for input x"),
        ({"x": (1, 3, 6)}, "input x has the shape .*, not"),
        ({"x": (1, 3, 6, 7)}, "input x has the shape .*, not"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=message):
        FixShapesPass(sizes)(network())


def data(count: int) -> Dataset:
    rng = np.random.default_rng(0)
    given = model("g (float[N,4] x) => (float[N,3] y) { [fc] y = MatMul (x, w) }")
    x = rng.standard_normal((count, 4)).astype(np.float32)
    return Dataset({"x": x}, rng.integers(0, 3, count), input_specs(given))


def dense() -> ir.Model:
    text = "g (float[N,4] x) => (float[N,3] y) { [fc] y = MatMul (x, w) }"
    return model(text, weights={"w": (4, 3)})


def test_only_targets_that_need_it_get_fixed_shapes() -> None:
    for name, target in TARGETS.items():
        graph, notes = ship(dense(), target, data(5))
        assert bool(notes) is target.static_shapes is (shapes(graph)["x"] == [1, 4]), name
    assert notes_of("qnn") == ("qnn runs fixed shapes only; the graph has those of x [1, 4]",)


def notes_of(name: str) -> tuple[str, ...]:
    return ship(dense(), TARGETS[name], data(5))[1]


def test_what_is_emitted_has_one_sample_and_is_measured_all_the_same() -> None:
    result = emit(dense(), Assignment({"fc": "int8"}, "qnn"), data(10))
    assert shapes(result.model)["x"] == [1, 4]
    assert shapes(result.model)["y"] == [1, 3]
    known = data(10)
    fixed = Dataset(known.stored_inputs, known.labels, input_specs(result.model))
    assert evaluate(result.model, fixed).value == result.quantized_quality
    assert validate(result.model, data=fixed).problems == ()
