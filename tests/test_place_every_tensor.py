"""Fully quantized graphs: every tensor, one format per operator, conversions in between."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs import Budget, BudgetKind, SearchConfig, search
from onnx_fliqs.calibrate import activation_scales
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import IntFormat, fake_quantize, quantize
from onnx_fliqs.lint import lint
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import Precision, PrecisionMap, parse_space
from onnx_fliqs.sites import Site
from onnx_fliqs.targets import TARGETS, FixedRange
from pass_models import LAYERED
from support import (
    Calibrated,
    calibrated,
    calibrated_case,
    f32,
    initializer,
    model,
    random_feeds,
    run,
)

QNN = TARGETS["qnn"]
INTEGERS = parse_space(QNN.default_space)
NAMES = [precision.name for precision in INTEGERS]

MODELS = {
    "block": model(
        """g (float[N,5,4] x) => (float[N,5,4] y) {
            [scale] a = Mul (x, two)
            [norm] n = LayerNormalization <axis = -1> (a, gamma, beta)
            [up] u = MatMul (n, w1)
            [shift] s = Add (bias, u)
            [gate] g1 = Sigmoid (s)
            [gated] h = Mul (s, g1)
            [down] d = MatMul (h, w2)
            [add] y = Add (d, x) }""",
        weights={"w1": (4, 6), "w2": (6, 4), "gamma": (4,), "beta": (4,), "bias": (6,)},
        constants={"two": 2.0},
    ),
    "convolutions": model(
        """g (float[N,3,8,8] x) => (float[N,4] y, float[N,4,4,4] r) {
            [c1] a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1, b1)
            [six] r = Clip (a, zero, six)
            [p] q = Pad (r, pads)
            [c2] b = Conv (q, w2, b2)
            [slope] c = PRelu (b, slopes)
            [joined] j = Concat <axis = 1> (c, r)
            [pool] m = MaxPool <kernel_shape = [2, 2]> (j)
            [c3] d = Conv (m, w3, b3)
            [t] e = Tanh (d)
            [v] h = GlobalAveragePool (e)
            [f] y = Flatten (h) }""",
        weights={
            "w1": (4, 3, 3, 3),
            "b1": (4,),
            "w2": (4, 4, 3, 3),
            "b2": (4,),
            "w3": (4, 8, 1, 1),
            "b3": (4,),
            "slopes": (4, 1, 1),
        },
        constants={"zero": 0.0, "six": 1.5, "pads": [0, 0, 1, 1, 0, 0, 1, 1]},
    ),
    "tokens": model(
        """g (int64[N,5] ids) => (float[N,5,7] y) {
            [look] e = Gather (table, ids)
            [q] q1 = MatMul (e, wq)
            [k] k1 = MatMul (e, wk)
            [t] kt = Transpose <perm = [0, 2, 1]> (k1)
            [scores] s = MatMul (q1, kt)
            [p] p1 = Softmax (s)
            [mix] m = MatMul (p1, q1)
            [head] y = MatMul (m, wo) }""",
        weights={"table": (300, 8), "wq": (8, 8), "wk": (8, 8), "wo": (8, 7)},
    ),
    "masked": model(
        """g (float[N,T,4] x) => (float[N,T,4] y) {
            [sizes] s = Shape <start = 1, end = 2> (x)
            [empty] e = ConstantOfShape (s)
            [near] m = Sub (e, one)
            [a] b = Add (x, one)
            [c] d = MatMul (b, w)
            [last] l = Unsqueeze (m, axis)
            [z] y = Mul (d, l) }""",
        weights={"w": (4, 4)},
        constants={"one": 1.0, "axis": [1]},
    ),
}


def prepared(name: str) -> Calibrated:
    """A model above, in every integer precision of the target."""
    return calibrated(MODELS[name].clone(), "qnn", INTEGERS)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Calibrated:
    return prepared(request.param)


def mixes(calibrated: Calibrated) -> Iterator[ir.Model]:
    """Emitted: every uniform precision, and some random mixes."""
    space = calibrated.space
    for row in space.levels:
        yield calibrated.emitted(space.assign(row))
    for seed in range(4):
        yield calibrated.emitted(calibrated.random_mix(seed))


def codes_of(value: ir.Value | None) -> ir.Value | None:
    """The codes that a value was dequantized from."""
    maker = value.producer() if value is not None else None
    return maker.inputs[0] if maker is not None and "Dequant" in maker.op_type else None


def written(value: ir.Value) -> ir.Value | None:
    """The codes that a value becomes, behind a Relu or Clip in the same kernel."""
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type in ("Relu", "Clip"):
        users = [use.node for use in users[0].outputs[0].uses()]
    found = [node.outputs[0] for node in users if node.op_type == "QuantizeLinear"]
    return found[0] if found else None


def type_of(codes: ir.Value) -> ir.DataType | None:
    """The type of codes: that of the zero point beside them, or of what is stored."""
    maker = codes.producer()
    stored = codes if maker is None else maker.inputs[2]
    assert stored is not None
    assert stored.const_value is not None
    return stored.const_value.dtype


def assert_one_type(graph: ir.Model) -> None:
    for node in graph.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Relu", "Clip"):
            continue
        codes = [codes_of(value) for value in node.inputs]
        read = {type_of(c) for c in codes if c is not None and not c.is_initializer()}
        made = {type_of(c) for c in map(written, node.outputs) if c is not None}
        assert len(read | made) <= 1, node.name


# -- what is emitted ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("name", LAYERED)
def test_every_layered_model_computes_what_was_searched(name: str, precision: str) -> None:
    known = calibrated_case(name, "qnn")
    names = [p.name for p in known.space.precisions]
    chosen = uniform(known, names.index(precision))
    assert_as_searched(known, known.emitted(chosen), chosen)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LAYERED)
def test_every_random_mix_computes_what_was_searched(name: str, seed: int) -> None:
    known = calibrated_case(name, "qnn")
    chosen = known.random_mix(seed)
    graph = known.emitted(chosen)
    assert_as_searched(known, graph, chosen)
    assert_one_type(graph)


def uniform(known: Calibrated, level: int) -> dict[str, Precision]:
    return known.space.assign(known.space.levels[level])


def assert_as_searched(known: Calibrated, graph: ir.Model, chosen: PrecisionMap) -> None:
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    names = [[v.name for v in m.graph.outputs] for m in (graph, known.canonical)]
    assert names[0] == names[1]
    feeds = random_feeds(known.canonical, 3)
    for want, got in zip(run(known.searchable(chosen), feeds), run(graph, feeds), strict=True):
        np.testing.assert_array_equal(got, want)


def test_mixes_of_every_operator_compute_what_was_searched(case: Calibrated) -> None:
    for seed in range(4):
        chosen = case.random_mix(seed)
        assert_as_searched(case, case.emitted(chosen), chosen)
    for level in range(len(NAMES)):
        chosen = uniform(case, level)
        assert_as_searched(case, case.emitted(chosen), chosen)


def test_an_operator_reads_and_writes_one_type(case: Calibrated) -> None:
    for graph in mixes(case):
        assert_one_type(graph)


def test_every_tensor_that_data_flows_through_is_quantized(case: Calibrated) -> None:
    assert case.space.skipped == ()
    for graph in mixes(case):
        data = {v for v in graph.graph.inputs if v.dtype is ir.DataType.FLOAT}
        for value in data:
            assert {use.node.op_type for use in value.uses()} == {"QuantizeLinear"}
        for output in graph.graph.outputs:
            assert codes_of(output) is not None
        for node in graph.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            for value in node.outputs:
                if value.dtype is ir.DataType.FLOAT and node.op_type != "ConstantOfShape":
                    assert written(value) is not None or node.name == "near", node.name
                    assert len(value.uses()) == 1
            read = [value for value in node.inputs if value is not None]
            if any(v.is_initializer() and v.dtype is ir.DataType.FLOAT for v in read):
                assert node.op_type == "Sub", node.name


@pytest.mark.parametrize("precision", NAMES)
def test_all_types_are_those_of_the_target(case: Calibrated, precision: str) -> None:
    graph = case.emitted(uniform(case, NAMES.index(precision)))
    wide = precision.endswith("int16")
    for node in graph.graph:
        if node.op_type == "QuantizeLinear":
            expected = ir.DataType.UINT16 if wide else ir.DataType.UINT8
            assert type_of(node.outputs[0]) is expected
        elif node.op_type == "DequantizeLinear":
            assert node.inputs[0] is not None
            dtype = type_of(node.inputs[0])
            assert dtype is not None
            assert dtype.name in (QNN.qdq_types or ())


# -- sites ----------------------------------------------------------------------------------


def site_of(known: Calibrated, tensor: str) -> Site:
    return known.space.site[f"{tensor}@all"]


def test_a_conversion_stands_only_where_formats_differ() -> None:
    known = prepared("convolutions")
    chosen = uniform(known, 0) | {"c2": parse_space("int8:int16")[0]}
    graph = known.emitted(chosen)
    converted = {
        node.name
        for node in graph.graph
        if node.op_type == "QuantizeLinear" and codes_of(node.inputs[0]) is not None
    }
    # To 16 bits in front of c2, and of the Concat that reads what c2 made; back for c3.
    assert converted == {
        "q@c2:0.QuantizeLinear",
        "r@joined:1.QuantizeLinear",
        "m@c3:0.QuantizeLinear",
    }
    kept = [n for n in graph.graph if n.op_type == "QuantizeLinear"]
    uniform_ones = [
        n for n in known.emitted(uniform(known, 0)).graph if n.op_type == "QuantizeLinear"
    ]
    assert len(kept) == len(uniform_ones) + 3


def test_no_conversion_is_searched_where_there_is_one_activation_format() -> None:
    known = calibrated(MODELS["block"].clone(), "qnn", parse_space("int8,int4:int8"))
    assert all(site.after is None for site in known.space.sites)


def test_an_operator_between_layers_takes_the_widest_of_its_operands() -> None:
    known = prepared("block")
    int8, wide = parse_space("int8")[0], parse_space("int8:int16")[0]
    taken = known.space.formats_taken({"up": int8, "down": wide})
    bits = {site.name: taken[site.name].bits for site in known.space.sites}
    assert bits["x@all"] == bits["a@all"] == bits["n@all"] == bits["u@all"] == 8
    assert bits["h@down:0"] == bits["d@all"] == bits["x@add:1"] == bits["y@all"] == 16
    assert bits["bias@shift:0"] == bits["two@scale:1"] == 8
    taken = known.space.formats_taken({"up": wide, "down": int8})
    bits = {site.name: taken[site.name].bits for site in known.space.sites}
    assert bits["two@scale:1"] == bits["bias@shift:0"] == bits["g1@all"] == 16
    # The scale of a normalization stays 8 bits wide; its shift is added to sums of products.
    assert (bits["gamma@norm:1"], bits["beta@norm:2"]) == (8, 32)


def test_a_uniform_level_means_the_activations_where_there_are_no_weights() -> None:
    known = prepared("tokens")
    activations = {
        name: known.space.assign(row)["scores"].activations.name
        for name, row in zip(NAMES, known.space.levels, strict=True)
    }
    assert activations == {name: name.rpartition(":")[2] for name in NAMES}


def test_choices_are_in_the_order_of_the_operands_that_a_layer_has() -> None:
    space = prepared("tokens").space
    scores = space.decisions.index(("scores",))
    # Of int8 and int4:int16, which have as many bits in all.
    assert [p.activations.name for p in space.choices[scores]] == ["int8", "int16"]
    assert space.as_precise[scores].tolist() == [[True, True], [False, True]]


def test_what_only_moves_numbers_keeps_their_scale() -> None:
    known = prepared("convolutions")
    for tensor, source in (("q", "r"), ("m", "j"), ("y", "h")):
        assert site_of(known, tensor).same_scale_as == f"{source}@all"
    assert site_of(known, "h").same_scale_as is None
    graph = known.emitted(uniform(known, 0))
    np.testing.assert_array_equal(
        initializer(graph, "m@all.scale"), initializer(graph, "j@all.scale")
    )


@pytest.mark.parametrize(
    ("name", "tensor", "eight", "sixteen"),
    [
        ("block", "g1", (1 / 256, 0), (1 / 65536, 0)),
        ("tokens", "p1", (1 / 256, 0), (1 / 65536, 0)),
        ("convolutions", "e", (1 / 128, 128), (1 / 32768, 32768)),
    ],
)
def test_fixed_ranges_do_not_depend_on_data(
    name: str, tensor: str, eight: tuple[float, int], sixteen: tuple[float, int]
) -> None:
    known = prepared(name)
    for precision, expected in (("int8", eight), ("int8:int16", sixteen)):
        graph = known.emitted(uniform(known, NAMES.index(precision)))
        scale = initializer(graph, f"{tensor}@all.scale")
        zero_point = initializer(graph, f"{tensor}@all.zero_point")
        assert (scale.item(), zero_point.item()) == expected


def test_a_fixed_range_on_a_symmetric_grid_reaches_its_larger_end() -> None:
    site = Site(
        name="t", tensor="t", layers=(), consumers=(), is_weight=False, fixed_range=(-1.0, 1.0)
    )
    assert site.fixed_scale(IntFormat(bits=8)) == 1 / 128
    assert site.effective(IntFormat(bits=8)) == IntFormat(bits=8)


def test_a_clip_in_the_same_kernel_bounds_the_format() -> None:
    known = prepared("convolutions")
    assert not [node for graph in mixes(known) for node in graph.graph if node.name == "six"]
    site = site_of(known, "r")
    assert (site.limits, site.negative) == ((0.0, 1.5), 0.0)
    # Runtimes drop a Clip that cuts off nothing that the format could hold.
    values = f32(np.append(np.linspace(0, 1.4, 99), [1.5] * 9))
    space = replace(known.space, sites=(site,))
    found = activation_scales(space, {"r": values})
    for fmt in space.site_formats(site):
        (scale,) = space.scales_taken({site.name: fmt}, found).values()
        assert scale.item() * fmt.max <= 1.5
        (wide,) = space.scales_taken(
            {site.name: fmt}, {(site.name, fmt.name): f32([9])}
        ).values()
        assert 1.49 < wide.item() * fmt.max <= 1.5


def test_a_clip_that_begins_below_zero_is_an_operator_of_its_own() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        [fc] a = MatMul (x, w)
        [cut] b = Clip (a, low, high)
        [fc2] y = MatMul (b, w) }"""
    constants = {"low": -1.0, "high": 1.0}
    known = calibrated(model(text, weights={"w": (4, 4)}, constants=constants), "qnn")
    assert {"a@all", "b@all"} <= set(known.space.site)


