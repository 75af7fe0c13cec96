"""Compressed weights stay compressed in ONNX Runtime, and are right."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.precision import parse_precision
from support import calibrated, model, random_feeds, run

ort = pytest.importorskip(
    "onnxruntime", "1.31", reason="run by .ci/run, step conformance: needs onnxruntime 1.31"
)

LAYERS = {
    "matmul": ("y = MatMul (x, w)", (128, 64)),
    "gemm": ("y = Gemm (x, w, b)", (128, 64)),
    "transposed_gemm": ("y = Gemm <transB = 1> (x, w, b)", (64, 128)),
}


@pytest.mark.parametrize("precision", ["int8:float32", "int4g32:float32", "int4g128:float32"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_product_with_floats_keeps_its_weights_compressed(
    layer: str, precision: str, tmp_path: Path
) -> None:
    text, shape = LAYERS[layer]
    plain = model(
        f"g (float[N,128] x) => (float[N,64] y) {{ [layer] {text} }}",
        weights={"w": shape, "b": (64,)},
    )
    case = calibrated(plain, "ort-cpu", [parse_precision(precision)])
    graph = case.emitted(case.space.uniform(parse_precision(precision)))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ran = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "MatMulNBits" in ran
    assert "DequantizeLinear" not in ran
    feeds = random_feeds(case.canonical, 3)
    (got,), (want,) = session.run(None, feeds), run(graph, feeds)
    # The kernel rounds its activations to 8 bits.
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.02
