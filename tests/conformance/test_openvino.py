"""OpenVINO as a second opinion on what ONNX Runtime computes."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from naive_graphs import relu_replaced_by_quantization
from onnx_fliqs import api, openvino_runtime
from onnx_fliqs.errors import RunError, UnsupportedError, VerificationError
from onnx_fliqs.openvino_runtime import compile_model, run_compiled
from support import PRECISIONS, Feeds, calibrated_case, f32, model, random_feeds, run

pytest.importorskip("openvino", reason="run by .ci/run, step conformance: needs openvino")


def computed(graph: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    names = [str(value.name) for value in graph.graph.outputs]
    return run_compiled(compile_model(graph), names, feeds)


# -- running ----------------------------------------------------------------------------------


def test_it_computes_what_onnx_runtime_does() -> None:
    graph = model(
        """g (float[N,8] x) => (float[N,8] y, int64[N] k, float[N,8] r) {
            r = Relu (x)
            y = Gemm (r, w)
            k = ArgMax <axis = 1, keepdims = 0> (y) }""",
        weights={"w": (8, 8)},
    )
    feeds = random_feeds(graph, batch=5)
    for got, want in zip(computed(graph, feeds), run(graph, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_weights_may_lie_in_a_file(tmp_path: Path) -> None:
    graph = model("g (float[N,64] x) => (float[N,64] y) { y = Gemm (x, w) }")
    weight = ir.tensor(random_feeds(graph, batch=64)["x"], name="w")
    graph.graph.register_initializer(ir.Value(name="w", const_value=weight))
    graph.graph.node(0).replace_input_with(1, graph.graph.initializers["w"])
    feeds = random_feeds(graph, 1)
    (expected,) = run(graph, feeds)
    ir.save(graph, tmp_path / "graph.onnx", external_data="weights.bin")
    loaded = ir.load(tmp_path / "graph.onnx")
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    np.testing.assert_allclose(computed(loaded, feeds)[0], expected, rtol=1e-5)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_bfloat16_outputs_are_bfloat16() -> None:
    graph = model("g (float[N] x) => (bfloat16[N] y) { y = Cast <to = 16> (x) }")
    (y,) = computed(graph, {"x": f32([1.5, -2.0, 1e30])})
    expected = f32([1.5, -2.0, 1e30]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(y, expected)


def test_what_it_does_not_know_is_named_on_one_line() -> None:
    graph = model("g (uint8[N] x) => (uint8[H,W,C] y) { y = ImageDecoder (x) }")
    with pytest.raises(
        UnsupportedError, match=r"OpenVINO cannot compile.*ImageDecoder"
    ) as error:
        compile_model(graph)
    assert "\n" not in str(error.value)
    assert "src/" not in str(error.value)


def test_inputs_that_do_not_fit_are_named_on_one_line() -> None:
    graph = model("g (float[N] x, float[N] z) => (float[N] y) { y = Add (x, z) }")
    feeds = {"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)}
    with pytest.raises(RunError, match=r"OpenVINO cannot run.*'y'.*mismatch") as error:
        run_compiled(compile_model(graph), ["y"], feeds)
    assert "\n" not in str(error.value)


def test_weights_of_more_than_a_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_runtime, "fits_inline", lambda model: False)
    with pytest.raises(UnsupportedError, match="GB of weights"):
        compile_model(model("g (float[N] x) => (float[N] y) { y = Relu (x) }"))


# -- traps ------------------------------------------------------------------------------------


def test_a_16_bit_quantization_that_is_dropped_is_named() -> None:
    graph = relu_replaced_by_quantization(ir.DataType.UINT16)
    assert api.validate(graph).verification.levels[1].agrees
    with pytest.raises(VerificationError, match=r"DequantizeLinear 'd1'.* Gemm 'g1' by 0"):
        api.validate(graph, runtimes=["openvino"])


@pytest.mark.parametrize("precision", ["int16", "int8", "int4", "e4m3"])
def test_what_is_emitted_for_such_a_network_keeps_its_relu(precision: str) -> None:
    case = calibrated_case("conv_relu_conv")
    graph = case.emitted(case.space.uniform(PRECISIONS[precision]))
    found = api.validate(graph, runtimes=["onnxruntime", "openvino"])
    (check,) = found.verification.others
    assert (check.name, check.agrees) == ("openvino", True)
    assert set(found.versions) == {"onnxruntime", "openvino"}
    assert found.to_dict()["verification"]["runtimes"]["openvino"]["agrees"]


def test_rounding_by_a_sum_is_simplified_away_and_named() -> None:
    graph = model(
        """g (float[N,8] x) => (float[N,8] y) {
            [first] a = Mul (x, s)
            [up] b = Add (a, magic)
            [down] c = Sub (b, magic)
            [last] y = Neg (c) }""",
        constants={"s": 0.5, "magic": 12582912.0},
    )
    with pytest.raises(VerificationError, match="beginning at Sub 'down'"):
        api.validate(graph, runtimes=["openvino"])
