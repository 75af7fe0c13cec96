"""The names of what a layer chooses, and spaces of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.formats import FORMATS, SPACES, IntFormat
from onnx_fliqs.precision import (
    Precision,
    in_words,
    parse_precision,
    parse_space,
    separated,
)
from support import PRECISIONS, SEARCHED

SIGNED = [n for n, fmt in FORMATS.items() if not isinstance(fmt, IntFormat) or fmt.signed]


@pytest.mark.parametrize("name", SIGNED)
def test_one_name_is_for_both_operands(name: str) -> None:
    precision = parse_precision(f" {name.upper()} ")
    assert precision.weights is precision.activations is FORMATS[name]
    assert precision.name == name
    assert parse_precision(f"{name}:{name}") == precision


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("int4:int8", "int4", "int8"),
        ("int8:int16", "int8", "int16"),
        ("e2m1:e4m3", "e2m1", "e4m3"),
        ("int4g32:float32", "int4g32", "float32"),
        ("int4g128:int8", "int4g128", "int8"),
        ("e2m1g16:fp16", "e2m1g16", "fp16"),
        ("int8:e4m3", "int8", "e4m3"),
        ("bf16:float32", "bf16", "float32"),
    ],
)
def test_two_names_are_weights_and_activations(
    name: str, weights: str, activations: str
) -> None:
    precision = parse_precision(name)
    assert (precision.weights.name, precision.activations.name) == (weights, activations)
    assert precision.name == name
    assert parse_precision(name.upper().replace(":", " : ")) == precision


def test_a_group_is_part_of_the_format_of_the_weights() -> None:
    weights = parse_precision("int4g32:float32").weights
    assert weights == IntFormat(bits=4, group=32)
    assert parse_precision("int4:float32").weights.group is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown format ''"),
        ("int9", "unknown format 'int9'"),
        (":int8", "unknown format ''"),
        ("int8:", "unknown format ''"),
        ("int4g32:", "unknown format ''"),
        ("int4:int8:int8", "'int4:int8:int8' names more than weights:activations"),
        ("uint4", "uint4 cannot be searched: ask for int4, which becomes uint4"),
        ("int4:uint8", "uint8 cannot be searched: ask for int8"),
        ("uint4:int8", "uint4 cannot be searched: ask for int4"),
        ("int8z3", "unknown format 'int8z3'"),
        ("uint8z3", "unknown format 'uint8z3'"),
        ("int4g32", "int4g32: activations have no groups; .* as in int4g32:float32"),
        ("int4:int4g32", "int4:int4g32: activations have no groups"),
        ("int4g32:int8g32", "int4g32:int8g32: activations have no groups"),
        ("int4g", "unknown format 'int4g'; .* with g16, g32, g64, g128, g256"),
        ("int4g0", "unknown format 'int4g0'"),
        ("int4g8:float32", "unknown format 'int4g8'"),
        ("int4g48:float32", "unknown format 'int4g48'"),
        ("int4g-32:float32", "unknown format 'int4g-32'"),
        ("int4g٣٢:float32", "unknown format 'int4g٣٢'"),
        ("int4g" + "9" * 5000, "unknown format 'int4g9"),
        ("fp16g32:float32", "unknown format 'fp16g32'"),
        ("float32:int8", "float32:int8: activations alone are not quantized"),
        ("fp16:int8", "fp16:int8: activations alone are not quantized"),
        ("bf16:e4m3", "bf16:e4m3: activations alone are not quantized"),
    ],
)
def test_every_other_name_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        parse_precision(name)
    assert "\n" not in str(error.value)


# -- what follows from the formats ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int5", True),
        ("int8", True),
        ("int7:int8", True),
        ("int8:int5", True),
        ("int4", False),
        ("int4:int8", False),
        ("int8:int4", False),
        ("int8:int16", False),
        ("int16", False),
        ("int8:float32", False),
        ("int8g32:int8", False),
        ("e4m3", False),
        ("float32", False),
    ],
)
def test_8_bit_integers_without_groups_are_multiplied_as_integers(
    name: str, expected: bool
) -> None:
    assert parse_precision(name).in_integers is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", False),
        ("int4:float32", False),
        ("int4g32:float32", False),
        ("float32", False),
        ("int4:fp16", True),
        ("e4m3:int8", True),
        ("int8:e4m3", True),
        ("bf16", True),
    ],
)
def test_a_mantissa_is_rounded_where_either_operand_has_one(name: str, expected: bool) -> None:
    assert parse_precision(name).needs_mantissa is expected


# -- spaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("int-s", ["int4", "int8"]),
        (" INT-L ", ["int4", "int5", "int6", "int7", "int8"]),
        ("fp-s", ["e2m1", "e4m3"]),
        ("int8,int4", ["int4", "int8"]),
        ("e4m3 bf16, INT4,, int8", ["int4", "e4m3", "int8", "bf16"]),
        ("int8,int8", ["int8"]),
        ("int8:int8 INT8", ["int8"]),
        ("int8,int4:int8,int4", ["int4", "int4:int8", "int8"]),
        # By the product of the bits, then by the bits of the weights.
        (
            "float32 int8:int16 int4g32:float32 int4:float32 int8 int4:int8 int2:int16",
            [
                *("int2:int16", "int4:int8", "int8", "int4:float32", "int4g32:float32"),
                *("int8:int16", "float32"),
            ],
        ),
    ],
)
def test_a_space_is_sorted_by_cost_without_repeats(text: str, names: list[str]) -> None:
    assert [precision.name for precision in parse_space(text)] == names


@pytest.mark.parametrize("name", SPACES)
def test_a_named_space_holds_what_it_names(name: str) -> None:
    assert {precision.name for precision in parse_space(name)} == set(SPACES[name])


def test_a_space_does_not_depend_on_the_order_of_its_names() -> None:
    names = [*PRECISIONS, "int4:int8", "int8:int4", "int4g32:float32", "int4g16:float32"]
    assert parse_space(",".join(names)) == parse_space(",".join(reversed(names)))
    assert list(parse_space(",".join(PRECISIONS))) == list(SEARCHED)


@pytest.mark.parametrize("text", ["", " ", ",,"])
def test_an_empty_space_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^the search space is empty$"):
        parse_space(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8,uint4", "uint4 cannot be searched: ask for int4"),
        ("int-xl", "unknown format 'int-xl'"),
        ("int-s,int8", "unknown format 'int-s'"),
        ("int8,int4g32", "int4g32: activations have no groups"),
        ("int4: int8", "unknown format ''"),
    ],
)
def test_a_space_with_a_name_that_cannot_be_searched_is_refused(
    text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_space(text)


# -- formats of weights and of activations apart --------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("int4,int8", ["int4", "int4:int8", "int8:int4", "int8"]),
        ("int8", ["int8"]),
        ("fp-s", ["e2m1", "e2m1:e4m3", "e4m3:e2m1", "e4m3"]),
        # A pair that was asked for stays as it is.
        (
            "int4,int8:int16,int8",
            ["int4", "int4:int8", "int8:int4", "int8", "int8:int16"],
        ),
        ("int4g32:float32,int8", ["int8", "int4g32:float32"]),
        # Activations alone are not quantized.
        ("int8,float32", ["int8", "int8:float32", "float32"]),
        ("int4,e4m3", ["int4", "int4:e4m3", "e4m3:int4", "e4m3"]),
    ],
)
def test_formats_that_are_chosen_apart_make_pairs(text: str, names: list[str]) -> None:
    assert [precision.name for precision in separated(parse_space(text))] == names


def test_formats_that_leave_a_tensor_may_stay_without_pairs() -> None:
    found = separated(parse_space("int4,int8,bf16,float32"), left=False)
    names = [precision.name for precision in found]
    assert names == ["int4", "int4:int8", "int8:int4", "int8", "bf16", "float32"]


@pytest.mark.parametrize(
    ("text", "apart", "words"),
    [
        ("int4,int8", False, "int4, int8"),
        ("int4,int8", True, "int4, int8 (weights and activations apart)"),
        ("int8,float32", True, "int8, float32"),
        ("int4,int8,bf16", True, "int4, int8 (weights and activations apart), bf16"),
        ("int4,int8,int4:int8", False, "int4, int4:int8, int8"),
        (
            "int4,int8:int16,int8",
            True,
            "int4, int8 (weights and activations apart), int8:int16",
        ),
    ],
)
def test_formats_of_which_every_pair_is_searched_are_named_once(
    text: str, apart: bool, words: str
) -> None:
    space = parse_space(text)
    assert in_words(separated(space, left=False) if apart else space) == words


@pytest.mark.parametrize("name", SPACES)
def test_a_named_space_has_every_pair_of_its_formats(name: str) -> None:
    pairs = separated(parse_space(name))
    assert len(pairs) == len(SPACES[name]) ** 2
    assert {(p.weights.name, p.activations.name) for p in pairs} == {
        (weights, activations) for weights in SPACES[name] for activations in SPACES[name]
    }
    assert [p.order for p in pairs] == sorted(p.order for p in pairs)
    assert separated(pairs) == pairs
    assert all(parse_precision(p.name) == p for p in pairs)


ANY = st.sampled_from(
    separated(
        parse_space(
            "int2 int4 int8 e2m1 e2m3 e3m2 e4m3 e5m2 bf16 float32 int4g16:float32"
            " int4g32:float32 int4g128:int8 int8g32:float32 e2m1g32:int8"
        )
    )
)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].bits <= 8 and n[0] != "u"])
def test_the_grid_of_a_more_precise_format_holds_the_other_on_some_scale(name: str) -> None:
    first = numbers(name)
    for other in FORMATS:
        fmt = FORMATS[other]
        if fmt.bits > 8 or (isinstance(fmt, IntFormat) and not fmt.signed):
            continue
        if parse_precision(name).as_precise_as(parse_precision(other)):
            scaled = ({2.0**n * x for x in numbers(other)} for n in range(-40, 41))
            assert any(each <= first for each in scaled), other


def numbers(name: str) -> set[float]:
    """All that a format can represent."""
    fmt = FORMATS[name]
    if isinstance(fmt, IntFormat):
        return set(map(float, range(int(fmt.min), int(fmt.max) + 1)))
    steps = [fmt.smallest * 2.0**n * m for n in range(40) for m in range(2 << fmt.mantissa)]
    found = {x for x in steps if x <= fmt.max}
    return found | {-x for x in found}


@given(ANY, ANY, ANY)
def test_precisions_are_ordered_in_part(a: Precision, b: Precision, c: Precision) -> None:
    assert a.as_precise_as(a)
    if a.as_precise_as(b) and b.as_precise_as(a):
        assert a == b
    if a.as_precise_as(b) and b.as_precise_as(c):
        assert a.as_precise_as(c)
    # The order of a space is one extension.
    if a.as_precise_as(b):
        assert a.order >= b.order


@pytest.mark.parametrize(
    ("first", "second", "either_way"),
    [
        ("int8", "int4", (True, False)),
        ("int4:int8", "int4", (True, False)),
        ("int4:int8", "int8:int4", (False, False)),
        ("int8", "e4m3", (False, False)),
        ("e4m3", "int4", (True, False)),
        ("e5m2", "e2m4", (False, False)),
        ("e5m2", "int6", (False, False)),
        ("int7", "e3m2", (False, False)),
        ("int8", "e2m4", (True, False)),
        ("e4m3:e5m2", "e4m2:e4m1", (True, False)),
        ("bf16", "fp16", (False, False)),
        ("float32", "int16", (True, False)),
        ("int4:e4m3", "int4:int8", (False, False)),
        ("int4g16:float32", "int4g32:float32", (True, False)),
        ("int4g32:float32", "int4:float32", (True, False)),
        ("int8:float32", "int4g32:float32", (True, False)),
        ("int8", "int4g32:float32", (False, False)),
    ],
)
def test_of_two_precisions_one_may_be_as_precise(
    first: str, second: str, either_way: tuple[bool, bool]
) -> None:
    a, b = parse_precision(first), parse_precision(second)
    assert (a.as_precise_as(b), b.as_precise_as(a)) == either_way