def test_a_table_and_its_rows_are_in_the_format_of_the_layers_that_read_them() -> None:
    known = prepared("tokens")
    assert [item.name for item in known.space.skipped] == []
    taken = known.space.formats_taken(uniform(known, NAMES.index("int4:int8")))
    assert {taken["e@all"].bits, taken["table@look:0"].bits} == {8}


def test_a_constant_that_is_only_repeated_is_quantized() -> None:
    text = """g (float[N,5,4] x) => (float[N,6,4] y) {
        [sizes] n = Shape <end = 1> (x)
        [to] t = Concat <axis = 0> (n, ones)
        [rows] r = Expand (token, t)
        [joined] j = Concat <axis = 1> (r, x)
        [fc] y = MatMul (j, w) }"""
    given = model(text, weights={"token": (1, 1, 4), "w": (4, 4)}, constants={"ones": [1, 1]})
    known = calibrated(given, "qnn", INTEGERS)
    chosen = known.random_mix(0)
    graph = known.emitted(chosen)
    assert_as_searched(known, graph, chosen)
    assert_one_type(graph)
    nodes = {node.name: node for node in graph.graph}
    for name in ("sizes", "rows"):
        assert codes_of(nodes[name].inputs[0]) is not None


def test_arithmetic_on_shapes_stays_as_it_is() -> None:
    known = prepared("masked")
    tensors = {site.tensor for site in known.space.sites}
    assert {"x", "b", "d", "y"} <= tensors
    assert not {"e", "s"} & tensors


