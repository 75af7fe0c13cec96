"""What is shipped as QONNX computes what was searched, and says what its tools ask for."""

import functools

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.formats import (
    FORMATS,
    FloatFormat,
    Format,
    IntFormat,
    Special,
    fake_quantize,
    is_passthrough,
)
from onnx_fliqs.passes.lower_sites_to_qonnx import LowerSitesToQonnxPass
from onnx_fliqs.precision import Precision
from onnx_fliqs.qonnx_functions import QONNX
from onnx_fliqs.verify import verify_graph
from pass_models import LAYERED
from support import (
    PRECISIONS,
    Calibrated,
    calibrated,
    calibrated_case,
    check_pass,
    f32,
    initializer,
    model,
    ops,
    random_feeds,
    run,
    serialized,
    session,
)

CASES = pytest.mark.parametrize("case", LAYERED)
EVERY = pytest.mark.parametrize("fmt", [FORMATS[name] for name in PRECISIONS], ids=PRECISIONS)
ROUNDED = [fmt for fmt in FORMATS.values() if not is_passthrough(fmt)]


def case_of(name: str) -> Calibrated:
    return calibrated_case(name, "qonnx")


def quantizers(graph: ir.Model) -> list[ir.Node]:
    return [node for node in graph.graph if node.domain == QONNX]


def parameters(node: ir.Node) -> dict[str, npt.NDArray[np.float32]]:
    """The further inputs of a quantizer, by what their names end in."""
    found = {}
    for value in node.inputs[1:]:
        assert value is not None
        assert value.const_value is not None
        found[str(value.name).rpartition(".")[2]] = value.const_value.numpy()
    return found


def assert_as_searched(prepared: Calibrated, chosen: dict[str, Precision]) -> ir.Model:
    """The emitted graph is valid and computes the searchable one's bits."""
    graph = prepared.emitted(chosen)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    assert {node.domain for node in graph.graph.all_nodes()} <= {"", QONNX}
    feeds = random_feeds(prepared.canonical, 3)
    expected, actual = run(prepared.searchable(chosen), feeds), run(graph, feeds)
    for want, got in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(got, want)
    return graph


# -- agreement ------------------------------------------------------------------------------


@EVERY
@CASES
def test_every_format_computes_what_was_searched(case: str, fmt: Format) -> None:
    prepared = case_of(case)
    assert_as_searched(prepared, prepared.space.uniform(Precision(fmt, fmt)))


@pytest.mark.parametrize("seed", range(4))
@CASES
def test_random_mixes_compute_what_was_searched(case: str, seed: int) -> None:
    prepared = case_of(case)
    assert_as_searched(prepared, prepared.random_mix(seed))


@CASES
def test_every_optimisation_level_runs_it_right(case: str) -> None:
    prepared = case_of(case)
    graph = prepared.emitted(prepared.random_mix(1))
    verification = verify_graph(graph, [random_feeds(prepared.canonical, 3)])
    assert all(check.agrees for check in verification.levels)


@CASES
def test_float32_leaves_the_model_as_it_was(case: str) -> None:
    prepared = case_of(case)
    graph = assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["float32"]))
    assert ops(graph) == ops(prepared.canonical)
    assert not graph.functions
    assert QONNX not in graph.opset_imports


# -- the pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "int16", "e2m1", "e5m2", "bf16", "float32"])
@pytest.mark.parametrize("case", ["residual", "attention", "layers_in_a_branch"])
def test_the_pass_keeps_its_contract(case: str, fmt: str) -> None:
    prepared = case_of(case)
    chosen = prepared.space.uniform(PRECISIONS[fmt])
    lower = LowerSitesToQonnxPass(prepared.space, chosen, prepared.scales)
    # ONNX Runtime and NumPy differ in no code.
    check_pass(lower, prepared.searchable(chosen), rtol=1e-5, atol=1e-5)


@CASES
def test_an_emitted_graph_is_left_alone(case: str) -> None:
    prepared = case_of(case)
    chosen = prepared.random_mix(0)
    graph = prepared.emitted(chosen)
    before = serialized(ir.to_proto(graph))
    lower = LowerSitesToQonnxPass(prepared.space, chosen, prepared.scales)
    assert not lower(graph).modified
    assert serialized(ir.to_proto(graph)) == before


@CASES
def test_the_signature_stays_and_the_canonical_model_too(case: str) -> None:
    prepared = case_of(case)
    before = ir.to_proto(prepared.canonical)
    after = ir.to_proto(prepared.emitted(prepared.random_mix(3))).graph
    assert list(after.input) == list(before.graph.input)
    assert list(after.output) == list(before.graph.output)
    assert serialized(ir.to_proto(prepared.canonical)) == serialized(before)


# -- the nodes ------------------------------------------------------------------------------


