"""What a model is judged by, and that a search gets there."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import support
from onnx_fliqs import api
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.judged import compared_names, exposed, judged_values, tensor_outputs
from onnx_fliqs.objective import LossKind, Metric, choose_objective
from onnx_fliqs.report import SearchResult
from onnx_fliqs.search_loop import search

LAYERS = "a = MatMul (x, w1) r = Relu (a) s = MatMul (r, w2)"
WEIGHTS = {"w1": (8, 6), "w2": (6, 5), "w3": (4, 4), "table": (5, 4)}
DETECTOR = """g (float[1,3,4,4] x)
        => (int64[M,3] rows, float[M,4] found, float[1,2,16] scores) {
    f = Conv (x, wf)
    r = Relu (f)
    b = Conv (r, wb)
    flat = Reshape (b, box_shape)
    turned = Transpose <perm = [0, 2, 1]> (flat)
    boxes = Sigmoid (turned)
    c = Conv (r, wc)
    logits = Reshape (c, score_shape)
    scores = Sigmoid (logits)
    rows = NonMaxSuppression (boxes, scores, most, overlap, least)
    column = Gather <axis = 1> (rows, two)
    index = Reshape (column, all)
    first = Squeeze (boxes, zero)
    found = Gather <axis = 0> (first, index)
}"""
DETECTOR_WEIGHTS = {"wf": (4, 3, 1, 1), "wb": (4, 4, 1, 1), "wc": (2, 4, 1, 1)}
DETECTOR_CONSTANTS: dict[str, float | list[int]] = {
    "box_shape": [1, 4, 16],
    "score_shape": [1, 2, 16],
    "two": [2],
    "all": [-1],
    "zero": [0],
    "most": [8],
    "overlap": 0.5,
    "least": 0.5,
}


def build(outputs: str, tail: str, **constants: float | list[int]) -> ir.Model:
    """A model of two layers and what comes behind them."""
    built = support.model(
        f"g (float[N,8] x) => ({outputs}) {{ {LAYERS} {tail} }}",
        weights=WEIGHTS,
        constants=constants,
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(built)))


def detector() -> ir.Model:
    built = support.model(DETECTOR, weights=DETECTOR_WEIGHTS, constants=DETECTOR_CONSTANTS)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(built)))


def names(model: ir.Model) -> list[str]:
    return [judged.name for judged in judged_values(model)]


@pytest.mark.parametrize(
    ("outputs", "tail", "expected"),
    [
        ("float[N,5] y", "y = Sigmoid (s)", ["y"]),
        ("float[N,5] y, float[N,6] z", "y = Identity (s) z = Exp (r)", ["y", "z"]),
        ("int64[N,1] y", "y = ArgMax <axis = 1> (s)", ["s"]),
        ("int64[N,1] y", "p = Softmax (s) y = ArgMax <axis = 1> (p)", ["p"]),
        ("float[N,5] p, int64[N,1] y", "p = Softmax (s) y = ArgMax <axis = 1> (s)", ["p"]),
        ("int64[N,1] y, float[N,5] p", "y = ArgMax <axis = 1> (s) p = Softmax (s)", ["p"]),
        ("float[N,2] v, int64[N,2] i", "v, i = TopK (s, k)", ["s"]),
        ("bool[N,5] y", "y = Greater (s, zero)", ["s"]),
        ("float[N,5] y", "b = Greater (s, zero) y = Cast <to = 1> (b)", ["s"]),
        ("uint8[N,5] y", "m = Mul (s, scale) y = Cast <to = 2> (m)", ["m"]),
        ("float[N,5] y", "m = Mul (s, scale) t = Round (m) y = Div (t, scale)", ["m"]),
        ("seq(float[N,M]) y", "y = SequenceConstruct (s, r)", ["s", "r"]),
        ("int64[M,2] y", "n = NonZero (s) y = Transpose (n)", ["s"]),
        # A gate is no decision of the whole: the product has a slope.
        (
            "float[N,5] y",
            "b = Greater (s, zero) g = Cast <to = 1> (b) y = Mul (s, g)",
            ["y"],
        ),
        # What a layer makes of a choice can be compared again.
        (
            "float[N,2,4] y",
            "v, i = TopK (s, k) e = Gather (table, i) y = MatMul (e, w3)",
            ["y"],
        ),
        # The shape of this output is the model's own, not that of its input.
        ("float[N,5] y", "h = Shape (s) t = Reshape (s, h) y = Neg (t)", ["y"]),
        ("float[M] y", "b = Greater (s, zero) y = Compress (s, b)", ["s"]),
        # It does not change with the weights.
        ("float[N,5] y, float[N,8] z", "y = Neg (s) z = Neg (x)", ["y"]),
    ],
)
def test_what_is_judged(outputs: str, tail: str, expected: list[str]) -> None:
    found = names(build(outputs, tail, k=[2], zero=0.0, scale=4.0))
    assert found == expected


def test_a_detector_is_judged_by_its_boxes_and_scores() -> None:
    model = detector()
    # The scores are an output; the boxes are not, and are judged once.
    assert names(model) == ["scores", "first"]
    assert tensor_outputs(model) == ["rows", "found", "scores"]


def test_without_layers_the_float_outputs_count() -> None:
    model = support.model(
        "g (float[N,5] x) => (float[N,5] y, int64[N,1] k)"
        " { y = Relu (x) k = ArgMax <axis = 1> (x) }"
    )
    assert names(model) == ["y"]
    model = support.model("g (float[N,5] x) => (int64[N,1] k) { k = ArgMax <axis = 1> (x) }")
    assert names(model) == []
    assert compared_names(model) == ["k"]


def test_values_of_control_flow_are_seen_through() -> None:
    model = build(
        "int64[N,1] y",
        """b = If (c) <
               then_branch = t () => (float[N,5] p) { p = Exp (s) },
               else_branch = e () => (float[N,5] q) { q = Neg (s) }>
           y = ArgMax <axis = 1> (b)""".replace("(c)", "(yes)"),
    )
    graph = model.graph
    graph.register_initializer(
        ir.val("yes", const_value=ir.tensor(np.array(True), name="yes"))
    )
    node = next(node for node in graph if node.op_type == "If")
    node.replace_input_with(0, graph.initializers["yes"])
    assert names(model) == ["b"]


def test_exposing_adds_outputs_to_a_copy() -> None:
    model = build("int64[N,1] y", "y = ArgMax <axis = 1> (s)")
    watched = exposed(model, ["s", "y"])
    assert [value.name for value in watched.graph.outputs] == ["y", "s"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert exposed(model, ["y"]) is model


def test_an_emitted_model_is_judged_by_the_same_values() -> None:
    case = support.calibrated(build("int64[N,1] y", "y = ArgMax <axis = 1> (s)"))
    emitted = case.emitted(case.space.uniform(case.space.precisions[-1]))
    assert names(case.canonical) == names(emitted) == ["s"]


@pytest.mark.parametrize(
    ("axis", "kind", "metric"),
    [
        (1, LossKind.DIVERGENCE, Metric.AGREEMENT),
        (-2, LossKind.DIVERGENCE, Metric.AGREEMENT),
        (2, LossKind.SQUARED_ERROR, Metric.R2),
    ],
)
def test_argmax_tells_where_the_classes_are(axis: int, kind: LossKind, metric: Metric) -> None:
    model = build(
        "int64[N,A,B] y",
        f"t = Unsqueeze (s, two) y = ArgMax <axis = {axis}> (t)",
        two=[2],
    )
    values = {"t": np.random.default_rng(0).standard_normal((4, 5, 1)).astype(np.float32)}
    objective = choose_objective(model, values, labels=None, distillation=0.5)
    (term,) = objective.terms
    assert (term.kind, term.output, objective.metric) == (kind, "t", metric)
    (note,) = objective.notes
    assert note == (
        "output 'y' has no gradient or no fixed shape: loss and quality are those of 't', on"
        " which it rests"
    )


# -- searches -------------------------------------------------------------------------------


def searched(
    model: ir.Model, *, labels: bool = False, target: str = "generic"
) -> tuple[Dataset, SearchResult]:
    rng = np.random.default_rng(0)
    specs = input_specs(model)
    shape = (20, *(size or 1 for size in (specs[0].shape or ())[1:]))
    x = rng.standard_normal(shape).astype(np.float32)
    data = Dataset({"x": x}, rng.integers(0, 5, 20) if labels else None, specs)
    space = "int8" if target == "ort-cpu" else "int8,int16"
    config = SearchConfig(steps=4, batch_size=4, workers=2, space=space, target=target)
    result = search(model, data, config)
    assert [v.name for v in result.model.graph.outputs] == [
        v.name for v in model.graph.outputs
    ]
    assert all(layer.trained for layer in result.layers)
    return data, result


@pytest.mark.parametrize(("labels", "target"), [(True, "generic"), (False, "ort-cpu")])
@pytest.mark.parametrize(
    ("outputs", "tail"),
    [
        ("int64[N] y", "y = ArgMax <axis = 1, keepdims = 0> (s)"),
        ("float[N,2] v, int64[N,2] i", "v, i = TopK (s, k)"),
        ("bool[N,5] y", "y = Greater (s, zero)"),
        ("seq(float[N,M]) y", "y = SequenceConstruct (s, r)"),
    ],
    ids=["classes", "best", "decisions", "sequence"],
)
def test_models_that_end_in_decisions_are_trained(
    outputs: str, tail: str, labels: bool, target: str
) -> None:
    model = build(outputs, tail, k=[2], zero=0.0)
    data, result = searched(model, labels=labels, target=target)
    assert result.metric == ("accuracy" if labels else "agreement")
    assert np.isfinite(result.loss or 0)
    assert any("on which it rests" in warning for warning in result.warnings)
    assert api.validate(result.model, data=data).level is result.optimization_level
    emitted = api.emit(model, result.assignment, data)
    assert emitted.metric == result.metric
    assert any("on which it rests" in warning for warning in emitted.warnings)


@pytest.mark.parametrize("target", ["generic", "ort-cpu"])
def test_a_detector_is_searched_although_its_outputs_change_their_size(target: str) -> None:
    data, result = searched(detector(), target=target)
    assert result.metric == "r2"
    assert result.quantized_quality > 0.9
    found = api.validate(result.model, data=data, reference=detector())
    assert found.reference is not None
    assert found.reference.rms < 0.2
    evaluation = api.evaluate(result.model, data, against=detector())
    assert evaluation.value > 0.9
    assert {warning.split("'")[1] for warning in evaluation.warnings} <= {"rows", "found"}


def test_inspect_tells_what_trains_in_front_of_a_decision() -> None:
    layers = api.inspect(build("int64[N,1] y", "y = ArgMax <axis = 1> (s)")).layers
    assert [layer.frozen for layer in layers] == [None, None]
