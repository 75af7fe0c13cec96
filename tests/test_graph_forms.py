"""Each form of graph that exporters write is searched from end to end, or refused in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs import SearchConfig, search
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.report import LayerReport, SearchResult
from onnx_fliqs.verify import EXACT
from support import HEADER, model, random_feeds, session

_CONFIG: Final = SearchConfig(
    space="int4,int8",
    steps=3,
    batch_size=8,
    held_out_batch=4,
    draws=2,
    workers=1,
)
_SAMPLES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A model as text, and what a search has to find in it."""

    text: str
    layers: Sequence[str]
    """Each as operator and fate, in any order: ``Conv trained``, ``LSTM frozen weight-only``;
    the product of two activations has no weights to train: ``MatMul free``."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Name of a node that is left in float → words of the reason."""
    weights: Mapping[str, Sequence[int]] = field(default_factory=dict)
    constants: Mapping[str, float | Sequence[int]] = field(default_factory=dict)
    header: str = HEADER

    def build(self) -> ir.Model:
        """The model, new each time."""
        return model(
            self.text, header=self.header, weights=self.weights, constants=self.constants
        )


def opset(version: int) -> str:
    return f'<ir_version: {8 if version < 21 else 10}, opset_import: ["" : {version}]>'


_BN: Final = {"s": (4,), "t": (4,), "m": (4,), "var": (4,)}
_CONTRIB: Final = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
_IR3: Final = '<ir_version: 3, opset_import: ["" : 9]>'