def test_an_infinite_constant_is_left_with_a_reason() -> None:
    text = """g (float[N,4] x, bool[N,4] keep) => (float[N,4] y) {
        [fc] a = MatMul (x, w)
        [mask] b = Where (keep, a, never)
        y = Softmax (b) }"""
    given = model(text, weights={"w": (4, 4)}, constants={"never": -np.inf})
    space = find_layers(canonicalise(given), QNN, INTEGERS)
    assert [(item.name, item.op_type) for item in space.skipped] == [("mask", "Where")]
    assert "its constant never (operand 2) is not finite" in space.skipped[0].reason


# -- biases ---------------------------------------------------------------------------------


def test_a_bias_beside_wide_activations_is_exact_to_the_end_of_int32() -> None:
    known = prepared("convolutions")
    site = known.space.site["b1@c1:bias"]
    taken = known.space.formats_taken(uniform(known, NAMES.index("int8:int16")))
    fmt = taken[site.name]
    assert isinstance(fmt, IntFormat)
    assert (fmt.bits, fmt.name) == (32, "int32x512")
    t = f32([-(2.0**31), -5357811.5, -4357588.5, 4357588.5, 7.0, 2.0**30 + 300])
    magic = np.float32(1.5 * 2**23 * 512)
    np.testing.assert_array_equal(quantize(t, fmt), (t + magic) - magic)
    np.testing.assert_array_equal(fake_quantize(t, 1.0, fmt) % 512, 0)


