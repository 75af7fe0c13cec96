"""QDQ graphs as tools write them that do not know the traps of runtimes.

All nodes are named: a test can tell where a runtime went wrong.
"""

import numpy as np
import onnx_ir as ir

from support import model

__all__ = ["quantized_conv", "relu_after_each_layer", "relu_replaced_by_quantization"]


def relu_after_each_layer(dtype: ir.DataType) -> ir.Model:
    """Zero points of 0 behind a Relu: ONNX Runtime drops it for float8 and 4-bit integers."""
    graph = model(
        """g (float[N,8] x) => (float[N,8] y) {
            [g1] a = Gemm (x, w1)
            [r1] b = Relu (a)
            [q1] b_q = QuantizeLinear (b, s, s)
            [d1] c = DequantizeLinear (b_q, s, s)
            [c1] d = Mul (c, s)
            [g2] e = Gemm (d, w2)
            [r2] f = Relu (e)
            [q2] f_q = QuantizeLinear (f, s, s)
            [d2] h = DequantizeLinear (f_q, s, s)
            [c2] y = Mul (h, s) }""",
        weights={"w1": (8, 8), "w2": (8, 8)},
        constants={"s": 0.05},
    )
    return _with_zero_point(graph, dtype)


def quantized_conv(dtype: ir.DataType) -> ir.Model:
    """A group that ONNX Runtime fuses into a QLinearConv, float8 or not."""
    graph = model(
        """g (float[N,4,6,6] x) => (float[N,4,4,4] y) {
            [q1] x_q = QuantizeLinear (x, s, s)
            [d1] a = DequantizeLinear (x_q, s, s)
            [q2] w_q = QuantizeLinear (w, s, s)
            [d2] b = DequantizeLinear (w_q, s, s)
            [conv] c = Conv (a, b)
            [q3] c_q = QuantizeLinear (c, s, s)
            [d3] d = DequantizeLinear (c_q, s, s)
            [sum] y = Add (d, d) }""",
        weights={"w": (4, 4, 3, 3)},
        constants={"s": 0.05},
    )
    return _with_zero_point(graph, dtype)


def relu_replaced_by_quantization(dtype: ir.DataType) -> ir.Model:
    """Unsigned codes do what a Relu did: wrong where QuantizeLinear is dropped."""
    graph = model(
        """g (float[N,8] x) => (float[N,8] y) {
            [g1] a = Gemm (x, w1)
            [q1] a_q = QuantizeLinear (a, s, s)
            [d1] b = DequantizeLinear (a_q, s, s)
            [g2] c = Gemm (b, w2)
            [q2] c_q = QuantizeLinear (c, s, s)
            [d2] d = DequantizeLinear (c_q, s, s)
            [g3] y = Gemm (d, w3) }""",
        weights={"w1": (8, 8), "w2": (8, 8), "w3": (8, 8)},
        constants={"s": 0.001},
    )
    return _with_zero_point(graph, dtype)


def _with_zero_point(graph: ir.Model, dtype: ir.DataType) -> ir.Model:
    zero = ir.Tensor(np.zeros((), dtype.numpy()), dtype=dtype, name="z")
    graph.graph.register_initializer(ir.Value(name="z", const_value=zero))
    for node in graph.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.replace_input_with(2, graph.graph.initializers["z"])
    return graph
