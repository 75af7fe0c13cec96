"""Multiplications and additions of constants disappear in the layers before them."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.fold_scaling import FoldScalingPass
from pass_models import CASES
from support import evaluate, initializer, model, ops, random_feeds


def folded(name: str) -> ir.Model:
    return FoldScalingPass()(CASES[name].build()).model


def test_chains_of_scaling_disappear() -> None:
    assert ops(folded("scaled_layers")) == ["Conv", "Gemm", "MatMul"]


def test_weights_keep_their_names() -> None:
    plain, graph = CASES["scaled_layers"].build(), folded("scaled_layers")
    scaled = initializer(plain, "w1") * initializer(plain, "f")[..., None]
    np.testing.assert_allclose(initializer(graph, "w1"), scaled, rtol=1e-6)


def test_what_would_change_shapes_or_has_no_bias_stays() -> None:
    assert ops(folded("scaling_that_stays")) == ["Conv", "Mul", "MatMul", "Add", "Mul"]


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv (x, w) y = Mul (c, zero) z = Exp (c)",  # it is read elsewhere
        "c = Conv (x, w) y = Div (c, zero) z = Exp (x)",
        "c = Conv (x, w) y = Div (one, c) z = Exp (x)",
        "c = Conv (x, w) y = Sub (one, c) z = Exp (x)",
        "c = Conv (x, w) y = Mul (c, x) z = Exp (x)",
        "c = Conv (x, x) y = Mul (c, one) z = Exp (x)",
        "c = Conv (x, w) y = Mul (c, image) z = Exp (x)",
    ],
)
def test_anything_else_stays(body: str) -> None:
    plain = model(
        f"""g (float[2,2,1,1] x) => (float[A,B,C,D] y, float[2,2,1,1] z)
            <float zero = {{0.0}}, float one = {{1.0}}> {{ {body} }}""",
        weights={"w": (2, 2, 1, 1), "image": (1, 1, 3, 3)},
    )
    before = ops(plain)
    result = FoldScalingPass()(plain)
    assert (ops(result.model), result.modified) == (before, False)


def test_a_weight_that_another_layer_reads_is_copied() -> None:
    plain = model(
        """g (float[N,2,4,4] x) => (float[N,2,4,4] y, float[N,2,4,4] z) {
            c = Conv (x, w)
            y = Mul (c, f)
            z = Conv (x, w) }""",
        weights={"w": (2, 2, 1, 1), "f": (2, 1, 1)},
    )
    graph = FoldScalingPass()(plain.clone()).model
    assert set(graph.graph.initializers) >= {"w", "w_y"}
    for want, got in zip(*evaluate([plain, graph], random_feeds(plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_canonical_model_has_operators_with_integer_kernels() -> None:
    graph = canonicalise(CASES["sums_and_means"].build())
    assert ops(graph) == ["Add", "Add", "GlobalAveragePool", "Flatten", "GlobalAveragePool"]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [("N,2,4", [1, 2]), ("N,2,4,4", [1, 2]), ("N,2,4,4", [2]), ("N,2,4,4", [1, 2, 3])],
)
def test_other_means_stay(shape: str, axes: list[int]) -> None:
    plain = model(
        f"g (float[{shape}] x) => (float y) {{ m = ReduceMean (x, axes) y = Exp (m) }}",
        constants={"axes": axes},
    )
    assert ops(canonicalise(plain)) == ["ReduceMean", "Exp"]
