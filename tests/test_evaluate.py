"""Quality and agreement of model files: every sample counts once, whatever the batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import support
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.emission import LEVEL_KEY
from onnx_fliqs.errors import ConfigError, DataError, FliqsError, UnsupportedError
from onnx_fliqs.evaluation import (
    evaluate_model,
    feeds_of,
    most_judged,
    not_finite,
    open_session,
    run_dataset,
)
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import Metric
from onnx_fliqs.runtime import OptimizationLevel, make_session

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

LINEAR = "g (float[BATCH,4] x) => (float[BATCH,3] y) { y = MatMul (x, w) }"


def linear(batch: str = "N", output: str = "y", inputs: str = "x") -> ir.Model:
    text = LINEAR.replace("BATCH", batch)
    text = (
        text.replace(" y", f" {output}")
        .replace(" x)", f" {inputs})")
        .replace("(x", f"({inputs}")
    )
    return support.model(text, weights={"w": (4, 3)})


def data_for(model: ir.Model, count: int, *, labels: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 4)).astype(np.float32)
    specs = input_specs(model)
    return Dataset({specs[0].name: x}, rng.integers(0, 3, count) if labels else None, specs)


def scores(model: ir.Model, data: Dataset) -> npt.NDArray[np.float32]:
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    x = next(iter(data.stored_inputs.values()))
    return np.asarray(x @ weight.numpy(), np.float32)


@pytest.mark.parametrize("batch", ["N", "1", "4", "7", "64"])
@pytest.mark.parametrize("count", [1, 7, 10, 65])
def test_accuracy_counts_every_sample_once(batch: str, count: int) -> None:
    model = linear(batch)
    data = data_for(model, count)
    found = evaluate_model(model, data)
    expected = float(np.mean(scores(model, data).argmax(axis=1) == data.labels))
    assert found.value == expected
    assert found.samples == count
    assert found.metric is Metric.ACCURACY


@pytest.mark.parametrize("count", [1, 4, 6, 11])
def test_a_fixed_batch_is_filled_up_with_the_last_sample(count: int) -> None:
    data = data_for(linear("4"), count)
    feeds = list(feeds_of(data))
    assert all(feed["x"].shape == (4, 4) for feed in feeds)
    joined = np.concatenate([feed["x"] for feed in feeds])
    np.testing.assert_array_equal(joined[:count], data.stored_inputs["x"])
    for row in joined[count:]:
        np.testing.assert_array_equal(row, data.stored_inputs["x"][-1])


def test_a_free_batch_is_not_filled_up() -> None:
    data = data_for(linear(), 70)
    assert sum(len(feed["x"]) for feed in feeds_of(data)) == 70


@pytest.mark.parametrize(("side", "size"), [(32, 64), (256, 8)])
def test_big_images_are_run_a_few_at_a_time(side: int, size: int) -> None:
    shape = f"N,3,{side},{side}"
    model = support.model(f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Relu (x) }}")
    data = Dataset({"x": np.zeros((66, 3, side, side))}, None, input_specs(model))
    sizes = [len(feed["x"]) for feed in feeds_of(data)]
    assert sizes == [size] * (66 // size) + [66 % size]


@pytest.mark.parametrize(
    ("batch", "kept", "samples"),
    [("N", 21, 5), ("N", 1000, 250), ("N", 3, 1), ("4", 21, 5), ("4", 3, 1)],
)
def test_as_many_samples_are_judged_as_can_be_kept(
    batch: str, kept: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input has 4 numbers, an output 3."""
    monkeypatch.setattr("onnx_fliqs.evaluation._MOST_KEPT", kept)
    model = linear(batch)
    assert most_judged(make_session(model), data_for(model, 10), ["y"]) == samples


