"""A graph that does not compute what was searched is found out."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from naive_graphs import quantized_conv
from onnx_fliqs.errors import VerificationError
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.verify import Check, Comparison, Verification, compare, verify_graph
from support import (
    PRECISIONS,
    Feeds,
    calibrated_case,
    f32,
    initializer,
    model,
    random_feeds,
    run,
)


def searched(
    case: str, fmt: str, target: str = "generic"
) -> tuple[ir.Model, list[Feeds], list[Feeds]]:
    """An emitted graph, feeds, and the searched network's outputs."""
    prepared = calibrated_case(case, target)
    chosen = prepared.space.uniform(PRECISIONS[fmt])
    batches = [random_feeds(prepared.canonical, seed) for seed in (3, 4)]
    names = [str(value.name) for value in prepared.canonical.graph.outputs]
    outputs = [
        dict(zip(names, run(prepared.searchable(chosen), feeds), strict=True))
        for feeds in batches
    ]
    return prepared.emitted(chosen), batches, outputs


# -- comparison -----------------------------------------------------------------------------


def test_a_difference_is_measured_in_the_size_of_the_reference() -> None:
    reference = f32([[3, -3], [3, 3]])
    moved = reference + f32([[0.3, 0.0], [0.0, 0.0]])
    result = compare({"y": moved}, {"y": reference})
    assert result.rms == pytest.approx(0.05, rel=1e-5)
    assert result.largest == pytest.approx(0.1, rel=1e-5)
    assert compare({"y": reference}, {"y": reference}) == Comparison(0.0, 0.0)


def test_the_worst_output_counts_and_integers_do_not() -> None:
    one = np.ones(4, np.float32)
    outputs = {"y": one, "z": one * 2, "k": np.array([1])}
    reference = {"y": one, "z": one, "k": np.array([2])}
    assert compare(outputs, reference).rms == 1.0


def test_what_is_not_finite_differs_infinitely() -> None:
    one = np.ones(2, np.float32)
    for bad in (np.nan, np.inf):
        assert compare({"y": one * np.float32(bad)}, {"y": one}).rms == float("inf")


def test_a_reference_of_zeros_is_measured_absolutely() -> None:
    zeros = np.zeros(2, np.float32)
    assert compare({"y": zeros}, {"y": zeros}).rms == 0
    assert compare({"y": zeros + 0.5}, {"y": zeros}).rms == 0.5


# -- graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "fmt", "target"),
    [
        ("residual", "int8", "generic"),
        ("residual", "int8", "ort-cpu"),
        ("residual", "int4", "generic"),
        ("attention", "e2m1", "generic"),
        ("conv_relu_conv", "e4m3", "generic"),
    ],
)
def test_a_right_graph_passes_at_every_level(case: str, fmt: str, target: str) -> None:
    graph, batches, outputs = searched(case, fmt, target)
    result = verify_graph(graph, batches, outputs)
    assert result.searched == Comparison(0.0, 0.0)
    assert [check.name for check in result.levels] == ["basic", "default"]
    assert all(check.agrees for check in result.levels)
    assert result.level is OptimizationLevel.DEFAULT
    assert result.why() == ""


def test_a_wrong_scale_is_found() -> None:
    graph, batches, outputs = searched("residual", "int8")
    scale = graph.graph.initializers["w2@c1.scale"]
    wrong = initializer(graph, "w2@c1.scale") * np.float32(1.05)
    scale.const_value = ir.tensor(wrong, name="w2@c1.scale")
    with pytest.raises(VerificationError, match=r"differs from the searched network by 0\.0"):
        verify_graph(graph, batches, outputs)
    # By itself it is consistent: only the searched network tells.
    assert verify_graph(graph, batches).level is OptimizationLevel.DEFAULT


