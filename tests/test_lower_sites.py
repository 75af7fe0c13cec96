"""The graph that is shipped computes what was searched, in standard operators."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_fliqs.containers import container_of
from onnx_fliqs.errors import FliqsError
from onnx_fliqs.formats import FORMATS, Format, IntFormat, is_passthrough
from onnx_fliqs.passes.lower_sites import LowerSitesPass
from onnx_fliqs.precision import Precision
from onnx_fliqs.runtime import OptimizationLevel, make_session
from onnx_fliqs.site_functions import DOMAIN
from onnx_fliqs.targets import TARGETS, Dialect
from onnx_fliqs.verify import compare
from pass_models import LAYERED
from support import (
    PRECISIONS,
    Calibrated,
    calibrated,
    calibrated_case,
    check_pass,
    evaluate,
    f32,
    initializer,
    model,
    on_targets,
    ops,
    random_feeds,
    run,
    serialized,
)

CASES = pytest.mark.parametrize("case", LAYERED)
EVERY = pytest.mark.parametrize("fmt", [FORMATS[name] for name in PRECISIONS], ids=PRECISIONS)
INTEGER_CASES = pytest.mark.parametrize(
    "case", [case for case, target in on_targets(LAYERED) if target == "ort-cpu"]
)
QDQ_CASES = [
    (case, target)
    for case, target in on_targets(LAYERED)
    if TARGETS[target].dialect is Dialect.QDQ
]
ON_TARGETS = pytest.mark.parametrize(("case", "target"), QDQ_CASES)
STANDARD = {"", "ai.onnx"}


def assert_as_searched(prepared: Calibrated, chosen: dict[str, Precision]) -> ir.Model:
    """The emitted graph is valid, standard, and computes the searchable one's bits."""
    graph = prepared.emitted(chosen)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} <= STANDARD
    assert {node.domain for node in graph.graph.all_nodes()} <= STANDARD
    assert not proto.functions
    feeds = random_feeds(prepared.canonical, 3)
    expected, actual = run(prepared.searchable(chosen), feeds), run(graph, feeds)
    # Exact: codes are the same integers, and a power of two rescales them exactly. Of weights
    # that stay float, the searchable graph computes what the other has as a constant, which
    # kernels may add up in another order.
    is_float = any(precision.name == "float32" for precision in chosen.values())
    for want, got in zip(expected, actual, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6 * is_float, atol=1e-6 * is_float)
    return graph


# -- agreement ------------------------------------------------------------------------------


@EVERY
@CASES
def test_every_format_computes_what_was_searched(case: str, fmt: Format) -> None:
    prepared = calibrated_case(case)
    assert_as_searched(prepared, prepared.space.uniform(PRECISIONS[fmt.name]))


@pytest.mark.parametrize("seed", range(4))
@ON_TARGETS
def test_random_mixes_compute_what_was_searched(case: str, target: str, seed: int) -> None:
    prepared = calibrated_case(case, target)
    assert_as_searched(prepared, prepared.random_mix(seed))


