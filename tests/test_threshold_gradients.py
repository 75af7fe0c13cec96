"""Thresholds of activations follow the gradient of the loss."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import InlinePass

from onnx_fliqs import SearchConfig
from onnx_fliqs.errors import ConfigError
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.kernels import block_of_channels, for_fast_kernels
from onnx_fliqs.learned_thresholds import Growth, Threshold, learned_thresholds
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.add_threshold_gradients import AddThresholdGradientsPass
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES
from onnx_fliqs.passes.specialise_sites import SpecialiseSitesPass
from onnx_fliqs.precision import parse_space
from onnx_fliqs.runtime import make_session
from onnx_fliqs.signs import positive_sites
from onnx_fliqs.sites import FormatMap
from onnx_fliqs.step_graphs import cut_step
from onnx_fliqs.trainability import trainable_parameters
from pass_models import LAYERED
from support import Calibrated, Feeds, calibrated, calibrated_case, initializer, model

BATCH = 6
NETWORK = """g (float[N,16,8,8] x) => (float[N,5] y) {
    [first] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    r0 = Relu (c0)
    [second] c1 = Conv (r0, w1, b1)
    r1 = Clip (c1, zero, limit)
    [third] c2 = Conv (r1, w2, b2)
    a = Add (c2, r1)
    [fourth] c3 = Conv (a, w3, b3)
    r3 = Clip (c3, below, limit)
    [fifth] c4 = Conv (r3, w4, b4)
    m = GlobalAveragePool (c4)
    f = Flatten (m)
    [last] y = Gemm (f, w5, b5) }"""
SHAPES: dict[str, tuple[int, ...]] = {
    "w0": (16, 16, 3, 3),
    **{f"w{i}": (16, 16, 1, 1) for i in (1, 2, 3, 4)},
    "w5": (16, 5),
    **{f"b{i}": (16,) for i in range(5)},
    "b5": (5,),
}
LIMIT = 1.5
DISABLED = ["GatherSliceToSplitFusion"]


@dataclass(frozen=True)
class Task:
    """A network, and its gradient by weights, then by the thresholds of every site."""

    calibrated: Calibrated
    parameters: Feeds
    graph: ir.Model
    fast: ir.Model
    """The same for the kernels of this machine."""
    thresholds: tuple[Threshold, ...]

    def feeds(self, precision: str, wider: float) -> Feeds:
        """Inputs, with thresholds of activations so much wider than the calibrated ones.

        Those of weights are narrower, so that none lies at the edge of its range, where there
        are two derivatives.
        """
        space = self.calibrated.space
        (chosen,) = parse_space(precision)
        scales = {
            key: scale * np.float32(0.93 if space.site[key[0]].is_weight else wider)
            for key, scale in self.calibrated.scales.items()
        }
        values = space.values(space.uniform(chosen), scales)
        rng = np.random.default_rng(5)
        return {
            CODES: values.codes.reshape(-1),
            SCALES: values.scales,
            "x": rng.standard_normal((BATCH, 16, 8, 8)).astype(np.float32),
            teacher_input("y"): rng.standard_normal((BATCH, 5)).astype(np.float32),
            **self.parameters,
        }

    def found(self, graph: ir.Model, feeds: Feeds) -> npt.NDArray[np.float64]:
        """What the thresholds' part of the gradient says."""
        session = make_session(graph.clone(), threads=1, disabled=DISABLED)
        (gradient,) = session.run([GRADIENT], feeds)
        count = sum(threshold.count for threshold in self.thresholds)
        return np.asarray(gradient[-count:], np.float64)

    def by_operators(self, feeds: Feeds) -> npt.NDArray[np.float64]:
        """The same, as ONNX Runtime differentiates the operators of the sites."""
        searchable = _with_loss(self.calibrated, tuple(self.parameters))
        InlinePass()(searchable)
        gradient = build_gradient(searchable, LOSS, [SCALES])
        session = make_session(gradient, threads=1, disabled=DISABLED)
        known = [value.name for value in session.get_inputs()]
        (found,) = session.run([GRADIENT], {name: feeds[name] for name in known})
        by_site = self._by_site(np.asarray(found, np.float64) * feeds[SCALES])
        return np.concatenate(
            [
                np.sum([by_site[name] for name in threshold.sites], axis=0)
                for threshold in self.thresholds
            ]
        )

    def _by_site(self, numbers: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        sizes = [int(np.prod(site.broadcast_shape)) for site in self.calibrated.space.sites]
        cut = np.split(numbers, np.cumsum(sizes)[:-1])
        return {
            site.name: part
            for site, part in zip(self.calibrated.space.sites, cut, strict=True)
        }


def _with_loss(prepared: Calibrated, parameters: tuple[str, ...]) -> ir.Model:
    searchable = prepared.searchable()
    SpecialiseSitesPass((), positive_sites(prepared.canonical, prepared.space))(searchable)
    promote_initializers(searchable, [*parameters, CODES, SCALES])
    term = LossTerm(kind=LossKind.SQUARED_ERROR, output="y", scores="y")
    AddLossPass([term])(searchable)
    return searchable


def _network() -> ir.Model:
    constants = {"zero": 0.0, "below": -1.0, "limit": LIMIT}
    built = model(NETWORK, weights=SHAPES, constants=constants)
    for name, shape in SHAPES.items():
        array = initializer(built, name) / np.sqrt(np.prod(shape[1:]) or 1)
        built.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32))
    return built


