"""Which tensors of a model are quantized, along which axis, and what is left in float."""

import numpy as np
import onnx_ir as ir
import pytest

from layer_forms import FORMS
from onnx_fliqs.calibrate import Observer
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import parse_space
from onnx_fliqs.prepare import calibrate, prepare
from onnx_fliqs.sites import SearchSpace, Site
from onnx_fliqs.targets import TARGETS, Placement
from pass_models import LAYERED
from support import PRECISIONS, initializer, model, on_targets, random_feeds, runnable

ON_TARGETS = pytest.mark.parametrize(("name", "target"), on_targets(LAYERED))


def found(plain: ir.Model, target: str = "generic") -> SearchSpace:
    precisions = parse_space("int8,float32")
    if target != "generic":
        precisions = tuple(runnable(TARGETS[target]))
    return find_layers(canonicalise(plain), TARGETS[target], precisions)


def case(name: str, target: str = "generic") -> SearchSpace:
    return found(LAYERED[name].build(), target)


def form(name: str, target: str = "generic") -> SearchSpace:
    return found(FORMS[name].build(), target)


def weight_site(space: SearchSpace, *layers: str) -> Site:
    (site,) = [s for s in space.sites if s.is_weight and s.layers == layers and not s.bias_of]
    return site


# -- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "axis", "channels"),
    [
        ("conv_relu_conv", "c1", 0, 4),
        ("depthwise_and_grouped", "dw", 0, 4),
        ("depthwise_and_grouped", "gr", 0, 6),
        ("convtranspose", "up", 1, 3),
        ("convtranspose", "down", 1, 2),
        ("gemms", "plain", 1, 3),
        ("gemms", "trans", 0, 2),
        ("gemms", "left", 0, 5),
        ("matmuls", "right", 1, 4),
        ("matmuls", "left", 0, 2),
        ("matmuls", "batched", None, 1),
        ("matmuls", "vector", 1, 1),
    ],
)
def test_weights_have_a_scale_per_output_channel(
    name: str, layer: str, axis: int | None, channels: int
) -> None:
    site = weight_site(case(name), layer)
    assert (site.axis, site.channels) == (axis, channels)
    weight = initializer(canonicalise(LAYERED[name].build()), site.tensor)
    assert weight.ndim == site.rank
    np.broadcast_to(np.ones(site.channels).reshape(site.broadcast_shape), weight.shape)


@pytest.mark.parametrize("name", ["gemms", "matmuls", "conv_relu_conv"])
def test_a_channel_of_a_weight_makes_one_channel_of_the_output(name: str) -> None:
    # So an integer kernel can multiply by the scale after it has added up the products.
    plain = canonicalise(LAYERED[name].build())
    feeds = random_feeds(plain)
    nodes = {node.name: node for node in plain.graph}
    for layer in found(plain).layers:
        sites = [s for s in found(plain).sites if s.tensor in layer.weights and s.channels > 1]
        for site in sites:
            weight = np.array(initializer(plain, site.tensor))
            np.moveaxis(weight, site.axis or 0, 0)[1] *= 3
            changed = plain.clone()
            changed.graph.initializers[site.tensor].const_value = ir.tensor(weight)
            output = str(nodes[layer.name].outputs[0].name)
            before, after = (
                Observer(m, [output]).run(feeds)[output] for m in (plain, changed)
            )
            where = np.nonzero(before != after)
            assert any(set(axis) == {1} for axis in where)


def test_a_weight_of_several_layers_has_one_site_and_one_format() -> None:
    space = case("shared_weight")
    (site,) = [s for s in space.sites if s.is_weight]
    assert site.name == "w@once"
    assert site.layers == ("once", "twice", "turned")
    assert site.consumers == (("once", 1), ("twice", 1), ("turned", 1))
    # "turned" reads the transpose: the channels of the others are its rows.
    assert site.axis is None
    assert space.decisions == (("once", "twice", "turned"),)
    assert [layer.params for layer in space.layers] == [16, 0, 0]


