"""The searchable sites: the functions in ONNX Runtime, their gradients, and what is fed."""

import functools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.formats import (
    FORMATS,
    FloatFormat,
    Format,
    GridCode,
    IntFormat,
    fake_quantize,
    grid_code,
    unsigned_variant,
)
from onnx_fliqs.gradient import GRADIENT, build_gradient
from onnx_fliqs.precision import PrecisionMap, parse_precision, parse_space
from onnx_fliqs.site_functions import (
    ANY_CODES,
    ANY_SITE,
    BYTE_CODES,
    BYTE_SITE,
    DOMAIN,
    INTEGER_CODES,
    INTEGER_SITE,
    POSITIVE_SITE,
    site_function,
)
from onnx_fliqs.sites import Layer, SearchSpace, Site
from support import PRECISIONS, f32, model, session

Array = npt.NDArray[np.float32]

FIELDS = {
    ANY_SITE: ANY_CODES,
    INTEGER_SITE: INTEGER_CODES,
    BYTE_SITE: BYTE_CODES,
    POSITIVE_SITE: ANY_CODES,
}
EVERY = list(FORMATS.values())
INTEGERS = [f for f in EVERY if isinstance(f, IntFormat) or f.name == "float32"]
PAIRS = [(ANY_SITE, f) for f in EVERY] + [(INTEGER_SITE, f) for f in INTEGERS]
IDS = [f"{function}-{fmt.name}" for function, fmt in PAIRS]
BYTES: list[Format] = [f for f in EVERY if isinstance(f, IntFormat) and f.bits <= 8]
BYTES += [
    unsigned_variant(FORMATS[f"int{b}"], share) for b in (2, 4, 8) for share in (0.15, 1)
]
_ONE_SCALE = (BYTE_SITE, POSITIVE_SITE)
EVERY_POSITIVE = [*EVERY, unsigned_variant(FORMATS["int8"], 0.15)]
BOTH_SITES = pytest.mark.parametrize(("function", "fmt"), PAIRS, ids=IDS)
_HEADER = '<ir_version: 10, opset_import: ["" : 21, "onnx_fliqs" : 1]>'


def site_model(function: str) -> ir.Model:
    """One site of a [rows, columns] value, with a scale per row, or with one."""
    scale = "float" if function in _ONE_SCALE else "float[S,1]"
    codes = ", ".join(f"float {name}" for name in FIELDS[function])
    names = ", ".join(FIELDS[function])
    built = model(
        f"""g (float[R,C] x, {scale} scale, {codes}) => (float[R,C] y) {{
            y = onnx_fliqs.{function} (x, scale, {names}) }}""",
        header=_HEADER,
    )
    added = site_function(function)
    built.functions[added.identifier()] = added
    return built


@functools.cache
def site_session(function: str, level: str) -> ort.InferenceSession:
    data = ir.to_proto(site_model(function)).SerializeToString()
    if level == "none":
        return session(data)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _shaped(scale: Array, function: str) -> Array:
    return np.reshape(scale, () if function in _ONE_SCALE else (-1, 1))


def in_runtime(x: Array, scale: Array, function: str, fmt: Format, level: str) -> Array:
    """Quantize rows with their scales, in ONNX Runtime."""
    code = grid_code(fmt)._asdict()
    feeds = {name: np.array(code[name], np.float32) for name in FIELDS[function]}
    feeds["scale"] = _shaped(scale, function)
    result = site_session(function, level).run(None, {"x": x, **feeds})[0]
    return np.asarray(result)


def interesting(fmt: Format) -> Array:
    """Values on and between the numbers of a format, far outside, and of all magnitudes."""
    rng = np.random.default_rng(0)
    end = min(fmt.max, 1e30)
    parts = [
        rng.uniform(-1.5 * end, 1.5 * end, 4096),
        rng.standard_normal(4096),
        np.arange(-4096, 4096) / 16,  # ties of all formats with few bits
        rng.standard_normal(2048) * 2.0 ** rng.integers(-30, 30, 2048),
        np.array([0.0, -0.0, end, -end]),
    ]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("level", ["none", "default"])
