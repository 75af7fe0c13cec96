"""Convolutions in blocked channels compute what ONNX Runtime's Conv and ConvGrad do."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.kernels import block_of_channels
from onnx_fliqs.passes._blocked_convolution import Convolution
from onnx_fliqs.passes.block_channels import BlockChannelsPass
from support import check_pass, model, ops, random_feeds, run

Array = npt.NDArray[np.floating[Any]]

B = block_of_channels()
pytestmark = pytest.mark.skipif(
    B == 1, reason="ONNX Runtime has no kernels for blocked channels on this processor"
)

_HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
_REARRANGING = {"Constant", "Reshape", "Transpose"}
MANY = 1000
"""As many samples as make every gradient of a kernel worth while."""


# -- one convolution and its gradient -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A convolution; numbers of channels are those of images."""

    channels: int = B
    filters: int = B
    groups: int = 1
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    wanted: tuple[str, ...] = ("dx", "dw", "db")

    @property
    def output_size(self) -> tuple[int, int]:
        """By ONNX's formula."""
        height, width = (
            (self.size[i] + self.pads[i] + self.pads[i + 2] - self.reach(i) - 1)
            // self.strides[i]
            + 1
            for i in range(2)
        )
        return height, width

    def reach(self, axis: int) -> int:
        """From the first place of the kernel to its last."""
        return self.dilations[axis] * (self.kernel[axis] - 1)

    def attributes(self) -> str:
        """In ONNX's textual format."""
        lists = {
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": self.pads,
        }
        written = [f"{name} = {list(numbers)}" for name, numbers in lists.items()]
        return ", ".join([*written, f"group = {self.groups}"])

    def build(self) -> ir.Model:
        """The convolution with a Relu behind it, and the gradients that are wanted."""
        (h, w), (oh, ow), (kh, kw) = self.size, self.output_size, self.kernel
        kernel = f"float[{self.filters},{self.channels // self.groups},{kh},{kw}]"
        shapes = {"dx": f"float[N,{self.channels},{h},{w}]", "dw": kernel}
        shapes["db"] = f"float[{self.filters}]"
        made = ", ".join(f"{shapes[name]} {name}" for name in self.wanted)
        image, result = shapes["dx"], f"float[N,{self.filters},{oh},{ow}]"
        names = [name if name in self.wanted else "" for name in shapes]
        return model(
            f"""g ({image} x, {kernel} w, {shapes["db"]} b, {result} dy)
                => ({result} y, {made}) <{result} c> {{
                [conv] c = Conv <{self.attributes()}> (x, w, b)
                [relu] y = Relu (c)
                [grad] {", ".join(names)} =
                    com.microsoft.ConvGrad <{self.attributes()}> (dy, x, w) }}""",
            header=_HEADER,
        )


def check(sizes: Sizes, *, batch: int = 3, samples: int = MANY) -> ir.Model:
    """The outputs equal those of ONNX Runtime's kernels, but for the order of sums."""
    built = sizes.build()
    feeds = random_feeds(built, batch, batch)
    # Sums of at most some thousand products of about 1.
    return check_pass(BlockChannelsPass(B, samples), built, feeds, rtol=1e-5, atol=1e-4)


def left(after: ir.Model) -> str:
    """What ONNX Runtime's ConvGrad still computes: everything, the kernel's, or nothing."""
    gradients = [node for node in after.graph if node.op_type == "ConvGrad"]
    if not gradients:
        return "nothing"
    return "everything" if gradients[0].name == "grad" else "dw"


def depthwise(**options: tuple[int, ...]) -> Sizes:
    return Sizes(channels=2 * B, filters=2 * B, groups=2 * B, **options)  # type: ignore[arg-type]