def test_layers_that_agree_on_the_channels_of_their_weight_keep_its_axis() -> None:
    space = form("weight_of_two_convolutions")
    (site,) = [s for s in space.sites if s.is_weight and not s.bias_of]
    assert (site.axis, site.channels) == (0, 2)
    # Each bias is on the scale of its own layer's products.
    assert [s.bias_of for s in space.sites if s.bias_of] == [
        ("x@once:0", "w@once"),
        ("r@twice:0", "w@once"),
    ]


def test_an_embedding_takes_the_axis_of_the_product_that_shares_its_table() -> None:
    assert weight_site(form("embedding"), "words", "word").axis is None
    assert weight_site(form("tied_embedding"), "words", "scores").axis == 0


def test_the_product_of_two_activations_is_a_layer_without_a_weight() -> None:
    space = case("matmuls")
    assert space.layer["both"].weights == ()
    assert space.layer["both"].params == 0
    sites = [site.tensor for site in space.sites if site.layers == ("both",)]
    assert sites == ["a", "t"]


def test_the_parameters_of_a_layer_are_counted() -> None:
    space = case("conv_relu_conv")
    assert {layer.name: layer.params for layer in space.layers} == {"c1": 108, "c2": 72}


# -- signs ----------------------------------------------------------------------------------

UNSIGNED = {
    "relu": "a = Relu (x)",
    "sigmoid": "a = Sigmoid (x)",
    "softmax": "a = Softmax (x)",
    "clip": "a = Clip (x, zero, six)",
    "pooled": "r = Relu (x) a = MaxPool <kernel_shape = [1, 1]> (r)",
    "averaged": "r = Relu (x) a = AveragePool <kernel_shape = [1, 1]> (r)",
    "rearranged": "r = Relu (x) t = Transpose (r) u = Transpose (t) a = Slice (u, i, j, k)",
    "sum": "r = Relu (x) s = Sigmoid (x) a = Add (r, s)",
    "product_with_a_positive_constant": "r = Relu (x) a = Mul (r, six)",
    "concat": "r = Relu (x) s = Abs (x) a = Concat <axis = 1> (r, s)",
    "padded": "r = Relu (x) a = Pad (r, pads)",
    "padded_with_a_positive_number": "r = Relu (x) a = Pad (r, pads, six)",
    "squashed": "e = Exp (x) a = Sqrt (e)",
}
SIGNED = {
    "input": "a = Neg (x)",
    "clip": "a = Clip (x, minus, six)",
    "open_clip": "a = Clip (x, , six)",
    "leaky": "a = LeakyRelu (x)",
    "sum": "r = Relu (x) a = Add (r, x)",
    "difference": "r = Relu (x) a = Sub (r, six)",
    "product": "r = Relu (x) a = Mul (r, minus)",
    "padded": "r = Relu (x) a = Pad (r, pads, minus)",
    "padded_with_an_unknown_number": "r = Relu (x) m = ReduceMin <keepdims = 0> (x)"
    " a = Pad (r, pads, m)",
    "resized_by_splines": 'r = Relu (x) a = Resize <mode = "cubic"> (r, , twice)',
}


def _signed(text: str) -> bool:
    weights = {"w": (3, 2, 1, 1)} if "Concat" not in text else {"w": (3, 4, 1, 1)}
    space = found(
        model(
            f"""g (float[N,2,4,4] x) => (float[N,3,H,W] y)
                <float[4] twice = {{1, 1, 2, 2}}> {{
                {text}
                [conv] y = Conv (a, w) }}""",
            weights=weights,
            constants={
                "zero": 0.0,
                "six": 6.0,
                "minus": -1.0,
                "i": [0],
                "j": [3],
                "k": [2],
                "pads": [0, 0, 1, 1, 0, 0, 1, 1],
            },
        )
    )
    (site,) = [site for site in space.sites if site.tensor == "a"]
    return site.negative != 0


