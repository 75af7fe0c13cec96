"""Which weights are trained, that their gradients are right, and what stops the others."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.insert_search_sites import InsertSearchSitesPass
from onnx_fliqs.sites import Layer
from onnx_fliqs.targets import TARGETS
from onnx_fliqs.trainability import trainable_parameters, why_frozen
from support import HEADER, PRECISIONS, Feeds, initializer, model, random_feeds, session

# A graph, its initializers, and those that are trained.
PARAMETERS: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "gemm": (
        (
            "g (float[2,4] x) => (float[2,3] y) {"
            " y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }"
        ),
        {"w": (3, 4), "b": (3,)},
        ["w", "b"],
    ),
    "gemm_of_a_transpose_with_a_row": (
        "g (float[4,2] x) => (float[2,3] y) { y = Gemm <transA = 1> (x, w, b) }",
        {"w": (4, 3), "b": (1, 3)},
        ["w", "b"],
    ),
    "gemm_from_the_left": (
        "g (float[4,2] x) => (float[3,2] y) { y = Gemm (w, x) }",
        {"w": (3, 4)},
        ["w"],
    ),
    "grouped_strided_padded_conv": (
        (
            "g (float[2,4,5,5] x) => (float[2,6,3,3] y) {"
            " y = Conv <group = 2, pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b) }"
        ),
        {"w": (6, 2, 3, 3), "b": (6,)},
        ["w", "b"],
    ),
    "dilated_conv": (
        (
            "g (float[2,2,7,7] x) => (float[2,3,3,3] y) {"
            " y = Conv <dilations = [2, 2]> (x, w, b) }"
        ),
        {"w": (3, 2, 3, 3), "b": (3,)},
        ["w", "b"],
    ),
    "conv_of_one_dimension": (
        "g (float[2,4,9] x) => (float[2,3,7] y) { y = Conv (x, w, b) }",
        {"w": (3, 4, 3), "b": (3,)},
        ["w", "b"],
    ),
    "conv_with_same_padding": (
        (
            "g (float[2,4,5,5] x) => (float[2,3,3,3] y) {"
            ' y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w, b) }'
        ),
        {"w": (3, 4, 2, 2), "b": (3,)},
        ["w", "b"],
    ),
    "matmul_bias": (
        "g (float[5,2,4] x) => (float[5,2,3] y) { a = MatMul (x, w) y = Add (b, a) }",
        {"w": (4, 3), "b": (3,)},
        ["w", "b"],
    ),
    "stack_of_matrices": (
        "g (float[5,2,4] x) => (float[5,2,3] y) { y = MatMul (x, w) }",
        {"w": (1, 4, 3)},
        ["w"],
    ),
    "layernormalization": (
        (
            "g (float[2,4] x) => (float[2,4] y) {"
            " a = MatMul (x, w) y = LayerNormalization (a, s, b) }"
        ),
        {"w": (4, 4), "s": (4,), "b": (4,)},
        ["w", "s", "b"],
    ),
    "layernormalization_without_bias": (
        (
            "g (float[2,4] x) => (float[2,4] y) {"
            " a = MatMul (x, w) y = LayerNormalization (a, s) }"
        ),
        {"w": (4, 4), "s": (4,)},
        ["w", "s"],
    ),
    "an_addend_that_is_no_bias_and_a_factor_stay": (
        (
            "g (float[2,4] x) => (float[2,4] y) {"
            " a = MatMul (x, w) m = Mul (a, s) y = Add (m, b) }"
        ),
        {"w": (4, 4), "s": (4,), "b": (4,)},
        ["w"],
    ),
    "up": (
        "g (float[2,4,3,3] x) => (float[2,3,5,5] y) { y = ConvTranspose (x, w, b) }",
        {"w": (4, 3, 3, 3), "b": (3,)},
        ["w", "b"],
    ),
    "matrix_times_vector": (
        "g (float[5,4] x) => (float[5] y) { y = MatMul (x, w) }",
        {"w": (4,)},
        ["w"],
    ),
    "conv_of_free_size_with_same_padding": (
        (
            "g (float[N,3,H,W] x) => (float[N,2,H,W] y) {"
            ' y = Conv <auto_pad = "SAME_UPPER"> (x, w) }'
        ),
        {"w": (2, 3, 3, 3)},
        ["w"],
    ),
    "bias_of_a_conv": (
        "g (float[2,3,4,4] x) => (float[2,2,4,4] y) { a = Conv (x, w) y = Add (a, b) }",
        {"w": (2, 3, 1, 1), "b": (2, 1, 1)},
        ["w", "b"],
    ),
    "slope": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = PRelu (x, s) }",
        {"s": (3, 1)},
        ["s"],
    ),
    "instancenormalization": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = InstanceNormalization (x, s, b) }",
        {"s": (3,), "b": (3,)},
        ["s", "b"],
    ),
    "groupnormalization": (
        (
            "g (float[2,4,3] x) => (float[2,4,3] y) {"
            " y = GroupNormalization <num_groups = 2> (x, s, b) }"
        ),
        {"s": (4,), "b": (4,)},
        ["s", "b"],
    ),
    "batchnormalization_that_cannot_be_folded": (
        (
            "g (float[2,3,4,4] x) => (float[2,3,4,4] y) {"
            " a = Relu (x) y = BatchNormalization (a, s, b, m, var) }"
        ),
        {"s": (3,), "b": (3,), "m": (3,), "var": (3,)},
        ["y_scale", "y_offset"],
    ),
    "embedding": (
        "g (int64[2,3] i) => (float[2,3,5] y) { y = Gather (w, i) }",
        {"w": (4, 5)},
        ["w"],
    ),
    "columns_and_volumes_are_no_embedding": (
        """g (int64[2,3] i, float[2,4] x) => (float[2,2] y) {
            a = Gather <axis = 1> (t, i) b = Gather (v, i) m = ReduceMean <keepdims = 0> (a)
            n = ReduceMean <keepdims = 0> (b) c = MatMul (x, w) d = Add (m, n)
            y = Mul (c, d) }""",
        {"t": (4, 5), "v": (2, 2, 2), "w": (4, 2)},
        ["w"],
    ),
    "diagonals": (
        'g (float[2,4] x) => (float[2,4] y) { y = Einsum <equation = "bi,ii->bi"> (x, w) }',
        {"w": (4, 4)},
        ["w"],
    ),
    "cell": (
        """g (float[3,2,2] x) => (float[3,1,2,2] y, float[1,2,2] h) {
            y, h = LSTM <hidden_size = 2> (x, w, r, b) }""",
        {"w": (1, 8, 2), "r": (1, 8, 2), "b": (1, 16)},
        ["w", "r", "b"],
    ),
}


def with_loss(canonical: ir.Model, names: Sequence[str], output: str = "y") -> ir.Model:
    """The mean square of an output as the loss, with trainable weights as inputs."""
    graph = canonical.clone()
    AddLossPass([LossTerm(kind=LossKind.SQUARED_ERROR, output=output, scores=output)])(graph)
    promote_initializers(graph, names)
    return graph


def differentiate(
    canonical: ir.Model, output: str = "y"
) -> tuple[Feeds, Feeds, onnx.ModelProto]:
    """Feeds, the gradient of each parameter, and the gradient graph."""
    names = trainable_parameters(canonical, [output])
    built = build_gradient(with_loss(canonical, names, output), LOSS, names)
    feeds = random_feeds(canonical, 1)
    plain = session(ir.to_proto(canonical).SerializeToString())
    (value,) = plain.run([output], feeds)
    feeds |= {name: np.asarray(initializer(canonical, name)) for name in names}
    feeds[teacher_input(output)] = np.zeros_like(value)
    runner = session(built.SerializeToString())
    needed = {value.name for value in runner.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in needed}
    flat = runner.run([GRADIENT], feeds)[0]
    ends = np.cumsum([feeds[name].size for name in names])[:-1]
    gradients: Feeds = {
        name: part.reshape(feeds[name].shape)
        for name, part in zip(names, np.split(flat, ends), strict=True)
    }
    return feeds, gradients, built


def assert_slopes(canonical: ir.Model) -> None:
    """The gradient of each parameter is the slope of the loss in a random direction."""
    feeds, gradients, built = differentiate(canonical)
    runner = session(built.SerializeToString())
    rng = np.random.default_rng(0)
    for name, gradient in gradients.items():
        step = 2e-3 * rng.standard_normal(gradient.shape).astype(np.float32)
        after, before = (
            float(runner.run([LOSS], feeds | {name: feeds[name] + sign * step})[0])
            for sign in (1, -1)
        )
        assert np.any(gradient)
        # Central differences of float32 losses: their third derivative and their last bits.
        slope = (after - before) / (2 * 2e-3)
        expected = np.vdot(gradient, step) / 2e-3
        np.testing.assert_allclose(expected, slope, rtol=2e-2, atol=2e-3)


def layers_of(canonical: ir.Model) -> Sequence[Layer]:
    return find_layers(canonical, TARGETS["generic"], [PRECISIONS["int8"]]).layers


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_gradients_of_parameters_are_the_slopes_of_the_loss(name: str) -> None:
    text, weights, expected = PARAMETERS[name]
    canonical = canonicalise(model(text, weights=weights))
    assert list(trainable_parameters(canonical, ["y"])) == expected
    assert_slopes(canonical)


# -- where the gradient stops ---------------------------------------------------------------

_BRANCH = """If (c) <
    then_branch = t () => (float[2,4] p) { p = Exp (a) },
    else_branch = e () => (float[2,4] q) { q = Neg (a) }>"""

# What follows the first layer, up to b, and the reason for which that layer is frozen; then
# comes a second layer.
STOPPING: dict[str, tuple[str, str]] = {
    "rounding": ("b = Round (a)", "Round (its derivative is zero)"),
    "integers": (
        "i = Cast <to = 7> (a) b = Cast <to = 1> (i)",
        "Cast (it rounds to integers)",
    ),
    "indices": (
        "i = ArgMax <axis = 1, keepdims = 0> (a) b = Gather (t, i)",
        "the indices of Gather",
    ),
    "places": (
        "v1, i = TopK (a, four) b = Cast <to = 1> (i)",
        "TopK (its result is an integer)",
    ),
    "condition": ("z = Greater (a, x) b = Where (z, x, v)", "the condition of Where"),
    "branch": (f"b = {_BRANCH}", "If (it is control flow)"),
    "foreign": (
        'b = com.microsoft.CDist <metric = "sqeuclidean"> (a, v)',
        "CDist (it is an operator of com.microsoft)",
    ),
    "peepholes": (
        """s = Unsqueeze (a, zero) b3, h3 = LSTM <hidden_size = 4> (s, l, l, , , , , p)
        b = Squeeze (h3, zero)""",
        "LSTM (it has peepholes)",
    ),
    "two_ways": (
        "d = Floor (a) e = Sign (a) b = Add (d, e)",
        "Floor (its derivative is zero) or Sign (its derivative is zero)",
    ),
}


def stopping(name: str, ending: str) -> ir.Model:
    condition = ", bool c" if name == "branch" else ""
    return canonicalise(
        model(
            f"""g (float[2,4] x{condition}) => (float[2,4] y) {{
                [first] a = MatMul (x, w1)
                {STOPPING[name][0]}
                [second] d0 = MatMul (b, w2)
                {ending} }}""",
            header=HEADER.replace("]>", ', "com.microsoft" : 1]>'),
            weights={
                "w1": (4, 4),
                "w2": (2 if name == "foreign" else 4, 4),
                "v": (2, 4),
                "t": (4, 4),
                "l": (1, 16, 4),
                "p": (1, 12),
            },
            constants={"zero": [0], "four": [4]},
        )
    )


@pytest.mark.parametrize("name", STOPPING)
def test_a_layer_before_what_has_no_gradient_is_frozen_and_told_why(name: str) -> None:
    canonical = stopping(name, "y = Relu (d0)")
    assert "w1" not in trainable_parameters(canonical, ["y"])
    assert "w2" in trainable_parameters(canonical, ["y"])
    reasons = why_frozen(canonical, layers_of(canonical), ["y"])
    assert reasons["first"] == f"no gradient comes through {STOPPING[name][1]}"
    assert "second" not in reasons
    assert_slopes(canonical)


@pytest.mark.parametrize("name", STOPPING)
def test_a_residual_path_still_trains_what_is_partly_blocked(name: str) -> None:
    canonical = stopping(name, "y = Add (d0, a)")
    assert {"w1", "w2"} <= set(trainable_parameters(canonical, ["y"]))
    assert "first" not in why_frozen(canonical, layers_of(canonical), ["y"])
    feeds, gradients, _ = differentiate(canonical)
    # By hand: y = d0 + x w1, with d0 constant; the loss is the mean of y^2.
    plain = session(ir.to_proto(canonical).SerializeToString())
    inputs = {value.name for value in plain.get_inputs()}
    (y,) = plain.run(
        ["y"], {k: v for k, v in random_feeds(canonical, 1).items() if k in inputs}
    )
    expected = feeds["x"].T @ (2 * np.asarray(y) / np.size(y))
    np.testing.assert_allclose(gradients["w1"], expected, rtol=1e-4, atol=1e-5)


def test_a_stop_beside_a_differentiable_node_of_the_same_kind() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,4] x) => (float[2,4] y) {
                [first] a = MatMul (x, w1)
                [second] b = MatMul (x, w2)
                i = Cast <to = 7> (a)
                f = Cast <to = 1> (i)
                d = Cast <to = 11> (b)
                e = Cast <to = 1> (d)
                y = Add (e, f) }""",
            weights={"w1": (4, 4), "w2": (4, 4)},
        )
    )
    assert trainable_parameters(canonical, ["y"]) == ("w2",)
    assert_slopes(canonical)