CONVOLUTIONS = {
    "plain": (Sizes(channels=2 * B, filters=3 * B), "nothing"),
    "padded on one side": (Sizes(pads=(0, 1, 2, 0)), "nothing"),
    "not padded": (Sizes(pads=(0, 0, 0, 0)), "nothing"),
    "padded beyond its reach": (Sizes(pads=(3, 0, 3, 0)), "everything"),
    "of two by five": (Sizes(kernel=(2, 5), pads=(1, 2, 0, 2)), "nothing"),
    "of a row": (Sizes(kernel=(1, 3), pads=(0, 1, 0, 1)), "nothing"),
    "larger than the image": (Sizes(size=(2, 2), kernel=(4, 4), pads=(1,) * 4), "nothing"),
    "of one place": (Sizes(kernel=(1, 1), pads=(0,) * 4, filters=2 * B), "dw"),
    "of one place, strided": (
        Sizes(kernel=(1, 1), pads=(0,) * 4, strides=(2, 2), size=(8, 6)),
        "dw",
    ),
    "of one place, strides leave a rest": (
        Sizes(kernel=(1, 1), pads=(0,) * 4, strides=(2, 2)),
        "everything",
    ),
    "strided": (Sizes(strides=(2, 2)), "everything"),
    "strided, first layer": (Sizes(strides=(2, 2), wanted=("dw", "db")), "nothing"),
    "strided unevenly": (
        Sizes(strides=(3, 2), kernel=(4, 3), wanted=("dw",), size=(11, 9)),
        "nothing",
    ),
    "stride beyond the kernel": (
        Sizes(strides=(3, 3), kernel=(2, 2), wanted=("dw", "db")),
        "nothing",
    ),
    "dilated": (Sizes(dilations=(2, 1), pads=(2, 1, 2, 1)), "dw"),
    "few channels": (Sizes(channels=3, wanted=("dw", "db")), "nothing"),
    "few channels, strided": (
        Sizes(channels=1, kernel=(7, 7), pads=(3,) * 4, strides=(2, 2), wanted=("dw",)),
        "nothing",
    ),
    "few channels, of which the gradient is wanted": (Sizes(channels=3), "everything"),
    "depthwise": (depthwise(), "nothing"),
    "depthwise, strided": (depthwise(strides=(2, 2), size=(8, 8)), "nothing"),
    "depthwise, strided unevenly": (
        depthwise(kernel=(5, 3), pads=(2, 1, 2, 1), strides=(1, 2)),
        "nothing",
    ),
    "depthwise, dilated": (depthwise(dilations=(2, 2), pads=(2,) * 4), "nothing"),
    "depthwise, of one place": (depthwise(kernel=(1, 1), pads=(0,) * 4), "nothing"),
    "depthwise, padded beyond its reach": (
        depthwise(pads=(3, 0, 3, 0), strides=(2, 2), size=(8, 8)),
        "everything",
    ),
    "depthwise, strides leave a rest": (
        depthwise(kernel=(2, 2), pads=(0,) * 4, strides=(2, 2), size=(9, 7)),
        "nothing",
    ),
    "of one place, large image": (
        Sizes(kernel=(1, 1), pads=(0,) * 4, filters=2 * B, size=(24, 20)),
        "nothing",
    ),
    "of one place, large image, strided": (
        Sizes(kernel=(1, 1), pads=(0,) * 4, strides=(2, 2), size=(48, 38)),
        "nothing",
    ),
    "of one place, large image of few channels": (
        Sizes(channels=3, kernel=(1, 1), pads=(0,) * 4, size=(9, 8), wanted=("dw", "db")),
        "nothing",
    ),
    "of the input alone": (Sizes(wanted=("dx",)), "nothing"),
    "of the kernel alone, of one place": (
        Sizes(kernel=(1, 1), pads=(0,) * 4, wanted=("dw",)),
        "everything",
    ),
    "of the bias alone": (Sizes(wanted=("db",)), "nothing"),
    "in groups": (Sizes(channels=2 * B, filters=2 * B, groups=2), "everything"),
    "filters are no multiple": (Sizes(filters=B + 4), "everything"),
    "channels are no multiple": (Sizes(channels=B + 4), "everything"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_are_those_of_the_runtime(name: str) -> None:
    sizes, expected = CONVOLUTIONS[name]
    assert left(check(sizes)) == expected


@pytest.mark.parametrize("batch", range(1, 6))
def test_batches_of_any_size_go_through_the_same_graph(batch: int) -> None:
    check(Sizes(channels=2 * B), batch=batch)
    check(Sizes(channels=3, strides=(2, 2), wanted=("dw", "db")), batch=batch)
    check(depthwise(), batch=batch)


def test_the_gradient_of_a_large_kernel_beside_few_places_stays() -> None:
    sizes = Sizes(channels=4 * B, size=(3, 3))  # 36 B > 2 * 1 * 9
    assert left(check(sizes, samples=1)) == "dw"
    assert left(check(sizes, samples=2 * B)) == "nothing"


_LENGTH = st.integers(1, 5)
_WANTED = [("dx", "dw", "db"), ("dx", "dw"), ("dw", "db"), ("dx",), ("dw",), ("db",)]
_PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> Sizes:
    few = draw(st.booleans())
    groups = 1 if few or draw(st.booleans()) else 2 * B
    channels = draw(st.integers(1, B - 1)) if few else draw(st.sampled_from([B, 2 * B]))
    sizes = Sizes(
        channels=channels if groups == 1 else groups,
        filters=draw(st.sampled_from([B, 2 * B])) if groups == 1 else groups,
        groups=groups,
        size=draw(st.tuples(st.integers(1, 10), st.integers(1, 10))),
        kernel=draw(st.tuples(_LENGTH, _LENGTH)),
        strides=draw(_PAIR),
        dilations=draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)])),
        pads=draw(st.tuples(*[st.integers(0, 4)] * 4)),
        wanted=draw(st.sampled_from(_WANTED)),
    )
    # The kernel must find room at least once.
    height, width = (max(sizes.size[i], sizes.reach(i) + 1) for i in range(2))
    return replace(sizes, size=(height, width))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(sizes=convolutions(), batch=st.integers(1, 5), samples=st.sampled_from([1, MANY]))