@pytest.mark.parametrize("name", UNSIGNED)
def test_values_that_are_never_negative_are_unsigned(name: str) -> None:
    assert not _signed(UNSIGNED[name])


@pytest.mark.parametrize("name", SIGNED)
def test_values_that_may_be_negative_are_signed(name: str) -> None:
    assert _signed(SIGNED[name])


def test_raw_pixels_are_unsigned_and_so_is_what_shares_their_scale() -> None:
    plain = LAYERED["rearranged_input"].build()
    formats = parse_space("int8,float32")
    for low, unsigned in ((0.0, True), (-1.0, False)):
        x = np.random.default_rng(0).uniform(low, 1, (8, 2, 4, 4)).astype(np.float32)
        data = Dataset({"x": x}, None, input_specs(plain))
        prepared = prepare(plain, data, TARGETS["ort-cpu"], formats)
        prepared, scales, _ = calibrate(prepared, TARGETS["ort-cpu"], data, seed=0)
        signs = {s.tensor: s.negative == 0 for s in prepared.space.sites if not s.is_weight}
        assert signs == {**dict.fromkeys(("x", "s", "f"), unsigned), "z": False}
        # Every site finds the scale that it asks for.
        prepared.space.values(prepared.space.uniform(PRECISIONS["int8"]), scales)


# -- weight-only layers ---------------------------------------------------------------------

RECURRENT = "its activations lie inside a recurrent cell"
TABLE = "it reads rows of a table and multiplies nothing"
IN_BODY = "its activations lie inside If 'If_d', where they cannot be calibrated"


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("embedding", {"words": TABLE, "fc": None, "word": TABLE}),
        ("embeddings_of_several_kinds", {"words": TABLE}),
        ("lstm", {"cell": RECURRENT}),
        ("last_state_of_a_gru", {"cell": RECURRENT, "fc": None}),
        ("einsums", dict.fromkeys(["diagonal", "three"], "no runtime has an integer kernel")),
        (
            "layers_in_bodies",
            {
                "outside": None,
                **dict.fromkeys(["inside", "deep", "other", "words", "fc"], IN_BODY),
            },
        ),
    ],
)
def test_layers_whose_activations_stay_float_say_why(
    name: str, reasons: dict[str, str | None]
) -> None:
    space = form(name)
    assert set(space.layer) == set(reasons)
    for layer in space.layers:
        reason = reasons[layer.name]
        assert (layer.weight_only or "").startswith(reason or "")
        assert (layer.weight_only is None) == (reason is None)
        activations = [s for s in space.sites if not s.is_weight and layer.name in s.layers]
        assert (not activations) == (reason is not None)


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("lstm", "cell", {"w": (1, 8), "r": (1, 8)}),
        ("lstm_both_ways", "cell", {"w": (1, 8), "r": (1, 8)}),
        ("einsums", "diagonal", {"w": (0, 5)}),
        ("einsums", "three", {"v": (1, 2)}),
    ],
)
def test_their_weights_have_a_scale_for_each_row(
    name: str, layer: str, expected: dict[str, tuple[int | None, int]]
) -> None:
    space = form(name)
    assert space.layer[layer].weights == tuple(expected)
    sites = [s for s in space.sites if layer in s.layers]
    assert {s.tensor: (s.axis, s.channels) for s in sites} == expected


def test_layers_that_share_any_weight_are_one_decision() -> None:
    space = form("two_rnns_of_one_weight")
    assert space.decisions == (("first", "second"),)
    assert [s.consumers for s in space.sites] == [
        (("first", 1), ("first", 2), ("second", 1)),
        (("second", 2),),
    ]
    assert [layer.params for layer in space.layers] == [4, 4]


