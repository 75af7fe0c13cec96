"""Which choices differ in one operand alone."""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.formats import Format, is_passthrough
from onnx_fliqs.operand_lines import operand_lines, references
from onnx_fliqs.precision import Precision, parse_space, separated


def distorted(choices: Sequence[Precision]) -> npt.NDArray[np.float64]:
    """What formats do to a tensor if bits are all that counts."""

    def of(fmt: Format) -> float:
        return 0.0 if is_passthrough(fmt) else 4.0**-fmt.bits

    return np.array([(of(p.weights), of(p.activations)) for p in choices])


FORMATS = ("int2", "int4", "int8", "int16", "e2m1", "e4m3", "float32")


@pytest.mark.parametrize(
    ("space", "of_weights"),
    [
        ("int8", False),
        ("int-l", False),
        ("fp-l", False),
        ("int4:int8,int8", True),
        ("int4,int8,int4:int8", False),
        ("int8,float32", False),
        ("int4:float32,int8:float32", True),
    ],
)
def test_what_is_not_chosen_apart_is_one_line(space: str, of_weights: bool) -> None:
    choices = parse_space(space)
    (line,) = operand_lines(choices, distorted(choices))
    assert line.choices == line.positions == tuple(range(len(choices)))
    assert line.of_weights == of_weights


def test_of_a_layer_without_activations_weights_change_alone() -> None:
    choices = parse_space("int-l")
    (line,) = operand_lines(choices, distorted(choices) * (1, 0))
    assert line.of_weights


@given(st.lists(st.sampled_from(FORMATS), min_size=2, max_size=7, unique=True))
def test_apart_each_line_has_every_format_of_its_operand_once(names: list[str]) -> None:
    choices = separated(parse_space(",".join(names)))
    lines = operand_lines(choices, distorted(choices))
    for line, operand, other in zip(
        lines, ("weights", "activations"), ("activations", "weights"), strict=True
    ):
        own = [getattr(choices[choice], operand) for choice in line.choices]
        assert len(set(own)) == len(own)
        assert len({getattr(choices[choice], other) for choice in line.choices}) == 1
        for precision, position in zip(choices, line.positions, strict=True):
            assert getattr(precision, operand) == own[position]
        bits = [fmt.bits for fmt in own]
        assert bits == sorted(bits)
    assert [line.of_weights for line in lines] == [True, False]


def test_what_leaves_both_operands_alone_ends_both_lines() -> None:
    choices = separated(parse_space("int4,int8,bf16,float32"), left=False)
    weights, activations = operand_lines(choices, distorted(choices))
    names = [precision.name for precision in choices]
    assert [names[c] for c in weights.choices] == ["int4:int8", "int8", "bf16", "float32"]
    assert [names[c] for c in activations.choices] == ["int8:int4", "int8", "bf16", "float32"]
    for line, operand in ((weights, "weights"), (activations, "activations")):
        for precision, position in zip(choices, line.positions, strict=True):
            taken = choices[line.choices[position]]
            assert getattr(taken, operand) == getattr(precision, operand)


@given(
    st.sampled_from(("int-l", "fp-l", "int4,e2m1,int8,e4m3,e5m2", "int2,int4,int8,float32")),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_lines_are_ordered_by_what_was_measured_of_the_tensors(
    space: str, apart: bool, chance: random.Random
) -> None:
    choices = separated(parse_space(space)) if apart else parse_space(space)
    formats = {
        fmt for precision in choices for fmt in (precision.weights, precision.activations)
    }
    of = {fmt: 0.0 if is_passthrough(fmt) else chance.random() for fmt in formats}
    rows = np.array([(of[p.weights], of[p.activations]) for p in choices])
    lines = operand_lines(choices, rows)
    assert len(lines) == (2 if apart else 1)
    for line in lines:
        along = rows[np.ix_(line.choices, line.operands)].sum(axis=1)
        assert (np.diff(along) <= 0).all()
    (reference,) = references([lines])
    assert rows[reference].sum() == rows.sum(axis=1).min()
    for line in lines:
        # Activations have one format only beside weights that stay float: the choices differ.
        ends = rows[[line.choices[-1], reference]][:, list(line.operands)]
        assert (ends[0] == ends[1]).all()


def test_of_formats_that_distort_alike_the_most_precise_is_the_reference() -> None:
    for choices in (parse_space("int-l"), separated(parse_space("int-l"))):
        lines = operand_lines(choices, np.zeros((len(choices), 2)))
        assert references([lines]) == (len(choices) - 1,)
