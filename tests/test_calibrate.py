"""Scales have the least squared error, whatever the values are."""

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from layer_forms import FORMS
from onnx_fliqs.calibrate import (
    Observer,
    activation_scales,
    blended,
    distortions,
    sample_values,
    sampled,
    weight_scales,
)
from onnx_fliqs.emission import simulate
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import (
    FORMATS,
    Format,
    IntFormat,
    fake_quantize,
    is_passthrough,
)
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import TARGETS, Bias, Kernels
from onnx_fliqs.thresholds import least_squares_scales
from onnx_fliqs.verify import verify_graph
from pass_models import LAYERED
from support import (
    PRECISIONS,
    calibrated,
    calibrated_case,
    f32,
    initializer,
    model,
    on_targets,
    random_feeds,
    run,
)

Array = npt.NDArray[np.float32]

SCALED = [fmt for fmt in FORMATS.values() if not is_passthrough(fmt)]
EVERY = pytest.mark.parametrize("fmt", SCALED, ids=[fmt.name for fmt in SCALED])
ROWS = 16


def _rows(kind: str) -> Array:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal((ROWS, 512)),
        "laplace": rng.laplace(size=(ROWS, 512)),
        "relu": np.maximum(rng.standard_normal((ROWS, 512)), 0),
        "heavy": rng.standard_t(2.5, (ROWS, 512)),
    }[kind]
    return (values * np.exp2(rng.uniform(-12, 12, (ROWS, 1)))).astype(np.float32)


def error(values: Array, scale: npt.ArrayLike, fmt: Format) -> npt.NDArray[np.float64]:
    """Squared error of each row, relative to the row's square."""
    scale = np.asarray(scale, np.float32).reshape(-1, 1)
    difference = np.subtract(fake_quantize(values, scale, fmt), values, dtype=np.float64)
    result: npt.NDArray[np.float64] = (difference**2).sum(1) / np.square(
        values, dtype=np.float64
    ).sum(1)
    return result


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "heavy"])
@EVERY
def test_no_scale_of_a_dense_search_is_much_better(fmt: Format, kind: str) -> None:
    values = _rows(kind)
    if isinstance(fmt, IntFormat) and not fmt.signed:
        values = np.abs(values)
    found = error(values, least_squares_scales(values, fmt), fmt)
    largest = np.abs(values).max(axis=1) / fmt.max
    dense = np.min(
        [error(values, largest * share, fmt) for share in np.exp2(np.linspace(-6, 0.75, 400))],
        axis=0,
    )
    # The error is jagged in the scale (single values cross a rounding border), most where it
    # is least: for the few bits that matter 1 %, for many bits of an error of 1e-4 10 %.
    bound = 1.01 if fmt.bits <= 4 else 1.1
    assert found.sum() <= bound * dense.sum()


@EVERY
def test_the_scale_follows_the_values(fmt: Format) -> None:
    values = np.abs(_rows("normal"))
    scales = least_squares_scales(values, fmt)
    # Exact: a power of two changes exponents only.
    np.testing.assert_array_equal(least_squares_scales(values * 8, fmt), scales * 8)
    assert scales.dtype == np.float32
    assert (scales > 0).all()
    np.testing.assert_array_equal(least_squares_scales(values, fmt), scales)


@EVERY
def test_values_that_the_format_holds_are_kept_exactly(fmt: Format) -> None:
    if fmt.bits > 8:
        return
    rng = np.random.default_rng(1)
    numbers = np.concatenate([rng.uniform(0, fmt.max, 64), [fmt.max]]).astype(np.float32)
    numbers = fake_quantize(numbers, 1.0, fmt)[None, :]
    scales = least_squares_scales(numbers, fmt)
    np.testing.assert_array_equal(fake_quantize(numbers, scales[:, None], fmt), numbers)


@EVERY
def test_a_dead_row_gets_a_positive_scale_and_stays_dead(fmt: Format) -> None:
    values = np.zeros((2, 8), np.float32)
    values[1] = np.arange(8)
    scales = least_squares_scales(values, fmt)
    assert (scales > 0).all()
    assert not fake_quantize(values, scales[:, None], fmt)[0].any()


def test_more_bits_have_less_error() -> None:
    values = _rows("normal")
    errors = [
        error(
            values, least_squares_scales(values, FORMATS[f"int{bits}"]), FORMATS[f"int{bits}"]
        )
        for bits in range(2, 9)
    ]
    assert all((more < less).all() for less, more in itertools.pairwise(errors))


