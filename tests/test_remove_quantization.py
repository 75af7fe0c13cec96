"""A quantized model becomes the float model that it was made from, up to rounding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.formats import FORMATS, quantize
from onnx_fliqs.model import load_model, save_model
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.remove_quantization import RemoveQuantizationPass
from onnx_fliqs.prepare import with_weights
from onnx_fliqs.search_loop import search
from support import (
    PRECISIONS,
    calibrated_case,
    check_pass,
    ops,
    random_feeds,
    require_shared,
    run,
)

Array = npt.NDArray[Any]

DOMAINS = '"com.microsoft" : 1'
SCALES: Mapping[str, Array] = {
    "xs": np.array(0.03, np.float32),
    "xz": np.array(128, np.uint8),
    "ws": np.array(0.02, np.float32),
    "wz": np.array(3, np.int8),
    "ys": np.array(0.05, np.float32),
    "yz": np.array(120, np.uint8),
}


def codes(*shape: int, dtype: Any = np.int8, low: int = -100, high: int = 100) -> Array:
    return np.random.default_rng([*shape]).integers(low, high, shape).astype(dtype)


def built(text: str, **initializers: Any) -> ir.Model:
    """A model with initializers of any type, and the types of its values inferred."""
    return built_in(21, text, initializers)


def built_in(opset: int, text: str, initializers: Mapping[str, Array]) -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["" : {opset}, {DOMAINS}]>'
    proto = onnx.parser.parse_model(f"{header}\n{text}")
    for name, array in {**SCALES, **initializers}.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def removed(plain: ir.Model, tolerance: float) -> ir.Model:
    return check_pass(RemoveQuantizationPass(), plain, rtol=0, atol=tolerance)


def kinds(model: ir.Model) -> list[str]:
    """The operators but for constants."""
    return [op for op in ops(model) if op != "Constant"]


def constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


# -- QuantizeLinear and DequantizeLinear ----------------------------------------------------

LAYER = """g (float[N,4] x) => (float[N,3] y) {
    q = QuantizeLinear (x, xs, xz)
    d = DequantizeLinear (q, xs, xz)
    w = DequantizeLinear <axis = 1> (w_quantized, s, z)
    b = DequantizeLinear (b_quantized, t)
    m = MatMul (d, w)
    y = Add (m, b) }"""
CHANNELS = np.array([0.01, 0.02, 0.03], np.float32)
OFFSETS = np.array([1, -2, 3], np.int8)
BIAS = np.array([1 << 26, -5, (1 << 30) + 1], np.int32)


def test_weights_are_what_their_codes_stand_for_and_activations_are_not_rounded() -> None:
    weight = codes(4, 3)
    parts: dict[str, Any] = {"s": CHANNELS, "z": OFFSETS, "t": np.array(2.0**-28, np.float32)}
    plain = built(LAYER, w_quantized=weight, b_quantized=BIAS, **parts)
    result = removed(plain, 4 * 0.02 * 0.015 * 100)
    assert ops(result) == ["MatMul", "Add"]
    assert set(result.graph.initializers) == {"w", "b"}
    expected = (weight.astype(np.float64) - OFFSETS) * CHANNELS.astype(np.float64)
    np.testing.assert_array_equal(constant(result, "w"), expected.astype(np.float32))
    np.testing.assert_array_equal(
        constant(result, "b"), (BIAS.astype(np.float64) * 2.0**-28).astype(np.float32)
    )


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.int8, np.uint8, np.int16, np.uint16, ml_dtypes.int4, ml_dtypes.uint4),
        *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    ],
)
def test_codes_of_every_type_are_read(dtype: Any) -> None:
    array = np.array([[0, 1, 2], [3, 4, 7]]).astype(dtype)
    text = """g (float[N,2] x) => (float[N,3] y) {
        w = DequantizeLinear (c, ws)
        y = MatMul (x, w) }"""
    result = removed(built(text, c=array), 1e-5)
    expected = array.astype(np.float32) * np.float32(0.02)
    np.testing.assert_array_equal(constant(result, "c_"), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_in_blocks_are_read(axis: int) -> None:
    array = codes(6, 5, dtype=ml_dtypes.int4, low=-8, high=8)
    scale = np.abs(codes(*((3, 5) if axis == 0 else (6, 3)), dtype=np.float32)) + 1
    text = f"""g (float[N,6] x) => (float[N,5] y) {{
        w = DequantizeLinear <axis = {axis}, block_size = 2> (c, s)
        y = MatMul (x, w) }}"""
    result = removed(built(text, c=array, s=scale), 1e-3)
    spread = np.repeat(scale, 2, axis)[:6, :5]
    np.testing.assert_array_equal(constant(result, "c_"), array.astype(np.float32) * spread)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_may_be_a_vector_and_no_zero_point_means_zero(
    shape: tuple[int, ...],
) -> None:
    text = """g (float[N,3] x) => (float[N,3] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, xs)
        y = Neg (d) }"""
    scale, zero = np.full(shape, 0.03, np.float32), np.zeros((1,), np.uint8)
    plain = built(text, s=scale, z=zero.reshape(shape))
    assert kinds(RemoveQuantizationPass()(plain).model) == ["Neg"]


def test_readers_of_the_same_codes_share_the_weight() -> None:
    text = """g (float[N,3] x) => (float[N,3] y) {
        a = DequantizeLinear (c, ws)
        b = DequantizeLinear (c, ws)
        m = MatMul (x, a)
        y = MatMul (m, b) }"""
    result = removed(built(text, c=codes(3, 3)), 1e-4)
    assert len(result.graph.initializers) == 1


def test_a_float_weight_that_is_quantized_in_the_graph_stays_as_it_is() -> None:
    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    text = """g (float[N,4] x) => (float[N,3] y) {
        q = QuantizeLinear (w, s, z)
        d = DequantizeLinear (q, s, z)
        y = MatMul (x, d) }"""
    result = removed(built(text, w=weight, s=CHANNELS, z=np.zeros(3, np.int8)), 0.2)
    np.testing.assert_array_equal(constant(result, "w"), weight)


PAIR = """g (float[N,2,3,3] x) => (float[N,2,3,3] y) {{
    c = {op}
    q = QuantizeLinear (c, xs, z)
    d = DequantizeLinear (q, xs, z)
    y = Neg (d) }}"""
NEGATIVE = "Sub (x, xs)"


@pytest.mark.parametrize(
    ("op", "zero", "expected"),
    [
        (NEGATIVE, np.array(0, np.uint8), ["Sub", "Clip", "Neg"]),
        (NEGATIVE, np.array(-128, np.int8), ["Sub", "Clip", "Neg"]),
        (NEGATIVE, np.array(0, np.uint16), ["Sub", "Clip", "Neg"]),
        (NEGATIVE, np.array(128, np.uint8), ["Sub", "Neg"]),
        (NEGATIVE, np.array(0, np.int8), ["Sub", "Neg"]),
        (NEGATIVE, np.array(1, np.uint8), ["Sub", "Neg"]),
        ("Relu (x)", np.array(0, np.uint8), ["Relu", "Neg"]),
        ("Identity (x)", np.array(0, np.uint8), ["Identity", "Neg"]),
    ],
)
def test_a_range_from_zero_stands_for_an_activation(
    op: str, zero: Array, expected: list[str]
) -> None:
    plain = built(PAIR.format(op=op), z=zero)
    result = RemoveQuantizationPass()(plain).model
    assert kinds(result) == expected
    if "Clip" in expected:
        x = np.array([-4, -1, 0, 1, 4000], np.float32)
        feeds = {"x": np.resize(x, (1, 2, 3, 3)).astype(np.float32)}
        high = np.float32(0.03) * (np.iinfo(zero.dtype).max - np.float32(zero))
        np.testing.assert_allclose(
            run(result, feeds)[0], -np.clip(feeds["x"] - np.float32(0.03), 0, high), rtol=1e-6
        )


def test_an_activation_is_written_as_the_opset_has_it() -> None:
    plain = built_in(10, PAIR.format(op=NEGATIVE), {"z": np.array(0, np.uint8)})
    result = check_pass(RemoveQuantizationPass(), plain, atol=0.016)
    (clip,) = [node for node in result.graph if node.op_type == "Clip"]
    assert set(clip.attributes) == {"min", "max"}


def test_a_moved_activation_is_clipped_once() -> None:
    text = """g (float[N,2,4,4] x) => (float[N,2,2,2] y, float[N,8] z) {
        c = Sub (x, xs)
        q = QuantizeLinear (c, xs, zero)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (q)
        d = DequantizeLinear (p, xs, zero)
        y = Neg (d)
        f = Flatten (p)
        e = DequantizeLinear (f, xs, zero)
        z = Neg (e) }"""
    result = removed(built(text, zero=np.array(0, np.uint8)), 0.02)
    assert kinds(result) == ["Sub", "Clip", "MaxPool", "Neg", "Flatten", "Neg"]


@pytest.mark.parametrize(
    "move",
    [
        "m = Transpose <perm = [0, 2, 1]> (q)",
        "s = Constant <value = int64[2] {0, -1}> () m = Reshape (q, s)",
        "a = Constant <value = int64[1] {1}> () m = Unsqueeze (q, a)",
        "m = Concat <axis = 1> (q, c, q)",
        "h, m = Split <axis = 1, num_outputs = 2> (q)",
        "i = Constant <value = int64[2] {1, 0}> () m = Gather <axis = 1> (q, i)",
    ],
)
def test_moves_of_codes_become_moves_of_floats(move: str) -> None:
    text = f"""g (float[N,2,3] x) => (float y) {{
        q = QuantizeLinear (x, xs, xz)
        {move}
        d = DequantizeLinear (m, xs, xz)
        n = Constant <value = int64[1] {{-1}}> ()
        y = Reshape (d, n) }}"""
    text = text.replace("(float y)", "(float[M] y)")
    result = removed(built(text, c=codes(2, 1, 3, dtype=np.uint8, low=0)), 0.016)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(result))
    assert not any(v.dtype is ir.DataType.UINT8 for n in result.graph for v in n.outputs)


def test_codes_that_are_fed_are_decoded() -> None:
    text = """g (uint8[N,3] x) => (float[N,3] y) {
        d = DequantizeLinear <axis = 1> (x, s, z)
        y = Neg (d) }"""
    zeros = np.array([1, 0, 1], np.uint8)
    result = removed(built(text, s=CHANNELS, z=zeros), 0)
    assert kinds(result) == ["Cast", "Sub", "Mul", "Neg"]


def test_the_pass_enters_branches() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y) {
        q = QuantizeLinear (x, xs, xz)
        y = If (c) <
            then_branch = t () => (float[N,4] p) {
                d = DequantizeLinear (q, xs, xz)
                p = Neg (d) },
            else_branch = e () => (float[N,4] r) {
                w = DequantizeLinear (codes, ws)
                r = MatMul (x, w) }> }"""
    result = removed(built(text, codes=codes(4, 4)), 0.016)
    assert ops(result) == ["If", "Neg", "MatMul"]


