"""What files hold beyond plain ONNX is read, not refused or lost."""

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from onnx_fliqs.dialects import CONTRIB, translate
from onnx_fliqs.errors import ModelError
from onnx_fliqs.model import load_model
from onnx_fliqs.passes.canonicalise import canonicalise
from support import ops, run

WEIGHT = np.array([[0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, -1]], np.float32)
X = np.ones((2, 3), np.float32)


def sparse(indices: npt.ArrayLike) -> onnx.SparseTensorProto:
    values = onnx.numpy_helper.from_array(np.array([2, -1], np.float32), "w")
    positions = onnx.numpy_helper.from_array(np.array(indices, np.int64), "positions")
    return helper.make_sparse_tensor(values, positions, WEIGHT.shape)


def product(*before: onnx.NodeProto) -> onnx.GraphProto:
    """A product with w, after whatever makes w."""
    return helper.make_graph(
        [*before, helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 3])],
        [helper.make_tensor_value_info("y", 1, ["N", 4])],
    )


def saved(graph: onnx.GraphProto, path: Path, opset: int = 21, ir_version: int = 10) -> Path:
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, ir_version=ir_version, opset_imports=opsets), path)
    return path


@pytest.mark.parametrize("indices", [[1, 11], [[0, 1], [2, 3]]])
@pytest.mark.parametrize("as_node", [False, True])
def test_a_sparse_weight_becomes_dense(
    indices: npt.ArrayLike, as_node: bool, tmp_path: Path
) -> None:
    if as_node:
        graph = product(helper.make_node("Constant", [], ["w"], sparse_value=sparse(indices)))
    else:
        graph = product()
        graph.sparse_initializer.append(sparse(indices))
    result = canonicalise(load_model(saved(graph, tmp_path / "model.onnx")))
    assert list(result.graph.initializers) == ["w"]
    np.testing.assert_array_equal(run(result, {"x": X})[0], X @ WEIGHT)


def test_a_sparse_weight_in_a_branch_becomes_dense(tmp_path: Path) -> None:
    inner = product()
    inner.sparse_initializer.append(sparse([1, 11]))
    del inner.input[:]
    inner.output[0].name = inner.node[0].output[0] = "p"
    other = product(helper.make_node("Constant", [], ["w"], sparse_value=sparse([1, 11])))
    del other.input[:]
    other.output[0].name = other.node[-1].output[0] = "q"
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)
    graph = product()
    graph.node[0].CopyFrom(node)
    graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    result = canonicalise(load_model(saved(graph, tmp_path / "model.onnx")))
    for choice in (True, False):
        feeds = {"x": X, "c": np.array(choice)}
        np.testing.assert_array_equal(run(result, feeds)[0], X @ WEIGHT)


def test_a_sparse_weight_that_contradicts_itself_is_an_error(tmp_path: Path) -> None:
    graph = product()
    graph.sparse_initializer.append(sparse([1, 99]))
    with pytest.raises(ModelError, match="is not a valid ONNX model"):
        load_model(saved(graph, tmp_path / "model.onnx"))


def test_a_model_without_such_things_is_left_alone() -> None:
    opsets = [helper.make_opsetid("", 21)]
    weight = onnx.numpy_helper.from_array(WEIGHT, "w")
    graph = product()
    graph.initializer.append(weight)
    proto = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    before = proto.SerializeToString(deterministic=True)
    translate(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_initializers_of_an_old_file_need_not_be_inputs(tmp_path: Path) -> None:
    graph = product()
    graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    result = canonicalise(load_model(saved(graph, tmp_path / "m.onnx", opset=8, ir_version=3)))
    np.testing.assert_array_equal(run(result, {"x": X})[0], X @ WEIGHT)


def normalised(op_type: str) -> onnx.GraphProto:
    node = helper.make_node(op_type, ["x", "s"], ["y"], epsilon=0.1)
    return helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 4])],
        [onnx.numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "s")],
    )


@pytest.mark.parametrize(
    ("op_type", "opset", "expected"),
    [
        ("LayerNormalization", 12, ["LayerNormalization"]),
        ("LayerNormalization", 17, ["LayerNormalization"]),
        (
            "SimplifiedLayerNormalization",
            12,
            ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"],
        ),
        (
            "SimplifiedLayerNormalization",
            21,
            ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"],
        ),
    ],
)
def test_normalizations_in_the_wrong_domain(
    op_type: str, opset: int, expected: list[str], tmp_path: Path
) -> None:
    path = saved(normalised(op_type), tmp_path / "model.onnx", opset)
    result = canonicalise(load_model(path))
    assert ops(result) == expected
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    centred = x - x.mean(1, keepdims=True) * (op_type == "LayerNormalization")
    want = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 0.1) * [1, 2, 3, 4]
    np.testing.assert_allclose(run(result, {"x": x})[0], want, rtol=1e-5)


def test_preprocessing_of_old_converters(tmp_path: Path) -> None:
    node = helper.make_node("ImageScaler", ["x"], ["y"], scale=0.5, bias=[1.0, 2.0])
    shape: list[str | int | None] = ["N", 2, 3, 3]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
    )
    result = canonicalise(load_model(saved(graph, tmp_path / "model.onnx", 8, 3)))
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)
    want = x * 0.5 + np.array([1, 2]).reshape(2, 1, 1)
    np.testing.assert_allclose(run(result, {"x": x})[0], want, rtol=1e-6)


def test_the_domain_is_imported_once() -> None:
    opsets = [helper.make_opsetid("", 12), helper.make_opsetid(CONTRIB, 1)]
    graph = normalised("LayerNormalization")
    proto = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    translate(proto)
    assert [entry.domain for entry in proto.opset_import] == ["", CONTRIB]
    assert proto.graph.node[0].domain == CONTRIB


def test_nodes_in_any_order_are_read(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x, bool c) => (float[N,4] y) {'
        " a = Neg (x)  b = Abs (a)  d = If (c) <then_branch = t () => (float[N,4] p)"
        " { p = Relu (b) }, else_branch = e () => (float[N,4] q) { q = Neg (a) }>"
        " y = Add (d, b) }"
    )
    wanted = [node.op_type for node in model.graph.node]
    for order in itertools.permutations(range(4)):
        shuffled = onnx.ModelProto()
        shuffled.CopyFrom(model)
        del shuffled.graph.node[:]
        shuffled.graph.node.extend(model.graph.node[i] for i in order)
        path = tmp_path / "shuffled.onnx"
        onnx.save(shuffled, path)
        assert [node.op_type for node in load_model(path).graph] == wanted


def test_a_cycle_is_no_model(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {'
        " a = Add (x, b)  b = Abs (a)  y = Neg (b) }"
    )
    path = tmp_path / "cycle.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match="not a valid ONNX model: Graph contains a cycle"):
        load_model(path)