def test_convolutions_of_all_sizes_are_those_of_the_runtime(
    sizes: Sizes, batch: int, samples: int
) -> None:
    check(sizes, batch=batch, samples=samples)


def test_a_window_that_lies_in_the_padding_alone_reads_zeros() -> None:
    # ONNX Runtime's Pad leaves memory as it was where it crops all that there is.
    sizes = Sizes(
        channels=2 * B,
        size=(1, 1),
        kernel=(2, 3),
        strides=(3, 2),
        pads=(3, 3, 1, 0),
        wanted=("dw", "db"),
    )
    for _ in range(3):
        assert left(check(sizes)) != "nothing"


def convolved(sizes: Sizes, x: Array, w: Array) -> Array:
    """The convolution alone, in ONNX Runtime."""
    plain = model(
        f"g (float[N,C,H,W] x, float[O,I,J,K] w) => (float[N,O,P,Q] y) {{"
        f" y = Conv <{sizes.attributes()}> (x, w) }}"
    )
    return run(plain, {"x": x, "w": w})[0].astype(np.float64)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(size=(4, 3)),
        Sizes(size=(5, 4), kernel=(2, 3), pads=(0, 2, 1, 0)),
        Sizes(size=(4, 4), kernel=(1, 1), pads=(0,) * 4, strides=(2, 2)),
        Sizes(size=(5, 4), groups=B, strides=(2, 1)),
        Sizes(size=(4, 4), dilations=(2, 1), pads=(2, 1, 2, 1)),
    ],
)
def test_the_gradients_are_finite_differences(sizes: Sizes) -> None:
    built = sizes.build()
    feeds = random_feeds(built, 1, 1)
    after = check_pass(BlockChannelsPass(B, MANY), built, feeds, rtol=1e-5, atol=1e-4)
    _, dx, dw, db = run(after, feeds)
    x, w, dy = feeds["x"], feeds["w"], feeds["dy"]
    # A convolution is linear: the difference of any step is the slope.
    steps = np.eye(x.size, dtype=np.float32).reshape(-1, *x.shape[1:])
    slopes = (convolved(sizes, steps, w) * dy).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(dx.reshape(-1), slopes, rtol=1e-5, atol=1e-4)
    rng = np.random.default_rng(0)
    for index in rng.choice(w.size, 20, replace=False):
        step = np.zeros(w.size, np.float32)
        step[index] = 1
        slope = (convolved(sizes, x, step.reshape(w.shape)) * dy).sum()
        assert dw.reshape(-1)[index] == pytest.approx(slope, rel=1e-5, abs=1e-4)
    np.testing.assert_allclose(db, dy.sum(axis=(0, 2, 3)), rtol=1e-5, atol=1e-4)


