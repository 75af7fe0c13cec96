"""A gradient graph in pieces computes what it does in one piece, and the pieces are fewer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import support
from gradient_cases import CASES
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.kernels import for_fast_kernels
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LOSS, AddLossPass
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES
from onnx_fliqs.precision import parse_space
from onnx_fliqs.runtime import make_session
from onnx_fliqs.step_graphs import StepGraphs, cut_step, part_value
from onnx_fliqs.trainability import trainable_parameters
from support import Feeds
from test_gradients import reached, weights_for, with_loss

WEIGHTS = (1.0, 0.5, 0.25)
NETWORKS: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "convolutions": (
        """g (float[N,16,6,6] x) => (float[N,3] y) {
            [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            r = Relu (a)
            [c2] b = Conv (r, w2)
            c = GlobalAveragePool (b)
            d = Flatten (c)
            [fc] y = MatMul (d, w3) }""",
        {"w1": (16, 16, 3, 3), "b1": (16,), "w2": (16, 16, 1, 1), "w3": (16, 3)},
        "int4,int8,float32",
    ),
    "groups": (
        """g (float[N,32] x) => (float[N,3] y) {
            [fc1] a = MatMul (x, w1)
            b = Tanh (a)
            [fc2] y = MatMul (b, w2) }""",
        {"w1": (32, 64), "w2": (64, 3)},
        "int8g32:int8,float32",
    ),
    "shared": (
        """g (float[N,8] x) => (float[N,8] y) {
            [fc1] a = MatMul (x, w)
            b = Tanh (a)
            [fc2] c = MatMul (b, w)
            y = Add (c, p) }""",
        {"w": (8, 8), "p": (8,)},
        "int4,int8,float32",
    ),
}


def run(graph: ir.Model, feeds: Feeds) -> Feeds:
    """All outputs, from those of the arrays that the graph reads."""
    session = make_session(
        graph, threads=1, disabled=["GatherSliceToSplitFusion"], fuse_quantized=False
    )
    needed = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {name: feeds[name] for name in feeds if name in needed})
    return dict(zip(names, found, strict=True))


def run_pieces(graphs: StepGraphs, fixed: Feeds, parts: Sequence[Feeds]) -> Feeds:
    """The gradient, and the losses of the parts."""
    shared = dict(fixed)
    for graph in graphs.before:
        shared |= run(graph, fixed)
    pieces, losses = dict(fixed), {}
    for index, part in enumerate(parts):
        found = run(graphs.part, {**shared, **part})
        pieces |= {part_value(name, index): array for name, array in found.items()}
        losses[str(index)] = found[str(graphs.part.graph.outputs[0].name)]
    return {**losses, **run(graphs.after, pieces)}


def assert_pieces(
    whole: ir.Model, graphs: StepGraphs, fixed: Feeds, parts: Sequence[Feeds]
) -> None:
    loss = str(whole.graph.outputs[0].name)
    found = run_pieces(graphs, fixed, parts)
    wanted: npt.NDArray[np.float64] = np.zeros(found[GRADIENT].shape)
    for index, (part, weight) in enumerate(zip(parts, WEIGHTS, strict=True)):
        one = run(whole, {**fixed, **part})
        np.testing.assert_allclose(found[str(index)], one[loss], rtol=1e-5, atol=1e-5)
        wanted += weight * one[GRADIENT].astype(np.float64)
    scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-3)
    np.testing.assert_allclose(found[GRADIENT], wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if len(case.inputs) > 1]
)
def test_every_operator_can_be_cut(name: str) -> None:
    case = CASES[name]
    plain = case.build()
    found = reached(plain, case.inputs)
    # As in a layer, of which the first operand is an activation.
    parameters = found[1:] or found
    whole = for_fast_kernels(
        ir.from_proto(build_gradient(with_loss(plain), "loss", parameters)), 2
    )
    (y,) = support.run(plain, dict(case.inputs))
    fixed = {name: case.inputs[name] for name in parameters}
    samples = {name: array for name, array in case.inputs.items() if name not in fixed}
    parts = [
        {**samples, "weights": np.asarray(weights_for(np.shape(y)) * np.float32(factor))}
        for factor in (1, -2, 3)
    ]
    graphs = cut_step(whole, parameters, (), shares=2, weights=WEIGHTS)
    assert_pieces(whole, graphs, fixed, parts)


def network(name: str) -> tuple[ir.Model, Feeds, list[Feeds]]:
    """Gradient graph, what all parts read, and the parts."""
    text, weights, formats = NETWORKS[name]
    prepared = support.calibrated(
        support.model(text, weights=weights), "generic", parse_space(formats)
    )
    space = prepared.space
    searchable = prepared.searchable(
        {n.name: space.choices_of[n.name][0] for n in space.layers}
    )
    parameters = trainable_parameters(prepared.canonical, ["y"])
    fixed = {n: support.initializer(searchable, n) for n in (*parameters, CODES, SCALES)}
    promote_initializers(searchable, list(fixed))
    AddLossPass([LossTerm(kind=LossKind.SQUARED_ERROR, output="y", scores="y")])(searchable)
    graph = for_fast_kernels(ir.from_proto(build_gradient(searchable, LOSS, parameters)), 3)
    parts = []
    for seed, size in enumerate((3, 2, 1)):
        feeds = support.random_feeds(graph, seed, batch=size)
        parts.append({n: array for n, array in feeds.items() if n not in fixed})
    return graph, fixed, parts


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_can_be_cut(name: str) -> None:
    whole, fixed, parts = network(name)
    parameters = [name for name in fixed if name not in (CODES, SCALES)]
    graphs = cut_step(whole, parameters, (CODES, SCALES), shares=2, weights=WEIGHTS)
    assert_pieces(whole, graphs, fixed, parts)


def test_weights_are_quantized_before_the_parts_and_their_masks_applied_after() -> None:
    whole, fixed, _ = network("convolutions")
    nodes = len(whole.graph)
    parameters = [name for name in fixed if name not in (CODES, SCALES)]
    weights = {name for name in parameters if len(fixed[name].shape) > 1}
    graphs = cut_step(whole, parameters, (CODES, SCALES), shares=2, weights=WEIGHTS)
    assert len(whole.graph) == nodes
    assert len(graphs.before) == 2
    read = [{str(value.name) for value in graph.graph.inputs} for graph in graphs.before]
    # The bias has a site as well.
    assert set(parameters) == (read[0] | read[1]) - {CODES, SCALES}
    assert not set(parameters) & read[0] & read[1]
    assert not weights & {value.name for value in graphs.part.graph.inputs}
    # Whether a number lies between both ends of a site.
    masks = [
        sum(node.op_type == "And" for node in graph.graph)
        for graph in (whole, *graphs.before, graphs.part, graphs.after)
    ]
    assert masks[0] == masks[-2] + masks[-1]
    assert masks[-1] == len(parameters)


def test_a_graph_that_uses_its_weights_as_they_are_has_nothing_before_the_parts() -> None:
    plain = CASES["matmul"].build()
    names = reached(plain, CASES["matmul"].inputs)
    whole = ir.from_proto(build_gradient(with_loss(plain), "loss", names[1:]))
    assert cut_step(whole, names[1:], (), shares=2, weights=[1.0]).before == ()


def test_noise_is_drawn_for_each_part() -> None:
    text = """g (float[4] w, float[N,4] x) => (float loss, float[4] gradient) {
        noise = RandomNormalLike (w)
        v = Add (w, noise)
        z = Mul (x, v)
        loss = ReduceSum <keepdims = 0> (z)
        g = ReduceSum <keepdims = 0> (x, first)
        gradient = Concat <axis = 0> (g) }"""
    whole = support.model(text, constants={"first": [0]})
    graphs = cut_step(whole, ["w"], (), shares=2, weights=[1.0])
    assert graphs.before == ()
    assert "RandomNormalLike" in support.ops(graphs.part)
