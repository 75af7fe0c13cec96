"""The optimizer model against its docstring, written out in NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

import support
from onnx_fliqs.optimizer import BETA1, BETA2, Optimizer, build_optimizer

Array: TypeAlias = npt.NDArray[Any]

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (4,), "k": (2, 3, 1, 1), "s": ()}
SIZE = 12 + 4 + 6 + 1
LR = 0.01
# Of the docstring: a gradient longer than this many times its running mean is shortened.
CLIP = 4.0
# Sums of 23 float32 squares in another order, and the few operations after them.
ROUNDING = 3e-6


@dataclass
class State:
    parameters: list[Array]
    m: Array
    v: Array
    length: float = 0.0
    updates: int = 0


def start(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    parameters = [
        np.asarray(rng.standard_normal(shape), np.float32) * np.float32(10.0**i)
        for i, shape in enumerate(SHAPES.values())
    ]
    zeros = np.zeros(SIZE, np.float32)
    return State(parameters, zeros, zeros)


def gradient(seed: int, scale: float = 1.0) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(SIZE) * scale, np.float32)


every = pytest.mark.parametrize("kind", list(Optimizer))


def session(
    share: float = 1.0,
    shapes: Mapping[str, Sequence[int]] = SHAPES,
    kind: Optimizer = Optimizer.RELATIVE_ADAM,
) -> Any:
    model = build_optimizer(shapes, share, kind)
    onnx.checker.check_model(model, full_check=True)
    return support.session(model.SerializeToString())


def run(
    optimizer: ort.InferenceSession | ReferenceEvaluator,
    state: State,
    g: Array,
    lr: float = LR,
) -> tuple[State, float]:
    t = state.updates + 1
    feeds = {
        **{f"p{i}": array for i, array in enumerate(state.parameters)},
        "gradient": g,
        "m": state.m,
        "v": state.v,
        "length": np.float32(state.length),
        "lr": np.float32(lr),
        "correction1": np.float32(1 / (1 - BETA1**t)),
        "correction2": np.float32(1 / (1 - BETA2**t)),
    }
    feeds = {name: np.asarray(value) for name, value in feeds.items()}
    with np.errstate(all="ignore"):
        outputs: list[Array] = list(optimizer.run(None, feeds))  # type: ignore[arg-type]
    *parameters, m, v, length, norm = outputs
    return State(parameters, m, v, float(length), t), float(norm)


def expected(
    state: State, g: Array, lr: float = LR, kind: Optimizer = Optimizer.RELATIVE_ADAM
) -> State:
    """One update in float64."""
    t = state.updates + 1
    norm = float(np.linalg.norm(g.astype(np.float64)))
    limit = CLIP * state.length if state.length > 0 else norm
    clipped = g.astype(np.float64) * min(1.0, limit / norm)
    length = 0.95 * state.length + 0.05 * min(norm, limit) if state.length > 0 else norm
    m = BETA1 * state.m.astype(np.float64) + (1 - BETA1) * clipped
    v = BETA2 * state.v.astype(np.float64) + (1 - BETA2) * clipped**2
    first, second = m / (1 - BETA1**t), v / (1 - BETA2**t)
    parameters, start = [], 0
    for p in state.parameters:
        part = slice(start, start + p.size)
        power = second[part]
        if kind is Optimizer.RELATIVE_MOMENTUM:
            power = power.mean()
        direction = (first[part] / np.sqrt(power)).reshape(p.shape)
        start += p.size
        size = np.sqrt(np.mean(p.astype(np.float64) ** 2))
        # Only a bias may be so small that it needs a floor.
        size = max(size, 1e-3) if p.ndim <= 1 else size
        if kind is Optimizer.ADAM:
            size = 1.0
        parameters.append(p - lr * size * direction)
    return State(parameters, m, v, length, t)


def assert_close(found: State, wanted: State) -> None:
    for ours, theirs in zip(found.parameters, wanted.parameters, strict=True):
        assert ours.shape == theirs.shape
        scale = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING * scale)
    np.testing.assert_allclose(found.m, wanted.m, rtol=ROUNDING, atol=1e-7)
    np.testing.assert_allclose(found.v, wanted.v, rtol=ROUNDING, atol=1e-9)
    assert found.length == pytest.approx(wanted.length, rel=ROUNDING)


def assert_same(found: State, wanted: State) -> None:
    for ours, theirs in zip(found.parameters, wanted.parameters, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(found.m, wanted.m)
    np.testing.assert_array_equal(found.v, wanted.v)
    assert found.length == wanted.length


@every
def test_several_updates_equal_the_formula(kind: Optimizer) -> None:
    optimizer, state = session(kind=kind), start()
    for step in range(5):
        g = gradient(step)
        after, norm = run(optimizer, state, g)
        assert norm == pytest.approx(float(np.linalg.norm(g)), rel=ROUNDING)
        assert_close(after, expected(state, g, kind=kind))
        state = after


@every
def test_the_reference_evaluator_computes_the_same(kind: Optimizer) -> None:
    reference = ReferenceEvaluator(build_optimizer(SHAPES, optimizer=kind))
    state, g = start(), gradient(1)
    assert_close(run(reference, state, g)[0], expected(state, g, kind=kind))


def test_the_first_step_moves_every_weight_by_the_learning_rate_times_the_tensors_size() -> (
    None
):
    # Adam's first direction is the sign of the gradient.
    state, g = start(), gradient(3)
    after, _ = run(session(), state, g)
    for before, now in zip(state.parameters, after.parameters, strict=True):
        moved = np.abs(now.astype(np.float64) - before)
        size = np.sqrt(np.mean(before.astype(np.float64) ** 2))
        # p - step is rounded to float32, whose spacing at 1 is 1e-7; the step is 1e-2.
        np.testing.assert_allclose(moved, LR * size, rtol=1e-4)


def test_tensors_of_other_sizes_move_in_proportion() -> None:
    state, g = start(), gradient(0)
    larger = State([p * np.float32(1024) for p in state.parameters], state.m, state.v)
    optimizer = session()
    small, large = run(optimizer, state, g)[0], run(optimizer, larger, g)[0]
    for one, other in zip(small.parameters, large.parameters, strict=True):
        # A power of two scales without rounding.
        np.testing.assert_array_equal(one * np.float32(1024), other)


def test_a_bias_of_zeros_moves() -> None:
    shapes = {"b": (5,), "s": (), "of_channels": (1, 2, 1, 1)}
    zeros = np.zeros(8, np.float32)
    state = State([np.zeros(shape, np.float32) for shape in shapes.values()], zeros, zeros)
    g = np.array([1, -2, 3, -4, 5, 6, -7, 8], np.float32)
    after, _ = run(session(shapes=shapes), state, g)
    # lr * 1e-3 * sign(g)
    moved = np.concatenate([each.ravel() for each in after.parameters])
    np.testing.assert_allclose(moved, -LR * 1e-3 * np.sign(g), rtol=1e-6)


def test_a_long_gradient_is_shortened_to_four_times_the_running_length() -> None:
    optimizer, state = session(), start()
    for step in range(3):
        state, _ = run(optimizer, state, gradient(step))
    long = gradient(9, 1000.0)
    after, norm = run(optimizer, state, long)
    assert norm == pytest.approx(float(np.linalg.norm(long)), rel=ROUNDING)
    assert_close(after, expected(state, long))
    added = (after.m - np.float32(BETA1) * state.m) / np.float32(1 - BETA1)
    assert np.linalg.norm(added) == pytest.approx(CLIP * state.length, rel=1e-4)
    # 0.95 + 0.05 * 4: the running length follows what was applied, not what came.
    assert after.length == pytest.approx(1.15 * state.length, rel=ROUNDING)


@pytest.mark.parametrize("share", [3.9, 4.1])
def test_the_bound_lies_at_four_times_the_running_length(share: float) -> None:
    state = start()
    state.length = 2.0
    g = gradient(2)
    g *= np.float32(share * 2.0 / np.linalg.norm(g))
    after, _ = run(session(), state, g)
    kept = float(np.linalg.norm(after.m)) / (1 - BETA1)
    assert kept == pytest.approx(min(share, CLIP) * 2.0, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("seen", [0, 3])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(bad: float, seen: int) -> None:
    optimizer, state = session(), start()
    for step in range(seen):
        state, _ = run(optimizer, state, gradient(step))
    g = gradient(5)
    g[7] = bad
    _, norm = run(optimizer, state, g)
    assert not np.isfinite(norm)
    # The session remembers nothing of it.
    g = gradient(6)
    assert_close(run(optimizer, state, g)[0], expected(state, g))


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_sum_is_updated_with_like_its_mean(share: float) -> None:
    state, g = start(), gradient(0)
    after, norm = run(session(share), state, g / np.float32(share))
    assert norm == pytest.approx(float(np.linalg.norm(g)), rel=ROUNDING)
    assert_close(after, expected(state, g))


@every
def test_a_gradient_of_zeros_changes_no_weight(kind: Optimizer) -> None:
    optimizer, state = session(kind=kind), start()
    after, norm = run(optimizer, state, np.zeros(SIZE, np.float32))
    assert norm == 0.0
    assert_same(after, state)


@every
def test_a_weight_without_a_gradient_stays_where_it_is(kind: Optimizer) -> None:
    optimizer, state = session(kind=kind), start()
    for step in range(3):
        g = gradient(step)
        g[12:16] = 0
        after, _ = run(optimizer, state, g)
        np.testing.assert_array_equal(after.parameters[1], state.parameters[1])
        assert not np.array_equal(after.parameters[0], state.parameters[0])
        state = after


def test_a_learning_rate_of_zero_moves_only_the_moments() -> None:
    state = start()
    after, _ = run(session(), state, gradient(0), lr=0.0)
    for before, now in zip(state.parameters, after.parameters, strict=True):
        np.testing.assert_array_equal(before, now)
    assert np.any(after.m)


@every
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e15])
def test_the_size_of_the_gradient_does_not_matter(scale: float, kind: Optimizer) -> None:
    state = start()
    optimizer = session(kind=kind)
    one, _ = run(optimizer, state, gradient(0))
    other, _ = run(optimizer, state, gradient(0, scale))
    for a, b in zip(one.parameters, other.parameters, strict=True):
        # The same quotients, of numbers that round differently.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(a).max()))


@every
def test_a_parameter_of_given_size_steps_by_so_many_learning_rates(kind: Optimizer) -> None:
    shapes = {"w": (3,), "log": (2, 2)}
    model = build_optimizer(shapes, 1.0, kind, {"log": 10.0})
    onnx.checker.check_model(model, full_check=True)
    g = np.array([1.0, -1.0, 1.0, 2.0, -2.0, 2.0, 2.0], np.float32)
    parameters = [np.full(shape, 0.5, np.float32) for shape in shapes.values()]
    before = State(parameters, np.zeros(7, np.float32), np.zeros(7, np.float32))
    after, _ = run(support.session(model.SerializeToString()), before, g, lr=1e-3)
    moved = after.parameters[1] - before.parameters[1]
    np.testing.assert_allclose(np.abs(moved), 1e-2, rtol=1e-3)
    np.testing.assert_array_equal(np.sign(moved).reshape(-1), -np.sign(g[3:]))