def test_a_weight_read_in_several_bodies_has_one_site() -> None:
    space = form("layers_in_bodies")
    assert weight_site(space, "deep", "other").consumers == (("deep", 1), ("other", 1))
    # Its channels are those of the layer outside, which may run in integers.
    assert weight_site(space, "outside", "inside").axis == 1
    assert space.decisions == (("outside", "inside"), ("deep", "other"), ("words",), ("fc",))


def test_integer_kernels_quantize_weights_alone_only_where_that_is_no_slower() -> None:
    space = form("layers_in_bodies", "ort-cpu")
    assert set(space.layer) == {"outside", "words"}
    assert {s.name for s in space.skipped} == {"inside", "deep", "other", "fc"}
    for skipped in space.skipped:
        assert skipped.reason.startswith("target ort-cpu has no kernel for it in int8")


# -- what stays float -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("o = Add (x, big)", "its constant is no factor of a product of matrices"),
        (
            "o = com.microsoft.MatMulNBits <K = 32, N = 64> (x, big)",
            "operators of the domain com.microsoft are left as they are",
        ),
        ("o = mine.Mix (x, big)", "operators of the domain mine are left as they are"),
        ("o = Gather <axis = 1> (big, i)", "only tables of two axes that are read by rows"),
        ("o = Gather (big, k)", "both operands are constant"),
        ("o = GatherElements (big, i)", "its constant is no factor"),
        ("o = LSTM <hidden_size = 2> (z, z, z)", "none of its operands is constant"),
        ('o = Einsum <equation = "ij,ij->i"> (x, x)', "none of its operands is constant"),
        ("o = MatMul (x, none)", "its weight is empty"),
        ("o = MatMul (, big)", "an operand is missing"),
    ],
)
def test_every_node_with_a_large_weight_is_a_layer_or_left_with_a_reason(
    text: str, reason: str
) -> None:
    # Not canonicalised: that refuses some, and folds others.
    plain = model(
        f"""g (float[64,32] x, float[1,8,2] z, int64[64,2] i) => (float[64,4] y) {{
            [odd] {text}
            [fc] y = MatMul (x, w) }}""",
        header='<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "mine" : 1]>',
        weights={"w": (32, 4), "big": (64, 32), "none": (32, 0)},
        constants={"k": [1, 2]},
    )
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["int8"]])
    assert list(space.layer) == ["fc"]
    (skipped,) = space.skipped
    assert skipped.name == "odd"
    assert skipped.reason.startswith(reason)


@pytest.mark.parametrize(
    "text", ["o = Add (x, row)", "o = Gather (few, j)", "o = Mul (x, column)", "o = Relu (x)"]
)
def test_small_constants_and_vectors_are_left_in_silence(text: str) -> None:
    space = found(
        model(
            f"""g (float[2048,4] x, int64[3] j) => (float[2048,4] y, float[A,B] o) {{
                {text}
                [fc] y = MatMul (x, w) }}""",
            weights={"w": (4, 4), "row": (1, 4), "column": (2048, 1), "few": (31, 32)},
        )
    )
    assert list(space.layer) == ["fc"]
    assert space.skipped == ()


def test_a_product_of_activations_in_a_body_is_reported() -> None:
    space = found(
        model(
            """g (float[4,4] x, bool c) => (float[4,4] y) {
                [fc] a = MatMul (x, w)
                [branch] y = If (c) <
                    then_branch = t () => (float[4,4] p) { [inside] p = MatMul (a, x) },
                    else_branch = e () => (float[4,4] q) { q = Neg (a) }> }""",
            weights={"w": (4, 4)},
        )
    )
    assert [(s.name, s.reason) for s in space.skipped] == [
        (
            "inside",
            "its activations lie inside If 'branch', where they cannot be calibrated",
        )
    ]