@EVERY
def test_a_quantizer_says_everything_that_its_readers_ask_for(fmt: Format) -> None:
    prepared = case_of("residual")
    graph = prepared.emitted(prepared.space.uniform(Precision(fmt, fmt)))
    assert bool(quantizers(graph)) == (fmt.name != "float32")
    for node in quantizers(graph):
        read = parameters(node)
        assert all(array.dtype == np.float32 for array in read.values())
        assert node.attributes["rounding_mode"].as_string() == "ROUND"
        assert node.inputs[0] is not None
        assert node.outputs[0].shape == node.inputs[0].shape
        scale = read.pop("scale")
        if isinstance(fmt, IntFormat):
            assert node.op_type == "Quant"
            assert set(node.attributes) == {"signed", "narrow", "rounding_mode"}
            assert read == {"zeropt": 0, "bitwidth": fmt.bits}
            assert node.attributes["narrow"].as_int() == 0
        else:
            assert node.op_type == "FloatQuant"
            read.pop("max_val")
            assert read == {
                "exponent_bitwidth": fmt.exponent,
                "mantissa_bitwidth": fmt.mantissa,
                "exponent_bias": 2 ** (fmt.exponent - 1) - 1,
            }
            flags = {"has_inf", "has_nan", "has_subnormal", "saturation"}
            assert set(node.attributes) == {*flags, "rounding_mode"}
            assert node.attributes["has_inf"].as_int() == (fmt.special is Special.IEEE)
        if is_passthrough(fmt):
            assert (scale == 1).all()


@pytest.mark.parametrize(
    ("fmt", "largest"), [("e2m1", 6), ("e3m2", 28), ("e4m3", 448), ("e5m2", 57344)]
)
def test_minifloats_end_where_their_standards_say(fmt: str, largest: float) -> None:
    prepared = case_of("gemms")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS[fmt]))
    assert {float(parameters(node)["max_val"]) for node in quantizers(graph)} == {largest}


def test_relu_makes_integers_unsigned() -> None:
    prepared = case_of("conv_relu_conv")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int5"]))
    signs = {
        str(node.inputs[0].name): node.attributes["signed"].as_int()
        for node in quantizers(graph)
        if node.inputs[0] is not None
    }
    assert signs == {"x": 1, "w1": 1, "r": 0, "w2": 1}


def test_scales_broadcast_against_what_they_scale() -> None:
    prepared = case_of("depthwise_and_grouped")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int4"]))
    shapes = {
        str(node.inputs[0].name): parameters(node)["scale"].shape
        for node in quantizers(graph)
        if node.inputs[0] is not None
    }
    assert shapes == {"x": (), "w1": (4, 1, 1, 1), "r": (), "w2": (6, 1, 1, 1)}


@EVERY
def test_weights_are_stored_as_what_their_codes_stand_for(fmt: Format) -> None:
    prepared = case_of("residual")
    graph = prepared.emitted(prepared.space.uniform(Precision(fmt, fmt)))
    for site in prepared.space.sites:
        if not site.is_weight:
            continue
        stored = initializer(graph, site.tensor)
        assert stored.dtype == np.float32
        if fmt.name == "float32":
            continue
        node = next(n for n in quantizers(graph) if n.inputs[0].name == site.tensor)  # type: ignore[union-attr]
        scale = parameters(node)["scale"]
        # Quantizing once more changes nothing, even with a reciprocal in place of a division.
        again = fake_quantize(stored * (np.float32(1) / scale) * scale, scale, fmt)
        np.testing.assert_array_equal(again, stored)


def test_a_weight_that_something_else_reads_in_float_is_kept() -> None:
    prepared = calibrated(
        model(
            """g (float[N,4] x, float[4,3] s) => (float[N,3] y, float[4,3] z) {
                [layer] y = MatMul (x, w)
                z = Add (w, s) }""",
            weights={"w": (4, 3)},
        ),
        "qonnx",
        [PRECISIONS["int2"]],
    )
    graph = assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["int2"]))
    np.testing.assert_array_equal(
        initializer(graph, "w"), initializer(prepared.canonical, "w")
    )
    assert "w_quantized" in graph.graph.initializers


def test_what_is_only_rearranged_is_quantized_once() -> None:
    prepared = case_of("residual")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int6"]))
    pool, flatten = (
        next(node for node in graph.graph if node.op_type == op)
        for op in ("MaxPool", "Flatten")
    )
    for node in (pool, flatten):
        assert node.inputs[0] is not None
        maker = node.inputs[0].producer()
        assert maker is not None
        assert maker.op_type == "Quant"
        assert all(use.node.op_type != "Quant" for use in node.outputs[0].uses())


