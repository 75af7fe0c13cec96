"""Every operator that changed between opset 7 and 21 computes after conversion what it did."""

from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes.canonicalise import OPSET, canonicalise
from onnx_fliqs.passes.convert_opset import ConvertOpsetPass
from support import Feeds, model, ops, random_feeds, run

TENSOR: Final = "float[2,3,4] x"
IMAGE: Final = "float[1,2,6,6] x"
SMALL: Final = "float[1,1,3,3] x"
MATRIX: Final = "float[4,6] x"
POOL: Final = "kernel_shape = [3, 3], strides = [2, 2]"

# Opsets in which the operator was written differently, inputs, and nodes; parameters are
# inputs as well, so that nothing is constant.
FORMS: Final = [
    *(
        ([7, 11, 12], TENSOR, f"y = {op} <axis = {axis}> (x)")
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for axis in (0, 1, 2)
    ),
    *(
        ([7, 11], "float[A,B,C] x", f"y = {op} (x)")
        for op in ("Softmax", "LogSoftmax", "Hardmax")
    ),
    ([11, 12], TENSOR, "y = Hardmax <axis = -2> (x)"),
    ([11, 12], TENSOR, "y = Softmax <axis = -1> (x)"),
    *(
        ([7, 11, 13, 17], TENSOR, f"y = {op} <axes = [0, 2], keepdims = 0> (x)")
        for op in ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean")
    ),
    ([7, 11, 17], TENSOR, "a = Abs (x) y = ReduceLogSum (a)"),
    ([7, 11, 12], TENSOR, "y = ReduceSum <axes = [1]> (x)"),
    ([7, 11, 17], TENSOR, "y = ReduceSumSquare <keepdims = 0> (x)"),
    ([7, 12], TENSOR, "a = ReduceMin <axes = [1]> (x) b = ReduceProd (x) y = Add (a, b)"),
    ([7, 11, 12], TENSOR, "a = ArgMax <axis = 1> (x) y = Cast <to = 1> (a)"),
    ([7, 9, 11, 12], "float[1,3,1] x", "y = Squeeze <axes = [0]> (x)"),
    ([7, 11], "float[1,3,1] x", "y = Squeeze (x)"),
    ([7, 11, 12], "float[3] x", "y = Unsqueeze <axes = [0, 2]> (x)"),
    ([7, 11, 12], MATRIX, "y, z = Split <axis = 1, split = [2, 4]> (x)"),
    ([7, 11, 13, 17], MATRIX, "y, z = Split <axis = 1> (x)"),
    ([7, 9], MATRIX, "y = Slice <axes = [1], starts = [-3], ends = [1000]> (x)"),
    ([7, 9], MATRIX, "y, i = TopK <k = 2, axis = 0> (x)"),
    ([7, 9, 10], MATRIX, "y = Pad <pads = [0, 1, 1, 0], value = 1.5> (x)"),
    ([7, 10], MATRIX, 'y = Pad <pads = [0, 1, 1, 0], mode = "reflect"> (x)'),
    ([7, 9, 10], TENSOR, "y = Clip <min = -0.5, max = 0.5> (x)"),
    ([7, 10], TENSOR, "y = Clip <min = 0.0> (x)"),
    ([7, 10], TENSOR, "y = Clip (x)"),
    ([7, 9, 11], TENSOR, "y = Flatten <axis = 2> (x)"),
    ([7, 9, 11], TENSOR, "y = Dropout <ratio = 0.5> (x)"),
    ([7, 9], "float[2,4] x, float[3,4] w, float[3] b", "y = Gemm <transB = 1> (x, w, b)"),
    ([7, 8, 10, 11], IMAGE, f"y = MaxPool <{POOL}, pads = [1, 1, 1, 1]> (x)"),
    ([7, 10, 11, 18], IMAGE, f"y = AveragePool <{POOL}, pads = [1, 1, 1, 1]> (x)"),
    ([10, 11], IMAGE, f"y = AveragePool <{POOL}, ceil_mode = 1> (x)"),
    ([7, 11, 17], IMAGE, f"y = LpPool <{POOL}> (x)"),
    (
        [7, 8, 9, 13],
        "float[2,3,2] x, float[3] s, float[3] b, float[3] m, float[3] v",
        "a = Abs (v) y = BatchNormalization <epsilon = 0.01> (x, s, b, m, a)",
    ),
    (
        [7, 8],
        "float[2,3,2] x, float[3,2] s, float[3,2] b, float[3,2] m, float[3,2] v",
        "a = Abs (v) y = BatchNormalization <spatial = 0, epsilon = 0.1> (x, s, b, m, a)",
    ),
    (
        [18, 20],
        "float[2,4,3] x, float[2] s, float[2] b",
        "y = GroupNormalization <num_groups = 2> (x, s, b)",
    ),
    ([7, 8], SMALL, 'y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]> (x)'),
    ([7, 8], SMALL, 'y = Upsample <mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]> (x)'),
    *(
        (
            [opset],
            SMALL,
            f"""s = Constant <value = float[4] {{1, 1, {scale}, {scale}}}> ()
                y = {op} <mode = "{mode}"> (x, s)""",
        )
        for opset, op, scale in (
            (9, "Upsample", 2.5),
            (10, "Resize", 2.5),
            (10, "Resize", 0.6),
        )
        for mode in ("nearest", "linear")
    ),
    (
        [13, 18],
        SMALL,
        "r = Constant <value = float[4] {1, 1, 2, 2}> () y = Resize (x, , r)",
    ),
    ([7, 9, 12, 13], TENSOR, "y = Cast <to = 1> (x)"),
    ([7, 8, 12], "float[2,3] x, float[2,3] z", "y = Max (x, z)"),
    ([7, 8, 12], "float[2,3] x, float[2,3] z", "y = Sum (x, z, x)"),
    ([8, 12], TENSOR, "s = Constant <value = int64[3] {1, 3, 1}> () y = Expand (x, s)"),
    ([7, 12], "float[1,8,2,2] x", "y = DepthToSpace <blocksize = 2> (x)"),
    (
        [7, 13],
        "float[3,2,3] x, float[1,9,3] w, float[1,9,3] r",
        "y, h = GRU <hidden_size = 3> (x, w, r)",
    ),
    (
        [9, 10],
        "float[3,2] x, float[1,2] u",
        "i = Constant <value = int64[1,2] {2, 0}> () y = Scatter (x, i, u)",
    ),
    (
        [16],
        "float[1,1,4,4] x, float[1,3,3,2] z",
        'y = GridSample <mode = "bilinear"> (x, z)',
    ),
    ([17], "float[1,4,1] x", "y = DFT <axis = 1> (x)"),
    (
        [8, 10, 12],
        "float[2] x, int64 n, bool c",
        """y = Loop (n, c, x) <
            body = b (int64 i, bool go, float[2] s) => (bool on, float[2] r) {
                on = Identity (go)
                u = Unsqueeze <axes = [0]> (s)
                t = Softmax <axis = 1> (u)
                r = Squeeze <axes = [0]> (t) }>""",
    ),
    (
        [9, 11],
        "float[2] h, float[3,2] x",
        """y, z = Scan <num_scan_inputs = 1,
            body = b (float[2] a, float[2] i) => (float[2] o, float[2] s) {
                o = Add (a, i)
                s = Softmax <axis = 0> (o) }> (h, x)""",
    ),
]


