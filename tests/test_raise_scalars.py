"""Scalars get the rank of tensors that end in axes of one element."""

import onnx_ir as ir
import pytest

from onnx_fliqs.passes.raise_scalars import RaiseScalarsPass
from pass_models import CASES
from support import check_pass, model, ops
from test_passes_contract import with_shapes


def raised(text: str) -> ir.Model:
    return check_pass(RaiseScalarsPass(), with_shapes(model(text)))


def test_a_scalar_is_reshaped_once_for_all_its_readers() -> None:
    built = CASES["scalars_beside_tensors_that_end_in_one"].build()
    after = check_pass(RaiseScalarsPass(), with_shapes(built))
    # s, half and one; z reads s as it is.
    assert ops(after).count("Reshape") == 3
    for node in after.graph:
        if node.op_type in ("Mul", "Max", "Sub"):
            ranks = {len(value.shape or ()) for value in node.inputs if value is not None}
            assert ranks == ({4} if node.outputs[0].name != "z" else {1, 2})


@pytest.mark.parametrize(
    "text",
    [
        # Long rows; a tensor and not one number; an unknown size; one rank.
        "g (float[N,4] x, float s) => (float[N,4] y) { y = Mul (x, s) }",
        "g (float[N,4,1] x, float[4,1] s) => (float[N,4,1] y) { y = Mul (x, s) }",
        "g (float[N,M] x, float s) => (float[N,M] y) { y = Mul (x, s) }",
        "g (float[N,1] x, float[N,1] s) => (float[N,1] y) { y = Mul (x, s) }",
    ],
)
def test_what_is_fast_stays(text: str) -> None:
    assert ops(raised(text)) == ["Mul"]