@ON_TARGETS
def test_8_bits_compute_what_was_searched(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    assert_as_searched(prepared, prepared.eight_bits())


@EVERY
@pytest.mark.parametrize("case", ["rearranged_input", "square_of_a_tensor"])
def test_the_reference_evaluator_agrees(case: str, fmt: Format) -> None:
    # One layer deep: sums that differ in the last bit meet no further quantizer.
    prepared = calibrated_case(case)
    chosen = prepared.space.uniform(PRECISIONS[fmt.name])
    feeds = random_feeds(prepared.canonical, 3)
    expected = run(prepared.searchable(chosen), feeds)
    proto = ir.to_proto(prepared.emitted(chosen))
    actual = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
    for want, got in zip(expected, actual, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32 sums


@ON_TARGETS
def test_float32_leaves_the_model_as_it_was(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    graph = assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["float32"]))
    assert ops(graph) == ops(prepared.canonical)
    assert set(graph.graph.initializers) == set(prepared.canonical.graph.initializers)


# -- the pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "int8", "int16", "e2m1", "e4m3", "bf16", "float32"])
@pytest.mark.parametrize("case", ["residual", "attention", "layers_in_a_branch"])
def test_the_pass_keeps_its_contract(case: str, fmt: str) -> None:
    prepared = calibrated_case(case)
    chosen = prepared.space.uniform(PRECISIONS[fmt])
    lower = LowerSitesPass(prepared.space, chosen, prepared.scales, prepared.target)
    before = prepared.searchable(chosen)
    after = check_pass(lower, before, rtol=1e-5, atol=1e-5)  # ORT and NumPy differ in no code
    assert not any(key[0] == DOMAIN for key in after.functions)


@ON_TARGETS
def test_an_emitted_graph_is_left_alone(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    chosen = prepared.random_mix(0)
    graph = prepared.emitted(chosen)
    before = serialized(ir.to_proto(graph))
    lower = LowerSitesPass(prepared.space, chosen, prepared.scales, prepared.target)
    assert not lower(graph).modified
    assert serialized(ir.to_proto(graph)) == before


def test_emission_does_not_change_the_canonical_model() -> None:
    prepared = calibrated_case("residual")
    before = serialized(ir.to_proto(prepared.canonical))
    prepared.emitted(prepared.random_mix(1))
    assert serialized(ir.to_proto(prepared.canonical)) == before


def test_emission_is_deterministic() -> None:
    prepared = calibrated_case("residual")
    graphs = [prepared.emitted(prepared.random_mix(2)) for _ in range(2)]
    assert serialized(ir.to_proto(graphs[0])) == serialized(ir.to_proto(graphs[1]))


@ON_TARGETS
def test_the_signature_stays(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    before = ir.to_proto(prepared.canonical).graph
    after = ir.to_proto(prepared.emitted(prepared.random_mix(3))).graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


def test_names_are_unique_even_beside_a_branch() -> None:
    prepared = calibrated_case("layers_in_a_branch")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["e2m1"]))
    names = [value.name for node in graph.graph.all_nodes() for value in node.outputs]
    assert len(names) == len(set(names))


def test_names_that_the_model_already_uses_do_no_harm() -> None:
    # PyTorch names parameters so: a tensor "a" beside initializers "a.scale" and "a.lo".
    renamed = {"w2": "a.scale", "b2": "a.zero_point", "w3": "a.lo", "b3": "a.scales"}
    plain = LAYERED["residual"].build()
    for old, new in renamed.items():
        value = plain.graph.initializers.pop(old)
        value.name = new
        plain.graph.register_initializer(value)
    prepared = calibrated(plain, "ort-cpu")
    assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["int8"]))


# -- storage --------------------------------------------------------------------------------


@EVERY
def test_weights_are_stored_in_the_container_of_their_format(fmt: Format) -> None:
    prepared = calibrated_case("residual")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS[fmt.name]))
    dtype = container_of(fmt).dtype
    for layer in prepared.space.layers:
        name = layer.weights[0]
        stored = name if fmt.name == "float32" else f"{name}@{layer.name}.codes"
        tensor = graph.graph.initializers[stored].const_value
        assert tensor is not None
        assert tensor.dtype is dtype
        assert tensor.nbytes == -(-layer.params * int(dtype.itemsize * 8) // 8)
        assert (name in graph.graph.initializers) == (fmt.name == "float32")


def test_the_file_shrinks_as_the_formats_do() -> None:
    wide = model(
        "g (float[N,64] x) => (float[N,64] y) { [fc] y = MatMul (x, w) }",
        weights={"w": (64, 64)},
    )
    prepared = calibrated(wide)
    sizes = {
        name: len(ir.to_proto(prepared.emitted({"fc": PRECISIONS[name]})).SerializeToString())
        for name in ("float32", "bf16", "int8", "e4m3", "int4")
    }
    scales = 64 * 4
    for name, size in sizes.items():
        codes = 64 * 64 * FORMATS[name].bits // 8
        assert 0 <= size - codes < scales + 1500  # 1500 bytes of names and nodes


@EVERY
def test_a_weight_of_several_layers_is_stored_once(fmt: Format) -> None:
    prepared = calibrated_case("shared_weight")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS[fmt.name]))
    stored = [name for name in graph.graph.initializers if name.endswith(".codes")]
    assert stored == ([] if fmt.name == "float32" else ["w@once.codes"])
    assert ("w" in graph.graph.initializers) == (fmt.name == "float32")


