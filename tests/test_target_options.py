"""What a target asks of scales, zero points and biases: calibrated, searched, emitted."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.calibrate import negative_shares
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.emission import emit
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import (
    FORMATS,
    IntFormat,
    fake_quantize,
    parse_format,
    quantize,
    unsigned_variant,
)
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import parse_precision, parse_space
from onnx_fliqs.prepare import calibrate, prepare
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import TARGETS, Activations, Bias, Placement, Target
from onnx_fliqs.thresholds import least_squares_scales, power_of_two_scales
from support import (
    Calibrated,
    Feeds,
    calibrated,
    evaluate,
    f32,
    initializer,
    model,
    ops,
    random_feeds,
    run,
)

Array = npt.NDArray[np.float32]

GENERIC = TARGETS["generic"]
NETWORK = """g (float[N,3,6,6] x) => (float[N,5] y) {
    [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    s = Sigmoid (a)
    swish = Mul (a, s)
    [c2] b = Conv (swish, w2, b2)
    r = Relu (b)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    [fc] y = Gemm <transB = 1> (f, w3, b3) }"""
WEIGHTS = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (16, 8, 3, 3),
    "b2": (16,),
    "w3": (5, 16),
    "b3": (5,),
}
SPACE = "int4 int8 int4:int8 int8:int16 int4:float32 int4:int16 float32"
PAIRS = pytest.mark.parametrize("name", SPACE.split())


def network(target: Target, space: str = SPACE) -> Calibrated:
    return calibrated(model(NETWORK, weights=WEIGHTS), target, parse_space(space))


def assert_as_searched(case: Calibrated, name: str) -> ir.Model:
    """The emitted graph is valid and computes the searchable one's bits."""
    chosen = case.space.uniform(parse_precision(name))
    graph = case.emitted(chosen)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    feeds = random_feeds(case.canonical, 3)
    want = run(case.searchable(chosen), feeds)
    np.testing.assert_array_equal(run(graph, feeds), want)
    return graph


def zero_points(
    graph: ir.Model, op_type: str = "QuantizeLinear"
) -> dict[str, npt.NDArray[Any]]:
    """Tensor → the zero point of its quantizer; 0 where none is spelled out."""
    found = {}
    for node in graph.graph:
        if node.op_type == "QuantizeLinear":
            point = node.inputs[2] if len(node.inputs) > 2 else None
            name = str(node.name).partition("@")[0]
            found[name] = np.array(0) if point is None else initializer(graph, str(point.name))
    return found


# -- pairs ----------------------------------------------------------------------------------


@PAIRS
def test_pairs_of_formats_compute_what_was_searched(name: str) -> None:
    assert_as_searched(network(GENERIC), name)


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("int4:int8", "INT4", {"UINT8"}),
        ("int8:int16", "INT8", {"UINT16"}),
        ("int4:float32", "INT4", set()),
        ("int4:int16", "INT4", {"UINT16"}),
    ],
)
def test_each_operand_is_stored_in_its_own_format(
    name: str, weights: str, activations: set[str]
) -> None:
    graph = assert_as_searched(network(GENERIC), name)
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(graph)))
    made = {
        node.outputs[0].dtype.name
        for node in inferred.graph
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype is not None
    }
    assert made == activations
    for tensor in ("w1@c1", "w2@c2", "w3@fc"):
        stored = graph.graph.initializers[f"{tensor}.codes"].const_value
        assert stored is not None
        assert stored.dtype.name == weights


def test_an_int32_bias_stands_only_between_8_bit_integers() -> None:
    case = network(GENERIC)
    biases = [site.name for site in case.space.sites if site.bias_of]
    assert len(biases) == 3
    for name in SPACE.split():
        taken = case.space.formats_taken(case.space.uniform(parse_precision(name)))
        assert {taken[bias].name for bias in biases} == {
            "int32" if name == "int8" else "float32"
        }


@pytest.mark.parametrize("name", ["int4:int8", "int8:int16", "int4:float32", "int4:int16"])
def test_pairs_are_right_at_the_level_that_is_recorded(name: str) -> None:
    case = network(GENERIC)
    operands = case.canonical, case.space, case.space.uniform(parse_precision(name))
    feeds = [random_feeds(case.canonical, 3)]
    emitted = emit(*operands, case.scales, case.target, feeds)
    assert emitted.level in (OptimizationLevel.DEFAULT, OptimizationLevel.BASIC)


# -- asymmetric activations -----------------------------------------------------------------