# Where the numbers of a weight come from. The text format takes the bits of a float16.
WEIGHTS: Final = {
    "initializer": Form(
        text="g (float[N,4] x) => (float[N,3] y) { y = Gemm (x, w, b) }",
        weights={"w": (4, 3), "b": (3,)},
        layers=["Gemm trained"],
    ),
    "constant_node": Form(
        text="""g (float[N,2] x) => (float[N,3] y) {
            w = Constant <value = float[2,3] {0.5, -1.0, 2.0, 1.5, 0.25, -0.75}> ()
            y = MatMul (x, w) }""",
        layers=["MatMul trained"],
    ),
    "identity": Form(
        text="""g (float[N,4] x) => (float[N,3] y) {
            i = Identity (w)
            j = Identity (i)
            y = MatMul (x, j) }""",
        weights={"w": (4, 3)},
        layers=["MatMul trained"],
    ),
    "reshape": Form(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            k = Reshape (w, shape)
            y = Conv (x, k) }""",
        weights={"w": (4, 27)},
        constants={"shape": [4, 3, 3, 3]},
        layers=["Conv trained"],
    ),
    "transpose": Form(
        text="""g (float[N,4] x) => (float[N,3] y) {
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t) }""",
        weights={"w": (3, 4)},
        layers=["MatMul trained"],
    ),
    "cast": Form(
        text="""g (float[N,2] x) => (float[N,2] y)
            <float16[2,2] w = {14336, 48128, 16384, 15872}> {
            k = Cast <to = 1> (w)
            y = MatMul (x, k) }""",
        layers=["MatMul trained"],
    ),
    "several_steps": Form(
        text="""g (float[N,4] x) => (float[N,3] y) {
            d = Cast <to = 11> (w)
            t = Transpose <perm = [1, 0]> (d)
            c = Cast <to = 1> (t)
            k = Mul (c, gain)
            i = Identity (k)
            y = MatMul (x, i) }""",
        weights={"w": (3, 4)},
        constants={"gain": 0.5},
        layers=["MatMul trained"],
    ),
    "graph_input": Form(
        text="""g (float[N,3] x, float[2,3] w = {1, 2, -3, 4, 5, -6}, float[2] b = {1, 2})
            => (float[N,2] y) { y = Gemm <transB = 1> (x, w, b) }""",
        layers=["Gemm trained"],
    ),
    "graph_input_of_old_exporters": Form(
        text="""g (float[N,2,4,4] x, float[3,2,1,1] w = {1, 2, -3, 4, 5, -6})
            => (float[N,3,4,4] y) { y = Conv (x, w) }""",
        header=_IR3,
        layers=["Conv trained"],
    ),
    "shared": Form(
        text="""g (float[N,4] x) => (float[N,4] y) {
            a = MatMul (x, w)
            r = Relu (a)
            b = MatMul (r, w)
            y = Gemm <transB = 1> (b, w) }""",
        weights={"w": (4, 4)},
        layers=["MatMul trained", "MatMul trained", "Gemm trained"],
    ),
}

# Bodies of control flow.
BODIES: Final = {
    "if": Form(
        text="""g (float[N,4] x, bool c) => (float[N,2] y) {
            [before] a = MatMul (x, w1)
            b = If (c) <
                then_branch = t () => (float[N,4] p) { p = MatMul (a, w2) },
                else_branch = e () => (float[N,4] q) { q = Gemm (a, w3, b3) }>
            [after] y = MatMul (b, w4) }""",
        weights={"w1": (4, 4), "w2": (4, 4), "w3": (4, 4), "b3": (4,), "w4": (4, 2)},
        layers=[
            "MatMul frozen",
            "MatMul frozen weight-only",
            "Gemm frozen weight-only",
            "MatMul trained",
        ],
    ),
    "if_with_weights_of_its_own": Form(
        text="""g (float[N,2] x, bool c) => (float[N,2] y) {
            b = If (c) <
                then_branch = t () => (float[N,2] p)
                    <float[2,2] k = {0.5, -1.0, 2.0, 1.5}> { p = MatMul (x, k) },
                else_branch = e () => (float[N,2] q) {
                    k = Constant <value = float[2,2] {1.5, 1.0, -2.0, 0.5}> ()
                    q = MatMul (x, k) }>
            y = MatMul (b, w) }""",
        weights={"w": (2, 2)},
        layers=["MatMul frozen weight-only", "MatMul frozen weight-only", "MatMul trained"],
    ),
    "if_of_a_constant": Form(
        text="""g (float[N,4] x) => (float[N,4] y) <bool c = {1}> {
            y = If (c) <
                then_branch = t () => (float[N,4] p) { p = MatMul (x, w1) },
                else_branch = e () => (float[N,4] q) { q = MatMul (x, w2) }> }""",
        weights={"w1": (4, 4), "w2": (4, 4)},
        layers=["MatMul trained"],
    ),
    "loop": Form(
        text="""g (float[N,4] x) => (float[N,3] y) <int64 trips = {2}, bool go = {1}> {
            [before] a = MatMul (x, w1)
            h = Loop (trips, go, a) <body = b (int64 i, bool c, float[N,4] u)
                => (bool d, float[N,4] v) {
                d = Identity (c)
                m = MatMul (u, w2)
                v = Tanh (m) }>
            [after] y = MatMul (h, w3) }""",
        weights={"w1": (4, 4), "w2": (4, 4), "w3": (4, 3)},
        layers=["MatMul frozen", "MatMul frozen weight-only", "MatMul trained"],
    ),
    "scan": Form(
        text="""g (float[3,2,4] x, float[2,4] s) => (float[3,2,4] y) {
            last, y = Scan <num_scan_inputs = 1, body = b (float[2,4] u, float[2,4] e)
                => (float[2,4] v, float[2,4] o) {
                m = MatMul (u, w)
                v = Add (m, e)
                o = Tanh (v) }> (s, x) }""",
        weights={"w": (4, 4)},
        layers=["MatMul frozen weight-only"],
    ),
    "nested": Form(
        text="""g (float[N,4] x, bool c) => (float[N,4] y) <int64 trips = {2}, bool go = {1}> {
            y = If (c) <
                then_branch = t () => (float[N,4] p) {
                    p = Loop (trips, go, x) <body = b (int64 i, bool k, float[N,4] u)
                        => (bool d, float[N,4] v) {
                        d = Identity (k)
                        v = MatMul (u, w1) }> },
                else_branch = e () => (float[N,4] q) { q = MatMul (x, w2) }> }""",
        weights={"w1": (4, 4), "w2": (4, 4)},
        layers=["MatMul frozen weight-only", "MatMul frozen weight-only"],
    ),
}

# Operators with multiplications.
OPERATORS: Final = {
    "gemm_both_transposed": Form(
        text="g (float[4,8] x) => (float[8,3] y) { y = Gemm <transA=1, transB=1> (x, w) }",
        weights={"w": (3, 4)},
        layers=["Gemm trained"],
    ),
    "gemm_scaled": Form(
        text="""g (float[N,4] x) => (float[N,3] y) {
            y = Gemm <alpha = 0.5, beta = -2.0> (x, w, b) }""",
        weights={"w": (4, 3), "b": (1, 3)},
        layers=["Gemm trained"],
    ),
    "gemm_with_scalar_bias": Form(
        text="g (float[N,4] x) => (float[N,3] y) { y = Gemm (x, w, b) }",
        weights={"w": (4, 3), "b": ()},
        layers=["Gemm trained"],
    ),
    "gemm_with_weight_on_the_left": Form(
        text="g (float[4,8] x) => (float[3,8] y) { y = Gemm <transA = 1> (w, x) }",
        weights={"w": (4, 3)},
        layers=["Gemm trained"],
    ),
    "gemm_of_activations": Form(
        text="""g (float[8,4] x) => (float[8,8] y) {
            a = Tanh (x)
            y = Gemm <transB = 1, alpha = 0.5> (x, a) }""",
        layers=["Gemm free"],
    ),
    "depthwise_conv": Form(
        text="g (float[N,4,5,5] x) => (float[N,4,3,3] y) { y = Conv <group = 4> (x, w, b) }",
        weights={"w": (4, 1, 3, 3), "b": (4,)},
        layers=["Conv trained"],
    ),
    "grouped_conv": Form(
        text="g (float[N,4,5,5] x) => (float[N,6,3,3] y) { y = Conv <group = 2> (x, w) }",
        weights={"w": (6, 2, 3, 3)},
        layers=["Conv trained"],
    ),
    "dilated_conv": Form(
        text="""g (float[N,2,7,7] x) => (float[N,3,3,3] y) {
            y = Conv <dilations = [2, 2]> (x, w) }""",
        weights={"w": (3, 2, 3, 3)},
        layers=["Conv trained"],
    ),
    "conv_1d": Form(
        text="""g (float[N,3,9] x) => (float[N,4,5] y) {
            y = Conv <strides = [2], pads = [1, 1]> (x, w, b) }""",
        weights={"w": (4, 3, 3), "b": (4,)},
        layers=["Conv trained"],
    ),
    "conv_3d": Form(
        text="g (float[N,2,4,4,4] x) => (float[N,3,2,2,2] y) { y = Conv (x, w, b) }",
        weights={"w": (3, 2, 3, 3, 3), "b": (3,)},
        layers=["Conv trained"],
    ),
    "convtranspose": Form(
        text="""g (float[N,4,3,3] x) => (float[N,2,8,8] y) {
            a = ConvTranspose <group = 2, strides = [2, 2]> (x, w1, b1)
            y = ConvTranspose <output_padding = [0, 0]> (a, w2) }""",
        weights={"w1": (4, 3, 2, 2), "b1": (6,), "w2": (6, 2, 3, 3)},
        layers=["ConvTranspose trained", "ConvTranspose trained"],
    ),
    "convtranspose_1d": Form(
        text="""g (float[N,4,5] x) => (float[N,2,10] y) {
            y = ConvTranspose <strides = [2], pads = [1, 0], output_padding = [1]> (x, w) }""",
        weights={"w": (4, 2, 2)},
        layers=["ConvTranspose trained"],
    ),
    "same_padding": Form(
        text="""g (float[N,2,7,6] x) => (float[N,4,2,2] y) {
            a = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w1)
            y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (a, w2) }""",
        weights={"w1": (3, 2, 3, 3), "w2": (4, 3, 2, 2)},
        layers=["Conv trained", "Conv trained"],
    ),
    "same_padding_of_any_size": Form(
        text="""g (float[N,2,H,W] x) => (float[N,3,1,1] y) {
            a = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)
            y = GlobalAveragePool (a) }""",
        weights={"w": (3, 2, 3, 3)},
        layers=["Conv trained"],
    ),
    "attention": Form(
        text="""g (float[N,5,4] x) => (float[N,5,4] y) {
            q = MatMul (x, wq)
            k = MatMul (x, wk)
            v = MatMul (x, wv)
            t = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul (q, t)
            p = Softmax <axis = -1> (s)
            m = MatMul (p, v)
            y = Add (m, x) }""",
        weights={"wq": (4, 4), "wk": (4, 4), "wv": (4, 4)},
        layers=["MatMul trained"] * 3 + ["MatMul free"] * 2,
    ),
    "matmul_with_a_vector": Form(
        text="g (float[N,3,4] x) => (float[N,3] y) { y = MatMul (x, w) }",
        weights={"w": (4,)},
        layers=["MatMul trained"],
    ),
    "matmul_with_a_stack": Form(
        text="g (float[N,2,3,4] x) => (float[N,2,3,5] y) { y = MatMul (x, w) }",
        weights={"w": (2, 4, 5)},
        layers=["MatMul trained"],
    ),
    "einsum_with_a_weight": Form(
        text="""g (float[N,3,4] x) => (float[N,3,5] y) {
            y = Einsum <equation = "btf,fo->bto"> (x, w) }""",
        weights={"w": (4, 5)},
        layers=["MatMul trained"],
    ),
    "einsum_of_activations": Form(
        text="""g (float[N,3,2,4] x) => (float[N,2,3,3] y) {
            a = Tanh (x)
            y = Einsum <equation = "bihd,bjhd->bhij"> (x, a) }""",
        layers=["MatMul free"],
    ),
    "embedding": Form(
        text="""g (int64[N,5] ids) => (float[N,5,3] y) {
            e = Gather (table, ids)
            y = MatMul (e, w) }""",
        weights={"table": (300, 4), "w": (4, 3)},
        layers=["Gather trained weight-only", "MatMul trained"],
    ),
    "lstm": Form(
        text="""g (float[N,3,4] x) => (float[N,3] y) {
            [before] a = MatMul (x, w1)
            t = Transpose <perm = [1, 0, 2]> (a)
            all, h = LSTM <hidden_size = 2> (t, w, r, b)
            s = Squeeze (h, axis)
            [after] y = MatMul (s, w2) }""",
        weights={"w1": (4, 4), "w": (1, 8, 4), "r": (1, 8, 2), "b": (1, 16), "w2": (2, 3)},
        constants={"axis": [0]},
        layers=["MatMul trained", "LSTM trained weight-only", "MatMul trained"],
    ),
    "bidirectional_gru": Form(
        text="""g (float[3,N,4] x) => (float[3,2,N,2] y) {
            y = GRU <hidden_size = 2, direction = "bidirectional", linear_before_reset = 1>
                (x, w, r, b) }""",
        weights={"w": (2, 6, 4), "r": (2, 6, 2), "b": (2, 12)},
        layers=["GRU trained weight-only"],
    ),
    "rnn": Form(
        text="""g (float[3,N,4] x) => (float[1,N,2] y) {
            all, y = RNN <hidden_size = 2> (x, w, r) }""",
        weights={"w": (1, 2, 4), "r": (1, 2, 2)},
        layers=["RNN frozen weight-only"],
    ),
}

# What surrounds the layers.
SURROUNDINGS: Final = {
    "local_function": Form(
        text="""g (float[N,4] x) => (float[N,2] y) {
            a = local.dense (x, w1)
            y = local.dense (a, w2) }
        <domain: "local", opset_import: ["" : 21]>
        dense (v, k) => (r) {
            m = MatMul (v, k)
            r = Relu (m) }""",
        weights={"w1": (4, 3), "w2": (3, 2)},
        header='<ir_version: 10, opset_import: ["" : 21, "local" : 1]>',
        layers=["MatMul trained", "MatMul trained"],
    ),
    "operator_of_another_domain": Form(
        text="""g (float[N,4] x) => (float[N,3] y) {
            [before] a = MatMul (x, w1)
            b = com.microsoft.CDist <metric = "sqeuclidean"> (a, k)
            [after] y = MatMul (b, w2) }""",
        weights={"w1": (4, 4), "k": (2, 4), "w2": (2, 3)},
        header=_CONTRIB,
        layers=["MatMul frozen", "MatMul trained"],
    ),
    "weight_of_another_domain": Form(
        text="""g (float[N,32] x) => (float[N,3] y) {
            [other] a = com.microsoft.CDist <metric = "sqeuclidean"> (x, k)
            y = MatMul (a, w) }""",
        weights={"k": (32, 32), "w": (32, 3)},
        header=_CONTRIB,
        layers=["MatMul trained"],
        skipped={"other": "com.microsoft"},
    ),
    "fused_operators": Form(
        text="""g (float[N,4] x) => (float[N,3] y) {
            a = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (x, w1)
            b = com.microsoft.BiasGelu (a, c)
            y = MatMul (b, w2) }""",
        weights={"w1": (4, 4), "c": (4,), "w2": (4, 3)},
        header=_CONTRIB,
        layers=["MatMul trained", "MatMul trained"],
    ),
    "several_inputs_and_outputs": Form(
        text="""g (float[N,4] x, float[N,6] z, int64[N] k)
            => (float[N,3] y, float[N,2] u, int64[N] j) {
            a = MatMul (x, w1)
            b = MatMul (z, w2)
            y = Add (a, b)
            u = Gemm (z, w3)
            j = Neg (k) }""",
        weights={"w1": (4, 3), "w2": (6, 3), "w3": (6, 2)},
        layers=["MatMul trained", "MatMul trained", "Gemm trained"],
    ),
    "dynamic_sizes": Form(
        text="""g (float[N,T,4] x) => (float[N,T,3] y) {
            s = Shape (x)
            n = Gather (s, zero)
            t = Concat <axis = 0> (all, four)
            f = Reshape (x, t)
            a = Gemm (f, w, b)
            u = Concat <axis = 0> (n, all, three)
            y = Reshape (a, u) }""",
        weights={"w": (4, 3), "b": (3,)},
        constants={"zero": [0], "all": [-1], "four": [4], "three": [3]},
        layers=["Gemm trained"],
    ),
    "fixed_batch": Form(
        text="g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, w) }",
        weights={"w": (4, 3)},
        layers=["MatMul trained"],
    ),
    "float16": Form(
        text="""g (float16[N,2] x) => (float16[N,2] y)
            <float16[2,2] w = {14336, 48128, 16384, 15872}, float16[2] b = {13312, 14336}> {
            a = MatMul (x, w)
            c = Add (a, b)
            y = Relu (c) }""",
        layers=["MatMul trained"],
    ),
    "batch_normalization": Form(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c = Conv (x, w)
            n = BatchNormalization (c, s, t, m, var)
            y = Relu (n) }""",
        weights={"w": (4, 3, 3, 3), **_BN},
        layers=["Conv trained"],
    ),
    "shared_scale": Form(
        text="""g (float[N,2,4,4] x) => (float[N,3,4,4] y) {
            a = Conv (x, w1)
            b = Conv (x, w2)
            c = Concat <axis = 1> (a, b)
            d = Add (c, c)
            y = Conv (d, w3) }""",
        weights={"w1": (2, 2, 1, 1), "w2": (1, 2, 1, 1), "w3": (3, 3, 1, 1)},
        layers=["Conv trained"] * 3,
    ),
}

