"""Warnings of data that a float model was not made for."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from onnx_fliqs import Assignment, SearchConfig, emit, search
from onnx_fliqs.data import Dataset, TensorSpec, input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.doubtful_data import doubtful_data
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import Metric

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = EXAMPLES / "digits_cnn.onnx"

QUICK = SearchConfig(steps=2, batch_size=16, workers=1)


def digits(samples: int = 300) -> Dataset:
    data = load_npz(EXAMPLES / "digits_train.npz", input_specs(load_model(DIGITS)))
    return data.take(np.arange(samples))


def dataset(labels: npt.ArrayLike | None, samples: int = 100) -> Dataset:
    spec = TensorSpec("x", np.dtype(np.float32), (None, 1))
    found = None if labels is None else np.asarray(labels)
    return Dataset({"x": np.zeros((samples, 1), np.float32)}, found, (spec,))


def doubt(
    chosen: npt.ArrayLike, labels: npt.ArrayLike | None, *, classes: int = 10
) -> str | None:
    """What is said of scores that are largest for the classes that were chosen."""
    found = np.asarray(chosen)
    scores = np.moveaxis(np.eye(classes, dtype=np.float32)[found], -1, 1)
    metric = Metric.AGREEMENT if labels is None else Metric.ACCURACY
    return doubtful_data(metric, {"y": scores}, dataset(labels, len(found)))


def test_a_model_that_is_right_more_often_than_a_guess_is_not_doubted() -> None:
    classes = np.arange(100) % 10
    assert doubt(classes, classes) is None
    assert doubt(np.where(np.arange(100) < 40, classes, 9 - classes), classes) is None
    assert doubt(np.arange(4), np.array([0, 1, 5, 6])) is None


@pytest.mark.parametrize(
    "labels",
    [(np.arange(100) + 1) % 10, 9 - np.arange(100) % 10, np.zeros(100, int)],
    ids=["shifted", "another order", "one class"],
)
def test_labels_that_mean_other_classes_are_noticed(labels: npt.NDArray[np.int64]) -> None:
    found = doubt(np.arange(100) % 10, labels)
    assert found is not None
    assert "no better than a guess among 10 classes" in found
    assert "of 100 samples" in found


def test_a_guess_may_be_lucky_by_two_standard_errors() -> None:
    # Of 100 samples and two classes, half are right, ± 5.
    labels = np.arange(100) % 2
    for right, doubted in ((60, True), (61, False)):
        chosen = np.where(np.arange(100) < right, labels, 1 - labels)
        assert (doubt(chosen, labels, classes=2) is not None) == doubted


def test_one_class_for_all_samples_is_noticed_where_they_differ() -> None:
    found = doubt(np.full(100, 3), None)
    assert found is not None
    assert "all of 100 samples for class 3" in found
    mostly = np.where(np.arange(100) < 90, 3, 5)
    assert "class 3" in (doubt(np.full(100, 3), mostly) or "")
    assert doubt(np.full(100, 3), np.full(100, 3)) is None
    assert doubt(np.arange(100) % 2, None) is None


def test_numbers_that_are_no_closer_than_their_mean_are_noticed() -> None:
    labels = np.arange(40, dtype=np.float32)
    data = Dataset({"x": labels}, labels, ())
    assert doubtful_data(Metric.LABEL_R2, {"y": labels + 3}, data) is None
    said = doubtful_data(Metric.LABEL_R2, {"y": 100 * labels}, data)
    assert said is not None
    assert "no closer to the labels than their mean" in said


def test_few_samples_may_be_of_one_class() -> None:
    assert doubt(np.full(19, 3), None) is None
    assert doubt(np.full(20, 3), None) is not None


def test_a_background_may_cover_every_pixel() -> None:
    assert doubt(np.zeros((30, 4, 4), int), None) is None
    assert doubt(np.zeros((30, 4, 4), int), np.ones((30, 4, 4), int)) is not None


def test_one_score_is_no_guess() -> None:
    assert doubt(np.zeros(30, int), np.zeros(30, int), classes=1) is None


def test_numbers_and_inputs_that_were_made_up_are_not_doubted() -> None:
    same = {"y": np.ones((30, 3), np.float32)}
    assert doubtful_data(Metric.R2, same, dataset(None, 30)) is None
    made_up = replace(dataset(None, 30), synthetic=True)
    assert doubtful_data(Metric.AGREEMENT, same, made_up) is None


def test_a_search_says_so_before_it_trains_and_in_its_result(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = digits()
    assert data.labels is not None
    wrong = replace(data, stored_labels=(data.labels + 1) % 10)
    logged: list[list[str]] = []
    with caplog.at_level(logging.WARNING, "onnx_fliqs"):
        result = search(
            DIGITS, wrong, QUICK, progress=lambda _: logged.append([*caplog.messages])
        )
    assert ["no better than a guess" in line for line in logged[0]] == [True]
    assert sum("no better than a guess" in warning for warning in result.warnings) == 1
    assert result.samples == 30
    assert not any("guess" in line for line in search(DIGITS, data, QUICK).warnings)


def test_an_emission_says_so(tmp_path: Path) -> None:
    data = digits(100)
    assert data.labels is not None
    formats = search(DIGITS, data, QUICK).assignment
    path = tmp_path / "a.json"
    path.write_text(formats.to_json())
    scaled = {"image": np.zeros_like(data.stored_inputs["image"])}
    for wrong, doubted in ((data, False), (replace(data, stored_inputs=scaled), True)):
        result = emit(DIGITS, Assignment.read(path), wrong)
        assert any("guess" in warning for warning in result.warnings) == doubted
        assert result.samples == 100


def test_a_single_sample_trains_and_judges() -> None:
    result = search(DIGITS, digits(1), QUICK)
    assert "there is a single sample, which trains and judges" in result.warnings
