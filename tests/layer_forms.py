"""Small models of the forms that layers take, beside those of ``pass_models``."""

from pass_models import Case

_LSTM = {"w": (1, 8, 4), "r": (1, 8, 2), "b": (1, 16)}

FORMS: dict[str, Case] = {
    "conv_1d": Case(
        text="""g (float[N,3,9] x) => (float[N,4,4] y) {
            [conv] y = Conv <strides = [2], dilations = [1]> (x, w, b) }""",
        weights={"w": (4, 3, 3), "b": (4,)},
        ops=["Conv"],
    ),
    "conv_3d": Case(
        text="""g (float[N,2,4,4,4] x) => (float[N,4,A,B,C] y) {
            [conv] y = Conv <dilations = [1, 2, 2], strides = [2, 1, 1], pads = [1,1,1,1,1,1]>
                (x, w, b) }""",
        weights={"w": (4, 2, 2, 3, 3), "b": (4,)},
        ops=["Conv"],
    ),
    "conv_with_computed_weight": Case(
        text="""g (float[N,2,5,5] x, float[3,18] k) => (float[N,3,3,3] y)
            <int64[4] shape = {3, 2, 3, 3}> {
            [maker] m = MatMul (k, v)
            w = Reshape (m, shape)
            [conv] y = Conv (x, w, b) }""",
        weights={"v": (18, 18), "b": (3,)},
        ops=["MatMul", "Reshape", "Conv"],
    ),
    "conv_of_a_constant_image": Case(
        text="""g (float[3,2,2,2] k) => (float[1,3,4,4] y) { [conv] y = Conv (i, k) }""",
        weights={"i": (1, 2, 5, 5)},
        ops=["Conv"],
    ),
    "convtranspose_1d_grouped": Case(
        text="""g (float[N,4,5] x) => (float[N,6,11] y) {
            [up] y = ConvTranspose <group = 2, strides = [2]> (x, w, b) }""",
        weights={"w": (4, 3, 3), "b": (6,)},
        ops=["ConvTranspose"],
    ),
    "gemms_of_every_kind": Case(
        text="""g (float[4,3] x) => (float[3,2] y, float[2,4] z) {
            [both] a = Gemm <transA = 1, transB = 1> (x, w1, b1)
            [scaled] y = Gemm <alpha = 0.5, beta = 2.0> (a, w2, b2)
            [left] z = Gemm <transB = 1> (w3, x, b3) }""",
        weights={
            "w1": (5, 4),
            "b1": (3, 5),
            "w2": (5, 2),
            "b2": (1,),
            "w3": (2, 3),
            "b3": (2, 1),
        },
        ops=["Transpose", "Gemm", "Add", "Gemm", "Gemm", "Add"],
    ),
    "stacks_of_matrices": Case(
        text="""g (float[2,3,4] x) => (float[5,2,3,6] y, float[2,7,4] z) {
            [right] y = MatMul (x, w1)
            [left] z = MatMul (w2, x) }""",
        weights={"w1": (5, 2, 4, 6), "w2": (2, 7, 3)},
        ops=["MatMul", "MatMul"],
    ),
    "matmul_and_bias": Case(
        text="""g (float[N,3,4] x) => (float[N,3,2] y) {
            [first] a = MatMul (x, w1)
            c = Add (a, b1)
            r = Relu (c)
            [second] d = MatMul (r, w2)
            y = Add (b2, d) }""",
        weights={"w1": (4, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)},
        ops=["MatMul", "Add", "Relu", "MatMul", "Add"],
    ),
    "scalar_product": Case(
        text="g (float[4] x) => (float y) { [dot] y = MatMul (x, w) }",
        weights={"w": (4,)},
        ops=["Unsqueeze", "MatMul", "Squeeze"],
    ),
    "weight_of_two_convolutions": Case(
        text="""g (float[N,2,5,5] x) => (float[N,2,5,5] y) {
            [once] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
            r = Relu (a)
            [twice] y = Conv <pads = [1, 1, 1, 1]> (r, w, b) }""",
        weights={"w": (2, 2, 3, 3), "b": (2,)},
        ops=["Conv", "Relu", "Conv"],
    ),
    "weight_that_others_read": Case(
        text="""g (float[4,4] x) => (float[4,4] y, float[4,4] z, float[4,4] w) {
            [fc] a = MatMul (x, w)
            z = Mul (x, w)
            y = Relu (a) }""",
        weights={"w": (4, 4)},
        ops=["MatMul", "Mul", "Relu"],
    ),
    "output_that_is_read": Case(
        text="""g (float[N,4] x) => (float[N,4] a, float[N,4] r, float[N,4] y) {
            [first] a = MatMul (x, w1)
            r = Relu (a)
            [second] b = MatMul (a, w2)
            [third] c = MatMul (r, w3)
            y = Add (b, c) }""",
        weights={"w1": (4, 4), "w2": (4, 4), "w3": (4, 4)},
        ops=["MatMul", "Relu", "MatMul", "MatMul", "Add"],
    ),
    "branching_additions": Case(
        text="""g (float[N,2,4,4] x) => (float[N,2,4,4] y) {
            [c1] a = Conv (x, w1)
            [c2] b = Conv (x, w2)
            s = Add (a, b)
            t = Concat <axis = 1> (s, b)
            p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (t)
            m = Add (s, half)
            [c3] c = Conv (p, w3)
            q = Mul (c, m)
            [c4] y = Conv (q, w4) }""",
        weights={
            "w1": (2, 2, 1, 1),
            "w2": (2, 2, 1, 1),
            "w3": (2, 4, 1, 1),
            "w4": (2, 2, 1, 1),
        },
        constants={"half": 0.5},
        ops=["Conv", "Conv", "Add", "Concat", "MaxPool", "Add", "Conv", "Mul", "Conv"],
    ),
    "concatenations": Case(
        text="""g (float[N,2,4,4] x) => (float[N,2,4,4] y, float[N,4,4,4] z) {
            [c1] a = Conv (x, w1)
            r = Relu (a)
            [c2] b = Conv (x, w2)
            s = Relu (b)
            t = Concat <axis = 1> (r, s)
            u = Concat <axis = 1> (t, a)
            [c3] y = Conv (u, w3)
            z = Concat <axis = 1> (s, r) }""",
        weights={"w1": (2, 2, 1, 1), "w2": (2, 2, 1, 1), "w3": (2, 6, 1, 1)},
        ops=["Conv", "Relu", "Conv", "Relu", "Concat", "Concat", "Conv", "Concat"],
    ),
    "embedding": Case(
        text="""g (int64[N,3] i, int32 j) => (float[N,3,4] y, float[16] e) {
            [words] t = Gather (table, i)
            [fc] y = MatMul (t, w)
            [word] e = Gather (table, j) }""",
        weights={"table": (64, 16), "w": (16, 4)},
        ops=["Gather", "MatMul", "Gather"],
    ),
    "embeddings_of_several_kinds": Case(
        text="""g (int64[N,3] i, int64[N,3] k) => (float[N,3,16] y) {
            [words] t = Gather <axis = 0> (table, i)
            [kinds] u = Gather (two_rows, k)
            s = Add (t, u)
            p = Add (s, positions)
            [norm] y = LayerNormalization (p, gain) }""",
        weights={"table": (64, 16), "two_rows": (2, 16), "positions": (3, 16), "gain": (16,)},
        ops=["Gather", "Gather", "Add", "Add", "LayerNormalization"],
    ),
    "tied_embedding": Case(
        text="""g (int64[N] i) => (float[N,64] y) {
            [words] t = Gather (table, i)
            r = Relu (t)
            [scores] y = Gemm <transB = 1> (r, table) }""",
        weights={"table": (64, 16)},
        ops=["Gather", "Relu", "Gemm"],
    ),
    "lstm": Case(
        text="""g (float[3,N,4] x) => (float[3,1,N,2] y, float[1,N,2] c) {
            [cell] y, h, c = LSTM <hidden_size = 2> (x, w, r, b) }""",
        weights=_LSTM,
        ops=["LSTM"],
    ),
    "lstm_both_ways": Case(
        text="""g (float[3,2,4] x, float[2,2,2] h0) => (float[3,2,2,2] y) {
            [cell] y = LSTM <hidden_size = 2, direction = "bidirectional">
                (x, w, r, , , h0) }""",
        weights={"w": (2, 8, 4), "r": (2, 8, 2)},
        ops=["LSTM"],
    ),
    "last_state_of_a_gru": Case(
        text="""g (float[3,N,4] x) => (float[N,3] y) {
            [cell] a, h = GRU <hidden_size = 2, linear_before_reset = 1> (x, w, r, b)
            s = Squeeze (h, axis)
            [fc] y = MatMul (s, v) }""",
        weights={"w": (1, 6, 4), "r": (1, 6, 2), "b": (1, 12), "v": (2, 3)},
        constants={"axis": [0]},
        ops=["GRU", "Squeeze", "MatMul"],
    ),
    "two_rnns_of_one_weight": Case(
        text="""g (float[3,N,2] x) => (float[3,1,N,2] y) {
            [first] a = RNN <hidden_size = 2> (x, w, w)
            s = Squeeze (a, axis)
            [second] y = RNN <hidden_size = 2> (s, w, r) }""",
        weights={"w": (1, 2, 2), "r": (1, 2, 2)},
        constants={"axis": [1]},
        ops=["RNN", "Squeeze", "RNN"],
    ),
    "einsums": Case(
        text="""g (float[3,3,4] x) => (float[3,5] y, float[3,3,4,2] z) {
            [diagonal] y = Einsum <equation = "aab,cb->ac"> (x, w)
            [three] z = Einsum <equation = "...a,...b,bc->...ac"> (x, x, v) }""",
        weights={"w": (5, 4), "v": (4, 2)},
        ops=["Einsum", "Einsum"],
    ),
    "layers_in_bodies": Case(
        text="""g (float[N,4] x, int64[N] i, bool c) => (float[N,4] y) {
            [outside] a = MatMul (x, w1)
            d = If (c) <
                then_branch = t () => (float[N,4] p) {
                    [inside] q = MatMul (a, w1)
                    [nested] p = If (c) <
                        then_branch = u () => (float[N,4] k) { [deep] k = Gemm (q, w2, b2) },
                        else_branch = v () => (float[N,4] l) { [other] l = Gemm (q, w2) }> },
                else_branch = e () => (float[N,4] r) {
                    [words] s = Gather (table, i)
                    [fc] r = MatMul (s, w3) }>
            y = Relu (d) }""",
        weights={"w1": (4, 4), "w2": (4, 4), "b2": (4,), "table": (256, 4), "w3": (4, 4)},
        ops=["MatMul", "If", "MatMul", "If", "Gemm", "Gemm", "Gather", "MatMul", "Relu"],
    ),
    "layer_in_a_loop": Case(
        text="""g (float[2,4] x, bool c) => (float[2,4] y) <int64 n = {3}> {
            [loop] y = Loop (n, c, x) <
                body = b (int64 i, bool go, float[2,4] s) => (bool on, float[2,4] t) {
                    on = Identity (go)
                    [inside] m = MatMul (s, w)
                    t = Tanh (m) }> }""",
        weights={"w": (4, 4)},
        ops=["Loop", "Identity", "MatMul", "Tanh"],
    ),
    "recurrent_cell_in_a_branch": Case(
        text="""g (float[3,2,4] x, bool c) => (float[1,2,2] y) {
            y = If (c) <
                then_branch = t () => (float[1,2,2] p) {
                    [cell] all, p = LSTM <hidden_size = 2> (x, w, r, b) },
                else_branch = e () => (float[1,2,2] q) {
                    [conv] k = Conv (x, v)
                    q = ReduceMean <axes = [0]> (k) }> }""",
        weights={**_LSTM, "v": (2, 2, 3)},
        header='<ir_version: 8, opset_import: ["" : 17]>',
        ops=["If", "LSTM", "Conv", "ReduceMean"],
    ),
}