def test_a_weight_that_belongs_to_a_body_is_reported() -> None:
    plain = model(
        """g (float[4,4] x, bool c) => (float[4,4] y) {
            [fc] a = MatMul (x, w)
            [branch] y = If (c) <
                then_branch = t () => (float[4,4] p) { [inside] p = MatMul (a, v) },
                else_branch = e () => (float[4,4] q) { q = Neg (a) }> }""",
        weights={"w": (4, 4), "v": (4, 4)},
    )
    body = next(n for n in plain.graph if n.op_type == "If").attributes["then_branch"]
    moved = plain.graph.initializers.pop("v")
    body.as_graph().register_initializer(moved)
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["int8"]])
    assert [(s.name, s.reason) for s in space.skipped] == [
        ("inside", "its weights belong to the body that holds it")
    ]


def test_operands_of_other_types_are_reported() -> None:
    # Not canonicalised, or they would be float32.
    plain = model(
        """g (float[N,4] x, float16[N,4] h) => (float[N,4] y, float16[N,4] z) {
            [wide] y = MatMul (x, w)
            w16 = Constant <value = float16[4,4] {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> ()
            [half] z = MatMul (h, w16) }""",
        weights={"w": (4, 4)},
    )
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["int8"]])
    assert [layer.name for layer in space.layers] == ["wide"]
    assert [(s.name, s.reason) for s in space.skipped] == [
        ("half", "its operand h is FLOAT16, not FLOAT")
    ]