@BOTH_SITES
def test_a_site_computes_the_reference_bit_for_bit(
    function: str, fmt: Format, level: str
) -> None:
    x = interesting(fmt)[None, :]
    scale = np.ones(1, np.float32)
    expected = fake_quantize(x, scale, fmt)
    # assert_array_equal holds 0 equal to -0: a site loses the sign of zero.
    np.testing.assert_array_equal(in_runtime(x, scale, function, fmt, level), expected)


@pytest.mark.parametrize("level", ["none", "default"])
@pytest.mark.parametrize("fmt", BYTES, ids=lambda fmt: fmt.name)
def test_a_site_of_bytes_computes_the_reference_bit_for_bit(fmt: Format, level: str) -> None:
    for scale in f32([1.0, 0.037, 2.7e-4, 811.0]):
        x = interesting(fmt)[None, :] * scale
        x = np.append(x, f32([[np.inf, -np.inf]]), axis=1)
        expected = fake_quantize(x, scale, fmt)
        np.testing.assert_array_equal(
            in_runtime(x, np.array(scale), BYTE_SITE, fmt, level), expected
        )


@pytest.mark.parametrize("level", ["none", "default"])
@pytest.mark.parametrize("fmt", EVERY_POSITIVE, ids=lambda fmt: fmt.name)
def test_a_site_of_what_is_never_negative_computes_the_reference_bit_for_bit(
    fmt: Format, level: str
) -> None:
    for scale in f32([1.0, 0.037, 2.7e-4, 811.0]):
        x = np.abs(interesting(fmt))[None, :].clip(max=1e30) * scale
        expected = fake_quantize(x, scale, fmt)
        found = in_runtime(x, np.array(scale), POSITIVE_SITE, fmt, level)
        np.testing.assert_array_equal(found, expected)


_FINITE = st.floats(-(2.0**66), 2.0**66, width=32)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    x=st.lists(_FINITE, min_size=3, max_size=3),
    exponents=st.lists(st.floats(-30, 30), min_size=3, max_size=3),
)
def test_each_channel_is_quantized_with_its_own_scale(
    x: list[float], exponents: list[float]
) -> None:
    scale = np.exp2(exponents).astype(np.float32)
    # Each value as it is, and of the size of its scale.
    column = np.array(x, np.float32)[:, None]
    # What is smaller loses its sign, and with it itself.
    column[np.abs(column) < 1e-30] = 0
    rows = np.concatenate([column, column % 64 * scale[:, None]], axis=1).astype(np.float32)
    for function, fmt in PAIRS:
        expected = fake_quantize(rows, scale[:, None], fmt)
        np.testing.assert_array_equal(in_runtime(rows, scale, function, fmt, "none"), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    x=st.lists(_FINITE, min_size=3, max_size=3),
    exponent=st.floats(-39, 30),  # scales are at least 1e-12
    share=st.floats(0, 1),
)
def test_bytes_of_any_scale_and_zero_point_are_the_reference(
    x: list[float], exponent: float, share: float
) -> None:
    scale = np.exp2(f32(exponent))
    row = f32(x)[None, :]
    row = np.concatenate([row, row % 400 * scale, (row % 256 + 0.5) * scale], axis=1)
    for bits in range(2, 9):
        fmt = unsigned_variant(FORMATS[f"int{bits}"], share)
        expected = fake_quantize(row, scale, fmt)
        np.testing.assert_array_equal(
            in_runtime(row, np.array(scale), BYTE_SITE, fmt, "none"), expected
        )


def test_a_tensor_of_zeros_and_the_least_scale_give_zeros() -> None:
    zeros = np.zeros((1, 3), np.float32)
    scale = f32([1e-12])
    for function, fmt in PAIRS:
        assert not in_runtime(zeros, scale, function, fmt, "none").any()
    for fmt in BYTES:
        assert not in_runtime(zeros, scale, BYTE_SITE, fmt, "none").any()
    for fmt in EVERY_POSITIVE:
        assert not in_runtime(zeros, scale, POSITIVE_SITE, fmt, "none").any()


