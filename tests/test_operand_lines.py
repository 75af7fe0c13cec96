"""Which choices differ in one operand alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.operand_lines import operand_lines
from onnx_fliqs.precision import parse_space, separated

FORMATS = ("int2", "int4", "int8", "int16", "e2m1", "e4m3", "float32")


@pytest.mark.parametrize(
    "space", ["int8", "int-l", "fp-l", "int4:int8,int8", "int4,int8,int4:int8", "int8,float32"]
)
def test_what_is_not_chosen_apart_is_one_line(space: str) -> None:
    choices = parse_space(space)
    (line,) = operand_lines(choices)
    assert line.choices == line.positions == tuple(range(len(choices)))
    assert not line.of_weights


@given(st.lists(st.sampled_from(FORMATS), min_size=2, max_size=7, unique=True))
def test_apart_each_line_has_every_format_of_its_operand_once(names: list[str]) -> None:
    choices = separated(parse_space(",".join(names)))
    lines = operand_lines(choices)
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
    weights, activations = operand_lines(choices)
    names = [precision.name for precision in choices]
    assert [names[c] for c in weights.choices] == ["int4:int8", "int8", "bf16", "float32"]
    assert [names[c] for c in activations.choices] == ["int8:int4", "int8", "bf16", "float32"]
    for line, operand in ((weights, "weights"), (activations, "activations")):
        for precision, position in zip(choices, line.positions, strict=True):
            taken = choices[line.choices[position]]
            assert getattr(taken, operand) == getattr(precision, operand)
