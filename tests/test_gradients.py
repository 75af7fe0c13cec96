"""The gradient of every operator is the slope of its outputs, and no operator is forgotten."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from gradient_cases import CASES, Case, Sizes
from onnx_fliqs.gradient import GRADIENT, build_gradient
from onnx_fliqs.passes._gradient_flow import trace
from onnx_fliqs.passes._gradient_table import FORMULAS, LOWERINGS, NOT_DIFFERENTIABLE
from onnx_fliqs.passes._native_gradients import NATIVE
from onnx_fliqs.passes.canonicalise import OPSET
from onnx_fliqs.passes.define_gradients import DefineGradientsPass
from onnx_fliqs.passes.lower_for_gradient import LowerForGradientPass
from onnx_fliqs.passes.name_everything import NameEverythingPass
from onnx_fliqs.runtime import make_session
from support import Feeds, model, session

STEP = 5e-3
"""Numbers that decide a choice (a sign, a maximum) are further apart."""

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_the_slope(name: str) -> None:
    case = CASES[name]
    plain = case.build()
    (y,) = session(ir.to_proto(plain).SerializeToString()).run(["y"], dict(case.inputs))
    weights = weights_for(np.shape(y))
    expected = slopes(case, weights)
    assert_gradient(plain, case, weights, expected)
    assert_outputs(plain, case, np.asarray(y))
    if set(case.known) < set(case.inputs):
        assert_gradient(case.build(sizes=Sizes.FREE), case, weights, expected)
    unknown = case.build(sizes=Sizes.UNKNOWN)
    # Where not even the number of axes is known, a rule may refuse, but not err.
    if found := reached(unknown, case.inputs):
        known = {name: slope for name, slope in expected.items() if name in found}
        assert_gradient(unknown, case, weights, known)


def weights_for(shape: tuple[int, ...]) -> Floats:
    """Numbers by which outputs are multiplied before they are added up."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], shape)
    return np.asarray(rng.uniform(0.5, 1.5, shape) * signs, np.float32)


def slopes(case: Case, weights: Floats) -> Feeds:
    """Five-point differences of the weighted sum of the outputs, element by element."""
    inputs = dict(case.inputs)
    runner = session(ir.to_proto(case.build()).SerializeToString())

    def loss(which: str, index: tuple[int, ...], steps: int) -> float:
        moved = np.array(inputs[which])
        moved[index] += steps * STEP
        (y,) = runner.run(["y"], inputs | {which: moved})
        return float(np.vdot(np.asarray(y, np.float64), weights))

    found: Feeds = {}
    for which, array in inputs.items():
        found[which] = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            near, far = (loss(which, index, n) - loss(which, index, -n) for n in (1, 2))
            found[which][index] = (8 * near - far) / (12 * STEP)
    return found


def assert_gradient(plain: ir.Model, case: Case, weights: Floats, expected: Feeds) -> None:
    names = reached(plain, case.inputs)
    proto = build_gradient(with_loss(plain), "loss", names)
    runner = make_session(proto, threads=1, disabled=["GatherSliceToSplitFusion"])
    needed = {value.name for value in runner.get_inputs()}
    feeds = {k: v for k, v in {**case.inputs, "weights": weights}.items() if k in needed}
    flat = runner.run([GRADIENT], feeds)[0]
    ends = np.cumsum([case.inputs[name].size for name in names])[:-1]
    found = dict(zip(names, np.split(flat, ends), strict=True))
    for name, slope in expected.items():
        # An input that no gradient reaches has to have a slope of zero.
        gradient = found.get(name, np.zeros(slope.size)).reshape(slope.shape)
        # Differences of float32 sums of some dozen numbers around 1.
        np.testing.assert_allclose(gradient, slope, rtol=2e-3, atol=2e-3, err_msg=name)


def reached(plain: ir.Model, names: Collection[str]) -> list[str]:
    """The inputs that the gradient of the outputs reaches."""
    lowered = plain.clone()
    LowerForGradientPass(names)(lowered)
    flow = trace(lowered.graph.outputs)
    return [str(value.name) for value in lowered.graph.inputs if flow.reads(value)]


def with_loss(plain: ir.Model) -> ir.Model:
    """The weighted sum of the outputs as the loss."""
    graph = plain.clone()
    (y,) = graph.graph.outputs
    weights = ir.Value(name="weights", type=y.type, shape=y.shape)
    product = ir.node("Mul", [y, weights], name="product")
    product.outputs[0].name = "product"
    loss = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 0}, name="loss")
    loss.outputs[0].name, loss.outputs[0].type = "loss", ir.TensorType(ir.DataType.FLOAT)
    loss.outputs[0].shape = ir.Shape(())
    graph.graph.inputs.append(weights)
    graph.graph.extend([product, loss])
    graph.graph.outputs.append(loss.outputs[0])
    return graph


