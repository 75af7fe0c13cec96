"""Files of QONNX, from here or from elsewhere, are run, checked, refused or made float."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.data import input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.errors import UnknownOperatorError, UnsupportedError
from onnx_fliqs.formats import FORMATS, fake_quantize, is_passthrough
from onnx_fliqs.model import load_model, save_model
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import parse_space
from onnx_fliqs.qonnx_functions import QONNX
from onnx_fliqs.search_loop import search
from support import (
    PRECISIONS,
    calibrated,
    calibrated_case,
    f32,
    initializer,
    ops,
    random_feeds,
    run,
)

Array = npt.NDArray[Any]

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits_cnn.onnx"
X = f32([[-3.2, -0.3, 0.04, 0.05], [0.15, 0.25, 1.0, 40.0]])


def foreign(
    node: str,
    numbers: Mapping[str, Array] | None = None,
    *,
    opset: int = 13,
    domain: str = "onnx.brevitas",
) -> onnx.ModelProto:
    """One node between x and y, as others write it: without a definition."""
    proto: onnx.ModelProto = onnx.parser.parse_model(
        f'<ir_version: 7, opset_import: ["" : {opset}, "{domain}" : 1]>'
        f"g (float[N,4] x) => (float[N,4] y) {{ [q] y = {domain}.{node} }}"
    )
    for name, array in (
        {"s": f32(0.1), "z": f32(0), "b": f32(4)} | dict(numbers or {})
    ).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def read(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return load_model(path)


QUANT = 'Quant <signed = 1, narrow = 0, rounding_mode = "ROUND"> (x, s, z, b)'


# -- running --------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["onnx.brevitas", "qonnx.custom_op.general", "finn"])
@pytest.mark.parametrize("name", ["Quant", "IntQuant"])
@pytest.mark.parametrize("opset", [12, 13, 21])
def test_a_quantizer_from_elsewhere_gets_a_definition(
    domain: str, name: str, opset: int, tmp_path: Path
) -> None:
    node = QUANT.replace("Quant", name)
    graph = read(foreign(node, domain=domain, opset=opset), tmp_path)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    expected = fake_quantize(X, f32(0.1), FORMATS["int4"])
    np.testing.assert_array_equal(run(graph, {"x": X})[0], expected)


@pytest.mark.parametrize(
    ("signed", "narrow", "codes"),
    [
        (1, 0, [-8, -3, 0, 0, 2, 2, 7, 7]),
        (1, 1, [-7, -3, 0, 0, 2, 2, 7, 7]),
        (0, 0, [0, 0, 0, 0, 2, 2, 10, 15]),
        (0, 1, [0, 0, 0, 0, 2, 2, 10, 14]),
    ],
)
def test_signs_and_narrow_ranges_mean_what_qonnx_says(
    signed: int, narrow: int, codes: list[int], tmp_path: Path
) -> None:
    # The widest range of each kind, so that x = -3 is inside of all but the signed.
    node = f"Quant <signed = {signed}, narrow = {narrow}> (x, s, z, b)"
    (y,) = run(read(foreign(node), tmp_path), {"x": X})
    np.testing.assert_array_equal(y.reshape(-1), f32(codes) * f32(0.1))


def test_a_zero_point_shifts_the_range(tmp_path: Path) -> None:
    node = "Quant <signed = 0, narrow = 0> (x, s, z, b)"
    (y,) = run(read(foreign(node, {"z": f32(5)}), tmp_path), {"x": X})
    np.testing.assert_array_equal(y.reshape(-1), f32([-5, -3, 0, 1, 1, 3, 10, 10]) * f32(0.1))


def test_widths_in_constant_nodes_are_seen(tmp_path: Path) -> None:
    proto = foreign(QUANT)
    bits = proto.graph.initializer.pop()
    assert bits.name == "b"
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["b"], value=bits))
    expected = fake_quantize(X, f32(0.1), FORMATS["int4"])
    np.testing.assert_array_equal(run(read(proto, tmp_path), {"x": X})[0], expected)


@pytest.mark.parametrize(
    ("node", "numbers"),
    [
        (QUANT.replace("ROUND", "FLOOR"), {}),
        (QUANT, {"b": f32(1)}),
        ("BipolarQuant (x, s)", {}),
        (
            "FloatQuant <has_inf = 1, has_nan = 1, saturation = 0> (x, s, e, m, o, t)",
            {"e": f32(4), "m": f32(3), "o": f32(7), "t": f32(448)},
        ),
    ],
)
def test_what_the_definitions_do_not_cover_stays_unknown(
    node: str, numbers: Mapping[str, Array], tmp_path: Path
) -> None:
    graph = read(foreign(node, numbers), tmp_path)
    assert not graph.functions
    with pytest.raises(UnknownOperatorError, match=r"Quant of the domain 'onnx\.brevitas'"):
        api.validate(graph)


def test_a_definition_in_the_file_is_kept(tmp_path: Path) -> None:
    prepared = calibrated_case("residual", "qonnx")
    graph = prepared.emitted(prepared.random_mix(0))
    path = tmp_path / "model.onnx"
    save_model(graph, path)
    assert set(load_model(path).functions) == set(graph.functions)


def test_an_opset_that_cannot_hold_the_definitions_is_left_alone(tmp_path: Path) -> None:
    assert not read(foreign(QUANT, opset=11), tmp_path).functions


# -- emission, from end to end --------------------------------------------------------------


def test_a_search_for_qonnx_ends_in_a_checked_file(tmp_path: Path) -> None:
    data = load_npz(EXAMPLES / "digits_train.npz", input_specs(load_model(DIGITS)))
    config = SearchConfig(
        space="int4,int8,e4m3",
        budget=Budget(BudgetKind.BITS, 6.0),
        steps=12,
        target="qonnx",
    )
    result = search(DIGITS, data.take(np.arange(300)), config)
    assert result.verification.searched is not None
    assert result.verification.searched.rms < 1e-3
    path = tmp_path / "out.onnx"
    result.save(path)
    validation = api.validate(path, reference=DIGITS)
    assert validation.target == "qonnx"
    assert validation.level.value == "default"
    quality = api.evaluate(path, EXAMPLES / "digits_test.npz").value
    assert quality == pytest.approx(result.quantized_quality, abs=0.05)
    assert {node.domain for node in load_model(path).graph} == {"", QONNX}


def test_an_assignment_goes_to_another_dialect() -> None:
    layers = api.inspect(DIGITS).layers
    assignment = Assignment({layer.name: "int5" for layer in layers}, "generic")
    data = EXAMPLES / "digits_train.npz"
    result = api.emit(DIGITS, assignment, data, target="qonnx")
    assert "Quant" in ops(result.model)
    assert result.quantized_quality > 0.9


# -- rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "numbers", "problem"),
    [
        (QUANT, {"z": f32(2)}, "has a zero point other than 0"),
        (QUANT.replace("s,", "x,"), {}, "has a .* that is not constant"),
    ],
)
def test_what_finn_and_hls4ml_refuse_is_reported(
    node: str, numbers: Mapping[str, Array], problem: str, tmp_path: Path
) -> None:
    graph = read(foreign(node, numbers), tmp_path)
    found = api.validate(graph, target="qonnx").problems
    assert any(re.search(problem, str(each)) for each in found)


def test_a_graph_of_another_dialect_is_none_for_qonnx() -> None:
    prepared = calibrated_case("residual")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    found = api.validate(graph, target="qonnx").problems
    assert any("is no quantizer of QONNX" in str(each) for each in found)


# -- removal --------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "e3m2", "bf16"])
def test_an_emitted_graph_is_refused_or_made_float(fmt: str) -> None:
    prepared = calibrated_case("residual", "qonnx")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS[fmt]))
    with pytest.raises(UnsupportedError, match=r"already quantized .*--remove-quantization"):
        canonicalise(graph.clone())
    plain = canonicalise(graph.clone(), remove_quantization=True)
    assert ops(plain) == ops(prepared.canonical)
    assert set(plain.graph.initializers) == set(prepared.canonical.graph.initializers)
    for site in prepared.space.sites:
        if site.is_weight:
            np.testing.assert_array_equal(
                initializer(plain, site.tensor), initializer(graph, site.tensor)
            )


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.bits <= 8], ids=lambda f: f.name
)
def test_weights_become_what_their_quantizer_makes_of_them(fmt: Any, tmp_path: Path) -> None:
    assert not is_passthrough(fmt)
    scale = f32([[0.1, 0.03, 1.0, 0.2]])
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    if fmt.name.startswith(("int", "uint")):
        node = f"Quant <signed = {int(fmt.signed)}, narrow = 0> (w, s, z, b)"
        numbers = {"b": f32(fmt.bits)}
    else:
        node = "FloatQuant <saturation = 1> (w, s, e, m, o, t)"
        numbers = {
            "e": f32(fmt.exponent),
            "m": f32(fmt.mantissa),
            "o": f32(2 ** (fmt.exponent - 1) - 1),
            "t": f32(fmt.max),
        }
    proto = foreign(node, {"s": scale, "w": weight, **numbers})
    proto.graph.node[0].output[0] = "wq"
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["x", "wq"], ["y"]))
    plain = canonicalise(read(proto, tmp_path), remove_quantization=True)
    np.testing.assert_array_equal(initializer(plain, "w"), fake_quantize(weight, scale, fmt))


@pytest.mark.parametrize(
    ("mode", "codes"),
    [
        ("HALF_EVEN", [6, 2, 2, 1, -1, -2, -6]),
        ("ceil", [6, 3, 2, 2, -1, -2, -5]),
        ("FLOOR", [5, 2, 1, 1, -2, -3, -6]),
        ("UP", [6, 3, 2, 2, -2, -3, -6]),
        ("DOWN", [5, 2, 1, 1, -1, -2, -5]),
        ("HALF_UP", [6, 3, 2, 1, -1, -3, -6]),
        ("HALF_DOWN", [5, 2, 2, 1, -1, -2, -5]),
    ],
)
def test_weights_are_rounded_in_every_way_of_qonnx(
    mode: str, codes: list[int], tmp_path: Path
) -> None:
    weight = f32([[5.5, 2.5, 1.6, 1.1, -1.1, -2.5, -5.5]] * 4)
    node = f'Quant <signed = 1, narrow = 0, rounding_mode = "{mode}"> (w, s, z, b)'
    proto = foreign(node, {"w": weight, "s": f32(1)})
    proto.graph.node[0].output[0] = "wq"
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["x", "wq"], ["y"]))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    plain = canonicalise(read(proto, tmp_path), remove_quantization=True)
    np.testing.assert_array_equal(initializer(plain, "w")[0], f32(codes))


@pytest.mark.parametrize("node", ["BipolarQuant (w, s)", QUANT.replace("(x", "(w")])
def test_one_bit_weights_are_signs(node: str, tmp_path: Path) -> None:
    weight = f32([[0.3, -0.2, 0.0, -1.0]] * 4)
    proto = foreign(node, {"w": weight, "b": f32(1)})
    proto.graph.node[0].output[0] = "wq"
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["x", "wq"], ["y"]))
    plain = canonicalise(read(proto, tmp_path), remove_quantization=True)
    np.testing.assert_array_equal(initializer(plain, "w")[0], f32([0.1, -0.1, 0.1, -0.1]))


@pytest.mark.parametrize("opset", [9, 13])
def test_a_range_from_zero_may_stand_for_a_relu(opset: int, tmp_path: Path) -> None:
    proto = foreign("Quant <signed = 0, narrow = 0> (h, s, z, b)", opset=opset)
    proto.graph.node.insert(0, onnx.helper.make_node("Neg", ["x"], ["h"]))
    graph = read(proto, tmp_path)
    plain = canonicalise(graph, remove_quantization=True)
    assert ops(plain) == ["Neg", "Clip"]
    np.testing.assert_allclose(run(plain, {"x": X})[0], np.clip(-X, 0, 1.5), rtol=1e-6)


def test_signed_activations_are_just_not_rounded(tmp_path: Path) -> None:
    proto = foreign(QUANT.replace("(x", "(h"))
    proto.graph.node.insert(0, onnx.helper.make_node("Neg", ["x"], ["h"]))
    plain = canonicalise(read(proto, tmp_path), remove_quantization=True)
    np.testing.assert_array_equal(run(plain, {"x": X})[0], -X)


@pytest.mark.parametrize(
    ("node", "numbers"),
    [
        ("BipolarQuant (x, s)", {}),
        (QUANT, {"b": f32(1)}),
        ("Trunc (x, s, z, b, b)", {}),
    ],
)
def test_one_bit_activations_and_truncation_cannot_be_removed(
    node: str, numbers: Mapping[str, Array], tmp_path: Path
) -> None:
    graph = read(foreign(node, numbers), tmp_path)
    with pytest.raises(
        UnsupportedError, match=r"the quantization of .* 'q' cannot be removed"
    ):
        canonicalise(graph, remove_quantization=True)


def test_what_was_emitted_can_be_searched_again() -> None:
    prepared = calibrated(load_model(DIGITS), "qonnx", parse_space("int8"))
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    plain = canonicalise(graph, remove_quantization=True)
    feeds = random_feeds(plain, 1, batch=4)
    (float_scores,), (again,) = run(prepared.canonical, feeds), run(plain, feeds)
    assert np.sqrt(np.mean((again - float_scores) ** 2)) < 0.05 * np.abs(float_scores).max()
