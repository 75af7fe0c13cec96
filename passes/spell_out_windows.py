"""Write down how convolutions and pooling move over their input."""

from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._graph import is_standard

__all__ = ["SpellOutWindowsPass"]

_CONVOLUTIONS: Final = ("Conv", "ConvTranspose")
_POOLS: Final = ("AveragePool", "MaxPool")


class SpellOutWindowsPass(ir.passes.InPlacePass):
    """Give convolutions and pooling the attributes that they leave at their defaults.

    Before:  y = Conv (x, w)
    After:   y = Conv <dilations = [1, 1], group = 1, kernel_shape = [3, 3],
                       pads = [0, 0, 0, 0], strides = [1, 1]> (x, w)

    Tools for hardware read these attributes where they need them, not ONNX's defaults: those
    of QONNX and FINN fail without ``kernel_shape``.

    Requires: nothing.
    Ensures: each such node whose number of axes is known has ``kernel_shape``, ``strides``
        and, unless ``auto_pad`` computes it, ``pads``; convolutions have ``dilations`` and
        ``group``.
    Idempotent: what is there is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add what is missing, node by node."""
        modified = False
        for node in model.graph.all_nodes():
            if is_standard(node, *_CONVOLUTIONS, *_POOLS):
                for attribute in _defaults(node):
                    if attribute.name not in node.attributes:
                        node.attributes.add(attribute)
                        modified = True
        return ir.passes.PassResult(model, modified=modified)


def _defaults(node: ir.Node) -> list[ir.Attr]:
    """What ONNX says that missing attributes mean; nothing where that is not known."""
    kernel = node.attributes.get_ints("kernel_shape")
    weight = node.inputs[1] if node.op_type in _CONVOLUTIONS else None
    if kernel is None and weight is not None and weight.shape is not None:
        kernel = [size for size in weight.shape[2:] if isinstance(size, int)]
        kernel = kernel if len(kernel) == len(weight.shape) - 2 else None
    if not kernel:
        return []
    ones = [1] * len(kernel)
    found = [ir.AttrInt64s("kernel_shape", kernel), ir.AttrInt64s("strides", ones)]
    if node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET":
        found.append(ir.AttrInt64s("pads", [0] * 2 * len(kernel)))
    if node.op_type in _CONVOLUTIONS:
        found += [ir.AttrInt64s("dilations", ones), ir.AttrInt64("group", 1)]
    return found
