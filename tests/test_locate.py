"""The node where a disagreement begins is found, and said not to be found where it is not."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from naive_graphs import quantized_conv, relu_after_each_layer
from onnx_fliqs import api, locate
from onnx_fliqs.errors import VerificationError
from onnx_fliqs.locate import Origin, find_origin, named_node
from onnx_fliqs.verify import Batches, way_of
from support import PRECISIONS, calibrated_case, initializer, model, random_feeds

E4M3 = ir.DataType.FLOAT8E4M3FN
BRANCHES = """g (float[N,6] x) => (float[N,6] y) {
    [first] a = Gemm (x, w1)
    [left] b = Relu (a)
    [right] c = Tanh (a)
    [second] d = Gemm (b, w2)
    [third] e = Gemm (c, w3)
    [join] f = Add (d, e)
    [last] y = Gemm (f, w4) }"""
WEIGHTS = dict.fromkeys(("w1", "w2", "w3", "w4"), (6, 6))

Fault = Callable[[ir.Model, Sequence[str]], None]


def broken_by(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the default level compute what a fault makes of the graph."""

    def way(graph: ir.Model, names: Sequence[str], batches: Batches) -> list[list[Any]]:
        copy = graph.clone()
        fault(copy, [str(value.name) for value in copy.graph.outputs])
        return way_of("none")(copy, names, batches)

    monkeypatch.setattr(
        locate, "way_of", lambda name: way if name == "default" else way_of(name)
    )


def doubles(weight: str) -> Fault:
    def fault(graph: ir.Model, outputs: Sequence[str]) -> None:
        array = initializer(graph, weight) * 2
        graph.graph.initializers[weight].const_value = ir.tensor(array, name=weight)

    return fault


def located(graph: ir.Model, seeds: Sequence[int] = (0,)) -> Origin | None:
    return find_origin(graph, [random_feeds(graph, seed) for seed in seeds], "default")


@pytest.mark.parametrize(
    ("weight", "node", "sources"),
    [
        ("w1", "Gemm 'first'", ()),
        ("w2", "Gemm 'second'", ("Relu 'left'",)),
        ("w3", "Gemm 'third'", ("Tanh 'right'",)),
        ("w4", "Gemm 'last'", ("Add 'join'",)),
    ],
)
def test_the_node_is_found_in_every_branch(
    weight: str, node: str, sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_by(doubles(weight), monkeypatch)
    found = located(model(BRANCHES, weights=WEIGHTS))
    assert found is not None
    assert (found.node, found.sources) == (node, sources)
    assert found.difference == pytest.approx(1)
    assert found.before == 0
    assert not found.mended


def test_a_fault_that_only_one_batch_shows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(doubles("w3"), monkeypatch)
    graph = model(BRANCHES, weights=WEIGHTS)
    zeros = {"x": np.zeros((2, 6), np.float32)}
    found = find_origin(graph, [zeros, random_feeds(graph)], "default")
    assert found is not None
    assert found.node == "Gemm 'third'"


def test_a_fusion_that_ends_where_one_looks_is_told_by_its_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(graph: ir.Model, outputs: Sequence[str]) -> None:
        if "f" not in outputs:
            doubles("w4")(graph, outputs)

    broken_by(fault, monkeypatch)
    found = located(model(BRANCHES, weights=WEIGHTS))
    assert found is not None
    assert found.mended
    assert str(found) == (
        "beginning at Gemm 'last': off by 1, what it gets from Add 'join' by 0, and right once"
        " that is exposed"
    )


def test_a_fault_that_vanishes_at_every_look_is_not_put_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(graph: ir.Model, outputs: Sequence[str]) -> None:
        if outputs == ["y"]:
            doubles("w1")(graph, outputs)

    broken_by(fault, monkeypatch)
    assert located(model(BRANCHES, weights=WEIGHTS)) is None


def test_runs_that_agree_have_no_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(lambda graph, outputs: None, monkeypatch)
    assert located(model(BRANCHES, weights=WEIGHTS)) is None


def test_a_message_names_a_node_by_itself_or_by_its_output() -> None:
    graph = model(BRANCHES, weights=WEIGHTS)
    assert named_node("of operator (QGemm) in node (second) is", graph) == "Gemm 'second'"
    assert named_node("[CPU] Add node with name 'f' Check", graph) == "Add 'join'"
    assert named_node("""In Node, ("third", QGemm, "", -1)""", graph) == "Gemm 'third'"
    assert named_node("a second thought", graph) is None


# -- traps of ONNX Runtime --------------------------------------------------------------------


def test_a_relu_that_is_dropped_is_named() -> None:
    with pytest.raises(VerificationError) as error:
        api.validate(relu_after_each_layer(E4M3))
    assert "default: differs by" in str(error.value)
    assert "beginning at DequantizeLinear 'd1'" in str(error.value)
    assert "from Relu 'r1' by 0" in str(error.value)


def test_a_group_that_is_refused_is_named() -> None:
    with pytest.raises(
        VerificationError, match=r"default: .*cannot load.* \(at Conv 'conv'\)"
    ):
        api.validate(quantized_conv(E4M3))


@pytest.mark.parametrize("precision", ["e4m3", "int4", "int8"])
def test_what_is_emitted_for_such_a_network_is_right(precision: str) -> None:
    case = calibrated_case("conv_relu_conv")
    graph = case.emitted(case.space.uniform(PRECISIONS[precision]))
    checks = api.validate(graph).verification.levels
    assert [(check.name, check.agrees) for check in checks] == [
        ("basic", True),
        ("default", True),
    ]
