"""Pad works on codes where both sides have one grid."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs.passes.pad_codes import PadCodesPass
from support import check_pass, initializer, model, ops

_GRIDS = (
    "<float s = {0.25}, float t = {0.5}, uint8 z = {3}, uint8 o = {4}, float zero = {0.0},"
    " float one = {1.0}, int64[4] pads = {0, 1, 0, 2}>"
)


def graph(pad: str, scale: str = "s", point: str = "z", more: str = "") -> ir.Model:
    return model(
        f"""g (float[N,3] x) => (float[N,6] y) {_GRIDS} {{
            c = QuantizeLinear (x, s, z)
            d = DequantizeLinear (c, s, z)
            {more}
            [pad] p = {pad}
            e = QuantizeLinear (p, {scale}, {point})
            y = DequantizeLinear (e, {scale}, {point}) }}"""
    )


@pytest.mark.parametrize("pad", ["Pad (d, pads)", "Pad (d, pads, zero)"])
def test_zeros_are_padded_as_the_code_of_zero(pad: str) -> None:
    padded = check_pass(PadCodesPass(), graph(pad))
    assert ops(padded) == ["QuantizeLinear", "Pad", "DequantizeLinear"]
    (node,) = [node for node in padded.graph if node.op_type == "Pad"]
    assert node.name == "pad"
    assert node.inputs[2] is not None
    assert initializer(padded, str(node.inputs[2].name)) == np.uint8(3)


@pytest.mark.parametrize(
    "other",
    [
        graph("Pad (d, pads)", scale="t"),
        graph("Pad (d, pads)", point="o"),
        graph("Pad (d, pads, one)"),
        graph('Pad <mode = "edge"> (d, pads)'),
        graph("Pad (x, pads)"),
        graph("Pad (r, pads)", more="r = Relu (d)"),
    ],
)
def test_other_padding_stays(other: ir.Model) -> None:
    before = ops(other)
    result = PadCodesPass()(other)
    assert (ops(result.model), result.modified) == (before, False)