def test_four_bits_clip_outliers_and_eight_do_not_lose_them() -> None:
    values = np.random.default_rng(0).standard_normal((1, 4096)).astype(np.float32)
    largest = float(np.abs(values).max())
    reach = {
        bits: float(least_squares_scales(values, FORMATS[f"int{bits}"])[0])
        * FORMATS[f"int{bits}"].max
        / largest
        for bits in (2, 4, 8)
    }
    # Banner et al. 2019 give 2.55 standard deviations for 4 bits of a normal distribution.
    assert reach[2] < reach[4] < reach[8]
    assert 2.2 < reach[4] * largest < 2.9


# -- samples --------------------------------------------------------------------------------


def test_a_sample_holds_the_extremes_and_few_values_are_all_taken() -> None:
    values = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    rng = np.random.default_rng(1)
    some = sampled(values, 100, rng)
    assert some.shape == (100,)
    assert (some.min(), some.max()) == (values.min(), values.max())
    assert set(some.tolist()) <= set(values.ravel().tolist())
    np.testing.assert_array_equal(sampled(values, 2000, rng), values.ravel())


def test_samples_are_shared_out_among_the_batches_and_repeat() -> None:
    rng = np.random.default_rng(0)
    batches = [{"a": rng.standard_normal(9000), "b": np.arange(3.0)} for _ in range(4)]
    first, second = (sample_values(batches, 4, seed=5) for _ in range(2))
    assert {name: len(values) for name, values in first.items()} == {"a": 4 * 4096, "b": 12}
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    other = sample_values(batches, 4, seed=6)
    assert not np.array_equal(first["a"], other["a"])
    extremes = [batch["a"].astype(np.float32).max() for batch in batches]
    assert set(extremes) <= set(first["a"])


def test_an_observer_hands_out_inputs_and_inner_values() -> None:
    plain = canonicalise(LAYERED["residual"].build())
    feeds = random_feeds(plain)
    seen = Observer(plain, ["x", "f", "y", "f"]).run(feeds)
    assert list(seen) == ["x", "f", "y"]
    assert seen["x"] is feeds["x"]
    np.testing.assert_allclose(seen["y"], run(plain, feeds)[0], rtol=1e-4, atol=1e-5)
    assert (seen["f"] >= 0).all()
    assert list(Observer(plain, ["x"]).run(feeds)) == ["x"]


# -- tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "target"), on_targets(LAYERED))
def test_every_site_has_its_scales_in_every_format(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    expected = {
        (site.name, fmt.name): (site.scale_count(fmt),)
        for site in prepared.space.sites
        for fmt in prepared.space.site_formats(site)
    }
    assert {key: scales.shape for key, scales in prepared.scales.items()} == expected
    for scales in prepared.scales.values():
        assert scales.dtype == np.float32
        assert np.isfinite(scales).all()
        assert (scales > 0).all()


def test_calibration_is_deterministic() -> None:
    first, second = (calibrated(LAYERED["residual"].build()).scales for _ in range(2))
    assert first.keys() == second.keys()
    for key, scales in first.items():
        np.testing.assert_array_equal(scales, second[key])


def test_each_channel_of_a_weight_is_calibrated_by_itself() -> None:
    prepared = calibrated_case("gemms")
    weight = initializer(prepared.canonical, "w1")
    for fmt in SCALED[:5]:
        found = prepared.scales["w1@plain", fmt.name]
        np.testing.assert_array_equal(found, least_squares_scales(weight.T, fmt))


def test_large_weights_are_sampled_with_their_extremes() -> None:
    plain = canonicalise(LAYERED["gemms"].build())
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["int8"]])
    rng = np.random.default_rng(0)
    weights = {
        site.tensor: initializer(plain, site.tensor) for site in space.sites if site.is_weight
    }
    large = rng.standard_normal((5000, 3)).astype(np.float32)
    weights["w1"] = large
    scales = weight_scales(space, weights, seed=0)["w1@plain", "int8"]
    exact = least_squares_scales(large.T, FORMATS["int8"])
    np.testing.assert_allclose(scales, exact, rtol=0.15)  # 512 of 5000 values
    again = weight_scales(space, weights, seed=0)["w1@plain", "int8"]
    np.testing.assert_array_equal(scales, again)