ASYMMETRIC = replace(GENERIC, activations=Activations.ASYMMETRIC)


def share_of(values: npt.ArrayLike, space: str = "int8") -> float:
    """What ``negative_shares`` says of one tensor."""
    plain = canonicalise(
        model(
            "g (float[N,4] x) => (float[N,2] y) { [fc] y = MatMul (x, w) }",
            weights={"w": (4, 2)},
        )
    )
    found = find_layers(plain, ASYMMETRIC, parse_space(space))
    (share,) = negative_shares(found, {"x": f32(values).reshape(-1)}).values()
    return share


def normal(count: int = 4096) -> Array:
    return np.random.default_rng(0).standard_normal(count).astype(np.float32)


def gelu_like(x: Array) -> Array:
    """The function x * sigmoid(1.702 x), which has a minimum of -0.1."""
    return f32(x / (1 + np.exp(-1.702 * x)))


@pytest.mark.parametrize("space", ["int4", "int8", "int4,int16", "int4:int8"])
def test_values_that_are_never_negative_have_no_share_below_zero(space: str) -> None:
    assert share_of(np.abs(normal()), space) == 0
    assert share_of([0, 0, 0], space) == 0
    assert share_of([3], space) == 0


@pytest.mark.parametrize("space", ["int4", "int8", "int16"])
def test_half_of_a_symmetric_range_lies_below_zero(space: str) -> None:
    values = normal()
    both = np.concatenate([values, -values])
    assert share_of(both, space) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("space", ["int4", "int8", "int16"])
def test_a_small_share_of_what_gelu_makes_lies_below_zero(space: str) -> None:
    share = share_of(gelu_like(normal()), space)
    assert 0.0 < share < 0.15


def test_values_that_are_never_positive_lie_below_zero() -> None:
    share = share_of(-np.abs(normal()))
    assert share > 0.95
    fmt = unsigned_variant(FORMATS["int8"], share)
    assert fmt.max >= 1  # something above zero can be represented
    scale = least_squares_scales(-np.abs(normal())[None, :], fmt)
    assert (scale > 0).all()


def test_the_share_that_is_chosen_has_no_more_error_than_the_symmetric_range() -> None:
    for values in (gelu_like(normal()), normal() + 1, np.exp(normal()) - 0.5):
        for name in ("int4", "int8"):
            errors = []
            for share in (share_of(values, name), 0.5):
                fmt = unsigned_variant(FORMATS[name], share)
                scale = least_squares_scales(f32(values)[None, :], fmt)
                difference = fake_quantize(f32(values), scale, fmt) - values
                errors.append(float(np.square(difference).sum()))
            assert errors[0] <= errors[1]


def test_a_space_without_integers_has_no_shares() -> None:
    plain = canonicalise(model(NETWORK, weights=WEIGHTS))
    space = find_layers(plain, ASYMMETRIC, parse_space("e4m3,int4:float32,float32"))
    assert negative_shares(space, {}) == {}


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [
        ("int8", 8, np.uint8),
        ("int4:int8", 8, np.uint8),
        ("int4", 4, np.uint8),
        ("int8:int4", 4, np.uint8),
        ("int16", 16, np.uint16),
        ("int8:int16", 16, np.uint16),
    ],
)
def test_the_quantizer_has_the_zero_point_of_its_site(
    name: str, bits: int, dtype: type
) -> None:
    case = network(ASYMMETRIC, f"{name} float32")
    graph = assert_as_searched(case, name)
    points = zero_points(graph)
    expected = {}
    for site in case.space.sites:
        if not site.is_weight:
            assert site.negative is not None
            expected[site.tensor] = round(site.negative * (2**bits - 1))
    assert {tensor: int(point) for tensor, point in points.items()} == expected
    assert expected["f"] == 0
    assert expected["swish"] < 0.25 * 2**bits
    assert expected["swish"] > 0 or bits == 4  # a fifteenth is too much for what lies there
    assert 0.3 * 2**bits < expected["x"] < 0.7 * 2**bits
    for point in (points["x"], points["swish"]):
        assert point.dtype == dtype


def test_minifloats_have_no_zero_point() -> None:
    case = network(ASYMMETRIC, "e4m3 int8 int8:e5m2 float32")
    for name in ("e4m3", "int8:e5m2"):
        graph = assert_as_searched(case, name)
        assert {int(point) for point in zero_points(graph).values()} == {0}
    assert_as_searched(case, "int8")