def test_the_name_of_a_code_says_which_number_it_is() -> None:
    assert GridCode._fields == ANY_CODES
    assert set(BYTE_CODES) < set(INTEGER_CODES) < set(ANY_CODES)
    for name, fields in FIELDS.items():
        function = site_function(name)
        assert [value.name for value in function.inputs] == ["x", "scale", *fields]
        assert (function.domain, function.name) == (DOMAIN, name)


# -- gradients ------------------------------------------------------------------------------


@functools.cache
def gradient_session(function: str) -> ort.InferenceSession:
    """The gradient of sum(weights * site(x)) by x."""
    built = site_model(function)
    graph = built.graph
    weights = ir.Value(name="weights", type=ir.TensorType(ir.DataType.FLOAT))
    weights.shape = ir.Shape(["R", "C"])
    graph.inputs.append(weights)
    product = ir.node("Mul", [graph.outputs[0], weights], name="product")
    product.outputs[0].name = "weighted"
    loss = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 0}, name="sum")
    loss.outputs[0].name = "loss"
    loss.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    loss.outputs[0].shape = ir.Shape(())
    graph.extend([product, loss])
    graph.outputs[:] = [loss.outputs[0]]
    proto = build_gradient(built, "loss", ["x"])
    return session(proto.SerializeToString())


def gradient(x: Array, scale: Array, weights: Array, function: str, fmt: Format) -> Array:
    code = grid_code(fmt)._asdict()
    feeds = {name: np.array(code[name], np.float32) for name in FIELDS[function]}
    feeds["scale"] = _shaped(scale, function)
    feeds |= {"x": x, "weights": weights}
    return np.asarray(gradient_session(function).run([GRADIENT], feeds)[0]).reshape(x.shape)


@BOTH_SITES
def test_the_gradient_passes_inside_the_clipping_range_and_nowhere_else(
    function: str, fmt: Format
) -> None:
    rng = np.random.default_rng(1)
    scale = f32([0.5, 2.0])
    end = min(fmt.max, 1e30)
    x = (rng.uniform(-2 * end, 2 * end, (2, 256)) * scale[:, None]).astype(np.float32)
    weights = rng.standard_normal(x.shape).astype(np.float32)
    code = grid_code(fmt)
    t = x / scale[:, None]
    expected = np.where((t >= code.lo) & (t <= code.hi), weights, 0)
    np.testing.assert_array_equal(gradient(x, scale, weights, function, fmt), expected)


@pytest.mark.parametrize("fmt", BYTES, ids=lambda fmt: fmt.name)
def test_the_gradient_of_bytes_passes_inside_the_clipping_range(fmt: Format) -> None:
    rng = np.random.default_rng(2)
    code = grid_code(fmt)
    for scale in f32([1.0, 0.037, 811.0]):
        ends = f32([code.lo, code.hi]) * scale
        reach = max(fmt.max, -fmt.min) * scale
        x = rng.uniform(-2 * reach, 2 * reach, (1, 256)).astype(np.float32)
        x = np.concatenate([x, ends[None, :], f32([[0.0, np.inf, -np.inf]])], axis=1)
        weights = rng.standard_normal(x.shape).astype(np.float32)
        expected = np.where((x >= ends[0]) & (x <= ends[1]), weights, 0)
        found = gradient(x, f32(scale), weights, BYTE_SITE, fmt)
        np.testing.assert_array_equal(found, expected)
        # The rule of the other sites, but for the last bit at the ends.
        inner = np.delete(x, [256, 257], axis=1)
        t = inner / scale
        rule = np.where((t >= code.lo) & (t <= code.hi), np.delete(weights, [256, 257], 1), 0)
        np.testing.assert_array_equal(np.delete(found, [256, 257], axis=1), rule)


@pytest.mark.parametrize("fmt", EVERY_POSITIVE, ids=lambda fmt: fmt.name)
def test_the_gradient_of_what_is_never_negative_passes_up_to_the_end(fmt: Format) -> None:
    rng = np.random.default_rng(3)
    end = min(fmt.max, 1e30)
    for scale in f32([0.5, 2.0]):
        x = (rng.uniform(0, 2 * end, (2, 256)) * scale).astype(np.float32)
        x[:, 0] = 0
        weights = rng.standard_normal(x.shape).astype(np.float32)
        expected = np.where(x / scale <= grid_code(fmt).hi, weights, 0)
        np.testing.assert_array_equal(
            gradient(x, np.array(scale), weights, POSITIVE_SITE, fmt), expected
        )


