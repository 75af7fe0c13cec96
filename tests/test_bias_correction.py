"""Bias correction: layers compute the right means, and nothing else changes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnx_fliqs import Assignment, emit
from onnx_fliqs.bias_correction import corrected_biases
from onnx_fliqs.calibrate import Observer
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.emission import emit_graph, searchable, simulate
from onnx_fliqs.passes.separate_biases import SeparateBiasesPass
from onnx_fliqs.precision import Precision
from onnx_fliqs.prepare import with_weights
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session
from onnx_fliqs.verify import verify_graph
from support import PRECISIONS, Calibrated, Feeds, calibrated, initializer, model, random_feeds

TAKEN = [PRECISIONS["int3"], PRECISIONS["int8"]]

NETWORK = """g (float[N,3,6,6] x) => (float[N,5] y) {
    [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    [c2] d = Conv <group = 4> (r, w2)
    s = Relu (d)
    [c3] e = ConvTranspose (s, w3)
    g = GlobalAveragePool (e)
    f = Flatten (g)
    [fc] h = Gemm <transB = 1> (f, w4)
    [m1] m = MatMul (h, w5)
    n = Add (m, b5)
    [m2] y = MatMul (n, w6) }"""
WEIGHTS = {
    "w1": (4, 3, 3, 3),
    "b1": (4,),
    "w2": (4, 1, 3, 3),
    "w3": (4, 6, 2, 2),
    "w4": (5, 6),
    "w5": (5, 5),
    "b5": (5,),
    "w6": (5, 5),
}


def network(precisions: Sequence[Precision] = TAKEN) -> Calibrated:
    plain = model(NETWORK, weights=WEIGHTS)
    SeparateBiasesPass()(plain)
    return calibrated(plain, precisions=precisions)


def channel_means(graph: ir.Model, feeds: Feeds) -> dict[str, npt.NDArray[np.float32]]:
    """The mean of each channel of what layers compute."""
    names = ["a", "d", "e", "h", "m"]
    seen = Observer(graph, names).run(feeds)
    return {
        name: array.mean(axis=tuple(i for i in range(array.ndim) if i != 1))
        for name, array in seen.items()
    }


def test_one_batch_of_calibration_data_gives_the_right_means() -> None:
    case = network()
    chosen = case.space.uniform(PRECISIONS["int3"])
    feeds = random_feeds(case.canonical, 1, batch=32)
    biases = corrected_biases(case.canonical, case.space, chosen, case.scales, [feeds])
    assert set(biases) == {"b1", "w2_bias", "w3_bias", "w4_bias", "b5"}
    fixed = with_weights(case.canonical, biases)
    right = channel_means(case.canonical, feeds)
    before, after = (
        channel_means(searchable(each, case.space, chosen, case.scales), feeds)
        for each in (case.canonical, fixed)
    )
    # The MatMul's own output lacks the bias; its Add is corrected.
    right["m"] = right["m"] + initializer(case.canonical, "b5")
    before["m"] = before["m"] + initializer(case.canonical, "b5")
    after["m"] = after["m"] + biases["b5"]
    for name, mean in right.items():
        assert np.abs(before[name] - mean).max() > 1e-2
        np.testing.assert_allclose(after[name], mean, atol=1e-4, rtol=1e-4)


def test_several_batches_have_a_smaller_shift() -> None:
    case = network()
    chosen = case.space.uniform(PRECISIONS["int3"])
    batches = [random_feeds(case.canonical, seed, batch=16) for seed in range(8)]
    together = {"x": np.concatenate([feeds["x"] for feeds in batches])}
    biases = corrected_biases(case.canonical, case.space, chosen, case.scales, batches)
    right = channel_means(case.canonical, together)
    before, after = (
        channel_means(searchable(each, case.space, chosen, case.scales), together)
        for each in (case.canonical, with_weights(case.canonical, biases))
    )
    for name in ("a", "d", "e", "h"):
        shift, left = (np.abs(means[name] - right[name]).max() for means in (before, after))
        assert left < 0.25 * shift


def test_the_emitted_graph_is_corrected_and_right_at_every_level() -> None:
    case = network()
    chosen = case.space.uniform(PRECISIONS["int8"])
    feeds = [random_feeds(case.canonical, 1, batch=8)]
    biases = corrected_biases(case.canonical, case.space, chosen, case.scales, feeds)
    fixed = with_weights(case.canonical, biases)
    graph = emit_graph(fixed, case.space, chosen, case.scales, case.target)
    searched = simulate(fixed, case.space, chosen, case.scales, feeds)
    assert verify_graph(graph, feeds, searched).level is OptimizationLevel.DEFAULT


def test_float_layers_and_layers_without_a_bias_are_left() -> None:
    case = calibrated(
        model(
            "g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }", weights={"w": (4, 3)}
        )
    )
    chosen = case.space.uniform(PRECISIONS["int4"])
    feeds = [random_feeds(case.canonical)]
    assert corrected_biases(case.canonical, case.space, chosen, case.scales, feeds) == {}
    whole = network([PRECISIONS["int8"], PRECISIONS["float32"]])
    feeds = [random_feeds(whole.canonical)]
    chosen = whole.space.uniform(PRECISIONS["float32"])
    kept = corrected_biases(whole.canonical, whole.space, chosen, whole.scales, feeds)
    for name, bias in kept.items():
        np.testing.assert_allclose(bias, initializer(whole.canonical, name), atol=1e-5)


@pytest.mark.parametrize("equalize", [False, True])
def test_emit_corrects_with_data_and_only_with_data(equalize: bool) -> None:
    text = NETWORK.replace("n = Add (m, b5)", "y = Add (m, b5) }").partition("[m2]")[0]
    plain = model(text, weights={k: v for k, v in WEIGHTS.items() if k != "w6"})
    rng = np.random.default_rng(0)
    images = rng.standard_normal((64, 3, 6, 6)).astype(np.float32)
    data = Dataset({"x": images}, None, input_specs(plain))
    assignment = Assignment(dict.fromkeys(["c1", "c2", "c3", "fc", "m1"], "int4"))
    sessions = [make_session(plain)]
    sessions += [
        make_session(
            emit(plain, assignment, data, bias_correction=wanted, equalize=equalize).model
        )
        for wanted in (True, False)
    ]
    right, corrected, shifted = (run_session(s, ["y"], {"x": images})[0] for s in sessions)
    errors = [np.abs((y - right).mean(axis=0)).max() for y in (corrected, shifted)]
    assert errors[0] < 0.5 * errors[1]
    blind = emit(plain, assignment, None, equalize=equalize)
    assert any("biases are not corrected" in warning for warning in blind.warnings)
