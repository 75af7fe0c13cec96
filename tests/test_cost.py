"""Costs against hand counts, and budgets: what they bound and what they refuse."""

import itertools
import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from onnx_fliqs.cost import (
    Budget,
    BudgetKind,
    check_feasible,
    cost_of,
    cost_table,
    default_budget,
)
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import ConfigError, InfeasibleError
from onnx_fliqs.precision import parse_precision, parse_space
from onnx_fliqs.prepare import prepare
from onnx_fliqs.sites import Layer, SearchSpace
from onnx_fliqs.target_files import parse_target

SMALL = """
g (float[N,4,9,9] x) => (float[N,5,5] y, float[N,10] z) {
    [strided] a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1)
    [grouped] b = Conv <kernel_shape = [3, 3], group = 2, pads = [1, 1, 1, 1]> (a, w2)
    [up] u = ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]> (b, w3)
    m = ReduceMean <axes = [3], keepdims = 0> (b)
    t = Transpose <perm = [0, 2, 1]> (m)
    [product] y = MatMul (t, m)
    p = ReduceMean <axes = [2, 3], keepdims = 0> (u)
    [dense] d = Gemm <transB = 1> (p, w4, b4)
    [last] z = MatMul (d, w5)
}
"""
OPSET_13 = '<ir_version: 8, opset_import: ["" : 13]>'
WEIGHTS = {
    "w1": (6, 4, 3, 3),
    "w2": (8, 3, 3, 3),
    "w3": (8, 2, 2, 2),
    "w4": (7, 2),
    "b4": (7,),
    "w5": (7, 10),
}
# Output elements of one sample times multiplications for each of them.
MACS = {
    "strided": (6 * 5 * 5) * (4 * 3 * 3),
    "grouped": (8 * 5 * 5) * (3 * 3 * 3),
    "up": (8 * 5 * 5) * (2 * 2 * 2),  # each input element meets the kernel of each output
    "product": (5 * 5) * 8,
    "dense": 7 * 2,
    "last": 10 * 7,
}
PARAMS = {"strided": 216, "grouped": 216, "up": 64, "product": 0, "dense": 14, "last": 70}
BUDGET_KINDS = (BudgetKind.BITS, BudgetKind.BOPS, BudgetKind.SIZE)
"""Latency is no sum over operations: see test_latency."""


def small_space(batch: int = 1, formats: str = "int-l") -> SearchSpace:
    model = support.model(SMALL, header=OPSET_13, weights=WEIGHTS)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 4, 9, 9)).astype(np.float32)
    dataset = Dataset({"x": images}, None, input_specs(model))
    return prepare(model, dataset, parse_target("generic"), parse_space(formats)).space


def space_of(*layers: tuple[int, int], formats: str = "int-l") -> SearchSpace:
    """A space of layers of given (MACs, parameters)."""
    return SearchSpace(
        tuple(
            Layer(
                name=f"l{i}",
                op_type="Gemm",
                weights=("w",),
                params=params,
                macs=macs,
            )
            for i, (macs, params) in enumerate(layers)
        ),
        (),
        parse_space(formats),
    )


def test_macs_and_parameters_equal_the_hand_count() -> None:
    space = small_space()
    assert {layer.name: layer.macs for layer in space.layers} == MACS
    assert {layer.name: layer.params for layer in space.layers} == PARAMS


def test_macs_are_those_of_one_sample_whatever_the_data_set() -> None:
    assert [layer.macs for layer in small_space(batch=5).layers] == list(MACS.values())


def test_macs_of_a_model_with_a_fixed_batch_are_those_of_one_sample() -> None:
    model = support.model(
        "g (float[4,6] x) => (float[4,3] y) { [dense] y = MatMul (x, w) }",
        weights={"w": (6, 3)},
    )
    space = prepare(model, None, parse_target("generic"), parse_space("int-s")).space
    assert space.layers[0].macs == 18


def test_cost_of_a_mixed_assignment_equals_the_hand_count() -> None:
    space = small_space(formats="int-l,e4m3,e2m1,float32".replace("int-l", "int4,int6,int8"))
    names = ["int4", "int8", "e4m3", "int6", "e2m1", "float32"]
    bits = [4, 8, 8, 6, 4, 32]
    chosen = {
        layer.name: parse_precision(name)
        for layer, name in zip(space.layers, names, strict=True)
    }
    cost = cost_of(space, chosen)
    bops = sum(m * b * b for m, b in zip(MACS.values(), bits, strict=True))
    assert cost.bops == bops
    assert cost.effective_bits == math.sqrt(bops / sum(MACS.values()))
    assert (
        cost.weight_bytes == sum(p * b for p, b in zip(PARAMS.values(), bits, strict=True)) / 8
    )
    assert cost.relative_to_int8 == bops / (64 * sum(MACS.values()))