@pytest.mark.parametrize("batch", ["N", "4"])
def test_outputs_are_in_the_order_of_the_samples(batch: str) -> None:
    model = linear(batch)
    data = data_for(model, 70)
    session = make_session(ir.to_proto(model).SerializeToString())
    found = run_dataset(session, data, ["y"])["y"]
    assert found.shape == (70, 3)
    # A sum of four products, in another order.
    np.testing.assert_allclose(found, scores(model, data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", ["N", "4"])
def test_an_output_without_samples_is_handed_on(batch: str) -> None:
    model = support.model(
        f"g (float[{batch},4] x) => (float[{batch},3] y, float s)"
        " { y = MatMul (x, w) s = ReduceMax <keepdims = 0> (w) }",
        weights={"w": (4, 3)},
    )
    session = make_session(ir.to_proto(model).SerializeToString())
    found = run_dataset(session, data_for(model, 10), ["y", "s"])
    assert found["y"].shape == (10, 3)
    assert found["s"].shape == ()
    assert evaluate_model(model, data_for(model, 10)).samples == 10


def test_the_example_has_the_accuracy_that_it_was_published_with() -> None:
    model = load_model(EXAMPLES / "digits_cnn.onnx")
    data = load_npz(EXAMPLES / "digits_test.npz", input_specs(model))
    found = evaluate_model(model, data)
    assert found.samples == 600
    assert found.value > 0.97
    assert found.to_dict() == {
        "schema": 1,
        "metric": "accuracy",
        "value": found.value,
        "samples": 600,
        "optimization_level": "default",
        "warnings": [],
    }


def test_without_labels_another_model_is_needed() -> None:
    model = linear()
    with pytest.raises(ConfigError, match="--against"):
        evaluate_model(model, data_for(model, 5, labels=False))


@pytest.mark.parametrize("batch", ["N", "4"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_model_agrees_with_itself(batch: str, labels: bool) -> None:
    model = linear(batch)
    found = evaluate_model(model, data_for(model, 10, labels=labels), against=linear(batch))
    assert found.metric is Metric.AGREEMENT
    assert found.value == 1.0
    assert found.samples == 10


def test_agreement_is_the_share_of_the_same_decisions() -> None:
    model, other = linear(), linear()
    weight = other.graph.initializers["w"].const_value
    assert weight is not None
    rolled = np.roll(weight.numpy(), 1, axis=0)
    other.graph.initializers["w"].const_value = ir.tensor(rolled, name="w")
    data = data_for(model, 50, labels=False)
    found = evaluate_model(model, data, against=other)
    same = scores(model, data).argmax(axis=1) == scores(other, data).argmax(axis=1)
    assert found.value == float(np.mean(same))
    assert 0 < found.value < 1


def test_without_classes_the_explained_variance_counts() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { y = MatMul (x, w) }"
    model = support.model(text, weights={"w": (4, 4)})
    other = model.clone()
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    other.graph.initializers["w"].const_value = ir.tensor(
        weight.numpy() * np.float32(2), name="w"
    )
    data = data_for(model, 40, labels=False)
    assert evaluate_model(model, data, against=model).value == 1.0
    found = evaluate_model(model, data, against=other)
    assert found.metric is Metric.R2
    # Half of every output is missing: about a quarter of the variance.
    assert 0.6 < found.value < 0.8


@pytest.mark.parametrize(("mine", "theirs"), [("N", "4"), ("4", "N"), ("4", "3")])
def test_a_model_may_be_compared_with_one_of_another_batch_size(
    mine: str, theirs: str
) -> None:
    model = linear(mine)
    data = data_for(model, 10, labels=False)
    assert evaluate_model(model, data, against=linear(theirs)).value == 1.0


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (linear(output="z"), "outputs of the model ('y') .* ('z')"),
        (linear(inputs="image"), "inputs of the model ('x') .* ('image')"),
        (
            support.model(
                "g (float[N,4] x) => (float[N,3] y, float[N,3] z)"
                " { y = MatMul (x, w) z = Relu (y) }",
                weights={"w": (4, 3)},
            ),
            "outputs of the model ('y') .* ('y', 'z')",
        ),
    ],
    ids=["output", "input", "further output"],
)
def test_models_of_different_signatures_are_not_compared(other: ir.Model, named: str) -> None:
    model = linear()
    pattern = named.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ConfigError, match=pattern) as error:
        evaluate_model(model, data_for(model, 5, labels=False), against=other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2, 3, 0]), "labels run from 0 to 3, but .* 3 classes"),
        (np.zeros((5, 2), np.int64), r"shape \[N, 2\], but output 'y' needs \[N\]"),
        (np.zeros((5, 1), np.int64), r"shape \[N, 1\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    labels: npt.NDArray[np.int64], message: str
) -> None:
    model = linear()
    with pytest.raises(DataError, match=message):
        evaluate_model(model, replace(data_for(model, 5), stored_labels=labels))


def test_labels_for_every_position_are_counted() -> None:
    model = support.model("g (float[N,3,5] x) => (float[N,3,5] y) { y = Identity (x) }")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 3, 5)).astype(np.float32)
    labels = x.argmax(axis=1)
    labels[0, 0] = (labels[0, 0] + 1) % 3
    found = evaluate_model(model, Dataset({"x": x}, labels, input_specs(model)))
    assert found.value == 34 / 35


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_numbers_are_compared_with_labels(shape: tuple[int, ...]) -> None:
    model = support.model(
        "g (float[N,4] x) => (int64[N] i, float[N,1] y)"
        " { y = MatMul (x, w) i = ArgMax <axis = 1, keepdims = 0> (x) }",
        weights={"w": (4, 1)},
    )
    x = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    y = support.run(model, {"x": x})[1]
    for labels, expected in ((y, 1.0), (y + np.std(y), 0.0)):
        data = Dataset({"x": x}, labels.reshape(shape), input_specs(model))
        found = evaluate_model(model, data)
        assert found.metric is Metric.LABEL_R2
        assert found.value == pytest.approx(expected, abs=1e-5)
    wrong = Dataset({"x": x}, np.zeros((6, 3), np.float32), input_specs(model))
    with pytest.raises(DataError, match=r"floats of the shape \[N, 3\]"):
        evaluate_model(model, wrong)