@functools.cache
def task(names: str) -> Task:
    prepared = calibrated(_network(), "generic", parse_space(names))
    parameters = tuple(trainable_parameters(prepared.canonical, ["y"]))
    thresholds = learned_thresholds(prepared.space)
    gradient = ir.from_proto(
        build_gradient(_with_loss(prepared, parameters), LOSS, parameters)
    )
    AddThresholdGradientsPass(thresholds)(gradient)
    weights = {name: initializer(prepared.canonical, name) for name in parameters}
    fast = for_fast_kernels(gradient.clone(), BATCH)
    return Task(prepared, weights, gradient, fast, thresholds)


@pytest.mark.parametrize("wider", [0.4, 0.9, 3.0])
@pytest.mark.parametrize("fmt", ["int2", "int4", "int8", "e2m1", "e4m3"])
def test_the_gradient_is_that_of_the_operators(fmt: str, wider: float) -> None:
    """Behind a Relu, a Clip that reaches to the threshold or not, and neither."""
    built = task("int2,int4,int8" if fmt.startswith("int") else "e2m1,e4m3")
    feeds = built.feeds(fmt, wider)
    found, wanted = built.found(built.graph, feeds), built.by_operators(feeds)
    # Nothing trains in front of the input, so that no gradient reaches its site.
    assert built.thresholds[0].sites == (built.calibrated.space.sites[0].name,)
    assert found[0] == 0
    assert np.count_nonzero(wanted[1:]) >= 4
    many, largest = fmt in ("int8", "e4m3"), np.abs(wanted).max()
    channels = sum(threshold.count for threshold in built.thresholds if threshold.of_weight)
    assert channels == 5 * 16 + 5
    assert np.count_nonzero(wanted[-channels:]) > channels / 2
    # The finer the codes, the more of the two products cancels.
    off = 1e-3 if many else 2e-5
    np.testing.assert_allclose(found[1:], wanted[1:], atol=off * largest)
    # Of many codes, some round the other way where sums are in another order.
    off = 2e-2 if many else 1e-4
    np.testing.assert_allclose(built.found(built.fast, feeds), found, atol=off * largest)


@pytest.mark.skipif(block_of_channels() == 1, reason="no kernels for blocked channels here")
def test_images_in_blocked_channels_are_multiplied_as_they_are() -> None:
    built = task("int4,int8")
    rearranged = [n for n in built.fast.graph if n.op_type.startswith("Reorder")]
    plain = ir.from_proto(
        build_gradient(
            _with_loss(built.calibrated, tuple(built.parameters)), LOSS, [*built.parameters]
        )
    )
    before = [
        n for n in for_fast_kernels(plain, BATCH).graph if n.op_type.startswith("Reorder")
    ]
    assert len(rearranged) <= len(before) + 2


def test_a_graph_has_the_gradients_once() -> None:
    built = task("int4,int8")
    names = tuple(built.parameters)
    gradient = ir.from_proto(build_gradient(_with_loss(built.calibrated, names), LOSS, names))
    pass_ = AddThresholdGradientsPass(built.thresholds)
    assert pass_(gradient).modified
    assert not pass_(gradient).modified
    assert not AddThresholdGradientsPass(())(gradient).modified


def test_what_weights_alone_make_is_made_once_a_step() -> None:
    """Each part of a batch gives one number more for a threshold of activations, no others."""
    built = task("int4,int8")
    names = tuple(built.parameters)
    plain = ir.from_proto(build_gradient(_with_loss(built.calibrated, names), LOSS, names))
    outputs = []
    for gradient in (plain.clone(), built.graph.clone()):
        graphs = cut_step(
            for_fast_kernels(gradient, BATCH), names, (CODES, SCALES), shares=1, weights=[1, 1]
        )
        outputs.append(len(graphs.part.graph.outputs))
    reached = sum(not threshold.of_weight for threshold in built.thresholds) - 1
    assert outputs[1] == outputs[0] + reached


