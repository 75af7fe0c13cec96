"""One training step: parts add up, the loss falls, and restored state goes on identically."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from scipy.special import log_softmax

import support
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.evaluation import run_dataset
from onnx_fliqs.formats import FORMATS
from onnx_fliqs.learned_thresholds import Growth, Threshold, learned_thresholds
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import Objective, choose_objective, quality
from onnx_fliqs.passes.insert_search_sites import InsertSearchSitesPass
from onnx_fliqs.precision import parse_precision, parse_space
from onnx_fliqs.prepare import Prepared, calibrate, make_batch, prepare
from onnx_fliqs.runtime import make_session
from onnx_fliqs.sampling import batch_indices
from onnx_fliqs.sites import SiteValues
from onnx_fliqs.target_files import parse_target
from onnx_fliqs.train_step import Batch, TrainState, TrainStep
from onnx_fliqs.trainability import trainable_parameters

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LR = 1e-3
GENERIC = parse_target("generic")


@dataclass(frozen=True)
class Task:
    """What a train step is built from."""

    prepared: Prepared
    scales: dict[tuple[str, str], npt.NDArray[np.float32]]
    data: Dataset
    objective: Objective

    def values(self, *formats: str) -> SiteValues:
        """One format for all layers, or one for each."""
        layers = self.prepared.space.layers
        names = formats * len(layers) if len(formats) == 1 else formats
        chosen = {
            layer.name: parse_precision(name)
            for layer, name in zip(layers, names, strict=True)
        }
        return self.prepared.space.values(chosen, self.scales)

    def batch(self, size: int, step: int = 0) -> Batch:
        return make_batch(self.data, batch_indices(len(self.data), size, step, 0))

    @contextlib.contextmanager
    def step(
        self,
        sizes: Sequence[int] = (32,),
        parameters: tuple[str, ...] | None = None,
        thresholds: Sequence[Threshold] = (),
    ) -> Iterator[TrainStep]:
        canonical, outputs = self.prepared.canonical, self.objective.outputs
        searchable = canonical.clone()
        InsertSearchSitesPass(self.prepared.space)(searchable)
        found = trainable_parameters(canonical, outputs) if parameters is None else parameters
        step = TrainStep(
            searchable,
            objective=self.objective,
            parameters=found,
            teacher=canonical,
            parts=sizes,
            workers=2,
            thresholds=thresholds,
            threshold_rate=10.0,
        )
        try:
            yield step
        finally:
            step.close()


def task_of(
    model: ir.Model, data: Dataset, *, space: str = "int-l", labelled: bool = True
) -> Task:
    prepared = prepare(model, data, GENERIC, parse_space(space))
    prepared, scales, _ = calibrate(prepared, GENERIC, data, 0)
    session = make_session(ir.to_proto(prepared.canonical).SerializeToString())
    names = [str(value.name) for value in prepared.canonical.graph.outputs]
    teacher = run_dataset(session, data.take(np.arange(64) % len(data)), names)
    objective = choose_objective(
        prepared.canonical,
        teacher,
        labels=data.labels if labelled else None,
        distillation=0.5,
    )
    return Task(prepared, scales, data, objective)


@pytest.fixture(scope="module")
def digits() -> Task:
    model = load_model(EXAMPLES / "digits_cnn.onnx")
    data = load_npz(EXAMPLES / "digits_train.npz", input_specs(model))
    return task_of(model, data, space="int4,int8,e2m1,float32")


@pytest.fixture(scope="module")
def step(digits: Task) -> Iterator[TrainStep]:
    with digits.step() as built:
        yield built


def parts(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The same samples, cut."""
    ends = np.cumsum(sizes)
    return [
        Batch(
            {name: array[end - size : end] for name, array in batch.inputs.items()},
            None if batch.labels is None else batch.labels[end - size : end],
            size,
        )
        for size, end in zip(sizes, ends, strict=True)
    ]