def test_every_bias_is_int32_with_the_product_of_the_scales() -> None:
    known = prepared("convolutions")
    for level in range(len(NAMES)):
        graph = known.emitted(uniform(known, level))
        for layer, x in (("c1", "x"), ("c2", "q"), ("c3", "m")):
            index = layer[1]
            bias = f"b{index}@{layer}:bias"
            assert initializer(graph, f"{bias}.codes").dtype == np.int32
            np.testing.assert_array_equal(
                initializer(graph, f"{bias}.scale"),
                initializer(graph, f"{x}@all.scale")
                * initializer(graph, f"w{index}@{layer}.scale"),
            )


# -- searching ------------------------------------------------------------------------------


def test_a_search_ends_in_a_graph_of_fixed_shapes() -> None:
    given = MODELS["block"].clone()
    rng = np.random.default_rng(0)
    data = Dataset(
        {"x": rng.standard_normal((64, 5, 4)).astype(np.float32)}, None, input_specs(given)
    )
    config = SearchConfig(
        target="qnn", steps=6, batch_size=16, budget=Budget(BudgetKind.BITS, 9)
    )
    result = search(given, data, config)
    assert result.verification.searched is not None
    assert result.verification.searched.rms == 0
    assert [list(v.shape or ()) for v in result.model.graph.inputs] == [[1, 5, 4]]
    assert [list(v.shape or ()) for v in result.model.graph.outputs] == [[1, 5, 4]]
    assert any("qnn runs fixed shapes only" in text for text in result.warnings)
    assert_one_type(result.model)