@BOTH_SITES
def test_the_value_that_the_scale_was_taken_from_keeps_its_gradient(
    function: str, fmt: Format
) -> None:
    # Divided by its scale, it may round to a number just above the largest.
    largest = np.random.default_rng(4).uniform(0.1, 10, (512, 1)).astype(np.float32)
    scale = (largest[:, 0] / np.float32(min(fmt.max, 1e30))).astype(np.float32)
    ones = np.ones_like(largest)
    np.testing.assert_array_equal(gradient(largest, scale, ones, function, fmt), ones)


@pytest.mark.parametrize("bound", ["lo", "hi"])
def test_the_ends_of_the_range_belong_to_it(bound: str) -> None:
    for function, fmt in PAIRS:
        end = np.float32(getattr(grid_code(fmt), bound))
        one = np.ones((1, 1), np.float32)
        x = np.full((1, 1), end)
        assert gradient(x, one[0], one, function, fmt)[0, 0] == 1.0


@pytest.mark.parametrize("fmt", [FORMATS[n] for n in ("int8", "uint4", "e4m3", "float32")])
def test_the_gradient_is_the_slope_of_the_site_seen_from_afar(fmt: Format) -> None:
    # A step is not smooth, but over a hundred steps its mean slope is that of the line.
    scale = f32([1.0])
    x = f32([[-2e4, -40.0, 40.0, 2e4]])
    reach = 0.5 * min(fmt.max, 40.0)
    ends = [in_runtime(x + s * reach, scale, ANY_SITE, fmt, "none") for s in (-1, 1)]
    slope = (ends[1] - ends[0]) / (2 * reach)
    if fmt.name in ("int8", "e4m3"):  # uint4 ends at 15: 40 is outside it
        np.testing.assert_allclose(
            slope[0, 1:3], 1.0, atol=0.08
        )  # half a step of e4m3 / reach
    ones = np.ones_like(x)
    inside = gradient(x, scale, ones, ANY_SITE, fmt)
    np.testing.assert_allclose(inside[np.isclose(slope, 0, atol=1e-6)], 0)
    np.testing.assert_allclose(inside[slope > 0.9], 1)


def test_neither_scale_nor_codes_get_a_gradient() -> None:
    outputs = {value.name for value in gradient_session(ANY_SITE).get_outputs()}
    assert outputs == {"loss", GRADIENT}
    x = np.ones((3, 2), np.float32)
    flat = gradient(x, np.ones(3, np.float32), x, ANY_SITE, FORMATS["int8"])
    assert flat.size == x.size


# -- what an assignment feeds ---------------------------------------------------------------


def _space(*formats: str) -> SearchSpace:
    def layer(name: str) -> Layer:
        return Layer(name=name, op_type="MatMul", weights=(f"w_{name}",), params=6)

    def site(name: str, *layers: str, **options: object) -> Site:
        common = {"tensor": name, "consumers": ((layers[0], 0),), "is_weight": False}
        return Site(name=name, layers=layers, **{**common, **options})  # type: ignore[arg-type]

    return SearchSpace(
        (layer("a"), layer("b")),
        (
            site("x", "a"),
            site("r", "a", "b", negative=0.0),
            site("w", "b", is_weight=True, axis=1, channels=3, rank=2),
            site("bias", "b", is_weight=True, axis=0, channels=3, rank=1, bias_of=("r", "w")),
        ),
        tuple(PRECISIONS[name] for name in formats),
    )


def _scales(space: SearchSpace) -> dict[tuple[str, str], Array]:
    return {
        (site.name, fmt.name): np.arange(1, site.channels + 1, dtype=np.float32) * fmt.bits
        for site in space.sites
        for fmt in space.site_formats(site)
    }


def taken(space: SearchSpace, chosen: PrecisionMap) -> dict[str, str]:
    return {name: fmt.name for name, fmt in space.formats_taken(chosen).items()}


