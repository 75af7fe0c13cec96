"""The number formats against ml_dtypes, their own codes and the site formula."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.formats import (
    FORMATS,
    SPACES,
    FloatFormat,
    Format,
    IntFormat,
    Special,
    fake_quantize,
    grid_code,
    is_passthrough,
    parse_format,
    quantize,
    unsigned_variant,
)

Array = npt.NDArray[np.float32]

# float8_e3m4 is the IEEE variant of ours: the same numbers, but only up to 15.5.
ORACLES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
FLOATS = [fmt for fmt in FORMATS.values() if isinstance(fmt, FloatFormat)]
INTEGERS = [fmt for fmt in FORMATS.values() if isinstance(fmt, IntFormat)]
# Not float32: it has too many codes to list.
ENUMERABLE = [fmt for fmt in FORMATS.values() if fmt.name != "float32"]


def _finite_halves() -> Array:
    """Every finite float16: all signs, exponents and ties that matter to 8 bits and fewer."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return values[np.isfinite(values)]


def _random_floats(count: int = 200_000) -> Array:
    """float32 of random bits (all magnitudes), and as many of ordinary size."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
    ordinary = (rng.standard_normal(count) * 20).astype(np.float32)
    return np.concatenate([bits[np.isfinite(bits)], ordinary])


HALVES = _finite_halves()
SAMPLES = np.concatenate([HALVES, _random_floats()])


def by_name(
    formats: list[Format] | list[FloatFormat] | list[IntFormat],
) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fmt", formats, ids=[fmt.name for fmt in formats])


def codes(fmt: Format) -> list[float]:
    """Decode every bit pattern of a format, from the definition of its encoding."""
    if isinstance(fmt, IntFormat):
        low = -(1 << (fmt.bits - 1)) if fmt.signed else 0
        return [float(low + code) for code in range(1 << fmt.bits)]
    bias = (1 << (fmt.exponent - 1)) - 1
    top = (1 << fmt.exponent) - 1
    positive = []
    for exponent in range(top + 1):
        for mantissa in range(1 << fmt.mantissa):
            is_last = exponent == top and mantissa == (1 << fmt.mantissa) - 1
            if (fmt.special is Special.IEEE and exponent == top) or (
                fmt.special is Special.NAN and is_last
            ):
                continue
            fraction = Fraction(mantissa, 1 << fmt.mantissa) + (exponent > 0)
            power = max(exponent, 1) - bias
            positive.append(float(fraction * Fraction(2) ** power))
    return sorted([-value for value in positive[1:]] + positive)


def site(x: Array, fmt: Format) -> Array:
    """The formula of GridCode, in float32, as a site computes it."""
    low, high, factor, least = map(np.float32, grid_code(fmt))
    t = np.clip(x, low, high)
    anchor = np.maximum(np.abs(t) * factor, least)
    return np.asarray(np.copysign(anchor - (anchor - np.abs(t)), t))


@pytest.mark.parametrize("name", ORACLES)
def test_quantize_agrees_with_ml_dtypes_on_every_half_and_random_floats(name: str) -> None:
    fmt, oracle = FORMATS[name], np.dtype(ORACLES[name])
    end = float(ml_dtypes.finfo(oracle).max)  # type: ignore[no-untyped-call]
    inside = np.clip(SAMPLES, -end, end)
    expected = inside.astype(oracle).astype(np.float32)
    np.testing.assert_array_equal(quantize(inside, fmt), expected)
    np.testing.assert_array_equal(np.signbit(quantize(inside, fmt)), np.signbit(expected))


@pytest.mark.parametrize("name", [name for name in ORACLES if name != "e3m4"])
def test_quantize_saturates_where_ml_dtypes_has_its_ends(name: str) -> None:
    fmt, info = FORMATS[name], ml_dtypes.finfo(ORACLES[name])  # type: ignore[no-untyped-call]
    assert (fmt.min, fmt.max) == (float(info.min), float(info.max))
    beyond = SAMPLES[np.abs(SAMPLES) > fmt.max]
    np.testing.assert_array_equal(quantize(beyond, fmt), np.sign(beyond) * np.float32(fmt.max))


@pytest.mark.parametrize("name", ORACLES)
def test_the_smallest_numbers_are_those_of_ml_dtypes(name: str) -> None:
    fmt, info = FORMATS[name], ml_dtypes.finfo(ORACLES[name])  # type: ignore[no-untyped-call]
    assert isinstance(fmt, FloatFormat)
    assert fmt.smallest == float(info.smallest_subnormal)
    assert math.ldexp(1.0, fmt.min_exponent) == float(info.smallest_normal)


@pytest.mark.parametrize(
    ("name", "maximum"),
    [
        ("e2m1", 6),
        ("e2m3", 7.5),
        ("e3m2", 28),
        ("e4m3", 448),
        ("e5m2", 57344),
        ("fp16", 65504),
    ],
)
def test_the_maxima_are_those_of_the_ocp_and_ieee_documents(name: str, maximum: float) -> None:
    assert FORMATS[name].max == maximum


@by_name(INTEGERS)
def test_integers_round_by_exact_arithmetic(fmt: IntFormat) -> None:
    # Python rounds a Fraction exactly, ties to even.
    some = HALVES[:: 7 if fmt.bits < 16 else 5]
    expected = [min(max(round(Fraction(float(x))), fmt.min), fmt.max) for x in some]
    np.testing.assert_array_equal(quantize(some, fmt), np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("name", "oracle"), [("int2", ml_dtypes.int2), ("int4", ml_dtypes.int4)]
)
def test_integer_ends_are_those_of_ml_dtypes(name: str, oracle: type) -> None:
    info = ml_dtypes.iinfo(oracle)  # type: ignore[no-untyped-call]
    assert (FORMATS[name].min, FORMATS[name].max) == (info.min, info.max)
    assert FORMATS[f"u{name}"].max == 2 * info.max + 1


@by_name(ENUMERABLE)
def test_every_code_stands_for_itself_and_nothing_else_is_representable(fmt: Format) -> None:
    every = np.array(codes(fmt), np.float32)
    np.testing.assert_array_equal(quantize(every, fmt), every)
    reached = np.unique(quantize(np.concatenate([SAMPLES, every]), fmt))
    np.testing.assert_array_equal(reached, every)


@by_name(ENUMERABLE)
def test_the_number_of_codes_follows_from_the_bits(fmt: Format) -> None:
    patterns = 1 << fmt.bits
    if isinstance(fmt, FloatFormat):
        patterns -= 1  # zero has two signs
        patterns -= {
            Special.NONE: 0,
            Special.NAN: 2,
            Special.IEEE: 2 << fmt.mantissa,
        }[fmt.special]
    assert len(codes(fmt)) == patterns


@by_name(ENUMERABLE)
def test_midpoints_go_to_the_even_neighbour_and_the_rest_to_the_nearest(fmt: Format) -> None:
    every = np.array(codes(fmt))
    low, high = every[:-1], every[1:]
    middle = (low + high) / 2
    exact = middle.astype(np.float32) == middle  # the others cannot be asked about
    low, high, middle = low[exact], high[exact], middle[exact].astype(np.float32)
    # Even codes alternate with odd ones on either side of zero, which is even.
    position = np.searchsorted(every, low) - np.searchsorted(every, 0.0)
    even = np.where(position % 2 == 0, low, high)
    np.testing.assert_array_equal(quantize(middle, fmt), even)
    below, above = np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.inf)
    apart = (below > low) & (above.astype(np.float32) < high)
    np.testing.assert_array_equal(quantize(below[apart], fmt), low[apart])
    np.testing.assert_array_equal(quantize(above[apart], fmt), high[apart])


def values(limit: float) -> st.SearchStrategy[Array]:
    """Arrays of any finite float32, many of them within the format's range."""
    inside = st.floats(-1.5, 1.5).map(lambda part: part * min(limit, 2e38))
    anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return st.lists(inside | anything, min_size=1, max_size=24).map(
        lambda items: np.array(items, np.float32)
    )


