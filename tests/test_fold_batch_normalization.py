"""Normalizations move into layers through what lies between them."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.passes._rearranging import backwards, channels, forwards
from onnx_fliqs.passes.fold_batch_normalization import FoldBatchNormalizationPass
from onnx_fliqs.passes.fold_leading_batch_normalization import (
    FoldLeadingBatchNormalizationPass,
)
from pass_models import CASES
from support import model, ops, random_feeds, run


def inferred(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def reshape(source: list[int | str], target: list[int | str]) -> ir.Node:
    """A Reshape between values of these shapes, its target not constant."""
    x = ir.val("x", ir.DataType.FLOAT, source)
    node = ir.node("Reshape", [x, ir.val("shape")])
    node.outputs[0].shape = ir.Shape(target)
    return node


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Two shapes of as many elements, and which axes of the first the numbers vary along."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def grouped() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(0, len(factors)))) | {0, len(factors)})
        return [int(np.prod(factors[a:b])) for a, b in itertools.pairwise(cuts)]

    source, target = grouped(), grouped()
    shape = tuple(size if draw(st.booleans()) else 1 for size in source)
    return source, target, shape


@settings(max_examples=200, deadline=None, derandomize=True)
@given(reshapes())
def test_numbers_follow_a_reshape(drawn: tuple[list[int], list[int], tuple[int, ...]]) -> None:
    source, target, shape = drawn
    array = np.random.default_rng(0).standard_normal(shape)
    moved = forwards(reshape(list(source), list(target)), array)
    back = backwards(reshape(list(target), list(source)), array)
    assert moved is not None
    assert back is not None
    want = np.broadcast_to(array, source).reshape(target)
    np.testing.assert_array_equal(np.broadcast_to(moved, target), want)
    np.testing.assert_array_equal(moved, back)


@pytest.mark.parametrize(
    ("source", "target", "shape", "expected"),
    [
        (["N", 4, 2], ["N", 8], (1, 4, 1), (1, 8)),
        (["N", 4, "H"], ["N", "M"], (1, 4, 1), None),
        (["N", 4, "H"], ["N", "M"], (1, 1, 1), (1, 1)),
        (["N", "T", 4], ["M", 4], (1, 1, 4), (1, 4)),
        (["M", 4], ["N", "T", 4], (1, 4), (1, 1, 4)),
        (["N", 4], ["N", 4, 1, 1], (1, 4), (1, 4, 1, 1)),
        ([4, "N"], [1, 4, "N"], (4, 1), (1, 4, 1)),
        (["N", 4, 1, 1], ["K", 4], (1, 4, 1, 1), (1, 4)),
        (["N", 4], ["N", 2, 2], (7, 1), (7, 1, 1)),
        (["N", 4], ["K", 2, 2], (7, 1), (7, 1, 1)),
        (["N", 4], ["K", "L"], (1, 4), None),
    ],
)
def test_unknown_sizes_in_a_reshape(
    source: list[int | str],
    target: list[int | str],
    shape: tuple[int, ...],
    expected: tuple[int, ...] | None,
) -> None:
    array = np.random.default_rng(0).standard_normal(shape)
    moved = forwards(reshape(source, target), array)
    assert (None if moved is None else moved.shape) == expected


def test_channels_are_one_axis() -> None:
    array = np.arange(4.0).reshape(1, 4, 1)
    assert channels(np.broadcast_to(array, (1, 4, 3)), 1) is not None
    assert channels(array, 0) is None
    assert channels(array, -4) is None
    ones = channels(np.ones((1, 4, 3)), 0)
    assert ones is not None
    assert ones.shape == (1,)


def test_matmul_gets_a_bias_by_the_name_of_its_weight() -> None:
    result = inferred(CASES["matmul_bn"].build())
    FoldBatchNormalizationPass()(result)
    assert {"w", "w_bias"} <= set(result.graph.initializers)
    assert ops(result) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (  # BatchNormalization varies along an axis that the addend broadcasts
            """g (float[N,3] x) => (float[N,4,4] y) {
            c = MatMul (x, w)
            u = Unsqueeze (c, one)
            d = Add (u, k)
            y = BatchNormalization (d, s, b, m, var) }""",
            {"w": (3, 4), "k": (4, 1)},
        ),
        (  # the addend has an axis more than the product, whose rows are normalized
            """g (float[4,3] x) => (float[2,4,5] y) {
            c = MatMul (x, w)
            d = Add (c, k)
            y = BatchNormalization (d, s, b, m, var) }""",
            {"w": (3, 5), "k": (2, 1, 5)},
        ),
        (  # something else reads what is added
            """g (float[N,3] x) => (float[N,4] y, float[N,4] z) {
            c = MatMul (x, w)
            z = Add (c, k)
            y = BatchNormalization (z, s, b, m, var) }""",
            {"w": (3, 4), "k": (4,)},
        ),
        (  # the layer is outside, the normalization in a branch
            """g (float[N,3] x, bool t) => (float[N,4] y) {
            c = MatMul (x, w)
            y = If (t) <
                then_branch = f () => (float[N,4] p) {
                    p = BatchNormalization (c, s, b, m, var) },
                else_branch = e () => (float[N,4] q) { q = Neg (c) }> }""",
            {"w": (3, 4)},
        ),
        (  # the axis of a left constant does not exist in a product with a vector
            """g (float[3] x) => (float[1,4] y) {
            c = MatMul (w, x)
            u = Unsqueeze (c, zero)
            y = BatchNormalization (u, s, b, m, var) }""",
            {"w": (4, 3)},
        ),
    ],
)
def test_what_does_not_commute_stays(text: str, weights: dict[str, tuple[int, ...]]) -> None:
    further: dict[str, tuple[int, ...]] = dict.fromkeys(("s", "b", "m", "var"), (4,))
    original = model(text, weights=weights | further, constants={"one": [1], "zero": [0]})
    assert not FoldBatchNormalizationPass()(inferred(original)).modified


@pytest.mark.parametrize(
    "text",
    [
        """g (float[4,N] x) => (float[4,N] y) {
            n = BatchNormalization (x, s, b, m, var)
            y = Gemm (w, n) }""",
        """g (float[N,4] x) => (float[4,4] y) {
            n = BatchNormalization (x, s, b, m, var)
            y = Gemm <transA = 1> (n, v) }""",
        """g (float[N,4,4] x) => (float[N,4,4] y) {
            n = BatchNormalization (x, s, b, m, var)
            y = MatMul (n, w) }""",
        """g (float[N,4] x) => (float[N,4] y, float[N,4] n) {
            n = BatchNormalization (x, s, b, m, var)
            y = MatMul (n, w) }""",
        """g (float[N,4] x) => (float[N,4] y) {
            n = BatchNormalization (x, s, b, m, var)
            r = Relu (n)
            y = MatMul (r, w) }""",
    ],
)
def test_what_no_layer_can_take_over_stays(text: str) -> None:
    weights = {"w": (4, 4), "v": (2, 4), "s": (4,), "b": (4,), "m": (4,), "var": (4,)}
    original = inferred(model(text, weights=weights))
    assert not FoldLeadingBatchNormalizationPass()(original).modified


def test_normalizations_in_a_loop_body_fold() -> None:
    text = """g (float[N,4] x, int64 count) => (float[N,4] y) {
        y = Loop (count, , x) <body = b (int64 i, bool c, float[N,4] a)
            => (bool go, float[N,4] r) {
            go = Identity (c)
            n = BatchNormalization (a, s, b, m, var)
            p = MatMul (n, w)
            r = BatchNormalization (p, s, b, m, var) }> }"""
    weights = {"w": (4, 4), "s": (4,), "b": (4,), "m": (4,), "var": (4,)}
    original = inferred(model(text, weights=weights))
    result = original.clone()
    FoldBatchNormalizationPass()(result)
    FoldLeadingBatchNormalizationPass()(result)
    assert ops(result) == ["Loop", "Identity", "MatMul", "Add"]
    feeds = random_feeds(original) | {"count": np.array(2)}
    for want, got in zip(run(original, feeds), run(result, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
