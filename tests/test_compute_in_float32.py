"""Models of float16, bfloat16 and double compute in float32, and keep their signature."""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs import api
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.compute_in_float32 import ComputeInFloat32Pass
from onnx_fliqs.search_loop import search
from support import check_pass, evaluate, ops, run

HEADER = '<ir_version: 10, opset_import: ["" : 21, "c" : 1, "com.microsoft" : 1]>'
WEIGHT = np.random.default_rng(0).standard_normal((4, 3))


def built(text: str, **initializers: npt.NDArray[Any]) -> ir.Model:
    """A model with initializers of any type, and the types of its values inferred."""
    proto = onnx.parser.parse_model(f"{HEADER}\n{text}")
    for name, array in initializers.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def lines(graph: ir.Graph) -> list[str]:
    """The nodes as text, without their names."""
    return [
        f"{', '.join(str(v.name) for v in node.outputs)} = {node.op_type}"
        f" ({', '.join(str(v.name) for v in node.inputs if v is not None)})"
        for node in graph
    ]


def changed(plain: ir.Model) -> ir.Model:
    return check_pass(ComputeInFloat32Pass(), plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_the_ends_keep_their_types_and_all_between_is_float32(dtype: str) -> None:
    text = f"""g ({dtype}[N,4] x) => ({dtype}[N,3] y) {{
        a = MatMul (x, w)
        y = Relu (a) }}"""
    result = changed(built(text, w=WEIGHT.astype(dtype)))
    assert lines(result.graph) == [
        "x_float32 = Cast (x)",
        "a = MatMul (x_float32, w)",
        "y_float32 = Relu (a)",
        "y = Cast (y_float32)",
    ]
    weight = result.graph.initializers["w"].const_value
    assert weight is not None
    assert weight.dtype is ir.DataType.FLOAT
    np.testing.assert_array_equal(
        weight.numpy(), WEIGHT.astype(dtype).astype(np.float32), strict=True
    )


def test_casts_inside_a_mixed_model_go() -> None:
    text = """g (float[N,4] x) => (float[N,3] y, float16[N,3] z) {
        h = Cast <to = 10> (x)
        a = MatMul (h, w)
        f = Cast <to = 1> (a)
        s = Softmax (f)
        z = Cast <to = 10> (s)
        b = Add (z, z)
        y = Cast <to = 1> (b) }"""
    result = changed(built(text, w=WEIGHT.astype(np.float16)))
    assert ops(result) == [
        *("Identity", "MatMul", "Identity", "Softmax", "Identity", "Add", "Identity", "Cast")
    ]
    assert ops(canonicalise(result)) == ["MatMul", "Softmax", "Add", "Cast"]


def test_weights_behind_a_cast_are_folded() -> None:
    text = """g (float[N,4] x) => (float[N,3] y) {
        f = Cast <to = 1> (w)
        y = MatMul (x, f) }"""
    result = canonicalise(built(text, w=WEIGHT.astype(ml_dtypes.bfloat16)))
    assert ops(result) == ["MatMul"]
    assert [v.dtype for v in result.graph.initializers.values()] == [ir.DataType.FLOAT]


def test_what_overflows_float16_does_not_overflow_float32() -> None:
    text = """g (float16[N] x) => (float16[N] y) {
        a = Mul (x, k)
        b = Mul (a, k)
        c = Div (b, k)
        y = Div (c, k) }"""
    plain = built(text, k=np.array([1024], np.float16))
    feeds = {"x": np.array([1, 2, 3], np.float16)}
    with np.errstate(over="ignore"):
        ((expected,),) = evaluate([plain], feeds)
    assert np.isinf(expected).all()
    np.testing.assert_array_equal(run(canonicalise(plain), feeds)[0], feeds["x"])


def test_an_input_that_is_an_output_stays() -> None:
    text = "g (float16[N,2] x) => (float16[N,2] x, float16[N,2] y) { y = Neg (x) }"
    result = check_pass(ComputeInFloat32Pass(), built(text))
    assert lines(result.graph)[-1] == "y = Cast (y_float32)"


def test_an_initializer_that_is_an_output_is_cast_back() -> None:
    text = "g (float16[N,4] x) => (float16[N,3] y, float16[4,3] w) { y = MatMul (x, w) }"
    result = changed(built(text, w=WEIGHT.astype(np.float16)))
    assert "w = Cast (w_float32)" in lines(result.graph)
    assert "y_float32 = MatMul (x_float32, w_float32)" in lines(result.graph)


@pytest.mark.parametrize(
    "node",
    [
        "y = ConstantOfShape <value = float16[1] {1}> (s)",
        "r = ConstantOfShape (s) e = Cast <to = 10> (r) y = EyeLike <dtype = 10> (e)",
        "t = Constant <value = float16 {1}> () y = CastLike (s, t)",
        "q = SequenceEmpty <dtype = 10> () n = SequenceInsert (q, x) y = SequenceAt (n, i)",
        "o = Optional <type = float16[2,2]> () y = Neg (x)",
        "y = LayerNormalization <stash_type = 16> (x, x)",
    ],
)
def test_types_in_attributes_change(node: str) -> None:
    text = f"""g (float16[2,2] x) => (float16[A,B] y) {{
        i = Constant <value_int = 0> ()
        s = Shape (x)
        {node} }}"""
    if "CastLike" in node:
        text = text.replace("[A,B]", "[A]")
    plain = built(text)
    result = ComputeInFloat32Pass()(ir.from_proto(ir.to_proto(plain))).model
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    values = [value for inner in result.graph for value in inner.outputs]
    assert [str(v.name) for v in values if v.dtype is ir.DataType.FLOAT16] == ["y"]


def test_a_body_changes_with_the_graph() -> None:
    text = """g (float16[2] x, int64 n, bool c) => (float16[2] y, float16[K,2] z) {
        y, z = Loop (n, c, x) <
            body = b (int64 i, bool go, float16[2] s)
                => (bool on, float16[2] r, float16[2] t) {
                on = Identity (go)
                r = Mul (s, k)
                t = Neg (r) }> }"""
    result = changed(built(text, k=np.array([2], np.float16)))
    (body,) = result.graph.subgraphs()
    assert [v.dtype for v in (*body.inputs, *body.outputs)] == [
        *(ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT),
        *(ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.FLOAT),
    ]


# -- operators of other domains -------------------------------------------------------------


def test_an_unknown_operator_keeps_its_types() -> None:
    text = """g (float16[N,4] x) => (float16[N,4] y) <float16[N,4] b, float16[N,4] d> {
        a = Relu (x)
        b = c.Foo (a, x)
        d = c.Bar (b)
        e = Neg (d)
        y = Add (e, b) }"""
    result = check_pass(ComputeInFloat32Pass(), built(text), signature=False)
    assert lines(result.graph) == [
        "x_float32 = Cast (x)",
        "a = Relu (x_float32)",
        "a_float16 = Cast (a)",
        "b = Foo (a_float16, x)",
        "b_float32 = Cast (b)",
        "d = Bar (b)",
        "d_float32 = Cast (d)",
        "e = Neg (d_float32)",
        "y_float32 = Add (e, b_float32)",
        "y = Cast (y_float32)",
    ]


def test_an_unknown_operator_of_unknown_type_is_refused() -> None:
    text = "g (float16[N,4] x) => (float16[N,4] y) { a = c.Foo (x) y = Neg (a) }"
    with pytest.raises(UnsupportedError, match=r"Foo 'a' of the domain 'c' .* type of 'a' is"):
        ComputeInFloat32Pass()(built(text))


def test_an_unknown_operator_of_unknown_type_in_float32_is_left_alone() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { a = c.Foo (x) y = Neg (a) }"
    assert not ComputeInFloat32Pass()(built(text)).modified


def test_operators_of_onnx_runtime_change_like_those_of_onnx() -> None:
    text = """g (float16[N,4] x) => (float16[N,4] y) {
        a = com.microsoft.FastGelu (x)
        y = Neg (a) }"""
    result = changed(built(text))
    assert ops(result) == ["Cast", "FastGelu", "Neg", "Cast"]


# -- doubles --------------------------------------------------------------------------------


def test_doubles_outside_layers_stay() -> None:
    text = "g (double[N,4] x) => (double[N,4] y) { y = Exp (x) }"
    assert not ComputeInFloat32Pass()(built(text)).modified


def test_a_double_beyond_float32_is_refused() -> None:
    text = "g (double[N,4] x) => (double[N,3] y) { y = MatMul (x, w) }"
    with pytest.raises(UnsupportedError, match=r"^'w' is of type double and holds 1e\+300"):
        ComputeInFloat32Pass()(built(text, w=np.full((4, 3), -1e300)))


def test_a_double_that_would_vanish_stays() -> None:
    text = """g (double[N,4] x) => (double[N,3] y) {
        a = MatMul (x, w)
        y = Div (a, e) }"""
    result = canonicalise(built(text, w=np.zeros((4, 3)), e=np.array(-1e-300)))
    (y,) = run(result, {"x": np.ones((1, 4))})
    assert (y == 0).all()


# -- what cannot be done --------------------------------------------------------------------


def test_a_sequence_of_another_float_type_is_refused() -> None:
    text = """g (seq(float16[2]) x) => (float16[2] y) {
        i = Constant <value_int = 0> ()
        y = SequenceAt (x, i) }"""
    with pytest.raises(UnsupportedError, match=r"^input 'x' holds FLOAT16, but is no"):
        ComputeInFloat32Pass()(built(text))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("g (bfloat16[N,4] x) => (float[N,4] y) { y = Cast <to = 1> (x) }", "input 'x'"),
        ("g (float[N,4] x) => (bfloat16[N,4] y) { y = Cast <to = 16> (x) }", "output 'y'"),
    ],
)
def test_types_that_numpy_lacks_are_refused_at_the_ends(text: str, end: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{end} is BFLOAT16, which ONNX Runtime"):
        canonicalise(built(text))


# -- the whole way --------------------------------------------------------------------------

CLASSIFIER = """g (float16[N,4] x) => (float16[N,3] y) {
    a = MatMul (x, w1)
    r = Relu (a)
    s = MatMul (r, w2)
    y = Softmax <axis = 1> (s) }"""
REGRESSION = CLASSIFIER.replace("y = Softmax <axis = 1> (s)", "y = Tanh (s)")


@pytest.mark.parametrize(
    ("text", "loss", "labelled"),
    [(CLASSIFIER, "auto", True), (CLASSIFIER, "kl", False), (REGRESSION, "mse", False)],
)
def test_a_model_of_float16_is_searched_and_emitted(
    text: str, loss: str, labelled: bool
) -> None:
    rng = np.random.default_rng(1)
    weights = {"w1": rng.standard_normal((4, 8)), "w2": rng.standard_normal((8, 3))}
    plain = built(text, **{name: w.astype(np.float16) for name, w in weights.items()})
    inputs = {"x": rng.standard_normal((64, 4))}
    labels = np.argmax(run(plain, {"x": inputs["x"].astype(np.float16)})[0], axis=1)
    data = Dataset(inputs, labels if labelled else None, input_specs(plain))
    config = SearchConfig(space="int8", steps=4, batch_size=16, loss=loss, workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = search(plain, data, config)
    assert result.loss is not None
    assert np.isfinite(result.loss)
    assert all(row.trained for row in result.layers)
    assert [v.dtype for v in result.model.graph.outputs] == [ir.DataType.FLOAT16]
    assert result.quantized_quality > 0.9
    assert api.evaluate(result.model, data, against=plain).value > 0.9
    assert api.validate(result.model, reference=plain).reference is not None