def test_a_tensor_of_several_layers_takes_the_fewest_bits_of_any() -> None:
    space = _space("int4", "int8", "float32")
    chosen = {"a": PRECISIONS["int8"], "b": PRECISIONS["int4"]}
    assert taken(space, chosen) == {"x": "int8", "r": "uint4", "w": "int4", "bias": "float32"}
    chosen = space.uniform(PRECISIONS["float32"])
    assert set(taken(space, chosen).values()) == {"float32"}


@pytest.mark.parametrize(
    ("operands", "reader", "expected"),
    [
        (("int4", "int8"), None, "uint8"),
        (("int4", "float32"), None, "float32"),
        (("int8", "int8"), "int4", "uint4"),
        (("float32", "int8"), "int8", "uint8"),
    ],
)
def test_what_is_computed_from_quantized_tensors_takes_the_widest_format_or_that_of_readers(
    operands: tuple[str, str], reader: str | None, expected: str
) -> None:
    def site(name: str, *layers: str, **options: object) -> Site:
        return Site(
            name=name,
            tensor=name,
            layers=layers,
            consumers=(),
            is_weight=False,
            **options,  # type: ignore[arg-type]
        )

    layers = ["a", "b", "reader"][: 2 + (reader is not None)]
    space = SearchSpace(
        tuple(Layer(name=name, op_type="Conv", weights=(), params=0) for name in layers),
        (
            site("x", "a"),
            site("y", "b"),
            site("sum", *layers[2:], operands=("x", "y"), negative=0.0),
            site("pooled", operands=("sum",), negative=0.0),
        ),
        tuple(PRECISIONS[name] for name in ("int4", "int8", "float32")),
    )
    chosen = dict(zip(layers, [PRECISIONS[n] for n in (*operands, reader) if n], strict=True))
    assert taken(space, chosen) == {
        "x": operands[0],
        "y": operands[1],
        "sum": expected,
        "pooled": expected,
    }


def test_layers_of_a_group_decide_together() -> None:
    names = ("a", "b", "c", "d", "e")
    space = SearchSpace(
        tuple(Layer(name=name, op_type="Conv", weights=(), params=0) for name in names),
        (),
        (PRECISIONS["int4"], PRECISIONS["int8"]),
        groups=(("d", "b"), ("e", "c"), ("b", "e")),
    )
    assert space.decisions == (("a",), ("b", "c", "d", "e"))
    chosen = space.assign((0, 1))
    assert list(chosen) == list(names)
    assert [fmt.name for fmt in chosen.values()] == ["int4", *["int8"] * 4]


@pytest.mark.parametrize("name", ["int4", "int5", "int8", "int16", "e4m3", "bf16"])
def test_biases_are_int32_where_runtimes_may_add_them_to_sums_of_integers(name: str) -> None:
    space = _space("int4", name)
    chosen = space.uniform(PRECISIONS[name])
    expected = "int32" if name in ("int5", "int8") else "float32"
    assert taken(space, chosen)["bias"] == expected


def test_only_formats_with_a_scale_of_their_own_are_calibrated() -> None:
    space = _space("int4", "e2m1", "bf16", "float32")
    names = {site.name: [f.name for f in space.site_formats(site)] for site in space.sites}
    assert names == {
        "x": ["int4", "e2m1"],
        "r": ["uint4", "e2m1"],
        "w": ["int4", "e2m1"],
        "bias": [],
    }


def test_codes_and_scales_come_site_after_site() -> None:
    space = _space("int4", "int8")
    values = space.values(space.uniform(PRECISIONS["int8"]), _scales(space))
    assert values.codes.shape == (4, 4)
    assert values.codes.dtype == values.scales.dtype == np.float32
    expected = [grid_code(FORMATS[n]) for n in ("int8", "uint8", "int8")]
    np.testing.assert_array_equal(values.codes[:3], f32(expected))
    # The bias is added to the products: its scales are those of r times those of w.
    np.testing.assert_array_equal(values.scales, [8, 8, 8, 16, 24, 64, 128, 192])


def test_formats_without_a_scale_are_fed_ones() -> None:
    space = _space("int8", "fp16", "float32")
    for name in ("fp16", "float32"):
        values = space.values(space.uniform(PRECISIONS[name]), _scales(space))
        np.testing.assert_array_equal(values.scales, np.ones(8))