FORMS: Final = {**WEIGHTS, **BODIES, **OPERATORS, **SURROUNDINGS}

REFUSED: Final = {
    "quantized": (
        """g (float[N,2] x) => (float[N,2] y) <float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            y = MatMul (d, w) }""",
        HEADER,
        "already quantized",
    ),
    "quantized_operator": (
        """g (uint8[N,2] x, uint8[2,2] k) => (int32[N,2] y) { y = MatMulInteger (x, k) }""",
        HEADER,
        "already quantized",
    ),
    "unknown_domain": (
        "g (float[N,2] x) => (float[N,2] y) { a = MatMul (x, w) y = my.own.Thing (a) }",
        '<ir_version: 10, opset_import: ["" : 21, "my.own" : 1]>',
        r"operator Thing of the domain 'my\.own'",
    ),
    "no_layer": (
        "g (float[N,2] x) => (float[N,2] y) { y = Relu (x) }",
        HEADER,
        "no quantizable layer",
    ),
    "training_mode": (
        """g (float[N,2] x) => (float[N,2] y) {
            a = MatMul (x, w)
            y, m, v = BatchNormalization <training_mode = 1> (a, s, s, s, s) }""",
        HEADER,
        "training mode",
    ),
}


def fate(layer: LayerReport) -> str:
    """How a layer is written in ``Form.layers``."""
    weights = "trained" if layer.trained else "frozen" if layer.params else "free"
    return f"{layer.op} {weights}" + (" weight-only" if layer.weight_only else "")