def test_a_dead_channel_keeps_a_share_of_the_scale_of_its_tensor() -> None:
    plain = canonicalise(LAYERED["conv_relu_conv"].build())
    space = find_layers(plain, TARGETS["ort-cpu"], [PRECISIONS["int8"]])
    weights = {
        site.tensor: np.array(initializer(plain, site.tensor))
        for site in space.sites
        if site.is_weight
    }
    weights["w1"][2] = 0
    scales = weight_scales(space, weights, seed=0)["w1@c1", "int8"]
    assert scales[2] == scales.max() * np.float32(2.0**-14)


def test_sites_of_one_tensor_have_one_scale_and_rearrangements_that_of_their_source() -> None:
    generic = calibrated_case("attention")
    for name in ("int4", "e4m3"):
        sites = [generic.space.site[f"x@{q}:0"] for q in ("query", "key", "value")]
        scales = {
            float(generic.scales[site.name, site.effective(FORMATS[name]).name][0])
            for site in sites
        }
        assert len(scales) == 1
    integer = calibrated_case("rearranged_input", "ort-cpu")
    for tensor in ("s", "f"):
        assert integer.scales[f"{tensor}@all", "int8"] is integer.scales["x@all", "int8"]


def test_a_shared_scale_suits_the_values_of_all_that_share_it() -> None:
    integer = calibrated_case("rearranged_input", "ort-cpu")
    parts = {"x": f32([-1, 0.5]), "s": f32([2, -3, 0.1]), "f": f32([0.25])}
    found = activation_scales(integer.space, {**parts, "z": f32([9])})
    together = np.concatenate(list(parts.values()))[None, :]
    best = least_squares_scales(together, FORMATS["int8"])
    for site in ("x@all", "s@all", "f@all"):
        np.testing.assert_array_equal(found[site, "int8"], best)


def test_the_distortion_of_a_decision_is_that_of_all_its_layers() -> None:
    case = calibrated_case("shared_weight")
    observer = Observer(
        case.canonical, [s.tensor for s in case.space.sites if not s.is_weight]
    )
    samples = sample_values([observer.run(random_feeds(case.canonical, 1))], 1, seed=0)
    weights = {"w": initializer(case.canonical, "w")}
    (row,) = distortions(case.space, samples, weights, case.scales)
    apart = distortions(replace(case.space, groups=()), samples, weights, case.scales)
    assert len(apart) == 3
    np.testing.assert_allclose(row, np.sum(apart, axis=0), rtol=1e-12)
    assert (row[:-1] > 0).all()
    assert (row[-1] == 0).all()  # float32


def test_layers_without_activations_are_distorted_by_their_weights_alone() -> None:
    case = calibrated(
        FORMS["lstm"].build(), precisions=[PRECISIONS["int4"], PRECISIONS["int8"]]
    )
    weights = {name: initializer(case.canonical, name) for name in ("w", "r")}
    (row,) = distortions(case.space, {}, weights, case.scales)
    for index, precision in enumerate(case.space.precisions):
        fmt = precision.weights
        expected = 0.0
        for name, weight in weights.items():
            scale = case.scales[f"{name}@cell", fmt.name].reshape(1, -1, 1)
            difference = fake_quantize(weight, scale, fmt) - weight
            expected += float((difference**2).sum() / (weight**2).sum())
        np.testing.assert_allclose(row[index], [expected, 0], rtol=1e-5)  # float32 sums


def test_a_large_weight_is_represented_by_some_of_each_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "g (float[N,512] x) => (float[N,64] y) { y = MatMul (x, w) }"
    case = calibrated(model(text, weights={"w": (512, 64)}), precisions=[PRECISIONS["int4"]])
    space = replace(case.space, sites=tuple(s for s in case.space.sites if s.is_weight))
    weights = {"w": initializer(case.canonical, "w")}
    (whole,) = distortions(space, {}, weights, case.scales)
    monkeypatch.setattr("onnx_fliqs.calibrate._LARGE_WEIGHT", 4096)
    (part,) = distortions(space, {}, weights, case.scales)
    assert part[0, 0] != whole[0, 0]
    np.testing.assert_allclose(part, whole, rtol=0.1)  # an eighth of the numbers


