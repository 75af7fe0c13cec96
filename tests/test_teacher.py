"""The float model is asked once for each sample, and what it said is handed out again."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_fliqs import teacher
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import InterruptedSearchError
from onnx_fliqs.runtime import make_session
from onnx_fliqs.search_loop import search
from onnx_fliqs.teacher import Teacher
from support import model
from test_search import Recorder, mlp, samples, written

Array = npt.NDArray[Any]

SAMPLES = 12
ROWS = np.arange(SAMPLES)
_TEXT = """g (float[N,4] x)
        => (float[N,3] y, float[N,2,2] z, float[4,3] w2, float s, float[3] r) {
    y = MatMul (x, w)
    z = Reshape (x, shape)
    w2 = Neg (w)
    s = ReduceSum <keepdims = 0> (x)
    r = ReduceSum <keepdims = 0> (y, axes) }"""


class Counting:
    """A session that counts for how many samples it is asked."""

    def __init__(self, text: str = _TEXT) -> None:
        built = model(
            text, weights={"w": (4, 3)}, constants={"shape": [-1, 2, 2], "axes": [0]}
        )
        self._session = make_session(built)
        self.asked = 0
        self.data = Dataset(
            {"x": np.random.default_rng(0).standard_normal((SAMPLES, 4))},
            None,
            input_specs(built),
        )

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        self.asked += len(feeds["x"])
        found: list[Array] = self._session.run(names, feeds)
        return found

    def teacher(self, *names: str) -> Teacher:
        return Teacher(self, names)


def ask(
    asked: Teacher, data: Dataset, rows: Sequence[int] | Array, *, named: bool = True
) -> dict[str, Array]:
    indices = np.asarray(rows)
    inputs = data.batch(indices)
    return asked.outputs(inputs, data, indices) if named else asked.outputs(inputs)


def test_each_sample_is_asked_for_once() -> None:
    session = Counting()
    asked = session.teacher("y", "z")
    wanted = ask(session.teacher("y", "z"), session.data, ROWS, named=False)
    session.asked = 0
    for epoch in range(3):
        order = np.random.default_rng(epoch).permutation(SAMPLES)
        for rows in np.split(order, 3):
            found = ask(asked, session.data, rows)
            assert list(found) == ["y", "z"]
            for name, array in found.items():
                np.testing.assert_array_equal(array, wanted[name][rows])
    assert session.asked == SAMPLES


def test_a_batch_with_a_new_sample_is_asked_for_as_a_whole() -> None:
    session = Counting()
    asked = session.teacher("y")
    ask(asked, session.data, [0, 1, 2])
    ask(asked, session.data, [2, 3])
    assert session.asked == 5
    # Repetitions are samples too.
    assert len(ask(asked, session.data, [3, 3, 0, 1])["y"]) == 4
    assert session.asked == 5


def test_what_is_handed_out_belongs_to_the_caller() -> None:
    session = Counting()
    asked = session.teacher("y")
    first = ask(asked, session.data, ROWS)["y"]
    kept = first.copy()
    first[:] = 0
    second = ask(asked, session.data, ROWS)["y"]
    np.testing.assert_array_equal(second, kept)
    second[:] = 0
    np.testing.assert_array_equal(ask(asked, session.data, ROWS)["y"], kept)


def test_another_data_set_has_other_samples() -> None:
    session = Counting()
    asked = session.teacher("y")
    other = session.data.take(ROWS[::-1])
    first = ask(asked, session.data, ROWS)["y"]
    np.testing.assert_array_equal(ask(asked, other, ROWS)["y"], first[::-1])
    assert session.asked == 2 * SAMPLES
    assert ask(asked, other, ROWS[:2])["y"].shape == (2, 3)
    assert session.asked == 2 * SAMPLES


def test_batches_from_nowhere_are_not_remembered() -> None:
    session = Counting()
    asked = session.teacher("y")
    for _ in range(2):
        ask(asked, session.data, ROWS, named=False)
    assert session.asked == 2 * SAMPLES


def test_without_outputs_nothing_is_asked() -> None:
    session = Counting()
    assert ask(session.teacher(), session.data, ROWS) == {}
    assert session.asked == 0


@pytest.mark.parametrize("name", ["w2", "s", "r"])
def test_outputs_without_an_axis_of_samples_are_not_remembered(name: str) -> None:
    session = Counting()
    asked = session.teacher("y", name)
    # Batches of 4 and 3 are as long as these outputs by chance.
    for size in (4, 3, 2):
        for rows in (np.arange(size), np.arange(size)[::-1]):
            found = ask(asked, session.data, rows)
            wanted = ask(asked, session.data, rows, named=False)
            for each in ("y", name):
                np.testing.assert_array_equal(found[each], wanted[each])
    assert session.asked == 2 * 2 * (4 + 3 + 2)


def test_outputs_of_a_fixed_batch_are_remembered() -> None:
    session = Counting("g (float[4,4] x) => (float[4,3] y) { y = MatMul (x, w) }")
    asked = session.teacher("y")
    for _ in range(2):
        ask(asked, session.data, ROWS[4:8])
    assert session.asked == 4


def test_shapes_that_depend_on_the_batch_are_not_mixed() -> None:
    text = """g (float[N,4] x) => (float[N,M] y) {
        t = Transpose (x)
        y = MatMul (x, t) }"""
    session = Counting(text)
    asked = session.teacher("y")
    for rows in ([0, 1, 2], [3, 4], [3, 4]):
        found, wanted = (ask(asked, session.data, rows, named=n)["y"] for n in (True, False))
        np.testing.assert_array_equal(found, wanted)


def test_large_outputs_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, asked_for in ((SAMPLES * 12, 1), (SAMPLES * 12 - 1, 2)):
        monkeypatch.setattr(teacher, "_MOST_BYTES", most)
        session = Counting()
        asked = session.teacher("y")  # three floats
        for _ in range(2):
            ask(asked, session.data, ROWS)
        assert session.asked == asked_for * SAMPLES


def test_threads_get_the_same_answers() -> None:
    session = Counting()
    asked = session.teacher("y", "z")
    wanted = ask(asked, session.data, ROWS, named=False)
    batches = [np.random.default_rng(i).permutation(SAMPLES)[: 2 + i % 5] for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda rows: ask(asked, session.data, rows), batches))
    for rows, found in zip(batches, results, strict=True):
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name][rows])


@pytest.mark.parametrize("step", [3, 10, 17])
def test_a_search_of_several_epochs_resumes_to_the_same_bytes(
    tmp_path: Path, step: int
) -> None:
    # 13 samples in parts of 3 and 2: epochs of under three steps, and batches across two. What
    # the first epoch asked for is asked for in other parts after the interruption.
    data = samples(mlp(), 16)
    config = SearchConfig(steps=20, batch_size=5, held_out_batch=4, draws=2, workers=2)
    whole = search(mlp(), data, config)
    with pytest.raises(InterruptedSearchError):
        search(mlp(), data, config, checkpoint=tmp_path, progress=Recorder(step))
    resumed = search(mlp(), data, config, checkpoint=tmp_path, resume=True)
    assert written(resumed) == written(whole)