# --- which are learned, and how they move --------------------------------------------------


@pytest.mark.parametrize("case", LAYERED)
def test_activations_that_share_a_scale_are_learned_together(case: str) -> None:
    space = calibrated_case(case).space
    thresholds = learned_thresholds(space)
    names = [name for threshold in thresholds for name in threshold.sites]
    assert len(names) == len(set(names))
    sharing = {name: threshold for threshold in thresholds for name in threshold.sites}
    for site in space.sites:
        root = site.same_scale_as or site.name
        assert sharing.get(site.name) == sharing.get(root)
        if site.fixed_range is not None or site.bias_of is not None:
            assert site.name not in sharing
        elif site.is_weight and root == site.name:
            alone = Threshold((site.name,), site.broadcast_shape, of_weight=True)
            assert sharing.get(site.name, alone) == alone
            assert (site.name in sharing) == (site.group_axis is None)
        elif not space.site[root].is_weight:
            assert site.name in sharing or space.site[root].fixed_range is not None


def test_some_cases_share_scales() -> None:
    spaces = [calibrated_case(case).space for case in LAYERED]
    assert any(len(each.sites) > 1 for space in spaces for each in learned_thresholds(space))


def test_powers_of_two_stay() -> None:
    space = calibrated_case(next(iter(LAYERED))).space
    assert learned_thresholds(space)
    assert not learned_thresholds(replace(space, power_of_two_scales=True))


def formats(prepared: Calibrated, precision: str) -> FormatMap:
    (chosen,) = parse_space(precision)
    return prepared.space.formats_taken(prepared.space.uniform(chosen))


def test_what_has_no_scale_moves_none() -> None:
    """The gradient is then a rounding error, and Adam makes a whole step of it."""
    prepared = calibrated(_network(), "generic", parse_space("int4,bf16"))
    thresholds = learned_thresholds(prepared.space)
    growth = np.full(_total(thresholds), 0.1, np.float32)
    first = prepared.space.layers[0].name
    (four,), (bf16,) = parse_space("int4"), parse_space("bf16")
    chosen = {**prepared.space.uniform(bf16), first: four}
    taken = prepared.space.formats_taken(chosen)
    moved = Growth(thresholds, prepared.scales)(prepared.scales, growth, taken)
    of_first = {site.name for site in prepared.space.sites if site.layers == (first,)}
    changed = {key[0] for key in moved if np.any(moved[key] != prepared.scales[key])}
    assert changed == of_first - {
        s.name for s in prepared.space.sites if s.bias_of is not None
    }


def _total(thresholds: Sequence[Threshold]) -> int:
    return sum(threshold.count for threshold in thresholds)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=8))
def test_no_threshold_leaves_the_calibrated_one_by_more_than_twice(steps: list[float]) -> None:
    prepared = task("int4,int8").calibrated
    thresholds = learned_thresholds(prepared.space)
    scales, taken = dict(prepared.scales), formats(prepared, "int8")
    for step in steps:
        growth = np.full(_total(thresholds), step, np.float32)
        scales = Growth(thresholds, prepared.scales)(scales, growth, taken)
    learned = {name for threshold in thresholds for name in threshold.sites}
    for key, scale in prepared.scales.items():
        share = scales[key] / scale
        if key[0] in learned:
            assert np.all((share >= 0.499) & (share <= 2.001))
        else:
            assert np.all(share == 1)


def test_all_formats_of_a_site_move_by_the_same_factors() -> None:
    prepared = task("int4,int8").calibrated
    thresholds = learned_thresholds(prepared.space)
    growth = np.linspace(-0.5, 0.5, _total(thresholds)).astype(np.float32)
    taken = formats(prepared, "int4")
    moved = Growth(thresholds, prepared.scales)(prepared.scales, growth, taken)
    start = 0
    for threshold in thresholds:
        factors = np.exp(growth[start : start + threshold.count])
        start += threshold.count
        own = [key for key in moved if key[0] in threshold.sites]
        assert own
        for key in own:
            np.testing.assert_allclose(moved[key] / prepared.scales[key], factors, rtol=1e-5)


def test_thresholds_are_learned_or_refreshed_not_both() -> None:
    with pytest.raises(ConfigError, match="threshold_rate=0"):
        SearchConfig(refresh=10)
    with pytest.raises(ConfigError, match="threshold_rate must not be negative"):
        SearchConfig(threshold_rate=-1.0)
    SearchConfig(refresh=10, threshold_rate=0.0)