def test_an_unsigned_site_is_calibrated_in_the_unsigned_format() -> None:
    prepared = calibrated_case("conv_relu_conv")
    assert ("r@c2:0", "uint4") in prepared.scales
    assert ("r@c2:0", "int4") not in prepared.scales
    samples = {"x": f32([-1, 1]), "r": f32([0, 1, 2])}
    scales = activation_scales(prepared.space, samples)
    assert scales["r@c2:0", "uint8"].shape == (1,)


def test_running_scales_are_a_geometric_mean() -> None:
    old = {("x", "int8"): f32([4.0])}
    new = {("x", "int8"): f32([1.0]), ("y", "int8"): f32([3.0])}
    result = blended(old, new, keep=0.5)
    np.testing.assert_array_equal(result["x", "int8"], f32([2.0]))
    np.testing.assert_array_equal(result["y", "int8"], f32([3.0]))
    assert result["x", "int8"].dtype == np.float32


# -- biases that have to fit in int32 -------------------------------------------------------


@pytest.mark.parametrize(
    "target", [name for name, target in TARGETS.items() if target.bias is Bias.INT32]
)
@pytest.mark.parametrize("trouble", ["dead activation", "dead weights", "dead channel"])
def test_a_large_bias_beside_next_to_nothing_stays_right(target: str, trouble: str) -> None:
    plain = model(
        """g (float[N,3,5,5] x) => (float[N,2,5,5] y) {
            [c1] a = Conv (x, w1, b1)
            r = Relu (a)
            [c2] c = Conv (r, w2, b2)
            s = Relu (c)
            [c3] y = Conv (s, w3, b3) }""",
        weights={"w1": (4, 3, 1, 1), "b1": (4,), "w2": (4, 4, 1, 1), "b2": (4,)}
        | {"w3": (2, 4, 1, 1), "b3": (2,)},
    )

    def put(name: str, array: npt.NDArray[np.float32]) -> None:
        plain.graph.initializers[name].const_value = ir.tensor(array, name=name)

    put("b2", f32([1e3, 0.5, 30, 2e4]))
    weight = np.array(initializer(plain, "w2"))
    if trouble == "dead activation":
        put("b1", f32([-1e6] * 4))
    else:
        weight[: 4 if trouble == "dead weights" else 2] = 0
        put("w2", weight)
    case = calibrated(plain, target)
    chosen = case.eight_bits()
    taken = case.space.formats_taken(chosen)
    steps = case.space.scales_taken(taken, case.scales)
    biases = [site for site in case.space.sites if site.bias_of is not None]
    assert [site.tensor for site in biases] == ["b1", "b2", "b3"]
    for site in biases:
        codes = np.abs(initializer(case.canonical, site.tensor) / steps[site.name])
        assert codes.max() <= 2.0**30 * (1 + 1e-6)
    feeds = [random_feeds(case.canonical, 1)]
    searched = simulate(case.canonical, case.space, chosen, case.scales, feeds)
    graph = case.emitted(chosen)
    assert verify_graph(graph, feeds, searched).level is OptimizationLevel.DEFAULT
    exact = run(case.canonical, feeds[0])[0]
    difference = np.abs(searched[0]["y"] - exact).max()
    assert difference < 0.05 * np.abs(exact).max()


def test_room_for_a_bias_is_made_in_the_precisions_of_its_own_layer() -> None:
    target = replace(
        TARGETS["generic"],
        kernels=(
            Kernels(ops=("Conv",), precisions=("int8",)),
            Kernels(ops=("MatMul",), precisions=("int6",)),
        ),
    )
    plain = model(
        """g (float[N,2,4,4] x) => (float[N,2,4,3] y) {
            [c] a = Conv (x, w1, b1)
            [m] y = MatMul (a, w2) }""",
        weights={"w1": (2, 2, 1, 1), "b1": (2,), "w2": (4, 3)},
    )
    case = calibrated(plain, target)
    assert ("w1@c", "int8") in case.scales
    assert ("x@c:0", "int6") not in case.scales


def test_values_are_let_go_before_the_next_are_computed() -> None:
    seen: list[weakref.ref[npt.NDArray[np.float32]]] = []

    def observed(number: int) -> dict[str, npt.NDArray[np.float32]]:
        array = np.full(40_000, number, np.float32)
        seen.append(weakref.ref(array))
        return {"x": array}

    def batches() -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        for number in range(3):
            assert all(ref() is None for ref in seen)
            yield observed(number)

    found = sample_values(batches(), 3, seed=0)
    assert set(found["x"]) == {0, 1, 2}
