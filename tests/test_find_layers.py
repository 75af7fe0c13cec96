"""Which tensors of a model are quantized, along which axis, and what is left in float."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs.calibrate import Observer
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import FORMATS, parse_space
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.prepare import calibrate, prepare
from onnx_fliqs.sites import SearchSpace, Site
from onnx_fliqs.targets import TARGETS
from pass_models import LAYERED
from support import initializer, model, random_feeds


def found(plain: ir.Model, target: str = "generic") -> SearchSpace:
    return find_layers(canonicalise(plain), TARGETS[target], parse_space("int8,float32"))


def case(name: str, target: str = "generic") -> SearchSpace:
    return found(LAYERED[name].build(), target)


def weight_site(space: SearchSpace, layer: str) -> Site:
    (site,) = [
        s for s in space.sites if s.is_weight and s.layers == (layer,) and not s.bias_of
    ]
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
        ("gemms", "left", 1, 5),
        ("matmuls", "right", 1, 4),
        ("matmuls", "left", 0, 2),
        ("matmuls", "batched", None, 1),
        ("matmuls", "vector", None, 1),
    ],
)
def test_weights_have_a_scale_per_output_channel(
    name: str, layer: str, axis: int | None, channels: int
) -> None:
    site = weight_site(case(name), layer)
    assert (site.axis, site.channels) == (axis, channels)
    weight = initializer(LAYERED[name].build(), site.tensor)
    assert weight.ndim == site.rank
    np.broadcast_to(np.ones(site.channels).reshape(site.broadcast_shape), weight.shape)


@pytest.mark.parametrize("name", ["gemms", "matmuls", "conv_relu_conv"])
def test_a_channel_of_a_weight_makes_one_channel_of_the_output(name: str) -> None:
    # So an integer kernel can multiply by the scale after it has added up the products.
    plain = canonicalise(LAYERED[name].build())
    feeds = random_feeds(plain)
    for layer in found(plain).layers:
        sites = [
            s for s in found(plain).sites if s.tensor in layer.weights and s.axis is not None
        ]
        for site in sites:
            weight = np.array(initializer(plain, site.tensor))
            np.moveaxis(weight, site.axis or 0, 0)[1] *= 3
            changed = plain.clone()
            changed.graph.initializers[site.tensor].const_value = ir.tensor(weight)
            before, after = (
                Observer(m, [layer.output]).run(feeds)[layer.output] for m in (plain, changed)
            )
            where = np.nonzero(before != after)
            assert any(set(axis) == {1} for axis in where)


def test_a_weight_of_several_layers_has_a_site_for_each() -> None:
    space = case("shared_weight")
    assert {s.name for s in space.sites if s.is_weight} == {"w@once", "w@twice", "w@turned"}
    assert weight_site(space, "turned").axis == 0


def test_the_product_of_two_activations_is_a_layer_without_a_weight() -> None:
    space = case("matmuls")
    assert space.layer["both"].weights == ()
    assert space.layer["both"].params == 0
    sites = [site.tensor for site in space.sites if site.layers == ("both",)]
    assert sites == ["a", "t"]


def test_the_parameters_of_a_layer_are_counted() -> None:
    space = case("conv_relu_conv")
    assert {layer.name: layer.params for layer in space.layers} == {"c1": 108, "c2": 72}
    assert [layer.output for layer in space.layers] == ["a", "y"]


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
    return not site.unsigned


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
        prepared, scales, _ = calibrate(prepared, data, seed=0)
        signs = {s.tensor: s.unsigned for s in prepared.space.sites if not s.is_weight}
        assert signs == dict.fromkeys(("x", "s", "f"), unsigned)
        # Every site finds the scale that it asks for.
        prepared.space.values(prepared.space.uniform(FORMATS["int8"]), scales)


# -- what stays float -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (
            "h, c = LSTM <hidden_size = 2> (x, w, r) [fc] y = MatMul (x, v)",
            {"w": (1, 8, 4), "r": (1, 8, 2)},
            "LSTM: recurrent cells are left in float",
        ),
        (
            'h = Einsum <equation = "abc,cd->abd"> (x, v) [fc] y = MatMul (h, v)',
            {},
            "Einsum: Einsum is left in float",
        ),
    ],
)
def test_what_is_not_quantized_yet_is_reported(
    text: str, weights: dict[str, Sequence[int]], reason: str
) -> None:
    outputs = "float[3,N,4] y, float[A,B,C,D] h" if "LSTM" in text else "float[3,N,4] y"
    plain = model(
        f"g (float[3,N,4] x) => ({outputs}) {{ {text} }}", weights={"v": (4, 4), **weights}
    )
    space = found(plain)
    assert [layer.name for layer in space.layers] == ["fc"]
    assert [f"{s.op_type}: {s.reason}" for s in space.skipped] == [reason]


def test_layers_in_a_branch_are_reported_and_branches_without_layers_are_not() -> None:
    (skipped,) = case("layers_in_a_branch").skipped
    assert skipped.op_type == "If"
    assert skipped.reason == "layers in the branches are left in float"
    assert case("read_in_a_branch").skipped == ()


def test_weights_of_other_types_are_reported() -> None:
    space = found(
        model(
            """g (float[N,4] x, float16[N,4] h) => (float[N,4] y, float16[N,4] z) {
                [wide] y = MatMul (x, w)
                w16 = Constant <value = float16[4,4] {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> ()
                [half] z = MatMul (h, w16) }""",
            weights={"w": (4, 4)},
        )
    )
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
    space = find_layers(plain, TARGETS["generic"], [FORMATS["int8"]])
    assert [(s.name, s.reason) for s in space.skipped] == [
        ("constant", "both operands are constant")
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_without_layers_is_refused_and_told_what_was_left_out(target: str) -> None:
    with pytest.raises(
        UnsupportedError, match="no quantizable layer: the model has no float32"
    ):
        found(model("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"), target)
    with pytest.raises(UnsupportedError, match="left out: LSTM lstm: recurrent cells"):
        found(
            model(
                """g (float[3,N,4] x) => (float[3,1,N,2] y) {
                    [lstm] y = LSTM <hidden_size = 2> (x, w, r) }""",
                weights={"w": (1, 8, 4), "r": (1, 8, 2)},
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
        "f": ("c2", "stem"),
        "p": ("c2", "stem"),
        "q": ("c2", "stem"),
        "h": ("head", "c2", "stem"),
    }
    assert sites["a"].consumers == (("c1", 0), ("Add_e", 1))


def test_every_reader_of_a_quantized_tensor_reads_the_quantized_one() -> None:
    plain = canonicalise(LAYERED["residual"].build())
    values = ir.convenience.create_value_mapping(plain.graph)
    for tensor, site in activations("residual").items():
        uses = {(str(node.name), index) for node, index in values[tensor].uses()}
        assert set(site.consumers) == uses


def test_rearrangements_stay_on_the_grid_of_their_source() -> None:
    assert {t: s.same_scale_as for t, s in activations("residual").items()} == {
        **dict.fromkeys(("x", "a", "c", "d", "f", "q")),
        "p": "f@all",
        "h": "q@all",
    }


def test_graph_outputs_unread_parts_and_indices_have_no_site() -> None:
    for name in LAYERED:
        space = case(name, "ort-cpu")
        outputs = {value.name for value in LAYERED[name].build().graph.outputs}
        assert not outputs & {site.tensor for site in space.sites}
        assert all(site.consumers for site in space.sites)
    assert "q" not in activations("split_with_an_unread_part")
    assert "i" not in activations("maxpool_with_indices")


def test_biases_are_integers_where_their_scale_fits() -> None:
    def biases(name: str, target: str) -> set[str]:
        return {s.tensor for s in case(name, target).sites if s.bias_of}

    for target in TARGETS:
        assert biases("residual", target) == {"b1", "b2", "b3", "b4"}
        # Not where alpha scales the product, nor where groups share the weight's scales.
        assert biases("gemms", target) == {"b2"}
        assert biases("convtranspose", target) == {"b2"}


def test_names_of_sites_are_unique() -> None:
    for name in LAYERED:
        for target in TARGETS:
            names = [site.name for site in case(name, target).sites]
            assert len(names) == len(set(names))
