"""Removes what a quantized range says as well."""

import logging

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of, is_standard, only_reader

__all__ = ["RemoveRedundantClipsPass"]

logger = logging.getLogger(__name__)


class RemoveRedundantClipsPass(ir.passes.InPlacePass):
    """Remove each Relu or Clip that cuts off nothing but what saturates anyway.

    Before:  a = Conv (x, w);  r = Relu (a);  q = QuantizeLinear (r, scale, zero_point)
    After:   a = Conv (x, w);  q = QuantizeLinear (a, scale, zero_point)

    with the least code of an unsigned type, 0, as zero point. A Clip goes where its range
    holds that of the codes. One that reads a dequantized tensor stays: it is an operator of
    its own, not the end of another.

    Requires: nothing.
    Ensures: signature and outputs are unchanged, to the last bit.
    Idempotent: what can go is gone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every QuantizeLinear."""
        count = 0
        for node in list(model.graph):
            clip = _clip_before(node)
            if clip is None:
                continue
            node.replace_input_with(0, clip.inputs[0])
            model.graph.remove(clip, safe=True)
            count += 1
        logger.info("removed %d clips", count)
        return ir.passes.PassResult(model, modified=count > 0)


def _clip_before(quantize: ir.Node) -> ir.Node | None:
    """The redundant operator that a QuantizeLinear reads."""
    value = quantize.inputs[0] if is_standard(quantize, "QuantizeLinear") else None
    clip = value.producer() if value is not None else None
    if value is None or clip is None or only_reader(value) is None:
        return None
    if not is_standard(clip, "Relu", "Clip") or clip.inputs[0] is None:
        return None
    maker = clip.inputs[0].producer()
    if maker is None or maker.op_type == "DequantizeLinear":
        return None
    codes = _range(quantize)
    if codes is None or only_reader(clip.inputs[0]) is None:
        return None
    low, high = _bounds(clip)
    return clip if low <= codes[0] and codes[1] <= high else None


def _range(quantize: ir.Node) -> tuple[np.float32, np.float32] | None:
    """The least and the largest number of one scale, if it is unsigned of 8 or 16 bits."""
    scale = constant_of(quantize.inputs[1])
    point = constant_of(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if scale is None or point is None or scale.size != 1 or point.size != 1:
        return None
    if point.dtype not in (np.uint8, np.uint16):
        return None
    zero = int(point.item())
    largest = (1 << 8 * point.dtype.itemsize) - 1
    step = np.float32(scale.item())
    return np.float32(-zero) * step, np.float32(largest - zero) * step


def _bounds(clip: ir.Node) -> tuple[float, float]:
    """Between which numbers it cuts; where a bound is computed, nothing lies between."""
    if clip.op_type == "Relu":
        return 0.0, np.inf
    found = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = clip.inputs[index] if index < len(clip.inputs) else None
        bound = constant_of(value)
        unknown = np.inf if index == 1 else -np.inf
        if value is None:
            found.append(default)
        else:
            found.append(unknown if bound is None else float(np.asarray(bound).item()))
    return found[0], found[1]
