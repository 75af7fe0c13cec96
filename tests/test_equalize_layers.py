"""Neighbouring layers share the range of each channel, and compute what they did."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.equalize_layers import EqualizeLayersPass
from onnx_fliqs.passes.separate_biases import SeparateBiasesPass
from onnx_fliqs.runtime import make_session, run_session
from support import check_pass, initializer, model, random_feeds, run

Array = npt.NDArray[np.float32]


def inferred(plain: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain)))


def rescaled(plain: ir.Model, name: str, axis: int, seed: int = 0) -> None:
    """Spread the channels of a weight over two orders of magnitude."""
    weight = initializer(plain, name)
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    spread = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, shape)
    array = (weight * spread).astype(np.float32)
    plain.graph.initializers[name].const_value = ir.tensor(array, name=name)


def ranges(weight: Array, axis: int) -> Array:
    found: Array = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(1)
    return found


# -- every form of a pair -------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two layers w1, w2 of 6 channels between them, and the axes of those."""

    text: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    axes: tuple[int, int]
    constants: dict[str, list[int]]

    def build(self) -> ir.Model:
        plain = model(
            f"g {self.text}",
            weights={"w1": self.first, "w2": self.second, "b": (6,), "k": (1, 6, 1, 1)},
            constants=self.constants,
        )
        rescaled(plain, "w1", self.axes[0])
        return inferred(plain)


def image(between: str, second: str = "Conv (m, w2)", **constants: list[int]) -> Pair:
    """Conv, something, and a layer behind it."""
    text = f"""(float[N,3,6,6] x) => (y) {{
        c = Conv <pads = [1, 1, 1, 1]> (x, w1, b)
        {between}
        y = {second} }}"""
    return Pair(text, (6, 3, 3, 3), (4, 6, 1, 1), (0, 1), constants)


def rows(between: str, first: str, second: str, axes: tuple[int, int]) -> Pair:
    text = f"(float[N,5] x) => (y) {{ c = {first}\n{between}\ny = {second} }}"
    wide, narrow = (6, 5) if axes[0] == 0 else (5, 6), (6, 4) if axes[1] == 0 else (4, 6)
    return Pair(text, wide, narrow, axes, {})


SCALED = {
    "conv_conv": image("m = Relu (c)"),
    "no_activation": image("", "Conv (c, w2)"),
    "leaky_relu": image("m = LeakyRelu <alpha = 0.2> (c)"),
    "parametric_relu": image("m = PRelu (c, k)"),
    "product": image("a = Mul (k, c)\nm = Div (a, k)"),
    "addition": image("a = Add (k, c)\nm = Relu (a)"),
    "max_pooling": image("m = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (c)"),
    "mean_pooling": image("m = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)"),
    "global_pooling": image("m = GlobalAveragePool (c)"),
    "padding": image("m = Pad (c, pads)", pads=[0, 0, 1, 2, 0, 0, 0, 1]),
    "mirrored_padding": image(
        'm = Pad <mode = "reflect"> (c, pads, , axes)', pads=[1, 0, 1, 2], axes=[-1, 2]
    ),
    "means": Pair(
        """(float[N,3,6,6] x) => (y) {
            c = Conv (x, w1, b)
            m = ReduceMean <keepdims = 0> (c, axes)
            y = Gemm (m, w2) }""",
        (6, 3, 3, 3),
        (6, 4),
        (0, 0),
        {"axes": [2, -1]},
    ),
    "grouped": Pair(
        """(float[N,4,6,6] x) => (y) {
            c = Conv <group = 2> (x, w1, b)
            r = Relu (c)
            y = Conv <group = 3> (r, w2) }""",
        (6, 2, 3, 3),
        (3, 2, 1, 1),
        (0, -1),
        {},
    ),
    "depthwise": Pair(
        """(float[N,3,6,6] x) => (y) {
            c = Conv (x, w1, b)
            r = Relu (c)
            y = Conv <group = 6> (r, w2) }""",
        (6, 3, 3, 3),
        (12, 1, 3, 3),
        (0, -1),
        {},
    ),
    "upsampling": Pair(
        """(float[N,3,4,4] x) => (y) {
            c = ConvTranspose <strides = [2, 2]> (x, w1, b)
            r = Relu (c)
            y = ConvTranspose (r, w2) }""",
        (3, 6, 2, 2),
        (6, 4, 2, 2),
        (1, 0),
        {},
    ),
    "gemm_gemm": rows("r = Relu (c)", "Gemm (x, w1, b)", "Gemm (r, w2)", (1, 0)),
    "transposed_gemms": rows(
        "r = Relu (c)", "Gemm <transB = 1> (x, w1, b)", "Gemm <transB = 1> (r, w2)", (0, 1)
    ),
    "matmul_matmul": rows(
        "a = Add (c, b)\nr = Relu (a)", "MatMul (x, w1)", "MatMul (r, w2)", (1, 0)
    ),
    "weight_on_the_left": Pair(
        """(float[5,N] x) => (y) {
            c = MatMul (w1, x)
            r = Relu (c)
            y = MatMul (w2, r) }""",
        (6, 5),
        (4, 6),
        (0, 1),
        {},
    ),
}