def test_a_missing_relu_is_found() -> None:
    graph, batches, outputs = searched("residual", "e4m3")
    relu = next(node for node in graph.graph if node.op_type == "Relu")
    relu.outputs[0].replace_all_uses_with(relu.inputs[0])  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="differs from the searched network"):
        verify_graph(graph, batches, outputs)


def test_wrong_codes_are_found() -> None:
    graph, batches, outputs = searched("gemms", "int4")
    value = graph.graph.initializers["w2@trans.codes"]
    codes = initializer(graph, "w2@trans.codes")
    value.const_value = ir.Tensor(np.ascontiguousarray(codes[::-1]), dtype=ir.DataType.INT4)
    with pytest.raises(VerificationError, match="differs from the searched network"):
        verify_graph(graph, batches, outputs)


def test_a_relu_that_onnx_runtime_drops_costs_the_default_level() -> None:
    # What tools emit that write a zero point: fp8 behind a Relu (see LowerSitesPass).
    graph = model(
        """g (float[N,4] x) => (float[N,4] y) {
            r = Relu (x)
            q = QuantizeLinear (r, s, z)
            d = DequantizeLinear (q, s, z)
            y = Add (d, d) }""",
        constants={"s": 0.01},
    )
    zero = ir.Tensor(
        np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()),
        dtype=ir.DataType.FLOAT8E4M3FN,
        name="z",
    )
    graph.graph.register_initializer(ir.Value(name="z", const_value=zero))
    for reader in [node for node in graph.graph if node.op_type.endswith("Linear")]:
        reader.replace_input_with(2, graph.graph.initializers["z"])
    batches = [{"x": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)}]
    result = verify_graph(graph, batches)
    basic, default = result.levels
    assert basic.agrees
    assert not default.agrees
    assert result.level is OptimizationLevel.BASIC
    assert result.why().startswith("default: ")


def test_a_graph_that_the_default_level_refuses_falls_back() -> None:
    # QDQ around a float8 Conv is fused into a QLinearConv that does not exist.
    graph = quantized_conv(ir.DataType.FLOAT8E4M3FN)
    result = verify_graph(graph, [random_feeds(graph)])
    assert result.level is OptimizationLevel.BASIC
    assert result.levels[1].error is not None
    assert result.levels[1].difference is None


def test_an_invalid_graph_is_refused() -> None:
    graph, batches, _ = searched("gemms", "int8")
    node = next(node for node in graph.graph if node.op_type == "Gemm")
    node.attributes["broadcast"] = ir.AttrInt64("broadcast", 1)
    with pytest.raises(VerificationError, match="not valid ONNX"):
        verify_graph(graph, batches)


def test_a_graph_that_does_not_run_is_refused() -> None:
    # Valid ONNX, for which ONNX Runtime has no kernel.
    graph = model("g (uint8[N] x) => (uint8[H,W,C] y) { y = ImageDecoder (x) }")
    with pytest.raises(VerificationError, match="does not run"):
        verify_graph(graph, [{"x": np.zeros(4, np.uint8)}])


def test_no_level_that_agrees_is_an_error_that_says_why() -> None:
    result = Verification(
        None,
        (
            Check("basic", None, Comparison(0.5, 1.0)),
            Check("default", "no kernel", None),
        ),
    )
    with pytest.raises(VerificationError, match=r"basic: differs by 0\.5 .*; default: no"):
        _ = result.level


def test_the_result_is_json() -> None:
    graph = quantized_conv(ir.DataType.FLOAT8E4M3FN)
    batches = [random_feeds(graph)]
    outputs = [{"y": run(graph, batches[0])[0]}]
    report = json.loads(json.dumps(verify_graph(graph, batches, outputs).to_dict()))
    assert report["searched_rms"] == 0
    assert report["runtimes"] == {}
    assert report["levels"]["basic"] == {"agrees": True, "rms": 0.0, "error": None}
    assert report["levels"]["default"]["agrees"] is False
    assert report["levels"]["default"]["rms"] is None
    assert verify_graph(graph, batches).to_dict()["searched_rms"] is None
