"""Stores dequantized weights the way round that a float product reads them."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    changed_constant,
    constant_of,
    is_standard,
    only_reader,
    used_names,
)

__all__ = ["TransposeCompressedWeightsPass"]

_SCALE: Final = 1


class TransposeCompressedWeightsPass(ir.passes.InPlacePass):
    """Transpose stored codes, not the weight of a Gemm that reads floats beside them.

    Before:  w = DequantizeLinear <axis = 1, block_size = 32> (codes, scale)
             y = Gemm <transB = 1> (x, w, b)
    After:   w = DequantizeLinear <axis = 0, block_size = 32> (codes_t, scale_t)
             y = Gemm (x, w, b)

    Only in this form does ONNX Runtime leave the weight compressed (MatMulNBits); the other is
    dequantized in every run.

    Requires: codes, scales and zero points in initializers.
    Ensures: no Gemm transposes a weight that one DequantizeLinear makes for it alone, unless
        its other operand is dequantized as well; results and signature are unchanged.
    Idempotent: such a Gemm transposes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the nodes of the main graph."""
        taken = used_names(model)
        count = sum([_transpose(node, taken) for node in list(model.graph)])
        return ir.passes.PassResult(model, modified=count > 0)


def _transpose(gemm: ir.Node, taken: set[str]) -> bool:
    if not is_standard(gemm, "Gemm") or not gemm.attributes.get_int("transB", 0):
        return False
    first, weight = gemm.inputs[:2]
    maker = weight.producer() if weight is not None else None
    if weight is None or maker is None or not is_standard(maker, "DequantizeLinear"):
        return False
    beside = first.producer() if first is not None else None
    integer = beside is not None and is_standard(beside, "DequantizeLinear")
    constants = [constant_of(value) for value in maker.inputs if value is not None]
    if integer or only_reader(weight) is None or any(array is None for array in constants):
        return False
    for index, value in enumerate(maker.inputs):
        array = constant_of(value)
        if value is not None and array is not None and array.ndim == 2:
            flipped: npt.NDArray[Any] = np.ascontiguousarray(array.T)
            changed = changed_constant(maker, value, flipped, "transposed", taken)
            maker.replace_input_with(index, changed)
    if constants[_SCALE] is not None and constants[_SCALE].ndim:
        axis = 1 - maker.attributes.get_int("axis", 1) % 2
        maker.attributes.add(ir.AttrInt64("axis", axis))
    gemm.attributes.pop("transB")
    weight.shape = None if weight.shape is None else ir.Shape(list(weight.shape)[::-1])
    return True
