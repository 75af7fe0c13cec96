"""Which weights are trained, and that the gradients of all of them are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import FORMATS
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.expose_optional_outputs import ExposeOptionalOutputsPass
from onnx_fliqs.passes.insert_search_sites import InsertSearchSitesPass
from onnx_fliqs.site_functions import gradient_functions
from onnx_fliqs.targets import TARGETS
from onnx_fliqs.trainability import stopped_operators, trainable_parameters, why_frozen
from support import Feeds, initializer, model, random_feeds, session


@dataclass(frozen=True, slots=True)
class Graph:
    """A layer ``a = x w`` and what follows it, up to ``y``."""

    text: str
    constants: Mapping[str, float | Sequence[int]]
    image: bool = False
    rank: int = 2

    def build(self) -> ir.Model:
        shape, layer = ("2,2,4,4", "Conv") if self.image else ("2,4", "MatMul")
        output = ",".join("ABCD"[: self.rank])
        text = f"g (float[{shape}] x) => (float[{output}] y) {{ [first] a = {layer} (x, w)"
        weights = {"w": (4, 2, 1, 1) if self.image else (4, 4)}
        return canonicalise(
            model(f"{text} {self.text} }}", weights=weights, constants=self.constants)
        )


def matrix(text: str, rank: int = 2, **constants: float | Sequence[int]) -> Graph:
    return Graph(text, constants, rank=rank)


def image(text: str, rank: int = 4) -> Graph:
    return Graph(text, {}, image=True, rank=rank)


_ONES = "i = Constant <value = int64[1,2] {0, 1}> () "

# Every operator that is taken for differentiable, in its variants.
TRAINED: dict[str, Graph] = {
    "abs": matrix("y = Abs (a)"),
    "add": matrix("y = Add (a, x)"),
    "averagepool": image("y = AveragePool <kernel_shape = [2, 2]> (a)"),
    "averagepool_padded": image(
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (a)"
    ),
    "averagepool_counting_pads": image(
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1],"
        " count_include_pad = 1> (a)"
    ),
    "averagepool_ceil": image(
        "y = AveragePool <kernel_shape = [3, 3], ceil_mode = 1, strides = [2, 2]> (a)"
    ),
    "cast": matrix("b = Cast <to = 11> (a) c = Exp (b) y = Cast <to = 1> (c)"),
    "clip": matrix("y = Clip (a, lo, hi)", lo=-0.5, hi=0.5),
    "concat": matrix("y = Concat <axis = 1> (a, x)"),
    "div": matrix("b = Exp (x) y = Div (a, b)"),
    "divisor": matrix("b = Exp (a) y = Div (x, b)"),
    "erf": matrix("y = Erf (a)"),
    "exp": matrix("y = Exp (a)"),
    "expand": matrix("b = Unsqueeze (a, i) y = Expand (b, s)", 3, i=[0], s=[3, 2, 4]),
    "flatten": image("y = Flatten (a)", 2),
    "gather": matrix("y = Gather <axis = 1> (a, i)", i=[0, 2, 2]),
    "gatherelements": matrix(_ONES + "y = GatherElements <axis = 1> (a, i)"),
    "gathernd": matrix(_ONES + "y = GatherND (a, i)", 1),
    "gelu": matrix("y = Gelu (a)"),
    "gelu_tanh": matrix('y = Gelu <approximate = "tanh"> (a)'),
    "globalaveragepool": image("y = GlobalAveragePool (a)"),
    "leakyrelu": matrix("y = LeakyRelu <alpha = 0.3> (a)"),
    "log": matrix("b = Exp (a) y = Log (b)"),
    "logsoftmax": matrix("y = LogSoftmax <axis = 0> (a)"),
    "max": matrix("z = Neg (x) y = Max (a, x, z)"),
    "maxpool": image("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)"),
    "maxpool_ceil": image(
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (a)"
    ),
    "min": matrix("z = Neg (x) y = Min (a, x, z)"),
    "mul": matrix("y = Mul (a, x)"),
    "neg": matrix("y = Neg (a)"),
    "pad": matrix("y = Pad (a, p)", p=[0, 1, 0, 2]),
    "pad_cropping": matrix("y = Pad (a, p)", p=[0, -1, 0, 2]),
    "pow": matrix("b = Exp (a) y = Pow (b, e)", e=1.5),
    "reciprocal": matrix("b = Exp (a) y = Reciprocal (b)"),
    "reducel2": matrix("y = ReduceL2 (a, i)", i=[1]),
    "reducelogsumexp": matrix("y = ReduceLogSumExp (a, i)", i=[1]),
    "reducemean": matrix("y = ReduceMean (a, i)", i=[0]),
    "reducesum_of_all": matrix("y = ReduceSum (a)"),
    "relu": matrix("y = Relu (a)"),
    "reshape": matrix("y = Reshape (a, s)", s=[4, 2]),
    "reshape_to_a_computed_shape": matrix("s = Shape (a) z = Reshape (x, s) y = Add (a, z)"),
    "scatternd": matrix(
        "i = Constant <value = int64[1,1] {0}> ()"
        " u = Constant <value = float[1,4] {1, 2, 3, 4}> () y = ScatterND (a, i, u)"
    ),
    "sigmoid": matrix("y = Sigmoid (a)"),
    "slice": matrix("y = Slice (a, s, e, i, t)", s=[0], e=[4], i=[1], t=[2]),
    "softmax": image("y = Softmax <axis = 1> (a)"),
    "split": matrix("p, q = Split <axis = 1> (a, s) y = Mul (p, q)", s=[2, 2]),
    "sqrt": matrix("b = Exp (a) y = Sqrt (b)"),
    "squeeze": matrix("b = Unsqueeze (a, i) c = Exp (b) y = Squeeze (c, i)", i=[0]),
    "sub": matrix("y = Sub (x, a)"),
    "tanh": matrix("y = Tanh (a)"),
    "tile": matrix("y = Tile (a, r)", r=[1, 2]),
    "transpose": matrix("y = Transpose (a)"),
    "where": matrix("c = Greater (x, a) y = Where (c, a, x)"),
    "weight_used_twice": matrix("r = Tanh (a) y = MatMul (r, w)"),
}

# Whole graphs, for what layers and normalisations train.
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
}


def with_loss(canonical: ir.Model, output: str = "y") -> onnx.ModelProto:
    """The mean square of an output as the loss, with trainable weights as inputs."""
    graph = canonical.clone()
    AddLossPass([LossTerm(kind=LossKind.SQUARED_ERROR, output=output, scores=output)])(graph)
    ExposeOptionalOutputsPass()(graph)
    for function in gradient_functions():
        graph.functions[function.identifier()] = function
    proto = ir.to_proto(graph)
    promote_initializers(proto, trainable_parameters(canonical, [output]))
    return proto


def differentiate(
    canonical: ir.Model, output: str = "y"
) -> tuple[Feeds, Feeds, onnx.ModelProto]:
    """Feeds, the gradient of each parameter, and the gradient graph."""
    names = trainable_parameters(canonical, [output])
    proto = with_loss(canonical, output)
    built = build_gradient(proto, LOSS, names, stopped_operators(canonical, [output]))
    feeds = random_feeds(canonical, 1)
    feeds |= {name: np.asarray(initializer(canonical, name)) for name in names}
    plain = session(ir.to_proto(canonical).SerializeToString())
    inputs = {value.name for value in plain.get_inputs()}
    (value,) = plain.run([output], {k: v for k, v in feeds.items() if k in inputs})
    feeds[teacher_input(output)] = np.zeros_like(value)
    flat = session(built.SerializeToString()).run([GRADIENT], feeds)[0]
    sizes = np.cumsum([feeds[name].size for name in names])[:-1]
    parts = np.split(flat, sizes)
    gradients: Feeds = {
        name: part.reshape(feeds[name].shape) for name, part in zip(names, parts, strict=True)
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


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_through_an_operator_is_the_slope_of_the_loss(name: str) -> None:
    canonical = TRAINED[name].build()
    assert trainable_parameters(canonical, ["y"]) == ("w",)
    assert_slopes(canonical)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_gradients_of_parameters_are_the_slopes_of_the_loss(name: str) -> None:
    text, weights, expected = PARAMETERS[name]
    canonical = canonicalise(model(text, weights=weights))
    assert list(trainable_parameters(canonical, ["y"])) == expected
    assert stopped_operators(canonical, ["y"]) == ()
    assert_slopes(canonical)


# -- where the gradient stops ---------------------------------------------------------------

_BRANCH = """If (c) <
    then_branch = t () => (float[2,4] p) { p = Exp (a) },
    else_branch = e () => (float[2,4] q) { q = Neg (a) }>"""

# What follows the first layer, up to b; then comes a second layer.
STOPPING: dict[str, tuple[str, str]] = {
    "hardswish": ("b = HardSwish (a)", "HardSwish"),
    "cumsum": ("b = CumSum (a, one)", "CumSum"),
    "sum": ("b = Sum (a, x)", "Sum"),
    "prelu": ("b = PRelu (a, x)", "PRelu"),
    "reducemax": ("m = ReduceMax (a) b = Mul (m, x)", "ReduceMax"),
    "cast_to_integers": ("i = Cast <to = 7> (a) b = Cast <to = 1> (i)", "Cast"),
    "padding_by_reflection": (
        'f = Pad <mode = "reflect"> (a, pads) b = Slice (f, one, five, one)',
        "Pad",
    ),
    "slicing_backwards": ("b = Slice (a, three, least, one, back)", "Slice"),
    "concat_of_the_same": (
        "f = Concat <axis = 0> (a, a) b = Slice (f, one, three, zero)",
        "Concat",
    ),
    "split_with_an_unread_part": (
        "p, q = Split <axis = 1> (a, halves) r = Neg (p) b = Concat <axis = 1> (p, r)",
        "Split",
    ),
    "computed_exponent": ("e = Exp (x) b = Pow (e, a)", "Pow"),
    "branch": (f"b = {_BRANCH}", "If"),
}
_INTEGERS = {
    "one": [1],
    "three": [3],
    "five": [5],
    "zero": [0],
    "least": [-9],
    "back": [-1],
    "pads": [0, 1, 0, 1],
    "halves": [2, 2],
}


def stopping(name: str, ending: str) -> ir.Model:
    condition = ", bool c" if name == "branch" else ""
    return canonicalise(
        model(
            f"""g (float[2,4] x{condition}) => (float[2,4] y) {{
                [first] a = MatMul (x, w1)
                {STOPPING[name][0]}
                [second] d = MatMul (b, w2)
                {ending} }}""",
            weights={"w1": (4, 4), "w2": (4, 4)},
            constants=_INTEGERS,
        )
    )


@pytest.mark.parametrize("name", STOPPING)
def test_a_layer_behind_what_has_no_gradient_is_frozen_and_told_why(name: str) -> None:
    canonical = stopping(name, "y = Relu (d)")
    assert trainable_parameters(canonical, ["y"]) == ("w2",)
    layers = find_layers(canonical, TARGETS["generic"], [FORMATS["int8"]]).layers
    assert why_frozen(canonical, layers, ["y"]) == {
        "first": f"behind {STOPPING[name][1]}, which ONNX Runtime cannot differentiate"
    }
    assert_slopes(canonical)


@pytest.mark.parametrize("name", STOPPING)
def test_a_residual_path_still_trains_what_is_partly_blocked(name: str) -> None:
    canonical = stopping(name, "y = Add (d, a)")
    assert trainable_parameters(canonical, ["y"]) == ("w1", "w2")
    layers = find_layers(canonical, TARGETS["generic"], [FORMATS["int8"]]).layers
    assert why_frozen(canonical, layers, ["y"]) == {}
    feeds, gradients, _ = differentiate(canonical)
    # By hand: y = d + x w1, with d constant; the loss is the mean of y^2.
    plain = session(ir.to_proto(canonical).SerializeToString())
    inputs = {value.name for value in plain.get_inputs()}
    (y,) = plain.run(["y"], {k: v for k, v in feeds.items() if k in inputs})
    expected = feeds["x"].T @ (2 * y / y.size)
    np.testing.assert_allclose(gradients["w1"], expected, rtol=1e-4, atol=1e-5)


def test_stopping_in_one_model_does_not_stop_another() -> None:
    # ONNX Runtime's registry is global: what is registered there holds for the process.
    differentiate(stopping("concat_of_the_same", "y = Relu (d)"))
    assert_slopes(TRAINED["concat"].build())


def test_a_stop_beside_a_differentiable_node_of_the_same_kind() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,4] x) => (float[2,8] y) {
                [first] a = MatMul (x, w1)
                [second] b = MatMul (x, w2)
                twice = Concat <axis = 1> (a, a)
                once = Concat <axis = 1> (b, x)
                y = Add (once, twice) }""",
            weights={"w1": (4, 4), "w2": (4, 4)},
        )
    )
    assert trainable_parameters(canonical, ["y"]) == ("w2",)
    assert_slopes(canonical)