@pytest.mark.parametrize("form", SCALED)
def test_both_sides_of_each_channel_have_one_range(form: str) -> None:
    pair = SCALED[form]
    plain = pair.build()
    result = check_pass(EqualizeLayersPass(), plain, rtol=1e-4, atol=1e-4)
    before = ranges(initializer(result, "w1"), pair.axes[0])
    second = initializer(result, "w2")
    if pair.axes[1] >= 0:
        behind = ranges(second, pair.axes[1])
    else:  # grouped: [group, outputs, inputs]
        groups = 6 // second.shape[1]
        cut = second.reshape(groups, -1, second.shape[1], *second.shape[2:])
        behind = np.abs(cut).max(axis=(1, 3, 4)).reshape(-1)
    np.testing.assert_allclose(before, behind, rtol=1e-5)
    assert not np.array_equal(initializer(result, "w1"), initializer(plain, "w1"))


def test_flattened_channels_are_blocks() -> None:
    text = """(float[N,3,4,4] x) => (float[N,5] y) {
        c = Conv (x, w1, b)
        t = Transpose <perm = [0, 2, 3, 1]> (c)
        f = Flatten (t)
        y = Gemm (f, w2) }"""
    plain = inferred(
        model(f"g {text}", weights={"w1": (6, 3, 3, 3), "b": (6,), "w2": (24, 5)})
    )
    rescaled(plain, "w1", 0)
    result = check_pass(EqualizeLayersPass(), plain, rtol=1e-4, atol=1e-4)
    behind = np.abs(initializer(result, "w2").reshape(4, 6, 5)).max(axis=(0, 2))
    np.testing.assert_allclose(ranges(initializer(result, "w1"), 0), behind, rtol=1e-5)


LEFT = {
    "clip_at_6": "m = Clip (c, zero, six)",
    "sigmoid": "m = Sigmoid (c)",
    "read_twice": "r = Relu (c)\ns = Exp (c)\nm = Add (r, s)",
    "computed_addend": "m = Add (c, x6)",
    "padding_with_ones": "m = Pad (c, pads, one)",
    "padded_channels": "p = Pad (c, pad_channels)\nm = Slice (p, one_, seven, one_)",
    "softmax": "m = Softmax <axis = 1> (c)",
    "mean_of_channels": "r = ReduceMean (c, one_)\nm = Expand (r, shape)",
}


@pytest.mark.parametrize("form", LEFT)
def test_what_does_not_commute_is_left(form: str) -> None:
    text = f"""(float[N,3,4,4] x, float[1,6,1,1] x6) => (y) {{
        c = Conv (x, w1, b)
        {LEFT[form]}
        y = Conv (m, w2) }}"""
    plain = model(
        f"g {text}",
        weights={"w1": (6, 3, 1, 1), "b": (6,), "w2": (4, 6, 1, 1)},
        constants={"zero": 0.0, "six": 6.0, "one": 1.0}
        | {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "pad_channels": [0, 1, 0, 0, 0, 0, 0, 0]}
        | {"one_": [1], "seven": [7], "shape": [1, 6, 1, 1]},
    )
    rescaled(plain, "w1", 0)
    assert not EqualizeLayersPass()(inferred(plain)).modified


def test_outputs_of_the_graph_and_shared_weights_are_left() -> None:
    outputs = model(
        """g (float[N,5] x) => (float[N,6] r, float[N,4] y) {
            c = MatMul (x, w1)
            r = Relu (c)
            y = MatMul (r, w2) }""",
        weights={"w1": (5, 6), "w2": (6, 4)},
    )
    shared = model(
        """g (float[N,6] x) => (float[N,6] y) {
            c = MatMul (x, w)
            r = Relu (c)
            y = MatMul (r, w) }""",
        weights={"w": (6, 6)},
    )
    for plain in (outputs, shared):
        assert not EqualizeLayersPass()(inferred(plain)).modified


