"""What the integer inputs of a model may be, as far as its graph tells.

Wide integers are indices, masks, lengths or switches. Made-up values of the wrong range would
be refused by the first Gather, so that a model of text could never be tried without data.
"""

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.signs import REARRANGING

__all__ = ["index_ranges"]

_PASSING: Final = REARRANGING | {"Cast", "Identity"}
"""Operators whose first output holds only the values of input 0."""
_WIDE: Final = frozenset(
    {
        *(ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
        *(ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
    }
)
_YES: Final = 1
"""Of a mask, a length or a step, of which nothing else is known."""


def index_ranges(model: ir.Model) -> dict[str, tuple[int, int]]:
    """The smallest and largest sensible value of each integer input, by its name.

    Indices into a table of known size may be all of it; a switch is a constant that it is
    compared with; everything else is 1. Inputs of 8 bits, which are pixels, are left out.
    """
    return {
        str(value.name): _range(value)
        for value in model.graph.inputs
        if value.dtype in _WIDE and not value.is_initializer()
    }


def _range(value: ir.Value) -> tuple[int, int]:
    sizes, switches = [], []
    for user, index in _readers(value):
        if (size := _indexed(user, index)) is not None:
            sizes.append(size)
        if user.op_type == "Equal":
            constant = constant_of(user.inputs[1 - index])
            if constant is not None and constant.size == 1:
                switches.append(int(constant.reshape(-1)[0]))
    if sizes:
        return 0, min(sizes) - 1
    return (switches[0], switches[0]) if switches else (_YES, _YES)


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Every node of ONNX that reads the value, also rearranged, and at which input."""
    pending, seen = [value], {value}
    while pending:
        for user, index in pending.pop().uses():
            if user.domain:
                continue
            yield user, index
            output = user.outputs[0]
            if user.op_type in _PASSING and index == 0 and output not in seen:
                seen.add(output)
                pending.append(output)


def _indexed(node: ir.Node, index: int) -> int | None:
    """How many entries the operand of a node may point at."""
    if node.op_type == "OneHot" and index == 0:
        depth = constant_of(node.inputs[1])
        return None if depth is None else int(depth.reshape(-1)[0])
    table = node.inputs[0]
    if node.op_type != "Gather" or index != 1 or table is None or table.shape is None:
        return None
    size = table.shape[node.attributes.get_int("axis", 0)]
    return size if isinstance(size, int) and size > 0 else None