def test_a_layer_of_constants_that_do_not_fold_is_reported() -> None:
    plain = model(
        """g (float[N,4] x) => (float[N,4] y) {
            [constant] c = MatMul (v, w)
            [fc] y = MatMul (x, c) }""",
        weights={"v": (4, 4), "w": (4, 4)},
    )
    # Not canonicalised, or it would be folded.
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["int8"]])
    assert [(s.name, s.reason) for s in space.skipped] == [
        ("constant", "both operands are constant")
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_without_layers_is_refused_and_told_what_was_left_out(target: str) -> None:
    with pytest.raises(
        UnsupportedError, match="no quantizable layer: the model has no float32"
    ):
        found(model("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"), target)
    with pytest.raises(UnsupportedError, match="left out: MatMul fc: its weight is empty"):
        found(
            model(
                "g (float[N,4] x) => (float[N,0] y) { [fc] y = MatMul (x, w) }",
                weights={"w": (4, 0)},
            ),
            target,
        )


# -- one site per tensor --------------------------------------------------------------------


def activations(name: str) -> dict[str, Site]:
    return {s.tensor: s for s in case(name, "ort-cpu").sites if not s.is_weight}


def test_integer_kernels_quantize_tensors_where_they_are_made() -> None:
    sites = activations("residual")
    # Behind the Relu that a convolution absorbs; d, which the addition reads, has none.
    assert list(sites) == ["x", "a", "c", "d", "f", "p", "q", "h"]
    assert {t: s.layers for t, s in sites.items()} == {
        "x": ("stem",),
        "a": ("c1", "stem"),
        "c": ("c2", "c1"),
        "d": ("c2",),
        **dict.fromkeys(("f", "p", "q"), ()),
        "h": ("head",),
    }
    assert {t: s.operands for t, s in sites.items() if s.operands} == {
        "f": ("d@all", "a@all"),
        "p": ("f@all",),
        "q": ("p@all",),
        "h": ("q@all",),
    }
    assert sites["a"].consumers == (("c1", 0), ("Add_e", 1))


def test_every_reader_of_a_quantized_tensor_reads_the_quantized_one() -> None:
    plain = canonicalise(LAYERED["residual"].build())
    values = ir.convenience.create_value_mapping(plain.graph)
    for tensor, site in activations("residual").items():
        uses = {(str(node.name), index) for node, index in values[tensor].uses()}
        assert set(site.consumers) == uses


QUANTIZED = {
    "stem c1 c2 head": "x a c d f p q h",
    "c1 c2": "a c d f p q h",
    # The sum reads a float tensor: it stays float, and so does all behind it.
    "c2": "c d",
    "c2 head": "c d h",
    "stem": "x a",
    "stem c2": "x a c d f p q h",
    "head": "h",
    "": "",
}


@pytest.mark.parametrize("integers", QUANTIZED)
def test_between_layers_nothing_is_quantized_in_vain(integers: str) -> None:
    space = case("residual", "ort-cpu")
    chosen = space.uniform(PRECISIONS["float32"])
    chosen |= dict.fromkeys(integers.split(), PRECISIONS["int8"])
    taken = space.formats_taken(chosen)
    quantized = [
        s.tensor for s in space.sites if not s.is_weight and taken[s.name].name != "float32"
    ]
    assert quantized == QUANTIZED[integers].split()


def test_a_sum_with_a_constant_is_computed_in_float() -> None:
    sites = {s.tensor: s for s in form("branching_additions", "ort-cpu").sites}
    assert "s" in sites
    assert "m" not in sites
    # A product of it is quantized for the layer that reads it, not for its own sake.
    assert (sites["q"].layers, sites["q"].operands) == (("c4",), ())


def test_what_a_concatenation_joins_shares_its_scale_where_the_target_says_so() -> None:
    space = form("concatenations", "ort-cpu")
    shared = {s.tensor: s.same_scale_as for s in space.sites if not s.is_weight}
    assert shared == dict.fromkeys(("x", "a", "s", "u", "y"))
    joined = found(
        model(
            """g (float[N,2,4,4] x) => (float[N,2,4,4] y) {
                [c1] a = Conv (x, w1)
                r = Relu (a)
                [c2] b = Conv (x, w2)
                t = Concat <axis = 1> (r, b)
                u = Concat <axis = 1> (t, x)
                [c3] y = Conv (u, w3) }""",
            weights={"w1": (2, 2, 1, 1), "w2": (2, 2, 1, 1), "w3": (2, 6, 1, 1)},
        ),
        "ort-cpu",
    )
    sites = {s.tensor: s for s in joined.sites if not s.is_weight}
    # On a scale for signed numbers, no kernel would compute the Relu of r.
    assert {t: s.same_scale_as for t, s in sites.items()} == {
        **dict.fromkeys(("x", "r", "b", "y")),
        **dict.fromkeys(("t", "u"), "x@all"),
    }
    assert {t for t, s in sites.items() if s.negative == 0} == {"r"}


def test_products_that_write_floats_are_quantized_for_who_reads_them() -> None:
    space = found(
        model(
            """g (float[N,4] x) => (float[N,4] y) {
                [m1] a = MatMul (x, w)
                b = Add (a, c)
                r = Relu (b)
                [m2] d = MatMul (r, w)
                s = Relu (d)
                [m3] e = MatMul (s, w)
                y = Softmax (e) }""",
            weights={"w": (4, 4), "c": (4,)},
        ),
        "ort-cpu",
    )
    sites = {s.tensor: s for s in space.sites if not s.is_weight}
    assert {t: s.layers for t, s in sites.items()} == {
        "x": ("m1",),
        "r": ("m2",),
        "s": ("m3",),
    }


CLIPS = "<float zero = {0.0}, float one = {1.0}, float six = {6.0}, float minus = {-1.0}>"


@pytest.mark.parametrize(
    ("inside", "limits"),
    [
        ("b = Clip (a, zero, six)", {"b": (0.0, 6.0)}),
        ("b = Clip (a, minus, six)", {"b": (-1.0, 6.0)}),
        ("b = Clip (a, six)", {"b": None}),
        ("b = Clip (a, zero, six) c = MaxPool <kernel_shape = [1, 1]> (b)", {"c": (0.0, 6.0)}),
        ("b = Clip (a, zero, six) c = AveragePool <kernel_shape = [1, 1]> (b)", {"c": None}),
        (
            """b = Clip (a, zero, six) d = Clip (x, zero, one) [c3] e = Conv (d, w)
               f = Clip (e, zero, one) c = Concat <axis = 0> (b, f)""",
            {"b": (0.0, 6.0), "f": (0.0, 6.0), "c": (0.0, 6.0), "d": (0.0, 1.0)},
        ),
        (
            """b = Clip (a, zero, six) [c3] e = Conv (x, w)
               f = Relu (e) c = Concat <axis = 0> (b, f)""",
            {"b": None, "f": None, "c": None},
        ),
    ],
)
def test_what_a_clip_limits_is_known(
    inside: str, limits: dict[str, tuple[float, float] | None]
) -> None:
    last = "c" if "c = " in inside else "b"
    plain = model(
        f"""g (float[N,2,4,4] x) => (float[N,2,4,4] y) {CLIPS} {{
            [c1] a = Conv (x, w)
            {inside}
            [c2] y = Conv ({last}, w) }}""",
        weights={"w": (2, 2, 1, 1)},
    )
    sites = {s.tensor: s for s in found(plain, "ort-cpu").sites}
    assert {tensor: sites[tensor].limits for tensor in limits} == limits


def test_an_output_of_the_graph_that_a_layer_reads_is_quantized_for_the_layer() -> None:
    sites = {s.tensor: s for s in form("output_that_is_read", "ort-cpu").sites}
    assert sites["a"].consumers == (("Relu_r", 0), ("second", 0))
    assert "y" not in sites


def test_rearrangements_stay_on_the_grid_of_their_source() -> None:
    assert {t: s.same_scale_as for t, s in activations("residual").items()} == {
        **dict.fromkeys(("x", "a", "c", "d", "f", "q")),
        "p": "f@all",
        "h": "q@all",
    }


@ON_TARGETS
def test_of_the_graph_outputs_those_of_integer_kernels_that_write_no_floats_are_sites(
    name: str, target: str
) -> None:
    plain = canonicalise(LAYERED[name].build())
    space = found(plain, target)
    outputs = {str(value.name) for value in plain.graph.outputs}
    handed_out = {site.tensor for site in space.sites if site.is_output}
    profile = TARGETS[target]
    if profile.placement is Placement.EVERY_TENSOR:
        # Indices are no floats.
        assert handed_out == outputs - {"j"}
        return
    written = {
        str(value.name)
        for value in plain.graph.outputs
        if (node := value.producer()) is not None
        and node.op_type in profile.integer_output_ops
    }
    assert outputs & {site.tensor for site in space.sites} == handed_out == written
    assert all(site.consumers or site.is_output for site in space.sites)


def test_unread_parts_and_indices_have_no_site() -> None:
    assert "q" not in activations("split_with_an_unread_part")
    assert "i" not in activations("maxpool_with_indices")


def test_biases_are_integers_where_their_scale_fits() -> None:
    def biases(name: str, target: str) -> set[str]:
        return {s.tensor for s in case(name, target).sites if s.bias_of}

    assert not biases("residual", "qonnx")
    for target in ("generic", "ort-cpu"):
        assert biases("residual", target) == {"b1", "b2", "b3", "b4"}
        assert biases("gemms", target) == {"b1", "b2"}
    # Not where groups share the weight's scales.
    assert biases("convtranspose", "generic") == {"b2"}


@ON_TARGETS
def test_names_of_sites_are_unique(name: str, target: str) -> None:
    names = [site.name for site in case(name, target).sites]
    assert len(names) == len(set(names))


def test_limits_of_a_clip_may_be_vectors_of_one() -> None:
    plain = model(
        """g (float[N,2,4,4] x) => (float[N,2,4,4] y)
            <float[1] zero = {0.0}, float[1] six = {6.0}> {
            [c1] a = Conv (x, w)
            b = Clip (a, zero, six)
            [c2] y = Conv (b, w) }""",
        weights={"w": (2, 2, 1, 1)},
    )
    sites = {s.tensor: s for s in found(plain, "ort-cpu").sites}
    assert sites["b"].limits == (0.0, 6.0)