@pytest.mark.parametrize(
    ("text", "weights", "op_type"),
    [
        (
            "g (float[2,4,3,3] x) => (float[2,3,5,5] y) { [up] y = ConvTranspose (x, w) }",
            {"w": (4, 3, 3, 3)},
            "ConvTranspose",
        ),
        ("g (float[5,4] x) => (float[5] y) { [up] y = MatMul (x, w) }", {"w": (4,)}, "MatMul"),
        (
            (
                "g (float[N,3,H,W] x) => (float[N,2,H,W] y) {"
                ' [up] y = Conv <auto_pad = "SAME_UPPER"> (x, w) }'
            ),
            {"w": (2, 3, 3, 3)},
            "Conv",
        ),
    ],
)
def test_a_layer_that_itself_has_no_gradient_says_so(
    text: str, weights: dict[str, tuple[int, ...]], op_type: str
) -> None:
    canonical = canonicalise(model(text, weights=weights))
    layers = find_layers(canonical, TARGETS["generic"], [FORMATS["int8"]]).layers
    assert trainable_parameters(canonical, ["y"]) == ()
    assert why_frozen(canonical, layers, ["y"]) == {
        "up": f"behind {op_type}, which ONNX Runtime cannot differentiate"
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
    layers = find_layers(canonical, TARGETS["generic"], [FORMATS["int8"]]).layers
    assert trainable_parameters(canonical, ["y"]) == ("w1", "w2")
    assert why_frozen(canonical, layers, ["y"]) == {
        "two": "no output of the loss depends on it"
    }
    assert trainable_parameters(canonical, ["y", "z"]) == ("w1", "w2", "w3")


def test_the_product_of_activations_has_nothing_to_freeze() -> None:
    canonical = canonicalise(
        model(
            """g (float[2,3,3] x) => (float[2,3,3] y) {
                [square] a = MatMul (x, x)
                y = HardSwish (a) }"""
        )
    )
    layers = find_layers(canonical, TARGETS["generic"], [FORMATS["int8"]]).layers
    assert why_frozen(canonical, layers, ["y"]) == {}


@pytest.mark.parametrize("target", TARGETS)
def test_sites_pass_the_gradient_on_around_a_stop(target: str) -> None:
    canonical = stopping("hardswish", "y = Add (d, a)")
    space = find_layers(canonical, TARGETS[target], [FORMATS["int8"], FORMATS["float32"]])
    _, plain, _ = differentiate(canonical)
    InsertSearchSitesPass(space)(canonical)
    assert stopped_operators(canonical, ["y"]) == ("HardSwish_b",)
    names = trainable_parameters(stopping("hardswish", "y = Add (d, a)"), ["y"])
    proto = with_sites_loss(canonical, names)
    built = build_gradient(proto, LOSS, names, stopped_operators(canonical, ["y"]))
    feeds = random_feeds(stopping("hardswish", "y = Add (d, a)"), 1)
    feeds |= {name: np.asarray(initializer(canonical, name)) for name in names}
    feeds[teacher_input("y")] = np.zeros((2, 4), np.float32)
    flat = session(built.SerializeToString()).run([GRADIENT], feeds)[0]
    # At float32 a site is the identity, and so is its gradient.
    np.testing.assert_array_equal(flat, np.concatenate([g.ravel() for g in plain.values()]))


def with_sites_loss(searchable: ir.Model, names: Sequence[str]) -> onnx.ModelProto:
    graph = searchable.clone()
    AddLossPass([LossTerm(kind=LossKind.SQUARED_ERROR, output="y", scores="y")])(graph)
    for function in gradient_functions():
        graph.functions[function.identifier()] = function
    proto = ir.to_proto(graph)
    promote_initializers(proto, names)
    return proto