def test_layers_that_agree_share_the_quantizer_of_a_tensor() -> None:
    prepared = calibrated_case("attention")
    same = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    chosen = prepared.space.uniform(PRECISIONS["int8"]) | {"key": PRECISIONS["int4"]}
    other = prepared.emitted(chosen)
    readers = [
        sum(
            user.op_type in ("QuantizeLinear", "Clip")
            for user in g.graph.inputs[0].consumers()
        )
        for g in (same, other)
    ]
    assert readers == [1, 2]


# -- the dialect ----------------------------------------------------------------------------


def quantizers(graph: ir.Model) -> list[ir.Node]:
    return [n for n in graph.graph.all_nodes() if n.op_type == "QuantizeLinear"]


@EVERY
def test_a_zero_point_is_spelled_out_for_8_bits_and_where_it_is_not_0(fmt: Format) -> None:
    prepared = calibrated_case("residual")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS[fmt.name]))
    found = quantizers(graph)
    computed = isinstance(fmt, IntFormat) or fmt.name in ("e4m3", "e5m2")
    assert bool(found) == computed
    for node in found:
        if len(node.inputs) == 3:
            assert isinstance(fmt, IntFormat)
            assert node.inputs[2] is not None
            types = (ir.DataType.INT8, ir.DataType.UINT8)
            assert node.inputs[2].dtype in (types if fmt.bits <= 8 else (ir.DataType.UINT16,))
            assert "output_dtype" not in node.attributes
            assert fmt.bits <= 8 or initializer(graph, str(node.inputs[2].name)) > 0
        else:
            assert not isinstance(fmt, IntFormat) or fmt.bits > 8
            assert len(node.inputs) == 2
            assert node.attributes.get_int("output_dtype", 0) != 0
        (reader,) = node.outputs[0].consumers()
        assert reader.op_type == "DequantizeLinear"
        assert reader.inputs[1:] == node.inputs[1:]


@EVERY
def test_formats_without_a_kernel_are_rounded_by_arithmetic(fmt: Format) -> None:
    prepared = calibrated_case("conv_relu_conv")
    used = set(ops(prepared.emitted(prepared.space.uniform(PRECISIONS[fmt.name]))))
    if is_passthrough(fmt):
        assert used == {"Conv", "Relu"} | (
            set() if fmt.name == "float32" else {"Clip", "Cast"}
        )
    elif isinstance(fmt, IntFormat) or fmt.name in ("e4m3", "e5m2"):
        clipped = {"Clip"} if fmt.bits < 8 else set()
        assert used == {"Conv", "Relu", "QuantizeLinear", "DequantizeLinear"} | clipped
    else:
        assert {"Div", "Clip", "Abs", "Sub"} <= used
        assert "QuantizeLinear" not in used


def test_relu_makes_integers_unsigned_and_floats_not() -> None:
    prepared = calibrated_case("conv_relu_conv")
    for name, dtypes in (("int8", ["UINT8"] * 2), ("e4m3", ["FLOAT8E4M3FN"] * 2)):
        proto = ir.to_proto(prepared.emitted(prepared.space.uniform(PRECISIONS[name])))
        graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        assert [
            q.outputs[0].dtype.name for q in quantizers(graph) if q.outputs[0].dtype
        ] == dtypes
        zeros = [
            int(initializer(graph, str(q.inputs[2].name)))  # type: ignore[union-attr]
            for q in quantizers(graph)
            if len(q.inputs) > 2
        ]
        # Signed codes travel as uint8 around 128.
        assert zeros == ([128, 0] if name == "int8" else [])


def test_no_activation_is_a_four_bit_tensor() -> None:
    for name in ("int2", "int3", "int4"):
        for case in LAYERED:
            prepared = calibrated_case(case)
            proto = ir.to_proto(prepared.emitted(prepared.space.uniform(PRECISIONS[name])))
            graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
            dtypes = {q.outputs[0].dtype for q in quantizers(graph)}
            assert dtypes <= {ir.DataType.INT8, ir.DataType.UINT8}


