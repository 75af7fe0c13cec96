"""Bring Gemm into one form, so that what follows has to know only that."""

import logging

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    changed_constant,
    constant_of,
    formula_for,
    is_standard,
    replace_node,
    require_opset,
    used_names,
)
from onnx_fliqs.passes._ops import Ops

__all__ = ["SimplifyGemmPass"]

logger = logging.getLogger(__name__)


class SimplifyGemmPass(ir.passes.InPlacePass):
    """Reduce Gemm to ``a · w + b`` with one constant bias per column.

    Before:  y = Gemm <alpha = 0.5, beta = 2.0, transA = 1> (a, w, c)    # c: [M,N]
    After:   t = Transpose (a);  p = Gemm (t, w');  y = Add (p, c')

    alpha goes into a constant operand, or where there is none becomes a Mul; beta goes into
    a constant c. transB stays: with a constant it costs nothing.

    Requires: opset >= 13; constants are initializers.
    Ensures: a Gemm of floats has neither alpha, beta nor transA; its third input is missing
        or a constant of shape [N]; results change by float32 rounding only; the graph's
        signature is unchanged.
    Idempotent: a Gemm of that form is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, in which Transpose and Add took fewer types."""
        require_opset(model, 13)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite what is not of the form, in the main graph and in subgraphs."""
        taken = used_names(model)
        found = [
            node
            for node in model.graph.all_nodes()
            if is_standard(node, "Gemm") and not _is_simple(node)
        ]
        count = sum([_simplify(node, taken) for node in found])
        logger.info("simplified %d Gemm nodes", count)
        return ir.passes.PassResult(model, modified=count > 0)


def _is_simple(node: ir.Node) -> bool:
    attributes = node.attributes
    if any(attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return False
    if attributes.get_int("transA", 0):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    array, width = constant_of(bias), _width(node)
    return array is not None and array.shape == (width,)


def _width(node: ir.Node) -> int | None:
    """The number of columns of the result, where it is known."""
    right, result = node.inputs[1], node.outputs[0]
    transposed = node.attributes.get_int("transB", 0)
    for value, axis in ((right, 0 if transposed else 1), (result, 1)):
        if value is not None and value.shape is not None:
            size = value.shape[axis]
            if isinstance(size, int):
                return size
    return None


def _simplify(node: ir.Node, taken: set[str]) -> bool:
    left, right = node.inputs[:2]
    values = (value for value in (left, right, *node.outputs) if value is not None)
    dtype = next((value.dtype for value in values if value.dtype), None)
    if left is None or right is None or dtype is None or not dtype.is_floating_point():
        return False
    op = formula_for(node)
    if node.attributes.get_int("transA", 0):
        array = constant_of(left)
        left = (
            op.Transpose(left, perm=[1, 0])
            if array is None
            else _changed(node, left, array.T, taken)
        )
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha != 1.0:
        left, right = _scaled(op, node, (left, right), alpha, taken)
    bias, addend = _bias(op, node, taken)
    transposed = node.attributes.get_int("transB", 0)
    product = op.Gemm(left, right, bias, transB=transposed)
    result = product if addend is None else op.Add(product, addend)
    replace_node(node, op, [result], heir=product)
    logger.debug("simplified %s", node.name)
    return True


def _scaled(
    op: Ops, node: ir.Node, operands: tuple[ir.Value, ir.Value], alpha: float, taken: set[str]
) -> tuple[ir.Value, ir.Value]:
    """The operands with alpha in one of them: in a constant, if there is one."""
    left, right = operands
    if (array := constant_of(right)) is not None:
        return left, _changed(node, right, _times(array, alpha), taken)
    if (array := constant_of(left)) is not None:
        return _changed(node, left, _times(array, alpha), taken), right
    return op.Mul(left, alpha), right


def _bias(op: Ops, node: ir.Node, taken: set[str]) -> tuple[ir.Value | None, ir.Value | None]:
    """The third input as a bias of shape [N], or as what has to be added afterwards."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    beta = node.attributes.get_float("beta", 1.0)
    if value is None or beta == 0.0:
        return None, None
    array = constant_of(value)
    if array is None:
        return None, value if beta == 1.0 else op.Mul(value, beta)
    scaled, width = _times(array, beta), _width(node)
    if width is not None and scaled.shape in ((), (1,), (width,), (1, 1), (1, width)):
        row = np.broadcast_to(scaled.reshape(-1), width)
        return _changed(node, value, row, taken), None
    return None, _changed(node, value, scaled, taken)


def _times(array: npt.NDArray[np.generic], factor: float) -> npt.NDArray[np.generic]:
    return (array.astype(np.float64) * factor).astype(array.dtype)


def _changed(
    node: ir.Node, value: ir.Value, array: npt.NDArray[np.generic], taken: set[str]
) -> ir.Value:
    return changed_constant(node, value, array.copy(), str(node.outputs[0].name), taken)