def test_labels_without_classes_are_refused() -> None:
    model = support.model(
        "g (float[N,4] x) => (float[N] y) { m = MatMul (x, w) y = Squeeze (m) }",
        weights={"w": (4, 1)},
    )
    with pytest.raises(DataError, match="no output has the shape"):
        evaluate_model(model, data_for(model, 5))


def argmax(weight: str, keepdims: int = 0) -> ir.Model:
    shape = "[N,1]" if keepdims else "[N]"
    return support.model(
        f"g (float[N,4] x) => (int64{shape} y) {{ a = MatMul (x, {weight})"
        f" y = ArgMax <axis = 1, keepdims = {keepdims}> (a) }}",
        weights={weight: (4, 3)},
    )


@pytest.mark.parametrize("keepdims", [0, 1])
def test_classes_are_compared_with_labels_and_with_each_other(keepdims: int) -> None:
    model, other = argmax("w", keepdims), argmax("v", keepdims)
    data = data_for(model, 50)
    mine, theirs = (
        support.run(m, dict(data.stored_inputs))[0].reshape(-1) for m in (model, other)
    )
    found = evaluate_model(model, data)
    assert found.metric is Metric.ACCURACY
    assert found.value == float(np.mean(mine == data.labels))
    found = evaluate_model(model, replace(data, stored_labels=None), against=other)
    assert found.metric is Metric.AGREEMENT
    assert found.value == float(np.mean(mine == theirs))
    assert found.warnings == ()


def test_classes_that_are_not_one_for_each_label_are_refused() -> None:
    model = argmax("w")
    with pytest.raises(DataError, match=r"the shape \[N, 2\], but output 'a' needs \[N\]"):
        evaluate_model(
            model, replace(data_for(model, 5), stored_labels=np.zeros((5, 2), np.int64))
        )


CHOSEN = """g (float[N,4] x) => (float[N,3] y, int64[M,2] places, string[N] words) {
    a = MatMul (x, w)
    y = Identity (a)
    zero = Constant <value_float = 0.0> ()
    positive = Greater (a, zero)
    rows = NonZero (positive)
    places = Transpose (rows)
    label = Constant <value_string = "word"> ()
    n = Shape <start = 0, end = 1> (x)
    words = Expand (label, n)
}"""


def test_outputs_of_another_size_or_kind_are_left_out_with_a_warning() -> None:
    model = support.model(CHOSEN, weights={"w": (4, 3)})
    other = model.clone()
    weight = support.initializer(model, "w")
    other.graph.initializers["w"].const_value = ir.tensor(
        weight + np.roll(weight, 1, axis=0) / np.float32(2)
    )
    found = evaluate_model(model, data_for(model, 70, labels=False), against=other)
    assert found.metric is Metric.AGREEMENT
    assert 0.5 < found.value < 1
    (warning,) = found.warnings
    assert warning == (
        "output 'places' is not compared: it has a shape that depends on the numbers in it"
    )
    # With itself it has the same shape; floats decide all the same.
    found = evaluate_model(model, data_for(model, 70, labels=False), against=model)
    assert (found.value, found.warnings) == (1.0, ())


def test_models_without_comparable_outputs_are_refused() -> None:
    text = CHOSEN.replace("float[N,3] y, ", "").replace("y = Identity (a)", "")
    model = support.model(text, weights={"w": (4, 3)})
    other = model.clone()
    weight = support.initializer(model, "w")
    other.graph.initializers["w"].const_value = ir.tensor(np.abs(weight))
    with pytest.raises(UnsupportedError, match="can be compared: 'places' has a shape that"):
        evaluate_model(model, data_for(model, 70, labels=False), against=other)


def test_an_output_of_no_rows_is_not_compared() -> None:
    model = support.model(
        """g (float[N,4] x) => (float[N,3] y, float[M] z) {
            y = MatMul (x, w)
            never = Constant <value = bool[3] {0, 0, 0}> ()
            z = Compress (y, never) }""",
        weights={"w": (4, 3)},
    )
    found = evaluate_model(model, data_for(model, 5, labels=False), against=model)
    assert found.value == 1.0
    assert found.warnings == ("output 'z' is not compared: it is empty",)


