"""Which precisions a layer may take: kernels, groups, and choices that make no difference."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from layer_forms import FORMS
from onnx_fliqs.errors import ConfigError, UnsupportedError
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.legality import check_pairs
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import parse_precision, parse_space
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.targets import TARGETS, Kernels, Target
from support import model, runnable

GENERIC = TARGETS["generic"]


def space_of(
    text: str,
    weights: Mapping[str, Sequence[int]],
    space: str,
    target: Target = GENERIC,
) -> SearchSpace:
    plain = canonicalise(model(text, weights=weights))
    return find_layers(plain, target, parse_space(space))


def allowed(space: SearchSpace) -> dict[str, list[str]]:
    """Layer → the names of the precisions that it may take, cheapest first."""
    return {
        layer.name: [p.name for p in space.precisions if p.name not in layer.excluded]
        for layer in space.layers
    }


def choices(space: SearchSpace) -> dict[tuple[str, ...], list[str]]:
    """Decision → its choices."""
    return {
        names: [precision.name for precision in found]
        for names, found in zip(space.decisions, space.choices, strict=True)
    }


def with_kernels(*kernels: Kernels) -> Target:
    return replace(GENERIC, kernels=kernels)


# -- groups ---------------------------------------------------------------------------------

GROUPS = "int4g16:float32 int4g32:float32 int8 float32"
PRODUCTS = {
    "matmul": ("[fc] y = MatMul (x, w)", (32, 6), "x"),
    "gemm": ("[fc] y = Gemm (x, w)", (32, 6), "x"),
    "gemm_transposed": ("[fc] y = Gemm <transB = 1> (x, w)", (6, 32), "x"),
    "gemm_of_a_transpose": ("[fc] y = Gemm <transA = 1> (z, w)", (32, 6), "z"),
    "from_the_left": ("[fc] y = MatMul (w, z)", (6, 32), "z"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_groups_need_a_summed_axis_that_they_divide(name: str) -> None:
    text, shape, operand = PRODUCTS[name]
    for size, expected in ((32, (16, 32)), (48, (16,)), (31, ()), (16, (16,)), (8, ())):
        head = {"x": f"float[N,{size}] x", "z": f"float[{size},N] z"}[operand]
        weight = tuple(size if length == 32 else length for length in shape)
        space = space_of(f"g ({head}) => (float[A,B] y) {{ {text} }}", {"w": weight}, GROUPS)
        names = {f"int4g{group}:float32" for group in expected}
        assert set(allowed(space)["fc"]) == {"int8", "float32"} | names


def test_the_other_axis_of_a_weight_does_not_matter() -> None:
    for channels in (1, 7, 16):
        space = space_of(
            "g (float[N,32] x) => (float[N,C] y) { [fc] y = MatMul (x, w) }",
            {"w": (32, channels)},
            GROUPS,
        )
        assert space.layer["fc"].excluded == frozenset()


OTHERS = {
    "conv": ("float[2,32,4,4] x", "Conv", (32, 32, 1, 1)),
    "convtranspose": ("float[2,32,4,4] x", "ConvTranspose", (32, 32, 1, 1)),
    "stack_of_matrices": ("float[2,4,32] x", "MatMul", (2, 32, 32)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_only_products_of_matrices_have_groups(name: str) -> None:
    head, op_type, shape = OTHERS[name]
    dims = ",".join("ABCD"[: len(shape)])
    space = space_of(
        f"g ({head}) => (float[{dims}] y) {{ [l] y = {op_type} (x, w) }}", {"w": shape}, GROUPS
    )
    assert allowed(space) == {"l": ["int8", "float32"]}
    assert all(site.group_axis is None for site in space.sites)


@pytest.mark.parametrize("form", ["lstm", "einsums", "embedding", "layers_in_bodies"])
def test_weights_of_layers_whose_activations_stay_float_have_no_groups(form: str) -> None:
    space = find_layers(
        canonicalise(FORMS[form].build()),
        GENERIC,
        parse_space("int4g16:float32 int4 float32"),
    )
    for layer in space.layers:
        if layer.weight_only is not None:
            assert "int4g16:float32" in layer.excluded


def test_the_product_of_two_activations_has_no_groups() -> None:
    space = space_of(
        "g (float[N,32] x, float[32,32] z) => (float[N,32] y) { [both] y = MatMul (x, z) }",
        {},
        "int4g32:int8 int8 float32",
    )
    assert allowed(space) == {"both": ["int8", "float32"]}


# -- choices that make no difference --------------------------------------------------------

PAIRS = "int4 int8 int4:int8 int8:int16 int4:float32 int8:float32 float32"


def test_a_product_of_activations_takes_one_of_equal_activations() -> None:
    space = space_of(
        "g (float[N,8] x, float[8,8] z) => (float[N,8] y) { [both] y = MatMul (x, z) }",
        {},
        PAIRS,
    )
    # int4:int8 differs from int8 in weights that are not there, int4:float32 from float32.
    assert allowed(space) == {"both": ["int4", "int8", "int8:int16", "float32"]}


def test_a_layer_of_weights_alone_takes_one_of_equal_weights() -> None:
    space = space_of(
        """g (float[5,N,4] x) => (float[5,1,N,2] y) {
            [cell] y = LSTM <hidden_size = 2> (x, w, r) }""",
        {"w": (1, 8, 4), "r": (1, 8, 2)},
        PAIRS,
    )
    assert allowed(space) == {"cell": ["int4", "int8", "float32"]}


def test_a_layer_of_both_operands_takes_every_pair() -> None:
    space = space_of(
        "g (float[N,8] x) => (float[N,8] y) { [fc] y = MatMul (x, w) }", {"w": (8, 8)}, PAIRS
    )
    assert allowed(space)["fc"] == [precision.name for precision in parse_space(PAIRS)]


# -- kernels --------------------------------------------------------------------------------

CONV = "g (float[N,C,4,4] x) => (float[N,M,4,4] y) { [c] y = Conv <group = G> (x, w) }"


@pytest.mark.parametrize(
    ("shape", "groups", "expected"),
    [
        ((16, 16, 1, 1), 1, True),
        ((15, 16, 1, 1), 1, False),
        ((16, 15, 1, 1), 1, False),
        ((64, 15, 3, 3), 2, False),
        ((16, 16, 3, 3), 2, True),  # per group, what goes in; altogether, what comes out
        ((32, 1, 3, 3), 32, False),
    ],
)
def test_a_kernel_may_need_channels(
    shape: tuple[int, int, int, int], groups: int, expected: bool
) -> None:
    target = with_kernels(
        Kernels(ops=("Conv",), precisions=("int8",)),
        Kernels(ops=("Conv",), precisions=("e4m3",), least_channels=16),
    )
    text = CONV.replace("C,", f"{shape[1] * groups},").replace("G>", f"{groups}>")
    space = space_of(text, {"w": shape}, "e4m3 int8 float32", target)
    assert allowed(space)["c"] == [*(["e4m3"] if expected else []), "int8", "float32"]


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("[fc] y = MatMul (x, w)", (16, 16), True),
        ("[fc] y = MatMul (x, w)", (16, 15), False),
        ("[fc] y = MatMul (x, w)", (15, 16), False),
        ("[fc] y = Gemm <transB = 1> (x, w)", (15, 16), False),
        ("[fc] y = MatMul (x, w)", (2, 16, 16), True),
        ("[fc] y = MatMul (x, w)", (20, 16, 15), False),
    ],
)
def test_a_kernel_of_matrices_may_need_channels(
    text: str, shape: tuple[int, ...], expected: bool
) -> None:
    target = with_kernels(
        Kernels(ops=("MatMul", "Gemm"), precisions=("int8",)),
        Kernels(ops=("MatMul", "Gemm"), precisions=("e4m3",), least_channels=16),
    )
    stack = "".join(f"{size}," for size in shape[:-2])
    summed = shape[-1] if "transB" in text else shape[-2]
    text = f"g (float[{stack}N,{summed}] x) => (float[{stack}A,B] y) {{ {text} }}"
    space = space_of(text, {"w": shape}, "e4m3 int8 float32", target)
    assert allowed(space)["fc"] == [*(["e4m3"] if expected else []), "int8", "float32"]


def test_a_layer_without_a_kernel_is_left_with_the_reason() -> None:
    target = with_kernels(Kernels(ops=("MatMul",), precisions=("int8", "int4:int8")))
    space = space_of(
        """g (float[N,4] x) => (float[N,3] y) {
            [one] a = MatMul (x, w1)
            [two] y = Gemm (a, w2) }""",
        {"w1": (4, 4), "w2": (4, 3)},
        "int4:int8 int8 float32",
        target,
    )
    assert allowed(space) == {"one": ["int4:int8", "int8", "float32"]}
    (skipped,) = space.skipped
    assert (skipped.name, skipped.op_type) == ("two", "Gemm")
    assert skipped.reason == "target generic has no kernel for it in int4:int8, int8"


def test_float32_needs_no_kernel() -> None:
    target = with_kernels(Kernels(ops=("MatMul",), precisions=("int8",)))
    text = "g (float[N,4] x) => (float[N,4] y) { [one] y = MatMul (x, w) }"
    space = space_of(text, {"w": (4, 4)}, "int8 float32", target)
    assert allowed(space) == {"one": ["int8", "float32"]}
    # Without it, what has a kernel may still be all of the model.
    assert allowed(space_of(text, {"w": (4, 4)}, "int8", target)) == {"one": ["int8"]}


def test_a_kernel_for_weights_alone_counts_for_layers_of_weights_alone() -> None:
    target = with_kernels(Kernels(ops=("LSTM",), precisions=("int8:int8", "int4:float32")))
    space = space_of(
        """g (float[5,N,4] x) => (float[5,1,N,2] y) {
            [cell] y = LSTM <hidden_size = 2> (x, w, r) }""",
        {"w": (1, 8, 4), "r": (1, 8, 2)},
        "int4 int8 int6 float32",
        target,
    )
    assert allowed(space) == {"cell": ["int4", "int8", "float32"]}


IN_A_BODY = """g (float[N,4] x, bool c) => (float[N,4] y) {
    [outside] a = MatMul (x, w1)
    [branch] y = If (c) <
        then_branch = t () => (float[N,4] p) { [inside] p = MatMul (a, w2) },
        else_branch = e () => (float[N,4] q) { q = Neg (a) }> }"""
IN_A_BODY_WEIGHTS = {"w1": (4, 4), "w2": (4, 4)}


def test_a_kernel_of_integers_does_not_run_products_whose_activations_stay_float() -> None:
    """Their weights would be dequantized in every run, which is slower than to leave them."""
    for precision in ("int8", "int8:float32"):
        target = with_kernels(Kernels(ops=("MatMul",), precisions=(precision,)))
        space = space_of(IN_A_BODY, IN_A_BODY_WEIGHTS, f"{precision} float32", target)
        assert set(space.layer) == {"outside"}


# -- layers that share a weight -------------------------------------------------------------

SHARED = """g (float[N,16] x) => (float[N,16] y) {
    [one] a = MatMul (x, w)
    [two] b = MatMul (a, v)
    [three] y = Gemm (b, w) }"""
SHARED_WEIGHTS = {"w": (16, 16), "v": (16, 16)}


def test_layers_that_share_a_weight_choose_what_all_of_them_can() -> None:
    target = with_kernels(
        Kernels(ops=("MatMul",), precisions=("int4", "int8")),
        Kernels(ops=("Gemm",), precisions=("int8", "e4m3")),
    )
    space = space_of(SHARED, SHARED_WEIGHTS, "int4 int8 e4m3 float32", target)
    assert allowed(space) == {
        "one": ["int4", "int8", "float32"],
        "two": ["int4", "int8", "float32"],
        "three": ["e4m3", "int8", "float32"],
    }
    assert choices(space) == {
        ("one", "three"): ["int8", "float32"],
        ("two",): ["int4", "int8", "float32"],
    }


def test_layers_that_share_a_weight_and_no_precision_are_refused() -> None:
    target = with_kernels(
        Kernels(ops=("MatMul",), precisions=("int4",)),
        Kernels(ops=("Gemm",), precisions=("int8",)),
    )
    with pytest.raises(
        UnsupportedError,
        match="layers one, three share a weight, and generic runs them in no precision",
    ):
        space_of(SHARED, SHARED_WEIGHTS, "int4 int8", target)
    space = space_of(SHARED, SHARED_WEIGHTS, "int4 int8 float32", target)
    assert choices(space)["one", "three"] == ["float32"]


def test_layers_of_different_groups_share_the_groups_that_fit_both() -> None:
    space = space_of(
        """g (float[N,64] x) => (float[N,64] y) {
            [one] a = MatMul (x, w)
            [two] y = Gemm <transB = 1> (a, w) }""",
        {"w": (64, 48)},
        "int4g16:float32 int4g64:float32 int8",
    )
    excluded = {layer.name: set(layer.excluded) for layer in space.layers}
    assert excluded == {"one": set(), "two": {"int4g64:float32"}}
    assert choices(space) == {("one", "two"): ["int8", "int4g16:float32"]}
    (site,) = [site for site in space.sites if site.is_weight]
    assert (site.group, site.groups) == (16, 4)
    assert {f.name for f in space.site_formats(site)} == {"int8", "int4g16"}


# -- the profiles ---------------------------------------------------------------------------


def test_a_target_names_every_precision_of_its_kernels_and_float32() -> None:
    for target in TARGETS.values():
        if target.kernels is None:
            assert target.precisions is None
            continue
        assert target.precisions is not None
        assert ("float32" in target.precisions) == target.runs_float
        for kernels in target.kernels:
            assert set(kernels.precisions) <= set(target.precisions)
        assert {p.name for p in target.space(None)} <= set(target.precisions)


@pytest.mark.parametrize(
    ("target", "text", "weights", "expected"),
    [
        ("tensorrt", "[l] y = Conv (x, w)", (16, 16, 1, 1), ["int8", "float32"]),
        ("tensorrt", "[l] y = Conv (x, w)", (17, 16, 1, 1), ["int8", "float32"]),
        ("tensorrt", "[l] y = Conv (x, w)", (17, 17, 1, 1), ["int8", "float32"]),
        ("xnnpack", "[l] y = ConvTranspose (x, w)", (16, 16, 1, 1), ["int8", "float32"]),
        ("vitis-ai", "[l] y = ConvTranspose (x, w)", (16, 16, 1, 1), ["int8", "float32"]),
        ("ort-cpu", "[l] y = Conv (x, w)", (16, 16, 1, 1), ["int8", "float32"]),
        ("ort-cpu-avx2", "[l] y = Conv (x, w)", (16, 16, 1, 1), ["int7:int8", "float32"]),
    ],
)
def test_profiles_allow_what_their_kernels_run(
    target: str, text: str, weights: tuple[int, ...], expected: list[str]
) -> None:
    channels = weights[0 if "Transpose" in text else 1]
    plain = model(
        f"g (float[N,{channels},4,4] x) => (float[N,M,4,4] y) {{ {text} }}",
        weights={"w": weights},
    )
    profile = TARGETS[target]
    space = find_layers(canonicalise(plain), profile, runnable(profile))
    assert allowed(space)["l"] == expected


def test_tensorrt_has_groups_of_int4_for_matrices_that_they_divide() -> None:
    for size, expected in (
        (256, ["e4m3", "int8", "int4g64:float32", "int4g128:float32", "float32"]),
        (64, ["e4m3", "int8", "int4g64:float32", "float32"]),
        (96, ["e4m3", "int8", "float32"]),
        (15, None),
    ):
        profile = TARGETS["tensorrt"]
        plain = model(
            f"""g (float[N,{size}] x) => (float[N,32] y) {{ [fc] y = MatMul (x, w) }}""",
            weights={"w": (size, 32)},
        )
        try:
            space = find_layers(canonicalise(plain), profile, runnable(profile))
        except UnsupportedError:
            assert expected is None
        else:
            assert set(allowed(space)["fc"]) == set(expected or ())


# -- formats of weights and of activations apart --------------------------------------------

SOME = ("int4", "int8", "e4m3", "float32")
LAYERS = {
    "fc": ("g (float[N,32] x) => (float[N,16] y) { [l] y = MatMul (x, w) }", (32, 16)),
    "conv": (
        "g (float[N,16,4,4] x) => (float[N,16,4,4] y) { [l] y = Conv (x, w) }",
        (16, 16, 1, 1),
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["fc", "conv", *FORMS])
def test_no_pair_is_proposed_that_the_target_does_not_run(target: str, form: str) -> None:
    profile = TARGETS[target]
    text, shape = LAYERS.get(form, ("", ()))
    plain = model(text, weights={"w": shape}) if text else FORMS[form].build()
    tied = [name for name in profile.precisions or SOME if ":" not in name]
    asked = ",".join(tied or profile.precisions or ())
    precisions = profile.space(asked, separate=True)
    assert set(profile.space(asked)) <= set(precisions)
    try:
        space = find_layers(canonicalise(plain), profile, precisions)
    except UnsupportedError:
        return
    for layer in space.layers:
        for precision in space.choices_of[layer.name]:
            if profile.kernels is None or precision.name == "float32":
                continue
            runs = {n for k in profile.kernels if layer.op_type in k.ops for n in k.precisions}
            if layer.weight_only is None:
                assert precision.name in runs
            else:
                assert precision.weights in {parse_precision(name).weights for name in runs}


@pytest.mark.parametrize(
    ("target", "form", "space", "expected"),
    [
        ("generic", "conv", "int4,int8", ["int4", "int4:int8", "int8:int4", "int8"]),
        ("generic", "fc", "int4,e4m3", ["int4", "int4:e4m3", "e4m3:int4", "e4m3"]),
        ("generic", "fc", "int4,float32", ["int4", "int4:float32", "float32"]),
        ("ort-cpu", "fc", None, ["int8", "int8:float32", "float32"]),
        ("qnn", "conv", None, ["int4:int8", "int4:int16", "int8", "int8:int16"]),
    ],
)
def test_a_layer_takes_every_pair_that_its_target_runs(
    target: str, form: str, space: str | None, expected: list[str]
) -> None:
    text, shape = LAYERS[form]
    plain = canonicalise(model(text, weights={"w": shape}))
    profile = TARGETS[target]
    found = find_layers(plain, profile, profile.space(space, separate=True))
    assert allowed(found)["l"] == expected
    check_pairs(found, profile)


@pytest.mark.parametrize(
    ("target", "form", "space"),
    [
        ("ort-cpu", "conv", None),
        ("xnnpack", "conv", None),
        ("vitis-ai", "fc", None),
        ("generic", "fc", "int8"),
    ],
)
def test_where_no_pair_is_legal_the_option_is_refused(
    target: str, form: str, space: str | None
) -> None:
    text, shape = LAYERS[form]
    plain = canonicalise(model(text, weights={"w": shape}))
    profile = TARGETS[target]
    found = find_layers(plain, profile, profile.space(space, separate=True))
    with pytest.raises(ConfigError, match=f"--separate changes nothing: target {target} runs"):
        check_pairs(found, profile)


def test_operands_that_are_not_there_are_no_reason_for_pairs() -> None:
    space = find_layers(
        canonicalise(FORMS["lstm"].build()), GENERIC, GENERIC.space("int4,int8", separate=True)
    )
    assert allowed(space) == {"cell": ["int4", "int8"]}
    with pytest.raises(ConfigError, match="--separate changes nothing"):
        check_pairs(space, GENERIC)
    both = "g (float[N,8] x, float[8,8] z) => (float[N,8] y) { [both] y = MatMul (x, z) }"
    assert allowed(space_of(both, {}, "int4 int4:int8 int8:int4 int8")) == {
        "both": ["int4", "int8"]
    }
