"""Weights of control-flow bodies live in the main graph."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.hoist_initializers import HoistInitializersPass
from support import (
    HEADER,
    Feeds,
    check_pass,
    model,
    ops,
    random_feeds,
    require_shared,
    session,
)

NESTED = """g (float[N,2] x, bool c, bool d) => (float[N,2] y) {
    y = If (c) <
        then_branch = t () => (float[N,2] p) <float[2,2] w = {1, 2, 3, 4}, float s = {2}> {
            a = MatMul (x, w)
            p = Mul (a, s) },
        else_branch = e () => (float[N,2] q) {
            q = If (d) <
                then_branch = t2 () => (float[N,2] r) <float[2,2] w = {1, 2, 3, 4}> {
                    r = MatMul (x, w) },
                else_branch = e2 () => (float[N,2] z)
                    <float[2,2] w = {1, 2, 3, 5}, int64[2] i = {1, 0}> {
                    b = MatMul (x, w)
                    z = Gather <axis = 1> (b, i) }> }> }"""


def test_bodies_share_what_is_equal_and_keep_scalars_and_integers() -> None:
    result = check_pass(HoistInitializersPass(), model(NESTED))
    assert {
        name: value.const_value.numpy().reshape(-1).tolist()  # type: ignore[union-attr]
        for name, value in result.graph.initializers.items()
    } == {"w": [1, 2, 3, 4], "w_": [1, 2, 3, 5]}
    assert [list(body.initializers) for body in result.graph.subgraphs()] == [
        *(["s"], [], [], ["i"])
    ]
    readers = {
        str(node.outputs[0].name): str(node.inputs[1].name)  # type: ignore[union-attr]
        for node in result.graph.all_nodes()
        if node.op_type == "MatMul"
    }
    assert readers == {"a": "w", "r": "w", "b": "w_"}


def test_a_name_of_the_main_graph_is_not_taken() -> None:
    text = """g (float[N,2] x, bool c) => (float[N,2] y) <float[2] k = {9, 9}> {
        w = Mul (x, k)
        y = If (c) <
            then_branch = t () => (float[N,2] p) <float[2] v = {1, 2}> { p = Add (w, v) },
            else_branch = e () => (float[N,2] v) { v = Neg (w) }> }"""
    result = check_pass(HoistInitializersPass(), model(text))
    assert list(result.graph.initializers) == ["k", "v_"]


def test_what_a_body_returns_stays_its_own() -> None:
    text = """g (bool c) => (float[2] y) {
        y = If (c) <
            then_branch = t () => (float[2] p) <float[2] p = {1, 2}> { u = Neg (p) },
            else_branch = e () => (float[2] q) <float[2] q = {3, 4}> { v = Neg (q) }> }"""
    result = check_pass(HoistInitializersPass(), model(text))
    bodies = list(result.graph.subgraphs())
    assert [str(body.outputs[0].name) for body in bodies] == ["p", "q"]
    assert list(result.graph.initializers) == ["p_", "q_"]


LAYERS = """g (float[4,2,3] x, bool c) => (float[4,2,5] y) {
    y = If (c) <
        then_branch = t () => (float[4,2,5] p) {
            h, last = LSTM <hidden_size = 5> (x, w1, r1)
            a = Constant <value = int64[1] {1}> ()
            p = Squeeze (h, a) },
        else_branch = e () => (float[4,2,5] q) {
            m = MatMul (x, w2)
            n = Conv <pads = [1, 1]> (m, w3)
            q = Relu (n) }> }"""


def in_bodies(text: str, shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    """The model of a text whose bodies hold the weights that they read."""
    proto = onnx.parser.parse_model(f"{HEADER}\n{text}")
    rng = np.random.default_rng(3)
    for node in proto.graph.node:
        for attribute in node.attribute:
            read = {name for inner in attribute.g.node for name in inner.input}
            for name in sorted(read & set(shapes)):
                array = rng.standard_normal(shapes[name]).astype(np.float32)
                attribute.g.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    "level",
    [
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_onnx_runtime_runs_layers_whose_weights_lie_outside(
    level: ort.GraphOptimizationLevel, seed: int
) -> None:
    shapes = {"w1": (1, 20, 3), "r1": (1, 20, 5), "w2": (3, 5), "w3": (2, 2, 3)}
    plain = in_bodies(LAYERS, shapes)
    result = canonicalise(ir.from_proto(ir.to_proto(plain)))
    assert set(result.graph.initializers) >= set(shapes)
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    feeds = random_feeds(plain, seed)
    expected, actual = (
        ort.InferenceSession(
            ir.to_proto(each).SerializeToString(), options, providers=["CPUExecutionProvider"]
        ).run(None, feeds)[0]
        for each in (plain, result)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chosen", "op_type"), [(1, "MatMul"), (0, "Neg")])
def test_a_branch_that_is_always_taken_is_inlined(chosen: int, op_type: str) -> None:
    text = f"""g (float[N,2] x) => (float[N,2] y) <bool c = {{{chosen}}}> {{
        h = Relu (x)
        z = If (c) <
            then_branch = t () => (float[N,2] p) <float[2,2] w = {{1, 2, 3, 4}}> {{
                p = MatMul (h, w) }},
            else_branch = e () => (float[N,2] q) {{ q = Neg (h) }}>
        y = Exp (z) }}"""
    assert ops(canonicalise(model(text))) == ["Relu", op_type, "Exp"]


def test_a_speech_detector_keeps_its_outputs(tmp_path: Path) -> None:
    path = require_shared("zoo/silero_vad_16k_op15.onnx")
    result = canonicalise(ir.load(path))
    assert not any(
        tensor.dtype.is_floating_point() and len(tensor.shape)
        for body in result.graph.subgraphs()
        for value in body.initializers.values()
        if (tensor := value.const_value) is not None
    )
    rng = np.random.default_rng(0)
    feeds: Feeds = {
        "input": rng.standard_normal((1, 512)).astype(np.float32),
        "state": rng.standard_normal((2, 1, 128)).astype(np.float32),
        "sr": np.array(16000),
    }
    saved = tmp_path / "model.onnx"
    ir.save(result, saved)
    for want, got in zip(
        session(str(path)).run(None, feeds), session(str(saved)).run(None, feeds), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
