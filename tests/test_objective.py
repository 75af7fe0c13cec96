"""What is optimised follows from the model's outputs and the data."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.errors import ConfigError, DataError, UnsupportedError
from onnx_fliqs.objective import LossKind, Metric, Objective, choose_objective, quality
from support import f32, model, random_feeds, run

CLASSES = """g (float[N,4] x) => (float[N,3] y) {
    a = MatMul (x, w)
    y = Identity (a) }"""
FLAT = "l = Constant <value = int64[1] {-1}> () f = Reshape (a, l)"
SOFTMAX = """g (float[N,4] x) => (float[N,3] y) {
    a = MatMul (x, w)
    y = Softmax <axis = 1> (a) }"""


def choose(
    text: str,
    *,
    labelled: bool = False,
    labels: npt.NDArray[Any] | None = None,
    distillation: float = 0.5,
    loss: str = "auto",
) -> Objective:
    plain = model(text, weights={"w": (4, 3)})
    plain = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain)))
    names = [str(value.name) for value in plain.graph.outputs]
    teacher = dict(zip(names, run(plain, random_feeds(plain)), strict=True))
    return choose_objective(
        plain,
        teacher,
        labels=np.zeros(4, np.int64) if labelled else labels,
        distillation=distillation,
        loss=loss,
    )


def kinds(objective: Objective) -> list[tuple[str, str, float]]:
    return [(term.kind.value, term.scores, term.weight) for term in objective.terms]


# -- the choice -----------------------------------------------------------------------------


def test_labels_mean_cross_entropy_mixed_with_the_float_model() -> None:
    objective = choose(CLASSES, labelled=True, distillation=0.25)
    assert kinds(objective) == [("cross-entropy", "y", 0.75), ("kl", "y", 0.25)]
    assert objective.metric is Metric.ACCURACY
    assert objective.uses_labels
    assert objective.teacher_outputs == ("y",)
    assert objective.outputs == ("y",)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [("cross-entropy", "y", 1.0)]), (1.0, [("kl", "y", 1.0)])]
)
def test_a_term_without_weight_is_left_out(
    share: float, expected: list[tuple[str, str, float]]
) -> None:
    objective = choose(CLASSES, labelled=True, distillation=share)
    assert kinds(objective) == expected
    assert objective.metric is Metric.ACCURACY
    assert objective.uses_labels == (share < 1)


def test_cross_entropy_is_labels_alone() -> None:
    objective = choose(CLASSES, labelled=True, distillation=0.5, loss="cross-entropy")
    assert kinds(objective) == [("cross-entropy", "y", 1.0)]
    assert objective.metric is Metric.ACCURACY
    assert not objective.distills


def test_class_scores_without_labels_are_distilled() -> None:
    objective = choose(CLASSES)
    assert kinds(objective) == [("kl", "y", 1.0)]
    assert objective.metric is Metric.AGREEMENT
    assert not objective.uses_labels


@pytest.mark.parametrize("labelled", [True, False])
def test_a_final_softmax_is_looked_behind(labelled: bool) -> None:
    objective = choose(SOFTMAX, labelled=labelled)
    assert {term.scores for term in objective.terms} == {"a"}
    assert {term.output for term in objective.terms} == {"y"}


@pytest.mark.parametrize(
    ("axis", "scores"), [("1", "a"), ("-2", "a"), ("-1", "y"), ("2", "y")]
)
def test_only_a_softmax_over_the_classes_is(axis: str, scores: str) -> None:
    objective = choose(
        f"""g (float[N,3,4] x) => (float[N,3,3] y) {{
            a = MatMul (x, w)
            y = Softmax <axis = {axis}> (a) }}""",
        labelled=True,
    )
    assert {term.scores for term in objective.terms} == {scores}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,4] x) => (float[N,1] y) { a = MatMul (x, w) y = ReduceMean (a, i) }",
        "g (float[N,5,4] x) => (float[N,5,3] y) { y = MatMul (x, w) }",
        "g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w) y = Add (x, x) }",
    ],
    ids=["one_number", "rank_3", "reconstruction"],
)
def test_what_is_no_class_score_is_compared_by_squares(text: str) -> None:
    plain = model(text, weights={"w": (4, 3)}, constants={"i": [1]})
    teacher = {"y": run(plain, random_feeds(plain))[0]}
    objective = choose_objective(plain, teacher, labels=None, distillation=0.5)
    (term,) = objective.terms
    assert term.kind is LossKind.SQUARED_ERROR
    assert term.variance == pytest.approx(np.var(teacher["y"]))
    assert objective.metric is Metric.R2


def test_every_float_output_is_distilled_and_squares_win_the_metric() -> None:
    objective = choose(
        """g (float[N,4] x) => (float[N,3] y, float[N,3,1] z, int64[N,1] k) {
            a = MatMul (x, w)
            y = Identity (a)
            s = Constant <value = int64[3] {0, -1, 1}> ()
            z = Reshape (a, s)
            k = ArgMax <axis = 1> (a) }"""
    )
    assert kinds(objective) == [("kl", "y", 1.0), ("mse", "z", 1.0)]
    assert objective.metric is Metric.R2
    assert objective.outputs == ("y", "z")


def test_a_constant_output_does_not_divide_by_zero() -> None:
    objective = choose(
        "g (float[N,4] x) => (float[N,3] y) { a = MatMul (x, w) y = Sub (a, a) }", loss="mse"
    )
    assert objective.terms[0].variance > 0


@pytest.mark.parametrize("aux", ["float aux", "float[1] aux"])
def test_an_output_that_tells_no_samples_apart_is_not_judged(aux: str) -> None:
    """In units of its variance it would outweigh all others."""
    keep = "" if "[" in aux else "<keepdims = 0>"
    objective = choose(
        f"""g (float[N,4] x) => (float[N,3] y, {aux}) {{
            a = MatMul (x, w)
            y = Identity (a)
            {FLAT}
            aux = ReduceMean {keep} (f) }}"""
    )
    assert objective.outputs == ("y",)
    assert objective.notes == (
        "'aux' is not judged: the float model gives the same number for all samples",
    )


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_the_loss_can_be_asked_for_even_beside_labels(loss: str) -> None:
    objective = choose(SOFTMAX, labelled=True, loss=loss)
    assert kinds(objective) == [(loss, "y" if loss == "mse" else "a", 1.0)]
    assert objective.metric is (Metric.R2 if loss == "mse" else Metric.AGREEMENT)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 1, 3)])
def test_labels_that_are_numbers_are_regressed(shape: tuple[int, ...]) -> None:
    labels = 5 * np.random.default_rng(0).standard_normal(shape, np.float32)
    objective = choose(CLASSES, labels=labels, distillation=0.25)
    assert objective.metric is Metric.LABEL_R2
    assert kinds(objective) == [("label-mse", "y", 0.75), ("mse", "y", 0.25)]
    assert objective.terms[0].variance == pytest.approx(np.var(labels), rel=1e-5)
    assert objective.uses_labels
    assert objective.distills
    assert [term.kind for term in objective.comparison] == [LossKind.SQUARED_ERROR]
    alone = choose(CLASSES, labels=labels, distillation=0.0)
    assert kinds(alone) == [("label-mse", "y", 1.0)]
    assert not alone.distills
    assert choose(CLASSES, labels=labels, loss="mse").metric is Metric.R2


def test_numbers_are_matched_with_the_output_of_their_shape() -> None:
    objective = choose(
        "g (float[N,4] x) => (float[N,3] y, float[N,1] z) { y = MatMul (x, w) i = Constant"
        " <value = int64[1] {1}> () z = ReduceMean (y, i) }",
        labels=np.zeros(4, np.float32),
    )
    assert objective.outputs == ("z",)


def test_numbers_that_no_output_fits_are_refused() -> None:
    with pytest.raises(DataError, match=r"floats of the shape \[N\], which no output has"):
        choose(CLASSES, labels=np.zeros(4, np.float32))
    with pytest.raises(ConfigError, match="`labels` that are classes: integers"):
        choose(CLASSES, labels=np.zeros((4, 3), np.float32), loss="cross-entropy")


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs `labels`"):
        choose(CLASSES, loss="cross-entropy")
    with pytest.raises(DataError, match=r"no output has the shape \[N, classes\]"):
        choose(
            "g (float[N,4] x) => (float[N] y) { a = MatMul (x, w) i = Constant"
            " <value = int64[1] {1}> () y = ReduceMean <keepdims = 0> (a, i) }",
            labelled=True,
        )
    with pytest.raises(UnsupportedError, match="no output of the model is, or rests on"):
        choose("g (float[N,4] x) => (int64[N,1] y) { y = ArgMax <axis = 1> (x) }")


# -- quality --------------------------------------------------------------------------------


def test_numbers_are_judged_by_the_variance_that_is_explained() -> None:
    labels = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    for outputs, expected in (
        (labels, 1.0),
        (np.full(4, 2.5), 0.0),
        (labels + 1, 1 - 1 / 1.25),
        (-labels, 1 - 4 * 7.5 / 1.25),
    ):
        found = quality(Metric.LABEL_R2, {"y": f32(outputs)[:, None]}, labels=labels)
        assert found == pytest.approx(expected)


def test_accuracy_is_the_share_of_right_labels() -> None:
    scores = f32([[0, 1], [1, 0], [0, 1], [2, 1]])
    assert quality(Metric.ACCURACY, {"y": scores}, labels=np.array([1, 0, 0, 1])) == 0.5


def test_accuracy_counts_every_place_of_a_map() -> None:
    scores = np.zeros((1, 3, 2, 2), np.float32)
    scores[0, 1] = 1
    labels = np.array([[[1, 1], [1, 2]]])
    assert quality(Metric.ACCURACY, {"y": scores}, labels=labels) == 0.75


def test_agreement_is_the_share_of_like_choices() -> None:
    scores = f32([[0, 1], [1, 0]])
    assert quality(Metric.AGREEMENT, {"y": scores}, teacher={"y": scores * 3}) == 1.0
    assert quality(Metric.AGREEMENT, {"y": scores}, teacher={"y": -scores}) == 0.0


def test_r2_is_1_for_the_same_and_0_for_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    assert quality(Metric.R2, {"y": values}, teacher={"y": values}) == 1.0
    mean = np.full_like(values, values.mean())
    assert quality(Metric.R2, {"y": mean}, teacher={"y": values}) == pytest.approx(0, abs=1e-6)
    assert quality(Metric.R2, {"y": -values}, teacher={"y": values}) < 0


def test_r2_of_a_constant_is_all_or_nothing() -> None:
    ones = np.ones((2, 2), np.float32)
    assert quality(Metric.R2, {"y": ones}, teacher={"y": ones}) == 1.0
    assert quality(Metric.R2, {"y": ones * 2}, teacher={"y": ones}) == 0.0


def test_several_outputs_are_averaged() -> None:
    scores = f32([[0, 1], [1, 0]])
    outputs = {"y": scores, "z": scores}
    assert quality(Metric.AGREEMENT, outputs, teacher={"y": scores, "z": -scores}) == 0.5