def test_a_layer_that_itself_has_no_gradient_says_so() -> None:
    canonical = canonicalise(
        model(
            """g (float[N,4,H,W] x) => (float[N,3,5,5] y) {
                [up] y = ConvTranspose <output_shape = [5, 5]> (x, w) }""",
            weights={"w": (4, 3, 3, 3)},
        )
    )
    assert trainable_parameters(canonical, ["y"]) == ()
    assert why_frozen(canonical, layers_of(canonical), ["y"]) == {
        "up": (
            "no gradient comes through ConvTranspose"
            " (it has an output_shape, but the size of its input is not known)"
        )
    }


def test_layers_in_a_body_are_frozen() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,4] x, bool c) => (float[2,4] y) {
                y = If (c) <
                    then_branch = t () => (float[2,4] p) { [inner] p = MatMul (x, w1) },
                    else_branch = e () => (float[2,4] q) { q = Neg (x) }> }""",
            weights={"w1": (4, 4)},
        )
    )
    layers = [
        Layer(name="inner", op_type="MatMul", weights=("w1",), params=16, weight_only="inside")
    ]
    assert trainable_parameters(canonical, ["y"]) == ()
    assert why_frozen(canonical, layers, ["y"]) == {
        "inner": "no gradient comes through If (it is control flow)"
    }


def test_what_the_loss_does_not_judge_is_frozen() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
                [trunk] a = MatMul (x, w1)
                [one] y = MatMul (a, w2)
                [two] z = MatMul (a, w3) }""",
            weights={"w1": (4, 4), "w2": (4, 4), "w3": (4, 4)},
        )
    )
    assert trainable_parameters(canonical, ["y"]) == ("w1", "w2")
    assert why_frozen(canonical, layers_of(canonical), ["y"]) == {
        "two": "no output of the loss depends on it"
    }
    assert trainable_parameters(canonical, ["y", "z"]) == ("w1", "w2", "w3")