def test_scales_broadcast_along_their_axis() -> None:
    site = _space("int8").sites[2]
    assert site.broadcast_shape == (1, 3)
    assert replace(site, axis=None, channels=1).broadcast_shape == ()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("int4", "int8"), False),
        (("int8", "float32"), False),
        (("int8", "bf16"), True),
        (("e2m1",), True),
    ],
)
def test_the_mantissa_is_rounded_only_where_a_format_has_one(
    names: tuple[str, ...], expected: bool
) -> None:
    assert _space(*names).needs_mantissa is expected
    has_minifloat = any(
        isinstance(FORMATS[name], FloatFormat) and name != "float32" for name in names
    )
    assert has_minifloat is expected


@pytest.mark.parametrize("name", ["uint8", "int8", "uint5"])
@pytest.mark.parametrize("most", [1.0, 6.0, 0.1])
def test_no_code_lies_beyond_the_limits_of_a_clip(name: str, most: float) -> None:
    fmt = FORMATS[name]
    limits = (-most if fmt.min < 0 else 0.0, most)
    site = Site(name="s", tensor="t", layers=(), consumers=(), is_weight=False, limits=limits)
    small, large = site.within_limits(fmt, f32([1e-6, 1.0]))
    assert small == np.float32(1e-6)
    codes = f32([fmt.min, fmt.max])
    assert (np.abs(codes * large) <= most).all()
    # Little is cut off.
    assert np.abs(codes * large).max() > 0.999 * most
    assert codes[1] * large > 0.99 * most


@pytest.mark.parametrize(
    ("name", "limits"),
    [("int8", (-1.0, 6.0)), ("int5", (-1.0, 1.0)), ("e4m3", (0.0, 6.0)), ("int8", None)],
)
def test_scales_stay_where_limits_do_not_fit_the_format(
    name: str, limits: tuple[float, float] | None
) -> None:
    site = Site(name="s", tensor="t", layers=(), consumers=(), is_weight=False, limits=limits)
    np.testing.assert_array_equal(site.within_limits(FORMATS[name], f32([9.0])), f32([9.0]))


# -- choices of decisions, and levels of precision ------------------------------------------


def _choosing(
    text: str, *excluded: str, groups: tuple[tuple[str, ...], ...] = ()
) -> SearchSpace:
    """A space of layers a, b, c, ... each of which excludes some precisions."""
    layers = [
        Layer(
            name="abc"[i],
            op_type="MatMul",
            weights=("w",),
            params=1,
            excluded=frozenset(names.split()),
        )
        for i, names in enumerate(excluded)
    ]
    return SearchSpace(tuple(layers), (), parse_space(text), groups=groups)


def _names(chosen: PrecisionMap) -> list[str]:
    return [precision.name for precision in chosen.values()]


def test_a_decision_has_the_choices_that_all_its_layers_can_take() -> None:
    space = _choosing("int4 int4:int8 int8 float32", "int4", "", "int8", groups=(("a", "c"),))
    assert space.decisions == (("a", "c"), ("b",))
    assert [[p.name for p in row] for row in space.choices] == [
        ["int4:int8", "float32"],
        ["int4", "int4:int8", "int8", "float32"],
    ]
    assert _names(space.assign((1, 2))) == ["float32", "int8", "float32"]


def test_a_level_is_the_next_more_precise_choice_of_every_decision() -> None:
    space = _choosing(
        "int4 int4:int8 int8 int8:int16 float32", "int4 int8", "float32 int8:int16", ""
    )
    levels = [_names(space.assign(level)) for level in space.levels]
    assert levels == [
        ["int4:int8", "int4", "int4"],
        ["int4:int8", "int4:int8", "int4:int8"],
        ["int8:int16", "int8", "int8"],
        ["int8:int16", "int8", "int8:int16"],
        ["float32", "int8", "float32"],
    ]