def test_a_target_of_signed_codes_shifts_the_zero_point() -> None:
    plain = network(ASYMMETRIC, "int8 float32")
    shifted = network(replace(ASYMMETRIC, activation_type="INT8"), "int8 float32")
    one, other = (zero_points(assert_as_searched(case, "int8")) for case in (plain, shifted))
    assert list(one) == list(other)
    for tensor in one:
        assert other[tensor].dtype == np.int8
        assert int(other[tensor]) == int(one[tensor]) - 128
    feeds = random_feeds(plain.canonical, 3)
    chosen = plain.space.uniform(parse_precision("int8"))
    np.testing.assert_array_equal(
        run(plain.emitted(chosen), feeds), run(shifted.emitted(chosen), feeds)
    )


def test_the_reference_evaluator_agrees_on_zero_points() -> None:
    for name in ("int8", "int4", "int16"):
        case = calibrated(
            model(
                """g (float[N,8] x) => (float[N,4] y) {
                    s = Sigmoid (x)
                    z = Mul (x, s)
                    [fc] y = MatMul (z, w) }""",
                weights={"w": (8, 4)},
            ),
            ASYMMETRIC,
            parse_space(name),
        )
        chosen = case.space.uniform(parse_precision(name))
        feeds = random_feeds(case.canonical, 3)
        want, got = evaluate((case.searchable(chosen), case.emitted(chosen)), feeds)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("placement", Placement)
def test_what_shares_a_scale_shares_its_zero_point(
    placement: Placement, activations: Activations
) -> None:
    target = replace(TARGETS["ort-cpu"], placement=placement, activations=activations)
    case = calibrated(
        model(
            """g (float[N,2,4,4] x) => (float[N,3,2,2] y) {
                [c1] a = Conv (x, w1)
                s = Sigmoid (a)
                t = Mul (a, s)
                u = Concat <axis = 1> (t, x)
                m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (u)
                [c2] y = Conv (m, w2) }""",
            weights={"w1": (2, 2, 1, 1), "w2": (3, 4, 1, 1)},
        ),
        target,
        parse_space("int8 float32"),
    )
    first = {site.name: site for site in case.space.sites}
    for site in case.space.sites:
        if site.same_scale_as is not None:
            assert site.negative == first[site.same_scale_as].negative
    for seed in range(3):
        chosen, feeds = case.random_mix(seed), random_feeds(case.canonical, 3)
        want = run(case.searchable(chosen), feeds)
        np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)
    assert_as_searched(case, "int8")


def test_calibration_finds_the_zero_points() -> None:
    plain = model(NETWORK, weights=WEIGHTS)
    rng = np.random.default_rng(0)
    for low, expected in ((0.0, 0.0), (-1.0, 0.5)):
        x = rng.uniform(low, 1, (16, 3, 6, 6)).astype(np.float32)
        data = Dataset({"x": x}, None, input_specs(plain))
        precisions = parse_space("int8,float32")
        prepared = prepare(plain, data, ASYMMETRIC, precisions)
        prepared, scales, _ = calibrate(prepared, ASYMMETRIC, data, 0)
        shares = {s.tensor: s.negative for s in prepared.space.sites if not s.is_weight}
        assert shares["x"] == pytest.approx(expected, abs=0.01)
        assert shares["f"] == 0
        assert shares["swish"] is not None
        assert 0 < shares["swish"] < 0.5
        prepared.space.values(prepared.space.uniform(parse_precision("int8")), scales)