def assert_same(found: TrainState, wanted: TrainState) -> None:
    mine, theirs = found.arrays(), wanted.arrays()
    assert list(mine) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)


@pytest.mark.parametrize("sizes", [(16, 16), (20, 12), (11, 11, 10), (31, 1)])
def test_the_gradient_of_parts_is_that_of_the_whole(
    digits: Task, step: TrainStep, sizes: tuple[int, ...]
) -> None:
    # float32 sites: a quantizer would turn the rounding of a sum into a step now and then.
    values, right = digits.values("float32"), digits.batch(32)
    assert right.labels is not None
    # Wrong labels: the gradient of a trained network is hardly more than its rounding errors.
    batch = Batch(right.inputs, np.roll(right.labels, 1), 32)
    whole, report = step.step(step.initial(), [batch], values, LR)
    with digits.step(sizes) as cut:
        split, split_report = cut.step(cut.initial(), parts(batch, sizes), values, LR)
    # Means over 32 samples, summed in another order.
    assert split_report.loss == pytest.approx(report.loss, rel=1e-5)
    assert split_report.norm == pytest.approx(report.norm, rel=1e-4)
    gradient, other = (state.m.numpy() * 10 for state in (whole, split))
    assert report.norm > 0
    assert float(np.linalg.norm(gradient - other)) <= 1e-4 * report.norm


@pytest.mark.parametrize("name", ["int4", "e2m1"])
def test_the_gradient_of_quantized_parts_is_nearly_that_of_the_whole(
    digits: Task, step: TrainStep, name: str
) -> None:
    values, batch = digits.values(name), digits.batch(32)
    whole, report = step.step(step.initial(), [batch], values, LR)
    with digits.step((16, 16)) as cut:
        split, _ = cut.step(cut.initial(), parts(batch, (16, 16)), values, LR)
    # Here a rounding error may move a value by a whole quantization step.
    difference = float(np.linalg.norm(whole.m.numpy() - split.m.numpy())) * 10
    assert difference <= 0.02 * report.norm


def test_the_gradient_is_that_of_finite_differences() -> None:
    model = support.model(
        """
        g (float[N,4] x) => (float[N,3] y) {
            h = Gemm (x, w, b)
            t = Tanh (h)
            y = MatMul (t, v)
        }
        """,
        weights={"w": (4, 6), "b": (6,), "v": (6, 3)},
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 4)).astype(np.float32)
    data = Dataset({"x": x}, rng.integers(0, 3, 16), input_specs(model))
    task = task_of(model, data, space="int8,float32")
    values, batch = task.values("float32"), make_batch(data, np.arange(16))
    with task.step((16,)) as step:
        start = step.initial()
        after, _ = step.step(start, [batch], values, LR)
        gradient = after.m.numpy() * 10
        slopes = []
        arrays = start.arrays()
        for name in start.parameters:
            key = f"parameter/{name}"
            for index in np.ndindex(arrays[key].shape):
                losses = []
                for sign in (1, -1):
                    moved = arrays[key].copy()
                    moved[index] += sign * 1e-2
                    state = step.restore({**arrays, key: moved})
                    losses += step.losses(state, batch, [values])
                slopes.append((losses[0] - losses[1]) / 2e-2)
    # Differences of float32 losses of about 1, and the curvature over a step of 1e-2.
    np.testing.assert_allclose(gradient, slopes, atol=2e-4)


@pytest.mark.parametrize("name", ["int4", "e2m1"])
def test_the_loss_of_the_digits_falls_at_four_bits(
    digits: Task, step: TrainStep, name: str
) -> None:
    values, held_out = digits.values(name), digits.batch(512, 1)
    state = step.initial()
    before = step.losses(state, held_out, [values])[0]
    for index in range(80):
        state, report = step.step(state, [digits.batch(32, index)], values, 3e-3)
        assert report.applied
    after = step.losses(state, held_out, [values])[0]
    assert after < 0.8 * before