# -- operators on integers ------------------------------------------------------------------

STEP = 0.05 / 2 + 1e-6
"""Half a step of the results' grid; what rounding of the inputs adds is in each case."""
CONTRIB = "com.microsoft"
OPERATORS = {
    "QLinearConv": (
        "float[N,2,4,4]",
        "p = QLinearConv <pads = [1, 1, 1, 1]> (q, xs, xz, w, s, z, ys, yz, b)",
        {
            "w": codes(3, 2, 3, 3),
            "b": codes(3, dtype=np.int32, low=-1000, high=1000),
            "s": CHANNELS / 10,
            "z": np.zeros(3, np.int8),
        },
        ["Conv"],
    ),
    "QLinearMatMul": (
        "float[N,3,4]",
        "p = QLinearMatMul (q, xs, xz, w, s, z, ys, yz)",
        {"w": codes(4, 3), "s": CHANNELS / 10, "z": np.zeros(3, np.int8)},
        ["MatMul"],
    ),
    "QGemm": (
        "float[N,4]",
        "p = com.microsoft.QGemm <transB = 1, alpha = 0.5> (q, xs, xz, w, s, z, b, ys, yz)",
        {
            "w": codes(3, 4),
            "b": codes(3, dtype=np.int32, low=-1000, high=1000),
            "s": CHANNELS / 10,
            "z": np.zeros(3, np.int8),
        },
        ["Gemm"],
    ),
    "QLinearAdd": (
        "float[N,4]",
        "p = com.microsoft.QLinearAdd (q, xs, xz, w, ws, v, ys, yz)",
        {"w": codes(4, dtype=np.uint8, low=0), "v": np.array(7, np.uint8)},
        ["Add"],
    ),
    "QLinearMul": (
        "float[N,4]",
        "p = com.microsoft.QLinearMul (q, xs, xz, q, xs, xz, ys, yz)",
        {},
        ["Mul"],
    ),
    "QLinearSigmoid": (
        "float[N,4]",
        "p = com.microsoft.QLinearSigmoid (q, xs, xz, ys, yz)",
        {},
        ["Sigmoid"],
    ),
    "QLinearLeakyRelu": (
        "float[N,4]",
        "p = com.microsoft.QLinearLeakyRelu <alpha = 0.25> (q, xs, xz, ys, yz)",
        {},
        ["LeakyRelu"],
    ),
    "QLinearSoftmax": (
        "float[N,4]",
        "p = com.microsoft.QLinearSoftmax <axis = 1, opset = 13> (q, xs, xz, ys, u)",
        {"u": np.array(0, np.uint8)},
        ["Softmax"],
    ),
    "QLinearAveragePool": (
        "float[N,2,4,4]",
        "p = com.microsoft.QLinearAveragePool <kernel_shape = [2, 2]> (q, xs, xz, ys, yz)",
        {},
        ["AveragePool"],
    ),
    "QLinearGlobalAveragePool": (
        "float[N,2,4,4]",
        "p = com.microsoft.QLinearGlobalAveragePool (q, xs, xz, ys, yz)",
        {},
        ["GlobalAveragePool"],
    ),
    "QLinearConcat": (
        "float[N,4]",
        "p = com.microsoft.QLinearConcat <axis = 1> (ys, yz, q, xs, xz, q, xs, xz)",
        {},
        ["Concat"],
    ),
    "QLinearWhere": (
        "float[N,4]",
        "p = com.microsoft.QLinearWhere (c, q, xs, xz, q, xs, xz, ys, yz)",
        {"c": np.array([True, False, True, False])},
        ["Where"],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_quantized_operator_becomes_the_float_one(name: str) -> None:
    shape, node, initializers, expected = OPERATORS[name]
    zero = "u" if "u" in initializers else "yz"
    text = f"""g ({shape} x) => (float[M] y) {{
        q = QuantizeLinear (x, xs, xz)
        [layer_quant] {node}
        d = DequantizeLinear (p, ys, {zero})
        n = Constant <value = int64[1] {{-1}}> ()
        y = Reshape (d, n) }}"""
    # Half a step of the result, and the operands' rounding on its way through the operator.
    result = removed(built(text, **initializers), STEP + 0.12)
    assert ops(result) == [*expected, "Constant", "Reshape"]
    assert next(iter(result.graph)).name == "layer"
    assert {node.domain for node in result.graph} == {""}


def test_the_result_of_a_quantized_operator_may_be_clipped() -> None:
    text = """g (float[N,4] x) => (float[N,3] y) {
        q = QuantizeLinear (x, xs, xz)
        p = QLinearMatMul (q, xs, xz, w, ws, wz, ys, zero)
        y = DequantizeLinear (p, ys, zero) }"""
    result = removed(built(text, w=codes(4, 3), zero=np.array(0, np.uint8)), 0.2)
    assert kinds(result) == ["MatMul", "Clip", "Identity"]


DYNAMIC = {
    "matmul": (
        "float[N,3,4]",
        """q, s, z = DynamicQuantizeLinear (x)
        i = MatMulInteger (q, w, z, wz)
        f = Cast <to = 1> (i)
        t = Mul (s, ws)
        y = Mul (f, t)""",
        {"w": codes(4, 3)},
        ["MatMul"],
    ),
    "conv": (
        "float[N,2,4,4]",
        """q, s, z = DynamicQuantizeLinear (x)
        i = ConvInteger <pads = [1, 1, 1, 1]> (q, w, z)
        f = Cast <to = 1> (i)
        t = Mul (ws, s)
        y = Mul (t, f)""",
        {"w": codes(3, 2, 3, 3, dtype=np.uint8, low=0)},
        ["Conv"],
    ),
    "read back": (
        "float[N,4]",
        "q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z)",
        {},
        ["Identity"],
    ),
    "DynamicQuantizeMatMul": (
        "float[N,4]",
        "y = com.microsoft.DynamicQuantizeMatMul (x, w, s, z, b)",
        {
            "w": codes(4, 3),
            "s": CHANNELS,
            "z": np.zeros(3, np.int8),
            "b": np.ones(3, np.float32),
        },
        ["MatMul", "Add"],
    ),
    "MatMulIntegerToFloat": (
        "float[N,4]",
        """q = QuantizeLinear (x, xs, xz)
        y = com.microsoft.MatMulIntegerToFloat (q, w, xs, ws, xz, wz)""",
        {"w": codes(4, 3)},
        ["MatMul"],
    ),
    "DynamicQuantizeLSTM": (
        "float[3,1,4]",
        """y, h, l = com.microsoft.DynamicQuantizeLSTM <hidden_size = 2>
            (x, w, r, , , , , , s, z, s, z)""",
        {
            "w": codes(1, 4, 8),
            "r": codes(1, 2, 8),
            "s": np.array([0.01], np.float32),
            "z": np.array([3], np.int8),
        },
        ["LSTM"],
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamically_quantized_layer_becomes_the_float_one(name: str) -> None:
    shape, nodes, initializers, expected = DYNAMIC[name]
    plain = built(f"g ({shape} x) => (float y) {{ {nodes} }}", **initializers)
    plain.graph.outputs[0].shape = None
    result = RemoveQuantizationPass()(plain.clone()).model
    assert kinds(result) == expected
    feeds = random_feeds(plain)
    (want,), (got,) = run(plain, feeds), run(result, feeds)
    assert want.shape == got.shape
    assert np.abs(want - got).max() < 0.02 * np.abs(want).max()


# -- weights in blocks ----------------------------------------------------------------------


def packed(array: Array, bits: int) -> Array:
    """Codes along the last axis in bytes, the lowest bits first."""
    per_byte = 8 // bits
    padding = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % per_byte)]
    parts = np.pad(array, padding).reshape(*array.shape[:-1], -1, per_byte).astype(np.uint8)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    joined: Array = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return joined


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
def test_packed_weights_are_unpacked(bits: int, zeros: str) -> None:
    n, k, block, blocks = 3, 40, 16, 3
    raw = codes(n, blocks * block, low=0, high=1 << bits, dtype=np.uint8)
    scale = np.abs(codes(n, blocks, dtype=np.float32)) / 100 + np.float32(0.1)
    zero = codes(n, blocks, low=0, high=1 << bits, dtype=np.uint8)
    parts = {"w": packed(raw.reshape(n, blocks, block), bits), "s": scale.reshape(-1)}
    if zeros == "packed":
        parts["z"] = packed(zero, bits).reshape(-1)
    elif zeros == "float":
        parts["z"] = zero.astype(np.float32).reshape(-1)
    else:
        zero = np.full((n, blocks), 1 << (bits - 1))
    text = f"""g (float[N,{k}] x) => (float[N,{n}] y) {{
        y = com.microsoft.MatMulNBits <K = {k}, N = {n}, bits = {bits}, block_size = {block}>
            (x, w, s{", z" if "z" in parts else ""}) }}"""
    plain = built(text, **parts)
    result = RemoveQuantizationPass()(plain.clone()).model
    difference = raw[:, :k].astype(np.float32) - np.repeat(zero, block, 1)[:, :k]
    weight = difference * np.repeat(scale, block, 1)[:, :k]
    feeds = random_feeds(plain)
    (got,) = run(result, feeds)
    np.testing.assert_allclose(got, feeds["x"] @ weight.T, rtol=1e-4, atol=1e-4)
    if bits == 4 and zeros != "float":  # what ONNX Runtime 1.19.2 has a kernel for
        np.testing.assert_allclose(got, run(plain, feeds)[0], rtol=1e-3, atol=1e-3)


def test_packed_weights_in_another_order_are_unpacked() -> None:
    order = np.arange(32, dtype=np.int32)[::-1] // 16
    raw = codes(2, 32, low=0, high=16, dtype=np.uint8)
    scale = np.array([[1, 2], [3, 4]], np.float32)
    text = """g (float[N,32] x) => (float[N,2] y) {
        y = com.microsoft.MatMulNBits <K = 32, N = 2, bits = 4, block_size = 16>
            (x, w, s, , order) }"""
    plain = built(text, w=packed(raw.reshape(2, 2, 16), 4), s=scale.reshape(-1), order=order)
    result = RemoveQuantizationPass()(plain.clone()).model
    weight = (raw.astype(np.float32) - 8) * scale[:, order]
    feeds = random_feeds(plain)
    np.testing.assert_allclose(run(result, feeds)[0], feeds["x"] @ weight.T, rtol=1e-4)


def test_a_quantized_embedding_becomes_a_float_one() -> None:
    table = codes(6, 32, low=-8, high=8, dtype=ml_dtypes.int4)
    scale = np.abs(codes(6, 2, dtype=np.float32)) + 1
    text = """g (int64[N] x) => (float[N,32] y) {
        y = com.microsoft.GatherBlockQuantized <block_size = 16> (w, x, s) }"""
    result = RemoveQuantizationPass()(built(text, w=table, s=scale)).model
    weight = table.astype(np.float32) * np.repeat(scale, 16, 1)
    (got,) = run(result, {"x": np.array([5, 0])})
    np.testing.assert_array_equal(got, weight[[5, 0]])


# -- what cannot be removed -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (
            "g (float[N,4] x) => (uint8[N,4] y) { [end] y = QuantizeLinear (x, xs, xz) }",
            "QuantizeLinear 'end'",
        ),
        (
            """g (float[N,4] x) => (float[N,4] y) {
                [first] q = QuantizeLinear (x, xs, xz)
                y = DequantizeLinear (q, ws, xz) }""",
            "QuantizeLinear 'first'",
        ),
        (
            """g (uint8[N,4] x) => (int32[N,3] y) {
                [sums] y = MatMulInteger (x, w) }""",
            "MatMulInteger 'sums'",
        ),
        (
            """g (float[N,4] x) => (float[N,4] y) {
                [nf4] y = com.microsoft.MatMulBnb4 <K = 4, N = 4, block_size = 16,
                    quant_type = 1> (x, w, xs) }""",
            "MatMulBnb4 'nf4'",
        ),
    ],
)
def test_what_cannot_be_removed_is_refused_by_name(text: str, node: str) -> None:
    plain = built(text, w=codes(4, 3, dtype=np.uint8, low=0))
    with pytest.raises(UnsupportedError) as error:
        canonicalise(plain, remove_quantization=True)
    assert str(error.value) == (
        f"the quantization of {node} cannot be removed; give the float model that this one was"
        " made from"
    )