def header(opset: int) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]>'


def built(opset: int, inputs: str, nodes: str) -> ir.Model:
    """A model of which only the inputs have shapes."""
    proto = onnx.parser.parse_model(
        f"{header(opset)}\ng ({inputs}) => (float y) {{ {nodes} }}"
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def in_a_branch(plain: ir.Model) -> ir.Model:
    """The same nodes in both branches of an If, which read the graph's inputs."""
    proto = ir.to_proto(plain)
    branches = []
    for name in ("then_branch", "else_branch"):
        branch = onnx.GraphProto(name=name, node=proto.graph.node, output=proto.graph.output)
        text = branch.SerializeToString()
        branches.append(onnx.GraphProto.FromString(text))
    condition = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    both = dict(zip(("then_branch", "else_branch"), branches, strict=True))
    del proto.graph.node[:]
    proto.graph.node.append(onnx.helper.make_node("If", ["c"], ["out"], **both))
    proto.graph.output[0].name = "out"
    proto.graph.input.append(condition)
    return ir.from_proto(proto)


def check(plain: ir.Model, feeds: Feeds) -> ir.Model:
    """Convert, and compare with the original in ONNX Runtime."""
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain)))
    result = ConvertOpsetPass(target=OPSET)(typed).model
    result.ir_version = 10
    assert result.opset_imports[""] == OPSET
    for want, got in zip(run(plain, feeds), run(result, feeds), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize(
    ("opset", "inputs", "nodes"),
    [(opset, inputs, nodes) for opsets, inputs, nodes in FORMS for opset in opsets],
)
def test_a_converted_operator_computes_the_same(opset: int, inputs: str, nodes: str) -> None:
    plain = built(opset, inputs, nodes)
    feeds = random_feeds(plain, 1)
    check(plain, feeds)
    if " c" not in inputs:
        check(in_a_branch(plain), {**feeds, "c": np.array(False)})


def test_group_normalization_keeps_the_names_of_its_parameters() -> None:
    text = """g (float[N,4,3] x) => (float[N,4,3] y) {
        y = GroupNormalization <num_groups = 2> (x, s, b) }"""
    plain = model(text, header=header(18), weights={"s": (2,), "b": (2,)})
    (s, b) = (plain.graph.initializers[name].const_value for name in ("s", "b"))
    result = ConvertOpsetPass(target=OPSET)(plain).model
    for name, old in (("s", s), ("b", b)):
        new = result.graph.initializers[name].const_value
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(new.numpy(), np.repeat(old.numpy(), 2))


def test_group_normalization_of_unknown_channels_is_refused() -> None:
    text = """g (float[N,C,3] x, float[2] s) => (float[N,C,3] y) {
        y = GroupNormalization <num_groups = 2> (x, s, s) }"""
    with pytest.raises(
        UnsupportedError, match=r"^the number of channels of GroupNorm.* is unknown"
    ):
        canonicalise(model(text, header=header(18)))


@pytest.mark.parametrize("opset", [9, OPSET])
def test_the_checker_accepts_normalization_over_the_default_axes(opset: int) -> None:
    text = "g (float[2,3,4,4] x) => (float[2,3,4,4] y) { y = MeanVarianceNormalization (x) }"
    plain = model(text, header=header(opset))
    result = check(plain, random_feeds(plain))
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert not ConvertOpsetPass(target=OPSET)(result).modified


def test_a_scan_over_batches_is_refused() -> None:
    text = """g (float[1,3,2] x, float[1,2] h) => (float[1,2] y, float[1,3,2] z) {
        y, z = Scan <num_scan_inputs = 1,
            body = b (float[2] a, float[2] i) => (float[2] o, float[2] s) {
                o = Add (a, i)
                s = Neg (o) }> (, h, x) }"""
    with pytest.raises(UnsupportedError, match=r"^Scan 'y' is of opset 8, in which it runs"):
        canonicalise(model(text, header=header(8)))


def test_other_domains_are_kept() -> None:
    text = """g (float[N,3] x) => (float[N] y) {
        a = c.Foo <n = 3> (x)
        y = Squeeze <axes = [1]> (a) }"""
    plain = model(text, header='<ir_version: 8, opset_import: ["" : 11, "c" : 3]>')
    result = ConvertOpsetPass(target=OPSET)(plain).model
    assert result.opset_imports == {"": OPSET, "c": 3}
    assert ops(result) == ["Foo", "Constant", "Squeeze"]
    (foo, *_) = result.graph
    assert (foo.domain, foo.attributes.get_int("n", 0)) == ("c", 3)
