"""Small models on which every pass is tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from support import HEADER, model

_CONTRIB = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
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
    "gemm_of_a_transposed_activation": Case(
        text="""g (float[3,N] x) => (float[N,4] y) {
            y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }""",
        weights={"w": (4, 3), "b": (1, 4)},
        ops=["Transpose", "Gemm"],
    ),
    "gemm_of_a_transposed_constant": Case(
        text="""g (float[2,N] x) => (float[5,N] y) {
            y = Gemm <transA = 1, alpha = 0.5> (w, x) }""",
        weights={"w": (2, 5)},
        ops=["Gemm"],
    ),
    "gemm_with_a_constant_of_two_axes": Case(
        text="""g (float[2,3] x) => (float[2,4] y, float[2,4] z, float[2,4] u) {
            y = Gemm <beta = 0.5> (x, w, c)
            z = Gemm (x, w, column)
            u = Gemm <beta = 0.0> (x, w, c) }""",
        weights={"w": (3, 4), "c": (2, 4), "column": (2, 1)},
        ops=["Gemm", "Add", "Gemm", "Add", "Gemm"],
    ),
    "gemm_with_a_scalar_bias": Case(
        text="""g (float[N,3] x) => (float[N,4] y) { y = Gemm <beta = 3.0> (x, w, b) }""",
        weights={"w": (3, 4), "b": ()},
        ops=["Gemm"],
    ),
    "gemm_of_activations": Case(
        text="""g (float[N,3] x, float[4,3] z, float[4] c) => (float[N,4] y) {
            y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, z, c) }""",
        ops=["Mul", "Mul", "Gemm", "Add"],
    ),
    "gemms_share_constants": Case(
        text="""g (float[N,3] x) => (float[N,4] y) {
            a = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)
            c = Gemm (x, w, b)
            y = Add (a, c) }""",
        weights={"w": (3, 4), "b": (4,)},
        ops=["Gemm", "Gemm", "Add"],
    ),
    "gemm_of_integers": Case(
        text="""g (int32[N,2] x) => (int32[N,1] y) <int32[2,1] w = {3, 4}> {
            y = Gemm <alpha = 2.0> (x, w) }""",
        ops=["Gemm"],
    ),
    "matmul_of_vectors": Case(
        text="""g (float[3] a, float[N,3] x) => (float s, float[N] y, float[4] z, float[N] u) {
            s = MatMul (a, v)
            y = MatMul (x, v)
            z = MatMul (a, w)
            u = MatMul (x, a) }""",
        weights={"v": (3,), "w": (3, 4)},
        ops=[
            *("Unsqueeze", "MatMul", "Squeeze", "MatMul", "Squeeze"),
            *("Unsqueeze", "MatMul", "Squeeze", "Unsqueeze", "MatMul", "Squeeze"),
        ],
    ),
    "einsum_of_a_layer": Case(
        text="""g (float[N,T,4] x) => (float[N,3,T,2] y) {
            y = Einsum <equation = "b t d, d n h -> b n t h"> (x, w) }""",
        weights={"w": (4, 3, 2)},
        ops=["MatMul", "Reshape", "Transpose"],
    ),
    "einsum_with_a_constant_on_the_left": Case(
        text="""g (float[N,T,4] x) => (float[N,T,3] y) {
            y = Einsum <equation = "od,...d->...o"> (w, x) }""",
        weights={"w": (3, 4)},
        ops=["MatMul"],
    ),
    "einsums_of_attention": Case(
        text="""g (float[N,5,2,4] q, float[N,T,2,4] k, float[N,T,2,4] v)
            => (float[N,5,2,4] y) {
            s = Einsum <equation = "bqnh,bknh->bnqk"> (q, k)
            y = Einsum <equation = "bnqk,bknh->bqnh"> (s, v) }""",
        ops=["Transpose", "Transpose", "MatMul", "Transpose", "MatMul", "Transpose"],
    ),
    "einsum_over_two_indices": Case(
        text="""g (float[N,T,2,4] x, float[2,4,M] z) => (float[N,T,3] y, float[N,T,M] u) {
            y = Einsum <equation = "btnh,nhd->btd"> (x, w)
            u = Einsum <equation = "btnh,nhd->btd"> (x, z) }""",
        weights={"w": (2, 4, 3)},
        ops=["Reshape", "MatMul", "Reshape", "Reshape", "MatMul"],
    ),
    "einsum_of_sizes_known_later": Case(
        text="""g (float[A,B,K,L] x, float[K,L,M,P] z) => (float[A,B,M,P] y) {
            y = Einsum <equation = "abkl,klmp->abmp"> (x, z) }""",
        ops=[
            *("Reshape", "Shape", "Shape", "Mul", "Concat", "Reshape", "MatMul"),
            *("Shape", "Concat", "Reshape"),
        ],
    ),
    "einsum_of_dots": Case(
        text="""g (float[N,4] x, float[N,4] z) => (float[N] y, float s) {
            y = Einsum <equation = "bi,bi->b"> (x, z)
            s = Einsum <equation = "bi,bi->"> (x, z) }""",
        ops=[
            *("Unsqueeze", "Unsqueeze", "MatMul", "Squeeze"),
            *("Reshape", "Reshape", "MatMul", "Squeeze"),
        ],
    ),
    "einsum_without_sums": Case(
        text="""g (float[N,3] x, float[4] z) => (float[N,3,4] y, float[N,3] u) {
            y = Einsum <equation = "bi,j->bij"> (x, z)
            u = Einsum <equation = "...a,a->...a"> (x, w) }""",
        weights={"w": (3,)},
        ops=["Unsqueeze", "Mul", "Mul"],
    ),
    "einsum_of_one_operand": Case(
        text="""g (float[N,3,4] x) => (float[4,N] y, float[N,3,4] z, float[4,N,3] u) {
            y = Einsum <equation = "ijk->ki"> (x)
            z = Einsum <equation = "ijk"> (x)
            u = Einsum <equation = "bca"> (x) }""",
        ops=["ReduceSum", "Transpose", "Identity", "Transpose"],
    ),
    "einsum_of_a_bilinear_layer": Case(
        text="""g (float[N,3] x, float[N,4] z) => (float[N,2] y) {
            y = Einsum <equation = "bi,oij,bj->bo"> (x, w, z) }""",
        weights={"w": (2, 3, 4)},
        ops=["MatMul", "Reshape", "Unsqueeze", "MatMul", "Squeeze"],
    ),
    "einsum_sums_what_one_operand_has": Case(
        text="""g (float[N,3,2] x) => (float[N,5] y) {
            y = Einsum <equation = "bis,ioc->bo"> (x, w) }""",
        weights={"w": (3, 5, 2)},
        ops=["ReduceSum", "MatMul"],
    ),
    "einsum_of_diagonals": Case(
        text="""g (float[3,3] x) => (float[3] y, float[3,2] z) {
            y = Einsum <equation = "ii->i"> (x)
            z = Einsum <equation = "ii,ij->ij"> (x, w) }""",
        weights={"w": (3, 2)},
        ops=["Einsum", "Einsum"],
    ),
    "einsums_share_a_constant": Case(
        text="""g (float[N,3] x) => (float[N,3] y) {
            a = Einsum <equation = "bi,ij->bj"> (x, w)
            y = Einsum <equation = "bi,ji->bj"> (a, w) }""",
        weights={"w": (3, 3)},
        ops=["MatMul", "MatMul"],
    ),
    "matmul_bn": Case(
        text="""g (float[N,3] x) => (float[N,4] y) {
            c = MatMul (x, w)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (3, 4), **_BN},
        ops=["MatMul", "Add"],
    ),
    "matmul_add_transpose_bn": Case(
        text="""g (float[N,T,3] x) => (float[N,4,T] y) {
            c = MatMul (x, w)
            d = Add (wb, c)
            t = Transpose <perm = [0, 2, 1]> (d)
            y = BatchNormalization (t, s, b, m, var) }""",
        weights={"w": (3, 4), "wb": (4,), **_BN},
        ops=["MatMul", "Add", "Transpose"],
    ),
    "matmul_bn_of_another_axis": Case(
        text="""g (float[N,4,3] x) => (float[N,4,5] y) {
            c = MatMul (x, w)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (3, 5), **_BN},
        ops=["MatMul", "Mul", "Add"],
    ),
    "left_matmul_bn": Case(
        text="""g (float[N,3,5] x) => (float[N,4,5] y) {
            c = MatMul (w, x)
            y = BatchNormalization (c, s, b, m, var) }""",
        weights={"w": (4, 3), **_BN},
        ops=["MatMul", "Add"],
    ),
    "conv_add_bn": Case(
        text="""g (float[N,3,5,5] x) => (float[N,4,3,3] y) {
            c = Conv (x, w)
            d = Add (c, wb)
            y = BatchNormalization (d, s, b, m, var) }""",
        weights={"w": (4, 3, 3, 3), "wb": (4, 1, 1), **_BN},
        ops=["Conv"],
    ),
    "gemm_reshape_bn": Case(
        text="""g (float[N,3] x) => (float[N,4,2,2] y) <int64[4] shape = {-1, 4, 2, 2}> {
            c = Gemm (x, w, wb)
            r = Reshape (c, shape)
            y = BatchNormalization (r, s, b, m, var) }""",
        weights={"w": (3, 16), "wb": (16,), **_BN},
        ops=["Gemm", "Reshape"],
    ),
    "conv_flatten_bn": Case(
        text="""g (float[N,1,3,3] x) => (float[N,4] y) {
            c = Conv (x, w)
            f = Flatten (c)
            y = BatchNormalization (f, s, b, m, var) }""",
        weights={"w": (1, 1, 2, 2), **_BN},
        ops=["Conv", "Flatten", "Mul", "Add"],
    ),
    "bn_conv": Case(
        text="""g (float[N,4,5,5] x) => (float[N,6,3,3] y) {
            n = BatchNormalization (x, s, b, m, var)
            y = Conv <group = 2> (n, w, wb) }""",
        weights={"w": (6, 2, 3, 3), "wb": (6,), **_BN},
        ops=["Conv"],
    ),
    "two_bns_conv": Case(
        text="""g (float[N,4,5,5] x) => (float[N,6,3,3] y) {
            k = BatchNormalization (x, s, b, m, var)
            n = BatchNormalization (k, s, b, m, var)
            y = Conv (n, w) }""",
        weights={"w": (6, 4, 3, 3), **_BN},
        ops=["Conv"],
    ),
    "bn_padded_conv": Case(
        text="""g (float[N,4,5,5] x) => (float[N,6,5,5] y, float[N,6,5,5] z)
            <float[4] zero = {0, 0, 0, 0}> {
            n = BatchNormalization (x, s, b, m, var)
            y = Conv <pads = [1, 1, 1, 1]> (n, w)
            k = BatchNormalization (x, s, zero, zero, var)
            z = Conv <auto_pad = "SAME_UPPER"> (k, w) }""",
        weights={"w": (6, 4, 3, 3), **_BN},
        ops=["Mul", "Add", "Conv", "Conv"],
    ),
    "bn_convtranspose": Case(
        text="""g (float[N,4,3,3] x) => (float[N,6,3,3] y, float[N,6,5,5] z) {
            n = BatchNormalization (x, s, b, m, var)
            y = ConvTranspose <group = 2> (n, w)
            k = BatchNormalization (x, s, b, m, var)
            z = ConvTranspose (k, v) }""",
        weights={"w": (4, 3, 1, 1), "v": (4, 6, 3, 3), **_BN},
        ops=["ConvTranspose", "Mul", "Add", "ConvTranspose"],
    ),
    "bn_flatten_gemm": Case(
        text="""g (float[N,4,2,3] x) => (float[N,6] y) {
            n = BatchNormalization (x, s, b, m, var)
            f = Flatten (n)
            y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (f, w, wb) }""",
        weights={"w": (6, 24), "wb": (6,), **_BN},
        ops=["Flatten", "Gemm"],
    ),
    "bn_transpose_matmul": Case(
        text="""g (float[N,4,T] x) => (float[N,T,6] y, float[N,T,6] z, float[N,6,T] u) {
            n = BatchNormalization (x, s, b, m, var)
            t = Transpose <perm = [0, 2, 1]> (n)
            y = MatMul (t, w)
            k = BatchNormalization (x, s, b, m, var)
            l = Transpose <perm = [0, 2, 1]> (k)
            a = MatMul (l, w)
            z = Add (a, wb)
            j = BatchNormalization (x, s, b, m, var)
            u = MatMul (v, j) }""",
        weights={"w": (4, 6), "v": (6, 4), "wb": (6,), **_BN},
        ops=[
            *("Transpose", "MatMul", "Add", "Transpose", "MatMul", "Add"),
            *("MatMul", "Add"),
        ],
    ),
    "split_weight": Case(
        text="""g (float[N,3] x) => (float[N,4] y, float[2] p, float[2] q)
            <int64[2] sizes = {1, 7}> {
            k, v = Split <axis = 1, num_outputs = 2> (w)
            t, u = Split <axis = -1> (w, sizes)
            p, q = Split <num_outputs = 2> (c)
            a = MatMul (x, k)
            b = MatMul (x, u)
            d = ReduceSum (b)
            y = Add (a, d) }""",
        weights={"w": (3, 8), "c": (4,)},
        ops=["Split", "MatMul", "MatMul", "ReduceSum", "Add"],
    ),
    "sizes_of_a_batch": Case(
        text="""g (float[N,3,4] x) => (float[N,12] y, float[12,N] z)
            <int64 i = {1}, int64 j = {-1}, int64[1] zero = {0}, int64[1] one = {1},
             int64[1] two = {2}, int64[1] rest = {-1}> {
            s = Shape (x)
            a = Gather (s, i)
            b = Gather (s, j)
            m = Mul (a, b)
            u = Unsqueeze (m, zero)
            t = Concat <axis = 0> (rest, u)
            y = Reshape (x, t)
            q = Shape <start = 1> (x)
            c = Slice (q, zero, one)
            d = Slice (q, one, two, zero)
            e = Mul (c, d)
            f = Concat <axis = 0> (e, rest)
            r = Slice (s, zero, one)
            g = Reshape (x, f)
            h = CastLike (r, x)
            z = Mul (g, h) }""",
        ops=["Shape", "Reshape", "Slice", "Reshape", "Cast", "Mul"],
    ),
    "sizes_behind_a_contrib_operator": Case(
        text="""g (float[N,3,4] x) => (float[N,12] y)
            <int64 i = {1}, int64[1] zero = {0}, int64[1] four = {4}, int64[1] rest = {-1}> {
            k = com.microsoft.SkipLayerNormalization (x, x, scale)
            s = Shape (k)
            a = Gather (s, i)
            u = Unsqueeze (a, zero)
            p = Mul (u, four)
            t = Concat <axis = 0> (rest, p)
            y = Reshape (k, t) }""",
        weights={"scale": (4,)},
        header=_CONTRIB,
        ops=["Add", "LayerNormalization", "Reshape"],
    ),
    "weight_norm": Case(
        text="""g (float[N,3] x) => (float[N,4] y)
            <int64[1] axes = {0}, int64[2] to = {3, 4}> {
            i = Identity (w)
            c = Cast <to = 1> (i)
            r = Reshape (c, to)
            n = ReduceL2 (r, axes)
            d = Div (r, n)
            k = Mul (d, g)
            y = MatMul (x, k) }""",
        weights={"w": (12,), "g": (1, 4)},
        ops=["MatMul"],
    ),
    "contrib_activations": Case(
        text="""g (float[N,4] x) => (float[N,4] y) {
            a = com.microsoft.BiasGelu (x, b)
            c = com.microsoft.FastGelu (a, b)
            d = com.microsoft.FastGelu (c)
            y = com.microsoft.QuickGelu <alpha = 1.5> (d) }""",
        weights={"b": (4,)},
        header=_CONTRIB,
        ops=["Add", "Gelu", "Add", "Gelu", "Gelu", "Mul", "Sigmoid", "Mul"],
    ),
    "contrib_layers": Case(
        text="""g (float[N,3,5,5] x, float[N,4,3,3] r) => (float[N,4,3,3] y, float[N,5] z) {
            c = com.microsoft.FusedConv <activation = "LeakyRelu", activation_params = [0.2]>
                (x, w, b, r)
            y = com.microsoft.FusedConv <activation = "Clip", activation_params = [-1.0, 1.0],
                                         pads = [1, 1, 1, 1]> (c, v)
            p = ReduceMax <keepdims = 0> (y, axes)
            z = com.microsoft.FusedGemm <transB = 1, activation = "Elu",
                                         activation_alpha = 0.5> (p, k, kb) }""",
        weights={"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "k": (5, 4), "kb": (5,)},
        constants={"axes": [2, 3]},
        header=_CONTRIB,
        ops=["Conv", "Add", "LeakyRelu", "Conv", "Clip", "ReduceMax", "Gemm", "Elu"],
    ),
    "contrib_matmuls": Case(
        text="""g (float[N,3,4] x, float[N,3,5] z) => (float[N,4,5] y, float[N,3,2] u,
                                                        float[4,N,N] v) {
            y = com.microsoft.FusedMatMul <alpha = 0.5, transA = 1> (x, z)
            u = com.microsoft.TransposeMatMul <transB = 1> (x, w)
            t = Transpose <perm = [1, 2, 0]> (x)
            a = com.microsoft.FusedMatMul <transBatchA = 1, transBatchB = 1, transA = 1>
                (t, t)
            v = Neg (a) }""",
        weights={"w": (2, 4)},
        header=_CONTRIB,
        ops=[
            *("Transpose", "MatMul", "Mul", "MatMul", "Transpose"),
            *("Transpose", "Transpose", "MatMul", "Neg"),
        ],
    ),
    "contrib_normalizations": Case(
        text="""g (float[N,5,8] x, float[N,5,8] z) => (float[N,5,8] y, float[N,5,8] k) {
            a, m, v, k = com.microsoft.SkipLayerNormalization <epsilon = 0.00001>
                (x, z, s, b, c)
            y = com.microsoft.SkipSimplifiedLayerNormalization (a, x, s) }""",
        weights={"s": (8,), "b": (8,), "c": (8,)},
        header=_CONTRIB,
        ops=[
            *("Add", "Add", "LayerNormalization"),
            *("Add", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"),
        ],
    ),
    "contrib_embedding": Case(
        text="""g (int32[N,5] ids, int32[N,5] segments, int32[N,5] mask)
            => (float[N,5,8] y, int32[N] n, float[N,5,8] z) {
            y, n = com.microsoft.EmbedLayerNormalization <epsilon = 0.00001>
                (ids, segments, words, positions, types, s, b, mask)
            z, k = com.microsoft.EmbedLayerNormalization
                (ids, , words, positions, , s, b, , segments) }""",
        weights={"words": (3, 8), "positions": (6, 8), "types": (2, 8), "s": (8,), "b": (8,)},
        header=_CONTRIB,
        ops=[
            *("Gather", "Add", "Gather", "Add", "LayerNormalization", "ReduceSum"),
            *("Gather", "Gather", "Add", "LayerNormalization"),
        ],
    ),
    "contrib_attention": Case(
        text="""g (float[N,5,8] x, int32[N,5] mask) => (float[N,5,8] y) {
            y = com.microsoft.Attention <num_heads = 2> (x, w, b, mask) }""",
        weights={"w": (8, 24), "b": (24,)},
        header=_CONTRIB,
        ops=[
            *("MatMul", "Add", "Split", *("Reshape", "Transpose") * 3, "MatMul", "Mul"),
            *("Cast", "Unsqueeze", "Where", "Add", "Softmax", "MatMul"),
            *("Transpose", "Reshape"),
        ],
    ),
    "contrib_causal_attention": Case(
        text="""g (float[N,5,8] x, float[N,2,5,5] d) => (float[N,5,4] y) {
            y = com.microsoft.Attention <num_heads = 2, unidirectional = 1, scale = 0.3,
                                         qkv_hidden_sizes = [8, 8, 4]> (x, w, b, , , d) }""",
        weights={"w": (8, 20), "b": (20,)},
        header=_CONTRIB,
        ops=[
            *("MatMul", "Add", "Split", *("Reshape", "Transpose") * 3, "MatMul", "Mul"),
            *("Add", "Add", "Softmax", "MatMul", "Transpose", "Reshape"),
        ],
    ),
    "contrib_multi_head_attention": Case(
        text="""g (float[N,5,8] q, float[N,7,8] k) => (float[N,5,8] y) {
            y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, k, b) }""",
        weights={"b": (24,)},
        header=_CONTRIB,
        ops=[
            *("Add", "Add", "Add", *("Reshape", "Transpose") * 3, "MatMul", "Mul"),
            *("Softmax", "MatMul", "Transpose", "Reshape"),
        ],
    ),
    "contrib_attention_with_a_past": Case(
        text="""g (float[N,1,8] x, float[2,N,2,5,4] past) => (float[N,1,8] y) {
            y, present = com.microsoft.Attention <num_heads = 2> (x, w, b, , past) }""",
        weights={"w": (8, 24), "b": (24,)},
        header=_CONTRIB,
        ops=["Attention"],
    ),
    "half_precision": Case(
        text="""g (float16[N,4] x) => (float16[N,4] y, float[N,4] z) {
            a = Relu (x)
            z = Cast <to = 1> (a)
            n = Neg (z)
            h = Cast <to = 10> (n)
            y = Max (h, x) }""",
        ops=["Cast", "Relu", "Neg", "Max", "Cast"],
    ),
    "bfloat16_in_a_branch": Case(
        text="""g (int64[4] x, bool c) => (float[4] y) {
            b = Cast <to = 16> (x)
            h = If (c) <
                then_branch = t () => (bfloat16[4] p) { p = Neg (b) },
                else_branch = e () => (bfloat16[4] q) { q = Abs (b) }>
            y = Cast <to = 1> (h) }""",
        ops=["Cast", "If", "Neg", "Abs"],
    ),
    "double_precision": Case(
        text="""g (double[N,4] x) => (double[N,3] y) {
            d = Cast <to = 11> (w)
            y = MatMul (x, d) }""",
        weights={"w": (4, 3)},
        ops=["Cast", "MatMul", "Cast"],
    ),
    "double_of_a_size": Case(
        text="""g (float[N,4] x) => (double[2] y) {
            s = Shape (x)
            d = Cast <to = 11> (s)
            y = Sqrt (d) }""",
        ops=["Shape", "Cast", "Sqrt"],
    ),
    "weights_in_branches": Case(
        text="""g (float[N,2] x, bool c) => (float[N,2] y, float[2] k) {
            y, k = If (c) <
                then_branch = t () => (float[N,2] p, float[2] b)
                    <float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}> {
                    p = MatMul (x, w) },
                else_branch = e () => (float[N,2] q, float[2] d)
                    <float[2,2] v = {1, 2, 3, 4}, float[2] f = {5, 7}, float o = {2}> {
                    m = MatMul (x, v)
                    q = Mul (m, o)
                    d = Neg (f) }> }""",
        ops=["If", "MatMul", "Identity", "MatMul", "Identity"],
    ),
    "weight_in_a_loop": Case(
        text="""g (float[2] x, int64 n, bool c) => (float[2] y) {
            y = Loop (n, c, x) <
                body = b (int64 i, bool go, float[2] s) => (bool on, float[2] r) {
                    w = Constant <value = float[2] {2.0, 3.0}> ()
                    on = Identity (go)
                    r = Mul (s, w) }> }""",
        ops=["Loop", "Identity", "Mul"],
    ),
    "opset_11_branches": Case(
        text="""g (float[1,4,1] x, bool c) => (float[1,4] y) {
            y = If (c) <
                then_branch = t () => (float[1,4] p) {
                    h = Hardmax (x)
                    p = Squeeze <axes = [2]> (h) },
                else_branch = e () => (float[1,4] q) {
                    s = Softmax <axis = 1> (x)
                    q = Squeeze <axes = [-1]> (s) }> }""",
        opset=11,
        ops=[
            *("If", "Flatten", "Hardmax", "Reshape", "Squeeze"),
            *("Flatten", "Softmax", "Reshape", "Squeeze"),
        ],
    ),
    "opset_7_normalization_of_elements": Case(
        text="""g (float[N,4,3] x) => (float[N,4,3] y) {
            y = BatchNormalization <spatial = 0> (x, s, b, m, var) }""",
        weights={"s": (4, 3), "b": (4, 3), "m": (4, 3), "var": (4, 3)},
        opset=7,
        ops=["Sub", "Div", "Mul", "Add"],
    ),
    "scaled_layers": Case(
        text="""g (float[N,2,4,4] x, float[M,3] z) => (float[N,4,4,4] y, float[M,2] v) {
            c = Conv (x, w1)
            m = Mul (f, c)
            y = Add (m, o)
            g1 = Gemm (z, w2, b2)
            d = Div (g1, f2)
            s = Sub (d, o2)
            p = MatMul (s, w3)
            v = Mul (p, half) }""",
        weights={
            "w1": (4, 2, 1, 1),
            "f": (4, 1, 1),
            "o": (1, 4, 1, 1),
            "w2": (3, 4),
            "b2": (4,),
            "f2": (4,),
            "o2": (1, 4),
            "w3": (4, 2),
            "half": (),
        },
        ops=["Conv", "Gemm", "MatMul"],
    ),
    "scaling_that_stays": Case(
        text="""g (float[N,1,4,4] x, float[M,3] z) => (float[N,4,4,4] y, float[K,M,2] v) {
            c = Conv (x, w1)
            y = Mul (c, f)
            p = MatMul (z, w2)
            q = Add (p, o)
            v = Mul (q, o3) }""",
        weights={"w1": (1, 1, 1, 1), "f": (4, 1, 1), "w2": (3, 2), "o": (2,), "o3": (2, 1, 2)},
        ops=["Conv", "Mul", "MatMul", "Add", "Mul"],
    ),
    "sums_and_means": Case(
        text="""g (float[N,2,4,4] x, float[N,2,4,4] z) => (float[N,2] y, float[N,2,1,1] v) {
            s = Sum (x, z, x)
            y = ReduceMean <keepdims = 0> (s, last)
            v = ReduceMean (x, both) }""",
        constants={"last": [-1, 2], "both": [2, 3]},
        ops=["Add", "Add", "GlobalAveragePool", "Flatten", "GlobalAveragePool"],
    ),
    "chain_with_a_depthwise_conv": Case(
        text="""g (float[N,3,6,6] x) => (float[N,2,4,4] y) {
            c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            r1 = Relu (c1)
            c2 = Conv <group = 4> (r1, w2)
            r2 = LeakyRelu <alpha = 0.3> (c2)
            y = Conv (r2, w3, b3) }""",
        weights={"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3)}
        | {"w3": (2, 4, 1, 1), "b3": (2,)},
        ops=["Conv", "Relu", "Conv", "LeakyRelu", "Conv"],
    ),
    "flattened_between_layers": Case(
        text="""g (float[N,2,6,6] x) => (float[N,3] y) {
            c = Conv <group = 2> (x, w1, b1)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
            f = Flatten (p)
            y = Gemm <transB = 1> (f, w2, b2) }""",
        weights={"w1": (4, 1, 3, 3), "b1": (4,), "w2": (3, 16), "b2": (3,)},
        ops=["Conv", "MaxPool", "Flatten", "Gemm"],
    ),
    "biases_added_between_matmuls": Case(
        text="""g (float[N,3,4] x) => (float[N,3,4] y) {
            m1 = MatMul (x, w1)
            a1 = Add (b1, m1)
            s = PRelu (a1, slope)
            m2 = MatMul (s, w2)
            y = Add (m2, b1) }""",
        weights={"w1": (4, 4), "b1": (4,), "slope": (4,), "w2": (4, 4)},
        ops=["MatMul", "Add", "PRelu", "MatMul", "Add"],
    ),
    "upsampling_pair": Case(
        text="""g (float[N,4,3,3] x) => (float[N,2,4,4] y) {
            c1 = ConvTranspose <group = 2> (x, w1)
            r1 = Relu (c1)
            c2 = ConvTranspose <group = 2, strides = [2, 2]> (r1, w2, b2)
            m = ReduceMean (c2, axes)
            y = Conv <pads = [3, 3, 0, 0]> (m, w3) }""",
        weights={"w1": (4, 3, 1, 1), "w2": (6, 2, 2, 2), "b2": (4,), "w3": (2, 4, 1, 1)},
        constants={"axes": [2, 3]},
        ops=["ConvTranspose", "Relu", "ConvTranspose", "GlobalAveragePool", "Conv"],
    ),
    "whole_blocks_of_channels": Case(
        text="""g (float[N,16,6,6] x) => (float[N,16,6,6] y, float[N,16,1,1] z) {
            a = Conv (x, w, b)
            r = Relu (a)
            d = Conv <pads = [1, 1, 1, 1], group = 16> (r, v)
            s = Add (d, r)
            y = Relu (s)
            z = GlobalAveragePool (y) }""",
        weights={"w": (16, 16, 1, 1), "b": (16,), "v": (16, 1, 3, 3)},
        ops=["Conv", "Relu", "Conv", "Add", "Relu", "GlobalAveragePool"],
    ),
    "masks": Case(
        text="""g (float[N,4] x, float[N,4] t) => (float[N,4] y, float[N,4] z) {
            p = Greater (x, zero)
            m = Cast <to = 1> (p)
            q = Less (t, one)
            n = Cast <to = 1> (q)
            r = Less (x, one)
            o = Cast <to = 1> (r)
            a = Mul (t, m)
            b = Mul (n, a)
            y = Mul (b, o)
            z = Add (x, m) }""",
        constants={"zero": 0.0, "one": 1.0},
        ops=["Greater", "Cast", "Less", "Cast", "Less", "Cast", "Mul", "Mul", "Mul", "Add"],
    ),
    "masks_that_two_see_or_that_are_broadcast": Case(
        text="""g (float[N,4] x, float[4] t) => (float[N,4] y, float[N,4] a) {
            p = Greater (x, zero)
            m = Cast <to = 1> (p)
            q = Less (t, one)
            n = Cast <to = 1> (q)
            a = Mul (x, m)
            b = Mul (a, m)
            c = Mul (b, n)
            y = Mul (m, c) }""",
        constants={"zero": 0.0, "one": 1.0},
        ops=["Greater", "Cast", "Less", "Cast", *["Mul"] * 4],
    ),
    "scalars_beside_tensors_that_end_in_one": Case(
        text="""g (float[N,4,1,1] x, float[1] s) => (float[N,4,1,1] y, float[N,4] z) {
            a = Mul (x, s)
            b = Max (a, half, x)
            c = Sub (one, b)
            f = Flatten (c)
            z = Mul (f, s)
            y = Mul (s, c) }""",
        constants={"half": 0.5, "one": 1.0},
        ops=["Mul", "Max", "Sub", "Flatten", "Mul", "Mul"],
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
        ops=["Transpose", "Gemm", "Gemm", "Gemm"],
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
            "Squeeze",
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