FORMAT_AND_VALUES = st.sampled_from(list(FORMATS.values())).flatmap(
    lambda fmt: st.tuples(st.just(fmt), values(fmt.max))
)
for_all = settings(max_examples=300, deadline=None)


@for_all
@given(FORMAT_AND_VALUES)
def test_quantize_is_idempotent(case: tuple[Format, Array]) -> None:
    fmt, x = case
    once = quantize(x, fmt)
    np.testing.assert_array_equal(quantize(once, fmt), once)


@for_all
@given(FORMAT_AND_VALUES)
def test_quantize_is_monotone(case: tuple[Format, Array]) -> None:
    fmt, x = case
    y = quantize(np.sort(x), fmt)
    assert (y[:-1] <= y[1:]).all()


@for_all
@given(FORMAT_AND_VALUES)
def test_quantize_is_odd_for_minifloats(case: tuple[Format, Array]) -> None:
    fmt, x = case
    if isinstance(fmt, FloatFormat):
        np.testing.assert_array_equal(quantize(-x, fmt), -quantize(x, fmt))


@for_all
@given(FORMAT_AND_VALUES)
def test_quantize_saturates_and_stays_within_half_a_step(case: tuple[Format, Array]) -> None:
    fmt, x = case
    y = quantize(x, fmt).astype(np.float64)
    assert ((y >= fmt.min) & (y <= fmt.max)).all()
    np.testing.assert_array_equal(y[x >= fmt.max], fmt.max)
    np.testing.assert_array_equal(y[x <= fmt.min], fmt.min)
    inside = (x > fmt.min) & (x < fmt.max)
    step = np.ones(len(x))
    if isinstance(fmt, FloatFormat):
        exponent = np.maximum(np.frexp(x)[1] - 1, fmt.min_exponent)
        step = np.ldexp(step, exponent - fmt.mantissa)
    assert (np.abs(y - x.astype(np.float64))[inside] <= step[inside] / 2).all()


