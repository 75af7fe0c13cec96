"""Operators newer than the canonical opset are written in terms of older ones."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnx_fliqs.passes.canonicalise import OPSET, canonicalise
from onnx_fliqs.passes.inline_operator_definitions import InlineOperatorDefinitionsPass
from onnx_fliqs.trainability import trainable_parameters
from support import check_pass, f32, model, ops, run

NEWEST = onnx.defs.onnx_opset_version()


def needs(opset: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        opset > NEWEST, reason=f"onnx {onnx.__version__} does not know opset {opset}"
    )


def numbers(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(np.float32)


POSITIONS = np.array([[0, 1, 2], [3, 4, 5]])
QKV = (numbers(2, 4, 3, 8), numbers(2, 4, 5, 8), numbers(2, 4, 5, 8))
FLAT = (numbers(2, 3, 32), numbers(2, 5, 32), numbers(2, 5, 32))
GROUPED = (numbers(2, 3, 32), numbers(2, 5, 16), numbers(2, 5, 16))
HEADS = {"q_num_heads": 4, "kv_num_heads": 4}
FEW_HEADS = {"q_num_heads": 4, "kv_num_heads": 2}


@pytest.mark.parametrize(
    ("opset", "op_type", "inputs", "attributes", "outputs"),
    [
        pytest.param(opset, *rest, marks=needs(opset), id=f"{rest[0]}-{opset}-{index}")
        for index, (opset, *rest) in enumerate(
            [
                (23, "RMSNormalization", [numbers(2, 3, 4), numbers(4)], {}, 1),
                (
                    *(23, "RMSNormalization", [numbers(2, 3, 4), numbers(3, 4)]),
                    *({"axis": 1, "epsilon": 1e-2}, 1),
                ),
                (24, "Swish", [numbers(2, 3)], {}, 1),
                (24, "Swish", [numbers(2, 3)], {"alpha": 1.5}, 1),
                (28, "SwiGLU", [numbers(2, 3), numbers(2, 3)], {}, 1),
                (23, "Attention", [*QKV], {}, 1),
                (24, "Attention", [*QKV], {"is_causal": 1, "scale": 0.3}, 1),
                (23, "Attention", [*FLAT, numbers(3, 5)], HEADS, 1),
                (23, "Attention", [*FLAT, numbers(3, 5) > 0], {**HEADS, "softcap": 2.0}, 1),
                (
                    *(24, "Attention"),
                    [*GROUPED, numbers(3, 9), numbers(2, 2, 4, 8), numbers(2, 2, 4, 8)],
                    *(FEW_HEADS, 3),
                ),
                (24, "Attention", [*QKV, None, None, None, np.array([3, 5])], {}, 1),
                (
                    *(23, "RotaryEmbedding"),
                    [numbers(2, 4, 3, 8), numbers(9, 4), numbers(9, 4), POSITIONS],
                    *({"interleaved": 1}, 1),
                ),
                (
                    *(23, "RotaryEmbedding"),
                    [numbers(2, 3, 32), numbers(2, 3, 4), numbers(2, 3, 4)],
                    *({"num_heads": 4}, 1),
                ),
                (
                    *(27, "CausalConvWithState"),
                    [numbers(2, 3, 6), numbers(3, 1, 4), numbers(3), numbers(2, 3, 3)],
                    *({"activation": "silu"}, 2),
                ),
            ]
        )
    ],
)
def test_a_newer_operator_computes_the_same(
    opset: int,
    op_type: str,
    inputs: list[npt.NDArray[Any] | None],
    attributes: dict[str, Any],
    outputs: int,
) -> None:
    feeds = {f"i{k}": array for k, array in enumerate(inputs) if array is not None}
    names = [f"i{k}" if array is not None else "" for k, array in enumerate(inputs)]
    results = [f"o{k}" for k in range(outputs)]
    node = helper.make_node(op_type, names, results, name="layer", **attributes)
    types = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), ["N", *array.shape[1:]]
        )
        for name, array in feeds.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in results
    ]
    proto = helper.make_model(
        helper.make_graph([node], "g", types, ends),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    expected = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)

    written_out = check_pass(
        InlineOperatorDefinitionsPass(target=OPSET), ir.from_proto(proto), signature=False
    )
    assert op_type not in ops(written_out)
    assert all(node.name.startswith("layer_") for node in written_out.graph if node.name)
    assert written_out.opset_imports == {"": opset}
    assert not written_out.functions
    for want, got in zip(expected, run(canonicalise(written_out), feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@needs(24)
def test_what_a_newer_operator_separates_still_trains() -> None:
    text = """g (float[N,3,8] x) => (float[N,3,8] y) {
        n = RMSNormalization (x, s)
        q = MatMul (n, wq)
        k = MatMul (n, wk)
        v = MatMul (n, wv)
        a = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v)
        o = MatMul (a, wo)
        y = Swish (o) }"""
    weights = {"s": (8,), **dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8))}
    header = '<ir_version: 10, opset_import: ["" : 24]>'
    result = canonicalise(model(text, header=header, weights=weights))
    assert ops(result).count("MatMul") == 6
    assert set(trainable_parameters(result, ["y"])) >= {"wq", "wk", "wv", "wo"}


@needs(24)
def test_attributes_at_their_new_defaults_do_not_matter() -> None:
    text = 'g (float[N,4] x) => (int32[N,4] y) { y = Cast <to = 6, round_mode = "up"> (x) }'
    plain = model(text, header='<ir_version: 10, opset_import: ["" : 24]>')
    assert not InlineOperatorDefinitionsPass(target=OPSET)(plain).modified
    (node,) = canonicalise(plain).graph
    assert set(node.attributes) == {"to"}


@needs(23)
def test_an_operator_whose_types_are_unknown_is_left() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { a = c.Foo (x) y = RMSNormalization (a, x) }"
    plain = model(text, header='<ir_version: 10, opset_import: ["" : 23, "c" : 1]>')
    assert not InlineOperatorDefinitionsPass(target=OPSET)(plain).modified


def test_operators_that_the_older_opset_has_are_left() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { y = Mish (x) }"
    plain = model(text, header='<ir_version: 10, opset_import: ["" : 22]>')
    assert not InlineOperatorDefinitionsPass(target=OPSET)(plain).modified
    np.testing.assert_allclose(
        run(canonicalise(plain), {"x": f32([[0, 1, -1, 2]])})[0],
        [[0, 0.86509836, -0.30340147, 1.9439589]],
        rtol=1e-5,
    )