def test_a_level_has_no_fewer_bits_in_either_operand() -> None:
    space = _choosing("int4 int4:int8 int8:int4 int8", "int4:int8", "int8:int4", "")
    levels = [_names(space.assign(level)) for level in space.levels]
    assert levels == [
        ["int4", "int4", "int4"],
        ["int8", "int4:int8", "int4:int8"],
        ["int8:int4", "int8", "int8:int4"],
        ["int8", "int8", "int8"],
    ]


def test_levels_of_layers_without_activations_are_those_of_their_weights() -> None:
    plain = _choosing("int4 int4:int8 int8", "int4:int8")
    layers = (replace(plain.layers[0], weight_only="it multiplies nothing"),)
    levels = [_names(s.assign(x)) for s in (replace(plain, layers=layers),) for x in s.levels]
    assert levels == [["int4"], ["int4"], ["int8"]]


def test_the_coarser_operand_tells_how_precise_a_uniform_assignment_is() -> None:
    space = _choosing("int4 int5:int6 int8:int4 int4:int8 int6:int5 int8", "")
    names = [_names(space.assign(choices))[0] for choices in space.uniform_choices]
    assert names == ["int4", "int4:int8", "int8:int4", "int5:int6", "int6:int5", "int8"]
    line = _choosing("int-l", "", "int5", "")
    assert line.uniform_choices == line.levels


def test_choices_are_compared_operand_by_operand() -> None:
    space = _choosing("int4 int4:int8 int8:int4 int8", "", "int4 int8:int4")
    first, second = space.as_precise
    np.testing.assert_array_equal(
        first, [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    )
    np.testing.assert_array_equal(second, [[1, 1], [0, 1]])


def test_the_levels_of_a_space_without_exclusions_are_uniform() -> None:
    space = _choosing("int-l", "", "", "")
    assert space.levels == tuple((level,) * 3 for level in range(5))
    for precision, level in zip(space.precisions, space.levels, strict=True):
        assert space.assign(level) == space.uniform(precision)


# -- pairs ----------------------------------------------------------------------------------


def test_each_site_takes_its_half_of_a_pair() -> None:
    space = _space("int4", "int8")
    for pair, expected in {
        "int4:int8": ("int8", "uint8", "int4", "float32"),
        "int8:int16": ("int16", "uint16", "int8", "float32"),
        "int4:float32": ("float32", "float32", "int4", "float32"),
        "int8:e4m3": ("e4m3", "e4m3", "int8", "float32"),
        "int7:int8": ("int8", "uint8", "int7", "int32"),
    }.items():
        found = taken(space, space.uniform(parse_precision(pair)))
        assert tuple(found.values()) == expected


def test_a_tensor_of_several_layers_takes_the_fewest_bits_of_their_activations() -> None:
    space = _space("int4", "int8")
    chosen = {"a": parse_precision("int4:int16"), "b": parse_precision("int8")}
    assert taken(space, chosen) == {"x": "int16", "r": "uint8", "w": "int8", "bias": "int32"}


@pytest.mark.parametrize(
    ("negative", "expected"),
    [(None, "int4"), (0.0, "uint4"), (0.5, "uint4z8"), (0.1, "uint4z2"), (1.0, "uint4z14")],
)
def test_a_site_takes_integers_of_its_range_and_other_formats_as_they_are(
    negative: float | None, expected: str
) -> None:
    site = replace(_space("int8").sites[0], negative=negative)
    assert site.effective(FORMATS["int4"]).name == expected
    assert site.effective(FORMATS["e4m3"]) is FORMATS["e4m3"]
    assert site.effective(FORMATS["float32"]) is FORMATS["float32"]


def test_formats_that_no_layer_of_a_site_takes_need_no_scales() -> None:
    plain = _space("int4", "int8", "float32")
    layers = tuple(replace(layer, excluded=frozenset({"int4"})) for layer in plain.layers)
    space = replace(plain, layers=layers)
    names = {site.name: [f.name for f in space.site_formats(site)] for site in space.sites}
    assert names == {"x": ["int8"], "r": ["uint8"], "w": ["int8"], "bias": []}
    # What an operator between layers makes may be asked for by any of them.
    between = replace(space.sites[0], operands=("r",))
    assert [f.name for f in space.site_formats(between)] == ["int4", "int8"]