def test_a_step_changes_neither_its_state_nor_its_batch(digits: Task, step: TrainStep) -> None:
    start, batch = step.initial(), digits.batch(32)
    before = {name: array.copy() for name, array in start.arrays().items()}
    images = {name: array.copy() for name, array in batch.inputs.items()}
    after, _ = step.step(start, [batch], digits.values("int4"), LR)
    for name, array in start.arrays().items():
        np.testing.assert_array_equal(array, before[name])
    for name, array in batch.inputs.items():
        np.testing.assert_array_equal(array, images[name])
    assert start.updates == 0
    assert after.updates == 1
    changed = [not np.array_equal(after.arrays()[name], before[name]) for name in before]
    assert all(changed)


def test_the_same_step_twice_gives_the_same_bytes(digits: Task, step: TrainStep) -> None:
    args = ([digits.batch(32)], digits.values("int4"), LR)
    first, report = step.step(step.initial(), *args)
    second, again = step.step(step.initial(), *args)
    assert_same(first, second)
    assert report == again


def test_restored_state_continues_identically(digits: Task, step: TrainStep) -> None:
    values = digits.values("int4")

    def steps(state: TrainState, first: int, last: int, by: TrainStep) -> TrainState:
        for index in range(first, last):
            state, _ = by.step(state, [digits.batch(32, index)], values, LR)
        return state

    halfway = steps(step.initial(), 0, 3, step)
    wanted = steps(halfway, 3, 6, step)
    arrays = {name: np.array(array) for name, array in halfway.arrays().items()}
    with digits.step() as other:
        restored = other.restore(arrays)
        assert_same(restored, halfway)
        assert_same(steps(restored, 3, 6, other), wanted)


def test_state_and_arrays_live_without_each_other(digits: Task, step: TrainStep) -> None:
    """What the runtime reads must not go with the arrays it came from, nor the other way."""
    start = step.initial().arrays()
    wanted = {name: np.array(array) for name, array in start.items()}
    copies = {name: np.array(array) for name, array in start.items()}
    state = step.restore(copies)
    for array in copies.values():
        array.fill(0)
    found = state.arrays()
    batch, values = digits.batch(32), digits.values("int8")
    trained = step.step(state, [batch], values, LR)[0].arrays()
    before = {name: np.array(array) for name, array in trained.items()}
    del state, copies
    junk = [
        np.full(array.shape, -1, array.dtype) for array in wanted.values() for _ in range(9)
    ]
    step.losses(step.initial(), batch, [values] * 4)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        np.testing.assert_array_equal(trained[name], before[name], err_msg=name)
    del junk


def test_losses_of_several_candidates_equal_those_one_by_one(
    digits: Task, step: TrainStep
) -> None:
    layers = len(digits.prepared.space.layers)
    rng = np.random.default_rng(0)
    names = ["int4", "int8", "e2m1", "float32"]
    candidates = [digits.values(n) for n in names] + [
        digits.values(*(str(n) for n in rng.choice(names, layers))) for _ in range(4)
    ]
    state, batch = step.initial(), digits.batch(64)
    together = step.losses(state, batch, candidates)
    assert together == [step.losses(state, batch, [c])[0] for c in candidates]
    assert len(set(together)) == len(candidates)
    assert step.losses(state, batch, []) == []


def test_the_reported_loss_is_that_of_the_formats_in_force(
    digits: Task, step: TrainStep
) -> None:
    batch = digits.batch(32)
    for name in ("int4", "float32"):
        _, report = step.step(step.initial(), [batch], digits.values(name), LR)
        expected = step.losses(step.initial(), batch, [digits.values(name)])[0]
        # Two graphs, fused differently.
        assert report.loss == pytest.approx(expected, rel=1e-4)


def test_float32_everywhere_is_the_float_model(digits: Task, step: TrainStep) -> None:
    batches = [digits.batch(size) for size in (64, 10)]
    state = step.initial()
    found = step.judge(state, batches, digits.values("float32"))[0]
    wanted = step.teacher_outputs(batches)
    assert found["logits"].shape == (74, 10)
    # Batch normalization and convolution round differently once fused.
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
    labels = np.concatenate([b.labels for b in batches if b.labels is not None])
    assert quality(digits.objective.metric, found, labels=labels) > 0.9