@for_all
@given(FORMAT_AND_VALUES)
def test_unsigned_and_signed_integers_agree_where_both_reach(
    case: tuple[Format, Array],
) -> None:
    fmt, x = case
    other = unsigned_variant(fmt)
    if isinstance(fmt, IntFormat) and fmt.signed:
        x = np.clip(x, 0, np.float32(fmt.max))
        np.testing.assert_array_equal(quantize(x, fmt), quantize(x, other))


def test_quantize_keeps_shape_and_takes_scalars() -> None:
    assert quantize(0.3, FORMATS["int4"]).shape == ()
    assert quantize(np.zeros((2, 0, 3)), FORMATS["e2m1"]).shape == (2, 0, 3)
    assert quantize([1, 2], FORMATS["e2m1"]).dtype == np.float32


@by_name(list(FORMATS.values()))
def test_the_site_formula_computes_quantize(fmt: Format) -> None:
    # Exact, for all values but the sign of zero: (t + magic) - magic has none.
    np.testing.assert_array_equal(site(HALVES, fmt), quantize(HALVES, fmt))


@by_name([fmt for fmt in FORMATS.values() if fmt.name not in {"bf16", "float32"}])
def test_the_site_formula_computes_quantize_for_any_float(fmt: Format) -> None:
    np.testing.assert_array_equal(site(SAMPLES, fmt), quantize(SAMPLES, fmt))


@by_name(FLOATS)
def test_the_site_formula_rounds_every_significand_to_even(fmt: FloatFormat) -> None:
    # Near the ends of a binade, a number and its anchor add up to one of the next or the last
    # binade, where the last bit is worth something else: so try all of one binade.
    binade = np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)
    x = binade.view(np.float32)
    np.testing.assert_array_equal(site(x, fmt), quantize(x, fmt))


def test_a_bf16_site_stays_finite_and_clips_only_huge_values() -> None:
    fmt = FORMATS["bf16"]
    end = np.float32(grid_code(fmt).hi)
    assert end > 5e33
    usual = SAMPLES[np.abs(SAMPLES) < end]
    np.testing.assert_array_equal(site(usual, fmt), quantize(usual, fmt))
    huge = np.array([np.finfo(np.float32).max, fmt.max, -1e38], np.float32)
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(np.abs(site(huge, fmt)), quantize(end, fmt))


def test_a_float32_site_is_the_identity_to_its_very_ends() -> None:
    extremes = np.array([np.finfo(np.float32).max, np.finfo(np.float32).min], np.float32)
    x = np.concatenate([SAMPLES, extremes])
    np.testing.assert_array_equal(site(x, FORMATS["float32"]), x)
    np.testing.assert_array_equal(quantize(x, FORMATS["float32"]), x)


def test_fake_quantize_scales_each_channel() -> None:
    x = np.array([[0.9, -3.0], [90.0, -300.0]], np.float32)
    scale = np.array([[0.5], [50.0]], np.float32)
    y = fake_quantize(x, scale, FORMATS["int2"])
    np.testing.assert_array_equal(y, np.array([[0.5, -1.0], [50.0, -100.0]], np.float32))
    assert y.dtype == np.float32


def test_names_are_unique_and_lead_back_to_their_formats() -> None:
    for name, fmt in FORMATS.items():
        assert fmt.name == name
        assert parse_format(f" {name.upper()} ") is fmt


@pytest.mark.parametrize("name", ["int9", "", "e9m9", "fp8", "int", "float16"])
def test_an_unknown_format_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown format .*; known: int2, .*float32, and those of .* g16, "
    ) as info:
        parse_format(name)
    assert repr(name) in str(info.value)


@pytest.mark.parametrize("name", SPACES)
def test_named_spaces_hold_searchable_formats(name: str) -> None:
    formats = [FORMATS[each] for each in SPACES[name]]
    assert all(4 <= fmt.bits <= 8 and not is_passthrough(fmt) for fmt in formats)


def test_the_large_minifloat_space_has_every_split_of_the_bits() -> None:
    splits = {(fmt.bits, fmt.exponent) for fmt in FLOATS if not is_passthrough(fmt)}
    assert splits == {(b, e) for b in range(4, 9) for e in range(2, 6) if b - 1 - e >= 1}
    assert set(SPACES["fp-l"]) == {fmt.name for fmt in FLOATS if not is_passthrough(fmt)}


@by_name(list(FORMATS.values()))
def test_only_integers_have_an_unsigned_variant(fmt: Format) -> None:
    variant = unsigned_variant(fmt)
    assert variant.bits == fmt.bits
    if isinstance(fmt, IntFormat):
        assert isinstance(variant, IntFormat)
        assert not variant.signed
        assert variant.name == f"uint{fmt.bits}"
        assert FORMATS[variant.name] == variant
    else:
        assert variant is fmt


def test_formats_that_leave_a_tensor_alone_are_the_wide_floats() -> None:
    assert [name for name, fmt in FORMATS.items() if is_passthrough(fmt)] == [
        "bf16",
        "fp16",
        "float32",
    ]