# -- graphs ---------------------------------------------------------------------------------

_WEIGHTS = {"w": (B, B, 3, 3), "v": (B, B, 3, 3), "k": (B, 1, 1), "few": (B, 3, 3, 3)}
_CONSTANTS = {"zero": 0.0, "half": 0.5, "six": 6.0}
_FULL = f"float[N,{B},6,6]"
_SAME = "pads = [1, 1, 1, 1]"


def graph(nodes: str, outputs: str = f"{_FULL} y", inputs: str = f"{_FULL} x") -> ir.Model:
    """A model whose first node, ``[a]``, is a convolution c of x."""
    text = nodes.replace("Conv (", f"Conv <{_SAME}> (")
    return model(
        f"g ({inputs}) => ({outputs}) {{ [a] c = Conv <{_SAME}> (x, w) {text} }}",
        header=_HEADER,
        weights=_WEIGHTS,
        constants=_CONSTANTS,
    )


def rewritten(built: ir.Model) -> ir.Model:
    """After the pass, which kept its contract."""
    shaped = ir.passes.common.ShapeInferencePass()(built).model
    # Two convolutions in a row make numbers of some hundred.
    return check_pass(BlockChannelsPass(B, MANY), shaped, rtol=1e-5, atol=1e-3)


def does(after: ir.Model) -> str:
    """The operators of the main graph that do something, in order."""
    names = [node.op_type for node in after.graph if node.op_type not in _REARRANGING]
    return " ".join(names).replace("ReorderInput", ">").replace("ReorderOutput", "<")


