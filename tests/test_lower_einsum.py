"""Einsum becomes MatMul, Mul or ReduceSum, whatever its equation."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.passes.lower_einsum import LowerEinsumPass
from support import ops, run

SIZES = {letter: 2 + index % 3 for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}


def einsum(
    equation: str, operands: list[npt.NDArray[np.float32]], constant: int | None, dynamic: bool
) -> ir.Model:
    """A model of one Einsum whose operands are inputs ``x0``, ``x1``, ... but for one."""
    inputs, constants = [], []
    for index, array in enumerate(operands):
        name = f"x{index}"
        if index == constant:
            constants.append(onnx.numpy_helper.from_array(array, name))
            continue
        shape = [
            f"{name}_{axis}" if dynamic else size for axis, size in enumerate(array.shape)
        ]
        inputs.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    names = [f"x{index}" for index in range(len(operands))]
    node = onnx.helper.make_node("Einsum", names, ["y"], name="layer", equation=equation)
    result = onnx.helper.make_tensor_value_info("y", 1, None)
    graph = onnx.helper.make_graph([node], "g", inputs, [result], constants)
    opset = onnx.helper.make_opsetid("", 21)
    proto = onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset])
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def check(
    equation: str,
    *shapes: tuple[int, ...],
    constant: int | None = None,
    dynamic: bool = False,
) -> list[str]:
    """Lower an Einsum and compare with NumPy; gives its operators, but for constants."""
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    model = einsum(equation, operands, constant, dynamic)
    assert LowerEinsumPass()(model).modified
    feeds = {f"x{index}": x for index, x in enumerate(operands) if index != constant}
    (actual,) = run(model, feeds)
    expected = np.einsum(equation.replace(" ", ""), *operands)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    return [op for op in ops(model) if op != "Constant"]


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[str], int | None, bool]:
    """An equation of two operands, what they hold, and which is constant."""
    letters = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
    operands: list[str] = ["", ""]
    result = ""
    for letter in letters:
        held = draw(st.sampled_from(["0", "1", "01"]))
        for index in held:
            operands[int(index)] += letter
        if draw(st.booleans()):
            result += letter
    operands = ["".join(draw(st.permutations(text))) for text in operands]
    result = "".join(draw(st.permutations(result)))
    constant = draw(st.sampled_from([None, 0, 1]))
    return f"{operands[0]},{operands[1]}->{result}", operands, constant, draw(st.booleans())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(equations())
def test_any_product_of_two_operands(drawn: tuple[str, list[str], int | None, bool]) -> None:
    equation, operands, constant, dynamic = drawn
    shapes = [tuple(SIZES[letter] for letter in text) for text in operands]
    found = check(equation, *shapes, constant=constant, dynamic=dynamic)
    assert "Einsum" not in found


@pytest.mark.parametrize("constant", [None, 0, 1])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...ij,jk->...ik", [(2, 5, 3, 4), (4, 2)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 2)]),
        ("ij,...jk->...ik", [(3, 4), (5, 2, 4, 2)]),
        ("...i,ij", [(2, 5, 3), (3, 4)]),
        ("...a,...a->...", [(2, 3), (2, 3)]),
        ("i...j,j->...i", [(2, 5, 3), (3,)]),
        (" i j , j k -> i k ", [(2, 3), (3, 4)]),
        ("ij,jk", [(2, 3), (3, 4)]),
        ("bij,bjk", [(2, 3, 4), (2, 4, 5)]),
    ],
)
def test_ellipsis_spaces_and_implied_results(
    equation: str, shapes: list[tuple[int, ...]], constant: int | None, dynamic: bool
) -> None:
    assert "MatMul" in check(equation, *shapes, constant=constant, dynamic=dynamic)


@pytest.mark.parametrize("shapes", [[(1, 2, 3), (4, 3, 2)], [(4, 2, 3), (3, 2)]])
def test_an_ellipsis_is_broadcast(shapes: list[tuple[int, ...]]) -> None:
    assert check("...ij,...jk->...ik", *shapes) == ["MatMul"]


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)], ["MatMul", "MatMul"]),
        ("a,b,c->abc", [(2,), (3,), (4,)], ["Unsqueeze", "Mul", "Unsqueeze", "Mul"]),
    ],
)
def test_more_operands_are_multiplied_from_left_to_right(
    equation: str, shapes: list[tuple[int, ...]], expected: list[str]
) -> None:
    assert check(equation, *shapes) == expected


def test_the_matmul_keeps_the_name_of_layer_and_weight() -> None:
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 4), (4, 3, 2))]
    model = einsum("btd,dnh->bnth", operands, 1, dynamic=False)
    LowerEinsumPass()(model)
    (layer,) = (node for node in model.graph if node.op_type == "MatMul")
    assert layer.name == "layer"
    weight = layer.inputs[1]
    assert weight is not None
    assert weight.name == "x1"
    assert weight.const_value is not None
    assert tuple(weight.const_value.shape) == (4, 6)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ii->i", [(3, 3)]),
        ("bii->b", [(2, 3, 3)]),
        ("ij,jj->ij", [(2, 3), (3, 3)]),
        ("...i,...i,...i->...", [(2, 3), (2, 3), (2, 3)]),
    ],
)
def test_what_no_matmul_computes_stays(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [np.ones(shape, np.float32) for shape in shapes]
    model = einsum(equation, operands, None, dynamic=False)
    assert not LowerEinsumPass()(model).modified
    assert ops(model) == ["Einsum"]


def test_an_ellipsis_of_unknown_length_stays() -> None:
    model = einsum(
        "...i,ij->...j", [np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)], 1, False
    )
    model.graph.inputs[0].shape = None
    assert not LowerEinsumPass()(model).modified