def test_the_product_of_activations_has_nothing_to_freeze() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,3,3] x) => (float[2,3,3] y) {
                [square] a = MatMul (x, x)
                y = Round (a) }"""
        )
    )
    assert why_frozen(canonical, layers_of(canonical), ["y"]) == {}


@pytest.mark.parametrize("target", ["generic", "ort-cpu", "vitis-ai"])
@pytest.mark.parametrize("name", ["rounding", "branch", "peepholes"])
def test_sites_pass_the_gradient_on_around_a_stop(target: str, name: str) -> None:
    canonical = stopping(name, "y = Add (d0, a)")
    space = find_layers(
        canonical, TARGETS[target], [PRECISIONS["int8"], PRECISIONS["float32"]]
    )
    feeds, plain, _ = differentiate(canonical)
    names = trainable_parameters(canonical, ["y"])
    InsertSearchSitesPass(space)(canonical)
    graph = with_loss(canonical, names)
    built = build_gradient(graph, LOSS, names)
    runner = session(built.SerializeToString())
    needed = {value.name for value in runner.get_inputs()}
    flat = runner.run([GRADIENT], {k: v for k, v in feeds.items() if k in needed})[0]
    # At float32 a site is the identity, and so is its gradient.
    np.testing.assert_array_equal(flat, np.concatenate([g.ravel() for g in plain.values()]))


def test_other_outputs_cost_the_gradient_nothing() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,4] x) => (float[2,4] y, float[2,4] z) {
                a = MatMul (x, w1)
                y = Relu (a)
                b = MatMul (a, w2)
                z = Exp (b) }""",
            weights={"w1": (4, 4), "w2": (4, 4)},
        )
    )
    _, _, built = differentiate(canonical)
    assert "Exp" not in {node.op_type for node in built.graph.node}