def test_a_fixed_range_holds_for_rearrangements_and_conversions_too() -> None:
    plain = model(
        """g (float[N,8] x) => (float[N,2,2] y, float[N,4] z) {
            p = Abs (x)
            [m1] a = MatMul (p, w1)
            [tanh] t = Tanh (a)
            [moved] r = Reshape (t, sizes)
            [m2] y = MatMul (r, w2)
            [m3] z = MatMul (t, w3) }""",
        weights={"w1": (8, 8), "w2": (4, 2), "w3": (8, 4)},
        constants={"sizes": [0, 2, 4]},
    )
    # Nothing negative reaches Tanh: a range taken from the data would end at zero.
    plain.graph.initializers["w1"].const_value = ir.tensor(
        np.abs(initializer(plain, "w1")), name="w1"
    )
    known = calibrated(plain, "qnn", parse_space("int8,int8:int16"))
    int8, wide = parse_space("int8,int8:int16")
    for chosen in ({"m1": int8, "m2": wide, "m3": int8}, {"m1": wide, "m2": int8, "m3": wide}):
        taken = known.space.formats_taken(chosen)
        scales = known.space.scales_taken(taken, known.scales)
        sites = [s for s in known.space.sites if s.tensor in ("t", "r") and not s.is_weight]
        assert len(sites) >= 3
        for site in sites:
            fmt = taken[site.name]
            assert isinstance(fmt, IntFormat)
            half = 1 << (fmt.bits - 1)
            assert (scales[site.name].item(), fmt.zero_point) == (1 / half, half)


def test_a_fixed_range_holds_where_only_some_tensors_are_quantized() -> None:
    profile = replace(
        TARGETS["ort-cpu"], fixed_ranges=(FixedRange(op="Sigmoid", low=0.0, high=1.0),)
    )
    plain = model(
        """g (float[N,2,4,4] x) => (float[N,2,4,4] y) {
            [c1] a = Conv (x, w)
            [s] b = Sigmoid (a)
            [t] r = Transpose <perm = [0, 1, 3, 2]> (b)
            [c2] y = Conv (r, w) }""",
        weights={"w": (2, 2, 1, 1)},
    )
    known = calibrated(plain, profile)
    graph = known.emitted(known.eight_bits())
    assert lint(graph, profile) == ()
    for tensor in ("b", "r"):
        (node,) = [n for n in graph.graph if n.name == f"{tensor}@all.QuantizeLinear"]
        scale, zero_point = (initializer(graph, str(v.name)) for v in node.inputs[1:])  # type: ignore[union-attr]
        assert (scale.item(), zero_point.item()) == (1 / 256, 0)