@pytest.mark.parametrize("name", ["int4", "int8", "e2m1", "e5m2", "float32"])
def test_a_uniform_assignment_has_the_bits_of_its_format(name: str) -> None:
    space = small_space(formats="int4,int8,e2m1,e5m2,float32")
    bits = parse_precision(name).weights.bits
    cost = cost_of(space, space.uniform(parse_precision(name)))
    assert cost.effective_bits == bits
    assert cost.relative_to_int8 == (bits / 8) ** 2
    assert cost.weight_bytes == sum(PARAMS.values()) * bits / 8


@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_the_table_adds_up_to_the_cost_of_every_assignment(kind: BudgetKind) -> None:
    space = space_of((100, 7), (3, 50), (11, 0), formats="int4,int6,e4m3")
    table = cost_table(space, kind)
    for choices in itertools.product(range(3), repeat=3):
        chosen = {f"l{i}": space.precisions[c] for i, c in enumerate(choices)}
        cost = cost_of(space, chosen)
        total = sum(float(row[c]) for row, c in zip(table, choices, strict=True))
        assert total == (cost.weight_bytes if kind is BudgetKind.SIZE else cost.bops)


@pytest.mark.parametrize(
    ("kind", "value"), [(BudgetKind.BITS, 8), (BudgetKind.BOPS, 1), (BudgetKind.SIZE, 1)]
)
def test_the_budget_of_uniform_int8_is_its_cost(kind: BudgetKind, value: float) -> None:
    space = small_space()
    cost = cost_of(space, space.uniform(parse_precision("int8")))
    expected = cost.weight_bytes if kind is BudgetKind.SIZE else cost.bops
    assert Budget(kind, value).limit(space) == expected


def test_a_budget_in_bits_bounds_effective_bits() -> None:
    space = small_space()
    assert Budget(BudgetKind.BITS, 4.5).limit(space) == 4.5**2 * sum(MACS.values())


@pytest.mark.parametrize("kind", BUDGET_KINDS)
@given(value=st.floats(1e-3, 1e3), share=st.floats(1e-3, 1e3))
def test_stated_is_the_inverse_of_limit(kind: BudgetKind, value: float, share: float) -> None:
    space = space_of((1000, 17), (12345, 999))
    budget = Budget(kind, value)
    # A handful of roundings in float64 on either way.
    assert budget.stated(space, budget.limit(space)) == pytest.approx(value, rel=1e-13)
    other = Budget(kind, share)
    assert other.stated(space, budget.limit(space)) == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_a_budget_must_be_a_positive_number(kind: BudgetKind, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{kind.value} must be positive"):
        Budget(kind, value)


@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_a_budget_names_the_option_that_states_it(kind: BudgetKind) -> None:
    assert str(Budget(kind, 0.25)) == f"--{kind.value} 0.25"


@pytest.mark.parametrize(
    ("kind", "least"),
    [(BudgetKind.BITS, 4.0), (BudgetKind.BOPS, 0.25), (BudgetKind.SIZE, 0.5)],
)
def test_the_cheapest_assignment_is_feasible_and_nothing_below_it(
    kind: BudgetKind, least: float
) -> None:
    space = small_space()
    check_feasible(space, Budget(kind, least))
    with pytest.raises(InfeasibleError) as error:
        check_feasible(space, Budget(kind, least * 0.998))
    assert error.value.exit_code == 4


def test_an_infeasible_budget_is_told_the_formats_and_the_range() -> None:
    with pytest.raises(InfeasibleError) as error:
        check_feasible(small_space(), Budget(BudgetKind.BITS, 3))
    message = str(error.value)
    assert "--bits 3 " in message
    assert "int4, int5, int6, int7, int8" in message
    assert "--bits 4 to 8" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [1e-300, 1e-12])
@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_a_tiny_budget_is_infeasible_rather_than_an_error_of_arithmetic(
    kind: BudgetKind, value: float
) -> None:
    with pytest.raises(InfeasibleError):
        check_feasible(small_space(), Budget(kind, value))


@pytest.mark.parametrize("value", [100.0, 1e300])
@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_a_budget_beyond_the_largest_cost_is_met_by_all(
    kind: BudgetKind, value: float
) -> None:
    space = small_space()
    budget = Budget(kind, value)
    check_feasible(space, budget)
    assert budget.limit(space) >= sum(row.max() for row in cost_table(space, kind))