def test_fewer_bits_are_further_from_the_float_model(digits: Task, step: TrainStep) -> None:
    batch = digits.batch(64)
    teacher = step.teacher_outputs([batch])["logits"]

    def distance(name: str) -> float:
        found = step.judge(step.initial(), [batch], digits.values(name))[0]["logits"]
        return float(np.linalg.norm(found - teacher))

    assert 0 < distance("int8") < distance("int4")


def test_a_gradient_that_is_not_finite_is_skipped(digits: Task, step: TrainStep) -> None:
    values, start = digits.values("int4"), step.initial()
    start, _ = step.step(start, [digits.batch(32)], values, LR)
    good = digits.batch(32, 1)
    bad = Batch({k: np.full_like(v, np.nan) for k, v in good.inputs.items()}, good.labels, 32)
    after, report = step.step(start, [bad], values, LR)
    assert not report.applied
    assert_same(after, start)
    assert step.step(after, [good], values, LR)[1].applied


def test_values_inside_the_graph_can_be_observed(digits: Task, step: TrainStep) -> None:
    batch = digits.batch(8)
    tensors = [s.tensor for s in digits.prepared.space.sites if not s.is_weight]
    names = [*dict.fromkeys(["image", *tensors])]
    found = step.observe(step.initial(), batch, digits.values("int8"), names)
    assert set(found) == set(names)
    np.testing.assert_array_equal(found["image"], batch.inputs["image"])
    assert all(len(array) == 8 for array in found.values())


def test_a_model_without_parameters_can_be_scored_but_not_trained(digits: Task) -> None:
    with digits.step(parameters=()) as frozen:
        state = frozen.initial()
        assert state.parameters == {}
        (loss,) = frozen.losses(state, digits.batch(32), [digits.values("int8")])
        assert np.isfinite(loss)
        assert_same(frozen.restore(state.arrays()), state)
        with pytest.raises(ValueError, match="no trainable parameters"):
            frozen.step(state, [digits.batch(32)], digits.values("int8"), LR)


def test_thresholds_that_are_learned_leave_the_weights_steps_alone(digits: Task) -> None:
    thresholds = learned_thresholds(digits.prepared.space)
    values, batch = digits.values("int4"), digits.batch(32)
    halves = parts(batch, (16, 16))
    with digits.step((16, 16)) as plain, digits.step((16, 16), thresholds=thresholds) as step:
        fixed, before = plain.step(plain.initial(), halves, values, 2e-3)
        state, report = step.step(step.initial(), halves, values, 2e-3)
        again, _ = step.step(step.restore(step.initial().arrays()), halves, values, 2e-3)
        nan = replace(batch, inputs={n: a * np.nan for n, a in batch.inputs.items()})
        same, skipped = step.step(state, parts(nan, (16, 16)), values, 2e-3)
    assert not len(before.growth)
    for name, value in fixed.parameters.items():
        np.testing.assert_array_equal(state.parameters[name].numpy(), value.numpy())
    assert_same(again, state)
    # Adam's first step is as long for all; the input's threshold has no gradient.
    sizes = np.abs(report.growth)
    assert sizes.shape == (sum(threshold.count for threshold in thresholds),)
    assert np.mean(sizes > 0) > 0.5
    np.testing.assert_allclose(sizes[sizes > 0], 2e-2, rtol=1e-3)
    assert (report.growth < 0).any()
    assert (report.growth > 0).any()
    assert same is state
    assert not skipped.applied
    assert not skipped.growth.any()