def assert_outputs(plain: ir.Model, case: Case, expected: Floats) -> None:
    """What is differentiated computes what the original does."""
    graph = rewritten(plain, case.inputs)
    runner = session(ir.to_proto(graph).SerializeToString())
    (y,) = runner.run(["y"], dict(case.inputs))
    # Sums in another order.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def rewritten(plain: ir.Model, names: Collection[str]) -> ir.Model:
    """The graph that is differentiated, with the original output."""
    graph = with_loss(plain)
    for pass_ in (LowerForGradientPass(names), DefineGradientsPass("loss", names)):
        pass_(graph)
        assert not pass_(graph).modified
    nodes = [node for node in graph.graph if node.name in ("loss", "product")]
    graph.graph.outputs[:] = graph.graph.outputs[:1]
    graph.graph.remove(reversed(nodes), safe=True)
    graph.graph.inputs[:] = [v for v in graph.graph.inputs if v.name != "weights"]
    return graph


# -- nothing is forgotten -------------------------------------------------------------------


def operators() -> list[str]:
    """The operators of ONNX that a canonical model may hold."""
    names = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if not schema.domain and schema.since_version <= OPSET
    }
    return sorted(
        name for name in names if not onnx.defs.get_schema(name, OPSET, "").deprecated
    )


@pytest.mark.parametrize("op_type", operators())
def test_every_operator_has_a_gradient_or_a_reason(op_type: str) -> None:
    differentiable = ("", op_type) in NATIVE or op_type in FORMULAS or op_type in LOWERINGS
    assert differentiable != (op_type in NOT_DIFFERENTIABLE)


def test_every_gradient_is_tried() -> None:
    tried = {node.op_type for case in CASES.values() for node in case.build().graph}
    standard = {op_type for domain, op_type in NATIVE if not domain}
    assert standard | set(FORMULAS) | set(LOWERINGS) <= tried


# -- what is not covered --------------------------------------------------------------------

_ROW = "a = Squeeze (x) b = Unsqueeze (a, zero)"
REFUSED = {
    "it keeps the aspect ratio": (
        "s = Constant <value = int64[4] {1, 1, 6, 6}> ()"
        ' y = Resize <keep_aspect_ratio_policy = "not_larger"> (x, , , s)'
    ),
    "its mode is max": (
        "q = Constant <value = float[1,4] {0, 0, 2, 2}> ()"
        ' y = RoiAlign <mode = "max"> (x, q, zero)'
    ),
    "its output_padding is not less than its strides": (
        "y = ConvTranspose <output_padding = [1, 0], dilations = [2, 2]> (x, w)"
    ),
    "it has an output_shape, but the size of its input is not known": (
        "s = ReduceSum (p) e = Cast <to = 7> (s) f = Squeeze (e, zero)"
        " a = Slice (x, zero, f, two) y = ConvTranspose <output_shape = [5, 5]> (a, w)"
    ),
    "its output_shape is larger than what it computes": (
        "y = ConvTranspose <output_shape = [9, 9]> (x, w)"
    ),
    "it has peepholes": f"{_ROW} y = LSTM <hidden_size = 3> (b, w4, w4, , , , , p)",
    "it has clip": f"{_ROW} y = GRU <hidden_size = 3, clip = 1.0> (b, w3, w3)",
    "it has unusual activations": (
        f'{_ROW} y = GRU <hidden_size = 3, activations = ["Relu", "Tanh"]> (b, w3, w3)'
    ),
    "the remainder of integers has no derivative": "y = Mod (x, x)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_rule_does_not_cover_is_told(reason: str) -> None:
    cells = {f"w{gates}": (1, 3 * gates, 3) for gates in (1, 3, 4)}
    plain = model(
        f"g (float[1,1,3,3] x) => (float[] y) {{ {REFUSED[reason]} }}",
        weights={"w": (1, 1, 3, 3), "p": (1, 9), **cells},
        constants={"zero": [0], "two": [2]},
    )
    NameEverythingPass()(plain)
    plain = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain)))
    LowerForGradientPass(["x"])(plain)
    assert list(trace(plain.graph.outputs).stopped.values()) == [reason]


# -- definitions ----------------------------------------------------------------------------


def defined(text: str) -> list[str]:
    """Names of the functions that a graph of two nodes needs."""
    plain = model(f"g (float[3] x) => (float[] y) {{ {text} }}")
    NameEverythingPass()(plain)
    graph = with_loss(ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain))))
    LowerForGradientPass(["x"])(graph)
    DefineGradientsPass("loss", ["x"])(graph)
    return [name for _, name, _ in graph.functions]


def test_like_nodes_share_a_definition_and_unlike_ones_do_not() -> None:
    one = defined("y = Elu <alpha = 0.5> (x)")
    assert set(one) < set(defined("a = Elu <alpha = 0.5> (x) y = Elu <alpha = 0.25> (a)"))
    assert defined("a = Elu <alpha = 0.5> (x) y = Elu <alpha = 0.5> (a)") == one
    assert set(one).isdisjoint(defined("y = Celu <alpha = 0.5> (x)"))
    assert all(name.startswith("Elu_") for name in one if "gradient" not in name)


def test_only_what_the_parameters_change_is_touched() -> None:
    plain = model(
        "g (float[3] x) => (float[] y) { a = Elu (x) b = Elu (p) y = Sub (a, b) }",
        weights={"p": (3,)},
    )
    NameEverythingPass()(plain)
    graph = with_loss(ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(plain))))
    DefineGradientsPass("loss", ["p"])(graph)
    domains = {node.outputs[0].name: node.domain for node in graph.graph}
    assert (domains["a"], domains["b"]) == ("", "onnx_fliqs")