@settings(deadline=None)
@given(
    kind=st.sampled_from(BUDGET_KINDS),
    formats=st.lists(
        st.sampled_from(["int3", "int5", "int6", "int7", "int8"]), min_size=1, unique=True
    ),
    layers=st.lists(
        st.tuples(st.integers(1, 10**9), st.integers(1, 10**7)), min_size=1, max_size=4
    ),
)
def test_the_least_budget_of_the_message_can_be_met(
    kind: BudgetKind, formats: list[str], layers: list[tuple[int, int]]
) -> None:
    space = space_of(*layers, formats=",".join(formats))
    with pytest.raises(InfeasibleError) as error:
        check_feasible(space, Budget(kind, 1e-6))
    typed = float(str(error.value).split(f"--{kind.value} ")[-1].split(" to ")[0])
    budget = Budget(kind, typed)
    check_feasible(space, budget)
    least = sum(float(row.min()) for row in cost_table(space, kind))
    # The tolerance that the projection allows for rounding.
    assert least <= budget.limit(space) * (1 + 1e-9)


def test_a_size_budget_without_weights_is_refused() -> None:
    model = support.model(
        "g (float[2,3,4] a, float[2,4,5] b) => (float[2,3,5] y) { y = MatMul (a, b) }"
    )
    space = prepare(model, None, parse_target("generic"), parse_space("int-l")).space
    check_feasible(space, Budget(BudgetKind.BITS, 4))
    with pytest.raises(ConfigError, match="no layer has weights"):
        check_feasible(space, Budget(BudgetKind.SIZE, 0.5))


# -- pairs and groups of numbers --------------------------------------------------------------

PAIRS = "int4 int4:int8 int8 int4:float32 int8:int16 int4g32:int8 int4g16:float32 float32"


@pytest.mark.parametrize(
    ("name", "product", "stored"),
    [
        ("int4:int8", 4 * 8, 4.0),
        ("int8:int4", 8 * 4, 8.0),
        ("int8:int16", 8 * 16, 8.0),
        ("int4:float32", 4 * 32, 4.0),
        ("e2m1:e4m3", 4 * 8, 4.0),
        # A float32 scale for every so many numbers.
        ("int4g16:float32", 4 * 32, 6.0),
        ("int4g32:float32", 4 * 32, 5.0),
        ("int4g64:int8", 4 * 8, 4.5),
        ("int4g128:float32", 4 * 32, 4.25),
        ("int8g256:int8", 8 * 8, 8.125),
        ("e2m1g16:float32", 4 * 32, 6.0),
    ],
)
def test_operations_count_both_operands_and_bytes_the_scales_of_groups(
    name: str, product: int, stored: float
) -> None:
    space = space_of((1000, 256), (10, 512), formats=f"{name} int8")
    cost = cost_of(space, space.uniform(parse_precision(name)))
    assert cost.bops == 1010 * product
    assert cost.effective_bits == pytest.approx(math.sqrt(product), rel=1e-15)
    assert cost.relative_to_int8 == product / 64
    assert cost.weight_bytes == 768 * stored / 8


def test_a_product_of_activations_counts_the_bits_of_its_activations_twice() -> None:
    layer = Layer(name="both", op_type="MatMul", weights=(), params=0, macs=100)
    space = SearchSpace((layer,), (), parse_space("int4:int8 int8"))
    for name, bits in (("int4:int8", 8), ("int8", 8)):
        cost = cost_of(space, {"both": parse_precision(name)})
        assert cost.bops == 100 * bits**2
        assert cost.weight_bytes == 0


@pytest.mark.parametrize("kind", BUDGET_KINDS)
def test_the_table_of_pairs_adds_up_to_the_cost_of_every_assignment(kind: BudgetKind) -> None:
    plain = space_of((100, 64), (3, 640), (11, 32), formats=PAIRS)
    excluded = frozenset({"int4", "int8:int16", "float32"})
    layers = (plain.layers[0], replace(plain.layers[1], excluded=excluded), plain.layers[2])
    space = replace(plain, layers=layers)
    table = cost_table(space, kind)
    assert [len(row) for row in table] == [8, 5, 8]
    for choices in itertools.product(*(range(len(row)) for row in table)):
        cost = cost_of(space, space.assign(choices))
        total = sum(float(row[c]) for row, c in zip(table, choices, strict=True))
        assert total == pytest.approx(
            cost.weight_bytes if kind is BudgetKind.SIZE else cost.bops, rel=1e-15
        )


def test_the_cost_of_a_decision_is_that_of_what_all_its_layers_can_take() -> None:
    plain = space_of((100, 64), (3, 0), formats="int4 int8 float32")
    layers = (plain.layers[0], replace(plain.layers[1], excluded=frozenset({"int4"})))
    space = replace(plain, layers=layers, groups=(("l0", "l1"),))
    (row,) = cost_table(space, BudgetKind.BOPS)
    np.testing.assert_array_equal(row, [103 * 64, 103 * 1024])
    with pytest.raises(InfeasibleError, match="reaches --bits 8 to 32"):
        check_feasible(space, Budget(BudgetKind.BITS, 7.9))
    assert default_budget(space, 5.0) == Budget(BudgetKind.BITS, 8.0)


