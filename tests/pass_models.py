"""Small models on which every pass is tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from support import HEADER, model

_BN = {"s": (4,), "b": (4,), "m": (4,), "var": (4,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model as text, and what canonicalisation has to make of it."""

    text: str
    ops: Sequence[str]
    weights: Mapping[str, Sequence[int]] = field(default_factory=dict)
    constants: Mapping[str, float | Sequence[int]] = field(default_factory=dict)
    opset: int | None = None
    header: str | None = None

    def build(self) -> ir.Model:
        """The model, new each time."""
        header = HEADER if self.opset is None else old(self.opset)
        return model(
            self.text,
            header=self.header or header,
            weights=self.weights,
            constants=self.constants,
        )


def old(opset: int) -> str:
    """The header of a model of another opset."""
    return f'<ir_version: {8 if opset < 21 else 10}, opset_import: ["" : {opset}]>'


CASES: dict[str, Case] = {
    "conv_bn": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c = Conv (x, w, wb)
            y = BatchNormalization <epsilon = 0.001> (c, s, b, m, var) }""",
        weights={"w": (4, 3, 3, 3), "wb": (4,), **_BN},
        ops=["Conv"],
    ),
    "conv_without_bias_bn_relu": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c = Conv (x, w)
            n = BatchNormalization (c, s, b, m, var)
            y = Relu (n) }""",
        weights={"w": (4, 3, 3, 3), **_BN},
        ops=["Conv", "Relu"],
    ),
    "conv_feeds_bn_and_another": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c = Conv (x, w, wb)
            n = BatchNormalization (c, s, b, m, var)
            y = Add (n, c) }""",
        weights={"w": (4, 3, 3, 3), "wb": (4,), **_BN},
        ops=["Conv", "Mul", "Add", "Add"],
    ),
    "conv_is_output_and_feeds_bn": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] c, float[N,4,3,3] y) {
            c = Conv (x, w, wb)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (4, 3, 3, 3), "wb": (4,), **_BN},
        ops=["Conv", "Mul", "Add"],
    ),
    "bn_alone": Case(
        text="""g (float[N,4,3,3] x) => (float[N,4,3,3] y) {
            y = BatchNormalization (x, s, b, m, var) }""",
        weights=_BN,
        ops=["Mul", "Add"],
    ),
    "bn_of_a_matrix": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            y = BatchNormalization (x, s, b, m, var) }""",
        weights=_BN,
        ops=["Mul", "Add"],
    ),
    "two_bns_in_a_row": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c = Conv (x, w)
            n = BatchNormalization (c, s, b, m, var)
            y = BatchNormalization (n, s, b, m, var) }""",
        weights={"w": (4, 3, 3, 3), **_BN},
        ops=["Conv"],
    ),
    "gemm_bn": Case(
        text="""g (float[N,3] x) => (float[N,4] y) {
            c = Gemm <alpha = 0.5, beta = 2.0> (x, w, wb)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (3, 4), "wb": (1, 4), **_BN},
        ops=["Gemm"],
    ),
    "transposed_gemm_bn_scalar_bias": Case(
        text="""g (float[N,3] x) => (float[N,4] y) {
            c = Gemm <transB = 1> (x, w, wb)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (4, 3), "wb": (), **_BN},
        ops=["Gemm"],
    ),
    "grouped_convtranspose_bn": Case(
        text="""g (float[N,6,3,3] x) => (float[N,4,5,5] y) {
            c = ConvTranspose <group = 2> (x, w)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (6, 2, 3, 3), **_BN},
        ops=["ConvTranspose"],
    ),
    "depthwise_conv_bn": Case(
        text="""g (float[N,4,5,5] x) => (float[N,4,3,3] y) {
            c = Conv <group = 4> (x, w)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (4, 1, 3, 3), **_BN},
        ops=["Conv"],
    ),
    "shared_weight_two_bns": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c1 = Conv (x, w, wb)
            n1 = BatchNormalization (c1, s, b, m, var)
            x2 = Neg (x)
            c2 = Conv (x2, w, wb)
            n2 = BatchNormalization (c2, b, s, m, var2)
            y = Add (n1, n2) }""",
        weights={"w": (4, 3, 3, 3), "wb": (4,), "var2": (4,), **_BN},
        ops=["Conv", "Neg", "Conv", "Add"],
    ),
    "same_padding": Case(
        text="""g (float[N,3,6,7] x) => (float[N,2,2,2] y) {
            c = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)
            p = MaxPool <auto_pad = "SAME_LOWER", kernel_shape = [3, 3]> (c)
            y = AveragePool <auto_pad = "VALID", kernel_shape = [2, 3]> (p) }""",
        weights={"w": (2, 3, 3, 2)},
        ops=["Conv", "MaxPool", "AveragePool"],
    ),
    "same_padding_of_any_size": Case(
        text="""g (float[N,3,H,W] x) => (float[N,2,1,1] y) {
            c = Conv <auto_pad = "SAME_UPPER"> (x, w)
            y = GlobalAveragePool (c) }""",
        weights={"w": (2, 3, 3, 3)},
        ops=["Conv", "GlobalAveragePool"],
    ),
    "normalised_and_pooled": Case(
        text="""g (float[N,2,4,4] x) => (float[N,2,2,2] y) {
            n = LayerNormalization (x, s)
            y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (n) }""",
        weights={"s": (4,)},
        ops=["LayerNormalization", "MaxPool"],
    ),
    "weight_is_graph_output": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y, float[4,3,3,3] w) {
            c = Conv (x, w)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (4, 3, 3, 3), **_BN},
        ops=["Conv"],
    ),
    "dropout": Case(
        text="""g (float[N,4] x) => (float[N,4] y) <float r = {0.5}, bool t = {0}> {
            d = Dropout (x, r, t)
            e, mask = Dropout (d)
            y = Relu (e) }""",
        ops=["Relu"],
    ),
    "dropout_is_output": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            a = Relu (x)
            y = Dropout (a) }""",
        ops=["Relu"],
    ),
    "identities": Case(
        text="""g (float[N,4] x) => (float[N,4] y, float[N,4] z, float[N,4] u, float[N,4] a) {
            i = Identity (x)
            j = Identity (i)
            a = Relu (j)
            y = Identity (a)
            z = Identity (a)
            u = Identity (j)
            unused = Exp (a) }""",
        ops=["Relu", "Identity", "Identity", "Identity"],
    ),
    "constants": Case(
        text="""g (float[N,4] x) => (float[N,4] y, float[2] k) {
            c = Constant <value = float[4] {1, 2, 3, 4}> ()
            f = Constant <value_float = 0.5> ()
            p = Mul (c, f)
            q = Add (x, p)
            k = Constant <value = float[2] {1, 2}> ()
            y = Mul (q, f) }""",
        ops=["Add", "Constant", "Mul"],
    ),
    "materialised_weight": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) <int64[4] shape = {4, 3, 3, 3}> {
            w = ConstantOfShape <value = float[1] {0.25}> (shape)
            t = Transpose <perm = [0, 1, 3, 2]> (w)
            y = Conv (x, t) }""",
        ops=["Conv"],
    ),
    "unnamed_and_unused": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            [n] a = Relu (x)
            [n] b = Exp (a)
            c = Neg (b)
            d = Log (b)
            y = Neg (c) }""",
        weights={"never_read": (3,)},
        ops=["Relu", "Exp", "Neg", "Neg"],
    ),
    "function": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            a = local.twice (x)
            y = local.twice (a) }
        <domain: "local", opset_import: ["" : 21]>
        twice (v) => (r) {
            two = Constant <value_float = 2.0> ()
            r = Mul (v, two) }""",
        header='<ir_version: 10, opset_import: ["" : 21, "local" : 1]>',
        ops=["Mul", "Mul"],
    ),
    "initializers_as_inputs": Case(
        text="""g (float[N,3] x, float[2,3] w = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 2})
            => (float[N,2] y) {
            y = Gemm <transB = 1> (x, w, b) }""",
        ops=["Gemm"],
    ),
    "dynamic_reshape": Case(
        text="""g (float[N,3,2,2] x) => (float[N,12] y)
            <int64 i = {0}, int64[1] axes = {0}, int64[1] rest = {-1}> {
            shape = Shape (x)
            n = Gather <axis = 0> (shape, i)
            n1 = Unsqueeze (n, axes)
            target = Concat <axis = 0> (n1, rest)
            y = Reshape (x, target) }""",
        ops=["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"],
    ),
    "static_reshape": Case(
        text="""g (float[2,3,2,2] x) => (float[2,12] y)
            <int64 i = {0}, int64[1] axes = {0}, int64[1] rest = {-1}> {
            shape = Shape (x)
            n = Gather <axis = 0> (shape, i)
            n1 = Unsqueeze (n, axes)
            target = Concat <axis = 0> (n1, rest)
            y = Reshape (x, target) }""",
        ops=["Reshape"],
    ),
    "branches": Case(
        text="""g (float[N,4] x, bool c) => (float[N,4] y) {
            a = Relu (x)
            y = If (c) <
                then_branch = t () => (float[N,4] p) { p = Identity (a) },
                else_branch = e () => (float[N,4] q) {
                    k = Constant <value = float {2.0}> ()
                    i = Identity (a)
                    q = Mul (i, k) }> }""",
        ops=["Relu", "If", "Identity", "Mul"],
    ),
    "branch_holds_conv_bn": Case(
        text="""g (float[N,3,5,5] x, bool c) => (float[N,4,3,3] y) {
            y = If (c) <
                then_branch = t () => (float[N,4,3,3] p) {
                    pc = Conv (x, w)
                    p = BatchNormalization (pc, s, b, m, var) },
                else_branch = e () => (float[N,4,3,3] q) { q = Conv (x, w) }> }""",
        weights={"w": (4, 3, 3, 3), **_BN},
        ops=["If", "Conv", "Conv"],
    ),
    "constant_branch": Case(
        text="""g (float[N,4] x) => (float[N,4] y) <bool c = {1}> {
            a = Relu (x)
            unused = Exp (x)
            y = If (c) <
                then_branch = t () => (float[N,4] p) { p = Neg (a) },
                else_branch = e () => (float[N,4] q) { q = Mul (unused, a) }> }""",
        ops=["Relu", "Neg"],
    ),
    "lstm_with_unread_output": Case(
        text="""g (float[3,N,4] x) => (float[1,N,2] h) {
            all, h = LSTM <hidden_size = 2> (x, w, r) }""",
        weights={"w": (1, 8, 4), "r": (1, 8, 2)},
        ops=["LSTM"],
    ),
    "other_domain": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            a = com.microsoft.Gelu (x)
            y = Relu (a) }""",
        header='<ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1, "ai.x" : 2]>',
        ops=["Gelu", "Relu"],
    ),
    "opset_7": Case(
        text="""g (float[N,2,3,3] x) => (float[N,2,6,6] y) {
            u = Upsample <mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]> (x)
            p = Pad <pads = [0, 0, 0, 0, 0, 0, 0, 0]> (u)
            y = Clip <min = -0.5, max = 0.5> (p) }""",
        opset=7,
        ops=["Resize", "Pad", "Clip"],
    ),
    "opset_8_bn_matmul": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,9] y) <int64[3] shape = {0, 4, -1}> {
            c = Conv (x, w)
            n = BatchNormalization (c, s, b, m, var)
            y = Reshape (n, shape) }""",
        weights={"w": (4, 3, 3, 3), **_BN},
        opset=8,
        ops=["Conv", "Reshape"],
    ),
    "opset_9": Case(
        text="""g (float[N,4,3] x) => (float[N,4,3] y, float[N,2,1] v, int64[N,2,1] i) {
            d = Dropout <ratio = 0.3> (x)
            c = Clip <min = -1.0, max = 1.0> (d)
            s = Slice <starts = [0], ends = [1], axes = [2]> (c)
            v, i = TopK <axis = 1, k = 2> (s)
            r = ReduceSum <axes = [1], keepdims = 1> (c)
            y = Add (c, r) }""",
        opset=9,
        ops=["Clip", "Slice", "TopK", "ReduceSum", "Add"],
    ),
    "opset_10_resize": Case(
        text="""g (float[N,2,4,4] x) => (float[N,2,6,6] y, float[N,2,6,6] z)
            <float[4] scales = {1, 1, 1.5, 1.5}> {
            y = Resize <mode = "linear"> (x, scales)
            z = Resize <mode = "nearest"> (x, scales) }""",
        opset=10,
        ops=["Resize", "Resize"],
    ),
    "opset_10_shrinking_resize": Case(
        text="""g (float[N,2,4,4] x) => (float[N,2,2,2] y)
            <float[4] scales = {1, 1, 0.6, 0.6}> {
            y = Resize <mode = "nearest"> (x, scales) }""",
        opset=10,
        ops=["Resize"],
    ),
    "opset_11_hardmax": Case(
        text="g (float[N,4] x) => (float[N,4] y) { y = Hardmax (x) }",
        opset=11,
        ops=["Hardmax"],
    ),
    "opset_11": Case(
        text="""g (float[N,1,4] x) => (float[N,4] y) {
            s = Squeeze <axes = [1]> (x)
            a, b = Split <axis = 1, split = [1, 3]> (s)
            e = Concat <axis = 1> (b, a)
            u = Unsqueeze <axes = [0]> (e)
            m = ReduceMean <axes = [0], keepdims = 0> (u)
            y = Softmax <axis = 1> (m) }""",
        opset=11,
        ops=["Squeeze", "Split", "Concat", "Unsqueeze", "ReduceMean", "Softmax"],
    ),
    "opset_11_softmax_over_the_rest": Case(
        text="""g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax <axis = 1> (x) }""",
        opset=11,
        ops=["Flatten", "Softmax", "Reshape"],
    ),
    "opset_13_converter_names": Case(
        text="""g (float[N,3,2] x) => (float[N,1] y) <int64[1] _v_4 = {2}> {
            _v_5 = ReduceSum <keepdims = 0> (x, _v_4)
            _v_7 = Relu (_v_5)
            y = ReduceMax <axes = [1]> (_v_7) }""",
        opset=13,
        ops=["ReduceSum", "Relu", "ReduceMax"],
    ),
    "opset_17_in_a_branch": Case(
        text="""g (float[N,3] x, bool c) => (float[N,1] y) {
            y = If (c) <
                then_branch = t () => (float[N,1] p) { p = ReduceMean <axes = [1]> (x) },
                else_branch = e () => (float[N,1] q) { q = ReduceMax <axes = [1]> (x) }> }""",
        opset=17,
        ops=["If", "ReduceMean", "ReduceMax"],
    ),
    "opset_22_old_ops": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,1,1] y) {
            c = Conv (x, w)
            r = Relu (c)
            y = GlobalAveragePool (r) }""",
        weights={"w": (4, 3, 3, 3)},
        opset=22,
        ops=["Conv", "Relu", "GlobalAveragePool"],
    ),
}

# Models with layers, in which sites are found, inserted and lowered.
LAYERED: dict[str, Case] = {
    "conv_relu_conv": Case(
        text="""g (float[N,3,6,6] x) => (float[N,2,2,2] y) {
            [c1] a = Conv (x, w1, b1)
            r = Relu (a)
            [c2] y = Conv (r, w2, b2) }""",
        weights={"w1": (4, 3, 3, 3), "b1": (4,), "w2": (2, 4, 3, 3), "b2": (2,)},
        ops=["Conv", "Relu", "Conv"],
    ),
    "depthwise_and_grouped": Case(
        text="""g (float[N,4,6,6] x) => (float[N,6,2,2] y) {
            [dw] a = Conv <group = 4> (x, w1, b1)
            r = Clip (a, lo, hi)
            [gr] y = Conv <group = 2> (r, w2) }""",
        weights={"w1": (4, 1, 3, 3), "b1": (4,), "w2": (6, 2, 3, 3)},
        constants={"lo": 0.0, "hi": 6.0},
        ops=["Conv", "Clip", "Conv"],
    ),
    "convtranspose": Case(
        text="""g (float[N,4,3,3] x) => (float[N,2,5,5] y) {
            [up] a = ConvTranspose <group = 2> (x, w1, b1)
            [down] y = ConvTranspose <pads = [1, 1, 1, 1]> (a, w2, b2) }""",
        weights={"w1": (4, 3, 3, 3), "b1": (6,), "w2": (6, 2, 3, 3), "b2": (2,)},
        ops=["ConvTranspose", "ConvTranspose"],
    ),
    "gemms": Case(
        text="""g (float[4,2] x) => (float[5,2] y) {
            [plain] a = Gemm <transA = 1, alpha = 0.5> (x, w1, b1)
            [trans] b = Gemm <transB = 1> (a, w2, b2)
            [left] y = Gemm <transA = 1> (w3, b) }""",
        weights={"w1": (4, 3), "b1": (3,), "w2": (2, 3), "b2": (2,), "w3": (2, 5)},
        ops=["Gemm", "Gemm", "Gemm"],
    ),
    "matmuls": Case(
        text="""g (float[N,3,4] x) => (float[N,3,3] y, float[N,2] z) {
            [right] a = MatMul (x, w1)
            t = Transpose <perm = [0, 2, 1]> (x)
            [left] b = MatMul (w2, x)
            [both] c = MatMul (a, t)
            [batched] y = MatMul (c, w3)
            v = ReduceSum <keepdims = 0> (b, axis)
            [vector] s = MatMul (v, w4)
            e = Unsqueeze (s, axis)
            z = Concat <axis = 1> (e, e) }""",
        weights={"w1": (4, 4), "w2": (2, 3), "w3": (1, 3, 3), "w4": (4,)},
        constants={"axis": [1]},
        ops=[
            "MatMul",
            "Transpose",
            "MatMul",
            "MatMul",
            "MatMul",
            "ReduceSum",
            "MatMul",
            "Unsqueeze",
            "Concat",
        ],
    ),
    "attention": Case(
        text="""g (float[N,5,4] x) => (float[N,5,4] y) {
            [query] q = MatMul (x, wq)
            [key] k = MatMul (x, wk)
            [value] v = MatMul (x, wv)
            kt = Transpose <perm = [0, 2, 1]> (k)
            [scores] s = MatMul (q, kt)
            p = Softmax <axis = -1> (s)
            [mix] m = MatMul (p, v)
            y = Add (m, x) }""",
        weights={"wq": (4, 4), "wk": (4, 4), "wv": (4, 4)},
        ops=["MatMul", "MatMul", "MatMul", "Transpose", "MatMul", "Softmax", "MatMul", "Add"],
    ),
    "square_of_a_tensor": Case(
        text="""g (float[2,3,3] x) => (float[2,3,3] y) {
            a = Relu (x)
            [square] y = MatMul (a, a) }""",
        ops=["Relu", "MatMul"],
    ),
    "shared_weight": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            [once] a = MatMul (x, w)
            r = Relu (a)
            [twice] b = MatMul (r, w)
            [turned] y = Gemm <transB = 1> (b, w) }""",
        weights={"w": (4, 4)},
        ops=["MatMul", "Relu", "MatMul", "Gemm"],
    ),
    "residual": Case(
        text="""g (float[N,3,6,6] x) => (float[N,5] y) {
            [stem] s = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            a = Relu (s)
            [c1] b = Conv <pads = [1, 1, 1, 1]> (a, w2, b2)
            c = Relu (b)
            [c2] d = Conv <pads = [1, 1, 1, 1]> (c, w3, b3)
            e = Add (d, a)
            f = Relu (e)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (f)
            q = GlobalAveragePool (p)
            h = Flatten (q)
            [head] y = Gemm <transB = 1> (h, w4, b4) }""",
        weights={
            "w1": (4, 3, 3, 3),
            "b1": (4,),
            "w2": (4, 4, 3, 3),
            "b2": (4,),
            "w3": (4, 4, 3, 3),
            "b3": (4,),
            "w4": (5, 4),
            "b4": (5,),
        },
        ops=[
            "Conv",
            "Relu",
            "Conv",
            "Relu",
            "Conv",
            "Add",
            "Relu",
            "MaxPool",
            "GlobalAveragePool",
            "Flatten",
            "Gemm",
        ],
    ),
    "rearranged_input": Case(
        text="""g (float[N,2,4,4] x) => (float[N,3] y, float[N,2,4,4] z) {
            [c1] z = Conv (x, w1, b1)
            s = Slice (x, starts, ends, axes)
            f = Reshape (s, flat)
            [fc] y = Gemm (f, w2, b2) }""",
        weights={"w1": (2, 2, 1, 1), "b1": (2,), "w2": (8, 3), "b2": (3,)},
        constants={"starts": [0, 0], "ends": [2, 2], "axes": [2, 3], "flat": [0, -1]},
        ops=["Conv", "Slice", "Reshape", "Gemm"],
    ),
    "split_with_an_unread_part": Case(
        text="""g (float[N,4] x) => (float[N,3] y) {
            [fc1] a = MatMul (x, w1)
            p, q = Split <axis = 1> (a, parts)
            [fc2] y = MatMul (p, w2) }""",
        weights={"w1": (4, 4), "w2": (2, 3)},
        constants={"parts": [2, 2]},
        ops=["MatMul", "Split", "MatMul"],
    ),
    "maxpool_with_indices": Case(
        text="""g (float[N,2,4,4] x) => (float[N,2,2,2] y, int64[N,2,2,2] j) {
            [c1] a = Conv (x, w1)
            p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
            j = Neg (i)
            [c2] y = Conv (p, w2) }""",
        weights={"w1": (2, 2, 1, 1), "w2": (2, 2, 1, 1)},
        ops=["Conv", "MaxPool", "Neg", "Conv"],
    ),
    "layers_in_a_branch": Case(
        text="""g (float[N,4] x, bool c) => (float[N,4] y) {
            [outside] a = MatMul (x, w1)
            [between] b = Relu (a)
            d = If (c) <
                then_branch = t () => (float[N,4] p) { [inside] p = MatMul (b, w2) },
                else_branch = e () => (float[N,4] q) { q = Neg (b) }>
            [after] y = MatMul (d, w3)
            }""",
        weights={"w1": (4, 4), "w2": (4, 4), "w3": (4, 4)},
        ops=["MatMul", "Relu", "If", "MatMul", "Neg", "MatMul"],
    ),
    "read_in_a_branch": Case(
        text="""g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] z) {
            [outside] a = MatMul (x, w1)
            y = If (c) <
                then_branch = t () => (float[N,4] p) { p = Exp (a) },
                else_branch = e () => (float[N,4] q) { q = Neg (a) }>
            [other] z = MatMul (a, w2) }""",
        weights={"w1": (4, 4), "w2": (4, 4)},
        ops=["MatMul", "If", "Exp", "Neg", "MatMul"],
    ),
}