def test_learned_thresholds_lower_the_loss(digits: Task) -> None:
    """With the weights as they are: thresholds are calibrated for the values, not the loss."""
    thresholds = learned_thresholds(digits.prepared.space)
    batch, scales = digits.batch(32), digits.scales
    space = digits.prepared.space
    (chosen,) = parse_space("int4")
    losses = []
    with digits.step(thresholds=thresholds) as step:
        state = step.initial()
        for _ in range(12):
            values = space.values(space.uniform(chosen), scales)
            moved, report = step.step(state, [batch], values, 1e-3)
            # Moments are kept, weights are not.
            state = replace(moved, parameters=state.parameters)
            taken = space.formats_taken(space.uniform(chosen))
            scales = Growth(thresholds, digits.scales)(scales, report.growth, taken)
            losses.append(report.loss)
    assert losses[-1] < 0.9 * losses[0]


def test_without_labels_the_float_model_is_the_teacher(digits: Task) -> None:
    data = Dataset(digits.data.stored_inputs, None, digits.data.specs)
    task = Task(
        digits.prepared,
        digits.scales,
        data,
        choose_objective(
            digits.prepared.canonical,
            {"logits": np.zeros((4, 10), np.float32)},
            labels=None,
            distillation=0.5,
        ),
    )
    with task.step() as step:
        state, batch = step.initial(), task.batch(32)
        same, near, far = step.losses(
            state, batch, [task.values(n) for n in ("float32", "int8", "int4")]
        )
        # A divergence is zero at its teacher, to within the rounding of fused kernels.
        assert abs(same) < 1e-5
        assert same < near < far
        for index in range(20):
            state, _ = step.step(state, [task.batch(32, index)], task.values("int4"), 3e-3)
        assert step.losses(state, batch, [task.values("int4")])[0] < far


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_the_divergence_is_that_from_the_float_model_whatever_the_loss(
    digits: Task, distillation: float
) -> None:
    objective = choose_objective(
        digits.prepared.canonical,
        {"logits": np.zeros((4, 10), np.float32)},
        labels=digits.data.labels,
        distillation=distillation,
    )
    task = replace(digits, objective=objective)
    with task.step() as step:
        state, batch = step.initial(), task.batch(32)
        assert batch.labels is not None
        relabelled = replace(batch, labels=np.roll(batch.labels, 1))
        values = [task.values(name) for name in ("float32", "int8", "int4")]
        found = step.divergences(state, batch, values)
        assert step.divergences(state, relabelled, values) == found
        assert step.losses(state, relabelled, values) != step.losses(state, batch, values)
        scores = step.judge_each(state, batch, values)
        teacher = log_softmax(
            step.teacher_outputs([batch])["logits"].astype(np.float64), axis=1
        )
        for (outputs, _), divergence in zip(scores, found, strict=True):
            shift = teacher - log_softmax(outputs["logits"].astype(np.float64), axis=1)
            expected = float(np.mean(np.sum(np.exp(teacher) * shift, axis=1)))
            assert divergence == pytest.approx(expected, rel=0.1, abs=3e-8)
        assert found[0] < found[1] < found[2]
        assert step.step(state, [batch], values[2], LR)[1].applied


def test_every_format_can_be_fed_without_another_graph() -> None:
    model = load_model(EXAMPLES / "digits_cnn.onnx")
    data = load_npz(EXAMPLES / "digits_test.npz", input_specs(model)).take(np.arange(64))
    signed = [n for n in FORMATS if not n.startswith("uint")]
    task = task_of(model, data, space=",".join(signed))
    with task.step() as step:
        losses = step.losses(step.initial(), task.batch(64), [task.values(n) for n in signed])
    assert np.isfinite(losses).all()


def test_the_loss_of_a_judgement_is_the_mean_over_all_samples(
    digits: Task, step: TrainStep
) -> None:
    batches, state, values = (
        [digits.batch(size) for size in (48, 16)],
        step.initial(),
        digits.values("int4"),
    )
    losses = [step.losses(state, batch, [values])[0] for batch in batches]
    assert losses[0] != losses[1]
    wanted = (48 * losses[0] + 16 * losses[1]) / 64
    assert step.judge(state, batches, values)[1] == pytest.approx(wanted, rel=1e-6)
