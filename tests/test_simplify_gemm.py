"""Gemm of any form computes the same in its one form."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.passes.simplify_gemm import SimplifyGemmPass
from pass_models import CASES
from support import check_pass, model

ROWS, INNER, COLUMNS = 2, 3, 4
BIASES = [(), (1,), (COLUMNS,), (1, 1), (1, COLUMNS), (ROWS, 1), (ROWS, COLUMNS)]


@st.composite
def gemms(draw: st.DrawFn) -> ir.Model:
    """A Gemm whose operands may be inputs or constants."""
    attributes: dict[str, Any] = {
        "alpha": draw(st.sampled_from([1.0, 0.5, -2.0])),
        "beta": draw(st.sampled_from([1.0, 0.0, 3.0])),
        "transA": draw(st.sampled_from([0, 1])),
        "transB": draw(st.sampled_from([0, 1])),
    }
    left = (INNER, ROWS) if attributes["transA"] else (ROWS, INNER)
    right = (COLUMNS, INNER) if attributes["transB"] else (INNER, COLUMNS)
    shapes: dict[str, tuple[int, ...]] = {"a": left, "b": right}
    bias = draw(st.sampled_from([None, *BIASES]))
    if bias is not None:
        shapes["c"] = bias
    constant = draw(st.sets(st.sampled_from(sorted(shapes)), max_size=len(shapes) - 1))
    rng = np.random.default_rng(0)
    inputs = [
        onnx.helper.make_tensor_value_info(name, 1, shape)
        for name, shape in shapes.items()
        if name not in constant
    ]
    constants = [
        onnx.numpy_helper.from_array(
            rng.standard_normal(shapes[name]).astype(np.float32), name
        )
        for name in sorted(constant)
    ]
    node = onnx.helper.make_node("Gemm", list(shapes), ["y"], name="layer", **attributes)
    result = onnx.helper.make_tensor_value_info("y", 1, (ROWS, COLUMNS))
    graph = onnx.helper.make_graph([node], "g", inputs, [result], constants)
    opset = onnx.helper.make_opsetid("", 21)
    return ir.from_proto(onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(gemms())
def test_any_form(original: ir.Model) -> None:
    result = check_pass(SimplifyGemmPass(), original, rtol=1e-5, atol=1e-5)
    (layer,) = (node for node in result.graph if node.op_type == "Gemm")
    assert layer.name == "layer"
    for name in ("alpha", "beta"):
        assert layer.attributes.get_float(name, 1.0) == 1.0
    assert layer.attributes.get_int("transA", 0) == 0
    if len(layer.inputs) > 2:
        bias = layer.inputs[2]
        assert bias is not None
        assert bias.const_value is not None
        assert tuple(bias.const_value.shape) == (COLUMNS,)


def test_constants_that_others_read_stay_as_they_are() -> None:
    original = CASES["gemms_share_constants"].build()
    before = {
        name: value.const_value.numpy()
        for name, value in original.graph.initializers.items()
        if value.const_value is not None
    }
    SimplifyGemmPass()(original)
    after = original.graph.initializers
    assert set(after) == {"w", "b", "w_a", "b_a"}
    for name, array in before.items():
        tensor = after[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("attributes", ["", "<transB = 0>", "<alpha = 1.0, beta = 1.0>"])
def test_a_gemm_of_that_form_is_left_alone(attributes: str) -> None:
    text = f"g (float[N,3] x) => (float[N,4] y) {{ y = Gemm {attributes} (x, w, b) }}"
    original = model(text, weights={"w": (3, 4), "b": (4,)})
    assert not SimplifyGemmPass()(original).modified