@pytest.mark.parametrize("synthetic", [False, True])
def test_with_symmetric_activations_everything_is_signed(synthetic: bool) -> None:
    target = replace(GENERIC, activations=Activations.SYMMETRIC, activation_type=None)
    plain = model(NETWORK, weights=WEIGHTS)
    x = np.random.default_rng(0).uniform(0, 1, (16, 3, 6, 6)).astype(np.float32)
    data = Dataset({"x": x}, None, input_specs(plain), synthetic=synthetic)
    prepared = prepare(plain, data, target, parse_space("int8,float32"))
    prepared, _, _ = calibrate(prepared, target, data, 0)
    assert {site.negative for site in prepared.space.sites} == {None}
    case = network(target, "int8 int4 int16")
    for name, dtype in (("int8", np.int8), ("int4", np.int8), ("int16", None)):
        graph = assert_as_searched(case, name)
        points = zero_points(graph)
        assert {int(point) for point in points.values()} == {0}
        if dtype is not None:
            assert {point.dtype for point in points.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", ["int8", "int4", "int16", "e4m3", "int4:int8"])
def test_a_target_may_want_every_zero_point_spelled_out(name: str) -> None:
    target = replace(
        GENERIC,
        activations=Activations.SYMMETRIC,
        activation_type=None,
        zero_points=True,
        bias=Bias.FLOAT,
    )
    graph = assert_as_searched(network(target, name), name)
    quantizers = [node for node in graph.graph if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 3
    for node in quantizers:
        assert len(node.inputs) == 3
        assert node.inputs[2] is not None
        (reader,) = node.outputs[0].consumers()
        assert reader.inputs[1:] == node.inputs[1:]


# -- the format with a zero point -----------------------------------------------------------


@st.composite
def asymmetric_cases(draw: st.DrawFn) -> tuple[IntFormat, Array, np.float32]:
    bits = draw(st.sampled_from([8, 16]))
    fmt = unsigned_variant(FORMATS[f"int{bits}"], draw(st.floats(0, 1)))
    assert isinstance(fmt, IntFormat)
    scale = np.float32(draw(st.floats(2.0**-20, 2.0**20)))
    codes = draw(st.lists(st.floats(-0.3, 1.3), min_size=1, max_size=16))
    numbers = np.array(codes) * 2**bits - fmt.zero_point
    exact = draw(st.lists(st.integers(0, 2**bits - 1), max_size=4))
    halves = np.array([code - fmt.zero_point + 0.5 for code in exact])
    return fmt, f32(np.concatenate([numbers, halves]) * scale), scale


@functools.cache
def roundtrip(bits: int) -> ir.Model:
    kind = f"uint{bits}"
    return model(
        f"""g (float[N] x, float s, {kind} z) => (float[N] y, {kind}[N] q) {{
            q = QuantizeLinear (x, s, z)
            y = DequantizeLinear (q, s, z) }}"""
    )


def quantized_by_onnx(fmt: IntFormat, x: Array, scale: np.float32) -> Feeds:
    return {
        "x": x,
        "s": np.array(scale),
        "z": np.array(fmt.zero_point, np.dtype(f"uint{fmt.bits}")),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(asymmetric_cases())
def test_an_asymmetric_format_rounds_as_quantizelinear(
    case: tuple[IntFormat, Array, np.float32],
) -> None:
    fmt, x, scale = case
    y, codes = run(roundtrip(fmt.bits), quantized_by_onnx(fmt, x, scale))
    np.testing.assert_array_equal(fake_quantize(x, scale, fmt), y)
    np.testing.assert_array_equal(
        quantize(x / scale, fmt) + fmt.zero_point, codes.astype(np.float32)
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(asymmetric_cases())
def test_an_asymmetric_format_rounds_as_numpy_does(
    case: tuple[IntFormat, Array, np.float32],
) -> None:
    fmt, x, scale = case
    codes = np.clip(np.rint(x / scale) + fmt.zero_point, 0, 2**fmt.bits - 1)
    want = ((codes - fmt.zero_point).astype(np.float32) * scale).astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(x, scale, fmt), want)


@given(bits=st.sampled_from([*range(2, 9), 16]), share=st.floats(0, 1))
def test_the_range_of_an_asymmetric_format_holds_zero_and_one_step_above(
    bits: int, share: float
) -> None:
    fmt = unsigned_variant(FORMATS[f"int{bits}"], share)
    assert isinstance(fmt, IntFormat)
    assert not fmt.signed
    assert fmt.min <= 0 < fmt.max
    assert fmt.max - fmt.min == 2**bits - 1
    assert abs(-fmt.min - share * (2**bits - 1)) <= 1.5
    assert fmt.name == (f"uint{bits}z{fmt.zero_point}" if fmt.zero_point else f"uint{bits}")


# -- scales that are powers of two ----------------------------------------------------------

SHIFTS = replace(GENERIC, power_of_two_scales=True)


def assert_powers_of_two(scales: Mapping[Any, Array]) -> None:
    assert scales
    for scale in scales.values():
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "uint8", "int16", "e2m1", "e4m3"])
def test_a_scale_goes_to_the_better_of_the_two_nearest_powers(name: str) -> None:
    rng = np.random.default_rng(0)
    values = f32(rng.standard_normal((32, 256)) * np.exp2(rng.uniform(-9, 9, (32, 1))))
    if name == "uint8":
        values = np.abs(values)
    fmt = parse_format(name)
    exact = least_squares_scales(values, fmt)
    found = power_of_two_scales(values, exact, fmt)
    assert_powers_of_two({name: found})
    above = found > exact
    assert above.any() != above.all() or fmt.bits > 8
    other = np.where(above, found / 2, found * 2).astype(np.float32)
    assert (np.maximum(found, other) >= exact).all()
    assert (np.minimum(found, other) <= exact).all()

    def errors(scales: Array) -> npt.NDArray[np.float64]:
        difference = fake_quantize(values, scales[:, None], fmt) - values
        result: npt.NDArray[np.float64] = np.square(difference, dtype=np.float64).sum(axis=1)
        return result

    assert (errors(found) <= errors(other) * (1 + 1e-5)).all()  # float32 sums


@pytest.mark.parametrize("activations", Activations)
def test_every_scale_is_a_power_of_two(activations: Activations) -> None:
    space = f"{SPACE} e2m1:e4m3"
    case = network(replace(SHIFTS, activations=activations), space)
    assert_powers_of_two(case.scales)
    for precision in case.space.precisions:
        taken = case.space.formats_taken(case.space.uniform(precision))
        # Those of biases, which are products, too.
        assert_powers_of_two(case.space.scales_taken(taken, case.scales))
        graph = assert_as_searched(case, precision.name)
        for name, value in graph.graph.initializers.items():
            if name.endswith(".scale"):
                assert value.const_value is not None
                assert_powers_of_two({name: value.const_value.numpy()})


def test_scales_of_groups_are_powers_of_two() -> None:
    case = calibrated(
        model(
            "g (float[N,32] x) => (float[N,6] y) { [fc] y = MatMul (x, w) }",
            weights={"w": (32, 6)},
        ),
        SHIFTS,
        parse_space("int4g16:float32 int8"),
    )
    assert case.scales["w@fc", "int4g16"].shape == (12,)
    assert_powers_of_two(case.scales)
    assert_as_searched(case, "int4g16:float32")


@pytest.mark.filterwarnings("error")
def test_a_dead_channel_keeps_a_share_of_the_scale_that_its_bias_needs() -> None:
    plain = model(
        "g (float[N,3,4,4] x) => (float[N,4,4,4] y) { [c] y = Conv (x, w, b) }",
        weights={"w": (4, 3, 1, 1), "b": (4,)},
    )
    weight = np.array(initializer(plain, "w"))
    weight[1] *= 1e-9
    plain.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    case = calibrated(plain, SHIFTS, parse_space("int8"))
    scales = case.scales["w@c", "int8"]
    assert scales.min() >= scales.max() * 2.0**-15
    graph = assert_as_searched(case, "int8")
    codes = initializer(graph, "b@c:bias.codes").astype(np.float64)
    step = initializer(graph, "b@c:bias.scale").astype(np.float64)
    np.testing.assert_allclose(codes * step, initializer(case.canonical, "b"), atol=step.max())


# -- biases ---------------------------------------------------------------------------------


def producers(graph: ir.Model) -> dict[str, str]:
    """Layer → the operator that makes its bias."""
    found = {}
    for node in graph.graph:
        if node.op_type in ("Conv", "Gemm"):
            bias = node.inputs[2]
            assert bias is not None
            made = bias.producer()
            found[str(node.name)] = "" if made is None else made.op_type
    return found


@PAIRS
def test_a_float_bias_stays_an_initializer(name: str) -> None:
    case = network(replace(GENERIC, bias=Bias.FLOAT))
    assert not [site for site in case.space.sites if site.tensor.startswith("b")]
    graph = assert_as_searched(case, name)
    assert set(producers(graph).values()) == {""}
    for tensor in ("b1", "b2", "b3"):
        np.testing.assert_array_equal(
            initializer(graph, tensor), initializer(case.canonical, tensor)
        )


@PAIRS
def test_a_bias_may_be_stored_like_the_weights(name: str) -> None:
    case = network(replace(GENERIC, bias=Bias.WEIGHT))
    sites = {s.tensor: s for s in case.space.sites if s.tensor in ("b1", "b2", "b3")}
    assert set(sites) == {"b1", "b2", "b3"}
    weights = parse_precision(name).weights
    taken = case.space.formats_taken(case.space.uniform(parse_precision(name)))
    graph = assert_as_searched(case, name)
    assert set(producers(graph).values()) == {"" if name == "float32" else "DequantizeLinear"}
    for tensor, site in sites.items():
        assert (site.axis, site.channels, site.bias_of) == (None, 1, None)
        assert taken[site.name] == weights
        if name != "float32":
            codes = graph.graph.initializers[f"{site.name}.codes"].const_value
            assert codes is not None
            assert codes.dtype.name == weights.name.upper()
            scale = initializer(graph, f"{site.name}.scale")
            assert scale.shape == ()
            want = fake_quantize(initializer(case.canonical, tensor), scale, weights)
            np.testing.assert_array_equal(codes.numpy().astype(np.float32) * scale, want)


def test_the_scale_of_a_bias_that_is_stored_like_the_weights_is_the_best_for_it() -> None:
    case = network(replace(GENERIC, bias=Bias.WEIGHT))
    for tensor, layer in (("b1", "c1"), ("b3", "fc")):
        values = initializer(case.canonical, tensor)[None, :]
        for fmt in ("int4", "int8"):
            found = case.scales[f"{tensor}@{layer}:bias", fmt]
            np.testing.assert_array_equal(found, least_squares_scales(values, FORMATS[fmt]))


def test_a_bias_that_two_layers_share_is_stored_for_each() -> None:
    case = calibrated(
        model(
            """g (float[N,4,4,4] x) => (float[N,4,4,4] y) {
                [one] a = Conv (x, w1, b)
                [two] y = Conv (a, w2, b) }""",
            weights={"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "b": (4,)},
        ),
        replace(GENERIC, bias=Bias.WEIGHT),
        parse_space("int4 int8 float32"),
    )
    for seed in range(4):
        chosen, feeds = case.random_mix(seed), random_feeds(case.canonical, 3)
        want = run(case.searchable(chosen), feeds)
        np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)


# -- all at once ----------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "shifts": {"power_of_two_scales": True},
    "biases of weights": {"bias": Bias.WEIGHT},
    "float biases": {"bias": Bias.FLOAT},
    "one scale per weight": {"per_channel_ops": ()},
    "scales per channel of Conv": {"per_channel_ops": ("Conv",)},
    "sites of tensors": {
        "placement": Placement.TENSORS,
        "between_ops": ("Mul", "GlobalAveragePool"),
    },
    "signed codes": {"activation_type": "INT8"},
    "residual additions": {"residual_adds": True},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_computes_what_was_searched(
    option: str, activations: Activations, seed: int
) -> None:
    target = replace(GENERIC, activations=activations, **OPTIONS[option])
    case = network(target)
    chosen, feeds = case.random_mix(seed), random_feeds(case.canonical, 3)
    want = run(case.searchable(chosen), feeds)
    np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)