def test_what_groups_add_is_no_part_of_a_budget_of_uniform_int8() -> None:
    space = space_of((1000, 256), formats="int8g16:int8")
    assert Budget(BudgetKind.SIZE, 1).limit(space) == 256
    with pytest.raises(InfeasibleError, match=r"reaches --size 1\.25 to 1\.25"):
        check_feasible(space, Budget(BudgetKind.SIZE, 1))


def test_a_range_of_one_number_is_not_turned_round() -> None:
    """The least is rounded up, the most to nearest."""
    space = space_of((1000, 256), formats="int5:int6")
    with pytest.raises(InfeasibleError, match=r"reaches --bits 5\.478 to 5\.478$"):
        check_feasible(space, Budget(BudgetKind.BITS, 1))


def test_precisions_that_differ_in_groups_are_sorted_by_what_they_store() -> None:
    names = ["int4:float32", *(f"int4g{size}:float32" for size in (256, 128, 64, 32, 16))]
    space = space_of((1000, 1024), formats=" ".join(reversed(names)))
    assert [precision.name for precision in space.precisions] == names
    (row,) = cost_table(space, BudgetKind.SIZE)
    assert list(row) == sorted(row)


# -- weight-only layers and groups ------------------------------------------------------------


def mixed_space(*, only: bool = False) -> SearchSpace:
    """Layers of (MACs, parameters): 100, 7; 1000, 50 in float; 10, 3; the outer two tied."""
    plain = space_of((100, 7), (1000, 50), (10, 3), formats="int4,int6,int8")
    layers = tuple(
        replace(layer, weight_only="why") if only or layer.name == "l1" else layer
        for layer in plain.layers
    )
    return replace(plain, layers=layers, groups=(("l0", "l2"),))


def test_layers_that_multiply_in_float_cost_bytes_but_no_bit_operations() -> None:
    space = mixed_space()
    chosen = {
        f"l{i}": parse_precision(name) for i, name in enumerate(("int4", "int8", "int4"))
    }
    cost = cost_of(space, chosen)
    assert cost.bops == 110 * 16
    assert cost.effective_bits == 4
    assert cost.relative_to_int8 == 0.25
    assert cost.weight_bytes == 7 / 2 + 50 + 3 / 2


def test_the_table_has_a_row_for_each_decision() -> None:
    space = mixed_space()
    assert space.decisions == (("l0", "l2"), ("l1",))
    for kind, expected in {
        BudgetKind.BITS: [[110 * 16, 110 * 36, 110 * 64], [0, 0, 0]],
        BudgetKind.SIZE: [[5, 7.5, 10], [25, 37.5, 50]],
    }.items():
        np.testing.assert_array_equal(cost_table(space, kind), expected)


@pytest.mark.parametrize("kind", [BudgetKind.BITS, BudgetKind.BOPS])
def test_a_budget_of_operations_is_refused_where_only_weights_are_quantized(
    kind: BudgetKind,
) -> None:
    with pytest.raises(
        ConfigError, match="only weights are quantized; bound their bytes with --size"
    ):
        check_feasible(mixed_space(only=True), Budget(kind, 1))
    check_feasible(mixed_space(only=True), Budget(BudgetKind.SIZE, 0.5))


def test_the_default_budget_is_in_bytes_where_only_weights_are_quantized() -> None:
    for bits, stated in ((2.0, 4.0), (5.0, 5.0), (16.0, 8.0)):
        assert default_budget(mixed_space(), bits) == Budget(BudgetKind.BITS, stated)
        expected = Budget(BudgetKind.SIZE, stated / 8)
        assert default_budget(mixed_space(only=True), bits) == expected


def test_macs_of_a_layer_in_a_body_are_counted_if_its_shapes_are_known() -> None:
    text = """g (float[{n},4] x, bool c) => (float[{n},3] y) {{
        y = If (c) <
            then_branch = t () => (float[{n},3] p) {{ [inside] p = MatMul (x, w) }},
            else_branch = e () => (float[{n},3] q) {{ [other] q = Gemm (x, w) }}> }}"""
    for rows, macs in (("2", 4 * 3), ("N", 0)):
        model = support.model(text.format(n=rows), weights={"w": (4, 3)})
        data = Dataset(support.random_feeds(model), None, input_specs(model))
        space = prepare(model, data, parse_target("generic"), parse_space("int8")).space
        assert [layer.macs for layer in space.layers] == [macs, macs]
        for layer in space.layers:
            assert layer.weight_only is not None
            assert layer.weight_only.endswith("are not counted") == (macs == 0)


def test_preparing_leaves_the_model_as_it_is() -> None:
    model = support.model(SMALL, header=OPSET_13, weights=WEIGHTS)
    before = support.serialized(ir.to_proto(model))
    prepare(model, None, parse_target("generic"), parse_space("int-l"))
    assert support.serialized(ir.to_proto(model)) == before
