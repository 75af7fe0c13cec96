"""Write down the padding that a node was told to work out by itself."""

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

__all__ = ["ResolveAutoPaddingPass"]

_PADDED: Final = ("Conv", "MaxPool", "AveragePool")


class ResolveAutoPaddingPass(ir.passes.InPlacePass):
    """Replace ``auto_pad`` of convolutions and pools by explicit ``pads``.

    Before:  y = Conv <auto_pad = "SAME_UPPER"> (x, w)      # w: 3x3
    After:   y = Conv <pads = [1, 1, 1, 1]> (x, w)

    ONNX Runtime's gradient of Conv takes SAME_UPPER and SAME_LOWER for no padding at all.

    Requires: inferred shapes.
    Ensures: no Conv, MaxPool or AveragePool whose spatial dimensions are known has
        ``auto_pad``; the outputs are the same; the graph's signature is unchanged.
    Idempotent: explicit padding is left alone, and so are nodes of unknown shape.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes of all graphs."""
        modified = False
        for node in model.graph.all_nodes():
            if node.domain or node.op_type not in _PADDED or "auto_pad" not in node.attributes:
                continue
            mode = node.attributes.get_string("auto_pad", "NOTSET")
            pads = _pads(node, mode) if mode in ("SAME_UPPER", "SAME_LOWER") else []
            if pads is None:
                continue
            modified = True
            del node.attributes["auto_pad"]
            if pads:
                node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        return ir.passes.PassResult(model, modified=modified)


def _pads(node: ir.Node, mode: str) -> list[int] | None:
    """Begins, then ends, of each spatial axis; None if a size is unknown."""
    sizes = _static(node.inputs[0])
    weight = _static(node.inputs[1]) if node.op_type == "Conv" else None
    kernel = node.attributes.get_ints("kernel_shape") or weight
    if sizes is None or kernel is None:
        return None
    ones = [1] * len(sizes)
    strides = node.attributes.get_ints("strides", ones)
    dilations = node.attributes.get_ints("dilations", ones)
    small, large = [], []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + (length - 1) * dilation + 1 - size, 0)
        small.append(total // 2)
        large.append(total - total // 2)
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


def _static(value: ir.Value | None) -> Sequence[int] | None:
    """The dimensions after the first two, if they are all numbers."""
    if value is None or value.shape is None:
        return None
    found = [size for size in list(value.shape)[2:] if isinstance(size, int)]
    return found if len(found) == len(value.shape) - 2 else None