# -- integer kernels ------------------------------------------------------------------------


def integer_graph(case: str) -> tuple[Calibrated, ir.Model]:
    prepared = calibrated_case(case, "ort-cpu")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    return prepared, graph


def test_integer_kernels_get_int32_biases_on_the_scale_of_the_products() -> None:
    prepared, graph = integer_graph("residual")
    nodes = {str(node.name): node for node in graph.graph}
    for layer in prepared.space.layers:
        activation, weight, bias = (
            value.producer() for value in nodes[layer.name].inputs if value is not None
        )
        assert activation is not None
        assert weight is not None
        assert bias is not None
        assert [n.op_type for n in (activation, weight, bias)] == ["DequantizeLinear"] * 3
        codes, scale = bias.inputs[:2]
        assert codes is not None
        assert codes.dtype is ir.DataType.INT32
        scales = [
            initializer(graph, str(node.inputs[1].name))  # type: ignore[union-attr]
            for node in (activation, weight)
        ]
        assert scale is not None
        np.testing.assert_array_equal(
            initializer(graph, str(scale.name)), (scales[0] * scales[1]).astype(np.float32)
        )


@INTEGER_CASES
def test_integer_kernels_get_uint8_activations(case: str) -> None:
    prepared, graph = integer_graph(case)
    points = {
        str(node.name): initializer(graph, str(node.inputs[2].name))  # type: ignore[union-attr]
        for node in quantizers(graph)
    }
    assert points
    for site in prepared.space.sites:
        name = f"{site.name}.QuantizeLinear"
        if name in points:
            assert points[name].dtype == np.uint8
            assert points[name] == (0 if site.negative == 0 else 128)


@INTEGER_CASES
def test_graph_outputs_stay_float_but_for_convolutions(case: str, tmp_path: Path) -> None:
    prepared, graph = integer_graph(case)
    pairs = zip(prepared.canonical.graph.outputs, graph.graph.outputs, strict=True)
    for plain, value in pairs:
        assert (value.name, value.dtype, value.shape) == (plain.name, plain.dtype, plain.shape)
        made, wanted = value.producer(), plain.producer()
        assert made is not None
        assert wanted is not None
        assert (made.op_type == "DequantizeLinear") == (wanted.op_type == "Conv")
    assert "Conv" not in operators_that_run(graph, tmp_path)


def test_rearrangements_share_the_scale_of_their_source() -> None:
    prepared, graph = integer_graph("rearranged_input")
    scales = {
        str(node.inputs[0].name): float(initializer(graph, str(node.inputs[1].name)))  # type: ignore[union-attr]
        for node in quantizers(graph)
    }
    assert scales.keys() == {"x", "s", "f", "z@float"}
    assert len({scales[name] for name in "xsf"}) == 1
    shared = {site.tensor: site.same_scale_as for site in prepared.space.sites}
    assert (shared["s"], shared["f"]) == ("x@all", "x@all")


@pytest.mark.parametrize("case", ["conv_relu_conv", "residual", "rearranged_input", "gemms"])
def test_integer_kernels_run_the_graph_in_integers_and_agree(case: str) -> None:
    prepared, graph = integer_graph(case)
    feeds = random_feeds(prepared.canonical, 3)
    names = [str(value.name) for value in graph.graph.outputs]
    data = ir.to_proto(graph).SerializeToString()
    fast = make_session(data, threads=1).run(names, feeds)
    plain = dict(zip(names, run(graph, feeds), strict=True))
    # Sums of integers differ from sums of floats by rounding; no code flips with this seed.
    assert compare(dict(zip(names, fast, strict=True)), plain).largest < 1e-5