def test_a_shared_bias_is_copied() -> None:
    plain = model(
        """g (float[N,6] x) => (float[N,6] y) {
            c = Gemm (x, w1, b)
            r = Relu (c)
            y = Gemm (r, w2, b) }""",
        weights={"w1": (6, 6), "w2": (6, 6), "b": (6,)},
    )
    rescaled(plain, "w1", 1)
    result = check_pass(EqualizeLayersPass(), inferred(plain), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(initializer(result, "b"), initializer(plain, "b"))
    assert "b_equalized" in result.graph.initializers


def test_the_bias_of_a_dead_channel_does_not_dwarf_the_others() -> None:
    plain = model(
        """g (float[N,5] x) => (float[N,4] y) {
            c = Gemm (x, w1, b)
            r = Relu (c)
            y = Gemm (r, w2) }""",
        weights={"w1": (5, 6), "w2": (6, 4), "b": (6,)},
    )
    rescaled(plain, "w1", 1)
    first = np.array(initializer(plain, "w1"))
    first[:, 0], first[:, 1] = 0, first[:, 1] * 1e-20
    plain.graph.initializers["w1"].const_value = ir.tensor(first, name="w1")
    result = check_pass(EqualizeLayersPass(), inferred(plain), rtol=1e-4, atol=1e-4)
    factors = initializer(result, "b") / initializer(plain, "b")
    np.testing.assert_allclose(
        factors[:2], np.exp2(np.median(np.log2(factors[2:]))), rtol=1e-5
    )


# -- random chains --------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> ir.Model:
    """Three to six layers of any kind and width, with anything that commutes between them."""
    width, value = 4, "x"
    lines: list[str] = []
    weights: dict[str, tuple[int, ...]] = {}
    for index in range(draw(st.integers(3, 6))):
        kind = draw(st.sampled_from(["Conv", "ConvTranspose", "depthwise", "grouped"]))
        size = draw(st.sampled_from([1, 3]))
        wide = width if kind == "depthwise" else draw(st.sampled_from([2, 4, 6]))
        groups = {"depthwise": width, "grouped": 2}.get(kind, 1)
        shape = (wide, width // groups, size, size)
        if kind == "ConvTranspose":
            shape = (width, wide, size, size)
        weights |= {f"w{index}": shape, f"b{index}": (wide,)}
        operator = "ConvTranspose" if kind == "ConvTranspose" else "Conv"
        bias = f", b{index}" if draw(st.booleans()) else ""
        pads = str(size // 2)
        lines.append(
            f"c{index} = {operator} <group = {groups}, pads = [{', '.join([pads] * 4)}]>"
            f" ({value}, w{index}{bias})"
        )
        value = f"c{index}"
        activation = draw(st.sampled_from(["", "Relu", "LeakyRelu", "Clip"]))
        if activation:
            limits = ", zero" if activation == "Clip" else ""
            lines.append(f"r{index} = {activation} ({value}{limits})")
            value = f"r{index}"
        width = wide
    lines.append(f"y = Neg ({value})")
    text = "g (float[N,4,5,5] x) => (y) {\n" + "\n".join(lines) + "}"
    plain = model(text, weights=weights, constants={"zero": 0.0})
    for index, name in enumerate(weights):
        if name.startswith("w"):
            rescaled(plain, name, 0, index + draw(st.integers(0, 100)))
    return inferred(plain)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chains())
def test_chains_of_any_layers_compute_the_same(plain: ir.Model) -> None:
    result = plain.clone()
    modified = EqualizeLayersPass()(result).modified
    feeds = random_feeds(plain)
    (before,), (after,) = run(plain, feeds), run(result, feeds)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())
    again = EqualizeLayersPass()(result.clone())
    assert not again.modified
    assert modified


# -- biases of their own --------------------------------------------------------------------


def test_each_layer_gets_a_bias_of_its_own() -> None:
    plain = inferred(
        model(
            """g (float[N,4,5,5] x) => (y) {
                c1 = Conv (x, w1, b)
                c2 = ConvTranspose <group = 2> (c1, w2)
                f = Flatten (c2)
                g1 = Gemm (f, w3)
                m = MatMul (g1, w4)
                a = Add (b, m)
                y = MatMul (a, w4) }""",
            weights={"w1": (4, 4, 1, 1), "b": (4,), "w2": (4, 2, 1, 1), "w3": (100, 4)}
            | {"w4": (4, 4)},
        )
    )
    result = check_pass(SeparateBiasesPass(), plain)
    biases = {
        node.outputs[0].name: str(node.inputs[2] and node.inputs[2].name)
        for node in result.graph
        if node.op_type in ("Conv", "ConvTranspose", "Gemm")
    }
    assert biases == {"c1": "b_separate", "c2": "w2_bias", "g1": "w3_bias"}
    addition = next(node for node in result.graph if node.op_type == "Add")
    assert [value.name for value in addition.inputs if value is not None] == ["b", "m"]
    assert [initializer(result, name).shape for name in ("w2_bias", "w3_bias")] == [(4,), (4,)]


def test_a_real_chain_runs_at_every_level() -> None:
    plain = canonicalise(SCALED["depthwise"].build())
    result = plain.clone()
    EqualizeLayersPass()(result)
    feeds = random_feeds(plain)
    (before,), (after,) = (
        run_session(make_session(each), ["y"], feeds) for each in (plain, result)
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
