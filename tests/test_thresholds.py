"""Where values are clipped: the alternatives to a threshold for each format."""

import numpy as np
import numpy.typing as npt
import pytest

import support
from onnx_fliqs.calibrate import activation_scales, weight_scales
from onnx_fliqs.formats import FORMATS, Format, IntFormat, fake_quantize, unsigned_variant
from onnx_fliqs.precision import parse_precision
from onnx_fliqs.thresholds import (
    SMALLEST_SCALE,
    Thresholds,
    fit_scales,
    least_squares_scales,
    rounded,
)

Array = npt.NDArray[np.float32]

SIGNED = [FORMATS[name] for name in ("int2", "int4", "int8", "e2m1", "e4m3")]
SHIFTED = [unsigned_variant(FORMATS[name], 0.25) for name in ("int4", "int8")]
every = pytest.mark.parametrize("thresholds", list(Thresholds))


def values(rows: int = 3, count: int = 4000, seed: int = 0) -> Array:
    """Heavy tails, so that clipping pays; each row of another size."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** np.arange(rows)[:, None]
    return np.asarray(rng.laplace(size=(rows, count)) * sizes, np.float32)


def clipped_share(x: Array, scale: Array, fmt: Format) -> float:
    """Share of the values beyond the largest number on their side."""
    low = fmt.min if isinstance(fmt, IntFormat) and fmt.zero_point else -fmt.max
    return float(np.mean((x > scale[:, None] * fmt.max) | (x < scale[:, None] * low)))


def test_switched_thresholds_are_those_of_least_squares() -> None:
    x = values()
    found = fit_scales(x, SIGNED)
    assert list(found) == [fmt.name for fmt in SIGNED]
    for fmt in SIGNED:
        np.testing.assert_array_equal(found[fmt.name], least_squares_scales(x, fmt))


@pytest.mark.parametrize(
    "thresholds", [Thresholds.SHARED, Thresholds.PERCENTILE, Thresholds.MAXIMUM]
)
def test_other_thresholds_are_the_same_in_all_formats(thresholds: Thresholds) -> None:
    x = values()
    found = fit_scales(x, SIGNED, thresholds)
    ends = [found[fmt.name].astype(np.float64) * fmt.max for fmt in SIGNED]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-6)
    switched = fit_scales(x, SIGNED)
    assert switched["int2"][0] * FORMATS["int2"].max < 0.5 * switched["int8"][0] * 127


def test_a_shared_threshold_is_the_geometric_mean_of_the_switched() -> None:
    x = values()
    switched, shared = fit_scales(x, SIGNED), fit_scales(x, SIGNED, Thresholds.SHARED)
    logarithms = [np.log(switched[fmt.name] * fmt.max) for fmt in SIGNED]
    np.testing.assert_allclose(
        shared["int8"] * 127, np.exp(np.mean(logarithms, axis=0)), rtol=1e-5
    )


def test_a_shared_threshold_of_one_format_is_its_own() -> None:
    found = fit_scales(values(), SIGNED[:1], Thresholds.SHARED)["int2"]
    np.testing.assert_allclose(found, least_squares_scales(values(), SIGNED[0]), rtol=1e-6)


@pytest.mark.parametrize("fmt", [*SIGNED, *SHIFTED], ids=lambda fmt: fmt.name)
def test_maximum_clips_nothing_and_a_percentile_a_thousandth(fmt: Format) -> None:
    x = values(count=20_000)
    whole = fit_scales(x, [fmt], Thresholds.MAXIMUM)[fmt.name]
    assert clipped_share(x, whole * np.float32(1 + 1e-6), fmt) == 0
    assert clipped_share(x, whole * np.float32(0.999), fmt) > 0
    most = fit_scales(x, [fmt], Thresholds.PERCENTILE)[fmt.name]
    assert clipped_share(x, most, fmt) == pytest.approx(1e-3, abs=1e-4)


@every
@pytest.mark.parametrize("formats", [SIGNED, SHIFTED], ids=["symmetric", "zero point"])
def test_scales_follow_the_values_and_rows_of_zeros_stay_zero(
    formats: list[Format], thresholds: Thresholds
) -> None:
    x = values()
    found, larger = (fit_scales(y, formats, thresholds) for y in (x, 8 * x))
    dead = fit_scales(np.zeros_like(x), formats, thresholds)
    for fmt in formats:
        np.testing.assert_allclose(larger[fmt.name], 8 * found[fmt.name], rtol=1e-6)
        assert found[fmt.name].dtype == np.float32
        assert (found[fmt.name] > 0).all()
        assert (dead[fmt.name] >= np.float32(SMALLEST_SCALE)).all()
        assert not fake_quantize(np.zeros_like(x), dead[fmt.name][:, None], fmt).any()


def test_no_threshold_has_less_error_than_the_switched() -> None:
    x = values()
    for fmt in SIGNED:
        errors = {
            thresholds: np.square(
                rounded(x, fit_scales(x, SIGNED, thresholds)[fmt.name][:, None], fmt) - x
            ).sum(axis=1)
            for thresholds in Thresholds
        }
        for error in errors.values():
            assert (errors[Thresholds.SWITCHED] <= error * (1 + 1e-3)).all()


@every
def test_sites_of_the_same_values_have_the_same_scales(thresholds: Thresholds) -> None:
    case = support.calibrated(
        support.model(
            "g (float[N,4] x) => (float[N,3] y, float[N,2] z)"
            " { y = MatMul (x, w) z = MatMul (x, v) }",
            weights={"w": (4, 3), "v": (4, 2)},
        )
    )
    samples = {site.tensor: values(1)[0] for site in case.space.sites if not site.is_weight}
    found = activation_scales(case.space, samples, thresholds)
    by_values: dict[tuple[str, str], set[float]] = {}
    for (name, fmt), scale in found.items():
        by_values.setdefault((case.space.site[name].tensor, fmt), set()).add(float(scale[0]))
    assert by_values
    assert all(len(scales) == 1 for scales in by_values.values())


def test_groups_of_a_weight_share_no_threshold_with_its_channels() -> None:
    names = ("int4", "int8", "int4g16:float32", "int8g16:float32")
    case = support.calibrated(
        support.model(
            "g (float[N,32] x) => (float[N,3] y) { y = MatMul (x, w) }", weights={"w": (32, 3)}
        ),
        precisions=[parse_precision(name) for name in names],
    )
    site = next(site for site in case.space.sites if site.is_weight)
    weights = {site.tensor: values(32, 3, seed=1)}
    found = weight_scales(case.space, weights, 0, Thresholds.SHARED)
    for group in ("", "g16"):
        ends = [
            found[site.name, f"int{bits}{group}"] * (2 ** (bits - 1) - 1) for bits in (4, 8)
        ]
        np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)
    assert found[site.name, "int4"].size == 3
    assert found[site.name, "int4g16"].size == 6