def operators_that_run(graph: ir.Model, folder: Path) -> Counter[str]:
    """What a default session of the installed ONNX Runtime makes of a graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    data = ir.to_proto(graph).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    return Counter(node.op_type for node in optimized.graph.node)


CLIPS = "<float zero = {0.0}, float one = {1.0}, float six = {6.0}, float minus = {-1.0}>"


@pytest.mark.parametrize(
    "between",
    [
        "b = Relu (a)",
        "b = Clip (a, zero, six)",
        "b = Clip (a, minus, one)",
        "b = Add (a, x)",
        "s = Add (a, x) b = Relu (s)",
        "r = Relu (a) [c3] c = Conv (x, w) b = Concat <axis = 2> (r, c)",
        "r = Clip (a, zero, six) [c3] c = Conv (x, w) b = Concat <axis = 2> (c, r)",
        "r = Clip (a, zero, six) b = MaxPool <kernel_shape = [2, 2]> (r)",
        "b = GlobalAveragePool (a)",
        "b = LeakyRelu (a)",
    ],
)
def test_between_layers_everything_runs_in_integers(between: str, tmp_path: Path) -> None:
    plain = model(
        f"""g (float[N,2,4,4] x) => (float[N,M,K,L] y) {CLIPS} {{
            [c1] a = Conv (x, w)
            {between}
            [c2] y = Conv (b, w) }}""",
        weights={"w": (2, 2, 1, 1)},
    )
    prepared = calibrated(plain, "ort-cpu")
    graph = assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["int8"]))
    ran = operators_that_run(graph, tmp_path)
    assert (ran["QuantizeLinear"], ran["DequantizeLinear"]) == (1, 1)
    assert not ran.keys() & {"Conv", "FusedConv", "Relu", "Clip"}


def test_matrix_products_that_are_read_in_float_write_floats(tmp_path: Path) -> None:
    plain = model(
        """g (float[N,3,4] x) => (float[N,3,4] y) {
            [m1] a = MatMul (x, w)
            b = Add (a, c)
            r = Gelu (b)
            [m2] d = MatMul (r, w)
            e = Add (d, c)
            y = LayerNormalization (e, c) }""",
        weights={"w": (4, 4), "c": (4,)},
    )
    prepared = calibrated(plain, "ort-cpu")
    graph = assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["int8"]))
    ran = operators_that_run(graph, tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["QuantizeLinear"]) == (2, 2)
    assert "DequantizeLinear" not in ran


@pytest.mark.filterwarnings("error")
def test_the_bias_of_a_dead_channel_survives() -> None:
    plain = LAYERED["conv_relu_conv"].build()
    weight = np.array(initializer(plain, "w1"))
    weight[1] = 0  # as batch normalization leaves it behind a pruned filter
    weight[2] *= 1e-9
    bias = f32([0.1, 2.0, -2.0, 0.1])
    for name, array in (("w1", weight), ("b1", bias)):
        plain.graph.initializers[name].const_value = ir.tensor(array, name=name)
    prepared = calibrated(plain, "ort-cpu")
    assert_as_searched(prepared, prepared.space.uniform(PRECISIONS["int8"]))
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    codes = initializer(graph, "b1@c1:bias.codes").astype(np.float64)
    scale = initializer(graph, "b1@c1:bias.scale").astype(np.float64)
    np.testing.assert_allclose(codes * scale, bias, atol=scale.max())


@pytest.mark.filterwarnings("error")
def test_a_bias_beyond_int32_saturates_and_keeps_its_sign() -> None:
    plain = LAYERED["conv_relu_conv"].build()
    prepared = calibrated(plain, "ort-cpu")
    bias = f32([1e12, -1e12, 0, 1])
    # Training may move it beyond the room that calibration left.
    prepared.canonical.graph.initializers["b1"].const_value = ir.tensor(bias, name="b1")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int8"]))
    codes = initializer(graph, "b1@c1:bias.codes")
    assert codes[0] == 2**31 - 128
    assert codes[1] == -(2**31)


# -- traps in ONNX Runtime ------------------------------------------------------------------


@EVERY
def test_a_relu_before_a_quantizer_survives_the_default_optimisations(fmt: Format) -> None:
    # With a zero point, ONNX Runtime 1.19 drops a Relu before QuantizeLinear to fp8 or int4.
    prepared = calibrated(
        model(
            """g (float[N,3,4,4] x) => (float[N,2,4,4] y) {
                r = Relu (x)
                [c1] y = Conv (r, w) }""",
            weights={"w": (2, 3, 1, 1)},
        ),
        precisions=[PRECISIONS[fmt.name]],
    )
    graph = assert_as_searched(prepared, prepared.space.uniform(PRECISIONS[fmt.name]))
    feeds = random_feeds(prepared.canonical, 3)
    assert (feeds["x"] < 0).any()
    plain = run(graph, feeds)[0]
    optimised = make_session(ir.to_proto(graph).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(optimised, plain, atol=1e-5)


@pytest.mark.parametrize("level", list(OptimizationLevel))
def test_int4_beside_int8_activations_do_not_corrupt_each_other(
    level: OptimizationLevel,
) -> None:
    # ONNX Runtime 1.19 gave the half-sized buffer of an int4 tensor to an int8 tensor.
    prepared = calibrated(
        model(
            """g (float[N,4,8,8] x) => (float[N,4,8,8] y) {
                [c1] a = Conv (x, w1)
                r = Relu (a)
                [c2] b = Conv (r, w2)
                [c3] c = Conv (b, w3)
                s = Sigmoid (c)
                [c4] d = Conv (s, w4)
                y = Add (d, x) }""",
            weights={f"w{i}": (4, 4, 1, 1) for i in (1, 2, 3, 4)},
        ),
    )
    chosen = {f"c{i}": PRECISIONS["int4" if i % 2 else "int8"] for i in (1, 2, 3, 4)}
    graph = assert_as_searched(prepared, chosen)
    built = make_session(ir.to_proto(graph).SerializeToString(), level=level, threads=1)
    for seed in range(5):
        feeds = random_feeds(prepared.canonical, seed, batch=7)
        want = run(graph, feeds)[0]
        difference = compare({"y": built.run(None, feeds)[0]}, {"y": want})
        assert difference.rms < 0.02  # a flipped code of an int4 layer; corruption gives 1


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "int4", "int16"])
def test_the_basic_level_always_runs_what_was_searched(fmt: str) -> None:
    for case in LAYERED:
        prepared = calibrated_case(case)
        graph = prepared.emitted(prepared.space.uniform(PRECISIONS[fmt]))
        feeds = random_feeds(prepared.canonical, 3)
        names = [str(value.name) for value in graph.graph.outputs]
        data = ir.to_proto(graph).SerializeToString()
        try:
            basic = make_session(data, level=OptimizationLevel.BASIC).run(names, feeds)
        except FliqsError as error:
            pytest.fail(f"{case}: {error}")
        plain = dict(zip(names, run(graph, feeds), strict=True))
        assert compare(dict(zip(names, basic, strict=True)), plain).rms < 1e-3


def test_int4_initializers_are_packed() -> None:
    # A text model stores them unpacked, which the checker passes and every runtime misreads.
    prepared = calibrated_case("square_of_a_tensor")
    assert prepared.space.layer["square"].weights == ()
    prepared = calibrated_case("gemms")
    graph = prepared.emitted(prepared.space.uniform(PRECISIONS["int4"]))
    proto = ir.to_proto(graph)
    packed = {
        t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT4
    }
    assert {name: len(t.raw_data) for name, t in packed.items()} == {
        "w1@plain.codes": 6,
        "w2@trans.codes": 3,
        "w3@left.codes": 5,
    }
    expected, actual = evaluate((prepared.searchable(), graph), random_feeds(graph, 1))
    # Four bits of three layers in a row are coarse; wrongly unpacked ones are unrelated.
    assert np.corrcoef(expected[0].ravel(), actual[0].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", ["int2", "int4", "int16", "e4m3", "e5m2"])
def test_biases_beside_dequantized_operands_are_stored_where_no_runtime_rounds_them(
    name: str,
) -> None:
    """ONNX Runtime 1.31.1 rounds float biases to the product of the operands' scales."""
    case = calibrated_case("conv_relu_conv")
    graph = case.emitted(case.space.uniform(PRECISIONS[name]))
    biases = [node.inputs[2] for node in graph.graph if node.op_type == "Conv"]
    assert len(biases) == 2
    for value in biases:
        assert value is not None
        producer = value.producer()
        assert producer is not None
        assert producer.op_type == "DequantizeLinear"
        scale = initializer(graph, str(producer.inputs[1].name))  # type: ignore[union-attr]
        # A power of two: the codes times the scale are exact.
        assert np.frexp(scale)[0] == 0.5