def test_not_a_number_is_no_agreement() -> None:
    model = support.model(
        "g (float[N,4] x) => (float[N,3] y) { m = MatMul (x, w) y = Sqrt (m) }",
        weights={"w": (4, 3)},
    )
    data = data_for(model, 50)
    whole = ~np.isnan(support.run(model, dict(data.stored_inputs))[0]).any(axis=1)
    assert 0 < whole.mean() < 1
    found = evaluate_model(model, replace(data, stored_labels=None), against=model)
    assert found.value == float(whole.mean())
    assert evaluate_model(model, data).value <= float(whole.mean())


@pytest.mark.parametrize("level", list(OptimizationLevel))
def test_a_model_runs_at_the_level_that_it_asks_for(level: OptimizationLevel) -> None:
    model = linear()
    model.metadata_props[LEVEL_KEY] = level.value
    assert open_session(model)[1] is level
    assert evaluate_model(model, data_for(model, 5)).level is level


def test_the_level_can_be_overridden() -> None:
    model = linear()
    model.metadata_props[LEVEL_KEY] = "none"
    found = evaluate_model(model, data_for(model, 5), level=OptimizationLevel.BASIC)
    assert found.level is OptimizationLevel.BASIC
    assert found.to_dict()["optimization_level"] == "basic"


def test_a_level_that_does_not_exist_is_refused() -> None:
    model = linear()
    model.metadata_props[LEVEL_KEY] = "breakneck"
    with pytest.raises(FliqsError, match="breakneck"):
        evaluate_model(model, data_for(model, 5))


def test_outputs_that_are_not_finite_are_counted_where_the_reference_is() -> None:
    bad = np.array([[1.0, np.nan], [np.inf, 2.0], [3.0, 4.0]], np.float32)
    reference = {"y": np.ones((3, 2), np.float32), "none": np.zeros((0, 4), np.float32)}
    outputs = {"y": bad, "none": reference["none"], "extra": bad, "count": np.array(3)}
    (warning,) = not_finite(reference, outputs)
    assert warning.startswith("'y' of the quantized model is not finite for 2 of 3 samples")
    assert not_finite({"y": bad}, {"y": bad}) == ()


def test_the_largest_scores_in_order_are_no_scores_of_classes() -> None:
    """Labels are compared with what TopK chose from, as a search does."""
    model = support.model(
        "g (float[N,4] x) => (float[N,2] v, int64[N,2] i)"
        " { a = MatMul (x, w) v, i = TopK (a, k) }",
        weights={"w": (4, 4)},
        constants={"k": [2]},
    )
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    classes = support.run(model, {"x": x})[1][:, 0]
    found = evaluate_model(model, Dataset({"x": x}, classes, input_specs(model)))
    assert found.value == 1.0


def test_a_number_without_samples_is_not_compared() -> None:
    model = support.model(
        "g (float[N,4] x) => (float[N,3] y, float aux)"
        " { y = MatMul (x, w) aux = ReduceMean <keepdims = 0> (y) }",
        weights={"w": (4, 3)},
    )
    found = evaluate_model(model, data_for(model, 100, labels=False), against=model)
    assert found.value == 1.0
    assert found.warnings == ("output 'aux' is not compared: it is the same for all samples",)


def test_an_output_that_is_an_initializer_is_part_of_the_signature() -> None:
    stored, computed = (
        support.model(
            f"g (float[N,4] x) => (float[N,3] y, float[4,3] p) {{ y = MatMul (x, w) {more} }}",
            weights={"w": (4, 3)} | stored,
        )
        for more, stored in (("", {"p": (4, 3)}), ("p = Mul (w, w)", {}))
    )
    data = data_for(stored, 30, labels=False)
    assert evaluate_model(stored, data, against=computed).samples == 30


def test_what_comes_out_of_integers_is_scored_itself() -> None:
    """Behind an embedding, an integer product is no layer that is known here."""
    model = support.model(
        """g (int64[N] i) => (float[N,3] y) {
            e = Gather (t, i)
            q, s, z = DynamicQuantizeLinear (e)
            p = MatMulInteger (q, w8, z)
            f = Cast <to = 1> (p)
            y = Mul (f, s) }""",
        weights={"t": (9, 4)},
    )
    weight = np.random.default_rng(0).integers(-9, 9, (4, 3)).astype(np.int8)
    value = ir.val("w8", const_value=ir.tensor(weight, name="w8"))
    product = next(node for node in model.graph if node.op_type == "MatMulInteger")
    product.replace_input_with(1, value)
    model.graph.register_initializer(value)
    i = np.arange(9)
    classes = support.run(model, {"i": i})[0].argmax(axis=1)
    assert evaluate_model(model, Dataset({"i": i}, classes, input_specs(model))).value == 1.0