# > and < are rearrangements to blocked channels and back.
GRAPHS = {
    "alone": ("[r] y = Identity (c)", "> Conv Identity <"),
    "relu": ("[r] y = Relu (c)", "> Conv <"),
    "relu twice": ("[r] d = Relu (c) [s] y = Relu (d)", "> Conv Relu <"),
    "relu, two readers": ("[r] d = Relu (c) [s] y = Mul (d, c)", "> Conv Relu Mul <"),
    "chain": ("[r] d = Relu (c) [b] y = Conv (d, v)", "> Conv Conv <"),
    "without names": ("d = Relu (c) y = Conv (d, v)", "> Conv Conv <"),
    "residual": (
        "[r] d = Relu (c) [b] e = Conv (d, v) [s] f = Add (e, d) [t] y = Relu (f)",
        "> Conv Conv Add Relu <",
    ),
    "residual of what was plain": (
        "[b] e = Conv (c, v) [s] y = Add (x, e)",
        "> Conv Conv Add <",
    ),
    "number in front": ("[r] y = Mul (half, c)", "> Conv Mul <"),
    "numbers that are left out": ("[r] y = Clip (c, , six)", "> Conv Clip <"),
    "twice the same": ("[r] y = Mul (c, c)", "> Conv Mul <"),
    "number for each channel": ("[r] y = Mul (c, k)", "> Conv < Mul"),
    "mask": (
        "[r] m = Greater (c, zero) [s] y = Where (m, c, zero)",
        "> Conv Greater Where <",
    ),
    "bytes": (
        "[r] d = QuantizeLinear (c, half) [s] y = DequantizeLinear (d, half)",
        "> Conv QuantizeLinear DequantizeLinear <",
    ),
    "softmax": ("[r] y = Softmax <axis = 1> (c)", "> Conv < Softmax"),
    "plain and blocked": (
        """[r] d = Abs (c) [s] e = Softmax <axis = 1> (d)
           [b] f = Conv (d, v) [t] y = Add (e, f)""",
        "> Conv Abs < Softmax Conv > Add <",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_lies_between_convolutions_stays_blocked(name: str) -> None:
    text, expected = GRAPHS[name]
    assert does(rewritten(graph(text))) == expected


@pytest.mark.parametrize("name", ["residual", "mask", "bytes"])
def test_blocked_values_tell_their_shapes_and_types(name: str) -> None:
    """Later passes look at the last axis."""
    after = rewritten(graph(GRAPHS[name][0]))
    for node in after.graph:
        if node.op_type in {"Conv", "Add", "Greater", "Where", "DequantizeLinear"}:
            assert all(v.shape is not None and v.dtype is not None for v in node.outputs), node


def test_a_relu_is_computed_by_the_convolution() -> None:
    after = rewritten(graph("[r] y = Relu (c)"))
    (conv,) = (node for node in after.graph if node.op_type == "Conv")
    assert conv.attributes.get_string("activation") == "Relu"
    after = rewritten(graph("[r] y = Relu (c)", f"{_FULL} c, {_FULL} y"))
    assert does(after) == "> Conv Relu < <"


def test_what_two_read_is_rearranged_once() -> None:
    nodes = "[r] d = Softmax <axis = 1> (c) [s] e = Softmax <axis = 2> (c) [b] y = Add (d, e)"
    assert does(rewritten(graph(nodes))) == "> Conv < Softmax Softmax Add"
    nodes = "[b] d = Conv (x, v) [s] y = Add (c, d)"
    assert does(rewritten(graph(nodes))) == "> Conv Conv Add <"


def test_outputs_keep_their_names_inside_and_at_the_end() -> None:
    after = rewritten(
        graph(
            "[r] d = Abs (c) [b] y = Softmax <axis = 1> (d)",
            f"{_FULL} y, {_FULL} d, {_FULL} c",
        )
    )
    assert [value.name for value in after.graph.outputs] == ["y", "d", "c"]
    assert does(after) == "> Conv Abs < Softmax <"


def test_bodies_read_images_as_they_were() -> None:
    built = graph(
        f"""[r] d = Abs (c)
            [i] e = If (q) <
                then_branch = t () => ({_FULL} p) {{ p = Softmax <axis = 1> (d) }},
                else_branch = f () => ({_FULL} s) {{ [n] s = Conv (c, v) }}>
            [z] y = Add (d, e)""",
        inputs=f"{_FULL} x, bool q",
    )
    after = rewritten(built)
    assert does(after) == "> Conv Abs < < If > Add <"
    assert ops(after).count("Conv") == 2


def test_a_relu_outside_does_not_change_what_a_body_reads() -> None:
    built = graph(
        f"""[r] d = Relu (c)
            [i] e = If (q) <
                then_branch = t () => ({_FULL} p) {{ p = Neg (c) }},
                else_branch = f () => ({_FULL} s) {{ s = Abs (c) }}>
            [z] y = Add (d, e)""",
        inputs=f"{_FULL} x, bool q",
    )
    assert "Relu" in does(rewritten(built))


@pytest.mark.parametrize(
    ("nodes", "output", "expected"),
    [
        ("[r] y = Greater (c, zero)", f"bool[N,{B},6,6] y", "> Conv Greater Cast < Cast"),
        (
            "[r] d = Greater (c, zero) [s] y = NonZero (d)",
            "int64[4,K] y",
            "> Conv Greater Cast < Cast NonZero",
        ),
        (
            """[r] d = QuantizeLinear (c, half)
               [s] y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)""",
            f"uint8[N,{B},3,3] y",
            "> Conv QuantizeLinear Cast < Cast MaxPool",
        ),
        # float32 has not every number of these.
        ("[r] y = Cast <to = 7> (c)", f"int64[N,{B},6,6] y", "> Conv < Cast"),
        ("[r] y = Cast <to = 11> (c)", f"double[N,{B},6,6] y", "> Conv < Cast"),
    ],
)
def test_what_is_no_float_is_rearranged_as_floats(
    nodes: str, output: str, expected: str
) -> None:
    # The runtime rearranges only floats.
    assert does(rewritten(graph(nodes, output))) == expected


@pytest.mark.parametrize(
    ("kind", "nodes"),
    [
        ("bool", "[s] y = Where (m, c, zero)"),
        ("int64", "[s] y = Pow (c, m)"),
        ("double", "[r] d = Cast <to = 11> (c) [t] e = Add (d, m) [s] y = Cast <to = 1> (e)"),
    ],
)
def test_operands_that_are_no_floats_stay_as_they_are(kind: str, nodes: str) -> None:
    built = graph(nodes, inputs=f"{_FULL} x, {kind}[N,{B},6,6] m")
    assert does(rewritten(built)).startswith("> Conv <")


def test_operands_of_another_shape_stay() -> None:
    built = graph("[s] y = Add (c, r)", inputs=f"{_FULL} x, float[1,{B},6,6] r")
    assert does(rewritten(built)) == "> Conv < Add"


def test_few_channels_are_read_as_they_are() -> None:
    built = model(
        f"""g (float[N,3,6,6] x) => ({_FULL} y) {{
            [a] c = Conv <{_SAME}> (x, few)
            [b] y = Conv <{_SAME}> (c, v) }}""",
        weights=_WEIGHTS,
    )
    assert does(rewritten(built)) == "Conv Conv <"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (f"g (float[N,{B},H,6] x) => (float[N,{B},H,6] y)", (B, B, 3, 3)),
        (f"g (float[N,{B},6,6] x) => (float[N,{B + 4},6,6] y)", (B + 4, B, 3, 3)),
        (f"g (float[N,{B + 4},6,6] x) => (float[N,{B},6,6] y)", (B, B + 4, 3, 3)),
    ],
    ids=["size", "filters", "channels"],
)
def test_what_does_not_fit_stays(text: str, weights: tuple[int, ...]) -> None:
    built = model(
        f"{text} {{ [a] c = Conv <{_SAME}> (x, w) y = Relu (c) }}", weights={"w": weights}
    )
    assert does(rewritten(built)) == "Conv Relu"


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        (f"g (float[N,{B},6] x) => (float[N,{B},4] y) {{ y = Conv (x, w) }}", (B, B, 3)),
        (
            f'g ({_FULL} x) => ({_FULL} y) {{ y = Conv <auto_pad = "SAME_UPPER"> (x, w) }}',
            (B, B, 3, 3),
        ),
    ],
    ids=["a line", "automatic padding"],
)
def test_other_convolutions_stay(text: str, weight: tuple[int, ...]) -> None:
    assert does(rewritten(model(text, weights={"w": weight}))) == "Conv"


def test_convolutions_of_other_numbers_stay() -> None:
    built = model(
        f"""g (double[N,{B},6,6] x, double[{B},{B},3,3] w) => (double[N,{B},4,4] y) {{
            y = Conv (x, w) }}"""
    )
    assert not BlockChannelsPass(B, MANY)(built).modified


def test_without_blocks_nothing_is_done() -> None:
    built = graph("[r] y = Relu (c)")
    shaped = ir.passes.common.ShapeInferencePass()(built).model
    assert not BlockChannelsPass(1, MANY)(shaped).modified
    assert does(shaped) == "Conv Relu"


def test_the_sizes_of_what_is_made_are_the_runtimes() -> None:
    for sizes, _ in CONVOLUTIONS.values():
        built = sizes.build()
        node = next(iter(built.graph))
        image, weight = node.inputs[:2]
        assert image is not None
        assert weight is not None
        conv = Convolution.of(node, image, weight)
        assert conv is not None
        made = run(built, random_feeds(built, 0, 1))[0]
        assert made.shape[2:] == conv.output_size == sizes.output_size