RESIDUAL = """g (float[N,4,5,5] x) => (float[N,4,5,5] y) {
    [c1] a = Conv (x, w1)
    r = Relu (a)
    [c2] b = Conv (r, w2)
    s = Add (b, r)
    [c3] c = Conv (s, w3)
    [c4] d = Conv (s, w4)
    t = Add (c, d)
    n = Neg (t)
    u = Add (n, t)
    [c5] y = Conv (u, w5) }"""


def residual(target: Target) -> Calibrated:
    weights = {f"w{i}": (4, 4, 1, 1) for i in range(1, 6)}
    return calibrated(
        model(RESIDUAL, weights=weights), target, parse_space("int4 int8 float32")
    )


def test_what_is_added_to_a_convolution_is_quantized_in_its_format() -> None:
    sites = {
        site.name: site for site in residual(replace(GENERIC, residual_adds=True)).space.sites
    }
    assert "r@Add_s:1" in sites
    assert sites["r@Add_s:1"].layers == ("c2",)
    assert sites["r@Add_s:1"].consumers == (("Add_s", 1),)
    # Of two convolutions the one that is computed last adds; "u" is no residual.
    assert sites["c@Add_t:0"].layers == ("c4",)
    assert not any("Add_u" in name for name in sites)
    assert not any("Add" in site.name for site in residual(GENERIC).space.sites)


@pytest.mark.parametrize("seed", range(4))
def test_residual_additions_compute_what_was_searched(seed: int) -> None:
    case = residual(replace(GENERIC, residual_adds=True))
    chosen, feeds = case.random_mix(seed), random_feeds(case.canonical, 3)
    want = run(case.searchable(chosen), feeds)
    graph = case.emitted(chosen)
    np.testing.assert_array_equal(run(graph, feeds), want)
    assert set(ops(graph)) >= {"Conv", "Relu", "Neg", "Add"}