def test_a_quantized_model_is_refused_with_a_hint() -> None:
    with pytest.raises(UnsupportedError, match=r"from, or pass --remove-quantization$"):
        canonicalise(built(LAYER, w_quantized=codes(4, 3), b_quantized=BIAS))


# -- the whole way --------------------------------------------------------------------------


def faked(canonical: ir.Model, case: Any, name: str) -> ir.Model:
    """The canonical model with weights rounded to a format."""
    fmt = FORMATS[name]
    weights = {}
    for site in case.space.sites:
        if site.is_weight and site.bias_of is None:
            scale = case.scales[site.name, name].reshape(site.broadcast_shape)
            weights[site.tensor] = (
                quantize(constant(canonical, site.tensor) / scale, fmt) * scale
            )
    return with_weights(canonical, weights)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_this_tool_emits_comes_back(name: str) -> None:
    case = calibrated_case("residual")
    chosen = {layer.name: PRECISIONS[name] for layer in case.space.layers}
    result = canonicalise(case.emitted(chosen), remove_quantization=True)
    expected = faked(case.canonical, case, name)
    assert "DequantizeLinear" not in ops(result)
    feeds = {key: np.abs(array) / 10 for key, array in random_feeds(result).items()}
    names = {"w1", "w2", "w3", "w4"}
    for weight in names:
        np.testing.assert_allclose(
            constant(result, weight), constant(expected, weight), rtol=1e-6
        )
    (got,), (want,) = run(result, feeds), run(expected, feeds)
    assert np.abs(got - want).max() < 0.01 * np.abs(want).max()