def test_what_is_rearranged_and_takes_another_format_is_quantized_again() -> None:
    prepared = calibrated(
        model(
            """g (float[N,4] x) => (float[N,3] y, float[5,3] z) {
                [wide] a = MatMul (x, w)
                t = Transpose (a)
                [narrow] y = MatMul (a, v)
                [coarse] z = MatMul (t, u) }""",
            weights={"w": (4, 5), "v": (5, 3), "u": (2, 3)},
        ),
        "qonnx",
        [PRECISIONS["int3"], PRECISIONS["int8"]],
    )
    chosen = {
        "wide": PRECISIONS["int8"],
        "narrow": PRECISIONS["int8"],
        "coarse": PRECISIONS["int3"],
    }
    graph = prepared.emitted(chosen)
    widths = [float(parameters(node)["bitwidth"]) for node in quantizers(graph)]
    assert sorted(widths) == [3, 3, 8, 8, 8, 8]


def test_biases_stay_float() -> None:
    prepared = case_of("residual")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    for name in ("b1", "b2", "b3", "b4"):
        np.testing.assert_array_equal(
            initializer(graph, name), initializer(prepared.canonical, name)
        )


def test_convolutions_and_pooling_spell_out_their_windows() -> None:
    prepared = case_of("residual")
    graph = prepared.emitted(prepared.random_mix(0))
    windows = {"kernel_shape", "strides", "pads"}
    for node in graph.graph:
        if node.op_type == "Conv":
            assert set(node.attributes) == windows | {"dilations", "group"}
        elif node.op_type == "MaxPool":
            assert set(node.attributes) == windows


def test_the_opset_is_old_where_that_suffices() -> None:
    prepared = case_of("residual")
    graph = prepared.emitted(prepared.random_mix(0))
    assert (graph.opset_imports[""], graph.opset_imports[QONNX], graph.ir_version) == (
        13,
        1,
        8,
    )
    for function in graph.functions.values():
        assert function.opset_imports[""] == 13
    assert {key[1] for key in graph.functions} == {n.op_type for n in quantizers(graph)}


# -- their definitions ----------------------------------------------------------------------


@functools.cache
def runs(fmt: Format, scale: float) -> object:
    """A session of one quantizer."""
    prepared = calibrated(
        model(
            "g (float[N,1] x) => (float[N,1] y) { [layer] y = MatMul (x, w) }",
            weights={"w": (1, 1)},
        ),
        "qonnx",
        [Precision(fmt, fmt)],
    )
    site = next(site for site in prepared.space.sites if not site.is_weight)
    weight = next(site for site in prepared.space.sites if site.is_weight)
    scales = {(s.name, fmt.name): f32([scale]) for s in (site, weight)}
    changed = Calibrated(prepared.canonical, prepared.space, scales, prepared.target)
    graph = changed.emitted(prepared.space.uniform(Precision(fmt, fmt)))
    node = next(n for n in quantizers(graph) if n.inputs[0].name == "x")  # type: ignore[union-attr]
    node.outputs[0].name = "q"
    graph.graph.outputs[:] = [node.outputs[0]]
    return session(ir.to_proto(graph).SerializeToString())


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from(ROUNDED),
    scale=st.sampled_from([1.0, 0.1, 3e-3, 2.0**-9, 7.3]),
    values=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
        min_size=1,
        max_size=20,
    ),
    codes=st.lists(
        st.floats(-300, 300, width=32, allow_subnormal=False), min_size=1, max_size=20
    ),
)
def test_a_node_computes_the_reference_quantizer(
    fmt: Format, scale: float, values: list[float], codes: list[float]
) -> None:
    near = f32(codes) * np.float32(scale)
    x = np.concatenate([f32(values), near, f32([0.5, 1.5, 2.5, -2.5]) * np.float32(scale)])
    expected = fake_quantize(x, np.float32(scale), fmt)
    (actual,) = runs(fmt, scale).run(None, {"x": x[:, None]})  # type: ignore[attr-defined]
    np.testing.assert_array_equal(actual[:, 0], expected)


@pytest.mark.parametrize("fmt", ROUNDED, ids=[fmt.name for fmt in ROUNDED])
def test_a_node_knows_every_number_and_every_tie_of_its_format(fmt: Format) -> None:
    if isinstance(fmt, IntFormat):
        grid = f32(np.arange(fmt.min, fmt.max + 1, max(1, int(fmt.max) // 512)))
    else:
        assert isinstance(fmt, FloatFormat)
        positive = np.unique(fake_quantize(f32(np.geomspace(1e-9, fmt.max, 20000)), 1.0, fmt))
        grid = np.concatenate([-positive, positive])
    ties = (np.sort(grid)[1:] + np.sort(grid)[:-1]) / 2
    x = np.concatenate([grid, ties, f32([2 * fmt.max, -2 * fmt.max])]).astype(np.float32)
    (actual,) = runs(fmt, 1.0).run(None, {"x": x[:, None]})  # type: ignore[attr-defined]
    np.testing.assert_array_equal(actual[:, 0], fake_quantize(x, 1.0, fmt))
