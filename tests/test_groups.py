"""Weights with a scale for every few numbers of a channel: NumPy, searched, emitted."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.emission import emit
from onnx_fliqs.formats import IntFormat, fake_quantize
from onnx_fliqs.passes.insert_search_sites import InsertSearchSitesPass
from onnx_fliqs.precision import parse_precision, parse_space
from onnx_fliqs.runtime import OptimizationLevel, make_session
from onnx_fliqs.targets import TARGETS, Bias
from onnx_fliqs.thresholds import least_squares_scales
from support import (
    Calibrated,
    calibrated,
    check_pass,
    f32,
    initializer,
    model,
    ops,
    random_feeds,
    run,
)

Array = npt.NDArray[np.float32]

SPACE = (
    "int4g16:float32 int4g32:float32 int4g64:float32 int4g16:int8 int8g16:int8 int2g32:int4"
    " int4 int8 float32"
)


@dataclass(frozen=True)
class Form:
    """A layer, and how its weight lies: channels first or summed numbers first."""

    text: str
    summed: int
    """The axis that is summed over."""
    position: int = 1
    """Of the weight among the operands."""

    def output(self, x: Array, w: Array) -> Array:
        """What it computes of an activation and a weight."""
        summed_last = np.moveaxis(w, self.summed, 1)
        return summed_last @ x if self.position == 0 else x @ summed_last.T


FORMS = {
    "matmul": Form("g (float[N,64] x) => (float[N,6] y) { [fc] y = MatMul (x, w) }", 0),
    "gemm": Form("g (float[N,64] x) => (float[N,6] y) { [fc] y = Gemm (x, w) }", 0),
    "gemm_transposed": Form(
        "g (float[N,64] x) => (float[N,6] y) { [fc] y = Gemm <transB = 1> (x, w) }", 1
    ),
    "matmul_from_the_left": Form(
        "g (float[64,3] x) => (float[6,3] y) { [fc] y = MatMul (w, x) }", 1, 0
    ),
    "gemm_from_the_left": Form(
        "g (float[64,3] x) => (float[6,3] y) { [fc] y = Gemm (w, x) }", 1, 0
    ),
}
EVERY = pytest.mark.parametrize("form", FORMS)
NAMES = pytest.mark.parametrize("name", SPACE.split())


@functools.cache
def prepared(form: str) -> Calibrated:
    shape = (6, 64) if FORMS[form].summed else (64, 6)
    return calibrated(
        model(FORMS[form].text, weights={"w": shape}), precisions=parse_space(SPACE)
    )


def grouped(w: Array, summed: int, size: int) -> Array:
    """[channels, groups, numbers of a group]."""
    return np.moveaxis(w, summed, 1).reshape(w.shape[1 - summed], -1, size)


def reference(case: Calibrated, form: Form, name: str, x: Array) -> Array:
    """The layer in NumPy: every group is quantized by itself."""
    precision = parse_precision(name)
    fmt, size = precision.weights, precision.weights.group or 64
    w = initializer(case.canonical, "w")
    parts = grouped(w, form.summed, size)
    if name != "float32":
        scales = case.scales["w@fc", fmt.name].reshape(
            case.space.site["w@fc"].scale_shape(fmt)
        )
        scales = np.moveaxis(scales, form.summed, 1)[..., None]
        assert scales.shape == (6, 64 // size, 1)
        parts = fake_quantize(parts, scales, fmt)
    w = np.moveaxis(parts.reshape(6, 64), 1, form.summed)
    if precision.activations.name != "float32":
        (site,) = [s for s in case.space.sites if not s.is_weight]
        taken = site.effective(precision.activations)
        x = fake_quantize(x, case.scales[site.name, taken.name], taken)
    return form.output(x, w)


# -- searchable -----------------------------------------------------------------------------


@NAMES
@EVERY
def test_the_searchable_graph_quantizes_each_group_by_itself(form: str, name: str) -> None:
    case = prepared(form)
    feeds = random_feeds(case.canonical, 3, batch=5)
    chosen = case.space.uniform(parse_precision(name))
    (got,) = run(case.searchable(chosen), feeds)
    want = reference(case, FORMS[form], name, feeds["x"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # the order of float32 sums


@NAMES
@EVERY
def test_the_scale_of_a_group_is_the_best_for_its_numbers(form: str, name: str) -> None:
    fmt = parse_precision(name).weights
    if name == "float32":
        return
    case, size = prepared(form), fmt.group or 64
    parts = grouped(initializer(case.canonical, "w"), FORMS[form].summed, size)
    found = case.scales["w@fc", fmt.name].reshape(case.space.site["w@fc"].scale_shape(fmt))
    found = np.moveaxis(found, FORMS[form].summed, 1)
    for channel, group in np.ndindex(*parts.shape[:2]):
        best = least_squares_scales(parts[None, channel, group], fmt)
        assert found[channel, group] == best[0]


@EVERY
def test_at_float32_not_a_bit_of_the_outputs_changes(form: str) -> None:
    case = prepared(form)
    feeds = random_feeds(case.canonical, 3)
    (want,) = run(case.canonical, feeds)
    np.testing.assert_array_equal(run(case.searchable(), feeds)[0], want)
    chosen = case.space.uniform(parse_precision("float32"))
    np.testing.assert_array_equal(run(case.searchable(chosen), feeds)[0], want)
    graph = case.emitted(chosen)
    np.testing.assert_array_equal(run(graph, feeds)[0], want)
    assert ops(graph) == ops(case.canonical)


@EVERY
def test_insertion_keeps_the_contract_of_a_pass(form: str) -> None:
    case = prepared(form)
    check_pass(InsertSearchSitesPass(case.space), case.canonical)


def test_smaller_groups_have_less_error() -> None:
    case = prepared("matmul")
    w = initializer(case.canonical, "w")
    errors = []
    for size in (16, 32, 64):
        fmt = IntFormat(bits=4, group=size)
        scales = case.scales["w@fc", fmt.name].reshape(64 // size, 1, 6)
        parts = w.reshape(64 // size, size, 6)
        errors.append(float(np.square(fake_quantize(parts, scales, fmt) - parts).sum()))
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2]


# -- emitted --------------------------------------------------------------------------------


def opset(graph: ir.Model) -> int:
    return int(graph.opset_imports[""])


@NAMES
@EVERY
def test_the_emitted_graph_computes_what_was_searched(form: str, name: str) -> None:
    case = prepared(form)
    chosen = case.space.uniform(parse_precision(name))
    graph = case.emitted(chosen)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    feeds = random_feeds(case.canonical, 3)
    np.testing.assert_array_equal(run(graph, feeds)[0], run(case.searchable(chosen), feeds)[0])


@pytest.mark.parametrize("level", OptimizationLevel)
@pytest.mark.parametrize("name", ["int4g16:float32", "int4g16:int8", "int2g32:int4"])
@EVERY
def test_every_level_of_onnx_runtime_agrees(
    form: str, name: str, level: OptimizationLevel
) -> None:
    case = prepared(form)
    graph = case.emitted(case.space.uniform(parse_precision(name)))
    feeds = random_feeds(case.canonical, 3)
    (want,) = run(graph, feeds)
    (got,) = make_session(graph, level=level, threads=1).run(None, feeds)
    # ONNX Runtime may multiply blocks of int4 in integers.
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


@EVERY
def test_groups_of_8_bits_beside_8_bits_are_for_the_basic_level(form: str) -> None:
    """ONNX Runtime 1.31 fuses them to a kernel that refuses their scales."""
    case = prepared(form)
    chosen = case.space.uniform(parse_precision("int8g16:int8"))
    feeds = [random_feeds(case.canonical, 3)]
    operands = case.canonical, case.space, chosen, case.scales, case.target
    emitted = emit(*operands, feeds)
    refused = emitted.level is OptimizationLevel.BASIC
    assert bool(emitted.warnings) == refused
    assert refused or FORMS[form].position == 0  # QLinearMatMul wants the weight second


@pytest.mark.parametrize(("name", "size"), [("int4g16:float32", 16), ("int4g64:float32", 64)])
@EVERY
def test_groups_are_blocks_of_dequantizelinear(form: str, name: str, size: int) -> None:
    case = prepared(form)
    # A Gemm that reads floats transposes no weight.
    summed = 0 if form == "gemm_transposed" else FORMS[form].summed
    graph = case.emitted(case.space.uniform(parse_precision(name)))
    (node,) = [n for n in graph.graph if n.op_type == "DequantizeLinear"]
    assert node.attributes.get_int("block_size") == size
    assert node.attributes.get_int("axis") == summed
    codes, scale = node.inputs[:2]
    assert codes is not None
    assert scale is not None
    assert codes.dtype is ir.DataType.INT4
    shape = [6, 6]
    shape[summed] = 64 // size
    assert initializer(graph, str(scale.name)).shape == tuple(shape)
    assert ops(graph) == ["DequantizeLinear", ops(case.canonical)[0]]
    assert opset(graph) == 21


def test_without_groups_no_block_is_left_of_them() -> None:
    case = prepared("matmul")
    graph = case.emitted(case.space.uniform(parse_precision("int8")))
    assert opset(graph) == 20
    assert "Reshape" not in ops(graph)
    for node in graph.graph:
        assert "block_size" not in node.attributes


@pytest.mark.parametrize(
    "name", ["e2m1g16:float32", "e3m4g32:float32", "e4m3g16:e4m3", "int6g16:fp16"]
)
def test_formats_of_every_kind_of_container_have_groups(name: str) -> None:
    case = calibrated(
        model(FORMS["gemm_transposed"].text, weights={"w": (6, 64)}),
        precisions=parse_space(f"{name} int4g32:float32"),
    )
    for precision in case.space.precisions:
        chosen = case.space.uniform(precision)
        feeds = random_feeds(case.canonical, 3)
        want = run(case.searchable(chosen), feeds)[0]
        np.testing.assert_array_equal(run(case.emitted(chosen), feeds)[0], want)


def test_a_group_of_all_numbers_is_a_channel() -> None:
    case = calibrated(
        model(
            "g (float[N,16] x) => (float[N,6] y) { [fc] y = MatMul (x, w) }",
            weights={"w": (16, 6)},
        ),
        precisions=parse_space("int4g16:float32 int4:float32"),
    )
    feeds = random_feeds(case.canonical, 3)
    channel, group = case.space.precisions
    for step in (case.searchable, case.emitted):
        one, other = (run(step(case.space.uniform(p)), feeds) for p in (channel, group))
        np.testing.assert_array_equal(one, other)


# -- networks -------------------------------------------------------------------------------

MIXED = """g (float[N,64] x) => (float[N,8] y) {
    [one] a = MatMul (x, w1)
    r = Relu (a)
    [two] b = Gemm <transB = 1> (r, w2, bias)
    [three] c = MatMul (b, w3)
    t = Tanh (c)
    [four] y = MatMul (t, w4) }"""
MIXED_WEIGHTS = {"w1": (64, 32), "w2": (48, 32), "bias": (48,), "w3": (48, 16), "w4": (16, 8)}


@functools.cache
def mixed(bias: Bias = Bias.INT32) -> Calibrated:
    target = replace(TARGETS["generic"], bias=bias)
    return calibrated(model(MIXED, weights=MIXED_WEIGHTS), target, parse_space(SPACE))


@pytest.mark.parametrize("seed", range(8))
def test_random_mixes_of_groups_compute_what_was_searched(seed: int) -> None:
    case = mixed()
    chosen = case.random_mix(seed)
    feeds = random_feeds(case.canonical, 3)
    graph = case.emitted(chosen)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    want = run(case.searchable(chosen), feeds)
    np.testing.assert_array_equal(run(graph, feeds), want)


def test_each_layer_has_the_groups_that_fit_it() -> None:
    choices = {
        names[0]: {p.name for p in choices}
        for names, choices in zip(mixed().space.decisions, mixed().space.choices, strict=True)
    }
    every = set(SPACE.split())
    assert choices == {
        "one": every,
        "two": every - {"int4g64:float32"},
        "three": every - {"int4g32:float32", "int4g64:float32", "int2g32:int4"},
        "four": every - {"int4g32:float32", "int4g64:float32", "int2g32:int4"},
    }
    sites = {s.tensor: (s.group_axis, s.group, s.groups) for s in mixed().space.sites}
    assert sites["w1"] == (0, 16, 4)
    assert sites["w2"] == (1, 16, 2)
    assert sites["w3"] == (0, 16, 3)
    assert sites["x"] == sites["bias"] == (None, None, 1)


def test_a_bias_that_is_stored_like_the_weights_has_no_groups() -> None:
    case = mixed(Bias.WEIGHT)
    feeds = random_feeds(case.canonical, 3)
    for level in case.space.levels:
        chosen = case.space.assign(level)
        want = run(case.searchable(chosen), feeds)
        np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)


TIED = """g (int64[N,4] i) => (float[N,4,48] y) {
    [words] t = Gather (table, i)
    [inner] h = MatMul (t, w)
    f = Reshape (h, rows)
    [scores] s = Gemm <transB = 1> (f, table)
    y = Reshape (s, back) }"""


def tied() -> Calibrated:
    return calibrated(
        model(
            TIED,
            weights={"table": (48, 32), "w": (32, 32)},
            constants={"rows": [-1, 32], "back": [-1, 4, 48]},
        ),
        precisions=parse_space("int4g16:float32 int8 float32"),
    )


def test_a_table_that_is_also_read_by_rows_has_no_groups() -> None:
    case = tied()
    names = [[p.name for p in choices] for choices in case.space.choices]
    assert dict(zip(case.space.decisions, names, strict=True)) == {
        ("words", "scores"): ["int8", "float32"],
        ("inner",): ["int8", "int4g16:float32", "float32"],
    }
    feeds = random_feeds(case.canonical, 3)
    for seed in range(4):
        chosen = case.random_mix(seed)
        want = run(case.searchable(chosen), feeds)
        np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_of_two_products_that_sum_over_different_axes(seed: int) -> None:
    case = calibrated(
        model(
            """g (float[N,32] x) => (float[N,32] y) {
                [one] a = MatMul (x, w)
                [two] y = Gemm <transB = 1> (a, w) }""",
            weights={"w": (32, 32)},
        ),
        precisions=parse_space("int4g16:float32 int8 float32"),
    )
    chosen = case.random_mix(seed)
    feeds = random_feeds(case.canonical, 3)
    want = run(case.searchable(chosen), feeds)
    np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)
    stored = [n for n in case.emitted(chosen).graph.initializers if n.endswith(".codes")]
    assert len(stored) <= 1


@pytest.mark.parametrize("name", ["matmul", "gemm_transposed", "matmul_from_the_left"])
def test_groups_without_a_scale_per_channel(name: str) -> None:
    target = replace(TARGETS["generic"], per_channel_ops=())
    shape = (6, 64) if FORMS[name].summed else (64, 6)
    case = calibrated(
        model(FORMS[name].text, weights={"w": shape}),
        target,
        parse_space("int4g16:float32 int8 float32"),
    )
    for precision in case.space.precisions:
        chosen = case.space.uniform(precision)
        feeds = random_feeds(case.canonical, 3)
        want = run(case.searchable(chosen), feeds)
        np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)


def test_a_weight_inside_a_branch_is_emitted_as_searched() -> None:
    case = calibrated(
        model(
            """g (float[N,32] x, bool c) => (float[N,16] y) {
                [outside] a = MatMul (x, w1)
                [branch] y = If (c) <
                    then_branch = t () => (float[N,16] p) { [inside] p = MatMul (a, w2) },
                    else_branch = e () => (float[N,16] q) { [other] q = MatMul (x, w2) }> }""",
            weights={"w1": (32, 32), "w2": (32, 16)},
        ),
        precisions=parse_space("int4g16:float32 int8 float32"),
    )
    for seed in range(3):
        chosen = case.random_mix(seed)
        for branch in (0, 1):
            feeds = random_feeds(case.canonical, branch)
            want = run(case.searchable(chosen), feeds)
            np.testing.assert_array_equal(run(case.emitted(chosen), feeds), want)


def test_the_file_of_groups_is_as_small_as_its_cost() -> None:
    text = "g (float[N,256] x) => (float[N,64] y) { [fc] y = MatMul (x, w) }"
    case = calibrated(
        model(text, weights={"w": (256, 64)}),
        precisions=parse_space("int4g16:float32 int4g64:float32 int4:float32"),
    )
    sizes: dict[str, Any] = {}
    for precision in case.space.precisions:
        graph = case.emitted(case.space.uniform(precision))
        sizes[precision.name] = len(ir.to_proto(graph).SerializeToString())
    codes = 256 * 64 // 2
    for name, groups in (("int4g16:float32", 16), ("int4g64:float32", 4), ("int4:float32", 1)):
        assert 0 <= sizes[name] - codes - 4 * 64 * groups < 1500  # names and nodes


def test_scales_are_spread_over_the_smallest_groups() -> None:
    site = prepared("matmul").space.site["w@fc"]
    assert (site.axis, site.group_axis, site.group, site.groups) == (1, 0, 16, 4)
    assert site.broadcast_shape == (4, 1, 6)
    pairs = f32(np.arange(12))
    for fmt, want in (
        (IntFormat(bits=4, group=32), np.repeat(pairs.reshape(2, 6), 2, axis=0)),
        (IntFormat(bits=4, group=64), np.tile(pairs[:6], (4, 1))),
        (IntFormat(bits=4), np.tile(pairs[:6], (4, 1))),
    ):
        given = pairs[: site.scale_count(fmt)]
        np.testing.assert_array_equal(site.spread(given, fmt), want.reshape(-1))
    finest = f32(np.arange(24))
    np.testing.assert_array_equal(site.spread(finest, IntFormat(bits=4, group=16)), finest)


@pytest.mark.parametrize("name", ["int8:float32", "int4:float32", "int4g16:float32"])
def test_a_gemm_that_reads_floats_does_not_transpose_its_weight(name: str) -> None:
    plain = model(
        "g (float[N,32] x) => (float[N,6] y) { [layer] y = Gemm <transB = 1> (x, w, b) }",
        weights={"w": (6, 32), "b": (6,)},
    )
    prepared = calibrated(plain, precisions=[parse_precision(name)])
    chosen = prepared.space.uniform(parse_precision(name))
    graph = prepared.emitted(chosen)
    (gemm,) = [node for node in graph.graph if node.op_type == "Gemm"]
    assert "transB" not in gemm.attributes
    maker = gemm.inputs[1].producer() if gemm.inputs[1] is not None else None
    assert maker is not None
    assert list(initializer(graph, str(maker.inputs[0].name)).shape) == [32, 6]  # type: ignore[union-attr]
    feeds = random_feeds(prepared.canonical, 3)
    np.testing.assert_array_equal(
        run(graph, feeds)[0], run(prepared.searchable(chosen), feeds)[0]
    )


def test_a_gemm_of_integers_keeps_its_form() -> None:
    plain = model(
        "g (float[N,32] x) => (float[N,6] y) { [layer] y = Gemm <transB = 1> (x, w, b) }",
        weights={"w": (6, 32), "b": (6,)},
    )
    prepared = calibrated(plain)
    graph = prepared.emitted(prepared.space.uniform(parse_precision("int8")))
    (gemm,) = [node for node in graph.graph if node.op_type == "Gemm"]
    assert gemm.attributes.get_int("transB") == 1