def test_a_network_that_this_tool_emitted_comes_back_and_is_searched() -> None:
    model = load_model(require_shared("models/resnet20_cifar10_jpegft_bnfold.onnx"))
    layers = [layer.name for layer in api.inspect(model).layers]
    emitted = api.emit(model, Assignment(dict.fromkeys(layers, "int8"), "generic")).model
    found = api.inspect(emitted, remove_quantization=True)
    assert [layer.name for layer in found.layers] == layers
    feeds = random_feeds(model, batch=4)
    (want,) = run(model, feeds)
    (got,) = run(canonicalise(emitted.clone(), remove_quantization=True), feeds)
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.05 * np.sqrt(np.mean(want**2))
    config = SearchConfig(
        space="int8", steps=2, batch_size=8, workers=1, remove_quantization=True
    )
    result = search(emitted, None, config)
    assert [row.name for row in result.layers] == layers
    assert all(row.trained for row in result.layers)


def test_the_option_of_the_command_line(tmp_path: Path) -> None:
    case = calibrated_case("residual")
    chosen = {layer.name: PRECISIONS["int8"] for layer in case.space.layers}
    path, output = tmp_path / "quantized.onnx", tmp_path / "out.onnx"
    save_model(case.emitted(chosen), path)
    steps = ("--space", "int8", "--steps", 2, "--batch-size", 8, "--threads", 1)
    refusal = invoke("search", path, *steps, "-o", output)
    assert refusal.exit_code == UnsupportedError.exit_code
    assert "or pass --remove-quantization" in refusal.stderr
    assert not output.exists()

    option = "--remove-quantization"
    assert invoke("search", path, *steps, "-o", output, option).exit_code == 0
    found = json.loads(invoke("inspect", path, "--json", option).stdout)
    assert [layer["name"] for layer in found["layers"]] == list(chosen)
    again, formats = tmp_path / "again.onnx", output.with_suffix(".assignment.json")
    emitted = invoke("emit", path, "--assignment", formats, "-o", again, option)
    assert emitted.exit_code == 0, emitted.output
    assert "DequantizeLinear" in ops(load_model(again))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
