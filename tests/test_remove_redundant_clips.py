"""A Relu or Clip goes where the codes behind it saturate at the same numbers."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs.passes.remove_redundant_clips import RemoveRedundantClipsPass
from support import check_pass, f32, model, ops


def quantized(
    clip: str, scale: float, zero_point: int, dtype: type[np.generic], before: str = "Neg"
) -> ir.Model:
    text = f"""g (float[N,400] x) => (float[N,400] y) {{
        a = {before} (x)
        r = {clip}
        q = QuantizeLinear (r, s, z)
        y = DequantizeLinear (q, s, z) }}"""
    given = model(text, constants={"s": scale, "low": 0.0, "high": 6.0, "z": 0.0})
    point = ir.tensor(np.array(zero_point, dtype), name="z")
    given.graph.initializers["z"].const_value = point
    given.graph.initializers["z"].dtype = point.dtype
    given.graph.initializers["z"].shape = ir.Shape(())
    return ir.from_proto(ir.to_proto(given))


FEEDS = {"x": f32(np.append(np.linspace(-9, 9, 398), [6.0, -6.0])[None])}
STEP = 6 / 255


@pytest.mark.parametrize(
    ("clip", "scale", "zero_point", "dtype", "goes"),
    [
        ("Relu (a)", 0.03, 0, np.uint8, True),
        ("Relu (a)", 0.0001, 0, np.uint16, True),
        ("Relu (a)", 0.03, 1, np.uint8, False),
        ("Relu (a)", 0.03, 0, np.int8, False),
        ("Clip (a, low, high)", STEP * 0.999, 0, np.uint8, True),
        ("Clip (a, low, high)", STEP * 1.001, 0, np.uint8, False),
        ("Clip (a, , high)", STEP * 0.999, 100, np.uint8, True),
        ("Clip (a, low)", 0.1, 0, np.uint8, True),
        ("Clip (a, low)", 0.1, 9, np.uint8, False),
    ],
)
def test_it_goes_where_the_codes_saturate(
    clip: str, scale: float, zero_point: int, dtype: type[np.generic], goes: bool
) -> None:
    after = check_pass(
        RemoveRedundantClipsPass(), quantized(clip, scale, zero_point, dtype), FEEDS
    )
    assert (clip.split()[0] not in ops(after)) is goes


def test_a_bound_that_is_computed_is_not_known() -> None:
    given = quantized("Clip (a, top)", 0.1, 0, np.uint8)
    top = ir.node("ReduceMin", [given.graph.inputs[0]], {"keepdims": 0}, name="top")
    top.outputs[0].name = "top"
    clip = next(node for node in given.graph if node.op_type == "Clip")
    given.graph.insert_before(clip, top)
    clip.replace_input_with(1, top.outputs[0])
    assert "Clip" in ops(check_pass(RemoveRedundantClipsPass(), given, FEEDS))


def test_an_operator_of_its_own_stays() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        p = QuantizeLinear (x, s, z)
        a = DequantizeLinear (p, s, z)
        r = Relu (a)
        q = QuantizeLinear (r, s, zero)
        y = DequantizeLinear (q, s, zero) }"""
    given = model(text, constants={"s": 0.1, "z": 0.0, "zero": 0.0})
    for name, number in (("z", 100), ("zero", 0)):
        point = ir.tensor(np.array(number, np.uint8), name=name)
        given.graph.initializers[name].const_value = point
        given.graph.initializers[name].dtype = point.dtype
    given = ir.from_proto(ir.to_proto(given))
    assert "Relu" in ops(check_pass(RemoveRedundantClipsPass(), given))


def test_what_others_read_stays() -> None:
    text = """g (float[N,4] x) => (float[N,4] y, float[N,4] r) {
        a = Neg (x)
        r = Relu (a)
        q = QuantizeLinear (r, s, z)
        y = DequantizeLinear (q, s, z) }"""
    given = model(text, constants={"s": 0.1, "z": 0.0})
    point = ir.tensor(np.array(0, np.uint8), name="z")
    given.graph.initializers["z"].const_value = point
    given.graph.initializers["z"].dtype = point.dtype
    given = ir.from_proto(ir.to_proto(given))
    assert "Relu" in ops(check_pass(RemoveRedundantClipsPass(), given))