def refused(form: str) -> tuple[ir.Model, str]:
    """A model of :data:`REFUSED`, and the words with which it is."""
    text, header, words = REFUSED[form]
    return model(text, header=header, weights={"w": (2, 2), "s": (2,)}), words


def made_up(plain: ir.Model) -> Dataset:
    feeds = random_feeds(plain, seed=0, batch=_SAMPLES)
    return Dataset(feeds, None, input_specs(plain))


def assert_shipped(result: SearchResult, plain: ir.Model) -> None:
    """The graph is valid, computes what was searched, and runs at the level it asks for."""
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    assert result.verification.searched is not None
    assert result.verification.searched.rms <= EXACT
    assert result.loss is not None
    assert np.isfinite(result.loss)
    feeds = random_feeds(plain, seed=1, batch=3)
    outputs = session(proto.SerializeToString()).run(None, feeds)
    assert [value.name for value in proto.graph.output] == [
        value.name for value in plain.graph.outputs
    ]
    assert all(np.isfinite(array).all() for array in outputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_searched_from_end_to_end(form: str) -> None:
    case = FORMS[form]
    plain = case.build()
    result = search(plain, made_up(plain), _CONFIG)
    assert sorted(map(fate, result.layers)) == sorted(case.layers)
    assert all(layer.reason for layer in result.layers if "frozen" in fate(layer))
    reasons = {item.name: item.reason for item in result.skipped}
    assert set(reasons) == set(case.skipped)
    for name, words in case.skipped.items():
        assert words in reasons[name]
    assert_shipped(result, plain)


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_in_one_line(form: str) -> None:
    plain, words = refused(form)
    with pytest.raises(UnsupportedError, match=words) as refusal:
        search(plain, made_up(plain), _CONFIG)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 3


_ANY_OPSET: Final = """g (float[N,3,6,6] x) => (float[N,2] y) {
    c = Conv (x, w, wb)
    n = BatchNormalization (c, s, t, m, var)
    r = Relu (n)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    f = Flatten (p)
    y = Gemm (f, v, vb) }"""


@pytest.mark.parametrize("version", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_opset_is_searched(version: int) -> None:
    plain = model(
        _ANY_OPSET,
        header=opset(version),
        weights={"w": (4, 3, 3, 3), "wb": (4,), "v": (16, 2), "vb": (2,), **_BN},
    )
    result = search(plain, made_up(plain), _CONFIG)
    assert sorted(map(fate, result.layers)) == ["Conv trained", "Gemm trained"]
    assert_shipped(result, plain)


def test_weights_beside_the_file_are_searched(tmp_path: Path) -> None:
    plain = FORMS["initializer"].build()
    path = tmp_path / "model.onnx"
    ir.save(plain, path, external_data="model.data", size_threshold_bytes=0)
    assert (tmp_path / "model.data").stat().st_size == 4 * (12 + 3)
    result = search(path, made_up(plain), _CONFIG)
    assert sorted(map(fate, result.layers)) == ["Gemm trained"]
    assert_shipped(result, plain)
    output = tmp_path / "out" / "model.onnx"
    output.parent.mkdir()
    result.save(output)
    assert session(str(output)).run(None, random_feeds(plain, seed=1, batch=3))
